"""Updates on a GPU as CUDA graphs: everything between the batch and the new weights is one launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.losses import Metrics
from sb3_mbdpo.updates import CROSS_TD_INTERVAL, Learner

# What decides what an update computes; all can be compared
SETTINGS = (
    "coefficients",
    "energy_interval",
    "tau",
    "bootstrap",
    "target_horizon",
    "prior_horizon",
    "score_coef",
    "score_batch_size",
    "score_config",
    "max_grad_norm",
    "mixed_precision",
)


class CapturedLearner(Learner):
    """
    Updates that are captured once for each combination of what is due at them (the prior, the energy, the score
    network) and replayed. Learning rates are read from tensors, so that schedules go on.

    With several processes, which wait for each other in the middle of an update, nothing is captured.

    :param arguments: Those of :class:`~sb3_mbdpo.updates.Learner`
    :raises ValueError: if an optimizer cannot be captured
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        if not all(group.get("fused") and "capturable" in group for group in self._groups):
            raise ValueError(
                f"compile=True on a GPU captures whole updates, which {type(self.policy.optimizer).__name__} as it is "
                "set up does not allow: use th.optim.Adam or AdamW with fused=True, their default here, or "
                "compile=False."
            )
        self._held = [float(group["lr"]) for group in self._groups]
        self._rates = [th.full((), rate, device=self.policy.device) for rate in self._held]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """Groups of parameters of all optimizers; loading a state makes new ones."""
        policy = self.policy
        optimizers = (policy.optimizer, policy.prior_optimizer, policy.score_optimizer)
        return [group for optimizer in optimizers if optimizer is not None for group in optimizer.param_groups]

    def update(self, samples: SequenceSamples, index: int = 0) -> Metrics:
        """
        One update from one batch.

        :param samples: Windows from the replay buffer
        :param index: Number of updates before this one
        :return: Losses, gradient norms and statistics by log key, as scalar tensors
        """
        if self.ranks.size > 1 or not self.policy.captures:
            return super().update(samples, index)
        names: tuple[str, ...]

        def update(*fields: Any) -> tuple[tuple[str, ...], th.Tensor]:
            metrics = super(CapturedLearner, self).update(SequenceSamples(*fields), index)
            return tuple(metrics), th.stack([value.reshape(()).float() for value in metrics.values()])

        with self._rates_in_tensors():
            names, values = self.policy.graphs(self._key(index), update, tuple(samples), self.policy.generator)
        return dict(zip(names, values.clone().unbind(), strict=True))

    def _key(self, index: int) -> tuple[Any, ...]:
        intervals = (self.policy_delay, self.energy_interval, self.score_interval, CROSS_TD_INTERVAL)
        due = tuple(index % interval == 0 for interval in intervals)
        policy, settings = self.policy, tuple(getattr(self, name) for name in SETTINGS)
        acting = policy.search_config, policy.exploration_noise, policy.episodic, policy.training
        return ("update", due, settings, *acting)

    @contextmanager
    def _rates_in_tensors(self) -> Iterator[None]:
        """A graph keeps the numbers that it was captured with: learning rates go through tensors."""
        groups = self._groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        for i, (group, (rate, _)) in enumerate(zip(groups, before, strict=True)):
            if rate != self._held[i]:
                self._held[i] = rate
                self._rates[i].fill_(rate)
            group["lr"], group["capturable"] = self._rates[i], True
        try:
            yield
        finally:
            # As optimizers are saved: a CPU that reads them knows nothing of a GPU's needs
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable
