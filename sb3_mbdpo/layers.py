"""Layers shared by every head of the world model.

A hidden layer is Linear -> (Dropout) -> LayerNorm -> activation. The critics are an :class:`EnsembleMLP` instead.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch as th
from torch import nn

from sb3_mbdpo.activations import Mish, normed

# Where models pickled whole look for them
from sb3_mbdpo.activations import SimNorm as SimNorm
from sb3_mbdpo.blocks import in_blocks
from sb3_mbdpo.ensemble import EnsembleMLP as EnsembleMLP
from sb3_mbdpo.products import WEIGHT_STD, Input, Joined, linear


class Linear(nn.Linear):
    """An output layer; see :func:`linear`."""

    def forward(self, x: Input) -> th.Tensor:
        """
        :param x: [..., in], or rows in two parts
        :return: [..., out]
        """
        return linear(x, *_weight_and_bias(self))


class NormedLinear(nn.Module):
    """
    Linear -> LayerNorm -> activation.

    :param in_dim: Input width
    :param out_dim: Output width
    :param activation: Module applied last
    """

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module):
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.activation = activation

    def forward(self, x: Input) -> th.Tensor:
        """
        :param x: [..., in_dim], or rows in two parts
        :return: [..., out_dim]
        """
        # The functions instead of the modules: their calls are half of the cost of a small layer on a CPU
        return self.normalise(linear(x, *_weight_and_bias(self._modules["linear"])))

    def normalise(self, h: th.Tensor) -> th.Tensor:
        """
        What follows the linear layer.

        :param h: [..., out_dim]
        :return: [..., out_dim]
        """
        norm = cast(nn.LayerNorm, self._modules["norm"])
        return normed(self.activation, h, *_weight_and_bias(norm), norm.eps)


def _weight_and_bias(module: nn.Module | None) -> tuple[th.Tensor, th.Tensor]:
    """Taken where modules keep them: looking for an attribute takes a small layer as long as its norm."""
    layer = cast(nn.Linear | nn.LayerNorm, module)
    own = layer._parameters
    if "weight" in own and "bias" in own:
        return cast(th.Tensor, own["weight"]), cast(th.Tensor, own["bias"])
    # What is pruned or parametrized lies elsewhere
    return layer.weight, layer.bias


class MLP(nn.Sequential):
    """
    Layers one after the other.

    Forward hooks of the whole and of activations are called, those of layers are not. Activations see a block at a time
    where many rows come in blocks (:func:`~sb3_mbdpo.blocks.in_blocks`). A search, and the score network along several
    denoising steps, compute from the layers' parameters and call no head, nor its hooks.
    """

    reads_parts = True

    def forward(self, x: Input) -> th.Tensor:
        """
        :param x: [..., in], or in two parts
        :return: [..., out]
        """
        # Flattened once: each linear layer would, and back
        rows: Input
        if isinstance(x, Joined):
            lead, rows = x.action.shape[:-1], x.rows()
        else:
            lead, rows = x.shape[:-1], x.flatten(0, -2) if x.dim() > 2 else x
        if th.is_grad_enabled() or not lead:
            h = self._rows(rows)
        else:
            h = in_blocks(self._rows, rows, self._first_width())
        return h.unflatten(0, lead) if len(lead) > 1 else h

    def _rows(self, rows: Input) -> th.Tensor:
        for layer in self._modules.values():
            rows = layer.forward(rows)
        return cast(th.Tensor, rows)

    def _first_width(self) -> int:
        _, bias = _weight_and_bias(self[0].linear if isinstance(self[0], NormedLinear) else self[0])
        return len(bias)


def mlp(
    in_dim: int,
    hidden: Sequence[int],
    out_dim: int,
    out_activation: nn.Module | None = None,
    activation_fn: type[nn.Module] = Mish,
    zero_last: bool = False,
) -> MLP:
    """
    Multi-layer perceptron of normed hidden layers.

    :param in_dim: Input width
    :param hidden: Widths of the hidden layers
    :param out_dim: Output width
    :param out_activation: When given, the last layer is normed too and ends in it; otherwise it is a plain Linear
    :param activation_fn: Activation of the hidden layers
    :param zero_last: Start the last layer at zero, so that a new head predicts zero everywhere
    :return: [..., in_dim] -> [..., out_dim]
    """
    widths = [in_dim, *hidden]
    layers: list[nn.Module] = [NormedLinear(a, b, activation_fn()) for a, b in pairwise(widths)]
    last: nn.Module
    if out_activation is None:
        last = Linear(widths[-1], out_dim)
    else:
        last = NormedLinear(widths[-1], out_dim, out_activation)
    layers.append(last)
    net = MLP(*layers)
    net.apply(init_weights)
    if zero_last and isinstance(last, nn.Linear):
        nn.init.zeros_(last.weight)
    return net


def init_weights(module: nn.Module) -> None:
    """
    Truncated normal weights (std 0.02) and zero biases for linear layers, as TD-MPC2 does.

    :param module: Any module; those without a linear weight are left alone
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)
        nn.init.zeros_(module.bias)
