"""
What updates need of memory and time when activations are computed again, and when batches are worked through in parts::

    python -m tests.benchmarks.memory --size 5 --batch 1024

Each setting has a process of its own. Memory is what the process takes at most above what it had before its first
update, gradients and the optimizers' state included; time is the processor's, in a second run without figures of
memory, the median of a few updates in turn with those of the other settings.
"""

import argparse
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch as th

from sb3_mbdpo import MBDPO
from sb3_mbdpo.buffers import SequenceSamples
from tests.benchmarks.scale import table
from tests.fakes import ToyEnv

SETTINGS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "activation_checkpointing=True": {"activation_checkpointing": True},
    "gradient_accumulation=4": {"gradient_accumulation": 4},
    "both": {"activation_checkpointing": True, "gradient_accumulation": 4},
}
# What is freed goes back to the system at once, so that its figures are those of tensors; it costs time
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def windows(batch: int, horizon: int, seed: int = 0) -> SequenceSamples:
    """
    :param batch: Number of windows
    :param horizon: Their length
    :param seed: Of their numbers
    :return: Windows of random numbers, of ``ToyEnv``'s spaces
    """
    draw = np.random.default_rng(seed)

    def uniform(*shape: int) -> th.Tensor:
        return th.as_tensor(draw.uniform(-1, 1, shape), dtype=th.float32)

    steps = (horizon, batch)
    flags = th.zeros(*steps, 1), th.ones(*steps, 1)
    return SequenceSamples(uniform(horizon + 1, batch, 3), uniform(*steps, 2), uniform(*steps, 1), *flags)


def kilobytes(name: str) -> int:
    """An entry of what Linux knows of this process's memory."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    """Make a model, then do an update at each message: peak memory in bytes, seconds of the processor."""
    th.set_num_threads(1)
    model = MBDPO("MlpPolicy", ToyEnv(), preset="paper", seed=0, device="cpu", buffer_size=1000, **arguments)
    assert model.batch_size is not None and model.horizon is not None
    samples = windows(model.batch_size, model.horizon)
    model.policy.set_training_mode(True)
    before = kilobytes("VmRSS")
    while pipe.recv():
        # The highest so far is forgotten
        CLEAR.write_text("5")
        start = time.process_time()
        model.learner.update(samples)
        pipe.send((1024 * (kilobytes("VmHWM") - before), time.process_time() - start))


def updates(size: float, batch: int, repeats: int, settings: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """What each update takes, by setting; settings take turns."""
    context, pipes = mp.get_context("spawn"), {}
    for name in settings:
        pipes[name], theirs = context.Pipe()
        arguments = {"model_size": size, "batch_size": batch, "score_batch_size": 64} | SETTINGS[name]
        context.Process(target=serve, args=(theirs, arguments), daemon=True).start()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return found


def measured(size: float, batch: int, repeats: int) -> dict[str, tuple[float, float]]:
    """
    :param size: Model size, millions of parameters
    :param batch: Windows per update
    :param repeats: Updates that are timed, after one that is not
    :return: Peak memory in bytes, and seconds, of an update by setting
    """
    with mock.patch.dict(os.environ, EXACT):
        memory = updates(size, batch, 2, list(SETTINGS))
    times = updates(size, batch, repeats + 1, list(SETTINGS))
    return {
        name: (max(peak for peak, _ in memory[name]), statistics.median(seconds for _, seconds in times[name][1:]))
        for name in SETTINGS
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Memory and time of updates.")
    parser.add_argument("--size", type=float, default=5, help="millions of parameters")
    parser.add_argument("--batch", type=int, default=1024, help="windows per update")
    parser.add_argument("--repeats", type=int, default=3, help="updates that are timed")
    args = parser.parse_args()
    found = measured(args.size, args.batch, args.repeats)
    _, unit = found["as by default"]
    rows = [[name, f"{memory / 1e6:,.0f}", f"{seconds / unit:.2f}"] for name, (memory, seconds) in found.items()]
    print(f"Size {args.size:g}, {args.batch} windows, one thread; as by default {unit:.1f} s\n")
    print(table([["", "peak memory of an update, MB", "time"], *rows]))


if __name__ == "__main__":
    main()
