"""Writes episodes as shards (see ``shards``), so that a set on disk is either complete or not there."""

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape

from sb3_mbdpo.shard_format import DESCRIPTION, INDEX, ROW_FILE, Description, Field, TaskData, row_file, up_to_date

try:
    import fcntl
except ImportError:  # Windows: two processes that convert the same set at once are not told apart
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 2**27
# Seconds between looks at a set that another process is writing
POLL_SECONDS = 1.0


class SetInUseError(ValueError):
    """Another process is writing the same set."""


class _RowFiles:
    """Rows being written: files of ``rows_per_file`` rows, and the checksum of each."""

    def __init__(self, directory: Path, rows_per_file: int):
        self.directory, self.rows_per_file = directory, rows_per_file
        self.checksums: list[int] = []
        self.rows = 0
        self.file: BinaryIO | None = None

    def write(self, rows: np.ndarray) -> None:
        """:param rows: Bytes [N, row_bytes]"""
        while len(rows) > 0:
            if self.rows % self.rows_per_file == 0:
                self.close()
                self.file = (self.directory / row_file(len(self.checksums))).open("xb")
                self.checksums.append(0)
            assert self.file is not None
            part, rows = np.split(rows, [self.rows_per_file - self.rows % self.rows_per_file])
            self.file.write(part.data)
            self.checksums[-1] = zlib.crc32(part.data, self.checksums[-1])
            self.rows += len(part)

    def close(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        self.file = None


class ShardWriter:
    """
    Context manager that writes a set into a hidden folder beside ``path`` and renames it when the block ends well.

    After an error nothing is left behind; what a killed process left is removed by the next one. A set that was at
    ``path`` before stands until the new one is complete.

    :param path: Folder of the set
    :param observation_space: Space of the observations, images channels first
    :param action_space: Space of the actions before they were scaled to [-1, 1]
    :param fingerprint: What tells the source from another or a changed one
    :param tasks: What is known of the tasks, by index; episodes and transitions are counted here
    :param shard_bytes: Largest size of a file, bytes
    :raises ValueError: on leaving the block without a single transition, while another process writes the same set, or
        if ``path`` is a folder of something else
    """

    def __init__(
        self,
        path: str | Path,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        fingerprint: str = "",
        tasks: Iterable[TaskData] = (TaskData(),),
        shard_bytes: int = SHARD_BYTES,
    ):
        self.path = Path(path)
        self.observation_space, self.action_space, self.fingerprint = observation_space, action_space, fingerprint
        self.tasks, self.shard_bytes = tuple(tasks), shard_bytes
        self._part = self.path.with_name(f".{self.path.name}.part")
        self._lock: int | None = None

    def __enter__(self) -> "ShardWriter":
        self._check_folder()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        for left_over in self._part.iterdir():
            left_over.unlink()
        self._index: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}
        self._fields = self._make_fields()
        self._row_bytes = sum(entry.nbytes for entry in self._fields)
        self._rows = _RowFiles(self._part, max(self.shard_bytes // self._row_bytes, 1))
        return self

    def _check_folder(self) -> None:
        """Replace nothing but an older set: the path may be a folder of something else by mistake."""
        ours = {DESCRIPTION, *(f"{name}.bin" for name in INDEX)}
        entries = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        strange = [name for name in entries if name not in ours and not ROW_FILE.fullmatch(name)]
        if strange or self.path.is_file():
            what = f"holds other files ({strange[0]})" if strange else "is a file"
            raise ValueError(f"{self.path} {what}: choose a folder that is empty, new, or an older set.")

    def _make_fields(self) -> list[Field]:
        """Layout of a row: observations by key, action, reward."""
        shapes, space = get_obs_shape(self.observation_space), self.observation_space
        if isinstance(space, spaces.Dict):
            assert isinstance(shapes, dict)
            entries: list[tuple[str, str | None, Any, Any]]
            entries = [("observations", key, part.dtype, shapes[key]) for key, part in space.items()]
        else:
            entries = [("observations", None, space.dtype, shapes)]
        entries += [("actions", None, np.float32, (get_action_dim(self.action_space),))]
        entries += [("rewards", None, np.float32, ())]
        fields: list[Field] = []
        for name, key, dtype, shape in entries:
            dtype = np.dtype(np.float32 if np.issubdtype(dtype, np.floating) else dtype)
            fields.append(Field(name, key, str(dtype), shape, fields[-1].span.stop if fields else 0))
        return fields

    def add(self, observations: Any, actions: np.ndarray, rewards: np.ndarray, terminated: bool, task: int = 0) -> None:
        """
        Append an episode of T transitions.

        :param observations: [T + 1, *obs_shape], or a dict of such arrays
        :param actions: [T, action_dim], scaled to [-1, 1]
        :param rewards: [T]
        :param terminated: Whether it ended by a true termination
        :param task: Index of its task
        :raises ValueError: if shapes do not fit
        """
        observations = _each(lambda values: np.asarray(values)[None], observations)
        self.add_block(
            observations, np.asarray(actions)[None], np.asarray(rewards)[None], np.array([terminated]), np.array([task])
        )

    def add_block(
        self, observations: Any, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, tasks: np.ndarray
    ) -> None:
        """
        Append N episodes of T transitions each.

        :param observations: [N, T + 1, *obs_shape], or a dict of such arrays
        :param actions: [N, T, action_dim], scaled to [-1, 1]
        :param rewards: [N, T]
        :param terminated: [N] whether each ended by a true termination
        :param tasks: [N] index of each one's task
        :raises ValueError: if shapes do not fit
        """
        episodes, length = rewards.shape
        parts = observations if isinstance(observations, dict) else {None: observations}
        keys = [entry.key for entry in self._fields[:-2]]
        if set(parts) != set(keys):
            raise ValueError(f"Observations have the keys {list(parts)}, not {keys}.")
        if length < 1 or not ((tasks >= 0) & (tasks < len(self.tasks))).all():
            raise ValueError(f"Episodes need a transition and a task below {len(self.tasks)}, got {length} of {tasks}.")
        rows = np.zeros((episodes, length + 1, self._row_bytes), np.uint8)
        for entry, values in zip(self._fields, [*(parts[key] for key in keys), actions, rewards], strict=True):
            values, steps = np.asarray(values), length + (entry.name == "observations")
            if values.shape[:2] != (episodes, steps) or values[0, 0].size != np.prod(entry.shape, dtype=np.int64):
                wanted = (episodes, steps, *entry.shape)
                raise ValueError(f"{entry.name} are of shape {values.shape}, expected {wanted}.")
            values = np.ascontiguousarray(values, entry.dtype).reshape(episodes, steps, -1)
            rows[:, :steps, entry.span] = values.view(np.uint8)
        self._rows.write(rows.reshape(-1, self._row_bytes))
        entries = np.full(episodes, length), tasks, terminated, rewards.sum(axis=1, dtype=np.float64)
        for (name, dtype), values in zip(INDEX.items(), entries, strict=True):
            self._index[name].append(np.array(values, dtype))  # a copy: no view of the source stays

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._rows.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._part, ignore_errors=True)
            self._release()

    def _finish(self) -> None:
        if self._rows.rows == 0:
            raise ValueError(f"There is no transition to write to {self.path}: the source is empty.")
        index = {name: np.concatenate(parts) for name, parts in self._index.items()}
        sums = {}
        for name, values in index.items():
            (self._part / f"{name}.bin").write_bytes(values.tobytes())
            sums[name] = zlib.crc32(values.tobytes())
        tasks = tuple(self._counted(number, index) for number in range(len(self.tasks)))
        description = Description(
            self.observation_space,
            self.action_space,
            tuple(self._fields),
            self._row_bytes,
            self._rows.rows_per_file,
            tuple(self._rows.checksums),
            tasks,
            len(index["lengths"]),
            int(index["lengths"].sum(dtype=np.int64)),
            self.fingerprint,
            sums,
        )
        (self._part / DESCRIPTION).write_text(description.to_json())
        old = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            os.rename(self.path, old)
        os.rename(self._part, self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _counted(self, number: int, index: dict[str, np.ndarray]) -> TaskData:
        lengths = index["lengths"][index["tasks"] == number]
        task = self.tasks[number]
        longest = int(lengths.max(initial=0)) or None
        return replace(
            task,
            episodes=len(lengths),
            transitions=int(lengths.sum(dtype=np.int64)),
            max_episode_length=task.max_episode_length or longest,
        )

    def _acquire(self) -> None:
        """Make the hidden folder and lock it; the system lets go of the lock of a process that is killed."""
        while True:
            self._part.mkdir(exist_ok=True)
            if fcntl is None:
                return
            self._lock = os.open(self._part, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it may have renamed the folder by now: then this is the lock of a finished set
                if self._part.exists() and os.path.samestat(os.stat(self._part), os.fstat(self._lock)):
                    return
            except BlockingIOError as error:
                self._release()
                raise SetInUseError(f"Another process is writing {self.path}: wait for it and try again.") from error
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    return {key: function(value) for key, value in tree.items()} if isinstance(tree, dict) else function(tree)


def write_once(path: Path, fingerprint: str, write: Callable[[], None]) -> Path:
    """
    Write a set unless it is up to date; where another process is at it, wait for that one.

    :param path: Folder of the set
    :param fingerprint: That of the source as it is now
    :param write: Writes the set
    :return: ``path``
    """
    waiting = False
    while not up_to_date(path, fingerprint):
        try:
            write()
        except SetInUseError:
            if not waiting:
                print(f"Another process is writing {path}: waiting for it")
            waiting = True
            time.sleep(POLL_SECONDS)
    return path
