"""Regression by classification: scalars as two-hot distributions over symlog bins (DreamerV3; TD-MPC2)."""

import torch as th
from torch import nn
from torch.nn import functional as F


def symlog(x: th.Tensor) -> th.Tensor:
    """
    Symmetric logarithm: sign(x) ln(1 + |x|).

    :param x: Any shape
    :return: Same shape
    """
    return th.sign(x) * th.log1p(x.abs())


def symexp(x: th.Tensor) -> th.Tensor:
    """
    Inverse of :func:`symlog`: sign(x) (exp(|x|) - 1).

    :param x: Any shape
    :return: Same shape
    """
    return th.sign(x) * th.expm1(x.abs())


class TwoHot(nn.Module):
    """
    Encode scalars as two-hot targets, decode logits to scalars, and measure the cross-entropy between them.

    :param num_bins: Number of bins, at least 2
    :param vmin: Lowest bin, in symlog space
    :param vmax: Highest bin, in symlog space
    """

    bins: th.Tensor

    def __init__(self, num_bins: int = 101, vmin: float = -10.0, vmax: float = 10.0):
        super().__init__()
        if num_bins < 2 or vmin >= vmax:
            raise ValueError(f"TwoHot needs num_bins >= 2 and vmin < vmax, got num_bins={num_bins}, [{vmin}, {vmax}].")
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax
        # Not in the state_dict: it follows from the three numbers above
        self.register_buffer("bins", th.linspace(vmin, vmax, num_bins), persistent=False)

    def _locate(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param x: [..., 1] scalars
        :return: index of the lower bin [..., 1] (int64) and weight of the upper one [..., 1]
        """
        position = (symlog(x).clamp(self.vmin, self.vmax) - self.vmin) * ((self.num_bins - 1) / (self.vmax - self.vmin))
        # NaN is given a bin, so that it shows as a NaN loss instead of as an index out of bounds
        lower = position.floor().clamp(max=self.num_bins - 2).nan_to_num(0.0)
        return lower.long(), position - lower

    def beyond(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Scalars of any shape
        :return: Share of them that lie beyond the bins, where all are the same
        """
        squashed = symlog(x)
        return ((squashed < self.vmin) | (squashed > self.vmax)).float().mean()

    def encode(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [..., 1] scalars
        :return: [..., num_bins] two-hot distributions
        """
        lower, upper_weight = self._locate(x)
        target = x.new_zeros(*x.shape[:-1], self.num_bins)
        return target.scatter(-1, lower, 1 - upper_weight).scatter(-1, lower + 1, upper_weight)

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: [..., num_bins]
        :return: [..., 1] scalars
        """
        probabilities = logits.float().softmax(dim=-1)
        if th.is_autocast_enabled(logits.device.type):
            # A matrix product would be rounded
            return symexp((probabilities * self.bins).sum(-1, keepdim=True))
        return symexp((probabilities @ self.bins).unsqueeze(-1))

    def cross_entropy(self, logits: th.Tensor, target: th.Tensor) -> th.Tensor:
        """
        Cross-entropy of the two-hot target; only its two non-zero bins are read.

        :param logits: [..., num_bins]
        :param target: [..., 1] scalars
        :return: [..., 1]
        """
        lower, upper_weight = self._locate(target)
        log_probs = F.log_softmax(logits.float(), dim=-1)
        bins, weights = th.cat([lower, lower + 1], dim=-1), th.cat([1 - upper_weight, upper_weight], dim=-1)
        return -(log_probs.gather(-1, bins) * weights).sum(-1, keepdim=True)
