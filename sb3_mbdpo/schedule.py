"""Noise schedule of the diffusion over plans (arXiv 2605.26282)."""

import math
from dataclasses import dataclass, field
from functools import cache

import torch as th
from torch.nn import functional as F


@dataclass(frozen=True)
class NoiseSchedule:
    """
    Linear schedule: beta_i from ``beta_start`` to ``beta_end`` in T values, alpha = 1 - beta, alpha_bar its
    cumulative product.

    The numbers are kept as Python floats, so that using them never waits for a device.

    :param denoising_steps: Length T of the schedule, at least 2; a search takes T - 1 denoising steps
    :param beta_start: First (least noisy) beta
    :param beta_end: Last (noisiest) beta; it sets how widely the first denoising step looks around the warm start
    """

    denoising_steps: int
    beta_start: float
    beta_end: float
    alphas: tuple[float, ...] = field(init=False, repr=False, compare=False)
    alpha_bars: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.denoising_steps < 2:
            raise ValueError(f"denoising_steps must be at least 2 (T - 1 steps are taken), got {self.denoising_steps}.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "The noise schedule needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start}, beta_end={self.beta_end}."
            )
        # In float32 like the released code: 1 - alpha_bar loses digits there, and parity needs the same loss
        alphas = 1 - th.linspace(self.beta_start, self.beta_end, self.denoising_steps, device="cpu")
        object.__setattr__(self, "alphas", tuple(alphas.tolist()))
        object.__setattr__(self, "alpha_bars", tuple(alphas.cumprod(0).tolist()))

    @cache  # noqa: B019 (a schedule is three numbers, by which it hashes; there are few of them)
    def alpha_bar_table(self, device: th.device) -> th.Tensor:
        """
        :param device: Where the table lives
        :return: ``alpha_bars`` as a tensor [T], made once per device
        """
        return th.tensor(self.alpha_bars, device=device)

    @cache  # noqa: B019 (as above)
    def sigma_table(self, device: th.device) -> th.Tensor:
        """
        :param device: Where the table lives
        :return: ``sigma`` of each denoising step in the order taken [T - 1], made once per device
        """
        return th.tensor([self.sigma(tau) for tau in self.taus], device=device)

    def sigma(self, tau: int) -> float:
        """
        Spread of the candidate plans at a step.

        :param tau: Denoising step
        :return: sqrt((1 - alpha_bar) / alpha_bar), in units of the scaled action
        """
        return math.sqrt((1 - self.alpha_bars[tau]) / self.alpha_bars[tau])

    @property
    def taus(self) -> range:
        """Denoising steps in the order taken: T - 1 ... 1."""
        return range(self.denoising_steps - 1, 0, -1)

    @staticmethod
    def warm_start(previous_plan: th.Tensor, restart: th.Tensor) -> th.Tensor:
        """
        The previous plan shifted by one step; zeros at an episode start.

        :param previous_plan: [B, H, A]
        :param restart: [B] bool, rows that start cold
        :return: Plan in the middle of the first candidates [B, H, A]
        """
        shifted = F.pad(previous_plan[:, 1:], (0, 0, 0, 1))
        return shifted.masked_fill(restart[:, None, None], 0.0)

    def start(self, previous_plan: th.Tensor, restart: th.Tensor) -> th.Tensor:
        """
        Warm start, scaled to the first noise level.

        :param previous_plan: [B, H, A]
        :param restart: [B] bool, rows that start cold
        :return: x at T - 1, [B, H, A]
        """
        return math.sqrt(self.alpha_bars[-1]) * self.warm_start(previous_plan, restart)

    def denoise(self, clean_plan: th.Tensor, tau: int) -> th.Tensor:
        """
        One step of denoising along the score (sqrt(alpha_bar) * clean_plan - x) / (1 - alpha_bar).

        With this score the step (x + (1 - alpha_bar) * score) / sqrt(alpha) keeps nothing of x, so it is written
        without the cancelling terms.

        :param clean_plan: Estimate of the noise-free plan [..., H, A]
        :param tau: Denoising step
        :return: Noised plans at ``tau - 1``
        """
        return clean_plan * math.sqrt(self.alpha_bars[tau] / self.alphas[tau])
