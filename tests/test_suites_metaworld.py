"""Meta-World's tasks, in an environment of their own: `make test-metaworld`."""

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("metaworld")

import sb3_mbdpo.suites  # noqa: F401


def test_goals_are_visible_drawn_anew_and_seeded():
    env = gym.make("mbdpo/mw-reach-v0")
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    goals = [env.reset(seed=seed)[0][-3:] for seed in (1, None, 1)]
    np.testing.assert_array_equal(goals[0], goals[2])
    assert (goals[0] != goals[1]).all()
    assert (goals[0] != 0).any()
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_an_episode():
    env = gym.make("mbdpo/mw-reach-v0")
    observation, info = env.reset(seed=0)
    assert observation.shape == (39,) and observation.dtype == np.float32
    assert info["success"] is False
    steps, done = 0, False
    while not done:
        # Straight to the goal: this task is solved by its own observation
        direction = np.append(10 * (observation[-3:] - observation[:3]), 0)
        observation, _, terminated, done, info = env.step(np.clip(direction, -1, 1).astype(np.float32))
        assert not terminated
        steps += 1
    assert steps == 100
    assert info["success"] is True
