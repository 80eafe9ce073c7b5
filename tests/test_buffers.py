import copy
import doctest
import io
import pickle
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_mbdpo.buffers
from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer, SequenceSamples

ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
# [environment, episode, step within the episode]: no two observations of a run are the same.
TAGS = spaces.Box(-np.inf, np.inf, (3,), np.float32)


@dataclass
class Transition:
    obs: tuple[int, int, int]
    next_obs: tuple[int, int, int]
    action: np.ndarray
    reward: float
    done: bool
    timeout: bool
    last: bool  # no window may go past it


class Recorder:
    """Feeds a buffer from simulated environments and keeps the whole history as plain Python lists."""

    def __init__(self, buffer, seed=0, lengths=(1, 6), breaks=0.0, as_obs=lambda tags: tags.astype(np.float32)):
        self.buffer, self.lengths, self.breaks, self.as_obs = buffer, lengths, breaks, as_obs
        self.rng = np.random.default_rng(seed)
        self.history: list[list[Transition]] = []  # one list of n_envs transitions for each `add`
        self.episode = [0] * buffer.n_envs
        self.step = [0] * buffer.n_envs
        self.length = [self.draw_length() for _ in range(buffer.n_envs)]

    def draw_length(self):
        return int(self.rng.integers(self.lengths[0], self.lengths[1] + 1))

    def restart(self, env):
        self.episode[env] += 1
        self.step[env] = 0
        self.length[env] = self.draw_length()

    def add(self, n=1):
        for _ in range(n):
            now = []
            for env in range(self.buffer.n_envs):
                if self.history and not self.history[-1][env].done and self.rng.random() < self.breaks:
                    self.history[-1][env].last = True
                    self.restart(env)
                done = self.step[env] + 1 == self.length[env]
                now.append(
                    Transition(
                        obs=(env, self.episode[env], self.step[env]),
                        next_obs=(env, self.episode[env], self.step[env] + 1),
                        action=self.rng.uniform(-1, 1, 2).astype(np.float32),
                        reward=float(np.float32(self.rng.normal())),
                        done=done,
                        timeout=done and self.rng.random() < 0.5,
                        last=done,
                    )
                )
                self.step[env] += 1
                if done:
                    self.restart(env)
            self.history.append(now)
            self.buffer.add(
                self.as_obs(np.array([t.obs for t in now])),
                self.as_obs(np.array([t.next_obs for t in now])),
                np.stack([t.action for t in now]),
                np.array([t.reward for t in now]),
                np.array([t.done for t in now]),
                [{"TimeLimit.truncated": t.timeout} for t in now],
            )

    def stored(self):
        first = max(0, len(self.history) - self.buffer.buffer_size)
        return [(k, env) for k in range(first, len(self.history)) for env in range(self.buffer.n_envs)]

    def window(self, k, env):
        """The transitions of the window that opens at the k-th `add`, read off the history one by one."""
        out = []
        while len(out) < self.buffer.horizon and k < len(self.history):
            out.append(self.history[k][env])
            if out[-1].last:
                break
            k += 1
        return out

    def start_of(self):
        return {self.history[k][env].obs: (k, env) for k, env in self.stored()}

    def check(self, samples, tags_of=lambda obs: obs.numpy(), timeouts_terminate=False):
        """Every window equals the reference; returns the starts in the order of the batch."""
        index = self.start_of()
        tags = tags_of(samples.observations).astype(int).tolist()
        actions = samples.actions.tolist()
        rewards, terminations, masks = (x.squeeze(-1).tolist() for x in samples[2:5])
        starts = []
        for b in range(len(masks[0])):
            start = index[tuple(tags[0][b])]
            starts.append(start)
            window = self.window(*start)
            for t in range(self.buffer.horizon):
                valid = t < len(window)
                now = window[min(t, len(window) - 1)]
                assert tuple(tags[t + 1][b]) == now.next_obs
                if valid:
                    assert tuple(tags[t][b]) == now.obs
                assert masks[t][b] == valid
                assert actions[t][b] == [x * valid for x in now.action.tolist()]
                assert rewards[t][b] == now.reward * valid
                terminated = now.done and (timeouts_terminate or not now.timeout)
                assert terminations[t][b] == (terminated and valid)
        return starts


def assert_same(first: SequenceSamples, second: SequenceSamples):
    assert first.task is second.task is None
    for a, b in zip(first[:5], second[:5], strict=True):
        pairs = [(a[key], b[key]) for key in a] if isinstance(a, dict) else [(a, b)]
        for x, y in pairs:
            assert x.dtype == y.dtype and x.shape == y.shape and th.equal(x, y)


def simple(n=0, cls=SequenceReplayBuffer, space=TAGS, size=20, seed=0, **kwargs):
    buffer = cls(size, space, ACTIONS, device="cpu", **kwargs)
    buffer.seed(seed)
    recorder = Recorder(buffer, seed=seed)
    recorder.add(n)
    return buffer, recorder


def add_one(buffer, obs, next_obs, done=False, **info):
    buffer.add(np.array(obs), np.array(next_obs), np.zeros((buffer.n_envs, 2)), np.ones(buffer.n_envs),
               np.broadcast_to(done, buffer.n_envs), [info] * buffer.n_envs)  # fmt: skip


@pytest.mark.parametrize("device_storage", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_random_rings_match_plain_python(seed, device_storage):
    rng = np.random.default_rng(seed)
    horizon, n_envs = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    rows = int(rng.integers(horizon, 25))
    extra = int(rng.integers(0, n_envs))  # a buffer_size that is no multiple of n_envs
    timeouts = bool(rng.random() < 0.8)
    buffer = SequenceReplayBuffer(rows * n_envs + extra, TAGS, ACTIONS, device="cpu", n_envs=n_envs, horizon=horizon,
                                  handle_timeout_termination=timeouts, device_storage=device_storage)  # fmt: skip
    buffer.seed(seed)
    lengths = (1, int(rng.choice([1, 2, 4, 40])))
    recorder = Recorder(buffer, seed=seed, lengths=lengths, breaks=float(rng.choice([0.0, 0.2])))
    # From one row through a part-filled ring to one that has wrapped several times.
    for n in (1, 1, rows // 2, rows - rows // 2 - 1, 1, rows, 3):
        recorder.add(n)
        stored = recorder.stored()
        samples = buffer.sample(64)
        starts = recorder.check(samples, timeouts_terminate=not timeouts)
        assert set(starts) <= set(stored)
        everything = buffer._get_samples(np.arange(len(stored)))
        assert sorted(recorder.check(everything, timeouts_terminate=not timeouts)) == stored
        assert (samples.masks[0] == 1).all() and (samples.masks.diff(dim=0) <= 0).all()


def test_shapes_and_dtypes():
    buffer, _ = simple(9, size=40, n_envs=2, horizon=4)
    samples = buffer.sample(5)
    assert samples.observations.shape == (5, 5, 3)
    assert samples.actions.shape == (4, 5, 2)
    assert samples.rewards.shape == samples.terminations.shape == samples.masks.shape == (4, 5, 1)
    assert all(tensor.dtype == th.float32 for tensor in samples[:5])
    assert isinstance(buffer, ReplayBuffer) and buffer.size() == 9 and buffer.pos == 9 and not buffer.full


def test_starts_are_uniform_over_stored_transitions():
    buffer, recorder = simple(23, size=3 * 10, n_envs=3)
    assert buffer.full
    draws = 30_000
    samples = buffer.sample(draws)
    tags = [tuple(int(x) for x in row) for row in samples.observations[0].numpy()]
    stored = set(recorder.start_of())
    assert len(stored) == 30 and set(tags) == stored
    expected = draws / len(stored)
    chi_square = sum((tags.count(tag) - expected) ** 2 / expected for tag in stored)
    # 29 degrees of freedom: mean 29, standard deviation 7.6. A far smaller value would not be random either.
    assert 8 < chi_square < 60


def test_masked_entries_are_zero_even_next_to_nan():
    buffer, _ = simple(horizon=3, device_storage=False)
    mirrored, _ = simple(horizon=3, device_storage=True)
    for each in (buffer, mirrored):
        each.add(np.zeros((1, 3)), np.ones((1, 3)), np.full((1, 2), np.nan), np.array([np.inf]), np.array([True]), [{}])
        samples = each.sample(4)
        assert (samples.masks[1:] == 0).all()
        for tensor in (samples.actions, samples.rewards, samples.terminations):
            assert (tensor[1:] == 0).all()
        assert (samples.observations[1:] == 1).all()
        assert samples.terminations[0].min() == 1


def test_a_restart_in_the_middle_of_an_episode_ends_windows_there():
    buffer = SequenceReplayBuffer(40, TAGS, ACTIONS, device="cpu", n_envs=2, horizon=2)
    a, b, c = np.array([[0, 0, 0], [1, 0, 0]]), np.array([[0, 0, 1], [1, 0, 1]]), np.array([[0, 0, 2], [1, 0, 2]])
    add_one(buffer, a, b)
    restarted = b.copy()
    restarted[1] = [1, 9, 0]  # only the second environment starts anew
    add_one(buffer, restarted, c)
    assert buffer.window_ends[:2].tolist() == [[False, True], [False, False]]
    add_one(buffer, c, c + 1)
    assert buffer.window_ends[:3].tolist() == [[False, True], [False, False], [False, False]]
    assert not buffer.dones.any()
    assert buffer._get_samples(np.array([0, 1])).masks[1, :, 0].tolist() == [1, 0]


def test_a_break_across_the_ring_edge_is_seen():
    buffer = SequenceReplayBuffer(3, TAGS, ACTIONS, device="cpu", horizon=2)
    for step in range(3):
        add_one(buffer, [[0, 0, step]], [[0, 0, step + 1]])
    add_one(buffer, [[0, 5, 0]], [[0, 5, 1]])
    assert buffer.window_ends[:, 0].tolist() == [False, False, True]
    add_one(buffer, [[0, 5, 1]], [[0, 5, 2]])
    add_one(buffer, [[0, 5, 2]], [[0, 5, 3]])
    assert not buffer.window_ends.any()  # the mark went with the row it was on


def test_mark_boundary():
    buffer = SequenceReplayBuffer(10, TAGS, ACTIONS, device="cpu", n_envs=2, horizon=2)
    buffer.mark_boundary()
    assert not buffer.window_ends.any()
    same = np.zeros((2, 3))
    add_one(buffer, same, same)
    assert not buffer.window_ends.any()
    buffer.mark_boundary()
    add_one(buffer, same, same)
    assert buffer.window_ends.tolist() == [[True, True]] + [[False, False]] * 4
    assert buffer._get_samples(np.array([0, 1])).masks[1].sum() == 0


@pytest.mark.parametrize("truncated", [False, True])
def test_an_episode_that_restarts_where_it_ended_is_still_cut(truncated):
    buffer = SequenceReplayBuffer(10, TAGS, ACTIONS, device="cpu", horizon=2)
    same = np.zeros((1, 3))
    add_one(buffer, same, same, done=True, **{"TimeLimit.truncated": truncated})
    add_one(buffer, same, same)
    samples = buffer._get_samples(np.array([0]))
    assert samples.masks.flatten().tolist() == [1, 0]
    assert samples.terminations.flatten().tolist() == [not truncated, 0]


@pytest.mark.parametrize(
    ("dtype", "value", "other"),
    [
        (np.float32, np.nan, 0.0),
        (np.float64, np.nan, np.inf),
        (np.float32, np.inf, -np.inf),
        (np.float64, 1 / 3, 0.3333),
        (np.uint8, 255, 0),
        (np.int64, 2**40, 2**40 + 1),
    ],
)
def test_continuity_in_every_dtype(dtype, value, other):
    low, high = (-np.inf, np.inf) if np.issubdtype(dtype, np.floating) else (0, np.iinfo(dtype).max)
    buffer = SequenceReplayBuffer(10, spaces.Box(low, high, (2, 2), dtype), ACTIONS, device="cpu", horizon=2)
    same, changed = np.full((1, 2, 2), 1, dtype), np.full((1, 2, 2), 1, dtype)
    same[0, 1, 0] = value
    changed[0, 1, 0] = other
    add_one(buffer, same, same)
    add_one(buffer, same, same)
    assert not buffer.window_ends.any()
    add_one(buffer, changed, same)
    assert buffer.window_ends[:3, 0].tolist() == [False, True, False]


def test_observations_given_in_a_wider_dtype_are_continuous():
    buffer = SequenceReplayBuffer(10, TAGS, ACTIONS, device="cpu", horizon=2)
    third = np.full((1, 3), 1 / 3, np.float64)
    add_one(buffer, third, third)
    add_one(buffer, third.astype(np.float32), third)
    assert not buffer.window_ends.any()


def test_reset_forgets_boundaries_and_rows():
    buffer, recorder = simple(25, device_storage=True)
    buffer.reset()
    assert buffer.size() == 0 and not buffer.window_ends.any()
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    recorder = Recorder(buffer, seed=5)
    recorder.add(4)
    recorder.check(buffer.sample(50))


def test_dict_observations():
    space = spaces.Dict({"tags": TAGS, "mode": spaces.Discrete(9), "image": spaces.Box(0, 255, (1, 4, 4), np.uint8)})

    def as_obs(tags):
        image = np.broadcast_to(tags[:, 2, None, None, None], (len(tags), 1, 4, 4)).astype(np.uint8)
        return {"tags": tags.astype(np.float32), "mode": tags[:, 2] % 9, "image": image}

    for device_storage in (False, True):
        buffer = DictSequenceReplayBuffer(60, space, ACTIONS, device="cpu", n_envs=3, device_storage=device_storage)
        assert isinstance(buffer, DictReplayBuffer)
        recorder = Recorder(buffer, breaks=0.1, as_obs=as_obs)
        recorder.add(33)
        samples = buffer.sample(200)
        recorder.check(samples, tags_of=lambda obs: obs["tags"].numpy())
        observations = samples.observations
        assert observations["mode"].dtype == th.int64 and observations["image"].dtype == th.uint8
        assert observations["image"].shape == (4, 200, 1, 4, 4) and observations["mode"].shape == (4, 200, 1)
        assert th.equal(observations["mode"][..., 0], observations["tags"][..., 2].long() % 9)
        assert (observations["image"] == observations["tags"][..., 2, None, None, None]).all()


def test_one_differing_key_breaks_continuity():
    space = spaces.Dict({"a": TAGS, "b": TAGS})
    buffer = DictSequenceReplayBuffer(10, space, ACTIONS, device="cpu", horizon=2)

    def add(obs_b):
        obs = {"a": np.zeros((1, 3)), "b": np.full((1, 3), obs_b)}
        following = {"a": np.zeros((1, 3)), "b": np.zeros((1, 3))}
        buffer.add(obs, following, np.zeros((1, 2)), np.zeros(1), np.array([False]), [{}])

    for value in (0.0, 0.0, 1.0):
        add(value)
    assert buffer.window_ends[:3, 0].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("space", "dtype", "shape"),
    [
        (spaces.Box(0, 255, (3, 8, 8), np.uint8), th.uint8, (3, 8, 8)),
        (spaces.Box(-1, 1, (3,), np.float64), th.float32, (3,)),
        (spaces.Box(-1, 1, (3,), np.float16), th.float32, (3,)),
        (spaces.Discrete(5), th.int64, (1,)),
        (spaces.MultiDiscrete([3, 4]), th.int64, (2,)),
        (spaces.MultiBinary(4), th.int8, (4,)),
    ],
)
@pytest.mark.parametrize("device_storage", [False, True])
def test_observation_spaces(space, dtype, shape, device_storage):
    space.seed(0)
    buffer = SequenceReplayBuffer(32, space, ACTIONS, device="cpu", n_envs=2, device_storage=device_storage)
    assert buffer.observations.dtype == space.dtype
    obs = np.stack([space.sample(), space.sample()])
    seen = []
    for _ in range(6):
        following = np.stack([space.sample(), space.sample()])
        add_one(buffer, obs, following)
        seen.append(obs)
        obs = following
    samples = buffer._get_samples(np.array([0, 1]))
    assert samples.observations.dtype == dtype and samples.observations.shape == (4, 2, *shape)
    expected = th.as_tensor(np.stack(seen[:4]).reshape(4, 2, *shape)).to(dtype)
    assert th.equal(samples.observations, expected) and (samples.masks == 1).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_actions_are_float32(dtype):
    buffer = SequenceReplayBuffer(9, TAGS, spaces.Box(-1, 1, (2, 2), dtype), device="cpu")
    buffer.add(np.zeros((1, 3)), np.ones((1, 3)), np.full((1, 2, 2), 0.5, dtype), np.ones(1), np.array([False]), [{}])
    actions = buffer.sample(3).actions
    assert actions.dtype == th.float32 and actions.shape == (3, 3, 4) and (actions[0] == 0.5).all()


def test_mirror_equals_host():
    host, recorder = simple(n_envs=4, size=80, device_storage=False)
    mirror = SequenceReplayBuffer(80, TAGS, ACTIONS, device="cpu", n_envs=4, device_storage=True)
    mirror.seed(0)
    other = Recorder(mirror)
    for n in (1, 7, 30, 1, 1):
        recorder.add(n)
        other.add(n)
        assert_same(host.sample(64), mirror.sample(64))
    assert host._device_mirror() is None
    stored = mirror._device_mirror()
    for name, tensor in stored.items():
        assert np.array_equal(tensor.numpy(), getattr(mirror, name))
        # A view of the host's memory would pass this test without any writing.
        assert tensor.data_ptr() != getattr(mirror, name).ctypes.data
    # Samples come from the mirror, not from the arrays.
    stored["rewards"].fill_(7.0)
    samples = mirror.sample(9)
    assert (samples.rewards == 7.0 * samples.masks).all()


def test_mirror_follows_the_device():
    buffer, recorder = simple(12, device_storage=True)
    assert buffer._device_mirror()["actions"].device.type == "cpu"
    buffer.device = th.device("meta")
    assert buffer._device_mirror()["actions"].device.type == "meta"
    recorder.add(15)  # wraps meanwhile
    buffer.device = "cpu"
    recorder.check(buffer.sample(50))


def test_automatic_mirror_only_where_it_fits(monkeypatch):
    buffer, _ = simple(3)
    needed = sum(np.asarray(getattr(buffer, name)).nbytes for name in sb3_mbdpo.buffers._STORED)
    assert buffer._device_mirror() is None
    buffer.device = th.device("cuda")
    for free, fits in [(2 * needed, True), (2 * needed - 2, False)]:
        monkeypatch.setattr(th.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert buffer._wants_mirror() is fits
        buffer.device_storage = False
        assert not buffer._wants_mirror()
        buffer.device_storage = "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device_storage", ["auto", False])
def test_cuda_samples_equal_cpu_samples(device_storage):
    host, _ = simple(30, n_envs=2, device_storage=False)
    cuda = SequenceReplayBuffer(20, TAGS, ACTIONS, device="cuda", n_envs=2, device_storage=device_storage)
    cuda.seed(0)
    Recorder(cuda).add(30)
    assert (cuda._device_mirror() is not None) == (device_storage == "auto")
    samples = cuda.sample(64)
    assert samples.observations.device.type == "cuda"
    assert_same(host.sample(64), SequenceSamples(*(tensor.cpu() for tensor in samples[:5])))


@pytest.mark.parametrize("device_storage", [False, True])
def test_a_saved_buffer_goes_on_with_the_same_draws(tmp_path, device_storage):
    buffer, recorder = simple(14, device_storage=device_storage)
    buffer.sample(10)
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    loaded = load_from_pkl(tmp_path / "buffer.pkl")
    assert loaded._mirror is None
    for _ in range(3):
        assert_same(buffer.sample(32), loaded.sample(32))
    assert (loaded._mirror is not None) == device_storage
    # Both go on alike, over the ring's edge.
    twin = copy.deepcopy(recorder)
    twin.buffer = loaded
    recorder.add(9)
    twin.add(9)
    assert_same(buffer.sample(64), loaded.sample(64))
    twin.check(loaded.sample(64))


def test_the_mirror_is_not_pickled():
    plain, _ = simple(15, size=2000, device_storage=False)
    mirrored, _ = simple(15, size=2000, device_storage=True)
    mirrored.sample(1)
    assert mirrored._mirror is not None
    assert abs(len(pickle.dumps(plain)) - len(pickle.dumps(mirrored))) < 100


def test_seed_and_global_numpy_state():
    buffer, _ = simple(15)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    buffer.seed(7)
    first = buffer.sample(64)
    second = buffer.sample(64)
    assert not th.equal(first.observations, second.observations)
    np.random.seed(4)
    buffer.seed(7)
    assert_same(first, buffer.sample(64))
    np.random.seed(3)
    buffer.seed(None)
    assert not th.equal(first.observations, buffer.sample(64).observations)
    assert np.array_equal(before, np.random.get_state()[1])


class TwoBoxes(gym.Env):
    observation_space = TAGS
    action_space = ACTIONS

    def __init__(self, episode_length=5):
        self.episode_length, self.episode, self.t = episode_length, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([0, self.episode, 0], np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([0, self.episode, self.t], np.float32), 3.0 * self.t, False, self.t == self.episode_length, {}


@pytest.mark.parametrize("device_storage", [False, True])
def test_vec_normalize(device_storage):
    buffer, _ = simple(15, device_storage=device_storage)
    env = VecNormalize(DummyVecEnv([TwoBoxes]), clip_obs=1.0, clip_reward=0.5)
    env.obs_rms.mean = np.array([0.0, 1.0, 2.0])
    env.obs_rms.var = np.array([1.0, 4.0, 9.0])
    env.ret_rms.var = np.array(16.0)
    buffer.seed(1)
    raw = buffer.sample(64)
    buffer.seed(1)
    normalised = buffer.sample(64, env=env)
    assert (buffer._mirror is not None) == device_storage, "built for the raw samples"
    unread, _ = simple(15, device_storage=device_storage)
    assert_same(unread.sample(64, env=env), simple(15)[0].sample(64, env=env))
    assert unread._mirror is None, "normalised samples never read it"
    assert (raw.masks == 0).any()
    expected = np.clip((raw.observations.numpy() - [0, 1, 2]) / np.sqrt(np.array([1, 4, 9]) + 1e-8), -1, 1)
    assert normalised.observations.dtype == normalised.rewards.dtype == th.float32
    assert np.allclose(normalised.observations.numpy(), expected, atol=1e-6)
    assert np.allclose(normalised.rewards.numpy(), np.clip(raw.rewards.numpy() / 4, -0.5, 0.5), atol=1e-6)
    for name in ("actions", "terminations", "masks"):
        assert th.equal(getattr(raw, name), getattr(normalised, name))
    assert np.abs(buffer.observations).max() > 1  # the stored values stay raw


def test_vec_normalize_dict():
    space = spaces.Dict({"tags": TAGS, "image": spaces.Box(0, 255, (1, 2, 2), np.uint8)})

    class Env(TwoBoxes):
        observation_space = space

        def reset(self, *, seed=None, options=None):
            obs, info = super().reset(seed=seed)
            return {"tags": obs, "image": np.zeros((1, 2, 2), np.uint8)}, info

    env = VecNormalize(DummyVecEnv([Env]), norm_obs_keys=["tags"], clip_obs=100.0)
    env.obs_rms["tags"].mean = np.array([5.0, 5.0, 5.0])
    buffer = DictSequenceReplayBuffer(20, space, ACTIONS, device="cpu")
    obs = {"tags": np.ones((1, 3)), "image": np.full((1, 1, 2, 2), 9, np.uint8)}
    buffer.add(obs, obs, np.zeros((1, 2)), np.ones(1), np.array([False]), [{}])
    observations = buffer.sample(3, env=env).observations
    assert observations["image"].dtype == th.uint8 and (observations["image"] == 9).all()
    assert th.allclose(observations["tags"], th.tensor(-4.0)) and observations["tags"].dtype == th.float32


def test_collected_by_an_sb3_algorithm():
    """Two `learn` calls, the second one starting in the middle of an episode, through SB3's own collection loop."""
    model = SAC("MlpPolicy", TwoBoxes(5), replay_buffer_class=SequenceReplayBuffer, replay_buffer_kwargs={"horizon": 4},
                buffer_size=50, learning_starts=1000, device="cpu", policy_kwargs={"net_arch": [4]})  # fmt: skip
    model.learn(8)
    model.learn(7)
    buffer = model.replay_buffer
    assert np.flatnonzero(buffer.window_ends[:, 0]).tolist() == [4, 7, 12]
    assert np.flatnonzero(buffer.dones[:, 0]).tolist() == [4, 12]
    samples = buffer._get_samples(np.arange(buffer.size()))
    lengths = samples.masks.sum(dim=0).flatten().tolist()
    assert lengths == [4, 4, 3, 2, 1, 3, 2, 1, 4, 4, 3, 2, 1, 2, 1]
    assert samples.terminations.sum() == 0  # a time limit is no termination
    assert samples.observations[4, 1].tolist() == samples.observations[4, 2].tolist()
    assert samples.observations[4, 1, 2] == 5  # the terminal observation, not the next episode's first
    file = io.BytesIO()
    model.save_replay_buffer(file)
    file.seek(0)
    model.load_replay_buffer(file)
    assert_same(buffer.sample(16), model.replay_buffer.sample(16))


def test_extend():
    buffer, other = simple()[0], simple()[0]
    _, recorder = simple(6)
    rows = [
        (np.array([t.obs]), np.array([t.next_obs]), t.action[None], np.array([t.reward]), np.array([t.done]), [{}])
        for (t,) in recorder.history
    ]
    buffer.extend(*zip(*rows, strict=True))
    for row in rows:
        other.add(*row)
    assert buffer.size() == 6 and np.array_equal(buffer.window_ends, other.window_ends)
    assert_same(buffer.sample(40), other.sample(40))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"horizon": 0}, ["horizon", "at least 1"]),
        ({"optimize_memory_usage": True}, ["optimize_memory_usage=False"]),
        ({"optimize_memory_usage": True, "handle_timeout_termination": False}, ["optimize_memory_usage=False"]),
        ({"device_storage": "gpu"}, ["device_storage", "auto"]),
        ({"observation_space": spaces.Dict({"a": TAGS})}, ["observation_space", "DictSequenceReplayBuffer"]),
    ],
)
def test_refused_arguments(kwargs, words):
    arguments = {"buffer_size": 100, "observation_space": TAGS, "action_space": ACTIONS, "device": "cpu"} | kwargs
    with pytest.raises(ValueError) as error:
        SequenceReplayBuffer(**arguments)
    assert all(word in str(error.value) for word in words)


def test_refused_without_dict_space_and_when_empty():
    with pytest.raises(ValueError, match=r"observation_space.*SequenceReplayBuffer"):
        DictSequenceReplayBuffer(10, TAGS, ACTIONS)
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        DictSequenceReplayBuffer(10, spaces.Dict({"a": TAGS}), ACTIONS, optimize_memory_usage=True)
    for device_storage in (False, True):
        with pytest.raises(ValueError, match="empty"):
            simple(device_storage=device_storage)[0].sample(4)


def test_the_smallest_allowed_buffer():
    buffer, recorder = simple(7, size=3, horizon=3)
    recorder.check(buffer.sample(60))
    one, recorder = simple(4, size=1, horizon=1)
    recorder.check(one.sample(20))


def test_a_buffer_without_room_for_a_window_is_not_sampled_from():
    buffer, _ = simple(4, size=11, n_envs=4, horizon=3)
    assert buffer.size() == 2
    for device_storage in (False, True):
        buffer.device_storage = device_storage
        with pytest.raises(ValueError, match=r"has 2 row\(s\) .* horizon=3: pass buffer_size >= 12"):
            buffer.sample(1)


def test_docstring_example():
    assert doctest.testmod(sb3_mbdpo.buffers).failed == 0
