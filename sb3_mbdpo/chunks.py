"""The multi-task data that the authors of TD-MPC2 and MBDPO released (`.pt` chunks of mt30 and mt80) as shards.

A chunk is a pickled TensorDict [episode, row] with ``obs``, ``action``, ``reward`` and ``task``. Row t holds the
observation at t and the action and reward that led to it, so those of row 0 mean nothing. Narrower tasks are padded
with zeros on the right; episodes end by time limits only. Files are read as weights alone: of the container's classes
just two names are known, and stand-ins take their place, so that no code of a file and no further package is needed.
"""

import hashlib
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from tqdm import tqdm

from sb3_mbdpo.shard_format import VERSION, TaskData
from sb3_mbdpo.shard_writer import SHARD_BYTES, ShardWriter, write_once
from sb3_mbdpo.suites.catalogue import suite_entry
from sb3_mbdpo.suites.registration import DMCONTROL, env_id
from sb3_mbdpo.task_names import MT30, MT80, sizes_of

KEYS = {"obs": (th.float32, 3), "action": (th.float32, 3), "reward": (th.float32, 2), "task": (th.int32, 2)}
# Width of the observations of each set: the widest task's
TASK_SETS = {24: MT30, 39: MT80}
# Bytes of observations that are handled at once
BLOCK_BYTES = 2**26
# How far outside of [-1, 1] an action may lie: rounding, nothing else
TOLERANCE = 1e-5


class _Container:
    """Stands in for the container's class: a name, nothing else."""


def _make_container(_kind: Any, state: Any) -> Any:
    """Stands in for the function that rebuilds a container: its tensors by name."""
    return state.get("_tensordict") if isinstance(state, dict) else None


ALLOWED = [(_Container, "tensordict._td.TensorDict"), (_make_container, "tensordict._reductions._make_td")]


def read_chunk(path: str | Path) -> dict[str, th.Tensor]:
    """
    Open a chunk; its numbers stay on the disk until they are used.

    :param path: The ``.pt`` file
    :return: "obs" [E, T + 1, O], "action" [E, T + 1, A], "reward" [E, T + 1] and "task" [E, T + 1]
    :raises ValueError: if it is no such chunk
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: download the chunk first.")
    try:
        with th.serialization.safe_globals(ALLOWED):  # type: ignore[arg-type]
            tensors = th.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is no chunk of mt30 or mt80, or is cut short ({reason}): download it again."
        ) from error
    if not isinstance(tensors, dict) or set(tensors) != set(KEYS):
        found = sorted(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise ValueError(f"{path} is no chunk of mt30 or mt80: it holds {found}, not {sorted(KEYS)}.")
    for name, (dtype, dimensions) in KEYS.items():
        value = tensors[name]
        if not isinstance(value, th.Tensor) or value.dtype != dtype or value.dim() != dimensions:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, th.Tensor) else type(value).__name__
            raise ValueError(
                f"{path} is no chunk of mt30 or mt80: {name!r} is {found}, expected {dtype} with {dimensions} "
                "dimensions."
            )
    shape = tensors["obs"].shape[:2]
    if any(value.shape[:2] != shape for value in tensors.values()) or shape[0] < 1 or shape[1] < 2:
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise ValueError(f"{path} is no chunk of mt30 or mt80: its tensors do not fit together ({shapes}).")
    return tensors


def convert_chunks(
    files: Sequence[str | Path] | str | Path,
    path: str | Path,
    task_names: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """
    Shards of released chunk files, converted now unless that was done before and they have not changed since.

    :param files: The files of a set, in any number, or one file
    :param path: Folder of the shards
    :param task_names: Names of the tasks by index; None: those of mt30 or mt80, told apart by the observations' width
    :param shard_bytes: Largest size of a file, bytes
    :return: ``path``, for ``ShardedDataset`` and ``learn_offline``
    :raises ValueError: naming the file that is no such chunk; nothing half-written stays
    """
    files = [files] if isinstance(files, (str, Path)) else files
    path, sources = Path(path), sorted(Path(file) for file in files)
    if not sources:
        raise ValueError("No chunk file was given: pass at least one.")
    # Every file is looked at before the long work begins
    widths = {file: tuple(read_chunk(file)[name].shape[2] for name in ("obs", "action")) for file in sources}
    observations, actions = widths[sources[0]]
    for file, width in widths.items():
        if width != (observations, actions):
            raise ValueError(
                f"{file} has {width[0]} observations and {width[1]} actions, {sources[0]} has {observations} and "
                f"{actions}: convert the files of one set at a time."
            )
    names = TASK_SETS.get(observations) if task_names is None else tuple(task_names)
    if names is None:
        raise ValueError(
            f"Chunks with {observations} observations are neither mt30 (24) nor mt80 (39): pass task_names."
        )
    observation_space = spaces.Box(-np.inf, np.inf, (observations,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (actions,), np.float32)
    tasks = [_task(name, observations, actions) for name in names]
    fingerprint = _fingerprint(sources, tasks)

    def write() -> None:
        with ShardWriter(path, observation_space, action_space, fingerprint, tasks, shard_bytes) as writer:
            for file in sources:
                for block in _blocks(file, len(tasks)):
                    writer.add_block(*block)

    return write_once(path, fingerprint, write)


def _task(name: str, observations: int, actions: int) -> TaskData:
    """What is known of a task; one of another data set is taken to be as wide as the set."""
    sizes = sizes_of(name)
    fits = sizes is not None and sizes[0] <= observations and sizes[1] <= actions
    observation_size, action_size = sizes if sizes is not None and fits else (observations, actions)
    # Longer than the rows of a chunk: mt80 holds episodes of DMControl in pieces
    limit = suite_entry(name).decisions if name in MT80 else None
    made_by = env_id(name) if name in DMCONTROL else None
    return TaskData(name, observation_size, action_size, env_id=made_by, max_episode_length=limit)


def _blocks(file: Path, n_tasks: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Arguments of ``ShardWriter.add_block`` for the episodes of a file, a few at a time."""
    episodes, rows, width = read_chunk(file)["obs"].shape
    size = max(BLOCK_BYTES // (4 * rows * width), 1)
    with tqdm(total=episodes, desc=file.name, unit="episodes", disable=None, delay=1) as progress:
        for first in range(0, episodes, size):
            # Opened anew for each block: the pages of the last one are handed back
            tensors = read_chunk(file)
            obs, action, reward, task = (tensors[name][first : first + size].numpy() for name in KEYS)
            action, reward = action[:, 1:], reward[:, 1:]
            _check(first, file, obs, "observations that are not finite", ~np.isfinite(obs))
            _check(first, file, obs, "rewards that are not finite", ~np.isfinite(reward))
            # Not "any outside": NaN is neither inside nor outside
            _check(first, file, obs, "actions outside of [-1, 1]", ~(np.abs(action) <= 1 + TOLERANCE))
            _check(first, file, obs, "several tasks", task != task[:, :1])
            _check(first, file, obs, f"a task that is none of the {n_tasks}", (task < 0) | (task >= n_tasks))
            yield obs, action.clip(-1, 1), reward, np.zeros(len(obs), bool), task[:, 0]
            progress.update(len(obs))


def _check(first: int, file: Path, obs: np.ndarray, what: str, wrong: np.ndarray) -> None:
    if wrong.any():
        episode = first + int(np.argmax(wrong.reshape(len(obs), -1).any(axis=1)))
        raise ValueError(f"{file}, episode {episode} has {what}: download the file again.")


def _fingerprint(files: Sequence[Path], tasks: Sequence[TaskData]) -> str:
    known = [(task.name, task.max_episode_length) for task in tasks]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([VERSION, known, stats]).encode()).hexdigest()
