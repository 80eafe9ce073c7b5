"""Whether parameters are a model's own: names, shapes, and groups of optimizers, compared before anything is loaded."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.save_util import recursive_getattr

if TYPE_CHECKING:
    from sb3_mbdpo.resuming import ResumableAlgorithm

SHOWN = 3


class ParameterMismatchError(ValueError, RuntimeError):
    """Parameters of another model; PyTorch, and with it Stable-Baselines3, has a RuntimeError for them."""


def check_parameters(model: "ResumableAlgorithm", params: Mapping[str, Any], exact_match: bool) -> None:
    """
    :param model: Algorithm
    :param params: What its ``get_parameters`` gives, or part of it
    :param exact_match: Whether everything the model has must be there
    :raises ValueError: naming what belongs to another model; a :class:`ParameterMismatchError` where its tensors do
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
        apart: list[str] = []
        if isinstance(own, th.optim.Optimizer):
            differing = _differing_state(found, own)
        else:
            differing, apart = _differing(found, own.state_dict())
        if differing:
            raise ParameterMismatchError(
                "These parameters belong to a model of other sizes: horizon, model_size, policy_kwargs and spaces must "
                f"be those that it was saved with. What differs in {name}: {_listed(differing)}."
            )
        if apart and exact_match:
            raise ParameterMismatchError(
                f"{name} of the model and these parameters do not have the same tensors: {_listed(apart)}. Pass those "
                "of a model with the same arguments, or exact_match=False to take the tensors that both have."
            )


def _part(model: "ResumableAlgorithm", name: str) -> Any:
    try:
        return recursive_getattr(model, name)
    except AttributeError:
        return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _differing(found: Mapping[str, th.Tensor], own: Mapping[str, th.Tensor]) -> tuple[list[str], list[str]]:
    """Tensors that have another shape, and those that one side lacks."""
    shaped = sorted(name for name in found.keys() & own.keys() if found[name].shape != own[name].shape)
    missing = [f"{name} is missing" for name in sorted(own.keys() - found.keys())]
    unknown = [f"{name} is not the model's" for name in sorted(found.keys() - own.keys())]
    return shaped, missing + unknown


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
