"""Whether spaces and observations are those of a multi-task model."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_mbdpo.tasks import OBSERVATION_KEY, TASK_KEY, TaskSet


def check_task_spaces(task_set: TaskSet, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param task_set: Tasks of a multi-task model
    :param observation_space: Observation space
    :param action_space: Action space
    :raises ValueError: unless the spaces are the set's own
    """
    for what, found, wanted in (
        ("observations", observation_space, task_set.observation_space),
        ("actions", action_space, task_set.action_space),
    ):
        if found != wanted:
            raise ValueError(
                f"A model of these {len(task_set)} tasks has {what} of {wanted}, this environment has {found}: wrap it "
                "in MultiTaskEnv with the same tasks, or build it with make_multitask_env."
            )


def check_task_indices(task_set: TaskSet, observation: Any) -> None:
    """
    :param task_set: Tasks of a multi-task model
    :param observation: One observation or a batch of them, as NumPy arrays
    :raises ValueError: unless it holds the index of one of the tasks for each row
    """
    if not isinstance(observation, dict) or observation.keys() != {OBSERVATION_KEY, TASK_KEY}:
        found = sorted(observation) if isinstance(observation, dict) else type(observation).__name__
        raise ValueError(
            f'A multi-task policy observes a dict of "{OBSERVATION_KEY}" and "{TASK_KEY}", got {found}: wrap the '
            "environment in MultiTaskEnv."
        )
    index = np.asarray(observation[TASK_KEY])
    known = np.issubdtype(index.dtype, np.integer) and ((index >= 0) & (index < len(task_set))).all()
    if not known:
        raise ValueError(f"task must be whole numbers from 0 to {len(task_set) - 1}, got {observation[TASK_KEY]!r}.")
    rows = math.prod(np.shape(observation[OBSERVATION_KEY])[:-1])
    if index.size != rows:
        raise ValueError(f"Each observation needs its task: got {rows} observation(s) and {index.size} task(s).")
