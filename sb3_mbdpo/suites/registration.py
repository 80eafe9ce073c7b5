"""
Ids of the task suites.

Entry points are strings, so that an id costs nothing until it is made, a vector environment's processes and Minari can
build what was recorded, and a suite's package is asked for only when one of its tasks is.
"""

import gymnasium as gym

NAMESPACE = "mbdpo"
# The suite's episodes last 1000 control steps; every action is applied twice
DMCONTROL_DECISIONS = 500

# The paper's name of a task: domain and task of dm_control
DMCONTROL = {
    "walker-stand": ("walker", "stand"),
    "walker-walk": ("walker", "walk"),
    "walker-run": ("walker", "run"),
    "cheetah-run": ("cheetah", "run"),
    "reacher-easy": ("reacher", "easy"),
    "reacher-hard": ("reacher", "hard"),
    "acrobot-swingup": ("acrobot", "swingup"),
    "pendulum-swingup": ("pendulum", "swingup"),
    "cartpole-balance": ("cartpole", "balance"),
    "cartpole-balance-sparse": ("cartpole", "balance_sparse"),
    "cartpole-swingup": ("cartpole", "swingup"),
    "cartpole-swingup-sparse": ("cartpole", "swingup_sparse"),
    "cup-catch": ("ball_in_cup", "catch"),
    "finger-spin": ("finger", "spin"),
    "finger-turn-easy": ("finger", "turn_easy"),
    "finger-turn-hard": ("finger", "turn_hard"),
    "fish-swim": ("fish", "swim"),
    "hopper-stand": ("hopper", "stand"),
    "hopper-hop": ("hopper", "hop"),
    "quadruped-walk": ("quadruped", "walk"),
    "quadruped-run": ("quadruped", "run"),
    "humanoid-stand": ("humanoid", "stand"),
    "humanoid-walk": ("humanoid", "walk"),
    "humanoid-run": ("humanoid", "run"),
    "dog-stand": ("dog", "stand"),
    "dog-walk": ("dog", "walk"),
    "dog-trot": ("dog", "trot"),
    "dog-run": ("dog", "run"),
}


def env_id(task: str) -> str:
    """
    :param task: The paper's name of a task
    :return: Its Gymnasium id

    >>> env_id("walker-walk")
    'mbdpo/walker-walk-v0'
    """
    return f"{NAMESPACE}/{task}-v0"


def register_suites() -> None:
    """Register every task that is not registered yet."""
    for task, (domain, name) in DMCONTROL.items():
        if env_id(task) not in gym.registry:
            gym.register(
                env_id(task),
                entry_point="sb3_mbdpo.suites.dmcontrol:DMControlEnv",
                max_episode_steps=DMCONTROL_DECISIONS,
                kwargs={"domain": domain, "task": name},
            )
