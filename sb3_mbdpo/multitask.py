"""The part of MBDPO that knows of several tasks: where they come from, scores per task, and adding one more."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces
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
from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer
from sb3_mbdpo.building import make_learner
from sb3_mbdpo.env_facts import make_again
from sb3_mbdpo.multitask_env import EnvSource, MultiTaskEnv, check_task_env, describe_task, make_env, task_set_of
from sb3_mbdpo.resuming import ResumableAlgorithm
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer
from sb3_mbdpo.task_scores import TaskScores, evaluate_tasks
from sb3_mbdpo.tasks import NEAREST, TASK_KEY, TaskSet, mean_and_std, plain_tasks
from sb3_mbdpo.updates import Learner

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

UNKNOWN_EPISODE_LENGTH = 500
LONGEST_NAME_IN_TABLES = 18


class MultiTaskAlgorithm(ResumableAlgorithm):
    """
    The part of MBDPO that handles several tasks. Arguments are those of the algorithm.

    The task set is kept as plain data, so that a saved model describes its tasks without running any code.
    """

    learner: Learner
    task_sampling: str
    normalize_observations: bool
    horizon: int | None
    consistency_coef: float
    reward_coef: float
    _tasks: dict[str, Any] | None
    # Parts that go on learning, None for all; and whether the policy acts before learning starts, not random draws
    _trainable: list[str] | None
    _acts_from_start: bool
    # What makes the environments of added tasks that no id makes; and returns of each task's latest episodes, as plain
    # data too
    _task_sources: dict[str, Callable[[], gym.Env]]
    _task_returns: dict[str, list[float]]

    @property
    def tasks(self) -> TaskSet | None:
        """The tasks of a multi-task model, None in single-task models."""
        return None if self._tasks is None else TaskSet.from_plain(self._tasks)

    def _require_tasks(self) -> TaskSet:
        if self.tasks is None:
            raise ValueError(
                "This is a single-task model: build one of several tasks with "
                'MBDPO("MultiInputPolicy", make_multitask_env(tasks)).'
            )
        return self.tasks

    def _set_tasks(self, tasks: TaskSet) -> None:
        self._tasks = tasks.to_plain()
        self.policy.register_tasks(tasks)

    # --- construction -------------------------------------------------------------------------------------------

    def _resolve_tasks(self) -> None:
        """Take the tasks from the environments where they were not given, and refuse what does not go with tasks."""
        # load() writes its arguments into the model, where those of a property have no effect
        given = self.__dict__.pop("tasks", None)
        if given is not None and plain_tasks(given) != self._tasks:
            raise ValueError(
                "tasks is what the weights were made for and cannot be changed by load: leave it out, or teach the "
                "loaded model one more task with add_task."
            )
        found = task_set_of(self.env)
        if self._tasks is None and found is not None:
            self._tasks = found.to_plain()
        tasks = self.tasks
        if tasks is not None and self.env is not None:
            check_task_env(tasks, self.env)
        elif tasks is not None and not hasattr(self, "action_space"):
            # No environment: the tasks know the spaces
            self.observation_space, self.action_space = tasks.observation_space, tasks.action_space
            self.n_envs = 1

    def _default_buffer_class(self) -> type[SequenceReplayBuffer]:
        if self._tasks is not None:
            return MultiTaskReplayBuffer
        return DictSequenceReplayBuffer if isinstance(self.observation_space, spaces.Dict) else SequenceReplayBuffer

    def _buffer_arguments(self) -> dict[str, Any]:
        """The algorithm's own arguments that the replay buffer takes."""
        assert self.replay_buffer_class is not None
        multi = issubclass(self.replay_buffer_class, MultiTaskReplayBuffer)
        return {"horizon": self.horizon} | ({"task_sampling": self.task_sampling} if multi else {})

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Replace the training environment; running plans are dropped.

        :param env: Environment with the same spaces, of the same tasks in a multi-task model. As long as nothing is
            in the replay buffer, any number of environments can be set
        :param force_reset: Reset it before the next step
        :raises ValueError: if it does not fit
        """
        vector = self._wrap_env(env, self.verbose)
        if self._tasks is not None:
            check_task_env(TaskSet.from_plain(self._tasks), vector)
        if vector.num_envs != self.n_envs and self.replay_buffer is not None and self.replay_buffer.size() == 0:
            # What does not fit is refused before anything changes
            check_for_correct_spaces(vector, self.observation_space, self.action_space)
            self._empty_buffer(vector.num_envs)
        super().set_env(vector, force_reset)
        self._plans = self._restarts = None

    def _empty_buffer(self, n_envs: int) -> None:
        """Begin a replay buffer for the present spaces; its random generator goes on."""
        self._begin_buffer(self._new_buffer(n_envs, self.observation_space))

    def _begin_buffer(self, buffer: SequenceReplayBuffer) -> None:
        if self.replay_buffer is not None:
            buffer.rng = self.replay_buffer.rng
        self.replay_buffer, self.n_envs = buffer, buffer.n_envs
        self._fit_action_noise()

    def _fit_action_noise(self) -> None:
        """Action noise of another number of environments is single again: ``learn`` makes one for each of them."""
        if isinstance(self.action_noise, VectorizedActionNoise) and self.action_noise.n_envs != self.n_envs:
            self.action_noise = self.action_noise.base_noise

    def _new_buffer(self, n_envs: int, observation_space: spaces.Space) -> SequenceReplayBuffer:
        assert self.replay_buffer_class is not None
        buffer: ReplayBuffer = self.replay_buffer_class(
            self.buffer_size,
            observation_space,
            self.action_space,
            device=self.device,
            n_envs=n_envs,
            **{**self.replay_buffer_kwargs, **self._buffer_arguments()},
        )
        assert isinstance(buffer, SequenceReplayBuffer)
        return buffer

    def _mask_actions(self, scaled: np.ndarray) -> np.ndarray:
        """Zero for the actions that a task does not have [n_envs, A]; as they are in single-task models."""
        tasks = self.policy.task_set
        if tasks is None:
            return scaled
        assert isinstance(self._last_obs, dict)
        return scaled * tasks.action_masks[np.asarray(self._last_obs[TASK_KEY]).reshape(-1)]

    # --- logs ---------------------------------------------------------------------------------------------------

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.normalize_observations and not self._require_tasks().normalizes:
            raise ValueError(
                "normalize_observations takes its statistics from data, and this model has none yet: call "
                "learn_offline first, or give tasks an observation_mean and observation_std."
            )
        assert self.replay_buffer is not None
        self.replay_buffer.check_room()
        if reset_num_timesteps:
            self._task_returns = {}
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        """Besides what Stable-Baselines3 keeps of episodes that ended, their returns by task."""
        super()._update_info_buffer(infos, dones)
        tasks = self.policy.task_set
        if tasks is None:
            return
        # The last observation is still the one before this step: of the task whose episode may have ended
        assert isinstance(self._last_obs, dict)
        for index, info in zip(self._last_obs[TASK_KEY].reshape(-1), infos, strict=True):
            if "episode" in info:
                self._add_task_return(tasks.names[index], float(info["episode"]["r"]))

    def _add_task_return(self, task: str, episode_return: float) -> None:
        returns = self._task_returns.setdefault(task, [])
        returns.append(episode_return)
        del returns[: -self._stats_window_size]

    def dump_logs(self) -> None:
        """Write log data, mean returns of each task included."""
        for name, returns in self._task_returns.items():
            # Tables on the screen shorten long keys, and refuse those that have become alike
            apart = ("stdout", "log") if len(name) > LONGEST_NAME_IN_TABLES else None
            self.logger.record(f"rollout/ep_rew_mean/{name}", float(np.mean(returns)), exclude=apart)
        super().dump_logs()

    # --- scores -------------------------------------------------------------------------------------------------

    def evaluate_tasks(
        self,
        n_eval_episodes: int = 5,
        envs: Mapping[str, EnvSource] | None = None,
        names: Sequence[str] | None = None,
        deterministic: bool = True,
        seed: int | None = None,
    ) -> TaskScores:
        """
        Returns on each task: see :func:`~sb3_mbdpo.task_scores.evaluate_tasks`. Print the result for a table,
        :func:`~sb3_mbdpo.plots.plot_task_scores` draws it. A task that :meth:`add_task` was given the environment of is
        played in another like it, until the model is saved and loaded.

        :param n_eval_episodes: Episodes of each task
        :param envs: Environments, ids or functions that make one, by task; the others are made by their ``env_id``
        :param names: Tasks to evaluate; None: those in ``envs`` if given, otherwise all
        :param deterministic: Act without exploration noise
        :param seed: Seed of each task's first episode
        :return: A score for each task
        :raises ValueError: for a single-task model, an unknown task, or one without an environment
        """
        tasks = self._require_tasks()
        if names is None:
            names = list(envs or tasks.names)
        sources = {**self._task_sources, **(envs or {})}
        return evaluate_tasks(self, tasks, sources, names, n_eval_episodes, deterministic, seed)

    # --- one task more ------------------------------------------------------------------------------------------

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
