"""Pictures of what the policy does."""

from typing import cast

import numpy as np

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("pictures need matplotlib: run `pip install matplotlib`") from error

from sb3_mbdpo.imagination import PlanTrace
from sb3_mbdpo.task_scores import TaskScores

MAX_COLUMNS = 6


def plot_plan(trace: PlanTrace, row: int = 0, max_actions: int = 4) -> Figure:
    """
    Draw how a search found its plan: one column per denoising step, one row per action.

    Each thin line is a candidate, coloured by its return relative to the other candidates of its step; the dashed line
    is where the candidates were laid, the thick one the plan that the step found.

    :param trace: Denoising path, from ``model.plan(obs, return_trace=True)``
    :param row: Which observation of the batch
    :param max_actions: Actions drawn; more are left out
    :return: Figure; ``figure.savefig("plan.png")`` writes it
    :raises IndexError: if the batch has no such row
    """
    steps, batch, _, horizon, width = trace.candidates.shape
    if not 0 <= row < batch:
        raise IndexError(f"row must be between 0 and {batch - 1}, the observations of this trace, got {row}.")
    columns = np.unique(np.linspace(0, steps - 1, min(steps, MAX_COLUMNS)).round().astype(int))
    width = min(width, max_actions)
    figure = Figure(figsize=(2.6 * len(columns) + 1, 2.2 * width + 0.6), layout="constrained")
    panels = figure.subplots(width, len(columns), sharex=True, sharey=True, squeeze=False)
    time = np.arange(horizon)
    for column, step in enumerate(columns):
        returns = trace.returns[step, row]
        spread = max(float(np.ptp(returns)), 1e-9)
        # The best last, on top of the others
        order = np.argsort(returns)
        colours = _colours((returns[order] - returns.min()) / spread)
        for action in range(width):
            panel = panels[action, column]
            for colour, candidate in zip(colours, trace.candidates[step, row, order, :, action], strict=True):
                panel.plot(time, candidate, color=colour, linewidth=0.6, alpha=0.5)
            panel.plot(time, trace.centres[step, row, :, action], color="black", linewidth=1.2, linestyle="--")
            panel.plot(time, trace.plans[step, row, :, action], color="red", linewidth=2.2)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set(ylim=(-1.05, 1.05))
            if column == 0:
                panel.set_ylabel(f"action {action} (scaled)")
        best = f"returns {returns.min():.3g} to {returns.max():.3g}"
        panels[0, column].set_title(f"step {step + 1} of {steps}, sigma {trace.sigmas[step]:.2g}\n{best}", fontsize=8)
        panels[-1, column].set_xlabel("plan step")
    return figure


def _colours(fractions: np.ndarray) -> np.ndarray:
    """Grey for the worst candidate to blue for the best [N, 3]."""
    worst, best = np.array([0.85, 0.85, 0.85]), np.array([0.0, 0.3, 0.8])
    return worst + fractions[:, None] * (best - worst)


def plot_task_scores(scores: TaskScores, before: TaskScores | None = None) -> Figure:
    """
    Draw scores task by task: a bar for each, with the standard deviation over its episodes.

    Normalised scores where every task has them, returns otherwise.

    :param scores: From ``model.evaluate_tasks()``
    :param before: Earlier scores to draw beside them, e.g. from before a fine-tuning; tasks they lack get one bar
    :return: Figure; ``figure.savefig("tasks.png")`` writes it
    :raises ValueError: if there is nothing to draw
    """
    if not scores:
        raise ValueError("There are no scores to draw.")
    shown = [("before", before), ("after", scores)] if before is not None else [("", scores)]
    normalized = all(score.normalized is not None for _, group in shown for score in group)
    figure = Figure(figsize=(max(0.7 * len(scores) + 2, 4.5), 4), layout="constrained")
    panel, width = figure.subplots(), 0.8 / len(shown)
    positions = {score.name: place for place, score in enumerate(scores)}
    for number, (label, group) in enumerate(shown):
        known = [score for score in group if score.name in positions]
        places = [positions[score.name] + (number - (len(shown) - 1) / 2) * width for score in known]
        heights = [cast(float, score.normalized) if normalized else score.mean for score in known]
        spreads = [cast(float, score.normalized_std) if normalized else score.std for score in known]
        colour = (0.6, 0.6, 0.6) if label == "before" else (0.0, 0.3, 0.8)
        panel.bar(places, heights, width, yerr=spreads, label=label, color=colour, capsize=2)
    panel.axhline(0.0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(scores)), [score.name for score in scores], rotation=45, ha="right")
    panel.set_ylabel("normalised score" if normalized else "return of an episode")
    if before is not None:
        panel.legend(frameon=False)
    return figure
