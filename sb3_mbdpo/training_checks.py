"""What a training by the RL Zoo would begin with, built once before anything is written, and thrown away."""

import argparse
import contextlib
import copy
import io
import numbers
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbdpo.arguments import check_arguments, resolve_defaults
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.zoo_checks import BadInputError, check_actions, check_registered, sentence

# The zoo evaluates strings and imports names: a mistake in one can raise any of these
MISTAKES: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError, gym.error.Error),
)
NOISES = ("normal", "ornstein-uhlenbeck")
# Networks of up to so many million parameters are built in a quarter of a second
QUICKLY_BUILT = 5
SMALL_BUFFER = 1_000


def check_log_folder(folder: str) -> None:
    """
    Make a log folder, as training does, and write to it.

    :param folder: Log folder
    :raises BadInputError: if one cannot
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInputError(f"The log folder {folder} cannot be written: {sentence(error)}.") from error


def check_values(given: argparse.Namespace, entry: dict[str, Any], where: str) -> None:
    """
    Have the zoo read the hyperparameters, make the environment, and build a model of them.

    :param given: Arguments of training
    :param entry: Hyperparameters, names of which are known
    :param where: Where they come from
    :raises BadInputError: for what the zoo, the environment or MBDPO refuses
    """
    check_registered(given.env)
    _check_what_the_zoo_does_not(entry, where)
    with _quietly():
        manager = _manager(given)
        arguments = _read(manager, entry, where)
        try:
            env = manager.create_envs(1, no_log=True)
        except MISTAKES as error:
            raise BadInputError(f"{given.env} cannot be made: {sentence(error)}.") from error
        try:
            check_actions(given.env, env.action_space)
            arguments = manager._preprocess_action_noise(arguments, {}, env)
            if not given.trained_agent:  # whose own arguments are the others
                _build(arguments, env, given.device)
        except MISTAKES as error:
            if isinstance(error, BadInputError):
                raise
            raise BadInputError(f"{where}: {sentence(error)}.") from error
        finally:
            env.close()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Training says all of it again, and draws the same random numbers as without this."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), th.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def _manager(given: argparse.Namespace) -> ExperimentManager:
    steps = int(given.n_timesteps) if given.n_timesteps.isdecimal() else -1
    return ExperimentManager(
        argparse.Namespace(),
        given.algo,
        given.env,
        given.log_folder,
        n_timesteps=steps,
        # Values may be changed in place
        hyperparams=copy.deepcopy(given.hyperparams),
        env_kwargs=copy.deepcopy(given.env_kwargs),
        trained_agent=given.trained_agent,
        config=given.conf_file,
        verbose=0,
    )


def _check_what_the_zoo_does_not(entry: dict[str, Any], where: str) -> None:
    """Values that the zoo takes for itself and would stumble over late, or without a word of what is wrong."""
    n_envs, rate, noise, std = (entry.get(name) for name in ("n_envs", "learning_rate", "noise_type", "noise_std"))
    mistake = ""
    if "n_envs" in entry and (not isinstance(n_envs, int) or n_envs < 1):
        mistake = f"n_envs must be a whole number of at least 1, got {n_envs!r}."
    elif isinstance(rate, str) and not _is_schedule(rate):
        mistake = f"learning_rate must be a number, or one that falls to zero as in 'lin_1e-3', got {rate!r}."
    elif "noise_type" in entry and not (isinstance(noise, str) and any(known in noise for known in NOISES)):
        mistake = f"noise_type must be {' or '.join(map(repr, NOISES))}, got {noise!r}."
    elif noise is not None and (isinstance(std, bool) or not isinstance(std, numbers.Real) or std < 0):
        mistake = f"noise_type needs noise_std, a number of at least 0, got {std!r}."
    elif noise is None and "noise_std" in entry:
        mistake = "noise_std is for noise_type: name one."
    if mistake:
        raise BadInputError(f"{where}: {mistake}")


def _is_schedule(text: str) -> bool:
    _, _, value = text.partition("_")
    try:
        return float(value) >= 0
    except ValueError:
        return False


def _read(manager: ExperimentManager, entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of MBDPO, as the zoo makes them of an entry; those of the environment stay with the manager."""
    try:
        read, _ = manager.read_hyperparameters()
        arguments, manager.env_wrapper, _, manager.vec_env_wrapper = manager._preprocess_hyperparams(read)
    except MISTAKES as error:
        if "n_timesteps" not in entry:
            raise BadInputError(f"{where}: n_timesteps is missing.") from error
        name = next((name for name in entry if not _is_read_alone(manager, name, entry[name])), None)
        what = f"{name}={entry[name]!r} does not work: " if name else ""
        raise BadInputError(f"{where}: {what}{sentence(error)}.") from error
    if manager.n_timesteps < 1:
        raise BadInputError(f"{where}: n_timesteps must be at least 1, got {manager.n_timesteps}.")
    if not isinstance(manager.normalize_kwargs, dict):
        raise BadInputError(f"{where}: normalize must be True, False or keywords, got {entry['normalize']!r}.")
    return arguments


def _is_read_alone(manager: ExperimentManager, name: str, value: Any) -> bool:
    try:
        manager._preprocess_hyperparams({"n_timesteps": 1, name: copy.deepcopy(value)})
    except MISTAKES:
        return False
    return True


def _build(arguments: dict[str, Any], env: VecEnv, device: str) -> None:
    size = arguments.get("buffer_size")
    if isinstance(size, int) and size > SMALL_BUFFER:
        arguments = arguments | {"buffer_size": SMALL_BUFFER}
    # Without a seed, which would be that of a training that is given none
    model = MBDPO(env=env, verbose=0, device=device, _init_setup_model=False, **arguments)
    model._resolve_tasks()
    resolve_defaults(model)
    assert model.model_size is not None
    if model.model_size <= QUICKLY_BUILT:
        model._setup_model()
    else:
        check_arguments(model)
