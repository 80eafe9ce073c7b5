"""Minari data sets as shards: opened by id, checked, and converted once, episode by episode.

Converted sets lie in a hidden folder beside Minari's own, which its listings pass over. A set is converted anew when
its files have changed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from sb3_mbdpo.minari_sources import (
    Dataset,
    DataTask,
    channels_last,
    common_spaces,
    minari_root,
    open_tasks,
    size_of,
    task_data,
)
from sb3_mbdpo.shard_format import VERSION
from sb3_mbdpo.shard_writer import SHARD_BYTES, ShardWriter, write_once

if TYPE_CHECKING:
    from minari import MinariDataset

SHARDS_FOLDER = ".sb3_mbdpo_shards"
# Episodes read at a time
BLOCK = 16
# How far outside of its bounds an action may lie, in units of the scaled action: rounding, nothing else
TOLERANCE = 1e-5


def convert_minari(dataset: Dataset, shards_dir: str | Path | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """
    Shards of Minari data sets, converted now unless that was done before and they have not changed since.

    Several tasks are padded with zeros to the widest one's sizes.

    :param dataset: An id or ``MinariDataset``, several of them, or a dict of them by the names of tasks; see
        :func:`~sb3_mbdpo.minari_sources.open_tasks`
    :param shards_dir: Where converted sets go; None puts them beside Minari's data sets
    :param shard_bytes: Largest size of a file, bytes
    :return: Folder of the shards
    :raises ValueError: naming the data set and the episode that cannot be used; nothing half-written stays
    """
    return convert_tasks(open_tasks(dataset), shards_dir, shard_bytes)


def convert_tasks(tasks: list[DataTask], shards_dir: str | Path | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """
    The same for data sets that are open.

    :param tasks: Opened tasks
    :param shards_dir: As in :func:`convert_minari`
    :param shard_bytes: As in :func:`convert_minari`
    :return: Folder of the shards
    :raises ValueError: as in :func:`convert_minari`
    """
    observation_space, action_space = common_spaces(tasks)
    root = Path(shards_dir) if shards_dir is not None else minari_root() / SHARDS_FOLDER
    path, fingerprint = root / _folder_name(tasks), _fingerprint(tasks)
    entries = [task_data(task) for task in tasks]

    def write() -> None:
        total = sum(len(source) for task in tasks for source in task.datasets)
        with (
            ShardWriter(path, observation_space, action_space, fingerprint, entries, shard_bytes) as writer,
            tqdm(total=total, desc="Converting", unit="episodes", disable=None, delay=1) as progress,
        ):
            for number, task in enumerate(tasks):
                for source in task.datasets:
                    for episode in _episodes(source):
                        for part in _prepared(source, task.action_space, episode):
                            observations, actions = _padded(part, observation_space, action_space)
                            writer.add(observations, actions, part.rewards, part.terminated, number)
                        progress.update()

    return write_once(path, fingerprint, write)


class _Part(NamedTuple):
    """T transitions without a break: observations [T + 1, ...], scaled actions [T, A], rewards [T]."""

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def _folder_name(tasks: list[DataTask]) -> str:
    """A readable name, and a hash of what was asked for."""
    sources = [d for task in tasks for d in task.datasets]
    asked = [
        [task.name, str(Path(d.storage.data_path).resolve()), hashlib.sha256(d.episode_indices.tobytes()).hexdigest()]
        for task in tasks
        for d in task.datasets
    ]
    more = f"-and-{len(sources) - 1}-more" if len(sources) > 1 else ""
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return f"{sources[0].id.replace('/', '--')}{more}-{digest[:8]}"


def _fingerprint(tasks: list[DataTask]) -> str:
    """Hash of names, episodes, and size and time of every file: a changed data set has another one."""
    seen: list[Any] = [VERSION]
    for task in tasks:
        seen.append(task.name)
        for source in task.datasets:
            folder = Path(source.storage.data_path)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
            seen.append([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
            seen.append([source.id, source.episode_indices.tolist()])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _episodes(dataset: "MinariDataset") -> Iterator[Any]:
    indices = dataset.episode_indices
    for first in range(0, len(indices), BLOCK):
        block = indices[first : first + BLOCK]
        try:
            episodes = list(dataset.iterate_episodes(block))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{dataset.id} cannot be read at episodes {block[0]} to {block[-1]} ({error}): download or record it "
                "again."
            ) from error
        yield from episodes


def _prepared(source: "MinariDataset", action_space: spaces.Box, episode: Any) -> Iterator[_Part]:
    """Check an episode and give its parts; one that went on after an end has several."""
    place, length = f"{source.id}, episode {episode.id}", len(episode.rewards)
    flags = {name: np.asarray(getattr(episode, name), bool).reshape(-1) for name in ("terminations", "truncations")}
    for name, values in {"actions": episode.actions, **flags}.items():
        if len(values) != length:
            raise ValueError(f"{place} has {length} rewards but {len(values)} {name}: the data set is damaged.")
    observations = _observations(place, source.observation_space, episode.observations, length + 1)
    if length == 0:
        return
    rewards = np.asarray(episode.rewards, np.float64).reshape(length)
    if not np.isfinite(rewards).all():
        raise ValueError(f"{place} has rewards that are not finite: leave it out (filter_episodes) or record it again.")
    actions = _scaled(place, action_space, np.asarray(episode.actions, np.float64).reshape(length, -1))
    last = (flags["terminations"] | flags["truncations"])[:-1]
    stops = [*(np.flatnonzero(last) + 1).tolist(), length]
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        part = _each(lambda values: values[start : stop + 1], observations)  # noqa: B023 (called at once)
        yield _Part(part, actions[start:stop], rewards[start:stop], bool(flags["terminations"][stop - 1]))


def _scaled(place: str, space: spaces.Box, actions: np.ndarray) -> np.ndarray:
    """Actions [T, A] on the scale from -1 to 1."""
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))
    scaled = 2 * (actions - low) / (high - low) - 1
    # Not "any outside": NaN is neither inside nor outside
    if not (np.abs(scaled) <= 1 + TOLERANCE).all():
        raise ValueError(f"{place} has actions outside of the bounds of {space}: clip them or correct the space.")
    return scaled.clip(-1, 1).astype(np.float32)


def _observations(place: str, space: spaces.Space, values: Any, rows: int) -> Any:
    """
    Observations as they are stored: images channels first.

    :param place: What errors call the episode
    :param space: The data set's own space
    :param values: Its observations
    :param rows: How many there must be
    :return: [rows, ...], or a dict of such arrays
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(values, dict) or values.keys() != space.keys():
            raise ValueError(f"{place} does not have the observations {list(space)}: the data set is damaged.")
        return {key: _observations(f'{place}, "{key}"', part, values[key], rows) for key, part in space.items()}
    array, shape = np.asarray(values), (rows, *(space.shape or ()))
    if array.shape != shape:
        raise ValueError(
            f"{place} has observations of shape {array.shape} instead of {shape}: the data set is damaged."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"{place} has observations that are not finite: leave it out (filter_episodes) or record it again."
        )
    return array.transpose(0, 3, 1, 2) if channels_last(space) else array


def _padded(part: _Part, observation_space: spaces.Space, action_space: spaces.Box) -> tuple[Any, np.ndarray]:
    """Observations and actions, with zeros on the right up to the sizes of the spaces."""
    observations, actions = part.observations, part.actions
    if not isinstance(observations, dict) and observations.ndim == 2:
        width = (observation_space.shape or observations.shape[1:])[0]
        observations = np.pad(observations, ((0, 0), (0, width - observations.shape[1])))
    actions = np.pad(actions, ((0, 0), (0, size_of(action_space) - actions.shape[1])))
    return observations, actions


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    return {key: function(value) for key, value in tree.items()} if isinstance(tree, dict) else function(tree)
