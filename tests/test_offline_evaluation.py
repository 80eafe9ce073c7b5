from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo import MBDPO, ShardedDataset, WeightAveraging, convert_minari
from sb3_mbdpo.normalization import take_statistics
from tests.fakes import UNEVEN, VECTOR, Scaled, ToyEnv, flat_parameters, toy_envs
from tests.recordings import record
from tests.test_offline import DEBUG, logged, record_pendulum

pytestmark = pytest.mark.usefixtures("minari_cache")


def test_evaluation_with_normalised_scores() -> None:
    dataset = record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    rows = logged(model)
    env = ToyEnv(VECTOR, UNEVEN)
    model.learn_offline("test/toy-v0", 5, eval_env=env, eval_freq=2, n_eval_episodes=3)
    evaluations = [row for row in rows if "eval/mean_reward" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 5]
    assert env.episodes == 3 * 3 + 3  # evaluate_policy resets once after the last
    assert all("eval/normalized_score" not in row for row in evaluations)
    assert evaluations[0]["eval/mean_ep_length"] == 5
    dataset.storage.update_metadata({"ref_min_score": -10.0, "ref_max_score": 10.0})
    model.learn_offline("test/toy-v0", 2, eval_env=env)
    last = [row for row in rows if "eval/mean_reward" in row][-1]
    assert last["eval/normalized_score"] == pytest.approx((last["eval/mean_reward"] + 10) / 20)


def test_an_evaluation_changes_nothing() -> None:
    record("test/toy-v0")
    plain = MBDPO.from_minari("test/toy-v0", **DEBUG).learn_offline("test/toy-v0", 6)
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    model.learn_offline("test/toy-v0", 6, eval_env=ToyEnv(VECTOR, UNEVEN), eval_freq=2, n_eval_episodes=1)
    assert th.equal(flat_parameters(plain.policy), flat_parameters(model.policy))


def test_normalised_environments_normalise_the_data() -> None:
    record("test/toy-v0")
    env = VecNormalize(toy_envs(1, action_space=UNEVEN))
    model = MBDPO.from_minari("test/toy-v0", env, **DEBUG)
    assert env.obs_rms.count < 1
    seen = []

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(local["samples"].rewards.abs().max().item())
        return True

    eval_env = VecNormalize(toy_envs(1, action_space=UNEVEN), training=False)
    model.learn_offline("test/toy-v0", 2, look, eval_env=eval_env, n_eval_episodes=1)
    # Rewards go to 207; normalised by statistics of nothing they would be clipped to 10
    assert 0 < max(seen) < 5
    data = ShardedDataset(convert_minari("test/toy-v0"))
    assert env.obs_rms.count == pytest.approx(len(data), rel=0.01)
    np.testing.assert_allclose(env.obs_rms.mean, data.spread_observations().mean(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
    # Statistics that are there stay
    mean = env.obs_rms.mean.copy()
    model.learn_offline(record("test/other-v0"), 2)
    np.testing.assert_array_equal(env.obs_rms.mean, mean)


def test_statistics_of_other_shapes_are_refused_before_any_is_taken() -> None:
    record("test/toy-v0", observation_space=spaces.Box(-1.0, 1.0, (6,), np.float32))
    inner = VecNormalize(toy_envs(1, action_space=UNEVEN))
    data = ShardedDataset(convert_minari("test/toy-v0"))
    with pytest.raises(ValueError, match=r"shape \(6,\), .* of \(3,\): wrap in VecNormalize last"):
        take_statistics(inner, data)
    assert inner.ret_rms.count < 1


def test_an_environment_to_evaluate_in_is_normalised_like_the_models() -> None:
    record("test/toy-v0")
    env = VecNormalize(toy_envs(1, action_space=UNEVEN))
    model = MBDPO.from_minari("test/toy-v0", env, **DEBUG)
    rows = logged(model)
    plain = ToyEnv(VECTOR, UNEVEN)
    model.learn_offline("test/toy-v0", 3, eval_env=plain, n_eval_episodes=2)
    # Returns are the environment's own: five steps that cost the mean size of actions of at most 2 and 0.5
    assert -5 * 1.25 <= rows[-1]["eval/mean_reward"] <= 0 and plain.episodes == 3
    seen: list[np.ndarray] = []
    to_tensor = model.policy.obs_to_tensor
    model.policy.obs_to_tensor = lambda obs: seen.append(obs) or to_tensor(obs)  # type: ignore[method-assign, func-returns-value]
    episodes = model.to_minari("test/agent-v0", source="agent", env=plain, n_episodes=1)
    np.testing.assert_allclose(seen[0], env.normalize_obs(episodes[0].observations[:1]), rtol=1e-5)


def test_statistics_of_a_checkpoint_need_an_environment(tmp_path: Path) -> None:
    record("test/toy-v0")
    env = VecNormalize(toy_envs(1, action_space=UNEVEN))
    MBDPO.from_minari("test/toy-v0", env, **DEBUG).learn_offline("test/toy-v0", 2).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="VecNormalize made of observations and rewards: give it an environment"):
        MBDPO.from_pretrained(tmp_path / "model").learn_offline("test/toy-v0", 2)
    model = MBDPO.from_pretrained(tmp_path / "model", toy_envs(1, action_space=UNEVEN))
    assert model.learn_offline("test/toy-v0", 2)._n_updates == 4


def test_the_last_score_is_of_the_average_that_remains() -> None:
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", **DEBUG)
    scored: list[th.Tensor] = []
    env = ToyEnv(VECTOR, UNEVEN)
    reset = env.reset
    env.reset = lambda **kwargs: scored.append(flat_parameters(model.policy)) or reset(**kwargs)  # type: ignore[method-assign, func-returns-value]
    model.learn_offline("test/toy-v0", 4, WeightAveraging(0.9), eval_env=env, eval_freq=2, n_eval_episodes=1)
    assert th.equal(scored[-1], flat_parameters(model.policy)) and not th.equal(scored[-3], scored[-1])


def test_what_was_evaluated_in_is_reset_before_learning_goes_on() -> None:
    record("test/toy-v0")
    model = MBDPO.from_minari("test/toy-v0", toy_envs(1, action_space=UNEVEN), **DEBUG).learn(12)
    model.learn_offline("test/toy-v0", 2, eval_env=model.get_env(), n_eval_episodes=1)
    assert model._last_obs is None


@pytest.mark.parametrize(
    "env",
    ["Pendulum-v1", gym.make, lambda name: Monitor(gym.make(name)), lambda name: make_vec_env(name, 2)],
    ids=["id", "environment", "monitored", "vector"],
)
def test_an_environment_like_the_models_own_is_made_without_its_monitor(env: Any) -> None:
    record_pendulum()
    model = MBDPO("MlpPolicy", env if isinstance(env, str) else env("Pendulum-v1"), **DEBUG)
    rows = logged(model)
    model.learn_offline("test/pendulum-v0", 1, eval_env=True, n_eval_episodes=1)
    assert rows[-1]["eval/mean_ep_length"] == 200


def test_an_environment_that_its_spec_does_not_make_has_to_be_passed() -> None:
    record_pendulum()
    model = MBDPO("MlpPolicy", Scaled(gym.make("Pendulum-v1"), 0.1), **DEBUG)
    with pytest.raises(ValueError, match=r"Pendulum-v1 cannot be made again .*Scaled.*: pass the env"):
        model.learn_offline("test/pendulum-v0", 1, eval_env=True)
    assert model.num_timesteps == 0


# --- building from data --------------------------------------------------------------------------------------------
