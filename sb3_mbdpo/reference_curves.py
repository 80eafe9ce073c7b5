"""
The learning curves that the paper's authors released, to lay a run beside.

Means and standard deviations over seeds of evaluation returns, on 104 tasks from states ("mbdpo", "tdmpc2", "sac",
"dreamerv3", "tdmpc") and 10 to 12 from pixels ("mbdpo-pixels", "tdmpc2-pixels"). Steps count the agent's decisions, the
unit of ``num_timesteps`` and of ``evaluations.npz`` here: on DMControl and Meta-World each of them is two environment
steps. Curves are of returns on DMControl and of success on the other suites; the paper ran version 2 of Meta-World and
ManiSkill, of which version 3 is what can be installed.

>>> curve = reference_curve("walker-walk", "mbdpo")
>>> curve.metric, int(curve.steps[1])
('reward', 100000)
"""

import csv
import difflib
import functools
import gzip
from collections import defaultdict
from dataclasses import dataclass
from importlib import resources

import numpy as np

FILE = "reference_curves.csv.gz"


@dataclass(frozen=True)
class ReferenceCurve:
    """
    A curve, averaged over seeds.

    :param task: The paper's name of the task
    :param method: Method
    :param metric: "reward" for mean returns of evaluation episodes, "success" for a rate from 0 to 1
    :param steps: Decisions [n], ascending
    :param mean: Means over seeds [n]
    :param std: Standard deviations over seeds [n]
    :param seeds: Number of seeds [n]
    """

    task: str
    method: str
    metric: str
    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    seeds: np.ndarray


@functools.cache
def _curves() -> dict[tuple[str, str, str], ReferenceCurve]:
    rows = defaultdict(list)
    packed = resources.files("sb3_mbdpo").joinpath("data", FILE).read_bytes()
    for row in csv.DictReader(gzip.decompress(packed).decode().splitlines()):
        key = (row["task"], row["method"], row["metric"])
        rows[key].append([float(row[name]) for name in ("step", "mean", "std", "seeds")])
    columns = {key: np.array(sorted(values)).T for key, values in rows.items()}
    return {
        key: ReferenceCurve(*key, steps.astype(np.int64), mean, std, seeds.astype(np.int64))
        for key, (steps, mean, std, seeds) in columns.items()
    }


def reference_tasks(method: str | None = None) -> tuple[str, ...]:
    """
    :param method: Only tasks that this method has a curve for; None: any
    :return: Names of tasks, sorted
    """
    return tuple(sorted({task for task, of, _ in _curves() if method in (None, of)}))


def reference_methods(task: str | None = None) -> tuple[str, ...]:
    """
    :param task: Only methods that have a curve for this task; None: any
    :return: Names of methods, sorted
    """
    return tuple(sorted({method for of, method, _ in _curves() if task in (None, of)}))


def reference_curve(task: str, method: str = "mbdpo", metric: str | None = None) -> ReferenceCurve:
    """
    :param task: The paper's name of a task, such as "walker-walk" or "mw-reach"
    :param method: Method, such as "mbdpo" or "tdmpc2-pixels"
    :param metric: "reward" or "success"; None: reward where there is one
    :return: Its curve
    :raises ValueError: for a name that is not there, with the nearest ones
    """
    if task not in reference_tasks():
        raise ValueError(f"The reference has no task {task!r}; {_nearest(task, reference_tasks())}.")
    if method not in reference_methods():
        raise ValueError(f"The reference has no method {method!r}; {_nearest(method, reference_methods())}.")
    found = {of: curve for (name, by, of), curve in _curves().items() if (name, by) == (task, method)}
    if not found:
        raise ValueError(f"The reference has no curve of {method} on {task}; {_nearest('', reference_methods(task))}.")
    if metric is not None and metric not in found:
        raise ValueError(f"The reference has no {metric!r} of {method} on {task}; {_nearest(metric, tuple(found))}.")
    return found[metric] if metric is not None else found.get("reward") or found["success"]


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known[:10])
    return f"there is {', '.join(near)}"
