"""Replay of several tasks: which task the windows of a batch come from."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.tasks import TASK_KEY

TASK_SAMPLINGS = ("proportional", "balanced")
EMPTY = -1


class MultiTaskReplayBuffer(DictSequenceReplayBuffer):
    """
    ``DictSequenceReplayBuffer`` whose environments are different tasks.

    :param buffer_size: Max number of transitions, over all environments
    :param observation_space: Observation space of a task set
    :param action_space: Its action space
    :param device: PyTorch device of the samples
    :param n_envs: Number of parallel environments
    :param task_sampling: "proportional": all transitions alike, so that a task with more environments is seen more
        often; "balanced": all tasks alike, whatever the number of their environments
    :param kwargs: Further arguments of ``SequenceReplayBuffer``
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        task_sampling: str = "proportional",
        **kwargs: Any,
    ):
        check_task_sampling(task_sampling)
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, **kwargs)
        self.task_sampling = task_sampling
        # The task of each environment; a ring column that has held two cannot be balanced
        self.env_tasks = np.full(n_envs, EMPTY, dtype=np.int64)

    def set_task_sampling(self, task_sampling: str) -> None:
        """
        Have tasks share batches in another way from now on.

        :param task_sampling: As at the beginning
        :raises ValueError: for an unknown way, or if tasks are to be balanced and an environment has had several
        """
        check_task_sampling(task_sampling)
        if task_sampling == "balanced":
            stored = self.observations[TASK_KEY][: self.buffer_size if self.full else self.pos]
            stored = stored.reshape(len(stored), self.n_envs)
            self._refuse_changed((stored != self.env_tasks).any(axis=0))
        self.task_sampling = task_sampling

    def _refuse_changed(self, changed: np.ndarray) -> None:
        if changed.any():
            raise ValueError(
                'task_sampling="balanced" needs environments that keep their task, environment '
                f'{int(changed.argmax())} has changed it: use "proportional", or begin with an empty replay buffer.'
            )

    def reset(self) -> None:
        """Forget all transitions."""
        super().reset()
        self.env_tasks[:] = EMPTY

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store one transition of every environment; see ``SequenceReplayBuffer.add``.

        :param obs: Observations with their tasks
        :param next_obs: What followed
        :param action: ``[n_envs, A]`` padded actions
        :param reward: ``[n_envs]`` rewards
        :param done: ``[n_envs]`` whether the episode ended
        :param infos: one dict per environment
        :raises ValueError: if an environment changes its task while tasks are to be balanced
        """
        assert isinstance(obs, dict)
        tasks = np.asarray(obs[TASK_KEY]).reshape(-1)
        if self.task_sampling == "balanced":
            self._refuse_changed((self.env_tasks != EMPTY) & (self.env_tasks != tasks))
        self.env_tasks[:] = tasks
        super().add(obs, next_obs, action, reward, done, infos)

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> SequenceSamples:
        """
        Draw windows, all transitions or all tasks alike.

        :param batch_size: Number of windows
        :param env: Not used: normalisation is refused in multi-task models
        :return: the windows, time first
        """
        if self.task_sampling == "proportional" or self.size() == 0:
            return super().sample(batch_size, env)
        # Every environment has as many transitions: what is balanced are the environments of each task
        _, inverse, counts = np.unique(self.env_tasks, return_inverse=True, return_counts=True)
        shares = 1.0 / (counts[inverse] * len(counts))
        columns = self.rng.choice(self.n_envs, size=batch_size, p=shares)
        rows = self.rng.integers(self.size(), size=batch_size)
        return self._get_samples(rows * self.n_envs + columns, env)


def check_task_sampling(task_sampling: str) -> None:
    """
    :param task_sampling: How tasks share a batch
    :raises ValueError: for an unknown way
    """
    if task_sampling not in TASK_SAMPLINGS:
        raise ValueError(f'task_sampling must be "proportional" or "balanced", got {task_sampling!r}.')
