import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from torch import nn

from sb3_mbdpo import CnnPolicy, MlpPolicy
from sb3_mbdpo.acting import repeated
from sb3_mbdpo.encoders import FeaturesEncoder
from sb3_mbdpo.search_config import ACT_MODES
from tests.fakes import ACTIONS, IMAGE, TINY_SIZES, UNEVEN, VECTOR, ending, flat_parameters, make_policy

CHW = spaces.Box(0, 255, (3, 36, 40), np.uint8)
SPACES = {
    "box": VECTOR,
    "float64": spaces.Box(-5.0, 5.0, (2,), np.float64),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(4),
    "image": CHW,
    "dict": spaces.Dict({"camera": CHW, "speed": VECTOR, "gear": spaces.Discrete(3), "lamps": spaces.MultiBinary(2)}),
}
OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)


def stack(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


# --- shapes, spaces, dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_every_observation_space(name: str) -> None:
    """One observation gets one action; a batch gets rows that are what each observation gets alone."""
    space = copy.deepcopy(SPACES[name])
    space.seed(0)
    policy = make_policy(space)
    samples = [space.sample() for _ in range(4)]
    actions, plans = policy.predict(stack(samples), deterministic=True)
    assert actions.shape == (4, 2) and plans.shape == (4, 3, 2) and actions.dtype == plans.dtype == np.float32
    for sample, action, plan in zip(samples, actions, plans, strict=True):
        alone, state = policy.predict(sample, deterministic=True)
        assert alone.shape == (2,) and state.shape == (1, 3, 2)
        np.testing.assert_allclose(alone, action, atol=1e-4)
        np.testing.assert_allclose(state[0], plan, atol=1e-4)
    assert len(np.unique(actions, axis=0)) > 1, "the observation matters"


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = th.get_num_threads()
    th.set_num_threads(request.param)
    yield
    th.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("act_mode", ACT_MODES)
def test_a_row_acts_the_same_to_the_last_bit_in_any_company(act_mode: str) -> None:
    space = spaces.Box(-1.0, 1.0, (24,), np.float32)
    policy = make_policy(space, model_size=0.1, n_samples=32, n_prior_trajectories=8)
    policy.act_mode = act_mode
    observations = np.random.default_rng(0).uniform(-1, 1, (60, 24)).astype(np.float32)
    many, _ = policy.predict(observations, deterministic=True)
    for count in (1, 7, 8, 9, 10, 11, 15, 17, 33):
        few, _ = policy.predict(observations[:count], deterministic=True)
        np.testing.assert_array_equal(few, many[:count], err_msg=f"{count} rows")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["channels first", "channels last"])
def test_an_image_acts_the_same_to_the_last_bit_in_any_company(axes: tuple[int, ...]) -> None:
    policy = make_policy(spaces.Box(0, 255, (3, 64, 64), np.uint8), n_samples=32, n_prior_trajectories=8)
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 64, 64), np.uint8)
    images = np.ascontiguousarray(images.transpose(axes))
    for policy.act_mode in ACT_MODES:
        many, _ = policy.predict(images, deterministic=True)
        for count in (1, 3):
            few, _ = policy.predict(images[:count], deterministic=True)
            np.testing.assert_array_equal(few, many[:count], err_msg=f"{policy.act_mode}, {count} rows")


def test_rows_are_repeated_in_their_order() -> None:
    x = th.arange(6.0).reshape(3, 2)
    assert repeated(x, 7)[:, 0].tolist() == [0, 2, 4, 0, 2, 4, 0]
    assert repeated(x, 2)[:, 0].tolist() == [0, 2]
    assert repeated(th.tensor([True]), 3).tolist() == [True, True, True]


def test_a_policy_is_where_its_parameters_are() -> None:
    policy = make_policy()
    assert policy.device == next(policy.parameters()).device == th.device("cpu")
    assert copy.deepcopy(policy).to("meta").device == th.device("meta")


def test_channels_last_images_are_turned() -> None:
    """What comes as [h, w, C] while the model was trained on the transposed images acts the same."""
    policy, image = make_policy(CHW), CHW.sample()
    turned = np.transpose(image, (1, 2, 0))
    np.testing.assert_array_equal(
        policy.predict(image, deterministic=True)[0], policy.predict(turned, deterministic=True)[0]
    )


@pytest.mark.parametrize(
    "space",
    [
        UNEVEN,
        spaces.Box(-1.0, 1.0, (2, 3), np.float32),
        spaces.Box(-2.0, 5.0, (2,), np.float64),
        spaces.Box(-2.0, 5.0, (1,), np.float16),
        spaces.Box(-0.1, 0.3, (), np.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("act_mode", ACT_MODES)
def test_actions_are_in_the_action_space(space: spaces.Box, act_mode: str) -> None:
    policy = make_policy(action_space=space, act_mode=act_mode, exploration_noise=1.0)
    for deterministic in (True, False):
        actions, _ = policy.predict(OBSERVATIONS, deterministic=deterministic)
        assert actions.dtype == space.dtype and actions.shape == (5, *space.shape)
        assert all(space.contains(np.asarray(action, space.dtype)) for action in actions)
        single, _ = policy.predict(OBSERVATIONS[0], deterministic=deterministic)
        assert single.shape == space.shape


def test_scaled_actions_reach_both_bounds() -> None:
    policy = make_policy(action_space=UNEVEN)
    np.testing.assert_array_equal(
        policy.to_env(np.array([[-1.0, -1.0], [1.0, 1.0]], np.float32)), [UNEVEN.low, UNEVEN.high]
    )
    np.testing.assert_allclose(policy.to_env(np.array([[0.0, 0.5]], np.float32)), [[-0.5, 0.375]])
    # Rounding must not lead out of the space
    assert all(UNEVEN.contains(row) for row in policy.to_env(np.full((1, 2), 1.0000001, np.float32)))


# --- plans as state -------------------------------------------------------------------------------------------------


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one observation"):
        make_policy(VECTOR).predict(np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="at least one observation"):
        make_policy(spaces.Dict({"speed": VECTOR})).predict({})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_observations_that_are_not_finite_are_refused(value: float) -> None:
    broken = np.array([[0.0, 0.0, 0.0], [0.0, value, 0.0]])
    with pytest.raises(ValueError, match=r"predict\(\) got a value that is not finite in its observation: mend"):
        make_policy().predict(broken)
    space = spaces.Dict({"gear": spaces.Discrete(3), "speed": VECTOR})
    with pytest.raises(ValueError, match='not finite in its observation "speed": mend'):
        make_policy(space).predict({"gear": np.zeros(2, np.int64), "speed": broken})


@pytest.mark.parametrize("act_mode", ["search", "score"])
def test_state_is_the_warm_start(act_mode: str) -> None:
    policy = make_policy(horizon=3, act_mode=act_mode)
    _, plans = policy.predict(OBSERVATIONS, deterministic=True)
    warm, _ = policy.predict(OBSERVATIONS, state=np.ones_like(plans), deterministic=True)
    cold, _ = policy.predict(OBSERVATIONS, state=None, deterministic=True)
    assert (np.abs(warm - cold).max(axis=1) > 1e-4).all()
    zeros, _ = policy.predict(OBSERVATIONS, state=np.zeros_like(plans), deterministic=True)
    np.testing.assert_array_equal(zeros, cold)


@pytest.mark.parametrize("kwargs", [{}, {"warm_denoising_steps": 1}, {"act_mode": "score"}], ids=str)
def test_rows_restart_where_an_episode_starts(kwargs: dict[str, Any]) -> None:
    policy = make_policy(**kwargs)
    state = np.random.default_rng(1).choice([-1.0, 1.0], (5, 3, 2))
    start = np.array([True, False, True, False, False])
    mixed, mixed_plans = policy.predict(OBSERVATIONS, state, start, deterministic=True)
    cold, cold_plans = policy.predict(OBSERVATIONS, None, deterministic=True)
    warm, warm_plans = policy.predict(OBSERVATIONS, state, deterministic=True)
    np.testing.assert_array_equal(mixed, np.where(start[:, None], cold, warm))
    np.testing.assert_array_equal(mixed_plans, np.where(start[:, None, None], cold_plans, warm_plans))
    # As SB3 hands it over, and as plain Python does
    for flags in (start[:, None], start.astype(np.float32), start.tolist()):
        np.testing.assert_array_equal(policy.predict(OBSERVATIONS, state, flags, deterministic=True)[0], mixed)


def test_given_arrays_are_left_alone() -> None:
    policy, state = make_policy(), np.full((5, 3, 2), 0.5, np.float32)
    observations, plans = OBSERVATIONS.copy(), state.copy()
    policy.predict(observations, plans, np.zeros(5, bool))
    np.testing.assert_array_equal(observations, OBSERVATIONS)
    np.testing.assert_array_equal(plans, state)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"observation": np.zeros(4, np.float32)}, "shape"),
        ({"observation": np.zeros((2, 3, 3), np.float32)}, "shape"),
        ({"observation": (OBSERVATIONS[0], {})}, "tuple"),
        ({"state": np.zeros((4, 3, 2))}, r"state.*\(5, 3, 2\)"),
        ({"state": np.zeros((5, 2, 2))}, r"state.*\(5, 3, 2\)"),
        ({"state": np.zeros((5, 3, 2)), "episode_start": np.zeros(4, bool)}, "episode_start"),
    ],
)
def test_wrong_shapes_are_refused(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_policy().predict(**({"observation": OBSERVATIONS} | kwargs))


# --- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_mode", ACT_MODES)
def test_deterministic_is_a_pure_function(act_mode: str) -> None:
    policy = make_policy(act_mode=act_mode)
    first, plans = policy.predict(OBSERVATIONS, deterministic=True)
    policy.predict(OBSERVATIONS)
    policy.seed(99)
    own, torch_state, numpy_state = policy.generator.get_state(), th.get_rng_state(), np.random.get_state()[1].copy()
    again, plans_again = policy.predict(OBSERVATIONS, deterministic=True)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(plans, plans_again)
    assert th.equal(own, policy.generator.get_state()) and th.equal(torch_state, th.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])
    # Another row order and other neighbours
    turned, _ = policy.predict(OBSERVATIONS[::-1].copy(), deterministic=True)
    np.testing.assert_allclose(turned[::-1], first, atol=1e-5)
    alone = np.stack([policy.predict(row, deterministic=True)[0] for row in OBSERVATIONS])
    np.testing.assert_allclose(alone, first, atol=1e-5)
    other = np.concatenate([OBSERVATIONS[:1], 100 * OBSERVATIONS[1:]])
    np.testing.assert_allclose(policy.predict(other, deterministic=True)[0][0], first[0], atol=1e-5)


def test_an_untrained_policy_does_not_depend_on_the_batch() -> None:
    """All candidates are worth the same at the zero start: rounding must not choose among them."""
    policy = MlpPolicy(VECTOR, ACTIONS, lambda _: 3e-4, **TINY_SIZES)
    together, _ = policy.predict(OBSERVATIONS, deterministic=True)
    alone = np.stack([policy.predict(row, deterministic=True)[0] for row in OBSERVATIONS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("act_mode", ACT_MODES)
def test_exploring_is_seeded_and_leaves_global_state_alone(act_mode: str) -> None:
    policy = make_policy(act_mode=act_mode)
    global_state = th.get_rng_state()
    policy.seed(3)
    first, second = policy.predict(OBSERVATIONS)[0], policy.predict(OBSERVATIONS)[0]
    policy.seed(3)
    np.testing.assert_array_equal(first, policy.predict(OBSERVATIONS)[0])
    np.testing.assert_array_equal(second, policy.predict(OBSERVATIONS)[0])
    assert not np.array_equal(first, second)
    assert th.equal(global_state, th.get_rng_state())


@pytest.mark.parametrize("act_mode", ACT_MODES)
@pytest.mark.parametrize("scale", [1e6, 1e30])
def test_any_finite_weights_give_finite_actions(act_mode: str, scale: float) -> None:
    policy = make_policy(act_mode=act_mode)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(scale)
    for deterministic in (True, False):
        actions, plans = policy.predict(OBSERVATIONS, deterministic=deterministic)
        assert np.isfinite(actions).all() and np.isfinite(plans).all()


def test_act_modes_differ() -> None:
    plans = {mode: make_policy(act_mode=mode).predict(OBSERVATIONS, deterministic=True)[0] for mode in ACT_MODES}
    assert not np.allclose(plans["search"], plans["prior"]) and not np.allclose(plans["search"], plans["score"])
    policy = make_policy(act_mode="prior")
    with th.no_grad():
        z = policy.world_model.encode(th.as_tensor(OBSERVATIONS))
        expected = policy.world_model.prior_action(z)
    np.testing.assert_allclose(plans["prior"], expected, atol=1e-6)


def test_the_prior_draws_its_actions_without_further_noise() -> None:
    draws = [make_policy(act_mode="prior", exploration_noise=noise).predict(OBSERVATIONS)[0] for noise in (0.0, 0.5)]
    np.testing.assert_array_equal(*draws)


def test_acting_knows_where_episodes_end() -> None:
    policy, values = ending(make_policy()), []
    for policy.episodic in (False, True):
        result = policy.plan(th.as_tensor(OBSERVATIONS), th.zeros(5, 3, 2), th.ones(5, dtype=th.bool), True)
        assert result.search is not None
        values.append(result.search.value)
    assert not th.isclose(*values).any()


def test_statistics_are_of_the_rows_asked_for() -> None:
    """However many rows are searched beside them."""
    for count in (1, 2, 5):
        observations = th.as_tensor(OBSERVATIONS[:count])
        result = make_policy().plan(observations, th.zeros(count, 3, 2), th.ones(count, dtype=th.bool))
        assert result.search is not None and [len(statistic) for statistic in result.search] == [count] * 3


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "kwargs"),
    [
        (VECTOR, {"act_mode": "score", "net_arch": {"encoder": [20], "heads": [24]}, "activation_fn": nn.ReLU}),
        (VECTOR, {"act_mode": "prior", "with_score": False, "episodic": False}),
        (
            VECTOR,
            {"n_critics": 3, "horizon": 2, "optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
        ),
        (CHW, {"act_mode": "search"}),
        (SPACES["dict"], {}),
    ],
)
def test_a_saved_policy_acts_alike(space: spaces.Space, kwargs: dict[str, Any], tmp_path: Path) -> None:
    policy, space = make_policy(space, **kwargs), copy.deepcopy(space)
    policy.mark_episodic()
    policy.save(str(tmp_path / "policy.pth"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = type(policy).load(str(tmp_path / "policy.pth"))
    assert loaded.act_mode == policy.act_mode and loaded.episodic == policy.episodic
    assert loaded.search_config == policy.search_config
    space.seed(1)
    for _ in range(2):
        sample = space.sample()
        for ours, theirs in zip(
            policy.predict(sample, deterministic=True), loaded.predict(sample, deterministic=True), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("space", [VECTOR, CHW, SPACES["dict"]], ids=["vector", "image", "dict"])
def test_state_dict_holds_each_float_tensor_once(space: spaces.Space) -> None:
    state = make_policy(space).state_dict()
    assert all(isinstance(value, th.Tensor) and value.is_floating_point() for value in state.values())
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)
    stored = [value.untyped_storage().nbytes() for value in state.values()]
    assert stored == [value.numel() * value.element_size() for value in state.values()], "no views of larger storages"


def test_the_state_dict_tells_whether_the_task_terminates() -> None:
    policy, other = make_policy(), make_policy(seed=1)
    policy.mark_episodic()
    other.load_state_dict(policy.state_dict())
    assert other.episodic
    other.load_state_dict(make_policy().state_dict())
    assert not other.episodic
    without_head = make_policy(episodic=False)
    without_head.mark_episodic()
    assert not without_head.episodic and without_head.world_model.termination is None
    assert make_policy(episodic=True).episodic


def test_what_has_learned_nothing_of_ends_ends_nothing() -> None:
    """A head that was never trained may hold anything, as in files of earlier versions."""
    policy = make_policy()
    head = policy.world_model.termination
    assert head is not None
    latents = th.randn(50, head[0].linear.in_features)
    nn.init.normal_(head[-1].weight)
    assert (head(latents) > 0).any()
    policy.mark_episodic()
    assert head(latents).abs().max() == 0
    nn.init.normal_(head[-1].weight)
    policy.mark_episodic()
    assert head(latents).abs().max() > 0, "what it has learned since stays"


def test_a_copied_policy_acts_alike_and_stands_alone() -> None:
    policy = make_policy()
    twin = copy.deepcopy(policy)
    before = policy.predict(OBSERVATIONS, deterministic=True)[0]
    np.testing.assert_array_equal(before, twin.predict(OBSERVATIONS, deterministic=True)[0])
    with th.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(before, policy.predict(OBSERVATIONS, deterministic=True)[0])


# --- construction ---------------------------------------------------------------------------------------------------


def test_net_arch_and_activation() -> None:
    model = make_policy(net_arch={"encoder": [20, 21], "heads": [22]}, activation_fn=nn.Tanh).world_model
    assert [layer.linear.out_features for layer in model.encoder.net] == [20, 21, 16]
    assert [tuple(weight.shape) for weight in model.critics.weights] == [(2, 18, 22), (2, 22, 101)]
    assert isinstance(model.dynamics[0].activation, nn.Tanh) and isinstance(model.critics.activation, nn.Tanh)
    assert [layer.linear.out_features for layer in make_policy(net_arch=[23]).world_model.dynamics] == [23, 16]


def test_arguments_reach_the_world_model() -> None:
    kwargs = {"log_std_min": -3.0, "log_std_max": 1.0, "vmin": -4.0, "vmax": 5.0, "score_prediction": "score"}
    model = make_policy(**kwargs).world_model
    assert model.score is not None
    found = model.log_std_min, model.log_std_max, model.two_hot.vmin, model.two_hot.vmax, model.score.prediction_type
    assert found == tuple(kwargs.values())


class HalfExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box, factor: float = 1.0):
        super().__init__(observation_space, features_dim=2)
        self.factor = nn.Parameter(th.tensor([factor]))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.factor * observations[:, :2]


def test_own_features_extractor() -> None:
    policy = make_policy(features_extractor_class=HalfExtractor, features_extractor_kwargs={"factor": 2.0})
    encoder = policy.world_model.encoder
    assert isinstance(encoder, FeaturesEncoder) and encoder.extractor.factor.item() == 2.0
    unseen = OBSERVATIONS.copy()
    unseen[:, 2] = 0.0
    np.testing.assert_array_equal(
        policy.predict(OBSERVATIONS, deterministic=True)[0], policy.predict(unseen, deterministic=True)[0]
    )
    assert any(parameter is encoder.extractor.factor for parameter in policy.optimizer.param_groups[0]["params"])


def test_extractors_of_sb3_on_float_images() -> None:
    """They are told that images are scaled already, as Stable-Baselines3's own models tell them."""
    image = spaces.Box(0.0, 1.0, (3, 36, 36), np.float32)
    kwargs: dict[str, Any] = {"normalize_images": False, "features_extractor_class": NatureCNN}
    make_policy(image, **kwargs).predict(image.sample())
    kwargs["features_extractor_class"] = CombinedExtractor
    policy = make_policy(spaces.Dict({"camera": image, "speed": VECTOR}), **kwargs)
    assert any(isinstance(module, NatureCNN) for module in policy.modules())


def test_images_are_scaled_unless_told_otherwise() -> None:
    policy = make_policy(CHW)
    image = th.full((1, 3, 36, 40), 255, dtype=th.uint8)
    assert policy.preprocess(image).unique().tolist() == [1.0]
    floats = spaces.Box(0.0, 1.0, (3, 36, 40), np.float32)
    policy = make_policy(floats, normalize_images=False)
    assert policy.preprocess(th.full((1, 3, 36, 40), 0.5)).unique().tolist() == [0.5]


def test_only_images_are_shifted_and_only_while_training() -> None:
    space = SPACES["dict"]
    obs = {key: th.as_tensor(np.stack([subspace.sample() for _ in range(3)])) for key, subspace in space.items()}
    policy = make_policy(space)
    plain, shifted = policy.preprocess(obs), policy.preprocess(obs, augment=True)
    for key in ("speed", "gear", "lamps"):
        assert th.equal(plain[key], shifted[key])
    assert not th.equal(plain["camera"], shifted["camera"])
    still = make_policy(space, shift_pixels=0)
    assert th.equal(plain["camera"], still.preprocess(obs, augment=True)["camera"])


def test_refused_spaces_and_modes() -> None:
    with pytest.raises(ValueError, match="CnnPolicy needs image"):
        CnnPolicy(VECTOR, ACTIONS, lambda _: 3e-4, **TINY_SIZES)
    with pytest.raises(ValueError, match="at least 7 pixels"):
        CnnPolicy(spaces.Box(0, 255, (3, 6, 40), np.uint8), ACTIONS, lambda _: 3e-4, **TINY_SIZES)
    with pytest.raises(ValueError, match="act_mode"):
        MlpPolicy(VECTOR, ACTIONS, lambda _: 3e-4, act_mode="fast", **TINY_SIZES)
    with pytest.raises(ValueError, match=r"act_mode.*score"):
        MlpPolicy(VECTOR, ACTIONS, lambda _: 3e-4, act_mode="score", with_score=False, **TINY_SIZES)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"net_arch": {"pi": [8], "qf": [8]}}, "net_arch"),
        ({"time_embed_dim": 7}, "time_embed_dim"),
        ({"time_embed_dim": 2}, "time_embed_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"features_extractor_kwargs": {"features_dim": 8}}, "features_dim"),
        ({"observation_space": IMAGE, "net_arch": {"encoder": [8]}}, "num_channels"),
    ],
)
def test_refused_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_policy(**kwargs)


def test_forward_gives_scaled_cold_actions() -> None:
    policy = make_policy(action_space=UNEVEN)
    scaled = policy(th.as_tensor(OBSERVATIONS), deterministic=True)
    np.testing.assert_allclose(policy.to_env(scaled.numpy()), policy.predict(OBSERVATIONS, deterministic=True)[0])


def test_acting_switches_dropout_off_and_changes_nothing() -> None:
    policy = make_policy(dropout=0.5)
    policy.set_training_mode(True)
    before = flat_parameters(policy)
    policy.predict(OBSERVATIONS)
    assert not policy.training and th.equal(before, flat_parameters(policy))


def test_another_search_draws_its_own_deterministic_noise() -> None:
    policy, obs = make_policy(), VECTOR.sample()
    first, _ = policy.predict(obs, deterministic=True)
    wider = replace(policy.search_config, n_samples=2 * policy.search_config.n_samples)
    original, policy.search_config = policy.search_config, wider
    second, _ = policy.predict(obs, deterministic=True)
    policy.search_config = original
    again, _ = policy.predict(obs, deterministic=True)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
