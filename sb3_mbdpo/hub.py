"""Sharing models in folders and repositories of the Hugging Face Hub, with huggingface_hub's own argument names."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sb3_mbdpo.checkpoint_config import CARD, CURVE, VIDEO, read_config
from sb3_mbdpo.checkpoint_weights import fingerprint, in_memory
from sb3_mbdpo.checkpoints import write_checkpoint
from sb3_mbdpo.hub_evaluation import EVALUATION_SEED, evaluate_model, evaluation_sources, record_video
from sb3_mbdpo.hub_loading import LoadableAlgorithm
from sb3_mbdpo.multitask_env import EnvSource

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO


class HubAlgorithm(LoadableAlgorithm):
    """The part of MBDPO that shares models."""

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


def _video(
    model: MBDPO, envs: Mapping[str, EnvSource] | EnvSource | None, seed: int
) -> tuple[bytes | None, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VIDEO)
        missing = record_video(model, path, envs, seed=seed)
        return (path.read_bytes(), None) if missing is None else (None, missing)
