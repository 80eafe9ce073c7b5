"""The part of the policies that knows of several tasks: which one an observation belongs to, and what that implies."""

import math
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_mbdpo.cuda_graphs import CudaGraphs
from sb3_mbdpo.task_checks import check_task_indices
from sb3_mbdpo.tasks import OBSERVATION_KEY, TASK_KEY, TaskSet

# Standard deviations; VecNormalize's default
OBSERVATION_BOUND = 10.0


class TaskPolicy(BasePolicy):
    """A policy of one task (``task_set`` None) or of those of a task set. Arguments are those of the policy."""

    task_set: TaskSet | None
    graphs: CudaGraphs
    discounts: th.Tensor
    observation_means: th.Tensor
    observation_stds: th.Tensor
    observation_bounds: th.Tensor
    _init_arguments: dict[str, Any]

    def register_tasks(self, task_set: TaskSet | None) -> None:
        """
        Make a task set the policy's own; the world model's embedding is the caller's to change.

        :param task_set: Tasks in the order of the embedding's rows; None for a single-task policy
        """
        self.task_set = task_set
        if task_set is None:
            return
        self.graphs.clear()
        self._init_arguments["tasks"] = task_set.to_plain()
        self.observation_space = self._init_arguments["observation_space"] = task_set.observation_space
        discounts = th.tensor(task_set.discounts, dtype=th.float32, device=self.device)[:, None]
        # Not in the state_dict: they are part of the task set
        self.register_buffer("discounts", discounts, persistent=False)
        means, stds = task_set.observation_statistics
        bounds = [[math.inf if task.observation_mean is None else OBSERVATION_BOUND] for task in task_set]
        statistics = {"observation_means": means, "observation_stds": stds, "observation_bounds": bounds}
        for name, values in statistics.items():
            self.register_buffer(name, th.as_tensor(values, dtype=th.float32, device=self.device), persistent=False)

    def tasks_of(self, obs: PyTorchObs, task: th.Tensor | None = None) -> th.Tensor | None:
        """
        :param obs: Batch of observations [B, ...]
        :param task: Task indices [B], where they came beside the observations
        :return: Task indices [B], None in single-task models
        :raises ValueError: if a multi-task policy is told no task
        """
        if self.task_set is None:
            return None
        if task is None and not isinstance(obs, dict):
            raise ValueError(f'This policy knows several tasks: pass a dict of "{OBSERVATION_KEY}" and "{TASK_KEY}".')
        given = cast(dict[str, th.Tensor], obs)[TASK_KEY] if task is None else task
        return given.reshape(-1).long()

    def standardise(self, obs: PyTorchObs, task: th.Tensor | None = None) -> th.Tensor:
        """
        Vectors of a multi-task policy, in units of their task's standard deviation and clipped as VecNormalize does.

        :param obs: Batch of observations [B, ...]
        :param task: Task indices [B], where they came beside the observations
        :return: [B, W]; as they are where a task has no statistics
        """
        vectors = (obs[OBSERVATION_KEY] if isinstance(obs, dict) else obs).float()
        if self.task_set is None or not self.task_set.normalizes:
            return vectors
        index = self.tasks_of(obs, task)
        scaled = (vectors - self.observation_means[index]) / self.observation_stds[index]
        bound = self.observation_bounds[index]
        return scaled.maximum(-bound).minimum(bound)

    def row_discounts(self, task: th.Tensor | None) -> th.Tensor | None:
        """
        :param task: Task indices [B]
        :return: Discount of each row [B, 1]; None in single-task models, where one number does
        """
        return None if task is None else self.discounts[task]

    def obs_to_tensor(self, observation: np.ndarray | dict[str, Any]) -> tuple[PyTorchObs, bool]:
        """
        Observations as tensors.

        :param observation: One observation or a batch of them
        :return: batch of tensors, whether it was a batch
        :raises ValueError: if a task index is not one of the policy's
        """
        if self.task_set is not None:
            check_task_indices(self.task_set, observation)
        return super().obs_to_tensor(observation)
