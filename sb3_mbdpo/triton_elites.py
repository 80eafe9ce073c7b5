"""
The choice of a denoising step as a kernel for CUDA devices, written in Triton; imported where there is one only.

What is chosen and weighted are a few hundred returns, so that its time is that of starting kernels: this is one, where
sorting, spread and softmax would be three, at each of a search's denoising steps.
"""

import torch as th
import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def _kth_largest(keys, k):  # type: ignore[no-untyped-def]  # pointers and numbers, typed by Triton
    """Bit by bit from the highest: the largest number that at least k of the keys reach."""
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= k, 0, LOWEST)
    for i in range(31):
        higher = found + (1 << (30 - i))
        found = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= k, higher, found)
    return found


@triton.jit
def _elite_weights(  # type: ignore[no-untyped-def]
    values_ptr,
    weights_ptr,
    value_ptr,
    std_ptr,
    n_elites,
    temperature,
    min_std,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    inside = index < COUNT
    values = tl.load(values_ptr + batch * COUNT + index, mask=inside, other=0.0)
    # Whole numbers in the order of the values: negative floats grow with the rest of their bits
    bits = values.to(tl.int32, bitcast=True)
    keys = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    last = _kth_largest(keys, n_elites)
    better = keys > last
    equal = keys == last
    # Of equal ones, the first
    first = tl.cumsum(equal.to(tl.int32), axis=0) <= n_elites - tl.sum(better.to(tl.int32), axis=0)
    best = tl.max(tl.where(inside, values, float("-inf")), axis=0)
    relative = tl.where(inside, values - best, 0.0)
    centred = tl.where(inside, relative - tl.sum(relative, axis=0) / COUNT, 0.0)
    std = tl.sqrt(tl.sum(centred * centred, axis=0) / (COUNT - 1))
    scale = tl.where(std < min_std, 1.0, std) * temperature
    weights = tl.where(better | (equal & first), tl.exp(relative / scale), 0.0)
    weights /= tl.sum(weights, axis=0)
    tl.store(weights_ptr + batch * COUNT + index, weights, mask=inside)
    tl.store(value_ptr + batch, best + tl.sum(weights * relative, axis=0))
    tl.store(std_ptr + batch, std)


@th.library.custom_op("sb3_mbdpo::elite_weights", mutates_args=())
def elite_weights(
    values: th.Tensor, n_elites: int, temperature: float, min_std: float
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Weights of :func:`~sb3_mbdpo.search.combine_elites`, without gradient, in float32: the spread of returns is finite
    up to differences of 1e19.

    :param values: [B, N], float32, none of them NaN
    :param n_elites: How many of the best count
    :param temperature: Softmax temperature lambda
    :param min_std: Spread of the values below which they are not divided by it
    :return: weights [B, N], zero for all but the elites, weighted value [B], standard deviation of all values [B]
    """
    batch, count = values.shape
    weights = th.empty_like(values, memory_format=th.contiguous_format)
    value, std = (th.empty(batch, dtype=th.float32, device=values.device) for _ in range(2))
    block = triton.next_power_of_2(count)
    _elite_weights[(batch,)](
        values.contiguous(),
        weights,
        value,
        std,
        n_elites,
        temperature,
        min_std,
        COUNT=count,
        BLOCK=block,
        num_warps=max(block // 512, 1),
    )
    return weights, value, std


@elite_weights.register_fake
def _(values: th.Tensor, n_elites: int, temperature: float, min_std: float) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    return values.new_empty(values.shape), values.new_empty(len(values)), values.new_empty(len(values))
