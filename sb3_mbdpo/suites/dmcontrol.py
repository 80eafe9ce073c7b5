"""The DeepMind Control Suite as the paper uses it: flat float32 observations or pixels, actions applied twice."""

import os
import warnings
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_mbdpo.suites.rendering import choose_backend, explanation


def load_task(domain: str, task: str) -> Any:
    """
    :param domain: Domain, as dm_control names it
    :param task: Task, as dm_control names it, or one of ``sb3_mbdpo.suites.dmcontrol_tasks``
    :return: dm_control's environment
    :raises ImportError: if dm_control is not installed, with the command that installs it
    :raises RuntimeError: if the rendering back end that MUJOCO_GL names cannot be loaded
    """
    # dm_control decides once, when it is imported, and without a screen for one that ends the process when it is used
    chosen = choose_backend()
    try:
        suite, ours = _import_suite()
    except ModuleNotFoundError as error:
        raise ImportError('DMControl tasks need dm_control: run `pip install "sb3-mbdpo[dmc]"`.') from error
    except (ImportError, RuntimeError, AttributeError) as error:
        if not chosen:
            raise RuntimeError(explanation(error)) from error
        # The library is there and does not work: that matters only where pictures are asked for
        del os.environ["MUJOCO_GL"]
        suite, ours = _import_suite()
    return ours[domain, task]() if (domain, task) in ours else suite.load(domain, task)


def _import_suite() -> tuple[Any, Any]:
    # Without a display the rendering back end warns as it is imported, whether or not anything is rendered
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dm_control import suite

        from sb3_mbdpo.suites.dmcontrol_tasks import TASKS
    return suite, TASKS


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
    :raises RuntimeError: if the rendering back end that MUJOCO_GL names cannot be loaded
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012 (an instance variable in gym.Env)

    def __init__(
        self,
        domain: str,
        task: str,
        action_repeat: int = 2,
        render_mode: str | None = None,
        image_size: int = 240,
        camera: int = 0,
    ):
        self._env = load_task(domain, task)
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
        """
        :return: A picture [image_size, image_size, 3] of the present state
        :raises RuntimeError: if no rendering back end works, with what to do about it
        """
        return self._picture(self.image_size)

    def _picture(self, size: int) -> np.ndarray:
        from mujoco import FatalError

        try:
            return np.asarray(self._env.physics.render(size, size, self.camera))
        except (FatalError, RuntimeError, ImportError, AttributeError) as error:
            raise RuntimeError(explanation(error)) from error

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()


class DMControlPixelsEnv(DMControlEnv):
    """
    A task of the suite that is seen: the last pictures stacked, channels first, as ``CnnPolicy`` takes them.

    :param domain: Domain, as dm_control names it
    :param task: Task, as dm_control names it
    :param action_repeat: Control steps that an action lasts; one picture is taken after the last of them
    :param render_mode: "rgb_array" or None
    :param image_size: Height and width of what ``render`` returns
    :param camera: Camera of observations and of ``render``
    :param pixels: Height and width of observed pictures
    :param frames: Pictures in an observation, the newest last; an episode begins with copies of its first
    :raises ImportError: if dm_control is not installed
    :raises RuntimeError: if no rendering back end works, with what to do about it
    """

    def __init__(
        self,
        domain: str,
        task: str,
        action_repeat: int = 2,
        render_mode: str | None = None,
        image_size: int = 240,
        camera: int = 0,
        pixels: int = 64,
        frames: int = 3,
    ):
        super().__init__(domain, task, action_repeat, render_mode, image_size, camera)
        self.pixels, self._frames = pixels, deque[np.ndarray](maxlen=frames)
        self.observation_space = spaces.Box(0, 255, (3 * frames, pixels, pixels), np.uint8)
        self._picture(pixels)  # where nothing can be rendered, better now than after the first episode's reset

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """
        Begin an episode.

        :param seed: Seed of this and the following initial states
        :param options: Not used
        :return: Pictures [3 * frames, pixels, pixels] and an empty dict
        """
        _, info = super().reset(seed=seed, options=options)
        frame = self._frame()
        self._frames.extend([frame] * (self._frames.maxlen or 1))
        return np.concatenate(self._frames), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Apply an action ``action_repeat`` times.

        :param action: Action in [-1, 1]
        :return: Pictures, summed reward, terminated, truncated, and an empty dict
        """
        _, reward, terminated, truncated, info = super().step(action)
        self._frames.append(self._frame())
        return np.concatenate(self._frames), reward, terminated, truncated, info

    def _frame(self) -> np.ndarray:
        return self._picture(self.pixels).transpose(2, 0, 1)


def _flat(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)
