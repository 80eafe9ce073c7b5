"""Small environments, policies and models that the tests share."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_mbdpo import (
    MBDPO,
    CnnPolicy,
    MBDPOPolicy,
    MlpPolicy,
    MultiInputPolicy,
    Task,
    TaskSet,
    WorldModel,
    make_multitask_env,
)
from sb3_mbdpo.encoders import StateEncoder
from sb3_mbdpo.evaluator import Evaluator
from sb3_mbdpo.losses import LatentBatch
from sb3_mbdpo.schedule import NoiseSchedule
from sb3_mbdpo.search_config import SearchConfig
from sb3_mbdpo.world_model import TaskSpec

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
MIXED = spaces.Dict({"camera": IMAGE, "speed": VECTOR, "gear": spaces.Discrete(3)})
BOXES = spaces.Dict({"camera": IMAGE, "speed": VECTOR})
ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
UNEVEN = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32))

TINY_SIZES: dict[str, Any] = {
    "model_size": 0.02,
    "denoising_steps": 3,
    "n_samples": 16,
    "n_elites": 4,
    "n_prior_trajectories": 4,
    "beta_start": 1e-3,
    "beta_end": 0.2,
}


class ToyEnv(gym.Env):
    """
    Random observations, episodes of fixed lengths, and a check that every action belongs to the action space.

    :param observation_space: Any space
    :param action_space: Box
    :param lengths: Lengths of the episodes, taken in turn
    :param terminates: Episodes end by termination instead of a time limit
    """

    def __init__(
        self,
        observation_space: spaces.Space = VECTOR,
        action_space: spaces.Space = ACTIONS,
        lengths: tuple[int, ...] = (5,),
        terminates: bool = False,
    ):
        self.observation_space, self.action_space = copy.deepcopy(observation_space), copy.deepcopy(action_space)
        self.lengths, self.terminates = lengths, terminates
        self.episodes = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.episodes, self.steps = self.episodes + 1, 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        end = self.steps == self.lengths[(self.episodes - 1) % len(self.lengths)]
        reward = -float(np.abs(action).mean())
        return self.observation_space.sample(), reward, end and self.terminates, end and not self.terminates, {}


def toy_envs(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    """Environments whose episodes are of different lengths: 5 steps in the first, 6 in the second, ..."""

    def maker(index: int) -> Callable[[], gym.Env]:
        return lambda: ToyEnv(**({"lengths": (5 + index,)} | kwargs))

    return DummyVecEnv([maker(index) for index in range(n_envs)])


class Counter(ToyEnv):
    """Observations say where they were made: environment, episode, step. Rewards are all one."""

    def __init__(self, index: int = 0, length: int = 8):
        super().__init__(spaces.Box(-1e6, 1e6, (3,)), lengths=(length,))
        self.index = index

    def observation(self) -> np.ndarray:
        return np.array([self.index, self.episodes, self.steps], np.float32)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, _, terminated, truncated, info = super().step(action)
        return self.observation(), 1.0, terminated, truncated, info


def counters(n_envs: int, length: int = 8) -> DummyVecEnv:
    return DummyVecEnv([lambda index=index: Counter(index, length) for index in range(n_envs)])  # type: ignore[misc]


def policy_class_for(space: spaces.Space) -> type[MBDPOPolicy]:
    if isinstance(space, spaces.Dict):
        return MultiInputPolicy
    return CnnPolicy if space.shape is not None and len(space.shape) == 3 else MlpPolicy


def make_policy(
    observation_space: spaces.Space = VECTOR, action_space: spaces.Box = ACTIONS, seed: int = 0, **kwargs: Any
) -> MBDPOPolicy:
    """A tiny policy whose heads are not at their zero start, so that values, rewards and energies differ."""
    th.manual_seed(seed)
    policy = policy_class_for(observation_space)(
        observation_space, action_space, lambda _: 3e-4, seed=seed, **(TINY_SIZES | kwargs)
    )
    randomize(policy.world_model)
    return policy


def randomize(model: WorldModel, seed: int = 0) -> WorldModel:
    """Give the last layers, which start at zero, random weights."""
    generator = th.Generator().manual_seed(seed)
    layers = [model.reward[-1].weight, model.critics.weights[-1], model.target_critics.weights[-1]]
    layers += [head[-1].weight for head in (model.energy, model.termination) if head is not None]
    with th.no_grad():
        for weight in layers:
            weight.copy_(0.3 * th.randn(weight.shape, generator=generator))
    return model


def ending(policy: MBDPOPolicy) -> MBDPOPolicy:
    """Have the termination head see an end in every latent."""
    head = policy.world_model.termination
    assert head is not None
    th.nn.init.zeros_(head[-1].weight)
    th.nn.init.constant_(head[-1].bias, 5.0)
    return policy


def make_model(tasks: TaskSpec | None = None, seed: int = 0, **kwargs: Any) -> WorldModel:
    """A world model of 5-wide observations, 16-wide latents and 2 actions."""
    th.manual_seed(seed)
    task_dim = 0 if tasks is None else tasks.embedding_dim
    sizes: dict[str, Any] = {
        "hidden": (24, 24),
        "n_critics": 3,
        "num_bins": 21,
        "vmin": -3.0,
        "vmax": 3.0,
        "dropout": 0.0,
    }
    encoder = StateEncoder(5, [24], 16, task_dim=task_dim)
    return randomize(WorldModel(encoder, 16, tasks=tasks, **({"action_dim": 2} | sizes | kwargs)), seed)


def make_config(**kwargs: Any) -> SearchConfig:
    values = {"horizon": 3, "n_samples": 32, "n_elites": 6, "n_prior_trajectories": 4, "energy_coef": 0.5} | kwargs
    return SearchConfig(NoiseSchedule(4, 1e-3, 0.2), **values)


def make_batch(model: WorldModel, horizon: int = 3, size: int = 6, seed: int = 0) -> LatentBatch:
    """A batch with full windows; the first latents carry a gradient into the encoder."""
    generator = th.Generator().manual_seed(seed)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(shape, generator=generator)

    task = None if model.task_embedding is None else th.arange(size) % model.task_embedding.num_embeddings
    first = model.encode(normal(size, 5), task)
    with th.no_grad():
        flat_task = None if task is None else task.repeat(horizon)
        targets = model.encode(normal(horizon * size, 5), flat_task).unflatten(0, (horizon, size))
    actions = normal(horizon, size, model.action_dim).clamp(-1, 1)
    if task is not None:
        actions = actions * model.action_masks[task]
    rewards, terminations = normal(horizon, size, 1), th.zeros(horizon, size, 1)
    terminations[-1, 0] = 1
    return LatentBatch(first, targets, actions, rewards, terminations, th.ones(horizon, size, 1), task)


def flat_parameters(module: th.nn.Module) -> th.Tensor:
    return th.cat([value.detach().flatten() for value in module.state_dict().values()])


class Scalar(th.nn.Module):
    """A stand-in for a head: any function of its input, as logits that decode to exactly that number."""

    def __init__(self, model: WorldModel, function: Callable[[th.Tensor], th.Tensor]):
        super().__init__()
        self.two_hot, self.function = model.two_hot, function

    def forward(self, joined: th.Tensor) -> th.Tensor:
        number = self.function(joined)
        logits = (self.two_hot.encode(number.nan_to_num()) + 1e-30).log()
        return logits.masked_fill(number.isnan(), th.nan)


def hand_set(
    reward: Callable[[th.Tensor], th.Tensor] = lambda action: 0 * action[..., :1],
    value: float = 0.0,
    termination: Callable[[th.Tensor], th.Tensor] | None = None,
) -> WorldModel:
    """
    A model whose latents stand still, with a given reward of the action alone and one value everywhere.

    :param termination: Function of the latent, above zero where the episode has ended
    """
    model = make_model(num_bins=41, vmin=-4.0, vmax=4.0)
    model.dynamics = Apply(lambda joined: joined[..., :16])
    model.reward = Scalar(model, lambda joined: reward(joined[..., 16:]))
    head = Scalar(model, lambda joined: th.full_like(joined[..., :1], value))
    model.critics.select = lambda members, detach=False: lambda x: head(x).expand(2, *x.shape[:-1], -1)
    if termination is not None:
        model.termination = Apply(termination)
    return model


class Apply(th.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[th.Tensor], th.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.function(x)


class PlainEvaluator(Evaluator):
    """The same returns from the world model's own modules, head by head: works with hand-set heads too."""

    def _arrange(self, z: th.Tensor, critics: th.Tensor, prepare: Any) -> None:
        self.z, self.chosen = z, self.model.critics.select(critics)

    def roll_out(self, actions: th.Tensor) -> tuple[list[th.Tensor], th.Tensor]:
        model, count = self.model, actions.shape[1]
        task = None if self.task is None else self.task.repeat_interleave(count, 0)
        z, latents, rewards = self.z.repeat_interleave(count, 0), [], []
        for action in actions.permute(2, 0, 1, 3).flatten(1, 2):
            joined = model.join(z, action, task)
            reward = model.two_hot.decode(model.reward(joined))
            if self.config.energy_coef != 0:
                unit = {"reward": 1.0, "value_range": model.prior_scale}[self.config.energy_unit]
                reward = reward + self.config.energy_coef * unit * model.scale_energy(model.energy(joined))
            z = model.dynamics(joined)
            latents.append(z)
            rewards.append(reward.squeeze(-1))
        return latents, th.stack(rewards)

    def terminal_value(self, z: th.Tensor, count: int) -> th.Tensor:
        task = None if self.task is None else self.task.repeat_interleave(count, 0)
        action = self.model.prior_action(z, None, task)
        return self.model.value(z, action, task, self.chosen).mean(0).squeeze(-1)


class Leaning(ToyEnv):
    """
    A task of its own sizes: rewards are the mean action times ``sign``, observations random.

    :param width: Observation entries
    :param n_actions: Actions, in bounds that are not [-1, 1]
    :param sign: Whether large or small actions pay
    :param length: Steps of an episode
    """

    def __init__(
        self, width: int = 3, n_actions: int = 1, sign: float = 1.0, length: int = 6, terminates: bool = False
    ):
        actions = spaces.Box(-2.0, 2.0, (n_actions,), np.float32)
        super().__init__(spaces.Box(-1.0, 1.0, (width,), np.float64), actions, (length,))
        self.sign = sign

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, self.sign * float(action.mean()), terminated, truncated, info


# Two tasks that only the task's index tells apart, and one of other sizes; room for wider ones
LEANING = TaskSet(
    [
        Task("up", 3, 1, episode_length=6, discount=0.9),
        Task("down", 3, 1, episode_length=6, discount=0.5, ref_min_score=-12.0, ref_max_score=12.0),
        Task("wide", 4, 2, episode_length=6),
    ],
    observation_dim=5,
    action_dim=3,
)
LEANING_ENVS: dict[str, Callable[[], gym.Env]] = {
    "up": lambda: Leaning(),
    "down": lambda: Leaning(sign=-1.0),
    "wide": lambda: Leaning(4, 2, length=7),
}


def leaning_env(names: tuple[str, ...] = LEANING.names, **kwargs: Any) -> VecEnv:
    return make_multitask_env(LEANING, LEANING_ENVS, names, **kwargs)


def leaning_model(env: VecEnv | None = None, **kwargs: Any) -> MBDPO:
    """A tiny multi-task model."""
    values = {"preset": "debug", "buffer_size": 600, "learning_starts": 12, "batch_size": 16, "warmup_updates": 0}
    return MBDPO("MultiInputPolicy", env or leaning_env(), **(values | {"seed": 0, "device": "cpu"} | kwargs))


def leaning_observations(tasks: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Padded observations of the given tasks."""
    draw = np.random.default_rng(seed).uniform(-1, 1, (len(tasks), LEANING.observation_dim)).astype(np.float32)
    widths = np.array([LEANING.tasks[task].observation_dim for task in tasks])
    draw *= np.arange(LEANING.observation_dim) < widths[:, None]
    return {"observation": draw, "task": np.array(tasks)}


class Scaled(gym.RewardWrapper):
    """A wrapper that does not tell its spec what it was made with."""

    def __init__(self, env: gym.Env, scale: float):
        super().__init__(env)
        self.scale = scale

    def reward(self, reward: Any) -> float:
        return self.scale * float(reward)
