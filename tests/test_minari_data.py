import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbdpo.minari_data import convert_minari
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import IMAGE, MIXED, UNEVEN, VECTOR
from tests.recordings import minari, record, recorded

pytestmark = pytest.mark.usefixtures("minari_cache")
SPACES = [VECTOR, spaces.Box(-1, 1, (3,), np.float64), IMAGE, MIXED, spaces.Discrete(4), spaces.MultiDiscrete([3, 4])]


def broken(episode: int = 1, **changes: Any) -> list[Any]:
    """Recorded episodes of which one has other entries: name -> function that changes them."""
    episodes = recorded()
    values = {name: change(np.array(getattr(episodes[episode], name))) for name, change in changes.items()}
    episodes[episode] = dataclasses.replace(episodes[episode], **values)
    return episodes


def put(index: Any, value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_windows_are_those_of_the_data_set(space: spaces.Space, data_format: str) -> None:
    episodes = recorded(observation_space=space)
    record("test/toy-v0", episodes, space, data_format=data_format)
    data = ShardedDataset(convert_minari("test/toy-v0"), horizon=2, seed=0)
    assert (data.n_episodes, len(data), data.has_terminations(), data.multitask) == (3, 14, True, False)
    samples = data.sample(80)
    assert samples.task is None
    seen = set()
    for b in range(80):
        e, t = divmod(int(samples.rewards[0, b, 0]), 100)
        seen.add((e, t))
        valid = int(samples.masks[:, b].sum())
        assert valid == min(2, len(episodes[e].rewards) - t)
        low, high = UNEVEN.low, UNEVEN.high
        scaled = 2 * (episodes[e].actions[t : t + valid] - low) / (high - low) - 1
        np.testing.assert_allclose(samples.actions[:valid, b], scaled, atol=1e-6)
        assert samples.terminations[valid - 1, b] == float(e == 0 and t + valid == 5)
        parts = samples.observations if isinstance(samples.observations, dict) else {None: samples.observations}
        for key, found in parts.items():
            wanted = episodes[e].observations if key is None else episodes[e].observations[key]
            wanted = np.asarray(wanted)[t : t + valid + 1]
            if wanted.ndim == 4:
                wanted = wanted.transpose(0, 3, 1, 2)
                assert found.dtype == th.uint8
            np.testing.assert_allclose(found[: valid + 1, b].numpy().reshape(wanted.shape), wanted, atol=1e-7)
    assert len(seen) == 14
    if space == IMAGE:
        assert data.observation_space.shape == (3, 36, 36)


def test_lossy_images_come_back_as_images() -> None:
    frames = np.full((4, 36, 36, 3), 100, np.uint8)
    episode = dataclasses.replace(recorded((3,), IMAGE)[0], observations=frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("test/jpeg-v0", [episode], observation_space=IMAGE, action_space=UNEVEN)
    obs = ShardedDataset(convert_minari("test/jpeg-v0"), seed=0).sample(4).observations
    assert isinstance(obs, th.Tensor)
    assert obs.shape == (4, 4, 3, 36, 36)
    assert (obs.float() - 100).abs().max() < 5


def test_several_data_sets_are_one_task() -> None:
    first, _ = record("test/a-v0"), record("test/b-v0", recorded((4,), seed=1))
    data = ShardedDataset(convert_minari({"toy": [first, "test/b-v0"]}))
    assert (data.n_episodes, len(data), len(data.tasks)) == (4, 18, 1)
    # Float spaces that differ in bounds or precision only are one
    record("test/c-v0", observation_space=spaces.Box(-2, 3, (3,), np.float64))
    assert ShardedDataset(convert_minari({"toy": ["test/a-v0", "test/c-v0"]})).n_episodes == 6


def test_tasks_by_name_are_padded_to_the_widest() -> None:
    wide, flat = spaces.Box(-1, 1, (5,), np.float32), spaces.Box(-3, 3, (1,), np.float32)
    dataset = record("test/a-v0", observation_space=VECTOR, action_space=UNEVEN)
    dataset.storage.update_metadata({"ref_min_score": 1.0, "ref_max_score": 11.0})
    record("test/b-v0", recorded((6, 4), wide, flat), wide, flat)
    data = ShardedDataset(convert_minari({"near": "test/a-v0", "far": ["test/b-v0"]}), task_sampling="balanced", seed=0)
    assert data.observation_space.shape == (5,)
    assert data.action_space == spaces.Box(-1, 1, (2,), np.float32)
    near, far = data.tasks
    assert (near.name, near.observation_size, near.action_size, near.transitions) == ("near", 3, 2, 14)
    assert (far.name, far.observation_size, far.action_size, far.transitions) == ("far", 5, 1, 10)
    assert near.normalized_score(6.0) == 0.5
    assert far.normalized_score(6.0) is None
    samples = data.sample(200)
    assert isinstance(samples.observations, th.Tensor)
    assert samples.task is not None
    assert not samples.observations[:, samples.task == 0, 3:].any()
    assert samples.observations[:, samples.task == 1, 3:].any()
    assert not samples.actions[:, samples.task == 1, 1:].any()
    assert abs(np.bincount(samples.task)[0] - 100) < 40


def test_an_episode_that_goes_on_after_an_end_is_cut_there() -> None:
    episodes = recorded((6,), terminates=(False,))
    episodes[0].terminations[1] = episodes[0].truncations[3] = True
    record("test/toy-v0", episodes)
    data = ShardedDataset(convert_minari("test/toy-v0"), horizon=3, seed=0)
    assert data._lengths.tolist() == [2, 2, 2]
    assert data._terminated.tolist() == [True, False, False]
    samples = data.sample(30)
    assert isinstance(samples.observations, th.Tensor)
    start = samples.rewards[0, :, 0].long()
    np.testing.assert_array_equal(samples.observations[1], episodes[0].observations[start + 1])


def test_episodes_that_were_picked(minari_cache: Path) -> None:
    whole = record("test/toy-v0")
    picked = whole.filter_episodes(lambda episode: len(episode) > 4)
    data = ShardedDataset(convert_minari(picked))
    assert data.episode_returns.tolist() == [10.0, 8 * 200 + 28.0]
    assert ShardedDataset(convert_minari(whole)).n_episodes == 3
    assert len(list((minari_cache / ".sb3_mbdpo_shards").iterdir())) == 2


def test_infos_are_not_needed_and_not_read() -> None:
    episodes = [
        dataclasses.replace(episode, infos={"success": np.zeros(len(episode.rewards) + 1)} if e else None)
        for e, episode in enumerate(recorded())
    ]
    record("test/toy-v0", episodes)
    assert ShardedDataset(convert_minari("test/toy-v0")).n_episodes == 3


def test_minari_does_not_see_the_shards(minari_cache: Path, tmp_path: Path) -> None:
    record("test/toy-v0")
    path = convert_minari("test/toy-v0")
    assert path.parent.parent == minari_cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(minari.list_local_datasets()) == ["test/toy-v0"]
        assert minari.namespace.list_local_namespaces() == ["test"]
    assert convert_minari("test/toy-v0", shards_dir=tmp_path / "else").parent == tmp_path / "else"


def test_converted_once_and_again_after_a_change() -> None:
    dataset = record("test/toy-v0")
    path = convert_minari("test/toy-v0")
    before = (path / "description.json").stat().st_mtime_ns
    assert convert_minari(["test/toy-v0"]) == convert_minari(dataset) == path
    assert (path / "description.json").stat().st_mtime_ns == before
    dataset.update_dataset_from_buffer(recorded((2,), seed=5))
    again = convert_minari("test/toy-v0")
    assert ShardedDataset(again).n_episodes == 4
    (again / "description.json").write_text("{}")
    assert ShardedDataset(convert_minari("test/toy-v0")).n_episodes == 4
    file = Path(dataset.storage.data_path, "main_data.hdf5")
    changed = (again / "description.json").stat().st_mtime_ns
    os.utime(file, ns=(1, 1))
    assert (convert_minari("test/toy-v0") / "description.json").stat().st_mtime_ns > changed


def test_an_interrupted_conversion_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    record("test/toy-v0")
    path = convert_minari("test/toy-v0")
    assert path.is_dir()
    record("test/other-v0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sb3_mbdpo.minari_data._padded", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        convert_minari("test/other-v0")
    assert list(path.parent.iterdir()) == [path]
    assert ShardedDataset(convert_minari("test/other-v0")).n_episodes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": put(0, np.nan)}, "episode 1 has rewards that are not finite"),
        ({"observations": put((0, 2), np.inf)}, "episode 1 has observations that are not finite"),
        ({"actions": put((0, 1), 0.51)}, "episode 1 has actions outside of the bounds of Box"),
        ({"actions": put((0, 1), np.nan)}, "episode 1 has actions outside"),
        (
            {"observations": lambda array: array[:-1]},
            r"episode 1 has observations of shape \(1, 3\) instead",
        ),
        ({"terminations": lambda array: np.zeros(3)}, "episode 1 has 1 rewards but 3 terminations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_episodes_that_cannot_be_used(minari_cache: Path, changes: dict[str, Any], message: str) -> None:
    record("test/toy-v0", broken(**changes))
    with pytest.raises(ValueError, match=f"test/toy-v0, {message}") as raised:
        convert_minari("test/toy-v0")
    assert "\n" not in str(raised.value)
    assert not list((minari_cache / ".sb3_mbdpo_shards").iterdir())


def test_actions_on_the_bounds_are_inside() -> None:
    record("test/toy-v0", broken(actions=put((0, 1), np.nextafter(np.float32(0.5), np.float32(1)))))
    assert ShardedDataset(convert_minari("test/toy-v0"), seed=0).sample(50).actions.max() <= 1


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_files_that_cannot_be_read(data_format: str) -> None:
    dataset = record("test/toy-v0", data_format=data_format)
    for file in Path(dataset.storage.data_path).rglob("*"):
        if file.suffix in (".hdf5", ".arrow"):
            file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"test/toy-v0 cannot be read at episodes 0 to 2"):
        convert_minari("test/toy-v0")
