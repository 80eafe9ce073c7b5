"""Online training of the study's agents, with their learning curves."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

import sb3_mbdpo.suites  # noqa: F401  (registers the tasks)
from sb3_mbdpo import MBDPO, MultiTaskEnv, TaskSet

# Two random episodes instead of the rule's five, then as many updates as steps
ONLINE = {"preset": "cpu", "learning_starts": 1000, "warmup_updates": 1000, "batch_size": 128}
CURVE_FIELDS = ["step", "return_mean", "return_std", "n_episodes", "train_seconds"]
EVAL_SEED = 10_000


class LearningCurve(BaseCallback):
    """
    Evaluate at fixed steps, from the same initial states each time, and append each result to a table.

    :param path: Table, a CSV file
    :param env: Environments to evaluate in, one episode each
    :param every: Environment steps between evaluations
    :param at_start: Evaluate before the first step too
    """

    def __init__(self, path: Path, env: VecEnv, every: int, at_start: bool = False):
        super().__init__()
        self.path, self.env, self.every, self.at_start = path, env, every, at_start
        self.evaluating, self.started = 0.0, 0.0

    def _on_training_start(self) -> None:
        with open(self.path, "w", newline="") as file:
            csv.DictWriter(file, CURVE_FIELDS).writeheader()
        self.started = time.perf_counter()
        if self.at_start:
            self.evaluate()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        """Play an episode in each environment and write the row."""
        before = time.perf_counter()
        self.env.seed(EVAL_SEED)
        returns, _ = evaluate_policy(self.model, self.env, self.env.num_envs, return_episode_rewards=True, warn=False)
        self.evaluating += time.perf_counter() - before
        row = {
            "step": self.num_timesteps,
            "return_mean": round(float(np.mean(returns)), 2),
            "return_std": round(float(np.std(returns)), 2),
            "n_episodes": len(returns),
            "train_seconds": round(time.perf_counter() - self.started - self.evaluating, 1),
        }
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, CURVE_FIELDS).writerow(row)
        print(f"{self.path.stem}: {row}", flush=True)


def eval_env(task: str, n_episodes: int, task_set: TaskSet | None = None) -> VecEnv:
    """
    :param task: Task of the suite
    :param n_episodes: Environments
    :param task_set: Tasks of the model that is evaluated, None for a single-task model
    :return: Environments to evaluate in
    """

    def make() -> gym.Env:
        env = gym.make(f"mbdpo/{task}-v0")
        return Monitor(env if task_set is None else MultiTaskEnv(env, task_set, task))

    return DummyVecEnv([make] * n_episodes)


def play(model: PolicyPredictor, task: str, n_episodes: int, task_set: TaskSet | None = None) -> list[float]:
    """
    :param model: What acts
    :param task: Task of the suite
    :param n_episodes: Episodes, played side by side
    :param task_set: Tasks of the model, None for a single-task model
    :return: Their returns
    """
    env = eval_env(task, n_episodes, task_set)
    env.seed(EVAL_SEED)
    returns, _ = evaluate_policy(model, env, n_episodes, return_episode_rewards=True, warn=False)
    assert isinstance(returns, list)
    return [round(value, 2) for value in returns]


def train_from_scratch(
    task: str,
    steps: int,
    seed: int,
    curve: Path,
    every: int,
    n_episodes: int,
    callbacks: Sequence[BaseCallback] = (),
    **kwargs: Any,
) -> MBDPO:
    """
    :param task: Task of the suite
    :param steps: Decisions
    :param seed: Seed
    :param curve: Table of the learning curve
    :param every: Decisions between evaluations
    :param n_episodes: Episodes of an evaluation
    :param callbacks: Further callbacks, before the one that evaluates
    :param kwargs: Further arguments of the algorithm
    :return: The trained model
    """
    arguments: dict[str, Any] = {"buffer_size": steps, "seed": seed, "device": "cpu"} | ONLINE | kwargs
    model = MBDPO("MlpPolicy", f"mbdpo/{task}-v0", **arguments)
    return model.learn(steps, [*callbacks, LearningCurve(curve, eval_env(task, n_episodes), every)])
