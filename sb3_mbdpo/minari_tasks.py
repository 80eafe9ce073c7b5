"""Episodes of a multi-task model in the terms of one task: what its own environment observes, does and is called."""

from typing import Any, cast

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_mbdpo.multitask_env import EnvSource, MultiTaskEnv, make_env
from sb3_mbdpo.tasks import OBSERVATION_KEY, TASK_KEY, TaskSet


class TaskUnits:
    """
    Turns padded observations and actions in [-1, 1] back into those of one task's environment.

    :param tasks: Tasks of the model
    :param name: Which of them
    :param source: Its environment, id or function that makes one; None: by the task's ``env_id``. Where there is
        neither, observations are taken as an unbounded vector and actions as they are, in [-1, 1]
    :raises ValueError: for an unknown task, or an environment of another one
    """

    def __init__(self, tasks: TaskSet, name: str, source: EnvSource | None = None):
        self.tasks, self.index, self.task = tasks, tasks.index(name), tasks[name]
        source = self.task.env_id if source is None else source
        self.env: MultiTaskEnv | None = None
        self.observation_space: spaces.Box = spaces.Box(-np.inf, np.inf, (self.task.observation_dim,), np.float32)
        self.action_space: spaces.Box = spaces.Box(-1.0, 1.0, (self.task.action_dim,), np.float32)
        if source is not None:
            inner = make_env(source, self.task.action_repeat)
            self.env = MultiTaskEnv(inner, tasks, name)
            self.observation_space = cast(spaces.Box, inner.observation_space)
            self.action_space = cast(spaces.Box, inner.action_space)

    @property
    def spec(self) -> EnvSpec | None:
        """Spec of the task's own environment; None where there is none."""
        return None if self.env is None else self.env.env.spec

    def is_of_task(self, observations: dict[str, np.ndarray]) -> bool:
        """
        :param observations: Padded observations of an episode
        :return: Whether they are of this task
        """
        return int(np.ravel(observations[TASK_KEY])[0]) == self.index

    def own(self, observations: dict[str, np.ndarray], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param observations: Padded observations of an episode, [T + 1, O] under "observation"
        :param actions: Padded actions in [-1, 1] [T, A]
        :return: The task's own observations [T + 1, ...] and actions [T, ...]
        """
        vectors = observations[OBSERVATION_KEY][:, : self.task.observation_dim]
        if self.env is None:
            return vectors, actions[:, : self.task.action_dim]
        return vectors, np.stack([self.env.action(action) for action in actions])


def task_units(tasks: TaskSet | None, name: str | None, source: Any = None) -> TaskUnits | None:
    """
    :param tasks: Tasks of the model, None for a single-task one
    :param name: Task that is wanted
    :param source: Its environment, id or function that makes one
    :return: The task's terms; None for a single-task model
    :raises ValueError: if a multi-task model is not told which task, or a single-task model is told one
    """
    if tasks is None:
        if name is not None:
            raise ValueError(f"This model is of a single task: leave out task={name!r}.")
        return None
    if name is None:
        raise ValueError(
            f"A data set is of one task in its own units: pass task=..., one of the model's {list(tasks.names)}."
        )
    return TaskUnits(tasks, name, source)
