"""
ManiSkill as the paper uses it: state observations, end-effector control, every action applied twice.

Not verified: ManiSkill 3 starts its renderer, which needs a Vulkan device, whatever is observed. The paper ran version
2, whose LiftCube version 3 has not kept, and whose TurnFaucet had dense rewards.
"""

import gymnasium as gym

from sb3_mbdpo.suites.adapter import SuiteTask


def make_maniskill(name: str, control_mode: str, action_repeat: int = 2, render_mode: str | None = None) -> gym.Env:
    """
    :param name: ManiSkill's id of a task, such as ``PickCube-v1``
    :param control_mode: What an action means, such as ``pd_ee_delta_pos``
    :param action_repeat: Steps that an action lasts
    :param render_mode: As for ManiSkill
    :return: The environment: flat state observations, ``info["success"]``
    :raises ImportError: if ManiSkill is not installed, with the command that installs it
    :raises RuntimeError: where there is no Vulkan device, no such task in this version of ManiSkill, or its models are
        not downloaded
    """
    try:
        import mani_skill.envs  # noqa: F401  (registers its environments)
        from mani_skill.utils.wrappers import CPUGymWrapper
    except ImportError as error:
        raise ImportError(
            'ManiSkill tasks need mani_skill and a Vulkan device: run `pip install "sb3-mbdpo[maniskill]"`.'
        ) from error
    if name not in gym.registry:
        raise RuntimeError(f"This version of ManiSkill has no {name}: choose another of its tasks (`mbdpo tasks`).")
    try:
        env = gym.make(name, obs_mode="state", control_mode=control_mode, render_mode=render_mode, sim_backend="cpu")
    except EOFError as error:
        # It asks on the terminal whether to download them
        raise RuntimeError(
            f"{name} needs models that are not downloaded yet: run `python -m mani_skill.utils.download_asset {name}`."
        ) from error
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("vk::", "vulkan", "physical device")):
            raise
        raise RuntimeError(
            "ManiSkill found no Vulkan device, which it needs even for state observations: it takes a GPU and its "
            f"driver, as `vulkaninfo` shows them; a processor's software driver is not enough ({error})."
        ) from error
    return SuiteTask(CPUGymWrapper(env), action_repeat)
