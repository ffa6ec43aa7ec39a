"""The suite's statistics on data whose answers are known."""

import math

import numpy as np
import pytest

from benchmarks.suite import statistics

pytestmark = pytest.mark.once

RUN = {
    "steps": 40,
    "evals": [
        {"step": 10, "loss": 0.5, "phases": {"dense": 10}},
        {"step": 20, "loss": 0.2, "phases": {"dense": 12, "cheap": 8}},
        {"step": 40, "loss": 0.3, "phases": {"dense": 12, "cheap": 28}},
    ],
}
SECONDS = {"dense": 1.0, "cheap": 0.25}


def test_clock_adds_up_the_phases():
    assert statistics.clock(RUN, SECONDS) == [10.0, 14.0, 19.0]
    assert statistics.whole(RUN, SECONDS) == 19.0
    # Cut short in the middle, it is charged in proportion.
    assert statistics.whole(RUN | {"evals": RUN["evals"][:2]}, SECONDS) == 28.0
    assert statistics.whole(RUN | {"evals": []}, SECONDS) is None


def test_time_to_target_is_where_a_straight_line_comes_down_to_it():
    reached = lambda run, target: statistics.time_to_target(run, SECONDS, target)  # noqa: E731
    assert reached(RUN, 0.2) == 14.0
    assert reached(RUN, 0.7) == 10.0  # no line to before the first
    assert reached(RUN, 0.35) == pytest.approx(12.0) and reached(RUN, 0.4) < 12.0
    assert reached(RUN, 0.19) is None
    assert reached(RUN | {"failed": "diverged"}, 0.7) is None
    lost = [RUN["evals"][0] | {"loss": math.nan}, *RUN["evals"][1:]]
    assert reached(RUN | {"evals": lost}, 0.35) == 14.0  # no line from where there is no number
    assert reached(RUN | {"evals": lost[:1]}, 0.7) is None
    # As against a fine grid on the same line.
    points = [(10 + i / 10, 0.5 - 0.3 * i / 40) for i in range(41)]
    assert next(t for t, loss in points if loss <= 0.41) == pytest.approx(
        reached(RUN, 0.41), abs=0.1
    )


def test_geometric_mean():
    assert statistics.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert statistics.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    for bad in ([], [1.0, 0.0], [-1.0], [math.inf]):
        with pytest.raises(ValueError, match="positive and finite"):
            statistics.geometric_mean(bad)


def test_bootstrap_of_few_is_exact():
    assert statistics.bootstrap([1.0, 2.0]) is None
    # Each extreme resample of three has probability 1/27, more than a tail of 2.5 %.
    assert statistics.bootstrap([1.0, 2.0, 4.0]) == (1.0, 4.0)
    # 2.5 % of the 256 resamples of four are 6.4 of them: the seventh from either end.
    values = [0.0, 1.0, 10.0, 100.0]
    every = sorted(
        sum(values[i] for i in (a, b, c, d)) / 4
        for a in range(4)
        for b in range(4)
        for c in range(4)
        for d in range(4)
    )
    assert statistics.bootstrap(values) == (every[6], every[249])
    assert statistics.bootstrap([3.0] * 4) == (3.0, 3.0)
    with pytest.raises(ValueError, match="finite"):
        statistics.bootstrap([1.0, math.nan, 2.0])


def test_bootstrap_of_many_draws_the_same_each_time():
    values = np.random.default_rng(0).normal(size=7)
    assert statistics.bootstrap(values) == statistics.bootstrap(values)
    lower, upper = statistics.bootstrap(values)
    assert lower < values.mean() < upper


def test_geometric_interval_turns_with_the_ratio():
    ratios = [1.5, 2.0, 3.0, 2.5]
    lower, upper = statistics.geometric_interval(ratios)
    assert min(ratios) <= lower < statistics.geometric_mean(ratios) < upper <= max(ratios)
    inverse = statistics.geometric_interval([1 / ratio for ratio in ratios])
    assert inverse == pytest.approx((1 / upper, 1 / lower))


def test_the_interval_covers_the_true_mean_of_log_normal_ratios():
    rng, true, repeats = np.random.default_rng(0), 2.0, 500
    covered = 0
    for _ in range(repeats):
        ratios = true * np.exp(0.3 * rng.normal(size=30))
        lower, upper = statistics.geometric_interval(ratios, draws=1000)
        covered += lower <= true <= upper
    assert 0.91 <= covered / repeats <= 0.975


def test_speed_up_pairs_by_seed_and_handles_misses():
    base = {0: 10.0, 1: 20.0, 2: None, 3: 30.0}
    budgets = dict.fromkeys(base, 40.0)
    own = {0: 5.0, 1: 5.0, 2: 5.0, 3: None, 9: 1.0}
    got = statistics.speed_up(base, own, budgets)
    # Seed 0: 2, seed 1: 4, seed 2 charged: 8; seed 3 misses; seed 9 has no partner.
    assert got.mean == pytest.approx(4.0) and got.interval == pytest.approx((2.0, 8.0))
    assert (got.pairs, got.misses, got.charged) == (3, 1, 1)
    # Without a known budget there is no pair.
    got = statistics.speed_up(base, own, budgets | {2: None})
    assert (got.mean, got.interval, got.pairs) == (pytest.approx(8**0.5), None, 2)
    nothing = statistics.speed_up(base, {0: None}, budgets)
    assert (nothing.mean, nothing.interval, nothing.pairs, nothing.misses) == (None, None, 0, 1)


def test_difference_is_paired():
    base, own = {0: 0.90, 1: 0.80, 2: 0.70, 5: 0.0}, {0: 0.91, 1: 0.82, 2: 0.73, 4: 0.5}
    got = statistics.difference(base, own)
    assert got.mean == pytest.approx(0.02) and got.pairs == 3
    assert got.interval == pytest.approx((0.01, 0.03))
    assert statistics.difference({}, own).mean is None
    assert statistics.difference({0: math.nan, 1: 0.1}, {0: 1.0, 1: 0.2}).pairs == 1


@pytest.mark.parametrize(
    ("interval", "misses", "said"),
    [
        ((2.0, 3.0), 0, "at least 2x"),
        ((1.99, 3.0), 0, "at least 1.9x"),
        ((5.35, 9.0), 0, "at least 5.3x"),
        ((1.04, 1.2), 0, "faster, by less than 1.1x"),
        ((0.9, 1.2), 0, "no difference shown"),
        ((0.5, 0.9), 0, "slower"),
        ((4.0, 5.0), 1, "nothing may be claimed: 1 fell short"),
        (None, 0, "nothing may be claimed: too few seeds for an interval"),
        (None, 2, "nothing may be claimed: 2 fell short"),
    ],
)
def test_claim(interval, misses, said):
    assert statistics.claim(interval, misses) == said
