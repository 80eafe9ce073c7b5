"""Which of MuJoCo's rendering back ends to use where there is no screen, and what to say when none works."""

import ctypes.util
import os
import sys

# Libraries that render without a screen, and what MUJOCO_GL calls them
OFFSCREEN = {"EGL": "egl", "OSMesa": "osmesa"}


def choose_backend() -> bool:
    """
    Set ``MUJOCO_GL`` to a back end that needs no screen, on Linux without a display, unless it is set already.

    MuJoCo and dm_control read it once, when they are imported: call this before.

    :return: Whether it was set
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")):
        return False
    for library, backend in OFFSCREEN.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return True
    return False


def explanation(error: BaseException) -> str:
    """
    :param error: What came of rendering, or of importing a package that renders
    :return: What to do about it, in a sentence
    """
    backend = os.environ.get("MUJOCO_GL")
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return (
        "MuJoCo cannot render here: without a screen, install EGL or OSMesa (Debian: libegl1 and libgl1-mesa-dri, or "
        "libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa before Python starts "
        f"(MUJOCO_GL is {'not set' if backend is None else repr(backend)}; {reason})."
    )
