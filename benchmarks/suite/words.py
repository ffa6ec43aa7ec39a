"""Numbers, intervals and tables, as the report words them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.suite.statistics import Estimate
from priorityprop_jax.core.tables import markdown


def table(header: str, rows: Sequence[str]) -> str:
    """Cells are parted by ` | `."""
    return "\n".join(markdown([line.split(" | ") for line in (header, *rows)]))


def number(value: float | None, pattern: str = ".4g") -> str:
    return "-" if value is None else format(value, pattern)


def ratio(estimate: Estimate | None) -> str:
    if estimate is None or estimate.mean is None:
        return "-"
    if estimate.interval is None:
        return f"{estimate.pairs} only"
    low, high = estimate.interval
    return f"{'≥ ' if estimate.charged else ''}{estimate.mean:.2f}x ({low:.2f} to {high:.2f})"


def gap(estimate: Estimate) -> str:
    if estimate.mean is None:
        return "-"
    if estimate.interval is None:
        return f"{estimate.mean:+.4f} (too few for an interval)"
    return "{:+.4f} ({:+.4f} to {:+.4f})".format(estimate.mean, *estimate.interval)


def of(count: int | None, n: int) -> str:
    return "-" if count is None else f"{count} of {n}"


def listed(words: Sequence[str]) -> str:
    return ", ".join(words) if words else "none"
