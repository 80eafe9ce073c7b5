"""One gradient update: encode a batch of windows, compute each loss, step each optimizer, move the targets."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch as th

from sb3_mbdpo.buffer_arrays import map_arrays
from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.distillation import draw_path, score_loss
from sb3_mbdpo.encoders import Features
from sb3_mbdpo.hardware import compiled, recomputed
from sb3_mbdpo.losses import (
    LatentBatch,
    LossCoefficients,
    Metrics,
    UpdateNoise,
    cross_td_error,
    draw_update_noise,
    td_target,
    world_model_loss,
)
from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.prior_loss import prior_loss
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.score import score_plan
from sb3_mbdpo.search import SearchNoise, draw_noise
from sb3_mbdpo.search_config import with_samples
from sb3_mbdpo.world_model import WorldModel

BOOTSTRAPS = ("prior", "score")
# Cross-TD error and clipped targets are figures to watch: measured at every so many updates
CROSS_TD_INTERVAL = 10


class Learner:
    """
    Updates a policy's world model, prior and score network.

    Every random number comes from the policy's own generator, and nothing here waits for the device.

    :param policy: Policy to update in place
    :param coefficients: Weights of the losses
    :param tau: Polyak step of target critics and value range
    :param bootstrap: Policy that the critics' targets follow, "prior" or "score"
    :param target_horizon: Imagined steps in the critics' targets, see :func:`~sb3_mbdpo.losses.td_target`
    :param prior_horizon: Imagined steps in the prior's objective, see :func:`~sb3_mbdpo.prior_loss.prior_loss`
    :param policy_delay: Updates of the world model per update of the prior
    :param energy_interval: Updates of the rest of the world model per update of the energy
    :param score_coef: Weight of the score network's loss
    :param score_batch_size: Latents per update that the score network learns from
    :param score_samples: Candidate plans per latent in the score network's targets
    :param score_interval: Updates of the world model per update of the score network
    :param max_grad_norm: Gradient-norm clip of each optimizer
    :param mixed_precision: Matrix products in bfloat16
    :param activation_checkpointing: Compute activations again in the backward pass instead of keeping them
    """

    def __init__(
        self,
        policy: MBDPOPolicy,
        coefficients: LossCoefficients,
        tau: float,
        bootstrap: str,
        target_horizon: int,
        prior_horizon: int,
        policy_delay: int,
        energy_interval: int,
        score_coef: float,
        score_batch_size: int,
        score_samples: int,
        score_interval: int,
        max_grad_norm: float,
        mixed_precision: bool = False,
        activation_checkpointing: bool = False,
    ):
        self.policy, self.model = policy, policy.world_model
        self.model.set_recompute(activation_checkpointing)
        self.coefficients, self.tau, self.bootstrap = coefficients, tau, bootstrap
        self.without_energy = replace(coefficients, energy=0.0)
        self.energy_interval = energy_interval
        self.target_horizon, self.prior_horizon, self.policy_delay = target_horizon, prior_horizon, policy_delay
        self.score_coef, self.score_batch_size = score_coef, score_batch_size
        self.score_config = with_samples(policy.search_config, score_samples)
        self.score_interval, self.max_grad_norm = score_interval, max_grad_norm
        self.mixed_precision = mixed_precision
        # Processes that share each batch; with several, samples are this one's rows
        self.ranks = ALONE
        # Whether the prior is held to the actions in the data: while it cannot try others
        self.near_data = False
        losses: tuple[Callable[..., Any], ...] = (encode, td_target, world_model_loss, prior_loss)
        self._encode, self._td_target, self._world_model_loss, self._prior_loss = (
            compiled(loss, policy.captures) if policy.compiled else loss for loss in losses
        )
        # Long, and rarely due: what compiling it takes comes back where launches cost more than numbers
        self._score_loss = compiled(score_loss, static=True) if policy.captures else score_loss

    def update(self, samples: SequenceSamples, index: int = 0) -> Metrics:
        """
        One update from one batch.

        :param samples: Windows from the replay buffer
        :param index: Number of updates before this one
        :return: Losses, gradient norms and statistics by log key, as scalar tensors
        """
        with self._autocast():
            batch = self.encode(samples)
        noise = draw_update_noise(self.model, batch.actions, self.policy.generator, self.target_horizon, self.ranks)
        metrics, z = self.update_world_model(batch, noise, index)
        if index % self.policy_delay == 0:
            metrics |= self.update_prior(z.detach(), batch, noise)
        if self.policy.score_optimizer is not None and index % self.score_interval == 0:
            metrics |= self.update_score(z[0].detach(), batch)
        self.finish()
        return metrics

    @th.no_grad()
    def finish(self) -> None:
        """After the optimizers' steps: target critics follow the critics, task embeddings stay inside their norm."""
        critics = (self.model.target_critics, self.model.critics)
        targets, online = ([tensor for layer in each.layers() for tensor in layer] for each in critics)
        th._foreach_lerp_(targets, online, self.tau)
        self.model.project_embeddings()

    def _autocast(self) -> AbstractContextManager[object]:
        # One for each loss: within one, weights are cast once, and would stay what they were before a step
        device = self.policy.device.type
        if not (self.mixed_precision or th.is_autocast_enabled(device)):
            return nullcontext()
        return th.autocast(device, th.bfloat16, enabled=self.mixed_precision)

    def encode(self, samples: SequenceSamples) -> LatentBatch:
        """
        :param samples: Windows of H transitions
        :return: The same with latents; only the first observation's carries a gradient
        """
        horizon, batch = samples.actions.shape[:2]
        task = self.policy.tasks_of(map_arrays(lambda x: x[0], samples.observations), samples.task)
        features = map_arrays(lambda x: x.flatten(0, 1), samples.observations)
        every = None if task is None else task.repeat(horizon + 1)
        features = self.policy.preprocess(features, augment=True, ranks=self.ranks, task=every)
        first = self._encode(self.model, map_arrays(lambda x: x[:batch], features), task)
        with th.no_grad():
            following = None if every is None else every[batch:]
            targets = self._encode(self.model, map_arrays(lambda x: x[batch:], features), following)
        return LatentBatch(
            first,
            targets.unflatten(0, (horizon, batch)),
            samples.actions,
            samples.rewards,
            samples.terminations,
            samples.masks,
            task,
        )

    def update_world_model(self, batch: LatentBatch, noise: UpdateNoise, index: int = 0) -> tuple[Metrics, th.Tensor]:
        """
        Step encoder, dynamics, reward, termination, critics and energy.

        :param batch: Encoded batch
        :param noise: Random numbers of this update
        :param index: Number of updates before this one
        :return: metrics, rolled-out latents [H + 1, B, L]
        """
        loss, z, metrics = self.loss_of_world_model(batch, noise, index)
        metrics["train/grad_norm"] = self._step(self.policy.optimizer, loss)
        return metrics, z

    def loss_of_world_model(
        self, batch: LatentBatch, noise: UpdateNoise, index: int = 0, energies: list[th.Tensor] | None = None
    ) -> tuple[th.Tensor, th.Tensor, Metrics]:
        """
        :param batch: Encoded batch
        :param noise: Random numbers of this update
        :param index: Number of updates before this one
        :param energies: See :func:`~sb3_mbdpo.losses.energy_loss`
        :return: loss, rolled-out latents [H + 1, B, L], metrics
        """
        policy, discount = self.policy, self._discount(batch.task)
        bootstrap = self.bootstrap_plan if batch.task is None else partial(self.bootstrap_plan, task=batch.task)
        with self._autocast():
            target = self._td_target(self.model, batch, bootstrap, noise, discount, policy.episodic)
        coefficients = self.coefficients if index % self.energy_interval == 0 else self.without_energy
        with self._autocast():
            loss, z, losses = self._world_model_loss(
                self.model, batch, target, noise, coefficients, policy.episodic, self.ranks, energies
            )
        metrics = {f"train/{name}_loss": value for name, value in losses.items()}
        if index % CROSS_TD_INTERVAL == 0 and len(batch.actions) > 1:
            # Before the step, with the critics that the target belongs to
            error = cross_td_error(self.model, z, batch, noise.target_critics, discount)
            metrics["train/cross_td_error"] = error
        if index % CROSS_TD_INTERVAL == 0:
            metrics["train/clipped_targets"] = self.model.two_hot.beyond(th.cat([batch.rewards, target]))
        return loss, z, metrics

    @th.no_grad()
    def bootstrap_plan(self, z: th.Tensor, noise: th.Tensor, task: th.Tensor | None = None) -> th.Tensor:
        """
        Next actions of the policy that targets follow: one of the prior, or a whole plan of the score network.

        :param z: [..., L]
        :param noise: Standard normal draws [R, ..., A] for the R steps that are wanted
        :param task: Task indices, broadcastable to the leading dimensions of ``z``
        :return: [P, ..., A], P at most R
        """
        if self.bootstrap == "prior":
            return self.model.prior_action(z, noise[0], task)[None]
        rows = None if task is None else task.expand(z.shape[:-1]).flatten()
        plan = self.cold_plan(z.flatten(0, -2), rows).transpose(0, 1)[: len(noise)]
        noise, mask = noise[: len(plan)], self.model.mask(task)
        noise = noise if mask is None else noise * mask
        return (plan.reshape(noise.shape) + self.policy.exploration_noise * noise).clamp(-1, 1)

    def cold_plan(self, z: th.Tensor, task: th.Tensor | None = None) -> th.Tensor:
        """
        The score network's plans without a warm start.

        :param z: [B, L]
        :param task: Task indices [B]
        :return: [B, H, A]
        """
        cold = z.new_zeros(len(z), *self.policy.plan_shape)
        restart = th.ones(len(z), dtype=th.bool, device=z.device)
        return score_plan(self.model, self.policy.search_config.schedule, z, cold, restart, task)

    def update_prior(self, z: th.Tensor, batch: LatentBatch, noise: UpdateNoise) -> Metrics:
        """
        Step the prior.

        :param z: Detached latents [H + 1, B, L]
        :param batch: Encoded batch
        :param noise: Random numbers of this update
        :return: metrics
        """
        loss, metrics = self.loss_of_prior(z, batch, noise, self.tau, self.ranks)
        metrics["train/prior_grad_norm"] = self._step(self.policy.prior_optimizer, loss)
        return metrics

    def loss_of_prior(
        self, z: th.Tensor, batch: LatentBatch, noise: UpdateNoise, tau: float, ranks: Ranks
    ) -> tuple[th.Tensor, Metrics]:
        """
        :param z: Detached latents [H + 1, B, L]
        :param batch: Encoded batch
        :param noise: Random numbers of this update
        :param tau: Step of the range of values
        :param ranks: Processes whose values count in it
        :return: loss, metrics
        """
        discount, episodic = self._discount(batch.task), self.policy.episodic
        with self._autocast():
            loss, values = self._prior_loss(
                self.model, z, batch, noise, self.coefficients, tau, self.prior_horizon, discount, episodic, ranks
            )
        metrics = {f"train/{name}": value for name, value in values.items()}
        metrics["train/prior_loss"] = metrics.pop("train/prior")
        return loss, metrics

    def update_score(self, z: th.Tensor, batch: LatentBatch) -> Metrics:
        """
        Step the score network.

        :param z: Detached latents of the first observations [B, L]
        :param batch: Encoded batch
        :return: metrics
        """
        assert self.policy.score_optimizer is not None
        loss, metrics = self.loss_of_score(z, batch)
        metrics["train/score_grad_norm"] = self._step(self.policy.score_optimizer, loss)
        return metrics

    def loss_of_score(self, z: th.Tensor, batch: LatentBatch) -> tuple[th.Tensor, Metrics]:
        """
        :param z: Detached latents of the first observations [B, L]
        :param batch: Encoded batch
        :return: weighted loss, metrics
        """
        policy, ranks = self.policy, self.ranks
        count = min(self.score_batch_size // ranks.size, len(z))
        drawn = draw_noise(self.score_config, self.model, policy.generator, count * ranks.size, z.device, steps=1)
        noise = SearchNoise(ranks.rows(drawn.candidates, 1), ranks.rows(drawn.prior, 1), drawn.critics)
        behaviour = batch.actions[:, :count].transpose(0, 1)
        task = None if batch.task is None else batch.task[:count]
        path = draw_path(self.score_config, count, policy.generator, z.device, ranks)
        arguments = (noise, path, task, policy.row_discounts(task), policy.episodic)
        with self._autocast():
            loss = self._score_loss(self.model, self.score_config, z[:count], behaviour, *arguments)
        return self.score_coef * loss, {"train/score_loss": loss.detach()}

    def _discount(self, task: th.Tensor | None) -> float | th.Tensor:
        """One number in single-task models, otherwise a discount for each row [B, 1]."""
        rows = self.policy.row_discounts(task)
        return self.policy.search_config.discount if rows is None else rows

    def _step(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> th.Tensor:
        optimizer.zero_grad(set_to_none=True)
        self._backward(optimizer, loss)
        return self._apply_gradients(optimizer)

    def _backward(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        parameters = trained_by(optimizer)
        if parameters:
            # Named inputs: what lies outside this optimizer gets no gradient
            loss.backward(inputs=parameters)

    def _apply_gradients(self, optimizer: th.optim.Optimizer) -> th.Tensor:
        """Step by the gradients of all processes; returns their norm before clipping."""
        parameters = trained_by(optimizer)
        if not parameters:
            return th.zeros((), device=self.policy.device)
        self.ranks.average([p.grad for p in parameters if p.grad is not None])
        norm = th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        optimizer.step()
        return norm.detach()


def encode(model: WorldModel, features: Features, task: th.Tensor | None) -> th.Tensor:
    """
    :param model: World model
    :param features: Preprocessed observations [B, ...] or a dict of them
    :param task: Task indices [B]
    :return: Latents [B, L]; activations are computed again in the backward pass where the model says so
    """
    return recomputed(model.recompute, model.encode, features, task)


def trained_by(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: An optimizer
    :return: Its parameters that learn: fine-tuning can leave parts of the model as they are
    """
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
