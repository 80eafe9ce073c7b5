"""Tables and pictures of the study, from what its units of work left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from study import ENERGY_COEFS, HELD_OUT, TASKS, stages

PRETRAINING, FINETUNING, RESULTS = "pretraining.png", "finetuning.png", "results.md"
LABEL_HEIGHT = 0.035
# Units of work whose learning curves are compared
COMPARED = {
    "finetune": "fine-tuned",
    "scratch": "from scratch",
    "averaged": "from scratch, weights averaged",
}


def write_report(out: Path) -> None:
    """
    Write ``results.md`` and two pictures into the study's folder.

    :param out: The study's folder
    """
    units = [unit for stage in stages() for unit in stage]
    files = {unit: out / f"{unit.replace(' ', '-')}.json" for unit in units}
    found = {unit: json.loads(file.read_text()) for unit, file in files.items() if file.exists()}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for unit, result in found.items():
        by_kind.setdefault(unit.split()[0], []).append(result)
    parts = [f"{len(found)} of {len(units)} units of work are done."]
    if "collect" in by_kind:
        parts.append(_data_table(by_kind["collect"]))
    if "pretrain" in by_kind:
        ordered = sorted(by_kind["pretrain"], key=lambda result: result["size"])
        parts.append(_pretraining_table(ordered))
        _draw_pretraining(ordered).savefig(out / PRETRAINING, dpi=130)
    if "finetune" in by_kind and "scratch" in by_kind:
        compared = {label: by_kind[kind] for kind, label in COMPARED.items() if kind in by_kind}
        parts.append(_finetuning_table(compared))
        _draw_finetuning(compared).savefig(out / FINETUNING, dpi=130)
    if "single" in by_kind:
        parts.append(_single_table(by_kind["single"], by_kind.get("clone", []), by_kind.get("anchor", [])))
    (out / RESULTS).write_text("\n\n".join(parts) + "\n")
    print((out / RESULTS).read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _data_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        returns, curve = result["returns"], result["curve"]["return_mean"]
        spread = f"{min(returns):.0f} to {max(returns):.0f}"
        rows.append([result["task"], str(len(returns)), f"{np.mean(returns):.0f}", spread, f"{curve[-1]:.0f}"])
    return _table(["data", "episodes", "mean return", "range", "the agent at the end"], rows)


def _pretraining_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        scores = [f"{result['tasks'][task]['mean']:.0f}" for task in TASKS]
        size = f"{result['size']} ({result['parameters'] / 1e6:.2f} M)"
        rows.append([size, *scores, f"{result['mean_normalized']:.3f}"])
    return _table(["model size", *TASKS, "mean normalised score"], rows)


def _curves(results: list[dict[str, Any]], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T] and returns [seeds, T] of one task, without what came before the first step."""
    curves = [result["curve"] for result in results if result["task"] == task]
    steps = np.array(curves[0]["step"])
    returns = np.array([curve["return_mean"] for curve in curves])
    return steps, returns


def _finetuning_table(compared: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for task in HELD_OUT:
        for label, results in compared.items():
            if not any(result["task"] == task for result in results):
                continue
            steps, returns = _curves(results, task)
            cells = {step: f"{row.mean():.0f} [{row.min():.0f}]" for step, row in zip(steps, returns.T, strict=True)}
            picked = [cells.get(step, "") for step in (0, 1000, 2000, 3000, 5000, 7000, 10_000)]
            rows.append([f"{task}, {label} ({len(returns)} seeds)", *picked])
    header = ["return, mean of seeds [worst]", "0", "1,000", "2,000", "3,000", "5,000", "7,000", "10,000"]
    return _table(header, rows)


def _single_table(results: list[dict[str, Any]], clones: list[dict[str, Any]], anchored: list[dict[str, Any]]) -> str:
    rows = []
    for task in dict.fromkeys(result["task"] for result in results):
        data = next(result["data_returns"] for result in results if result["task"] == task)
        rows.append([task, "the data's own", f"{np.mean(data):.0f}", "", ""])
        cloned = [np.mean(result["returns"]) for result in clones if result["task"] == task]
        if cloned:
            rows.append([task, f"behaviour cloning ({len(cloned)} seeds)", _mean_worst(cloned), "", ""])
        for label, runs in (("MBDPO", results), ("MBDPO, energy alone as the anchor", anchored)):
            rows += _acting_rows(task, label, [run for run in runs if run["task"] == task])
    return _table(["task", "learned by", "return, mean [worst]", "action drift", "cross-TD error"], rows)


def _acting_rows(task: str, label: str, runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the models of one task that acted with each weight of the energy, and by the prior alone."""
    if not runs:
        return []
    rows, error = [], f"{np.mean([run['cross_td_error'] for run in runs]):.3f}"
    for coef in ENERGY_COEFS:
        acting = [run["energy_coefs"][str(coef)] for run in runs]
        drift = f"{np.mean([found['action_drift'] for found in acting]):.3f}"
        returns = _mean_worst([np.mean(found["returns"]) for found in acting])
        rows.append([task, f"{label}, search, eta {coef} ({len(runs)} seeds)", returns, drift, error])
    returns = _mean_worst([np.mean(run["prior_returns"]) for run in runs])
    return [*rows, [task, f"{label}, prior alone ({len(runs)} seeds)", returns, "", error]]


def _mean_worst(values: list[Any]) -> str:
    return f"{np.mean(values):.0f} [{np.min(values):.0f}]"


def _draw_pretraining(results: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    parameters = [result["parameters"] / 1e6 for result in results]
    height = 0.0
    for task in sorted(TASKS, key=lambda task: results[-1]["tasks"][task]["normalized"]):
        scores = [result["tasks"][task]["normalized"] for result in results]
        panel.plot(parameters, scores, color="0.7", linewidth=1, marker=".")
        # Names of tasks with like scores above one another
        height = max(height + LABEL_HEIGHT, scores[-1])
        panel.annotate(task, (parameters[-1] * 1.03, height), fontsize=7, color="0.4", verticalalignment="center")
    panel.plot(
        parameters, [r["mean_normalized"] for r in results], linewidth=2.5, marker="o", label="mean of six tasks"
    )
    panel.set(xscale="log", xlabel="parameters, millions", ylabel="normalised score", title="Offline, six tasks")
    panel.set_ylim(0, 1)
    panel.set_xlim(right=parameters[-1] * 1.5)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


def _draw_finetuning(compared: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(5.5 * len(HELD_OUT), 4), layout="constrained")
    panels = figure.subplots(1, len(HELD_OUT), squeeze=False)[0]
    for panel, task in zip(panels, HELD_OUT, strict=True):
        for i, (label, results) in enumerate(compared.items()):
            if not any(result["task"] == task for result in results):
                continue
            steps, returns = _curves(results, task)
            for row in returns:
                panel.plot(steps, row, color=f"C{i}", linewidth=0.8, alpha=0.4)
            name = f"{label} ({len(returns)} seeds)"
            panel.plot(steps, returns.mean(0), color=f"C{i}", linewidth=2.5, label=name)
        panel.set(title=f"{task}, held out", xlabel="decisions", ylabel="evaluation return")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(frameon=False)
    return figure
