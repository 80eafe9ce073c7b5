"""
Learning curves of MBDPO and of its rivals, each run trained in a fresh process.

Run it from the repository's root::

    python -m tests.benchmarks.learning --task Pendulum-v1 --algos mbdpo sac --seeds 0 1 2 3 4 --steps 5000 \\
        --eval-every 500 --threshold -200 --out logs/pendulum --variant noisy:exploration_noise=0.1

The folder then holds ``evaluations.csv`` (one row per evaluation: returns, seconds of training alone, wall and CPU),
``episodes.csv`` (one row per training episode), ``study.json`` (what was run) and ``learning.png``. The same command
again takes up where the study stopped: finished (label, seed) pairs are kept, unfinished ones start from scratch.
"""

import argparse
import csv
import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ALGOS = {"mbdpo": "sb3_mbdpo.MBDPO", "sac": "stable_baselines3.SAC", "tqc": "sb3_contrib.TQC"}
PACKAGES = ("sb3-mbdpo", "stable_baselines3", "sb3_contrib", "rl_zoo3", "torch", "gymnasium", "mujoco", "dm_control")
ROOT = Path(__file__).resolve().parents[2]
EVALUATIONS, EPISODES, STUDY, PICTURE = "evaluations.csv", "episodes.csv", "study.json", "learning.png"
# Given like an argument of the constructor, but a callback's
AVERAGING = "average_weights"
COMMON = ["label", "algo", "task", "seed", "step", "train_seconds"]
TIMES = ["cpu_seconds", "eval_seconds", "n_updates"]
FIELDS = {
    EVALUATIONS: [*COMMON, *TIMES, "return_mean", "return_std", "length_mean", "n_episodes"],
    EPISODES: [*COMMON, "episode_return", "episode_length"],
}


@dataclass(frozen=True)
class Settings:
    """
    What one label of a study runs, the same for all of its seeds.

    :param algo: Key of ``ALGOS``
    :param task: Name that ``environments.make`` understands
    :param kwargs: Constructor arguments, as YAML gave them; ``average_weights`` is WeightAveraging's decay
    :param n_envs: Training environments
    :param eval_every: Environment steps between evaluations
    :param eval_episodes: Episodes per evaluation, each from its own fixed seed and in its own environment
    :param threads: Torch threads
    :param device: Torch device
    """

    algo: str
    task: str
    kwargs: dict[str, Any]
    n_envs: int
    eval_every: int
    eval_episodes: int
    threads: int
    device: str


def parse_value(text: str) -> Any:
    """Read an argument as YAML; ``1e-3``, which YAML 1.1 takes for a string, is a number here."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_assignments(text: str) -> tuple[str, dict[str, Any]]:
    """
    Read ``name:key=value,key=value``; commas inside a value (``[64, 64]``) stay in it.

    :param text: Name and assignments as typed
    :return: The name, and the values by key
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in re.split(r",\s*(?=\w+=)", rest)]
    if not name or not all(equals and key.strip().isidentifier() for key, equals, _ in pairs):
        raise ValueError(f"Expected name:key=value,key=value, got {text!r}")
    return name, {key.strip(): parse_value(value) for key, _, value in pairs}


def read_table(out: Path, name: str) -> pd.DataFrame:
    """Read one of the study's tables, empty if it does not exist yet."""
    if not (out / name).exists():
        return pd.DataFrame(columns=FIELDS[name])
    # In the order in which rows are appended, whatever order the file was written in
    return pd.read_csv(out / name, dtype={"label": str}).reindex(columns=FIELDS[name])


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to one of the study's tables and close it: a study that is stopped keeps what it measured."""
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, FIELDS[path.name]).writerow(row)


def train(settings: Settings, label: str, seed: int, steps: int, out: Path) -> None:
    """
    Train one label with one seed and write its rows; the body of a worker process.

    :param settings: What to run
    :param label: Name of the curve
    :param seed: Seed of the algorithm and of the training environment
    :param steps: Environment steps
    :param out: The study's folder
    """
    import torch as th
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_mbdpo import WeightAveraging
    from tests.benchmarks import environments

    def vector(n_envs: int) -> DummyVecEnv:
        return DummyVecEnv([lambda: Monitor(environments.make(settings.task)) for _ in range(n_envs)])

    def clock() -> np.ndarray:
        if th.cuda.is_initialized():
            th.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    class RecordLearning(BaseCallback):
        """Evaluate at fixed steps, and keep a clock of training (wall, CPU) that stands still meanwhile."""

        def __init__(self) -> None:
            super().__init__()
            self.eval_env = vector(settings.eval_episodes)
            self.trained = np.zeros(2)
            self.resumed = np.zeros(2)
            self.evaluated_at = 0

        def _on_training_start(self) -> None:
            self.resumed = clock()

        def _on_step(self) -> bool:
            for episode in [info["episode"] for info in self.locals["infos"] if "episode" in info]:
                trained = self.trained + clock() - self.resumed
                self.write(EPISODES, trained, episode_return=episode["r"], episode_length=episode["l"])
            if self.num_timesteps // settings.eval_every > self.evaluated_at // settings.eval_every:
                self.evaluate()
            return True

        def _on_training_end(self) -> None:
            if self.evaluated_at < self.num_timesteps:
                self.evaluate()

        def evaluate(self) -> None:
            started = clock()
            self.trained += started - self.resumed
            # The same initial states at every evaluation and for every label, apart from those of training
            self.eval_env.seed(10_000 + 100 * seed)
            returns, lengths = evaluate_policy(
                self.model, self.eval_env, settings.eval_episodes, deterministic=True, return_episode_rewards=True
            )
            self.resumed, self.evaluated_at = clock(), self.num_timesteps
            self.write(
                EVALUATIONS,
                self.trained,
                cpu_seconds=self.trained[1],
                return_mean=np.mean(returns),
                return_std=np.std(returns),
                length_mean=np.mean(lengths),
                n_episodes=settings.eval_episodes,
                eval_seconds=(self.resumed - started)[0],
                n_updates=self.model._n_updates,
            )
            summary = f"return {np.mean(returns):.1f} +/- {np.std(returns):.1f}, {self.trained[0]:.1f} s of training"
            print(f"{label} seed {seed} step {self.num_timesteps}: {summary}", flush=True)

        def write(self, table: str, trained: np.ndarray, **values: Any) -> None:
            row = {
                "label": label,
                "algo": settings.algo,
                "task": settings.task,
                "seed": seed,
                "step": self.num_timesteps,
            }
            numbers = {"train_seconds": trained[0], **values}
            append_row(out / table, row | {key: round(value, 4) for key, value in numbers.items()})

    th.set_num_threads(settings.threads)
    module, name = ALGOS[settings.algo].rsplit(".", 1)
    algorithm = getattr(importlib.import_module(module), name)
    env = vector(settings.n_envs)
    own = environments.resolve_kwargs(settings.kwargs, int(np.prod(env.action_space.shape or ())))
    kwargs = {"policy": "MlpPolicy", "device": settings.device} | own
    decay = kwargs.pop(AVERAGING, None)
    # Before the one that evaluates, so that it sees the average
    averaging = [] if decay is None else [WeightAveraging(decay)]
    algorithm(env=env, seed=seed, **kwargs).learn(steps, callback=[*averaging, RecordLearning()])


def prepare(out: Path, labels: dict[str, Settings], seeds: list[int], steps: int) -> list[tuple[str, int]]:
    """
    Make the study's folder ready: check that its labels mean the same as before, drop the rows of unfinished runs.

    :param out: The study's folder
    :param labels: Settings by label
    :param seeds: Seeds of every label
    :param steps: Environment steps that a finished run has
    :return: The (label, seed) pairs that are left to run; the labels' order turns round from seed to seed, so that a
        slow spell of the computer does not always meet the same rival
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = {name: read_table(out, name) for name in FIELDS}
    study = json.loads((out / STUDY).read_text()) if (out / STUDY).exists() else {"labels": {}}
    measured = tables[EVALUATIONS]
    for label, settings in labels.items():
        before = study["labels"].get(label, asdict(settings))
        if before != asdict(settings) and (measured["label"] == label).any():
            raise ValueError(f"{out} holds {label!r} with other settings, {before}: choose another folder or label")
        study["labels"][label] = asdict(settings)
    installed = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    study["versions"] = {name: installed[name] for name in PACKAGES if name in installed}
    (out / STUDY).write_text(json.dumps(study, indent=2) + "\n")

    reached = measured.groupby(["label", "seed"])["step"].max().to_dict()
    pairs = [(label, seed) for i, seed in enumerate(seeds) for label in list(labels)[:: 1 if i % 2 == 0 else -1]]
    pending = [pair for pair in pairs if reached.get(pair, -1) < steps]
    for name, rows in tables.items():
        keep = [pair not in pending for pair in zip(rows["label"], rows["seed"], strict=True)]
        rows[np.array(keep, dtype=bool)].to_csv(out / name, index=False)
    return pending


def run(out: Path, labels: dict[str, Settings], pending: list[tuple[str, int]], steps: int, jobs: int) -> int:
    """
    Train the pending pairs in worker processes, a few at a time.

    :param out: The study's folder
    :param labels: Settings by label
    :param pending: The (label, seed) pairs to run
    :param steps: Environment steps of each
    :param jobs: Workers at the same time
    :return: How many workers failed
    """
    queue, failures = list(pending), 0
    running: dict[tuple[str, int], subprocess.Popen] = {}
    try:
        while queue or running:
            while queue and len(running) < jobs:
                label, seed = pair = queue.pop(0)
                work = {
                    "settings": asdict(labels[label]),
                    "label": label,
                    "seed": seed,
                    "steps": steps,
                    "out": str(out),
                }
                threads = str(labels[label].threads)
                env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
                command = [sys.executable, "-m", "tests.benchmarks.learning", "--worker", json.dumps(work)]
                running[pair] = subprocess.Popen(command, cwd=ROOT, env=env)
            time.sleep(0.1)
            for pair in [pair for pair, process in running.items() if process.poll() is not None]:
                code = running.pop(pair).returncode
                if code != 0:
                    failures += 1
                    print(f"{pair[0]} seed {pair[1]} failed: exit code {code}", file=sys.stderr, flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failures


def first_lasting(rows: pd.DataFrame, threshold: float) -> tuple[int, float] | None:
    """
    Find where one run comes to stay above a threshold.

    :param rows: Its evaluations, in order
    :param threshold: Mean return to reach
    :return: Step and seconds of training at the first evaluation from which on every one is at or above the
        threshold, or None
    """
    lasting = np.logical_and.accumulate((rows["return_mean"] >= threshold).to_numpy()[::-1])[::-1]
    reached = rows[lasting]
    return None if reached.empty else (int(reached["step"].iloc[0]), float(reached["train_seconds"].iloc[0]))


def summarise(rows: pd.DataFrame, threshold: float | None = None) -> str:
    """
    Write the study's table: returns at each step over seeds, the time of a step, and when the threshold was reached.

    :param rows: The study's evaluations
    :param threshold: Mean return to reach
    :return: The text
    """
    cells = rows.groupby(["step", "label"], sort=False)["return_mean"]
    table = (cells.mean().map("{:.1f}".format) + cells.min().map(" [{:.1f}]".format)).unstack("label").sort_index()
    lines = [f"{rows['task'].iloc[0]}: mean return over seeds [worst seed]", table.fillna("").to_string()]
    for label, group in rows.groupby("label", sort=False):
        runs = {seed: run.sort_values("step") for seed, run in group.groupby("seed")}
        # From the first evaluation on: before it lie the random steps of the start
        timed = group.groupby("seed")[["step", "train_seconds", "cpu_seconds"]]
        spans = (timed.max() - timed.min()).sum()
        decision = 1e3 * group["eval_seconds"].sum() / (group["length_mean"] * group["n_episodes"]).sum()
        wall, cpu = 1e3 * spans["train_seconds"] / spans["step"], 1e3 * spans["cpu_seconds"] / spans["step"]
        lines.append(
            f"{label}: {wall:.2f} ms a training step (CPU {cpu:.2f}), {decision:.2f} ms an evaluation decision"
        )
        if threshold is not None:
            found = {seed: first_lasting(run, threshold) for seed, run in runs.items()}
            text = [f"seed {seed}: {f'{at[0]} ({at[1]:.1f} s)' if at else 'never'}" for seed, at in found.items()]
            lines.append(f"  stays above {threshold:g} from step (seconds) on: {', '.join(text)}")
    return "\n".join(lines)


def plot(rows: pd.DataFrame, path: Path, threshold: float | None = None, episodes: pd.DataFrame | None = None) -> None:
    """
    Draw return by environment steps and by seconds of training: a thin line per seed, a bold one for their mean.

    :param rows: The study's evaluations
    :param path: Picture to write
    :param threshold: Return to mark
    :param episodes: The study's training episodes, to be drawn as dots; None for none
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    axes = {"step": "environment steps", "train_seconds": "seconds of training"}
    for panel, (column, title) in zip(panels, axes.items(), strict=True):
        for i, (label, group) in enumerate(rows.groupby("label", sort=False)):
            for _, run in group.groupby("seed"):
                panel.plot(run[column], run["return_mean"], color=f"C{i}", linewidth=0.8, alpha=0.4)
            mean = group.groupby("step", as_index=False)[["train_seconds", "return_mean"]].mean()
            seeds = group["seed"].nunique()
            panel.plot(
                mean[column],
                mean["return_mean"],
                color=f"C{i}",
                linewidth=2.5,
                label=f"{label} ({seeds} seed{'s' * (seeds != 1)})",
            )
            if episodes is not None:
                tried = episodes[episodes["label"] == label]
                name = f"{label}, training episodes"
                panel.scatter(tried[column], tried["episode_return"], color=f"C{i}", s=14, alpha=0.5, label=name)
        if threshold is not None:
            panel.axhline(threshold, color="grey", linestyle="--", linewidth=1)
        panel.set(xlabel=title, xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="evaluation return", title=rows["task"].iloc[0])
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read_labels(args: argparse.Namespace) -> dict[str, Settings]:
    """
    Work out what each label of the command line runs, and print it.

    :param args: The parsed command line
    :return: Settings by label
    """
    from tests.benchmarks import environments

    given: dict[str, dict[str, Any]] = {algo: {} for algo in ALGOS}
    for algo, values in map(parse_assignments, args.set):
        given[algo].update(values)
    names = dict(item.split("=", 1) for item in args.label)
    wanted: list[tuple[str, str, dict[str, Any]]] = [(names.get(algo, algo), algo, {}) for algo in args.algos]
    wanted += [(name, "mbdpo", values) for name, values in map(parse_assignments, args.variant)]
    labels: dict[str, Settings] = {}
    for label, algo, values in wanted:
        if label in labels:
            raise ValueError(f"Two curves are called {label!r}")
        tuned, source = environments.zoo_hyperparameters(algo, args.task)
        kwargs = tuned | given[algo] | values
        shared = (args.n_envs, args.eval_every, args.eval_episodes, args.threads, args.device)
        labels[label] = Settings(algo, args.task, kwargs, *shared)
        print(f"{label}: {ALGOS[algo]} on {args.task}, {source}; constructor arguments {kwargs}", flush=True)
    return labels


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments; None takes the process's own
    :return: Exit status, 1 if a worker failed
    """
    parser = argparse.ArgumentParser(description="Learning curves of MBDPO and its rivals.")
    add = parser.add_argument
    add("--task", default="Pendulum-v1", help="Gymnasium id, or dmc:<domain>-<task>")
    add("--out", type=Path, help="folder of the tables and the picture; logs/learning/<task> if not given")
    add("--algos", nargs="*", choices=ALGOS, default=["mbdpo", "sac"])
    add("--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="one more MBDPO, on top of --set")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="ALGO:KEY=VALUE,...",
        help="constructor arguments, YAML; average_weights=DECAY: learn with WeightAveraging",
    )
    add("--label", nargs="+", action="extend", default=[], metavar="ALGO=NAME", help="name of an algorithm's curve")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=5000, help="environment steps of a run")
    add("--eval-every", type=int, default=500, help="environment steps between evaluations")
    add("--eval-episodes", type=int, default=10)
    add("--n-envs", type=int, default=1, help="training environments; updates per step are --set's business")
    add("--threads", type=int, default=1, help="torch threads of a worker")
    add("--jobs", type=int, default=1, help="workers at the same time")
    add("--device", default="auto")
    add("--threshold", type=float, help="return to reach and keep")
    add("--training-episodes", action="store_true", help="draw returns of training episodes as dots")
    add("--plot-only", action="store_true", help="only make the table and the picture again")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work = json.loads(args.worker)
        train(Settings(**work.pop("settings")), out=Path(work.pop("out")), **work)
        return 0

    failures, out = 0, (args.out or Path("logs", "learning", args.task.replace(":", "-").replace("/", "-"))).resolve()
    if not args.plot_only:
        # So that a study told to end takes its workers with it
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        labels = read_labels(args)
        failures = run(out, labels, prepare(out, labels, args.seeds, args.steps), args.steps, args.jobs)
    rows = read_table(out, EVALUATIONS)
    if not rows.empty:
        print(summarise(rows, args.threshold))
        plot(rows, out / PICTURE, args.threshold, read_table(out, EPISODES) if args.training_episodes else None)
        print(f"Wrote {out / PICTURE}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
