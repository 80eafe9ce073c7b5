"""
MBDPO in the RL Zoo (``rl_zoo3``): registration, an Optuna search space, and the way to the zoo's own programs.

Importing this module is enough to make ``--algo mbdpo`` known to ``rl_zoo3`` in this process. The zoo builds its list
of algorithms when its argument parser is built, before it looks at ``--gym-packages``, which is therefore too late to
bring in an algorithm; so its programs are entered from here, by the command ``mbdpo`` (``sb3_mbdpo.cli``) or as::

    python -m sb3_mbdpo.zoo train --env Pendulum-v1 -P
    python -m sb3_mbdpo.zoo enjoy --env Pendulum-v1

Everything after the command goes to ``rl_zoo3`` as it is. Only what would otherwise point away from MBDPO is filled in:
``--algo mbdpo``, ``-conf`` with the hyperparameters of this package, and the log folder to look for trained agents in.
"""

import argparse
import importlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.utils import get_device

from sb3_mbdpo import MBDPO, zoo_checks
from sb3_mbdpo.presets import resolve_preset

try:
    import rl_zoo3
    from rl_zoo3 import hyperparams_opt
except ImportError as error:
    raise ImportError('the RL Zoo is not installed: run `pip install "sb3-mbdpo[zoo]"`') from error

if TYPE_CHECKING:
    import optuna

ALGO = "mbdpo"

# What `python -m sb3_mbdpo.zoo` can do, and where rl_zoo3 does it. Without a function name the module is a script.
COMMANDS: dict[str, tuple[str, str | None]] = {
    "train": ("rl_zoo3.train", "train"),
    "enjoy": ("rl_zoo3.enjoy", "enjoy"),
    "record_video": ("rl_zoo3.record_video", None),
    "plot_train": ("rl_zoo3.plots", "plot_train"),
    "all_plots": ("rl_zoo3.plots", "all_plots"),
    "plot_from_file": ("rl_zoo3.plots", "plot_from_file"),
}


class ActingMBDPO(MBDPO):
    """
    MBDPO as it is loaded to act, not to learn: with room for next to no replay.

    ``rl_zoo3`` does this with ``buffer_size=1`` for a fixed list of algorithms. MBDPO is not on it and would allocate
    the whole buffer it was trained with.
    """

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :param path: path to the saved model
        :param args: as for ``MBDPO.load``
        :param kwargs: as for ``MBDPO.load``; ``buffer_size`` is 1 unless given
        :return: the loaded model
        """
        kwargs.setdefault("buffer_size", 1)
        return super().load(path, *args, **kwargs)


def default_config() -> Path:
    """
    :return: path to the hyperparameter file that comes with this package
    """
    package = Path(__file__).resolve().parent
    # Inside the package when installed, next to it in a checkout.
    candidates = [package / "zoo_configs" / f"{ALGO}.yml", package.parent / "zoo_configs" / f"{ALGO}.yml"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no hyperparameter file at {candidates[0]} or {candidates[1]}")


def convert_mbdpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn what Optuna sampled into arguments of MBDPO.

    :param sampled_params: values as the search space names them
    :return: keyword arguments of MBDPO
    """
    hyperparams = sampled_params.copy()
    # Elites are sampled as a share of the candidates, so that there are never more of them than candidates.
    hyperparams["n_elites"] = max(2, round(hyperparams.pop("elite_fraction") * hyperparams["n_samples"]))
    return hyperparams


# Ranges of the search space, logarithmic; every preset but "debug" lies inside
SEARCH_SPACE: dict[str, tuple[float, float]] = {
    # Learning
    "learning_rate": (1e-4, 2e-3),
    "batch_size": (32, 512),
    "tau": (0.005, 0.1),
    # Search: depth, number of denoising steps, width, greediness
    "horizon": (2, 6),
    "denoising_steps": (3, 20),
    "n_samples": (32, 512),
    "elite_fraction": (0.05, 0.5),
    "temperature": (0.1, 2.0),
    # Exploration, and how strongly the search is held to the behaviour in the data
    "exploration_noise": (0.02, 0.5),
    "energy_coef": (1e-3, 1.0),
}


def sample_mbdpo_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Search space of MBDPO. What is not sampled stays with the configuration file and its preset.

    :param trial: the trial to sample for
    :param n_actions: dimension of the action space (not used)
    :param n_envs: number of training environments (not used)
    :param additional_args: what rl_zoo3 knows about hindsight replay (not used)
    :return: keyword arguments of MBDPO
    """
    sampled: dict[str, Any] = {}
    for name, (low, high) in SEARCH_SPACE.items():
        if isinstance(high, int):
            sampled[name] = trial.suggest_int(name, int(low), high, log=True)
        else:
            sampled[name] = trial.suggest_float(name, low, high, log=True)
    hyperparams = convert_mbdpo_params(sampled)
    # Show the true value next to the sampled one
    trial.set_user_attr("n_elites", hyperparams["n_elites"])
    return hyperparams


def default_trial(hyperparams: dict[str, Any], device: str = "auto") -> dict[str, Any]:
    """
    Where the search starts: the preset's values (the paper's, with ``preset: 'paper'``) and what an entry sets.

    :param hyperparams: an entry of the configuration file
    :param device: where models will run; it decides what the preset "auto" is
    :return: a value for each name of the search space, moved to the nearest edge where it lies outside

    >>> trial = default_trial({"preset": "paper"})
    >>> trial["learning_rate"], trial["denoising_steps"], trial["n_samples"], trial["energy_coef"]
    (0.0003, 20, 512, 0.01)
    """
    _, values = resolve_preset(hyperparams.get("preset", "auto"), get_device(device))
    values["energy_coef"] = inspect.signature(MBDPO.__init__).parameters["energy_coef"].default
    values |= {name: value for name, value in hyperparams.items() if value is not None}
    rate = values["learning_rate"]
    values["learning_rate"] = float(rate.split("_")[1]) if isinstance(rate, str) else rate
    values["elite_fraction"] = values["n_elites"] / values["n_samples"]
    trial = {}
    for name, (low, high) in SEARCH_SPACE.items():
        trial[name] = type(high)(min(max(values[name], low), high))
    return trial


def register() -> None:
    """
    Make ``mbdpo`` known to ``rl_zoo3`` in this process: algorithm, search space and its conversion.
    """
    rl_zoo3.ALGOS[ALGO] = MBDPO
    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_mbdpo_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_mbdpo_params


def complete_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """
    Fill in what a command of ``rl_zoo3`` needs to find MBDPO and its files, unless it was given.

    :param command: a key of ``COMMANDS``
    :param arguments: the arguments after the command
    :return: the arguments, with those that were missing at the end
    """
    completed = list(arguments)
    if command not in ("train", "enjoy", "record_video"):
        return completed
    # The zoo's own spellings; what is not among them is not looked at.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo")
    parser.add_argument("--env", default="")
    if command == "train":
        parser.add_argument("-conf", "--conf-file")
    else:
        parser.add_argument("-f", "--folder")
    given, _ = parser.parse_known_args(completed)

    zoo_checks.import_environments(given.env)
    if given.algo is None:
        completed += ["--algo", ALGO]
    if given.algo in (None, ALGO):
        if command == "train" and given.conf_file is None:
            completed += ["-conf", str(default_config())]
        if command != "train" and given.folder is None:
            # The zoo's default folder would make it look for a pretrained agent on the Hub.
            completed += ["-f", "logs"]
    return completed


def hand_over(command: str, arguments: Sequence[str], prog: str | None = None) -> None:
    """
    Run a program of ``rl_zoo3`` with MBDPO among its algorithms.

    :param command: a key of ``COMMANDS``
    :param arguments: its arguments; what it needs to find MBDPO is filled in
    :param prog: what its help calls the program; None: ``python -m sb3_mbdpo.zoo COMMAND``
    """
    register()
    completed = complete_arguments(command, arguments)
    if command in ("enjoy", "record_video"):
        rl_zoo3.ALGOS[ALGO] = ActingMBDPO

    # rl_zoo3 reads its arguments from sys.argv.
    module, function = COMMANDS[command]
    previous_argv, sys.argv = sys.argv, [prog or f"python -m sb3_mbdpo.zoo {command}", *completed]
    try:
        if function is None:
            runpy.run_module(module, run_name="__main__")
        else:
            getattr(importlib.import_module(module), function)()
    finally:
        sys.argv = previous_argv
        register()


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a program of the RL Zoo, as it is. ``mbdpo`` looks at the arguments first and has more commands.

    :param argv: a command and its arguments; those of the process by default
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_mbdpo.zoo",
        description="The RL Zoo with MBDPO among its algorithms. `COMMAND --help` lists the arguments of a command.",
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to rl_zoo3")
    args = parser.parse_args(argv)
    hand_over(args.command, args.arguments)


register()

if __name__ == "__main__":
    # Enter by the module's importable name: run with -m this file is `__main__`, and whoever imports it by its name
    # would register a second time in the middle of a command.
    from sb3_mbdpo.zoo import main as main_of_the_imported_module

    main_of_the_imported_module()
