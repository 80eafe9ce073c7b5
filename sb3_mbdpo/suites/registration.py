"""
Ids of the task suites.

Entry points are strings, so that an id costs nothing until it is made, a vector environment's processes and Minari can
build what was recorded, and a suite's package is asked for only when one of its tasks is.
"""

from typing import Any

import gymnasium as gym

from sb3_mbdpo.task_names import META_WORLD

NAMESPACE = "mbdpo"
# The suite's episodes last 1000 control steps; every action is applied twice
DMCONTROL_DECISIONS = 500
# Episodes of Meta-World, MyoSuite and ManiSkill
MANIPULATION_DECISIONS = 100

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
    # Ours, in sb3_mbdpo.suites.dmcontrol_tasks
    "walker-walk-backwards": ("walker", "walk_backwards"),
    "walker-run-backwards": ("walker", "run_backwards"),
    "cheetah-run-backwards": ("cheetah", "run_backwards"),
    "cheetah-run-front": ("cheetah", "run_front"),
    "cheetah-run-back": ("cheetah", "run_back"),
    "cheetah-jump": ("cheetah", "jump"),
    "hopper-hop-backwards": ("hopper", "hop_backwards"),
    "reacher-three-easy": ("reacher", "three_easy"),
    "reacher-three-hard": ("reacher", "three_hard"),
    "cup-spin": ("ball_in_cup", "spin"),
    "pendulum-spin": ("pendulum", "spin"),
    # The suite's own again, not part of mt30
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

# Tasks that are learned from pixels too, and the camera they are seen through
VISUAL = {
    "acrobot-swingup": 0,
    "cheetah-run": 0,
    "finger-spin": 0,
    "finger-turn-easy": 0,
    "finger-turn-hard": 0,
    "quadruped-walk": 2,
    "reacher-easy": 0,
    "reacher-hard": 0,
    "walker-run": 0,
    "walker-walk": 0,
}

# The paper's name of a task: MyoSuite's id
MYOSUITE = {
    "myo-reach": "myoHandReachFixed-v0",
    "myo-reach-hard": "myoHandReachRandom-v0",
    "myo-pose": "myoHandPoseFixed-v0",
    "myo-pose-hard": "myoHandPoseRandom-v0",
    "myo-obj-hold": "myoHandObjHoldFixed-v0",
    "myo-obj-hold-hard": "myoHandObjHoldRandom-v0",
    "myo-key-turn": "myoHandKeyTurnFixed-v0",
    "myo-key-turn-hard": "myoHandKeyTurnRandom-v0",
    "myo-pen-twirl": "myoHandPenTwirlFixed-v0",
    "myo-pen-twirl-hard": "myoHandPenTwirlRandom-v0",
}

# The paper's name of a task: ManiSkill's id and control mode. ManiSkill 3 has no LiftCube any more
MANISKILL = {
    "lift-cube": ("LiftCube-v1", "pd_ee_delta_pos"),
    "pick-cube": ("PickCube-v1", "pd_ee_delta_pos"),
    "stack-cube": ("StackCube-v1", "pd_ee_delta_pos"),
    "pick-ycb": ("PickSingleYCB-v1", "pd_ee_delta_pose"),
    "turn-faucet": ("TurnFaucet-v1", "pd_ee_delta_pose"),
}


def env_id(task: str, pixels: bool = False) -> str:
    """
    :param task: The paper's name of a task
    :param pixels: The variant that is seen, not measured
    :return: Its Gymnasium id

    >>> env_id("walker-walk"), env_id("walker-walk", pixels=True)
    ('mbdpo/walker-walk-v0', 'mbdpo/walker-walk-pixels-v0')
    """
    return f"{NAMESPACE}/{task}{'-pixels' if pixels else ''}-v0"


def task_of(name: str) -> str:
    """
    :param name: A Gymnasium id, one of ours or ``dm_control/<domain>-<task>-v0``, or a task's name
    :return: The paper's name of the task; what is none of these, as it is

    >>> task_of("mbdpo/walker-walk-pixels-v0"), task_of("dm_control/ball_in_cup-catch-v0"), task_of("mw-reach")
    ('walker-walk', 'cup-catch', 'mw-reach')
    """
    if name.startswith(f"{NAMESPACE}/"):
        return name.removeprefix(f"{NAMESPACE}/").removesuffix("-v0").removesuffix("-pixels")
    if name.startswith("dm_control/"):
        domain, _, task = name.removeprefix("dm_control/").removesuffix("-v0").partition("-")
        return {names: ours for ours, names in DMCONTROL.items()}.get((domain, task), name)
    return name


def register_suites() -> None:
    """Register every task that is not registered yet."""
    for task, (domain, name) in DMCONTROL.items():
        kwargs: dict[str, Any] = {"domain": domain, "task": name}
        _register(env_id(task), "dmcontrol:DMControlEnv", DMCONTROL_DECISIONS, kwargs)
        if task in VISUAL:
            kwargs = kwargs | {"camera": VISUAL[task]}
            _register(env_id(task, pixels=True), "dmcontrol:DMControlPixelsEnv", DMCONTROL_DECISIONS, kwargs)
    for task in META_WORLD:
        kwargs = {"name": f"{task.removeprefix('mw-')}-v3"}
        _register(env_id(task), "metaworld:make_metaworld", MANIPULATION_DECISIONS, kwargs)
    for task, name in MYOSUITE.items():
        _register(env_id(task), "myosuite:make_myosuite", MANIPULATION_DECISIONS, {"name": name})
    for task, (name, control_mode) in MANISKILL.items():
        kwargs = {"name": name, "control_mode": control_mode}
        _register(env_id(task), "maniskill:make_maniskill", MANIPULATION_DECISIONS, kwargs)


def _register(name: str, entry_point: str, decisions: int, kwargs: dict[str, Any]) -> None:
    if name not in gym.registry:
        gym.register(name, f"sb3_mbdpo.suites.{entry_point}", max_episode_steps=decisions, kwargs=kwargs)
