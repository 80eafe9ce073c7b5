"""
``mbdpo plot``: learning curves of runs, beside the paper's where asked for; or one of the RL Zoo's plot programs.

Steps on the horizontal axis are environment steps: a run counts decisions, as the reference curves do, and both are
multiplied by the steps that a decision lasts (two on DMControl, Meta-World and ManiSkill, one elsewhere).
"""

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sb3_mbdpo import zoo
from sb3_mbdpo.reference_curves import ReferenceCurve, reference_curve, reference_methods
from sb3_mbdpo.suites.registration import DMCONTROL, MANISKILL, task_of
from sb3_mbdpo.task_names import META_WORLD
from sb3_mbdpo.zoo_checks import BadInputError, check_run, has_display, run_number, sentence

# The zoo's own programs by the word after `mbdpo plot`
ZOO_PLOTS = {"train": "plot_train", "all": "all_plots", "file": "plot_from_file"}
PAPER = "paper"


@dataclass(frozen=True)
class RunCurve:
    """
    Evaluations of a run.

    :param name: Name of its folder
    :param steps: Decisions at each evaluation [n]
    :param mean: Mean over the episodes of each [n]
    """

    name: str
    steps: np.ndarray
    mean: np.ndarray


def plot(arguments: Sequence[str]) -> int:
    """
    :param arguments: command line arguments
    :return: exit code
    """
    if arguments and arguments[0] in ZOO_PLOTS:
        return _zoo_plot(arguments[0], list(arguments[1:]))
    parser = argparse.ArgumentParser(
        prog="mbdpo plot",
        description="Draw the evaluations of runs. `mbdpo plot train|all|file ...` are rl_zoo3's plot_train, all_plots "
        "and plot_from_file, with --save FILE for a picture of what they show.",
    )
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("-f", "--log-folder", default="logs", help="log folder given to training")
    parser.add_argument("--algo", default=zoo.ALGO, help="algorithm whose runs to draw")
    parser.add_argument("--exp-id", type=int, nargs="+", default=[], help="numbers of the runs (default: all)")
    parser.add_argument("--against", choices=[PAPER], help="draw the curves that the paper's authors released below")
    parser.add_argument("--task", help="name of the task in the reference, where the id does not say it")
    parser.add_argument("--methods", nargs="+", help="reference methods (default: mbdpo tdmpc2 sac, or the pixel ones)")
    parser.add_argument("--max-timesteps", type=_steps, help="environment steps to draw")
    parser.add_argument("-o", "--output", type=Path, help="picture to write (default: in the log folder)")
    args = parser.parse_args(list(arguments))

    task = args.task or task_of(args.env)
    if args.methods and not args.against:
        raise BadInputError(f"--methods are the reference's: add --against {PAPER}.")
    references = find_references(task, args.methods, "pixels" in args.env) if args.against else []
    success = any(curve.metric == "success" for curve in references)
    runs = read_runs(args.log_folder, args.algo, args.env, args.exp_id, success)
    name = f"{args.env.replace('/', '-')}{'_against_paper' if args.against else ''}.png"
    output = args.output or Path(args.log_folder) / args.algo / name
    check_picture(output)
    draw(runs, references, args.env, steps_per_decision(task), output, args.max_timesteps)
    print(f"Wrote {output}")
    return 0


def _steps(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def check_picture(path: Path) -> None:
    """
    Make the folder of a picture.

    :param path: Picture to write
    :raises BadInputError: if one of its kind cannot be written there
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    # What has no suffix is written as PNG, with one
    if path.is_dir() or path.suffix[1:].lower() not in ("", *kinds):
        raise BadInputError(f"{path} is no picture that can be written: name a file that ends in .{', .'.join(kinds)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadInputError(f"{path} cannot be written: {sentence(error)}.") from error


def find_references(task: str, methods: Sequence[str] | None = None, pixels: bool = False) -> list[ReferenceCurve]:
    """
    :param task: The paper's name of the task
    :param methods: Methods; None: MBDPO and its main rivals
    :param pixels: Take the curves that were learned from pixels by default
    :return: Their curves
    :raises BadInputError: for a name that is not there, with the nearest ones
    """
    usual = ("mbdpo-pixels", "tdmpc2-pixels") if pixels else ("mbdpo", "tdmpc2", "sac")
    try:
        there = reference_methods(task)
        chosen = methods or [method for method in usual if method in there]
        return [reference_curve(task, method) for method in chosen or usual]
    except ValueError as error:
        raise BadInputError(f"{error} (--task names the task if the id does not.)") from error


def read_runs(
    folder: str, algo: str, env_id: str, numbers: Sequence[int] = (), success: bool = False
) -> list[RunCurve]:
    """
    :param folder: Log folder
    :param algo: Algorithm
    :param env_id: Environment id
    :param numbers: Numbers of the runs; none for all
    :param success: Read rates of success instead of returns
    :return: The runs that were evaluated
    :raises BadInputError: if there is none
    """
    check_run(folder, algo, env_id)
    _check_numbers(folder, algo, env_id, numbers)
    name, key = env_id.replace("/", "-"), "successes" if success else "results"
    curves = []
    for path in sorted((Path(folder) / algo).glob(f"{name}_*/evaluations.npz")):
        number = run_number(path.parent, name)
        if number is None or (numbers and number not in numbers):
            continue
        with np.load(path) as evaluations:
            if key in evaluations:
                curves.append(RunCurve(path.parent.name, evaluations["timesteps"], evaluations[key].mean(axis=1)))
    if not curves:
        what = "says how often it succeeded" if success else "was evaluated"
        raise BadInputError(f"No run of {algo} on {env_id} under {folder} {what}: train with --eval-freq.")
    return curves


def _check_numbers(folder: str, algo: str, env_id: str, numbers: Sequence[int]) -> None:
    name = env_id.replace("/", "-")
    there = {number for path in (Path(folder) / algo).glob(f"{name}_*") if (number := run_number(path, name))}
    missing = sorted(set(numbers) - there)
    if missing:
        raise BadInputError(f"There is no run {missing[0]} of {algo} on {env_id}; there are {sorted(there)}.")


def steps_per_decision(task: str) -> int:
    """
    :param task: The paper's name of a task, or an environment id
    :return: Environment steps that each decision lasts

    >>> steps_per_decision("walker-walk"), steps_per_decision("myo-reach"), steps_per_decision("Pendulum-v1")
    (2, 1, 1)
    """
    return 2 if task in DMCONTROL or task in META_WORLD or task in MANISKILL else 1


def draw(
    runs: Sequence[RunCurve],
    references: Sequence[ReferenceCurve],
    title: str,
    repeat: int,
    output: Path,
    max_steps: float | None = None,
) -> None:
    """
    :param runs: Runs; a thin line each, and their mean where they were evaluated at the same steps
    :param references: Reference curves, with a band of one standard deviation over seeds
    :param title: Title
    :param repeat: Environment steps that each decision lasts
    :param output: Picture to write
    :param max_steps: Environment steps to draw; None: twice those of the longest run, or to the references' first
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")  # without pyplot: no backend, no window
    axes = figure.add_subplot()
    for index, curve in enumerate(references):
        color, steps = f"C{index + 1}", curve.steps * repeat
        label = f"{curve.method}, released ({int(curve.seeds.max())} seeds)"
        axes.plot(steps, curve.mean, color=color, lw=1.4, ls="--", marker="o", ms=3, label=label)
        axes.fill_between(steps, curve.mean - curve.std, curve.mean + curve.std, color=color, alpha=0.12, lw=0)
    together = len(runs) > 1 and all(np.array_equal(run.steps, runs[0].steps) for run in runs)
    for run in runs:
        style = {"lw": 0.9} if together else {"lw": 2, "label": run.name}
        axes.plot(run.steps * repeat, run.mean, color="C0", marker=".", **style)
    if together:
        mean = np.mean([run.mean for run in runs], axis=0)
        axes.plot(runs[0].steps * repeat, mean, color="C0", lw=2.5, label=f"this project ({len(runs)} runs)")
    longest = max(int(run.steps[-1]) for run in runs) * repeat
    # As far as the first evaluations of the references at least: between them there are straight lines alone
    firsts = [1.1 * repeat * int(curve.steps[curve.steps > 0][0]) for curve in references]
    axes.set_xlim(0, max_steps or max([longest * (2 if references else 1.02), *firsts]))
    success = any(curve.metric == "success" for curve in references)
    axes.set(title=title, xlabel="environment steps", ylabel="success rate" if success else "evaluation return")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=130)


def _zoo_plot(word: str, arguments: list[str]) -> int:
    program = ZOO_PLOTS[word]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save", type=Path)
    given, rest = parser.parse_known_args(arguments)
    if not has_display():
        os.environ.setdefault("MPLBACKEND", "Agg")
        asks = any(argument in ("-h", "--help", "--no-display", "--no-render") for argument in rest)
        if program == "plot_train" and given.save is None and not asks:
            raise BadInputError("There is no display to show the plot on: add --save FILE for a picture.")
    _check_runs(word, rest)
    if given.save is not None:
        check_picture(given.save)
    zoo.hand_over(program, rest, f"mbdpo plot {word}")
    if given.save is not None:
        from matplotlib import pyplot

        pyplot.savefig(given.save, dpi=130)
        print(f"Wrote {given.save}")
    return 0


def _check_runs(word: str, arguments: list[str]) -> None:
    """The zoo draws an empty picture of environments without runs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # plot_train takes one algorithm and folder, all_plots several; plot_from_file takes neither
    parser.add_argument("-a", "--algo", "--algos", nargs="+", default=[])
    parser.add_argument("-e", "--env", nargs="+", default=[])
    parser.add_argument("-f", "--exp-folder", "--exp-folders", nargs="+", default=[])
    if word == "file" or any(argument in ("-h", "--help") for argument in arguments):
        return
    given = parser.parse_known_args(arguments)[0]
    folders = [(folder, algo.lower()) for folder in given.exp_folder for algo in given.algo]
    for env_id in given.env if folders else []:
        runs = [path for folder, algo in folders for path in (Path(folder) / algo).glob("*") if path.is_dir()]
        if not any(env_id in path.name for path in runs):
            check_run(*folders[0], env_id)
            raise BadInputError(f"Runs are found by the names of their folders: -e {env_id.replace('/', '-')}.")
