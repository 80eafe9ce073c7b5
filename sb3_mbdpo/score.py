"""The score network s(z, a_tau, tau): the search distilled into a diffusion policy (arXiv 2605.26282)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch as th
from torch import nn

from sb3_mbdpo.activations import Mish
from sb3_mbdpo.hardware import on_accelerator
from sb3_mbdpo.layers import NormedLinear, mlp
from sb3_mbdpo.schedule import NoiseSchedule

if TYPE_CHECKING:
    from sb3_mbdpo.world_model import WorldModel

MAX_PERIOD = 10_000.0
# Denoising steps whose embedding is kept
TABLED_STEPS = 128


def timestep_embedding(tau: th.Tensor, dim: int) -> th.Tensor:
    """
    Sinusoidal embedding of the denoising step.

    :param tau: Steps [...]
    :param dim: Width, even
    :return: [..., dim], sines first
    """
    half = dim // 2
    exponents = th.arange(half, device=tau.device, dtype=th.float32) / max(half - 1, 1)
    angles = tau.float().unsqueeze(-1) * th.exp(-math.log(MAX_PERIOD) * exponents)
    return th.cat([angles.sin(), angles.cos()], dim=-1)


class ScoreNetwork(nn.Module):
    """
    Score of the noised plan distribution, as an MLP of latent, plan and denoising step.

    :param condition_dim: Width of latent plus task embedding
    :param action_dim: Actions A
    :param horizon: Plan length H
    :param hidden: Widths of the hidden layers
    :param time_embed_dim: Width of the embedding of tau
    :param activation_fn: Activation of the hidden layers
    :param prediction_type: "score": the output is the score itself (released checkpoints); "sample": it is the clean
        plan, from which the score follows. The score grows like 1 / (1 - alpha_bar), up to thousands at the last
        steps, while the plan stays in [-1, 1] at every step: only the second can be learned well.
    """

    step_embeddings: th.Tensor

    def __init__(
        self,
        condition_dim: int,
        action_dim: int,
        horizon: int,
        hidden: Sequence[int],
        time_embed_dim: int = 64,
        activation_fn: type[nn.Module] = Mish,
        prediction_type: str = "sample",
    ):
        super().__init__()
        if prediction_type not in ("sample", "score"):
            raise ValueError(f'score_prediction must be "sample" or "score", got {prediction_type!r}.')
        self.horizon, self.action_dim = horizon, action_dim
        self.time_embed_dim, self.prediction_type = time_embed_dim, prediction_type
        table = timestep_embedding(th.arange(TABLED_STEPS), time_embed_dim)
        # Not in the state_dict: it is the same for all models
        self.register_buffer("step_embeddings", table, persistent=False)
        self.net = mlp(
            condition_dim + horizon * action_dim + time_embed_dim, hidden, horizon * action_dim, None, activation_fn
        )

    def forward(self, condition: th.Tensor, x: th.Tensor, tau: th.Tensor | int) -> th.Tensor:
        """
        The network's raw output.

        :param condition: Latent and task embedding [..., C]
        :param x: Noised plans [..., H, A]
        :param tau: Denoising steps, int64, broadcastable to [...]; a number for one that all share
        :return: [..., H, A]
        """
        if isinstance(tau, int) and tau < TABLED_STEPS:
            time = self.step_embeddings[tau]
        else:
            tau = tau if isinstance(tau, th.Tensor) else th.full((), tau, device=x.device)
            time = timestep_embedding(tau, self.time_embed_dim)
        time = time.expand(*condition.shape[:-1], -1)
        out = self.net(th.cat([condition, x.flatten(-2), time], dim=-1))
        return out.unflatten(-1, (self.horizon, self.action_dim))

    def _embeddings(self, steps: int) -> th.Tensor:
        """Of steps 0 ... T - 1 [T, E]."""
        if steps <= TABLED_STEPS:
            return self.step_embeddings[:steps]
        table = timestep_embedding(th.arange(steps, device=self.step_embeddings.device), self.time_embed_dim)
        return table.to(self.step_embeddings.dtype)

    def along(self, condition: th.Tensor, steps: int) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        The network for several denoising steps from the same latents: on a CPU, what its first layer makes of them is
        computed once.

        :param condition: Latent and task embedding [B, C]
        :param steps: Denoising steps T of the schedule
        :return: function of noised plans [B, H, A] and their denoising step to the raw output [B, H, A]
        """
        if on_accelerator(condition):
            return lambda x, tau: self(condition, x, tau)
        first, *rest = cast(Iterable[nn.Module], self.net)
        assert isinstance(first, NormedLinear)
        plan_width = self.horizon * self.action_dim
        widths = [condition.shape[-1], plan_width, self.time_embed_dim]
        of_condition, of_plan, of_time = first.linear.weight.t().split(widths)
        shared = th.addmm(first.linear.bias, condition, of_condition)
        times = self._embeddings(steps) @ of_time

        def output(x: th.Tensor, tau: int) -> th.Tensor:
            h = first.normalise(th.addmm(shared + times[tau], x.flatten(1), of_plan))
            for layer in rest:
                h = layer.forward(h)
            return h.view_as(x)

        return output

    def clean_plan(
        self, condition: th.Tensor, x: th.Tensor, tau: th.Tensor | int, alpha_bar: th.Tensor | float
    ) -> th.Tensor:
        """
        The plan that the score points at: (x + (1 - alpha_bar) s) / sqrt(alpha_bar).

        :param condition: [..., C]
        :param x: [..., H, A]
        :param tau: Denoising steps
        :param alpha_bar: Cumulative product of the schedule at ``tau``, broadcastable to [..., 1, 1]
        :return: [..., H, A]
        """
        return self._clean(self(condition, x, tau), x, alpha_bar)

    def _clean(self, out: th.Tensor, x: th.Tensor, alpha_bar: th.Tensor | float) -> th.Tensor:
        if self.prediction_type == "sample":
            return out.tanh()
        return (x + (1 - alpha_bar) * out) / alpha_bar**0.5

    @th.no_grad()
    def denoise(
        self,
        schedule: NoiseSchedule,
        condition: th.Tensor,
        x: th.Tensor,
        mask: th.Tensor | None = None,
        steps: int | None = None,
    ) -> list[th.Tensor]:
        """
        Follow the score from the first noise level on.

        :param schedule: Noise schedule of T values
        :param condition: [B, C]
        :param x: Where to start [B, H, A]
        :param mask: 1 for the actions that a row has [B, A]
        :param steps: Denoising steps S to take; by default all T - 1, to the last noise level
        :return: The start and what each denoising step makes of it, S + 1 plans [B, H, A]
        """
        output, points = self.along(condition, schedule.denoising_steps), [x]
        for tau in schedule.taus[:steps]:
            plan = self._clean(output(points[-1], tau), points[-1], schedule.alpha_bars[tau])
            points.append(schedule.denoise(plan if mask is None else plan * mask[:, None], tau))
        return points


@th.no_grad()
def score_plan(
    model: "WorldModel",
    schedule: NoiseSchedule,
    z: th.Tensor,
    previous_plan: th.Tensor,
    restart: th.Tensor,
    task: th.Tensor | None = None,
) -> th.Tensor:
    """
    Denoise with the score network alone, without any search.

    :param model: World model with a score network
    :param schedule: Noise schedule
    :param z: Latents [B, L]
    :param previous_plan: Warm start [B, H, A]
    :param restart: Rows that start cold [B] bool
    :param task: Task indices [B]
    :return: Plans [B, H, A] in [-1, 1]
    :raises ValueError: if the model has no score network
    """
    if model.score is None:
        raise ValueError('This world model has no score network: act with act_mode="search" or "prior".')
    x = schedule.start(previous_plan, restart)
    return model.score.denoise(schedule, model.join(z, None, task), x, model.mask(task))[-1].clamp(-1, 1)
