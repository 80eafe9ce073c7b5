"""``optimizer.safetensors``: what a continued training needs besides the weights."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_mbdpo.checkpoint_config import OPTIMIZER, CheckpointConfig
from sb3_mbdpo.checkpoint_weights import (
    LEAVE_OUT,
    check_mark,
    optimizer_tensors,
    plain_metadata,
    read_header,
    read_tensors,
    restore_optimizer,
)
from sb3_mbdpo.optimizers import set_encoder_lr_scale

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

OPTIMIZERS = ("policy.optimizer", "policy.prior_optimizer", "policy.score_optimizer")


def training_state(model: MBDPO) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """Optimizers, random generators and latest episodes: what a continued training needs besides the weights."""
    random = model._current_random_state()
    tensors: dict[str, th.Tensor] = {"policy_generator": th.from_numpy(random["policy"])}
    plain: dict[str, Any] = {
        "seed": random["seed"],
        "device": random["device"],
        "action_space": json.loads(json.dumps(random["action_space"])),
        "noise": None,
        "episodes": [[float(info[key]) for key in ("r", "l", "t")] for info in model.ep_info_buffer or ()],
        "task_returns": model._task_returns,
        "optimizers": {},
    }
    if random["noise"] is not None:
        name, keys, *rest = random["noise"]
        plain["noise"] = [name, keys.tolist(), *rest]
    for name in OPTIMIZERS:
        optimizer = getattr(model.policy, name.removeprefix("policy."))
        if optimizer is not None:
            state, plain["optimizers"][name] = optimizer_tensors(name, optimizer)
            tensors |= state
    return tensors, plain


def read_training_state(
    path: Path, config: CheckpointConfig, weights: Mapping[str, Any], model: MBDPO
) -> tuple[dict[str, th.Tensor], dict[str, Any]] | None:
    """What was saved of optimizers and generators; the action space's generator is put where setting up looks."""
    if not (path / OPTIMIZER).is_file():
        return None
    infos, metadata = read_header(path / OPTIMIZER)
    check_mark(OPTIMIZER, metadata, config.fingerprint)
    plain = plain_metadata(path / OPTIMIZER, metadata, "state")
    # Adam keeps two numbers for each weight, no optimizer more than four
    numbers = sum(int(np.prod(info.shape, dtype=np.float64)) for info in weights.values())
    tensors = read_tensors(path / OPTIMIZER, infos, 16 * numbers + 10**7)
    generator = tensors.pop("policy_generator", None)
    try:
        if generator is None or generator.dtype != th.uint8 or plain["device"] not in ("cpu", "cuda", "mps"):
            raise ValueError("no state of the policy's generator")
        if plain["device"] == model.device.type:
            th.Generator(model.device).set_state(generator)
        if plain["seed"] is not None and type(plain["seed"]) is not int:
            raise ValueError(f"the seed is {plain['seed']!r}")
        np.random.PCG64().state = plain["action_space"]
        model._random_state = {
            "seed": plain["seed"],
            "device": plain["device"],
            "policy": generator.numpy(),
            "action_space": plain["action_space"],
            # Files of before have none
            "noise": _checked_noise(plain.get("noise")),
        }
        episodes = [(float(r), int(length), float(t)) for r, length, t in plain["episodes"]]
        returns = {str(name): [float(r) for r in rs] for name, rs in plain["task_returns"].items()}
        return tensors, {"episodes": episodes, "task_returns": returns, "optimizers": dict(plain["optimizers"])}
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{OPTIMIZER} cannot be read ({error}): {LEAVE_OUT}.") from error


def _checked_noise(written: Any) -> tuple[Any, ...] | None:
    """State of NumPy's global generator, as ``numpy.random.set_state`` takes it."""
    if written is None:
        return None
    name, keys, position, has_gauss, cached = written
    state = name, np.array(keys, np.uint32), position, has_gauss, float(cached)
    np.random.RandomState().set_state(state)
    # Of which NumPy takes any
    if not 0 <= position <= len(state[1]) or has_gauss not in (0, 1) or not math.isfinite(state[4]):
        raise ValueError(f"the noise's generator is at {position!r}, {has_gauss!r}, {cached!r}")
    return state


def restore_training(model: MBDPO, tensors: dict[str, th.Tensor], plain: dict[str, Any]) -> None:
    """
    Give a model what :func:`read_training_state` found.

    :param model: Model that is set up
    :param tensors: Tensors of the optimizers
    :param plain: What is no tensor
    :raises ValueError: if it belongs to other optimizers
    """
    expected = {name for name in OPTIMIZERS if getattr(model.policy, name.removeprefix("policy.")) is not None}
    unknown = sorted(name for name in tensors if not name.startswith(tuple(f"{known}." for known in expected)))
    if plain["optimizers"].keys() != expected or unknown:
        raise ValueError(
            f"{OPTIMIZER} holds {sorted(plain['optimizers'])} {unknown[:3]}, the model has {sorted(expected)}: "
            f"{LEAVE_OUT}."
        )
    for name in expected:
        optimizer = getattr(model.policy, name.removeprefix("policy."))
        restore_optimizer(name, optimizer, tensors, plain["optimizers"][name])
    # An argument, which may have been given another value
    set_encoder_lr_scale(model.policy.optimizer, model.encoder_lr_scale)
    model._task_returns = plain["task_returns"]
    model.ep_info_buffer = None
    if plain["episodes"]:
        infos = [{"r": r, "l": length, "t": t} for r, length, t in plain["episodes"]]
        model.ep_info_buffer = deque(infos, maxlen=model._stats_window_size)
        model.ep_success_buffer = deque(maxlen=model._stats_window_size)
