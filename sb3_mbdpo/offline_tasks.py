"""Recorded data of several tasks as a multi-task model learns from it: a task set, and batches in the model's terms."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch.nn.functional import pad

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.minari_sources import size_of
from sb3_mbdpo.multitask_env import EnvSource, flat_sizes, make_env
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.shard_format import TaskData
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.tasks import Task, TaskSet, mean_and_std

# Not among the model's tasks
ABSENT = -1


class TaskWindows:
    """
    Windows of a set as a multi-task model takes them: by its own task indices, padded to its own widths.

    Rows of all tasks are mixed within a batch; ``task_sampling`` of the set decides how many there are of each.

    :param data: Set whose tasks fit, see :func:`check_tasks`
    :param tasks: The model's tasks
    """

    def __init__(self, data: ShardedDataset, tasks: TaskSet):
        self.data, self.tasks = data, tasks
        names = [task.name for task in data.tasks]
        self._index = th.tensor([tasks.index(str(name)) if name in tasks else ABSENT for name in names])
        self._index = self._index.to(data.device)
        self._masks = th.as_tensor(tasks.action_masks, device=data.device)

    def seed(self, seed: int | Sequence[int] | None = None) -> None:
        """
        :param seed: As for ``ShardedDataset.seed``
        """
        self.data.seed(seed)

    def sample(self, batch_size: int, env: VecNormalize | None = None, ranks: Ranks = ALONE) -> SequenceSamples:
        """
        :param batch_size: Number of windows B
        :param env: Not used: normalisation is refused in multi-task models
        :param ranks: Processes that share the batch
        :return: Windows of the model's widths, time first, with the index of each one's task [B]
        """
        samples = self.data.sample(batch_size, ranks=ranks)
        assert isinstance(samples.observations, th.Tensor) and samples.task is not None
        task = self._index[samples.task]
        actions = _fitted(samples.actions, self.tasks.action_dim) * self._masks[task]
        observations = _fitted(samples.observations, self.tasks.observation_dim)
        return samples._replace(observations=observations, actions=actions, task=task)


def _fitted(values: th.Tensor, width: int) -> th.Tensor:
    """Zeros after the last entries, or fewer of those that there are."""
    return pad(values[..., :width], (0, max(width - values.shape[-1], 0)))


def present(entries: Sequence[TaskData]) -> list[TaskData]:
    """
    :param entries: Tasks of a set, or those that will be in one, not counted yet
    :return: Those that are not known to have no episode
    """
    counted = any(entry.episodes > 0 for entry in entries)
    return [entry for entry in entries if entry.episodes > 0 or not counted]


def check_tasks(
    tasks: TaskSet | None, entries: Sequence[TaskData], pair: tuple[spaces.Space, spaces.Box] | None = None
) -> None:
    """
    Refuse data of other tasks than the model's.

    :param tasks: The model's tasks, None for a single-task model
    :param entries: Tasks of the data
    :param pair: Spaces of the data; not looked at for a single-task model
    :raises ValueError: saying what to do instead
    """
    found = present(entries)
    if tasks is None:
        if len(found) > 1:
            raise ValueError(
                f"The data is of the tasks {[entry.name for entry in found]}, this model of a single one: pass one "
                "task's data ({name: [data sets]} says that all of them are), or build a model of several tasks with "
                "MBDPO.from_minari(...)."
            )
        return
    if found[0].name is None:
        raise ValueError(
            "The data does not say which task it is of, and this model has several: convert it by name, "
            'convert_minari({"name": data set}).'
        )
    unknown = [str(entry.name) for entry in found if entry.name not in tasks]
    if unknown:
        raise ValueError(
            f"The data is of the tasks {unknown}, which are not among this model's {list(tasks.names)}: leave them "
            "out, give data sets the names of the model's tasks ({name: data sets}), or build a model with "
            "MBDPO.from_minari(...)."
        )
    if pair is not None:
        check_vectors(pair[0])
    for entry in found:
        task = tasks[str(entry.name)]
        sizes = (entry.observation_size, entry.action_size)
        wanted = (task.observation_dim, task.action_dim)
        if any(size is not None and size != expected for size, expected in zip(sizes, wanted, strict=True)):
            raise ValueError(
                f"The data of task {task.name!r} has {sizes[0]} observation entries and {sizes[1]} actions, the "
                f"model's task has {wanted[0]} and {wanted[1]}: this is not the task's data."
            )


def check_vectors(space: spaces.Space) -> None:
    """
    :param space: Observation space of data of several tasks
    :raises ValueError: unless it is flat
    """
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"Models of several tasks read flat Box observations, the data holds {space}: record it in an environment "
            "wrapped in gymnasium.wrappers.FlattenObservation."
        )


def task_set_of_data(
    entries: Sequence[TaskData],
    pair: tuple[spaces.Space, spaces.Box],
    limits: Sequence[int | None],
    envs: Mapping[str, EnvSource],
    observation_dim: int | None = None,
    action_dim: int | None = None,
) -> TaskSet:
    """
    The tasks of a data set: names, sizes, episode lengths, discounts by the paper's rule, reference scores, and ids of
    environments where they make what was recorded.

    :param entries: Tasks of the data
    :param pair: Its spaces
    :param limits: Episode lengths of the tasks
    :param envs: Environments that the caller gives; these tasks' ids are not looked at
    :param observation_dim: Width that leaves room for later tasks; None: the widest task's
    :param action_dim: The same for actions
    :return: The set
    :raises ValueError: for data that is not flat, an environment of no task, or a width that is too narrow
    """
    check_vectors(pair[0])
    tasks = []
    for entry, limit in zip(entries, limits, strict=True):
        task = Task(
            str(entry.name),
            entry.observation_size or size_of(pair[0]),
            entry.action_size or size_of(pair[1]),
            episode_length=limit,
        )
        if entry.normalized_score(0.0) is not None:
            task = replace(task, ref_min_score=entry.ref_min_score, ref_max_score=entry.ref_max_score)
        source = envs.get(task.name)
        env_id = source if isinstance(source, str) else None
        if source is None and entry.env_id is not None:
            env_id = _checked_id(task, entry.env_id)
        tasks.append(replace(task, env_id=env_id))
    found = TaskSet(tasks, observation_dim, action_dim)
    for name in envs:
        found.index(name)
    return found


def with_statistics(tasks: TaskSet, data: ShardedDataset) -> TaskSet:
    """
    The model's tasks, with the data's mean and standard deviation of observations where a task has none yet.

    :param tasks: The model's tasks
    :param data: Set whose tasks fit, see :func:`check_tasks`
    :return: The set
    :raises ValueError: for observations that are not finite
    """
    indices = {entry.name: index for index, entry in enumerate(data.tasks) if entry.episodes > 0}

    def filled(task: Task) -> Task:
        if task.observation_mean is not None or task.name not in indices:
            return task
        mean, std = mean_and_std(data.spread_observations(indices[task.name])[:, : task.observation_dim])
        return replace(task, observation_mean=mean, observation_std=std)

    return TaskSet([filled(task) for task in tasks], tasks.observation_dim, tasks.action_dim)


def _checked_id(task: Task, env_id: str) -> str | None:
    """The id, if it makes an environment of the task's sizes here; None, with a warning, otherwise."""
    try:
        env = make_env(env_id)
        sizes = flat_sizes(env)
        env.close()
        if sizes == (task.observation_dim, task.action_dim):
            return env_id
        error: Exception = ValueError(f"it has {sizes[0]} observation entries and {sizes[1]} actions")
    except (gym.error.Error, ImportError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as caught:
        error = caught
    warnings.warn(
        f"{env_id} is not the environment of task {task.name!r} here ({error}): the task has none, unless you pass "
        "one by its name.",
        stacklevel=5,
    )
    return None


def with_references(tasks: TaskSet, entries: Sequence[TaskData]) -> TaskSet:
    """
    The model's tasks, with the data's reference scores where the model has none.

    :param tasks: The model's tasks
    :param entries: Tasks of the data
    :return: The set to evaluate with
    """
    known = {entry.name: entry for entry in entries if entry.normalized_score(0.0) is not None}

    def filled(task: Task) -> Task:
        entry = known.get(task.name)
        if entry is None or task.ref_min_score is not None:
            return task
        low, high = cast(float, entry.ref_min_score), cast(float, entry.ref_max_score)
        return replace(task, ref_min_score=low, ref_max_score=high)

    return TaskSet([filled(task) for task in tasks], tasks.observation_dim, tasks.action_dim)
