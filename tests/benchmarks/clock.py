"""Clocks for a machine that is shared: what is compared is measured in turns, and the ratio is taken turn by turn."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch as th


class Ratio(NamedTuple):
    """``seconds`` of the subject and ``reference`` of the other, medians; ``ratio`` median of the turns' ratios."""

    seconds: float
    reference: float
    ratio: float


def timed(function: Callable[[], object], device: th.device, repeats: int) -> float:
    """
    Seconds of one call, waiting for the device once at the end.

    :param function: What to time
    :param device: Where it works
    :param repeats: Calls
    :return: Wall-clock seconds a call
    """
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def in_turns(
    subject: Callable[[], object], reference: Callable[[], object], device: th.device, seconds: float, turns: int = 7
) -> Ratio:
    """
    Time two functions alternately, so that a slow spell of the machine meets both.

    :param subject: What is measured
    :param reference: What it is compared with
    :param device: Where both work
    :param seconds: About how long to measure in all
    :param turns: Number of alternations
    :return: Medians
    """
    repeats = [_repeats(function, device, seconds / (2 * turns)) for function in (subject, reference)]
    pairs = [(timed(subject, device, repeats[0]), timed(reference, device, repeats[1])) for _ in range(turns)]
    return Ratio(median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs))


def _repeats(function: Callable[[], object], device: th.device, seconds: float) -> int:
    # The first call pays for caches, compilation and lazy initialisation
    function()
    return max(1, int(seconds / max(timed(function, device, 1), 1e-7)))


def _wait(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize(device)
