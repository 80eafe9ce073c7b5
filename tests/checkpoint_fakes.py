"""Models of every kind, and what tests of checkpoints do with them."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo import MBDPO, TaskSet
from tests.fakes import (
    IMAGE,
    LEANING,
    MIXED,
    UNEVEN,
    VECTOR,
    ToyEnv,
    leaning_env,
    leaning_model,
    leaning_observations,
    randomize,
    toy_envs,
)

QUICK: dict[str, Any] = {
    "preset": "debug",
    "buffer_size": 300,
    "learning_starts": 8,
    "warmup_updates": 0,
    "batch_size": 8,
    "device": "cpu",
    "seed": 0,
}
NUMBERS = spaces.Dict({"speed": VECTOR, "gear": spaces.Discrete(3)})
KINDS = ("vector", "uneven", "episodic", "pixels", "dict", "normalized", "normalized dict", "tasks", "discrete")
# One of three sees its observations in units of their spread
STATISTICS: dict[str, Any] = {"observation_mean": (0.1, -0.2, 0.0), "observation_std": (0.5, 2.0, 0.01)}
NORMALIZED_TASKS = TaskSet(
    [replace(task, **(STATISTICS if task.name == "down" else {})) for task in LEANING],
    LEANING.observation_dim,
    LEANING.action_dim,
)
MODES = ("search", "score", "prior")


def make_env(kind: str) -> Any:
    """The environment of a kind of model, not normalised."""
    space: dict[str, spaces.Space] = {
        "pixels": IMAGE,
        "dict": MIXED,
        "normalized dict": NUMBERS,
        "discrete": spaces.Discrete(4),
    }
    if kind == "tasks":
        return leaning_env()
    return ToyEnv(
        space.get(kind, VECTOR),
        **({"action_space": UNEVEN} if kind == "uneven" else {}),
        terminates=kind == "episodic",
    )


def trained(kind: str, steps: int = 16, **kwargs: Any) -> MBDPO:
    """A model that has learned a little, whose last layers are not zero."""
    values = QUICK | kwargs
    if kind == "tasks":
        values = {"tasks": NORMALIZED_TASKS} | values
        model = leaning_model(**{name: value for name, value in values.items() if name != "device"})
    elif kind.startswith("normalized"):
        keys = ["speed"] if kind.endswith("dict") else None
        env = VecNormalize(toy_envs(observation_space=NUMBERS if keys else VECTOR), norm_obs_keys=keys, clip_obs=2.0)
        model = MBDPO("MultiInputPolicy" if keys else "MlpPolicy", env, **values)
    else:
        policy = {"pixels": "CnnPolicy", "dict": "MultiInputPolicy"}.get(kind, "MlpPolicy")
        model = MBDPO(policy, make_env(kind), **values)
    model.learn(steps)
    randomize(model.policy.world_model)
    return model


def observations(model: MBDPO, count: int = 3, seed: int = 0) -> Any:
    """Observations as the policy gets them, normalised where it is used to that."""
    if model.tasks is not None:
        return leaning_observations([index % len(model.tasks) for index in range(count)], seed)
    space = model.observation_space
    leaves = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    for index, leaf in enumerate(leaves.values()):
        leaf.seed(seed + index)
    batch = {key: np.stack([leaf.sample() for _ in range(count)]) for key, leaf in leaves.items()}
    raw = batch if isinstance(space, spaces.Dict) else batch[""]
    return raw if model._vec_normalize_env is None else model._vec_normalize_env.normalize_obs(raw)


def same_weights(first: MBDPO, second: MBDPO) -> bool:
    """Whether two models hold the same tensors, to the last bit."""
    one, two = first.policy.state_dict(), second.policy.state_dict()
    return one.keys() == two.keys() and all(bool((one[name] == two[name]).all()) for name in one)


def acts_alike(first: MBDPO, second: MBDPO) -> bool:
    """Whether two models act alike in every mode, cold and warm, to the last bit."""
    before = first.policy.act_mode
    obs = observations(first)
    for mode in MODES:
        first.policy.act_mode = second.policy.act_mode = mode
        plan = None
        for _ in range(2):
            action, plan_one = first.predict(obs, plan, deterministic=True)
            other, plan_two = second.predict(obs, plan, deterministic=True)
            if not ((action == other).all() and (plan_one == plan_two).all()):
                return False
            plan = plan_one
    first.policy.act_mode = second.policy.act_mode = before
    return True


class Pendulum(gym.Wrapper):
    """Pendulum-v1 under an id of one's own, drawn as a grey square: no renderer is needed."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(gym.make("Pendulum-v1", max_episode_steps=12))
        self._mode = render_mode

    @property
    def render_mode(self) -> str | None:
        return self._mode

    def render(self) -> Any:
        return np.full((64, 64, 3), 100, np.uint8)


if "CheckpointPendulum-v0" not in gym.registry:
    gym.register("CheckpointPendulum-v0", Pendulum, max_episode_steps=12)
