"""Evaluation while learning offline, on the scale of the data's reference scores where it has some."""

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_mbdpo.shard_format import TaskData


class OfflineEvaluation(BaseCallback):
    """
    Evaluate every so many gradient steps, and at the end.

    Logs "eval/mean_reward", "eval/std_reward", "eval/mean_ep_length" and, where the data has reference scores,
    "eval/normalized_score" (0: ``ref_min_score``, 1: ``ref_max_score``).

    :param env: Environment to evaluate in
    :param task: What the data knows of the task
    :param eval_freq: Gradient steps between evaluations
    :param n_eval_episodes: Episodes of each
    """

    def __init__(self, env: VecEnv, task: TaskData, eval_freq: int, n_eval_episodes: int):
        super().__init__()
        self.env, self.task = env, task
        self.eval_freq, self.n_eval_episodes = eval_freq, n_eval_episodes

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        if self.n_calls % self.eval_freq != 0:
            self._evaluate()

    def _evaluate(self) -> None:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.env)
        rewards, lengths = evaluate_policy(
            self.model, self.env, self.n_eval_episodes, return_episode_rewards=True, warn=False
        )
        values = {
            "mean_reward": float(np.mean(rewards)),
            "std_reward": float(np.std(rewards)),
            "mean_ep_length": float(np.mean(lengths)),
        }
        score = self.task.normalized_score(values["mean_reward"])
        if score is not None:
            values["normalized_score"] = score
        for name, value in values.items():
            self.logger.record(f"eval/{name}", value)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.model.verbose >= 1:
            print(f"Gradient step {self.num_timesteps}: " + ", ".join(f"{k}={v:.4g}" for k, v in values.items()))
