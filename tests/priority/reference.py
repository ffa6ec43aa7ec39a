"""The slow reference of `allocate`: the definition in exact rational arithmetic, nothing clever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

SMALLEST_NORMAL = 2.0**-126  # of float32
WEIGHT_BITS = 40


def usable(priorities: Sequence[float]) -> list[float]:
    """The priorities with all that counts as 0 at 0."""
    return [float(p) if SMALLEST_NORMAL <= p < math.inf else 0.0 for p in priorities]


def weights(priorities: Sequence[float]) -> list[int]:
    """Whole multiples of 2**-39 of the leading bit of the largest priority, the rest cut off."""
    scores = usable(priorities)
    _, exponent = math.frexp(max(scores))
    unit = Fraction(2) ** (exponent - WEIGHT_BITS)
    return [math.floor(Fraction(score) / unit) for score in scores]


def quota(priorities: Sequence[float], budget: int, low: int, high: int) -> list[Fraction]:
    """What each slot would get above `low` if updates could be divided."""
    slots, cap = len(priorities), Fraction(high - low)
    weight = weights(priorities)
    left = Fraction(min(max(budget, slots * low), slots * high) - slots * low)
    shares = [Fraction(0)] * slots
    unfilled = set(range(slots))
    while unfilled:
        total = sum(weight[i] for i in unfilled)
        if total == 0:
            share = {i: left / len(unfilled) for i in unfilled}
        else:
            share = {i: left * weight[i] / total for i in unfilled}
        filled = {i for i in unfilled if share[i] >= cap} if total else set()
        if not filled:
            for i in unfilled:
                shares[i] = share[i]
            break
        for i in filled:
            shares[i] = cap
        left -= cap * len(filled)
        unfilled -= filled
    return shares


def allocate(
    priorities: Sequence[float], budget: int, low: int = 0, high: int = 2**31 - 1
) -> list[int]:
    """The quota, rounded by largest remainders; ties to the higher priority, then the earlier."""
    slots, scores = len(priorities), usable(priorities)
    shares = quota(priorities, budget, low, high)
    granted = [low + math.floor(share) for share in shares]
    leftover = min(max(budget, slots * low), slots * high) - sum(granted)

    def urgency(i: int) -> tuple[Fraction, float, int]:
        return (-(shares[i] % 1), -scores[i], i)

    for i in sorted(range(slots), key=urgency)[:leftover]:
        granted[i] += 1
    return granted
