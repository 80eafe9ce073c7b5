"""MyoSuite's tasks, in an environment of their own: `make test-myosuite`."""

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("myosuite")

from sb3_mbdpo.suites import env_id, suite_entry, task_set_names


def test_episodes_last_100_decisions_whatever_the_suite_says():
    for task in ("myo-reach", "myo-pen-twirl-hard"):
        env = gym.make(env_id(task))
        observation, _ = env.reset(seed=0)
        assert observation.dtype == np.float32
        ends = [env.step(env.action_space.sample()) for _ in range(100)]
        assert [end[3] for end in ends] == [False] * 99 + [True]
        assert not any(end[2] for end in ends)
        assert {type(end[4]["success"]) for end in ends} == {bool}


@pytest.mark.parametrize("task", task_set_names("myosuite"))
def test_sizes(task: str):
    env, entry = gym.make(env_id(task)), suite_entry(task)
    assert env.observation_space.shape == (entry.observation_dim,)
    assert env.action_space.shape == (entry.action_dim,)
