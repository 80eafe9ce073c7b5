"""Arrays of a replay buffer, in NumPy or on a device, alone or in a dict: what is read out of them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch as th

Array: TypeAlias = np.ndarray | th.Tensor


def map_arrays(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """
    Apply a function to arrays, or key by key to dicts of arrays.

    :param function: Function of arrays
    :param first: Array or dict of arrays
    :param others: The same, dicts with at least the keys of the first one
    :return: What the function returns, or a dict of that
    """
    if isinstance(first, dict):
        return {key: function(value, *(other[key] for other in others)) for key, value in first.items()}
    return function(first, *others)


def sampled_dtype(array: np.ndarray) -> th.dtype:
    """
    :param array: Stored array
    :return: Float32 for every float, the same dtype for integers and booleans
    """
    return th.float32 if np.issubdtype(array.dtype, np.floating) else th.from_numpy(array[:0]).dtype


def take(table: Array, index: Any, out: Any = None) -> Any:
    """
    Copy entries out of the ring.

    :param table: ``[buffer_size, n_envs, ...]``, a stored array or its mirror
    :param index: ``[T, B]`` flat positions (row * n_envs + env), of the table's kind and device
    :param out: ``[T, B, ...]`` contiguous, where to write them; allocated if None
    :return: ``[T, B, ...]``
    """
    entries = table.reshape(-1, *table.shape[2:])
    if isinstance(entries, np.ndarray):
        # mode="clip" only lets NumPy write into `out` unbuffered: positions are in range by construction.
        return entries.take(index, axis=0, out=out, mode="clip")
    if out is None:
        out = entries.new_empty((*index.shape, *entries.shape[1:]))
    th.index_select(entries, 0, index.flatten(), out=out.flatten(0, 1))
    return out


def take_observations(current: Array, following: Array, index: Any) -> Any:
    """
    Gather the windows' first observations, then what each transition led to.

    :param current: ``[buffer_size, n_envs, ...]``, observations before the transitions
    :param following: The same after them
    :param index: ``[H, B]`` flat positions
    :return: ``[H+1, B, ...]``
    """
    shape = (index.shape[0] + 1, index.shape[1], *current.shape[2:])
    out = np.empty(shape, current.dtype) if isinstance(current, np.ndarray) else current.new_empty(shape)
    take(current, index[:1], out[:1])
    take(following, index, out[1:])
    return out
