"""Constructor arguments: filling those left at None, and refusing what cannot work before any work is done."""

from __future__ import annotations

import math
import numbers
import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer
from sb3_mbdpo.building import policy_arguments
from sb3_mbdpo.env_facts import attributes_of, episode_length_of
from sb3_mbdpo.finite import not_finite
from sb3_mbdpo.hardware import resolve_dtype
from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.presets import discount_for, learning_starts_for, resolve_preset
from sb3_mbdpo.search_config import check_act_mode
from sb3_mbdpo.task_checks import check_task_spaces
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer, check_task_sampling
from sb3_mbdpo.updates import BOOTSTRAPS

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# Argument, smallest and largest value; the search checks its own too (see SearchConfig)
COUNTS = (
    ("buffer_size", 1),
    ("batch_size", 1),
    ("learning_starts", 0),
    ("warmup_updates", 0),
    ("horizon", 1),
    ("denoising_steps", 2),
    ("n_samples", 2),
    ("n_elites", 1),
    ("n_prior_trajectories", 0),
    ("target_horizon", 0),
    ("prior_horizon", 0),
    ("score_batch_size", 1),
    ("score_samples", 2),
    ("score_interval", 1),
    ("policy_delay", 1),
    ("energy_interval", 1),
    ("gradient_accumulation", 1),
    ("stats_window_size", 1),
    # As many updates as there were environment steps: -1
    ("gradient_steps", -1),
)
# Written as 1e4 by some, as Stable-Baselines3 lets them
COUNTS_OF_STEPS = ("learning_starts", "warmup_updates")
# What may still be None once the preset has decided the rest: see _apply_episode_rules
DECIDED_BY_RULE = ("learning_starts", "warmup_updates", "gamma")
# Attributes of Stable-Baselines3 that are called otherwise than their arguments
KEPT_AS = {"stats_window_size": "_stats_window_size"}
RANGES = (
    ("gamma", 0, 1),
    ("tau", 0, 1),
    ("rho", 0, 1),
    *(
        (name, 0, sys.float_info.max)
        for name in (
            "temperature",
            "exploration_noise",
            "energy_coef",
            "prior_margin",
            "consistency_coef",
            "reward_coef",
            "value_coef",
            "termination_coef",
            "energy_loss_coef",
            "score_coef",
            "entropy_coef",
            "saturation_coef",
            "behaviour_coef",
            "encoder_lr_scale",
        )
    ),
    # Infinite: no clipping
    ("max_grad_norm", 0, math.inf),
)


def resolve_defaults(model: MBDPO) -> None:
    """
    Fill arguments left at None; those that are set stay, so that this can run again after loading.

    :param model: Algorithm, changed in place
    :raises ValueError: without an environment, or for a number out of its range
    """
    if not hasattr(model, "action_space"):
        raise ValueError("env is None: pass an environment or its id; only load() and models of `tasks` do without.")
    resolved, values = resolve_preset(model.preset, model.device)
    if model._decided_by not in (None, model.preset):
        raise ValueError(
            f"preset={model.preset!r} would change nothing in a model that was saved with {model._decided_by!r}: pass "
            "the arguments that it decides, or load a folder of save_pretrained with from_pretrained(preset=...)."
        )
    model._decided_by = model.preset
    unset = [name for name in values if getattr(model, name) is None]
    for name in unset:
        setattr(model, name, values[name])
    _check_numbers(model)
    model.train_freq = _checked_train_freq(model.train_freq)
    if "bootstrap" in unset and model.score_coef <= 0:
        model.bootstrap = "prior"
    # Elites and prior rollouts that nobody set keep their share of the candidates that somebody did set
    share = model.n_samples / values["n_samples"]
    for name, least in (("n_elites", 1), ("n_prior_trajectories", 0)):
        if name in unset:
            setattr(model, name, max(int(values[name] * share), least))
    if model.verbose >= 1 and unset:
        print(f'Using the "{resolved}" preset (model_size={model.model_size}, n_samples={model.n_samples})')
    if (model.gamma is None and model.tasks is None) or model.learning_starts is None:
        _apply_episode_rules(model)
    if model.warmup_updates is None:
        model.warmup_updates = 0


def _check_numbers(model: MBDPO) -> None:
    for name in COUNTS_OF_STEPS:
        value = getattr(model, name)
        if isinstance(value, float) and value.is_integer():
            setattr(model, name, int(value))
    for name, least in COUNTS:
        value = getattr(model, KEPT_AS.get(name, name))
        if value is None and name in DECIDED_BY_RULE:
            continue
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    for name, low, high in RANGES:
        value = getattr(model, name)
        if value is None and name in DECIDED_BY_RULE:
            continue
        if not isinstance(value, numbers.Real) or not low <= float(value) <= high:
            limit = f"between {low:g} and {high:g}" if high == 1 else f"a number of at least {low:g}"
            raise ValueError(f"{name} must be {limit}, got {value!r}.")
    rate = model.learning_rate
    if not callable(rate) and not (isinstance(rate, numbers.Real) and 0 <= rate < math.inf):
        raise ValueError(f"learning_rate must be a number of at least 0, or a schedule, got {rate!r}.")
    if model.max_grad_norm == 0:
        raise ValueError("max_grad_norm=0 clips every gradient to nothing: pass more, or math.inf for no clipping.")


def _checked_train_freq(train_freq: Any) -> Any:
    """Stable-Baselines3 looks at the unit alone, never stops collecting nothing, and takes no NumPy integers."""
    with_unit = isinstance(train_freq, tuple) and len(train_freq) == 2
    frequency = train_freq[0] if with_unit else train_freq
    if not isinstance(frequency, numbers.Integral) or isinstance(frequency, bool) or frequency < 1:
        raise ValueError(
            'train_freq must be an integer of at least 1, or with its unit as in (4, "step") or (1, "episode"), got '
            f"{train_freq!r}."
        )
    if isinstance(frequency, int):
        return train_freq
    return (int(frequency), train_freq[1]) if with_unit else int(frequency)


def _apply_episode_rules(model: MBDPO) -> None:
    tasks = model.tasks
    length: int | None = None
    if tasks is not None:
        length = _length_of_a_round(model)
    elif model.env is not None:
        length = episode_length_of(model.env)
    if model.learning_starts is None:
        model.learning_starts = learning_starts_for(length)
        if model.warmup_updates is None:
            model.warmup_updates = model.learning_starts
    if tasks is not None:
        if model.verbose >= 1:
            print(f"An episode of each task played: {length} steps; learning_starts={model.learning_starts}")
        return
    if model.gamma is None:
        model.gamma = discount_for(length)
    if model.verbose >= 1:
        known = "of unknown length" if length is None else f"of at most {length} steps"
        print(f"Episodes {known}: gamma={model.gamma:g}, learning_starts={model.learning_starts}")


def _length_of_a_round(model: MBDPO) -> int:
    """Steps of an episode of each task that is played; of the longest one where no environment says which are."""
    assert model.tasks is not None
    lengths = {task.name: task.episode_length or 0 for task in model.tasks}
    played = set() if model.env is None else set(attributes_of(model.env, "task_name"))
    return sum(lengths[name] for name in played) if played else max(lengths.values())


def check_arguments(model: MBDPO) -> None:
    """
    Refuse combinations that cannot work.

    :param model: Algorithm whose defaults are filled in
    :raises ValueError: naming the argument and what to do instead
    """
    if not (isinstance(model.policy_class, type) and issubclass(model.policy_class, MBDPOPolicy)):
        raise ValueError(
            f"The policy must be an MBDPOPolicy (MlpPolicy, CnnPolicy, MultiInputPolicy or derived from them), got "
            f"{model.policy_class!r}. A file with another policy holds the model of another algorithm."
        )
    check_act_mode(model.act_mode, model.score_coef > 0)
    if model.bootstrap not in BOOTSTRAPS:
        raise ValueError(f'bootstrap must be "prior" or "score", got {model.bootstrap!r}.')
    if model.bootstrap == "score" and model.score_coef <= 0:
        raise ValueError('bootstrap="score" needs a trained score network: pass score_coef > 0.')
    if model.prior_horizon > model.horizon:  # type: ignore[operator]  # both are resolved by now
        raise ValueError(
            f"prior_horizon must be at most horizon ({model.horizon}), got {model.prior_horizon}; raise horizon too."
        )
    for name in ("compile", "activation_checkpointing", "normalize_observations"):
        if not isinstance(getattr(model, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(model, name)!r}.")
    if model.episodic is not None and not isinstance(model.episodic, bool):
        raise ValueError(f"episodic must be True, False or None (found out), got {model.episodic!r}.")
    for name in ("batch_size", *(["score_batch_size"] if model.score_coef > 0 else [])):
        if getattr(model, name) % model.gradient_accumulation:
            raise ValueError(
                f"{name} must be a multiple of gradient_accumulation ({model.gradient_accumulation}), which splits it: "
                f"got {getattr(model, name)}."
            )
    for name in ("search_dtype", "update_dtype"):
        resolve_dtype(name, getattr(model, name), model.device)
    if model.action_noise is not None and not isinstance(model.action_noise, ActionNoise):
        raise ValueError(
            "action_noise must be an ActionNoise, such as NormalActionNoise(np.zeros(n), 0.1 * np.ones(n)), n actions, "
            f"got {model.action_noise!r}. The standard deviation of plain Gaussian noise is `exploration_noise`."
        )
    dtype = model.action_space.dtype
    if not np.issubdtype(dtype, np.floating):
        raise ValueError(f"The action space must be a Box of floats, got {dtype}: wrap the environment to round.")
    check_spaces(model.observation_space, cast(spaces.Box, model.action_space))
    _check_tasks(model)
    if "horizon" in model.replay_buffer_kwargs and model.replay_buffer_kwargs["horizon"] != model.horizon:
        raise ValueError("replay_buffer_kwargs holds `horizon`, an argument of MBDPO itself: pass it to MBDPO.")
    clashing = sorted(policy_arguments(model).keys() & model.policy_kwargs.keys())
    if clashing:
        raise ValueError(f"policy_kwargs holds arguments of MBDPO itself: {clashing}; pass them to MBDPO.")
    if model.n_steps != 1:
        raise ValueError(f"n_steps must be 1, got {model.n_steps}: use `horizon` for longer lookahead.")
    buffer_class = model.replay_buffer_class
    if buffer_class is not None and not isinstance(buffer_class, type):
        raise ValueError(f"replay_buffer_class must be a class, got {buffer_class!r}: the buffer is made of it.")
    if buffer_class is not None and not issubclass(buffer_class, (SequenceReplayBuffer, DictSequenceReplayBuffer)):
        raise ValueError(
            f"replay_buffer_class must sample sequences, {buffer_class.__name__} does not (nor do hindsight "
            "and n-step buffers): leave it out, or derive from SequenceReplayBuffer or DictSequenceReplayBuffer."
        )
    for name in ("use_sde", "sde_sample_freq"):
        if model.policy_kwargs.get(name):
            raise ValueError(f"{name} is not supported: MBDPO explores with `exploration_noise` and `action_noise`.")


def _check_tasks(model: MBDPO) -> None:
    """Arguments of multi-task models, and those that do not go with them."""
    check_task_sampling(model.task_sampling)
    if model.tasks is None:
        if model.task_sampling != "proportional":
            raise ValueError('task_sampling="balanced" needs several tasks: pass `tasks` or a multi-task environment.')
        if model.normalize_observations:
            raise ValueError(
                "normalize_observations is for models of several tasks: wrap the environment in VecNormalize, or name "
                'the task, from_minari({"name": data set}).'
            )
        return
    if model.gamma is not None:
        raise ValueError(f"gamma={model.gamma:g} is for one task: here each has its own, pass Task(discount=...).")
    check_task_spaces(model.tasks, model.observation_space, model.action_space)
    buffer_class = model.replay_buffer_class
    multi = buffer_class is None or issubclass(buffer_class, MultiTaskReplayBuffer)
    if model.task_sampling == "balanced" and not multi:
        raise ValueError('task_sampling="balanced" needs a MultiTaskReplayBuffer: leave out replay_buffer_class.')
    if "task_sampling" in model.replay_buffer_kwargs:
        raise ValueError("replay_buffer_kwargs holds `task_sampling`, an argument of MBDPO itself: pass it to MBDPO.")


def check_spaces(observation_space: spaces.Space, action_space: spaces.Box) -> None:
    """
    Refuse spaces that only fail once something is learned from them.

    :param observation_space: Observation space, checked key by key if it is a Dict
    :param action_space: Action space
    :raises ValueError: naming the space and what to do
    """
    if 0 in action_space.shape:
        raise ValueError(f"There must be at least one action, got {action_space}: add an unused one in a wrapper.")
    with np.errstate(over="ignore"):
        width = action_space.high - action_space.low
    if not (np.isfinite(width) & (width > 0)).all():
        raise ValueError(
            f"Each action needs low < high with a finite high - low, got {action_space}: leave fixed actions out, or "
            "rescale the others, in a wrapper."
        )
    leaves = observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    if not leaves:
        raise ValueError(f"Dict observations need at least one key, got {observation_space}: add what is observed.")
    for space in leaves:
        if 0 in (space.shape or ()):
            raise ValueError(f"Observations need at least one entry, got {space}: leave it out, or add a constant.")
        if np.any(getattr(space, "start", 0)):
            raise ValueError(f"Discrete observations must start at 0, got {space}: subtract the start in a wrapper.")
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
            raise ValueError(f"MultiDiscrete observations must have one dimension, got {space}: flatten them.")
        if isinstance(space, spaces.Box) and space.shape == ():
            raise ValueError(f"Box observations need at least one dimension, got {space}: reshape them to (1,).")


def check_finite(observation: np.ndarray | dict[str, np.ndarray], reward: np.ndarray | None = None) -> None:
    """
    Refuse what would turn every weight into NaN; networks see it as float32.

    :param observation: Observations [n_envs, ...], or of one environment, or a dict of them
    :param reward: [n_envs]
    :raises ValueError: naming what is not finite, before it is stored
    """
    name = not_finite(observation=observation, reward=reward)
    if name is not None:
        raise ValueError(
            f"The environment returned a value that is not finite in its {name}; the step was not stored. Mend the "
            "environment (VecCheckNan tells which action led there)."
        )
