"""
The table of ``zoo_configs/README.md``: what was trained and what was only tried out, from files of results.

Run it from the repository's root, after ``tests.benchmarks.zoo_runs``::

    python -m tests.benchmarks.zoo_table [--check]
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import pandas as pd

from sb3_mbdpo.reference_curves import reference_curve, reference_tasks
from sb3_mbdpo.suites.registration import task_of
from tests.benchmarks import zoo_runs
from tests.benchmarks.learning import EVALUATIONS

README = zoo_runs.ROOT / "zoo_configs" / "README.md"
# Decisions
RELEASED_AT = 100_000
# Studies that were made on their own; the last two are one task by two names
ELSEWHERE = {
    "Pendulum-v1": "Pendulum-v1",
    "InvertedPendulum-v5": "InvertedPendulum-v5",
    "mbdpo/cartpole-swingup-v0": "cartpole-swingup",
    "dm_control/cartpole-swingup-v0": "cartpole-swingup",
}
BEGIN, END = "<!-- made by python -m tests.benchmarks.zoo_table -->\n", "<!-- end -->\n"
COLUMNS = ("id", "how it was run", "steps", "return at the end", "best", "time", "zoo's SAC", "zoo's TQC", "released")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


def table(results: Path = zoo_runs.RESULTS) -> str:
    """
    :param results: Folder of the results
    :return: The table, a line for each entry of the configuration, in its order
    """
    published, tried = read_published(results), read_smoke(results)
    return HEADER + "".join(line(env_id, results, published, tried) for env_id in zoo_runs.read_entries())


def line(env_id: str, results: Path, published: dict[tuple[str, str], str], tried: dict[str, dict[str, str]]) -> str:
    """
    :param env_id: Environment id
    :param results: Folder of the results
    :param published: What `read_published` gives
    :param tried: What `read_smoke` gives
    :return: The entry's line
    """
    path = results / zoo_runs.folder_name(env_id) / EVALUATIONS
    if not path.is_file() and env_id in ELSEWHERE:
        path = results.parent / ELSEWHERE[env_id] / EVALUATIONS
    if path.is_file():
        rows = pd.read_csv(path)
        rows = rows[rows["label"] == "mbdpo"]
        cells = trained(rows) if not rows.empty else ["not run", "", "", "", ""]
    elif env_id in tried:
        cells = [f"smoke-tested, {tried[env_id]['steps']} steps", "", "", "", ""]
    else:
        cells = ["not run", "", "", "", ""]
    beside = [published.get((algo, unversioned(env_id)), "") for algo in ("sac", "tqc")]
    return f"| {' | '.join([env_id, *cells, *beside, released(env_id)])} |\n"


def released(env_id: str) -> str:
    """
    :param env_id: Environment id
    :return: What the paper's authors released for this task of their MBDPO and of SAC, at RELEASED_AT decisions
    """
    task, suffix = task_of(env_id), "-pixels" if "pixels" in env_id else ""
    values = []
    for method in ("mbdpo", "sac"):
        if task in reference_tasks(method + suffix):
            curve = reference_curve(task, method + suffix)
            value = curve.mean[abs(curve.steps - RELEASED_AT).argmin()]
            figure = f"{value:.2f} success" if curve.metric == "success" else f"{value:,.0f}"
            values.append(f"{method.upper()} {figure}")
    return ", ".join(values)


def trained(rows: pd.DataFrame) -> list[str]:
    """
    :param rows: Evaluations of MBDPO, of all seeds
    :return: Cells: seeds, steps, mean return of the last evaluation with the worst seed, best mean, time of a run
    """
    last = rows.sort_values("step").groupby("seed").tail(1)
    best = rows.groupby("step")["return_mean"].mean().max()
    seeds, steps = len(last), int(last["step"].min())
    spread = last["return_std"].iloc[0] if seeds == 1 else last["return_mean"].std(ddof=0)
    of = "episodes" if seeds == 1 else "seeds"
    mean = f"{last['return_mean'].mean():,.0f} ± {spread:,.0f} (std over {of})"
    minutes = last["train_seconds"].mean() / 60
    return [f"trained, {seeds} seed{'s' * (seeds > 1)}", f"{steps:,}", mean, f"{best:,.0f}", f"{minutes:,.0f} min"]


def read_published(results: Path) -> dict[tuple[str, str], str]:
    """
    :param results: Folder of the results
    :return: What the zoo has published, by algorithm and environment without its version
    """
    with open(results / "published.csv", newline="") as file:
        return {
            (row["algo"], unversioned(row["env_id"])): f"{float(row['mean_reward']):,.0f} ± "
            f"{float(row['std_reward']):,.0f} ({row['env_id']}, {row['n_timesteps']})"
            for row in csv.DictReader(file)
        }


def read_smoke(results: Path) -> dict[str, dict[str, str]]:
    """
    :param results: Folder of the results
    :return: What was tried out, by environment id
    """
    path = results / zoo_runs.SMOKE
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        return {row["env_id"]: row for row in csv.DictReader(file)}


def unversioned(env_id: str) -> str:
    """
    >>> unversioned("Hopper-v5")
    'Hopper'

    :param env_id: Environment id
    :return: The id without its version
    """
    return re.sub(r"-v\d+$", "", env_id)


def renewed(text: str, new: str) -> str:
    """
    :param text: The README
    :param new: The table
    :return: The README with the table in place of the one between the marks
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{new}{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments; None takes the process's own
    :return: Exit status, 1 if the table is not that of the results and should only be checked
    """
    parser = argparse.ArgumentParser(description="Write the table of zoo_configs/README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the table is an old one")
    args = parser.parse_args(argv)
    text = README.read_text()
    new = renewed(text, table())
    if args.check:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
