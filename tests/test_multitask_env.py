from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_mbdpo.multitask_env import (
    MultiTaskEnv,
    decisions_per_episode,
    describe_task,
    describe_tasks,
    make_env,
    make_multitask_env,
    make_task_env,
)
from sb3_mbdpo.tasks import Task, TaskSet
from sb3_mbdpo.wrappers import ActionRepeat
from tests.fakes import LEANING, LEANING_ENVS, Leaning, ToyEnv, leaning_env


class Recorder(Leaning):
    """Remembers the actions it was given."""

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.action = action
        return super().step(action)


def test_padding_both_ways() -> None:
    inner = Recorder(4, 2)
    env = MultiTaskEnv(inner, LEANING, "wide")
    check_env(env, skip_render_check=True)
    observation, _ = env.reset(seed=0)
    expected, _ = Recorder(4, 2).reset(seed=0)
    np.testing.assert_array_equal(observation["observation"], np.append(expected, 0).astype(np.float32))
    assert observation["task"] == 2 and observation["observation"].dtype == np.float32
    assert env.observation_space.contains(observation)
    observation, reward, *_ = env.step(np.array([0.5, -1.0, 0.9], np.float32))
    np.testing.assert_allclose(inner.action, [1.0, -2.0])
    assert inner.action.dtype == np.float32 and reward == pytest.approx(-0.5) and observation["task"] == 2
    env.step(np.array([7.0, -7.0, 0.0]))
    np.testing.assert_array_equal(inner.action, [2.0, -2.0])


def test_actions_keep_their_shape() -> None:
    space = spaces.Box(np.array([[-1.0], [0.0]]), np.array([[3.0], [1.0]]), dtype=np.float64)
    env = MultiTaskEnv(ToyEnv(spaces.Box(-1, 1, (2,)), space), TaskSet([Task("a", 2, 2)]), "a")
    np.testing.assert_allclose(env.action(np.array([-1.0, 1.0])), [[-1.0], [1.0]])
    np.testing.assert_allclose(env.action(np.array([0.0, 0.0])), [[1.0], [0.5]])


@pytest.mark.parametrize(
    "env, words",
    [
        (ToyEnv(spaces.Box(-1, 1, (2, 2))), "FlattenObservation"),
        (ToyEnv(spaces.Dict({"a": spaces.Box(-1, 1, (2,))})), "FlattenObservation"),
        (ToyEnv(action_space=spaces.Discrete(2)), "Box spaces of floats"),
        (ToyEnv(action_space=spaces.Box(-np.inf, np.inf, (2,))), "finite bounds"),
        (Leaning(4, 2), "has 4 observation entries and 2 actions, task 'up' has 3 and 1"),
    ],
)
def test_environments_that_do_not_fit(env: gym.Env, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiTaskEnv(env, LEANING, "up")


def test_unknown_tasks_and_sources() -> None:
    with pytest.raises(ValueError, match="down"):
        MultiTaskEnv(Leaning(), LEANING, "dwn")
    with pytest.raises(ValueError, match="no environment id"):
        make_task_env(LEANING, "up")
    with pytest.raises(ValueError, match="got int"):
        make_env(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wide"):
        make_multitask_env(LEANING, LEANING_ENVS | {"wid": LEANING_ENVS["wide"]})
    with pytest.raises(ValueError, match="names is empty"):
        make_multitask_env(LEANING, LEANING_ENVS, names=[])


def test_a_vector_of_different_tasks() -> None:
    env = leaning_env(n_copies=2, seed=3)
    observation = env.reset()
    assert observation["task"].tolist() == [0, 0, 1, 1, 2, 2] and observation["task"].dtype == np.int64
    assert observation["observation"].shape == (6, 5) and not observation["observation"][:4, 3:].any()
    again = leaning_env(n_copies=2, seed=3).reset()
    np.testing.assert_array_equal(observation["observation"], again["observation"])
    _, rewards, *_ = env.step(np.ones((6, 3)))
    np.testing.assert_allclose(rewards, [2, 2, -2, -2, 2, 2])
    for _ in range(5):
        _, _, dones, infos = env.step(np.ones((6, 3)))
    assert dones.tolist() == [True] * 4 + [False] * 2 and infos[0]["episode"]["l"] == 6
    assert env.get_attr("task_name") == ["up", "up", "down", "down", "wide", "wide"]
    assert infos[0]["terminal_observation"]["task"] == 0


def test_tasks_in_processes() -> None:
    env = leaning_env(("down", "wide"), vec_env_cls=SubprocVecEnv)
    try:
        assert env.reset()["task"].tolist() == [1, 2]
        _, rewards, *_ = env.step(np.ones((2, 3)))
        assert rewards.tolist() == [-2.0, 2.0]
    finally:
        env.close()


@pytest.mark.parametrize("wrong", [{"n_copies": 2}, {"vec_env_cls": SubprocVecEnv}])
def test_one_object_is_one_environment(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="functions that make them"):
        make_multitask_env(LEANING, {"up": Leaning()}, ["up"], **wrong)


def test_tasks_describe_themselves() -> None:
    tasks = describe_tasks({"swing": "Pendulum-v1", "lean": LEANING_ENVS["wide"]})
    assert tasks["swing"] == Task("swing", 3, 1, env_id="Pendulum-v1", episode_length=200)
    assert tasks["lean"] == Task("lean", 4, 2)
    assert make_task_env(tasks, "swing").reset()[0]["observation"].shape == (4,)
    given = describe_task(Leaning(), "up", episode_length=6, ref_min_score=0.0, ref_max_score=1.0)
    assert given.episode_length == 6 and given.ref_max_score == 1.0


def test_episode_lengths_count_decisions() -> None:
    def limited(steps: int) -> gym.Env:
        return gym.wrappers.TimeLimit(Leaning(), steps)

    assert decisions_per_episode(Leaning()) is None
    assert decisions_per_episode(ActionRepeat(limited(101), 2)) == 51
    assert decisions_per_episode(gym.wrappers.TimeLimit(ActionRepeat(Leaning(), 2), 50)) == 50
    repeated = make_env("Pendulum-v1", action_repeat=4)
    assert decisions_per_episode(repeated) == 50
    assert describe_task(repeated, "swing", action_repeat=4).action_repeat == 4


def test_structured_observations_are_flattened_when_made_from_an_id() -> None:
    gym.register(
        "Structured-v0", lambda: ToyEnv(spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 1, (1,))}))
    )
    try:
        assert make_env("Structured-v0").observation_space.shape == (3,)
    finally:
        gym.registry.pop("Structured-v0")
