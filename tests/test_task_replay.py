from typing import Any

import numpy as np
import pytest

from sb3_mbdpo.task_replay import MultiTaskReplayBuffer
from tests.fakes import LEANING, leaning_observations


def filled(tasks: list[int], steps: int = 20, **kwargs: Any) -> MultiTaskReplayBuffer:
    buffer = MultiTaskReplayBuffer(
        50 * len(tasks), LEANING.observation_space, LEANING.action_space, "cpu", n_envs=len(tasks), **kwargs
    )
    buffer.seed(0)
    add(buffer, tasks, steps)
    return buffer


def add(buffer: MultiTaskReplayBuffer, tasks: list[int], steps: int) -> None:
    for step in range(steps):
        before, after = leaning_observations(tasks, step), leaning_observations(tasks, step + 1)
        zeros = np.zeros(len(tasks))
        buffer.add(before, after, np.zeros((len(tasks), 3)), zeros, zeros, [{} for _ in tasks])


def shares(buffer: MultiTaskReplayBuffer, size: int = 4000) -> list[float]:
    tasks = buffer.sample(size).observations["task"][0].flatten().numpy()
    return [float((tasks == task).mean()) for task in range(3)]


def test_proportional_is_uniform_over_transitions() -> None:
    assert shares(filled([0, 0, 0, 2])) == pytest.approx([0.75, 0, 0.25], abs=0.03)


def test_balanced_is_uniform_over_tasks() -> None:
    assert shares(filled([0, 0, 0, 2], task_sampling="balanced")) == pytest.approx([0.5, 0, 0.5], abs=0.03)
    buffer = filled([0, 1, 0, 2, 0], task_sampling="balanced")
    assert shares(buffer) == pytest.approx([1 / 3] * 3, abs=0.03)
    # All rows and all environments of a task are seen, in any order
    sampled = buffer.sample(2000)
    first = sampled.observations["observation"][0].numpy()
    assert len(np.unique(first, axis=0)) == 5 * 20
    tasks = sampled.observations["task"][0].flatten().numpy()
    assert (np.diff(tasks) != 0).mean() > 0.5


def test_a_balanced_environment_keeps_its_task() -> None:
    buffer = filled([0, 1], task_sampling="balanced")
    with pytest.raises(ValueError, match="environment 1 has changed"):
        add(buffer, [0, 2], 1)
    buffer.reset()
    add(buffer, [0, 2], 3)
    assert shares(buffer) == pytest.approx([0.5, 0, 0.5], abs=0.05)
    proportional = filled([0, 1])
    add(proportional, [0, 2], 20)
    assert shares(proportional) == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_another_way_from_now_on() -> None:
    buffer = filled([0, 0, 0, 2])
    buffer.set_task_sampling("balanced")
    assert shares(buffer) == pytest.approx([0.5, 0, 0.5], abs=0.03)
    buffer.set_task_sampling("proportional")
    add(buffer, [0, 0, 1, 2], 1)
    with pytest.raises(ValueError, match="environment 2 has changed"):
        buffer.set_task_sampling("balanced")
    with pytest.raises(ValueError, match=r'"proportional" or "balanced"'):
        buffer.set_task_sampling("even")
    assert buffer.task_sampling == "proportional"


def test_a_task_of_the_oldest_rows_of_a_full_ring_is_seen() -> None:
    buffer = filled([0, 1], steps=49)
    add(buffer, [0, 2], 2)
    assert buffer.full and buffer.pos == 1, "the newest row comes first, and all others are older"
    with pytest.raises(ValueError, match="environment 1 has changed"):
        buffer.set_task_sampling("balanced")


def test_unknown_ways_and_empty_buffers() -> None:
    with pytest.raises(ValueError, match=r'"proportional" or "balanced"'):
        filled([0], task_sampling="even")
    with pytest.raises(ValueError, match="empty"):
        filled([0], steps=0, task_sampling="balanced").sample(1)
