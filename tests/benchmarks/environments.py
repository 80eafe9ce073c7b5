"""
Environments of the learning studies, by name, and what rl-zoo has tuned for them.

A name is either a Gymnasium id, used as registered (``Pendulum-v1``) but for actions that are held where its entry in
``zoo_configs/mbdpo.yml`` says so, for all algorithms alike, or ``dmc:<domain>-<task>`` for a task of the
DeepMind Control Suite (``dmc:cartpole-swingup``): flat float32 observations, float32 actions in [-1, 1], every action
applied twice, 500 decisions an episode that end by truncation.
"""

import ast
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TimeLimit, TransformAction, TransformObservation
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule

from sb3_mbdpo.wrappers import ActionRepeat

OWN_CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
DMC_PREFIX = "dmc:"
DMC_ACTION_REPEAT = 2
# The suite's episodes last 1000 control steps, whatever the domain's time step
DMC_DECISIONS = 1000 // DMC_ACTION_REPEAT


def make(task: str, seed: int | None = None) -> gym.Env:
    """
    Build an environment by its name.

    >>> env = make("Pendulum-v1", seed=0)
    >>> env.spec.max_episode_steps
    200

    :param task: A Gymnasium id, or ``dmc:<domain>-<task>``
    :param seed: Seed of the initial states and of the action space's own sampling; None leaves both to chance.
        A later ``reset(seed=...)`` starts them anew.
    :return: The environment. ``env.spec.max_episode_steps`` is its time limit, in decisions; of one whose actions are
        held, in its own steps
    """
    if task.startswith(DMC_PREFIX):
        env = _make_dmc(task.removeprefix(DMC_PREFIX), seed)
    else:
        env, repeat = gym.make(task), held_for(task)
        env = ActionRepeat(env, repeat) if repeat > 1 else env
    if seed is not None:
        env.reset(seed=seed)
        env.action_space.seed(seed)
    return env


def held_for(task: str) -> int:
    """
    >>> held_for("MountainCarContinuous-v0"), held_for("Pendulum-v1")
    (8, 1)

    :param task: A Gymnasium id
    :return: Steps for which this project's entry holds each action, where that is all that it wraps
    """
    entry = yaml.safe_load((OWN_CONFIGS / "mbdpo.yml").read_text()).get(task, {})
    return _repeat_of(entry.get("env_wrapper"))


def _repeat_of(wrappers: Any) -> int:
    match wrappers:
        case [{"sb3_mbdpo.wrappers.ActionRepeat": {"repeat": int(repeat)}}]:
            return repeat
    return 1


def _make_dmc(name: str, seed: int | None) -> gym.Env:
    """
    Build a DeepMind Control Suite task.

    :param name: Domain and task, as in ``cartpole-swingup``
    :param seed: Seed of the task itself, for the few domains that draw their model when they are built
    :return: The environment
    """
    try:
        # Without a display the rendering back end warns as it is imported; nothing is rendered here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import dm_control.suite  # noqa: F401
            import shimmy
    except ImportError as error:
        raise ImportError(
            f'The task "{DMC_PREFIX}{name}" needs dm_control and shimmy: pip install "sb3-mbdpo[dmc]"'
        ) from error
    gym.register_envs(shimmy)

    task_kwargs = {} if seed is None else {"random": seed}
    # The checker would only report that the raw observations and actions are float64
    env = gym.make(f"dm_control/{name}-v0", disable_env_checker=True, task_kwargs=task_kwargs)
    env = _float32_observations(FlattenObservation(env))
    # The time limit counts decisions; the suite's own ends at the same moment, also as a truncation
    return TimeLimit(ActionRepeat(_unit_actions(env), DMC_ACTION_REPEAT), DMC_DECISIONS)


def _float32_observations(env: gym.Env) -> gym.Env:
    """
    Cast a flat environment's observations to float32.

    :param env: An environment with Box observations
    :return: The same environment, with its observations cast
    """
    inner = env.observation_space
    assert isinstance(inner, spaces.Box)
    space = spaces.Box(inner.low.astype(np.float32), inner.high.astype(np.float32), dtype=np.float32)
    return TransformObservation(env, lambda observation: observation.astype(np.float32), space)


def _unit_actions(env: gym.Env) -> gym.Env:
    """
    Give an environment with a bounded action space float32 actions in [-1, 1].

    :param env: The environment
    :return: The same environment, with its actions scaled
    """
    inner = env.action_space
    assert isinstance(inner, spaces.Box) and inner.is_bounded(), f"a bounded Box action space is needed, not {inner}"
    low, high = inner.low, inner.high

    def scale(action: np.ndarray) -> np.ndarray:
        fraction = (np.asarray(action, dtype=np.float64) + 1.0) / 2.0
        return np.clip(low + fraction * (high - low), low, high).astype(inner.dtype)

    return TransformAction(env, scale, spaces.Box(-1.0, 1.0, inner.shape, np.float32))


def zoo_hyperparameters(algo: str, task: str) -> tuple[dict[str, Any], str]:
    """
    Look up the tuned hyperparameters of an algorithm on a task: rl-zoo's, or this project's for MBDPO.

    :param algo: Algorithm, as rl-zoo names it: ``mbdpo``, ``sac``, ``tqc``
    :param task: Name that :func:`make` understands; where the zoo has only another version of it (``Hopper-v4``), that
        one is taken
    :return: Constructor arguments, and a line that says where they come from
    """
    path = OWN_CONFIGS / f"{algo}.yml"
    if not path.exists():
        spec = importlib.util.find_spec("rl_zoo3")
        path = Path(spec.origin).parent / "hyperparams" / f"{algo}.yml" if spec and spec.origin else path
    if not path.exists():
        return {}, "the constructor's defaults (rl_zoo3 is not installed)"
    entries = yaml.safe_load(path.read_text())
    wanted = {_unversioned(task), _unversioned(f"dm_control/{task.removeprefix(DMC_PREFIX)}")}
    same = [name for name in entries if name == task] or [name for name in entries if _unversioned(name) in wanted]
    if not same:
        return {}, f"the constructor's defaults ({path.name} has no entry)"
    entry = {key: value for key, value in entries[same[0]].items() if key not in ("n_timesteps", "n_envs")}
    if entry.get("policy") == "MlpPolicy":
        del entry["policy"]
    if task.startswith(DMC_PREFIX) or _repeat_of(entry.get("env_wrapper")) > 1:
        # What the entry's wrappers do, `make` has done
        entry.pop("env_wrapper", None)
    unsupported = sorted({"normalize", "env_wrapper", "frame_stack", "replay_buffer_class"} & set(entry))
    if unsupported:
        raise ValueError(f"{path}: the entry for {same[0]} wraps the environment or the buffer: {unsupported}")
    return entry, f"the entry for {same[0]} in {path.parent.name}/{path.name}"


def _unversioned(name: str) -> str:
    return re.sub(r"-v\d+$", "", name)


def resolve_kwargs(kwargs: dict[str, Any], n_actions: int = 1) -> dict[str, Any]:
    """
    Turn rl-zoo's notations into Python values: ``lin_1e-3`` schedules, ``"dict(...)"`` keywords, steps-and-unit lists,
    kinds of noise.

    :param kwargs: Constructor arguments as read
    :param n_actions: Number of actions, for noise
    :return: Constructor arguments to call with
    """
    resolved = dict(kwargs)
    kind, std = resolved.pop("noise_type", None), resolved.pop("noise_std", 0.0)
    if kind is not None:
        noise = {"normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}[kind]
        resolved["action_noise"] = noise(np.zeros(n_actions), std * np.ones(n_actions))
    for key, value in list(resolved.items()):
        if isinstance(value, str) and value.startswith("lin_"):
            resolved[key] = LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)
        elif isinstance(value, str) and re.match(r"dict\(", value):
            call = ast.parse(value, mode="eval").body
            assert isinstance(call, ast.Call)
            resolved[key] = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        elif key == "train_freq" and isinstance(value, list):
            resolved[key] = tuple(value)
    return resolved
