"""What may be said from a few paired runs: ratios, intervals, misses.

A ratio is the base's seconds to the target over an arm's, on the same seed. Ratios are averaged as
logarithms, so that twice as fast and half as fast cancel. Intervals are percentile bootstraps over
seeds (Efron, 1979); with a handful of seeds they tend to be too narrow, so an end that only just
clears a number is weak support for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.95
FEWEST = 3  # pairs; below this an interval would be made of nothing
ROUNDING = 1 + 1e-9  # 2.0000 times is 2 times, whatever the last bit
ENUMERATED = 6  # up to so many values, all n ** n resamples are looked at


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over paired seeds.

    Attributes:
      mean: geometric for ratios, arithmetic for differences; None without a pair.
      interval: of the mean, 95 %; None under three pairs.
      pairs: seeds behind the mean.
      misses: runs of the arm that never reached the target; they have no ratio.
      charged: pairs in which the base missed it and was charged its whole budget, which makes the
        ratio a lower bound.
    """

    mean: float | None
    interval: tuple[float, float] | None
    pairs: int
    misses: int = 0
    charged: int = 0


def clock(run: Mapping, seconds: Mapping[str, float]) -> list[float]:
    """Seconds of training up to each evaluation: steps of a phase times its seconds a step.

    Args:
      run: a record of a finished run.
      seconds: of one step, by phase.
    """
    return [sum(n * seconds[phase] for phase, n in e["phases"].items()) for e in run["evals"]]


def whole(run: Mapping, seconds: Mapping[str, float]) -> float | None:
    """Seconds of the run's whole budget, also where it diverged; None without an evaluation."""
    passed = clock(run, seconds)
    return passed[-1] * run["steps"] / run["evals"][-1]["step"] if passed else None


def time_to_target(run: Mapping, seconds: Mapping[str, float], target: float) -> float | None:
    """Seconds until the loss is down at the target; None where it never is.

    Between two evaluations the loss goes by a straight line, so that the grid does not decide. A
    run that failed (it diverged) has not reached anything that one could keep training from.
    """
    if run.get("failed"):
        return None
    before: tuple[float, float] | None = None
    for passed, evaluation in zip(clock(run, seconds), run["evals"], strict=True):
        loss = evaluation["loss"]
        if loss <= target:  # never true of NaN
            if before is None or not math.isfinite(before[1]):
                return passed
            start, above = before
            return start + (passed - start) * (above - target) / (above - loss)
        before = passed, loss
    return None


def geometric_mean(ratios: Sequence[float]) -> float:
    """``exp(mean(log(ratios)))``.

    Raises:
      ValueError: without ratios, or where one is not positive and finite.
    """
    return math.exp(math.fsum(_logs(ratios)) / len(ratios))


def _logs(ratios: Sequence[float]) -> list[float]:
    values = np.asarray(ratios, float)
    if not values.size or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"ratios must be positive and finite, at least one; got {list(ratios)}")
    return np.log(values).tolist()


def bootstrap(
    values: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile bootstrap's 95 % interval of the mean, values drawn with replacement.

    Up to six values all resamples are enumerated, and the interval is exact. Ends are values that
    a resample really has.

    Args:
      values: one number a seed.
      draws: resamples where there are too many to enumerate.
      seed: of these draws.

    Returns:
      ``(lower, upper)``; None for fewer than three values: too few for an interval.

    Raises:
      ValueError: where a value is not finite.
    """
    numbers = np.asarray(values, float)
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"values must be finite; got {list(values)}")
    n = len(numbers)
    if n < FEWEST:
        return None
    if n <= ENUMERATED:
        rows = np.indices((n,) * n).reshape(n, -1).T
    else:
        rows = np.random.default_rng(seed).integers(0, n, (draws, n))
    tail = (1 - LEVEL) / 2
    ends = np.quantile(numbers[rows].mean(1), [tail, 1 - tail], method="inverted_cdf")
    return float(ends[0]), float(ends[1])


def geometric_interval(
    ratios: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """`bootstrap` of the geometric mean.

    Raises:
      ValueError: without ratios, or where one is not positive and finite.
    """
    ends = bootstrap(_logs(ratios), draws=draws, seed=seed)
    return None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))


def speed_up(
    base: Mapping[int, float | None],
    own: Mapping[int, float | None],
    budgets: Mapping[int, float | None],
) -> Estimate:
    """How many times sooner an arm reaches the target than the base does, paired by seed.

    Args:
      base: the base's seconds to the target by seed; None where it misses.
      own: the arm's.
      budgets: seconds of the base's whole budget by seed, which it is charged where it misses.
    """
    ratios, charged = [], 0
    for seed, seconds in sorted(own.items()):
        against = base.get(seed)
        late = against is None and budgets.get(seed) is not None
        against = budgets[seed] if late else against
        if seconds is not None and against is not None:
            ratios.append(against / seconds)
            charged += late
    return Estimate(
        geometric_mean(ratios) if ratios else None,
        geometric_interval(ratios) if ratios else None,
        len(ratios),
        sum(seconds is None for seconds in own.values()),
        charged,
    )


def difference(base: Mapping[int, float], own: Mapping[int, float]) -> Estimate:
    """Mean of ``own - base`` over the seeds that both have."""
    values = [own[seed] - base[seed] for seed in sorted(own) if seed in base]
    values = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(values)) if values else None
    return Estimate(mean, bootstrap(values), len(values))


def claim(interval: tuple[float, float] | None, misses: int) -> str:
    """What may be said of a speed-up: "2x" when the interval's lower end is 2 and nothing misses.

    Args:
      interval: of the ratio.
      misses: runs that never reached the target.
    """
    if misses:
        return f"nothing may be claimed: {misses} fell short"
    if interval is None:
        return "nothing may be claimed: too few seeds for an interval"
    lower, upper = interval
    if lower > 1:
        # Rounded down, as a claim is not to outrun its interval.
        floor = math.floor(lower * 10 * ROUNDING) / 10
        return f"at least {floor:g}x" if floor > 1 else "faster, by less than 1.1x"
    return "slower" if upper < 1 else "no difference shown"
