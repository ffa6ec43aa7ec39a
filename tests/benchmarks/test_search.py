"""How arms are tuned: the same stages for all, and the best found inside of what was tried."""

import math

import pytest

from benchmarks.suite import search

BATCHES = (8, 32, 128)


def run(loss, batches=BATCHES, trials=8):
    tried = {}
    while at := search.next_setting(tried, batches, trials):
        assert at not in tried
        tried[at] = loss(*at)
    return tried


@pytest.mark.parametrize("best", [(8, -3), (32, 0), (32, 5), (128, 6), (32, -6), (8, 1)])
def test_the_best_of_a_bowl_is_found_and_inside(best):
    def bowl(batch, rung):
        return abs(math.log2(batch / best[0])) + 0.1 * (rung - best[1]) ** 2

    tried = run(bowl)
    found = search.best_setting(tried)
    assert found[0] == best[0] and abs(found[1] - best[1]) <= 1
    assert search.is_inside(tried, found)
    assert {batch for batch, _ in tried} == set(BATCHES)
    assert 8 <= len(tried) <= 8 + search.EXTRA


def test_all_arms_have_as_many_trials():
    counts = {
        len(run(lambda batch, rung, at=at: abs(rung - at) + (batch != 32))) for at in (-2, 0, 2)
    }
    assert counts == {8}


def test_a_best_that_runs_away_ends():
    tried = run(lambda batch, rung: -rung)
    assert len(tried) == 8 + search.EXTRA
    assert not search.is_inside(tried, search.best_setting(tried))
    # All diverge: lower and lower rates.
    tried = run(lambda batch, rung: math.inf)
    assert len(tried) == 8 + search.EXTRA and search.best_setting(tried) is None
    assert min(rung for _, rung in tried) < -10


def test_what_diverges_is_no_end():
    tried = run(lambda batch, rung: math.inf if rung > 0 else abs(rung + 1) + (batch != 32))
    assert search.best_setting(tried) == (32, -1)


def test_one_batch_alone():
    tried = run(lambda batch, rung: abs(rung - 1), (32,), 4)
    assert search.best_setting(tried) == (32, 1) and len(tried) == 4


@pytest.mark.parametrize("needed", [1.0, 0.9, 0.5, 0.3, 0.1, 0.05])
def test_the_length_is_bisected(needed):
    arrived = {}
    while (rung := search.next_share(arrived)) is not None:
        assert rung not in arrived
        arrived[rung] = search.share_of(rung) >= needed
    assert len(arrived) <= 5
    share = search.chosen_share(arrived)
    if needed < 0.9 and needed > 0.08:
        # Two rungs of a quarter power of two hold it: the one that is given, and its margin.
        assert needed <= share <= needed * 2**0.5 + 1e-3
        assert share >= min(1, needed * 2**0.25 - 1e-3)
    assert share <= 1


def test_none_arrives():
    assert search.next_share({0: False}) is None and search.chosen_share({0: False}) == 1
    assert search.chosen_share({}) == 1  # without a target


def test_rates_are_round():
    assert search.rate_of(1e-3, 4) == 1e-2 and search.rate_of(1e-3, -2) == 3.162e-4
    assert search.share_of(0) == 1 and search.share_of(4) == 0.5
