"""
What pretraining at scale costs: bytes, arithmetic and communication of an update at each size, and from them the time
of the whole on many GPUs. ``python -m tests.benchmarks.scale --write hub/COST.md`` writes the page; ``--measure``
counts at one small size what really happens, and times one process against two.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch as th
from torch.utils.flop_counter import FlopCounterMode

from sb3_mbdpo import MBDPO
from sb3_mbdpo.distributed import process_group
from sb3_mbdpo.presets import PRESETS
from sb3_mbdpo.ranks import Ranks
from sb3_mbdpo.schedule import NoiseSchedule
from sb3_mbdpo.search_config import SearchConfig, with_samples
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.sizes import PAPER_SIZES, count_parameters, shapes_of
from tests.benchmarks.arithmetic import update_flops
from tests.processes import launch, toy_model, toy_shards

FLOAT = 4
# Of TD-MPC2, whose data the paper takes: `steps` in its released config.yaml, and the batch of its README's command
# for mt80 with 48 million parameters
UPDATES, BATCH = 10_000_000, 1024
GPUS = (1, 8, 64)
# 39 observations, 6 actions and a reward, in rows of H + 1 a window
ROW_BYTES = (39 + 6 + 1) * FLOAT
# Batches at which two processes are timed against one, and updates before the clock runs
BATCHES, SCORE_BATCH, WARM_UP = (64, 256), 64, 5
SCALING = ["batch", "one process", "two", "times as fast", "calculated", "communication", "with waiting"]


@dataclass(frozen=True)
class Machine:
    """
    What is assumed of the hardware.

    :param name: Where products are computed, and how
    :param rate: Its peak, operations a second
    :param share: Share of the peak that an update reaches
    :param host: GPUs of a host
    :param inside: Bytes a second that a GPU sends to others of its host
    :param outside: The same to other hosts
    :param latency: Seconds that a collective takes at least
    """

    name: str
    rate: float
    share: float
    host: int = 8
    inside: float = 300e9
    outside: float = 40e9
    latency: float = 50e-6


MACHINES = (Machine("H100, bfloat16", 989e12, 0.3), Machine("H100, float32", 67e12, 0.6))
# Gradients of three optimizers, three sums for the energy's statistics, the gathered values, one flag
COLLECTIVES = 8


class Cost(NamedTuple):
    """
    One size. ``flops`` and ``payload`` (bytes that are averaged) of an update, over the intervals of prior and score
    network; ``memory`` bytes of weights, gradients and Adam's state; ``read`` bytes of data an update.
    """

    size: float
    trained: int
    flops: int
    payload: float
    memory: int
    read: int


def paper_algorithm(size: float) -> Any:
    """What :func:`~tests.benchmarks.arithmetic.update_flops` asks of an algorithm, of shapes alone."""
    preset = PRESETS["paper"]
    config = SearchConfig(
        NoiseSchedule(preset.denoising_steps, preset.beta_start, preset.beta_end),
        preset.horizon,
        preset.n_samples,
        preset.n_elites,
        preset.n_prior_trajectories,
        preset.temperature,
        0.01,
        0.99,
    )
    policy = SimpleNamespace(world_model=shapes_of(size), search_config=config, episodic=False)
    learner = SimpleNamespace(score_config=with_samples(config, preset.score_samples))
    return SimpleNamespace(policy=policy, learner=learner, energy_loss_coef=1.0, **asdict(preset))


def cost_of(size: float, batch: int = BATCH) -> Cost:
    """
    :param size: Key of the size table
    :param batch: Windows of an update, over all GPUs
    :return: Its cost, counted from shapes
    """
    preset, count = PRESETS["paper"], count_parameters(size)
    prior, score = count.modules["prior"], count.modules["score"]
    # The termination head has no gradient: these tasks do not terminate
    model = count.trained - prior - score - count.modules["termination"]
    payload = FLOAT * (model + prior / preset.policy_delay + score / preset.score_interval)
    memory = FLOAT * (count.stored + 3 * (count.trained - count.modules["termination"]))
    flops = update_flops(paper_algorithm(size), batch)
    return Cost(size, count.trained, flops, payload, memory, batch * (preset.horizon + 1) * ROW_BYTES)


def seconds(cost: Cost, machine: Machine, gpus: int) -> tuple[float, float]:
    """
    :param cost: Of an update
    :param machine: Hardware
    :param gpus: How many share the update
    :return: Seconds of arithmetic, and of communication, which follows it
    """
    arithmetic = cost.flops / (gpus * machine.rate * machine.share)
    if gpus == 1:
        return arithmetic, 0.0
    speed = machine.inside if gpus <= machine.host else machine.outside
    # A ring sends each byte twice, but for what stays at home
    return arithmetic, 2 * (gpus - 1) / gpus * cost.payload / speed + COLLECTIVES * machine.latency


def table(rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(table([["a", "b"], ["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def counted() -> str:
    """Cost of an update at each size."""
    rows = [["size", "trained, million", "GFLOP", "averaged, MB", "state, GB", "data read, MB"]]
    for cost in map(cost_of, PAPER_SIZES):
        numbers = (cost.trained / 1e6, cost.flops / 1e9, cost.payload / 1e6, cost.memory / 1e9, cost.read / 1e6)
        rows.append([f"{cost.size:g}", *(f"{number:,.3g}" if number < 100 else f"{number:,.0f}" for number in numbers)])
    return table(rows)


def whole(machine: Machine) -> str:
    """Time of the whole pretraining at each size and number of GPUs."""
    rows = [["size", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)]]
    for cost in map(cost_of, PAPER_SIZES):
        cells = []
        for gpus in GPUS:
            arithmetic, communication = seconds(cost, machine, gpus)
            days = UPDATES * (arithmetic + communication) / 86_400
            share = communication / (arithmetic + communication)
            cells.append(f"{days:.3g} days" + (f", {share:.0%} communication" if gpus > 1 else ""))
        rows.append([f"{cost.size:g}", *cells])
    return table(rows)


# --- measured -----------------------------------------------------------------------------------------------------


def measured_update(model: MBDPO, data: Path, update: int = 0) -> tuple[int, int]:
    """
    :param model: A model
    :param data: Folder of shards
    :param update: Number of the update: prior, energy and score network have their intervals
    :return: Operations of the matrix products of one update, and bytes that several processes would average
    """
    windows = ShardedDataset(data, model.policy.search_config.horizon, seed=0)
    averaged: list[int] = []
    count = FlopCounterMode(display=False)
    model.policy.set_training_mode(True)

    def average(self: Ranks, gradients: Sequence[th.Tensor]) -> None:
        averaged.append(sum(gradient.nbytes for gradient in gradients))

    with mock.patch.object(Ranks, "average", average), count:
        model.learner.update(windows.sample(model.batch_size), update)
    return count.get_total_flops(), sum(averaged)


def measured(steps: int) -> str:
    """One update of the smallest paper size counted as it runs, and two processes against one and against the model."""
    kwargs = {"preset": "paper", "model_size": 1, "search_dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        data = toy_shards(Path(folder, "data"))
        model = toy_model(data, batch_size=64, **kwargs)
        flops, payload = measured_update(model, data)
        counted_bytes = (
            f"- Size 1, one task, 64 windows, an update with score network: {flops / 1e9:.3g} GFLOP in matrix products "
            f"({flops / update_flops_now(model):.2f} of what is counted from shapes), {payload / 1e6:.3g} MB of "
            "gradients."
        )
        rows = [scaling(data, batch, steps, kwargs) for batch in BATCHES]
    return (
        f"{counted_bytes}\n- The same model, one process against two with gloo, one thread each, {steps} updates in "
        "one run, on two cores. Communication: what the same gradients take to be averaged when nobody is waited for. "
        "Calculated: one process's update of half a batch, and the communication; the rest is waiting, drawing the "
        f"whole batch's random numbers, and two cores that share their memory.\n\n{table([SCALING, *rows])}"
    )


def scaling(data: Path, batch: int, steps: int, kwargs: dict[str, Any]) -> list[str]:
    """Row of the table of two processes against one."""
    arguments, halved = (
        kwargs | {"batch_size": batch // parts, "score_batch_size": SCORE_BATCH // parts} for parts in (1, 2)
    )
    (alone,) = launch(replica, 1, data, steps, arguments)
    (half,) = launch(replica, 1, data, steps, halved)
    pair = max(launch(replica, 2, data, steps, arguments))
    calculated = half.update + pair.averaging
    return [
        str(batch),
        f"{1e3 * alone.update:.0f} ms",
        f"{1e3 * pair.update:.0f} ms",
        f"{alone.update / pair.update:.2f}",
        f"{alone.update / calculated:.2f}",
        f"{pair.averaging / pair.update:.0%}",
        f"{pair.collectives / pair.update:.0%}",
    ]


class Timing(NamedTuple):
    """
    Seconds of an ``update``; of them in ``collectives``, waiting for the others included; and of ``averaging`` the same
    gradients once more when nobody is waited for.
    """

    update: float
    collectives: float
    averaging: float


def replica(data: Path, steps: int, kwargs: dict[str, Any]) -> Timing:
    """What each process does: learn a little, learn again by the clock, and send its gradients once more."""
    inside, sent = [0.0], []

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Ranks, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = function(self, *arguments)
            inside[0] += time.perf_counter() - start
            return found

        return call

    def average(self: Ranks, gradients: Sequence[th.Tensor]) -> None:
        sent.append(gradients)
        plain(self, gradients)

    plain = Ranks.average
    with process_group(1) as ranks, contextlib.redirect_stdout(io.StringIO()):
        model, windows = toy_model(data, **kwargs), ShardedDataset(data)
        model.learn_offline(windows, WARM_UP, log_interval=steps, ranks=ranks)
        changed = {name: clocked(getattr(Ranks, name)) for name in ("_reduced", "_gathered")}
        with mock.patch.multiple(Ranks, average=clocked(average), **changed):
            start = time.perf_counter()
            model.learn_offline(windows, steps, log_interval=steps, ranks=ranks)
            whole = time.perf_counter() - start
        ranks.sum(th.zeros(1))
        start = time.perf_counter()
        for gradients in sent:
            ranks.average(gradients)
        return Timing(whole / steps, inside[0] / steps, (time.perf_counter() - start) / steps)


def update_flops_now(model: MBDPO) -> int:
    """Counted from shapes: an update in which all three optimizers step."""
    every = dict.fromkeys(("policy_delay", "energy_interval", "score_interval"), 1)
    with mock.patch.multiple(model, **every):
        return update_flops(model, model.batch_size)


def page(measurements: str | None) -> str:
    """
    :param measurements: What was measured, None for nothing
    :return: The page
    """
    assumptions = "\n".join(
        f"- {m.name}: {m.rate / 1e12:.0f} TFLOP/s at most, {m.share:.0%} of it reached; {m.inside / 1e9:.0f} GB/s "
        f"between the {m.host} GPUs of a host, {m.outside / 1e9:.0f} GB/s for each GPU between hosts, "
        f"{m.latency * 1e6:.0f} microseconds a collective."
        for m in MACHINES
    )
    parts = [
        "# What pretraining costs",
        "Written by `python -m tests.benchmarks.scale --write hub/COST.md`; nothing here was measured on a GPU.",
        "## One update",
        f"Counted from the shapes of the layers, {BATCH} windows of the widest 80 tasks (39 observations, 6 actions), "
        "the `paper` preset with its score network. State: weights, gradients and Adam's moments of one GPU, in "
        "float32, without activations. Averaged: gradients that each GPU sends and receives (twice, in a ring).",
        counted(),
        "## The whole pretraining",
        f"{UPDATES:,} updates of {BATCH} windows, the released settings of TD-MPC2 on the same data (`steps` in its "
        "config.yaml, the batch of its README's mt80 command); what the paper used is not known. Arithmetic is shared "
        "evenly, communication follows it without overlap. Assumed, not measured:",
        assumptions,
        *(f"{machine.name}:\n\n{whole(machine)}" for machine in MACHINES),
        "On 64 GPUs `score_batch_size` must be a multiple of 64. Read as calculated: at this batch replicas beyond "
        "one host cost more in communication than they save, so that more GPUs want a larger batch. Launching kernels "
        "is not counted, which is most of the time of small sizes on one GPU: their days are lower bounds.",
        "## Measured on a CPU",
        measurements or "Not measured in this run.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description="Cost of pretraining.")
    parser.add_argument("--write", metavar="PATH", help="file to write; default: the screen")
    parser.add_argument("--measure", type=int, metavar="STEPS", help="measure too, with so many updates")
    arguments = parser.parse_args()
    text = page(measured(arguments.measure) if arguments.measure else None)
    if arguments.write:
        Path(arguments.write).write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
