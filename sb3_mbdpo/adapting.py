"""The part of MBDPO that takes in one more task."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbdpo.adaptation import (
    AddedTask,
    Episode,
    TaskError,
    check_parts,
    episode_windows,
    extend_embedding,
    random_episodes,
    set_trainable,
    task_errors,
)
from sb3_mbdpo.building import make_learner
from sb3_mbdpo.env_facts import make_again
from sb3_mbdpo.multitask import UNKNOWN_EPISODE_LENGTH, MultiTaskAlgorithm
from sb3_mbdpo.multitask_env import EnvSource, MultiTaskEnv, describe_task, make_env
from sb3_mbdpo.tasks import NEAREST, TaskSet, mean_and_std

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO


class AdaptingAlgorithm(MultiTaskAlgorithm):
    """The part of MBDPO that takes in one more task. Arguments are those of the algorithm."""

    consistency_coef: float
    reward_coef: float
    # Parts that go on learning, None for all
    _trainable: list[str] | None

    def add_task(
        self,
        env: EnvSource,
        name: str | None = None,
        like: str | None = NEAREST,
        episodes: Sequence[Episode] | None = None,
        n_episodes: int = 3,
        trainable: Sequence[str] | None = None,
        learning_starts: int | None = None,
        n_envs: int = 1,
        **task_fields: Any,
    ) -> AddedTask:
        """
        Teach the model's sizes one more task, and make its environment the training environment.

        ``model.add_task(env, like="walker-walk")`` and then ``model.learn(40_000)`` fine-tunes. The model acts by its
        own policy from the first step on, and updates start after ``learning_starts`` steps. Optimizers start anew:
        moments of the old tasks' losses would go on moving the old tasks' embeddings. So does the replay buffer, which
        then holds the new task alone. In a model that normalises observations the new task is normalised like the one
        that it starts from, or by its own episodes where that one has another number of observations.

        :param env: An environment with flat Box observations, its id, or a function that makes one
        :param name: Name of the task; None: the environment's id
        :param like: Task whose embedding the new one starts from; "nearest": the one whose dynamics and rewards the
            model predicts best on ``episodes``; None: a fresh one
        :param episodes: Episodes of the new task to compare by, in its own units; None: ``n_episodes`` random ones
        :param n_episodes: Random episodes
        :param trainable: What goes on learning, see :meth:`set_trainable`
        :param learning_starts: Steps before the first update; None: one episode
        :param n_envs: Copies of the environment; more than one need an id or a function
        :param task_fields: Further fields of :class:`~sb3_mbdpo.tasks.Task`: ``episode_length``, ``discount``, ...
        :return: The task, its index, and which task it was taken from
        :raises ValueError: if the environment's sizes do not fit, naming them, or an argument cannot work; the model is
            then as it was
        """
        tasks = self._require_tasks()
        if n_envs < 1 or (n_envs > 1 and isinstance(env, gym.Env)):
            raise ValueError(f"n_envs={n_envs} copies need the environment's id or a function that makes it.")
        if n_episodes < 1:
            raise ValueError(f"n_episodes must be at least 1, got {n_episodes}.")
        if learning_starts is not None and not (isinstance(learning_starts, numbers.Integral) and learning_starts >= 0):
            raise ValueError(f"learning_starts must be a whole number of at least 0, got {learning_starts!r}.")
        if like is not None and like != NEAREST:
            tasks.index(like)
        check_parts(trainable)
        repeat = int(task_fields.get("action_repeat", 1))
        inner = make_env(env, repeat)
        env_id = env if isinstance(env, str) else None
        name = name or env_id or (inner.spec.id if inner.spec is not None else type(inner.unwrapped).__name__)
        extended = tasks.with_task(describe_task(inner, name, **({"env_id": env_id} | task_fields)))
        wrapped = MultiTaskEnv(inner, extended, name)
        copies = [wrapped] + [MultiTaskEnv(make_env(env, repeat), extended, name) for _ in range(n_envs - 1)]
        source, errors = like, None
        if like == NEAREST:
            if episodes is None:
                episodes = random_episodes(inner, n_episodes, np.random.default_rng(self.seed))
            source, errors = self._nearest(tasks, wrapped, episodes)
        extended = self._with_new_statistics(extended, name, source, inner, episodes, n_episodes)
        buffer = self._new_buffer(n_envs, extended.observation_space)
        buffer.check_room()
        again = maker_of(env)
        # Nothing has changed so far, and nothing can fail from here on
        index = None if source is None else tasks.index(source)
        extend_embedding(self.policy.world_model, extended[name].action_dim, index, self.policy.generator)
        self._set_tasks(extended)
        self.set_trainable(trainable)
        self.policy.rebuild_optimizers(self.lr_schedule)
        self.learner = make_learner(cast("MBDPO", self))
        self.observation_space = extended.observation_space
        self._acts_from_start = True
        length = extended[name].episode_length or UNKNOWN_EPISODE_LENGTH
        self.learning_starts = length if learning_starts is None else learning_starts
        vector = DummyVecEnv([lambda copy=copy: Monitor(copy) for copy in copies])  # type: ignore[misc]
        self._begin_buffer(buffer)
        self.set_env(vector)
        if self.seed is not None:
            vector.seed(self.seed)
        if again is not None:
            self._task_sources[name] = again
        return AddedTask(extended[name], len(tasks), source, errors)

    def set_trainable(self, parts: Sequence[str] | None) -> None:
        """
        Choose what further updates change. It is saved with the model.

        :param parts: Some of "embedding", "encoder", "dynamics", "heads" (reward, termination, critics, energy) and
            "policies" (prior, score network); None: everything
        :raises ValueError: for an unknown part
        """
        set_trainable(self.policy.world_model, parts)
        self.policy.graphs.clear()
        self._trainable = None if parts is None else list(parts)

    def _with_new_statistics(
        self,
        tasks: TaskSet,
        name: str,
        source: str | None,
        env: gym.Env,
        episodes: Sequence[Episode] | None,
        n_episodes: int,
    ) -> TaskSet:
        """
        Statistics for the last task of a set, where the others have some: those of the task that it starts from, whose
        entries mean the same if there are as many, otherwise those of its own episodes.
        """
        task = tasks[name]
        if not tasks.normalizes or task.observation_mean is not None:
            return tasks
        like = None if source is None else tasks[source]
        if like is not None and like.observation_dim == task.observation_dim:
            mean, std = like.observation_mean, like.observation_std
        else:
            episodes = episodes or random_episodes(env, n_episodes, np.random.default_rng(self.seed))
            mean, std = mean_and_std(np.concatenate([episode.observations for episode in episodes]))
        added = replace(task, observation_mean=mean, observation_std=std)
        return TaskSet([*list(tasks)[:-1], added], tasks.observation_dim, tasks.action_dim)

    def _nearest(
        self, tasks: TaskSet, env: MultiTaskEnv, episodes: Sequence[Episode]
    ) -> tuple[str, dict[str, TaskError]]:
        """Name of the known task that the new one is most like, and the errors by which it was found."""
        windows = episode_windows(episodes, env, self.policy.search_config.horizon, self.device)
        found = task_errors(self.policy, windows, len(tasks), self.consistency_coef, self.reward_coef)
        errors = dict(zip(tasks.names, found, strict=True))
        return min(errors, key=lambda task: errors[task].total), errors


def maker_of(env: EnvSource) -> Callable[[], gym.Env] | None:
    """
    :param env: An environment, its id, or a function that makes one
    :return: A function that makes one like it; None for an id, which needs none, and where nothing makes another
    """
    if callable(env):
        return env
    if isinstance(env, str) or env.spec is None:
        return None
    try:
        make_again(env.spec).close()
    except ValueError:
        return None
    return partial(make_again, env.spec)
