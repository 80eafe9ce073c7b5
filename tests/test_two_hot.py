import pytest
import torch as th
from torch.nn import functional as F

from sb3_mbdpo.two_hot import TwoHot, symexp, symlog

NUMBERS = th.tensor([-20000.0, -37.2, -1.0, -0.01, 0.0, 1e-6, 0.3, 1.0, 99.9, 20000.0])[:, None]


def test_symlog_and_its_inverse() -> None:
    th.testing.assert_close(symexp(symlog(NUMBERS)), NUMBERS, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(
        symlog(th.tensor([0.0, 1.0, -1.0])), th.tensor([0.0, 2.0, -2.0]).div(2).mul(th.tensor(2.0).log())
    )


def test_two_hot_is_a_distribution_with_the_right_mean() -> None:
    two_hot = TwoHot()
    target = two_hot.encode(NUMBERS)
    assert target.shape == (10, 101) and (target >= 0).all()
    assert ((target > 0).sum(-1) <= 2).all()
    th.testing.assert_close(target.sum(-1), th.ones(10))
    th.testing.assert_close((target @ two_hot.bins)[:, None], symlog(NUMBERS), rtol=1e-5, atol=1e-5)
    neighbours = target.topk(2).indices.sort().values
    spread = (target.topk(2).values > 0).all(-1)
    assert (neighbours[spread].diff() == 1).all()


def test_bins_are_hit_exactly() -> None:
    two_hot = TwoHot(5, -2.0, 2.0)
    th.testing.assert_close(two_hot.encode(symexp(two_hot.bins)[:, None]), th.eye(5), atol=1e-6, rtol=0)


def test_numbers_beyond_the_range_stay_at_its_ends() -> None:
    two_hot = TwoHot(5, -2.0, 2.0)
    found = two_hot.encode(th.tensor([[-1e9], [-th.inf], [1e9], [th.inf]]))
    assert th.equal(found, F.one_hot(th.tensor([0, 0, 4, 4]), 5).float())


def test_decoding_inverts_encoding() -> None:
    two_hot = TwoHot()
    inside = NUMBERS[NUMBERS.abs() < 1e4][:, None]
    th.testing.assert_close(two_hot.decode((two_hot.encode(inside) + 1e-30).log()), inside, rtol=1e-3, atol=1e-4)


def test_no_evidence_decodes_to_zero() -> None:
    assert TwoHot().decode(th.zeros(4, 3, 101)).abs().max() < 1e-5


def test_cross_entropy_is_that_of_the_two_hot_target() -> None:
    two_hot = TwoHot()
    logits = th.randn(10, 101, generator=th.Generator().manual_seed(0), requires_grad=True)
    expected = -(two_hot.encode(NUMBERS) * logits.log_softmax(-1)).sum(-1, keepdim=True)
    found = two_hot.cross_entropy(logits, NUMBERS)
    assert found.shape == (10, 1)
    th.testing.assert_close(found, expected)
    (gradient,) = th.autograd.grad(found.sum(), logits)
    th.testing.assert_close(gradient, logits.softmax(-1) - two_hot.encode(NUMBERS), atol=1e-6, rtol=1e-5)


def test_bins_are_no_part_of_the_state() -> None:
    assert not TwoHot().state_dict()


@pytest.mark.parametrize("arguments", [(1, -1.0, 1.0), (5, 1.0, 1.0), (5, 2.0, -2.0)])
def test_wrong_ranges_are_refused(arguments: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="num_bins"):
        TwoHot(*arguments)


def test_share_of_scalars_beyond_the_bins() -> None:
    regression = TwoHot(vmin=-3.0, vmax=3.0)
    inside, outside = symexp(th.tensor([-2.99, 0.0, 2.99])), symexp(th.tensor([-3.01, 3.01]))
    assert regression.beyond(inside) == 0 and regression.beyond(outside) == 1
    assert regression.beyond(th.cat([inside, outside])) == pytest.approx(0.4)
