"""What a CPU computes in blocks of rows is what it computes at once."""

from itertools import product

import pytest
import torch as th

from sb3_mbdpo import blocks
from sb3_mbdpo import ensemble as ensemble_module
from sb3_mbdpo.blocks import block_count, in_blocks
from sb3_mbdpo.ensemble import EnsembleMLP
from sb3_mbdpo.evaluator import Evaluator
from sb3_mbdpo.layers import mlp
from sb3_mbdpo.products import Input, Joined
from tests.fakes import make_config, make_model

SEED = 0


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight rows of sixteen numbers."""
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 8 * 16)


def normal(*shape: int) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(SEED + len(shape)))


@pytest.mark.usefixtures("small_blocks")
def test_only_what_needs_no_gradient_comes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3)
    assert block_count(x, 100, 16) == 1, "where gradients are wanted everything is kept anyway"
    with th.no_grad():
        assert [block_count(x, rows, 16) for rows in (0, 1, 8, 9, 16, 17, 100)] == [1, 1, 1, 2, 2, 3, 13]
        assert block_count(x.to("meta"), 100, 16) == 1, "an accelerator"
        for state in ("is_compiling", "is_exporting"):
            with monkeypatch.context() as patch:
                patch.setattr(th.compiler, state, lambda: True)
                assert block_count(x, 100, 16) == 1


@pytest.mark.usefixtures("small_blocks")
@th.no_grad()
def test_blocks_are_of_nearly_one_size() -> None:
    sizes: list[int] = []

    def note(x: th.Tensor) -> th.Tensor:
        sizes.append(len(x))
        return x

    x = normal(17, 2)
    assert th.equal(in_blocks(note, x, 16), x)
    assert sizes == [6, 6, 5], "a last block of one row would be rounded differently"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [7, 8, 9, 50])
@th.no_grad()
def test_heads_compute_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, critics = mlp(6, [16, 16], 3), EnsembleMLP(4, 6, [16, 16], 3)
    for parameter in critics.parameters():
        parameter.add_(0.1 * normal(*parameter.shape))
    monkeypatch.setattr(ensemble_module, "TURNS_FROM", 1)
    state = normal(rows, 4)
    each: list[Input] = [normal(rows, 6), normal(2, rows, 6), Joined(state, normal(rows, 2))]
    several = Joined(state, normal(3, rows, 2))
    for heads, inputs in (([net], [*each, several]), ([critics, critics.select(th.tensor([3, 1]))], each)):
        for head, x in product(heads, inputs):
            found = head(x)
            with monkeypatch.context() as patch:
                patch.setattr(blocks, "BLOCK_NUMBERS", 10**9)
                expected = head(x)
            assert found.shape == expected.shape and expected.std() > 1e-3
            th.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@th.no_grad()
def test_a_row_without_a_batch_is_no_batch() -> None:
    net, x = mlp(40, [16], 3), normal(40)
    th.testing.assert_close(net(x), net(x[None])[0])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batch", [1, 3, 40])
@th.no_grad()
def test_candidates_are_worth_the_same(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than candidates too: with many rows, each candidate is a block."""
    model, config = make_model(), make_config(energy_coef=0.5)
    z, plans = normal(batch, 16).softmax(-1), normal(batch, 9, 3, 2).clamp(-1, 1)
    counts: list[int] = []
    roll_out = Evaluator.roll_out
    monkeypatch.setattr(Evaluator, "roll_out", lambda self, x: counts.append(x.shape[1]) or roll_out(self, x))
    for episodic in (False, True):
        evaluate = Evaluator(model, config, z, th.tensor([1, 0]), episodic=episodic)
        counts.clear()
        found = evaluate(plans)
        assert sum(counts) == 9 and len(counts) == {1: 2, 3: 6, 40: 9}[batch]
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK_NUMBERS", 10**9)
            expected = evaluate(plans)
        assert expected.std() > 1e-3
        th.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
