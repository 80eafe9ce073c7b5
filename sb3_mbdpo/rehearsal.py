"""Recorded windows in the batches of online learning: a pretrained model keeps what it knows while it learns from its
first episodes, and data helps a new one (RLPD: Ball et al., 2023)."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th

from sb3_mbdpo.buffers import SequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.minari_models import MinariAlgorithm
from sb3_mbdpo.offline import OfflineData
from sb3_mbdpo.offline_tasks import TaskWindows
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer
from sb3_mbdpo.tasks import OBSERVATION_KEY, TASK_KEY

DEFAULT_SHARE = 0.5
SelfRehearsing = TypeVar("SelfRehearsing", bound="RehearsingAlgorithm")


class RehearsingAlgorithm(MinariAlgorithm):
    """The part of MBDPO that learns from recorded data beside what it collects."""

    replay_buffer: SequenceReplayBuffer | None
    # Part of each batch that is recorded, saved with the model; and the data, which is not
    _rehearsal_share: float
    _rehearsal: ShardedDataset | TaskWindows | None

    def rehearse(
        self: SelfRehearsing,
        dataset: "OfflineData | None",
        share: float | None = None,
        shards_dir: str | Path | None = None,
    ) -> SelfRehearsing:
        """
        From now on, let a part of each of ``learn``'s batches be recorded data: after :meth:`add_task` or ``from_hub``
        the data of the tasks that the model was pretrained on, or any data of a single task beside learning it.

        The replay buffer keeps what is collected alone. ``save`` remembers that there is data, which is not saved with
        the model: a loaded one asks for it again. Folders of ``save_pretrained`` do not: who loads them need not have
        the data, whose Minari ids they name. Statistics of observations are taken as by :meth:`learn_offline`.

        :param dataset: As in :meth:`learn_offline`; None: no more of it
        :param share: Part of each batch, between 0 and 1; there always are some of both kinds. None: what it was when
            the model was saved, otherwise a half
        :param shards_dir: Where converted data sets go; None puts them beside Minari's own
        :return: The model itself
        :raises ValueError: for data that cannot be read or that is not of this model's spaces or tasks, for another
            share, or if batches have less than two windows; the model is then as it was
        """
        if dataset is None:
            self._rehearsal, self._rehearsal_share = None, 0.0
            return self
        share = (self._rehearsal_share or DEFAULT_SHARE) if share is None else share
        if self.batch_size < 2:
            raise ValueError(f"Batches of {self.batch_size} hold nothing beside a window: pass batch_size=2 or more.")
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}: rehearse(None) is for none.")
        own: OfflineData = dataset
        if isinstance(dataset, ShardedDataset):
            # The caller's goes on with its own horizon, device and draws
            own = copy.copy(dataset)
            own.seed()
        data = self._open_data(own, shards_dir)
        self._normalize_by(data)
        self._rehearsal = data if self.tasks is None else TaskWindows(data, self.tasks)
        self._rehearsal_share = share
        self._remember_data(dataset)
        if self.episodic is None and data.has_terminations():
            self.policy.mark_episodic()
        return self

    def _check_rehearsal(self) -> None:
        """
        :raises ValueError: if what the model learns beside is not there
        """
        if self._rehearsal_share > 0 and self._rehearsal is None:
            raise ValueError(
                f"This model was learning beside recorded data ({self._rehearsal_share:g} of each batch), which is not "
                "saved with it: call model.rehearse(dataset) again, or model.rehearse(None) to go on without."
            )

    def _share_tasks(self) -> None:
        """``task_sampling`` as it is now, in what is collected and in recorded data beside it."""
        if isinstance(self.replay_buffer, MultiTaskReplayBuffer):
            self.replay_buffer.set_task_sampling(self.task_sampling)
        if isinstance(self._rehearsal, TaskWindows):
            self._rehearsal.data.task_sampling = self.task_sampling

    def _sample(self, batch_size: int) -> SequenceSamples:
        """A batch to learn from. With a seed, the recorded part depends on it and the number of updates alone."""
        assert self.replay_buffer is not None
        normalize = self._vec_normalize_env
        if self._rehearsal is None:
            return self.replay_buffer.sample(batch_size, env=normalize)
        count = min(max(round(self._rehearsal_share * batch_size), 1), batch_size - 1)
        seed = None if self.seed is None else (self.seed, self._n_updates)
        if seed is not None:
            self._rehearsal.seed(seed)
        recorded = self._rehearsal.sample(count, normalize)
        collected = self.replay_buffer.sample(batch_size - count, env=normalize)
        return mixed(collected if self.tasks is None else _with_task_beside(collected), recorded, seed)


def mixed(first: SequenceSamples, second: SequenceSamples, seed: Sequence[int] | None) -> SequenceSamples:
    """
    :param first: Windows
    :param second: Windows of the same horizon and model, told their tasks in the same way
    :param seed: Seed of the order; None takes one from the operating system
    :return: One batch of both, in random order: losses that read the first rows only read some of each
    """
    rows = first.actions.shape[1] + second.actions.shape[1]
    order = th.from_numpy(np.random.default_rng(seed).permutation(rows)).to(first.actions.device)

    def join(a: th.Tensor, b: th.Tensor) -> th.Tensor:
        return th.cat([a, b.to(a.dtype)], dim=1)[:, order]

    if isinstance(first.observations, dict):
        assert isinstance(second.observations, dict)
        observations: Any = {key: join(value, second.observations[key]) for key, value in first.observations.items()}
    else:
        assert isinstance(second.observations, th.Tensor)
        observations = join(first.observations, second.observations)
    task = None if first.task is None or second.task is None else th.cat([first.task, second.task])[order]
    return SequenceSamples(
        observations,
        join(first.actions, second.actions),
        join(first.rewards, second.rewards),
        join(first.terminations, second.terminations),
        join(first.masks, second.masks),
        task,
    )


def _with_task_beside(samples: SequenceSamples) -> SequenceSamples:
    """A multi-task model's windows in the form that data sets have."""
    observations = samples.observations
    assert isinstance(observations, dict)
    task = observations[TASK_KEY][0].reshape(-1).long()
    return samples._replace(observations=observations[OBSERVATION_KEY], task=task)
