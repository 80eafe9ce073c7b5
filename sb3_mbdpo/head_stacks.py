"""Heads of one input side by side, as a search evaluates them: each layer of all of them is one batched product.

The arithmetic is that of the modules, arranged: a first layer comes apart by what it reads, so that what all candidates
of a row share (the first latent, the task) is multiplied once. On accelerators widths are padded to multiples of eight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mbdpo.hardware import on_accelerator
from sb3_mbdpo.layers import MIN_ROWS, EnsembleMLP, NormedLinear, pad_end, to_align

# Weight [in, out] and bias [1, out]; a hidden layer also has gain and shift of its norm [1, out]
Layer = tuple[th.Tensor, ...]


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
    are gains and shifts, ``products`` weights and biases of the other hidden layers, ``outputs`` those of each head,
    ``widths`` the numbers of its outputs; ``joint`` is the output layer of all heads where one product serves them.
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
    activation: nn.Module

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

    def hidden(self, shared: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
        """
        What the output layers read.

        :param shared: ``shared`` or what :meth:`start` gave, a row for each of R or for all
        :param x: The other part of the input [R, in]
        :param weight: Its part of the first layer: ``moving``, ``action`` or ``latent``
        :return: [(G,) R, M]
        """
        x = pad_end(x, weight.shape[-2] - x.shape[-1])
        h = self._activate(_product(shared, x.to(self.dtype), weight), 0)
        for i, (product, bias) in enumerate(self.products):
            h = self._activate(_product(bias, h, product), i + 1)
        return h

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
        return _product(bias, h, weight)[:, : self.widths[head]].float()

    def all_outputs(self, h: th.Tensor) -> th.Tensor:
        """
        :param h: From :meth:`hidden`
        :return: Outputs of all heads, if they are as many of each [G, R, out], float32
        """
        if self.joint is None:
            return th.stack([self.output(k, part) for k, part in enumerate(self.each(h))])
        weight, bias = self.joint
        return _product(bias, h, weight)[..., : self.widths[0]].float()

    def _activate(self, x: th.Tensor, layer: int) -> th.Tensor:
        gain, shift = self.norms[layer]
        x = x.float()
        if x.dim() == 2:
            x = F.layer_norm(x, x.shape[-1:], gain[0], shift[0])
        else:
            x = th.addcmul(shift, F.layer_norm(x, x.shape[-1:]), gain)
        activated: th.Tensor = self.activation(x)
        return activated.to(self.dtype)


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
    state_dim = latent_dim + (0 if task is None else task.shape[-1])
    latent, action = first[..., :latent_dim, :], first[..., state_dim:, :]
    missing = to_align(action, -2) if on_accelerator(first) else 0
    action = pad_end(action, missing, -2)
    outputs = [_output(head[-1][0], head[-1][1], dtype) for head in heads]
    widths = [head[-1][1].shape[-1] for head in heads]
    alike = on_accelerator(first) and len(heads) > 1 and len(set(widths)) == 1
    return HeadStack(
        latent,
        action,
        th.cat([latent, action], -2) if missing or task is not None else first,
        bias if task is None else _few_rows(bias, task.to(dtype), first[..., latent_dim:state_dim, :]),
        [layer[2:] for layer in hidden],
        [(weight.to(dtype), bias.to(dtype)) for weight, bias, _, _ in hidden[1:]],
        outputs,
        widths,
        _stack(outputs) if alike else None,
        activation,
    )


def _output(weight: th.Tensor, bias: th.Tensor, dtype: th.dtype) -> Layer:
    missing = to_align(weight) if on_accelerator(weight) else 0
    return pad_end(weight.to(dtype), missing), pad_end(bias.to(dtype), missing)


def _stack(layers: Sequence[Layer]) -> Layer:
    return layers[0] if len(layers) == 1 else tuple(th.stack(tensors) for tensors in zip(*layers, strict=True))


def _product(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """Bias plus [(G,) R, in] times [(G,) in, out]; all heads of a stack read an input that has no G."""
    if on_accelerator(x):
        # Compiled, the sum is part of what follows; within the product, a bias of all rows is first copied to each
        product = x @ weight if weight.dim() == 2 else th.bmm(x.expand(len(weight), -1, -1), weight)
        return product + bias
    if weight.dim() == 2:
        return th.addmm(bias, x, weight)
    return th.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


def _few_rows(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """:func:`_product` of few rows, repeated so that they round as they do among many."""
    rows = th.arange(max(len(x), MIN_ROWS), device=x.device) % len(x)
    bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
    return _product(bias, x[rows], weight)[..., : len(x), :]
