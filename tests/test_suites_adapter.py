"""The adapter of the manipulation suites, and those suites themselves where they are installed."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from sb3_mbdpo.suites.adapter import SuiteTask


class Suite(gym.Env):
    """Counts its steps, is solved at the third, and wants to stop at the fourth."""

    observation_space = spaces.Box(-10, 10, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (3,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2), {"goal": 1}

    def step(self, action):
        self.steps += 1
        return np.full(2, self.steps), self.steps, self.steps == 4, False, {"solved": np.array([self.steps == 3])}


def test_holds_actions_and_says_success():
    env = SuiteTask(Suite(), action_repeat=1, success_key="solved")
    check_env(env, skip_render_check=True)
    observation, info = env.reset()
    assert observation.dtype == np.float32
    assert info == {"goal": 1, "success": False, "is_success": False}
    outcomes = [env.step(env.action_space.sample()) for _ in range(4)]
    assert [outcome[4]["success"] for outcome in outcomes] == [False, False, True, False]
    assert not any(outcome[2] or outcome[3] for outcome in outcomes)
    env = SuiteTask(Suite(), action_repeat=2, success_key="solved")
    env.reset()
    observation, reward, *_ = env.step(env.action_space.sample())
    assert (observation[0], reward) == (2, 3)


def test_other_spaces_are_refused():
    for name, space in (("action_space", spaces.Box(-2, 2, (1,))), ("observation_space", spaces.Discrete(3))):
        env = Suite()
        setattr(env, name, space)
        with pytest.raises(ValueError, match=r"actions in \[-1, 1\]|flat Box observations"):
            SuiteTask(env)
