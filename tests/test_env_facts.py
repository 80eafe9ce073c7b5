"""What is asked of environments, in this process and in others."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import FlattenObservation, RescaleAction, TimeLimit, TransformReward
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_mbdpo import MBDPO
from sb3_mbdpo.env_facts import describe_env, episode_length_of, spec_to_make_again
from sb3_mbdpo.wrappers import ActionRepeat
from tests.fakes import ToyEnv
from tests.test_mbdpo import make

LAMBDA_ID = "LambdaToy-v0"


@pytest.fixture
def lambda_id() -> Any:
    """Id of an environment whose spec cannot be pickled."""
    gym.register(LAMBDA_ID, entry_point=lambda: ToyEnv(), max_episode_steps=20)
    yield LAMBDA_ID
    gym.registry.pop(LAMBDA_ID)


def repeated() -> gym.Env:
    return ActionRepeat(gym.make("Pendulum-v1"), 2)


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_both_kinds_of_vector_environment_say_the_same(kind: type[Any]) -> None:
    env = make_vec_env("Pendulum-v1", vec_env_cls=kind)
    assert describe_env(env) == {"id": "Pendulum-v1", "action_repeat": 1} and episode_length_of(env) == 200
    env.close()
    env = VecNormalize(kind([repeated]))
    assert describe_env(env) == {"id": "Pendulum-v1", "action_repeat": 2} and episode_length_of(env) == 100
    env.close()
    env = kind([ToyEnv])
    assert describe_env(env) is None and episode_length_of(env) is None
    env.close()


def unlimited(env: gym.Env) -> gym.Env:
    env._max_episode_steps = math.inf  # type: ignore[attr-defined]
    return env


@pytest.mark.parametrize(
    ("wrap", "length"),
    [
        (lambda env: ActionRepeat(env, 8), 25),
        (lambda env: ActionRepeat(ActionRepeat(env, 3), 2), 34),
        (lambda env: TimeLimit(ActionRepeat(env, 8), 10), 10),
        (lambda env: ActionRepeat(env.unwrapped, 8), None),
        (lambda env: ActionRepeat(unlimited(env.unwrapped), 8), None),
    ],
    ids=["once", "nested", "limited again", "without a limit", "infinite"],
)
def test_episodes_are_as_long_as_they_are_for_who_decides(wrap: Callable[[gym.Env], gym.Env], length: int | None):
    env = DummyVecEnv([lambda: Monitor(wrap(gym.make("Pendulum-v1")))])
    assert episode_length_of(env) == length


class Halved(gym.RewardWrapper):
    """A wrapper that does not keep its arguments."""

    def reward(self, reward: Any) -> float:
        return 0.5 * float(reward)


ELSEWHERE = {
    "arguments": lambda: gym.make("Pendulum-v1", g=20),
    "array as argument": lambda: gym.make("Pendulum-v1", g=np.full(2, 10.0)),
    "limit": lambda: gym.make("Pendulum-v1", max_episode_steps=50),
    "actions": lambda: RescaleAction(gym.make("Pendulum-v1"), -1, 1),
    "reward": lambda: TransformReward(gym.make("Pendulum-v1"), lambda reward: 2 * reward),
    "flat": lambda: FlattenObservation(gym.make("Pendulum-v1")),
    "beneath": lambda: ActionRepeat(RescaleAction(gym.make("Pendulum-v1"), -1, 1), 2),
    "own limit": lambda: TimeLimit(gym.make("Pendulum-v1"), 200),
    "own wrapper": lambda: Halved(gym.make("Pendulum-v1")),
}


FORKED = partial(SubprocVecEnv, start_method="fork")


@pytest.mark.parametrize("kind", [DummyVecEnv, FORKED])
def test_an_id_that_alone_makes_another_environment_is_not_kept(kind: Any) -> None:
    envs = {name: kind([maker]) for name, maker in ELSEWHERE.items()}
    assert {name: describe_env(env) for name, env in envs.items()} == dict.fromkeys(ELSEWHERE)
    model = make(kind([lambda: gym.make("Pendulum-v1")]))
    model.set_env(kind([lambda: gym.make("Pendulum-v1", g=20)]))
    assert model._env_source is None
    for env in (*envs.values(), model.get_env()):
        env.close()


@pytest.mark.parametrize("kind", [DummyVecEnv, FORKED])
def test_repeats_of_repeats_are_multiplied(kind: Any) -> None:
    env = kind([lambda: ActionRepeat(Monitor(ActionRepeat(gym.make("Pendulum-v1"), 2)), 3)])
    assert describe_env(env) == {"id": "Pendulum-v1", "action_repeat": 6}
    env.close()


def wrapped_by_its_entry_point() -> gym.Env:
    # Registers the id, in a worker too
    from tests import checkpoint_fakes  # noqa: F401

    return gym.make("CheckpointPendulum-v0")


@pytest.mark.parametrize("kind", [DummyVecEnv, FORKED])
def test_what_an_entry_point_wraps_belongs_to_the_id(kind: Any) -> None:
    env = kind([wrapped_by_its_entry_point])
    assert describe_env(env) == {"id": "CheckpointPendulum-v0", "action_repeat": 1}
    env.close()


@pytest.mark.parametrize("kind", [DummyVecEnv, FORKED])
def test_the_time_limit_of_rl_zoo3_is_taken_for_gymnasiums(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym.wrappers, "TimeLimit", type("PatchedTimeLimit", (TimeLimit,), {}))
    env = kind([lambda: gym.make("Pendulum-v1")])
    assert describe_env(env) == {"id": "Pendulum-v1", "action_repeat": 1}
    assert describe_env(kind([lambda: gym.make("Pendulum-v1", max_episode_steps=5)])) is None
    env.close()


def test_vector_wrappers_that_change_what_is_seen_are_not_part_of_an_id() -> None:
    env = VecFrameStack(make_vec_env("Pendulum-v1"), 2)
    assert describe_env(env) is None and spec_to_make_again(env) is None


def test_specs_that_make_an_environment_again() -> None:
    specs = {name: spec_to_make_again(make_vec_env(maker)) for name, maker in ELSEWHERE.items()}
    assert {name for name, spec in specs.items() if spec is None} == {"own limit", "own wrapper"}
    repeated = spec_to_make_again(DummyVecEnv([lambda: ActionRepeat(gym.make("Pendulum-v1", g=20), 2)]))
    assert repeated is not None and gym.make(repeated).get_wrapper_attr("steps_per_action") == 2
    # The time limit counts decisions here, and would count steps inside the repeat
    limited = gym.make("Pendulum-v1", max_episode_steps=-1)
    assert spec_to_make_again(DummyVecEnv([lambda: TimeLimit(ActionRepeat(limited, 2), 200)])) is None


def only_there() -> gym.Env:
    gym.register("OnlyThere-v0", entry_point=ToyEnv)
    return gym.make("OnlyThere-v0")


def test_an_id_that_is_registered_in_the_other_process_only() -> None:
    env = SubprocVecEnv([only_there])
    assert "OnlyThere-v0" not in gym.registry
    assert describe_env(env) == {"id": "OnlyThere-v0", "action_repeat": 1} and episode_length_of(env) is None
    env.close()


def test_a_spec_that_cannot_be_pickled_costs_no_worker(lambda_id: str, tmp_path: Path) -> None:
    env = SubprocVecEnv([lambda: gym.make(lambda_id)], start_method="fork")
    model = make(env)
    model.learn(12, callback=CheckpointCallback(5, str(tmp_path)))
    assert describe_env(env) == {"id": lambda_id, "action_repeat": 1} and episode_length_of(env) == 20
    env.close()
    model.save(tmp_path / "model")
    assert MBDPO.load(tmp_path / "model", device="cpu")._env_source == {"id": lambda_id, "action_repeat": 1}


def test_a_model_is_saved_after_its_environment_was_closed(tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1", vec_env_cls=SubprocVecEnv)
    model = make(env)
    env.close()
    model.save(tmp_path / "model")
    model.save_pretrained(tmp_path / "folder")
    for loaded in (MBDPO.load(tmp_path / "model", device="cpu"), MBDPO.from_pretrained(tmp_path / "folder")):
        assert loaded._env_source == {"id": "Pendulum-v1", "action_repeat": 1}
    # Another environment says what it is when it is given
    model.set_env(DummyVecEnv([repeated]))
    assert model._env_source == {"id": "Pendulum-v1", "action_repeat": 2}


def test_an_environment_that_answers_no_questions_is_one_of_unknown_length() -> None:
    class Silent(DummyVecEnv):
        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            if attr_name == "render_mode":  # asked by Stable-Baselines3 itself
                return [None]
            raise NotImplementedError

        def env_method(self) -> None:  # type: ignore[override]
            raise NotImplementedError

        def has_attr(self, attr_name: str) -> bool:
            return bool(self.get_attr(attr_name))

    model = make(Silent([lambda: TimeLimit(ToyEnv(), 10)]))
    assert model.gamma == 0.99
    model.learn(12)


class NotImplementing(DummyVecEnv):
    """Answers no question about wrappers, and says so in its own way."""

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        raise NotImplementedError


class OfLists(DummyVecEnv):
    """Takes lists of indices only."""

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * (self.num_envs if indices is None else len(indices))


class WithoutIndices(DummyVecEnv):
    def env_is_wrapped(self, wrapper_class: Any) -> list[bool]:  # type: ignore[override]
        return [False] * self.num_envs


class OfKeys(DummyVecEnv):
    """Raises another error for attributes that it has not."""

    def has_attr(self, attr_name: str) -> bool:
        return True

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name not in ("spec", "render_mode"):
            raise KeyError(attr_name)
        return super().get_attr(attr_name, indices)


@pytest.mark.parametrize("kind", [NotImplementing, OfLists, WithoutIndices, OfKeys])
def test_vector_environments_that_answer_in_their_own_way(kind: type[Any]) -> None:
    env = kind([lambda: gym.make("Pendulum-v1")])
    assert describe_env(env) == {"id": "Pendulum-v1", "action_repeat": 1}
    MBDPO("MlpPolicy", env, preset="debug", learning_starts=4, warmup_updates=0, batch_size=4).learn(8)


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), 0, -1, None, "200"])
def test_what_is_no_time_limit(limit: Any) -> None:
    toy = ToyEnv()
    toy._max_episode_steps = limit  # type: ignore[attr-defined]
    env = DummyVecEnv([lambda: toy])
    assert episode_length_of(env) is None
    assert make(env, gamma=None).gamma == 0.99
