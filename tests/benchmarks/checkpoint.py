"""
Time and memory of saving and loading a checkpoint, beside the size of its file.

    python -m tests.benchmarks.checkpoint --model-size 317 --tasks 80

Each step runs in a process of its own. Resident memory is the process's own ("anonymous") and with pages of the file
that are mapped, both as the largest seen; what the process needs before it loads anything stands beside.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STEPS = ("import", "save", "load", "load zip")


def resident() -> dict[str, float]:
    """Megabytes of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("anonymous", "RssAnon"), ("all", "VmRSS"))}


class Peak(threading.Thread):
    """Watches the memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.going = resident(), True

    def run(self) -> None:
        while self.going:
            self.largest = {name: max(value, self.largest[name]) for name, value in resident().items()}
            time.sleep(0.01)


def make(model_size: float, n_tasks: int) -> Any:
    """A model with Meta-World's widths; what its weights are makes no difference here."""
    import numpy as np
    from gymnasium import spaces

    from sb3_mbdpo import MBDPO, Task, TaskSet

    if n_tasks:
        tasks = TaskSet([Task(f"task-{index}", 39, 6, episode_length=100) for index in range(n_tasks)])
        return MBDPO("MultiInputPolicy", None, preset="paper", model_size=model_size, tasks=tasks, buffer_size=1000)
    model = MBDPO("MlpPolicy", None, preset="paper", model_size=model_size, buffer_size=1000, _init_setup_model=False)
    model.observation_space = spaces.Box(-np.inf, np.inf, (39,), np.float32)
    model.action_space, model.n_envs = spaces.Box(-1.0, 1.0, (6,), np.float32), 1
    model._setup_model()
    return model


def step(name: str, folder: Path, model_size: float, n_tasks: int) -> None:
    """One measurement, printed as JSON."""
    from sb3_mbdpo import MBDPO
    from sb3_mbdpo.checkpoint_config import WEIGHTS
    from sb3_mbdpo.checkpoint_weights import NoInitialization

    # What PyTorch loads for any optimizer
    __import__("torch._dynamo")
    model = None
    if name == "save":
        with NoInitialization():
            model = make(model_size, n_tasks)
    before, peak = resident(), Peak()
    peak.start()
    started, processor = time.perf_counter(), time.process_time()
    if name == "save":
        assert model is not None
        model.save_pretrained(folder / "model")
    elif name == "load":
        MBDPO.from_pretrained(folder / "model", device="cpu")
    elif name == "load zip":
        MBDPO.load(folder / "model.zip", device="cpu")
    found = {"step": name, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor}
    peak.going = False
    peak.join()
    if name == "save":
        model.save(folder / "model.zip")  # type: ignore[union-attr]
        found["file"] = (folder / "model" / WEIGHTS).stat().st_size / 2**20
    print(json.dumps(found | {"before": before["all"]} | {f"peak_{key}": value for key, value in peak.largest.items()}))


def main() -> None:
    """Measure each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", type=float, default=317, help="key of the size table")
    parser.add_argument("--tasks", type=int, default=80, help="tasks of the model; 0: a single one")
    parser.add_argument("--folder", help="where files go; by default a temporary folder")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="what is measured")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step(arguments.step, Path(arguments.folder), arguments.model_size, arguments.tasks)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        command = [sys.executable, "-m", "tests.benchmarks.checkpoint", "--folder", folder]
        command += ["--model-size", str(arguments.model_size), "--tasks", str(arguments.tasks)]
        titles = f"{'step':<9} {'seconds':>8} {'cpu s':>7} {'before MB':>10} {'peak MB':>8}"
        print(f"{titles} {'with mapped':>12} {'file MB':>8}", flush=True)
        for name in arguments.steps:
            result = subprocess.run([*command, "--step", name], check=True, capture_output=True, text=True)
            found = json.loads(result.stdout.splitlines()[-1])
            print(
                f"{name:<9} {found['seconds']:>8.1f} {found['cpu_seconds']:>7.1f} {found['before']:>10.0f} "
                f"{found['peak_anonymous']:>8.0f} {found['peak_all']:>12.0f} {found.get('file', 0):>8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
