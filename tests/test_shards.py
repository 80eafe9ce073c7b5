from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo.shard_writer import ShardWriter
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.tasks import mean_and_std
from tests.episodes import LENGTHS, numbered, write
from tests.fakes import ACTIONS, VECTOR, toy_envs

MIXED = spaces.Dict({"camera": spaces.Box(0, 255, (3, 4, 4), np.uint8), "gear": spaces.Discrete(3), "speed": VECTOR})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set", numbered())


@pytest.mark.parametrize("shard_bytes", [1, 100, 2**20])
@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_windows_are_those_of_the_episodes(tmp_path: Path, shard_bytes: int, horizon: int) -> None:
    episodes = numbered()
    data = ShardedDataset(write(tmp_path / "set", episodes, shard_bytes), horizon, seed=0)
    assert len(data) == sum(LENGTHS)
    samples = data.sample(200)
    obs = samples.observations
    assert isinstance(obs, th.Tensor)
    assert obs.shape == (horizon + 1, 200, 3)
    assert samples.task is None
    for b in range(200):
        e, start = int(obs[0, b, 0]), int(obs[0, b, 1])
        wanted_obs, wanted_actions, wanted_rewards, terminated, _ = episodes[e]
        valid = min(horizon, LENGTHS[e] - start)
        assert samples.masks[:, b, 0].tolist() == [1.0] * valid + [0.0] * (horizon - valid)
        rows = np.minimum(start + np.arange(horizon + 1), start + valid)
        np.testing.assert_array_equal(obs[:, b], wanted_obs[rows].astype(np.float32))
        np.testing.assert_array_equal(samples.actions[:valid, b], wanted_actions[start : start + valid].astype("f4"))
        np.testing.assert_array_equal(samples.rewards[:valid, b, 0], wanted_rewards[start : start + valid])
        ends = [float(terminated and start + t == LENGTHS[e] - 1) for t in range(valid)]
        assert samples.terminations[:valid, b, 0].tolist() == ends
        for part in (samples.actions, samples.rewards, samples.terminations):
            assert not part[valid:, b].any()
    for part in samples[1:5]:
        assert isinstance(part, th.Tensor)
        assert part.dtype == th.float32


def test_every_transition_is_drawn_equally_often(folder: Path) -> None:
    samples = ShardedDataset(folder, seed=1).sample(37_000)
    assert isinstance(samples.observations, th.Tensor)
    _, counts = np.unique(samples.observations[0].numpy(), axis=0, return_counts=True)
    assert len(counts) == sum(LENGTHS) == 37
    assert counts.min() > 850
    assert counts.max() < 1150


def test_seeds_and_global_state(folder: Path) -> None:
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    data, other = ShardedDataset(folder, seed=3), ShardedDataset(folder, seed=3)
    first = data.sample(16)
    assert th.equal(first.rewards, other.sample(16).rewards)
    assert not th.equal(first.rewards, data.sample(16).rewards)
    data.seed((3, 1))
    again = data.sample(16)
    data.seed((3, 1))
    assert th.equal(again.rewards, data.sample(16).rewards)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index, union-attr]


def test_tasks_proportional_and_balanced(tmp_path: Path) -> None:
    # Tasks 1, 0, 2, 1, 0, 2 by episode: not in order on disk
    path = write(tmp_path / "set", numbered(n_tasks=3), n_tasks=3)
    sizes = np.array([1 + 3, 5 + 2, 9 + 17])
    for task_sampling, shares in (("proportional", sizes / 37), ("balanced", np.ones(3) / 3)):
        data = ShardedDataset(path, seed=0, task_sampling=task_sampling)
        samples = data.sample(6000)
        assert samples.task is not None
        assert samples.task.dtype == th.int64
        assert isinstance(samples.observations, th.Tensor)
        np.testing.assert_array_equal(samples.observations[0, :, 2], samples.task)
        np.testing.assert_allclose(np.bincount(samples.task) / 6000, shares, atol=0.03)
        within = samples.observations[0, samples.task == 2].numpy()
        _, counts = np.unique(within, axis=0, return_counts=True)
        assert len(counts) == 26
        assert counts.min() > 0.5 * counts.mean()
    assert [(task.name, task.episodes, task.transitions) for task in data.tasks] == [
        ("task-0", 2, 4),
        ("task-1", 2, 7),
        ("task-2", 2, 26),
    ]
    assert data.max_episode_length == 17


def test_a_task_without_episodes_is_never_drawn(tmp_path: Path) -> None:
    episodes = [(*episode[:4], 2) for episode in numbered()]
    data = ShardedDataset(write(tmp_path / "set", episodes, n_tasks=4), task_sampling="balanced", seed=0)
    assert set(np.asarray(data.sample(50).task).tolist()) == {2}


def test_dict_observations_keep_their_types(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    camera = rng.integers(256, size=(7, 3, 4, 4), dtype=np.uint8)
    obs = {"speed": rng.normal(size=(7, 3)), "camera": camera, "gear": np.arange(7) % 3}
    with ShardWriter(tmp_path / "set", MIXED, ACTIONS) as writer:
        writer.add(obs, np.zeros((6, 2)), np.arange(6), False)
    data = ShardedDataset(tmp_path / "set", horizon=2, seed=0)
    samples = data.sample(9)
    observations = samples.observations
    assert isinstance(observations, dict)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in observations.items()} == {
        "camera": (th.uint8, (3, 9, 3, 4, 4)),
        "gear": (th.int64, (3, 9, 1)),
        "speed": (th.float32, (3, 9, 3)),
    }
    start = samples.rewards[0, :, 0].numpy().astype(int)
    np.testing.assert_array_equal(observations["camera"][0], camera[start])
    np.testing.assert_array_equal(observations["gear"][1, :, 0], obs["gear"][start + 1])
    assert data.observation_space == MIXED
    assert data.action_space == ACTIONS


def test_vec_normalize_is_applied(folder: Path) -> None:
    env = VecNormalize(toy_envs(1), clip_obs=1e6, clip_reward=1e6)
    env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var = np.array([1.0, 2.0, 3.0]), np.ones(3), 4.0  # type: ignore[union-attr]
    data = ShardedDataset(folder, seed=0)
    raw = data.sample(8)
    data.seed(0)
    normal = data.sample(8, env)
    assert isinstance(raw.observations, th.Tensor)
    assert isinstance(normal.observations, th.Tensor)
    th.testing.assert_close(normal.observations, raw.observations - th.tensor([1.0, 2.0, 3.0]), rtol=0, atol=1e-4)
    th.testing.assert_close(normal.rewards, raw.rewards / 2, rtol=1e-4, atol=1e-4)


def test_pages_are_handed_back(folder: Path) -> None:
    data = ShardedDataset(folder, seed=0, resident_bytes=2**20)
    plain = ShardedDataset(folder, seed=0)
    released = []
    release = data._rows.release
    data._rows.release = lambda: released.append(release())  # type: ignore[method-assign, func-returns-value]
    for _ in range(3):
        assert th.equal(data.sample(8).rewards, plain.sample(8).rewards)
    assert len(released) == 1  # at the second of three


def test_statistics_of_the_episodes(folder: Path) -> None:
    data = ShardedDataset(folder)
    np.testing.assert_allclose(data.episode_returns, [episode[2].sum() for episode in numbered()])
    assert (data.n_episodes, data.has_terminations(), data.max_episode_length) == (6, True, 17)


def test_observation_statistics_by_task(tmp_path: Path) -> None:
    episodes = numbered(n_tasks=3)
    data = ShardedDataset(write(tmp_path / "set", episodes, n_tasks=3))
    for task in range(3):
        values = np.concatenate([e[0][:-1] for e in episodes if e[4] == task]).astype(np.float64)
        mean, std = mean_and_std(data.spread_observations(task))
        np.testing.assert_allclose(mean, values.mean(0))
        expected = values.std(0)
        np.testing.assert_allclose(std, np.where(expected < 1e-4, 1, expected))
        # A few rows, evenly spread, say nearly the same; asking draws nothing
        state = data.rng.bit_generator.state
        few, _ = mean_and_std(data.spread_observations(task, max_rows=4))
        assert np.abs(np.subtract(few, mean)).max() < 3 * np.max(std) and data.rng.bit_generator.state == state


def test_discounted_sums_as_vec_normalize_keeps_them(folder: Path) -> None:
    data = ShardedDataset(folder)
    expected = []
    for episode in numbered():
        total = 0.0
        for reward in episode[2]:
            total = 0.5 * total + reward
            expected.append(total)
    np.testing.assert_allclose(data.spread_returns(0.5), expected)
    # Of some episodes, the first and the last among them
    few = data.spread_returns(0.5, max_rows=len(data) // 2)
    assert len(few) < len(expected) and few[0] == expected[0] and few[-1] == expected[-1]


@pytest.mark.parametrize("name", ["rows-00000.bin", "lengths.bin", "terminated.bin"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_damaged_files_are_named(folder: Path, name: str, harm: str) -> None:
    content = bytearray((folder / name).read_bytes())
    if harm == "gone":
        (folder / name).unlink()
    else:
        content[3] ^= 1
        (folder / name).write_bytes(content[:-1] if harm == "cut" else content)
    with pytest.raises(ValueError, match=f"{name}.*convert again"):
        ShardedDataset(folder)


def test_sizes_are_always_checked_and_sums_on_request(folder: Path) -> None:
    content = bytearray((folder / "rows-00000.bin").read_bytes())
    content[0] ^= 1
    (folder / "rows-00000.bin").write_bytes(content)
    ShardedDataset(folder, verify=False)
    (folder / "rows-00000.bin").write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"has 1028 bytes instead of 1032"):
        ShardedDataset(folder, verify=False)


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        ShardedDataset(folder, horizon=0)
    with pytest.raises(ValueError, match="task_sampling must be"):
        ShardedDataset(folder, task_sampling="fair")
