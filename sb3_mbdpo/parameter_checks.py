"""Whether parameters are a model's own: names, shapes, and groups of optimizers, compared before anything is loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.save_util import recursive_getattr

if TYPE_CHECKING:
    from sb3_mbdpo.resuming import ResumableAlgorithm

SHOWN = 3


def check_parameters(model: "ResumableAlgorithm", params: Mapping[str, Any], exact_match: bool) -> None:
    """
    :param model: Algorithm
    :param params: What its ``get_parameters`` gives, or part of it
    :param exact_match: Whether everything the model has must be there
    :raises ValueError: naming what belongs to another model
    """
    names = set(model._get_torch_save_params()[0])
    if unknown := sorted(name for name in params if _part(model, name) is None):
        raise ValueError(f"{unknown} are invalid object names: the model has {sorted(names)}.")
    if exact_match and params.keys() != names:
        raise ValueError(
            f"Names of parameters do not match the model's, expected {sorted(names)}, got {sorted(params)}: pass all "
            "of them, or exact_match=False."
        )
    for name, found in params.items():
        own = _part(model, name)
        if isinstance(own, th.optim.Optimizer):
            differing = _differing_state(found, own)
        else:
            differing = _differing(found, own.state_dict(), exact_match)
        if differing:
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            raise ValueError(
                "These parameters belong to a model of other sizes: horizon, model_size, policy_kwargs and spaces must "
                f"be those that it was saved with. What differs in {name}: {', '.join(differing[:SHOWN])}{more}."
            )


def _part(model: "ResumableAlgorithm", name: str) -> Any:
    try:
        return recursive_getattr(model, name)
    except AttributeError:
        return None


def _differing(found: Mapping[str, th.Tensor], own: Mapping[str, th.Tensor], exact_match: bool) -> list[str]:
    """Names of tensors that one side lacks, where that matters, or that have another shape."""
    both = found.keys() & own.keys()
    apart = found.keys() ^ own.keys() if exact_match else set()
    return sorted(apart | {name for name in both if found[name].shape != own[name].shape})


def _differing_state(found: Mapping[str, Any], own: th.optim.Optimizer) -> list[str]:
    """Groups of other sizes, or state of parameters of another shape, which PyTorch would take."""
    sizes = [len(group["params"]) for group in found["param_groups"]]
    wanted = [len(group["params"]) for group in own.param_groups]
    if sizes != wanted:
        return [f"groups of {sizes} parameters instead of {wanted}"]
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    return [
        f"{index}.{key}"
        for index, entries in found["state"].items()
        for key, value in entries.items()
        if isinstance(value, th.Tensor) and value.shape not in (th.Size(()), th.Size((1,)), parameters[index].shape)
    ]
