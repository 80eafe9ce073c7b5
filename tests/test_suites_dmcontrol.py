"""DMControl's tasks as environments: spaces, seeds, episodes, pictures."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("dm_control")

from sb3_mbdpo.suites import env_id, suite_entry
from sb3_mbdpo.suites.checking import check_task

# One of each domain, and each of ours; `make test-dmcontrol` plays whole episodes of all
QUICK = ["walker-walk-backwards", "cheetah-jump", "reacher-hard", "reacher-three-easy", "acrobot-swingup"]
QUICK += ["cartpole-swingup-sparse", "cup-spin", "finger-turn-easy", "finger-spin", "fish-swim"]
QUICK += ["hopper-hop-backwards", "pendulum-spin", "quadruped-run", "humanoid-stand"]


@pytest.mark.parametrize("task", [*QUICK, pytest.param("dog-trot", marks=pytest.mark.slow)])
def test_passes_the_checker(task: str):
    checked = check_task(env_id(task), decisions=10)
    assert checked.decisions == 10
    assert checked.warnings == ()
    assert 0 <= checked.total <= 20
    env = gym.make(env_id(task))
    entry = suite_entry(task)
    assert env.observation_space.shape == (entry.observation_dim,)
    assert env.action_space.shape == (entry.action_dim,)
    env.close()


def test_an_episode_is_500_decisions_and_does_not_terminate():
    assert check_task(env_id("pendulum-spin")).decisions == 500
    env = gym.make(env_id("pendulum-swingup"))
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(500)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends] == [False] * 499 + [True]


def test_rewards_of_both_repetitions_are_summed():
    once, twice = (gym.make(env_id("cartpole-balance"), action_repeat=n) for n in (1, 2))
    for env in (once, twice):
        env.reset(seed=3)
    action = np.array([0.5], np.float32)
    singles = [once.step(action) for _ in range(2)]
    observation, reward, *_ = twice.step(action)
    np.testing.assert_allclose(reward, singles[0][1] + singles[1][1])
    np.testing.assert_array_equal(observation, singles[1][0])


PIXELS = """
import gymnasium as gym, numpy as np, sb3_mbdpo.suites
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
env = gym.make("mbdpo/reacher-easy-pixels-v0")
space = env.observation_space
assert is_image_space(space) and is_image_space_channels_first(space) and space.shape == (9, 64, 64)
first, _ = env.reset(seed=0)
assert first in space and (first[:3] == first[6:]).all() and first.std() > 5
for _ in range(3):
    before, second = first, env.step(np.ones(2, np.float32))[0]
    assert second in space and (second[:6] == before[3:]).all() and (second[6:] != before[6:]).any()
    first = second
print("seen")
"""


def test_pixels_are_stacked_channels_first():
    result = subprocess.run([sys.executable, "-c", PIXELS], capture_output=True, text=True, timeout=600)
    if "MuJoCo cannot render here" in result.stderr:
        pytest.skip("no OpenGL without a screen")
    assert "seen" in result.stdout, result.stderr


def test_no_way_to_render_is_one_sentence():
    code = "import gymnasium as gym, sb3_mbdpo.suites\n"
    code += "try: gym.make('mbdpo/reacher-easy-pixels-v0')\nexcept RuntimeError as error: print(error)"
    env = {key: value for key, value in os.environ.items() if "DISPLAY" not in key} | {"MUJOCO_GL": "off"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert result.stdout.startswith("MuJoCo cannot render here"), result.stderr
    assert "MUJOCO_GL is 'off'" in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
