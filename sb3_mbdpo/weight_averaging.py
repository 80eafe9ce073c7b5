"""Acting with an average of the weights: steadier than what it is an average of, above all while little has been seen.

Diffusion policies act so (Chi et al., 2023, appendix A). Here what is averaged is the whole policy: latents, rewards,
values and plans that were learned together stay together.
"""

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAveraging(BaseCallback):
    """
    Collect, evaluate and end with an exponential moving average of the policy's weights; updates change the weights
    themselves.

    The average is in the policy's place from the start of each rollout to its end, where callbacks such as
    ``EvalCallback`` and ``CheckpointCallback`` see it, and when ``learn`` has ended: what is then saved, or learned on
    from, is the average. It begins at the weights that ``learn`` finds. Costs two copies of the weights in memory.

    :param decay: Share of the average that an update leaves (0 to 1, exclusive): 0.998 averages over the last 500
        updates, and leaves a seventh of what there was before 1000. More is steadier, and learns later. Updates done
        at once, such as those of a warm-up, count one by one
    :param verbose: See ``BaseCallback``
    :raises ValueError: if the decay is out of bounds
    """

    def __init__(self, decay: float = 0.998, verbose: int = 0):
        super().__init__(verbose)
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, exclusive, got {decay!r}; for example 0.998.")
        self.decay = decay
        self._parameters: list[th.Tensor] = []
        self._average: list[th.Tensor] = []
        self._weights: list[th.Tensor] = []
        self._averages_acts = False
        self._seen_updates = 0

    @th.no_grad()
    def _on_training_start(self) -> None:
        # Buffers stay with what learns: statistics are averages already, and flags cannot be averaged
        self._parameters = list(self.model.policy.parameters())
        self._average = [p.clone() for p in self._parameters]
        self._weights = [p.clone() for p in self._parameters]
        self._averages_acts, self._seen_updates = False, self._n_updates

    @property
    def _n_updates(self) -> int:
        return int(getattr(self.model, "_n_updates", 0))

    @th.no_grad()
    def _on_rollout_start(self) -> None:
        self._follow()
        th._foreach_copy_(self._weights, self._parameters)
        th._foreach_copy_(self._parameters, self._average)
        self._averages_acts = True

    @th.no_grad()
    def _on_rollout_end(self) -> None:
        th._foreach_copy_(self._parameters, self._weights)
        self._averages_acts = False

    def _on_step(self) -> bool:
        return True

    @th.no_grad()
    def _on_training_end(self) -> None:
        # A callback that stopped the training left in the middle of a rollout
        if not self._averages_acts:
            self._follow()
            th._foreach_copy_(self._parameters, self._average)
        self._average, self._weights, self._parameters = [], [], []

    def _follow(self) -> None:
        """Move the average by the updates since it was last moved."""
        count = self._n_updates - self._seen_updates
        self._seen_updates += count
        if count > 0:
            get_ema_multi_avg_fn(self.decay**count)(self._average, self._parameters, 0)
