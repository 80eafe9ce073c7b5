"""Small Minari data sets that the tests share. Minari's folder must have been set to a temporary one."""

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from tests.fakes import UNEVEN, VECTOR

minari = pytest.importorskip("minari")


def recorded(
    lengths: tuple[int, ...] = (5, 1, 8),
    observation_space: spaces.Space = VECTOR,
    action_space: spaces.Box = UNEVEN,
    terminates: tuple[bool, ...] = (True, False, False),
    seed: int = 0,
) -> list[Any]:
    """Episodes of random numbers; the reward of step t of episode e is 100 e + t."""
    observation_space.seed(seed)
    action_space.seed(seed)
    episodes = []
    for e, length in enumerate(lengths):
        observations = [observation_space.sample() for _ in range(length + 1)]
        ends = np.zeros((2, length), bool)
        ends[0 if terminates[e] else 1, -1] = True
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                observations=stacked(observations),
                actions=np.stack([action_space.sample() for _ in range(length)]),
                rewards=100.0 * e + np.arange(length),
                terminations=ends[0],
                truncations=ends[1],
            )
        )
    return episodes


def stacked(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.stack([np.asarray(obs[key]) for obs in observations]) for key in observations[0]}
    return np.stack(observations)


def record(
    name: str,
    episodes: list[Any] | None = None,
    observation_space: spaces.Space = VECTOR,
    action_space: spaces.Box = UNEVEN,
    **kwargs: Any,
) -> Any:
    """Write a Minari data set; images are stored without loss."""
    episodes = (
        recorded(observation_space=observation_space, action_space=action_space) if episodes is None else episodes
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return minari.create_dataset_from_buffers(
            name,
            episodes,
            observation_space=observation_space,
            action_space=action_space,
            jpeg_encoding=False,
            **kwargs,
        )
