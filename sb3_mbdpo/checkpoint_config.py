"""What ``config.json`` says of a checkpoint: policy, arguments, spaces, tasks, counters, versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import torch as th

from sb3_mbdpo.checkpoint_format import argument_names, encode, encode_schedule
from sb3_mbdpo.checkpoint_weights import fingerprint
from sb3_mbdpo.tasks import plain_tasks
from sb3_mbdpo.typed_spaces import space_to_json
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
# What cannot be left out where it belongs to a checkpoint: the model would act or learn otherwise
STATE_FILES = (OPTIMIZER, NORMALIZATION)
LARGEST_CONFIG = 16_000_000
MOST_TASKS, WIDEST_TASK, MOST_ENVS, MOST_REPEATS = 10_000, 10**6, 10_000, 1000
# Tables of a task set have a row for each task, as wide as the widest
LARGEST_TABLE = 10**7
PACKAGES = ("sb3-mbdpo", "stable-baselines3", "torch", "gymnasium", "numpy", "safetensors")


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
    :param env: Gymnasium id and action repeat of a single task's environment, where these alone make it
    :param n_envs: Number of environments it was trained in
    :param state: Counters and what else goes on where training stopped
    :param versions: Versions of the packages that wrote it
    :param base_model: Repository that it was fine-tuned from
    :param datasets: Data sets that it learned from
    :param replay_dataset: Minari id of a data set that holds its replay buffer
    :param files: Which of :data:`STATE_FILES` belong to it; None: whichever are there, as in folders of before
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
    files: list[str] | None = None

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
        if not all(name in STATE_FILES for name in content.get("files") or ()):
            raise ValueError(f'"files" in {CONFIG} may list {STATE_FILES}, got {content["files"]!r}.')
        content["env"] = _checked_env(content.get("env"))
        return cls(**content)


def _checked_env(env: Any) -> dict[str, Any] | None:
    """Id without a module, which Gymnasium would import and no file must choose, and action repeat."""
    if env is None:
        return None
    repeat = env.get("action_repeat", 1)
    if not isinstance(env.get("id"), str) or not isinstance(repeat, int) or not 1 <= repeat <= MOST_REPEATS:
        raise ValueError(f'"env" in {CONFIG} needs an id and how often actions are repeated, got {env!r}.')
    return {"id": env["id"].rpartition(":")[2], "action_repeat": repeat}


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
    "files": (list, type(None)),
}


# --- writing ----------------------------------------------------------------------------------------------------------


def describe(model: MBDPO, weights: Mapping[str, th.Tensor]) -> CheckpointConfig:
    """
    :param model: Algorithm
    :param weights: Its tensors in main memory
    :return: What ``config.json`` says of it
    :raises ValueError: for an argument that cannot be written
    """
    present = model.lr_schedule(model._current_progress_remaining)
    arguments: dict[str, Any] = {}
    for name in argument_names(algorithm_class()):
        if name == "learning_rate":
            arguments[name] = encode_schedule(model.learning_rate, present)
        else:
            attribute = "_stats_window_size" if name == "stats_window_size" else name
            arguments[name] = encode(getattr(model, attribute), name)
    arguments["act_mode"] = model.policy.act_mode
    mark, source, replay = fingerprint(weights), model._hub_source, model._replay_source
    aliases = {cls: name for name, cls in model.policy_aliases.items()}
    policy = aliases.get(model.policy_class)
    return CheckpointConfig(
        policy={"$custom": model.policy_class.__name__} if policy is None else policy,
        arguments=arguments,
        observation_space=space_to_json(model.observation_space),
        action_space=space_to_json(model.action_space),
        fingerprint=mark,
        tasks=model._tasks,
        # That of several tasks is their first one's: the task table names them all
        env=model._env_source if model._tasks is None else None,
        n_envs=model.n_envs,
        state={
            "num_timesteps": model.num_timesteps,
            "n_updates": model._n_updates,
            "n_episodes": model._episode_num,
            "acts_from_start": model._acts_from_start,
            "counts_offline_steps": model._counts_offline_steps,
            "trainable": model._trainable,
        },
        versions=package_versions(),
        # Other weights than came from there are a model of their own
        base_model=model._base_model if source is None or source[1] == mark else source[0],
        replay_dataset=replay[0] if replay is not None and replay[1] == mark else None,
    )


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


# --- reading ----------------------------------------------------------------------------------------------------------


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
            "author, load a zip with MBDPO.load(file) and a released .pt with `mbdpo convert`."
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
    sized = [written, *(entry for entry in (entries or []) if isinstance(entry, dict))]
    found = (width for entry in sized for width in (entry.get("observation_dim"), entry.get("action_dim")))
    widths: list[Any] = [width for width in found if width is not None]
    for width in widths:
        if not isinstance(width, int) or width > WIDEST_TASK:
            raise ValueError(
                f"A task of width {width!r} is absurd, at most {WIDEST_TASK:,} is taken: nothing was built."
            )
    if len(sized) * max(widths, default=0) > LARGEST_TABLE:
        raise ValueError(
            f"{len(sized) - 1} tasks of width {max(widths):,} are absurd, at most {LARGEST_TABLE:,} entries are taken "
            "in all: nothing was built."
        )
    # Gymnasium imports the module of "module:id", and a file must not choose what is imported
    plain = plain_tasks(written)
    for entry in cast(dict[str, Any], plain)["tasks"]:
        entry["env_id"] = None if entry["env_id"] is None else str(entry["env_id"]).rpartition(":")[2]
    return plain


def checked_state(written: dict[str, Any]) -> dict[str, Any]:
    """
    :param written: "state" of a file
    :return: Counters and what else goes on where training stopped, complete
    :raises ValueError: if it cannot be read
    """
    flags = {"acts_from_start": False, "counts_offline_steps": False}
    state = {"num_timesteps": 0, "n_updates": 0, "n_episodes": 0, **flags, "trainable": None} | written
    counters = [state[name] for name in ("num_timesteps", "n_updates", "n_episodes")]
    trainable = state["trainable"]
    listed = trainable is None or (isinstance(trainable, list) and all(isinstance(part, str) for part in trainable))
    if len(state) != 6 or not listed or not all(isinstance(state[name], bool) for name in flags):
        raise ValueError(f'"state" in {CONFIG} cannot be read: {written!r}.')
    if not all(isinstance(number, int) and 0 <= number < 2**63 for number in counters):
        raise ValueError(f'Counters in "state" of {CONFIG} must be whole numbers, got {counters}.')
    return state


def algorithm_class() -> type[MBDPO]:
    """The class whose arguments are written; imported late, as it is built on this module."""
    from sb3_mbdpo.mbdpo import MBDPO

    return MBDPO


def make_source_env(source: Mapping[str, Any], **kwargs: Any) -> gym.Env:
    """
    :param source: What :func:`~sb3_mbdpo.env_facts.describe_env` gave, of an id that is registered here
    :param kwargs: Arguments of ``gymnasium.make``
    :return: The environment
    """
    env = gym.make(source["id"], **kwargs)
    return ActionRepeat(env, source["action_repeat"]) if source["action_repeat"] > 1 else env
