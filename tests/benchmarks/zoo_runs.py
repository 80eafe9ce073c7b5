"""
Train entries of ``zoo_configs/mbdpo.yml``, or try each of them out, and keep what ``zoo_table`` makes its table of.

Run it from the repository's root::

    python -m tests.benchmarks.zoo_runs --envs Pendulum-v1 mbdpo/cartpole-swingup-v0 --seeds 0 --jobs 1
    python -m tests.benchmarks.zoo_runs --smoke

Each environment gets a folder of ``tests.benchmarks.learning`` under ``--out``; finished runs are kept when the same
command is given again, unfinished ones start anew. ``--smoke`` trains every entry whose package is installed for a few
dozen steps in a tiny setting, through the RL Zoo's own program, and notes it in ``smoke.csv``.
"""

import argparse
import contextlib
import csv
import importlib.metadata
import io
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import yaml

from tests.benchmarks import learning

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "zoo_configs" / "mbdpo.yml"
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "zoo"
SMOKE = "smoke.csv"
SMOKE_FIELDS = ["env_id", "steps", "mujoco"]
SMOKE_STEPS = 60
# Everything small: what is tried out is that the entry, the environment and the algorithm go together
SMOKE_PARAMS = ["preset:'debug'", "learning_starts:40", "warmup_updates:2", "batch_size:8", "buffer_size:200"]


def read_entries() -> dict[str, dict]:
    """:return: The configuration's entries by environment id, the default one left out"""
    entries = yaml.safe_load(CONFIG.read_text())
    return {env_id: entry for env_id, entry in entries.items() if env_id != "default"}


def folder_name(env_id: str) -> str:
    """
    >>> folder_name("mbdpo/walker-walk-v0")
    'mbdpo-walker-walk-v0'

    :param env_id: Environment id
    :return: Name of its folder
    """
    return env_id.replace("/", "-")


def can_be_made(env_id: str) -> bool:
    """
    :param env_id: Environment id
    :return: Whether its package is installed, and pictures can be drawn where it needs them
    """
    from sb3_mbdpo import zoo_checks

    try:
        zoo_checks.import_environments(env_id)
        gym.make(env_id, disable_env_checker=True).close()
    except (ImportError, RuntimeError, gym.error.Error) as error:
        print(f"{env_id}: left out: {error}", flush=True)
        return False
    return True


def smoke(env_id: str) -> None:
    """
    Train an entry for a few dozen steps, by the RL Zoo's program.

    :param env_id: Environment id
    """
    from sb3_mbdpo import zoo

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train", "--env", env_id, "-n", str(SMOKE_STEPS), "--seed", "0", "--device", "cpu"]
        arguments += ["--num-threads", "1", "--eval-freq", "-1", "--verbose", "0", "-f", folder]
        with contextlib.redirect_stdout(io.StringIO()):
            zoo.main([*arguments, "-params", *SMOKE_PARAMS])
        saved = list(Path(folder).glob("mbdpo/*/*.zip"))
        assert len(saved) == 1, f"{env_id} left no model"


def note_smoke(out: Path, env_id: str) -> None:
    """
    Put a line into the table of what was tried out, in place of an earlier one.

    :param out: Folder of the results
    :param env_id: Environment id
    """
    rows = {}
    if (out / SMOKE).is_file():
        with open(out / SMOKE, newline="") as file:
            rows = {row["env_id"]: row for row in csv.DictReader(file)}
    try:
        mujoco = importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError:
        mujoco = ""
    rows[env_id] = {"env_id": env_id, "steps": str(SMOKE_STEPS), "mujoco": mujoco}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / SMOKE, "w", newline="") as file:
        writer = csv.DictWriter(file, SMOKE_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def study(env_id: str, args: argparse.Namespace) -> int:
    """
    Train an entry in full.

    :param env_id: Environment id
    :param args: The parsed command line
    :return: 1 if a run failed
    """
    steps = args.steps or int(float(read_entries()[env_id]["n_timesteps"]) * args.scale)
    arguments = ["--task", env_id, "--algos", *args.algos, "--out", str(args.out / folder_name(env_id))]
    arguments += ["--steps", str(steps), "--eval-every", str(max(steps // args.evaluations, 1))]
    arguments += ["--eval-episodes", str(args.eval_episodes), "--seeds", *map(str, args.seeds)]
    arguments += ["--jobs", str(args.jobs), "--threads", str(args.threads), "--device", args.device]
    return learning.main(arguments)


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments; None takes the process's own
    :return: Exit status, 1 if something failed
    """
    parser = argparse.ArgumentParser(description="Train entries of the configuration, or try them out.")
    parser.add_argument("--envs", nargs="+", help="environment ids; all entries by default")
    parser.add_argument("--smoke", action="store_true", help="a few dozen steps of each entry that can be made here")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--algos", nargs="+", default=["mbdpo"], help="mbdpo, sac, tqc")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the entry's n_timesteps to train for")
    parser.add_argument("--steps", type=int, help="steps to train for, whatever the entry says")
    parser.add_argument("--evaluations", type=int, default=10, help="evaluations of a run")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.envs or []) - set(read_entries()))
    if unknown:
        parser.error(f"{CONFIG.name} has no entry for {', '.join(unknown)}")
    chosen = [env_id for env_id in args.envs or read_entries() if can_be_made(env_id)]
    failed = 0
    for env_id in chosen:
        if args.smoke:
            smoke(env_id)
            note_smoke(args.out, env_id)
            print(f"{env_id}: {SMOKE_STEPS} steps", flush=True)
        else:
            failed += study(env_id, args)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
