"""Training of the score network: the diffusion policy that acts without search (arXiv 2605.26282).

The released loss (one state, one step, pure-noise inputs, unscaled targets, gradient into the encoder) does not train a
usable policy. Here many states take part in each update, their noised plans lie on the path that the score network
itself takes when it acts, the latents are detached, and the score error is weighted by (1 - alpha_bar)^2 / alpha_bar,
which makes it the squared error of the clean plan: of one size at every denoising step.
"""

import torch as th

from sb3_mbdpo.distributed import ALONE, Ranks
from sb3_mbdpo.evaluator import Evaluator
from sb3_mbdpo.hardware import recomputed
from sb3_mbdpo.search import SearchConfig, SearchNoise, combine_elites, favour_prior, prior_rollouts
from sb3_mbdpo.world_model import WorldModel


def score_loss(
    model: WorldModel,
    config: SearchConfig,
    z: th.Tensor,
    behaviour: th.Tensor,
    noise: SearchNoise,
    generator: th.Generator,
    task: th.Tensor | None = None,
    discount: th.Tensor | None = None,
    episodic: bool = False,
    ranks: Ranks = ALONE,
) -> th.Tensor:
    """
    Squared error between the score network's clean plan and the one that a denoising step of the search finds.

    :param model: World model with a score network
    :param config: Search that is distilled; its sample counts are those of the target
    :param z: Detached latents [B, L]
    :param behaviour: Actions executed from these latents on [B, H, A], warm starts for half of the rows
    :param noise: Candidate and prior noise of one denoising step, see :func:`~sb3_mbdpo.search.draw_noise`
    :param generator: Source of the denoising step of each row and of the cold starts
    :param task: Task indices [B]
    :param discount: Discount of each row [B, 1]
    :param episodic: Use the termination head
    :param ranks: Processes that share the latents
    :return: Scalar loss, gradient for the score network alone
    """
    assert model.score is not None
    condition = model.join(z, None, task).detach()
    x, tau, alpha_bar = own_path(model, config, condition, behaviour, generator, task, ranks)
    target = search_target(model, config, z, x, alpha_bar, noise, task, discount, episodic)
    prediction = recomputed(model.recompute, model.score.clean_plan, condition, x, tau, alpha_bar)
    mask = model.mask(task)
    error = prediction - target if mask is None else (prediction - target) * mask[:, None]
    return error.pow(2).mean()


@th.no_grad()
def own_path(
    model: WorldModel,
    config: SearchConfig,
    condition: th.Tensor,
    behaviour: th.Tensor,
    generator: th.Generator,
    task: th.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Noised plans where the score network arrives by itself, each row at a random denoising step.

    :param model: World model with a score network
    :param config: Search configuration (schedule)
    :param condition: Latents and task embeddings [B, C]
    :param behaviour: [B, H, A]
    :param generator: Source of steps and cold starts
    :param task: Task indices [B]
    :param ranks: Processes that share the latents: draws are for all of them, own rows are taken
    :return: x [B, H, A], tau [B], alpha_bar [B, 1, 1]
    """
    assert model.score is not None
    schedule, batch, device = config.schedule, len(condition), condition.device
    cold = ranks.rows(th.rand(batch * ranks.size, generator=generator, device=device) < 0.5)
    # Rows warm-start with what was executed; `start` shifts a previous plan, so give it one step more to shift away
    previous = th.cat([th.zeros_like(behaviour[:, :1]), behaviour[:, :-1]], dim=1)
    x = schedule.start(previous, cold)
    mask = model.mask(task)
    path = []
    for step in schedule.taus:
        path.append(x)
        plan = model.score.clean_plan(condition, x, step, schedule.alpha_bars[step])
        x = schedule.denoise(x, plan if mask is None else plan * mask[:, None], step)
    index = ranks.rows(th.randint(len(path), (batch * ranks.size,), generator=generator, device=device))
    tau = schedule.denoising_steps - 1 - index
    alpha_bar = schedule.alpha_bar_table(device)[tau][:, None, None]
    return th.stack(path)[index, th.arange(batch, device=device)], tau, alpha_bar


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
