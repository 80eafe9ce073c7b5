"""One update from a batch that is worked through in parts, for batches whose activations would not fit at once.

Each part is treated as if another process had it: all draw the random numbers of the whole batch and take their rows,
gradients add up, and there is one step. What is computed over the batch is computed over all parts: statistics of the
energy after the last one, the range of values in a pass of its own before the prior's gradients, which it scales.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.losses import (
    LatentBatch,
    Metrics,
    UpdateNoise,
    draw_update_noise,
    update_energy_statistics,
)
from sb3_mbdpo.prior_loss import prior_values, update_prior_scale
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.updates import Learner

# Of a part, once the world model has its gradient: batch, random numbers, detached latents [H + 1, B, L]
Part = tuple[LatentBatch, UpdateNoise, th.Tensor]


class AccumulatingLearner(Learner):
    """
    Updates from batches in equal parts, one after the other; the result is that of the whole batch but for rounding.

    :param parts: Number of parts; batches are multiples of it, also those of the score network
    :param arguments: Those of :class:`~sb3_mbdpo.updates.Learner`
    """

    def __init__(self, *arguments: Any, parts: int, **named: Any):
        super().__init__(*arguments, **named)
        self.parts = parts

    def update(self, samples: SequenceSamples, index: int = 0) -> Metrics:
        """
        One update from one batch.

        :param samples: Windows from the replay buffer
        :param index: Number of updates before this one
        :return: Losses, gradient norms and statistics by log key, as scalar tensors
        :raises ValueError: if the windows cannot be split into equal parts
        """
        if samples.actions.shape[1] % self.parts:
            raise ValueError(
                f"A batch of {samples.actions.shape[1]} windows cannot be split into {self.parts} equal parts: pass a "
                "multiple of gradient_accumulation."
            )
        metrics, parts = self._step_world_model(samples, index)
        if index % self.policy_delay == 0:
            metrics |= self._step_prior(parts)
        if self.policy.score_optimizer is not None and index % self.score_interval == 0:
            metrics |= self._step_score(self.policy.score_optimizer, parts)
        self.finish()
        return metrics

    def _step_world_model(self, samples: SequenceSamples, index: int) -> tuple[Metrics, list[Part]]:
        optimizer, start = self.policy.optimizer, self.policy.generator.get_state()
        parts: list[Part] = []
        metrics: list[Metrics] = []
        energies: list[th.Tensor] = []
        optimizer.zero_grad(set_to_none=True)
        for number in range(self.parts):
            with self._as_part(number, start):
                with self._autocast():
                    batch = self.encode(rows_of(samples, ALONE.part(number, self.parts)))
                generator = self.policy.generator
                noise = draw_update_noise(self.model, batch.actions, generator, self.target_horizon, self.ranks)
                loss, z, found = self.loss_of_world_model(batch, noise, index, energies)
                self._backward(optimizer, loss / self.parts)
            metrics.append(found)
            # Without its graph, whose memory the next part takes
            parts.append((batch._replace(first=batch.first.detach()), noise, z.detach()))
        if energies:
            seen = th.cat(energies, dim=2)
            masks = th.cat([batch.masks for batch, *_ in parts], dim=1)
            update_energy_statistics(self.model, seen, masks.expand_as(seen), self.ranks)
        return mean_of(metrics) | {"train/grad_norm": self._apply_gradients(optimizer)}, parts

    def _step_prior(self, parts: Sequence[Part]) -> Metrics:
        optimizer = self.policy.prior_optimizer
        with th.no_grad(), self._autocast():
            values = [self._first_values(*part) for part in parts]
            update_prior_scale(self.model, th.cat(values), self.tau, self.ranks)
        metrics = []
        optimizer.zero_grad(set_to_none=True)
        for batch, noise, z in parts:
            loss, found = self.loss_of_prior(z, batch, noise, tau=0.0, ranks=ALONE)
            self._backward(optimizer, loss / self.parts)
            metrics.append(found)
        return mean_of(metrics) | {"train/prior_grad_norm": self._apply_gradients(optimizer)}

    def _first_values(self, batch: LatentBatch, noise: UpdateNoise, z: th.Tensor) -> th.Tensor:
        """Values of the prior's actions in the first latents [B, 1], whose range scales the prior's loss."""
        discount, episodic = self._discount(batch.task), self.policy.episodic
        _, values = prior_values(self.model, z[:1], batch.task, noise, self.prior_horizon, discount, episodic)
        return values[0]

    def _step_score(self, optimizer: th.optim.Optimizer, parts: Sequence[Part]) -> Metrics:
        metrics, start = [], self.policy.generator.get_state()
        optimizer.zero_grad(set_to_none=True)
        for number, (batch, _, z) in enumerate(parts):
            with self._as_part(number, start):
                loss, found = self.loss_of_score(z[0], batch)
            self._backward(optimizer, loss / self.parts)
            metrics.append(found)
        return mean_of(metrics) | {"train/score_grad_norm": self._apply_gradients(optimizer)}

    @contextmanager
    def _as_part(self, number: int, start: th.Tensor) -> Iterator[None]:
        """Take the rows of a part out of what is drawn, from where the generator stood before the first part."""
        ranks = self.ranks
        self.policy.generator.set_state(start)
        self.ranks = ranks.part(number, self.parts)
        try:
            yield
        finally:
            self.ranks = ranks


def rows_of(samples: SequenceSamples, part: Ranks) -> SequenceSamples:
    """
    :param samples: Windows of a batch
    :param part: A part of it
    :return: The part's windows
    """
    observations = samples.observations
    if isinstance(observations, dict):
        observations = {key: part.rows(value, 1) for key, value in observations.items()}
    else:
        observations = part.rows(observations, 1)
    return SequenceSamples(
        observations,
        part.rows(samples.actions, 1),
        part.rows(samples.rewards, 1),
        part.rows(samples.terminations, 1),
        part.rows(samples.masks, 1),
        None if samples.task is None else part.rows(samples.task),
    )


def mean_of(metrics: Sequence[Metrics]) -> Metrics:
    """
    :param metrics: Metrics of equal parts, of the same names
    :return: Those of the whole
    """
    return {name: th.stack([part[name] for part in metrics]).mean(0) for name in metrics[0]}
