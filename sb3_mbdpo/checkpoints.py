"""Checkpoints as folders: ``config.json``, ``model.safetensors``, and what else belongs to a model.

A folder is what a repository on the Hugging Face Hub is. Reading one runs no code: nothing is unpickled, no class is
imported by a name in a file, and everything is checked before a model is built.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_mbdpo.arguments import check_arguments, resolve_defaults
from sb3_mbdpo.building import policy_arguments
from sb3_mbdpo.checkpoint_config import (
    CONFIG,
    NORMALIZATION,
    OPTIMIZER,
    OPTIONAL,
    RESULTS,
    STATE_FILES,
    TRAINING,
    WEIGHTS,
    CheckpointConfig,
    algorithm_class,
    checked_state,
    decode_tasks,
    describe,
    read_config,
)
from sb3_mbdpo.checkpoint_format import argument_names, decode_arguments
from sb3_mbdpo.checkpoint_training import read_training_state, restore_training, training_state
from sb3_mbdpo.checkpoint_weights import (
    NoInitialization,
    check_mark,
    compare,
    implied_shapes,
    in_memory,
    infos_of,
    read_header,
    read_into,
    write_tensors,
)
from sb3_mbdpo.env_facts import differing_spaces
from sb3_mbdpo.normalization import Normalization
from sb3_mbdpo.presets import PRESETS, resolve_preset
from sb3_mbdpo.saving import whole_files
from sb3_mbdpo.tasks import TaskSet
from sb3_mbdpo.typed_spaces import space_from_json

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

LARGEST_SEARCH = 10**9
# Transitions of a model that only acts
ACTING_BUFFER = 1000
# What the weights are made for; another value would be another model
SIZES = ("model_size", "horizon", "policy_kwargs", "tasks", "policy", "n_critics")
SelfMBDPO = TypeVar("SelfMBDPO", bound="MBDPO")


def write_checkpoint(
    model: MBDPO,
    folder: str | Path,
    include_optimizer: bool = False,
    replay_dataset: str | None = None,
    datasets: list[str] | None = None,
    training: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    others: Mapping[str, bytes] | None = None,
) -> CheckpointConfig:
    """
    Write a model to a folder. Files of a previous checkpoint are replaced when all new ones are complete.

    :param model: Algorithm
    :param folder: Folder, made if needed
    :param include_optimizer: Write the optimizers and random generators too, so that training goes on exactly
    :param replay_dataset: Minari id of the replay buffer; None: the one it was loaded with, if it has not changed since
    :param datasets: Data sets that it learned from; None: those that the model knows of
    :param training: What ``training.yml`` says besides counters and versions
    :param results: Content of ``results.json``
    :param others: Content of further files by name
    :return: What ``config.json`` says
    :raises ValueError: for a model that cannot be described
    :raises OSError: if the files cannot be written; those that were there before stay as they are
    """
    model._follow_arguments()
    weights = in_memory(model.policy.state_dict())
    config = describe(model, weights)
    config.replay_dataset = replay_dataset or config.replay_dataset
    config.datasets = list(model._datasets if datasets is None else datasets)
    mark = {"fingerprint": config.fingerprint}
    normalization = Normalization.of(model._vec_normalize_env) or model._normalization
    belongs = {OPTIMIZER: include_optimizer, NORMALIZATION: normalization is not None}
    config.files = [name for name in STATE_FILES if belongs[name]]
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: a checkpoint is a folder, pass another name.")
    try:
        with whole_files(target) as staging:
            write_tensors(staging / WEIGHTS, weights, mark)
            compare(WEIGHTS, read_header(staging / WEIGHTS)[0], infos_of(weights))
            if include_optimizer:
                tensors, plain = training_state(model)
                write_tensors(staging / OPTIMIZER, tensors, mark | {"state": json.dumps(plain)})
            if normalization is not None:
                normalization.write(staging / NORMALIZATION, mark)
            (staging / CONFIG).write_text(config.to_json(), encoding="utf-8")
            (staging / TRAINING).write_text(training_record(model, config, training), encoding="utf-8")
            if results is not None:
                (staging / RESULTS).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
            for name, content in (others or {}).items():
                (staging / name).write_bytes(content)
            written = {path.name for path in staging.iterdir()}
    except OSError as error:
        raise OSError(
            error.errno, f"The checkpoint could not be saved to {target} ({error}); what was there before is unchanged."
        ) from error
    for name in set(OPTIONAL) - written:
        (target / name).unlink(missing_ok=True)
    return config


def training_record(model: MBDPO, config: CheckpointConfig, given: Mapping[str, Any] | None) -> str:
    """
    :param model: Algorithm
    :param config: Its description
    :param given: What the user adds, for example the exact command
    :return: Content of ``training.yml``
    """
    record = {
        "command": None,
        **(given or {}),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "n_envs": model.n_envs,
        "seed": model.seed,
        **({"env": config.env} if config.tasks is None else {}),
        "device": model.device.type,
        "datasets": config.datasets,
        "versions": config.versions,
        "saved": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)


def load_checkpoint(
    algorithm: type[SelfMBDPO],
    folder: str | Path,
    env: GymEnv | str | None = None,
    device: th.device | str = "auto",
    custom_objects: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> SelfMBDPO:
    """
    Build the model that a folder holds.

    :param algorithm: Class of the model
    :param folder: A checkpoint
    :param env: Environment, wrapped as Stable-Baselines3 does, and normalised as in training if training was
    :param device: Where the model goes
    :param custom_objects: The user's own classes and objects by name
    :param overrides: Constructor arguments that replace the stored ones
    :return: The model
    :raises ValueError: if the folder holds something else, or an argument does not go with its weights
    """
    path, custom = Path(folder), custom_objects or {}
    config = read_config(path)
    with _readable():
        arguments = decode_arguments(algorithm_class(), config.arguments, custom)
        arguments = apply_overrides(arguments, overrides, th.device(device) if device != "auto" else None)
        stored = {name: space_from_json(getattr(config, name)) for name in ("observation_space", "action_space")}
        policy, tasks = _policy_class(algorithm, config.policy, custom), decode_tasks(config.tasks)
        state = checked_state(config.state)
        _check_search(arguments, stored["action_space"])
    for name in (WEIGHTS, *(config.files or ())):
        if not (path / name).is_file():
            raise ValueError(
                f"{path} holds a {CONFIG} but no {name}, which belongs to the checkpoint: download or save it again."
            )
    found, metadata = read_header(path / WEIGHTS)
    check_mark(WEIGHTS, metadata, config.fingerprint)
    normalization = Normalization.read(path / NORMALIZATION, stored["observation_space"], config.fingerprint)
    verbose = arguments.get("verbose", 0)
    vector = None if env is None else prepare_env(algorithm, env, stored, tasks, normalization, verbose)
    with _readable():
        model = algorithm(policy, vector, tasks=tasks, device=device, _init_setup_model=False, **arguments)
        model.observation_space, model.action_space = stored["observation_space"], cast(Any, stored["action_space"])
        model.n_envs = config.n_envs if vector is None else vector.num_envs
        model._trainable, model._acts_from_start = state["trainable"], state["acts_from_start"]
        model._counts_offline_steps, model._env_source = state["counts_offline_steps"], config.env
        if not custom:
            compare(WEIGHTS, found, _implied(model))
        training = read_training_state(path, config, found, model)
        set_up(model, to_act=vector is None)
    compare(WEIGHTS, found, infos_of(model.policy.state_dict()))
    read_into(path / WEIGHTS, model.policy)
    model.policy.episodic = bool(model.policy.terminates.item())
    model.num_timesteps, model._n_updates = state["num_timesteps"], state["n_updates"]
    model._episode_num = state["n_episodes"]
    if training is not None:
        restore_training(model, *training)
    model._normalization = normalization
    model._base_model, model._datasets = config.base_model, [str(name) for name in config.datasets]
    model._replay_source = None if config.replay_dataset is None else (config.replay_dataset, config.fingerprint)
    return model


@contextmanager
def _readable() -> Iterator[None]:
    """What stumbles over values that no check has foreseen is said to be the file's fault, in one sentence."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"No model can be built from what {CONFIG} says ({reason}).") from error


def _policy_class(algorithm: type[MBDPO], written: Any, custom: Mapping[str, Any]) -> Any:
    if isinstance(written, str):
        if written in algorithm.policy_aliases:
            return written
        raise ValueError(f"policy must be one of {sorted(algorithm.policy_aliases)}, the file names {written!r}.")
    name = written.get("$custom")
    if name not in custom:
        raise ValueError(
            f"The policy is {name!r}, a class that is not part of this package: nothing is imported by a name in a "
            f"file. Import it yourself and pass custom_objects={{{name!r}: ...}}."
        )
    return custom[name]


def apply_overrides(
    arguments: dict[str, Any], overrides: Mapping[str, Any], device: th.device | None = None
) -> dict[str, Any]:
    """
    Arguments of a checkpoint with those that the user gave in their place.

    Another ``preset`` replaces everything that presets decide but the sizes.

    :param arguments: Stored arguments
    :param overrides: Given ones
    :param device: Where the model goes, by which the preset "auto" decides; None: where PyTorch would put it
    :return: Arguments
    :raises ValueError: for one that the weights are made for, or that does not exist
    """
    known = {*argument_names(algorithm_class()), "compile", "tensorboard_log"}
    unknown = sorted(overrides.keys() - known - set(SIZES))
    if unknown:
        raise ValueError(f"There are no arguments {unknown}: overrides are constructor arguments of MBDPO.")
    for name in SIZES:
        if name in overrides and (name not in arguments or overrides[name] != arguments[name]):
            stored = f" ({arguments[name]!r})" if name in arguments else ""
            raise ValueError(f"{name} is what the weights were made for{stored} and cannot be changed: leave it out.")
    for name in ("score_coef", "episodic"):
        if name in overrides and bool(overrides[name] or (name == "episodic" and overrides[name] is None)) != bool(
            arguments.get(name) or (name == "episodic" and arguments.get(name) is None)
        ):
            raise ValueError(
                f"{name}={overrides[name]!r} would add or remove a part of the model, where the checkpoint has "
                f"{arguments.get(name)!r}: leave it out."
            )
    changed = dict(arguments)
    if "preset" in overrides:
        preset, _ = resolve_preset(
            overrides["preset"], device or th.device("cuda" if th.cuda.is_available() else "cpu")
        )
        changed |= {name: value for name, value in asdict(PRESETS[preset]).items() if name not in SIZES}
        if not arguments.get("score_coef", 1.0):
            changed["bootstrap"] = "prior"
        # The rest of a search is sized by the preset's own number of candidates
        changed["warm_denoising_steps"] = None
    return changed | dict(overrides)


def _check_search(arguments: Mapping[str, Any], action_space: spaces.Space) -> None:
    if not isinstance(action_space, spaces.Box):
        raise ValueError(f"Actions must be a Box, the file has {action_space}.")
    sizes = [arguments.get(name) or 1 for name in ("denoising_steps", "n_samples", "horizon")]
    numbers = float(np.prod([float(size) for size in sizes])) * float(np.prod(action_space.shape or (1,)))
    if numbers > LARGEST_SEARCH:
        raise ValueError(f"A search of {numbers:.1e} numbers is absurd: at most {LARGEST_SEARCH:.0e} are taken.")


def prepare_env(
    algorithm: type[MBDPO],
    env: GymEnv | str,
    stored: Mapping[str, spaces.Space],
    tasks: dict[str, Any] | None,
    normalization: Normalization | None,
    verbose: int = 0,
) -> VecEnv:
    """
    Wrap an environment for a model, and see that it is the model's.

    :param algorithm: Class of the model
    :param env: Environment
    :param stored: The model's spaces by name
    :param tasks: Its tasks
    :param normalization: Its statistics
    :param verbose: Whether wrapping is said
    :return: Vector environment
    :raises ValueError: saying which spaces differ
    """
    vector = algorithm._wrap_env(maybe_make_env(env, verbose), verbose)
    normalized = unwrap_vec_normalize(vector) is not None
    if normalization is not None and not normalized:
        vector = normalization.apply(vector)
    if differing := differing_spaces(vector, stored):
        hint = ""
        if tasks is not None:
            names = ", ".join(TaskSet.from_plain(tasks).names)
            hint = f". It is a model of several tasks ({names}): pass task=... for one of them to from_hub"
        raise ValueError(f"This environment is not the model's. {differing}{hint}.")
    return normalization.apply(vector) if normalization is not None and normalized else vector


def _implied(model: MBDPO) -> Any:
    """Shapes that the arguments imply; filling defaults needs no networks."""
    model._resolve_tasks()
    resolve_defaults(model)
    check_arguments(model)
    arguments = {**policy_arguments(model), **model.policy_kwargs}
    return implied_shapes(
        cast(Any, model.policy_class), model.observation_space, cast(spaces.Box, model.action_space), arguments
    )


def set_up(model: MBDPO, to_act: bool, initialize: bool = False) -> None:
    """
    Build a model's networks and buffer.

    :param model: Model that is not set up yet
    :param initialize: Draw initial weights; otherwise they are what memory happens to hold, until some are read
    :param to_act: Whether there is no environment to learn in: the replay buffer then gets next to no room, until
        ``set_env`` brings one, so that a model that was trained with gigabytes of replay acts on any machine
    :raises ValueError: if there is no memory for the replay buffer
    """
    size = model.buffer_size
    if to_act:
        model.buffer_size = min(size, max(ACTING_BUFFER, (model.horizon or 1) * model.n_envs))
    try:
        with nullcontext() if initialize else NoInitialization():
            model._setup_model()
    except MemoryError as error:
        raise ValueError(
            f"There is no memory for a replay buffer of buffer_size={model.buffer_size:,} transitions: pass a smaller "
            "buffer_size."
        ) from error
    model._acts_only, model.buffer_size = model.buffer_size < size, size
