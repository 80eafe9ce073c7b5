"""Floating-point operations that MBDPO cannot do without: matrix products, counted from the shapes of the layers."""

from torch import nn

from sb3_mbdpo import MBDPO
from sb3_mbdpo.ensemble import EnsembleMLP
from sb3_mbdpo.policies import MBDPOPolicy


def row_flops(module: nn.Module | None) -> int:
    """
    Multiplications and additions of a head's matrix products for one row; of one member, for an ensemble.

    :param module: A stack of linear layers; None costs nothing
    :return: Operations
    """
    if module is None:
        return 0
    if isinstance(module, EnsembleMLP):
        return sum(2 * weight.shape[1] * weight.shape[2] for weight in module.weights)
    return sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def search_flops(policy: MBDPOPolicy, batch: int) -> int:
    """
    One search: T - 1 evaluations of the N - M sampled plans, one of the M plans of the prior and their rollouts.

    :param policy: Policy
    :param batch: Observations B
    :return: Operations
    """
    model, config = policy.world_model, policy.search_config
    horizon, n_prior = config.horizon, config.n_prior_trajectories
    steps = config.schedule.denoising_steps - 1
    step = row_flops(model.dynamics) + row_flops(model.reward)
    step += row_flops(model.energy) if config.energy_coef else 0
    step += row_flops(model.termination) if policy.episodic else 0
    # Beyond the horizon: the mode of the prior, and two critics
    plan = horizon * step + row_flops(model.prior) + 2 * row_flops(model.critics)
    rollouts = n_prior * (horizon * row_flops(model.prior) + (horizon - 1) * row_flops(model.dynamics))
    plans = steps * (config.n_samples - n_prior) + n_prior
    return batch * (row_flops(model.encoder) + rollouts + plans * plan)


def update_flops(algorithm: MBDPO, batch: int) -> int:
    """
    One update, averaged over the intervals of prior, energy and score network. A layer that learns costs three times
    its forward pass, one that only passes a gradient on twice.

    :param algorithm: MBDPO on vectors
    :param batch: Windows B
    :return: Operations
    """
    policy, model = algorithm.policy, algorithm.policy.world_model
    horizon, members = policy.search_config.horizon, model.n_critics
    rows, latents = horizon * batch, (horizon + 1) * batch
    encoder, dynamics, reward = (row_flops(head) for head in (model.encoder, model.dynamics, model.reward))
    critic, prior, energy, score = (row_flops(head) for head in (model.critics, model.prior, model.energy, model.score))
    total = 3 * batch * encoder + rows * encoder
    total += rows * _target_flops(algorithm)
    total += 3 * rows * (dynamics + reward + members * critic)
    if model.energy is not None and algorithm.energy_loss_coef > 0:
        # The prior's proposal, three negatives to choose from, two actions to learn from
        total += rows * (prior + 3 * energy + 2 * 3 * energy) // int(algorithm.energy_interval)
    if policy.episodic:
        total += 3 * rows * row_flops(model.termination)
    total += latents * (3 * prior + 2 * 2 * critic) // int(algorithm.policy_delay)
    if score:
        total += _score_flops(algorithm, batch) // int(algorithm.score_interval)
    return total


def _target_flops(algorithm: MBDPO) -> int:
    """Targets of one row."""
    model, config = algorithm.policy.world_model, algorithm.policy.search_config
    ahead = int(algorithm.target_horizon)
    total = ahead * (row_flops(model.dynamics) + row_flops(model.reward)) + 2 * row_flops(model.critics)
    if algorithm.bootstrap == "prior":
        return total + (ahead + 1) * row_flops(model.prior)
    plans = -(-(ahead + 1) // config.horizon)
    return total + plans * (config.schedule.denoising_steps - 1) * row_flops(model.score)


def _score_flops(algorithm: MBDPO, batch: int) -> int:
    """One update of the score network."""
    model, config = algorithm.policy.world_model, algorithm.learner.score_config
    latents = min(int(algorithm.score_batch_size), batch)
    step = row_flops(model.dynamics) + row_flops(model.reward) + (row_flops(model.energy) if config.energy_coef else 0)
    plan = config.horizon * step + row_flops(model.prior) + 2 * row_flops(model.critics)
    n_prior = config.n_prior_trajectories
    rollouts = n_prior * (config.horizon * row_flops(model.prior) + (config.horizon - 1) * row_flops(model.dynamics))
    path = (config.schedule.denoising_steps - 2) * row_flops(model.score)
    return latents * (path + config.n_samples * plan + rollouts + 3 * row_flops(model.score))
