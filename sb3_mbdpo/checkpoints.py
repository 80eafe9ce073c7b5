"""Checkpoints as folders: ``config.json``, ``model.safetensors``, and what else belongs to a model.

A folder is what a repository on the Hugging Face Hub is. Reading one runs no code: nothing is unpickled, no class is
imported by a name in a file, and everything is checked before a model is built.
"""

from __future__ import annotations

import json
import platform
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_mbdpo.checkpoint_format import argument_names, decode_arguments, encode, encode_schedule
from sb3_mbdpo.checkpoint_weights import (
    NoInitialization,
    compare,
    fingerprint,
    implied_shapes,
    in_memory,
    infos_of,
    optimizer_tensors,
    plain_metadata,
    read_header,
    read_into,
    read_tensors,
    restore_optimizer,
    write_tensors,
)
from sb3_mbdpo.normalization import Normalization
from sb3_mbdpo.presets import PRESETS, resolve_preset
from sb3_mbdpo.saving import whole_files
from sb3_mbdpo.tasks import TaskSet, plain_tasks
from sb3_mbdpo.typed_spaces import space_from_json, space_to_json
from sb3_mbdpo.wrappers import ActionRepeat

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

FORMAT, FORMAT_VERSION = "sb3_mbdpo", 1
CONFIG, WEIGHTS, OPTIMIZER, NORMALIZATION = (
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "normalization.safetensors",
)
RESULTS, TRAINING, VIDEO, CARD, CURVE = "results.json", "training.yml", "replay.mp4", "README.md", "learning_curve.png"
# Everything that a checkpoint can hold; nothing else in a folder or repository is ever opened
FILES = (CONFIG, WEIGHTS, OPTIMIZER, NORMALIZATION, RESULTS, TRAINING, VIDEO, CARD, CURVE)
# What is removed when a newer checkpoint that does not have it takes a folder's place
OPTIONAL = (OPTIMIZER, NORMALIZATION, RESULTS, TRAINING, VIDEO, CURVE)
LARGEST_CONFIG = 16_000_000
MOST_TASKS, WIDEST_TASK, MOST_ENVS = 10_000, 10**6, 10_000
LARGEST_SEARCH = 10**9
# Transitions of a model that only acts
ACTING_BUFFER = 1000
PACKAGES = ("sb3-mbdpo", "stable-baselines3", "torch", "gymnasium", "numpy", "safetensors")
# What the weights are made for; another value would be another model
SIZES = ("model_size", "horizon", "policy_kwargs", "tasks", "policy", "n_critics")
OPTIMIZERS = ("policy.optimizer", "policy.prior_optimizer", "policy.score_optimizer")
SelfMBDPO = TypeVar("SelfMBDPO", bound="MBDPO")


@dataclass
class CheckpointConfig:
    """
    What ``config.json`` holds.

    :param policy: Name of the policy, or of the user's own class as ``{"$custom": name}``
    :param arguments: Constructor arguments as JSON
    :param observation_space: Observation space as JSON
    :param action_space: Action space as JSON
    :param fingerprint: Of the weights that it belongs to
    :param tasks: Task table of a multi-task model
    :param env: Gymnasium id and action repeat of a single task's environment, where they are known
    :param n_envs: Number of environments it was trained in
    :param state: Counters and what else goes on where training stopped
    :param versions: Versions of the packages that wrote it
    :param base_model: Repository that it was fine-tuned from
    :param datasets: Data sets that it learned from
    :param replay_dataset: Minari id of a data set that holds its replay buffer
    """

    policy: Any
    arguments: dict[str, Any]
    observation_space: Any
    action_space: Any
    fingerprint: str
    tasks: dict[str, Any] | None = None
    env: dict[str, Any] | None = None
    n_envs: int = 1
    state: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    replay_dataset: str | None = None

    def to_json(self) -> str:
        """
        :return: Content of the file
        """
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps(head | asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """
        :param text: Content of the file
        :return: The configuration, its parts not yet decoded
        :raises ValueError: if it is none, or of another version
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{CONFIG} is no JSON ({error}).") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f'{CONFIG} is not one of this package: its "format" is not "{FORMAT}".')
        found = content.pop("format_version", None)
        if found != FORMAT_VERSION:
            advice = "update sb3-mbdpo" if isinstance(found, int) and found > FORMAT_VERSION else "save it again"
            raise ValueError(f"{CONFIG} is of format version {found!r}, this package reads {FORMAT_VERSION}: {advice}.")
        known = {entry.name: entry for entry in fields(cls)}
        unknown, missing = sorted(content.keys() - known), sorted(REQUIRED - content.keys())
        if unknown or missing:
            raise ValueError(f"{CONFIG} is incomplete: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}.")
        wrong = [name for name, kinds in KINDS.items() if name in content and not isinstance(content[name], kinds)]
        if wrong or not 1 <= content.get("n_envs", 1) <= MOST_ENVS:
            raise ValueError(f"{CONFIG} holds something of the wrong kind in {wrong or ['n_envs']}.")
        return cls(**content)


REQUIRED = {"policy", "arguments", "observation_space", "action_space", "fingerprint"}
KINDS: dict[str, Any] = {
    "policy": (str, dict),
    "arguments": dict,
    "fingerprint": str,
    "tasks": (dict, type(None)),
    "env": (dict, type(None)),
    "n_envs": int,
    "state": dict,
    "versions": dict,
    "base_model": (str, type(None)),
    "datasets": list,
    "replay_dataset": (str, type(None)),
}


# --- saving -----------------------------------------------------------------------------------------------------------


def describe(model: MBDPO, weights: Mapping[str, th.Tensor]) -> CheckpointConfig:
    """
    :param model: Algorithm
    :param weights: Its tensors in main memory
    :return: What ``config.json`` says of it
    :raises ValueError: for an argument that cannot be written
    """
    present = model.lr_schedule(model._current_progress_remaining)
    arguments: dict[str, Any] = {}
    for name in argument_names(_algorithm()):
        if name == "learning_rate":
            arguments[name] = encode_schedule(model.learning_rate, present)
        else:
            attribute = "_stats_window_size" if name == "stats_window_size" else name
            arguments[name] = encode(getattr(model, attribute), name)
    arguments["act_mode"] = model.policy.act_mode
    mark, source = fingerprint(weights), model._hub_source
    aliases = {cls: name for name, cls in model.policy_aliases.items()}
    policy = aliases.get(model.policy_class)
    return CheckpointConfig(
        policy={"$custom": model.policy_class.__name__} if policy is None else policy,
        arguments=arguments,
        observation_space=space_to_json(model.observation_space),
        action_space=space_to_json(model.action_space),
        fingerprint=mark,
        tasks=model._tasks,
        env=model._env_source or describe_env(model.env),
        n_envs=model.n_envs,
        state={
            "num_timesteps": model.num_timesteps,
            "n_updates": model._n_updates,
            "n_episodes": model._episode_num,
            "acts_from_start": model._acts_from_start,
            "trainable": model._trainable,
        },
        versions=package_versions(),
        # Other weights than came from there are a model of their own
        base_model=model._base_model if source is None or source[1] == mark else source[0],
    )


def describe_env(env: VecEnv | None) -> dict[str, Any] | None:
    """
    :param env: Vector environment
    :return: Gymnasium id of its first environment and how often each action is repeated; None where it has no id
    """
    if env is None or not env.has_attr("spec"):
        return None
    spec = env.get_attr("spec", 0)[0]
    if spec is None:
        return None
    repeat = env.get_attr("action_repeat", 0)[0] if env.env_is_wrapped(ActionRepeat, 0)[0] else 1
    return {"id": str(spec.id), "action_repeat": int(repeat)}


def package_versions() -> dict[str, str]:
    """
    :return: Python's version and those of the packages that a model depends on
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
    :param replay_dataset: Minari id of the replay buffer
    :param datasets: Data sets that it learned from
    :param training: What ``training.yml`` says besides counters and versions
    :param results: Content of ``results.json``
    :param others: Content of further files by name
    :return: What ``config.json`` says
    :raises ValueError: for a model that cannot be described
    :raises OSError: if the files cannot be written; those that were there before stay as they are
    """
    weights = in_memory(model.policy.state_dict())
    config = describe(model, weights)
    config.replay_dataset, config.datasets = replay_dataset, list(datasets or model._datasets)
    mark = {"fingerprint": config.fingerprint}
    normalization = Normalization.of(model._vec_normalize_env) or model._normalization
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: a checkpoint is a folder, pass another name.")
    try:
        with whole_files(target) as staging:
            write_tensors(staging / WEIGHTS, weights, mark)
            compare(WEIGHTS, read_header(staging / WEIGHTS)[0], infos_of(weights))
            if include_optimizer:
                tensors, plain = _training_state(model)
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


def _training_state(model: MBDPO) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """Optimizers, random generators and latest episodes: what a continued training needs besides the weights."""
    tensors: dict[str, th.Tensor] = {"policy_generator": model.policy.generator.get_state()}
    plain: dict[str, Any] = {
        "seed": model.seed,
        "device": model.device.type,
        "action_space": json.loads(json.dumps(model.action_space.np_random.bit_generator.state)),
        "episodes": [[float(info[key]) for key in ("r", "l", "t")] for info in model.ep_info_buffer or ()],
        "task_returns": model._task_returns,
        "optimizers": {},
    }
    for name in OPTIMIZERS:
        optimizer = getattr(model.policy, name.removeprefix("policy."))
        if optimizer is not None:
            state, plain["optimizers"][name] = optimizer_tensors(name, optimizer)
            tensors |= state
    return tensors, plain


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
        "env": config.env,
        "device": model.device.type,
        "datasets": config.datasets,
        "versions": config.versions,
        "saved": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return cast(str, yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


# --- loading ----------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> CheckpointConfig:
    """
    :param folder: A checkpoint
    :return: Its configuration
    :raises ValueError: if there is none that can be read, saying what the folder holds instead
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(no_config(str(folder), [entry.name for entry in folder.iterdir()]))
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{CONFIG} has {path.stat().st_size:,} bytes, at most {LARGEST_CONFIG:,} are read.")
    try:
        return CheckpointConfig.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{CONFIG} is no text ({error.reason}).") from error


def no_config(where: str, names: list[str]) -> str:
    """
    :param where: Folder or repository
    :param names: Files in it
    :return: What to say where there is no ``config.json``
    """
    pickled = sorted(name for name in names if name.endswith((".zip", ".pkl", ".pickle", ".pt", ".pth", ".bin")))
    message = f"{where} is no checkpoint of this package: it has no {CONFIG}."
    if pickled:
        message += (
            f" It holds {', '.join(pickled[:3])}, which can run code when loaded and was not opened; if you trust its "
            "author, load a zip with MBDPO.load(file) and a released .pt with `python -m sb3_mbdpo.hub_commands "
            "convert`."
        )
    return message


def decode_tasks(written: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    :param written: Task table of a file
    :return: Plain data of a task set
    :raises ValueError: if it is none, or of absurd size
    """
    if written is None:
        return None
    entries = written.get("tasks")
    if isinstance(entries, list) and len(entries) > MOST_TASKS:
        raise ValueError(f"The file lists {len(entries)} tasks, at most {MOST_TASKS:,} are taken.")
    widths = [written, *(entry for entry in (entries or []) if isinstance(entry, dict))]
    for width in (entry.get(name) for entry in widths for name in ("observation_dim", "action_dim")):
        if width is not None and (not isinstance(width, int) or width > WIDEST_TASK):
            raise ValueError(f"A task of width {width!r} is absurd, at most {WIDEST_TASK:,} is taken: nothing was built.")
    # Gymnasium imports the module of "module:id", and a file must not choose what is imported
    plain = plain_tasks(written)
    for entry in cast(dict[str, Any], plain)["tasks"]:
        entry["env_id"] = None if entry["env_id"] is None else str(entry["env_id"]).rpartition(":")[2]
    return plain


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
    path = Path(folder)
    config = read_config(path)
    arguments = decode_arguments(_algorithm(), config.arguments, custom_objects or {})
    spaces_ = {name: space_from_json(getattr(config, name)) for name in ("observation_space", "action_space")}
    if not isinstance(spaces_["action_space"], spaces.Box):
        raise ValueError(f"Actions must be a Box, the file has {spaces_['action_space']}.")
    policy = _policy_class(algorithm, config.policy, custom_objects or {})
    tasks = decode_tasks(config.tasks)
    arguments = apply_overrides(arguments, overrides, th.device(device) if device != "auto" else None)
    _check_search(arguments, spaces_["action_space"])
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} holds a {CONFIG} but no {WEIGHTS}: download or save it again.")
    found, metadata = read_header(path / WEIGHTS)
    _check_mark(WEIGHTS, metadata, config)
    state = _checked_state(config.state)
    normalization = Normalization.read(path / NORMALIZATION, spaces_["observation_space"])
    vector = None if env is None else prepare_env(algorithm, env, spaces_, tasks, normalization, arguments["verbose"])

    model = algorithm(policy, vector, tasks=tasks, device=device, _init_setup_model=False, **arguments)
    model.observation_space, model.action_space = spaces_["observation_space"], cast(Any, spaces_["action_space"])
    model.n_envs = config.n_envs if vector is None else vector.num_envs
    model._trainable, model._acts_from_start = state["trainable"], state["acts_from_start"]
    if not custom_objects:
        compare(WEIGHTS, found, _implied(model))
    training = _read_training_state(path, config, found, model)
    set_up(model, to_act=vector is None)
    compare(WEIGHTS, found, infos_of(model.policy.state_dict()))
    read_into(path / WEIGHTS, model.policy)
    model.policy.episodic = bool(model.policy.terminates.item())
    model.num_timesteps, model._n_updates = state["num_timesteps"], state["n_updates"]
    model._episode_num = state["n_episodes"]
    if training is not None:
        _restore_training(model, *training)
    model._normalization, model._env_source = normalization, config.env
    model._base_model, model._datasets = config.base_model, [str(name) for name in config.datasets]
    return model


def _algorithm() -> type[MBDPO]:
    """The class whose arguments are written; imported late, as it is built on this module."""
    from sb3_mbdpo.mbdpo import MBDPO

    return MBDPO


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
    known = {*argument_names(_algorithm()), "compile", "tensorboard_log"}
    unknown = sorted(overrides.keys() - known - set(SIZES))
    if unknown:
        raise ValueError(f"There are no arguments {unknown}: overrides are constructor arguments of MBDPO.")
    for name in SIZES:
        if name in overrides and (name not in arguments or overrides[name] != arguments[name]):
            stored = f" ({arguments[name]!r})" if name in arguments else ""
            raise ValueError(f"{name} is what the weights were made for{stored} and cannot be changed: leave it out.")
    for name in ("score_coef", "episodic"):
        if name in overrides and bool(overrides[name] or name == "episodic" and overrides[name] is None) != bool(
            arguments.get(name) or name == "episodic" and arguments.get(name) is None
        ):
            raise ValueError(
                f"{name}={overrides[name]!r} would add or remove a part of the model, where the checkpoint has "
                f"{arguments.get(name)!r}: leave it out."
            )
    changed = dict(arguments)
    if "preset" in overrides:
        preset, _ = resolve_preset(overrides["preset"], device or th.device("cuda" if th.cuda.is_available() else "cpu"))
        changed |= {name: value for name, value in asdict(PRESETS[preset]).items() if name not in SIZES}
        if not arguments.get("score_coef", 1.0):
            changed["bootstrap"] = "prior"
        # The rest of a search is sized by the preset's own number of candidates
        changed["warm_denoising_steps"] = None
    return changed | dict(overrides)


def _check_search(arguments: Mapping[str, Any], action_space: spaces.Box) -> None:
    sizes = [arguments.get(name) or 1 for name in ("denoising_steps", "n_samples", "horizon")]
    numbers = float(np.prod([float(size) for size in sizes])) * float(np.prod(action_space.shape or (1,)))
    if numbers > LARGEST_SEARCH:
        raise ValueError(f"A search of {numbers:.1e} numbers is absurd: at most {LARGEST_SEARCH:.0e} are taken.")


def _check_mark(name: str, metadata: Mapping[str, str], config: CheckpointConfig) -> None:
    if metadata.get("fingerprint") != config.fingerprint:
        raise ValueError(
            f"{name} and {CONFIG} do not belong together: files of two checkpoints are mixed, or saving was cut short. "
            "Save or download the checkpoint again."
        )


def _checked_state(written: dict[str, Any]) -> dict[str, Any]:
    state = {"num_timesteps": 0, "n_updates": 0, "n_episodes": 0, "acts_from_start": False, "trainable": None} | written
    counters = [state[name] for name in ("num_timesteps", "n_updates", "n_episodes")]
    trainable = state["trainable"]
    listed = trainable is None or (isinstance(trainable, list) and all(isinstance(part, str) for part in trainable))
    if len(state) != 5 or not listed or not isinstance(state["acts_from_start"], bool):
        raise ValueError(f'"state" in {CONFIG} cannot be read: {written!r}.')
    if not all(isinstance(number, int) and 0 <= number < 2**63 for number in counters):
        raise ValueError(f'Counters in "state" of {CONFIG} must be whole numbers, got {counters}.')
    return state


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
    differing = [
        f"{name.replace('_', ' ')}: the model's is {space}, the environment's {getattr(vector, name)}"
        for name, space in stored.items()
        if getattr(vector, name) != space
    ]
    if differing:
        hint = ""
        if tasks is not None:
            names = ", ".join(TaskSet.from_plain(tasks).names)
            hint = f". It is a model of several tasks ({names}): pass task=... for one of them to from_hub"
        raise ValueError(f"This environment is not the model's. {'; '.join(differing)}{hint}.")
    return normalization.apply(vector) if normalization is not None and normalized else vector


def _implied(model: MBDPO) -> Any:
    """Shapes that the arguments imply; filling defaults needs no networks."""
    from sb3_mbdpo.arguments import check_arguments, resolve_defaults

    model._resolve_tasks()
    resolve_defaults(model)
    check_arguments(model)
    arguments = {**model._policy_arguments(), **model.policy_kwargs}
    return implied_shapes(
        cast(Any, model.policy_class), model.observation_space, cast(spaces.Box, model.action_space), arguments
    )


def set_up(model: MBDPO, to_act: bool) -> None:
    """
    Build a model's networks and buffer, weights as memory happens to be.

    :param model: Model that is not set up yet
    :param to_act: Whether there is no environment to learn in: the replay buffer then gets next to no room, until
        ``set_env`` brings one, so that a model that was trained with gigabytes of replay acts on any machine
    :raises ValueError: if there is no memory for the replay buffer
    """
    size = model.buffer_size
    if to_act:
        model.buffer_size = min(size, max(ACTING_BUFFER, cast(int, model.horizon or 1) * model.n_envs))
    try:
        with NoInitialization():
            model._setup_model()
    except MemoryError as error:
        raise ValueError(
            f"There is no memory for a replay buffer of buffer_size={model.buffer_size:,} transitions: pass a smaller "
            "buffer_size."
        ) from error
    model._acts_only, model.buffer_size = model.buffer_size < size, size


def _read_training_state(
    path: Path, config: CheckpointConfig, weights: Mapping[str, Any], model: MBDPO
) -> tuple[dict[str, th.Tensor], dict[str, Any]] | None:
    """What was saved of optimizers and generators; the action space's generator is put where setting up looks."""
    if not (path / OPTIMIZER).is_file():
        return None
    infos, metadata = read_header(path / OPTIMIZER)
    _check_mark(OPTIMIZER, metadata, config)
    plain = plain_metadata(path / OPTIMIZER, metadata, "state")
    # Adam keeps two numbers for each weight, no optimizer more than four
    numbers = sum(int(np.prod(info.shape, dtype=np.float64)) for info in weights.values())
    tensors = read_tensors(path / OPTIMIZER, infos, 16 * numbers + 10**7)
    generator = tensors.pop("policy_generator", None)
    try:
        if generator is None or generator.dtype != th.uint8 or plain["device"] not in ("cpu", "cuda", "mps"):
            raise ValueError("no state of the policy's generator")
        np.random.PCG64().state = plain["action_space"]
        model._random_state = {
            "seed": plain["seed"],
            "device": plain["device"],
            "policy": generator.numpy(),
            "action_space": plain["action_space"],
        }
        episodes = [(float(r), int(l), float(t)) for r, l, t in plain["episodes"]]
        returns = {str(name): [float(r) for r in rs] for name, rs in plain["task_returns"].items()}
        return tensors, {"episodes": episodes, "task_returns": returns, "optimizers": dict(plain["optimizers"])}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{OPTIMIZER} cannot be read ({error}): remove the file to load without it.") from error


def _restore_training(model: MBDPO, tensors: dict[str, th.Tensor], plain: dict[str, Any]) -> None:
    expected = {name for name in OPTIMIZERS if getattr(model.policy, name.removeprefix("policy.")) is not None}
    unknown = sorted(name for name in tensors if not name.startswith(tuple(f"{known}." for known in expected)))
    if plain["optimizers"].keys() != expected or unknown:
        raise ValueError(
            f"{OPTIMIZER} holds {sorted(plain['optimizers'])} {unknown[:3]}, the model has {sorted(expected)}: remove "
            "the file to load without it."
        )
    for name in expected:
        optimizer = getattr(model.policy, name.removeprefix("policy."))
        restore_optimizer(name, optimizer, tensors, plain["optimizers"][name])
    model._task_returns = plain["task_returns"]
    model.ep_info_buffer = None
    if plain["episodes"]:
        infos = [{"r": r, "l": length, "t": t} for r, length, t in plain["episodes"]]
        model.ep_info_buffer = deque(infos, maxlen=model._stats_window_size)
        model.ep_success_buffer = deque(maxlen=model._stats_window_size)


def make_source_env(source: Mapping[str, Any] | None, **kwargs: Any) -> gym.Env | None:
    """
    :param source: What :func:`describe_env` gave
    :param kwargs: Arguments of ``gymnasium.make``
    :return: The environment; None if it is not known, or not installed here
    """
    if not isinstance(source, Mapping) or not isinstance(source.get("id"), str) or ":" in source["id"]:
        return None
    if source["id"] not in gym.registry:
        return None
    env = gym.make(source["id"], **kwargs)
    repeat = source.get("action_repeat", 1)
    env = ActionRepeat(env, repeat) if isinstance(repeat, int) and repeat > 1 else env
    return env
