"""Whole calls as CUDA graphs: hundreds of small kernels, launched by the GPU itself instead of one by one from Python.

A graph repeats what was captured, at the addresses where it was captured. So each call has a key that says everything
which is not a number in a tensor, and graphs are forgotten when a tensor that they read is replaced by another.
"""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch as th
from torch.utils import _pytree as pytree


class _Captured(NamedTuple):
    """A graph, where it reads its arguments, and what it returns."""

    graph: th.cuda.CUDAGraph
    arguments: list[th.Tensor]
    result: Any


class CudaGraphs:
    """
    Calls of functions of tensors, by key: a key's first call runs as it is, its second one is captured, and from then
    on it is replayed. A replay computes and draws what the call itself would. Graphs share their memory, since one
    runs after the other.

    Copies and pickles begin without graphs: they have tensors of their own.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured | None] = {}
        self._stream: th.cuda.Stream | None = None
        self._pool: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaGraphs":
        return CudaGraphs()

    def __reduce__(self) -> tuple[type["CudaGraphs"], tuple[()]]:
        return CudaGraphs, ()

    def __len__(self) -> int:
        """Number of graphs at hand."""
        return sum(entry is not None for entry in self._captured.values())

    def clear(self) -> None:
        """Forget all graphs, because tensors that they read or write have been replaced."""
        self._captured.clear()
        self._pool = None

    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        generator: th.Generator,
    ) -> Any:
        """
        Call a function, or replay an earlier call.

        :param key: All that the call depends on apart from the numbers in its tensors; shapes of ``arguments`` are
            added here
        :param function: Function of tensors; it may change others in place, but must not wait for the device
        :param arguments: Tensors, or tuples and dicts of tensors, on a CUDA device; None among them stays None
        :param generator: What the function draws from
        :return: What the function returns. Where it was replayed, the next call of this key writes to the same
            tensors: who keeps them copies them
        """
        leaves, structure = pytree.tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, th.Tensor)]
        key = (key, generator, structure, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        with _on(generator.device):
            if key not in self._captured:
                self._captured[key] = None
                return self._warm_up(function, arguments)
            entry = self._captured[key]
            if entry is None:
                entry = self._captured[key] = self._capture(function, arguments, generator)
            else:
                th._foreach_copy_(entry.arguments, tensors)
            entry.graph.replay()
            return entry.result

    def _warm_up(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """A first call beside the main stream, as captures want it: libraries and optimizers set themselves up."""
        if self._stream is None:
            self._stream = th.cuda.Stream()
        main = th.cuda.current_stream()
        self._stream.wait_stream(main)
        with th.cuda.stream(self._stream):
            result = function(*arguments)
        main.wait_stream(self._stream)
        return result

    def _capture(self, function: Callable[..., Any], arguments: tuple[Any, ...], generator: th.Generator) -> _Captured:
        if self._pool is None:
            self._pool = th.cuda.graph_pool_handle()
        own = copied(arguments)
        graph = th.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with _garbage_waits(), th.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = function(*own)
        return _Captured(graph, [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, th.Tensor)], result)


def copied(tree: Any) -> Any:
    """
    :param tree: Tensors, or tuples and dicts of tensors
    :return: The same with tensors of its own
    """
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, th.Tensor) else leaf, tree)


@contextmanager
def _garbage_waits() -> Iterator[None]:
    """Among what Python's collector finds can be an old graph, and to free one in the middle of a capture ends it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _on(device: th.device) -> AbstractContextManager[Any]:
    """Streams and graphs belong to the current device, which need not be the model's."""
    return th.cuda.device(device) if device.type == "cuda" else nullcontext()
