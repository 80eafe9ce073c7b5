"""Budget of a diffusion search, and the ways to act that a policy has."""

import numbers
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch as th

from sb3_mbdpo.schedule import NoiseSchedule

ACT_MODES = ("search", "score", "prior")
# A unit of reward, as released, or the running range S of values
ENERGY_UNITS = ("reward", "value_range")
# Arguments of the algorithm that can be changed at any time, and that a search has under the same name
OF_SEARCH = (
    "n_samples",
    "n_elites",
    "n_prior_trajectories",
    "temperature",
    "energy_coef",
    "energy_unit",
    "prior_margin",
)


def check_act_mode(act_mode: str, with_score: bool) -> None:
    """
    :param act_mode: How to act
    :param with_score: Whether a score network is trained
    :raises ValueError: for an unknown mode, or "score" without a score network
    """
    if act_mode not in ACT_MODES:
        raise ValueError(f'act_mode must be "search", "score" or "prior", got {act_mode!r}.')
    if act_mode == "score" and not with_score:
        raise ValueError('act_mode="score" needs a trained score network: pass score_coef > 0.')


@dataclass(frozen=True)
class SearchConfig:
    """
    Budget and temperature of a search; see the arguments of ``MBDPO``.

    :param schedule: Noise schedule, T steps
    :param horizon: Plan length H in environment steps
    :param n_samples: Candidates N per denoising step
    :param n_elites: Candidates K that form the next plan
    :param n_prior_trajectories: Candidates M that are rollouts of the prior
    :param temperature: Temperature lambda of the softmax over normalised returns
    :param energy_coef: Weight eta of the energy in the return
    :param energy_unit: What the energy is weighted in, one of :data:`ENERGY_UNITS`
    :param prior_margin: Added to the returns of the prior's rollouts, in units of the value range S
    :param discount: Discount factor gamma
    :param warm_steps: Denoising steps of rows that continue a plan; None: all T - 1
    :param dtype: Type of the matrix products
    :param stacked: Evaluate heads of one input as one batched product; None: everywhere but for wide heads on a CPU
    """

    schedule: NoiseSchedule
    horizon: int = 3
    n_samples: int = 512
    n_elites: int = 64
    n_prior_trajectories: int = 24
    temperature: float = 0.5
    energy_coef: float = 0.01
    discount: float = 0.99
    warm_steps: int | None = None
    dtype: th.dtype = th.float32
    stacked: bool | None = None
    prior_margin: float = 0.0
    energy_unit: str = "reward"

    def __post_init__(self) -> None:
        if self.energy_unit not in ENERGY_UNITS:
            raise ValueError(f'energy_unit must be "reward" or "value_range", got {self.energy_unit!r}.')
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1 environment step, got {self.horizon}.")
        if self.n_samples < 2:
            raise ValueError(f"n_samples must be at least 2, got {self.n_samples}.")
        if not 1 <= self.n_elites <= self.n_samples:
            raise ValueError(f"n_elites must be between 1 and n_samples ({self.n_samples}), got {self.n_elites}.")
        if not 0 <= self.n_prior_trajectories < self.n_samples:
            raise ValueError(
                f"n_prior_trajectories must be between 0 and n_samples - 1 ({self.n_samples - 1}), "
                f"got {self.n_prior_trajectories}."
            )
        steps = self.schedule.denoising_steps - 1
        if self.warm_steps is not None and not (isinstance(self.warm_steps, int) and 1 <= self.warm_steps <= steps):
            raise ValueError(
                f"warm_denoising_steps must be a whole number between 1 and denoising_steps - 1 ({steps}), "
                f"or a share between 0 and 1, got {self.warm_steps!r}."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    def arguments(self) -> dict[str, Any]:
        """
        :return: Arguments of a policy that searches in this way, those that may have changed since it was built
        """
        own = {name: getattr(self, name) for name in (*OF_SEARCH, "discount")}
        return own | {"warm_denoising_steps": self.warm_steps}


def warm_steps_of(given: int | float | None, denoising_steps: int) -> int | None:
    """
    :param given: Denoising steps of decisions that continue a plan: a number of them, or below 1 a share
    :param denoising_steps: Length T of the schedule
    :return: Their number, at least 1 where it was a share; what is neither is left for :class:`SearchConfig` to refuse

    >>> warm_steps_of(0.5, 5), warm_steps_of(0.5, 20), warm_steps_of(0.5, 2), warm_steps_of(3, 5)
    (2, 10, 1, 3)
    """
    if isinstance(given, numbers.Real) and 0 < given < 1:
        return max(round(float(given) * (denoising_steps - 1)), 1)
    return int(given) if isinstance(given, np.integer) else cast(int | None, given)


def with_samples(config: SearchConfig, n_samples: int) -> SearchConfig:
    """
    The same search with another number of candidates; elites and prior rollouts keep their share.

    :param config: Search configuration
    :param n_samples: Candidates per denoising step
    :return: New configuration
    """
    share = n_samples / config.n_samples
    n_elites = max(round(config.n_elites * share), 1)
    return replace(
        config, n_samples=n_samples, n_elites=n_elites, n_prior_trajectories=int(config.n_prior_trajectories * share)
    )
