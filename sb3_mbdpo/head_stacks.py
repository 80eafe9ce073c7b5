"""Heads of one input side by side, as a search evaluates them: each layer of all of them is one batched product.

The arithmetic is that of the modules, arranged: a first layer comes apart by what it reads, so that what all candidates
of a row share (the first latent, the task) is multiplied once. On accelerators widths are padded to multiples of eight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mbdpo.activations import Mish, mish_of_negative
from sb3_mbdpo.ensemble import EnsembleMLP
from sb3_mbdpo.hardware import on_accelerator, uses_kernels
from sb3_mbdpo.layers import NormedLinear
from sb3_mbdpo.products import EPS, MIN_ROWS, pad_end, standardised, to_align
from sb3_mbdpo.two_hot import TwoHot

# Weight [in, out] and bias [1, out]; a hidden layer also has gain and shift of its norm [1, out]
Layer = tuple[th.Tensor, ...]
# Actions up to which a GPU multiplies them within the kernel of a first layer
MOST_ACTIONS = 16


def head_layers(head: nn.Sequential) -> list[Layer]:
    """
    :param head: Hidden layers and an output layer, from :func:`~sb3_mbdpo.layers.mlp`
    :return: Its layers, as views; what follows the output layer's product is left to the caller
    """
    layers: list[Layer] = []
    for module in head:
        if isinstance(module, NormedLinear):
            linear, norm = module.linear, module.norm
            layers.append((linear.weight.t(), linear.bias[None], norm.weight[None], norm.bias[None]))
        else:
            layers.append((module.weight.t(), module.bias[None]))  # type: ignore[operator, index]
    return layers


def member_layers(ensemble: EnsembleMLP, members: th.Tensor) -> list[list[Layer]]:
    """
    :param ensemble: Ensemble of heads
    :param members: Indices of the members wanted [K]; they are not read on the host
    :return: Layers of each
    """
    layers = ensemble.layers(members)
    return [[tuple(tensor[k] for tensor in layer) for layer in layers] for k in range(len(members))]


class HeadStack(NamedTuple):
    """
    Heads of one input and the same hidden widths, evaluated together: each layer of all G is one batched product.
    Made by :func:`stack_heads`. Tensors of a single head have no leading dimension G.

    ``latent``, ``action`` and ``moving`` are parts of the first layer [(G,) in, M]: what reads the latent, the action,
    and both of them. ``shared`` is what it adds for all candidates of a row, bias and task [(G,) 1 or B, M]. ``norms``
    are gains and shifts, negative ones where ``negates``; ``products`` weights and biases of the other hidden layers,
    ``outputs`` those of each head, ``widths`` the numbers of its outputs; ``joint`` is the output layer of all heads
    where one product serves them. On accelerators, ``reading`` is the output layer of a last head with one output, as a
    kernel reads it [M], float32.
    """

    latent: th.Tensor
    action: th.Tensor
    moving: th.Tensor
    shared: th.Tensor
    norms: list[Layer]
    products: list[Layer]
    outputs: list[Layer]
    widths: list[int]
    joint: Layer | None
    reading: Layer | None
    activation: nn.Module
    negates: bool

    @property
    def dtype(self) -> th.dtype:
        """Type of the matrix products; norms and activations stay in float32."""
        return self.latent.dtype

    def start(self, z: th.Tensor) -> th.Tensor:
        """
        What candidates share that start from one latent.

        :param z: Latents [B, L]
        :return: [(G,) B, M]
        """
        return _few_rows(self.shared, z.to(self.dtype), self.latent)

    def hidden(
        self, shared: th.Tensor, z: th.Tensor | None, moves: th.Tensor | None = None, step: int = 0
    ) -> th.Tensor:
        """
        What the output layers read.

        :param shared: ``shared`` or what :meth:`start` gave, for R / S candidates of each of S rows [(G,) S, M]
        :param z: Latents [R, L]; None where they are part of ``shared``
        :param moves: Actions [R, H, A]; None for heads without
        :param step: Which of them
        :return: [(G,) R, M]
        """
        return self._layers(shared, z, moves, step)[0]

    def parts(self, shared: th.Tensor, z: th.Tensor | None, moves: th.Tensor, step: int) -> list[th.Tensor]:
        """
        What the output layer of each head reads [R, M]; of a last head that has one output, that output [R, 1].

        :param shared: As in :meth:`hidden`
        :param z: As in :meth:`hidden`
        :param moves: As in :meth:`hidden`
        :param step: As in :meth:`hidden`
        :return: One tensor for each head
        """
        h, output = self._layers(shared, z, moves, step, read=True)
        if output is not None:
            return [*h.unbind(), output]
        parts = self.each(h)
        if self.widths[-1] == 1:
            parts[-1] = self.output(len(parts) - 1, parts[-1])
        return parts

    def each(self, h: th.Tensor) -> list[th.Tensor]:
        """
        :param h: From :meth:`hidden`
        :return: Each head's part [R, M]
        """
        return [h] if h.dim() == 2 else list(h.unbind())

    def output(self, head: int, h: th.Tensor) -> th.Tensor:
        """
        :param head: Number of the head
        :param h: Its part of :meth:`hidden` [R, M]
        :return: Its output [R, out], float32
        """
        weight, bias = self.outputs[head]
        return _unpadded(_product(bias, h, weight), self.widths[head]).float()

    def read(self, head: int, part: th.Tensor, two_hot: TwoHot) -> th.Tensor:
        """
        :param head: Number of a head
        :param part: Its part, from :meth:`parts`
        :param two_hot: What decodes outputs that are distributions
        :return: Its outputs [R, out], float32; where a kernel decodes distributions, scalars [R, 1]
        """
        if self.widths[head] == 1:
            return part
        if not uses_kernels(part):
            return self.output(head, part)
        weight, bias = self.outputs[head]
        return _decoded((part @ weight)[None], bias, two_hot)[0]

    def scalars(self, h: th.Tensor, two_hot: TwoHot) -> th.Tensor:
        """
        :param h: From :meth:`hidden`
        :param two_hot: What decodes the outputs of all heads
        :return: Scalars of all heads [G, R, 1], float32
        """
        if self.joint is None:
            return two_hot.decode(th.stack([self.output(k, part) for k, part in enumerate(self.each(h))]))
        weight, bias = self.joint
        if uses_kernels(h):
            return _decoded(_multiplied(h, weight), bias.squeeze(1), two_hot)
        return two_hot.decode(_unpadded(_product(bias, h, weight), self.widths[0]).float())

    def _layers(
        self, shared: th.Tensor, z: th.Tensor | None, moves: th.Tensor | None, step: int, read: bool = False
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """All hidden layers; with ``read``, where a kernel can, the last head's only output instead of its part."""
        h, output = self._first(shared, z, moves, step), None
        for i, (weight, bias) in enumerate(self.products, 1):
            if self._fused(h):
                reading = self.reading if read and i == len(self.products) else None
                h, output = self._kernel(_multiplied(h, weight), bias, i, reading=reading)
            else:
                h = self._activate(_product(bias, h, weight), i)
        return h, output

    def _first(self, shared: th.Tensor, z: th.Tensor | None, moves: th.Tensor | None, step: int) -> th.Tensor:
        z = None if z is None else z.to(self.dtype)
        if self._fused(shared) and (moves is None or moves.shape[-1] <= MOST_ACTIONS):
            product = None if z is None else _multiplied(z, self.latent)
            return self._kernel(product, shared, 0, moves, step)[0]
        if moves is None:
            assert z is not None
            x, weight = z, self.latent
        else:
            move = moves[:, step].to(self.dtype)
            x, weight = (move, self.action) if z is None else (th.cat([z, move], dim=-1), self.moving)
        product = _product(_rows(shared, len(x)), pad_end(x, weight.shape[-2] - x.shape[-1]), weight)
        return self._activate(product, 0)

    def _kernel(
        self,
        product: th.Tensor | None,
        shared: th.Tensor,
        layer: int,
        moves: th.Tensor | None = None,
        step: int = 0,
        reading: Layer | None = None,
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """What follows the product of a hidden layer [(G,) R, M]; with ``reading``, of G - 1 heads and an output."""
        from sb3_mbdpo.triton_kernels import normed_mish

        gain, shift = (tensor.view(-1, tensor.shape[-1]) for tensor in self.norms[layer])
        weight = None if moves is None else _by_head(self.action)
        product = None if product is None else _by_head(product)
        h, output = normed_mish(product, _by_head(shared), gain, shift, EPS, moves, step, weight, *(reading or ()))
        if reading is not None:
            return h, output
        return (h if self.latent.dim() == 3 else h[0]), None

    def _activate(self, x: th.Tensor, layer: int) -> th.Tensor:
        gain, shift = self.norms[layer]
        x = x.float()
        if x.dim() == 2:
            x = F.layer_norm(x, x.shape[-1:], gain[0], shift[0], EPS)
        else:
            x = th.addcmul(shift, standardised(x), gain)
        activated: th.Tensor = mish_of_negative(x) if self.negates else self.activation(x)
        return activated.to(self.dtype)

    def _fused(self, x: th.Tensor) -> bool:
        return type(self.activation) is Mish and uses_kernels(x)


def stack_heads(
    heads: Sequence[list[Layer]], latent_dim: int, task: th.Tensor | None, activation: nn.Module, dtype: th.dtype
) -> HeadStack:
    """
    :param heads: Layers of each of the G heads, at least one of them hidden
    :param latent_dim: Latent width L
    :param task: Task embeddings [B, E], None without tasks
    :param activation: Activation of the hidden layers
    :param dtype: Type of the matrix products
    :return: The heads side by side; float32 weights of a single one are not copied
    """
    hidden = [_stack(layers) for layers in zip(*[head[:-1] for head in heads], strict=True)]
    first, bias = hidden[0][0].to(dtype), hidden[0][1].to(dtype)
    accelerated, several = on_accelerator(first), len(heads) > 1
    state_dim = latent_dim + (0 if task is None else task.shape[-1])
    latent, action = first[..., :latent_dim, :], first[..., state_dim:, :]
    missing = to_align(action, -2) if accelerated else 0
    action = pad_end(action, missing, -2)
    outputs = [_output(head[-1][0], head[-1][1], dtype) for head in heads]
    widths = [head[-1][1].shape[-1] for head in heads]
    joint = accelerated and several and len(set(widths)) == 1
    reading = accelerated and several and widths[-1] == 1
    negates = type(activation) is Mish and not accelerated
    return HeadStack(
        latent=latent,
        # Kernels read it row by row, at each denoising step
        action=action.contiguous() if accelerated else action,
        moving=th.cat([latent, action], -2) if missing or task is not None else first,
        shared=bias if task is None else _few_rows(bias, task.to(dtype), first[..., latent_dim:state_dim, :]),
        norms=[tuple(tensor.neg() for tensor in layer[2:]) if negates else layer[2:] for layer in hidden],
        products=[(weight.to(dtype), bias.to(dtype)) for weight, bias, _, _ in hidden[1:]],
        outputs=outputs,
        widths=widths,
        joint=_stack(outputs) if joint else None,
        reading=tuple(tensor[..., 0].float().contiguous() for tensor in outputs[-1]) if reading else None,
        activation=activation,
        negates=negates,
    )


def _decoded(product: th.Tensor, bias: th.Tensor, two_hot: TwoHot) -> th.Tensor:
    """Scalars [G, R, 1] of the products of output layers [G, R, V and more] and their biases [G, V and more]."""
    from sb3_mbdpo.triton_kernels import decoded

    return decoded(product, bias, two_hot.bins)


def _output(weight: th.Tensor, bias: th.Tensor, dtype: th.dtype) -> Layer:
    missing = to_align(weight) if on_accelerator(weight) else 0
    return pad_end(weight.to(dtype), missing), pad_end(bias.to(dtype), missing)


def _unpadded(x: th.Tensor, width: int) -> th.Tensor:
    # A view of all of it costs a small search as much as an addition
    return x if x.shape[-1] == width else x[..., :width]


def _stack(layers: Sequence[Layer]) -> Layer:
    return layers[0] if len(layers) == 1 else tuple(th.stack(tensors) for tensors in zip(*layers, strict=True))


def _rows(shared: th.Tensor, rows: int) -> th.Tensor:
    """What R / S candidates of each of S rows share, a row for each where there is more than one to share."""
    count = shared.shape[-2]
    return shared if count in (1, rows) else shared.repeat_interleave(rows // count, -2)


def _product(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """Bias plus [(G,) R, in] times [(G,) in, out]; all heads of a stack read an input that has no G."""
    if on_accelerator(x):
        # Compiled, the sum is part of what follows; within the product, a bias of all rows is first copied to each
        return _multiplied(x, weight) + bias
    if weight.dim() == 2:
        return th.addmm(bias, x, weight)
    return th.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


def _by_head(x: th.Tensor) -> th.Tensor:
    """[(G,) R, M] as [G, R, M]."""
    return x if x.dim() == 3 else x[None]


def _multiplied(x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    return x @ weight if weight.dim() == 2 else th.bmm(x.expand(len(weight), -1, -1), weight)


def _few_rows(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """:func:`_product` of few rows, repeated so that they round as they do among many."""
    rows = th.arange(max(len(x), MIN_ROWS), device=x.device) % len(x)
    bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
    return _product(bias, x[rows], weight)[..., : len(x), :].contiguous()
