from typing import Any

import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo import MBDPO
from tests.fakes import UNEVEN, VECTOR, ToyEnv, flat_parameters, toy_envs
from tests.recordings import record
from tests.test_offline import DEBUG, logged

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
    seen = []

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(local["samples"].rewards.abs().max().item())
        return True

    eval_env = VecNormalize(toy_envs(1, action_space=UNEVEN), training=False)
    model.learn_offline("test/toy-v0", 2, look, eval_env=eval_env, n_eval_episodes=1)
    # Rewards go to 207 and are clipped to 10
    assert max(seen) == 10.0


# --- building from data --------------------------------------------------------------------------------------------
