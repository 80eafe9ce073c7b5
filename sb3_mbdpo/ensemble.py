"""The critics: several heads of one shape in one module, so that any number of them costs one product per layer."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch as th
from torch import nn

from sb3_mbdpo.activations import Mish, mish_of_negative, normed, reads_negative
from sb3_mbdpo.blocks import in_blocks
from sb3_mbdpo.hardware import on_accelerator, recomputed
from sb3_mbdpo.products import (
    EPS,
    WEIGHT_STD,
    Input,
    Joined,
    aligns,
    members_linear,
    one_linear,
    pad_end,
    standardised,
    to_align,
)

# Numbers in one member's layer from which the members of an ensemble take turns on a CPU: a batched product deals them
# out to the threads, of which some then wait, and one member's numbers stay in the cache from one product to the next
TURNS_FROM = 2**17


class EnsembleMLP(nn.Module):
    """
    E multi-layer perceptrons of one shape, evaluated together as batched matrix products; on a CPU one after the other
    where their layers are large.

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

    def select(self, members: th.Tensor, detach: bool = False) -> "Members":
        """
        Freeze a choice of members, so that who evaluates two of many pays for two.

        :param members: Indices of the members [K], int64; the choice is not read on the host
        :param detach: Leave the members' parameters out of the graph
        :return: Function [..., in_dim] -> [K, ..., out_dim], without dropout
        """
        layers = [tuple(t.detach() if detach else t for t in layer) for layer in self.layers(members)]
        return Members(self, layers)

    @property
    def first_width(self) -> int:
        """Units of a member's first layer."""
        return self.weights[0].shape[-1]

    def draw_dropout(self, rows: int, generator: th.Generator) -> th.Tensor | None:
        """
        Choose the units that a pass in training drops: as many draws, some of them alike, as drop the wanted share.

        :param rows: Rows of the input
        :param generator: Source of the draws
        :return: Positions in the first layer's output, flattened; None where dropout does not act
        """
        if not self.training or self.dropout == 0:
            return None
        units = self.n_members * rows * self.first_width
        draws = round(-math.log1p(-self.dropout) * units)
        return th.randint(units, (draws,), generator=generator, device=generator.device)

    def forward(self, x: Input, dropped: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: [..., in_dim], or in two parts
        :param dropped: Units to drop, from :meth:`draw_dropout`
        :return: [E, ..., out_dim]
        """
        return self.apply_members(x, self.layers(), dropped)

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

    def apply_members(
        self, x: Input, layers: list[tuple[th.Tensor, ...]], dropped: th.Tensor | None = None
    ) -> th.Tensor:
        """
        :param x: [..., in_dim], or in two parts
        :param layers: Parameters of some members, from :meth:`layers`
        :param dropped: Units to drop, from :meth:`draw_dropout`
        :return: [K, ..., out_dim]
        """
        lead = (x.action if isinstance(x, Joined) else x).shape[:-1]
        rows = x.rows() if isinstance(x, Joined) else x.reshape(-1, x.shape[-1])
        # An exported graph serves any number of rows, so that their number must not be asked for
        together = on_accelerator(layers[0][0]) or th.compiler.is_exporting()
        if together or lead.numel() * self.first_width < TURNS_FROM:
            out = self._side_by_side(rows, layers, dropped)
        elif dropped is None:
            out = in_blocks(lambda block: self._in_turn(block, layers, None), rows, self.first_width)
        else:
            out = self._in_turn(rows, layers, dropped)
        return out.view(len(out), *lead, out.shape[-1])

    def _side_by_side(self, x: Input, layers: list[tuple[th.Tensor, ...]], dropped: th.Tensor | None) -> th.Tensor:
        """All members in batched products, [R, in] to [K, R, out]."""
        width = layers[-1][1].shape[-1]
        if not isinstance(x, Joined):
            x, layers = _aligned(x, layers) if aligns(x) else (x, layers)
        h = x if isinstance(x, Joined) else x.expand(len(layers[0][0]), -1, -1)
        for i, layer in enumerate(layers[:-1]):
            # Layer by layer: all members side by side are more than half of what the losses keep
            h = recomputed(self.recompute, self._hidden, h, *layer, dropped if i == 0 else None)
        return members_linear(h, *layers[-1])[..., :width]

    def _in_turn(self, x: Input, layers: list[tuple[th.Tensor, ...]], dropped: th.Tensor | None) -> th.Tensor:
        """The same one member after the other."""
        kept: Sequence[th.Tensor | None] = [None] * len(layers[0][0])
        if dropped is not None:
            rows = len(x.action if isinstance(x, Joined) else x)
            flat = th.ones(len(kept) * rows * self.first_width, device=dropped.device).index_fill_(0, dropped, 0.0)
            kept = list(flat.view(-1, rows, self.first_width))
        by_layer = [zip(*(tensor.unbind() for tensor in layer), strict=True) for layer in layers]
        outputs = []
        for (*hidden, output), units in zip(zip(*by_layer, strict=True), kept, strict=True):
            h = x
            for i, layer in enumerate(hidden):
                h = recomputed(self.recompute, self._hidden_of_one, h, *layer, units if i == 0 else None)
            outputs.append(one_linear(h, *output))
        return th.stack(outputs)

    def _hidden_of_one(
        self,
        h: Input,
        weight: th.Tensor,
        bias: th.Tensor,
        gain: th.Tensor,
        shift: th.Tensor,
        kept: th.Tensor | None,
    ) -> th.Tensor:
        h, eps = one_linear(h, weight, bias), EPS
        if kept is not None:
            # What is kept is 1 / (1 - dropout) times as large, which matters to the norm's epsilon alone
            h, eps = h.mul_(kept), EPS * (1 - self.dropout) ** 2
        return normed(self.activation, h, gain[0], shift[0], eps)

    def _hidden(
        self,
        h: Input,
        weight: th.Tensor,
        bias: th.Tensor,
        gain: th.Tensor,
        shift: th.Tensor,
        dropped: th.Tensor | None,
    ) -> th.Tensor:
        h = members_linear(h, weight, bias)
        if dropped is not None:
            kept = th.full_like(h, 1 / (1 - self.dropout))
            h = h * kept.view(-1).index_fill_(0, dropped, 0.0).view_as(h)
        if reads_negative(self.activation, h):
            return mish_of_negative(th.addcmul(shift.neg(), standardised(h), gain.neg()))
        activated: th.Tensor = self.activation(th.addcmul(shift, standardised(h), gain))
        return activated


class Members:
    """
    A choice of an ensemble's members; their dropout does not act.

    :param ensemble: Ensemble
    :param layers: Their parameters, from :meth:`EnsembleMLP.layers`
    """

    reads_parts = True

    def __init__(self, ensemble: EnsembleMLP, layers: list[tuple[th.Tensor, ...]]):
        self.ensemble, self.layers = ensemble, layers

    def __call__(self, x: Input) -> th.Tensor:
        """
        :param x: [..., in_dim], or in two parts
        :return: [K, ..., out_dim]
        """
        return self.ensemble.apply_members(x, self.layers)


def _all(parameters: nn.ParameterList) -> Iterable[th.Tensor]:
    """The same as iterating, without a search for each of them."""
    return cast(Iterable[th.Tensor], parameters._parameters.values())


def _aligned(x: th.Tensor, layers: list[tuple[th.Tensor, ...]]) -> tuple[th.Tensor, list[tuple[th.Tensor, ...]]]:
    """Input, first and last layer with widths that are multiples of eight."""
    (weight, *rest), (last_weight, last_bias) = layers[0], layers[-1]
    inputs, outputs = to_align(x), to_align(last_bias)
    first = (pad_end(weight, inputs, -2), *rest)
    return pad_end(x, inputs), [first, *layers[1:-1], (pad_end(last_weight, outputs), pad_end(last_bias, outputs))]
