"""
MBDPO in the RL Zoo (``rl_zoo3``): registration, an Optuna search space, and the zoo's own command line.

Importing this module is enough to make ``--algo mbdpo`` known to ``rl_zoo3`` in this process. The zoo builds its list
of algorithms when its argument parser is built, before it looks at ``--gym-packages``, which is therefore too late to
bring in an algorithm; so the command line is entered from here::

    python -m sb3_mbdpo.zoo train --env Pendulum-v1 -P
    python -m sb3_mbdpo.zoo enjoy --env Pendulum-v1
    python -m sb3_mbdpo.zoo train --env Pendulum-v1 -n 3000 --optimize-hyperparameters --n-trials 20

Everything after the command goes to ``rl_zoo3`` as it is. Only what would otherwise point away from MBDPO is filled in:
``--algo mbdpo``, ``-conf`` with the hyperparameters of this package, and the log folder to look for trained agents in.
"""

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from sb3_mbdpo import MBDPO

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
    the whole buffer it was trained with; and one transition would be too few for a buffer of sequences.
    """

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :param path: path to the saved model
        :param args: as for ``MBDPO.load``
        :param kwargs: as for ``MBDPO.load``; ``buffer_size`` is 1,000 unless given
        :return: the loaded model
        """
        kwargs.setdefault("buffer_size", 1_000)
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
    for name in ("batch_size", "n_samples"):
        hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    # Elites are sampled as a share of the candidates, so that there are never more of them than candidates.
    hyperparams["n_elites"] = max(2, round(hyperparams.pop("elite_fraction") * hyperparams["n_samples"]))
    return hyperparams


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
    hyperparams = convert_mbdpo_params(
        {
            # Learning
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True),
            "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 9),
            "tau": trial.suggest_float("tau", 0.005, 0.1, log=True),
            # Search: depth, number of denoising steps, width, greediness
            "horizon": trial.suggest_int("horizon", 2, 6),
            "denoising_steps": trial.suggest_int("denoising_steps", 3, 20, log=True),
            "n_samples_pow": trial.suggest_int("n_samples_pow", 5, 9),
            "elite_fraction": trial.suggest_float("elite_fraction", 0.05, 0.5, log=True),
            "temperature": trial.suggest_float("temperature", 0.1, 2.0, log=True),
            # Exploration, and how strongly the search is held to the behaviour in the data
            "exploration_noise": trial.suggest_float("exploration_noise", 0.02, 0.5, log=True),
            "energy_coef": trial.suggest_float("energy_coef", 1e-3, 1.0, log=True),
        }
    )
    # Show the true values next to the sampled ones
    for name in ("batch_size", "n_samples", "n_elites"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def register() -> None:
    """
    Make ``mbdpo`` known to ``rl_zoo3`` in this process: algorithm, search space and its conversion.
    """
    rl_zoo3.ALGOS[ALGO] = MBDPO
    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_mbdpo_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_mbdpo_params


def import_environments(env_id: str) -> None:
    """
    Import the package that registers an environment, where that is one of this package's extras.

    :param env_id: environment id
    """
    if not env_id.startswith("dm_control/") or env_id in gym.registry:
        return
    message = f'{env_id} needs the DeepMind Control Suite: run `pip install "sb3-mbdpo[dmc]"`'
    try:
        importlib.import_module("shimmy")
        importlib.import_module("dm_control")
    except ImportError as error:
        raise ImportError(message) from error


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
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env", default="")
    if command == "train":
        parser.add_argument("-conf", "--conf-file")
    else:
        parser.add_argument("-f", "--folder")
    given, _ = parser.parse_known_args(completed)

    import_environments(given.env)
    if given.algo is None:
        completed += ["--algo", ALGO]
    if given.algo in (None, ALGO):
        if command == "train" and given.conf_file is None:
            completed += ["-conf", str(default_config())]
        if command != "train" and given.folder is None:
            # The zoo's default folder would make it look for a pretrained agent on the Hub.
            completed += ["-f", "logs"]
    return completed


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command of the RL Zoo with MBDPO among its algorithms.

    :param argv: a command and its arguments; those of the process by default
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_mbdpo.zoo",
        description="The RL Zoo with MBDPO among its algorithms. `COMMAND --help` lists the arguments of a command.",
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to rl_zoo3")
    args = parser.parse_args(argv)

    register()
    arguments = complete_arguments(args.command, args.arguments)
    if args.command in ("enjoy", "record_video"):
        rl_zoo3.ALGOS[ALGO] = ActingMBDPO

    # rl_zoo3 reads its arguments from sys.argv.
    module, function = COMMANDS[args.command]
    previous_argv, sys.argv = sys.argv, [f"{parser.prog} {args.command}", *arguments]
    try:
        if function is None:
            runpy.run_module(module, run_name="__main__")
        else:
            getattr(importlib.import_module(module), function)()
    finally:
        sys.argv = previous_argv
        register()


register()

if __name__ == "__main__":
    # Enter by the module's importable name: run with -m this file is `__main__`, and whoever imports it by its name
    # would register a second time in the middle of a command.
    from sb3_mbdpo.zoo import main as main_of_the_imported_module

    main_of_the_imported_module()
