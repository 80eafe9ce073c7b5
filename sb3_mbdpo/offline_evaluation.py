"""Evaluation while learning offline, on the scale of the data's reference scores where it has some."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_mbdpo.multitask_env import EnvSource, MultiTaskEnv, make_env
from sb3_mbdpo.normalization import Normalization
from sb3_mbdpo.shard_format import TaskData
from sb3_mbdpo.task_scores import evaluate_tasks
from sb3_mbdpo.tasks import TaskSet

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO


class _Evaluation(BaseCallback):
    """
    Evaluate every so many gradient steps, and at the end.

    :param eval_freq: Gradient steps between evaluations
    :param n_eval_episodes: Episodes of each
    """

    def __init__(self, eval_freq: int, n_eval_episodes: int):
        super().__init__()
        self.eval_freq, self.n_eval_episodes = eval_freq, n_eval_episodes
        # Whether weights were evaluated of which an average takes the place at the end
        self.of_raw_weights = False

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0:
            self.of_raw_weights = cast("MBDPO", self.model)._after_update is not None
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        if self.n_calls % self.eval_freq != 0 or self.of_raw_weights:
            self._evaluate()

    def _evaluate(self) -> None:
        raise NotImplementedError

    def _write(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.logger.record(f"eval/{name}", value)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.model.verbose >= 1:
            print(f"Gradient step {self.num_timesteps}: " + ", ".join(f"{k}={v:.4g}" for k, v in values.items()))


class OfflineEvaluation(_Evaluation):
    """
    Evaluation of a single task.

    Logs "eval/mean_reward", "eval/std_reward", "eval/mean_ep_length" and, where the data has reference scores,
    "eval/normalized_score" (0: ``ref_min_score``, 1: ``ref_max_score``).

    :param env: Environment to evaluate in
    :param task: What the data knows of the task
    :param eval_freq: Gradient steps between evaluations
    :param n_eval_episodes: Episodes of each
    """

    def __init__(self, env: VecEnv, task: TaskData, eval_freq: int, n_eval_episodes: int):
        super().__init__(eval_freq, n_eval_episodes)
        self.env, self.task = env, task

    def _evaluate(self) -> None:
        statistics, layer = Normalization.of(self.model.get_vec_normalize_env()), unwrap_vec_normalize(self.env)
        if statistics is not None and layer is not None:
            statistics.fill(layer)
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
        self._write(values)


class TasksEvaluation(_Evaluation):
    """
    Evaluation task by task.

    Logs "eval/mean_reward/<task>", "eval/normalized_score/<task>" for tasks with reference scores, and the means over
    all tasks as "eval/mean_reward" and, where each has reference scores, "eval/normalized_score". A model with a seed
    is evaluated from the same initial states each time. The tasks' own numbers go to files and tensorboard; on the
    screen, from ``verbose=1`` on, they are a table.

    :param tasks: The model's tasks, with the reference scores to use
    :param envs: Environments by task, see :func:`eval_envs`
    :param eval_freq: Gradient steps between evaluations
    :param n_eval_episodes: Episodes of each task
    """

    def __init__(self, tasks: TaskSet, envs: Mapping[str, gym.Env], eval_freq: int, n_eval_episodes: int):
        super().__init__(eval_freq, n_eval_episodes)
        self.tasks, self.envs = tasks, envs

    def _evaluate(self) -> None:
        scores = evaluate_tasks(self.model, self.tasks, self.envs, None, self.n_eval_episodes, seed=self.model.seed)
        # Tables on the screen shorten long keys, and then refuse those that have become alike
        apart = ("stdout", "log")
        for score in scores:
            self.logger.record(f"eval/mean_reward/{score.name}", score.mean, exclude=apart)
            if score.normalized is not None:
                self.logger.record(f"eval/normalized_score/{score.name}", score.normalized, exclude=apart)
        values = {"mean_reward": float(np.mean([score.mean for score in scores]))}
        if scores.mean_normalized is not None:
            values["normalized_score"] = scores.mean_normalized
        self._write(values)
        if self.model.verbose >= 1:
            print(scores)


def eval_envs(tasks: TaskSet, given: Mapping[str, EnvSource] | None = None) -> dict[str, gym.Env]:
    """
    Environments of tasks, made once for all evaluations.

    :param tasks: The model's tasks
    :param given: Environments, ids or functions that make one, by task; None: those of all tasks, by their ``env_id``
    :return: Environments by task
    :raises ValueError: for an unknown task, or one without an environment or with another task's
    """
    missing = [task.name for task in tasks if task.env_id is None] if given is None else []
    if missing or (given is not None and not given):
        raise ValueError(
            f"There is no environment for {missing or 'any task'}: pass eval_env as a dict, {{task: environment, id or "
            "function that makes it}, of those that are to be evaluated."
        )
    sources: Mapping[str, EnvSource] = given or {task.name: cast(str, task.env_id) for task in tasks}
    for name in sources:
        tasks.index(name)
    envs = {name: make_env(source, tasks[name].action_repeat) for name, source in sources.items()}
    for name, env in envs.items():
        # Another task's environment is found now, not after thousands of steps
        MultiTaskEnv(env, tasks, name)
    return envs
