"""Acting with an average of the weights: steadier than what it is an average of, above all while little has been seen.

Diffusion policies act so (Chi et al., 2023). Here all networks are averaged alike, so that latents, rewards, values and
plans that were learned together stay together.
"""

from typing import TYPE_CHECKING, cast

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO


class WeightAveraging(BaseCallback):
    """
    Collect, evaluate and end with an exponential moving average of MBDPO's weights; updates change the weights
    themselves.

    The average begins at the weights that ``learn`` finds and moves with every update. It is in the policy's place from
    the start of each rollout to its end, where callbacks such as ``EvalCallback`` and ``CheckpointCallback`` see it,
    and when learning has ended: what is then saved, or learned on from, is the average, so that resuming is not exact.
    ``learn_offline`` has no rollouts: there it comes at the end. List it before other callbacks. Costs two copies of
    the weights in memory. After an exception, :meth:`on_training_end` puts the average in place.

    :param decay: Share of the average that an update leaves (0 to 1, exclusive): 0.998 averages over the last 500
        updates. More is steadier, and learns later
    :param verbose: See ``BaseCallback``
    :raises ValueError: if the decay is out of bounds; when learning starts, if the algorithm is another one, several
        processes learn together, or there are two of these
    """

    def __init__(self, decay: float = 0.998, verbose: int = 0):
        super().__init__(verbose)
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, exclusive, got {decay!r}; for example 0.998.")
        self.decay = decay
        self._move = get_ema_multi_avg_fn(decay)
        self._parameters: list[th.Tensor] = []
        self._average: list[th.Tensor] = []
        self._weights: list[th.Tensor] = []
        self._average_acts = False

    @th.no_grad()
    def _on_training_start(self) -> None:
        model = self._followed_model()
        # Buffers stay with what learns: statistics are averages already, and flags cannot be averaged
        self._parameters = list(model.policy.parameters())
        self._average = [p.clone() for p in self._parameters]
        self._weights = [p.clone() for p in self._parameters]
        self._average_acts = False
        model._after_update = self._follow

    def _followed_model(self) -> "MBDPO":
        if not hasattr(self.model, "_after_update"):
            raise ValueError(f"WeightAveraging follows the updates of MBDPO, not those of {type(self.model).__name__}.")
        model = cast("MBDPO", self.model)
        if model._after_update is not None:
            raise ValueError("One WeightAveraging at a time averages a model's weights: leave the other one out.")
        if model.learner.ranks.size > 1:
            raise ValueError("WeightAveraging is for one process: leave it out when several learn together.")
        return model

    def _follow(self) -> None:
        self._move(self._average, self._parameters, 0)

    @th.no_grad()
    def _on_rollout_start(self) -> None:
        th._foreach_copy_(self._weights, self._parameters)
        th._foreach_copy_(self._parameters, self._average)
        self._average_acts = True

    @th.no_grad()
    def _on_rollout_end(self) -> None:
        th._foreach_copy_(self._parameters, self._weights)
        self._average_acts = False

    def _on_step(self) -> bool:
        return True

    @th.no_grad()
    def _on_training_end(self) -> None:
        if not self._parameters:
            # The RL Zoo ends its first callback twice
            return
        if not self._average_acts:
            th._foreach_copy_(self._parameters, self._average)
        self._parameters, self._average, self._weights = [], [], []
        cast("MBDPO", self.model)._after_update = None
