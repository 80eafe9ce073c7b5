"""What a vector environment says of its first environment: id, repeated actions, longest episode.

Workers of a ``SubprocVecEnv`` send what they are asked for: a spec that cannot be pickled (with a lambda as its entry
point, say) would end them. They are asked for plain values alone, and for their name, which holds the id.
"""

import re
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_mbdpo.wrappers import ActionRepeat

# Wrappers and environments print as <Wrapper<Environment<id>>>
NAMED_ID = re.compile(r"<([^<>\s]+)>+\Z")


def describe_env(env: VecEnv | None) -> dict[str, Any] | None:
    """
    :param env: Vector environment
    :return: Gymnasium id of its first environment and how often each action is repeated; None where it has no id
    """
    spec = None if env is None else _spec(env)
    if env is None or spec is None:
        return None
    repeat = env.get_attr("action_repeat", 0)[0] if env.env_is_wrapped(ActionRepeat, 0)[0] else 1
    return {"id": str(spec.id), "action_repeat": int(repeat)}


def episode_length_of(env: VecEnv) -> int | None:
    """
    Time limit of the first environment, from its ``TimeLimit`` wrapper or else its spec.

    :param env: Vector environment
    :return: Environment steps, or None when the environment does not say
    """
    limit = next(iter(attributes_of(env, "_max_episode_steps")), None)
    if limit is None:
        limit = getattr(_spec(env), "max_episode_steps", None)
    return None if limit is None else int(limit)


def _spec(env: VecEnv) -> Any:
    """Spec of the first environment; of one in another process, the registered one of its id."""
    if isinstance(env.unwrapped, DummyVecEnv):
        return next(iter(attributes_of(env, "spec")), None)
    try:
        name = env.env_method("__str__", indices=0)[0]
    except (AttributeError, NotImplementedError):
        return None
    found = NAMED_ID.search(str(name))
    return gym.registry.get(found[1]) if found else None


def attributes_of(env: VecEnv, name: str) -> list[Any]:
    """
    :param env: Vector environment
    :param name: Name of an attribute
    :return: Its value in each environment; empty where they do not all have it, or their kind answers no such questions
    """
    try:
        return list(env.get_attr(name)) if env.has_attr(name) else []
    except (AttributeError, NotImplementedError):
        return []
