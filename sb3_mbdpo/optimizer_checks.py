"""Whether what a file says of an optimizer goes with it: its settings, and the state of each parameter.

What belongs to a parameter differs from one optimizer to the next. PyTorch's own are asked by a step on a parameter of
a few numbers, which also lets them refuse settings out of their range.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch as th
from torch import nn

TRIAL_SHAPE = (2, 3)
# How a step is computed, not what it is: some of it only goes with certain devices
HOW = ("capturable", "differentiable", "foreach", "fused")
# Counts, squares and largest values so far
NEVER_NEGATIVE = {"step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "mu_product"}


def checked_settings(group: Mapping[str, Any], written: Any) -> dict[str, Any]:
    """
    Settings of a group of parameters: numbers from the file, flags from the model, whose arguments decide them.

    :param group: The optimizer's own group, as ``state_dict`` has it
    :param written: What the file holds
    :return: The group
    :raises ValueError: for other settings, or numbers that are none
    """
    if written.keys() != group.keys() - {"params"}:
        raise ValueError(f"settings {sorted(written)}")
    settings: dict[str, Any] = {}
    for key, own in group.items():
        if key == "params" or not isinstance(own, (int, float, tuple)) or isinstance(own, bool):
            settings[key] = own
        elif isinstance(own, tuple):
            if not isinstance(written[key], list) or len(written[key]) != len(own):
                raise ValueError(f"{key} is {written[key]!r}")
            settings[key] = tuple(_number(key, number, part) for number, part in zip(written[key], own, strict=True))
        else:
            settings[key] = _number(key, written[key], own)
    if settings.get("lr_scale", 0.0) < 0:
        raise ValueError(f"lr_scale is {settings['lr_scale']!r}")
    return settings


def _number(key: str, value: Any, own: Any) -> int | float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}")
    return value if isinstance(own, int) else float(value)


def check_state(
    optimizer: th.optim.Optimizer, groups: Sequence[Mapping[str, Any]], state: Mapping[int, Mapping[str, Any]]
) -> None:
    """
    :param optimizer: Optimizer without a past
    :param groups: Settings of its groups, as :func:`checked_settings` gives them
    :param state: State from the file by parameter
    :raises ValueError: naming the parameter whose state is incomplete, of another type or shape, or not finite
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := sorted(state.keys() - set(range(len(parameters)))):
        raise ValueError(f"there is no parameter {unknown[0]}")
    for group in groups:
        example = state_after_a_step(optimizer, group)
        for index in group["params"]:
            entries = state.get(index, {})
            # Parameters that never had a gradient have no state, unless an optimizer begins with one
            if example is not None and (entries or optimizer.state.get(parameters[index])):
                _compare(index, entries, example, parameters[index])
            for key, value in entries.items():
                _check_values(f"{index}.{key}", key, value)


def state_after_a_step(optimizer: th.optim.Optimizer, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    :param optimizer: Which optimizer
    :param settings: Settings of one of its groups
    :return: State of a parameter of shape :data:`TRIAL_SHAPE`; None for classes that are not PyTorch's own
    :raises ValueError: for settings that it does not take
    """
    kind: Any = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return None
    known = inspect.signature(kind).parameters.keys() - {"params", *HOW}
    parameter = nn.Parameter(th.ones(TRIAL_SHAPE, device="cpu"))
    parameter.grad = th.ones_like(parameter)
    try:
        trial = kind([parameter], **{key: value for key, value in settings.items() if key in known})
        trial.step()
    except (RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not parameter.isfinite().all():
        raise ValueError("a step with its settings is not finite")
    return dict(trial.state[parameter])


def _compare(index: int, entries: Mapping[str, Any], example: Mapping[str, Any], parameter: th.Tensor) -> None:
    found, wanted = ({key for key, value in of.items() if value is not None} for of in (entries, example))
    if found != wanted:
        raise ValueError(f"of parameter {index} it holds {sorted(found)} instead of {sorted(wanted)}")
    for key in wanted:
        value, like = entries[key], example[key]
        if isinstance(like, th.Tensor):
            shape = parameter.shape if like.shape == TRIAL_SHAPE else like.shape
            if not isinstance(value, th.Tensor) or value.dtype != like.dtype or value.shape != shape:
                raise ValueError(f"{index}.{key} is no tensor of type {like.dtype} and shape {list(shape)}")
        elif isinstance(value, (bool, th.Tensor)):
            raise ValueError(f"{index}.{key} is no number")


def _check_values(name: str, key: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    numbers = value if isinstance(value, th.Tensor) else th.tensor(float(value), dtype=th.float64)
    if not numbers.isfinite().all():
        raise ValueError(f"{name} is not finite")
    if key in NEVER_NEGATIVE and (numbers < 0).any():
        raise ValueError(f"{name} is negative")
