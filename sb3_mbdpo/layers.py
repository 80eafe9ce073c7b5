"""Layers shared by every head of the world model.

A hidden layer is Linear -> (Dropout) -> LayerNorm -> activation. The critics live in one batched ensemble, so that
any number of them costs one matrix product per layer.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mbdpo.activations import Mish
from sb3_mbdpo.activations import SimNorm as SimNorm  # where models pickled whole look for it
from sb3_mbdpo.hardware import on_accelerator, recomputed

WEIGHT_STD = 0.02
# Matrix products of fewer rows than this take another path on CPUs, and round differently
MIN_ROWS = 8
# Numbers that matrix units of GPUs read at once, in bfloat16
ALIGNED = 8
# Added to variances by the norms of PyTorch
EPS = 1e-5


def to_align(x: th.Tensor, dim: int = -1) -> int:
    """
    :param x: Any tensor
    :param dim: One of its dimensions
    :return: What its width lacks to a multiple of eight
    """
    return -x.shape[dim] % ALIGNED


def pad_end(x: th.Tensor, missing: int, dim: int = -1) -> th.Tensor:
    """
    :param x: Any tensor
    :param missing: Zeros to append; none leaves the tensor as it is
    :param dim: Along which dimension, -1 or -2
    :return: The wider tensor
    """
    if missing == 0:
        return x
    return F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))


def aligns(x: th.Tensor) -> bool:
    """
    :param x: Input of a layer
    :return: Whether products are made of widths that are multiples of eight: where padding is part of other kernels
    """
    return on_accelerator(x) and th.compiler.is_compiling()


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    A linear layer, of aligned widths where that pays.

    :param x: [..., in]
    :param weight: [out, in]
    :param bias: [out]
    :return: [..., out]
    """
    inputs, outputs = (to_align(weight, -1), to_align(weight, -2)) if aligns(x) else (0, 0)
    if inputs == outputs == 0:
        return F.linear(x, weight, bias)
    weight = pad_end(pad_end(weight, inputs), outputs, -2)
    return F.linear(pad_end(x, inputs), weight, pad_end(bias, outputs))[..., : len(bias)]


def standardised(h: th.Tensor) -> th.Tensor:
    """
    LayerNorm without gain and shift.

    :param h: [..., M]
    :return: Same shape, each row of mean zero and variance one
    """
    width = h.shape[-1]
    if on_accelerator(h) or th.compiler.is_compiling():
        return F.layer_norm(h, (width,), eps=EPS)
    # Without a gain and a shift PyTorch's kernel for CPUs goes number by number
    return F.layer_norm(h, (width,), h.new_ones(width), h.new_zeros(width), EPS)


class Linear(nn.Linear):
    """An output layer; see :func:`linear`."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [..., in]
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

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [..., in_dim]
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
        h = F.layer_norm(h, norm.normalized_shape, *_weight_and_bias(norm), norm.eps)
        activated: th.Tensor = self.activation(h)
        return activated


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

    Forward hooks of the whole and of activations are called, those of layers are not. A search, and the score network
    along several denoising steps, compute from the layers' parameters and call no head, nor its hooks.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [..., in]
        :return: [..., out]
        """
        # Flattened once: each linear layer would, and back
        rows = x.flatten(0, -2) if x.dim() > 2 else x
        for layer in self._modules.values():
            rows = layer.forward(rows)
        return rows.unflatten(0, x.shape[:-1]) if x.dim() > 2 else rows


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


class EnsembleMLP(nn.Module):
    """
    E multi-layer perceptrons of one shape, evaluated together as batched matrix products.

    Dropout acts on the first layer only, on the units that :meth:`draw_dropout` chose: training is reproducible without
    touching the global random state. At a low rate, drawing the dropped units instead of a number for each is what
    makes dropout nearly free.

    :param n_members: Number of members E
    :param in_dim: Input width
    :param hidden: Widths of the hidden layers
    :param out_dim: Output width
    :param activation_fn: Activation of the hidden layers
    :param dropout: Dropout probability of the first layer
    """

    def __init__(
        self,
        n_members: int,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        activation_fn: type[nn.Module] = Mish,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.n_members = n_members
        self.dropout = dropout
        # Whether activations are computed again in the backward pass instead of being kept
        self.recompute = False
        self.activation = activation_fn()
        widths = [in_dim, *hidden, out_dim]
        pairs = list(pairwise(widths))
        self.weights = nn.ParameterList([nn.Parameter(th.empty(n_members, a, b)) for a, b in pairs])
        self.biases = nn.ParameterList([nn.Parameter(th.zeros(n_members, 1, b)) for _, b in pairs])
        self.norm_weights = nn.ParameterList([nn.Parameter(th.ones(n_members, 1, b)) for _, b in pairs[:-1]])
        self.norm_biases = nn.ParameterList([nn.Parameter(th.zeros(n_members, 1, b)) for _, b in pairs[:-1]])
        for weight in self.weights[:-1]:
            nn.init.trunc_normal_(weight, std=WEIGHT_STD)
        nn.init.zeros_(self.weights[-1])

    def select(self, members: th.Tensor, detach: bool = False) -> Callable[[th.Tensor], th.Tensor]:
        """
        Freeze a choice of members, so that who evaluates two of many pays for two.

        :param members: Indices of the members [K], int64; the choice is not read on the host
        :param detach: Leave the members' parameters out of the graph
        :return: Function [..., in_dim] -> [K, ..., out_dim], without dropout
        """
        layers = [tuple(t.detach() if detach else t for t in layer) for layer in self.layers(members)]
        return lambda x: self._apply_members(x, layers, None)

    @property
    def first_width(self) -> int:
        """Units of a member's first layer."""
        return self.weights[0].shape[-1]

    def draw_dropout(self, rows: int, generator: th.Generator) -> th.Tensor | None:
        """
        Choose the units that a pass in training drops: as many positions as are dropped on average.

        :param rows: Rows of the input
        :param generator: Source of the draws
        :return: Positions in the first layer's output, flattened; None where dropout does not act
        """
        if not self.training or self.dropout == 0:
            return None
        units = self.n_members * rows * self.first_width
        return th.randint(units, (round(self.dropout * units),), generator=generator, device=generator.device)

    def forward(self, x: th.Tensor, dropped: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: [..., in_dim]
        :param dropped: Units to drop, from :meth:`draw_dropout`
        :return: [E, ..., out_dim]
        """
        return self._apply_members(x, self.layers(), dropped)

    def layers(self, members: th.Tensor | None = None) -> list[tuple[th.Tensor, ...]]:
        """
        Parameters by layer, of all members or of a choice of them.

        :param members: Indices of the members [K], int64; the choice is not read on the host
        :return: weight [K, in, out] and bias [K, 1, out] of each layer, and of the hidden ones gain and shift of the
            norm [K, 1, out]
        """
        norms = [*zip(_all(self.norm_weights), _all(self.norm_biases), strict=True), ()]
        layers = [(w, b, *norm) for w, b, norm in zip(_all(self.weights), _all(self.biases), norms, strict=True)]
        if members is None or len(members) == self.n_members:
            return layers
        return [tuple(t.index_select(0, members) for t in layer) for layer in layers]

    def _apply_members(self, x: th.Tensor, layers: list[tuple[th.Tensor, ...]], dropped: th.Tensor | None) -> th.Tensor:
        lead, width = x.shape[:-1], layers[-1][1].shape[-1]
        if aligns(x):
            x, layers = _aligned(x, layers)
        h = x.reshape(1, -1, x.shape[-1]).expand(len(layers[0][0]), -1, -1)
        for i, layer in enumerate(layers[:-1]):
            # Layer by layer: all members side by side are more than half of what the losses keep
            h = recomputed(self.recompute, self._hidden, h, *layer, dropped if i == 0 else None)
        weight, bias = layers[-1]
        out = _members_linear(h, weight, bias)[..., :width]
        return out.view(len(out), *lead, width)

    def _hidden(
        self,
        h: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor,
        gain: th.Tensor,
        shift: th.Tensor,
        dropped: th.Tensor | None,
    ) -> th.Tensor:
        h = _members_linear(h, weight, bias)
        if dropped is not None:
            kept = th.full_like(h, 1 / (1 - self.dropout))
            h = h * kept.view(-1).index_fill_(0, dropped, 0.0).view_as(h)
        h = th.addcmul(shift, standardised(h), gain)
        activated: th.Tensor = self.activation(h)
        return activated


def _all(parameters: nn.ParameterList) -> Iterable[th.Tensor]:
    """The same as iterating, without a search for each of them."""
    return cast(Iterable[th.Tensor], parameters._parameters.values())


def _members_linear(h: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """[E, R, in] times [E, in, out] plus [E, 1, out]."""
    # On a GPU, a bias within the product is first copied to each row
    return th.bmm(h, weight) + bias if on_accelerator(h) else th.baddbmm(bias, h, weight)


def _aligned(x: th.Tensor, layers: list[tuple[th.Tensor, ...]]) -> tuple[th.Tensor, list[tuple[th.Tensor, ...]]]:
    """Input, first and last layer with widths that are multiples of eight."""
    (weight, *rest), (last_weight, last_bias) = layers[0], layers[-1]
    inputs, outputs = to_align(x), to_align(last_bias)
    first = (pad_end(weight, inputs, -2), *rest)
    return pad_end(x, inputs), [first, *layers[1:-1], (pad_end(last_weight, outputs), pad_end(last_bias, outputs))]
