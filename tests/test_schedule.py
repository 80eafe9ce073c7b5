import math

import pytest
import torch as th

from sb3_mbdpo.schedule import NoiseSchedule


def test_paper_schedule() -> None:
    """Twenty betas from 1e-4 to 1e-2: candidates spread by 0.33 at first and 0.03 at last."""
    schedule = NoiseSchedule(20, 1e-4, 1e-2)
    betas = [1e-4 + i * (1e-2 - 1e-4) / 19 for i in range(20)]
    assert schedule.alphas == pytest.approx([1 - beta for beta in betas], abs=1e-6)
    assert schedule.alpha_bars == pytest.approx([math.prod(1 - b for b in betas[: i + 1]) for i in range(20)], abs=1e-6)
    assert list(schedule.taus) == list(range(19, 0, -1))
    assert schedule.sigma(19) == pytest.approx(0.33, abs=0.01) and schedule.sigma(1) == pytest.approx(0.027, abs=0.002)
    spreads = [schedule.sigma(tau) for tau in schedule.taus]
    assert spreads == sorted(spreads, reverse=True)


def test_start_shifts_and_forgets() -> None:
    schedule = NoiseSchedule(3, 0.01, 0.2)
    previous = th.arange(12.0).reshape(2, 3, 2)
    x = schedule.start(previous, th.tensor([False, True]))
    scale = math.sqrt(schedule.alpha_bars[-1])
    th.testing.assert_close(x[0], scale * th.tensor([[2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]))
    assert not x[1].any() and th.equal(previous, th.arange(12.0).reshape(2, 3, 2))
    assert not schedule.start(th.ones(1, 1, 2), th.tensor([False])).any(), "nothing is left of a plan of one step"


@pytest.mark.parametrize("tau", [1, 2, 3])
def test_denoising_is_the_step_along_the_score(tau: int) -> None:
    """The short form equals x + (1 - alpha_bar) * score, over sqrt(alpha), whatever x was."""
    schedule = NoiseSchedule(4, 0.05, 0.4)
    x, plan = th.randn(2, 3, 2), th.randn(2, 3, 2)
    alpha, alpha_bar = schedule.alphas[tau], schedule.alpha_bars[tau]
    score = (math.sqrt(alpha_bar) * plan - x) / (1 - alpha_bar)
    expected = (x + (1 - alpha_bar) * score) / math.sqrt(alpha)
    th.testing.assert_close(schedule.denoise(plan, tau), expected, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(schedule.denoise(plan, tau), math.sqrt(schedule.alpha_bars[tau - 1]) * plan)


def test_equal_arguments_make_equal_schedules() -> None:
    assert NoiseSchedule(5, 1e-3, 0.2) == NoiseSchedule(5, 1e-3, 0.2) != NoiseSchedule(5, 1e-3, 0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 1e-3, 0.1), "denoising_steps"),
        ((5, 0.0, 0.1), "beta_start=0.0"),
        ((5, 0.2, 0.1), "beta_start=0.2"),
        ((5, 0.1, 1.0), "beta_end=1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[int, float, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseSchedule(*arguments)
