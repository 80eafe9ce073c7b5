"""Learning from recorded data alone: the part of MBDPO that needs no environment."""

import numbers
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.distributed_learning import StepsBar, callbacks_of
from sb3_mbdpo.env_facts import make_again, spec_of
from sb3_mbdpo.metrics import RunningMeans
from sb3_mbdpo.minari_data import convert_tasks
from sb3_mbdpo.minari_sources import Dataset, check_same_spaces, common_spaces, minari_ids, open_tasks, task_data
from sb3_mbdpo.multitask import MultiTaskAlgorithm
from sb3_mbdpo.multitask_env import EnvSource
from sb3_mbdpo.normalization import Normalization, take_statistics
from sb3_mbdpo.offline_evaluation import OfflineEvaluation, TasksEvaluation, eval_envs
from sb3_mbdpo.offline_tasks import (
    TaskWindows,
    check_tasks,
    present,
    with_references,
    with_statistics,
)
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.replicas import check_no_drift, facts_of_data, join
from sb3_mbdpo.shard_format import TaskData
from sb3_mbdpo.shards import ShardedDataset

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

SelfOffline = TypeVar("SelfOffline", bound="OfflineAlgorithm")
# What can be learned from
OfflineData: TypeAlias = "Dataset | ShardedDataset"


class OfflineAlgorithm(MultiTaskAlgorithm):
    """The part of MBDPO that learns from data sets."""

    # Whether num_timesteps counts updates from data: a model that goes on from there has no need of random steps
    _counts_offline_steps: bool
    # Minari ids of what it has learned from, saved with the model
    _datasets: Sequence[str]
    _metrics: RunningMeans

    def _prepare_updates(self) -> None:
        """What comes before a series of updates."""
        raise NotImplementedError

    def _update(self, samples: SequenceSamples) -> None:
        """One update."""
        raise NotImplementedError

    def learn_offline(
        self: SelfOffline,
        dataset: OfflineData,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1000,
        eval_env: GymEnv | str | Mapping[str, EnvSource] | bool | None = None,
        eval_freq: int = 10_000,
        n_eval_episodes: int = 5,
        tb_log_name: str = "MBDPO_offline",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        shards_dir: str | Path | None = None,
        ranks: Ranks = ALONE,
    ) -> SelfOffline:
        """
        Learn from recorded data, without any environment.

        Here a timestep is a gradient step: ``num_timesteps``, the learning-rate schedule, the progress bar, the names
        of checkpoints and the logger's x-axis count them. Callbacks get ``on_training_start``, ``on_step`` after each
        gradient step (False stops) and ``on_training_end``; there are no rollouts, and their locals hold ``samples``
        instead of what an environment returned. ``learn()`` afterwards fine-tunes: it counts from zero and begins
        with ``learning_starts`` random steps, or goes on counting and acts for itself from the first step with
        ``reset_num_timesteps=False``, where updates begin as soon as more than ``learning_starts`` steps of both kinds
        are counted. ``warmup_updates`` are not done again.

        A model with a seed draws each batch by the seed and the number of updates so far: training that was
        interrupted, loaded and continued with ``reset_num_timesteps=False`` is the training that was not.

        Minari ids of the data are kept with the model, for ``save_pretrained``.

        A model of several tasks learns from data of all or some of them, which are found by their names; its
        ``task_sampling`` decides how tasks share a batch. With ``normalize_observations`` tasks that have no statistics
        of their observations yet get those of their data, and so does a ``VecNormalize`` that has seen nothing yet.

        With several processes (see :func:`~sb3_mbdpo.distributed.process_group`) all call this with the same arguments
        on models of the same arguments. They begin with the first one's weights, share each batch of ``batch_size``
        windows, and learn what one process would from the same batches. Callbacks, logs and evaluation are the first
        one's alone; a callback must not change the model.

        :param dataset: A Minari id, a ``MinariDataset``, a list of them (those that recorded the same environment are
            of one task, which is called as the environment), a dict of data sets by the names of tasks, or a
            ``ShardedDataset``, whose ``horizon``, ``device`` and ``task_sampling`` are set to the model's
        :param gradient_steps: Updates to do
        :param callback: Callback(s) called after every gradient step
        :param log_interval: Gradient steps between logs
        :param eval_env: Environment to evaluate in, as "eval/mean_reward" and, where there are reference scores,
            "eval/normalized_score"; of several tasks a dict {task: environment, id or function that makes it}, which
            adds "eval/mean_reward/<task>" and "eval/normalized_score/<task>"; True: the environments that the tasks
            name, of a single task one like the model's own; None: no evaluation
        :param eval_freq: Gradient steps between evaluations; there is one at the end in any case
        :param n_eval_episodes: Episodes of an evaluation, of each task
        :param tb_log_name: Name of the run in tensorboard
        :param reset_num_timesteps: Start counting from zero
        :param progress_bar: Show a progress bar
        :param shards_dir: Where converted data sets go; None puts them beside Minari's own
        :param ranks: The processes that share each batch
        :return: The model itself
        :raises ValueError: for data that cannot be read or that is not of this model's spaces or tasks, or with several
            processes for data, arguments or batches that do not fit together, before anything changes
        :raises LostProcessError: if another process has ended
        :raises OtherProcessError: if another process has failed
        """
        for name, value in {
            "gradient_steps": gradient_steps,
            "log_interval": log_interval,
            "eval_freq": eval_freq,
            "n_eval_episodes": n_eval_episodes,
        }.items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        callbacks = callbacks_of(callback) if ranks.is_main else []
        with ranks.together():
            # Before what may be a long conversion
            envs = self._eval_envs(eval_env) if ranks.is_main else None
            data = self._open_data(dataset, shards_dir)
        facts = {"gradient steps to do": str(gradient_steps), "log_interval": str(log_interval)}
        join(ranks, cast("MBDPO", self), facts_of_data(data) | facts)
        self._normalize_by(data)
        windows = data if self.tasks is None else TaskWindows(data, self.tasks)
        if self.seed is None and ranks.size > 1:
            windows.seed(ranks.shared_seed())
        if isinstance(envs, dict):
            tasks = with_references(self._require_tasks(), data.tasks)
            callbacks.append(TasksEvaluation(tasks, envs, eval_freq, n_eval_episodes))
        elif envs is not None:
            callbacks.append(OfflineEvaluation(envs, present(data.tasks)[0], eval_freq, n_eval_episodes))
        if progress_bar and ranks.is_main:
            callbacks.append(StepsBar())
        if self.episodic is None and data.has_terminations():
            self.policy.mark_episodic()
        self._counts_offline_steps = True
        self._remember_data(dataset)
        with self._any_env(), self._sharing(ranks), self._near_the_data():
            total_timesteps = self._setup_offline(gradient_steps, tb_log_name, reset_num_timesteps)
            callback = self._init_callback(callbacks)
            with ranks.together():
                callback.on_training_start(locals(), globals())
            unlogged = 0
            while self.num_timesteps < total_timesteps:
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self._prepare_updates()
                if self.tasks is not None:
                    data.task_sampling = self.task_sampling
                if self.seed is not None:
                    windows.seed((self.seed, self._n_updates))
                samples = windows.sample(self.batch_size, self._vec_normalize_env, ranks)
                self._update(samples)
                self.num_timesteps, unlogged = self.num_timesteps + 1, unlogged + 1
                if unlogged == log_interval:
                    self._log_offline()
                    unlogged = 0
                with ranks.together() as step:
                    callback.update_locals(locals())
                    step.stop = not callback.on_step()
                if step.stop:
                    break
            if unlogged > 0:
                self._log_offline()
            with ranks.together():
                callback.on_training_end()
        if envs is not None and envs is self.env:
            # It was played in: the next learn() resets it
            self._last_obs = None
        _close(envs, eval_env)
        return self

    def _normalize_by(self, data: ShardedDataset) -> None:
        """Give what normalises and has no statistics yet those of the data."""
        if self._vec_normalize_env is not None:
            take_statistics(self._vec_normalize_env, data)
        if not self.normalize_observations:
            return
        self._set_tasks(with_statistics(self._require_tasks(), data))

    @contextmanager
    def _sharing(self, ranks: Ranks) -> Iterator[None]:
        """Updates on own rows of batches that all processes share."""
        self.learner.ranks = ranks
        try:
            yield
        finally:
            self.learner.ranks = ALONE

    @contextmanager
    def _near_the_data(self) -> Iterator[None]:
        """Keep the prior where there is data, as long as it cannot try what it would rather do."""
        learner = self.learner
        learner.near_data = True
        learner.coefficients = replace(learner.coefficients, behaviour=cast("MBDPO", self).behaviour_coef)
        try:
            yield
        finally:
            learner.near_data = False
            learner.coefficients = replace(learner.coefficients, behaviour=0.0)

    def _log_offline(self) -> None:
        check_no_drift(self.learner.ranks, self.policy)
        self._metrics.average(self.learner.ranks)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.dump_logs()

    def _eval_envs(
        self, given: GymEnv | str | Mapping[str, EnvSource] | bool | None
    ) -> VecEnv | dict[str, gym.Env] | None:
        """Environments to evaluate in: one of a single-task model, otherwise those of its tasks."""
        if given is None or given is False:
            return None
        if self.tasks is not None:
            if given is not True and not isinstance(given, Mapping):
                raise ValueError(
                    "A model of several tasks is evaluated task by task: pass eval_env=True for the environments that "
                    "its tasks name, or a dict {task: environment, id or function that makes it}."
                )
            return eval_envs(self.tasks, None if given is True else given)
        if isinstance(given, Mapping):
            raise ValueError("eval_env by task goes with models of several tasks: pass this one's environment alone.")
        made = self._like_own_env() if isinstance(given, bool) else maybe_make_env(given, self.verbose)
        return self._as_seen(self._wrap_env(made, self.verbose))

    def _as_seen(self, env: VecEnv) -> VecEnv:
        """An environment to act in, with the model's statistics where it has no VecNormalize of its own."""
        statistics = Normalization.of(self._vec_normalize_env) or cast("MBDPO", self)._normalization
        if statistics is not None and unwrap_vec_normalize(env) is None:
            env = statistics.acting(env)
        utils.check_for_correct_spaces(env, self.observation_space, self.action_space)
        return env

    def _like_own_env(self) -> gym.Env:
        spec = None if self.env is None else spec_of(self.env)
        if spec is None:
            raise ValueError("eval_env=True needs a model whose environment has an id: pass the one to evaluate in.")
        try:
            return make_again(spec)
        except ValueError as error:
            raise ValueError(f"{error}: pass the environment to evaluate in as eval_env.") from error

    def _open_data(self, dataset: OfflineData, shards_dir: str | Path | None) -> ShardedDataset:
        """The data as shards of this model's horizon and device; what can be is checked before a long conversion."""
        tasks = self.tasks
        if self._vec_normalize_env is None and cast("MBDPO", self)._normalization is not None:
            raise ValueError(
                "This model has learned from what VecNormalize made of observations and rewards: give it an "
                "environment first, from_pretrained(..., env=env), whose statistics the data is normalised by."
            )
        if self.normalize_observations and self._n_updates > 0 and not self._require_tasks().normalizes:
            raise ValueError(
                "This model has learned from observations as they are, it cannot have them normalised now: load it "
                "with normalize_observations=False, or begin a new one."
            )
        if not isinstance(dataset, ShardedDataset):
            opened = open_tasks(dataset, named=tasks is not None)
            self._check_data(common_spaces(opened), [task_data(task) for task in opened])
            dataset = ShardedDataset(convert_tasks(opened, shards_dir))
        self._check_data((dataset.observation_space, dataset.action_space), dataset.tasks)
        dataset.horizon, dataset.device = self.policy.search_config.horizon, self.device
        if tasks is not None:
            dataset.task_sampling = self.task_sampling
        return dataset

    def _remember_data(self, dataset: OfflineData) -> None:
        """Note what the model learns from; shards do not say what they were made of."""
        if not isinstance(dataset, ShardedDataset):
            self._datasets = list(dict.fromkeys([*self._datasets, *minari_ids(dataset)]))

    def _check_data(self, pair: tuple[spaces.Space, spaces.Box], entries: Sequence[TaskData]) -> None:
        """Refuse data of other tasks or spaces than the model's."""
        check_tasks(self.tasks, entries, pair)
        if self.tasks is None:
            check_same_spaces(pair, self.observation_space, cast(spaces.Box, self.action_space))

    def _setup_offline(self, gradient_steps: int, tb_log_name: str, reset_num_timesteps: bool) -> int:
        """As Stable-Baselines3 sets up ``learn``, without touching an environment; returns where to stop counting."""
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps = self._episode_num = 0
        self._total_timesteps = self.num_timesteps + gradient_steps
        self._num_timesteps_at_start = self.num_timesteps
        if not self.learner.ranks.is_main:
            self._logger = Logger(folder=None, output_formats=[])
        elif not self._custom_logger:
            self._logger = utils.configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        return self._total_timesteps

    @contextmanager
    def _any_env(self) -> Iterator[None]:
        """Callbacks ask for a training environment: lend a model that has none one that only knows its spaces."""
        if self.env is not None:
            yield
            return
        self.env = DummyVecEnv([lambda: SpacesOnly(self.observation_space, self.action_space)])
        try:
            yield
        finally:
            self.env = None


class SpacesOnly(gym.Env):
    """
    Has spaces and nothing else: stands where an environment is asked for but never used.

    :param observation_space: Observation space
    :param action_space: Action space
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, **kwargs: Any) -> Any:
        """:raises RuntimeError: always"""
        raise RuntimeError("This model has no environment: give it one with set_env().")

    def step(self, action: Any) -> Any:
        """:raises RuntimeError: always"""
        raise RuntimeError("This model has no environment: give it one with set_env().")


def _close(envs: VecEnv | dict[str, gym.Env] | None, given: Any) -> None:
    """Close what was made to evaluate in; what was given stays open."""
    if isinstance(envs, dict):
        for name, env in envs.items():
            if not (isinstance(given, Mapping) and isinstance(given[name], gym.Env)):
                env.close()
    elif envs is not None and isinstance(given, (str, bool)):
        envs.close()
