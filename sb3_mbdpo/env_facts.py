"""What a vector environment says of its first environment: id, repeated actions, longest episode.

Workers of a ``SubprocVecEnv`` send what they are asked for: a spec that cannot be pickled (with a lambda as its entry
point, say) would end them. They are asked for plain values alone, and for their name, which holds the id.
"""

import dataclasses
import math
import numbers
import re
from contextlib import suppress
from typing import Any, cast

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_mbdpo.wrappers import ActionRepeat

# Wrappers and environments print as <Wrapper<Environment<id>>>
PRINTED_ID = re.compile(r"<([^<>\s]+)>+\Z")
# How vector environments of others say that they do not answer a question; a worker that died says something else
UNANSWERED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
VERSIONED = re.compile(r"-v\d+\Z")
MONITOR = "stable_baselines3.common.monitor:Monitor"
# What comes of a spec that does not make its environment again
NOT_MADE = (gym.error.Error, ImportError, ValueError, TypeError, AttributeError, RuntimeError)


def describe_env(env: VecEnv | None) -> dict[str, Any] | None:
    """
    :param env: Vector environment
    :return: Gymnasium id of its first environment and how often each action is repeated; None where it has no id
    """
    if env is None:
        return None
    env_id = _printed_id(env) if _is_elsewhere(env) else getattr(spec_of(env), "id", None)
    if env_id is None:
        return None
    return {"id": str(env_id), "action_repeat": _action_repeat(env)}


def _action_repeat(env: VecEnv) -> int:
    with suppress(*UNANSWERED):
        # Lists of indices: some kinds take no number
        if env.env_is_wrapped(ActionRepeat, indices=[0])[0]:
            return int(env.get_attr("action_repeat", [0])[0])
    return 1


def episode_length_of(env: VecEnv) -> int | None:
    """
    Time limit of the first environment, from its ``TimeLimit`` wrapper or else its spec; around the former,
    :class:`~sb3_mbdpo.wrappers.ActionRepeat` makes decisions of its steps.

    :param env: Vector environment
    :return: Steps, or None when the environment does not say, or has no limit
    """
    limit = next(iter(attributes_of(env, "_max_episode_steps")), None)
    if limit is None:
        spec = gym.registry.get(_printed_id(env) or "") if _is_elsewhere(env) else spec_of(env)
        limit = getattr(spec, "max_episode_steps", None)
    finite = isinstance(limit, numbers.Real) and math.isfinite(limit)
    return int(cast(float, limit)) if finite and cast(float, limit) >= 1 else None


def _is_elsewhere(env: VecEnv) -> bool:
    return isinstance(env.unwrapped, SubprocVecEnv)


def spec_of(env: VecEnv) -> Any:
    """
    :param env: Vector environment; its workers send the spec, which must be possible to pickle
    :return: Spec of its first environment, None where there is none
    """
    return next(iter(attributes_of(env, "spec")), None)


def without_monitor(spec: EnvSpec) -> EnvSpec:
    """
    :param spec: Spec of an environment
    :return: The same without Monitor, which changes nothing and which no spec can make again
    """
    wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.entry_point != MONITOR)
    return dataclasses.replace(spec, additional_wrappers=wrappers)


def make_again(spec: EnvSpec) -> gym.Env:
    """
    :param spec: Spec of an environment
    :return: Another like it, without Monitor
    :raises ValueError: if the spec alone does not make one, say for a wrapper that does not keep its arguments
    """
    try:
        return gym.make(without_monitor(spec))
    except NOT_MADE as error:
        raise ValueError(f"{spec.id} cannot be made again by its spec ({str(error).rstrip('.')})") from error


def _printed_id(env: VecEnv) -> str | None:
    """Id in the name of the first environment; in this process it may not be registered."""
    name = ""
    with suppress(*UNANSWERED):
        name = str(env.env_method("__str__", indices=[0])[0])
    found = PRINTED_ID.search(name)
    return found[1] if found and (found[1] in gym.registry or VERSIONED.search(found[1])) else None


def attributes_of(env: VecEnv, name: str) -> list[Any]:
    """
    :param env: Vector environment
    :param name: Name of an attribute
    :return: Its value in each environment; empty where they do not all have it, or their kind answers no such questions
    """
    with suppress(*UNANSWERED):
        return list(env.get_attr(name)) if env.has_attr(name) else []
    return []
