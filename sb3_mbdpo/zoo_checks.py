"""What is looked at before a program of the RL Zoo starts, when mistakes cost a sentence and not hours."""

import argparse
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.utils import get_device

from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.suites.catalogue import SUITES

# What an entry of a configuration file may hold besides the algorithm's arguments: rl_zoo3 takes it for itself
ZOO_KEYS = {
    *("n_timesteps", "n_envs", "env_wrapper", "vec_env_wrapper", "env_kwargs", "monitor_kwargs"),
    *("normalize", "frame_stack", "callback", "noise_type", "noise_std"),
}
# Beginnings of entry points, the module that has to be there, and what installs it
PACKAGES = (
    *((f"sb3_mbdpo.suites.{name}", suite.package, suite.install_command) for name, suite in SUITES.items()),
    ("gymnasium.envs.mujoco", "mujoco", 'pip install "sb3-mbdpo[mujoco]"'),
    ("gymnasium.envs.box2d", "Box2D", 'pip install "sb3-mbdpo[box2d]"'),
    ("gymnasium_robotics", "gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<3.12"'),
)
# Ids that a package registers when it is imported, by their beginning
IMPORTS = {
    "dm_control/": ("shimmy", 'pip install "sb3-mbdpo[dmc]"'),
    "Meta-World/": ("metaworld", 'pip install "sb3-mbdpo[metaworld]"'),
    "Fetch": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<3.12"'),
    "myo": ("myosuite", 'pip install "sb3-mbdpo[myosuite]"'),
}

# NumPy's
LARGEST_SEED = 2**32 - 1


class BadInputError(ValueError):
    """A mistake on the command line, said in one sentence."""


def known_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """
    :param parser: Some of a program's arguments
    :param arguments: All of them
    :return: Those that the parser knows; the rest is the program's business
    """
    return parser.parse_known_args(list(arguments))[0]


# --- environments -----------------------------------------------------------------------------------------------------


def import_environments(env_id: str) -> None:
    """
    Import the package that registers an environment, where that is one of this package's extras.

    :param env_id: environment id
    """
    if env_id in gym.registry:
        return
    if env_id.startswith("dm_control/"):
        try:
            importlib.import_module("shimmy")
            importlib.import_module("dm_control")
        except ImportError as error:
            message = f'{env_id} needs the DeepMind Control Suite: run `pip install "sb3-mbdpo[dmc]"`'
            raise ImportError(message) from error
    elif env_id.startswith("Fetch"):
        try:
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
        except ImportError as error:
            message = f'{env_id} needs Gymnasium-Robotics: run `pip install gymnasium-robotics "mujoco<3.12"`'
            raise ImportError(message) from error


def check_environment(env_id: str, env_kwargs: dict[str, Any] | None = None, continuous: bool = True) -> None:
    """
    Build the environment and close it again.

    :param env_id: Environment id
    :param env_kwargs: Keywords to make it with
    :param continuous: Whether the algorithm acts in Box spaces alone, as MBDPO does
    :raises BadInputError: if it is not registered, its package is missing, or MBDPO cannot act in it
    """
    check_registered(env_id)
    try:
        env = gym.make(env_id, disable_env_checker=True, **(env_kwargs or {}))
    except (ImportError, RuntimeError, gym.error.Error, TypeError) as error:
        raise BadInputError(f"{env_id} cannot be made: {sentence(error)}") from error
    actions = env.action_space
    env.close()
    if continuous:
        check_actions(env_id, actions)


def check_registered(env_id: str) -> None:
    """
    :param env_id: Environment id
    :raises BadInputError: if it is not registered, or its package is missing
    """
    if env_id not in gym.registry:
        raise BadInputError(_unregistered(env_id))
    command = _missing_package(str(gym.spec(env_id).entry_point))
    if command:
        raise BadInputError(f"{env_id} needs a package that is not installed: run `{command}`.")


def check_actions(env_id: str, actions: spaces.Space, other_algorithms: bool = True) -> None:
    """
    :param env_id: Environment id
    :param actions: Its action space
    :param other_algorithms: Whether the command has others than MBDPO
    :raises BadInputError: if MBDPO cannot act in it
    """
    if not isinstance(actions, spaces.Box):
        other = ", or another algorithm (--algo)" if other_algorithms else ""
        raise BadInputError(
            f"{env_id} has {actions} actions and MBDPO plans in finite Box spaces: take a continuous variant of "
            f"it{other}."
        )


def _unregistered(env_id: str) -> str:
    for prefix, (package, command) in IMPORTS.items():
        if env_id.startswith(prefix) and importlib.util.find_spec(package) is None:
            return f"{env_id} is registered by {package}, which is not installed: run `{command}`."
    # Other versions and namespaces first: that is what is mistyped most
    bare = re.sub(r"-v\d+$", "", env_id).rpartition("/")[2].lower()
    same = [name for name in gym.registry if re.sub(r"-v\d+$", "", name).rpartition("/")[2].lower() == bare]
    alike = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)
    near = list(dict.fromkeys([*sorted(same, reverse=True), *alike]))[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "`mbdpo tasks` lists the paper's."
    commands = {_missing_package(str(gym.spec(name).entry_point)) for name in near[:1]} - {None}
    install = f" (It needs `{commands.pop()}`.)" if commands else ""
    return f"There is no environment {env_id!r}; {hint}{install}"


def _missing_package(entry_point: str) -> str | None:
    for start, package, command in PACKAGES:
        if entry_point.startswith(start) and importlib.util.find_spec(package) is None:
            return command
    return None


def sentence(error: BaseException) -> str:
    """
    :param error: What was raised
    :return: The first line of its message, without a stop
    """
    return (f"{error}".strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- devices ----------------------------------------------------------------------------------------------------------


def check_device(device: str) -> None:
    """
    :param device: A PyTorch device, or "auto"
    :raises BadInputError: if nothing can be put there
    """
    try:
        chosen = get_device(device)
        th.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"--device {device} cannot be used: {sentence(error)}.") from error
    if device != "auto" and chosen.type != th.device(device).type:
        # Stable-Baselines3 takes the CPU without a word
        raise BadInputError(f"--device {device} cannot be used: PyTorch finds no such device here.")


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_count(option: str, text: str | None, also: Sequence[int] = ()) -> None:
    """
    :param option: Option of a command
    :param text: Its value as it was given, None where it was not
    :param also: What it may be besides a whole number of at least 1
    :raises BadInputError: if it is less
    """
    number = _whole_number(text)
    if number is not None and number < 1 and number not in also:
        raise BadInputError(f"{option} must be at least 1, got {number}.")


def check_seed(text: str | None, least: int = 0) -> None:
    """
    :param text: A seed as it was given, None where it was not
    :param least: The smallest one; -1 where that draws one
    :raises BadInputError: if there is no such seed
    """
    number = _whole_number(text)
    if number is not None and not least <= number <= LARGEST_SEED:
        raise BadInputError(f"--seed must be between {least} and {LARGEST_SEED}, got {number}.")


def _whole_number(text: str | None) -> int | None:
    """None too for what is none, which the program itself refuses."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


# --- hyperparameters --------------------------------------------------------------------------------------------------


def read_entry(config: str, env_id: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    :param config: A configuration file, YAML
    :param env_id: Environment id
    :param overrides: What to put over the entry, as after ``-params``
    :return: The entry for the environment, or the default one, with the overrides
    :raises BadInputError: if the file is missing or not one, or it holds neither entry
    """
    try:
        entries = yaml.safe_load(Path(config).read_text())
    except OSError as error:
        raise BadInputError(f"There is no configuration file {config} ({sentence(error)}).") from error
    except yaml.YAMLError as error:
        raise BadInputError(f"{config} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(entries, dict) or not any(isinstance(entries.get(name), dict) for name in (env_id, "default")):
        raise BadInputError(f"{config} has no entry for {env_id}, and no default one.")
    entry = entries[env_id] if isinstance(entries.get(env_id), dict) else entries["default"]
    return entry | dict(overrides or {})


def check_hyperparams(entry: dict[str, Any], where: str) -> None:
    """
    :param entry: An entry of a configuration file
    :param where: Where it comes from
    :raises BadInputError: for names that neither MBDPO nor the zoo knows, with the nearest
    """
    accepted = (set(inspect.signature(MBDPO.__init__).parameters) - {"self", "env", "args", "kwargs"}) | ZOO_KEYS
    for name in entry:
        if name not in accepted:
            near = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "MBDPO's docstring lists them."
            raise BadInputError(f"{where}: MBDPO has no hyperparameter {name!r}; {hint}")


# --- runs -------------------------------------------------------------------------------------------------------------


def check_run(folder: str, algo: str, env_id: str) -> None:
    """
    :param folder: Log folder
    :param algo: Algorithm
    :param env_id: Environment id
    :raises BadInputError: if there is no such run, saying of which algorithms there are some
    """
    name = env_id.replace("/", "-")
    root = Path(folder)
    if not root.is_dir():
        raise BadInputError(f"There is no log folder {folder}: give the one of the training with -f.")
    if any(run_number(path, name) for path in (root / algo).glob(f"{name}_*")):
        return
    others = sorted({path.parent.name for path in root.glob(f"*/{name}_*") if run_number(path, name)})
    hint = f"there are runs of {', '.join(others)}: add --algo" if others else f"train one: mbdpo train --env {env_id}"
    raise BadInputError(f"There is no run of {algo} on {env_id} under {folder}; {hint}.")


def run_number(path: Path, name: str) -> int | None:
    """
    :param path: A folder
    :param name: Environment id with "-" for "/"
    :return: The number at the end of a run's name (``Pendulum-v1_3``); None if it is no run of this environment
    """
    match = re.fullmatch(re.escape(name) + r"_(\d+)(_[0-9a-f-]{36})?", path.name)
    return int(match.group(1)) if match else None


def check_saved_model(path: str, algo: str) -> None:
    """
    Look at which algorithm wrote a model; nothing of it is unpickled.

    :param path: Saved model, a zip file
    :param algo: Algorithm to load it with
    :raises BadInputError: if it is not a model of MBDPO although MBDPO is to load it
    """
    if algo != "mbdpo":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
            policy = data.get("policy_class", {})
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BadInputError(f"{path} is not a model that Stable-Baselines3 saved ({sentence(error)}).") from error
    module = str(policy.get("__module__", "")) if isinstance(policy, dict) else ""
    # Whatever class its policy is of, a model of MBDPO has its arguments
    if module and "denoising_steps" not in data:
        raise BadInputError(
            f"{path} is a model of another algorithm (its policy is from {module}): name it with --algo."
        )


# --- seeing -----------------------------------------------------------------------------------------------------------


def has_display() -> bool:
    """:return: Whether windows can be opened; Linux says so in its environment"""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def check_display() -> None:
    """
    :raises BadInputError: where no window can be opened
    """
    if not has_display():
        raise BadInputError("There is no display to show the agent on: add --no-render, or use `mbdpo video`.")


def check_ffmpeg() -> None:
    """
    :raises BadInputError: if videos cannot be written, with what to install
    """
    if importlib.util.find_spec("moviepy") is None:
        raise BadInputError(
            'Videos are written by moviepy, which is not installed: run `pip install "sb3-mbdpo[zoo]"`.'
        )
    chosen = os.environ.get("IMAGEIO_FFMPEG_EXE")
    try:
        import imageio_ffmpeg

        found = shutil.which(chosen or imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        found = None
    if found is None:
        where = f" at IMAGEIO_FFMPEG_EXE={chosen}" if chosen else ""
        raise BadInputError(f"Videos need ffmpeg, which is not there{where}: run `pip install imageio-ffmpeg`.")
