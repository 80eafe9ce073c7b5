"""Try out tasks: Gymnasium's environment checker, then a whole episode of random decisions."""

import time
import warnings
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env

# What the checker remarks on and is meant to be so: unbounded observations, and an adapter around a suite's environment
EXPECTED = ("infinity", "different from the unwrapped version")


@dataclass(frozen=True)
class Checked:
    """
    What a trial of a task found.

    :param env_id: Gymnasium id
    :param decisions: Decisions of the episode
    :param total: Its return
    :param seconds: How long it took, checker and building included
    :param warnings: What the checker remarked on
    """

    env_id: str
    decisions: int
    total: float
    seconds: float
    warnings: tuple[str, ...]


def check_task(env_id: str, decisions: int | None = None, seed: int = 0) -> Checked:
    """
    :param env_id: Gymnasium id
    :param decisions: Decisions to make; None: to the end of the episode, which must come with the time limit
    :param seed: Seed of initial state and actions
    :return: What was found
    :raises Exception: what the checker, building or stepping raises
    :raises ValueError: for rewards that are not finite, observations outside of their space, or an early end
    """
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gym.make(env_id, disable_env_checker=True)
        # Without the time limit and the order enforcer around it, which the checker would remark on
        check_env(_inside_gym_wrappers(env), skip_render_check=True)
    limit = env.spec.max_episode_steps if env.spec is not None else None
    total, steps, ended = 0.0, 0, False
    env.reset(seed=seed)
    env.action_space.seed(seed)
    while not ended and steps != decisions:
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        steps, total, ended = steps + 1, total + float(reward), terminated or truncated
        if not np.isfinite(float(reward)) or observation not in env.observation_space:
            raise ValueError(f"{env_id}: step {steps} gave reward {reward} and an observation out of its space.")
    env.close()
    if ended and steps != limit:
        raise ValueError(f"{env_id}: the episode ended after {steps} decisions, not {limit}.")
    said = [str(warning.message) for warning in caught]
    remarks = tuple(text for text in said if "WARN" in text and not any(known in text for known in EXPECTED))
    return Checked(env_id, steps, total, time.perf_counter() - started, remarks)


def _inside_gym_wrappers(env: gym.Env) -> gym.Env:
    while isinstance(env, (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing)):
        env = env.env
    return env
