"""
Where the cpu preset stands: what more or less of one thing at a time brings, and costs.

Run it from the repository's root (hours on two cores; an interrupted run takes up where it stopped)::

    python -m tests.benchmarks.knee --seeds 0 1 --jobs 2

Each variant changes one setting of the preset. ``knee.csv`` and the printed table hold, for each variant and task, the
mean return over seeds after a fixed number of environment steps, and the processor's milliseconds for a step of
training; ``knee.png`` draws one against the other.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from tests.benchmarks import learning

PRESET = "preset"
VARIANTS = {
    "batch 96": "batch_size=96",
    "batch 128": "batch_size=128",
    "size 0.05": "model_size=0.05",
    "size 0.2": "model_size=0.2",
    "T 3": "denoising_steps=3",
    "T 9": "denoising_steps=9",
    "N 32": "n_samples=32",
    "N 128": "n_samples=128",
    "every update": "policy_delay=1,energy_interval=1",
}
# Environment steps, steps between evaluations, episodes of an evaluation
TASKS = {
    "Pendulum-v1": (2000, 500, 10),
    "InvertedPendulum-v5": (3000, 500, 5),
    "dmc:cartpole-swingup": (8000, 2000, 3),
}


def study(task: str, out: Path, seeds: list[int], jobs: int) -> int:
    """
    Run all variants on a task.

    :param task: Key of ``TASKS``
    :param out: Folder of the study
    :param seeds: Seeds
    :param jobs: Runs at the same time
    :return: Exit status
    """
    steps, every, episodes = TASKS[task]
    arguments = ["--task", task, "--algos", "mbdpo", "--label", f"mbdpo={PRESET}", "--out", str(out), "--device", "cpu"]
    arguments += ["--steps", str(steps), "--eval-every", str(every), "--eval-episodes", str(episodes)]
    arguments += ["--jobs", str(jobs), "--seeds", *map(str, seeds)]
    for name, setting in VARIANTS.items():
        arguments += ["--variant", f"{name}:{setting}"]
    return learning.main(arguments)


def table(out: Path) -> pd.DataFrame:
    """
    :param out: Folder of all studies
    :return: By variant: mean and lowest return over the seeds at the last step of each task, and processor time a step
    """
    columns = {}
    for task, (steps, _, _) in TASKS.items():
        path = out / folder(task)
        if not (path / learning.EVALUATIONS).exists():
            continue
        rows = learning.read_table(path, learning.EVALUATIONS)
        last = rows[rows["step"] == steps].groupby("label", sort=False)
        columns[f"{task} return"], columns[f"{task} worst"] = last["return_mean"].mean(), last["return_mean"].min()
        columns[f"{task} seeds"] = last["seed"].nunique()
        # From the first update to the end: what comes before is random and free
        first = rows[rows["n_updates"] > 0].groupby(["label", "seed"])[["step", "cpu_seconds"]].min()
        spent = rows[rows["step"] == steps].set_index(["label", "seed"])[["step", "cpu_seconds"]] - first
        columns[f"{task} ms"] = 1e3 * spent.groupby("label").sum().eval("cpu_seconds / step")
    return pd.DataFrame(columns).reindex([PRESET, *VARIANTS])


def folder(task: str) -> str:
    """
    :param task: Key of ``TASKS``
    :return: Name of its study's folder
    """
    return task.removeprefix("dmc:")


def plot(found: pd.DataFrame, path: Path) -> None:
    """
    Draw return against cost, a panel for each task.

    :param found: From :func:`table`
    :param path: Picture to write
    """
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if f"{task} return" in found]
    figure = Figure(figsize=(4.6 * len(tasks), 4), layout="constrained")
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for name, row in found.iterrows():
            marker = "*" if name == PRESET else "o"
            panel.scatter(row[f"{task} ms"], row[f"{task} return"], marker=marker, s=160 if marker == "*" else 30)
            panel.annotate(
                name, (row[f"{task} ms"], row[f"{task} return"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
        panel.set(title=f"{folder(task)}, {TASKS[task][0]} steps", xlabel="processor ms a step", ylabel="return")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments; None takes the process's own
    :return: Exit status
    """
    parser = argparse.ArgumentParser(description="The cpu preset beside its neighbours.")
    parser.add_argument("--tasks", nargs="*", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("logs", "knee"))
    args = parser.parse_args(argv)
    failures = sum(study(task, args.out / folder(task), args.seeds, args.jobs) for task in args.tasks)
    found = table(args.out)
    found.to_csv(args.out / "knee.csv", float_format="%.1f")
    plot(found, args.out / "knee.png")
    print(found.round(1).to_string())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
