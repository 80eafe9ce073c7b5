"""Memory and rate of training from shards: writes a random set, trains on it, and says what both cost.

The set is written straight to disk, piece by piece. Resident memory is the system's own figure (/proc/self/status),
apart for what the process holds itself (anonymous) and for pages of the files that are mapped at that moment.

    python -m tests.benchmarks.shards --transitions 50_000_000 --updates 2000

The folder is deleted at the end unless ``--keep`` is given; one that is there already is used as it is.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from tqdm import tqdm

from sb3_mbdpo.hardware import resolve_dtype
from sb3_mbdpo.losses import LossCoefficients
from sb3_mbdpo.policies import MlpPolicy
from sb3_mbdpo.presets import PRESETS
from sb3_mbdpo.shard_writer import ShardWriter
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.updates import Learner
from tests.benchmarks.clock import in_turns

OBSERVATIONS, ACTIONS = 31, 8  # and the reward: 40 numbers a transition
BLOCK = 100


def generate(path: Path, transitions: int, length: int) -> float:
    """:return: Seconds that writing the set took"""
    space = spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float32)
    actions = spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)
    rng, start = np.random.default_rng(0), time.perf_counter()
    episodes = transitions // length
    with ShardWriter(path, space, actions) as writer:
        for first in tqdm(range(0, episodes, BLOCK), desc="Writing", unit="blocks", disable=None):
            count = min(BLOCK, episodes - first)
            writer.add_block(
                rng.random((count, length + 1, OBSERVATIONS), np.float32),
                rng.random((count, length, ACTIONS), np.float32) * 2 - 1,
                rng.random((count, length), np.float32),
                np.zeros(count, bool),
                np.zeros(count, int),
            )
    return time.perf_counter() - start


def make_learner(data: ShardedDataset, preset: str) -> tuple[Learner, int]:
    """:return: Learner of a fresh model, and the preset's batch size"""
    values = PRESETS[preset]
    names = ("model_size", "horizon", "denoising_steps", "n_samples", "n_elites", "n_prior_trajectories")
    policy = MlpPolicy(
        data.observation_space,
        data.action_space,
        lambda _: values.learning_rate,
        beta_start=values.beta_start,
        beta_end=values.beta_end,
        episodic=False,
        search_dtype=resolve_dtype("search_dtype", values.search_dtype, th.device("cpu")),
        seed=0,
        **{name: getattr(values, name) for name in names},
    )
    policy.set_training_mode(True)
    names = ("tau", "bootstrap", "target_horizon", "prior_horizon", "policy_delay", "energy_interval")
    names += ("score_batch_size", "score_samples", "score_interval")
    coefficients = LossCoefficients(saturation=values.saturation_coef)
    arguments = {name: getattr(values, name) for name in names}
    return Learner(policy, coefficients, score_coef=1.0, max_grad_norm=20.0, **arguments), values.batch_size


def resident() -> dict[str, float]:
    """:return: Resident megabytes: in all, the process's own, pages of files"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon", "RssFile")}


def evict(path: Path) -> None:
    """Ask the system to forget the set's cached pages, so that they come from the disk again."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rate(data: ShardedDataset, batch_size: int, seconds: float) -> float:
    """:return: Windows a second"""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        data.sample(batch_size)
        count += batch_size
    return count / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Write, measure, print.

    :param argv: Arguments, by default those of the process
    :return: Exit status
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path("shards-benchmark"))
    parser.add_argument("--transitions", type=int, default=50_000_000)
    parser.add_argument("--episode-length", type=int, default=1000)
    parser.add_argument("--preset", default="cpu", choices=sorted(PRESETS))
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each rate is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="do not delete the set at the end")
    args = parser.parse_args(argv)
    th.set_num_threads(args.threads)
    if not (args.path / "description.json").exists():
        print(f"written in {generate(args.path, args.transitions, args.episode_length):.0f} s")
    start = time.perf_counter()
    data = ShardedDataset(args.path, PRESETS[args.preset].horizon, seed=0)
    size = sum(file.stat().st_size for file in args.path.iterdir())
    print(f"opened in {time.perf_counter() - start:.2f} s: {len(data):,} transitions, {size / 1e9:.2f} GB on disk")
    learner, batch_size = make_learner(data, args.preset)
    print("resident MB before training:", {k: round(v) for k, v in resident().items()})

    evict(args.path)
    print(f"sampling from the disk: {rate(data, batch_size, args.seconds):,.0f} windows/s")
    peak = resident()
    for index in tqdm(range(args.updates), desc="Training", disable=None):
        learner.update(data.sample(batch_size), index)
        if index % 10 == 0:
            peak = {name: max(value, peak[name]) for name, value in resident().items()}
    print(f"highest resident MB in {args.updates} updates:", {k: round(v) for k, v in peak.items()})

    for file in args.path.iterdir():
        with file.open("rb") as content:
            while content.read(2**24):
                pass
    print(f"sampling from the page cache: {rate(data, batch_size, args.seconds):,.0f} windows/s")
    samples, count = data.sample(batch_size), iter(range(10**9))
    both = in_turns(
        lambda: data.sample(batch_size),
        lambda: learner.update(samples, next(count)),
        th.device("cpu"),
        args.seconds,
    )
    print(
        f"one batch of {batch_size}: sampling {1e3 * both.seconds:.2f} ms, update ({args.preset}) "
        f"{1e3 * both.reference:.2f} ms, ratio {both.ratio:.3f}"
    )
    if not args.keep:
        shutil.rmtree(args.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
