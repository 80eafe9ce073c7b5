"""Task sets: what a multi-task model knows about each of its tasks, as plain data that is saved with the model.

Observations and actions of all tasks are zero-padded on the right to the widest task, as in TD-MPC2's multi-task models
and data; the index of a task in its set is what the world model's embedding is looked up by.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
from gymnasium import spaces

from sb3_mbdpo.presets import discount_for

OBSERVATION_KEY, TASK_KEY = "observation", "task"
# What `add_task(like=...)` takes for "the task that the world model predicts best"
NEAREST = "nearest"
CONSTANT_STD = 1e-4


@dataclass(frozen=True)
class Task:
    """
    One task of a multi-task model.

    >>> Task("walker-walk", observation_dim=24, action_dim=6, episode_length=500).discount
    0.99

    :param name: Name, unique in its set
    :param observation_dim: Width of the flat observation vector
    :param action_dim: Number of actions
    :param env_id: Gymnasium id of the environment ("module:id" imports a module first); None when it has none
    :param action_repeat: Environment steps of each decision, when the environment is made from its id
    :param episode_length: Longest episode L in decisions; None when unknown
    :param discount: Discount factor; None: the paper's clip((L/5 - 1) / (L/5), 0.95, 0.995), 0.99 for unknown L
    :param ref_min_score: Return that counts as 0 in normalised scores, e.g. a random policy's
    :param ref_max_score: Return that counts as 1, e.g. an expert's
    :param observation_mean: Mean of each observation entry, which the policy takes off; None: observations stay as they
        are
    :param observation_std: Standard deviation of each, which it divides by; both are given or neither
    :raises ValueError: for values that cannot be right, naming task and field
    """

    name: str
    observation_dim: int
    action_dim: int
    env_id: str | None = None
    action_repeat: int = 1
    episode_length: int | None = None
    discount: float | None = None
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    observation_mean: tuple[float, ...] | None = None
    observation_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name == NEAREST:
            raise ValueError(f'A task needs a name, and "{NEAREST}" is taken by add_task; got {self.name!r}.')
        for field in ("observation_dim", "action_dim", "action_repeat", "episode_length"):
            value = getattr(self, field)
            if value is None and field == "episode_length":
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} of task {self.name!r} must be a whole number of at least 1, got {value!r}.")
            # Plain numbers: NumPy's cannot be written as JSON
            object.__setattr__(self, field, int(value))
        discount = discount_for(self.episode_length) if self.discount is None else self.discount
        if not isinstance(discount, numbers.Real) or not 0 <= float(discount) <= 1:
            raise ValueError(f"discount of task {self.name!r} must be between 0 and 1, got {discount!r}.")
        object.__setattr__(self, "discount", float(discount))
        self._check_references()
        self._check_statistics()

    def _check_references(self) -> None:
        low, high = self.ref_min_score, self.ref_max_score
        if low is None and high is None:
            return
        if low is None or high is None or not math.isfinite(low) or not math.isfinite(high) or not low < high:
            raise ValueError(
                f"Task {self.name!r} needs both ref_min_score and ref_max_score, finite and the first one lower, or "
                f"neither; got {low!r} and {high!r}."
            )
        object.__setattr__(self, "ref_min_score", float(low))
        object.__setattr__(self, "ref_max_score", float(high))

    def _check_statistics(self) -> None:
        given = self.observation_mean, self.observation_std
        if given == (None, None):
            return
        try:
            with np.errstate(over="ignore"):
                # As the policy has them
                mean, std = (np.asarray(() if values is None else values, np.float32) for values in given)
        except (TypeError, ValueError):
            mean = std = np.full(0, np.nan, np.float32)
        if mean.shape != (self.observation_dim,) or std.shape != mean.shape or not np.isfinite([mean, std]).all():
            raise ValueError(
                f"Task {self.name!r} needs both observation_mean and observation_std, {self.observation_dim} finite "
                "numbers each, or neither."
            )
        if (std <= 0).any():
            raise ValueError(f"observation_std of task {self.name!r} must be above 0: give constant entries 1.")
        object.__setattr__(self, "observation_mean", tuple(mean.tolist()))
        object.__setattr__(self, "observation_std", tuple(std.tolist()))

    def normalized(self, score: float) -> float | None:
        """
        :param score: Return of an episode, or a mean of them
        :return: 0 at ``ref_min_score``, 1 at ``ref_max_score``; None without reference scores
        """
        if self.ref_min_score is None or self.ref_max_score is None:
            return None
        return (score - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)


class TaskSet:
    """
    Tasks in a fixed order, with the widths that observations and actions are padded to.

    >>> tasks = TaskSet([Task("run", 17, 6), Task("swing", 3, 1)])
    >>> len(tasks), tasks.names, tasks.index("swing"), tasks["swing"].action_dim
    (2, ('run', 'swing'), 1, 1)
    >>> TaskSet.from_plain(tasks.to_plain()) == tasks
    True

    :param tasks: Tasks; their position is their index
    :param observation_dim: Width of padded observations; None: the widest task's. More leaves room for later tasks
    :param action_dim: Width of padded actions; None: the widest task's
    :raises ValueError: for no task, a repeated name, or a width that a task does not fit in
    """

    def __init__(self, tasks: Sequence[Task], observation_dim: int | None = None, action_dim: int | None = None):
        self.tasks = tuple(tasks)
        if not self.tasks:
            raise ValueError("A task set needs at least one task.")
        self.names = tuple(task.name for task in self.tasks)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"Names of tasks must be unique, {repeated} occur more than once.")
        self._indices = {name: index for index, name in enumerate(self.names)}
        self.observation_dim = self._width("observation_dim", observation_dim)
        self.action_dim = self._width("action_dim", action_dim)

    def _width(self, field: str, given: int | None) -> int:
        widest = max(self.tasks, key=lambda task: getattr(task, field))
        needed = getattr(widest, field)
        if given is not None and given < needed:
            raise ValueError(f"{field}={given} is too narrow: task {widest.name!r} has {needed}.")
        return needed if given is None else int(given)

    # --- access -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._indices

    def __getitem__(self, name: str) -> Task:
        return self.tasks[self.index(name)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskSet) and self.to_plain() == other.to_plain()

    def __hash__(self) -> int:
        return hash((self.tasks, self.observation_dim, self.action_dim))

    def __repr__(self) -> str:
        return f"TaskSet({list(self.names)}, observation_dim={self.observation_dim}, action_dim={self.action_dim})"

    def index(self, name: str) -> int:
        """
        :param name: Name of a task
        :return: Its index
        :raises ValueError: for an unknown name, listing those that come nearest
        """
        if name in self._indices:
            return self._indices[name]
        near = difflib.get_close_matches(str(name), self.names, n=3, cutoff=0.4) or list(self.names[:10])
        raise ValueError(f"There is no task {name!r} among the {len(self)} of this set; did you mean one of {near}?")

    def with_task(self, task: Task) -> TaskSet:
        """
        The set with one task more, at the end; padded widths stay.

        :param task: New task
        :return: New set
        :raises ValueError: if the name is taken, or the task is wider than the padded widths
        """
        if task.name in self:
            raise ValueError(f"There is a task {task.name!r} already: pass another name.")
        too_wide = [
            f"{getattr(task, field)} {what} where this model has room for {getattr(self, field)}"
            for field, what in (("observation_dim", "observation entries"), ("action_dim", "actions"))
            if getattr(task, field) > getattr(self, field)
        ]
        if too_wide:
            raise ValueError(
                f"Task {task.name!r} does not fit: it has {' and '.join(too_wide)}. Use a narrower environment, or a "
                "model trained with a TaskSet whose observation_dim and action_dim leave room."
            )
        return TaskSet([*self.tasks, task], self.observation_dim, self.action_dim)

    # --- spaces -------------------------------------------------------------------------------------------------

    @property
    def observation_space(self) -> spaces.Dict:
        """What environments of this set return: the padded vector and the index of the task."""
        vector = spaces.Box(-np.inf, np.inf, (self.observation_dim,), np.float32)
        return spaces.Dict({OBSERVATION_KEY: vector, TASK_KEY: spaces.Discrete(len(self))})

    @property
    def action_space(self) -> spaces.Box:
        """What they take: the widest task's actions, each in [-1, 1]."""
        return spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32)

    @property
    def action_masks(self) -> np.ndarray:
        """1 for the actions that a task has, 0 for the others [n_tasks, A], float32."""
        dims = np.array([task.action_dim for task in self.tasks])
        return (np.arange(self.action_dim) < dims[:, None]).astype(np.float32)

    @property
    def discounts(self) -> list[float]:
        """Discount factor of each task."""
        return [float(cast(float, task.discount)) for task in self.tasks]

    @property
    def normalizes(self) -> bool:
        """Whether the observations of any task are standardised."""
        return any(task.observation_mean is not None for task in self.tasks)

    @property
    def observation_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations [n_tasks, W] float32; 0 and 1 in padding and for tasks without statistics."""
        shape = len(self), self.observation_dim
        means, stds = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        for row, task in enumerate(self.tasks):
            if task.observation_mean is not None:
                means[row, : task.observation_dim] = task.observation_mean
                stds[row, : task.observation_dim] = task.observation_std
        return means, stds

    # --- plain data ---------------------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """
        :return: Dicts, lists, strings and numbers, ready for JSON or YAML
        """
        return {
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "tasks": [_task_to_plain(task) for task in self.tasks],
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> TaskSet:
        """
        :param data: What :meth:`to_plain` gave, or only its list of tasks
        :return: The set
        :raises ValueError: for anything else, naming what does not belong or is missing
        """
        content: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"tasks": data}
        unknown = sorted(content.keys() - {"observation_dim", "action_dim", "tasks"})
        if unknown or not isinstance(content.get("tasks"), (list, tuple)):
            raise ValueError(
                'A task set is a list of tasks, or a dict of "tasks", "observation_dim" and "action_dim"; '
                f"got {unknown or type(content.get('tasks')).__name__}."
            )
        tasks = [_task_from_plain(entry) for entry in content["tasks"]]
        return cls(tasks, content.get("observation_dim"), content.get("action_dim"))


def _task_to_plain(task: Task) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(task).items()}


def _task_from_plain(entry: Any) -> Task:
    known = {field.name for field in fields(Task)}
    if not isinstance(entry, Mapping) or entry.keys() - known:
        wrong = sorted(entry.keys() - known) if isinstance(entry, Mapping) else repr(entry)
        raise ValueError(f"A task is a dict of {sorted(known)}; got {wrong}.")
    missing = sorted({"name", "observation_dim", "action_dim"} - entry.keys())
    if missing:
        raise ValueError(f"A task needs {missing}, missing in {dict(entry)}.")
    return Task(**entry)


def plain_tasks(
    tasks: TaskSet | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any] | None:
    """
    :param tasks: A task set or its plain data
    :return: Plain data, complete and checked; None for None
    :raises ValueError: if it is no task set
    """
    if tasks is None:
        return None
    return (tasks if isinstance(tasks, TaskSet) else TaskSet.from_plain(tasks)).to_plain()


def pad_right(values: np.ndarray, width: int) -> np.ndarray:
    """
    Zeros after the last entries.

    >>> pad_right(np.ones((2, 1)), 3).tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]

    :param values: [..., n]
    :param width: At least n
    :return: [..., width], float32
    """
    padded = np.zeros((*values.shape[:-1], width), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded


def mean_and_std(observations: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Statistics of a task's observations, as :class:`Task` takes them.

    :param observations: [N, W]
    :return: mean and standard deviation of each entry; 1 where one does not vary but for rounding
    """
    values = observations.astype(np.float64)
    std = values.std(axis=0)
    return tuple(values.mean(axis=0).tolist()), tuple(np.where(std < CONSTANT_STD, 1.0, std).tolist())
