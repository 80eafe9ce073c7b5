"""Losses of one update (arXiv 2605.26282; TD-MPC2).

Verified against the released implementation: each loss, the regression targets, the running statistics and the
gradient norms of every module (tests/test_golden.py). Different on purpose: the energy pairs each latent with its own
action (the released code pairs it with another step's), targets take a random pair of critics (released: always the
first two), and windows cut short by an episode's end are masked. The score network's loss is in `distillation.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch as th
from torch.nn import functional as F

from sb3_mbdpo.hardware import recomputed
from sb3_mbdpo.products import Joined, of_parts
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.search import random_pair
from sb3_mbdpo.world_model import WorldModel

STATISTICS_MOMENTUM = 0.99
ENERGY_JITTER = 0.5
CROSS_TD_ROWS = 32
Metrics = dict[str, th.Tensor]


@dataclass(frozen=True)
class LossCoefficients:
    """
    Weights of the losses; all are arguments of ``MBDPO``, where they are described.

    :param consistency: Latent consistency
    :param reward: Reward cross-entropy
    :param value: Value cross-entropy
    :param termination: Termination cross-entropy
    :param energy: Noise-contrastive loss of the energy
    :param entropy: Entropy bonus of the prior
    :param rho: Temporal weight rho of the loss, rho^t
    :param saturation: Barrier that keeps the prior's actions off their bounds
    :param behaviour: Squared distance of the prior's actions from the replayed ones
    """

    consistency: float = 20.0
    reward: float = 0.1
    value: float = 0.1
    termination: float = 1.0
    energy: float = 1.0
    entropy: float = 1e-4
    rho: float = 0.5
    saturation: float = 0.0
    behaviour: float = 0.0


class LatentBatch(NamedTuple):
    """
    A batch of windows, encoded.

    ``first`` [B, L] latents of the first observations, with gradient; ``targets`` [H, B, L] latents of the observations
    after each action, without; ``actions`` [H, B, A]; ``rewards``, ``terminations``, ``masks`` [H, B, 1]; ``task`` [B].
    """

    first: th.Tensor
    targets: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    terminations: th.Tensor
    masks: th.Tensor
    task: th.Tensor | None = None


class UpdateNoise(NamedTuple):
    """
    Every random number of an update of world model and prior.

    Standard normals: ``target`` [K + 1, H, B, A] for bootstrap actions, ``energy`` [H, B, A] for the prior's proposals,
    ``jitter`` [H, B, A], ``prior`` [H + 1, B, A]. ``uniform`` [H, B, A] on [-1, 1]. Indices of critics:
    ``target_critics`` and ``prior_critics`` [2]. ``dropped``: units of the critics' first layer, or None.
    """

    target: th.Tensor
    energy: th.Tensor
    jitter: th.Tensor
    uniform: th.Tensor
    prior: th.Tensor
    target_critics: th.Tensor
    prior_critics: th.Tensor
    dropped: th.Tensor | None = None


def draw_update_noise(
    model: WorldModel,
    actions: th.Tensor,
    generator: th.Generator,
    target_horizon: int = 0,
    ranks: Ranks = ALONE,
) -> UpdateNoise:
    """
    :param model: World model
    :param actions: The batch's actions [H, B, A]
    :param generator: Source of all draws, on the device of ``actions``
    :param target_horizon: Imagined steps K in the targets
    :param ranks: Processes that share the batch: drawn is for all rows, returned for those of ``actions``
    :return: The random numbers of one update
    """
    horizon, batch, width = actions.shape
    batch *= ranks.size

    def normal(*steps: int) -> th.Tensor:
        whole = th.randn(*steps, batch, width, generator=generator, device=generator.device)
        return ranks.rows(whole, len(steps))

    uniform = th.rand(horizon, batch, width, generator=generator, device=generator.device) * 2 - 1
    pairs = (random_pair(model.n_critics, generator), random_pair(model.n_critics, generator))
    target = normal(target_horizon + 1, horizon)
    dropped = ranks.positions(model.critics.draw_dropout(horizon * batch, generator), model.critics.first_width)
    uniform = ranks.rows(uniform, 1)
    return UpdateNoise(target, normal(horizon), normal(horizon), uniform, normal(horizon + 1), *pairs, dropped)


@th.no_grad()
def td_target(
    model: WorldModel,
    batch: LatentBatch,
    policy: Callable[[th.Tensor, th.Tensor], th.Tensor],
    noise: UpdateNoise,
    discount: float | th.Tensor,
    episodic: bool = False,
) -> th.Tensor:
    """
    Targets y = r + gamma (1 - done) min of two target critics, as far ahead as the noise has steps.

    The paper's targets look one step ahead (K = 0). With K > 0 the bootstrap policy is first unrolled for K steps in
    the model and the predicted rewards are added: model-based value expansion (Feinberg et al., 2018). A policy that
    plans several actions at once is asked again when its plan is used up.

    :param model: World model
    :param batch: Encoded batch
    :param policy: Bootstrap policy, latents [H, B, L] and the standard normal noise of the steps that remain
        [R, H, B, A] to the actions of the next P steps [P, H, B, A], 1 <= P
    :param noise: Random numbers; ``noise.target`` has K + 1 steps
    :param discount: gamma, a number or [B, 1] per task
    :param episodic: Imagined steps end where the termination head says so
    :return: [H, B, 1]
    """
    z, target, weight = batch.targets, batch.rewards, discount * (1 - batch.terminations)
    steps, plan = len(noise.target), list(policy(z, noise.target))
    inputs, weights = [], []
    for step in range(steps - 1):
        inputs.append(model.join(z, plan.pop(0), batch.task))
        weights.append(weight)
        z, weight = model.dynamics(inputs[-1]), weight * discount
        if episodic and model.termination is not None:
            weight = weight * (model.termination(model.join(z, None, batch.task)) <= 0)
        plan = plan or list(policy(z, noise.target[step + 1 :]))
    if inputs:
        rewards = model.two_hot.decode(model.reward(th.stack(inputs)))
        target = target + (th.stack(weights) * rewards).sum(0)
    critics = model.target_critics.select(noise.target_critics)
    return target + weight * model.value(z, plan[0], batch.task, critics).amin(0)


def world_model_loss(
    model: WorldModel,
    batch: LatentBatch,
    target: th.Tensor,
    noise: UpdateNoise,
    coefficients: LossCoefficients,
    episodic: bool = False,
    ranks: Ranks = ALONE,
    energies: list[th.Tensor] | None = None,
) -> tuple[th.Tensor, th.Tensor, Metrics]:
    """
    Consistency, reward, value, termination and energy losses along a latent rollout.

    :param model: World model
    :param batch: Encoded batch
    :param target: TD targets [H, B, 1]
    :param noise: Random numbers
    :param coefficients: Weights of the losses
    :param episodic: Train the termination head
    :param ranks: Processes that share the batch
    :param energies: See :func:`energy_loss`
    :return: total loss, rolled-out latents [H + 1, B, L] with gradient, each loss by name (detached)
    """
    horizon = len(batch.actions)
    latents = [batch.first]
    for action in batch.actions:
        latents.append(recomputed(model.recompute, model.next, latents[-1], action, batch.task))
    z = th.stack(latents)
    rho = coefficients.rho ** th.arange(horizon, device=z.device)[:, None, None]
    weight = rho * batch.masks

    joined = model.join(z[:-1], batch.actions, batch.task)
    consistency = ((z[1:] - batch.targets).pow(2).mean(-1, keepdim=True) * weight).mean()
    # One pass over the logits of reward and critics
    reward_logits = recomputed(model.recompute, model.reward, joined)
    logits = th.cat([reward_logits[None], model.critics(joined, noise.dropped)])
    targets = th.cat([batch.rewards[None], target.expand(len(logits) - 1, -1, -1, -1)])
    entropies = recomputed(model.recompute, model.two_hot.cross_entropy, logits, targets) * weight
    reward, value = entropies[0].mean(), entropies[1:].mean()
    losses = {"consistency": consistency, "reward": reward, "value": value}
    total = coefficients.consistency * consistency + coefficients.reward * reward + coefficients.value * value
    if episodic and model.termination is not None:
        ended = recomputed(model.recompute, model.termination, model.join(z[1:], None, batch.task))
        losses["termination"] = _masked_bce(ended, batch.terminations, batch.masks)
        total = total + coefficients.termination * losses["termination"]
    if model.energy is not None and coefficients.energy > 0:
        losses["energy"] = energy_loss(model, z[:-1].detach(), batch, noise, ranks, energies)
        total = total + coefficients.energy * losses["energy"]
    return total, z, {name: loss.detach() for name, loss in losses.items()}


def energy_loss(
    model: WorldModel,
    z: th.Tensor,
    batch: LatentBatch,
    noise: UpdateNoise,
    ranks: Ranks = ALONE,
    energies_seen: list[th.Tensor] | None = None,
) -> th.Tensor:
    """
    Noise-contrastive loss of the energy: the data's action against the hardest of three negatives (paper's NCE).

    Also moves the running mean and standard deviation that scale the energy in the search.

    :param model: World model with an energy
    :param z: Detached latents [H, B, L]
    :param batch: Encoded batch
    :param noise: Random numbers
    :param ranks: Processes that share the batch
    :param energies_seen: Where given, energies [2, H, B, 1] are appended to it and the running statistics stay as they
        are: a batch in parts moves them once
    :return: Scalar loss
    """
    assert model.energy is not None
    states = model.join(z, None, batch.task)
    with th.no_grad():
        proposed = model.prior_action(z, noise.energy, batch.task)
        jittered = (proposed + ENERGY_JITTER * noise.jitter).clamp(-1, 1)
        negatives = th.stack([proposed, jittered, noise.uniform])
        mask = model.mask(batch.task)
        negatives = negatives if mask is None else negatives * mask
        hardest = of_parts(model.energy, Joined(states, negatives)).argmax(0, keepdim=True)
        negative_actions = negatives.gather(0, hardest.expand(-1, -1, -1, negatives.shape[-1])).squeeze(0)
    # One pass for both: [2, H, B, 1]
    actions = th.stack([batch.actions, negative_actions])
    energies = recomputed(model.recompute, of_parts, model.energy, Joined(states, actions))
    if energies_seen is None:
        update_energy_statistics(model, energies.detach(), batch.masks.expand_as(energies), ranks)
    else:
        energies_seen.append(energies.detach())
    positive = _masked_bce(energies[0], th.ones_like(energies[0]), batch.masks)
    return 0.5 * (positive + _masked_bce(energies[1], th.zeros_like(energies[1]), batch.masks))


def update_energy_statistics(model: WorldModel, energies: th.Tensor, masks: th.Tensor, ranks: Ranks = ALONE) -> None:
    """
    Move the running mean and standard deviation towards a batch's (momentum 0.99).

    :param model: World model, changed in place
    :param energies: [...]
    :param masks: Validity [...]
    :param ranks: Processes that share the batch
    """
    count = ranks.sum(masks.sum())
    mean = ranks.sum((energies * masks).sum()) / count
    std = (ranks.sum(((energies - mean).pow(2) * masks).sum()) / count).sqrt()
    model.energy_mean.lerp_(mean.reshape(1), 1 - STATISTICS_MOMENTUM)
    model.energy_std.lerp_(std.clamp(min=1e-6).reshape(1), 1 - STATISTICS_MOMENTUM)


@th.no_grad()
def cross_td_error(
    model: WorldModel, z: th.Tensor, batch: LatentBatch, critics: th.Tensor, discount: float | th.Tensor
) -> th.Tensor:
    """
    Mean absolute TD error of the critics when the next action is the one that was executed (paper's cross-TD error).

    Small when the policy that the critics bootstrap from acts like the one that collected the data. Measured on the
    first rows of the batch: it is a figure to watch, not a loss.

    :param model: World model
    :param z: Latents of the rollout [H + 1, B, L], H at least 2
    :param batch: Encoded batch
    :param critics: Indices of the two critics
    :param discount: gamma, a number or [B, 1]
    :return: Scalar
    """
    rows = slice(0, CROSS_TD_ROWS)
    task = None if batch.task is None else batch.task[rows]
    discount = discount[rows] if isinstance(discount, th.Tensor) else discount
    value = model.value(z[0, rows], batch.actions[0, rows], task, model.critics.select(critics)).mean(0)
    targets = model.target_critics.select(critics)
    next_value = model.value(batch.targets[0, rows], batch.actions[1, rows], task, targets).mean(0)
    error = batch.rewards[0, rows] + discount * (1 - batch.terminations[0, rows]) * next_value - value
    # A termination needs no next action; anything else does
    known = th.maximum(batch.masks[1, rows], batch.terminations[0, rows])
    return (error.abs() * known).sum() / known.sum().clamp(min=1)


def _masked_bce(logits: th.Tensor, target: th.Tensor, masks: th.Tensor) -> th.Tensor:
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * masks).mean()
