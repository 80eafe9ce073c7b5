import math
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_mbdpo import MBDPO
from sb3_mbdpo.arguments import COUNTS, RANGES, check_finite, check_spaces
from tests.fakes import ACTIONS, MIXED, VECTOR, ToyEnv
from tests.test_mbdpo import make


def test_without_an_environment() -> None:
    with pytest.raises(ValueError, match="env is None"):
        MBDPO("MlpPolicy", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "least"), COUNTS)
def test_counts_are_whole_numbers_from_a_least_one_on(name: str, least: int) -> None:
    for value in (least - 1, least + 0.5, "3", math.nan):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}"):
            make(**{name: value})


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
def test_numbers_are_kept_in_their_range(name: str, low: float, high: float) -> None:
    beyond = [math.inf] if high < math.inf else []
    for value in (low - 0.1, math.nan, "0.5", *beyond):
        with pytest.raises(ValueError, match=f"{name} must be"):
            make(**{name: value})
    make(max_grad_norm=math.inf)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Discrete(5, start=1), "start at 0"),
        (spaces.Dict({"gear": spaces.Discrete(5, start=1), "speed": VECTOR}), "start at 0"),
        (spaces.MultiDiscrete([3, 3], start=[1, 1]), "start at 0"),
        (spaces.MultiDiscrete([[3, 3], [2, 2]]), "one dimension"),
        (spaces.Box(-1.0, 1.0, ()), "at least one dimension"),
    ],
)
def test_observations_that_cannot_be_learned_from(space: spaces.Space, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_spaces(space, ACTIONS)
    check_spaces(MIXED, ACTIONS)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-1, 2], np.float32), np.array([1, 2], np.float32)),
        spaces.Box(-3e38, 3e38, (2,), np.float32),
        spaces.Box(-6e4, 6e4, (2,), np.float16),
    ],
    ids=["fixed", "float32 overflow", "float16 overflow"],
)
def test_action_bounds_without_a_finite_width(space: spaces.Box) -> None:
    with pytest.raises(ValueError, match="low < high"):
        make(ToyEnv(action_space=space))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    good, bad = np.zeros((2, 3), np.float32), np.array([[0, 0, 0], [0, value, 0]], np.float32)
    check_finite(good, np.zeros(2))
    check_finite({"image": np.zeros((2, 4), np.uint8), "speed": good}, np.zeros(2))
    with pytest.raises(ValueError, match="reward"):
        check_finite(good, np.array([0.0, value]))
    with pytest.raises(ValueError, match="observation"):
        check_finite(bad, np.zeros(2))
    with pytest.raises(ValueError, match='observation "speed"'):
        check_finite({"image": np.zeros((2, 4), np.uint8), "speed": bad}, np.zeros(2))


def test_a_reward_that_is_not_finite_leaves_everything_as_it_was() -> None:
    class Broken(ToyEnv):
        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, reward, *rest = super().step(action)
            return obs, math.nan if self.episodes == 6 else reward, *rest

    model = make(Broken())
    with pytest.raises(ValueError, match="reward"):
        model.learn(100)
    assert model.replay_buffer is not None and model.replay_buffer.size() == 25
    assert np.isfinite(model.replay_buffer.rewards).all()
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
