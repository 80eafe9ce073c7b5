"""Behaviour cloning, the baseline of the study: a small network that repeats the data's actions."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_mbdpo import ShardedDataset

WIDTHS = (256, 256)


class ClonedBehaviour:
    """
    A deterministic policy with Stable-Baselines3's ``predict``.

    :param network: Observations [B, O] to actions [B, A] in [-1, 1]
    :param action_space: The environment's actions
    """

    def __init__(self, network: nn.Module, action_space: spaces.Box):
        self.network, self.action_space = network, action_space

    @th.no_grad()
    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """
        :param observation: One observation [O] or a batch [B, O]
        :param state: Not used, handed back
        :param episode_start: Not used
        :param deterministic: Not used: it always is
        :return: Actions in the action space's shape and bounds, state
        """
        scaled = self.network(th.as_tensor(np.asarray(observation, np.float32))).numpy()
        low, high = self.action_space.low, self.action_space.high
        shape = (*scaled.shape[:-1], *self.action_space.shape)
        actions = low + 0.5 * (scaled.reshape(shape) + 1) * (high - low)
        return np.clip(actions, low, high).astype(self.action_space.dtype), state


def clone_behaviour(
    data: ShardedDataset, steps: int, batch_size: int = 256, learning_rate: float = 1e-3, seed: int = 0
) -> ClonedBehaviour:
    """
    Learn the data's actions by mean squared error. Draws leave the data's own generator where ``seed`` puts it.

    :param data: Episodes of a single task with flat observations
    :param steps: Gradient steps
    :param batch_size: Transitions of each
    :param learning_rate: Adam's learning rate, which falls to zero
    :param seed: Seed of weights and batches
    :return: The policy
    :raises ValueError: for images or dictionaries
    """
    observations, actions = data.observation_space, data.action_space
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        raise ValueError(f"Behaviour cloning reads flat observations, the data holds {observations}: flatten them.")
    sizes = (observations.shape[0], *WIDTHS, int(np.prod(actions.shape)))
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Tanh())
    optimizer = th.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = th.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    data.seed(seed)
    for _ in range(steps):
        samples = data.sample(batch_size)
        # The first transition of a window is never masked
        loss = nn.functional.mse_loss(network(samples.observations[0]), samples.actions[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return ClonedBehaviour(network, actions)
