"""Activations, in forms that are fast on CPUs too: Mish between the layers, SimNorm where latents are made."""

from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_mbdpo.hardware import on_accelerator

# Numbers in a vector register of PyTorch's kernels for this CPU, float32
VECTOR_WIDTH = 16 if "AVX512" in th.backends.cpu.get_cpu_capability() else 8


def _one_plus_square(q: th.Tensor) -> th.Tensor:
    """In one pass; a row of ones is read faster than a single one."""
    return th.addcmul(q.new_ones(q.shape[-1:]), q, q)


class _MishOfNegative(th.autograd.Function):
    """:func:`mish_of_negative` with its gradient in closed form, from the sigmoid of the forward pass."""

    @staticmethod
    def forward(ctx: Any, negative: th.Tensor) -> th.Tensor:
        q = negative.sigmoid()
        m = _one_plus_square(q)
        y = th.addcdiv(negative, negative, m, value=-2)
        ctx.save_for_backward(negative, q, m, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> th.Tensor:
        # dy/dx = 2 (1 - (1 - q) (y - x)) / m - 1; in place: fresh memory costs wide layers more than a pass
        negative, q, m, y = ctx.saved_tensors
        inner = negative + y
        inner.addcmul_(q, inner, value=-1)
        th.addcmul(grad, grad, inner, value=-1, out=inner)
        return th.addcdiv(grad, inner, m, value=-2, out=inner)


class Mish(nn.Module):
    """x tanh(softplus(x)), in a form that is fast on CPUs too, where PyTorch's kernel works number by number."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Any shape
        :return: Same shape
        """
        if on_accelerator(x):
            if not th.compiler.is_compiling():
                return F.mish(x)
            # As above, with a third of the exponentials that the compiler would write
            q = (-x).sigmoid()
            return 2 * x / (1 + q * q) - x
        return mish_of_negative(x.neg())


def reads_negative(activation: nn.Module, h: th.Tensor) -> bool:
    """
    Whether to hand -h to :func:`mish_of_negative` instead of h to an activation: Mish on CPUs, unless hooks watch it.
    The norm before it changes the sign by its gain and shift, two passes over all numbers less in training.

    :param activation: Activation
    :param h: What is normed before it
    :return: True if so
    """
    return type(activation) is Mish and not (
        on_accelerator(h) or activation._forward_hooks or activation._forward_pre_hooks
    )


def mish_of_negative(negative: th.Tensor) -> th.Tensor:
    """
    Mish from one sigmoid: with q = sigmoid(-x), tanh(softplus(x)) is 2 / (1 + q^2) - 1. Nothing in it overflows.

    :param negative: -x, any shape; may be overwritten
    :return: Mish of x, float32 where x is bfloat16: what sums and squares a sigmoid needs all of its digits
    """
    negative = negative.float() if negative.dtype == th.bfloat16 else negative
    if not (negative.requires_grad and th.is_grad_enabled()):
        q = negative.sigmoid()
        return negative.addcdiv_(negative, _one_plus_square(q), value=-2)
    result: th.Tensor = _MishOfNegative.apply(negative)
    return result


def normed(activation: nn.Module, h: th.Tensor, gain: th.Tensor, shift: th.Tensor, eps: float) -> th.Tensor:
    """
    LayerNorm, then an activation.

    :param activation: Activation
    :param h: [..., M]
    :param gain: [M]
    :param shift: [M]
    :param eps: Added to variances
    :return: [..., M]
    """
    if reads_negative(activation, h):
        return mish_of_negative(F.layer_norm(h, gain.shape, gain.neg(), shift.neg(), eps))
    activated: th.Tensor = activation(F.layer_norm(h, gain.shape, gain, shift, eps))
    return activated


def fast_softmax(x: th.Tensor) -> th.Tensor:
    """
    Softmax over a short last dimension, from reductions that run over many rows at once.

    :param x: [..., V]
    :return: Same shape
    """
    e = (x - x.amax(-1, keepdim=True)).exp_()
    return e.div_(e.sum(-1, keepdim=True))


class _FastSoftmax(th.autograd.Function):
    """:func:`fast_softmax` with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        y = fast_softmax(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> th.Tensor:
        (y,) = ctx.saved_tensors
        weighted = grad * y
        return weighted.addcmul_(y, weighted.sum(-1, keepdim=True), value=-1)


class SimNorm(nn.Module):
    """
    Simplicial normalisation: softmax over consecutive groups of units (TD-MPC2).

    In a form of its own where a group does not fill a vector register of the CPU: there PyTorch's kernel goes number by
    number.

    :param group_size: Units in a group (paper symbol V); the input width must be a multiple of it.
    """

    def __init__(self, group_size: int = 8):
        super().__init__()
        self.group_size = group_size

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [..., D]
        :return: [..., D], each group of ``group_size`` units sums to one
        """
        groups = (x.float() if x.dtype == th.bfloat16 else x).unflatten(-1, (-1, self.group_size))
        if on_accelerator(x) or self.group_size >= VECTOR_WIDTH:
            return groups.softmax(dim=-1).flatten(-2)
        if not (x.requires_grad and th.is_grad_enabled()):
            return fast_softmax(groups).flatten(-2)
        result: th.Tensor = _FastSoftmax.apply(groups)
        return result.flatten(-2)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"
