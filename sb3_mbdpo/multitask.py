"""The part of MBDPO that knows of several tasks: where they come from, what they need, scores of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer
from sb3_mbdpo.multitask_env import EnvSource, check_task_env, task_set_of
from sb3_mbdpo.resuming import ResumableAlgorithm
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer
from sb3_mbdpo.task_scores import TaskScores, evaluate_tasks
from sb3_mbdpo.tasks import TASK_KEY, TaskSet, plain_tasks
from sb3_mbdpo.updates import Learner

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
    _tasks: dict[str, Any] | None
    # Whether the policy acts before learning starts, not random draws
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
