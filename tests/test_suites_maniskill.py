"""What is said where ManiSkill's tasks cannot be made, by a stand-in for its package; the tasks were not run."""

import sys
from types import ModuleType
from typing import Any

import gymnasium as gym
import pytest

import sb3_mbdpo.suites  # noqa: F401
from sb3_mbdpo.suites import maniskill


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mani_skill", "mani_skill.envs", "mani_skill.utils", "mani_skill.utils.wrappers"):
        module: Any = ModuleType(name)
        module.CPUGymWrapper = lambda env: env
        monkeypatch.setitem(sys.modules, name, module)
    registry = dict(gym.registry) | {"PickCube-v1": gym.spec("Pendulum-v1")}
    monkeypatch.setattr(maniskill.gym, "registry", registry)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver"), "found no Vulkan device.*Incompatible"),
        (RuntimeError('Failed to find a supported physical device "cpu"'), "found no Vulkan device"),
        (RuntimeError("something else"), "^something else$"),
        (EOFError("EOF when reading a line"), "download_asset PickCube-v1"),
    ],
)
def test_what_is_missing(package: None, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str):
    def make(*args: Any, **kwargs: Any) -> gym.Env:
        assert kwargs["obs_mode"] == "state"
        raise error

    monkeypatch.setattr(maniskill.gym, "make", make)
    with pytest.raises(RuntimeError, match=message):
        maniskill.make_maniskill("PickCube-v1", "pd_ee_delta_pos")


def test_tasks_that_version_3_has_not(package: None):
    with pytest.raises(RuntimeError, match="has no LiftCube-v1"):
        maniskill.make_maniskill("LiftCube-v1", "pd_ee_delta_pos")
