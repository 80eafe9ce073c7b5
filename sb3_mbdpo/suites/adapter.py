"""What the manipulation suites have in common once the paper uses them."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class SuiteTask(gym.Wrapper):
    """
    A suite's environment in the paper's terms: flat float32 observations, each action held, ``info["success"]``.

    The same stands under ``is_success`` too, where Stable-Baselines3's evaluation looks for it.
    Episodes end by the time limit alone: what the suite takes for a reason to stop early is not passed on.

    :param env: The suite's environment, without a time limit of its own: flat Box observations, actions in [-1, 1]
    :param action_repeat: Steps that an action lasts; their rewards are summed
    :param success_key: Where the environment says in ``info`` whether the task is solved
    :raises ValueError: for other spaces
    """

    def __init__(self, env: gym.Env, action_repeat: int = 1, success_key: str = "success"):
        super().__init__(env)
        observations, actions = env.observation_space, env.action_space
        if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
            raise ValueError(f"A task of a suite has flat Box observations, got {observations}.")
        if not isinstance(actions, spaces.Box) or (actions.low != -1).any() or (actions.high != 1).any():
            raise ValueError(f"A task of a suite has actions in [-1, 1], got {actions}.")
        self.action_repeat, self.success_key = action_repeat, success_key
        self.observation_space = spaces.Box(-np.inf, np.inf, observations.shape, np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, actions.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """
        Begin an episode.

        :param seed: Seed of this and the following initial states and goals
        :param options: The suite's own
        :return: Observation and info, with ``success`` False
        """
        observation, info = self.env.reset(seed=seed, options=options)
        return np.asarray(observation, np.float32), {**info, "success": False, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Apply an action ``action_repeat`` times.

        :param action: Action in [-1, 1]
        :return: Observation, summed reward, False, False, and the last info, with ``success``
        """
        total = 0.0
        for _ in range(self.action_repeat):
            observation, reward, _, _, info = self.env.step(action)
            total += float(reward)
        success = bool(np.asarray(info[self.success_key]).item())
        return (
            np.asarray(observation, np.float32),
            total,
            False,
            False,
            {**info, "success": success, "is_success": success},
        )
