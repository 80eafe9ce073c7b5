from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_mbdpo.normalization import Normalization
from tests.fakes import BOXES, VECTOR, toy_envs


def normalizing(space: spaces.Space = VECTOR, **kwargs: object) -> VecNormalize:
    env = VecNormalize(toy_envs(2, observation_space=space), **kwargs)  # type: ignore[arg-type]
    env.reset()
    for _ in range(5):
        env.step(np.zeros((2, 2), np.float32))
    return env


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        (VECTOR, {}),
        (VECTOR, {"norm_obs": False, "clip_reward": 3.0, "gamma": 0.9}),
        (VECTOR, {"norm_reward": False, "training": False, "epsilon": 1e-3}),
        (BOXES, {"norm_obs_keys": ["speed"]}),
    ],
)
def test_settings_and_statistics_come_back(space: spaces.Space, settings: dict[str, object], tmp_path: Path) -> None:
    env = normalizing(space, **settings)
    written = Normalization.of(env)
    assert written is not None
    written.write(tmp_path / "n.safetensors", {})
    found = Normalization.read(tmp_path / "n.safetensors", env.venv.observation_space)
    assert found is not None and found.settings == written.settings
    other = found.apply(toy_envs(2, observation_space=space))
    for name in ("norm_obs", "norm_reward", "training", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys"):
        assert getattr(other, name) == getattr(env, name), name
    obs = toy_envs(2, observation_space=space).reset()
    one, two = env.normalize_obs(obs), other.normalize_obs(obs)
    keys = obs if isinstance(obs, dict) else [...]
    assert all((one[key] == two[key]).all() for key in keys)
    assert (env.normalize_reward(np.ones(2)) == other.normalize_reward(np.ones(2))).all()


def test_statistics_go_into_a_wrapper_that_is_there_already() -> None:
    written = Normalization.of(normalizing())
    inner = VecNormalize(toy_envs(2), clip_obs=5.0)
    outer = VecMonitor(inner)
    assert written is not None and written.apply(outer) is outer
    assert inner.clip_obs == 5.0 and (inner.obs_rms.mean == written.statistics["observation.mean"]).all()
    # A copy: going on in one environment does not change the other
    inner.obs_rms.mean += 1
    assert not (inner.obs_rms.mean == written.statistics["observation.mean"]).any()


def test_statistics_of_other_shapes_stay_out() -> None:
    written, other = Normalization.of(normalizing()), VecNormalize(toy_envs(observation_space=spaces.Box(-1, 1, (5,))))
    assert written is not None
    with pytest.raises(ValueError, match="wrap it in VecNormalize where it was"):
        written.fill(other)
    assert other.obs_rms.mean.shape == (5,) and other.obs_rms.count < 1


def test_no_file_no_statistics(tmp_path: Path) -> None:
    assert Normalization.read(tmp_path / "n.safetensors", VECTOR) is None and Normalization.of(None) is None


def test_statistics_of_observations_by_key() -> None:
    by_key = Normalization.of(normalizing(BOXES, norm_obs_keys=["speed"])).observation_statistics()  # type: ignore[union-attr]
    assert list(by_key) == ["speed"] and by_key["speed"][0].shape == (3,)
    assert list(Normalization.of(normalizing()).observation_statistics()) == ["observation"]  # type: ignore[union-attr]
    assert Normalization.of(normalizing(norm_obs=False)).observation_statistics() == {}  # type: ignore[union-attr]


def test_statistics_of_other_observations_are_refused(tmp_path: Path) -> None:
    written = Normalization.of(normalizing(BOXES, norm_obs_keys=["speed"]))
    assert written is not None
    written.write(tmp_path / "n.safetensors", {})
    with pytest.raises(ValueError, match=r"statistics are of \['speed'\]"):
        Normalization.read(tmp_path / "n.safetensors", spaces.Dict({"position": VECTOR}))
