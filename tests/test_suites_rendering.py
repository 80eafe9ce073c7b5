import os
import sys

import pytest

from sb3_mbdpo.suites import rendering


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("libraries", "chosen"), [(["EGL", "OSMesa"], "egl"), (["OSMesa"], "osmesa"), ([], None)])
def test_takes_what_is_there(headless: None, monkeypatch: pytest.MonkeyPatch, libraries: list[str], chosen: str | None):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    monkeypatch.setenv("MUJOCO_GL", "")  # restored afterwards
    assert rendering.choose_backend() == (chosen is not None)
    assert (os.environ["MUJOCO_GL"] or None) == chosen


def test_a_choice_or_a_screen_is_respected(headless: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name)
    monkeypatch.setenv("DISPLAY", ":0")
    rendering.choose_backend()
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    rendering.choose_backend()
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_explanation_is_one_sentence(headless: None):
    text = rendering.explanation(RuntimeError("no context\nand more"))
    assert "MUJOCO_GL is not set; RuntimeError: no context)" in text
    assert "\n" not in text
