"""Diffusion search: model-based denoising of action sequences, batched over observations (arXiv 2605.26282).

Verified against the released planner with its noise and prior draws fixed (tests/test_golden.py). Different on purpose:
a whole batch of observations is searched at once; prior rollouts and their values are computed once per search instead
of once per denoising step (they start from the same latent); only the two critics in use are evaluated; values beyond
the horizon follow the mode of the prior instead of a sample.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th

from sb3_mbdpo.evaluator import Evaluator
from sb3_mbdpo.hardware import on_accelerator, uses_kernels
from sb3_mbdpo.search_config import SearchConfig
from sb3_mbdpo.world_model import WorldModel

# The seed of the candidates when acting deterministically: a constant, so that plans are a function of the weights
DETERMINISTIC_SEED = 0
MIN_STD = 1e-4
# Candidates of a row up to which one program of a GPU has all of them at hand
MOST_CANDIDATES = 4096


class SearchResult(NamedTuple):
    """
    Outcome of a search.

    ``plan`` [B, H, A] in [-1, 1]; ``value`` [B] weighted return of the last step's elites; ``value_std`` [B] spread of
    the return over the last step's candidates. Returns count the energy and the prior's margin.
    """

    plan: th.Tensor
    value: th.Tensor
    value_std: th.Tensor


class SearchStep(NamedTuple):
    """
    One denoising step as it was taken, scaled actions: ``sigma`` spread of the noise, ``centre`` [B, H, A] around which
    it was laid, ``candidates`` [B, N, H, A] with the prior's rollouts first, ``returns`` [B, N], ``plan`` [B, H, A] the
    weighted mean of the elites.
    """

    sigma: float
    centre: th.Tensor
    candidates: th.Tensor
    returns: th.Tensor
    plan: th.Tensor


class SearchNoise(NamedTuple):
    """
    Every random number of a search: ``candidates`` [T - 1, N - M, H, A] or [T - 1, B, N - M, H, A], ``prior``
    [H, M, A] or [H, B, M, A], and ``critics`` [2], the indices of the critics averaged beyond the horizon.
    """

    candidates: th.Tensor
    prior: th.Tensor
    critics: th.Tensor


def draw_noise(
    config: SearchConfig,
    model: WorldModel,
    generator: th.Generator,
    batch_size: int | None,
    device: th.device,
    steps: int | None = None,
) -> SearchNoise:
    """
    Draw the random numbers of one search.

    :param config: Search configuration
    :param model: World model (action width, number of critics)
    :param generator: Source of all draws
    :param batch_size: Rows that get draws of their own; None draws one set that all rows share, whatever their number
    :param device: Where the noise goes
    :param steps: Denoising steps to draw for, by default all T - 1
    :return: The noise
    """
    rows = () if batch_size is None else (batch_size,)
    steps = config.schedule.denoising_steps - 1 if steps is None else steps
    horizon, width = config.horizon, model.action_dim
    n_prior = config.n_prior_trajectories

    def normal(*shape: int) -> th.Tensor:
        return th.randn(shape, generator=generator, device=generator.device).to(device)

    return SearchNoise(
        normal(steps, *rows, config.n_samples - n_prior, horizon, width),
        normal(horizon, *rows, n_prior, width),
        random_pair(model.n_critics, generator).to(device),
    )


def random_pair(n_critics: int, generator: th.Generator) -> th.Tensor:
    """
    Two different critics out of all, drawn where the generator lives.

    :param n_critics: Number of critics
    :param generator: Source of the draw
    :return: Indices [2]
    """
    return th.randperm(n_critics, generator=generator, device=generator.device)[:2]


def prior_rollouts(model: WorldModel, z: th.Tensor, noise: th.Tensor, task: th.Tensor | None = None) -> th.Tensor:
    """
    Plans that the prior proposes, by rolling it through the dynamics.

    :param model: World model
    :param z: [B, L]
    :param noise: Standard normal draws [H, M, A] or [H, B, M, A]
    :param task: Task indices [B]
    :return: [B, M, H, A]
    """
    horizon, n_prior = noise.shape[0], noise.shape[-2]
    task = None if task is None else task[:, None]
    z = z[:, None].expand(-1, n_prior, -1)
    actions = []
    for t in range(horizon):
        actions.append(model.prior_action(z, noise[t], task))
        if t < horizon - 1:
            z = model.next(z, actions[-1], task)
    return th.stack(actions, dim=2)


@th.no_grad()
def search(
    model: WorldModel,
    config: SearchConfig,
    z: th.Tensor,
    previous_plan: th.Tensor,
    restart: th.Tensor,
    noise: SearchNoise,
    task: th.Tensor | None = None,
    discount: th.Tensor | None = None,
    episodic: bool = False,
    trace: list[SearchStep] | None = None,
    all_warm: bool = False,
    prepare: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> SearchResult:
    """
    Denoise a plan for each latent. Rows never see each other.

    :param model: World model
    :param config: Budget, temperature and schedule
    :param z: Latents [B, L]
    :param previous_plan: Plans of the previous decision, the warm start [B, H, A]
    :param restart: Rows at an episode's first step [B] bool: their previous plan is ignored
    :param noise: Random numbers, see :func:`draw_noise`
    :param task: Task indices [B] of multi-task models
    :param discount: Discount of each row [B, 1], by default ``config.discount``
    :param episodic: Use the termination head
    :param trace: When given, each denoising step is appended to it
    :param all_warm: Whether it is known that no row restarts: with ``warm_steps`` the steps before are then left out,
        of which nothing would remain
    :param prepare: Applied to the functions that do the work, such as :func:`denoising_step`, before they are called:
        what compiles them, for example
    :return: Plans and statistics
    """
    roll_out, improve = prepare(prior_rollouts), prepare(denoising_step)
    evaluator = Evaluator(model, config, z, noise.critics, task, discount, episodic, prepare)
    mask = model.mask(task)
    mask = None if mask is None else mask[:, None, None]
    rounded = on_accelerator(z) and config.dtype != th.float32
    with th.autocast(z.device.type, config.dtype if rounded else th.bfloat16, enabled=rounded):
        prior_plans = roll_out(model, z, noise.prior, task)
    prior_plans = prior_plans if mask is None else prior_plans * mask
    prior_values: th.Tensor | None = None
    schedule, warm = config.schedule, config.warm_steps or config.schedule.taus[0]
    centre = warm_start = schedule.warm_start(previous_plan, restart)
    # Of all steps at once
    sigmas = schedule.sigma_table(z.device).view(-1, *[1] * (noise.candidates.dim() - 1))
    deviations = sigmas * noise.candidates
    for i, tau in enumerate(schedule.taus):
        if all_warm and tau > warm:
            continue
        if tau == warm < schedule.taus[0] and not all_warm:
            centre = th.where(restart[:, None, None], centre, warm_start)
        plans, values, best = improve(evaluator, centre, deviations[i], prior_plans, prior_values, mask)
        # The prior's plans stay what they are, and so do their returns
        prior_values = values[:, : config.n_prior_trajectories]
        if trace is not None:
            trace.append(SearchStep(schedule.sigma(tau), centre, plans, values, best.plan))
        # Denoising scales the plan by the root of the next alpha_bar, by which the next step would divide it
        centre = best.plan
    return best._replace(plan=schedule.denoise(centre, schedule.taus[-1]).clamp(-1, 1))


def denoising_step(
    evaluator: Evaluator,
    centre: th.Tensor,
    deviations: th.Tensor,
    prior_plans: th.Tensor,
    prior_values: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor, SearchResult]:
    """
    Lay candidates around a plan, evaluate them beside the prior's, and combine the best.

    :param evaluator: What evaluates plans
    :param centre: Plan in the middle of the candidates [B, H, A]
    :param deviations: Of the candidates from it [N - M, H, A] or [B, N - M, H, A]
    :param prior_plans: Plans of the prior [B, M, H, A]
    :param prior_values: Their returns [B, M] where they are known already
    :param mask: 1 for the actions that a row's task has [B, 1, 1, A]
    :return: candidates [B, N, H, A] with the prior's first, their returns [B, N], and the weighted mean of the elites
    """
    model, config = evaluator.model, evaluator.config
    sampled = (centre[:, None] + deviations).clamp(-1, 1)
    sampled = sampled if mask is None else sampled * mask
    plans = th.cat([prior_plans, sampled], dim=1)
    if prior_values is None:
        values = favour_prior(model, config, evaluator(plans))
    else:
        values = th.cat([prior_values, evaluator(sampled)], dim=1)
    return plans, values, SearchResult(*combine_elites(plans, values, config.n_elites, config.temperature))


def favour_prior(model: WorldModel, config: SearchConfig, values: th.Tensor) -> th.Tensor:
    """
    Ask of a plan that it beats the prior's by a margin.

    Values err by a few hundredths of their range. Where waiting looks as good as acting, a search that plans anew at
    each step waits forever; the prior, which is one policy for all steps, does not.

    :param model: World model, for its value range S
    :param config: Search configuration
    :param values: Returns [B, N], the prior's rollouts first
    :return: Returns, the prior's raised by ``prior_margin`` times S
    """
    if config.prior_margin == 0:
        return values
    prior, others = values.tensor_split([config.n_prior_trajectories], dim=1)
    return th.cat([prior + config.prior_margin * model.prior_scale, others], dim=1)


def combine_elites(
    plans: th.Tensor, values: th.Tensor, n_elites: int, temperature: float
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Weighted mean of the best candidates: softmax of their normalised returns (paper's Monte-Carlo score estimate).

    :param plans: [B, N, H, A]
    :param values: [B, N]
    :param n_elites: How many of the best count
    :param temperature: Softmax temperature lambda
    :return: mean plan [B, H, A], weighted value [B], standard deviation of all values [B]
    """
    if uses_kernels(values) and values.shape[1] <= MOST_CANDIDATES:
        from sb3_mbdpo.triton_elites import elite_weights

        weights, value, std = elite_weights(values, n_elites, temperature, MIN_STD)
        share = weights[:, :, None, None]
        # Who is not chosen may be anything, NaN too
        return th.where(share > 0, share * plans, 0.0).sum(1), value, std
    elite_values, elites = _largest(values, n_elites)
    # Relative to the best, in double precision: close returns of a large value would else be told apart by their
    # rounding, which changes with the number of rows. MPS has no doubles.
    best = elite_values[:, :1]
    relative = values - best
    relative = relative if values.device.type == "mps" else relative.double()
    std = relative.std(1, keepdim=True).to(values.dtype)
    scale = th.where(std < MIN_STD, 1.0, std) * temperature
    weights = ((elite_values - best) / scale).softmax(dim=1)
    elite_plans = plans.gather(1, elites[:, :, None, None].expand(-1, -1, *plans.shape[2:]))
    return (weights[:, :, None, None] * elite_plans).sum(1), (weights * elite_values).sum(1), std.squeeze(1)


def _largest(values: th.Tensor, count: int) -> tuple[th.Tensor, th.Tensor]:
    """The largest of each row in order, and where they are [B, K]."""
    if not on_accelerator(values):
        return values.topk(count, dim=1)
    # As few as there are, a GPU sorts all of them in less time than it selects some
    ordered, places = values.sort(dim=1, descending=True)
    return ordered[:, :count], places[:, :count]
