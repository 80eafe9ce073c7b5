import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_mbdpo import MBDPO
from sb3_mbdpo.arguments import COUNTS, RANGES, check_finite, check_spaces
from sb3_mbdpo.building import ARGUMENTS, FIXED
from sb3_mbdpo.search_config import OF_SEARCH
from tests.checkpoint_fakes import observations, trained
from tests.fakes import ACTIONS, MIXED, VECTOR, ToyEnv
from tests.test_mbdpo import OBSERVATION, make


def test_without_an_environment() -> None:
    with pytest.raises(ValueError, match="env is None"):
        MBDPO("MlpPolicy", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "least"), COUNTS)
def test_counts_are_whole_numbers_from_a_least_one_on(name: str, least: int) -> None:
    for value in (least - 1, least + 0.5, "3", math.nan, True):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}"):
            make(**{name: value})


def test_steps_may_be_written_as_powers_of_ten() -> None:
    model = make(learning_starts=1e1, warmup_updates=2.0)
    assert (model.learning_starts, model.warmup_updates) == (10, 2) and type(model.learning_starts) is int


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
def test_numbers_are_kept_in_their_range(name: str, low: float, high: float) -> None:
    beyond = [math.inf] if high < math.inf else []
    for value in (low - 0.1, math.nan, "0.5", *beyond):
        with pytest.raises(ValueError, match=f"{name} must be"):
            make(**{name: value})
    make(max_grad_norm=math.inf)
    with pytest.raises(ValueError, match="max_grad_norm=0 clips every gradient to nothing"):
        make(max_grad_norm=0)


NUMBERS = [name for name, *_ in (*COUNTS, *RANGES)]
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(MBDPO).parameters.items()}


@pytest.mark.parametrize("name", [name for name in NUMBERS if DEFAULTS[name] is not None])
def test_none_is_no_number_unless_it_is_the_default(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got None"):
        make(**{name: None})


def test_every_number_whose_default_is_none_is_decided() -> None:
    model = make(**{name: None for name in NUMBERS if DEFAULTS[name] is None})
    assert all(getattr(model, name) is not None for name in NUMBERS if DEFAULTS[name] is None)


def test_a_buffer_has_a_whole_number_of_rows() -> None:
    with pytest.raises(ValueError, match=r"buffer_size must be a whole number of at least 1, got 1000\.0"):
        make(buffer_size=1e3)


@pytest.mark.parametrize("value", [0, -1, True, "4", None, [4, "step"], (0, "step"), (0, "episode"), (1,)], ids=str)
def test_steps_between_updates(value: Any) -> None:
    with pytest.raises(ValueError, match="train_freq must be an integer of at least 1"):
        make(train_freq=value)
    assert make(train_freq=(2, "episode")).train_freq == (2, TrainFrequencyUnit.EPISODE)


@pytest.mark.parametrize("value", [np.int64(2), (np.int64(2), "step")], ids=["alone", "with unit"])
def test_steps_between_updates_as_numpy_counts_them(value: Any) -> None:
    assert make(train_freq=value).train_freq == (2, TrainFrequencyUnit.STEP)


@pytest.mark.parametrize("value", ["yes", 0, 1, 0.5])
def test_episodic_is_known_or_left_out(value: Any) -> None:
    with pytest.raises(ValueError, match="episodic must be True, False or None"):
        make(episodic=value)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Discrete(5, start=1), "start at 0"),
        (spaces.Dict({"gear": spaces.Discrete(5, start=1), "speed": VECTOR}), "start at 0"),
        (spaces.MultiDiscrete([3, 3], start=[1, 1]), "start at 0"),
        (spaces.MultiDiscrete([[3, 3], [2, 2]]), "one dimension"),
        (spaces.Box(-1.0, 1.0, ()), "at least one dimension"),
        (spaces.Box(-1.0, 1.0, (0,)), r"at least one entry, got Box\(\[\], \[\], \(0,\)"),
        (spaces.Dict({"none": spaces.Box(-1.0, 1.0, (4, 0)), "speed": VECTOR}), "at least one entry"),
        (spaces.Dict({}), "at least one key"),
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


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"action_space": spaces.Box(-1.0, 1.0, (0,))}, r"at least one action, got Box\(\[\], \[\], \(0,\)"),
        ({"observation_space": spaces.Box(-1.0, 1.0, (0,))}, "at least one entry"),
        ({"observation_space": spaces.Dict({})}, "at least one key"),
    ],
    ids=["actions", "observations", "keys"],
)
def test_nothing_to_do_or_to_see(kwargs: dict[str, spaces.Space], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(ToyEnv(**kwargs), "MultiInputPolicy" if words == "at least one key" else "MlpPolicy")


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


def test_what_is_not_finite_as_float32() -> None:
    with pytest.raises(ValueError, match="observation"):
        check_finite(np.full((1, 3), 1e39))
    check_finite(np.full((1, 3), 1e38))


@pytest.mark.parametrize("where", ["first", "last"])
def test_ends_of_episodes_are_looked_at_too(where: str) -> None:
    class Broken(ToyEnv):
        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            obs, info = super().reset(**kwargs)
            return obs * math.nan if where == "first" else obs, info

        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, reward, terminated, truncated, info = super().step(action)
            return obs * math.nan if terminated or truncated else obs, reward, terminated, truncated, info

    model = make(Broken())
    with pytest.raises(ValueError, match="not finite in its observation"):
        model.learn(100)
    assert model.replay_buffer is not None and model.replay_buffer.size() == (0 if where == "first" else 4)


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


# --- arguments that change ------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "n_samples": 12,
    "n_elites": 3,
    "n_prior_trajectories": 2,
    "temperature": 0.9,
    "energy_coef": 0.3,
    "energy_unit": "value_range",
    "prior_margin": 0.2,
    "warm_denoising_steps": 1,
    "gamma": 0.5,
    "exploration_noise": 0.7,
    "act_mode": "prior",
    "tau": 0.5,
    "bootstrap": "prior",
    "target_horizon": 0,
    "prior_horizon": 2,
    "policy_delay": 3,
    "energy_interval": 2,
    "score_coef": 0.5,
    "score_batch_size": 2,
    "score_samples": 6,
    "score_interval": 5,
    "max_grad_norm": 0.1,
    "consistency_coef": 1.0,
    "reward_coef": 1.0,
    "value_coef": 1.0,
    "termination_coef": 0.5,
    "energy_loss_coef": 0.5,
    "entropy_coef": 0.1,
    "rho": 0.9,
    "saturation_coef": 0.5,
    "learning_rate": 0.5,
    "train_freq": (3, "step"),
}


def settings(model: MBDPO) -> dict[str, Any]:
    """Everything that policy and learner go by."""
    learner = {name: value for name, value in vars(model.learner).items() if isinstance(value, (int, float, str))}
    configs = {name: getattr(model.learner, name) for name in ("coefficients", "without_energy", "score_config")}
    policy = model.policy
    own = {"learning_rate": model.lr_schedule(1.0), "train_freq": model.train_freq}
    acts = {"search": policy.search_config, "acts": (policy.act_mode, policy.exploration_noise)}
    return learner | configs | own | acts


def test_every_argument_is_followed_or_fixed() -> None:
    # Of recorded data and of several tasks: tests/test_offline.py, tests/test_multitask.py
    assert CHANGES.keys() | {"behaviour_coef", "task_sampling"} | set(FIXED) == set(ARGUMENTS)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_set_on_a_model_is_what_it_would_have_been_built_with(name: str) -> None:
    # Elites and prior rollouts that nobody sets would follow n_samples
    shares = {"n_elites": 4, "n_prior_trajectories": 4}
    changed, built = make(**shares), make(**(shares | {name: CHANGES[name]}))
    assert settings(changed) != settings(built)
    setattr(changed, name, CHANGES[name])
    changed.predict(OBSERVATION)
    assert settings(changed) == settings(built)


def test_a_callback_anneals_an_argument() -> None:
    class Anneal(BaseCallback):
        def _on_step(self) -> bool:
            self.model.gamma = 0.9 + self.num_timesteps / 1000  # type: ignore[attr-defined]
            return True

    model = make().learn(20, callback=Anneal())
    assert model.policy.search_config.discount == pytest.approx(0.92)


def test_a_callback_sets_what_stable_baselines3_keeps_in_another_form() -> None:
    class Set(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 14:
                self.model.learning_rate, self.model.train_freq = 1e-5, 4  # type: ignore[assignment]
            return True

    model = make(train_freq=2, gradient_steps=1).learn(30, callback=Set())
    assert {group["lr"] / group.get("lr_scale", 1.0) for group in model.policy.optimizer.param_groups} == {1e-5}
    assert model.train_freq == TrainFreq(4, TrainFrequencyUnit.STEP)
    assert model._n_updates == 6, "after 12, 14, 18, 22, 26, 30 steps"
    model.train_freq = 3
    model.learn(9, reset_num_timesteps=False)
    assert model.train_freq == TrainFreq(3, TrainFrequencyUnit.STEP) and model._n_updates == 6 + 3
    model.train_freq = 0
    with pytest.raises(ValueError, match="train_freq must be"):
        model.learn(9, reset_num_timesteps=False)
    model.train_freq = 1
    for wrong in (-1.0, "fast", math.nan):
        model.learning_rate = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="learning_rate must be"):
            model.predict(OBSERVATION)


@pytest.mark.parametrize("name", FIXED)
def test_what_networks_depend_on_stays(name: str) -> None:
    model = make()
    other = {
        "model_size": 0.05,
        "search_dtype": "bfloat16",
        "update_dtype": "bfloat16",
        "episodic": True,
    }
    before, value = settings(model), getattr(model, name)
    setattr(model, name, other[name] if name in other else 2 * (value or 0.5))
    with pytest.raises(ValueError, match=name):
        model.learn(12)
    assert settings(model) == before
    setattr(model, name, value)
    model.learn(12)


def test_a_bad_value_is_refused_when_it_is_used(tmp_path: Path) -> None:
    model = make()
    model.tau = 7
    for use in (lambda: model.predict(OBSERVATION), lambda: model.learn(12), lambda: model.save(tmp_path / "model")):
        with pytest.raises(ValueError, match="tau must be between 0 and 1, got 7"):
            use()
    assert not list(tmp_path.iterdir())
    model.tau, model.score_coef = 0.1, 0.0
    with pytest.raises(ValueError, match="score_coef"):
        model.predict(OBSERVATION)


def test_a_loaded_model_acts_like_the_one_that_was_saved(tmp_path: Path) -> None:
    model = make().learn(12)
    model.gamma, model.act_mode = 0.5, "prior"
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy.act_mode == model.policy.act_mode == "prior"
    assert loaded.policy.search_config == model.policy.search_config


def test_what_is_set_on_the_policy_stays(tmp_path: Path) -> None:
    model = make()
    model.policy.act_mode, model.policy.exploration_noise = "prior", 0.0
    model.save(tmp_path / "model")
    assert model.act_mode == "prior"
    model.policy.act_mode, model.gamma = "search", 0.9
    model.predict(OBSERVATION)
    assert model.act_mode == model.policy.act_mode == "search"
    assert model.policy.exploration_noise == 0.0 and model.policy.search_config.discount == 0.9


@pytest.mark.parametrize("kind", ["vector", "tasks"])
def test_a_policy_that_is_saved_alone_acts_by_what_was_set_on_the_model(kind: str, tmp_path: Path) -> None:
    model = trained(kind, steps=1)
    before = settings(model)["search"]
    of_one_task = () if kind == "tasks" else ("gamma",)
    for name in (*OF_SEARCH, *of_one_task, "warm_denoising_steps", "exploration_noise"):
        setattr(model, name, CHANGES[name])
    obs = observations(model)
    _, plan = model.predict(obs, deterministic=True)
    model.policy.save(str(tmp_path / "policy.pkl"))
    loaded = type(model.policy).load(str(tmp_path / "policy.pkl"))
    assert loaded.search_config == model.policy.search_config != before
    for policy in (model.policy, loaded):
        policy.seed(0)
    for state, deterministic in ((None, True), (plan, True), (plan, False)):
        wanted, found = (policy.predict(obs, state, None, deterministic)[0] for policy in (model.policy, loaded))
        np.testing.assert_array_equal(found, wanted)


def test_a_folder_holds_what_was_set_on_the_model(tmp_path: Path) -> None:
    model = make()
    model.act_mode = "prior"
    model.save_pretrained(tmp_path / "model")
    assert MBDPO.from_pretrained(tmp_path / "model").policy.act_mode == "prior"
    model.horizon += 1
    with pytest.raises(ValueError, match="horizon"):
        model.save_pretrained(tmp_path / "model")
    assert MBDPO.from_pretrained(tmp_path / "model").horizon == 3, "the folder is what it was"


def test_a_model_pickled_before_arguments_were_followed() -> None:
    model = make()
    del model.__dict__["_followed"]
    model.predict(OBSERVATION)
    model.tau = 0.5
    model.predict(OBSERVATION)
    assert model.learner.tau == 0.5


@pytest.mark.parametrize(
    ("policy_kwargs", "match"),
    [
        ({"net_arch": "medium"}, "net_arch must be a list of widths"),
        ({"net_arch": 64}, "net_arch must be a list of widths"),
        ({"net_arch": {"heads": 64}}, "net_arch must be a list of widths"),
        ({"net_arch": [64, "a"]}, "net_arch must hold whole numbers of at least 1, got 'a'"),
        ({"net_arch": [0]}, "net_arch must hold whole numbers of at least 1, got 0"),
        ({"activation_fn": "relu"}, "activation_fn must be a class of modules, such as torch.nn.SiLU, got 'relu'"),
        ({"optimizer_class": partial(th.optim.Adam, eps=1)}, "optimizer_class must be a class .*as optimizer_kwargs"),
        ({"optimizer_class": th.nn.SiLU}, "optimizer_class must be a class of optimizers"),
        ({"optimizer_kwargs": {"lr": 1e-3}}, "optimizer_kwargs holds lr: pass learning_rate to MBDPO"),
    ],
)
def test_what_a_policy_cannot_be_built_of(policy_kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(policy_kwargs=policy_kwargs)


def test_a_buffer_is_no_buffer_class() -> None:
    buffer = make().replay_buffer
    with pytest.raises(ValueError, match="replay_buffer_class must be a class, got <"):
        make(replay_buffer_class=buffer)


def test_the_model_of_another_algorithm(tmp_path: Path) -> None:
    SAC("MlpPolicy", ToyEnv(), buffer_size=10).save(tmp_path / "sac")
    with pytest.raises(ValueError, match="A file with another policy holds the model of another algorithm"):
        MBDPO.load(tmp_path / "sac")


@pytest.mark.parametrize("number", [np.int64(1), np.float32(0.5)])
def test_numbers_of_numpy_shorten_a_warm_search(number: Any) -> None:
    assert make(warm_denoising_steps=number).policy.search_config.warm_steps == 1
