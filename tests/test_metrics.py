import pytest
import torch as th

from sb3_mbdpo.metrics import RunningMeans


def test_each_name_has_its_own_count() -> None:
    means = RunningMeans()
    for step in range(4):
        means.add({"always": th.tensor(float(step))} | ({"rarely": th.tensor(7.0)} if step == 2 else {}))
    assert means.pop() == {"always": pytest.approx(1.5), "rarely": pytest.approx(7.0)}
    assert means.pop() == {}
    means.add({"always": th.tensor([3.0])})
    assert means.pop() == {"always": 3.0}


def test_added_tensors_are_not_changed() -> None:
    means, value = RunningMeans(), th.tensor(2.0)
    means.add({"a": value})
    means.add({"a": th.tensor(4.0)})
    assert value.item() == 2.0 and means.pop() == {"a": 3.0}


def test_nan_stays_with_its_name() -> None:
    means = RunningMeans()
    means.add({"bad": th.tensor(float("nan")), "good": th.tensor(1.0)})
    found = means.pop()
    assert found["good"] == 1.0 and found["bad"] != found["bad"]
