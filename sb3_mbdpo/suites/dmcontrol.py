"""The DeepMind Control Suite as the paper uses it: flat float32 observations, actions in [-1, 1], each applied twice."""

import warnings
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def load_suite() -> Any:
    """
    :return: ``dm_control.suite``
    :raises ImportError: if dm_control is not installed, with the command that installs it
    """
    try:
        # Without a display the rendering back end warns as it is imported, whether or not anything is rendered
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from dm_control import suite
    except ImportError as error:
        raise ImportError('DMControl tasks need dm_control: run `pip install "sb3-mbdpo[dmc]"`.') from error
    return suite


class DMControlEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A task of the suite. Rewards of an action's repetitions are summed; episodes end by truncation.

    :param domain: Domain, as dm_control names it
    :param task: Task, as dm_control names it
    :param action_repeat: Control steps that an action lasts
    :param render_mode: "rgb_array" or None
    :param image_size: Height and width of what ``render`` returns
    :param camera: Camera of ``render``
    :raises ImportError: if dm_control is not installed
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(
        self,
        domain: str,
        task: str,
        action_repeat: int = 2,
        render_mode: str | None = None,
        image_size: int = 240,
        camera: int = 0,
    ):
        self._env = load_suite().load(domain, task)
        self.action_repeat, self.render_mode, self.image_size, self.camera = (
            action_repeat,
            render_mode,
            image_size,
            camera,
        )
        self.metadata = self.metadata | {"render_fps": round(1 / (self._env.control_timestep() * action_repeat))}
        bounds = self._env.action_spec()
        self._low, self._high = bounds.minimum, bounds.maximum
        self.action_space = spaces.Box(-1.0, 1.0, bounds.shape, np.float32)
        width = sum(int(np.prod(part.shape)) for part in self._env.observation_spec().values())
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """
        Begin an episode.

        :param seed: Seed of this and the following initial states
        :param options: Not used
        :return: Observation and an empty dict
        """
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed % 2**32)
        return _flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Apply an action ``action_repeat`` times.

        :param action: Action in [-1, 1]
        :return: Observation, summed reward, terminated, truncated, and an empty dict
        """
        fraction = (np.asarray(action, np.float64) + 1.0) / 2.0
        control = np.clip(self._low + fraction * (self._high - self._low), self._low, self._high)
        reward = 0.0
        for _ in range(self.action_repeat):
            step = self._env.step(control)
            reward += float(step.reward or 0.0)
            if step.last():
                break
        return _flat(step.observation), reward, step.last() and step.discount == 0.0, step.last(), {}

    def render(self) -> np.ndarray:
        """:return: A picture [image_size, image_size, 3] of the present state"""
        return np.asarray(self._env.physics.render(self.image_size, self.image_size, self.camera))

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()


def _flat(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)
