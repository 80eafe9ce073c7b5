from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo import MBDPO, onnx_export
from sb3_mbdpo.onnx_export import export_onnx, export_world_model
from tests.checkpoint_fakes import QUICK, observations, trained
from tests.fakes import VECTOR, ToyEnv, randomize, toy_envs

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def fed(model: MBDPO, count: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Observations as the model's predict takes them, and as the environment gives them."""
    statistics, model._vec_normalize_env = model._vec_normalize_env, None
    raw = observations(model, count)
    model._vec_normalize_env = statistics
    given = raw if isinstance(raw, dict) else {"observation": raw}
    numbers = {key: x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) else x for key, x in given.items()}
    return raw if statistics is None else statistics.normalize_obs(raw), numbers


@pytest.mark.parametrize("kind", ["normalized", "tasks"])
def test_the_score_policy_acts_alike_along_an_episode(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.policy.act_mode = "score"
    run = session(export_onnx(model, tmp_path / "policy.onnx")).run
    plan, state = np.zeros((4, *model.policy.plan_shape), np.float32), None
    for step in range(3):
        obs, given = fed(model, 4)
        wanted, state = model.predict(obs, state, deterministic=True)
        action, plan = run(["action", "next_plan"], given | {"plan": plan})
        assert action.shape == wanted.shape and np.abs(action - wanted).max() < 1e-5, step
        assert np.abs(plan - state).max() < 1e-5
        assert (action >= model.action_space.low).all() and (action <= model.action_space.high).all()


@pytest.mark.parametrize("kind", ["dict"])
def test_the_prior_acts_alike_for_any_number_of_rows(kind: str, tmp_path: Path) -> None:
    model = trained(kind, steps=1)
    model.policy.act_mode = "prior"
    policy = session(export_onnx(model, tmp_path / "policy.onnx"))
    assert [entry.name for entry in policy.get_outputs()] == ["action"]
    for count in (1, 3):
        obs, given = fed(model, count)
        wanted, _ = model.predict(obs, deterministic=True)
        (action,) = policy.run(None, given)
        assert np.abs(action - wanted).max() < 1e-5


def test_normalised_keys_may_hold_dots(tmp_path: Path) -> None:
    space = spaces.Dict({"observation.state": VECTOR, "goal": VECTOR, "observation.arm": spaces.Box(3.0, 7.0, (2,))})
    env = VecNormalize(toy_envs(observation_space=space), norm_obs_keys=["observation.arm", "observation.state"])
    model = MBDPO("MultiInputPolicy", env, act_mode="prior", **QUICK).learn(8)
    randomize(model.policy.world_model)
    obs, given = fed(model, 3)
    (action,) = session(export_onnx(model, tmp_path / "policy.onnx")).run(None, given)
    assert np.abs(action - model.predict(obs, deterministic=True)[0]).max() < 1e-5


def test_parts_of_the_world_model(tmp_path: Path) -> None:
    model = trained("tasks", steps=1)
    files = export_world_model(model, tmp_path, ["encoder", "dynamics", "critics"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["critics.onnx", "dynamics.onnx", "encoder.onnx"]
    obs, given = fed(model, 4)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32)
    world, task = model.policy.world_model, th.as_tensor(obs["task"])
    z = world.encode(model.policy.preprocess({key: th.as_tensor(x) for key, x in obs.items()}), task)
    (latent,) = session(files["encoder"]).run(None, given)
    more = {"latent": latent, "action": actions, "task": obs["task"]}
    (following,) = session(files["dynamics"]).run(None, more)
    (values,) = session(files["critics"]).run(None, more)
    with th.no_grad():
        wanted = world.next(z, th.as_tensor(actions), task), world.value(z, th.as_tensor(actions), task)
    assert np.abs(latent - z.detach().numpy()).max() < 1e-5
    assert np.abs(following - wanted[0].numpy()).max() < 1e-5
    assert np.abs(values - wanted[1].numpy()).max() < 1e-4 * max(1, np.abs(values).max())


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = trained("vector")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    schedule_cache = model.policy.search_config.schedule.alpha_bar_table(th.device("cpu"))
    export_world_model(model, tmp_path, ["score"])
    assert all((model.policy.state_dict()[name] == value).all() for name, value in before.items())
    assert type(model.policy.search_config.schedule.alpha_bar_table(th.device("cpu"))) is type(schedule_cache)
    model.learn(12)


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MBDPO("MlpPolicy", ToyEnv(spaces.Discrete(4)), bootstrap="prior", score_coef=0, **QUICK)
    randomize(model.policy.world_model)
    with pytest.raises(ValueError, match="cannot be exported"):
        export_onnx(model, tmp_path / "x.onnx", "search")
    with pytest.raises(ValueError, match="no score network"):
        export_onnx(model, tmp_path / "x.onnx", "score")
    with pytest.raises(ValueError, match=r"no \['score', 'planner'\]: it has"):
        export_world_model(model, tmp_path, ["score", "planner"])
    assert onnx_export._default_mode(model) == "prior"
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-mbdpo\[onnx\]"'):
        export_onnx(model, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []
