"""MyoSuite's hand as the paper uses it: episodes of 100 decisions, success as in ``info["solved"]``."""

import gymnasium as gym

from sb3_mbdpo.suites.adapter import SuiteTask
from sb3_mbdpo.suites.registration import MANIPULATION_DECISIONS
from sb3_mbdpo.suites.rendering import choose_backend


def make_myosuite(name: str, render_mode: str | None = None) -> gym.Env:
    """
    :param name: MyoSuite's id of a task, such as ``myoHandReachFixed-v0``
    :param render_mode: As for MyoSuite
    :return: The environment: one action for each muscle, ``info["success"]``
    :raises ImportError: if MyoSuite is not installed, with the command that installs it
    """
    if render_mode is not None:
        choose_backend()
    try:
        import myosuite  # noqa: F401  (registers its environments)
    except ImportError as error:
        raise ImportError(
            'MyoSuite tasks need myosuite, which asks for an older gymnasium: run `pip install "sb3-mbdpo[myosuite]"` '
            "in an environment of its own."
        ) from error
    kwargs = {} if render_mode is None else {"render_mode": render_mode}
    # Its own episodes are of 50 to 200 steps, the paper's all of 100
    env = gym.make(name, max_episode_steps=MANIPULATION_DECISIONS, disable_env_checker=True, **kwargs)
    return SuiteTask(env, success_key="solved")
