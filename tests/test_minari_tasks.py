"""Data sets out of multi-task models: one task each, in the units of its own environment."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sb3_mbdpo import MBDPO, MultiTaskEnv, Task, TaskSet, make_multitask_env
from sb3_mbdpo.minari_tasks import TaskUnits, task_units
from tests.fakes import Leaning
from tests.recordings import minari

pytestmark = pytest.mark.usefixtures("minari_cache")
WIDE = "tests/LeaningOut-v0"
SETTINGS: dict[str, Any] = {"preset": "debug", "seed": 0, "device": "cpu", "learning_starts": 10**6, "buffer_size": 200}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MBDPO:
    """A model of two tasks that has collected 20 random decisions of each."""
    registry = dict(gym.registry)
    monkeypatch.setattr(gym.envs.registration, "registry", registry)
    monkeypatch.setattr(gym, "registry", registry)
    gym.register(WIDE, "tests.fakes:Leaning", kwargs={"width": 4, "n_actions": 2, "length": 7})
    wide = Task("wide", 4, 2, WIDE, ref_min_score=-1.0, ref_max_score=3.0)
    tasks = TaskSet([Task("narrow", 3, 1), wide], observation_dim=6, action_dim=3)
    env = make_multitask_env(tasks, {"narrow": Leaning})
    return MBDPO("MultiInputPolicy", env, **SETTINGS).learn(40)


def test_the_replay_of_one_task_in_its_own_units(model: MBDPO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = model.to_minari("test/wide-v0", task="wide")
    own = gym.make(WIDE)
    assert (dataset.observation_space, dataset.action_space) == (own.observation_space, own.action_space)
    assert type(dataset.recover_environment().unwrapped) is Leaning
    assert (dataset.storage.metadata["ref_min_score"], dataset.storage.metadata["ref_max_score"]) == (-1.0, 3.0)
    buffer = model.replay_buffer
    assert buffer is not None and dataset.total_steps == 20
    column = 1
    observations = np.concatenate([episode.observations[:-1] for episode in dataset])
    actions = np.concatenate([episode.actions for episode in dataset])
    np.testing.assert_array_equal(observations, buffer.observations["observation"][:20, column, :4])
    # The environment's actions lie in [-2, 2]
    np.testing.assert_allclose(actions, 2 * buffer.actions[:20, column, :2], rtol=1e-6)
    assert [len(episode.rewards) for episode in dataset] == [7, 7, 6]


def test_a_task_without_an_id(model: MBDPO) -> None:
    dataset = model.to_minari("test/bare-v0", task="narrow")
    assert dataset.action_space == spaces.Box(-1.0, 1.0, (1,), np.float32) and dataset.env_spec is None
    dataset = model.to_minari("test/given-v0", task="narrow", env=Leaning)
    assert dataset.action_space == Leaning().action_space


def test_what_was_exported_is_learned_again(model: MBDPO) -> None:
    data = {
        name: model.to_minari(f"test/{name}-v0", task=name, env=Leaning if name == "narrow" else None).id
        for name in ("narrow", "wide")
    }
    again = MBDPO.from_minari(data, {"narrow": Leaning, "wide": WIDE}, preset="debug", seed=0, device="cpu")
    again.learn_offline(data, 2)
    assert again._n_updates == 2 and again.tasks is not None and again.tasks["wide"].ref_max_score == 3.0


def test_the_agent_plays_one_task(model: MBDPO) -> None:
    scores = {"ref_min_score": -100.0, "n_ref_episodes": 1}
    dataset = model.to_minari("test/played-v0", "agent", n_episodes=2, task="wide", **scores)
    assert dataset.total_episodes == 2 and [len(episode.rewards) for episode in dataset] == [7, 7]
    assert dataset.observation_space.shape == (4,) and dataset.storage.metadata["ref_min_score"] == -100.0
    expected = MultiTaskEnv(gym.make(WIDE), model.tasks, "wide")  # type: ignore[arg-type]
    first, _ = expected.reset()
    assert dataset[0].observations[0].shape == first["observation"][:4].shape
    with pytest.raises(ValueError, match="no environment to play in"):
        model.to_minari("test/lost-v0", "agent", task="narrow")


def test_what_cannot_be_exported(model: MBDPO) -> None:
    with pytest.raises(ValueError, match=r"pass task=.*'narrow', 'wide'"):
        model.to_minari("test/none-v0")
    with pytest.raises(ValueError, match=r"wid.*wide"):
        model.to_minari("test/none-v0", task="wid")
    with pytest.raises(ValueError, match="leave out task='wide'"):
        task_units(None, "wide")
    with pytest.raises(ValueError, match="this is not the task's environment"):
        TaskUnits(model.tasks, "wide", Leaning)  # type: ignore[arg-type]
    assert model.replay_buffer is not None
    model.replay_buffer.observations["task"][:] = 0
    with pytest.raises(ValueError, match=r"nothing of task 'wide'.*source=\"agent\""):
        model.to_minari("test/none-v0", task="wide")
    assert list(minari.list_local_datasets()) == []
