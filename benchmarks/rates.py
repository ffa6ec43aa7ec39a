"""Learning rates by factors of two, until the best has a worse one on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate of the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def next_rates(losses: Mapping[float, float], first: Sequence[float]) -> list[float]:
    """What to try next: those of the first that are missing, then past the end that is best."""
    missing = [rate for rate in first if rate not in losses]
    if missing:
        return missing
    low, high = min(losses), max(losses)
    return {low: [low / 2], high: [2 * high]}.get(best_rate(losses), [])
