"""Several processes that train one model: who takes which rows of a batch, and what they tell each other.

The processes are torchrun's. Each draws the random numbers of the whole batch and takes its own rows of them, every
``size``-th one, so that an update does not depend on how many processes share it. Texts and flags travel between
processors, gradients between accelerators where there are some.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import torch as th
from torch import distributed as dist

Rows = TypeVar("Rows", th.Tensor, np.ndarray)
# Gradients travel in pieces of about this size: one is on its way while the next is packed
BUCKET_BYTES = 2**25
GOES_ON, STOPS, FAILED = range(3)
LONGEST_VALUE = 80


class LostProcessError(RuntimeError):
    """Another process has ended, or does not answer."""


class OtherProcessError(RuntimeError):
    """Another process has failed, and has said how."""


@dataclass(frozen=True)
class Ranks:
    """
    The place of this process among those that train one model. Alone, everything here is free of cost.

    :param rank: Number of this process, from 0
    :param size: Number of processes
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process logs, evaluates and saves."""
        return self.rank == 0

    # --- shares of a batch --------------------------------------------------------------------------------------

    def check_divides(self, parts: int = 1, **numbers: int) -> None:
        """
        :param parts: Parts into which each process splits its share
        :param numbers: Rows that the processes are to share, by the argument that sets them
        :raises ValueError: if a number is no multiple of the number of processes, times parts
        """
        shares, times = self.size * parts, "" if parts == 1 else f" times gradient_accumulation ({parts})"
        for name, number in numbers.items():
            if number % shares:
                below = number - number % shares
                fitting = " or ".join(str(n) for n in (below, below + shares) if n > 0)
                raise ValueError(
                    f"{name} ({number}) must be a multiple of the number of processes ({self.size}){times}, which "
                    f"share it: pass {name}={fitting}, or start another number of processes."
                )

    def rows(self, whole: Rows, dim: int = 0) -> Rows:
        """
        This process's rows of something that all processes have drawn alike: every ``size``-th one.

        Rows may have been flattened together with the dimensions before them: the choice is the same.

        :param whole: Rows of the whole batch, a multiple of ``size``
        :param dim: Their dimension
        :return: Own rows
        """
        if self.size == 1:
            return whole
        return whole[(slice(None),) * dim + (slice(self.rank, None, self.size),)]

    def positions(self, whole: th.Tensor | None, width: int) -> th.Tensor | None:
        """
        :param whole: Positions in the flattened rows of the whole batch; None for none
        :param width: Entries of a row
        :return: Those that lie in own rows, as positions in them
        """
        if whole is None or self.size == 1:
            return whole
        row = whole // width
        own = row % self.size == self.rank
        return ((row // self.size) * width + whole % width)[own]

    def part(self, index: int, parts: int) -> "Ranks":
        """
        A part of this process's rows, as if it were a process of its own. It knows which rows are its own; sums and the
        like stay with the processes.

        :param index: Number of the part, from 0
        :param parts: Number of parts
        :return: What takes rows out of the whole batch: of this process's every ``parts``-th one

        >>> rows = th.arange(12)
        >>> [Ranks(1, 2).part(index, 3).rows(rows).tolist() for index in range(3)]
        [[1, 7], [3, 9], [5, 11]]
        """
        return Ranks(self.rank + self.size * index, self.size * parts)

    # --- numbers ------------------------------------------------------------------------------------------------

    def sum(self, value: th.Tensor) -> th.Tensor:
        """
        :param value: This process's
        :return: Sum over all processes
        """
        return value if self.size == 1 else self._reduced(value.detach().clone())

    def mean(self, value: th.Tensor) -> th.Tensor:
        """
        :param value: This process's
        :return: Mean over all processes
        """
        return value if self.size == 1 else self._reduced(value.detach().clone()) / self.size

    def gather(self, value: th.Tensor) -> th.Tensor:
        """
        :param value: This process's rows [n, ...]
        :return: Rows of all processes, process by process [size * n, ...]
        """
        return value if self.size == 1 else self._gathered(value.contiguous())

    def average(self, gradients: Sequence[th.Tensor]) -> None:
        """
        Replace gradients by their means over all processes.

        :param gradients: The same shapes in all processes, changed in place
        """
        # Not DistributedDataParallel: its hooks need backward() on everything that was in the forward pass, while here
        # each of three optimizers asks for the gradient of its own parameters alone (`backward(inputs=...)`)
        if self.size == 1:
            return
        under_way = []
        with contact(self):
            for bucket in _buckets(gradients):
                flat = th.cat([gradient.flatten() for gradient in bucket])
                under_way.append((dist.all_reduce(flat, async_op=True), flat, bucket))
            for work, flat, bucket in under_way:
                work.wait()
                flat /= self.size
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    @th.no_grad()
    def broadcast(self, tensors: Sequence[th.Tensor]) -> None:
        """
        :param tensors: Replaced, in place, by those of the first process
        """
        if self.size == 1:
            return
        with contact(self):
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    def shared_seed(self) -> int:
        """A seed from the operating system, the same in all processes."""
        seed = th.tensor([np.random.SeedSequence().generate_state(1, np.uint32).item()], dtype=th.int64)
        self.broadcast([seed])
        return int(seed)

    # Collectives stay outside of compiled graphs; a process that is alone has none, and nothing breaks its graphs. Not
    # as decorators: these import torch's whole compiler, for everybody
    def _gathered(self, value: th.Tensor) -> th.Tensor:
        def gather() -> th.Tensor:
            parts = [th.empty_like(value) for _ in range(self.size)]
            with contact(self):
                dist.all_gather(parts, value)
            return th.cat(parts)

        return cast(th.Tensor, th.compiler.disable(gather)())

    def _reduced(self, value: th.Tensor) -> th.Tensor:
        def reduce() -> th.Tensor:
            with contact(self):
                dist.all_reduce(value)
            return value

        return cast(th.Tensor, th.compiler.disable(reduce)())

    # --- agreement ----------------------------------------------------------------------------------------------

    def agree(self, facts: Mapping[str, str]) -> None:
        """
        Make sure that all processes are about the same.

        :param facts: What must be the same, by name
        :raises ValueError: in every process, naming what differs
        """
        if self.size == 1:
            return
        told: list[dict[str, str]] = [json.loads(text) for text in self.gather_texts(json.dumps(dict(facts)))]
        names = dict.fromkeys(name for facts_there in told for name in facts_there)
        found = []
        for name in names:
            values = [facts_there.get(name, "nothing") for facts_there in told]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                shown = [value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..." for value in values]
                found.append(f"{name} ({shown[0]} in process 0, {shown[other]} in process {other})")
        if found:
            raise ValueError(
                f"The processes do not have the same {', '.join(found)}: start all of them with the same arguments, "
                "data and versions."
            )

    def together(self) -> "Together":
        """
        A block that all processes leave well, or none: an error in one of them is an error in all. Nothing in the block
        may wait for another process.

        >>> with ALONE.together() as step:
        ...     step.stop = True
        >>> step.stop
        True
        """
        return Together(self)

    def gather_texts(self, text: str) -> list[str]:
        """
        :param text: This process's
        :return: Texts of all processes, by rank; they travel as plain bytes, which cannot do anything
        """
        own = th.tensor(list(text.encode()), dtype=th.uint8)
        lengths = self.gather(th.tensor([len(own)]))
        padded = th.zeros(int(lengths.max()), dtype=th.uint8)
        padded[: len(own)] = own
        rows = self.gather(padded[None])
        return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths.tolist(), strict=True)]


class Together:
    """
    A block that all processes leave well, or none; see :meth:`Ranks.together`.

    :param ranks: The processes
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        # Set by any process in the block, afterwards the same in all of them
        self.stop = False

    def __enter__(self) -> "Together":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.ranks.size == 1 or isinstance(error, LostProcessError):
            return
        try:
            self._tell(error)
        except LostProcessError:
            # What went wrong here says more than that nobody is left to hear it
            if error is None:
                raise

    def _tell(self, error: BaseException | None) -> None:
        state = th.tensor([FAILED if error is not None else STOPS if self.stop else GOES_ON])
        with contact(self.ranks):
            dist.all_reduce(state, dist.ReduceOp.MAX)
        self.stop = bool(state >= STOPS)
        if int(state) < FAILED:
            return
        texts = self.ranks.gather_texts("" if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            causes = [f"process {rank} has failed ({text})" for rank, text in enumerate(texts) if text]
            raise OtherProcessError(f"Stopped, because {' and '.join(causes)}.")


ALONE = Ranks()


@contextmanager
def contact(ranks: Ranks) -> Iterator[None]:
    """Failures of the connection, in words that help."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"Process {ranks.rank} of {ranks.size} has lost contact with the others ({str(error).splitlines()[0]}): "
            "one of them has ended or hangs, see what it said; training can go on from the last checkpoint."
        ) from error


def _buckets(tensors: Sequence[th.Tensor]) -> Iterator[list[th.Tensor]]:
    """Tensors in order, in groups of about :data:`BUCKET_BYTES` and of one type each."""
    bucket: list[th.Tensor] = []
    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) >= BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def described(value: Any) -> str:
    """
    A value as text that is the same in every process: functions by their names.

    :param value: Argument of a model

    >>> described({"activation_fn": th.nn.SiLU, "lr": 1e-4})
    "{'activation_fn': torch.nn.modules.activation.SiLU, 'lr': 0.0001}"
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {described(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(described(entry) for entry in value) + "]"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"
