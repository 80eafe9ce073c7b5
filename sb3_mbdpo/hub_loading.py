"""Taking models from folders and the Hugging Face Hub, and what they bring to the environments they go on in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import gymnasium as gym
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_mbdpo.adapting import AdaptingAlgorithm
from sb3_mbdpo.checkpoint_config import read_config
from sb3_mbdpo.checkpoints import load_checkpoint
from sb3_mbdpo.env_facts import describe_env, episode_length_of
from sb3_mbdpo.multitask import UNKNOWN_EPISODE_LENGTH
from sb3_mbdpo.multitask_env import EnvSource, make_task_env
from sb3_mbdpo.normalization import Normalization

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

SelfLoadable = TypeVar("SelfLoadable", bound="LoadableAlgorithm")


class LoadableAlgorithm(AdaptingAlgorithm):
    """The part of MBDPO that goes on from shared models."""

    # The environment's id, where it alone makes it; asked for while there is one that answers
    _env_source: dict[str, Any] | None = None
    # What a loaded checkpoint says of its past, models that never were one have none; and what data it learned from
    _base_model: str | None = None
    _datasets: Sequence[str] = ()
    # Repository that the model came from, and the fingerprint that its weights had there
    _hub_source: tuple[str, str] | None = None
    # The same of a folder, and of a data set with its replay buffer
    _folder_source: tuple[str, str] | None = None
    _replay_source: tuple[str, str] | None = None
    # Loaded without an environment: the replay buffer has next to no room so far
    _acts_only: bool = False
    # ``learning_starts`` and tasks of a model whose first environment decides how long an episode is to wait for
    _awaits_episode: tuple[int, dict[str, Any] | None] | None = None

    def _setup_model(self) -> None:
        if self.env is not None:
            self.env = self._as_trained(self.env)
            self._vec_normalize_env = unwrap_vec_normalize(self.env)
        super()._setup_model()
        if self.env is not None:
            self._env_source = describe_env(self.env)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Replace the training environment; running plans are dropped.

        :param env: Environment with the same spaces, of the same tasks in a multi-task model. As long as nothing is
            in the replay buffer, any number of environments can be set. If the model has learned from what
            ``VecNormalize`` made of observations, it is wrapped in one with the model's statistics, unless it has one
        :param force_reset: Reset it before the next step
        :raises ValueError: if it does not fit
        """
        super().set_env(self._as_trained(self._wrap_env(env, self.verbose)), force_reset)
        self._env_source = describe_env(self.env)
        if self._acts_only and self.replay_buffer is not None and self.replay_buffer.size() == 0:
            self._empty_buffer(self.n_envs)
        self._acts_only = False
        # Unless something else has been decided since, by hand or by add_task
        if self._awaits_episode == (self.learning_starts, self._tasks):
            self.learning_starts = episode_length_of(cast(VecEnv, self.env)) or UNKNOWN_EPISODE_LENGTH
        self._awaits_episode = None

    def _as_trained(self, env: VecEnv) -> VecEnv:
        """With the model's VecNormalize statistics where an environment has none: nothing else can act on it."""
        statistics = Normalization.of(self._vec_normalize_env) or self._normalization
        if statistics is None or unwrap_vec_normalize(env) is not None:
            return env
        normalized = statistics.apply(env)
        warnings.warn(
            "This model has learned from what VecNormalize made of observations and rewards: the environment is "
            "wrapped in one with the model's statistics. For others pass it in a VecNormalize of your own.",
            stacklevel=3,
        )
        return normalized

    @classmethod
    def from_pretrained(
        cls: type[SelfLoadable],
        pretrained_model_name_or_path: str | Path,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: Mapping[str, Any] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> SelfLoadable:
        """
        Load a model from a folder or a repository of the Hub. No code in either is run, and nothing is unpickled.

        :param pretrained_model_name_or_path: Folder, or repository "user/name"
        :param env: Environment to act and learn in, with the model's spaces; if the model was trained with
            ``VecNormalize``, it is wrapped in one with the stored statistics
        :param device: Where the model goes
        :param custom_objects: Classes (policy, features extractor, ...) and action noise of one's own by name
        :param revision: Branch, tag or commit
        :param token: Token of the Hub, for private repositories
        :param cache_dir: Where downloads are kept
        :param local_files_only: Use what was downloaded before, without a network
        :param force_download: Download again
        :param kwargs: Constructor arguments in place of the stored ones; another ``preset`` replaces all that presets
            decide but the sizes
        :return: The model
        :raises ValueError: if it is no checkpoint, is damaged, or an argument does not go with it
        :raises OSError: without a network, or for a repository or revision that does not exist
        """
        name = pretrained_model_name_or_path
        folder, is_repo = Path(name).expanduser(), False
        if not folder.is_dir():
            from sb3_mbdpo import hub_transfer

            hub_transfer.refuse_missing_folder(name)
            is_repo = True
            folder = hub_transfer.download_checkpoint(
                str(name), revision, token, cache_dir, local_files_only, force_download
            )
        model = load_checkpoint(cast("type[MBDPO]", cls), folder, env, device, custom_objects, **kwargs)
        mark = read_config(folder).fingerprint
        model._hub_source = (str(name), mark) if is_repo else None
        model._folder_source = None if is_repo else (str(folder.resolve()), mark)
        return cast(SelfLoadable, model)

    @classmethod
    def from_hub(
        cls: type[SelfLoadable],
        repo_id: str | Path,
        env: EnvSource | VecEnv | None = None,
        task: str | None = None,
        like: str | None = None,
        **kwargs: Any,
    ) -> SelfLoadable:
        """
        Load a model to go on with: on the environment it was made for, on one of its tasks, or on a new one.

        ``MBDPO.from_hub(repo, env=env, task="walker-run").learn(40_000)`` fine-tunes on a task that the model knows,
        ``task="new-name", like="walker-walk"`` adds one, see :meth:`add_task`. The model acts by its own policy from
        the first step on; updates start after an episode, or after ``learning_starts`` steps where that is given. An
        environment may come later too, by ``set_env``.

        :param repo_id: Repository "user/name", or a folder
        :param env: Environment in its own units, its id, or a function that makes one; for a model of several tasks
            without ``task``: environments of its task set. None: the task's own, made by its id; without ``task``: none
        :param task: Name of a task of a multi-task model
        :param like: For a new task: known task whose embedding it starts from, or "nearest"
        :param kwargs: Arguments of :meth:`from_pretrained`
        :return: The model
        :raises ValueError: naming the tasks that there are, if there is no such one
        """
        if task is None and like is not None:
            raise ValueError("like=... is for a new task: pass its name as task=....")
        learning_starts = kwargs.get("learning_starts")
        if task is None:
            source: Any = env() if callable(env) and not isinstance(env, (gym.Env, VecEnv)) else env
            model = cls.from_pretrained(repo_id, source, **kwargs)
            if model._n_updates > 0 and model.env is not None:
                model._begin_finetuning(episode_length_of(model.env), learning_starts)
            elif model._n_updates > 0:
                model._acts_from_start = True
                if learning_starts is None:
                    model._awaits_episode = (model.learning_starts, model._tasks)
            return model
        model = cls.from_pretrained(repo_id, None, **kwargs)
        tasks = model.tasks
        if tasks is None:
            raise ValueError(f"This is a model of a single task: leave out task={task!r}, and pass env alone.")
        if isinstance(env, VecEnv):
            raise ValueError(
                "With task=... pass one environment in its own units, its id, or a function that makes it."
            )
        if task in tasks and like is not None:
            raise ValueError(f"{task!r} is one of the model's tasks: leave out like, or give a new task another name.")
        if task not in tasks:
            if like is None:
                raise ValueError(
                    f"There is no task {task!r}; the model knows {', '.join(tasks.names)}. Pass like=... (one of them, "
                    'or "nearest") to add it.'
                )
            if env is None:
                raise ValueError(f"{task!r} is a new task: pass its environment as env.")
            model.add_task(env, name=task, like=like, learning_starts=learning_starts)
            return model
        wrapped = make_task_env(tasks, task, env)
        model.set_env(DummyVecEnv([lambda: Monitor(wrapped)]))
        model._begin_finetuning(tasks[task].episode_length, learning_starts)
        return model

    def _begin_finetuning(self, episode_length: int | None, learning_starts: int | None) -> None:
        """Act by the policy from the first step on, and update after the steps that were asked for, or an episode."""
        self._acts_from_start = True
        length = episode_length or UNKNOWN_EPISODE_LENGTH
        self.learning_starts = length if learning_starts is None else learning_starts
