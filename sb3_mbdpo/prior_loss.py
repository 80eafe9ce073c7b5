"""The prior's objective: the value of what it does, in latents of the data or at the end of an imagined rollout."""

from collections.abc import Callable

import torch as th
from torch.nn import functional as F

from sb3_mbdpo.hardware import recomputed
from sb3_mbdpo.losses import LatentBatch, LossCoefficients, Metrics, UpdateNoise
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.world_model import PriorSample, WorldModel


def prior_loss(
    model: WorldModel,
    z: th.Tensor,
    batch: LatentBatch,
    noise: UpdateNoise,
    coefficients: LossCoefficients,
    tau: float,
    prior_horizon: int = 0,
    discount: float | th.Tensor = 0.99,
    episodic: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[th.Tensor, Metrics]:
    """
    Policy loss of the prior: scaled value plus entropy.

    The paper asks the critics for the value of the prior's action in each latent of the rollout (``prior_horizon`` 0).
    With K > 0 the prior is unrolled for K steps in the model from the first latents, and gradients of the return come
    back through the model: value gradients (Heess et al., 2015). It is the return that the search maximises.

    Also moves the running 5-95 percentile range S that scales values.

    :param model: World model
    :param z: Detached latents [H + 1, B, L]
    :param batch: Encoded batch (masks, task)
    :param noise: Random numbers
    :param coefficients: Entropy coefficient and rho
    :param tau: Step of the running range
    :param prior_horizon: Imagined steps K, at most H
    :param discount: gamma of imagined steps, a number or [B, 1] per task
    :param episodic: Imagined steps end where the termination head says so
    :param ranks: Processes that share the batch
    :return: Scalar loss and metrics
    """
    sample, value = prior_values(model, z, batch.task, noise, prior_horizon, discount, episodic)
    update_prior_scale(model, value[0].detach(), tau, ranks)
    if prior_horizon > 0:
        weight = th.ones_like(batch.masks[:1])
    else:
        rho = coefficients.rho ** th.arange(len(z), device=z.device)[:, None, None]
        # The latent after a masked transition is nobody's; the first one always is somebody's
        weight = rho * th.cat([th.ones_like(batch.masks[:1]), batch.masks])
    objective = coefficients.entropy * sample.scaled_entropy + value / model.prior_scale.clone()
    if coefficients.saturation > 0:
        # What the scaled entropy leaves out of the squashed Gaussian's: without it nothing brings a saturated tanh back
        barrier = (1 - sample.action.pow(2) + 1e-6).log().sum(-1, keepdim=True)
        objective = objective + coefficients.saturation * barrier
    if coefficients.behaviour > 0:
        distance = _distance_from_behaviour(sample.action, batch, prior_horizon > 0)
        objective = objective - coefficients.behaviour * distance
    loss = -(objective * weight).mean()
    return loss, {
        "prior": loss.detach(),
        "prior_entropy": -sample.log_prob.detach().mean(),
        "value_mean": value.detach()[0].mean(),
        "prior_scale": model.prior_scale[0].clone(),
    }


def prior_values(
    model: WorldModel,
    z: th.Tensor,
    task: th.Tensor | None,
    noise: UpdateNoise,
    prior_horizon: int = 0,
    discount: float | th.Tensor = 0.99,
    episodic: bool = False,
) -> tuple[PriorSample, th.Tensor]:
    """
    What the prior does in latents and what it is worth, as :func:`prior_loss` sees it.

    :param model: World model
    :param z: Latents [N, B, L], the first N of a rollout; of an imagined return only the first one counts
    :param task: Task indices [B]
    :param noise: Random numbers
    :param prior_horizon: Imagined steps K
    :param discount: gamma of imagined steps, a number or [B, 1]
    :param episodic: Imagined steps end where the termination head says so
    :return: draws from the prior, [N, B, ...] or [K + 1, B, ...], and their values [N, B, 1] or [1, B, 1]
    """
    critics = model.critics.select(noise.prior_critics, detach=True)
    if prior_horizon > 0:
        draws = noise.prior[: prior_horizon + 1]
        sample, value = imagined_return(model, z[0], task, critics, draws, discount, episodic)
        return sample, value[None]
    sample = recomputed(model.recompute, model.prior_sample, z, noise.prior[: len(z)], task)
    return sample, model.value(z, sample.action, task, critics).mean(0)


@th.no_grad()
def update_prior_scale(model: WorldModel, values: th.Tensor, tau: float, ranks: Ranks = ALONE) -> None:
    """
    Move the running 5-95 percentile range of values towards a batch's.

    :param model: World model, changed in place
    :param values: Values in the first latents, any shape
    :param tau: Step; 0 leaves it
    :param ranks: Processes that share the batch
    """
    spread = percentile_range(ranks.gather(values.flatten()))
    model.prior_scale.lerp_(spread.clamp(min=1.0).reshape(1), tau)


def _distance_from_behaviour(actions: th.Tensor, batch: LatentBatch, imagined: bool) -> th.Tensor:
    """
    Squared distance of the prior's actions from those of the data, as in TD3+BC (Fujimoto and Gu, 2021).

    :param actions: The prior's actions along the rollout [H + 1, B, A]
    :param batch: Encoded batch
    :param imagined: Whether the rollout is imagined: only its first latents then have an action in the data
    :return: [H + 1, B, 1], zero beyond the last action; [1, B, 1] if imagined
    """
    known = 1 if imagined else len(batch.actions)
    distance = (actions[:known] - batch.actions[:known]).pow(2).sum(-1, keepdim=True) * batch.masks[:known]
    return distance if imagined else F.pad(distance, (0, 0, 0, 0, 0, 1))


def imagined_return(
    model: WorldModel,
    z: th.Tensor,
    task: th.Tensor | None,
    critics: Callable[[th.Tensor], th.Tensor],
    noise: th.Tensor,
    discount: float | th.Tensor,
    episodic: bool = False,
) -> tuple[PriorSample, th.Tensor]:
    """
    Unroll the prior in the model, with gradient: its actions, and predicted rewards plus the value where it arrives.

    :param model: World model
    :param z: Latents to start from [B, L]
    :param task: Task indices [B]
    :param critics: Critics asked at the end
    :param noise: Standard normal draws [K + 1, B, A]
    :param discount: gamma, a number or [B, 1]
    :param episodic: Steps end where the termination head says so
    :return: draws from the prior [K + 1, B, ...], returns [B, 1]
    """
    samples: list[PriorSample] = []
    inputs, weights, weight = [], [], th.ones_like(z[:, :1])
    for step, draws in enumerate(noise):
        samples.append(recomputed(model.recompute, model.prior_sample, z, draws, task))
        inputs.append(model.join(z, samples[-1].action, task))
        if step < len(noise) - 1:
            weights.append(weight)
            z, weight = recomputed(model.recompute, model.dynamics, inputs[-1]), weight * discount
            if episodic and model.termination is not None:
                weight = weight * (model.termination(model.join(z, None, task)) <= 0)
    rewards = model.two_hot.decode(recomputed(model.recompute, model.reward, th.stack(inputs[:-1])))
    value = model.two_hot.decode(critics(inputs[-1])).mean(0)
    stacked = PriorSample(*(th.stack(parts) for parts in zip(*samples, strict=True)))
    return stacked, (th.stack(weights) * rewards).sum(0) + weight * value


def percentile_range(x: th.Tensor, low: float = 0.05, high: float = 0.95) -> th.Tensor:
    """
    Distance between two quantiles, linearly interpolated, from one sort and without waiting for the device.

    :param x: [N]
    :param low: Lower quantile
    :param high: Upper quantile
    :return: Scalar
    """
    ordered = x.sort().values

    def quantile(q: float) -> th.Tensor:
        position = q * (len(x) - 1)
        below = int(position)
        return ordered[below].lerp(ordered[min(below + 1, len(x) - 1)], position - below)

    return quantile(high) - quantile(low)
