from collections.abc import Iterator

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
