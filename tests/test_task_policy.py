from dataclasses import replace

import numpy as np
import pytest
import torch as th

from sb3_mbdpo.tasks import Task, TaskSet
from tests.fakes import LEANING, leaning_observations, make_policy
from tests.test_multitask import multitask_policy


def test_the_task_is_read_from_wherever_it_comes() -> None:
    policy = multitask_policy()
    vector = th.zeros(3, 5)
    for stored in (th.tensor([2, 0, 1]), th.tensor([[2], [0], [1]]), th.tensor([2.0, 0.0, 1.0])):
        task = policy.tasks_of({"observation": vector, "task": stored})
        assert task is not None and task.dtype == th.int64 and task.tolist() == [2, 0, 1]
    # What comes beside the observations counts
    assert policy.tasks_of({"observation": vector, "task": th.zeros(3)}, th.tensor([1, 1, 2])).tolist() == [1, 1, 2]
    assert policy.tasks_of(vector, th.tensor([1, 1, 2])).tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="several tasks"):
        policy.tasks_of(vector)


def test_single_task_policies_have_none() -> None:
    policy = make_policy()
    assert policy.task_set is None and policy.tasks_of(th.zeros(2, 3), th.tensor([0, 1])) is None
    assert policy.row_discounts(None) is None and not hasattr(policy, "discounts")


def test_rows_get_their_discounts() -> None:
    policy = multitask_policy()
    rows = policy.row_discounts(th.tensor([1, 1, 0]))
    assert rows is not None and rows.shape == (3, 1)
    assert rows.flatten().tolist() == pytest.approx([0.5, 0.5, 0.9])


def test_registered_tasks_are_what_the_policy_is_built_from_again() -> None:
    policy = multitask_policy()
    more = LEANING.with_task(Task("new", 2, 1, discount=0.25))
    policy.register_tasks(more)
    assert policy.discounts.shape == (4, 1) and policy.discounts[3] == 0.25
    parameters = policy._get_constructor_parameters()
    assert parameters["tasks"] == more.to_plain() and parameters["observation_space"] == more.observation_space
    assert type(policy)(**parameters).task_set == more


def test_observations_are_standardised_by_their_task() -> None:
    policy = multitask_policy()
    obs = {"observation": th.full((2, 5), 3.0), "task": th.tensor([0, 2])}
    assert policy.preprocess(obs).unique().tolist() == [3.0]
    assert policy.task_set is not None
    first, *rest = policy.task_set
    width = first.observation_dim
    statistics = {"observation_mean": (1.0,) * width, "observation_std": (4.0,) + (0.01,) * (width - 1)}
    policy.register_tasks(TaskSet([replace(first, **statistics), *rest], 5, 3))
    scaled = policy.preprocess(obs)
    # In units of the standard deviation, clipped; padding and tasks without statistics stay
    assert scaled[0].tolist() == [0.5] + [10.0] * (width - 1) + [3.0] * (5 - width)
    assert scaled[1].tolist() == [3.0] * 5
    assert policy.preprocess({key: 50 * x if key == "observation" else x for key, x in obs.items()})[1, 0] == 150.0
    # The task may come beside the observations
    assert th.equal(policy.preprocess(obs["observation"], task=obs["task"]), scaled)
    rebuilt = type(policy)(**policy._get_constructor_parameters())
    assert th.equal(rebuilt.preprocess(obs), scaled)


def test_observations_are_checked_before_they_become_tensors() -> None:
    policy = multitask_policy()
    tensors, vectorized = policy.obs_to_tensor(leaning_observations([0, 2]))
    assert vectorized and isinstance(tensors, dict) and tensors["observation"].shape == (2, 5)
    single = {"observation": np.zeros(5, np.float32), "task": 2}
    assert policy.tasks_of(policy.obs_to_tensor(single)[0]).tolist() == [2]
    with pytest.raises(ValueError, match="from 0 to 2"):
        policy.obs_to_tensor({"observation": np.zeros(5, np.float32), "task": 3})
