"""Scores of a multi-task model, task by task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from sb3_mbdpo.multitask_env import EnvSource, MultiTaskEnv, make_task_env
from sb3_mbdpo.tasks import OBSERVATION_KEY, TASK_KEY, TaskSet

# Where the task suites say whether a task was solved
SUCCESS_KEYS = ("success", "solved")


class Predictor(Protocol):
    """What acts: a model or its policy."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Actions and recurrent state, as in Stable-Baselines3."""


class TaskScore(NamedTuple):
    """
    Outcome of one task: ``mean`` and ``std`` of the episodes' ``returns``; ``normalized`` and ``normalized_std`` the
    same with 0 and 1 at the task's reference scores, None without them; ``success`` share of episodes that ended
    solved, None where the environment does not say; ``lengths`` of the episodes in decisions.
    """

    name: str
    mean: float
    std: float
    normalized: float | None
    normalized_std: float | None
    success: float | None
    returns: tuple[float, ...]
    lengths: tuple[int, ...]


class TaskScores(tuple[TaskScore, ...]):
    """
    Scores of all evaluated tasks, in the order of the task set. Printed, a table.

    >>> scores = TaskScores([TaskScore("run", 250.0, 10.0, 0.25, 0.01, None, (240.0, 260.0), (500, 500))])
    >>> print(scores)
    task     mean    std  normalized  success  episodes
    run     250.0   10.0       0.250        -         2
    """

    def by_name(self) -> dict[str, TaskScore]:
        """
        :return: Each score by the name of its task
        """
        return {score.name: score for score in self}

    @property
    def mean_normalized(self) -> float | None:
        """Mean of the normalised scores; None unless every task has one."""
        values = [score.normalized for score in self if score.normalized is not None]
        return float(np.mean(values)) if values and len(values) == len(self) else None

    def __str__(self) -> str:
        labels = ["task", *(score.name for score in self), *(["mean of all"] if len(self) > 1 else [])]
        width = max(len(label) for label in labels)
        lines = [f"{'task':<{width}} {'mean':>8} {'std':>6} {'normalized':>11} {'success':>8} {'episodes':>9}"]
        for score in self:
            lines.append(
                f"{score.name:<{width}} {score.mean:>8.1f} {score.std:>6.1f} {_number(score.normalized):>11} "
                f"{_number(score.success):>8} {len(score.returns):>9}"
            )
        if len(self) > 1 and self.mean_normalized is not None:
            lines.append(f"{'mean of all':<{width}} {'':>8} {'':>6} {_number(self.mean_normalized):>11}")
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class _Run:
    """The episodes of one task, one after another."""

    def __init__(self, env: MultiTaskEnv, n_episodes: int, seed: int | None):
        self.env, self.n_episodes, self.seed = env, n_episodes, seed
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.successes: list[bool] = []
        self._reset()

    def _reset(self) -> None:
        seed = None if self.seed is None else self.seed + len(self.returns)
        self.observation, _ = self.env.reset(seed=seed)
        self.total, self.steps = 0.0, 0

    @property
    def done(self) -> bool:
        return len(self.returns) >= self.n_episodes

    def step(self, action: np.ndarray) -> bool:
        """Returns whether the episode ended; the next one, if there is one, has then begun."""
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.total, self.steps = self.total + float(reward), self.steps + 1
        if not (terminated or truncated):
            return False
        self.returns.append(self.total)
        self.lengths.append(self.steps)
        self.successes += [bool(info[key]) for key in SUCCESS_KEYS if key in info][:1]
        if not self.done:
            self._reset()
        return True

    def score(self) -> TaskScore:
        task = self.env.task_set[self.env.task_name]
        mean, std = float(np.mean(self.returns)), float(np.std(self.returns))
        normalized = [value for value in map(task.normalized, self.returns) if value is not None]
        known = bool(normalized)
        references = (float(np.mean(normalized)) if known else None, float(np.std(normalized)) if known else None)
        success = float(np.mean(self.successes)) if self.successes else None
        return TaskScore(task.name, mean, std, *references, success, tuple(self.returns), tuple(self.lengths))


def evaluate_tasks(
    model: Predictor,
    task_set: TaskSet,
    envs: Mapping[str, EnvSource] | None = None,
    names: Sequence[str] | None = None,
    n_eval_episodes: int = 5,
    deterministic: bool = True,
    seed: int | None = None,
    on_episode: Callable[[str, float], None] | None = None,
) -> TaskScores:
    """
    Returns of a model on each of its tasks. All tasks run side by side, so that one search serves all.

    :param model: Model or policy of the task set
    :param task_set: Its tasks
    :param envs: Environments, ids or functions that make one, by task; the others are made by their ``env_id``
    :param names: Tasks to evaluate; None: those in ``envs`` if given, otherwise all
    :param n_eval_episodes: Episodes of each task
    :param deterministic: Act without exploration noise
    :param seed: Seed of each task's first episode, the following count on; None: as the environments come
    :param on_episode: Told the task and the return of each episode that has ended
    :return: A score for each task, in the order of the set
    :raises ValueError: for an unknown task, or one without an environment
    """
    if n_eval_episodes < 1:
        raise ValueError(f"n_eval_episodes must be at least 1, got {n_eval_episodes}.")
    sources: dict[str, EnvSource] = dict(envs or {})
    chosen = names if names is not None else (list(sources) or task_set.names)
    for name in (*chosen, *sources):
        task_set.index(name)
    missing = [name for name in chosen if name not in sources and task_set[name].env_id is None]
    if missing:
        raise ValueError(
            f"There is no environment for {missing}: pass envs=dict(name=environment, id or function that makes it), "
            "or choose other tasks with names=[...]."
        )
    runs: list[_Run] = []
    try:
        for name in sorted(set(chosen), key=task_set.index):
            runs.append(_Run(make_task_env(task_set, name, sources.get(name)), n_eval_episodes, seed))
        _run_all(model, runs, deterministic, on_episode)
        return TaskScores(run.score() for run in runs)
    finally:
        for run in runs:
            if not isinstance(sources.get(run.env.task_name), gym.Env):
                run.env.close()


def _run_all(
    model: Predictor, runs: list[_Run], deterministic: bool, on_episode: Callable[[str, float], None] | None = None
) -> None:
    """Step all tasks together, those that have finished left out."""
    active, state = list(runs), None
    starts = np.ones(len(active), dtype=bool)
    while active:
        observation = {key: np.stack([run.observation[key] for run in active]) for key in (OBSERVATION_KEY, TASK_KEY)}
        actions, state = model.predict(observation, state, starts, deterministic)
        starts = np.array([run.step(action) for run, action in zip(active, actions, strict=True)])
        for run, ended in zip(active, starts, strict=True):
            if ended and on_episode is not None:
                on_episode(run.env.task_name, run.returns[-1])
        going = np.array([not run.done for run in active])
        active = [run for run in active if not run.done]
        state, starts = state[going], starts[going]
