import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbdpo import MBDPO
from sb3_mbdpo.minari_data import convert_minari
from sb3_mbdpo.presets import discount_for
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import ACTIONS, IMAGE, MIXED, UNEVEN, VECTOR, ToyEnv, flat_parameters, toy_envs
from tests.recordings import record, recorded

pytestmark = pytest.mark.usefixtures("minari_cache")
DEBUG: dict[str, Any] = {"preset": "debug", "buffer_size": 300, "batch_size": 8, "seed": 0, "device": "cpu"}
POLICIES = [("MlpPolicy", VECTOR), ("CnnPolicy", IMAGE), ("MultiInputPolicy", MIXED), ("MlpPolicy", spaces.Discrete(3))]
PENDULUM = spaces.Box(np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32))
TORQUE = spaces.Box(-2.0, 2.0, (1,), np.float32)


class Rows(KVWriter):
    """Everything that was logged, with the step that it was logged at."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append({"step": step, **key_values})

    def close(self) -> None:
        pass


def logged(model: MBDPO) -> list[dict[str, Any]]:
    writer = Rows()
    model.set_logger(Logger(folder=None, output_formats=[writer]))
    return writer.rows


class Watch(BaseCallback):
    """Counts what it is called for, and stops when told to."""

    def __init__(self, stop_after: int = 10**9):
        super().__init__()
        self.stop_after, self.events = stop_after, []  # type: ignore[var-annotated]

    def _on_training_start(self) -> None:
        self.events.append(("start", self.locals["total_timesteps"]))

    def _on_step(self) -> bool:
        assert self.locals["samples"].actions.shape[1] == 8
        self.events.append(("step", self.num_timesteps))
        return self.num_timesteps < self.stop_after

    def _on_training_end(self) -> None:
        self.events.append(("end", self.num_timesteps))


def record_pendulum(name: str = "test/pendulum-v0", **kwargs: Any) -> Any:
    episodes = recorded((5, 8), PENDULUM, TORQUE, terminates=(False, False))
    return record(name, episodes, PENDULUM, TORQUE, env="Pendulum-v1", **kwargs)


# --- learning ------------------------------------------------------------------------------------------------------


def test_the_prior_keeps_near_the_data_offline_and_goes_its_own_way_online() -> None:
    dataset = record_pendulum()
    observations = np.concatenate([episode.observations[:-1] for episode in dataset.iterate_episodes()])
    recorded_actions = np.concatenate([episode.actions for episode in dataset.iterate_episodes()])
    distances, online = [], []
    for coef in (0.0, 50.0):
        arguments = DEBUG | {"behaviour_coef": coef, "learning_rate": 1e-2, "act_mode": "prior"}
        model = MBDPO.from_minari("test/pendulum-v0", **arguments)
        model.learn_offline("test/pendulum-v0", 150)
        actions, _ = model.predict(observations, deterministic=True)
        distances.append(float(np.abs(actions - recorded_actions).mean()))
        model = MBDPO("MlpPolicy", toy_envs(1), learning_starts=20, warmup_updates=2, **arguments)
        online.append(flat_parameters(model.learn(30).policy))
    # Uniform actions are a mean of 1 away from their middle
    assert distances[1] < 1.1 < 1.5 < distances[0]
    assert th.equal(*online)


@pytest.mark.parametrize(("policy", "space"), POLICIES, ids=str)
def test_models_without_environment_learn_act_and_survive_a_file(
    tmp_path: Path, policy: str, space: spaces.Space
) -> None:
    record("test/toy-v0", observation_space=space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MBDPO.from_minari("test/toy-v0", **DEBUG)
        before = flat_parameters(model.policy).clone()
        assert model.learn_offline("test/toy-v0", 6) is model
    assert type(model.policy).__name__ == policy
    assert model.env is None
    assert (model.num_timesteps, model._n_updates) == (6, 6)
    assert not th.equal(before, flat_parameters(model.policy))
    assert model.policy.episodic
    obs = model.observation_space.sample()
    action, plan = model.predict(obs, deterministic=True)
    assert UNEVEN.contains(action)
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.env is None
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], action)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[1], plan)
    loaded.learn_offline("test/toy-v0", 2, reset_num_timesteps=False)
    assert loaded.num_timesteps == 8


def test_an_update_from_shards_is_the_update_from_the_replay_buffer() -> None:
    model = MBDPO("MlpPolicy", toy_envs(1, lengths=(4,)), learning_starts=10**6, **DEBUG).learn(24)
    data = ShardedDataset(convert_minari(model.to_minari("test/toy-v0")), horizon=model.policy.search_config.horizon)
    assert model.replay_buffer is not None
    data.seed(0)
    samples = data.sample(8)
    # The same windows out of the ring: found by their first observation
    first = model.replay_buffer.observations[:24, 0]
    assert isinstance(samples.observations, th.Tensor)
    rows = [int(np.flatnonzero((first == obs.numpy()).all(-1))[0]) for obs in samples.observations[0]]
    twin = model.replay_buffer._get_samples(np.array(rows))
    for ours, theirs in zip(samples[:5], twin[:5], strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["id", "object", "list", "shards"])
def test_data_comes_in_several_forms(kind: str, tmp_path: Path) -> None:
    dataset = record("test/toy-v0")
    path = convert_minari("test/toy-v0", tmp_path / "shards")
    data = {"id": "test/toy-v0", "object": dataset, "list": [dataset, "test/toy-v0"], "shards": ShardedDataset(path, 9)}
    model = MBDPO.from_minari(data[kind], **DEBUG).learn_offline(data[kind], 3, shards_dir=tmp_path / "shards")
    assert model._n_updates == 3
    assert model.gamma == discount_for(8)
    assert len(list((tmp_path / "shards").iterdir())) == (2 if kind == "list" else 1)


def test_a_seed_gives_the_same_training() -> None:
    record("test/toy-v0")
    weights = []
    for seed in (0, 0, 1):
        model = MBDPO.from_minari("test/toy-v0", **DEBUG | {"seed": seed}).learn_offline("test/toy-v0", 5)
        weights.append(flat_parameters(model.policy))
    assert th.equal(weights[0], weights[1])
    assert not th.equal(weights[0], weights[2])


def linear(remaining: float) -> float:
    return 1e-2 * remaining


@pytest.mark.parametrize("with_env", [False, True])
def test_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path, with_env: bool) -> None:
    record("test/toy-v0")

    def build() -> MBDPO:
        env = ToyEnv(VECTOR, UNEVEN) if with_env else None
        return MBDPO.from_minari("test/toy-v0", env, learning_rate=linear, **DEBUG)

    whole = build().learn_offline("test/toy-v0", 12)
    stopped = build()
    rates = []

    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        rates.append(local["self"].policy.optimizer.param_groups[1]["lr"])
        if local["self"].num_timesteps == 5:
            local["self"].save(tmp_path / "model")
        return bool(local["self"].num_timesteps < 7)

    stopped.learn_offline("test/toy-v0", 12, stop)
    np.testing.assert_allclose(rates, [linear(1 - k / 12) for k in range(7)])
    assert stopped.num_timesteps == 7
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    loaded.learn_offline("test/toy-v0", 12 - loaded.num_timesteps, reset_num_timesteps=False)
    assert loaded.num_timesteps == 12
    assert th.equal(flat_parameters(whole.policy), flat_parameters(loaded.policy))


def test_the_prior_is_held_to_the_data_from_the_moment_it_is_asked_for() -> None:
    record("test/toy-v0")
    model, seen = MBDPO.from_minari("test/toy-v0", **DEBUG), []

    def ask(_: dict[str, Any], __: dict[str, Any]) -> bool:
        seen.append(model.learner.coefficients.behaviour)
        model.behaviour_coef = 2.0 if model.num_timesteps < 3 else 0.5
        return True

    model.learn_offline("test/toy-v0", 5, ask)
    assert seen == [0.0, 2.0, 2.0, 0.5, 0.5]
    # Where it can try, nothing holds it
    assert model.learner.coefficients.behaviour == 0.0
    model.behaviour_coef = -1.0
    with pytest.raises(ValueError, match="behaviour_coef"):
        model.learn_offline("test/toy-v0", 2)


def test_online_learning_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    record("test/toy-v0")
    env = ToyEnv(VECTOR, UNEVEN)
    model = MBDPO.from_minari("test/toy-v0", env, learning_starts=6, warmup_updates=50, **DEBUG)
    model.learn_offline("test/toy-v0", 10)
    assert env.steps == 0
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 0
    model.learn(20)
    # Updates from the seventh step on, and no warm-up: the model has learned before
    assert (model.num_timesteps, model._n_updates) == (20, 10 + 14)
    model.learn_offline("test/toy-v0", 8)
    random_steps: list[int] = []
    sample = model.action_space.sample
    monkeypatch.setattr(model.action_space, "sample", lambda: (random_steps.append(1), sample())[1])
    model.learn(10, reset_num_timesteps=False)
    # Acts for itself from the first step once the steps are counted on
    assert (model.num_timesteps, len(random_steps)) == (18, 0)
    model.learn(10)
    assert (model.num_timesteps, len(random_steps)) == (10, 6)


def test_a_model_without_environment_is_given_one(tmp_path: Path) -> None:
    record("test/toy-v0")
    arguments = DEBUG | {"buffer_size": 20_000, "learning_starts": 5}
    model = MBDPO.from_minari("test/toy-v0", **arguments).learn_offline("test/toy-v0", 3)
    with pytest.raises(AssertionError, match="must set the environment"):
        model.learn(3)
    assert model.replay_buffer.rewards.size < model.buffer_size
    model.save(tmp_path / "model")
    model.set_env(ToyEnv(VECTOR, UNEVEN))
    assert model.replay_buffer.rewards.size == model.buffer_size
    model.learn(10)
    assert (model.num_timesteps, model._n_updates) == (10, 8)
    # What was saved has room, and keeps what it collects whatever environment follows
    loaded = MBDPO.load(tmp_path / "model", env=ToyEnv(VECTOR, UNEVEN), device="cpu").learn(10)
    loaded.set_env(ToyEnv(VECTOR, UNEVEN))
    assert loaded.replay_buffer.size() == 10


# --- callbacks, logs, evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [0, 3])
def test_callbacks_see_gradient_steps_and_can_stop(n_envs: int) -> None:
    record("test/toy-v0")
    env = toy_envs(n_envs, action_space=UNEVEN) if n_envs else None
    model = MBDPO.from_minari("test/toy-v0", env, **DEBUG)
    watch = Watch()
    model.learn_offline("test/toy-v0", 4, watch)
    steps = [("step", k) for k in range(1, 5)]
    assert watch.events == [("start", 4), *steps, ("end", 4)]
    watch = Watch(stop_after=6)
    model.learn_offline("test/toy-v0", 10, [watch], reset_num_timesteps=False)
    assert watch.events == [("start", 14), ("step", 5), ("step", 6), ("end", 6)]
    assert model.env is None or model.env.num_envs == n_envs


def test_callbacks_of_stable_baselines(tmp_path: Path) -> None:
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    evaluation = EvalCallback(Monitor(ToyEnv(VECTOR, UNEVEN)), eval_freq=3, n_eval_episodes=1, verbose=0)
    checkpoints = CheckpointCallback(2, str(tmp_path / "checkpoints"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn_offline("test/toy-v0", 6, [evaluation, checkpoints])
    assert evaluation.last_mean_reward < 0
    names = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert names == [f"rl_model_{k}_steps.zip" for k in (2, 4, 6)]
    assert MBDPO.load(tmp_path / "checkpoints" / names[0], device="cpu")._n_updates == 2


def test_the_progress_bar_counts_gradient_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    record("test/toy-v0")
    bars: list[Any] = []
    start: Callable[[Any], None] = ProgressBarCallback._on_training_start

    def watched(self: Any) -> None:
        start(self)
        bars.append(self.pbar)

    monkeypatch.setattr(ProgressBarCallback, "_on_training_start", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for env in (None, toy_envs(3, action_space=UNEVEN)):
            model = MBDPO.from_minari("test/toy-v0", env, **DEBUG)
            model.learn_offline("test/toy-v0", 4, progress_bar=True)
    assert [(bar.total, bar.n) for bar in bars] == [(4, 4), (4, 4)]


def test_logs() -> None:
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    rows = logged(model)
    model.learn_offline("test/toy-v0", 7, log_interval=3)
    assert [(row["step"], row["train/n_updates"], row["time/total_timesteps"]) for row in rows] == [
        (3, 3, 3),
        (6, 6, 6),
        (7, 7, 7),
    ]
    for name in ("reward", "value", "consistency", "prior", "score", "energy", "termination"):
        assert np.isfinite(rows[0][f"train/{name}_loss"])
    assert {"train/learning_rate", "train/grad_norm", "time/fps"} <= rows[0].keys()


def test_tensorboard_name_and_folders(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", tensorboard_log=str(tmp_path / "runs"), **DEBUG)
    model.learn_offline("test/toy-v0", 2)
    model.learn_offline("test/toy-v0", 2, tb_log_name="other")
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["MBDPO_offline_1", "other_1"]


def test_the_environment_is_recovered() -> None:
    record_pendulum()
    model = MBDPO.from_minari("test/pendulum-v0", **DEBUG)
    assert model.env is not None
    assert model.env.get_attr("spec")[0].id == "Pendulum-v1"
    # By the environment's limit of 200 steps, not by the recorded 5 and 8
    assert model.gamma == discount_for(200) == 0.975
    model.learn_offline("test/pendulum-v0", 2)
    model.learning_starts = 5
    model.learn(10)
    assert MBDPO.from_minari("test/pendulum-v0", gamma=0.9, **DEBUG).gamma == 0.9


def image_env() -> gym.Env:
    return ToyEnv(IMAGE, UNEVEN)


def no_env() -> gym.Env:
    raise ImportError("a simulator that is not installed")


def test_images_are_turned_as_the_recovered_environment_turns_them() -> None:
    spec = gym.envs.registration.EnvSpec("Recorded-v0", "tests.test_offline:image_env")
    dataset = record("test/image-v0", observation_space=IMAGE, env=spec)
    model = MBDPO.from_minari(dataset, **DEBUG)
    assert model.env is not None
    assert model.observation_space.shape == model.env.observation_space.shape == (3, 36, 36)
    model.learn_offline("test/image-v0", 2)
    file = Path(dataset.storage.data_path, "metadata.json")
    file.write_text(file.read_text().replace("image_env", "no_env"))
    with pytest.warns(UserWarning, match="could not be recovered .a simulator that is not installed"):
        model = MBDPO.from_minari("test/image-v0", **DEBUG)
    assert model.env is None
    assert model.observation_space.shape == (3, 36, 36)


def test_an_environment_of_other_spaces_is_not_taken() -> None:
    record("test/toy-v0", env="Pendulum-v1")
    with pytest.warns(UserWarning, match=r"could not be recovered \(The data's action space is Box"):
        model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    assert model.env is None
    with pytest.raises(ValueError, match="The data's observation space is"):
        MBDPO.from_minari("test/toy-v0", ToyEnv(IMAGE), **DEBUG)


def test_arguments_decided_by_the_data_can_be_given() -> None:
    record("test/toy-v0", recorded((400,), terminates=(False,)))
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    assert (model.gamma, model.learning_starts, model.warmup_updates) == (discount_for(400), 2000, 2000)
    assert not model.policy.episodic
    model = MBDPO.from_minari("test/toy-v0", policy="MlpPolicy", learning_starts=7, **DEBUG)
    assert (model.learning_starts, model.warmup_updates) == (7, 0)


# --- what cannot work ----------------------------------------------------------------------------------------------


def test_data_of_other_spaces_is_refused_before_it_is_converted(minari_cache: Path) -> None:
    model = MBDPO("MlpPolicy", toy_envs(), **DEBUG)
    record("test/uneven-v0")
    record("test/wide-v0", observation_space=spaces.Box(-1, 1, (4,)), action_space=ACTIONS)
    for name, message in (("uneven", "The data's action space"), ("wide", "The data's observation space")):
        with pytest.raises(ValueError, match=message):
            model.learn_offline(f"test/{name}-v0", 2)
    assert not (minari_cache / ".sb3_mbdpo_shards").exists()
    assert model._n_updates == 0
    with pytest.raises(ValueError, match="The data's action space"):
        model.learn_offline(ShardedDataset(convert_minari("test/uneven-v0")), 2)


def test_what_else_is_refused() -> None:
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    for arguments in (
        {"gradient_steps": 0},
        {"gradient_steps": 2, "log_interval": 0},
        {"gradient_steps": 2, "eval_freq": 0},
        {"gradient_steps": 2, "n_eval_episodes": 0},
        {"gradient_steps": 2.5},
        {"gradient_steps": "2"},
    ):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            model.learn_offline("test/toy-v0", **arguments)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.learn_offline("test/toy-v0", 2, eval_env=ToyEnv(IMAGE))
    with pytest.raises(ValueError, match="minari download test/none-v0"):
        model.learn_offline("test/none-v0", 2)
    shards = str(convert_minari("test/toy-v0"))
    with pytest.raises(ValueError, match="is a folder of shards: pass ShardedDataset"):
        model.learn_offline(shards, 2)
    with pytest.raises(ValueError, match=r"of the tasks \['walk', 'run'\], this model of a single one"):
        model.learn_offline({"walk": "test/toy-v0", "run": "test/toy-v0"}, 2)
    with pytest.raises(ValueError, match="are for models of several tasks"):
        MBDPO.from_minari("test/toy-v0", observation_dim=5, **DEBUG)
    with pytest.raises(ValueError, match="eval_env by task"):
        model.learn_offline("test/toy-v0", 2, eval_env={"toy": ToyEnv()})
    with pytest.raises(ValueError, match="eval_env=True needs"):
        model.learn_offline("test/toy-v0", 2, eval_env=True)
    assert (model._n_updates, model.env) == (0, None)


def test_a_damaged_shard_is_one_clear_error(tmp_path: Path) -> None:
    record("test/toy-v0")
    path = convert_minari("test/toy-v0", tmp_path)
    file = path / "rows-00000.bin"
    file.write_bytes(file.read_bytes()[:-1])
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    with pytest.raises(ValueError, match=r"rows-00000.bin has .* bytes .*delete its folder and convert again"):
        model.learn_offline("test/toy-v0", 2, shards_dir=tmp_path)


def test_the_environment_that_is_lent_does_nothing() -> None:
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    seen: list[Any] = []

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        env = local["self"].get_env()
        assert isinstance(env, DummyVecEnv)
        with pytest.raises(RuntimeError, match="has no environment"):
            env.reset()
        seen.append(env.observation_space)
        raise KeyError

    with pytest.raises(KeyError):
        model.learn_offline("test/toy-v0", 2, look)
    assert seen == [VECTOR]
    assert model.env is None
