"""Small sets of shards that the tests share."""

from pathlib import Path
from typing import Any

import numpy as np

from sb3_mbdpo.shard_format import TaskData
from sb3_mbdpo.shard_writer import ShardWriter
from tests.fakes import ACTIONS, VECTOR

Episode = tuple[np.ndarray, np.ndarray, np.ndarray, bool, int]
LENGTHS = (5, 1, 9, 2, 3, 17)


def numbered(lengths: tuple[int, ...] = LENGTHS, n_tasks: int = 1) -> list[Episode]:
    """Episodes whose entries say where they are from: observations [episode, step, task], rewards 100 e + t."""
    episodes = []
    for e, length in enumerate(lengths):
        task = (e * 2 + 1) % n_tasks
        steps = np.arange(length + 1, dtype=np.float64)
        obs = np.stack([np.full_like(steps, e), steps, np.full_like(steps, task)], axis=1)
        actions = np.stack([steps[:-1] / 100, np.full(length, e / 100)], axis=1)
        episodes.append((obs, actions, 100 * e + steps[:-1], e % 2 == 0, task))
    return episodes


def write(path: Path, episodes: list[Episode], shard_bytes: int = 2**20, n_tasks: int = 1, **kwargs: Any) -> Path:
    tasks = [TaskData(f"task-{k}") for k in range(n_tasks)] if n_tasks > 1 else [TaskData()]
    with ShardWriter(path, VECTOR, ACTIONS, tasks=tasks, shard_bytes=shard_bytes, **kwargs) as writer:
        for episode in episodes:
            writer.add(*episode)
    return path
