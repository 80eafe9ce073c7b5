"""Checkpoints of processes that learn together in environments: the model, and what each of them has collected.

A checkpoint is a folder ``step-000000010000`` with ``model.zip`` and, of each process, ``buffer-0-of-2.pkl``. It gets
its name when all have written their part, and only then do older ones go: a job that is killed at any time finds one
that is whole. The folder lies where all processes see it.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.type_aliases import GymEnv

from sb3_mbdpo.distributed_learning import SharedCallback
from sb3_mbdpo.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

MODEL, STEP = "model.zip", "step-"


class SharedCheckpoints(SharedCallback):
    """
    Saves the model and all replay buffers every so many steps and at the end, between updates and the next step.

    :param folder: Where checkpoints go, seen by all processes; one training each
    :param every: Timesteps, of all processes together, between two of them; each holds all replay buffers, so that
        saving large ones takes its time
    :param keep: How many of them to keep
    :raises ValueError: for numbers below 1
    """

    model: "MBDPO"

    def __init__(self, folder: str | Path, every: int, keep: int = 1):
        super().__init__()
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self._saved_at = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, every={self.every}, keep={self.keep})"

    def resume(self, algorithm: "type[MBDPO]", env: GymEnv, ranks: Ranks = ALONE, **kwargs: Any) -> "MBDPO | None":
        """
        The model of the last checkpoint, with this process's replay buffer. Replay buffers are pickles, which can run
        code: resume only what you have saved yourself.

        :param algorithm: Class of the model
        :param env: This process's environments; their episodes begin anew
        :param ranks: The processes, as many as have saved it
        :param kwargs: Further arguments of ``load``, e.g. ``device``
        :return: The model; None where nothing is saved yet
        :raises ValueError: if the checkpoint is of another number of processes, or not all see the same one
        """
        with ranks.together():
            steps = self._steps()
        ranks.agree({"last checkpoint": str(steps[-1].name) if steps else "none"})
        if not steps:
            return None
        with ranks.together():
            buffer = steps[-1] / _buffer_name(ranks)
            if not buffer.is_file():
                found = len(list(steps[-1].glob("buffer-*.pkl")))
                raise ValueError(
                    f"{steps[-1]} was saved by {found} processes, these are {ranks.size}: start as many, or load its "
                    f"{MODEL} and begin with empty replay buffers."
                )
            model = algorithm.load(steps[-1] / MODEL, env=env, **kwargs)
            model.load_replay_buffer(buffer)
        return model

    def save(self) -> None:
        """
        Save now; called in all processes.

        :raises OSError: if something cannot be written; older checkpoints then stay
        :raises OtherProcessError: if another process cannot
        """
        model, ranks = self.model, self.ranks
        target = self.folder / f"{STEP}{model.num_timesteps:012d}"
        part = target.with_name(f".{target.name}.part")
        with ranks.together():
            part.mkdir(parents=True, exist_ok=True)
            if ranks.is_main:
                model.save(part / MODEL)
            model.save_replay_buffer(part / _buffer_name(ranks))
        with ranks.together():
            if ranks.is_main:
                part.rename(target)
                for old in self._steps()[: -self.keep]:
                    shutil.rmtree(old)
                # What a process that was killed has left
                for left in self.folder.glob(f".{STEP}*.part"):
                    shutil.rmtree(left)
        self._saved_at = model.num_timesteps

    def _steps(self) -> list[Path]:
        """Checkpoints that are whole, oldest first."""
        return sorted(path for path in self.folder.glob(f"{STEP}*") if path.is_dir())

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps
        with self.ranks.together():
            steps = self._steps()
            if steps and int(steps[-1].name.removeprefix(STEP)) > self._saved_at:
                raise ValueError(
                    f"{self.folder} holds {steps[-1].name}, beyond this model's step {self._saved_at}: go on from it "
                    "with resume(), or pass another folder."
                )

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self._saved_at >= self.every:
            self.save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self._saved_at:
            self.save()


def _buffer_name(ranks: Ranks) -> str:
    return f"buffer-{ranks.rank}-of-{ranks.size}.pkl"
