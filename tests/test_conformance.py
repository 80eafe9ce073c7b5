"""What people do with Stable-Baselines3's own algorithms, done with MBDPO: build, act, save (learning is next door)."""

import inspect
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, VecTransposeImage

from sb3_mbdpo import MBDPO
from tests.fakes import IMAGE, MIXED, VECTOR, ToyEnv, flat_parameters, toy_envs
from tests.test_mbdpo import OBSERVATION, VARIANTS, make

IDS = [name for name, _ in VARIANTS]
CHW = spaces.Box(0, 255, (3, 36, 36), np.uint8)
OBSERVATION_SPACES: dict[str, spaces.Space] = {
    "float64": spaces.Box(-5.0, 5.0, (3,), np.float64),
    "unbounded": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(4),
    "channels first": CHW,
    "channels last": IMAGE,
    "dict": spaces.Dict({"state": spaces.Box(-1.0, 1.0, (2,), np.float64), "on": spaces.MultiBinary(2), "view": IMAGE}),
}


def policy_for(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space.shape is not None and len(space.shape) == 3 else "MlpPolicy"


def stacked(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def play(acting: Any, env: VecEnv, steps: int = 30) -> np.ndarray:
    """Actions of an agent that is handed its plans back, [steps, n_envs, ...]."""
    env.seed(7)
    obs, state, start = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    actions = []
    for _ in range(steps):
        action, state = acting.predict(obs, state, start, deterministic=True)
        obs, _, start, _ = env.step(action)
        actions.append(action)
    return np.stack(actions)


# --- construction ---------------------------------------------------------------------------------------------------


def test_arguments_come_in_the_order_of_sb3() -> None:
    """Ours stand where SAC has those of its entropy, its target network and gSDE; all others are as in SAC."""
    own = {"ent_coef", "target_update_interval", "target_entropy", "use_sde", "sde_sample_freq", "use_sde_at_warmup"}
    theirs = list(inspect.signature(SAC.__init__).parameters)
    parameters = inspect.signature(MBDPO.__init__).parameters
    assert [name for name in parameters if name in theirs] == [name for name in theirs if name not in own]
    shared = theirs.index("ent_coef")
    assert list(parameters)[:shared] == theirs[:shared]
    assert all(value.kind is value.POSITIONAL_OR_KEYWORD for value in parameters.values()), "flat keywords"
    model = MBDPO("MlpPolicy", ToyEnv(), 1e-2, 500, 7, 9, 0.2, 0.9, (3, "step"), 2, preset="debug", device="cpu")
    found = (model.learning_rate, model.buffer_size, model.learning_starts, model.batch_size, model.tau, model.gamma)
    assert found == (1e-2, 500, 7, 9, 0.2, 0.9) and model.train_freq.frequency == 3 and model.gradient_steps == 2


@pytest.mark.parametrize(
    ("env", "monitors"),
    [
        (lambda: "Pendulum-v1", 1),
        (ToyEnv, 1),
        (lambda: Monitor(ToyEnv()), 1),
        (lambda: toy_envs(2), 0),
        (lambda: VecNormalize(toy_envs(1)), 0),
        (lambda: make_vec_env("Pendulum-v1", 2), 1),
    ],
    ids=["id", "environment", "monitored", "vector", "normalised", "make_vec_env"],
)
def test_environments_are_wrapped_as_sb3_does_it(env: Callable[[], Any], monitors: int) -> None:
    given = env()
    model = make(given)
    found = model.get_env()
    assert isinstance(found, VecEnv) and (found is given or not isinstance(given, VecEnv))
    inner, count = found.unwrapped.envs[0], 0
    while hasattr(inner, "env"):
        count, inner = count + isinstance(inner, Monitor), inner.env
    assert count == monitors
    assert model.n_envs == found.num_envs == model.replay_buffer.n_envs
    assert model.get_vec_normalize_env() is (given if isinstance(given, VecNormalize) else None)


@pytest.mark.parametrize(
    ("env", "transposed"),
    [
        (lambda: ToyEnv(IMAGE), 1),
        (lambda: ToyEnv(CHW), 0),
        (lambda: ToyEnv(MIXED), 1),
        (lambda: toy_envs(2, observation_space=IMAGE), 1),
        (lambda: VecTransposeImage(toy_envs(2, observation_space=IMAGE)), 1),
        (lambda: FakeImageEnv(discrete=False), 1),
        (lambda: FakeImageEnv(discrete=False, channel_first=True), 0),
        (lambda: SimpleMultiObsEnv(discrete_actions=False), 1),
        (lambda: SimpleMultiObsEnv(discrete_actions=False, channel_last=False), 0),
    ],
    ids=["last", "first", "dict", "vector", "turned already", "fake", "fake first", "multi", "multi first"],
)
def test_images_are_turned_once(env: Callable[[], Any], transposed: int) -> None:
    given = env()
    model = make(given, policy_for(given.observation_space))
    found, count = model.get_env(), 0
    while isinstance(found, VecEnvWrapper):
        count, found = count + isinstance(found, VecTransposeImage), found.venv
    assert count == transposed
    space = model.observation_space
    images = [s for s in (space.values() if isinstance(space, spaces.Dict) else [space]) if len(s.shape) == 3]
    assert images and all(image.shape[0] in (1, 3) for image in images)
    model.learn(12)
    # As the environment gives them, channels last included
    action, _ = model.predict(given.reset() if isinstance(given, VecEnv) else given.reset()[0], deterministic=True)
    assert model.action_space.contains(action[0] if isinstance(given, VecEnv) else action)


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_dict_observations_ask_for_their_policy(policy: str) -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        make(ToyEnv(MIXED), policy)


@pytest.mark.parametrize("space", [CHW, VECTOR, spaces.Discrete(4)], ids=["image", "vector", "discrete"])
def test_observations_of_one_kind_ask_for_theirs(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=r"MultiInputPolicy needs Dict.*: use CnnPolicy for images"):
        make(ToyEnv(space), "MultiInputPolicy")


def test_nested_dicts_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="Nested"):
        make(ToyEnv(spaces.Dict({"outer": spaces.Dict({"inner": VECTOR})})), "MultiInputPolicy")


@pytest.mark.parametrize(
    ("env", "policy", "buffer"),
    [
        (lambda: BitFlippingEnv(4, continuous=True), "MultiInputPolicy", HerReplayBuffer),
        (ToyEnv, "MlpPolicy", NStepReplayBuffer),
        (ToyEnv, "MlpPolicy", ReplayBuffer),
    ],
    ids=["hindsight", "n-step", "plain"],
)
def test_other_buffers_are_refused_with_the_alternative(env: Callable[[], Any], policy: str, buffer: Any) -> None:
    with pytest.raises(ValueError, match=f"replay_buffer_class.*{buffer.__name__}.*SequenceReplayBuffer"):
        make(env(), policy, replay_buffer_class=buffer)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"n_steps": 3}, "n_steps.*`horizon`"),
        ({"policy_kwargs": {"use_sde": True}}, "use_sde.*`exploration_noise`"),
        ({"optimize_memory_usage": True}, "optimize_memory_usage=False"),
    ],
    ids=["n_steps", "gSDE", "optimize_memory_usage"],
)
def test_refusals_say_what_to_do_instead(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


@pytest.mark.parametrize(("policy", "space"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("preset", ["auto", "cpu", "paper"])
def test_presets_build_act_and_learn(preset: str, policy: str, space: spaces.Space) -> None:
    env = toy_envs(2, observation_space=space)
    fast = {"n_samples": 8, "denoising_steps": 2} if preset == "paper" else {}
    model = make(env, policy, preset=preset, learning_starts=4, gradient_steps=1, **fast)
    before = flat_parameters(model.policy)
    model.learn(6)
    after = flat_parameters(model.policy)
    assert model._n_updates == 1 and after.isfinite().all() and not th.equal(before, after)
    action, plans = model.predict(env.reset(), deterministic=True)
    assert action.shape == (2, 2) and plans.shape == (2, 3, 2) and np.isfinite(plans).all()


# --- spaces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_learns_from_every_observation_space(name: str, n_envs: int) -> None:
    """What the environment gave is what is stored, and learning from it keeps the weights finite."""
    space = OBSERVATION_SPACES[name]
    model = make(toy_envs(n_envs, observation_space=space), policy_for(space))
    seen = []
    model.learn(15, callback=lambda local, _: seen.append(local["new_obs"]) or True)
    stored, rows = model.replay_buffer.observations, len(seen) - 1
    for key in stored if isinstance(stored, dict) else [None]:
        ours = stored[key] if key else stored
        given = np.stack([obs[key] if key else obs for obs in seen[:-1]])
        np.testing.assert_array_equal(ours[1 : rows + 1].reshape(given.shape), given)
    assert model._n_updates > 0 and flat_parameters(model.policy).isfinite().all()
    sample = model.observation_space.sample()
    single, state = model.predict(sample, deterministic=True)
    batch, _ = model.predict(model.get_env().reset(), deterministic=True)
    assert single.shape == (2,) and state.shape == (1, 3, 2) and batch.shape == (n_envs, 2)


@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_of_any_shape_and_float(dtype: Any, shape: tuple[int, ...], n_envs: int) -> None:
    """The toy environments refuse an action that is outside of their space, in shape, dtype or bounds."""
    space = spaces.Box(-0.3, 1.7, shape, dtype)
    model = make(toy_envs(n_envs, action_space=space), exploration_noise=1.0).learn(14)
    assert model.replay_buffer.actions.shape[2:] == (space.low.size,)
    assert np.abs(model.replay_buffer.actions).max() <= 1
    for deterministic in (True, False):
        single, _ = model.predict(OBSERVATION, deterministic=deterministic)
        batch, _ = model.predict(np.stack([OBSERVATION] * 3), deterministic=deterministic)
        assert batch.shape == (3, *shape) and batch.dtype == dtype
        assert space.contains(np.asarray(single, dtype)) and all(space.contains(np.asarray(row)) for row in batch)


# --- acting ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, MBDPO]:
    """Left as they are: other tests use them too."""
    models = {}
    for policy, space in VARIANTS:
        env = toy_envs(2, observation_space=space, terminates=True)
        models[policy] = make(env, policy, policy_kwargs={"net_arch": [24]}).learn(50)
    return models


def copy_of(model: MBDPO, **kwargs: Any) -> MBDPO:
    """The same weights in a model that acts otherwise."""
    other = MBDPO(
        model.policy_class,
        model.get_env(),
        preset="debug",
        policy_kwargs=model.policy_kwargs,
        device="cpu",
        buffer_size=50,
        **kwargs,
    )
    other.set_parameters(model.get_parameters())
    return other


def draw_uniformly(model: MBDPO, scale: float) -> None:
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.copy_(scale * (2 * th.rand(parameter.shape, generator=generator) - 1))


@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
@pytest.mark.parametrize("policy", IDS)
def test_one_observation_or_64_along_50_steps(policy: str, act_mode: str, trained: dict[str, MBDPO]) -> None:
    """A row gets the actions that it would get alone, its plan carried along."""
    model = copy_of(trained[policy], act_mode=act_mode)
    draw_uniformly(model, 1.0)
    space = model.observation_space
    space.seed(0)
    together: np.ndarray | None = None
    alone: dict[int, np.ndarray | None] = {0: None, 30: None, 63: None}
    for _ in range(50):
        samples = [space.sample() for _ in range(64)]
        actions, together = model.predict(stacked(samples), together, deterministic=True)
        for row, plan in alone.items():
            action, alone[row] = model.predict(samples[row], plan, deterministic=True)
            np.testing.assert_allclose(action, actions[row], atol=1e-6)
            np.testing.assert_allclose(alone[row][0], together[row], atol=1e-6)
        assert actions.std(axis=0).max() > 1e-4, "rows differ by far more than the tolerance"


@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
def test_exploring_draws_anew_for_each_row_and_call(act_mode: str, trained: dict[str, MBDPO]) -> None:
    model = copy_of(trained["MlpPolicy"], act_mode=act_mode)
    obs = stacked([model.observation_space.sample()] * 8)
    first, second = model.predict(obs)[0], model.predict(obs)[0]
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 16


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e12, 1e38])
@pytest.mark.parametrize("policy", IDS)
@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
def test_uniform_random_weights_give_actions_in_the_space(
    act_mode: str, policy: str, scale: float, trained: dict[str, MBDPO]
) -> None:
    model = copy_of(trained[policy], act_mode=act_mode, exploration_noise=0.5)
    draw_uniformly(model, scale)
    obs, state = stacked([model.observation_space.sample() for _ in range(4)]), None
    for deterministic in (True, False, True):
        actions, state = model.predict(obs, state, deterministic=deterministic)
        assert np.isfinite(state).all() and all(model.action_space.contains(action) for action in actions)


@pytest.mark.parametrize("policy", IDS)
def test_model_file_and_policy_file_act_alike(policy: str, trained: dict[str, MBDPO], tmp_path: Path) -> None:
    """The model, the model loaded, and its policy loaded alone, along the same episodes."""
    model, env = trained[policy], trained[policy].get_env()
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pth"))
    expected = play(model, env)
    assert len(np.unique(expected.reshape(-1, 2), axis=0)) > 50
    np.testing.assert_array_equal(play(MBDPO.load(tmp_path / "model"), env), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = type(model.policy).load(str(tmp_path / "policy.pth"), device="cpu")
    np.testing.assert_array_equal(play(loaded, env), expected)
    np.testing.assert_array_equal(play(model, env), expected)


# --- saving ---------------------------------------------------------------------------------------------------------


def test_files_paths_and_streams(trained: dict[str, MBDPO], tmp_path: Path) -> None:
    model = trained["MlpPolicy"]
    weights = flat_parameters(model.policy)
    stream, buffer = io.BytesIO(), io.BytesIO()
    model.save(stream)
    model.save_replay_buffer(buffer)
    model.save(str(tmp_path / "folder" / "model"))
    with open(tmp_path / "handle", "wb") as file:
        model.save(file)
    for target in (io.BytesIO(stream.getvalue()), str(tmp_path / "folder" / "model.zip"), tmp_path / "handle"):
        loaded = MBDPO.load(target, env=toy_envs(2))
        assert th.equal(flat_parameters(loaded.policy), weights)
    buffer.seek(0)
    loaded.load_replay_buffer(buffer)
    np.testing.assert_array_equal(loaded.replay_buffer.rewards, model.replay_buffer.rewards)


def test_a_model_without_environment_acts_and_learns_once_it_has_one(trained: dict[str, MBDPO], tmp_path: Path) -> None:
    trained["MlpPolicy"].save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.get_env() is None and loaded.predict(OBSERVATION)[0].shape == (2,)
    with pytest.raises(AssertionError, match="set the environment"):
        loaded.learn(10)
    loaded.set_env(toy_envs(2))
    before = flat_parameters(loaded.policy)
    loaded.learn(12, reset_num_timesteps=False)
    assert loaded.num_timesteps == 62 and not th.equal(before, flat_parameters(loaded.policy))


@pytest.mark.parametrize("how", ["custom_objects", "keyword"])
@pytest.mark.parametrize("rate", [0.25, LinearSchedule(0.25, 0.1, 1.0)], ids=["number", "schedule"])
def test_loading_with_another_learning_rate(how: str, rate: Any, trained: dict[str, MBDPO], tmp_path: Path) -> None:
    trained["MlpPolicy"].save(tmp_path / "model")
    kwargs = {"custom_objects": {"learning_rate": rate}} if how == "custom_objects" else {"learning_rate": rate}
    loaded = MBDPO.load(tmp_path / "model", env=toy_envs(2), **kwargs)
    loaded.learn(6, reset_num_timesteps=False)
    # The last update comes when nothing of the schedule remains
    expected = 0.25 if isinstance(rate, float) else 0.1
    assert loaded.policy.prior_optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * expected)


def test_keywords_of_load_reach_the_policy_and_the_buffer(trained: dict[str, MBDPO], tmp_path: Path) -> None:
    model = trained["MlpPolicy"]
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", act_mode="prior", n_samples=24, gamma=0.5, buffer_size=40)
    assert (loaded.policy.act_mode, loaded.policy.search_config.n_samples) == ("prior", 24)
    assert loaded.policy.search_config.discount == 0.5 and loaded.replay_buffer.buffer_size == 40 // 2
    MBDPO.load(tmp_path / "model", policy_kwargs={"net_arch": [24]})
    with pytest.raises(ValueError, match="policy kwargs"):
        MBDPO.load(tmp_path / "model", policy_kwargs={"net_arch": [32]})


def test_a_model_that_only_acts_is_loaded_without_room_for_replay(trained: dict[str, MBDPO], tmp_path: Path) -> None:
    trained["MlpPolicy"].save(tmp_path / "model")
    for env in (None, ToyEnv()):
        loaded = MBDPO.load(tmp_path / "model", env=env, buffer_size=1, device="cpu")
        assert loaded.replay_buffer.buffer_size == 1
        assert play(loaded, toy_envs(1), steps=6).shape == (6, 1, 2)
    with pytest.raises(ValueError, match=r"has 1 row\(s\) .* horizon=3: pass buffer_size >= 3"):
        loaded.learn(1)


@pytest.mark.parametrize("policy", IDS)
def test_loading_and_saving_again_loses_nothing(policy: str, trained: dict[str, MBDPO], tmp_path: Path) -> None:
    """Building from a file fills in nothing that a file would keep: the second file is as the first."""
    trained[policy].save(tmp_path / "first")
    MBDPO.load(tmp_path / "first").save(tmp_path / "second")
    first, second = (MBDPO.load(tmp_path / name) for name in ("first", "second"))
    assert th.equal(flat_parameters(first.policy), flat_parameters(trained[policy].policy))
    assert th.equal(flat_parameters(first.policy), flat_parameters(second.policy))
    assert first.policy_kwargs == second.policy_kwargs == {"net_arch": [24]}
    for name, value in vars(trained[policy]).items():
        if isinstance(value, (int, float, str, type(None))):
            assert getattr(first, name) == getattr(second, name) == value, name


def test_attributes_can_be_left_out_or_forced_in(tmp_path: Path) -> None:
    model = make()
    model.verbose = 2
    model.save(tmp_path / "model", exclude=["verbose"])
    assert MBDPO.load(tmp_path / "model").verbose == 0
    model.save(tmp_path / "model", exclude=["verbose"], include=["verbose"])
    assert MBDPO.load(tmp_path / "model").verbose == 2


def test_parameters_from_a_file_and_in_part(trained: dict[str, MBDPO], tmp_path: Path) -> None:
    model = trained["MlpPolicy"]
    model.save(tmp_path / "model")
    other = make(toy_envs(2), policy_kwargs={"net_arch": [24]}, seed=5)
    other.set_parameters(str(tmp_path / "model"), device="cpu")
    assert th.equal(flat_parameters(model.policy), flat_parameters(other.policy))
    assert other.policy.prior_optimizer.state_dict()["state"], "with the optimisers"
    zeros = {name: th.zeros_like(value) for name, value in model.policy.state_dict().items() if "dynamics" in name}
    other.set_parameters({"policy": zeros}, exact_match=False)
    for name, value in other.policy.state_dict().items():
        assert th.equal(value, zeros.get(name, model.policy.state_dict()[name])), name
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({"actor": {}})


def test_what_set_env_takes_and_refuses() -> None:
    model = make(toy_envs(2))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(toy_envs(2, observation_space=spaces.Box(-2.0, 1.0, (3,))))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        model.set_env(toy_envs(2, action_space=spaces.Box(-2.0, 1.0, (2,))))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(toy_envs(3, observation_space=spaces.Box(-2.0, 1.0, (3,))))
    assert model.n_envs == model.replay_buffer.n_envs == 2
    for n_envs in (3, 2):
        model.set_env(toy_envs(n_envs))
        assert model.n_envs == model.replay_buffer.n_envs == n_envs, "as long as there is nothing to replay"
    inner = toy_envs(2)
    normalised = VecNormalize(inner)
    model.learn(12).set_env(normalised)
    assert model.get_env() is normalised and model.get_vec_normalize_env() is normalised
    model.learn(12, reset_num_timesteps=False)
    assert model.num_timesteps == 24 and normalised.obs_rms.count > 12
    assert inner.envs[0].episodes == 2, "reset before its first step, and after its fifth"
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(toy_envs(3))


def test_the_table_names_tests_that_exist() -> None:
    folder = Path(__file__).parent
    found = re.findall(r"(\w+): ((?:`test_\w+`(?:, )?)+)", (folder / "README.md").read_text())
    assert len(found) > 50
    for file, names in found:
        code = (folder / f"test_{file}.py").read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in code, f"{file}: {name}"
