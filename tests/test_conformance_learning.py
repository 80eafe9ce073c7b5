"""What people do with ``learn()`` of Stable-Baselines3's own algorithms, done with MBDPO."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from sb3_mbdpo import MBDPO
from tests.fakes import BOXES, IMAGE, MIXED, VECTOR, Counter, ToyEnv, counters, flat_parameters, toy_envs
from tests.test_mbdpo import OBSERVATION, VARIANTS, make
from tests.test_resume import logged

# --- when and how often to update -----------------------------------------------------------------------------------


def test_no_gradient_steps() -> None:
    model = make(toy_envs(2), gradient_steps=0)
    before = flat_parameters(model.policy)
    model.learn(30)
    assert model._n_updates == 0 and th.equal(before, flat_parameters(model.policy))
    assert model.replay_buffer.size() == 15


@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "at"),
    [
        (5, 3, {15: 3, 20: 6, 25: 9}),
        ((5, "step"), -1, {15: 5, 20: 10, 25: 15}),
        ((2, "episode"), 1, {16: 1, 24: 2, 32: 3}),
        ((1, "episode"), -1, {16: 8, 24: 16, 32: 24}),
    ],
    ids=str,
)
def test_updates_come_when_they_should(train_freq: Any, gradient_steps: int, at: dict[int, int]) -> None:
    """Episodes of 8 steps (4 where two make a rollout), the first 10 steps without updates."""
    length = 4 if train_freq == (2, "episode") else 8
    model = make(counters(1, length), train_freq=train_freq, gradient_steps=gradient_steps)
    seen = {}
    train = model.train

    def spy(**kwargs: Any) -> None:
        train(**kwargs)
        seen[model.num_timesteps] = model._n_updates

    model.train = spy  # type: ignore[method-assign]
    model.learn(25)
    assert seen == at


@pytest.mark.parametrize(
    ("train_freq", "n_envs", "words"),
    [((1, "minute"), 1, "step.*episode"), (1.5, 1, "integer"), ((1, "episode"), 2, "only one env")],
    ids=str,
)
def test_other_train_freqs_are_refused(train_freq: Any, n_envs: int, words: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=words):
        make(toy_envs(n_envs), train_freq=train_freq).learn(20)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("last", [16, 19])
def test_going_on_after_a_callback_has_stopped(n_envs: int, normalised: bool, last: int) -> None:
    """At an episode's end and amid one: Stable-Baselines3 does not store the step, and no window may cross it."""
    env: Any = counters(n_envs, length=8)
    env = VecNormalize(env, norm_reward=False, clip_obs=1e9) if normalised else env
    model = make(env, learning_starts=10, buffer_size=300)
    model.learn(1000, callback=lambda local_variables, _: local_variables["self"].num_timesteps < last * n_envs)
    assert model.num_timesteps == last * n_envs and model.replay_buffer is not None
    if last % 8 == 0:
        assert model._restarts is not None and model._restarts.all(), "plans of the last episode are not gone on with"
    model.learn(20 * n_envs, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert buffer.size() == last - 1 + 20
    before, after = buffer.observations[: buffer.size()], buffer.next_observations[: buffer.size()]
    # [environment, episode, step]
    # Terminal observations come back from VecNormalize with other last digits
    before, after = before.round(3), after.round(3)
    assert (before[..., :2] == after[..., :2]).all() and (after[..., 2] == before[..., 2] + 1).all()
    windows = buffer.sample(300)
    observations = windows.observations.round(decimals=3)
    first, reached = observations[0], observations[1:]
    assert (reached[..., :2] == first[None, :, :2]).all(), "no window crosses into another episode"
    steps = windows.masks[..., 0].cumsum(0)
    assert th.equal(reached[..., 2], first[None, :, 2] + steps), "nor the step that is missing"


class Gauge(gym.Env):
    """Observations of whole numbers."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, space: spaces.Box):
        self.observation_space, self.step_count = space, 0

    def _observed(self) -> np.ndarray:
        return np.full(self.observation_space.shape, 17 * self.step_count + 3, self.observation_space.dtype)

    def reset(self, **kwargs: Any) -> Any:
        self.step_count = 0
        return self._observed(), {}

    def step(self, action: Any) -> Any:
        self.step_count += 1
        return self._observed(), 0.0, False, self.step_count == 9, {}


@pytest.mark.parametrize(("dtype", "high"), [(np.int64, 1000), (np.uint8, 255)])
def test_last_observations_of_whole_numbers_under_vec_normalize(dtype: Any, high: int) -> None:
    space = spaces.Box(0, high, (2,), dtype)
    env = VecNormalize(DummyVecEnv([lambda: Gauge(space)]), clip_obs=1e6)
    model = MBDPO("MlpPolicy", env, preset="debug", learning_starts=100, buffer_size=100, device="cpu").learn(30)
    assert model.replay_buffer is not None
    before, after = (
        x[:30, 0].reshape(30, -1) for x in (model.replay_buffer.observations, model.replay_buffer.next_observations)
    )
    assert (after == before + 17).all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("last", [16, 19])
def test_going_on_after_an_error(error: type[BaseException], last: int) -> None:
    """The step that led to it is not stored, and nothing is stored as if it had not been made."""
    model = make(counters(2, length=8), learning_starts=10, buffer_size=300)
    env = model.get_env()
    assert env is not None and model.replay_buffer is not None
    step_wait = env.step_wait

    def broken() -> Any:
        observations, rewards, dones, infos = step_wait()
        if model.num_timesteps + 2 == 2 * last:
            env.step_wait = step_wait  # type: ignore[method-assign]
            if error is KeyboardInterrupt:
                raise error
            rewards[1] = np.nan
        return observations, rewards, dones, infos

    env.step_wait = broken  # type: ignore[method-assign]
    with pytest.raises(error):
        model.learn(1000)
    stored = model.replay_buffer.size()
    assert stored == last - 1
    model.learn(40, reset_num_timesteps=False)
    buffer = model.replay_buffer
    before, after = buffer.observations[: buffer.size()], buffer.next_observations[: buffer.size()]
    # [environment, episode, step]
    assert (before[..., :2] == after[..., :2]).all() and (after[..., 2] == before[..., 2] + 1).all()
    assert buffer.size() == stored + 20 and (before[stored, :, 2] == 0).all(), "a new episode"
    windows = buffer.sample(300)
    assert (windows.observations[..., :2] == windows.observations[:1, :, :2]).all()


def test_terminations_that_were_put_into_the_buffer() -> None:
    model = make(ToyEnv(lengths=(100,)))
    zeros = np.zeros((1, 3), np.float32)
    model.replay_buffer.add(zeros, zeros, np.zeros((1, 2)), np.ones(1), np.array([True]), [{}])
    assert not model.policy.episodic
    model.learn(12)
    assert model.policy.episodic
    kwargs = {"handle_timeout_termination": False}
    assert make(ToyEnv(), replay_buffer_kwargs=kwargs).learn(12).policy.episodic, "time limits count as terminations"


def test_learning_twice_starts_anew_or_goes_on() -> None:
    # Observations that never change: nothing but the reset itself tells where an episode was broken off
    env = ToyEnv(spaces.Box(0.0, 0.0, (3,)), lengths=(100,))
    model = make(env)
    model.learn(12)
    updates, resets = model._n_updates, env.episodes
    model.learn(12, reset_num_timesteps=False)
    assert model.num_timesteps == 24 and env.episodes == resets, "the episode goes on"
    assert not model.replay_buffer.window_ends[:23].any() and model._n_updates == updates + 12
    model.learn(12)
    assert model.num_timesteps == 12 and env.episodes == resets + 1
    assert np.flatnonzero(model.replay_buffer.window_ends[:35]).tolist() == [23], "no window crosses the reset"
    assert model.replay_buffer.size() == 36 and model._n_updates == updates + 12 + 2
    before = flat_parameters(model.policy)
    assert model.learn(0) is model and th.equal(before, flat_parameters(model.policy))


@pytest.mark.parametrize(("n_envs", "act_mode", "steps"), [(1, "search", 280), (8, "score", 4160)])
def test_a_small_buffer_of_short_episodes(n_envs: int, act_mode: str, steps: int) -> None:
    """The ring of 64 wraps many times; windows stay within one episode of one environment, terminal step included."""
    kwargs = {"buffer_size": 64, "train_freq": 5, "gradient_steps": 1, "learning_starts": 16, "act_mode": act_mode}
    model = make(counters(n_envs), **kwargs).learn(steps)
    assert model.replay_buffer.full and model._n_updates >= steps // (5 * n_envs) - 4
    assert flat_parameters(model.policy).isfinite().all()

    def draw() -> tuple[th.Tensor, th.Tensor]:
        samples = model.replay_buffer.sample(2000)
        going = samples.masks[..., 0] > 0
        moves = (samples.observations[1:] - samples.observations[:-1])[going]
        assert th.equal(moves, th.tensor([0.0, 0.0, 1.0]).expand_as(moves)) and not samples.terminations.any()
        return samples.observations[0], going.sum(0)

    first, lengths = draw()
    assert first[:, 0].unique().tolist() == list(range(n_envs))
    # The run ends with an episode, so nothing but episodes' ends cuts a window short
    assert th.equal(lengths, (8 - first[:, 2]).clamp(max=3).long())
    model.learn(1, reset_num_timesteps=False)  # a rollout of five steps: the newest row is amid an episode
    first, lengths = draw()
    newest = first[:, 1] == first[:, 1].max()
    assert th.equal(lengths[newest], (5 - first[newest, 2]).clamp(max=3).long())


# --- vector environments --------------------------------------------------------------------------------------------


def test_normalised_environments_store_raw_numbers_and_sync(tmp_path: Path) -> None:
    env, evaluation = (
        VecNormalize(counters(2)),
        VecNormalize(VecMonitor(counters(2)), training=False, norm_reward=False),
    )
    model = make(env)
    update, learned = model.learner.update, []
    model.learner.update = lambda samples, index: learned.append(samples) or update(samples, index)  # type: ignore[method-assign]
    model.learn(40, callback=EvalCallback(evaluation, n_eval_episodes=2, eval_freq=10, verbose=0))
    buffer = model.replay_buffer
    assert (buffer.rewards[:20] == 1).all()
    steps, following = buffer.observations[:20, :, 2], buffer.next_observations[:20, :, 2]
    np.testing.assert_allclose(steps[:, 0], np.arange(20) % 8, atol=1e-3)
    np.testing.assert_allclose(following, steps + 1, atol=1e-3)
    for samples in learned:
        # Normalised: an environment's number, 0 or 1, becomes about -1 or 1; a reward of 1 something smaller
        assert samples.observations[..., 0].max() <= 1.1 and samples.observations[..., 0].min() < -0.9
        assert not (samples.rewards[samples.masks > 0] == 1).any()
    assert evaluation.obs_rms.count > 20 and env.obs_rms.count > evaluation.obs_rms.count - 1
    # The last evaluation came after the last step
    np.testing.assert_array_equal(evaluation.obs_rms.mean, env.obs_rms.mean)
    env.save(str(tmp_path / "statistics.pkl"))
    model.save(tmp_path / "model")
    env = VecNormalize.load(str(tmp_path / "statistics.pkl"), counters(2))
    loaded = MBDPO.load(tmp_path / "model", env=env)
    assert loaded.get_vec_normalize_env() is env
    loaded.learn(12, reset_num_timesteps=False)
    assert loaded.replay_buffer.rewards[:6].tolist() == [[1.0, 1.0]] * 6


def test_normalised_dicts_keep_their_images() -> None:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (3, 36, 36), np.uint8), "speed": VECTOR})
    env = VecNormalize(toy_envs(2, observation_space=space), norm_obs_keys=["speed"])
    model = make(env, "MultiInputPolicy").learn(30)
    samples = model.replay_buffer.sample(100, env=env)
    assert samples.observations["camera"].dtype == th.uint8 and samples.observations["camera"].max() > 200
    assert samples.observations["speed"].abs().max() > 1 > model.replay_buffer.observations["speed"].max()
    assert flat_parameters(model.policy).isfinite().all()


def test_processes_learn_what_one_process_learns() -> None:
    makers = [lambda index=index: Counter(index, 5 + index) for index in range(2)]
    env = SubprocVecEnv(makers, start_method="fork")  # type: ignore[arg-type]
    try:
        apart = make(env).learn(30)
    finally:
        env.close()
    together = make(DummyVecEnv(makers)).learn(30)  # type: ignore[arg-type]
    assert th.equal(flat_parameters(apart.policy), flat_parameters(together.policy))
    np.testing.assert_array_equal(apart.replay_buffer.actions, together.replay_buffer.actions)


@pytest.mark.parametrize(
    ("policy", "space", "shape"),
    [
        ("MlpPolicy", VECTOR, (12,)),
        ("CnnPolicy", IMAGE, (12, 36, 36)),
        ("CnnPolicy", spaces.Box(0, 255, (1, 36, 36), np.uint8), (4, 36, 36)),
        ("MultiInputPolicy", BOXES, None),
    ],
    ids=["vector", "channels last", "channels first", "dict"],
)
def test_stacked_frames(policy: str, space: spaces.Space, shape: tuple[int, ...] | None) -> None:
    model = make(VecFrameStack(toy_envs(2, observation_space=space), 4), policy).learn(24)
    if shape is None:
        assert {key: s.shape for key, s in model.observation_space.items()} == {"camera": (12, 36, 36), "speed": (12,)}
    else:
        assert model.observation_space.shape == shape
    buffer = model.replay_buffer
    assert buffer.dones[:12].any() and (buffer.window_ends[:11] == (buffer.dones[:11] > 0)).all()
    assert model._n_updates == 14 and flat_parameters(model.policy).isfinite().all()


# --- policy_kwargs --------------------------------------------------------------------------------------------------


class Normed(BaseFeaturesExtractor):
    """A features extractor with statistics of its own."""

    def __init__(self, observation_space: spaces.Box, width: int = 4):
        super().__init__(observation_space, features_dim=width)
        self.linear, self.norm = nn.Linear(3, width), nn.BatchNorm1d(width)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(self.linear(observations))


FLOAT_IMAGE = spaces.Box(0.0, 1.0, (3, 36, 36), np.float32)
OWN: dict[str, Any] = {"features_extractor_class": Normed}
POLICY_KWARGS: dict[str, tuple[str, spaces.Space, dict[str, Any]]] = {
    "widths": ("MlpPolicy", VECTOR, {"net_arch": [20, 20], "activation_fn": nn.ELU}),
    "widths in parts": ("MultiInputPolicy", MIXED, {"net_arch": {"encoder": [20], "heads": [24]}}),
    "sizes": ("MlpPolicy", VECTOR, {"n_critics": 4, "latent_dim": 24, "mlp_dim": 40, "enc_dim": 20}),
    "channels": ("CnnPolicy", IMAGE, {"num_channels": 4, "shift_pixels": 0}),
    "float images": ("CnnPolicy", FLOAT_IMAGE, {"normalize_images": False, "shift_pixels": 0}),
    "own extractor": ("MlpPolicy", VECTOR, OWN),
    "extractor with arguments": ("MlpPolicy", VECTOR, OWN | {"features_extractor_kwargs": {"width": 6}}),
    "NatureCNN": (
        "CnnPolicy",
        IMAGE,
        {"features_extractor_class": NatureCNN, "features_extractor_kwargs": {"features_dim": 16}},
    ),
    "CombinedExtractor": ("MultiInputPolicy", MIXED, {"features_extractor_class": CombinedExtractor}),
    "FlattenExtractor": ("MlpPolicy", IMAGE, {"features_extractor_class": FlattenExtractor}),
    "AdamW": ("MlpPolicy", VECTOR, {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}),
    "RMSprop": ("MlpPolicy", VECTOR, {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}),
    "SGD": ("CnnPolicy", IMAGE, {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}),
    "Adam": ("MlpPolicy", VECTOR, {"optimizer_kwargs": {"betas": (0.8, 0.9), "eps": 1e-3, "amsgrad": True}}),
}


@pytest.mark.parametrize("name", POLICY_KWARGS)
def test_policy_kwargs_learn_and_survive_a_file(name: str, tmp_path: Path) -> None:
    policy, space, kwargs = POLICY_KWARGS[name]
    given = dict(kwargs)
    model = make(toy_envs(2, observation_space=space), policy, policy_kwargs=given).learn(16)
    assert model._n_updates == 6 and flat_parameters(model.policy).isfinite().all()
    assert given == kwargs and model.policy_kwargs == kwargs, "what was given stays as it was"
    least = {"normalize_images": False} if space is FLOAT_IMAGE else {}
    plain = make(toy_envs(2, observation_space=space), policy, policy_kwargs=least).learn(16)
    equal = th.equal(flat_parameters(model.policy), flat_parameters(plain.policy))
    assert equal == (name == "FlattenExtractor"), "everything but that makes a difference"
    if "features_extractor_class" in kwargs:
        extractor = model.policy.world_model.encoder.extractor
        widths = kwargs.get("features_extractor_kwargs", {"default": extractor.features_dim})
        assert type(extractor) is kwargs["features_extractor_class"] and [extractor.features_dim] == [*widths.values()]
    for optimizer in (model.policy.optimizer, model.policy.prior_optimizer, model.policy.score_optimizer):
        assert type(optimizer) is kwargs.get("optimizer_class", th.optim.Adam)
        for key, value in kwargs.get("optimizer_kwargs", {}).items():
            assert all(group[key] == value for group in optimizer.param_groups)
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", env=toy_envs(2, observation_space=space))
    sample = model.observation_space.sample()
    for ours, theirs in zip(
        model.predict(sample, deterministic=True), loaded.predict(sample, deterministic=True), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    loaded.learn(4, reset_num_timesteps=False)
    assert flat_parameters(loaded.policy).isfinite().all()


def test_statistics_of_an_extractor_move_while_learning_only() -> None:
    model = make(toy_envs(2), policy_kwargs={"features_extractor_class": Normed}, gradient_steps=0)
    norm = model.policy.world_model.encoder.extractor.norm
    before = norm.running_mean.clone()
    model.learn(16)
    assert th.equal(norm.running_mean, before), "acting"
    model.train(1, 8)
    after = norm.running_mean.clone()
    assert not th.equal(after, before)
    single, batch = (model.predict(obs, deterministic=True)[0] for obs in (OBSERVATION, np.stack([OBSERVATION] * 5)))
    np.testing.assert_allclose(batch, [single] * 5, atol=1e-5)
    assert th.equal(norm.running_mean, after) and not norm.training


# --- schedules, noise, seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate", [7e-4, ConstantSchedule(5e-4), LinearSchedule(1e-3, 1e-5, 0.5), lambda left: 1e-3 * left**2]
)
def test_learning_rates_follow_the_schedule(rate: Any) -> None:
    rates, model = [], make(toy_envs(2), learning_rate=rate)

    def watch(local: dict[str, Any], _: Any) -> bool:
        # What the last update used, and what it should have used: progress has not moved on yet
        if model._n_updates > 0:
            wanted = model.lr_schedule(model._current_progress_remaining)
            groups = (*model.policy.optimizer.param_groups, *model.policy.prior_optimizer.param_groups)
            assert [group["lr"] for group in groups] == pytest.approx([0.3 * wanted, wanted, wanted])
            rates.append(wanted)
        return True

    model.learn(40, callback=watch)
    value = rate if callable(rate) else lambda _: rate
    assert rates == pytest.approx([value(1 - steps / 40) for steps in range(12, 40, 2)])


class Resets(NormalActionNoise):
    """Counts how often it was reset."""

    count = 0

    def reset(self) -> None:
        self.count += 1


@pytest.mark.parametrize("vectorised", [False, True])
def test_noise_restarts_with_each_environments_episodes(vectorised: bool) -> None:
    noise: Any = Resets(np.zeros(2), np.full(2, 0.3))
    given = VectorizedActionNoise(noise, 2) if vectorised else noise
    model = make(toy_envs(2), action_noise=given, gradient_steps=0)
    model.learn(0)
    assert isinstance(model.action_noise, VectorizedActionNoise)
    before = [each.count for each in model.action_noise.noises]
    model.learn(60, reset_num_timesteps=False)
    counts = [each.count - start for each, start in zip(model.action_noise.noises, before, strict=True)]
    assert counts == [1 + 6, 1 + 5], "once with learn(), and with every episode of 5 and of 6 steps"


@pytest.mark.parametrize(("saved_with", "n_envs"), [(2, 3), (3, 1), (2, 2)])
def test_noise_fits_the_environments_that_a_model_is_loaded_into(saved_with: int, n_envs: int, tmp_path: Path) -> None:
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.3))
    make(toy_envs(saved_with), action_noise=noise).learn(12).save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", env=toy_envs(n_envs), device="cpu").learn(24)
    assert getattr(loaded.action_noise, "n_envs", 1) == n_envs


@pytest.mark.parametrize("n_envs", [1, 2])
def test_correlated_noise_moves_actions_together(n_envs: int) -> None:
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.2), theta=0.01, dt=1.0)
    kwargs = {"learning_starts": 0, "exploration_noise": 0.0, "act_mode": "score", "gradient_steps": 0}
    model = make(toy_envs(n_envs, lengths=(100,)), action_noise=noise, **kwargs).learn(100 * n_envs)
    plain = make(toy_envs(n_envs, lengths=(100,)), **kwargs).learn(100 * n_envs)
    added = model.replay_buffer.actions[:100] - plain.replay_buffer.actions[:100]
    assert added.std() > 0.2 and np.abs(np.diff(added, axis=0)).mean() < 0.5 * added.std()
    assert np.abs(model.replay_buffer.actions).max() <= 1


@pytest.mark.parametrize(("policy", "space"), VARIANTS, ids=[name for name, _ in VARIANTS])
def test_a_seed_gives_the_same_logs_actions_and_weights(policy: str, space: spaces.Space) -> None:
    steps = 70 if policy == "MlpPolicy" else 40

    def run() -> tuple[list[dict[str, Any]], np.ndarray, th.Tensor]:
        noise = NormalActionNoise(np.zeros(2), np.full(2, 0.1))
        model = make(toy_envs(2, observation_space=space, terminates=True), policy, seed=11, action_noise=noise)
        rows = logged(model)
        model.learn(steps, log_interval=1)
        return rows, model.replay_buffer.actions, flat_parameters(model.policy)

    (logs, actions, weights), (logs_again, actions_again, weights_again) = run(), run()
    assert len(logs) > 5 and logs == logs_again
    np.testing.assert_array_equal(actions, actions_again)
    assert th.equal(weights, weights_again)


def test_seeding_again_repeats_the_random_steps() -> None:
    model, seen = make(toy_envs(2), learning_starts=100), []
    for seed in (3, 3, 4):
        model.set_random_seed(seed)
        model.replay_buffer.reset()
        model.learn(16)
        seen.append((model.replay_buffer.actions[:8].copy(), model.replay_buffer.observations[:8].copy()))
    for first, second, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)
