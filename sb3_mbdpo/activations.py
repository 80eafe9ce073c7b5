"""Activations, in forms that are fast on CPUs too: Mish between the layers, SimNorm where latents are made."""

from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_mbdpo.hardware import on_accelerator

# Numbers in a vector register of PyTorch's kernels for this CPU, float32
VECTOR_WIDTH = 16 if "AVX512" in th.backends.cpu.get_cpu_capability() else 8


def fast_mish(x: th.Tensor) -> th.Tensor:
    """
    Mish from one sigmoid: with q = sigmoid(-x), tanh(softplus(x)) is 2 / (1 + q^2) - 1. Nothing in it overflows.

    :param x: Any shape
    :return: Same shape
    """
    return mish_of_negative_(x.neg())


def mish_of_negative_(negative: th.Tensor) -> th.Tensor:
    """
    Mish of -x, without gradient: a norm before it can change the sign for nothing, which saves a pass over all numbers.

    :param negative: -x, any shape; overwritten
    :return: Mish of x
    """
    q = negative.sigmoid()
    return negative.addcdiv_(negative, _one_plus_square(q), value=-2)


def _one_plus_square(q: th.Tensor) -> th.Tensor:
    """In one pass; a row of ones is read faster than a single one."""
    return th.addcmul(q.new_ones(q.shape[-1:]), q, q)


class _FastMish(th.autograd.Function):
    """:func:`fast_mish` with its gradient in closed form, from the sigmoid of the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        negative = x.neg()
        q = negative.sigmoid()
        m = _one_plus_square(q)
        y = th.addcdiv(negative, negative, m, value=-2)
        ctx.save_for_backward(negative, q, m, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> th.Tensor:
        # y' = 2 (1 - (1 - q) (y - x)) / m - 1; in place: fresh memory costs wide layers more than a pass
        negative, q, m, y = ctx.saved_tensors
        inner = negative + y
        inner.addcmul_(q, inner, value=-1)
        th.addcmul(grad, grad, inner, value=-1, out=inner)
        return th.addcdiv(grad, inner, m, value=-2, out=inner).neg_()


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
        # In mixed precision: what sums and squares a sigmoid needs all of its digits
        x = x.float() if x.dtype == th.bfloat16 else x
        if not (x.requires_grad and th.is_grad_enabled()):
            return fast_mish(x)
        result: th.Tensor = _FastMish.apply(x)
        return result


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
