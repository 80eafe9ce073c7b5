"""Environment wrappers that the paper's task suites need."""

import math
from typing import Any, SupportsFloat

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs


class ActionRepeat(gym.Wrapper, RecordConstructorArgs):
    """
    Hold each action for several environment steps and add up their rewards.

    :param env: the environment to wrap
    :param repeat: number of environment steps per action; fewer when the episode ends in between
    """

    def __init__(self, env: gym.Env, repeat: int = 2) -> None:
        # Without it no spec could make the wrapper again
        RecordConstructorArgs.__init__(self, repeat=repeat)
        gym.Wrapper.__init__(self, env)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        self.action_repeat = repeat

    @property
    def _max_episode_steps(self) -> int:
        """
        The time limit of what is wrapped, in decisions: what is asked of an environment comes from its outermost
        wrapper that knows.

        :raises AttributeError: if there is no time limit
        """
        limit = self.env.get_wrapper_attr("_max_episode_steps")
        if limit is None or not math.isfinite(limit):
            raise AttributeError("There is no time limit.")
        return math.ceil(limit / self.action_repeat)

    @property
    def steps_per_action(self) -> int:
        """Environment steps of each action, those of repeats inside this one counted too."""
        inner = self.env.get_wrapper_attr("steps_per_action") if self.env.has_wrapper_attr("steps_per_action") else 1
        return self.action_repeat * int(inner)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        :param action: the action to hold
        :return: the last observation, the sum of the rewards, terminated, truncated, the last info
        """
        total_reward = 0.0
        for _ in range(self.action_repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total_reward += float(reward)
            if terminated or truncated:
                break
        return observation, total_reward, terminated, truncated, info
