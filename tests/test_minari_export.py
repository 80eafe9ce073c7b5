import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TimeLimit, TransformObservation
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize, VecTransposeImage

import sb3_mbdpo
from sb3_mbdpo import MBDPO
from sb3_mbdpo.minari_data import convert_minari
from sb3_mbdpo.minari_episodes import buffer_episodes, mean_return, play, random_actor
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import IMAGE, MIXED, UNEVEN, VECTOR, Counter, ToyEnv, counters, toy_envs
from tests.recordings import minari

pytestmark = pytest.mark.usefixtures("minari_cache")
COUNTED = spaces.Box(-1e6, 1e6, (3,))


def make(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> MBDPO:
    defaults = {"preset": "debug", "buffer_size": 300, "learning_starts": 10**6, "seed": 0, "device": "cpu"}
    return MBDPO(policy, env, **(defaults | kwargs))


class Scripted(Counter):
    """A counter whose third step of every second episode is a true termination; the reward is the step."""

    def step(self, action: np.ndarray) -> Any:
        obs, _, _, truncated, info = super().step(action)
        over = self.episodes % 2 == 0 and self.steps == 3
        return obs, float(self.steps), over, truncated and not over, info


@pytest.mark.parametrize(("n_envs", "rows", "steps"), [(1, 40, 23), (1, 10, 37), (3, 40, 20), (3, 7, 33)])
def test_episodes_are_rebuilt_from_the_ring(n_envs: int, rows: int, steps: int) -> None:
    env = DummyVecEnv([lambda index=index: Scripted(index, 5) for index in range(n_envs)])  # type: ignore[misc]
    model = make(env, buffer_size=rows * n_envs).learn(steps * n_envs)
    buffer = model.replay_buffer
    assert buffer is not None
    episodes = list(buffer_episodes(buffer, model.policy.to_env))
    kept = min(rows, steps)
    assert sum(len(episode.rewards) for episode in episodes) == kept * n_envs
    for index in range(n_envs):
        own = [episode for episode in episodes if episode.observations[0, 0] == index]
        # What is left of the run: episodes of 5 steps by time limit and of 3 by termination, in turns
        expected, length = [], steps
        for number in range(1, 100):
            full = 3 if number % 2 == 0 else 5
            expected.append((number, min(full, length), number % 2 == 0 and length >= 3))
            length -= full
            if length <= 0:
                break
        excess = steps - kept
        while excess >= expected[0][1]:
            excess -= expected.pop(0)[1]
        for k, ((number, length, terminated), episode) in enumerate(zip(expected, own, strict=True)):
            first = excess if k == 0 else 0
            wanted = np.array([[index, number, step] for step in range(first, length + 1)])
            np.testing.assert_array_equal(episode.observations, wanted)
            np.testing.assert_array_equal(episode.rewards, wanted[1:, 2])
            assert episode.terminated == terminated


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize(
    ("policy", "space"),
    [
        ("MlpPolicy", VECTOR),
        ("MlpPolicy", spaces.Box(-1, 1, (3,), np.float64)),
        ("CnnPolicy", IMAGE),
        ("MultiInputPolicy", MIXED),
        ("MlpPolicy", spaces.Discrete(3)),
    ],
    ids=str,
)
def test_buffers_go_out_and_come_back(policy: str, space: spaces.Space, data_format: str) -> None:
    model = make(toy_envs(2, observation_space=space, action_space=UNEVEN), policy).learn(24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = model.to_minari("test/toy-v0", data_format=data_format)
    assert dataset.id == "test/toy-v0"
    assert dataset.total_steps == 24
    for episode in dataset:
        assert UNEVEN.contains(episode.actions[0])
        first = episode.observations
        first = {k: v[0] for k, v in first.items()} if isinstance(first, dict) else first[0]
        assert model.observation_space.contains(first)
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [True]
    data = ShardedDataset(convert_minari(dataset), horizon=model.policy.search_config.horizon, seed=0)
    assert (len(data), data.observation_space) == (24, model.observation_space)
    buffer = model.replay_buffer
    assert buffer is not None
    np.testing.assert_allclose(data.episode_returns.sum(), buffer.rewards[:12].sum(), rtol=1e-5)
    stored = {tuple(np.round(row, 4)) for row in buffer.actions[:12].reshape(-1, 2).tolist()}
    found = {tuple(np.round(row, 4)) for row in data.sample(400).actions[0].tolist()}
    assert found == stored


def test_metadata_names_algorithm_version_and_scores() -> None:
    model = make(toy_envs()).learn(12)
    dataset = model.to_minari(
        "test/toy-v0", ref_min_score=-3.0, ref_max_score=5.0, author="us", description="ours", code_permalink="there"
    )
    metadata = dataset.storage.metadata
    assert metadata["algorithm_name"] == "MBDPO"
    assert metadata["sb3_mbdpo_version"] == sb3_mbdpo.__version__
    assert (metadata["sb3_mbdpo_source"], metadata["n_updates"]) == ("replay_buffer", 0)
    assert (metadata["description"], metadata["author"], metadata["code_permalink"]) == ("ours", {"us"}, "there")
    assert minari.get_normalized_score(dataset, np.array([1.0])).tolist() == [0.5]
    assert list(minari.list_local_datasets()) == ["test/toy-v0"]


def test_reference_scores_are_measured_on_request() -> None:
    model = make(toy_envs(action_space=UNEVEN)).learn(12)
    last_obs = model._last_obs
    metadata = model.to_minari("test/toy-v0").storage.metadata
    assert "ref_min_score" not in metadata
    assert model._last_obs is last_obs
    metadata = model.to_minari("test/toy-v1", n_ref_episodes=4).storage.metadata
    # A step of the toy costs the mean size of its actions; uniform ones over -2..1 and 0..0.5 have 0.833 and 0.25
    assert -5 * 0.75 < metadata["ref_min_score"] < -5 * 0.35
    assert metadata["ref_max_score"] != metadata["ref_min_score"]
    assert model._last_obs is None
    assert model.to_minari("test/toy-v2", ref_max_score=7.0, n_ref_episodes=2).storage.metadata["ref_max_score"] == 7.0
    # Of an agent that is worse than chance
    with pytest.warns(UserWarning, match="gets no reference scores: -99"):
        metadata = model.to_minari("test/toy-v3", ref_max_score=-99.0, n_ref_episodes=2).storage.metadata
    assert "ref_min_score" not in metadata and "ref_max_score" not in metadata


def test_fresh_episodes_by_the_agent() -> None:
    model = make(counters(2, length=6))
    dataset = model.to_minari("test/agent-v0", source="agent", n_episodes=5)
    assert [len(episode) for episode in dataset] == [6] * 5
    for episode in dataset:
        assert episode.observations[:, 2].tolist() == list(range(7))
        assert len(set(episode.observations[:, 1])) == 1
    state, wanted = None, []
    episode = dataset[0]
    for step, obs in enumerate(episode.observations[:-1]):
        action, state = model.predict(obs[None], state, np.array([step == 0]), deterministic=True)
        wanted.append(action[0])
    np.testing.assert_allclose(episode.actions, wanted, atol=1e-6)
    again = model.to_minari("test/agent-v1", source="agent", n_episodes=5)
    np.testing.assert_array_equal(again[0].actions, episode.actions)
    noisy = model.to_minari("test/agent-v2", source="agent", n_episodes=2, deterministic=False)
    assert not np.array_equal(noisy[0].actions, episode.actions)


def test_normalised_environments_give_raw_numbers() -> None:
    env = VecNormalize(counters(2, length=4), clip_obs=1e6)
    model = make(env).learn(16)
    mean = env.obs_rms.mean.copy()  # type: ignore[union-attr]
    for source in ("agent", "replay_buffer"):
        for episode in model.to_minari(f"test/{source}-v0", source, n_episodes=2):
            steps = episode.observations[:, 2]
            np.testing.assert_allclose(steps, np.arange(len(steps)), atol=1e-3)
            assert episode.rewards.tolist() == [1.0] * len(episode)
    np.testing.assert_array_equal(env.obs_rms.mean, mean)  # type: ignore[union-attr]
    assert env.training


@pytest.mark.parametrize("key", [None, "count"])
def test_last_observations_are_those_before_they_were_clipped(key: str | None) -> None:
    counter: Any = Counter(length=4)
    env = counter if key is None else TransformObservation(counter, lambda obs: {key: obs}, spaces.Dict({key: COUNTED}))
    inner = DummyVecEnv([lambda: env])
    normalized = VecNormalize(inner, clip_obs=0.1)
    for _ in range(2):
        (episode,) = play(normalized, random_actor(normalized), 1)
        observations = episode.observations if key is None else episode.observations[key]
        np.testing.assert_array_equal(observations[:, 2], np.arange(5))
    assert normalized.venv is inner and normalized.training
    images = VecTransposeImage(VecNormalize(toy_envs(observation_space=IMAGE), norm_obs=False))
    with pytest.raises(ValueError, match="wrap in VecNormalize last"):
        next(play(images, random_actor(images), 1))


def test_each_environment_plays_its_share() -> None:
    env = DummyVecEnv([lambda index=index: Counter(index, 3 + 5 * index) for index in range(3)])  # type: ignore[misc]
    episodes = list(play(env, random_actor(env), 7))
    owners = [int(episode.observations[0, 0]) for episode in episodes]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 2]
    assert [len(episode.rewards) for episode in episodes] == [3 + 5 * owner for owner in owners]
    assert mean_return(env, random_actor(env), 3) == (3 + 8 + 13) / 3


def test_the_environment_is_named_where_its_spec_makes_it() -> None:
    model = make("Pendulum-v1").learn(10)
    dataset = model.to_minari("test/pendulum-v0")
    assert dataset.env_spec.id == "Pendulum-v1"
    assert dataset.env_spec.max_episode_steps == 200
    recovered = dataset.recover_environment()
    assert recovered.observation_space == model.observation_space
    # Wrappers that can be written down come along
    model = make(FlattenObservation(TimeLimit(gym.make("Pendulum-v1"), 50))).learn(10)
    env = model.to_minari("test/pendulum-v1").recover_environment()
    assert env.spec is not None
    assert "FlattenObservation" in [wrapper.name for wrapper in env.spec.additional_wrappers]


class Wider(gym.ObservationWrapper):
    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = COUNTED

    def observation(self, observation: Any) -> Any:
        return observation


def test_an_environment_that_cannot_be_named_is_left_out() -> None:
    model = make(Wider(gym.make("Pendulum-v1"))).learn(10)
    with pytest.warns(UserWarning, match="will not name its environment"):
        dataset = model.to_minari("test/pendulum-v0")
    assert dataset.env_spec is None
    with pytest.raises(ValueError, match="cannot be recovered"):
        dataset.recover_environment()


def test_another_environment_may_play() -> None:
    model = make(toy_envs()).learn(12)
    model.env = None
    with pytest.raises(ValueError, match="no environment to play in"):
        model.to_minari("test/toy-v0", source="agent")
    assert model.to_minari("test/toy-v0", source="agent", env=ToyEnv(), n_episodes=2).total_episodes == 2
    assert model.to_minari("test/toy-v1").total_steps == 12
    with pytest.raises(ValueError, match="spaces do not match"):
        model.to_minari("test/toy-v2", source="agent", env=ToyEnv(MIXED))


def test_what_cannot_be_exported() -> None:
    model = make(toy_envs())
    with pytest.raises(ValueError, match="replay buffer is empty"):
        model.to_minari("test/toy-v0")
    model.learn(12)
    with pytest.raises(ValueError, match='source must be "replay_buffer" or "agent"'):
        model.to_minari("test/toy-v0", source="buffer")
    for counts in ({"n_episodes": 0}, {"n_episodes": -2}, {"n_ref_episodes": -1}, {"n_ref_episodes": 2.5}):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            model.to_minari("test/toy-v0", source="agent", **counts)
    with pytest.raises(ValueError, match="ref_min_score must be lower than ref_max_score"):
        model.to_minari("test/toy-v0", ref_min_score=2.0, ref_max_score=1.0)
    for bad in ("toy", "t/toy-v0", "test/toy", "test toy-v0", "../toy-v0"):
        with pytest.raises(ValueError, match="dataset_id must look like"):
            model.to_minari(bad)
    model.to_minari("test/toy-v0")
    with pytest.raises(ValueError, match="exists already: raise its version"):
        model.to_minari("test/toy-v0")


@pytest.mark.parametrize("key", ["state/arm", "state/", "/state", ".", ""])
def test_keys_that_hdf5_has_no_name_for(key: str, minari_cache: Path) -> None:
    space = spaces.Dict({key: VECTOR, "state.leg": VECTOR})
    model = make(toy_envs(observation_space=space), "MultiInputPolicy").learn(12)
    for kwargs in ({}, {"source": "agent", "n_ref_episodes": 1}, {"data_format": "hdf5"}):
        last_obs = model._last_obs
        with pytest.raises(ValueError, match=rf'observation key {re.escape(repr(key))}: pass data_format="arrow"'):
            model.to_minari("test/toy-v0", **kwargs)
        assert model._last_obs is last_obs and not minari_cache.exists()
    data = ShardedDataset(convert_minari(model.to_minari("test/toy-v0", data_format="arrow")), horizon=3)
    assert (len(data), data.observation_space) == (12, space)


def test_nothing_half_written_stays(minari_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(toy_envs()).learn(24)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls: list[int] = []

        def stop(self: Any, *args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return dataclasses.replace(self)

        real = sb3_mbdpo.minari_export._recorded  # type: ignore[attr-defined]
        patch.setattr("sb3_mbdpo.minari_export._recorded", lambda e, m: stop(real(e, m)))
        model.to_minari("test/toy-v0")
    assert not (minari_cache / "test" / "toy-v0").exists()
    # A process that was killed leaves a folder that counts no episode
    dataset = model.to_minari("test/toy-v0")
    dataset.storage.update_metadata({"total_episodes": 0})
    file = Path(dataset.storage.data_path, "metadata.json")
    file.write_text(file.read_text().replace("sb3_mbdpo_version", "other"))
    assert model.to_minari("test/toy-v0").total_steps == 24
    for entry in file.parent.iterdir():
        entry.unlink()
    assert model.to_minari("test/toy-v0").total_steps == 24
    # Whatever else is in the way stays there
    for other in ("inner/data/main_data.hdf5", "data/main_data.hdf5"):
        path = minari_cache / "test" / "other-v0" / other
        path.parent.mkdir(parents=True)
        path.touch()
        with pytest.raises(ValueError, match="exists already"):
            model.to_minari("test/other-v0")
        assert path.exists()


@pytest.mark.slow
def test_environments_in_other_processes() -> None:
    env = SubprocVecEnv([lambda: gym.make("Pendulum-v1")] * 2, start_method="fork")
    model = make(env).learn(20)
    dataset = model.to_minari("test/pendulum-v0")
    assert (dataset.total_steps, dataset.env_spec.id) == (20, "Pendulum-v1")
    env.close()
