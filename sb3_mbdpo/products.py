"""Matrix products of the heads, and what goes with them, in the forms that are fast where they are computed."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mbdpo.hardware import on_accelerator

# Standard deviation of new weights
WEIGHT_STD = 0.02
# Matrix products of fewer rows than this take another path on CPUs, and round differently
MIN_ROWS = 8
# Numbers that matrix units of GPUs read at once, in bfloat16
ALIGNED = 8
# Added to variances by the norms of PyTorch
EPS = 1e-5


class Joined(NamedTuple):
    """
    What a head reads, in two parts: what several actions share is multiplied once, and for a part that wants no
    gradient none is computed.

    ``state`` is latent and task embedding [R..., S]; ``action`` [R..., A], or [K, R..., A] for K actions in each state.
    """

    state: th.Tensor
    action: th.Tensor

    def together(self) -> th.Tensor:
        """
        :return: The same in one piece [(K,) R..., S + A]
        """
        return th.cat([self.state.expand(*self.action.shape[:-1], -1), self.action], dim=-1)

    def rows(self) -> "Joined":
        """
        :return: The same with all leading dimensions as one: states [R, S], actions [R, A] or [K R, A]
        """
        return Joined(self.state.flatten(0, -2), self.action.flatten(0, -2))


Input = th.Tensor | Joined


def of_parts(head: Callable[..., th.Tensor], x: Joined) -> th.Tensor:
    """
    Call a head with its input in two parts where that is faster, and in one piece elsewhere: on a GPU, where a second
    product costs more than it saves; in mixed precision, which would round twice; and where hooks or functions of
    others expect one tensor.

    :param head: MLP, members of an ensemble, or any function of [..., in_dim]
    :param x: Its input
    :return: What it returns
    """
    device = x.action.device.type
    hooked = isinstance(head, nn.Module) and bool(head._forward_pre_hooks or head._forward_hooks)
    able = getattr(head, "reads_parts", False) and not hooked
    return head(x if able and device == "cpu" and not th.is_autocast_enabled(device) else x.together())


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


def linear(x: Input, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    A linear layer, of aligned widths where that pays.

    :param x: [..., in], or rows in two parts
    :param weight: [out, in]
    :param bias: [out]
    :return: [..., out]
    """
    if isinstance(x, Joined):
        width = x.state.shape[-1]
        shared = F.linear(x.state, weight[:, :width], bias)
        own = F.linear(x.action, weight[:, width:])
        return own.view(-1, *shared.shape).add_(shared).view(own.shape)
    inputs, outputs = (to_align(weight, -1), to_align(weight, -2)) if aligns(x) else (0, 0)
    if inputs == outputs == 0:
        return F.linear(x, weight, bias)
    weight = pad_end(pad_end(weight, inputs), outputs, -2)
    return F.linear(pad_end(x, inputs), weight, pad_end(bias, outputs))[..., : len(bias)]


def one_linear(x: Input, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    A linear layer of a single member of an ensemble.

    :param x: [R, in], or rows in two parts
    :param weight: [in, out]
    :param bias: [1, out]
    :return: [R, out]
    """
    if isinstance(x, Joined):
        width = x.state.shape[-1]
        return th.addmm(bias, x.state, weight[:width]).addmm_(x.action, weight[width:])
    return th.addmm(bias, x, weight)


def members_linear(x: Input, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    A linear layer of all members of an ensemble at once.

    :param x: [E, R, in]; rows in two parts are the same for all members
    :param weight: [E, in, out]
    :param bias: [E, 1, out]
    :return: [E, R, out]
    """
    if isinstance(x, Joined):
        width, count = x.state.shape[-1], len(weight)
        shared = th.baddbmm(bias, x.state.expand(count, -1, -1), weight[:, :width])
        return shared.baddbmm_(x.action.expand(count, -1, -1), weight[:, width:])
    # On a GPU, a bias within the product is first copied to each row
    return th.bmm(x, weight) + bias if on_accelerator(x) else th.baddbmm(bias, x, weight)


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
