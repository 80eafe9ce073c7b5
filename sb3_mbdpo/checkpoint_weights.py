"""The numbers of a checkpoint, as safetensors: read one by one into a model that is there, checked before it is built.

Names, types and shapes stand in a file's header. They are compared with those that ``config.json`` implies, found by
building the policy without memory (PyTorch's meta device), so that a file that does not fit is refused before anything
is allocated.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch as th
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from sb3_mbdpo.optimizer_checks import check_state, checked_settings
from sb3_mbdpo.policies import MBDPOPolicy

# Advice where the optimizers' file cannot be used
LEAVE_OUT = 'remove the file, and its name from "files" in config.json, to load without it'
SHOWN = 6
MOST_MAPPED_BYTES = 200_000_000
# In-place functions by which weights get their first values
FIRST_VALUES = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_"}
DRAWN_VALUES = {"uniform_", "normal_"}


class TensorInfo(NamedTuple):
    """Type and shape of a tensor in a file, ``dtype`` in the format's own words (F32, I64, ...)."""

    dtype: str
    shape: tuple[int, ...]


DTYPES = {th.float32: "F32", th.float64: "F64", th.int64: "I64", th.uint8: "U8", th.bool: "BOOL", th.float16: "F16"}


class NoInitialization(TorchFunctionMode):
    """Within it parameters are zero or left as memory happens to be, and no random number is drawn for them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every function of PyTorch comes through here."""
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        first_value = getattr(func, "__module__", "") == "torch.nn.init" or func.__name__ in FIRST_VALUES
        if first_value and isinstance(target, nn.Parameter) and not target.is_meta:
            # Some draw again until all are within bounds
            if func.__name__ in DRAWN_VALUES:
                target.detach().zero_()
            return target
        return func(*args, **kwargs)


def fingerprint(tensors: Mapping[str, th.Tensor]) -> str:
    """
    What tells one set of weights from another: files of one checkpoint carry the same.

    :param tensors: Tensors in main memory, contiguous
    :return: Hexadecimal digits
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        if tensors[name].numel():
            digest.update(memoryview(cast(Any, tensors[name].numpy())).cast("B"))
    return digest.hexdigest()[:32]


def write_tensors(path: Path, tensors: Mapping[str, th.Tensor], metadata: dict[str, str]) -> None:
    """
    :param path: File to write
    :param tensors: Tensors; those elsewhere are brought to main memory
    :param metadata: Strings that stand in the header
    :raises OSError: if it cannot be written
    """
    try:
        save_file(in_memory(tensors), path, {"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error


def in_memory(tensors: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
    """
    :param tensors: Tensors
    :return: The same in main memory and contiguous, copied only where they are not
    """
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """
    :param path: A safetensors file
    :return: type and shape of each tensor, and the strings of the header; no tensor is read
    :raises ValueError: if it is no whole safetensors file
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            infos = {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            return infos, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path.name} is damaged or cut short, or no safetensors file ({error}).") from error


def check_mark(name: str, metadata: Mapping[str, str], mark: str) -> None:
    """
    :param name: Name of a file
    :param metadata: Strings of its header
    :param mark: Fingerprint of the checkpoint that it should belong to
    :raises ValueError: if it belongs to another
    """
    if metadata.get("fingerprint") != mark:
        raise ValueError(
            f"{name} and config.json do not belong together: files of two checkpoints are mixed, or saving was cut "
            "short. Save or download the checkpoint again."
        )


def implied_shapes(
    policy_class: type[MBDPOPolicy],
    observation_space: spaces.Space,
    action_space: spaces.Box,
    policy_arguments: dict[str, Any],
) -> dict[str, TensorInfo]:
    """
    Tensors of a policy, found without allocating them.

    :param policy_class: Policy class
    :param observation_space: Observation space
    :param action_space: Action space
    :param policy_arguments: Arguments of the policy
    :return: Type and shape of each tensor
    :raises ValueError: if no policy can be built from these arguments
    """
    # Optimizers and generators are of no use for shapes, and do not exist on the meta device
    overrides = {"rebuild_optimizers": lambda *_: None, "seed": lambda *_: None, "__module__": __name__}
    shapes_only = type(policy_class.__name__, (policy_class,), overrides)
    try:
        with th.device("meta"):
            policy = shapes_only(observation_space, action_space, lambda _: 0.0, **policy_arguments)
    except (TypeError, RuntimeError, OverflowError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"No policy can be built from the arguments in the file: {error}") from error
    return infos_of(policy.state_dict())


def infos_of(tensors: Mapping[str, th.Tensor]) -> dict[str, TensorInfo]:
    """
    :param tensors: Tensors
    :return: Type and shape of each
    """
    return {name: TensorInfo(DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def compare(file_name: str, found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]) -> None:
    """
    :param file_name: Name of the file, for the error
    :param found: Tensors in the file
    :param expected: Tensors that there should be
    :raises ValueError: naming those that are missing, too many, or of another type or shape
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} is {found[name].dtype}{list(found[name].shape)} instead of {info.dtype}{list(info.shape)}"
        for name, info in expected.items()
        if name in found and found[name] != info
    ]
    if missing or extra or wrong:
        raise ValueError(
            f"{file_name} does not hold the model that config.json describes, nothing was loaded. "
            f"Missing: {_some(missing)}; too many: {_some(extra)}; of another shape: {_some(wrong)}."
        )


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


@th.no_grad()
def read_into(path: Path, module: nn.Module) -> None:
    """
    Fill a module's tensors from a file, one at a time.

    The file is opened anew every few hundred megabytes: its pages stay in memory as long as it is open.

    :param path: A safetensors file whose header has been compared
    :param module: Module, on any device
    :raises ValueError: if the file is damaged, holds numbers that are not finite, or is replaced meanwhile
    """
    tensors, mark = dict(module.state_dict()), read_header(path)[1]
    try:
        while tensors:
            with safe_open(path, "pt") as file:
                if dict(file.metadata() or {}) != mark:
                    raise ValueError(f"{path.name} was replaced while it was read: load it again.")
                size = 0
                while tensors and size < MOST_MAPPED_BYTES:
                    name = next(iter(tensors))
                    tensor, found = tensors.pop(name), file.get_tensor(name)
                    if not found.isfinite().all():
                        raise ValueError(
                            f"{path.name} holds numbers that are not finite in {name}: it is damaged, or of a training "
                            "that diverged. Save or download the checkpoint again."
                        )
                    tensor.copy_(found)
                    size += tensor.numel() * tensor.element_size()
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error}).") from error


# --- optimizers -------------------------------------------------------------------------------------------------------


def optimizer_tensors(name: str, optimizer: th.optim.Optimizer) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """
    :param name: Name of the optimizer
    :param optimizer: Optimizer
    :return: its state by name, and its groups' settings as plain data
    :raises ValueError: for a state that is not made of tensors and numbers
    """
    state = optimizer.state_dict()
    tensors: dict[str, th.Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, th.Tensor):
                tensors[f"{name}.{index}.{key}"] = value
            elif value is None or isinstance(value, (bool, int, float)):
                numbers[f"{index}.{key}"] = value
            else:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state, which a checkpoint "
                    "cannot hold: save without include_optimizer, or keep the model with save()."
                )
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def restore_optimizer(name: str, optimizer: th.optim.Optimizer, tensors: Mapping[str, th.Tensor], plain: Any) -> None:
    """
    Give an optimizer the state that :func:`optimizer_tensors` took.

    :param name: Name of the optimizer
    :param optimizer: Optimizer without a past, changed in place
    :param tensors: Tensors of the file
    :param plain: Settings of the groups and numbers of the state
    :raises ValueError: if the state belongs to other parameters, or no step can be made from it
    """
    present = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        state = _read_state(name, parameters, tensors, plain["numbers"])
        groups = [
            checked_settings(group, written)
            for group, written in zip(present["param_groups"], plain["groups"], strict=True)
        ]
        check_state(optimizer, groups, state)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"optimizer.safetensors does not hold the state of this model's {name} ({error}): {LEAVE_OUT}."
        ) from error


def _read_state(
    name: str, parameters: list[th.Tensor], tensors: Mapping[str, th.Tensor], numbers: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """State by parameter, each tensor of a shape that some optimizer could have for it."""
    state: dict[int, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        if not full_name.startswith(f"{name}."):
            continue
        index, key = full_name[len(name) + 1 :].split(".", 1)
        if tensor.shape not in (th.Size(()), th.Size((1,)), parameters[int(index)].shape):
            raise ValueError(f"{full_name} has shape {list(tensor.shape)}")
        state.setdefault(int(index), {})[key] = tensor
    for full_name, number in numbers.items():
        index, key = full_name.split(".", 1)
        if not (number is None or isinstance(number, (bool, int, float))):
            raise ValueError(f"{full_name} is no number")
        state.setdefault(int(index), {})[key] = number
    return state


def read_tensors(path: Path, infos: Mapping[str, TensorInfo], most_bytes: int) -> dict[str, th.Tensor]:
    """
    All tensors of a file whose names are not known before.

    :param path: A safetensors file
    :param infos: Its header
    :param most_bytes: What is taken at most
    :return: Tensors
    :raises ValueError: if the file is larger
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes where {most_bytes:,} are plenty: not read.")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in infos}


def plain_metadata(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    """
    :param path: File, for the error
    :param metadata: Strings of its header
    :param key: Which of them
    :return: The data that it holds as JSON
    :raises ValueError: if it is missing or no JSON
    """
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} has no readable {key!r} in its header: save the checkpoint again.") from error
