"""Training of the score network: the diffusion policy that acts without search (arXiv 2605.26282).

The released loss (one state, one step, pure-noise inputs, unscaled targets, gradient into the encoder) does not train a
usable policy. Here many states take part in each update, their noised plans lie on the path that the score network
itself takes when it acts, the latents are detached, and the score error is weighted by (1 - alpha_bar)^2 / alpha_bar,
which makes it the squared error of the clean plan: of one size at every denoising step.
"""

from typing import NamedTuple

import torch as th

from sb3_mbdpo.evaluator import Evaluator
from sb3_mbdpo.hardware import recomputed
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.search import SearchNoise, combine_elites, favour_prior, prior_rollouts
from sb3_mbdpo.search_config import SearchConfig
from sb3_mbdpo.world_model import WorldModel


class PathDraws(NamedTuple):
    """
    Where on its path each of B rows is taken: ``cold`` [B] bool, rows without a warm start; ``tau`` [B] denoising
    steps, int64; ``alpha_bar`` [B, 1, 1] of the schedule there.
    """

    cold: th.Tensor
    tau: th.Tensor
    alpha_bar: th.Tensor


def draw_path(
    config: SearchConfig, batch: int, generator: th.Generator, device: th.device, ranks: Ranks = ALONE
) -> PathDraws:
    """
    :param config: Search configuration (schedule)
    :param batch: Own rows B
    :param generator: Source of steps and cold starts
    :param device: Where the rows are
    :param ranks: Processes that share the rows: draws are for all of them, own rows are taken
    :return: The draws
    """
    schedule, whole = config.schedule, batch * ranks.size
    cold = ranks.rows(th.rand(whole, generator=generator, device=device) < 0.5)
    index = ranks.rows(th.randint(len(schedule.taus), (whole,), generator=generator, device=device))
    tau = schedule.denoising_steps - 1 - index
    return PathDraws(cold, tau, schedule.alpha_bar_table(device)[tau][:, None, None])


def score_loss(
    model: WorldModel,
    config: SearchConfig,
    z: th.Tensor,
    behaviour: th.Tensor,
    noise: SearchNoise,
    path: PathDraws,
    task: th.Tensor | None = None,
    discount: th.Tensor | None = None,
    episodic: bool = False,
) -> th.Tensor:
    """
    Squared error between the score network's clean plan and the one that a denoising step of the search finds.

    :param model: World model with a score network
    :param config: Search that is distilled; its sample counts are those of the target
    :param z: Detached latents [B, L]
    :param behaviour: Actions executed from these latents on [B, H, A], warm starts for half of the rows
    :param noise: Candidate and prior noise of one denoising step, see :func:`~sb3_mbdpo.search.draw_noise`
    :param path: Denoising step and start of each row
    :param task: Task indices [B]
    :param discount: Discount of each row [B, 1]
    :param episodic: Use the termination head
    :return: Scalar loss, gradient for the score network alone
    """
    assert model.score is not None
    condition = model.join(z, None, task).detach()
    x = own_path(model, config, condition, behaviour, path, task)
    target = search_target(model, config, z, x, path.alpha_bar, noise, task, discount, episodic)
    prediction = recomputed(model.recompute, model.score.clean_plan, condition, x, path.tau, path.alpha_bar)
    mask = model.mask(task)
    error = prediction - target if mask is None else (prediction - target) * mask[:, None]
    return error.pow(2).mean()


@th.no_grad()
def own_path(
    model: WorldModel,
    config: SearchConfig,
    condition: th.Tensor,
    behaviour: th.Tensor,
    path: PathDraws,
    task: th.Tensor | None = None,
) -> th.Tensor:
    """
    Noised plans where the score network arrives by itself, each row at its own denoising step.

    :param model: World model with a score network
    :param config: Search configuration (schedule)
    :param condition: Latents and task embeddings [B, C]
    :param behaviour: [B, H, A]
    :param path: Denoising step and start of each row
    :param task: Task indices [B]
    :return: [B, H, A]
    """
    assert model.score is not None
    schedule = config.schedule
    # Rows warm-start with what was executed; `start` shifts a previous plan, so give it one step more to shift away
    previous = th.cat([th.zeros_like(behaviour[:, :1]), behaviour[:, :-1]], dim=1)
    # No row is at the end of the path: where the last step leads, nothing is to be denoised
    start, steps = schedule.start(previous, path.cold), len(schedule.taus) - 1
    points = model.score.denoise(schedule, condition, start, model.mask(task), steps)
    index = schedule.denoising_steps - 1 - path.tau
    return th.stack(points)[index, th.arange(len(condition), device=condition.device)]


@th.no_grad()
def search_target(
    model: WorldModel,
    config: SearchConfig,
    z: th.Tensor,
    x: th.Tensor,
    alpha_bar: th.Tensor,
    noise: SearchNoise,
    task: th.Tensor | None = None,
    discount: th.Tensor | None = None,
    episodic: bool = False,
) -> th.Tensor:
    """
    One denoising step of the search, each row at its own noise level.

    :param model: World model
    :param config: Search configuration
    :param z: [B, L]
    :param x: Noised plans [B, H, A]
    :param alpha_bar: [B, 1, 1]
    :param noise: Random numbers; the first step's candidates are used
    :param task: Task indices [B]
    :param discount: [B, 1]
    :param episodic: Use the termination head
    :return: Clean plans [B, H, A]
    """
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    plans = ((x / alpha_bar.sqrt())[:, None] + sigma[:, None] * noise.candidates[0]).clamp(-1, 1)
    plans = th.cat([prior_rollouts(model, z, noise.prior, task), plans], dim=1)
    mask = model.mask(task)
    plans = plans if mask is None else plans * mask[:, None, None]
    values = Evaluator(model, config, z, noise.critics, task, discount, episodic)(plans)
    values = favour_prior(model, config, values)
    return combine_elites(plans, values, config.n_elites, config.temperature)[0]
