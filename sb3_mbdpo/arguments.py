"""Constructor arguments: filling those left at None, and refusing what cannot work before any work is done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer
from sb3_mbdpo.policies import check_act_mode
from sb3_mbdpo.presets import discount_for, episode_length_of, learning_starts_for, resolve_preset
from sb3_mbdpo.updates import BOOTSTRAPS

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# Argument, smallest and largest value; the search checks its own (see SearchConfig)
RANGES = (
    ("batch_size", 1, math.inf),
    ("score_batch_size", 1, math.inf),
    ("score_samples", 2, math.inf),
    ("score_interval", 1, math.inf),
    ("target_horizon", 0, math.inf),
    ("warmup_updates", 0, math.inf),
    ("exploration_noise", 0, math.inf),
    ("max_grad_norm", 0, math.inf),
    ("gamma", 0, 1),
    ("tau", 0, 1),
    ("rho", 0, 1),
    ("saturation_coef", 0, math.inf),
)


def resolve_defaults(model: MBDPO) -> None:
    """
    Fill arguments left at None; those that are set stay, so that this can run again after loading.

    :param model: Algorithm, changed in place
    :raises ValueError: for a number out of its range
    """
    resolved, values = resolve_preset(model.preset, model.device)
    unset = [name for name in values if getattr(model, name) is None]
    for name in unset:
        setattr(model, name, values[name])
    if "bootstrap" in unset and model.score_coef <= 0:
        model.bootstrap = "prior"
    # Elites and prior rollouts that nobody set keep their share of the candidates that somebody did set
    share = model.n_samples / values["n_samples"]
    for name, least in (("n_elites", 1), ("n_prior_trajectories", 0)):
        if name in unset:
            setattr(model, name, max(int(values[name] * share), least))
    if model.verbose >= 1 and unset:
        print(f'Using the "{resolved}" preset (model_size={model.model_size}, n_samples={model.n_samples})')
    if model.gamma is None or model.learning_starts is None:
        _apply_episode_rules(model)
    if model.warmup_updates is None:
        model.warmup_updates = 0
    for name, least, most in RANGES:
        if not least <= getattr(model, name) <= most:
            raise ValueError(f"{name} must lie between {least:g} and {most:g}, got {getattr(model, name)}.")


def _apply_episode_rules(model: MBDPO) -> None:
    length = None if model.env is None else episode_length_of(model.env)
    if model.learning_starts is None:
        model.learning_starts = learning_starts_for(length)
        if model.warmup_updates is None:
            model.warmup_updates = model.learning_starts
    if model.gamma is None:
        model.gamma = discount_for(length)
    if model.verbose >= 1:
        known = "of unknown length" if length is None else f"of at most {length} steps"
        print(f"Episodes {known}: gamma={model.gamma:g}, learning_starts={model.learning_starts}")


def check_arguments(model: MBDPO) -> None:
    """
    Refuse combinations that cannot work.

    :param model: Algorithm whose defaults are filled in
    :raises ValueError: naming the argument and what to do instead
    """
    check_act_mode(model.act_mode, model.score_coef > 0)
    if model.bootstrap not in BOOTSTRAPS:
        raise ValueError(f'bootstrap must be "prior" or "score", got {model.bootstrap!r}.')
    if model.bootstrap == "score" and model.score_coef <= 0:
        raise ValueError('bootstrap="score" needs a trained score network: pass score_coef > 0.')
    dtype = model.action_space.dtype
    if not np.issubdtype(dtype, np.floating):
        raise ValueError(f"The action space must be a Box of floats, got {dtype}: wrap the environment to round.")
    if "horizon" in model.replay_buffer_kwargs and model.replay_buffer_kwargs["horizon"] != model.horizon:
        raise ValueError("replay_buffer_kwargs holds `horizon`, an argument of MBDPO itself: pass it to MBDPO.")
    clashing = sorted(model.policy_arguments().keys() & model.policy_kwargs.keys())
    if clashing:
        raise ValueError(f"policy_kwargs holds arguments of MBDPO itself: {clashing}; pass them to MBDPO.")
    if model.n_steps != 1:
        raise ValueError(f"n_steps must be 1, got {model.n_steps}: use `horizon` for longer lookahead.")
    buffer_class = model.replay_buffer_class
    if buffer_class is not None and not issubclass(buffer_class, (SequenceReplayBuffer, DictSequenceReplayBuffer)):
        raise ValueError(
            f"replay_buffer_class must sample sequences, {buffer_class.__name__} does not (nor do hindsight "
            "and n-step buffers): leave it out, or derive from SequenceReplayBuffer or DictSequenceReplayBuffer."
        )
    for name in ("use_sde", "sde_sample_freq"):
        if model.policy_kwargs.get(name):
            raise ValueError(f"{name} is not supported: MBDPO explores with `exploration_noise` and `action_noise`.")
