"""Sharing models: folders and repositories of the Hugging Face Hub, with huggingface_hub's own argument names."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import gymnasium as gym
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_mbdpo.checkpoint_config import CARD, CURVE, VIDEO, read_config
from sb3_mbdpo.checkpoint_weights import fingerprint, in_memory
from sb3_mbdpo.checkpoints import load_checkpoint, write_checkpoint
from sb3_mbdpo.env_facts import describe_env, episode_length_of
from sb3_mbdpo.hub_evaluation import EVALUATION_SEED, evaluate_model, evaluation_sources, record_video
from sb3_mbdpo.multitask import UNKNOWN_EPISODE_LENGTH, MultiTaskAlgorithm
from sb3_mbdpo.multitask_env import EnvSource, make_task_env
from sb3_mbdpo.normalization import Normalization

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

SelfHub = TypeVar("SelfHub", bound="HubAlgorithm")


class HubAlgorithm(MultiTaskAlgorithm):
    """The part of MBDPO that shares models."""

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

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        include_optimizer: bool = False,
        n_eval_episodes: int = 0,
        eval_envs: Mapping[str, EnvSource] | EnvSource | None = None,
        eval_seed: int = EVALUATION_SEED,
        results: Mapping[str, Any] | None = None,
        video: bool = False,
        command: str | None = None,
        datasets: Sequence[str] | None = None,
        replay_dataset: str | None = None,
        learning_curve: str | Path | None = None,
        license: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        progress_bar: bool = True,
        **push_kwargs: Any,
    ) -> Path:
        """
        Write the model to a folder: ``config.json``, ``model.safetensors``, ``training.yml``, a card, and what was
        asked for. The folder is what :meth:`push_to_hub` uploads and :meth:`from_pretrained` reads.

        A previous checkpoint in the folder is replaced when the new one is complete. A card that was edited by hand
        (its last line removed) stays. Where a model has not changed since it was loaded, ``replay_dataset`` is what it
        was, and if from a folder, ``command`` and ``license`` too.

        :param save_directory: Folder, made if needed
        :param include_optimizer: Also write optimizers and random generators, three times the size, so that training
            goes on as after ``save`` and ``load``
        :param n_eval_episodes: Deterministic episodes of each task to play for ``results.json`` and the card; 0: none
        :param eval_envs: Environments for them by task, or one of a single-task model; None: made by their ids, or as
            the model's own was made
        :param eval_seed: Seed of each task's first episode
        :param results: Results from before, what ``results.json`` held, instead of new episodes
        :param video: Write ``replay.mp4`` of one episode, if something here can draw it
        :param command: The exact command of training, for ``training.yml`` and the card
        :param datasets: Data sets that it learned from, for ``training.yml`` and the card; None: the Minari ids of what
            ``learn_offline`` and ``rehearse`` were given
        :param replay_dataset: Minari id of a data set with its replay buffer (see ``to_minari``)
        :param learning_curve: Picture for the card, a png
        :param license: License of the weights, for the card
        :param repo_id: Repository that the card's snippet names; None: the folder
        :param push_to_hub: Upload to ``repo_id`` as well
        :param progress_bar: Show progress of the evaluation
        :param push_kwargs: Arguments of :meth:`push_to_hub`
        :return: The folder
        :raises ValueError: for what a checkpoint cannot hold, if there is nothing to evaluate in, for an environment
            with other spaces than the model's, or for one where there are several tasks; nothing is written
        :raises TypeError: for an argument that there is not
        :raises OSError: if it cannot be written; a previous checkpoint stays as it was
        """
        # The Hub's client is imported where it is used: it takes a while, and reads its settings at that moment
        from sb3_mbdpo import hub_transfer, model_card

        model, folder = cast("MBDPO", self), Path(save_directory)
        known = inspect.signature(hub_transfer.upload_checkpoint).parameters.keys() - {"folder", "repo_id", "keep_card"}
        if unknown := sorted(push_kwargs.keys() - known):
            raise TypeError(f"save_pretrained has no argument {', '.join(unknown)}.")
        if push_kwargs and not push_to_hub:
            raise TypeError(f"{', '.join(sorted(push_kwargs))} of save_pretrained goes with push_to_hub=True.")
        if push_to_hub and repo_id is None:
            raise ValueError("push_to_hub=True needs repo_id, the repository to push to.")
        if push_to_hub:
            hub_transfer.require_token(push_kwargs.get("token"))
        # Refuses what is none, asked for episodes or not
        evaluation_sources(model, eval_envs)
        curve = None if learning_curve is None else Path(learning_curve).read_bytes()
        if n_eval_episodes > 0:
            results = evaluate_model(model, n_eval_episodes, eval_envs, eval_seed, progress_bar)
        others: dict[str, bytes] = {} if curve is None else {CURVE: curve}
        notes: list[str] = []
        if video:
            clip, missing = _video(model, eval_envs, eval_seed)
            if clip is None:
                print(f"The checkpoint is written without a video ({missing}).")
                notes.append(f"Not checked: how it looks ({missing}).")
            else:
                others[VIDEO] = clip
        stated = model_card.stated_in(self._unchanged_folder())
        command, license = command or stated.command, license or stated.license
        config = write_checkpoint(
            model,
            folder,
            include_optimizer,
            replay_dataset,
            None if datasets is None else list(datasets),
            {"command": command},
            results,
            others,
        )
        if not model_card.keeps_hand_written(folder / CARD):
            card = model_card.make_card(
                config, repo_id or str(save_directory), results, command, license, tuple(notes), curve is not None
            )
            card.save(folder / CARD)
        if push_to_hub and repo_id is not None:
            hub_transfer.upload_checkpoint(folder, repo_id, **push_kwargs)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model of sb3-mbdpo",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool | None = None,
        n_eval_episodes: int | None = None,
        video: bool = True,
        **save_kwargs: Any,
    ) -> str:
        """
        Evaluate the model, record a video, and upload it with a card.

        A card that was edited by hand (its last line removed) stays in the repository; where there is none, that of the
        folder which the model was loaded from is taken, if the model has not changed since.

        :param repo_id: Repository, "user/name"; made if it does not exist
        :param commit_message: Message of the commit
        :param commit_description: Its longer description
        :param private: Whether a new repository is private; None: as the account has it
        :param token: Token of the Hub; None: the one of ``hf auth login`` or the environment variable HF_TOKEN
        :param revision: Branch to commit to; None: main
        :param create_pr: Open a pull request with the commit
        :param n_eval_episodes: Episodes of each task played before; None: 10 where an environment is known, else none;
            0: none
        :param video: Upload a video of one episode, where something here can draw it
        :param save_kwargs: Arguments of :meth:`save_pretrained`
        :return: Address of the commit
        :raises ValueError: for what a checkpoint cannot hold
        :raises OSError: without a token or a network, or if the Hub refuses, saying what to do
        """
        from sb3_mbdpo import hub_transfer, model_card

        model = cast("MBDPO", self)
        hub_transfer.check_name(repo_id)
        hub_transfer.check_account(token)
        known = evaluation_sources(model, save_kwargs.get("eval_envs"))
        if n_eval_episodes is None:
            n_eval_episodes = 10 if known and save_kwargs.get("results") is None else 0
        if not known and n_eval_episodes == 0 and save_kwargs.get("results") is None:
            print("No environment is known here, so the card says that the model was not evaluated; pass eval_envs.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, repo_id.rpartition("/")[2])
            card = model_card.stated_in(self._unchanged_folder()).card
            if card is not None:
                path.mkdir()
                (path / CARD).write_text(card, encoding="utf-8")
            self.save_pretrained(
                path, repo_id=repo_id, n_eval_episodes=n_eval_episodes, video=video and bool(known), **save_kwargs
            )
            return hub_transfer.upload_checkpoint(
                path,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _unchanged_folder(self) -> Path | None:
        """Folder that the model was loaded from, while both have the same weights: what stands there holds still."""
        if self._folder_source is None:
            return None
        folder, mark = Path(self._folder_source[0]), self._folder_source[1]
        try:
            same = mark == read_config(folder).fingerprint == fingerprint(in_memory(self.policy.state_dict()))
        except (OSError, ValueError):
            # Moved, or replaced by something else
            return None
        return folder if same else None

    @classmethod
    def from_pretrained(
        cls: type[SelfHub],
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
    ) -> SelfHub:
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
        return cast(SelfHub, model)

    @classmethod
    def from_hub(
        cls: type[SelfHub],
        repo_id: str | Path,
        env: EnvSource | VecEnv | None = None,
        task: str | None = None,
        like: str | None = None,
        **kwargs: Any,
    ) -> SelfHub:
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


def _video(
    model: MBDPO, envs: Mapping[str, EnvSource] | EnvSource | None, seed: int
) -> tuple[bytes | None, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VIDEO)
        missing = record_video(model, path, envs, seed=seed)
        return (path.read_bytes(), None) if missing is None else (None, missing)
