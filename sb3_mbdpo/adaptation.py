"""Taking a multi-task world model to a new task: its embedding row, the known task that is most like it, and which
parts of the model go on learning.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_mbdpo.multitask_env import MultiTaskEnv
from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.tasks import Task, pad_right
from sb3_mbdpo.world_model import WorldModel

# What can be fine-tuned, and the modules behind each word
PARTS: dict[str, tuple[str, ...]] = {
    "embedding": ("task_embedding",),
    "encoder": ("encoder",),
    "dynamics": ("dynamics",),
    "heads": ("reward", "termination", "critics", "energy"),
    "policies": ("prior", "score"),
}
EMBEDDING_BOUND = 0.02
# Windows on which tasks are compared: more tell no more
MAX_WINDOWS = 1024


class Episode(Protocol):
    """An episode of T steps in the environment's own units, e.g. Minari's ``EpisodeData``."""

    @property
    def observations(self) -> np.ndarray:
        """[T + 1, obs]"""

    @property
    def actions(self) -> np.ndarray:
        """[T, act]"""

    @property
    def rewards(self) -> np.ndarray:
        """[T]"""


class TaskError(NamedTuple):
    """How badly a world model predicts data when told that they are of a certain task; ``total`` weighs both."""

    total: float
    dynamics: float
    reward: float


class AddedTask(NamedTuple):
    """
    What ``add_task`` did: the ``task``, its ``task_index``, the name of the known task whose embedding it starts from
    (``source``, None if fresh), and the errors by which that one was found (None unless ``like="nearest"``).
    """

    task: Task
    task_index: int
    source: str | None
    errors: dict[str, TaskError] | None


class Windows(NamedTuple):
    """
    N stretches of episodes: ``observations`` [H + 1, N, W], ``actions`` [H, N, A] in [-1, 1], ``rewards`` [H, N, 1].
    """

    observations: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor


def check_parts(parts: Sequence[str] | None) -> None:
    """
    :param parts: Keys of :data:`PARTS`; None: all of them
    :raises ValueError: for an unknown part, or none at all
    """
    if parts is not None and (isinstance(parts, str) or not parts or set(parts) - PARTS.keys()):
        raise ValueError(f"trainable must list some of {list(PARTS)}, or be None for all of them; got {parts!r}.")


def set_trainable(model: WorldModel, parts: Sequence[str] | None) -> None:
    """
    Choose what gradient updates change; target critics follow the critics in any case.

    :param model: World model, changed in place
    :param parts: Keys of :data:`PARTS`; None: everything
    :raises ValueError: for an unknown part, or none at all
    """
    check_parts(parts)
    for part, names in PARTS.items():
        for name in names:
            module: nn.Module | None = getattr(model, name)
            if module is not None:
                module.requires_grad_(parts is None or part in parts)


@th.no_grad()
def extend_embedding(model: WorldModel, action_dim: int, source: int | None, generator: th.Generator) -> None:
    """
    Give a multi-task world model a row for one more task.

    :param model: World model, changed in place; optimizers of its embedding have to be rebuilt
    :param action_dim: Actions of the new task
    :param source: Row that the new one is a copy of; None draws it as at the start of training
    :param generator: Source of that draw
    """
    assert model.task_embedding is not None
    weight = model.task_embedding.weight
    if source is None:
        draw = th.rand(1, weight.shape[1], generator=generator, device=generator.device).to(weight.device)
        row = (2 * draw - 1) * EMBEDDING_BOUND
    else:
        row = weight[source : source + 1]
    model.task_embedding.weight = nn.Parameter(th.cat([weight, row]))
    model.task_embedding.num_embeddings += 1
    mask = (th.arange(model.action_dim, device=weight.device) < action_dim).float()
    model.action_masks = th.cat([model.action_masks, mask[None]])


def random_episodes(env: gym.Env, n_episodes: int, rng: np.random.Generator, max_steps: int = 1000) -> list[Episode]:
    """
    Episodes under uniform actions.

    :param env: Environment of the new task, in its own units
    :param n_episodes: Number of episodes, at least 1
    :param rng: Source of the actions and of the environment's seed
    :param max_steps: Decisions after which an episode is left that does not end by itself
    :return: The episodes
    """
    space = cast(spaces.Box, env.action_space)
    episodes: list[Episode] = []
    for _ in range(n_episodes):
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        observations, actions, ended = [np.asarray(observation)], [], False
        rewards: list[float] = []
        while not ended and len(rewards) < max_steps:
            actions.append(rng.uniform(space.low, space.high).astype(space.dtype))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(np.asarray(observation))
            rewards.append(float(reward))
            ended = terminated or truncated
        episodes.append(_Recorded(np.stack(observations), np.stack(actions), np.array(rewards)))
    return episodes


class _Recorded(NamedTuple):
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


def episode_windows(episodes: Sequence[Episode], env: MultiTaskEnv, horizon: int, device: th.device) -> Windows:
    """
    Cut episodes into windows, evenly thinned where there are many, padded and scaled as the model sees them.

    :param episodes: Episodes in the environment's own units
    :param env: The wrapped environment of their task
    :param horizon: Steps of a window H
    :param device: Where the windows go
    :return: The windows
    :raises ValueError: if shapes do not fit, a value is not finite, or no episode is as long as a window
    """
    task = env.task_set[env.task_name]
    space = cast(spaces.Box, env.env.action_space)
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, episode in enumerate(episodes):
        if not all(hasattr(episode, name) for name in ("observations", "actions", "rewards")):
            raise ValueError(
                f"episodes must hold observations, actions and rewards, such as those of minari.load_dataset(id); got "
                f"{type(episode).__name__}."
            )
        length = len(episode.rewards)
        if episode.observations.shape != (length + 1, task.observation_dim):
            raise ValueError(
                f"Episode {number} of {length} steps needs observations of shape {(length + 1, task.observation_dim)}, "
                f"got {episode.observations.shape}."
            )
        if episode.actions.shape != (length, *space.shape):
            raise ValueError(
                f"Episode {number} needs actions of shape {(length, *space.shape)}, got {episode.actions.shape}."
            )
        scaled = 2 * (episode.actions.reshape(length, -1) - low) / (high - low) - 1
        numbers = (episode.observations, scaled, np.asarray(episode.rewards, np.float64))
        if not all(np.isfinite(values).all() for values in numbers):
            raise ValueError(f"Episode {number} holds values that are not finite: leave it out.")
        if length >= horizon:
            parts.append(numbers)
    if not parts:
        raise ValueError(f"No episode is at least {horizon} steps long (horizon): pass longer ones.")
    starts = [(part, t) for part in parts for t in range(len(part[2]) - horizon + 1)]
    kept = np.unique(np.linspace(0, len(starts) - 1, min(len(starts), MAX_WINDOWS)).round().astype(int))
    chosen = [starts[i] for i in kept]
    stacked = [
        np.stack([pad_right(part[0][t : t + horizon + 1], env.task_set.observation_dim) for part, t in chosen], 1),
        np.stack([pad_right(part[1][t : t + horizon], env.task_set.action_dim) for part, t in chosen], 1),
        np.stack([part[2][t : t + horizon, None].astype(np.float32) for part, t in chosen], 1),
    ]
    return Windows(*(th.as_tensor(values, device=device) for values in stacked))


@th.no_grad()
def task_errors(
    policy: MBDPOPolicy, windows: Windows, n_tasks: int, consistency_coef: float, reward_coef: float
) -> list[TaskError]:
    """
    How well the world model predicts windows of a new task, when it takes them for each of those it knows.

    Both errors are the training losses along the windows, weighed as in training: the squared distance of predicted
    from encoded latents, and the cross-entropy of the rewards.

    :param policy: Multi-task policy
    :param windows: Windows of the new task
    :param n_tasks: Tasks to compare with, the first rows of the embedding
    :param consistency_coef: Weight of the dynamics error
    :param reward_coef: Weight of the reward error
    :return: Errors of each task
    """
    policy.set_training_mode(False)
    model, count = policy.world_model, windows.actions.shape[1]
    errors = []
    for index in range(n_tasks):
        task = th.full((count,), index, dtype=th.long, device=windows.actions.device)
        latents = [model.encode(policy.preprocess(obs, task=task), task) for obs in windows.observations]
        z = latents[0]
        dynamics, reward = [], []
        for action, latent, target in zip(windows.actions, latents[1:], windows.rewards, strict=True):
            joined = model.join(z, action, task)
            reward.append(model.two_hot.cross_entropy(model.reward(joined), target).mean())
            z = model.dynamics(joined)
            dynamics.append((z - latent).pow(2).mean())
        means = float(th.stack(dynamics).mean()), float(th.stack(reward).mean())
        errors.append(TaskError(consistency_coef * means[0] + reward_coef * means[1], *means))
    return errors
