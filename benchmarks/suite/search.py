"""How an arm is tuned: what to try next, from what was tried. Pure functions of the records.

A setting is a batch size and a rung, the learning rate `workload.rate * 10 ** (rung / 4)`. Every
arm is tuned in the same stages and with the same number of trials:

1. three rates, half a decade apart, at the middle batch, and more while the best is at an end;
2. the other batches at the best rate, times the square root of the ratio of the batches;
3. rates around the best batch's, until the best has a worse one on either side;
4. what is left of the trials goes to rates a quarter of a decade from the best.

A best rate that is still at an end gets up to `EXTRA` trials more. Then comes the length of a run:
the shortest share of the budget, on a ladder of quarter powers of two, in which a run with a
schedule of its own arrives on the tuning seeds; and one rung more, as other seeds may be slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

COARSE, FINE, EXTRA = 2, 1, 4
SHARES = 16  # rungs of the ladder of shares: from 1 down to 2 ** (-15 / 4), a thirteenth
TUNING_SEEDS = (1000, 1001)  # never compared on

Tried = Mapping[tuple[int, int], float]  # the loss by batch and rung


def rate_of(start: float, rung: int) -> float:
    """Rounded, so that a record of it is the same number on every machine."""
    return float(f"{start * 10 ** (rung / 4):.4g}")


def share_of(rung: int) -> float:
    return float(f"{2 ** (-rung / 4):.4g}")


def best_setting(tried: Tried) -> tuple[int, int] | None:
    """Batch and rung of the lowest loss; None before a trial, or where all diverged."""
    finite = {at: loss for at, loss in tried.items() if math.isfinite(loss)}
    return min(finite, key=lambda at: (finite[at], at)) if finite else None


def is_inside(tried: Tried, at: tuple[int, int]) -> bool:
    """Whether rates on either side were tried at the same batch."""
    rungs = [rung for batch, rung in tried if batch == at[0]]
    return min(rungs) < at[1] < max(rungs)


def beyond(tried: Tried, best: tuple[int, int] | None) -> tuple[int, int]:
    """Past the end of the rates of one batch that the best is at; lower where all diverged."""
    (batch, low), (_, high) = min(tried), max(tried)
    upwards = best is not None and best[1] == high
    return batch, high + COARSE if upwards else low - COARSE


def next_setting(tried: Tried, batches: Sequence[int], trials: int) -> tuple[int, int] | None:
    """What to try next; None when it is done."""
    if len(tried) >= trials + EXTRA:
        return None
    middle = batches[len(batches) // 2]
    for rung in (0, -COARSE, COARSE):
        if (middle, rung) not in tried:
            return middle, rung
    here = {at: loss for at, loss in tried.items() if at[0] == middle}
    at = best_setting(here)
    if at is None or not is_inside(here, at):
        return beyond(here, at)
    for batch in batches:
        if all(other != batch for other, _ in tried):
            return batch, at[1] + round(2 * math.log10(batch / middle))
    best = best_setting(tried)
    assert best is not None
    if not is_inside(tried, best):
        return beyond({at: loss for at, loss in tried.items() if at[0] == best[0]}, best)
    if len(tried) >= trials:
        return None
    for distance in (FINE, -FINE, COARSE, -COARSE, FINE + COARSE, -FINE - COARSE):
        if (best[0], best[1] + distance) not in tried:
            return best[0], best[1] + distance
    return None


def next_share(arrived: Mapping[int, bool]) -> int | None:
    """By bisection, the rung of the ladder to try next; None when the shortest is known.

    Args:
      arrived: by rung, whether runs of that share came down to the target. Rung 0 comes first.
    """
    if 0 not in arrived:
        return 0
    low = max((rung for rung, there in arrived.items() if there), default=None)
    if low is None:
        return None
    high = min((r for r, there in arrived.items() if not there and r > low), default=SHARES)
    return (low + high) // 2 if high - low > 1 else None


def chosen_share(arrived: Mapping[int, bool]) -> float:
    """One rung above the shortest share that arrived; the whole budget where none did."""
    low = max((rung for rung, there in arrived.items() if there), default=0)
    return share_of(max(0, low - 1))
