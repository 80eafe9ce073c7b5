"""Commands that the RL Zoo's own programs carry out, after a look at what they are given."""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import train as zoo_train
from rl_zoo3.utils import EnvironmentName, StoreDict, get_model_path

from sb3_mbdpo import quickstart, zoo, zoo_checks
from sb3_mbdpo.gym_packages import add_packages_argument, import_packages, without_packages
from sb3_mbdpo.suites.rendering import choose_backend
from sb3_mbdpo.training_checks import check_log_folder, check_values
from sb3_mbdpo.zoo_checks import BadInputError

PROG = "mbdpo"
VERSIONS_FILE = "versions.txt"
# What a run's numbers may depend on
PACKAGES = (
    *("sb3-mbdpo", "torch", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "numpy"),
    *("mujoco", "dm_control", "metaworld", "myosuite", "mani_skill", "box2d"),
)

# Options of a training that count something
COUNTS = ("--n-eval-envs", "--eval-episodes", "--n-trials", "--n-jobs", "--n-evaluations")


# --- commands ---------------------------------------------------------------------------------------------------------


def train(arguments: Sequence[str]) -> int:
    """
    :param arguments: as for rl_zoo3's train
    :return: exit code
    """
    if not _asks_for_help(arguments):
        _check_training(_training_arguments(arguments))
    with _versions_kept(arguments):
        zoo.hand_over("train", arguments, f"{PROG} train")
    return 0


def tune(arguments: Sequence[str]) -> int:
    """
    Search hyperparameters. The first trial is the entry as it is; trials are kept in a file, so that the same
    ``--study-name`` goes on where it stopped.

    :param arguments: as for rl_zoo3's train
    :return: exit code
    """
    if _asks_for_help(arguments):
        print(
            "mbdpo tune is mbdpo train --optimize-hyperparameters with the study kept in --storage (by default "
            "LOG_FOLDER/mbdpo/tuning.log), and the values of the configuration as its first trial.\n"
        )
        zoo.hand_over("train", arguments, f"{PROG} tune")
        return 0
    given = _training_arguments(arguments)
    entry = _check_training(given)
    completed = [*arguments, "--optimize-hyperparameters"]
    storage = given.storage or str(Path(given.log_folder) / zoo.ALGO / "tuning.log")
    name = given.study_name or f"{given.env.replace('/', '-')}_{int(time.time())}"
    if given.algo == zoo.ALGO:
        completed += [] if given.storage else ["--storage", storage]
        completed += [] if given.study_name else ["--study-name", name]

    def begin_study() -> None:
        if given.algo == zoo.ALGO:
            _enqueue_default(storage, name, zoo.default_trial(entry, given.device))
            print(f"Study {name} in {storage}; go on with it by --study-name {name}")

    try:
        with _once_arguments_are_taken(begin_study):
            zoo.hand_over("train", completed, f"{PROG} tune")
    except ValueError as error:
        if "No trials are completed" not in str(error):
            raise
        print(f"{PROG} tune: no trial was completed.")
        return 1
    return 0


def enjoy(arguments: Sequence[str]) -> int:
    """
    :param arguments: as for rl_zoo3's enjoy
    :return: exit code
    """
    if not _asks_for_help(arguments):
        given = _acting_arguments(arguments)
        _check_acting(given)
        if not given.no_render:
            zoo_checks.check_display()
    zoo.hand_over("enjoy", arguments, f"{PROG} enjoy")
    return 0


def video(arguments: Sequence[str]) -> int:
    """
    :param arguments: as for rl_zoo3's record_video
    :return: exit code
    """
    if not _asks_for_help(arguments):
        zoo_checks.check_ffmpeg()
        _render_without_a_screen()
        _check_acting(_acting_arguments(arguments))
    # rl_zoo3's program knows no packages; they are imported by now
    zoo.hand_over("record_video", without_packages(arguments), f"{PROG} video")
    return 0


def report(arguments: Sequence[str]) -> int:
    """
    :param arguments: as for ``python -m sb3_mbdpo.quickstart report``
    :return: exit code
    """
    if not _asks_for_help(arguments):
        _render_without_a_screen()
        given = _acting_arguments(arguments)
        given.env = given.env or "Pendulum-v1"
        _check_acting(given)
    quickstart.main(["report", *arguments], prog=PROG)
    return 0


# --- what is looked at first ------------------------------------------------------------------------------------------


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    try:
        given = parser.parse_known_args(list(arguments))[0]
    except (ValueError, NameError, SyntaxError, TypeError) as error:
        raise BadInputError(
            "Hyperparameters and keywords are name:value with a value in Python, strings in quotes of their own, as in "
            f"-params horizon:5 \"preset:'cpu'\" ({error})."
        ) from error
    import_packages(given.gym_packages)
    zoo_checks.import_environments(given.env)
    return given


def _training_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    # The zoo's own spellings and defaults; what is not among them is not looked at
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default=zoo.ALGO)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-n", "--n-timesteps", default="-1")
    parser.add_argument("--seed")
    parser.add_argument("-tb", "--tensorboard-log", default="")
    for option in (*COUNTS, "--log-interval"):
        parser.add_argument(option)
    parser.add_argument("-f", "--log-folder", default="logs")
    parser.add_argument("-i", "--trained-agent", default="")
    parser.add_argument("-conf", "--conf-file", default=str(zoo.default_config()))
    parser.add_argument("-params", "--hyperparams", nargs="+", action=StoreDict, default={})
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, default={})
    add_packages_argument(parser)
    parser.add_argument("--storage")
    parser.add_argument("--study-name")
    return _parse(parser, arguments)


def _check_training(given: argparse.Namespace) -> dict[str, Any]:
    """:return: The hyperparameters that training will use, as far as they are this package's business"""
    zoo_checks.check_device(given.device)
    zoo_checks.check_seed(given.seed, least=-1)
    # The zoo's own words for "as the entry has it", and for no logs at all
    zoo_checks.check_count("--n-timesteps", given.n_timesteps, also=(-1,))
    zoo_checks.check_count("--log-interval", given.log_interval, also=(-1, -2))
    for option in COUNTS:
        zoo_checks.check_count(option, getattr(given, option[2:].replace("-", "_")))
    if given.tensorboard_log and importlib.util.find_spec("tensorboard") is None:
        raise BadInputError('--tensorboard-log needs tensorboard: run `pip install "sb3-mbdpo[tracking]"`.')
    if given.trained_agent:
        if not given.trained_agent.endswith(".zip") or not Path(given.trained_agent).is_file():
            raise BadInputError(f"There is no trained agent {given.trained_agent}: -i takes the path of its .zip file.")
        zoo_checks.check_saved_model(given.trained_agent, given.algo)
    entry: dict[str, Any] = {}
    if given.algo == zoo.ALGO and given.conf_file.endswith((".yml", ".yaml")):
        where = f"{given.conf_file}, {given.env}"
        entry = zoo_checks.read_entry(given.conf_file, given.env, given.hyperparams)
        zoo_checks.check_hyperparams(entry, where)
        check_values(given, entry, where)
    else:
        zoo_checks.check_environment(given.env, given.env_kwargs, continuous=given.algo == zoo.ALGO)
    # Last, as it is made
    check_log_folder(given.log_folder)
    return entry


def _acting_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default=zoo.ALGO)
    parser.add_argument("--env", default="")
    parser.add_argument("-f", "--folder", default="logs")
    parser.add_argument("--exp-id", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed")
    # Of report they are episodes
    parser.add_argument("-n", "--n-timesteps", "--n-episodes")
    parser.add_argument("--n-envs")
    parser.add_argument("--no-render", action="store_true")
    parser.add_argument("--load-best", action="store_true")
    parser.add_argument("--load-checkpoint", type=int)
    parser.add_argument("--load-last-checkpoint", action="store_true")
    add_packages_argument(parser)
    return _parse(parser, arguments)


def _check_acting(given: argparse.Namespace) -> None:
    if not given.env:
        raise BadInputError("Name the environment that the agent was trained on with --env.")
    zoo_checks.check_device(given.device)
    zoo_checks.check_seed(given.seed)
    zoo_checks.check_count("-n", given.n_timesteps)
    zoo_checks.check_count("--n-envs", given.n_envs)
    zoo_checks.check_environment(given.env, continuous=given.algo == zoo.ALGO)
    if given.exp_id != -1:
        zoo_checks.check_run(given.folder, given.algo, given.env)
    choices = (given.load_best, given.load_checkpoint, given.load_last_checkpoint)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            path = get_model_path(given.exp_id, given.folder, given.algo, EnvironmentName(given.env), *choices)[1]
    except (AssertionError, ValueError) as error:
        raise BadInputError(f"{error}.") from error
    zoo_checks.check_saved_model(path, given.algo)


def _render_without_a_screen() -> None:
    choose_backend()
    if not zoo_checks.has_display():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen


# --- what the zoo does not keep ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _once_arguments_are_taken(begin: Callable[[], None]) -> Iterator[None]:
    """Do something when rl_zoo3's train has looked at its arguments, which it may refuse, and before it begins."""
    original = zoo_train.ExperimentManager

    def manager(*args: Any, **kwargs: Any) -> Any:
        begin()
        return original(*args, **kwargs)

    zoo_train.ExperimentManager = manager  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        zoo_train.ExperimentManager = original  # type: ignore[misc]


def _enqueue_default(storage: str, name: str, values: dict[str, Any]) -> None:
    backend: Any = storage
    if storage.endswith(".log"):  # as rl_zoo3 opens it
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.JournalStorage(JournalFileBackend(storage))
    study = optuna.create_study(storage=backend, study_name=name, load_if_exists=True, direction="maximize")
    if not study.trials:
        study.enqueue_trial(values)


@contextlib.contextmanager
def _versions_kept(arguments: Sequence[str]) -> Iterator[None]:
    """Write the versions of packages into the folders of runs that are new at the end."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default=zoo.ALGO)
    parser.add_argument("-f", "--log-folder", default="logs")
    given = zoo_checks.known_arguments(parser, arguments)
    root = Path(given.log_folder) / given.algo
    before = set(root.glob("*"))
    try:
        yield
    finally:
        for folder in set(root.glob("*")) - before:
            if folder.is_dir():
                (folder / VERSIONS_FILE).write_text(installed_versions())


def installed_versions() -> str:
    """
    :return: the packages that a run's numbers may depend on, in the form of a requirements file, Python in a comment
    """
    lines = [f"# Python {platform.python_version()}, {platform.platform()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{package}=={importlib.metadata.version(package)}")
    return "\n".join(lines) + "\n"
