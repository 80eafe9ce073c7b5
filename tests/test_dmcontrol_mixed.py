"""The study of hub/dmcontrol_mixed: what it runs, and what it makes of the results."""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("minari")
pytest.importorskip("matplotlib")
FOLDER = Path(__file__).resolve().parents[1] / "hub" / "dmcontrol_mixed"
MODULES = ("study", "units", "online", "report", "behaviour_cloning")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The study's modules, which import each other by their bare names as a script's do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def curve(*returns: float) -> dict[str, list[float]]:
    steps = [1000.0 * i for i in range(len(returns))]
    return {"step": steps, "return_mean": list(returns), "train_seconds": steps}


def test_every_unit_of_work_can_be_called(modules: dict[str, ModuleType]) -> None:
    units = [unit for stage in modules["study"].stages() for unit in stage]
    assert len(set(units)) == len(units)
    for name, *arguments in map(str.split, units):
        inspect.signature(getattr(modules["units"], name)).bind(Path("out"), *arguments)
    held_out = modules["study"].HELD_OUT
    assert not set(held_out) & set(modules["study"].TASKS) and set(held_out.values()) <= set(modules["study"].TASKS)


def test_done_units_are_not_run_again(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    study = modules["study"]
    study.result_file(tmp_path, "collect walker-walk").write_text("{}")
    assert study.run_stage(["collect walker-walk"], tmp_path, jobs=1) == 0
    assert study.run_stage(["no_such_work walker-walk"], tmp_path, jobs=1) == 1
    assert "no_such_work" in (tmp_path / "no_such_work-walker-walk.log").read_text()
    assert not study.result_file(tmp_path, "no_such_work walker-walk").exists()


def test_report_of_what_is_there(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    study, report = modules["study"], modules["report"]

    def write(unit: str, **result: object) -> None:
        study.result_file(tmp_path, unit).write_text(json.dumps(result))

    write("collect walker-walk", task="walker-walk", returns=[100.0, 300.0], curve=curve(0.0, 250.0))
    for size, score in ((0.02, 0.25), (0.5, 0.75)):
        tasks = {task: {"mean": 1000 * score, "std": 1.0, "normalized": score} for task in study.TASKS}
        write(f"pretrain {size}", size=size, parameters=1e6 * size, tasks=tasks, mean_normalized=score)
    for seed, value in ((0, 80.0), (1, 120.0)):
        write(f"finetune walker-run {seed}", task="walker-run", seed=seed, curve=curve(50.0, value))
        write(f"scratch walker-run {seed}", task="walker-run", seed=seed, curve=curve(0.0, value - 60))
        acting = {str(eta): {"returns": [value + eta], "action_drift": 0.5} for eta in study.ENERGY_COEFS}
        found = {"energy_coefs": acting, "cross_td_error": 0.25, "data_returns": [10.0, 30.0]}
        write(f"single walker-walk {seed}", task="walker-walk", seed=seed, prior_returns=[value / 4], **found)
        write(f"anchor walker-walk {seed}", task="walker-walk", seed=seed, prior_returns=[value / 8], **found)
        write(f"averaged walker-run {seed}", task="walker-run", seed=seed, curve=curve(10.0, value - 20))
        write(f"clone walker-walk {seed}", task="walker-walk", seed=seed, returns=[value / 2])
    report.write_report(tmp_path)
    text = (tmp_path / report.RESULTS).read_text()
    for row in (
        "| walker-walk | 2 | 200 | 100 to 300 | 250 |",
        "| 0.02 (0.02 M) | 250 | 250 | 250 | 250 | 250 | 250 | 0.250 |",
        "| walker-run, fine-tuned (2 seeds) | 50 [50] | 100 [80] |",
        "| walker-run, from scratch (2 seeds) | 0 [0] | 40 [20] |",
        "| walker-run, from scratch, weights averaged (2 seeds) | 10 [10] | 80 [60] |",
        "| walker-walk | the data's own | 20 |",
        "| walker-walk | behaviour cloning (2 seeds) | 50 [40] |",
        "| walker-walk | MBDPO, search, eta 0.01 (2 seeds) | 100 [80] | 0.500 | 0.250 |",
        "| walker-walk | MBDPO, prior alone (2 seeds) | 25 [20] |  | 0.250 |",
        "| walker-walk | MBDPO, energy alone as the anchor, prior alone (2 seeds) | 12 [10] |  | 0.250 |",
    ):
        assert row in text, text
    assert all((tmp_path / name).stat().st_size > 0 for name in (report.PRETRAINING, report.FINETUNING))
