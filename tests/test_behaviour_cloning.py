"""The behaviour-cloning baseline of the study under hub/dmcontrol_mixed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbdpo.shard_writer import ShardWriter
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import IMAGE, UNEVEN, VECTOR, ToyEnv

FILE = Path(__file__).parents[1] / "hub" / "dmcontrol_mixed" / "behaviour_cloning.py"
spec = importlib.util.spec_from_file_location("behaviour_cloning", FILE)
assert spec is not None and spec.loader is not None
cloning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cloning)


def demonstrated(path: Path) -> ShardedDataset:
    """Actions are a function of the observation."""
    rng = np.random.default_rng(0)
    with ShardWriter(path, VECTOR, UNEVEN) as writer:
        for _ in range(20):
            obs = rng.uniform(-1, 1, (21, 3))
            writer.add(obs, expected(obs[:-1]), np.zeros(20), False)
    return ShardedDataset(path, horizon=1)


def expected(obs: np.ndarray) -> np.ndarray:
    """Scaled actions [B, 2]."""
    return np.stack([obs[:, 0] * 0.8, np.sin(2 * obs[:, 1])], axis=1)


def test_it_repeats_the_datas_actions(tmp_path: Path) -> None:
    data, state = demonstrated(tmp_path / "set"), th.get_rng_state()
    policy = cloning.clone_behaviour(data, 300, batch_size=64)
    assert th.equal(state, th.get_rng_state())
    obs = np.random.default_rng(1).uniform(-0.9, 0.9, (50, 3))
    actions, _ = policy.predict(obs)
    wanted = UNEVEN.low + (expected(obs) + 1) / 2 * (UNEVEN.high - UNEVEN.low)
    np.testing.assert_allclose(actions, wanted, atol=0.25)
    assert np.abs(actions - wanted).mean() < 0.05
    again = cloning.clone_behaviour(data, 300, batch_size=64)
    np.testing.assert_array_equal(again.predict(obs)[0], actions)
    alone, _ = policy.predict(obs[0])
    assert UNEVEN.contains(alone)
    np.testing.assert_allclose(alone, actions[0], atol=1e-6)
    evaluate_policy(policy, Monitor(ToyEnv(VECTOR, UNEVEN)), 2)


def test_images_are_refused(tmp_path: Path) -> None:
    space = spaces.Box(0, 255, (3, *IMAGE.shape[:2]), np.uint8)
    with ShardWriter(tmp_path / "set", space, UNEVEN) as writer:
        writer.add(np.zeros((2, *space.shape), np.uint8), np.zeros((1, 2)), np.zeros(1), False)
    with pytest.raises(ValueError, match="flatten"):
        cloning.clone_behaviour(ShardedDataset(tmp_path / "set"), 1)
