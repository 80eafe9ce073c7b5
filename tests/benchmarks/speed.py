"""
Time of search, update and training loop, each beside the arithmetic that it cannot do without.

Run it from the repository's root, on an idle machine::

    python -m tests.benchmarks.speed --presets cpu paper --threads 2

The floor of a row is the number of operations in its matrix products as the method is written, every candidate through
every layer, counted from the shapes, at the rate of a plain float32 matrix product of the layers' width, measured in
turns with the row itself; the ratio is to that floor, for bfloat16 too. The share is the part of its own type's rate
that a row reaches, from products measured right after; its TFLOP/s, from the same operations, are to be compared with
the rates of large products, which a GPU prints first. SB3's SAC and TQC are measured in the same run. ``speed.csv`` and
``speed.png`` (cost over batch, candidates, steps and buffer size) go to ``--out``.
"""

import argparse
import csv
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import get_device

from sb3_mbdpo import MBDPO
from sb3_mbdpo.presets import PRESETS
from sb3_mbdpo.schedule import NoiseSchedule
from tests.benchmarks.arithmetic import search_flops, update_flops
from tests.benchmarks.clock import in_turns, timed
from tests.fakes import ToyEnv

COLUMNS = ("what", "preset", "size", "device", "threads", "batch")
DTYPES = {"float32": th.float32, "bfloat16": th.bfloat16}
NUMBERS = {
    "ms": (10, 2, "ms"),
    "per_second": (10, 1, "per s"),
    "floor_ms": (10, 2, "floor ms"),
    "ratio": (8, 2, "ratio"),
    "share": (8, 2, "share"),
    "tflops": (10, 3, "TFLOP/s"),
}
Row = dict[str, Any]
# A robot of the paper's kind: 24 observations, 6 actions
OBSERVATIONS = spaces.Box(-1.0, 1.0, (24,), np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, (6,), np.float32)


def make(preset: str, device: str, **kwargs: Any) -> MBDPO:
    """
    MBDPO with a little experience to learn from.

    :param preset: Preset
    :param device: Torch device
    :param kwargs: Further arguments
    :return: The algorithm
    """
    kwargs = {"buffer_size": 5000, "learning_starts": 300, "warmup_updates": 0} | kwargs
    model = MBDPO("MlpPolicy", _robot(), preset=preset, device=device, seed=0, **kwargs)
    model.learn(300)
    return model


def _robot() -> ToyEnv:
    return ToyEnv(OBSERVATIONS, ACTIONS, lengths=(100,))


def reference(
    width: int, rows: int, device: th.device, dtype: th.dtype = th.float32
) -> tuple[Callable[[], object], float]:
    """
    A plain matrix product to compare with.

    :param width: Width of the layers
    :param rows: Rows of a batch
    :param device: Where
    :param dtype: Type of the matrices
    :return: The product as a function, and its operations
    """
    left, right = (th.randn(n, width, device=device).to(dtype) for n in (rows, width))
    out = th.empty(rows, width, device=device, dtype=dtype)
    return (lambda: th.mm(left, right, out=out)), 2.0 * rows * width * width


def matrix_rates(device: th.device, width: int = 8192) -> str:
    """
    What a GPU does at best.

    :param device: A CUDA device
    :param width: Of the matrices
    :return: Rates of large square products in each number type, as text
    """
    found = []
    for name, dtype in DTYPES.items():
        product, operations = reference(width, width, device, dtype)
        timed(product, device, 2)
        found.append(f"{name} {operations / timed(product, device, 5) / 1e12:.0f}")
    return f"Products of {width} x {width} matrices, TFLOP/s: {', '.join(found)}"


def against_floor(
    function: Callable[[], object], flops: float, model: MBDPO, rows: int, seconds: float, dtype: th.dtype
) -> Row:
    """
    Time a function in turns with a matrix product.

    :param function: What to time
    :param flops: Operations that it cannot do without
    :param model: Algorithm (width of its layers, device)
    :param rows: Rows of the matrix product
    :param seconds: How long to measure
    :param dtype: Type of its own matrix products
    :return: Time, floor, their ratio, and the share of its own type's rate
    """
    width = model.policy.world_model.dynamics[0].linear.out_features  # type: ignore[union-attr]
    product, operations = reference(width, rows, model.device)
    found = in_turns(function, product, model.device, seconds)
    times = flops / operations
    row = {"ms": 1e3 * found.seconds, "floor_ms": 1e3 * found.reference * times, "ratio": found.ratio / times}
    row["tflops"] = flops / found.seconds / 1e12
    if dtype == th.float32:
        return row | {"share": 1 / row["ratio"]}
    product, _ = reference(width, rows, model.device, dtype)
    return row | {"share": times * timed(product, model.device, 20) / found.seconds}


def measure_search(model: MBDPO, batch: int, seconds: float) -> Row:
    """
    One search for ``batch`` observations.

    :param model: Algorithm
    :param batch: Observations B
    :param seconds: How long to measure
    :return: A row
    """
    policy, config = model.policy, model.policy.search_config
    policy.set_training_mode(False)
    obs = th.rand(batch, *OBSERVATIONS.shape, device=model.device)
    plan = th.zeros(batch, *policy.plan_shape, device=model.device)
    restart = th.zeros(batch, dtype=th.bool, device=model.device)

    def search() -> object:
        return policy.plan(obs, plan, restart)

    row = against_floor(search, search_flops(policy, batch), model, batch * config.n_samples, seconds, config.dtype)
    what = f"search {str(config.dtype).removeprefix('torch.')}" if policy.act_mode == "search" else policy.act_mode
    return row | {"what": what, "batch": batch, "per_second": batch / row["ms"] * 1e3}


def cycle(model: MBDPO) -> int:
    """
    :param model: Algorithm
    :return: Updates after which everything that is not done at each of them has had its turn
    """
    return math.lcm(int(model.policy_delay), int(model.energy_interval), int(model.score_interval))


def measure_update(model: MBDPO, batch: int, seconds: float) -> Row:
    """
    One update, sampling included.

    :param model: Algorithm
    :param batch: Windows B
    :param seconds: How long to measure
    :return: A row
    """
    rows, updates, mixed = batch * model.policy.search_config.horizon, cycle(model), model.learner.mixed_precision
    dtype = th.bfloat16 if mixed else th.float32
    flops = updates * update_flops(model, batch)
    row = against_floor(lambda: model.train(updates, batch), flops, model, rows, seconds, dtype)
    row |= {key: row[key] / updates for key in ("ms", "floor_ms")}
    what = f"update {str(dtype).removeprefix('torch.')}"
    return row | {"what": what, "batch": batch, "per_second": batch / row["ms"] * 1e3}


def measure_rivals(model: MBDPO, seconds: float) -> list[Row]:
    """
    Gradient step and prediction of SAC and TQC, and how MBDPO's own compare: the ratio is MBDPO's time over theirs.

    :param model: Algorithm
    :param seconds: How long to measure each
    :return: Rows
    """
    rows, obs, updates = [], np.zeros(OBSERVATIONS.shape, np.float32), cycle(model)
    batch = int(model.batch_size)
    for rival_class in (SAC, TQC):
        rival: OffPolicyAlgorithm = rival_class(
            "MlpPolicy", _robot(), device=model.device, seed=0, buffer_size=5000, learning_starts=300
        )
        rival.learn(300)
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "update": (lambda: model.train(updates, batch), lambda rival=rival: rival.train(updates, 256)),
            "predict": (lambda: model.predict(obs), lambda rival=rival: rival.predict(obs)),
        }
        for what, (ours, theirs) in pairs.items():
            found, per_call = in_turns(ours, theirs, model.device, seconds), updates if what == "update" else 1
            row = {"what": f"{what} against {rival_class.__name__}", "batch": batch if what == "update" else 1}
            row |= {"ms": 1e3 * found.seconds / per_call, "floor_ms": 1e3 * found.reference / per_call}
            rows.append(row | {"ratio": found.ratio})
    return rows


def measure_loop(preset: str, device: str, steps: int, compile: bool = False) -> list[Row]:
    """
    Environment steps per second of whole training loops, after the random steps of the start.

    :param preset: MBDPO's preset
    :param device: Torch device
    :param steps: Environment steps to measure
    :param compile: Compile MBDPO first
    :return: Rows of MBDPO, SAC and TQC; the ratio is to SAC's time
    """
    times = {}
    for name, algorithm in (("SAC", SAC), ("TQC", TQC), ("MBDPO", MBDPO)):
        own = {"preset": preset, "warmup_updates": 0, "compile": compile} if algorithm is MBDPO else {}
        model = algorithm("MlpPolicy", _robot(), device=device, seed=0, buffer_size=5000, learning_starts=100, **own)
        model.learn(150)
        times[name] = timed(lambda model=model: model.learn(steps, reset_num_timesteps=False), model.device, 1) / steps
    return [
        {"what": f"training loop {name}", "batch": 1, "ms": 1e3 * t, "per_second": 1 / t, "ratio": t / times["SAC"]}
        for name, t in times.items()
    ]


def measure_sweep(model: MBDPO, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """
    Cost of a search over B, N and T, and of sampling over the size of the buffer.

    :param model: Algorithm; its search settings are put back
    :param seconds: How long to measure each point
    :return: (value, milliseconds) by what is varied
    """
    policy, config = model.policy, model.policy.search_config
    curves: dict[str, list[tuple[float, float]]] = {"observations B": [], "candidates N": [], "schedule steps T": []}
    for batch in (1, 2, 4, 8, 16, 32):
        curves["observations B"].append((batch, measure_search(model, batch, seconds)["ms"]))
    for factor in (1, 2, 4, 8):
        wider = replace(
            config,
            n_samples=config.n_samples * factor,
            n_elites=config.n_elites * factor,
            n_prior_trajectories=config.n_prior_trajectories * factor,
        )
        policy.search_config = wider
        curves["candidates N"].append((wider.n_samples, measure_search(model, 4, seconds)["ms"]))
    for steps in (3, 5, 9, 17, 33):
        schedule = NoiseSchedule(steps, config.schedule.beta_start, config.schedule.beta_end)
        policy.search_config = replace(config, schedule=schedule)
        curves["schedule steps T"].append((steps, measure_search(model, 4, seconds)["ms"]))
    policy.search_config = config
    curves["transitions in the buffer"] = []
    for size in (1_000, 10_000, 100_000, 1_000_000):
        buffer = type(model.replay_buffer)(size, OBSERVATIONS, ACTIONS, model.device, horizon=config.horizon)  # type: ignore[misc]
        # As if it had been filled: written once, so that no page of its memory is new
        for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones):
            array.fill(0)
        buffer.full = True
        found = timed(lambda buffer=buffer: buffer.sample(256), model.device, 50)
        curves["transitions in the buffer"].append((size, 1e3 * found))
    return curves


def plot(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """
    Draw the sweep, with a line of slope one through each first point.

    :param curves: From :func:`measure_sweep`
    :param path: Picture to write
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(3.4 * len(curves), 3.4), layout="constrained")
    for panel, (name, points) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        values, times = np.array(points).T
        panel.loglog(values, times, "o-", label="measured")
        panel.loglog(values, times[-1] * values / values[-1], "--", color="grey", label="proportional")
        panel.set(xlabel=name, ylabel="ms, a sample of 256" if "buffer" in name else "ms, a search")
        panel.set_ylim(min(times) / 3, max(times) * 3)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def table(rows: list[Row]) -> str:
    """
    :param rows: Measured rows
    :return: Text, one line each
    """
    heads = "".join(f"{head:>{width}}" for width, _, head in NUMBERS.values())
    lines = [f"{'what':28}{'preset':8}{'batch':>7}{heads}"]
    for row in rows:
        numbers = [
            f"{row[key]:>{width}.{digits}f}" if key in row else " " * width
            for key, (width, digits, _) in NUMBERS.items()
        ]
        lines.append(f"{row['what']:28}{row['preset']:8}{row['batch']:>7}{''.join(numbers)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments; None takes the process's own
    :return: Exit status
    """
    parser = argparse.ArgumentParser(description="Speed of MBDPO beside its floor and its rivals.")
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=["cpu", "paper"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to measure each row")
    parser.add_argument("--search-batches", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--update-batches", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile search and losses first")
    parser.add_argument("--loop-steps", type=int, default=300, help="environment steps of each training loop")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--no-rivals", action="store_true", help="leave SAC and TQC out")
    parser.add_argument("--out", type=Path, default=Path("logs", "speed"))
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not th.cuda.is_available():
        # Stable-Baselines3 would take the CPU instead
        parser.error("--device cuda: PyTorch finds no CUDA device here. Leave the argument out to measure the CPU.")
    th.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []

    def add(model: MBDPO, preset: str, *found: Row) -> None:
        shared = {"preset": preset, "size": model.model_size, "device": model.device.type, "threads": args.threads}
        rows.extend(shared | row for row in found)
        print(table(rows[-len(found) :]).split("\n", 1)[1], flush=True)

    if get_device(args.device).type == "cuda":
        print(matrix_rates(get_device(args.device)))
    print(table([]))
    for preset in args.presets:
        model = make(preset, args.device, compile=args.compile)
        chosen = model.policy.search_config
        for dtype in args.dtypes:
            model.policy.search_config = replace(chosen, dtype=DTYPES[dtype])
            for batch in args.search_batches:
                add(model, preset, measure_search(model, batch, args.seconds))
        model.policy.search_config = chosen
        model.policy.act_mode = "score"
        found = measure_search(model, 1, args.seconds)
        add(model, preset, {key: found[key] for key in ("what", "batch", "ms", "per_second")})
        model.policy.act_mode = "search"
        for dtype in args.dtypes:
            model.learner.mixed_precision = dtype == "bfloat16"
            for batch in args.update_batches:
                add(model, preset, measure_update(model, batch, args.seconds))
        model.learner.mixed_precision = False
        if not args.no_rivals:
            add(model, preset, *measure_rivals(model, args.seconds))
        if args.loop_steps > 0:
            add(model, preset, *measure_loop(preset, args.device, args.loop_steps, args.compile))
        if not args.no_sweep and preset == args.presets[0]:
            plot(measure_sweep(model, args.seconds / 3), args.out / "speed.png")
    with open(args.out / "speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *NUMBERS))
        writer.writeheader()
        writer.writerows(rows)
    print(f"Peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if th.cuda.is_available():
        print(f"Peak memory of the device: {th.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
