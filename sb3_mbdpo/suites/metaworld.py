"""
Meta-World as the paper uses it: the goal in the observation, drawn anew in each episode, every action applied twice.

The paper ran version 2 of the tasks; what can be installed today, and is used here, is version 3.
"""

import gymnasium as gym

from sb3_mbdpo.suites.adapter import SuiteTask
from sb3_mbdpo.suites.rendering import choose_backend


def make_metaworld(name: str, action_repeat: int = 2, render_mode: str | None = None) -> gym.Env:
    """
    :param name: Meta-World's name of a task, such as ``reach-v3``
    :param action_repeat: Steps that an action lasts
    :param render_mode: As for Meta-World
    :return: The environment: 39 observations, 4 actions, ``info["success"]``
    :raises ImportError: if Meta-World is not installed, with the command that installs it
    """
    if render_mode is not None:
        choose_backend()
    try:
        from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    except ImportError as error:
        raise ImportError(
            'Meta-World tasks need metaworld, which pins another mujoco than dm_control: run `pip install "sb3-mbdpo'
            '[metaworld]"` in an environment of its own.'
        ) from error
    # A seed here keeps NumPy's global generator as it was; reset(seed=...) starts goals anew
    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"](seed=0, render_mode=render_mode)
    # Made to be used with one goal; with these it draws a goal in each episode, from its own generator
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    return SuiteTask(_Seeded(env), action_repeat)


class _Seeded(gym.Wrapper):
    """Meta-World's environments take their seed from a method of their own, and `reset` ignores it."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self.env.unwrapped.seed(seed)  # type: ignore[attr-defined]
        return self.env.reset(options=options)
