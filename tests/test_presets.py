import doctest
import importlib
import inspect
import pkgutil

import gymnasium as gym
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mbdpo
from sb3_mbdpo import MBDPO
from sb3_mbdpo.env_facts import episode_length_of
from sb3_mbdpo.presets import (
    MODEL_SIZES,
    PRESETS,
    ModelSize,
    Preset,
    discount_for,
    learning_starts_for,
    resolve_model_size,
    resolve_preset,
)
from tests.fakes import ToyEnv

MODULES = sorted(module.name for module in pkgutil.iter_modules(sb3_mbdpo.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("triton_"):
        pytest.importorskip("triton")
    module = importlib.import_module(f"sb3_mbdpo.{name}")
    failures, _ = doctest.testmod(module)
    assert failures == 0


def test_some_examples_exist() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(f"sb3_mbdpo.{name}") for name in ("presets", "metrics", "buffers")]
    assert all(any(test.examples for test in finder.find(module)) for module in modules)


def test_presets_decide_arguments_that_exist_and_default_to_none() -> None:
    parameters = inspect.signature(MBDPO.__init__).parameters
    for name in Preset.__dataclass_fields__:
        assert parameters[name].default is None, name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name: str) -> None:
    preset = PRESETS[name]
    assert preset.model_size in MODEL_SIZES
    assert preset.n_prior_trajectories < preset.n_samples and preset.n_elites <= preset.n_samples
    assert preset.score_batch_size <= preset.batch_size and preset.beta_start <= preset.beta_end


def test_paper_preset_is_the_papers() -> None:
    _, values = resolve_preset("paper", th.device("cpu"))
    expected = {"batch_size": 256, "horizon": 3, "denoising_steps": 20, "n_samples": 512, "n_elites": 64}
    expected |= {"n_prior_trajectories": 24, "temperature": 0.5, "beta_start": 1e-4, "beta_end": 1e-2}
    expected |= {"exploration_noise": 0.05, "model_size": 5}
    assert expected.items() <= values.items()
    assert MODEL_SIZES[1] == ModelSize(256, 2, 384, 128, 2) and MODEL_SIZES[317] == ModelSize(4096, 5, 4096, 1376, 8)


def test_auto_follows_the_device() -> None:
    assert resolve_preset("auto", th.device("cpu"))[0] == "cpu"
    assert resolve_preset("auto", th.device("cuda"))[0] == resolve_preset("auto", th.device("mps"))[0] == "paper"
    with pytest.raises(ValueError, match=r"preset.*'fast'"):
        resolve_preset("fast", th.device("cpu"))


def test_resolved_values_are_the_callers_own() -> None:
    resolve_preset("debug", th.device("cpu"))[1]["horizon"] = 99
    resolve_model_size(1)["mlp_dim"] = 99
    assert PRESETS["debug"].horizon == 3 and MODEL_SIZES[1].mlp_dim == 384


def test_unknown_sizes_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model_size.*317.*got 7"):
        resolve_model_size(7)
    assert resolve_model_size(1.0) == resolve_model_size(1)


@pytest.mark.parametrize(
    ("length", "discount", "starts"),
    [
        (None, 0.99, 1000),
        (1, 0.95, 1000),
        (25, 0.95, 1000),
        (200, 0.975, 1000),
        (500, 0.99, 2500),
        (10_000, 0.995, 50_000),
    ],
)
def test_rules_of_the_episode_length(length: int | None, discount: float, starts: int) -> None:
    assert discount_for(length) == pytest.approx(discount) and learning_starts_for(length) == starts


def test_episode_length_is_found_where_it_is_kept() -> None:
    assert episode_length_of(DummyVecEnv([lambda: TimeLimit(ToyEnv(), 123)])) == 123
    assert episode_length_of(DummyVecEnv([lambda: gym.make("Pendulum-v1")])) == 200
    assert episode_length_of(DummyVecEnv([ToyEnv])) is None
    by_spec = ToyEnv()
    by_spec.spec = gym.envs.registration.EnvSpec("Toy-v0", max_episode_steps=77)
    assert episode_length_of(DummyVecEnv([lambda: by_spec])) == 77
