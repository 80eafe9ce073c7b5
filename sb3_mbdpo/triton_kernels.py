"""
Layers of a search as kernels for CUDA devices, written in Triton; imported where there is one only.

Between two matrix products a search does little arithmetic on many numbers, so that its time is that of reading and
writing them once, and, for one observation, that of starting a kernel. Each function here is what lies between two
products: the sum with what a row's candidates share, the norm and the activation, or what decodes outputs. All of them
compute in float32 and have no gradient.
"""

import torch as th
import triton
import triton.language as tl

# Rows of all heads up to which each has a program of its own; of more, two share one, and what it reads of weights
MOST_UNPAIRED = 4096
# Distributions that a program decodes
DECODED_ROWS = 4


def _warps(width: int) -> int:
    """Of a program, by the width of a row: within one warp, with sixteen numbers a thread, nothing waits."""
    return min(triton.next_power_of_2(triton.cdiv(width, 512)), 16)


@triton.jit
def _standardised(x, inside, WIDTH: tl.constexpr, eps):  # type: ignore[no-untyped-def]  # typed by Triton
    centred = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)


if isinstance(_standardised, triton.JITFunction) and th.version.hip is None:
    # Without the care for numbers next to zero, which is more instructions than all the rest of an activation

    @triton.jit
    def _power(x):  # type: ignore[no-untyped-def]
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _inverse(x):  # type: ignore[no-untyped-def]
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

else:
    # Triton's interpreter, for tests without a GPU, and other makers' GPUs do not know that assembly

    @triton.jit
    def _power(x):  # type: ignore[no-untyped-def]
        return tl.exp2(x)

    @triton.jit
    def _inverse(x):  # type: ignore[no-untyped-def]
        return 1.0 / x


LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _mish(x):  # type: ignore[no-untyped-def]
    # tanh(softplus(x)) is n / (n + 2) with n = e (e + 2) and e = exp(x), from 20 on 1 in float32
    e = _power(tl.minimum(x, 20.0) * LOG2_E)
    n = e * (e + 2.0)
    return x * n * _inverse(n + 2.0)


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    product_ptr, shared_ptr, head, row, rows, count, column, inside, WIDTH: tl.constexpr, PRODUCT: tl.constexpr
):
    place = (head * tl.cdiv(rows, count) + row // count) * WIDTH + column
    x = tl.load(shared_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if PRODUCT:
        place = (head.to(tl.int64) * rows + row) * WIDTH + column
        x += tl.load(product_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _written(  # type: ignore[no-untyped-def]
    y,
    out_ptr,
    read_weight_ptr,
    read_bias_ptr,
    read_ptr,
    head,
    row,
    rows,
    column,
    inside,
    WIDTH: tl.constexpr,
    READ: tl.constexpr,
):
    place = (head.to(tl.int64) * rows + row) * WIDTH + column
    if READ:
        if head == tl.num_programs(1) - 1:
            weight = tl.load(read_weight_ptr + column, mask=inside, other=0.0)
            tl.store(read_ptr + row, tl.sum(y * weight, axis=0) + tl.load(read_bias_ptr))
        else:
            tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normed_mish(  # type: ignore[no-untyped-def]
    product_ptr,
    moves_ptr,
    move_weight_ptr,
    shared_ptr,
    gain_ptr,
    shift_ptr,
    out_ptr,
    read_weight_ptr,
    read_bias_ptr,
    read_ptr,
    rows,
    count,
    move_stride,
    padded_moves,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PRODUCT: tl.constexpr,
    MOVES: tl.constexpr,
    READ: tl.constexpr,
):
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.program_id(0) * (2 if PAIRS else 1)
    # The second of two; beside a last row alone, the same once more
    row2 = tl.minimum(row + 1, rows - 1)
    x = _summed(product_ptr, shared_ptr, head, row, rows, count, column, inside, WIDTH, PRODUCT)
    if PAIRS:
        x2 = _summed(product_ptr, shared_ptr, head, row2, rows, count, column, inside, WIDTH, PRODUCT)
    for k in tl.static_range(MOVES):
        weight_ptr = move_weight_ptr + (head * padded_moves + k) * WIDTH
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        # Rounded as in the product that this stands for
        move = tl.load(moves_ptr + row.to(tl.int64) * move_stride + k).to(weight.dtype)
        x += move.to(tl.float32) * weight.to(tl.float32)
        if PAIRS:
            move = tl.load(moves_ptr + row2.to(tl.int64) * move_stride + k).to(weight.dtype)
            x2 += move.to(tl.float32) * weight.to(tl.float32)
    gain = tl.load(gain_ptr + head * WIDTH + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + head * WIDTH + column, mask=inside, other=0.0)
    y = _mish(_standardised(x, inside, WIDTH, eps) * gain + shift)
    _written(y, out_ptr, read_weight_ptr, read_bias_ptr, read_ptr, head, row, rows, column, inside, WIDTH, READ)
    if PAIRS:
        y = _mish(_standardised(x2, inside, WIDTH, eps) * gain + shift)
        _written(y, out_ptr, read_weight_ptr, read_bias_ptr, read_ptr, head, row2, rows, column, inside, WIDTH, READ)


@th.library.custom_op("sb3_mbdpo::normed_mish", mutates_args=())
def normed_mish(
    product: th.Tensor | None,
    shared: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    eps: float,
    moves: th.Tensor | None = None,
    step: int = 0,
    move_weight: th.Tensor | None = None,
    read_weight: th.Tensor | None = None,
    read_bias: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    A hidden layer of each of G heads: Mish of the layer norm of the sum of its product and of what candidates share.

    Actions are few numbers, so that in a first layer their product is part of this; so is, after the last layer, the
    output of a head that has one.

    :param product: [G, R, M]; None where all candidates of a row share it
    :param shared: What is added to all candidates of a row [G, S, M], to ``R / S`` of R in turn
    :param gain: Of the norm [G, M], float32
    :param shift: Of the norm [G, M], float32
    :param eps: Added to the variance
    :param moves: Actions of each candidate [R, H, A], float32, where the layer reads them beside ``product``
    :param step: Which of them
    :param move_weight: What reads them [G, at least A, M]
    :param read_weight: Output layer of the last head [M], float32, where it has one output
    :param read_bias: Its bias [1], float32
    :return: [G, R, M] in the type of ``shared``, and an empty tensor; with ``read_weight``, of the last head the
        outputs [R, 1] alone, float32, beside the others' [G - 1, R, M]
    """
    heads, share, width = shared.shape
    reads = read_weight is not None
    rows = _rows(product, moves)
    out = th.empty(heads - reads, rows, width, dtype=shared.dtype, device=shared.device)
    read = th.empty(rows if reads else 0, 1, dtype=th.float32, device=shared.device)
    shared, gain, shift = shared.contiguous(), gain.contiguous(), shift.contiguous()
    pairs = heads * rows > MOST_UNPAIRED
    _normed_mish[(triton.cdiv(rows, 2) if pairs else rows, heads)](
        shared if product is None else product.contiguous(),
        shared if moves is None else moves.contiguous()[:, step],
        shared if move_weight is None else move_weight.contiguous(),
        shared,
        gain,
        shift,
        out,
        gain if read_weight is None else read_weight.contiguous(),
        gain if read_bias is None else read_bias.contiguous(),
        read,
        rows,
        rows // share,
        0 if moves is None else moves.shape[1] * moves.shape[2],
        0 if move_weight is None else move_weight.shape[1],
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        PAIRS=pairs,
        PRODUCT=product is not None,
        MOVES=0 if moves is None else moves.shape[2],
        READ=reads,
        num_warps=_warps(width),
    )
    return out, read


@normed_mish.register_fake
def _(
    product: th.Tensor | None,
    shared: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    eps: float,
    moves: th.Tensor | None = None,
    step: int = 0,
    move_weight: th.Tensor | None = None,
    read_weight: th.Tensor | None = None,
    read_bias: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    heads, _, width = shared.shape
    reads, rows = read_weight is not None, _rows(product, moves)
    return shared.new_empty(heads - reads, rows, width), shared.new_empty(rows if reads else 0, 1, dtype=th.float32)


def _rows(product: th.Tensor | None, moves: th.Tensor | None) -> int:
    if product is not None:
        return product.shape[1]
    assert moves is not None
    return len(moves)


@triton.jit
def _simplicial_norm(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, gain_ptr, shift_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
    groups = tl.reshape(_standardised(x, inside, WIDTH, eps) * gain + shift, (BLOCK // GROUP, GROUP))
    powers = _power((groups - tl.max(groups, axis=1, keep_dims=True)) * LOG2_E)
    latents = tl.reshape(powers * _inverse(tl.sum(powers, axis=1, keep_dims=True)), (BLOCK,))
    tl.store(out_ptr + place, latents.to(out_ptr.dtype.element_ty), mask=inside)


@th.library.custom_op("sb3_mbdpo::simplicial_norm", mutates_args=())
def simplicial_norm(
    x: th.Tensor, bias: th.Tensor, gain: th.Tensor, shift: th.Tensor, group: int, eps: float
) -> th.Tensor:
    """
    Layer norm of ``x + bias``, then a softmax over groups of units: the end of the dynamics.

    :param x: Product of the last layer [R, L]
    :param bias: [L]
    :param gain: [L], float32
    :param shift: [L], float32
    :param group: Units in a group, a power of two that divides L
    :param eps: Added to the variance
    :return: [R, L] in the type of ``x``
    """
    rows, width = x.shape
    x, out = x.contiguous(), th.empty(rows, width, dtype=x.dtype, device=x.device)
    _simplicial_norm[(rows,)](
        x,
        bias.contiguous(),
        gain.contiguous(),
        shift.contiguous(),
        out,
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        GROUP=group,
        num_warps=_warps(width),
    )
    return out


@simplicial_norm.register_fake
def _(x: th.Tensor, bias: th.Tensor, gain: th.Tensor, shift: th.Tensor, group: int, eps: float) -> th.Tensor:
    return x.new_empty(x.shape)


@triton.jit
def _decoded(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    bins_ptr,
    out_ptr,
    rows,
    PADDED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    # What is beyond the last row is the last row once more
    index = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1)
    column = tl.arange(0, BLOCK)[None, :]
    # What is beyond the bins is read too, so that a thread reads eight numbers at once
    inside = column < PADDED
    place = head * rows + index
    x = tl.load(logits_ptr + place[:, None] * PADDED + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + head * PADDED + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(column < BINS, x, float("-inf"))
    powers = _power((x - tl.max(x, axis=1, keep_dims=True)) * LOG2_E)
    bins = tl.load(bins_ptr + column, mask=column < BINS, other=0.0)
    mean = tl.sum(powers * bins, axis=1) / tl.sum(powers, axis=1)
    size = tl.abs(mean)
    # Where exp(x) - 1 loses its digits, the series has them
    grown = tl.where(size < 0.05, size * (1 + size * (0.5 + size * (1 / 6 + size / 24))), tl.exp(size) - 1)
    tl.store(out_ptr + place, tl.where(mean < 0, -grown, grown))


@th.library.custom_op("sb3_mbdpo::decoded", mutates_args=())
def decoded(logits: th.Tensor, bias: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """
    Scalars of two-hot distributions, as :meth:`~sb3_mbdpo.two_hot.TwoHot.decode` has them.

    :param logits: Product of the output layers [G, R, at least V], of which V are read
    :param bias: Of the output layers [G, as many]
    :param bins: Bins in symlog space [V]
    :return: [G, R, 1], float32
    """
    heads, rows, padded = logits.shape
    out = th.empty(heads, rows, 1, dtype=th.float32, device=logits.device)
    _decoded[(triton.cdiv(rows, DECODED_ROWS), heads)](
        logits.contiguous(),
        bias.contiguous(),
        bins.contiguous(),
        out,
        rows,
        PADDED=padded,
        BINS=len(bins),
        BLOCK=triton.next_power_of_2(padded),
        ROWS=DECODED_ROWS,
        num_warps=1,
    )
    return out


@decoded.register_fake
def _(logits: th.Tensor, bias: th.Tensor, bins: th.Tensor) -> th.Tensor:
    return logits.new_empty(*logits.shape[:2], 1, dtype=th.float32)
