import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_mbdpo.task_checks import check_task_indices, check_task_spaces
from sb3_mbdpo.tasks import Task, TaskSet, pad_right, plain_tasks

RUN = Task("run", 17, 6, episode_length=500, ref_min_score=10, ref_max_score=110)
SWING = Task("swing", 3, 1, env_id="Pendulum-v1", episode_length=100)


@pytest.mark.parametrize("length, expected", [(500, 0.99), (100, 0.95), (200, 0.975), (10_000, 0.995), (None, 0.99)])
def test_discount_follows_the_episode_length(length: int | None, expected: float) -> None:
    assert Task("a", 1, 1, episode_length=length).discount == pytest.approx(expected)
    assert Task("a", 1, 1, episode_length=length, discount=0.7).discount == 0.7


def test_normalized_scores() -> None:
    assert [RUN.normalized(score) for score in (10, 60, 110, 160)] == [0, 0.5, 1, 1.5]
    assert SWING.normalized(5) is None


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"name": ""}, "name"),
        ({"name": "nearest"}, "nearest"),
        ({"observation_dim": 0}, "observation_dim"),
        ({"action_dim": 1.5}, "action_dim"),
        ({"action_dim": True}, "action_dim"),
        ({"episode_length": -1}, "episode_length"),
        ({"discount": 1.1}, "discount"),
        ({"discount": float("nan")}, "discount"),
        ({"ref_min_score": 1.0}, "ref_max_score"),
        ({"ref_min_score": 1.0, "ref_max_score": 1.0}, "ref_max_score"),
        ({"ref_min_score": 0.0, "ref_max_score": float("inf")}, "finite"),
        ({"observation_mean": [0.0]}, "both observation_mean and observation_std"),
        ({"observation_mean": [0.0, 1.0], "observation_std": [1.0, 1.0]}, "1 finite numbers each"),
        ({"observation_mean": [float("nan")], "observation_std": [1.0]}, "finite"),
        ({"observation_mean": [0.0], "observation_std": [0.0]}, "constant entries 1"),
        ({"observation_mean": [0.0], "observation_std": [1e-300]}, "constant entries 1"),
        ({"observation_mean": [1e300], "observation_std": [1.0]}, "finite"),
        ({"observation_mean": ["a"], "observation_std": [None]}, "finite numbers"),
    ],
)
def test_tasks_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Task(**({"name": "a", "observation_dim": 1, "action_dim": 1} | wrong))


def test_a_set_knows_order_sizes_and_masks() -> None:
    tasks = TaskSet([SWING, RUN])
    assert (tasks.observation_dim, tasks.action_dim, len(tasks), list(tasks)) == (17, 6, 2, [SWING, RUN])
    assert "run" in tasks and "walk" not in tasks and tasks["run"] is RUN and tasks.index("run") == 1
    np.testing.assert_array_equal(tasks.action_masks, [[1, 0, 0, 0, 0, 0], [1] * 6])
    assert tasks.discounts == [0.95, 0.99]
    assert tasks.observation_space["task"] == spaces.Discrete(2)
    assert tasks.observation_space["observation"].shape == (17,) and tasks.action_space.shape == (6,)
    roomy = TaskSet([SWING], observation_dim=5, action_dim=2)
    assert (roomy.observation_dim, roomy.action_dim) == (5, 2)


def test_statistics_are_padded_and_survive_json() -> None:
    swing = Task("swing", 3, 1, observation_mean=(1.0, 2.0, 3.0), observation_std=np.array([0.5, 1, 2]))  # type: ignore[arg-type]
    tasks = TaskSet([RUN, swing])
    assert tasks.normalizes and not TaskSet([RUN]).normalizes
    means, stds = tasks.observation_statistics
    assert means.shape == stds.shape == (2, 17) and means.dtype == np.float32
    np.testing.assert_array_equal(means[1], [1, 2, 3] + [0] * 14)
    np.testing.assert_array_equal(stds[1], [0.5, 1, 2] + [1] * 14)
    assert not means[0].any() and (stds[0] == 1).all()
    assert TaskSet.from_plain(json.loads(json.dumps(tasks.to_plain()))) == tasks


def test_sets_that_cannot_be() -> None:
    for tasks, widths, words in (
        ([], {}, "at least one"),
        ([RUN, RUN], {}, "unique"),
        ([RUN], {"observation_dim": 16}, "'run' has 17"),
        ([RUN], {"action_dim": 5}, "'run' has 6"),
    ):
        with pytest.raises(ValueError, match=words):
            TaskSet(tasks, **widths)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    names = ("walker-walk", "walker-run", "cup-catch")
    tasks = TaskSet([Task(name, 1, 1) for name in names])
    with pytest.raises(ValueError, match=r"'walker-wlak'.*\['walker-walk', 'walker-run'\]"):
        tasks.index("walker-wlak")
    with pytest.raises(ValueError, match="cup-catch"):
        tasks.index("zzz")


def test_plain_data_survives_json() -> None:
    tasks = TaskSet([RUN, SWING], observation_dim=20)
    text = json.dumps(tasks.to_plain())
    again = TaskSet.from_plain(json.loads(text))
    assert again == tasks and hash(again) == hash(tasks) and again != TaskSet([RUN, SWING])
    assert plain_tasks(json.loads(text)["tasks"]) == TaskSet([RUN, SWING]).to_plain()
    numpy_sizes = TaskSet([Task("a", np.int64(3), np.int64(1), discount=np.float32(0.5))])  # type: ignore[arg-type]
    assert json.loads(json.dumps(numpy_sizes.to_plain())) == numpy_sizes.to_plain()
    assert plain_tasks(None) is None


@pytest.mark.parametrize(
    "data, words",
    [
        ({"tasks": [], "width": 1}, "width"),
        ({"observation_dim": 3}, "list of tasks"),
        ([{"name": "a", "observation_dim": 1}], "action_dim"),
        ([{"name": "a", "observation_dim": 1, "action_dim": 1, "colour": "red"}], "colour"),
        (["walker-walk"], "walker-walk"),
    ],
)
def test_plain_data_that_is_no_task_set(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskSet.from_plain(data)


def test_one_task_more() -> None:
    tasks = TaskSet([RUN])
    more = tasks.with_task(SWING)
    assert more.names == ("run", "swing") and (more.observation_dim, more.action_dim) == (17, 6)
    with pytest.raises(ValueError, match=r"18 observation entries where this model has room for 17 and 7 actions"):
        tasks.with_task(Task("dog", 18, 7))
    with pytest.raises(ValueError, match="another name"):
        tasks.with_task(RUN)


def test_padding() -> None:
    padded = pad_right(np.arange(6, dtype=np.float64).reshape(2, 3), 5)
    assert padded.dtype == np.float32
    np.testing.assert_array_equal(padded, [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]])


def test_spaces_and_indices_are_checked() -> None:
    tasks = TaskSet([RUN, SWING])
    check_task_spaces(tasks, tasks.observation_space, tasks.action_space)
    for pair in ((tasks.observation_space["observation"], tasks.action_space), (tasks.observation_space, RUN)):
        with pytest.raises(ValueError, match="MultiTaskEnv"):
            check_task_spaces(tasks, *pair)
    vector = np.zeros((2, 17), np.float32)
    check_task_indices(tasks, {"observation": vector, "task": np.array([0, 1])})
    for wrong in (np.array([0, 2]), np.array([-1, 0]), np.array([0.0, 1.0])):
        with pytest.raises(ValueError, match="from 0 to 1"):
            check_task_indices(tasks, {"observation": vector, "task": wrong})
    for observation in (vector, {"observation": vector}):
        with pytest.raises(ValueError, match="MultiTaskEnv"):
            check_task_indices(tasks, observation)
