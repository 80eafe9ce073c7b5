"""Whether observations are finite where networks see them, as float32."""

from typing import Any

import numpy as np


def not_finite(**parts: Any) -> str | None:
    """
    Look for infinities and NaN, which would turn every weight into NaN and every plan into zeros.

    >>> not_finite(observation={"speed": [0.5, np.nan]}, reward=1.0)
    'observation "speed"'

    :param parts: Arrays or dicts of arrays, by name; None and integers are finite
    :return: The first name with a value that is not finite in float32, with its key in a dict; None if all are
    """
    for name, part in parts.items():
        named = {f'{name} "{key}"': value for key, value in part.items()} if isinstance(part, dict) else {name: part}
        for label, value in named.items():
            array = np.asarray(value)
            if np.issubdtype(array.dtype, np.inexact) and not _finite_as_float32(array):
                return label
    return None


def require_finite(caller: str, **parts: Any) -> None:
    """
    Refuse what would give a plan of zeros, which looks like any other.

    :param caller: What was called, for the message
    :param parts: Arrays or dicts of arrays, by name
    :raises ValueError: naming the part that is not finite
    """
    name = not_finite(**parts)
    if name is not None:
        raise ValueError(f"{caller}() got a value that is not finite in its {name}: mend what it comes from.")


def _finite_as_float32(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32, copy=False)).all())
