"""``config.json``: everything about a checkpoint but its numbers, as plain JSON that is read without running any code.

Classes are written by the names of a fixed list. A class of the user's own is written as a note of its name, and is
only ever taken from what the user passes: no name in a file is imported.
"""

from __future__ import annotations

import inspect
import math
import typing
import warnings
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union

import numpy as np
import torch as th
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from sb3_mbdpo.activations import Mish
from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer

# Not written: the environment comes from whoever loads, these three belong to the machine
MACHINE_ARGUMENTS = ("device", "compile", "tensorboard_log")
OTHER_ARGUMENTS = ("self", "policy", "env", "tasks", "_init_setup_model")

ACTIVATIONS = (
    "CELU",
    "ELU",
    "GELU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
)
OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
# What a class may be called in a file; ours differs from PyTorch's Mish in its rounding
CLASSES: dict[str, type] = (
    {name: getattr(nn, name) for name in ACTIVATIONS}
    | {name: getattr(th.optim, name) for name in OPTIMIZERS}
    | {"FastMish": Mish}
    | {
        cls.__name__: cls
        for cls in (
            CombinedExtractor,
            DictSequenceReplayBuffer,
            FlattenExtractor,
            MultiTaskReplayBuffer,
            NatureCNN,
            SequenceReplayBuffer,
        )
    }
)
NAMES = {cls: name for name, cls in CLASSES.items()}
# The largest value that each of these may have in a file, so that no file asks for a machine's whole memory
LIMITS = {
    "buffer_size": 10**9,
    "batch_size": 10**6,
    "horizon": 10**3,
    "denoising_steps": 10**4,
    "n_samples": 10**6,
    "score_batch_size": 10**6,
    "score_samples": 10**5,
    "stats_window_size": 10**7,
    "warmup_updates": 10**9,
}
# Whole numbers within policy_kwargs (widths, numbers of layers), and the length of a list of them
LARGEST_WIDTH, MOST_LAYERS = 10**6, 64
MARK = "$"


# --- writing ----------------------------------------------------------------------------------------------------------


def encode(value: Any, where: str) -> Any:
    """
    A value as JSON.

    >>> encode({"activation_fn": nn.SiLU, "betas": (0.9, 0.99)}, "policy_kwargs")
    {'activation_fn': {'$class': 'SiLU'}, 'betas': {'$tuple': [0.9, 0.99]}}

    :param value: Numbers, strings, lists, tuples, dicts, classes, schedules and action noise
    :param where: Name of the argument, for the error
    :return: What ``json.dump`` takes
    :raises ValueError: for anything else
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, TrainFreq):
        return [value.frequency, value.unit.value]
    if isinstance(value, (list, tuple)):
        items = [encode(item, where) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        if not all(isinstance(key, str) and not key.startswith(MARK) for key in value):
            raise ValueError(f"{where} holds a dict whose keys are not plain names, which a checkpoint cannot hold.")
        return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, type):
        return {"$class": NAMES[value]} if value in NAMES else {"$custom": value.__name__}
    if isinstance(value, ActionNoise):
        return encode_noise(value)
    raise ValueError(
        f"{where} holds a {type(value).__name__}, which cannot be written as JSON: pass names and numbers instead, or "
        "keep the model with save()."
    )


def encode_noise(noise: ActionNoise) -> dict[str, Any]:
    """
    :param noise: Action noise; that of several environments is described by the noise that each has a copy of
    :return: Its name and parameters, or the name alone for a class of the user's own
    """
    if isinstance(noise, VectorizedActionNoise):
        noise = noise.base_noise
    kind = type(noise)
    if kind is NormalActionNoise or kind is OrnsteinUhlenbeckActionNoise:
        names = ["_mu", "_sigma"] + ([] if kind is NormalActionNoise else ["_theta", "_dt"])
        numbers = {name.strip("_"): np.asarray(getattr(noise, name), np.float64).tolist() for name in names}
        dtype = np.dtype(getattr(noise, "_dtype")).name  # noqa: B009 (no attribute of the base class)
        return {"$noise": kind.__name__, **numbers, "dtype": dtype}
    return {"$custom": kind.__name__}


def encode_schedule(learning_rate: Any, present: float) -> Any:
    """
    A learning rate: a number, or a schedule that Stable-Baselines3 describes.

    Any other function of the progress cannot be written; what it gives at present is written instead, with a warning.

    :param learning_rate: Number or schedule
    :param present: What it gives at present
    :return: JSON
    """
    while isinstance(learning_rate, FloatSchedule):
        learning_rate = learning_rate.value_schedule
    if isinstance(learning_rate, ConstantSchedule):
        learning_rate = learning_rate.val
    if isinstance(learning_rate, (int, float)):
        return float(learning_rate)
    if isinstance(learning_rate, LinearSchedule):
        fields = {name: float(getattr(learning_rate, name)) for name in ("start", "end", "end_fraction")}
        return {"$schedule": "LinearSchedule", **fields}
    warnings.warn(
        f"A learning-rate schedule of your own cannot be written to a checkpoint: {present:g}, its present value, is "
        "stored instead. Pass learning_rate=... when you load, or use Stable-Baselines3's LinearSchedule.",
        stacklevel=2,
    )
    return present


def argument_names(algorithm: type) -> list[str]:
    """
    :param algorithm: Algorithm class
    :return: Constructor arguments that a checkpoint holds
    """
    names = inspect.signature(algorithm.__init__).parameters  # type: ignore[misc]
    return [name for name in names if name not in (*MACHINE_ARGUMENTS, *OTHER_ARGUMENTS)]


# --- reading ----------------------------------------------------------------------------------------------------------


def decode(value: Any, custom: Mapping[str, Any], where: str) -> Any:
    """
    The value that :func:`encode` wrote.

    :param value: JSON
    :param custom: The user's own classes and objects by name
    :param where: Name of the argument, for the error
    :return: The value
    :raises ValueError: for a class that is not on the list and was not passed, or something that is no value
    """
    if isinstance(value, list):
        return [decode(item, custom, where) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next((key for key in value if key.startswith(MARK)), None)
    if mark is None:
        return {key: decode(item, custom, f"{where}[{key!r}]") for key, item in value.items()}
    content = value[mark]
    if mark == "$custom" and isinstance(content, str):
        if content in custom:
            return custom[content]
        raise ValueError(
            f"{where} is {content!r}, a class that is not part of this package: nothing is imported by a name in a "
            f"file. Import it yourself and pass custom_objects={{{content!r}: ...}}."
        )
    if mark == "$class" and isinstance(content, str):
        if content in CLASSES:
            return CLASSES[content]
        raise ValueError(f"{where} names the class {content!r}, which is none of {sorted(CLASSES)}.")
    if mark == "$tuple" and isinstance(content, list):
        return tuple(decode(item, custom, where) for item in content)
    if mark == "$float" and content in ("inf", "-inf", "nan"):
        return float(content)
    try:
        if mark == "$schedule" and content == "LinearSchedule":
            return LinearSchedule(*(float(value[name]) for name in ("start", "end", "end_fraction")))
        if mark == "$noise":
            return _decode_noise(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no schedule or noise that can be read: {value!r}.") from error
    raise ValueError(f"{where} holds {value!r}, which means nothing in a checkpoint of this version.")


def _decode_noise(value: dict[str, Any]) -> ActionNoise:
    if value["dtype"] not in ("float32", "float64"):
        raise ValueError("noise is made of floats")
    mean, sigma = (np.asarray(value[name], np.float64) for name in ("mu", "sigma"))
    dtype = np.dtype(value["dtype"]).type
    if value["$noise"] == "NormalActionNoise":
        return NormalActionNoise(mean, sigma, dtype)
    if value["$noise"] == "OrnsteinUhlenbeckActionNoise":
        return OrnsteinUhlenbeckActionNoise(mean, sigma, float(value["theta"]), float(value["dt"]), None, dtype)
    raise ValueError(f"unknown noise {value['$noise']!r}")


def decode_arguments(algorithm: type, written: Any, custom: Mapping[str, Any]) -> dict[str, Any]:
    """
    Constructor arguments of a checkpoint, checked for type and size.

    :param algorithm: Algorithm class
    :param written: What the file holds
    :param custom: The user's own classes and objects by name
    :return: Keyword arguments
    :raises ValueError: naming the argument that cannot be taken
    """
    if not isinstance(written, dict):
        raise ValueError(f'"arguments" must be an object of constructor arguments, got {type(written).__name__}.')
    unknown = sorted(written.keys() - set(argument_names(algorithm)))
    if unknown:
        raise ValueError(
            f"{algorithm.__name__} has no arguments {unknown}: the file is damaged, or of a later version."
        )
    parameters = inspect.signature(algorithm.__init__).parameters  # type: ignore[misc]
    arguments = {}
    for name, value in written.items():
        _check_size(name, value)
        arguments[name] = decode(value, custom, name)
        annotation = parameters[name].annotation
        if not _matches(arguments[name], annotation):
            wanted = getattr(annotation, "__name__", None) or str(annotation)
            raise ValueError(f"{name} must be {wanted}, the file holds {value!r}.")
        arguments[name] = _as_real(name, arguments[name], annotation)
    if isinstance(arguments.get("train_freq"), list):
        arguments["train_freq"] = tuple(arguments["train_freq"])
    return arguments


def _as_real(name: str, value: Any, annotation: Any) -> Any:
    """A whole number as a float where a real one is asked for: PyTorch takes no integers of more than 64 bits."""
    kinds = typing.get_args(annotation) or (annotation,)
    # A size is the key of a table, and is shown as it is written there
    if not isinstance(value, int) or isinstance(value, bool) or name == "model_size":
        return value
    if int in kinds or float not in kinds:
        return value
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} in the file is absurd: no number of {len(str(value))} digits is taken.") from error


def _check_size(name: str, value: Any) -> None:
    limit = LIMITS.get(name)
    if limit is not None and isinstance(value, (int, float)) and value > limit:
        raise ValueError(f"{name}={value} in the file is absurd, at most {limit:,} is taken: nothing was built.")
    if name in ("policy_kwargs", "replay_buffer_kwargs"):
        _check_widths(name, value)


def _check_widths(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_widths(f"{name}[{key!r}]", item)
    elif isinstance(value, list):
        if len(value) > MOST_LAYERS:
            raise ValueError(f"{name} lists {len(value)} entries, at most {MOST_LAYERS} are taken: nothing was built.")
        for item in value:
            _check_widths(name, item)
    elif isinstance(value, (int, float)):
        limit = MOST_LAYERS if "num_enc_layers" in name else LARGEST_WIDTH
        if abs(value) > limit:
            raise ValueError(f"{name}={value} in the file is absurd, at most {limit:,} is taken: nothing was built.")


def _matches(value: Any, annotation: Any) -> bool:
    """Whether a value has the type that an argument asks for; types that JSON does not know are taken as they are."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return any(_matches(value, part) for part in typing.get_args(annotation))
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    if annotation in (bool, str, NoneType):
        return isinstance(value, annotation)
    if typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(parts)
            and all(_matches(item, part) for item, part in zip(value, parts, strict=True))
        )
    if typing.get_origin(annotation) is dict:
        return isinstance(value, dict)
    # Schedules, noise and classes: what has been decoded to an object
    return not isinstance(value, (bool, int, float, str, list, tuple, dict, NoneType))
