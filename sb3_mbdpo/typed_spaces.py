"""Spaces as plain JSON: every kind names its type and fields, so that reading one back never runs code."""

import math
from typing import Any, cast

import numpy as np
from gymnasium import spaces

# Types of entries, and the most entries that a described space may have: a few words must not ask for gigabytes
DTYPES = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
MOST_ENTRIES = 10**7
# What fields of a space may be called, by type
FIELDS = {
    "Box": {"dtype", "shape", "low", "high"},
    "Discrete": {"n", "start"},
    "MultiDiscrete": {"nvec"},
    "MultiBinary": {"n"},
    "Dict": {"spaces"},
}


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """
    Describe a space.

    :param space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of them
    :return: What ``json.dump`` takes; infinite bounds are the strings "inf" and "-inf"
    :raises ValueError: for another kind of space

    >>> space_to_json(spaces.Box(-1.0, 1.0, (2,), np.float32))
    {'type': 'Box', 'dtype': 'float32', 'shape': [2], 'low': -1.0, 'high': 1.0}
    """
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound_to_json(space.low), "high": _bound_to_json(space.high)}
        return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: space_to_json(value) for key, value in space.items()}}
    raise ValueError(
        f"A {type(space).__name__} space cannot be described: use Box, Discrete, MultiDiscrete, MultiBinary or a Dict."
    )


def space_from_json(description: Any) -> spaces.Space:
    """
    Build the space that :func:`space_to_json` described.

    :param description: What ``json.load`` gave
    :return: The space
    :raises ValueError: if this is no description of a space

    >>> space_from_json({"type": "Discrete", "n": 3, "start": 0})
    Discrete(3)
    """
    kind = _kind_of(description)
    _check_fields(kind, description)
    if kind == "Box":
        dtype, shape = np.dtype(description["dtype"]), tuple(description["shape"])
        low, high = (_bound_from_json(description[name], shape, dtype) for name in ("low", "high"))
        return spaces.Box(low, high, shape, cast(Any, dtype.type))
    if kind == "Discrete":
        return spaces.Discrete(description["n"], start=description["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(description["nvec"]))
    if kind == "MultiBinary":
        return spaces.MultiBinary(description["n"])
    return spaces.Dict({key: space_from_json(value) for key, value in description["spaces"].items()})


def _kind_of(description: Any) -> str:
    kind = description.get("type") if isinstance(description, dict) else None
    if kind not in FIELDS or description.keys() - {"type"} != FIELDS[kind]:
        shown = repr(description)
        shown = shown if len(shown) < 200 else f"{shown[:200]}..."
        raise ValueError(f"{shown} describes no space: a type of {sorted(FIELDS)} with its fields is needed.")
    return str(kind)


def _check_fields(kind: str, description: dict[str, Any]) -> int:
    """Refuse what cannot be a space, or would be one of absurd size, before it is built; counts its entries."""
    if kind == "Dict":
        return _check_dict(description["spaces"])
    sizes = {"Box": "shape", "Discrete": "n", "MultiDiscrete": "nvec", "MultiBinary": "n"}[kind]
    value = description[sizes]
    numbers = value if isinstance(value, list) else [value]
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    start = description.get("start", 0)
    if not whole or not isinstance(start, int) or (kind == "Box" and not isinstance(value, list)):
        raise ValueError(f"{kind} needs whole numbers as its {sizes}, got {value!r}.")
    entries = sum(numbers) if kind == "MultiDiscrete" else math.prod(numbers)
    if entries > MOST_ENTRIES:
        raise ValueError(f"A {kind} space of {sizes}={value} is absurd: at most {MOST_ENTRIES:,} entries are taken.")
    if kind == "Box":
        if description["dtype"] not in DTYPES:
            raise ValueError(f"dtype of a Box must be one of {sorted(DTYPES)}, got {description['dtype']!r}.")
        for name in ("low", "high"):
            bound = description[name]
            if isinstance(bound, list) and len(bound) != entries:
                raise ValueError(f"{name} of a Box of shape {value} needs 1 or {entries} numbers, got {len(bound)}.")
    return entries


def _check_dict(content: Any) -> int:
    if not isinstance(content, dict) or not all(
        isinstance(value, dict) and value.get("type") != "Dict" for value in content.values()
    ):
        raise ValueError("A Dict space is described by its spaces by name, none of which is a Dict itself.")
    entries = sum(_check_fields(_kind_of(value), value) for value in content.values())
    if entries > MOST_ENTRIES:
        raise ValueError(f"A Dict space of {entries:,} entries is absurd: at most {MOST_ENTRIES:,} are taken in all.")
    return entries


def _bound_to_json(bound: np.ndarray) -> Any:
    """One number where all are alike, a flat list otherwise."""
    flat = bound.reshape(-1)
    if flat.size and (flat == flat[0]).all():
        flat = flat[:1]
    numbers = [str(x) if x in (float("inf"), float("-inf")) else x for x in flat.tolist()]
    return numbers[0] if len(numbers) == 1 else numbers


def _bound_from_json(bound: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    numbers = [float(x) if isinstance(x, str) else x for x in (bound if isinstance(bound, list) else [bound])]
    array = np.array(numbers, dtype)
    return np.full(shape, array[0], dtype) if array.size == 1 else array.reshape(shape)
