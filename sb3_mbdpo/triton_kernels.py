"""Kernels for CUDA devices, written in Triton; imported where there is one only.

The last layer of the dynamics ends in a norm over a row and a softmax over groups of eight. The compiler of the rest
needs three kernels for it, each of which reads and writes all latents; this does it in one, and appends the actions
that the next step reads beside them. In a search of one observation that is a tenth of all kernels.
"""

import torch as th
import triton
import triton.language as tl


@triton.jit
def _simplicial_norm(  # type: ignore[no-untyped-def]  # pointers and numbers, typed by Triton
    x_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    tail_ptr,
    out_ptr,
    x_stride,
    tail_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
    gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    groups = tl.reshape(centred * scale * gain + shift, (BLOCK // GROUP, GROUP))
    powers = tl.exp(groups - tl.max(groups, axis=1, keep_dims=True))
    latents = tl.reshape(powers / tl.sum(powers, axis=1, keep_dims=True), (BLOCK,))
    tl.store(out_ptr + row * out_stride + columns, latents.to(out_ptr.dtype.element_ty), mask=inside)
    if TAIL > 0:
        places = tl.arange(0, TAIL_BLOCK)
        present = places < TAIL
        tail = tl.load(tail_ptr + row * tail_stride + places, mask=present, other=0.0)
        tl.store(out_ptr + row * out_stride + WIDTH + places, tail.to(out_ptr.dtype.element_ty), mask=present)


@th.library.custom_op("sb3_mbdpo::simplicial_norm", mutates_args=())
def simplicial_norm(
    x: th.Tensor, bias: th.Tensor, gain: th.Tensor, shift: th.Tensor, tail: th.Tensor, group: int, eps: float
) -> th.Tensor:
    """
    Layer norm of ``x + bias``, then a softmax over groups of units, in float32; beside it, what else the next layer
    reads. Without gradient.

    :param x: [R, L], numbers of a row side by side
    :param bias: [L]
    :param gain: [L]
    :param shift: [L]
    :param tail: [R, T], numbers of a row side by side; T may be 0
    :param group: Units in a group, a power of two that divides L
    :param eps: Added to the variance
    :return: [R, L + T] in the type of ``x``
    """
    rows, width = x.shape
    more = tail.shape[1]
    out = th.empty(rows, width + more, dtype=x.dtype, device=x.device)
    _simplicial_norm[(rows,)](
        x,
        bias,
        gain,
        shift,
        tail,
        out,
        x.stride(0),
        tail.stride(0),
        out.stride(0),
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        GROUP=group,
        TAIL=more,
        TAIL_BLOCK=triton.next_power_of_2(max(more, 1)),
    )
    return out


@simplicial_norm.register_fake
def _(
    x: th.Tensor, bias: th.Tensor, gain: th.Tensor, shift: th.Tensor, tail: th.Tensor, group: int, eps: float
) -> th.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + tail.shape[1])
