"""Episodes on disk, sampled as windows: data sets that are larger than memory.

A set is a folder: ``description.json``, a few small per-episode arrays, and the rows of all episodes, one after the
other, in plain binary files of bounded size. An episode of T transitions has T + 1 rows; a row is an observation, and
the action and reward that follow it (zeros in the last). Fields lie side by side, so that a window is one place on the
disk. Windows are gathered through memory maps whose pages are handed back regularly: what stays resident does not grow
with the set. ``shard_writer`` writes such a folder.
"""

import mmap
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.shard_format import INDEX, Description, row_file
from sb3_mbdpo.task_replay import check_task_sampling

# Checksums of all data are compared by default up to this size: a second or so
VERIFY_BYTES = 2**30
# A page fault in a file maps the pages around it too, where the system has them: 64 KiB on Linux
FAULT_BYTES = 2**16
# Rows of a task from which its observations' mean and standard deviation are taken
STATISTICS_ROWS = 100_000
STATISTICS_BYTES = 2**28


class _Rows:
    """The rows of a set, whose pages are read when they are needed."""

    def __init__(self, directory: Path, description: Description, verify: bool):
        self.row_bytes, self.rows_per_file = description.row_bytes, description.rows_per_file
        self._maps: list[mmap.mmap] = []
        self._arrays: list[np.ndarray] = []
        for index, checksum in enumerate(description.checksums):
            path = directory / row_file(index)
            rows = min(self.rows_per_file, description.rows - index * self.rows_per_file)
            _check_size(path, rows * self.row_bytes)
            if verify:
                _check_sum(path, checksum)
            with path.open("rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                # Windows lie anywhere: reading ahead would fetch what nobody asked for
                pages.madvise(mmap.MADV_RANDOM)
            self._maps.append(pages)
            self._arrays.append(np.frombuffer(pages, np.uint8).reshape(rows, self.row_bytes))

    def take(self, index: np.ndarray) -> np.ndarray:
        """
        :param index: Row numbers of any shape
        :return: The rows as bytes [*index.shape, row_bytes]
        """
        flat = index.reshape(-1)
        file = flat // self.rows_per_file
        order = np.argsort(file, kind="stable")
        # One gather for each file that is met, not for each row
        bounds = np.searchsorted(file[order], np.arange(len(self._arrays) + 1))
        out = np.empty((len(flat), self.row_bytes), np.uint8)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            part = order[bounds[number] : bounds[number + 1]]
            out[part] = self._arrays[number].take(flat[part] - number * self.rows_per_file, axis=0)
        return out.reshape(*index.shape, self.row_bytes)

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
    :param task_sampling: "proportional": every transition is as likely as any other; "balanced": every task is,
        and within a task every transition
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
        task_sampling: str = "proportional",
        seed: int | None = None,
        verify: bool | None = None,
        resident_bytes: int = 2**28,
    ):
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}: pass the number of transitions in a window.")
        check_task_sampling(task_sampling)
        self.path, self.horizon, self.task_sampling = Path(path), horizon, task_sampling
        self.device = get_device(device)
        self.description = description = Description.read(path)
        self.observation_space, self.action_space = description.observation_space, description.action_space
        self.tasks = description.tasks
        self._read_index()
        if verify is None:
            verify = description.rows * description.row_bytes <= VERIFY_BYTES
        self._rows = _Rows(self.path, description, verify)
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

    def spread_observations(self, task: int | None = None, max_rows: int = STATISTICS_ROWS) -> Any:
        """
        Observations spread evenly over a task's transitions: the same in every process, whatever was drawn before.

        :param task: Index of a task that has episodes; None: all tasks
        :param max_rows: Most rows to read; fewer where they are large
        :return: [N, ...], N at most ``max_rows``, or a dict of these
        """
        first, size = 0, len(self)
        if task is not None:
            place = np.flatnonzero(np.unique(self.episode_tasks) == task)[0]
            first, size = int(self._task_first[place]), int(self._task_size[place])
        count = min(size, max_rows, max(STATISTICS_BYTES // self.description.row_bytes, 1))
        numbers = first + np.unique(np.linspace(0, size - 1, count).round().astype(np.int64))
        episode, transition = self._locate(numbers)
        rows = self._rows.take(transition + episode)
        fields = [field for field in self.description.fields if field.name == "observations"]
        by_key = {field.key: field.read(rows) for field in fields}
        self._rows.release()
        return by_key.get(None, by_key)

    def spread_returns(self, gamma: float, max_rows: int = STATISTICS_ROWS) -> np.ndarray:
        """
        What each reward adds to, going forward through an episode: x_t = gamma x_(t-1) + r_t, the quantity by whose
        variance ``VecNormalize`` scales rewards.

        :param gamma: Discount
        :param max_rows: About how many rows to read, of episodes spread evenly over the set
        :return: [N]
        """
        wanted = max(min(self.n_episodes, max_rows * self.n_episodes // len(self)), 1)
        (field,) = (field for field in self.description.fields if field.name == "rewards")
        found: list[float] = []
        for episode in np.unique(np.linspace(0, self.n_episodes - 1, wanted).round().astype(np.int64)).tolist():
            rows = np.arange(self._starts[episode], self._starts[episode + 1]) + episode
            rewards = field.read(self._rows.take(rows)).reshape(-1).tolist()
            found += accumulate(rewards, lambda total, reward: gamma * total + reward)
        self._rows.release()
        return np.asarray(found)

    def sample(self, batch_size: int, env: VecNormalize | None = None, ranks: Ranks = ALONE) -> SequenceSamples:
        """
        Draw windows; where one meets its episode's end, the steps that are left are masked.

        :param batch_size: Number of windows
        :param env: VecNormalize whose statistics normalise the stored observations and rewards, if any
        :param ranks: Processes that share the batch: all draw the same windows, each reads its own
        :return: The windows, time first; ``task`` is None in a set of a single task
        """
        episode, transition = (ranks.rows(drawn) for drawn in self._draw(batch_size))
        last = np.minimum(self._starts[episode + 1] - transition, self.horizon) - 1
        steps = np.arange(self.horizon + 1)[:, None]
        masked = steps[:-1] > last
        # Every episode before this one has a row more than it has transitions
        rows = self._rows.take(transition + episode + np.minimum(steps, last + 1))
        self._count_pages(len(episode))
        fields = {(field.name, field.key): field for field in self.description.fields}
        by_key = {key: field.read(rows) for (name, key), field in fields.items() if name == "observations"}
        observations: Any = by_key.get(None, by_key)
        actions = fields["actions", None].read(rows[:-1])
        rewards = fields["rewards", None].read(rows[:-1])
        terminations = (steps[:-1] == last) & self._terminated[episode]
        terminations &= transition + last == self._starts[episode + 1] - 1
        if env is not None:
            observations, rewards = env.normalize_obs(observations), env.normalize_reward(rewards)
        actions[masked], rewards[masked] = 0, 0
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
        if self.task_sampling == "balanced":
            task = self.rng.integers(len(self._task_size), size=batch_size)
            number = self._task_first[task] + self.rng.integers(self._task_size[task])
        else:
            number = self.rng.integers(len(self), size=batch_size)
        return self._locate(number)

    def _locate(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Episodes, and transitions as they are stored, of transitions counted task by task."""
        place = np.searchsorted(self._ordered_starts, number, side="right") - 1
        if self._order is None:
            return place, number
        episode = self._order[place]
        return episode, self._starts[episode] + number - self._ordered_starts[place]

    def _count_pages(self, batch_size: int) -> None:
        """Hand pages back before too many are mapped; what a window maps is estimated from above."""
        window = FAULT_BYTES + (self.horizon + 1) * self.description.row_bytes
        self._mapped += batch_size * window
        if self._mapped > self.resident_bytes:
            self._rows.release()
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
