"""Seconds that programs take, beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def medians(runs: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median seconds of each, in turns, so that a drift is shared: 3 to 100 rounds in ``seconds``.

    Each run waits for its results. Two rounds before these compile and warm up.
    """
    for run in runs:
        run()
    start = time.perf_counter()
    for run in runs:
        run()
    rounds = int(np.clip(seconds / (time.perf_counter() - start), 3, 100))
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, spent, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in spent]
