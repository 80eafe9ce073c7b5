from collections.abc import Iterator
from pathlib import Path

import pytest
import torch as th

from tests.fakes import PlainEvaluator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on several threads, and sums come out in another order."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(before)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate candidates head by head, so that heads can be replaced by functions."""
    for module in ("search", "distillation"):
        monkeypatch.setattr(f"sb3_mbdpo.{module}.Evaluator", PlainEvaluator)


@pytest.fixture
def minari_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of Minari data sets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"
