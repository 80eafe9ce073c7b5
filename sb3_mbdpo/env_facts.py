"""What a vector environment says of its first environment: id, repeated actions, longest episode.

Workers of a ``SubprocVecEnv`` send what they are asked for: a spec that cannot be pickled (with a lambda as its entry
point, say) would end them. They are asked for plain values alone, and for their name, which holds the id and all
wrappers.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

# Wrappers and environments print as <Wrapper<Environment<id>>>
PRINTED_ID = re.compile(r"<([^<>\s]+)>+\Z")
PRINTED_LAYERS = re.compile(r"[^<>]+")
# Such a name where nothing but these wrappers is around what gymnasium.make makes of the id; rl_zoo3 puts a time limit
# of its own in the place of Gymnasium's
RECORDERS = "Monitor|RecordEpisodeStatistics|RecordVideo|HumanRendering|RenderCollection"
MADE_BY_ID = re.compile(
    rf"((?:<(?:{RECORDERS}|ActionRepeat))*)(?:<(?:Patched)?TimeLimit)?"
    r"(?:<OrderEnforcing|<PassiveEnvChecker|<[^<>]+<[^<>]+>+\Z)"
)
# Vector wrappers that leave observations and rewards alone, or that every model is given again
TRANSPARENT = (VecCheckNan, VecMonitor, VecNormalize, VecTransposeImage, VecVideoRecorder)
# How vector environments of others say that they do not answer a question; a worker that died says something else
UNANSWERED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
VERSIONED = re.compile(r"-v\d+\Z")
MONITOR = "stable_baselines3.common.monitor:Monitor"
# What comes of a spec that does not make its environment again
NOT_MADE = (gym.error.Error, ImportError, ValueError, TypeError, AttributeError, RuntimeError)


def describe_env(env: VecEnv | None) -> dict[str, Any] | None:
    """
    :param env: Vector environment
    :return: Gymnasium id of its first environment and how often each action is repeated; None where these alone do not
        make it, for other arguments or wrappers
    """
    name = "" if env is None or _is_wrapped_further(env) else _printed(env)
    found = MADE_BY_ID.match(name)
    if env is None or found is None:
        return None
    repeats = attributes_of(env, "steps_per_action") if "<ActionRepeat" in found[1] else [1]
    if not repeats:
        return None
    repeat = int(repeats[0])
    env_id = _id_elsewhere(env, "TimeLimit<" in found[0], repeat) if _is_elsewhere(env) else _id_here(env)
    return {"id": env_id, "action_repeat": repeat} if env_id else None


def _is_wrapped_further(env: VecEnv) -> bool:
    """Whether a vector wrapper changes what the environments return, of which no id and no spec tells."""
    while isinstance(env, VecEnvWrapper):
        if not isinstance(env, TRANSPARENT):
            return True
        env = env.venv
    return False


def settings_of(spec: EnvSpec) -> tuple[Any, ...]:
    """
    :param spec: Spec of an environment
    :return: What makes it another one, but for wrappers; how it is drawn and checked does not
    """
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    return spec.entry_point, kwargs, spec.max_episode_steps


def has_settings_of_id(spec: Any, limited: bool = True) -> bool:
    """
    :param spec: Spec of an environment, or None
    :param limited: Whether the time limit counts
    :return: Whether it is what is registered under its id, but for wrappers
    """
    known = gym.registry.get(spec.id) if isinstance(spec, EnvSpec) else None
    if known is None:
        return False
    found, registered = settings_of(spec), settings_of(known)
    try:
        return found == registered if limited else found[:-1] == registered[:-1]
    except ValueError:
        # Arrays do not say in one word whether they are equal
        return False


class _AskedOfLayers(type):
    """``env_is_wrapped`` asks this of each layer in the worker's own process, so that no spec needs to be pickled."""

    def __instancecheck__(cls, layer: Any) -> bool:
        # Layers inside the time limit know of none
        return not has_settings_of_id(layer.spec, limited=False)


class OtherArguments(metaclass=_AskedOfLayers):
    """Stands for the layers of an environment that was made with other arguments than those of its id."""


def _id_here(env: VecEnv) -> str | None:
    spec = spec_of(env)
    return str(spec.id) if has_settings_of_id(spec) else None


def _id_elsewhere(env: VecEnv, limited: bool, repeat: int) -> str | None:
    """The id of an environment in another process, where it and repeated actions alone make it."""
    env_id = _printed_id(env)
    with suppress(*UNANSWERED):
        if env_id is None or env.env_is_wrapped(OtherArguments, indices=[0])[0]:  # type: ignore[arg-type]
            return None
        limit = env.get_attr("_max_episode_steps", [0])[0] if limited else None
        # Registered in its own process alone, it cannot be made here anyway
        known = gym.registry.get(env_id)
        if known is None:
            return env_id
        steps = known.max_episode_steps
        return env_id if limit == (None if steps is None else math.ceil(steps / repeat)) else None
    return None


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


def make_again(spec: EnvSpec, **kwargs: Any) -> gym.Env:
    """
    :param spec: Spec of an environment
    :param kwargs: Arguments of ``gymnasium.make``
    :return: Another like it, without Monitor
    :raises ValueError: if the spec alone does not make one, say for a wrapper that does not keep its arguments
    """
    try:
        return gym.make(without_monitor(spec), **kwargs)
    except NOT_MADE as error:
        raise ValueError(f"{spec.id} cannot be made again by its spec ({str(error).rstrip('.')})") from error


def spec_to_make_again(env: VecEnv | None) -> EnvSpec | None:
    """
    :param env: Vector environment
    :return: Spec by which its first environment is made again with all its wrappers, not drawn; None where no spec does
    """
    spec = None if env is None or _is_elsewhere(env) or _is_wrapped_further(env) else spec_of(env)
    if env is None or not isinstance(spec, EnvSpec):
        return None
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    spec = dataclasses.replace(without_monitor(spec), kwargs=kwargs)
    try:
        made = make_again(spec)
    except ValueError:
        return None
    made.close()
    # A spec keeps one time limit, which it puts inside all other wrappers
    layers = [layer for layer in PRINTED_LAYERS.findall(_printed(env)) if layer != "Monitor"]
    return spec if PRINTED_LAYERS.findall(str(made)) == layers else None


def differing_spaces(env: VecEnv, wanted: Mapping[str, spaces.Space]) -> str:
    """
    :param env: Environment as a model sees it
    :param wanted: The model's spaces by name
    :return: Which of them the environment does not have, empty if it has both
    """
    return "; ".join(
        f"{name.replace('_', ' ')}: the model's is {space}, the environment's {getattr(env, name)}"
        for name, space in wanted.items()
        if getattr(env, name) != space
    )


def _printed(env: VecEnv) -> str:
    """Name of the first environment, with its wrappers."""
    with suppress(*UNANSWERED):
        return str(env.env_method("__str__", indices=[0])[0])
    return ""


def _printed_id(env: VecEnv) -> str | None:
    """Id in the name of the first environment; in this process it may not be registered."""
    found = PRINTED_ID.search(_printed(env))
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
