"""Ids, names and sizes of the task suites: nothing here builds an environment unless its package is there."""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from sb3_mbdpo.suites import catalogue, env_id, registration, suite_entry, task_set, task_set_names
from sb3_mbdpo.task_names import MT30, MT80


def test_every_task_is_registered_with_a_string():
    tasks = [task for name in catalogue.SUITES for task in task_set_names(name)]
    assert len(tasks) == len(set(tasks)) == 39 + 50 + 10 + 5
    for task in tasks:
        spec = gym.spec(env_id(task))
        assert isinstance(spec.entry_point, str)
        assert spec.max_episode_steps == suite_entry(task).decisions == (500 if task in registration.DMCONTROL else 100)


def test_sets():
    assert task_set_names("mt30") == MT30
    assert task_set_names("mt80") == MT80
    assert set(MT30) < set(task_set_names("dmcontrol"))
    assert len(task_set_names("locomotion")) == 7
    assert len(task_set_names("visual")) == 10
    for task in task_set_names("visual"):
        assert gym.spec(env_id(task, pixels=True)).kwargs["camera"] == (2 if task == "quadruped-walk" else 0)


def test_task_sets_know_their_sizes():
    mt80 = task_set("mt80")
    assert mt80.names == MT80
    assert (mt80.observation_dim, mt80.action_dim) == (39, 6)
    assert mt80["walker-run"].discount == 0.99
    assert mt80["mw-reach"].discount == 0.95
    assert mt80["mw-reach"].env_id == "mbdpo/mw-reach-v0"
    assert (task_set("locomotion").observation_dim, task_set("locomotion").action_dim) == (223, 38)


def test_unknown_names_and_sizes_are_named():
    with pytest.raises(ValueError, match="did you mean 'mt80'"):
        task_set("mt81")
    with pytest.raises(ValueError, match="walker-walk"):
        suite_entry("walker-wlak")
    with pytest.raises(ValueError, match="describe_tasks"):
        task_set("maniskill")


def test_names_of_ids():
    assert registration.task_of("dm_control/cartpole-balance_sparse-v0") == "cartpole-balance-sparse"
    assert registration.task_of("Pendulum-v1") == "Pendulum-v1"


@pytest.mark.parametrize("task", ["walker-walk", "mw-reach", "myo-reach", "pick-cube"])
def test_a_missing_package_says_what_to_install(task: str, monkeypatch: pytest.MonkeyPatch):
    suite = suite_entry(task).suite
    monkeypatch.setitem(sys.modules, suite.package, None)
    with pytest.raises(ImportError) as raised:
        gym.make(env_id(task))
    assert suite.install_command in str(raised.value)


def test_the_readmes_example():
    pytest.importorskip("dm_control")
    text = (Path(__file__).parents[1] / "README.md").read_text()
    section = text[text.index("\n## Tasks\n") :]
    code = section.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].action_space.shape == (6,)
    assert len(names["tasks"]) == 30
