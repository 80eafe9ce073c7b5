"""Episodes on disk, sampled as windows: data sets that are larger than memory.

A set is a folder: ``description.json``, a few small per-episode arrays, and the data in plain binary files of bounded
size, one series for each field. Windows are gathered through memory maps whose pages are handed back regularly, so
that what stays resident does not grow with the set. ``shard_writer`` writes such a folder.
"""

import json
import mmap
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.typed_spaces import space_from_json, space_to_json

FORMAT, VERSION = "sb3_mbdpo shards", 1
DESCRIPTION = "description.json"
# Arrays with one entry for each episode: transitions, task, whether it terminated, sum of rewards
INDEX = {"lengths": np.int32, "tasks": np.int32, "terminated": np.bool_, "returns": np.float64}
BALANCES = ("proportional", "balanced")
# Checksums of all data are compared by default up to this size: a second or so
VERIFY_BYTES = 2**30
# A page fault in a file maps the pages around it too, where the system has them: 64 KiB on Linux
FAULT_BYTES = 2**16


@dataclass(frozen=True)
class Field:
    """
    One field of the data: rows of one shape, cut into files.

    :param name: "observations", "actions" or "rewards"
    :param key: Key of a Dict observation, None otherwise
    :param dtype: Name of the NumPy type
    :param shape: Shape of a row
    :param stem: Beginning of the names of its files
    :param rows_per_file: Rows in each file but the last
    :param rows: Rows in all
    :param checksums: CRC-32 of each file
    """

    name: str
    key: str | None
    dtype: str
    shape: tuple[int, ...]
    stem: str
    rows_per_file: int
    rows: int
    checksums: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    def file(self, index: int) -> str:
        """Name of the index-th file."""
        return f"{self.stem}-{index:05d}.bin"

    def file_rows(self, index: int) -> int:
        """Rows of the index-th file."""
        return min(self.rows_per_file, self.rows - index * self.rows_per_file)


@dataclass(frozen=True)
class TaskData:
    """
    What is known about one task of a set.

    :param name: Its name, or None in a set of a single task
    :param observation_size: Entries of its observations that are not padding, None if unknown
    :param action_size: The same for its actions
    :param episodes: Episodes in the set
    :param transitions: Transitions in the set
    :param max_episode_length: Time limit if known, otherwise the longest episode, in environment steps
    :param ref_min_score: Return that counts as 0, None if unknown
    :param ref_max_score: Return that counts as 1, None if unknown
    """

    name: str | None = None
    observation_size: int | None = None
    action_size: int | None = None
    episodes: int = 0
    transitions: int = 0
    max_episode_length: int | None = None
    ref_min_score: float | None = None
    ref_max_score: float | None = None

    def normalized_score(self, episode_return: float) -> float | None:
        """
        A return on the scale from ``ref_min_score`` (0) to ``ref_max_score`` (1).

        :param episode_return: Undiscounted return
        :return: None where the references are unknown or equal
        """
        low, high = self.ref_min_score, self.ref_max_score
        return None if low is None or high is None or low == high else (episode_return - low) / (high - low)


@dataclass(frozen=True)
class Description:
    """
    Content of ``description.json``.

    :param observation_space: Space of the stored observations, images channels first
    :param action_space: Space of the actions before they were scaled to [-1, 1]
    :param fields: Fields of the data
    :param tasks: Tasks, by index
    :param episodes: Number of episodes
    :param transitions: Number of transitions
    :param fingerprint: What tells the source from another or a changed one
    :param index_checksums: CRC-32 of the per-episode arrays
    """

    observation_space: spaces.Space
    action_space: spaces.Box
    fields: tuple[Field, ...]
    tasks: tuple[TaskData, ...]
    episodes: int
    transitions: int
    fingerprint: str
    index_checksums: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text."""
        values = asdict(self) | {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
        }
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1)

    @classmethod
    def read(cls, path: str | Path) -> "Description":
        """
        :param path: Folder of the set
        :return: Its description
        :raises ValueError: if the folder holds no set of this format and version
        """
        file = Path(path, DESCRIPTION)
        if not file.is_file():
            raise ValueError(f"{path} holds no shards ({DESCRIPTION} is missing): convert a data set first.")
        try:
            values = json.loads(file.read_text())
            found = values.pop("format"), values.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: delete the folder and convert the data set again.") from error
        if found != (FORMAT, VERSION):
            raise ValueError(f"{file} is of format {found}, not {(FORMAT, VERSION)}: convert the data set again.")
        try:
            values["fields"] = tuple(
                Field(**entry | {"shape": tuple(entry["shape"]), "checksums": tuple(entry["checksums"])})
                for entry in values["fields"]
            )
            values["tasks"] = tuple(TaskData(**entry) for entry in values["tasks"])
            for name in ("observation_space", "action_space"):
                values[name] = space_from_json(values[name])
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete the folder and convert again.") from error


class _Column:
    """The files of one field, as arrays whose pages are read when they are needed."""

    def __init__(self, directory: Path, layout: Field, verify: bool):
        self.layout = layout
        self._maps: list[mmap.mmap] = []
        self._arrays: list[np.ndarray] = []
        for index, checksum in enumerate(layout.checksums):
            path = directory / layout.file(index)
            size = layout.file_rows(index) * layout.row_bytes
            _check_size(path, size)
            with path.open("rb") as file:
                if verify:
                    _check_sum(path, checksum)
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                # Windows lie anywhere: reading ahead would fetch what nobody asked for
                pages.madvise(mmap.MADV_RANDOM)
            self._maps.append(pages)
            self._arrays.append(np.frombuffer(pages, layout.dtype).reshape(-1, *layout.shape))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """
        :param rows: Row numbers of any shape
        :return: The rows, [*rows.shape, *row shape]
        """
        flat, layout = rows.reshape(-1), self.layout
        if len(self._arrays) == 1:
            return self._arrays[0].take(flat, axis=0).reshape(*rows.shape, *layout.shape)
        file = flat // layout.rows_per_file
        order = np.argsort(file, kind="stable")
        # One gather for each file that is met, not for each row
        bounds = np.searchsorted(file[order], np.arange(len(self._arrays) + 1))
        out = np.empty((len(flat), *layout.shape), layout.dtype)
        for index in np.flatnonzero(np.diff(bounds)).tolist():
            part = order[bounds[index] : bounds[index + 1]]
            out[part] = self._arrays[index].take(flat[part] - index * layout.rows_per_file, axis=0)
        return out.reshape(*rows.shape, *layout.shape)

    def release(self) -> None:
        """Hand the pages back; the system keeps them cached as long as it has room."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED)


class ShardedDataset:
    """
    Windows of consecutive transitions from episodes on disk, in the form of ``SequenceReplayBuffer``'s samples.

    Draws come from the generator ``rng``; NumPy's global random state is never used.

    :param path: Folder that ``ShardWriter`` or a converter wrote
    :param horizon: Number of transitions in a window, at least 1
    :param device: PyTorch device of the samples
    :param balance: "proportional": every transition is as likely as any other; "balanced": every task is, and within
        a task every transition
    :param seed: Seed of the draws; None takes one from the operating system
    :param verify: Compare checksums of all files first (sizes always are); None does so for sets up to a gibibyte
    :param resident_bytes: About how much of the files may be mapped into memory at once
    :raises ValueError: naming the file that is missing or damaged
    """

    def __init__(
        self,
        path: str | Path,
        horizon: int = 3,
        device: th.device | str = "cpu",
        balance: str = "proportional",
        seed: int | None = None,
        verify: bool | None = None,
        resident_bytes: int = 2**28,
    ):
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}: pass the number of transitions in a window.")
        if balance not in BALANCES:
            raise ValueError(f'balance must be "proportional" or "balanced", got {balance!r}.')
        self.path, self.horizon, self.balance = Path(path), horizon, balance
        self.device = get_device(device)
        self.description = description = Description.read(path)
        self.observation_space, self.action_space = description.observation_space, description.action_space
        self.tasks = description.tasks
        self._read_index()
        if verify is None:
            verify = sum(entry.rows * entry.row_bytes for entry in description.fields) <= VERIFY_BYTES
        self._columns = {(layout.name, layout.key): _Column(self.path, layout, verify) for layout in description.fields}
        self.resident_bytes, self._mapped = resident_bytes, 0
        self.seed(seed)

    def _read_index(self) -> None:
        """Per-episode arrays, and what places a drawn number in an episode: a few bytes for each episode."""
        index: dict[str, np.ndarray] = {}
        for name, dtype in INDEX.items():
            path = self.path / f"{name}.bin"
            _check_size(path, self.description.episodes * np.dtype(dtype).itemsize)
            _check_sum(path, self.description.index_checksums.get(name, -1))
            index[name] = np.fromfile(path, dtype)
        self.episode_returns, self.episode_tasks = index["returns"], index["tasks"]
        self._terminated, self._lengths = index["terminated"], index["lengths"]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        if self._starts[-1] != self.description.transitions:
            raise ValueError(f"{self.path} is damaged (its episodes do not add up): delete it and convert again.")
        # Episodes in the order of their tasks: a task is one stretch of the numbers that are drawn
        sorted_already = bool((np.diff(self.episode_tasks) >= 0).all())
        self._order = None if sorted_already else np.argsort(self.episode_tasks, kind="stable")
        self._ordered_starts = self._starts
        if self._order is not None:
            self._ordered_starts = np.concatenate([[0], np.cumsum(self._lengths[self._order], dtype=np.int64)])
        counts = np.unique(self.episode_tasks, return_counts=True)[1]
        ends = self._ordered_starts[np.cumsum(counts)]
        self._task_first = np.concatenate([[0], ends[:-1]])
        self._task_size = ends - self._task_first

    def __len__(self) -> int:
        """Number of transitions."""
        return self.description.transitions

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return self.description.episodes

    @property
    def max_episode_length(self) -> int:
        """Longest time limit of the tasks, or their longest episode where none is known."""
        return max(task.max_episode_length or 0 for task in self.tasks)

    @property
    def multitask(self) -> bool:
        """Whether tasks have names, and samples say which they come from."""
        return self.tasks[0].name is not None

    def has_terminations(self) -> bool:
        """Whether any episode ended by a true termination, as opposed to a time limit."""
        return bool(self._terminated.any())

    def seed(self, seed: int | Sequence[int] | None = None) -> None:
        """
        Restart the generator behind ``sample``.

        :param seed: The seed, several numbers that make one, or None for one from the operating system
        """
        self.rng = np.random.default_rng(seed)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SequenceSamples:
        """
        Draw windows; where one meets its episode's end, the steps that are left are masked.

        :param batch_size: Number of windows
        :param env: VecNormalize whose statistics normalise the stored observations and rewards, if any
        :return: The windows, time first; ``task`` is None in a set of a single task
        """
        episode, transition = self._draw(batch_size)
        last = np.minimum(self._starts[episode + 1] - transition, self.horizon) - 1
        steps = np.arange(self.horizon + 1)[:, None]
        rows = transition + np.minimum(steps[:-1], last)
        masked = steps[:-1] > last
        # Every episode has one observation more than transitions
        observation_rows = transition + episode + np.minimum(steps, last + 1)
        observations = self._observations(observation_rows)
        actions = self._columns["actions", None].take(rows)
        rewards = self._columns["rewards", None].take(rows)
        terminations = (rows == self._starts[episode + 1] - 1) & self._terminated[episode]
        if env is not None:
            observations, rewards = env.normalize_obs(observations), env.normalize_reward(rewards)
        actions[masked], rewards[masked], terminations[masked] = 0, 0, False
        self._count_pages(batch_size)
        return SequenceSamples(
            observations=_each(self._tensor, observations),
            actions=self._tensor(actions),
            rewards=self._tensor(rewards[..., None]).float(),
            terminations=self._tensor(terminations[..., None]).float(),
            masks=self._tensor(~masked[..., None]).float(),
            task=self._tensor(self.episode_tasks[episode].astype(np.int64)) if self.multitask else None,
        )

    def _draw(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Episodes [B] and transitions, counted over all episodes, [B] that windows start from."""
        if self.balance == "balanced":
            task = self.rng.integers(len(self._task_size), size=batch_size)
            number = self._task_first[task] + self.rng.integers(self._task_size[task])
        else:
            number = self.rng.integers(len(self), size=batch_size)
        place = np.searchsorted(self._ordered_starts, number, side="right") - 1
        if self._order is None:
            return place, number
        episode = self._order[place]
        return episode, self._starts[episode] + number - self._ordered_starts[place]

    def _observations(self, rows: np.ndarray) -> Any:
        columns = {key: column for (name, key), column in self._columns.items() if name == "observations"}
        if None in columns:
            return columns[None].take(rows)
        return {key: column.take(rows) for key, column in columns.items()}

    def _count_pages(self, batch_size: int) -> None:
        """Hand pages back before too many are mapped; what a window maps is estimated from above."""
        window = sum(FAULT_BYTES + (self.horizon + 1) * column.layout.row_bytes for column in self._columns.values())
        self._mapped += batch_size * window
        if self._mapped > self.resident_bytes:
            for column in self._columns.values():
                column.release()
            self._mapped = 0

    def _tensor(self, array: np.ndarray) -> th.Tensor:
        tensor = th.from_numpy(array)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    return {key: function(value) for key, value in tree.items()} if isinstance(tree, dict) else function(tree)


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes instead of {size}"
        raise ValueError(f"{path} {state}: the set is damaged, delete its folder and convert again.")


def _check_sum(path: Path, checksum: int) -> None:
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            found = zlib.crc32(block, found)
    if found != checksum:
        raise ValueError(f"{path} does not have its checksum: the set is damaged, delete its folder and convert again.")
