"""
Multi-task pretraining on dm_control, from data to fine-tuned agents, in one command::

    python hub/dmcontrol_mixed/study.py --out logs/dmcontrol-mixed --jobs 2

Agents learn online on six tasks; their replay becomes Minari data sets; one model of each size learns all six from
that data alone; the largest one is fine-tuned on two tasks that it has never seen, beside models of its size that start
from scratch. On single tasks, learning from their data is compared with behaviour cloning, with three weights of the
energy, in a model whose prior is kept near the data and in one whose prior is not.

Every unit of work is a process of its own that ends by writing ``<out>/<unit>.json``. The same command again takes up
where the study stopped; ``--report-only`` draws tables and pictures from what is there.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TASKS = ("walker-stand", "walker-walk", "cheetah-run", "reacher-easy", "finger-spin", "cartpole-swingup")
# Tasks that are held out, and the task that each is like
HELD_OUT = {"walker-run": "walker-walk", "reacher-hard": "reacher-easy"}
SIZES = (0.02, 0.05, 0.1)
# The one that is fine-tuned
FINETUNED_SIZE = 0.1
SEEDS = (0, 1, 2)
SINGLE_TASKS = ("walker-walk", "reacher-easy")
ENERGY_COEFS = (0.0, 0.01, 0.1)
COLLECT_STEPS, PRETRAIN_STEPS, SINGLE_STEPS, FINETUNE_STEPS = 10_000, 10_000, 8_000, 10_000
FOLDER = Path(__file__).resolve().parent


def dataset_id(task: str) -> str:
    """
    :param task: Task of the suite
    :return: Id of the data set that the study records of it
    """
    return f"dmcontrol-mixed/{task}-v0"


def stages() -> list[list[str]]:
    """
    :return: Units of work; those of one stage do not wait for each other
    """
    rest = [size for size in SIZES if size != FINETUNED_SIZE]
    scratch = [f"scratch {task} {seed}" for seed in SEEDS for task in HELD_OUT]
    averaged = [f"averaged {task} {seed}" for seed in SEEDS for task in HELD_OUT]
    finetune = [f"finetune {task} {seed}" for seed in SEEDS for task in HELD_OUT]
    single = [f"single {task} {seed}" for seed in SEEDS for task in SINGLE_TASKS]
    anchor = [f"anchor {task} {seed}" for seed in SEEDS for task in SINGLE_TASKS]
    clone = [f"clone {task} {seed}" for seed in SEEDS for task in SINGLE_TASKS]
    return [
        [f"collect {task}" for task in TASKS],
        [f"pretrain {FINETUNED_SIZE}", *scratch, *averaged],
        [f"pretrain {size}" for size in reversed(rest)] + finetune + clone + single + anchor,
    ]


def result_file(out: Path, unit: str) -> Path:
    """
    :param out: The study's folder
    :param unit: Unit of work
    :return: File that says what came of it
    """
    return out / f"{unit.replace(' ', '-')}.json"


def run_stage(units: list[str], out: Path, jobs: int) -> int:
    """
    Run what is not done yet, each unit in a process of its own.

    :param units: Units of work
    :param out: The study's folder
    :param jobs: Processes at the same time
    :return: How many failed
    """

    def run(unit: str) -> int:
        print(f"starting: {unit}", flush=True)
        command = [sys.executable, __file__, "--out", str(out), "--unit", unit]
        with open(result_file(out, unit).with_suffix(".log"), "w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{'done' if code == 0 else 'FAILED'}: {unit} (see {log.name})", flush=True)
        return int(code != 0)

    pending = [unit for unit in units if not result_file(out, unit).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(run, pending))


def run_unit(unit: str, out: Path) -> None:
    """
    Do one unit of work and write what came of it.

    :param unit: Name and arguments
    :param out: The study's folder
    """
    # Before anything asks Minari where its data sets are
    os.environ["MINARI_DATASETS_PATH"] = str(out / "minari")
    import torch as th

    sys.path.insert(0, str(FOLDER))
    import units

    # Networks this small gain nothing from a second thread
    th.set_num_threads(1)
    name, *arguments = unit.split()
    work: Callable[..., dict[str, Any]] = getattr(units, name)
    result = work(out, *arguments)
    file = result_file(out, unit)
    file.with_suffix(".tmp").write_text(json.dumps(result, indent=2) + "\n")
    file.with_suffix(".tmp").replace(file)


def main() -> int:
    """
    Run the command line.

    :return: Exit status, 1 if a unit failed
    """
    parser = argparse.ArgumentParser(description="Multi-task pretraining on dm_control, and what it is good for.")
    parser.add_argument("--out", type=Path, default=Path("logs", "dmcontrol-mixed"), help="folder of the study")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time, one thread each")
    parser.add_argument("--report-only", action="store_true", help="only draw tables and pictures again")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.unit:
        run_unit(args.unit, out)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if not args.report_only:
        for units in stages():
            if run_stage(units, out, args.jobs) > 0:
                return 1
    sys.path.insert(0, str(FOLDER))
    from report import write_report

    write_report(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
