"""Released files in our format: what they compute stays what the released implementation computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from safetensors.torch import load_file

from sb3_mbdpo import MBDPO, load_released_checkpoint
from sb3_mbdpo.release_conversion import convert_released
from sb3_mbdpo.search import SearchNoise
from sb3_mbdpo.task_names import MT30
from tests.fakes import ToyEnv
from tests.test_released_checkpoints import older_layout, weights_of, without

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = ("single", "episodic", "multitask", "score", "pixels")
READ: dict[str, Any] = {"simnorm_dim": 8, "vmin": -10.0, "vmax": 10.0}


def converted(case: str, folder: Path) -> MBDPO:
    """A released case, written in our format and loaded from it."""
    config = json.loads((GOLDEN / f"{case}.json").read_text())
    names, lengths = (["one", "two", "three"], config["episode_lengths"]) if case == "multitask" else (None, None)
    convert_released(GOLDEN / f"{case}.pt", names, episode_length=lengths, **READ).save_pretrained(folder)
    # The released file does not hold its search
    searched = {
        "denoising_steps": config["diffusion_steps"],
        "n_samples": config["diffusion_num_samples"],
        "n_elites": config["diffusion_num_elites"],
        "n_prior_trajectories": config["diffusion_num_pi_trajs"],
        "temperature": config["diffusion_temperature"],
        "beta_start": config["diffusion_beta0"],
        "beta_end": config["diffusion_betaT"],
        "energy_coef": config["contrastive_eta"],
        "search_dtype": "float32",
        "act_mode": "score" if config["score_loss_included"] else "search",
    }
    discount = {} if case == "multitask" else {"gamma": config["discount_single"]}
    return MBDPO.from_pretrained(folder, device="cpu", **searched, **discount)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", ["first", "warm"])
def test_a_converted_case_acts_as_before(case: str, start: str, tmp_path: Path) -> None:
    model = converted(case, tmp_path)
    world, data = model.policy.world_model, load_file(GOLDEN / f"{case}.safetensors")
    released = load_released_checkpoint(GOLDEN / f"{case}.pt", **READ).state_dict()
    assert world.state_dict().keys() == released.keys()
    assert all((world.state_dict()[name] == value).all() for name, value in released.items())
    # Running statistics are not in released files; the stored plans were made with these
    world.energy_mean.fill_(0.3)
    world.energy_std.fill_(1.7)
    config = model.policy.search_config
    prior = th.zeros(config.horizon, config.n_prior_trajectories, world.action_dim)
    if "search_noise" in data:
        noise = SearchNoise(data["search_noise"][:, config.n_prior_trajectories :], prior, th.tensor([0, 1]))
        model.policy._shared_noise = lambda: noise  # type: ignore[method-assign]
    obs: Any = data["obs"][0][:1]
    if case == "multitask":
        obs = {"observation": obs, "task": data["task"][:1]}
    previous, restart = data["search_previous_plan"][None], th.tensor([start == "first"])
    plan = model.policy.plan(obs, previous, restart, deterministic=True).plan
    stored = data[f"search_plan_{start}"].reshape(plan.shape)
    assert (plan - stored).abs().max() < (1e-4 if case == "pixels" else 1e-5)


@pytest.mark.parametrize("case", ["single", "multitask"])
def test_files_of_tdmpc2_act_without_energy_and_learn(case: str, tmp_path: Path) -> None:
    th.save(older_layout(weights_of(case)), tmp_path / "old.pt")
    names, dims = None, None
    if case == "multitask":
        names = ["a", "b", "c"]
        dims = tuple(int(count) for count in weights_of(case)["_action_masks"].sum(-1))
    convert_released(tmp_path / "old.pt", names, dims, **READ).save_pretrained(tmp_path / "m")
    model = MBDPO.from_pretrained(tmp_path / "m", device="cpu", n_samples=16, n_elites=4, n_prior_trajectories=4)
    assert model.policy.world_model.energy is None and model.energy_coef == 0
    with pytest.raises(ValueError, match="score network"):
        model.policy.act_mode = "score"
    if case == "single":
        model = MBDPO.from_hub(
            tmp_path / "m",
            env=ToyEnv(model.observation_space, model.action_space),
            device="cpu",
            n_samples=16,
            n_elites=4,
            n_prior_trajectories=4,
            batch_size=8,
        )
        model.learning_starts = 6
        model.learn(10)
        assert model._n_updates > 1


def untrained_score(weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The score network as released training initialises it."""
    score = {name: value for name, value in weights.items() if name.startswith("_score.") and value.ndim == 1}
    return weights | {name: th.full_like(value, float(name.endswith("ln.weight"))) for name, value in score.items()}


def test_a_score_network_that_was_never_trained_is_left_out(tmp_path: Path) -> None:
    weights = untrained_score(weights_of("score"))
    th.save(weights, tmp_path / "plain.pt")
    with pytest.warns(UserWarning, match=r"score network in plain\.pt was never trained and is left out"):
        convert_released(tmp_path / "plain.pt", **READ).save_pretrained(tmp_path / "m")
    model = MBDPO.from_pretrained(tmp_path / "m", device="cpu")
    assert model.policy.world_model.score is None and model.score_coef == 0
    with pytest.raises(ValueError, match="score network"):
        model.policy.act_mode = "score"
    with pytest.raises(ValueError, match="bootstrap"):
        MBDPO.from_pretrained(tmp_path / "m", device="cpu", bootstrap="score")
    # A single number that has moved is training
    weights["_score.0.bias"][0] = 1e-6
    th.save(weights, tmp_path / "trained.pt")
    assert convert_released(tmp_path / "trained.pt", **READ).policy.world_model.score is not None


def test_task_tables_of_mt30_and_mt80(tmp_path: Path) -> None:
    weights = weights_of("multitask")
    # As many tasks as mt30 has, observations padded to 24
    rows = weights["_task_emb.weight"].repeat(10, 1)
    masks = weights["_action_masks"].repeat(10, 1)
    first = weights["_encoder.state.0.weight"]
    width = first.shape[1] - rows.shape[1]
    wider = th.cat([first[:, :width], th.zeros(len(first), 24 - width), first[:, width:]], 1)
    changed = {"_task_emb.weight": rows, "_action_masks": masks, "_encoder.state.0.weight": wider}
    th.save(weights | changed, tmp_path / "mt30.pt")
    model = convert_released(tmp_path / "mt30.pt", **READ)
    assert model.tasks.names == MT30 and model.tasks.observation_dim == 24
    assert (
        model.tasks["reacher-easy"].env_id == "mbdpo/reacher-easy-v0"
        and model.tasks["cup-spin"].env_id == "mbdpo/cup-spin-v0"
    )
    assert model.tasks["walker-run"].discount == 0.99 and model.tasks["reacher-three-hard"].observation_dim == 8
    observation = {"observation": np.zeros((2, 24), np.float32), "task": np.array([0, 29])}
    model.policy.act_mode = "prior"
    assert model.predict(observation, deterministic=True)[0].shape == (2, model.tasks.action_dim)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 tasks, which is neither mt30 nor mt80: pass task_names"):
        convert_released(GOLDEN / "multitask.pt", **READ)
    with pytest.raises(ValueError, match="pass task_names"):
        convert_released(GOLDEN / "multitask.pt", ["a"], **READ)
    with pytest.raises(ValueError, match="leave out task_names"):
        convert_released(GOLDEN / "single.pt", ["a"], **READ)
    th.save(without(weights_of("single"), "_pi"), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a checkpoint of MBDPO or TD-MPC2"):
        convert_released(tmp_path / "x.pt", **READ)
