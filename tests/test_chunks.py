import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_mbdpo import MBDPO, task_set
from sb3_mbdpo.chunks import ALLOWED, convert_chunks, read_chunk
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.task_names import MT30, MT80

CHUNKS = Path(__file__).parent / "data" / "chunks"


def save(path: Path, tensors: Any) -> Path:
    th.save(tensors, path)
    return path


def tensors(episodes: int = 2, rows: int = 4, obs: int = 24, actions: int = 6) -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(0)
    action, reward = th.rand(episodes, rows, actions, generator=generator), th.rand(episodes, rows, generator=generator)
    action[:, 0] = reward[:, 0] = th.nan
    task = th.arange(episodes, dtype=th.int32)[:, None].expand(-1, rows).contiguous()
    return {"obs": th.rand(episodes, rows, obs, generator=generator), "action": action, "reward": reward, "task": task}


@pytest.mark.parametrize(
    ("name", "shape", "tasks"), [("chunk_mt30.pt", (4, 501, 24), MT30), ("chunk_mt80.pt", (6, 101, 39), MT80)]
)
def test_released_chunks_become_shards(
    tmp_path: Path, name: str, shape: tuple[int, ...], tasks: tuple[str, ...]
) -> None:
    chunk = read_chunk(CHUNKS / name)
    assert chunk["obs"].shape == shape
    data = ShardedDataset(convert_chunks([CHUNKS / name], tmp_path / "set"), horizon=2, seed=0)
    assert (data.n_episodes, len(data)) == (shape[0], shape[0] * (shape[1] - 1))
    assert tuple(task.name for task in data.tasks) == tasks
    # The tasks' own time limits: mt80 holds episodes of 500 decisions in pieces
    assert {task.name: task.max_episode_length for task in data.tasks} == {
        name: 500 if name in MT30 else 100 for name in tasks
    }
    assert not data.has_terminations()
    samples = data.sample(64)
    assert isinstance(samples.observations, th.Tensor)
    assert samples.task is not None
    assert samples.observations.isfinite().all()
    for b in range(64):
        match = (chunk["obs"] == samples.observations[0, b]).all(-1).nonzero()
        assert len(match) == 1
        episode, row = match[0].tolist()
        assert samples.task[b] == chunk["task"][episode, row]
        valid = int(samples.masks[:, b].sum())
        assert valid == min(2, shape[1] - 1 - row)
        # The action and reward of a transition stand in the row that it led to
        for part, key in (
            (samples.actions, "action"),
            (samples.rewards[..., 0], "reward"),
            (samples.observations[1:], "obs"),
        ):
            assert th.equal(part[:valid, b], chunk[key][episode, row + 1 : row + 1 + valid])
    assert "tensordict" not in sys.modules


def test_models_of_released_chunks_have_the_discounts_of_their_tasks(tmp_path: Path) -> None:
    path = convert_chunks([CHUNKS / "chunk_mt80.pt"], tmp_path / "set")
    model = MBDPO.from_minari(ShardedDataset(path), preset="debug", device="cpu")
    theirs = {task.name: (task.episode_length, task.discount) for task in task_set("mt80")}
    assert model.tasks is not None
    found = {task.name: (task.episode_length, task.discount) for task in model.tasks}
    assert found == {name: theirs[name] for name in found} and {limit for limit, _ in found.values()} == {500, 100}


def test_several_files_at_once_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [save(tmp_path / f"{k}.pt", tensors(k + 1)) for k in range(3)]
    path = convert_chunks(files, tmp_path / "set", shard_bytes=500)
    data = ShardedDataset(path)
    assert (data.n_episodes, len(data)) == (6, 18)
    assert [task.episodes for task in data.tasks[:3]] == [3, 2, 1]
    before = (path / "description.json").stat().st_mtime_ns
    convert_chunks(files[::-1], path)
    assert (path / "description.json").stat().st_mtime_ns == before
    save(files[0], tensors(5))
    assert ShardedDataset(convert_chunks(files, path)).n_episodes == 10


def test_what_was_not_finished_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "0.pt", tensors(3))
    monkeypatch.setattr("sb3_mbdpo.chunks.BLOCK_BYTES", 1)
    add, calls = "sb3_mbdpo.shard_writer.ShardWriter.add_block", []

    def stop(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(add, stop)
        convert_chunks([file], tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == ["0.pt"]
    assert ShardedDataset(convert_chunks([file], tmp_path / "set")).n_episodes == 3


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of the file was run",)


def harmed(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (tensors() | changes).items() if value is not None}


def edited(name: str, index: Any, value: float) -> dict[str, th.Tensor]:
    changed = tensors()
    changed[name][index] = value
    return changed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (harmed(reward=None), r"holds \['action', 'obs', 'task'\]"),
        (harmed(extra=th.zeros(2)), "holds"),
        (th.zeros(3), "holds Tensor"),
        (Evil(), "is no chunk"),
        (harmed(obs=th.zeros(2, 4)), "'obs' is torch.float32"),
        (harmed(task=th.zeros(2, 4)), "'task' is torch.float32"),
        (harmed(reward=[1.0]), "'reward' is list"),
        (harmed(reward=th.zeros(2, 3)), "do not fit together"),
        (tensors(rows=1), "do not fit together"),
        (tensors(obs=25), "convert the files of one set"),
        (edited("reward", (1, 2), th.nan), "episode 1 has rewards"),
        (edited("obs", (0, 0), th.inf), "episode 0 has observations"),
        (edited("action", (1, 3), 1.5), r"episode 1 has actions outside of \[-1, 1\]"),
        (edited("action", (1, 3), th.nan), "episode 1 has actions"),
        (edited("task", (0, 2), 3), "episode 0 has several tasks"),
        (edited("task", 1, 30), "episode 1 has a task that is none of the 30"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_chunk(tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save(tmp_path / "0.pt", tensors()), save(tmp_path / "1.pt", content)
    with pytest.raises(ValueError, match=message) as raised:
        convert_chunks([good, bad], tmp_path / "set")
    assert "1.pt" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0.pt", "1.pt"]
    assert "code of the file" not in capsys.readouterr().out


def test_files_that_are_cut_short_pickled_or_missing(tmp_path: Path) -> None:
    content = (CHUNKS / "chunk_mt30.pt").read_bytes()
    for name, data in {
        "cut": content[:1000],
        "text": b"hello",
        "pickle": pickle.dumps({"obs": 1}),
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is no chunk of mt30 or mt80, or is cut short"):
            read_chunk(tmp_path / name)
    with pytest.raises(ValueError, match="is missing"):
        read_chunk(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="No chunk file"):
        convert_chunks([], tmp_path / "set")


def test_sets_are_not_mixed(tmp_path: Path) -> None:
    files = [shutil.copy(CHUNKS / f"chunk_{name}.pt", tmp_path) for name in ("mt30", "mt80")]
    with pytest.raises(ValueError, match="convert the files of one set at a time"):
        convert_chunks(files, tmp_path / "set")


def test_one_file_may_be_given_alone(tmp_path: Path) -> None:
    alone, listed = (CHUNKS / "chunk_mt30.pt", [CHUNKS / "chunk_mt30.pt"])
    assert len(ShardedDataset(convert_chunks(str(alone), tmp_path / "a"))) == len(
        ShardedDataset(convert_chunks(listed, tmp_path / "b"))
    )


def test_only_two_names_are_allowed_and_only_while_reading() -> None:
    assert [name for _, name in ALLOWED] == ["tensordict._td.TensorDict", "tensordict._reductions._make_td"]
    before = set(th.serialization.get_safe_globals())
    read_chunk(CHUNKS / "chunk_mt30.pt")
    assert set(th.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        th.load(CHUNKS / "chunk_mt30.pt", weights_only=True)


def test_own_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass task_names"):
        convert_chunks([save(tmp_path / "0.pt", tensors(obs=7))], tmp_path / "set")
    path = convert_chunks([save(tmp_path / "0.pt", tensors(obs=7))], tmp_path / "set", task_names=["a", "b"])
    data = ShardedDataset(path, task_sampling="balanced", seed=0)
    assert [task.name for task in data.tasks] == ["a", "b"]
    assert np.bincount(data.sample(100).task).min() > 30
