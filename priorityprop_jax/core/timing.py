"""Seconds that programs take, beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def in_turns(
    runs: Sequence[Callable[..., Any]],
    seconds: float,
    *,
    given: Sequence[Callable[[], Any]] | None = None,
    warm: int = 2,
    least: int = 3,
    most: int = 100,
) -> list[list[float]]:
    """Seconds of each in every round, in turns, so that a drift is shared.

    From ``least`` to ``most`` rounds fill ``seconds``, but for ``warm`` ones before these: the
    first compiles, or the last counts where there is no other. Each run waits for its results, and
    has arguments from ``given``, which are not timed.
    """
    spent: list[list[float]] = [[] for _ in runs]

    def turn() -> float:
        start = time.perf_counter()
        for run, make, times in zip(runs, given or [tuple] * len(runs), spent, strict=True):
            arguments = make()
            begin = time.perf_counter()
            run(*arguments)
            times.append(time.perf_counter() - begin)
        return time.perf_counter() - start

    one = [turn() for _ in range(warm)][-1]
    for _ in range(int(np.clip(seconds / one, least, most))):
        turn()
    return [times[warm:] or times[-1:] for times in spent]


def compared(runs: Sequence[Callable[..., Any]], seconds: float) -> np.ndarray:
    """Median and fastest seconds of each, `[runs, 2]`, of five rounds or more."""
    times = in_turns(runs, seconds, least=5)  # of three, noise was seen to decide
    return np.array([[statistics.median(own), min(own)] for own in times])


def sooner(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a choice pays: at least 3 % by both figures of `compared`."""
    return bool(np.all(after < 0.97 * before))


def medians(runs: Sequence[Callable[..., Any]], seconds: float, **options: Any) -> list[float]:
    """Median seconds of each; see `in_turns`."""
    return [statistics.median(times) for times in in_turns(runs, seconds, **options)]
