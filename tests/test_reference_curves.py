"""The released curves: what is there, in which units, and what is said of names that are not."""

import numpy as np
import pytest

from sb3_mbdpo.reference_curves import reference_curve, reference_methods, reference_tasks
from sb3_mbdpo.suites import TASK_SETS, task_set_names


def test_every_task_of_the_paper_is_there():
    suites = ("dmcontrol", "metaworld", "myosuite", "maniskill")
    assert set(reference_tasks("mbdpo")) == {task for name in suites for task in TASK_SETS[name]}
    assert set(reference_tasks("mbdpo-pixels")) == set(task_set_names("visual"))
    for method in ("mbdpo", "tdmpc2", "sac", "dreamerv3", "tdmpc"):
        assert len(reference_tasks(method)) == 104
    assert "tdmpc2-pixels" in reference_methods("reacher-easy")


@pytest.mark.parametrize(
    ("method", "step", "expected"), [("mbdpo", 500_000, 786), ("mbdpo", 2_000_000, 877), ("sac", 1_000_000, 517)]
)
def test_means_over_dmcontrol_are_the_papers(method: str, step: int, expected: int):
    # Some runs were stopped earlier, solved; they count with their last value
    values = []
    for task in task_set_names("dmcontrol"):
        curve = reference_curve(task, method)
        values.append(curve.mean[curve.steps <= step][-1])
    assert np.mean(values) == pytest.approx(expected, abs=1)


def test_a_curve():
    curve = reference_curve("walker-run")
    assert (curve.metric, curve.task, curve.method) == ("reward", "walker-run", "mbdpo")
    assert (np.diff(curve.steps) > 0).all()
    assert curve.mean.shape == curve.std.shape == curve.steps.shape == curve.seeds.shape
    assert curve.mean.min() >= 0
    assert curve.mean.max() <= 1000


def test_success_where_there_is_no_return():
    for method in ("mbdpo", "sac"):
        curve = reference_curve("mw-reach", method)
        assert curve.metric == "success"
        assert curve.mean.min() >= 0
        assert curve.mean.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("walker-wlak",), "walker-walk"),
        (("walker-walk", "tdmpc3"), "tdmpc2"),
        (("mw-reach", "mbdpo-pixels"), "there is dreamerv3"),
        (("mw-reach", "mbdpo", "reward"), "there is success"),
    ],
)
def test_names_that_are_not_there(arguments: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        reference_curve(*arguments)
