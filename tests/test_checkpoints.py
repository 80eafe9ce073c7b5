import json
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from safetensors.torch import load_file
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_mbdpo import MBDPO, MlpPolicy, checkpoints, describe_tasks, make_multitask_env
from sb3_mbdpo.checkpoint_format import argument_names
from sb3_mbdpo.checkpoint_weights import read_header, write_tensors
from tests.checkpoint_fakes import KINDS, QUICK, acts_alike, make_env, observations, same_weights, trained
from tests.fakes import LEANING, LEANING_ENVS, ToyEnv, leaning_env, toy_envs


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_the_saved_one_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save_pretrained(tmp_path / "model")
    loaded = MBDPO.from_pretrained(tmp_path / "model", env=make_env(kind), device="cpu")
    assert same_weights(model, loaded) and acts_alike(model, loaded)
    assert loaded.num_timesteps == model.num_timesteps and loaded.policy.episodic == model.policy.episodic
    for name in ("gamma", "train_freq", "replay_buffer_class", "tau", "batch_size", "policy_class", "tasks"):
        assert getattr(loaded, name) == getattr(model, name), name
    alone = MBDPO.from_pretrained(tmp_path / "model", device="cpu")
    assert same_weights(model, alone) and alone.observation_space == model.observation_space
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"config.json", "model.safetensors", "README.md"}


def test_running_statistics_are_part_of_the_weights(tmp_path: Path) -> None:
    model = trained("vector")
    model.policy.world_model.energy_mean.fill_(0.3)
    model.policy.world_model.prior_scale.fill_(2.5)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["world_model.energy_mean"].item() == pytest.approx(0.3)
    world_model = MBDPO.from_pretrained(tmp_path, device="cpu").policy.world_model
    assert world_model.energy_mean.item() == pytest.approx(0.3) and world_model.prior_scale.item() == 2.5


@pytest.mark.parametrize("kind", ["vector", "tasks", "normalized"])
@pytest.mark.parametrize("seed", [0, None])
def test_with_optimizers_learning_goes_on_as_after_save_and_load(kind: str, seed: int | None, tmp_path: Path) -> None:
    noise = NormalActionNoise(np.zeros(3 if kind == "tasks" else 2), np.full(3 if kind == "tasks" else 2, 0.1))
    model = trained(kind, seed=seed, action_noise=noise, learning_rate=LinearSchedule(1e-3, 1e-4, 0.5))
    model.save_pretrained(tmp_path / "model", include_optimizer=True)
    model.save(tmp_path / "model.zip")

    def goes_on(load: Any) -> MBDPO:
        np.random.seed(5)
        env = make_env(kind)
        if kind == "normalized" and load is not MBDPO.from_pretrained:
            env = VecNormalize(toy_envs(), clip_obs=2.0)
            env.obs_rms, env.ret_rms = model.get_vec_normalize_env().obs_rms, model.get_vec_normalize_env().ret_rms
            env.obs_rms, env.ret_rms = env.obs_rms.copy(), env.ret_rms.copy()
        path = tmp_path / ("model" if load == MBDPO.from_pretrained else "model.zip")
        loaded = load(path, env=env, device="cpu")
        env = loaded.get_env()
        env.seed(3)
        if seed is None:
            # Without a seed each draws for itself
            np.random.seed(5)
            loaded.replay_buffer.seed(1)
        return loaded.learn(24, reset_num_timesteps=False)

    as_sb3, ours = goes_on(MBDPO.load), goes_on(MBDPO.from_pretrained)
    assert as_sb3._n_updates == ours._n_updates > model._n_updates
    assert same_weights(as_sb3, ours) and not same_weights(model, ours)


def test_the_generator_of_action_noise_comes_along(tmp_path: Path) -> None:
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.1))
    trained("vector", action_noise=noise).save_pretrained(tmp_path, include_optimizer=True)
    drawn = np.random.rand(3).tolist()
    MBDPO.from_pretrained(tmp_path, device="cpu")
    assert np.random.rand(3).tolist() == drawn
    tensors, header = load_file(tmp_path / "optimizer.safetensors"), read_header(tmp_path / "optimizer.safetensors")[1]
    state = json.loads(header["state"])
    name, keys, *rest = state["noise"]
    for wrong in ([name, keys[1:], *rest], ["PCG64", keys, *rest], [name, keys, 10**6, *rest[1:]], [name, [-1]], 3):
        changed = header | {"state": json.dumps(state | {"noise": wrong})}
        write_tensors(tmp_path / "optimizer.safetensors", tensors, changed)
        with pytest.raises(ValueError, match=r"optimizer\.safetensors cannot be read"):
            MBDPO.from_pretrained(tmp_path, device="cpu")
    # Files of before have none
    del state["noise"]
    write_tensors(tmp_path / "optimizer.safetensors", tensors, header | {"state": json.dumps(state)})
    MBDPO.from_pretrained(tmp_path, device="cpu")


def test_the_encoder_learns_at_the_rate_that_is_given(tmp_path: Path) -> None:
    model = trained("vector")
    model.save_pretrained(tmp_path / "model", include_optimizer=True)
    model.save(tmp_path / "model.zip")
    for load, name in ((MBDPO.from_pretrained, "model"), (MBDPO.load, "model.zip")):
        for given, scale in (({}, 0.3), ({"encoder_lr_scale": 1.0}, 1.0)):
            loaded = load(tmp_path / name, env=ToyEnv(), device="cpu", **given)
            loaded.learn(1, reset_num_timesteps=False)
            groups = loaded.policy.optimizer.param_groups
            assert groups[0]["lr"] == pytest.approx(scale * groups[1]["lr"]) and groups[1]["lr_scale"] == 1.0


def test_normalization_comes_along(tmp_path: Path) -> None:
    model = trained("normalized")
    statistics = model.get_vec_normalize_env()
    model.save_pretrained(tmp_path / "model")
    loaded = MBDPO.from_pretrained(tmp_path / "model", env=ToyEnv(), device="cpu")
    normalized = loaded.get_vec_normalize_env()
    assert (normalized.obs_rms.mean == statistics.obs_rms.mean).all() and normalized.obs_rms.count == 16 + 1 + 1e-4
    assert normalized.clip_obs == 2.0 and normalized.ret_rms.var == statistics.ret_rms.var
    given = VecNormalize(toy_envs(), clip_obs=7.0)
    MBDPO.from_pretrained(tmp_path / "model", env=given, device="cpu")
    assert given.clip_obs == 7.0 and (given.obs_rms.var == statistics.obs_rms.var).all()
    # Without an environment they are kept for the next time it is saved
    MBDPO.from_pretrained(tmp_path / "model", device="cpu").save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "normalization.safetensors") for name in ("model", "again"))
    assert all((first[name] == second[name]).all() for name in first) and first.keys() == second.keys()


def same_statistics(one: VecNormalize | None, two: VecNormalize | None) -> bool:
    assert one is not None and two is not None
    return bool((one.obs_rms.mean == two.obs_rms.mean).all() and one.ret_rms.var == two.ret_rms.var)  # type: ignore


def test_a_zip_knows_its_statistics_too(tmp_path: Path) -> None:
    model = trained("normalized")
    model.save(tmp_path / "model.zip")
    MBDPO.load(tmp_path / "model.zip", device="cpu").save_pretrained(tmp_path / "model")
    folder = MBDPO.from_pretrained(tmp_path / "model", env=ToyEnv(), device="cpu")
    assert same_statistics(folder.get_vec_normalize_env(), model.get_vec_normalize_env())
    with pytest.warns(UserWarning, match="wrapped in one with the model's statistics"):
        loaded = MBDPO.load(tmp_path / "model.zip", env=ToyEnv(), device="cpu")
    assert same_statistics(loaded.get_vec_normalize_env(), model.get_vec_normalize_env())
    own = VecNormalize(toy_envs())
    assert MBDPO.load(tmp_path / "model.zip", env=own, device="cpu").get_vec_normalize_env() is own
    assert own.obs_rms.count < 1


def test_an_environment_that_comes_later_is_normalised_too(tmp_path: Path) -> None:
    model = trained("normalized")
    model.save_pretrained(tmp_path / "model")
    for env in (None, ToyEnv()):
        loaded = MBDPO.from_pretrained(tmp_path / "model", env=env, device="cpu")
        with pytest.warns(UserWarning, match="wrapped in one with the model's statistics"):
            loaded.set_env(ToyEnv())
        assert same_statistics(loaded.get_vec_normalize_env(), model.get_vec_normalize_env())
        loaded.learn(8, reset_num_timesteps=False)
        assert not same_statistics(loaded.get_vec_normalize_env(), model.get_vec_normalize_env())
    own = VecNormalize(toy_envs(), clip_obs=3.0)
    before = loaded.env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="pass one with the model's spaces"):
            loaded.set_env(ToyEnv(spaces.Box(-1, 1, (9,), np.float32)))
        assert loaded.env is before
    loaded.set_env(own)
    assert loaded.get_vec_normalize_env() is own and own.obs_rms.count < 1  # type: ignore[union-attr]


def test_every_kind_of_argument_survives(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "learning_rate": LinearSchedule(1e-3, 1e-4, 0.5),
        "train_freq": (1, "episode"),
        "gradient_steps": 2,
        "max_grad_norm": float("inf"),
        "action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.2), theta=0.3),
        "warm_denoising_steps": 1,
        "policy_kwargs": {
            "activation_fn": nn.Tanh,
            "net_arch": {"encoder": [16], "heads": [24, 16]},
            "optimizer_class": th.optim.AdamW,
            "optimizer_kwargs": {"betas": (0.8, 0.99)},
        },
    }
    model = MBDPO("MlpPolicy", ToyEnv(), **(QUICK | arguments))
    model.save_pretrained(tmp_path)
    loaded = MBDPO.from_pretrained(tmp_path, device="cpu")
    for name in argument_names(MBDPO):
        if name not in ("learning_rate", "action_noise", "stats_window_size"):
            assert getattr(loaded, name) == getattr(model, name), name
    assert [loaded.lr_schedule(x) for x in (1, 0.7, 0)] == [model.lr_schedule(x) for x in (1, 0.7, 0)]
    assert repr(loaded.action_noise) == repr(model.action_noise) and loaded.action_noise._theta == 0.3
    assert type(loaded.policy.optimizer) is th.optim.AdamW
    assert loaded.policy.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)


def test_a_schedule_of_ones_own_is_stored_as_its_present_value_and_said(tmp_path: Path) -> None:
    model = MBDPO("MlpPolicy", ToyEnv(), **(QUICK | {"learning_rate": lambda left: 0.01 * left}))
    with pytest.warns(UserWarning, match="its present value"):
        model.save_pretrained(tmp_path)
    assert MBDPO.from_pretrained(tmp_path, device="cpu").learning_rate == 0.01


class OwnExtractor(BaseFeaturesExtractor):
    """A features extractor of the user's own."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space, 4)
        self.net = nn.Linear(3, 4)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.net(obs)


class OwnPolicy(MlpPolicy):
    """A policy of the user's own."""


def test_own_classes_are_refused_until_they_are_passed(tmp_path: Path) -> None:
    model = MBDPO(OwnPolicy, ToyEnv(), policy_kwargs={"features_extractor_class": OwnExtractor}, **QUICK)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"OwnExtractor.*custom_objects"):
        MBDPO.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"policy is 'OwnPolicy'.*custom_objects"):
        MBDPO.from_pretrained(tmp_path, device="cpu", custom_objects={"OwnExtractor": OwnExtractor})
    own = {"OwnExtractor": OwnExtractor, "OwnPolicy": OwnPolicy}
    loaded = MBDPO.from_pretrained(tmp_path, device="cpu", custom_objects=own)
    assert acts_alike(model, loaded) and type(loaded.policy) is OwnPolicy


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    model = trained("vector", steps=1)
    model.policy_kwargs = {"optimizer_kwargs": {"hook": print}}
    with pytest.raises(ValueError, match=r"optimizer_kwargs.*cannot be written"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        trained("vector", steps=1).save_pretrained(tmp_path / "file")


# --- other arguments --------------------------------------------------------------------------------------------------


def test_presets_and_budgets_can_be_changed_sizes_cannot(tmp_path: Path) -> None:
    model = trained("vector", steps=1)
    model.save_pretrained(tmp_path)
    wide = MBDPO.from_pretrained(tmp_path, device="cpu", preset="cpu", n_samples=48)
    assert (wide.n_samples, wide.denoising_steps, wide.tau) == (48, 5, 0.05)
    assert (wide.model_size, wide.horizon) == (model.model_size, model.horizon) and same_weights(model, wide)
    assert wide.predict(observations(wide), deterministic=True)[0].shape == (3, 2)
    assert MBDPO.from_pretrained(tmp_path, device="cpu", model_size=0.02).model_size == 0.02
    for name, value in {"model_size": 5, "horizon": 4, "policy_kwargs": {"latent_dim": 32}}.items():
        with pytest.raises(ValueError, match=f"{name} is what the weights were made for"):
            MBDPO.from_pretrained(tmp_path, device="cpu", **{name: value})
    with pytest.raises(ValueError, match="score_coef=0"):
        MBDPO.from_pretrained(tmp_path, device="cpu", score_coef=0)
    with pytest.raises(ValueError, match=r"no arguments \['n_sample'\]"):
        MBDPO.from_pretrained(tmp_path, device="cpu", n_sample=3)


def test_the_way_it_acts_at_present_is_stored_what_belongs_to_a_machine_is_not(tmp_path: Path) -> None:
    model = trained("vector", steps=1)
    model.policy.act_mode, model.compile, model.tensorboard_log = "prior", True, str(tmp_path / "logs")
    model.save_pretrained(tmp_path / "model")
    loaded = MBDPO.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.policy.act_mode == "prior" and not loaded.compile and loaded.tensorboard_log is None
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_a_model_without_environment_takes_no_room_for_replay_until_it_gets_one(tmp_path: Path) -> None:
    model = MBDPO("MlpPolicy", ToyEnv(), **(QUICK | {"buffer_size": 50_000}))
    model.save_pretrained(tmp_path)
    loaded = MBDPO.from_pretrained(tmp_path, device="cpu")
    assert loaded.replay_buffer.buffer_size == 1000 and loaded.buffer_size == 50_000
    loaded.set_env(ToyEnv())
    assert loaded.replay_buffer.buffer_size == 50_000
    loaded.learn(12)
    assert loaded.replay_buffer.size() == 12


def test_a_wrong_environment_is_described(tmp_path: Path) -> None:
    trained("vector", steps=1).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"observation space: the model's is Box\(-1.0, 1.0, \(3,\).*Discrete\(4\)"):
        MBDPO.from_pretrained(tmp_path / "one", env=make_env("discrete"))
    with pytest.raises(ValueError, match="action space"):
        MBDPO.from_pretrained(tmp_path / "one", env=make_env("uneven"))
    trained("tasks", steps=1).save_pretrained(tmp_path / "many")
    with pytest.raises(ValueError, match=r"up, down, wide.*task="):
        MBDPO.from_pretrained(tmp_path / "many", env=ToyEnv())


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    trained("vector", steps=1, seed=None).save_pretrained(tmp_path)
    before = th.random.get_rng_state(), np.random.get_state()[1].copy()
    MBDPO.from_pretrained(tmp_path, device="cpu")
    assert (th.random.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()


# --- going on from a checkpoint ---------------------------------------------------------------------------------------


def test_fine_tuning_on_a_task_that_is_known_and_on_a_new_one(tmp_path: Path) -> None:
    model = trained("tasks")
    model.save_pretrained(tmp_path)
    known = MBDPO.from_hub(tmp_path, env=LEANING_ENVS["down"], task="down", device="cpu")
    assert known.tasks == model.tasks and known.learning_starts == LEANING["down"].episode_length
    known.learn(12)
    assert not same_weights(known, model) and known.replay_buffer.env_tasks.tolist() == [1]
    new = MBDPO.from_hub(tmp_path, env=LEANING_ENVS["up"](), task="sideways", like="down", device="cpu")
    rows = new.policy.world_model.task_embedding.weight
    assert new.tasks.names == ("up", "down", "wide", "sideways") and (rows[3] == rows[1]).all()
    new.learn(12)
    new.save_pretrained(tmp_path / "new")
    loaded = MBDPO.from_hub(tmp_path / "new", device="cpu")
    assert loaded.tasks.names == new.tasks.names and same_weights(new, loaded)
    whole = MBDPO.from_hub(tmp_path, env=make_multitask_env(LEANING, LEANING_ENVS), device="cpu")
    assert whole.n_envs == 3


def test_fine_tuning_of_a_single_task_acts_from_the_start(tmp_path: Path) -> None:
    model = trained("vector")
    model.save_pretrained(tmp_path)
    assert not MBDPO.from_pretrained(tmp_path, env=ToyEnv(), device="cpu")._acts_from_start
    loaded = MBDPO.from_hub(tmp_path, env=lambda: ToyEnv(), device="cpu")
    assert loaded._acts_from_start
    loaded.learn(4)


def test_fine_tuning_in_an_environment_that_comes_later_acts_from_the_start(tmp_path: Path) -> None:
    trained("vector").save_pretrained(tmp_path / "one")
    loaded = MBDPO.from_hub(tmp_path / "one", device="cpu")
    loaded.set_env(TimeLimit(ToyEnv(), 5))
    assert loaded._acts_from_start and loaded.learning_starts == 5
    before = loaded._n_updates
    loaded.learn(5)
    assert loaded._plans is not None and loaded._n_updates == before, "acts by plans, waits for an episode"
    # A later environment changes nothing of it
    loaded.set_env(TimeLimit(ToyEnv(), 7))
    assert loaded.learning_starts == 5
    given = MBDPO.from_hub(tmp_path / "one", device="cpu", learning_starts=8)
    given.set_env(TimeLimit(ToyEnv(), 5))
    assert given._acts_from_start and given.learning_starts == 8
    by_hand = MBDPO.from_hub(tmp_path / "one", device="cpu")
    by_hand.learning_starts = 3
    by_hand.set_env(TimeLimit(ToyEnv(), 5))
    assert by_hand.learning_starts == 3
    trained("tasks").save_pretrained(tmp_path / "many")
    added = MBDPO.from_hub(tmp_path / "many", device="cpu")
    stored = added.learning_starts
    added.add_task(LEANING_ENVS["up"], name="new", like="up", learning_starts=stored)
    assert added.learning_starts == stored
    untrained = MBDPO("MlpPolicy", ToyEnv(), **QUICK)
    untrained.save_pretrained(tmp_path / "none")
    assert not MBDPO.from_hub(tmp_path / "none", device="cpu")._acts_from_start


def test_a_given_learning_starts_is_not_replaced_by_an_episode(tmp_path: Path) -> None:
    trained("tasks").save_pretrained(tmp_path / "many")
    trained("vector").save_pretrained(tmp_path / "one")
    given = {"device": "cpu", "learning_starts": 77}
    up = LEANING_ENVS["up"]
    assert MBDPO.from_hub(tmp_path / "one", ToyEnv(), **given).learning_starts == 77
    assert MBDPO.from_hub(tmp_path / "many", up, "up", **given).learning_starts == 77
    assert MBDPO.from_hub(tmp_path / "many", up, "new", like="nearest", **given).learning_starts == 77
    assert MBDPO.from_hub(tmp_path / "many", up, "up", **given | {"learning_starts": None}).learning_starts == 6


def test_mistakes_with_tasks_are_named(tmp_path: Path) -> None:
    trained("tasks", steps=1).save_pretrained(tmp_path / "many")
    trained("vector", steps=1).save_pretrained(tmp_path / "one")
    up = LEANING_ENVS["up"]
    with pytest.raises(ValueError, match=r"no task 'upp'.*up, down, wide"):
        MBDPO.from_hub(tmp_path / "many", env=up(), task="upp", device="cpu")
    with pytest.raises(ValueError, match="leave out like"):
        MBDPO.from_hub(tmp_path / "many", env=up(), task="up", like="down", device="cpu")
    with pytest.raises(ValueError, match="pass its name as task"):
        MBDPO.from_hub(tmp_path / "many", env=up(), like="down", device="cpu")
    with pytest.raises(ValueError, match="no environment id"):
        MBDPO.from_hub(tmp_path / "many", task="up", device="cpu")
    with pytest.raises(ValueError, match="not the task's environment"):
        MBDPO.from_hub(tmp_path / "many", env=up(), task="wide", device="cpu")
    with pytest.raises(ValueError, match="one environment"):
        MBDPO.from_hub(tmp_path / "many", env=leaning_env(), task="wide", device="cpu")
    with pytest.raises(ValueError, match="single task"):
        MBDPO.from_hub(tmp_path / "one", env=ToyEnv(), task="up", device="cpu")


def test_modules_named_by_a_task_are_not_imported(tmp_path: Path) -> None:
    trained("tasks", steps=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tasks"]["tasks"][0]["env_id"] = "antigravity:Pendulum-v1"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MBDPO.from_pretrained(tmp_path, device="cpu").tasks["up"].env_id == "Pendulum-v1"


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_a_folder_says_of_itself(tmp_path: Path) -> None:
    model = MBDPO("MlpPolicy", "CheckpointPendulum-v0", **QUICK)
    model.save_pretrained(
        tmp_path, command="python train.py --seed 0", datasets=["me/pendulum-v0"], replay_dataset="me/replay-v0"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1 and config["env"] == {"id": "CheckpointPendulum-v0", "action_repeat": 1}
    assert config["replay_dataset"] == "me/replay-v0" and config["versions"]["torch"] == th.__version__
    training = yaml.safe_load((tmp_path / "training.yml").read_text())
    assert training["command"] == "python train.py --seed 0" and training["datasets"] == ["me/pendulum-v0"]
    loaded = MBDPO.from_pretrained(tmp_path, device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["env"] == config["env"] and again["datasets"] == config["datasets"]


def test_several_tasks_have_no_environment_of_the_first_one(tmp_path: Path) -> None:
    tasks = describe_tasks({"pendulum": "CheckpointPendulum-v0", "car": "MountainCarContinuous-v0"})
    model = MBDPO("MultiInputPolicy", make_multitask_env(tasks), **QUICK)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["env"] is None and "env" not in yaml.safe_load((tmp_path / "training.yml").read_text())
    loaded = MBDPO.from_pretrained(tmp_path, device="cpu")
    assert loaded.tasks == model.tasks
    # Folders of before named the first one
    config["env"] = {"id": "CheckpointPendulum-v0", "action_repeat": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    MBDPO.from_pretrained(tmp_path, make_multitask_env(tasks), device="cpu").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["env"] is None


def test_a_newer_checkpoint_takes_the_whole_place_of_an_older_one(tmp_path: Path) -> None:
    model = trained("normalized", steps=1)
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, include_optimizer=True)
    assert {"optimizer.safetensors", "normalization.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    trained("vector").save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "training.yml", "notes.txt"}
    card = (tmp_path / "README.md").read_text().splitlines()
    (tmp_path / "README.md").write_text("my own card")
    trained("vector").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own card" and card[-1].startswith("<!--")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond a limit, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    model = trained("vector")
    model.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    model.learn(16)
    with small_files(20_000), pytest.raises(OSError, match=r"could not be saved.*unchanged"):
        model.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == before
    with small_files(20_000), pytest.raises(OSError, match="could not be saved"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_process_that_is_killed_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    model = trained("vector")
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.learn(16)
    child = os.fork()
    if child == 0:
        # Killed when the weights of the new one are written, before they take their place
        checkpoints.training_record = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        model.save_pretrained(tmp_path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert not same_weights(MBDPO.from_pretrained(tmp_path, device="cpu"), model)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    model = trained("vector")
    model.save_pretrained(tmp_path / "a", include_optimizer=True)
    model.learn(16)
    model.save_pretrained(tmp_path / "b", include_optimizer=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(ValueError, match=f"{name} and config.json do not belong together"):
            MBDPO.from_pretrained(tmp_path / "a", device="cpu")
        (tmp_path / "a" / name).write_bytes(whole)
    MBDPO.from_pretrained(tmp_path / "a", device="cpu")


@pytest.mark.parametrize("name", ["normalization.safetensors", "optimizer.safetensors"])
def test_a_file_that_belongs_to_a_checkpoint_is_missed(name: str, tmp_path: Path) -> None:
    model = trained("normalized")
    model.save_pretrained(tmp_path, include_optimizer=True)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"holds a config.json but no {name}, which belongs to the checkpoint"):
        MBDPO.from_pretrained(tmp_path, device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["files"] == ["optimizer.safetensors", "normalization.safetensors"]
    # As its advice says, or as in folders of before
    for files in ([other for other in config["files"] if other != name], None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"files": files}))
        assert same_weights(model, MBDPO.from_pretrained(tmp_path, device="cpu"))
    del config["files"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    MBDPO.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"files": ["model.pkl"]}))
    with pytest.raises(ValueError, match=r'"files" in config\.json may list'):
        MBDPO.from_pretrained(tmp_path, device="cpu")


WEIRD = (None, -1, 10**18, 1e300, "os.system", [], {}, True, {"$custom": "os.system"}, [[1]])


def every_place(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from every_place(value, (*path, key))


@pytest.mark.parametrize("kind", ["vector", "tasks"])
def test_whatever_stands_in_a_config_a_model_is_built_or_one_sentence_said(kind: str, tmp_path: Path) -> None:
    trained(kind, steps=1).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    refused = 0
    for number, place in enumerate(every_place(json.loads(text))):
        changed = json.loads(text)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = WEIRD[number % len(WEIRD)]
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            MBDPO.from_pretrained(tmp_path, device="cpu")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error), (place, error)
    assert refused > 60


def test_misspelt_and_idle_arguments_are_refused_before_any_work(tmp_path: Path) -> None:
    model = trained("vector", steps=1)
    for wrong, error, words in (
        ({"includ_optimizer": True}, TypeError, "no argument includ_optimizer"),
        ({"commit_message": "one"}, TypeError, "commit_message of save_pretrained goes with push_to_hub=True"),
        ({"push_to_hub": True, "token": "x", "n_eval_episodes": 2}, ValueError, "needs repo_id"),
    ):
        with pytest.raises(error, match=words):
            model.save_pretrained(tmp_path / "model", **wrong)
    assert not (tmp_path / "model").exists()


def test_steps_counted_offline_are_still_counted(tmp_path: Path) -> None:
    model = trained("vector", steps=1)
    model._counts_offline_steps = True
    model.save_pretrained(tmp_path, include_optimizer=True)
    assert MBDPO.from_pretrained(tmp_path, device="cpu")._counts_offline_steps
    config = json.loads((tmp_path / "config.json").read_text())
    # Checkpoints from before it was written down
    del config["state"]["counts_offline_steps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not MBDPO.from_pretrained(tmp_path, device="cpu")._counts_offline_steps
