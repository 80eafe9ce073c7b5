"""Environment wrappers."""

import gymnasium as gym
import numpy as np
import pytest

from sb3_mbdpo.wrappers import ActionRepeat


def test_action_repeat() -> None:
    class Counter(gym.Env):
        observation_space = gym.spaces.Box(0, 10, (1,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        count = 0

        def step(self, action):
            self.count += 1
            return np.array([self.count], np.float32), 1, self.count == 5, False, {}

    env = ActionRepeat(Counter(), repeat=3)
    observation, reward, terminated, _, _ = env.step(np.zeros(1))
    assert (observation[0], reward, terminated) == (3, 3.0, False)
    # The episode ends within the second action.
    observation, reward, terminated, _, _ = env.step(np.zeros(1))
    assert (observation[0], reward, terminated) == (5, 2.0, True)
    with pytest.raises(ValueError, match="at least 1"):
        ActionRepeat(Counter(), repeat=0)
