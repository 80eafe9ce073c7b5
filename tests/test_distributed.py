"""Several processes that learn what one does."""

import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch as th
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sb3_mbdpo import MBDPO
from sb3_mbdpo.distributed import launched_ranks, process_group
from sb3_mbdpo.ranks import ALONE, Ranks, described
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.updates import Learner
from tests.episodes import numbered, write
from tests.fakes import ToyEnv
from tests.processes import command, launch, learn, messages, toy_model, toy_shards

STEPS = 8
SMALL = [
    "--preset",
    "debug",
    "--batch-size",
    "12",
    "--seed",
    "0",
    "--device",
    "cpu",
    "--verbose",
    "0",
    "--timeout",
    "1",
]
# Three processes share them too
SMALL += ["--set", "score_batch_size=6", "buffer_size=100"]


def weights_of(model: MBDPO) -> dict[str, th.Tensor]:
    return model.policy.state_dict()


def difference(one: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- the same as one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_two_processes_learn_what_one_does(tmp_path: Path, n_tasks: int) -> None:
    data = toy_shards(tmp_path / "data", n_tasks)
    # At the start the energy's last bias has no gradient but rounding, which Adam's usual 1e-8 would make a whole step
    policy = {"dropout": 0.1, "optimizer_kwargs": {"eps": 1e-5}}
    kwargs: dict[str, Any] = {"policy_kwargs": policy, "verbose": 1}
    alone = toy_model(data, **kwargs).learn_offline(ShardedDataset(data), STEPS, log_interval=2)
    start = toy_model(data, **kwargs).policy.state_dict()
    spoke = launch(learn, 2, data, tmp_path / "model.zip", STEPS, kwargs)
    together = MBDPO.load(tmp_path / "model.zip", device="cpu")
    assert difference(alone.policy.state_dict(), together.policy.state_dict()) < 1e-5
    # Everything has moved: energy, score network and running statistics with the rest
    changed = [name for name, value in start.items() if not th.equal(value, weights_of(together)[name])]
    moved = {name.removeprefix("world_model.").split(".")[0] for name in changed}
    assert {"encoder", "dynamics", "critics", "prior", "energy", "score", "energy_mean", "energy_std"} <= moved
    assert (together.num_timesteps, together._n_updates) == (STEPS, STEPS)
    # The first one alone logs
    assert spoke == [True, False]


# --- going on after a process has died ------------------------------------------------------------------------------


def test_a_killed_process_costs_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    """Under torchrun's own agent: three processes, one of which is killed at step 6, after the checkpoint at 4."""
    data = toy_shards(tmp_path / "data", 3)
    for name, killed_at in (("whole", None), ("killed", 6)):
        assert set(restarting(3, pretraining, data, tmp_path / name, killed_at)) == {0, 1, 2}
    whole, killed = (MBDPO.load(tmp_path / name, device="cpu") for name in ("whole", "killed"))
    assert killed.num_timesteps == 9 and (tmp_path / "killed.died").read_text() == "6"
    assert difference(weights_of(whole), weights_of(killed)) == 0


def restarting(size: int, *arguments: Any) -> dict[int, Any]:
    """As ``torchrun --nproc-per-node SIZE --max-restarts 1`` does."""
    config = LaunchConfig(
        1,
        1,
        size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=1,
        start_method="forkserver",
        monitor_interval=0.05,
        local_addr="127.0.0.1",
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        return elastic_launch(config, arguments[0])(*arguments[1:])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def pretraining(data: Path, saved: Path, killed_at: int | None) -> int:
    th.set_num_threads(1)
    update = Learner.update
    died = saved.with_suffix(".died")

    def dying(self: Learner, samples: Any, index: int = 0) -> Any:
        if index == killed_at and os.environ["RANK"] == "1" and not died.exists():
            died.write_text(str(index))
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, samples, index)

    Learner.update = dying  # type: ignore[method-assign]
    code, _ = command([str(data), "--steps", "9", "--save", str(saved), "--checkpoint-every", "4", *SMALL])
    if code:
        sys.exit(code)
    return int(os.environ["RANK"])


def test_those_who_lose_a_process_end_too(tmp_path: Path) -> None:
    data = toy_shards(tmp_path / "data")
    codes = launch(leaving, 2, data, tmp_path / "model")
    assert codes[1] is None and codes[0][0] == 1
    assert "lost contact with the others" in codes[0][1] and "last checkpoint" in codes[0][1]
    assert MBDPO.load(tmp_path / "model", device="cpu").num_timesteps == 2


def leaving(data: Path, saved: Path) -> tuple[int, str]:
    update = Learner.update

    def last(self: Learner, samples: Any, index: int = 0) -> Any:
        if index == 3 and os.environ["RANK"] == "1":
            os._exit(7)
        return update(self, samples, index)

    Learner.update = last  # type: ignore[method-assign]
    return command([str(data), "--steps", "9", "--save", str(saved), "--checkpoint-every", "2", *SMALL])


# --- what cannot work -----------------------------------------------------------------------------------------------


def test_a_full_disk_at_the_first_process_ends_all(tmp_path: Path) -> None:
    data, file = toy_shards(tmp_path / "data"), tmp_path / "file"
    results = launch(blocking, 2, data, file)
    for code, said in results:
        assert code == 1 and str(file) in said
    assert "process 0 has failed" in results[1][1]
    # What is in the way from the start is told by each of them
    results = launch(blocking, 2, data, file)
    assert [code for code, _ in results] == [2, 2] and all("is no folder" in said for _, said in results)


def blocking(data: Path, file: Path) -> tuple[int, str]:
    """Where the first checkpoint goes, something else has come to be by then."""
    update = Learner.update

    def block(self: Learner, samples: Any, index: int = 0) -> Any:
        if index == 1 and os.environ["RANK"] == "0":
            file.write_text("a file, no folder")
        return update(self, samples, index)

    Learner.update = block  # type: ignore[method-assign]
    return command([str(data), "--steps", "9", "--save", f"{file}/model", "--checkpoint-every", "2", *SMALL])


def test_what_is_refused_in_every_process(tmp_path: Path) -> None:
    paths = [toy_shards(tmp_path / "one"), toy_shards(tmp_path / "several", 3)]
    told = launch(messages, 2, REFUSED, paths)
    for found in told:
        assert len(found) == len(REFUSED)
        for message, case in zip(found, REFUSED, strict=True):
            assert (case.__doc__ or "") in message, message
    assert all("process 1" in message for message in told[0][:5])


def batches(ranks: Ranks, paths: list[Path]) -> None:
    """batch_size (8 in process 0, 10 in process 1)"""
    toy_model(paths[0], batch_size=8 + 2 * ranks.rank).learn_offline(ShardedDataset(paths[0]), 2, ranks=ranks)


def arguments(ranks: Ranks, paths: list[Path]) -> None:
    """energy_coef (0.01 in process 0, 0.5 in process 1)"""
    kwargs: dict[str, Any] = {"energy_coef": 0.5, "learning_rate": lambda left: left} if ranks.rank else {}
    toy_model(paths[0], **kwargs).learn_offline(ShardedDataset(paths[0]), 2, ranks=ranks)


def steps(ranks: Ranks, paths: list[Path]) -> None:
    """gradient steps to do (2 in process 0, 3 in process 1)"""
    toy_model(paths[0]).learn_offline(ShardedDataset(paths[0]), 2 + ranks.rank, ranks=ranks)


def data_of_others(ranks: Ranks, paths: list[Path]) -> None:
    """same data ("""
    other = (
        toy_shards(paths[0].parent / "other")
        if not ranks.rank
        else write(paths[0].parent / "shorter", numbered((4, 3)))
    )
    toy_model(paths[0]).learn_offline(ShardedDataset(other), 2, ranks=ranks)


def broken_data(ranks: Ranks, paths: list[Path]) -> None:
    """this model of a single one"""
    data: Any = ShardedDataset(paths[0]) if not ranks.rank else ShardedDataset(paths[1])
    toy_model(paths[0]).learn_offline(data, 2, ranks=ranks)


def uneven(ranks: Ranks, paths: list[Path]) -> None:
    """batch_size (7) must be a multiple of the number of processes (2), which share it: pass batch_size=6 or 8"""
    toy_model(paths[0], batch_size=7).learn_offline(ShardedDataset(paths[0]), 2, ranks=ranks)


def uneven_score(ranks: Ranks, paths: list[Path]) -> None:
    """score_batch_size (3) must be a multiple"""
    toy_model(paths[0], score_batch_size=3).learn_offline(ShardedDataset(paths[0]), 2, ranks=ranks)


def callback(ranks: Ranks, paths: list[Path]) -> None:
    """no room"""

    def full(*_: Any) -> bool:
        raise OSError("no room")

    toy_model(paths[0]).learn_offline(ShardedDataset(paths[0]), 2, full, ranks=ranks)


def drift(ranks: Ranks, paths: list[Path]) -> None:
    """same weights ("""

    def change(local: dict[str, Any], _: dict[str, Any]) -> bool:
        local["self"].policy.world_model.energy_mean.add_(1)
        return True

    toy_model(paths[0]).learn_offline(ShardedDataset(paths[0]), 2, change, log_interval=1, ranks=ranks)


def nothing_wrong(ranks: Ranks, paths: list[Path]) -> None:
    """nothing"""
    # Without a seed: all begin with the first one's weights and draws; stopping is for all
    model = toy_model(paths[1], seed=None)
    model.learn_offline(ShardedDataset(paths[1]), 9, lambda *_: model.num_timesteps < 4, log_interval=1, ranks=ranks)
    assert model.num_timesteps == 4


REFUSED = [batches, arguments, steps, data_of_others, broken_data, uneven, uneven_score, callback, drift, nothing_wrong]


# --- alone ------------------------------------------------------------------------------------------------------------


def test_rows_of_flattened_dimensions_are_the_same_choice() -> None:
    whole = th.arange(3 * 8 * 2).view(3, 8, 2)
    for rank in range(4):
        ranks = Ranks(rank, 4)
        rows = ranks.rows(whole, 1)
        assert th.equal(rows.flatten(0, 1), ranks.rows(whole.flatten(0, 1)))
        # Positions in the flattened whole are found again at the same numbers
        found = ranks.positions(th.arange(whole.numel()), 2)
        assert found is not None and th.equal(rows.flatten()[found], rows.flatten())
    assert ALONE.rows(whole) is whole and ALONE.sum(whole) is whole and ALONE.gather(whole) is whole


def test_environments_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group() as ranks:
        assert ranks == ALONE
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="but not WORLD_SIZE, LOCAL_RANK"):
        launched_ranks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_ranks() == ALONE


def test_descriptions_are_the_same_in_every_process() -> None:
    assert described(lambda: 0) == described(lambda: 1)
    assert described({"b": (1, None), "a": th.nn.SiLU}) == "{'a': torch.nn.modules.activation.SiLU, 'b': [1, None]}"
    assert described(ToyEnv()) == "tests.fakes.ToyEnv"
