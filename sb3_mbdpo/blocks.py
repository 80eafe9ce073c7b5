"""Many rows in blocks: what one layer writes is then still in a CPU's cache when the next one reads it."""

from collections.abc import Callable

import torch as th

from sb3_mbdpo.hardware import on_accelerator
from sb3_mbdpo.products import Input, Joined

# Numbers of a layer that a block may have: two megabytes
BLOCK_NUMBERS = 2**19


def block_count(x: th.Tensor, rows: int, width: int) -> int:
    """
    In how many blocks rows are computed: one where gradients are wanted, for which everything is kept anyway, on
    accelerators, and in what is compiled or exported.

    :param x: Any tensor of the computation
    :param rows: Rows
    :param width: Numbers of a row in a layer
    :return: At least 1
    """
    if th.is_grad_enabled() or on_accelerator(x) or th.compiler.is_compiling() or th.compiler.is_exporting():
        # Nothing is asked about the rows: an exported graph serves any number of them
        return 1
    return max(1, -(-rows * width // BLOCK_NUMBERS))


def in_blocks(function: Callable[[Input], th.Tensor], x: Input, width: int) -> th.Tensor:
    """
    A function of rows, called with a block of them at a time. Blocks are of nearly one size, so that none has too few
    rows to be rounded as the others.

    :param function: Function of rows [R, in] to [..., R, out]; of rows in two parts with K actions in each of R states
        to [..., K R, out]
    :param x: Its input
    :param width: Numbers of a row in its widest layer
    :return: What it returns for all rows
    """
    states, moves = x if isinstance(x, Joined) else (x, x)
    count = block_count(moves, moves.shape[0], width)
    if count == 1:
        return function(x)
    count = min(count, len(states))
    actions = moves.view(-1, len(states), moves.shape[-1])
    pairs = zip(states.tensor_split(count), actions.tensor_split(count, dim=1), strict=True)
    outputs = []
    for state, action in pairs:
        out = function(Joined(state, action.flatten(0, 1)) if isinstance(x, Joined) else state)
        outputs.append(out.unflatten(-2, (-1, len(state))))
    return th.cat(outputs, dim=-2).flatten(-3, -2)
