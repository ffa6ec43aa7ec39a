"""Tests of `repeats`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from priorityprop_jax.priority.allocation import SPREADS, check_spread, repeats

LARGEST = 2**31 - 1
LONGEST = 46_340
properties = settings(derandomize=True, deadline=None, max_examples=200)


@functools.cache
def compiled(spread: str):
    """All steps of a cycle at once: ``[steps, slots]``."""
    one_step = functools.partial(repeats, spread=spread)
    return jax.jit(jax.vmap(one_step, in_axes=(None, 0, None)))


def cycle(allocation, steps: int, spread: str, at=None) -> np.ndarray:
    """Whole numbers of any size: ``[steps, slots]``."""
    at = np.arange(steps) if at is None else np.asarray(at)
    # One shape for all cycles up to 12 steps, so that they share a program.
    padded = np.zeros(max(12, len(at)), np.int32)
    padded[: len(at)] = at
    n = np.asarray(allocation, np.int32)
    return np.asarray(compiled(spread)(n, padded, steps), np.int64)[: len(at)]


def even(n: int, t: int, steps: int) -> int:
    return (t + 1) * n // steps - t * n // steps


def nested(n: int, t: int, steps: int) -> int:
    return n // steps + (1 if t < n % steps else 0)


FORMULAS = {"even": even, "nested": nested}
ALL = np.arange(3 * 12 + 1)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("steps", range(1, 13))
def test_every_small_cycle_adds_up_and_follows_its_formula(spread, steps):
    n = ALL
    got = cycle(n, steps, spread)
    assert got.sum(0).tolist() == n.tolist()
    assert got.min() >= 0
    expected = [[FORMULAS[spread](int(m), t, steps) for m in n] for t in range(steps)]
    assert got.tolist() == expected


@pytest.mark.parametrize("steps", range(1, 13))
def test_even_keeps_every_partial_sum_within_one_update(steps):
    spent = np.cumsum(cycle(ALL, steps, "even"), axis=0)
    ideal = np.arange(1, steps + 1)[:, None] * ALL  # times `steps`
    assert (np.abs(spent * steps - ideal) < steps).all()


@pytest.mark.parametrize("steps", range(1, 13))
def test_nested_active_sets_shrink_and_are_few(steps):
    got = cycle(ALL, steps, "nested")
    active = [frozenset(np.flatnonzero(row > 0)) for row in got]
    assert all(later <= earlier for earlier, later in zip(active, active[1:], strict=False))
    assert active[0] == frozenset(np.flatnonzero(ALL > 0))  # the first step is a full one
    assert (np.diff(got, axis=0) <= 0).all()
    assert (got[0] - got[-1] <= 1).all()


def test_even_sets_are_not_nested_so_that_the_spreads_differ():
    assert cycle([1], 4, "even")[:, 0].tolist() == [0, 0, 0, 1]
    assert cycle([1], 4, "nested")[:, 0].tolist() == [1, 0, 0, 0]
    assert cycle([2], 4, "even")[:, 0].tolist() == [0, 1, 0, 1]
    assert cycle([2], 4, "nested")[:, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("spread", SPREADS)
def test_full_budget_is_one_update_a_step(spread):
    assert (cycle(np.full(5, 12), 12, spread) == 1).all()


numbers = st.one_of(st.integers(0, 200), st.integers(LARGEST - 200, LARGEST))
lengths = st.one_of(st.integers(1, 50), st.integers(LONGEST - 50, LONGEST))


@properties
@given(numbers, lengths, st.data())
def test_formula_on_large_numbers(n, steps, data):
    t = data.draw(st.integers(0, steps - 1))
    for spread in SPREADS:
        assert cycle([n], steps, spread, at=[t]).item() == FORMULAS[spread](n, t, steps)


@pytest.mark.parametrize("spread", SPREADS)
def test_longest_cycle_does_not_overflow(spread):
    n = [0, 1, LONGEST - 1, LONGEST, LONGEST + 1, LARGEST - 1, LARGEST]
    got = cycle(n, LONGEST, spread)
    assert got.sum(0).tolist() == n
    for t in (0, 1, LONGEST // 2, LONGEST - 2, LONGEST - 1):
        assert got[t].tolist() == [FORMULAS[spread](m, t, LONGEST) for m in n]


@properties
@given(st.integers(0, LARGEST), st.integers(1, LONGEST), st.data())
@example(LARGEST, LONGEST, None)
def test_no_step_is_more_than_one_update_from_the_mean(n, steps, data):
    t = steps - 1 if data is None else data.draw(st.integers(0, steps - 1))
    for spread in SPREADS:
        assert cycle([n], steps, spread, at=[t]).item() - n // steps in (0, 1)


@pytest.mark.parametrize("spread", SPREADS)
def test_step_and_length_are_traced(spread):
    traces = []

    @jax.jit
    def at(allocation, t, steps):
        traces.append(None)
        return repeats(allocation, t, steps, spread)

    n = jnp.array([0, 1, 5, 7, 12])
    for steps in range(1, 9):
        for t in range(steps):
            expected = [FORMULAS[spread](m, t, steps) for m in n.tolist()]
            assert at(n, t, steps).tolist() == expected
    assert len(traces) == 1


@pytest.mark.parametrize("spread", SPREADS)
def test_scan_over_a_cycle_spends_the_allocation(spread):
    n = jnp.array([5, 0, 3, 9])
    step = lambda spent, t: (spent + repeats(n, t, 4, spread), None)  # noqa: E731
    spent, _ = jax.lax.scan(step, jnp.zeros_like(n), jnp.arange(4))
    assert spent.tolist() == n.tolist()


@pytest.mark.parametrize("spread", SPREADS)
def test_shape_and_dtype(spread):
    for n in ([3, 4], np.array([3, 4]), jnp.array([3, 4], jnp.int8)):
        got = repeats(n, 0, 2, spread)
        assert got.shape == (2,) and got.dtype == jnp.int32
    assert repeats(jnp.zeros(0, jnp.int32), 0, 2, spread).shape == (0,)
    with jax.enable_x64(True):
        got = repeats(np.array([3, 4]), np.int64(1), 2, spread)
    assert got.dtype == jnp.int32 and got.tolist() == [FORMULAS[spread](n, 1, 2) for n in (3, 4)]
    with jax.numpy_dtype_promotion("strict"):
        assert repeats(np.array([3, 4]), 1, 2, spread).tolist() == got.tolist()


def test_even_is_the_default():
    assert repeats([1], 0, 2).tolist() == [0] and repeats([1], 1, 2).tolist() == [1]


@pytest.mark.parametrize("spread", ["Even", "", "random", None])
def test_unknown_spreads_are_errors(spread):
    for call in (lambda: repeats([1], 0, 2, spread), lambda: check_spread(spread)):
        with pytest.raises(ValueError, match=r"spread must be one of \('even', 'nested'\), got"):
            call()
