"""Environments of a task set: padded spaces, so that different tasks can stand side by side in one VecEnv.

The task travels as a key of the observation, hence through VecEnv, replay buffer and ``predict`` like anything that an
environment returns. It is a Discrete: Stable-Baselines3 keeps those exact (int64) everywhere, and refuses to normalise
them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat, TypeAlias, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize, unwrap_vec_wrapper

from sb3_mbdpo.env_facts import attributes_of
from sb3_mbdpo.task_checks import check_task_spaces
from sb3_mbdpo.tasks import OBSERVATION_KEY, TASK_KEY, Task, TaskSet, pad_right
from sb3_mbdpo.wrappers import ActionRepeat

# An environment, its id, or what makes one
EnvSource: TypeAlias = gym.Env | str | Callable[[], gym.Env]


class MultiTaskEnv(gym.Wrapper):
    """
    One task of a set in the padded spaces of all.

    Observations become ``{"observation": padded vector, "task": index}``; of the actions, each in [-1, 1], the first
    ones are scaled to the environment's own bounds and the surplus is ignored.

    >>> tasks = TaskSet([Task("pendulum", 3, 1), Task("walker", 24, 6)])
    >>> env = MultiTaskEnv(gym.make("Pendulum-v1"), tasks, "pendulum")
    >>> obs, _ = env.reset(seed=0)
    >>> obs["observation"].shape, int(obs["task"]), env.action_space.shape
    ((24,), 0, (6,))

    :param env: Environment with a flat Box observation and a finite Box action
    :param task_set: All tasks
    :param name: Which of them this is
    :raises ValueError: for an unknown name, or spaces that are not the task's
    """

    def __init__(self, env: gym.Env, task_set: TaskSet, name: str):
        super().__init__(env)
        self.task_set, self.task_name = task_set, name
        self.task_index = task_set.index(name)
        observation_dim, action_dim = flat_sizes(env)
        task = task_set[name]
        if (observation_dim, action_dim) != (task.observation_dim, task.action_dim):
            raise ValueError(
                f"The environment has {observation_dim} observation entries and {action_dim} actions, task {name!r} "
                f"has {task.observation_dim} and {task.action_dim}: this is not the task's environment."
            )
        self._inner_actions = cast(spaces.Box, env.action_space)
        self.observation_space, self.action_space = task_set.observation_space, task_set.action_space

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray | np.int64]:
        """
        :param observation: The environment's own
        :return: The padded one, with the task
        """
        padded = pad_right(np.asarray(observation), self.task_set.observation_dim)
        return {OBSERVATION_KEY: padded, TASK_KEY: np.int64(self.task_index)}

    def action(self, action: np.ndarray) -> np.ndarray:
        """
        :param action: Padded action in [-1, 1]
        :return: The environment's own action, in its shape, bounds and dtype
        """
        space = self._inner_actions
        scaled = np.asarray(action, np.float64)[: math.prod(space.shape)].reshape(space.shape)
        own = space.low + 0.5 * (scaled + 1.0) * (space.high.astype(np.float64) - space.low)
        return np.clip(own, space.low, space.high).astype(space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: Seed of the environment
        :param options: Its options
        :return: first observation, info
        """
        observation, info = self.env.reset(seed=seed, options=options)
        return self.observation(observation), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        :param action: Padded action in [-1, 1]
        :return: observation, reward, terminated, truncated, info
        """
        observation, reward, terminated, truncated, info = self.env.step(self.action(action))
        return self.observation(observation), reward, terminated, truncated, info


def flat_sizes(env: gym.Env) -> tuple[int, int]:
    """
    :param env: Environment
    :return: width of its observation vector, number of its actions
    :raises ValueError: if it has no flat Box observations, or no finite Box actions, saying what to wrap it in
    """
    observations, actions = env.observation_space, env.action_space
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        raise ValueError(
            f"Multi-task models read flat Box observations, got {observations}: wrap the environment in "
            "gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(actions, spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
        raise ValueError(f"Multi-task models act in Box spaces of floats, got {actions}: wrap the environment.")
    if not (np.isfinite(actions.low) & np.isfinite(actions.high) & (actions.low < actions.high)).all():
        raise ValueError(f"Each action needs finite bounds with low < high, got {actions}: rescale it in a wrapper.")
    return observations.shape[0], math.prod(actions.shape)


def decisions_per_episode(env: gym.Env) -> int | None:
    """
    Time limit in decisions, of which :class:`~sb3_mbdpo.wrappers.ActionRepeat` makes the steps inside it.

    :param env: Environment
    :return: Decisions, None when the environment does not say
    """
    if env.has_wrapper_attr("_max_episode_steps"):
        return cast("int | None", env.get_wrapper_attr("_max_episode_steps"))
    limit = getattr(env.spec, "max_episode_steps", None)
    repeat = env.get_wrapper_attr("steps_per_action") if env.has_wrapper_attr("steps_per_action") else 1
    return None if limit is None else math.ceil(limit / repeat)


def make_env(source: EnvSource, action_repeat: int = 1) -> gym.Env:
    """
    :param source: An environment, its id, or a function that makes one
    :param action_repeat: Steps of each decision; for ids only, as other sources are taken as they are
    :return: The environment; those made from ids are flattened where their observations are structured
    :raises ValueError: if the source is none of these
    """
    if isinstance(source, gym.Env):
        return source
    if callable(source):
        return source()
    if not isinstance(source, str):
        raise ValueError(
            f"Pass one Gymnasium environment, its id, or a function that makes one; got {type(source).__name__}."
        )
    env = gym.make(source)
    env = ActionRepeat(env, action_repeat) if action_repeat > 1 else env
    flat = isinstance(env.observation_space, spaces.Box) and len(env.observation_space.shape) == 1
    return env if flat else gym.wrappers.FlattenObservation(env)


def describe_task(env: gym.Env, name: str, **given: Any) -> Task:
    """
    A task from its environment: sizes, and the episode length where the environment says it.

    :param env: Environment with a flat Box observation and a finite Box action
    :param name: Name of the task
    :param given: Further fields of :class:`~sb3_mbdpo.tasks.Task`
    :return: The task
    :raises ValueError: for other spaces
    """
    observation_dim, action_dim = flat_sizes(env)
    if given.get("episode_length") is None:
        given["episode_length"] = decisions_per_episode(env)
    return Task(name, observation_dim, action_dim, **given)


def describe_tasks(envs: Mapping[str, EnvSource]) -> TaskSet:
    """
    A task set from environments. Those made for it are closed again.

    >>> describe_tasks({"pendulum": "Pendulum-v1", "car": "MountainCarContinuous-v0"})
    TaskSet(['pendulum', 'car'], observation_dim=3, action_dim=1)

    :param envs: Environments, ids or functions that make one, by the name of their task
    :return: The set, in the order of ``envs``
    """
    tasks = []
    for name, source in envs.items():
        env = make_env(source)
        tasks.append(describe_task(env, name, env_id=source if isinstance(source, str) else None))
        if env is not source:
            env.close()
    return TaskSet(tasks)


def make_task_env(task_set: TaskSet, name: str, source: EnvSource | None = None) -> MultiTaskEnv:
    """
    The environment of one task, in the padded spaces.

    :param task_set: All tasks
    :param name: Which of them
    :param source: An environment, its id, or a function that makes one; None: by the task's ``env_id``
    :return: The wrapped environment
    :raises ValueError: if there is neither a source nor an id
    """
    task = task_set[name]
    if source is None:
        if task.env_id is None:
            raise ValueError(f"Task {name!r} has no environment id: pass its environment, or a function that makes it.")
        source = task.env_id
    return MultiTaskEnv(make_env(source, task.action_repeat), task_set, name)


def make_multitask_env(
    task_set: TaskSet,
    envs: Mapping[str, EnvSource] | None = None,
    names: Sequence[str] | None = None,
    n_copies: int = 1,
    vec_env_cls: type[DummyVecEnv] | type[SubprocVecEnv] = DummyVecEnv,
    seed: int | None = None,
) -> VecEnv:
    """
    A vector environment whose environments are different tasks, monitored, each task ``n_copies`` times.

    >>> tasks = describe_tasks({"pendulum": "Pendulum-v1", "car": "MountainCarContinuous-v0"})
    >>> make_multitask_env(tasks).reset()["task"].tolist()
    [0, 1]

    :param task_set: All tasks
    :param envs: Environments, ids or functions that make one, by name; the others are made by their ``env_id``
    :param names: Tasks that take part; None: all
    :param n_copies: Environments of each task, at least 1
    :param vec_env_cls: ``DummyVecEnv``, or ``SubprocVecEnv`` for a process each
    :param seed: Seed of the first environment; the others count on from there. None leaves them unseeded
    :return: The vector environment, tasks in order, copies side by side
    :raises ValueError: for an unknown task, or an environment object that would have to be there more than once
    """
    if n_copies < 1:
        raise ValueError(f"n_copies must be at least 1, got {n_copies}.")
    sources: dict[str, EnvSource] = dict(envs or {})
    chosen = tuple(names) if names is not None else task_set.names
    if not chosen:
        raise ValueError(f"names is empty: name at least one of {', '.join(task_set.names)}, or pass None for all.")
    for name in (*chosen, *sources):
        task_set.index(name)
    shared = [name for name in chosen if isinstance(sources.get(name), gym.Env)]
    if shared and (n_copies > 1 or issubclass(vec_env_cls, SubprocVecEnv)):
        raise ValueError(
            f"{shared} are given as environment objects, which can be neither copied nor sent to a process: pass "
            "functions that make them."
        )

    def maker(name: str) -> Callable[[], gym.Env]:
        return lambda: Monitor(make_task_env(task_set, name, sources.get(name)))

    vec_env = vec_env_cls([maker(name) for name in chosen for _ in range(n_copies)])
    if seed is not None:
        vec_env.seed(seed)
    return vec_env


def task_set_of(env: GymEnv | None) -> TaskSet | None:
    """
    :param env: Environment or vector environment
    :return: The task set of its ``MultiTaskEnv``; None where there is none
    :raises ValueError: if its environments belong to different sets
    """
    if env is None:
        return None
    if isinstance(env, VecEnv):
        found = attributes_of(env, "task_set")
    else:
        found = [env.get_wrapper_attr("task_set")] if env.has_wrapper_attr("task_set") else []
    sets = [tasks for tasks in found if isinstance(tasks, TaskSet)]
    if any(other != sets[0] for other in sets[1:]):
        raise ValueError("The environments belong to different task sets: wrap all of them with the same one.")
    return sets[0] if sets else None


def check_task_env(tasks: TaskSet, env: GymEnv) -> None:
    """
    :param tasks: Tasks of the model
    :param env: Environment to train or evaluate in
    :raises ValueError: if it has other spaces, other tasks, or normalises what it returns
    """
    if isinstance(env, VecEnv) and unwrap_vec_wrapper(env, VecNormalize) is not None:
        raise ValueError(
            "VecNormalize shares its statistics between tasks of different scales: leave it out (rewards are learned "
            "in symlog space), or scale each task's observations in a wrapper of its own."
        )
    check_task_spaces(tasks, env.observation_space, env.action_space)
    found = task_set_of(env)
    if found is not None and found.names != tasks.names:
        raise ValueError(
            f"The environment's tasks are {list(found.names)}, the model's {list(tasks.names)}: build it with "
            "model.tasks, so that indices mean the same."
        )
