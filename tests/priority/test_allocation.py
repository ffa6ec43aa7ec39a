"""Tests of `priorityprop_jax.priority.allocation`."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from priorityprop_jax import allocate
from priorityprop_jax.priority import allocation
from tests.priority import reference

# Every length compiles once, so few of them.
LENGTHS = (1, 2, 3, 5, 8, 13, 30)
CASES = 2_000
ODD = (0.0, -0.0, 1.0, 2.0, -1.0, np.nan, np.inf, -np.inf, 1e-38, 1.2e-38, 1e-45, 3.4e38)
DRAWS = {
    "uniform": lambda rng, n: rng.random(n),
    "heavy tail": lambda rng, n: np.exp(rng.normal(size=n) * 10),
    "huge range": lambda rng, n: np.exp(rng.uniform(-86, 88, size=n)),
    "near ties": lambda rng, n: 1 + rng.integers(0, 3, n) * 2.0**-23,
    "ties": lambda rng, n: rng.integers(0, 3, n),
    "equal": lambda rng, n: np.full(n, rng.random()),
    "zeros": lambda rng, n: np.zeros(n),
    "one": lambda rng, n: np.eye(n)[rng.integers(n)],
    "sparse": lambda rng, n: np.exp(rng.normal(size=n) * 25) * (rng.random(n) < 0.5),
    "odd": lambda rng, n: rng.choice(ODD, n),
    "last bits": lambda rng, n: 2.0 ** -rng.integers(0, 44, n) * (1 + rng.random(n)),
}
BUDGETS = ("least", "most", "inside", "inside", "inside", "too small", "too large", "one spare")


def random_case(rng: np.random.Generator, number: int):
    n = LENGTHS[number % len(LENGTHS)]
    kind = list(DRAWS)[rng.integers(len(DRAWS))]
    with np.errstate(over="ignore", under="ignore"):
        priorities = np.asarray(DRAWS[kind](rng, n)).astype(np.float32)
    low = int(rng.integers(0, 4)) * int(rng.choice([1, 1, 1, 1000]))
    high = low + int(rng.choice([0, 1, 2, 5, 20, 1000, 10_000_000]))
    which = BUDGETS[rng.integers(len(BUDGETS))]
    budget = {
        "least": n * low,
        "most": n * high,
        "inside": int(rng.integers(n * low, n * high + 1)),
        "too small": max(n * low - int(rng.integers(1, 5)), 0),
        "too large": n * high + int(rng.integers(1, 1000)),
        "one spare": max(n * high - 1, n * low),
    }[which]
    return kind, which, priorities, budget, low, high


def run(priorities, budget, low=0, high=2**31 - 1) -> list[int]:
    return np.asarray(allocate(np.asarray(priorities, np.float32), budget, low, high)).tolist()


# Against the reference.


def test_equals_the_exact_reference_on_2000_random_cases():
    rng = np.random.default_rng(20250101)
    seen = Counter()
    for number in range(CASES):
        kind, which, priorities, budget, low, high = random_case(rng, number)
        seen.update([kind, which, len(priorities)])
        expected = reference.allocate(priorities.tolist(), budget, low, high)
        assert run(priorities, budget, low, high) == expected, (
            f"{kind}, {which}: {priorities.tolist()}, {budget=}, {low=}, {high=}"
        )
    assert min(seen[key] for key in (*DRAWS, *BUDGETS, *LENGTHS)) > 100


def test_reference_by_hand():
    assert reference.allocate([4.0, 2.0, 1.0, 0.0], 18, 1, 20) == [9, 5, 3, 1]
    assert reference.allocate([1.0, 1.0, 1.0], 4) == [2, 1, 1]
    assert reference.allocate([100.0, 1.0, 1.0], 10, 0, 4) == [4, 3, 3]
    assert reference.quota([3.0, 1.0], 5, 1, 9) == [Fraction(9, 4), Fraction(3, 4)]


@pytest.mark.parametrize(
    ("priorities", "budget", "low", "high", "expected"),
    [
        pytest.param([4, 2, 1, 0], 18, 1, 20, [9, 5, 3, 1], id="docstring"),
        pytest.param([1, 1, 1], 4, 0, 9, [2, 1, 1], id="tie to the earlier slot"),
        pytest.param([1, 2, 1], 2, 0, 9, [1, 1, 0], id="tie of remainders to the earlier slot"),
        pytest.param([1, 3], 2, 0, 9, [0, 2], id="tie of remainders to the higher priority"),
        pytest.param([100, 1, 1], 10, 0, 4, [4, 3, 3], id="what clamping frees is shared"),
        pytest.param([9, 0, 0], 10, 0, 4, [4, 3, 3], id="the rest goes to zeros evenly"),
        pytest.param([9, 0, 0], 4, 0, 4, [4, 0, 0], id="zeros get nothing before that"),
        pytest.param([0, 0, 0], 7, 0, 9, [3, 2, 2], id="all zero"),
        pytest.param(
            [np.nan, np.inf, -1, 1e-45, 2], 3, 0, 9, [0, 0, 0, 0, 3], id="all odd but one"
        ),
        pytest.param([np.nan, np.inf, -1, 1e-45, 2], 5, 1, 9, [1] * 5, id="at the least"),
        pytest.param([5], 3, 0, 9, [3], id="one slot"),
        pytest.param([5], 30, 0, 9, [9], id="one slot, too much"),
        pytest.param([1, 2], 1, 3, 9, [3, 3], id="too small is clamped"),
        pytest.param([1, 2], 100, 3, 9, [9, 9], id="too large is clamped"),
        pytest.param([1, 2], 0, 0, 9, [0, 0], id="nothing to give"),
        pytest.param([1, 2], 2**31 - 1, 0, 2**31 - 1, [715827882, 1431655765], id="largest budget"),
        pytest.param([3e38, 1e-38], 2**31 - 1, 0, 2**31 - 1, [2**31 - 1, 0], id="huge range"),
        pytest.param([1, 2.0**-39, 2.0**-40], 2**30, 0, 2**30 - 7, [2**30 - 7, 7, 0], id="39 bits"),
    ],
)
def test_known_cases(priorities, budget, low, high, expected):
    assert run(priorities, budget, low, high) == expected


@pytest.mark.once
def test_100_000_slots_are_exact():
    priorities = np.exp(np.random.default_rng(1).normal(size=100_000) * 5).astype(np.float32)
    for budget, low, high in [(1_234_567, 1, 20), (77, 0, 5)]:
        expected = reference.allocate(priorities.tolist(), budget, low, high)
        assert run(priorities, budget, low, high) == expected


def test_100_000_slots_are_fast():
    rng = np.random.default_rng(2)
    seconds = []
    for _ in range(5):
        priorities = jnp.asarray(rng.random(100_000), jnp.float32)
        start = time.perf_counter()
        allocate(priorities, 1_000_000, 1, 20).block_until_ready()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5  # a quadratic algorithm would take minutes


# Properties.

properties = settings(derandomize=True, deadline=None, max_examples=200)
ordinary = st.one_of(
    st.floats(0, 2.0**127, width=32, allow_subnormal=False),
    st.floats(0.5, 2, width=32),
    st.sampled_from([0.0, 1.0, 2.0, 3.0]),
)
anything = st.one_of(ordinary, st.floats(width=32))


@st.composite
def problems(draw, values=anything):
    n = draw(st.sampled_from(LENGTHS))
    priorities = np.array(draw(st.lists(values, min_size=n, max_size=n)), np.float32)
    low = draw(st.integers(0, 5))
    high = low + draw(st.integers(0, 50))
    budget = draw(st.integers(n * low, n * high))
    return priorities, budget, low, high


@properties
@given(problems())
def test_the_budget_is_spent_to_the_last_update_within_bounds(problem):
    priorities, budget, low, high = problem
    granted = run(*problem)
    assert sum(granted) == budget
    assert all(low <= n <= high for n in granted)


@properties
@given(problems(), st.integers(0, 5000))
def test_an_infeasible_budget_is_clamped(problem, budget):
    priorities, _, low, high = problem
    slots = len(priorities)
    assert sum(run(priorities, budget, low, high)) == min(max(budget, slots * low), slots * high)


@properties
@given(problems())
def test_a_higher_priority_never_gets_fewer(problem):
    scores = reference.usable(problem[0].tolist())
    ranked = sorted(zip(scores, run(*problem), strict=True), key=lambda pair: pair[0])
    for (low_score, fewer), (high_score, more) in zip(ranked, ranked[1:], strict=False):
        assert fewer <= more or low_score == high_score
        assert abs(fewer - more) <= 1 or low_score < high_score


@properties
@given(problems())
def test_among_equals_the_earlier_slot_never_gets_fewer(problem):
    scores, granted = reference.usable(problem[0].tolist()), run(*problem)
    for score in set(scores):
        equals = [n for n, other in zip(granted, scores, strict=True) if other == score]
        assert equals == sorted(equals, reverse=True)


@properties
@given(problems(st.floats(2.0**-40, 2.0**40, width=32)), st.integers(-80, 80))
def test_scaling_by_a_power_of_two_changes_nothing(problem, exponent):
    priorities, *rest = problem
    assert run(priorities * np.float32(2.0**exponent), *rest) == run(priorities, *rest)


@properties
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_distinct_priorities_permutes_the_result(problem, random):
    priorities, *rest = problem
    scores = reference.usable(priorities.tolist())
    assume(len(set(scores)) == len(scores))
    order = random.sample(range(len(scores)), len(scores))
    assert run(priorities[order], *rest) == [run(priorities, *rest)[i] for i in order]


@properties
@given(problems(st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e-45])))
def test_all_zero_priorities_mean_an_even_split(problem):
    slots, budget = len(problem[0]), problem[1]
    more = budget % slots
    assert run(*problem) == [budget // slots + 1] * more + [budget // slots] * (slots - more)


@properties
@given(problems(st.floats(2.0**-10, 2.0**10, width=32)))
def test_shares_are_proportional_to_within_one_update(problem):
    priorities, _, low, _ = problem
    budget = problem[1]
    spare = budget - low * len(priorities)
    # No cap: nothing is clamped, so that every share is the plain quotient.
    granted = run(priorities, budget, low, 2**31 - 1)
    exact = [Fraction(float(p)) for p in priorities]
    for n, p in zip(granted, exact, strict=True):
        assert abs(n - low - spare * p / sum(exact)) < 1


@properties
@given(problems(), st.integers(0, 100))
def test_equals_the_reference(problem, spare):
    priorities, budget, low, high = problem
    assert run(priorities, budget, low, high + spare) == reference.allocate(
        priorities.tolist(), budget, low, high + spare
    )


# As a JAX function.


def test_one_compile_serves_every_budget():
    priorities = jnp.asarray(np.random.default_rng(3).random(11), jnp.float32)
    allocate(priorities, 20, 1, 5)
    compiled = allocation._allocate._cache_size()
    for budget, low, high in [(0, 0, 0), (11, 1, 1), (40, 1, 5), (7, 0, 3), (2**31 - 1, 0, 2**30)]:
        for as_type in (int, np.int64, np.int32, jnp.int32, jnp.asarray):
            allocate(priorities, as_type(budget), low, as_type(high))
        allocate(np.asarray(priorities)[::-1].copy(), budget, low, high)
    assert allocation._allocate._cache_size() == compiled


def test_traces_inside_jit_with_everything_traced():
    traces = []

    @jax.jit
    def doubled(priorities, budget, low, high):
        traces.append(None)
        return 2 * allocate(priorities, budget, low, high)

    priorities = np.array([4, 2, 1, 0, 1], np.float32)
    for budget, low, high in [(18, 1, 20), (3, 0, 2), (100, 0, 7)]:
        expected = [2 * n for n in run(priorities, budget, low, high)]
        assert doubled(priorities, budget, low, high).tolist() == expected
    assert len(traces) == 1


def test_vmap_equals_a_loop():
    rng = np.random.default_rng(4)
    priorities = np.exp(rng.normal(size=(20, 8)) * 5).astype(np.float32)
    budgets, lows, highs = rng.integers(0, 90, 20), rng.integers(0, 3, 20), rng.integers(3, 20, 20)
    expected = [run(*row) for row in zip(priorities, budgets, lows, highs, strict=True)]
    assert jax.vmap(allocate)(priorities, budgets, lows, highs).tolist() == expected
    shared = jax.vmap(allocate, in_axes=(0, None, None, None))(priorities, 30, 1, 9)
    assert shared.tolist() == [run(row, 30, 1, 9) for row in priorities]
    by_budget = jax.vmap(allocate, in_axes=(None, 0, None, None))(priorities[0], budgets, 1, 9)
    assert by_budget.tolist() == [run(priorities[0], budget, 1, 9) for budget in budgets]


def test_scan_over_budgets():
    priorities = jnp.array([3.0, 1.0, 2.0])
    step = lambda carry, budget: (carry, allocate(priorities, budget, 1, 20))  # noqa: E731
    _, stacked = jax.lax.scan(step, 0, jnp.arange(3, 40))
    assert stacked.tolist() == [run(priorities, budget, 1, 20) for budget in range(3, 40)]


def test_no_gradient_flows_through():
    priorities = jnp.array([3.0, 1.0, 2.0])
    loss = lambda p: jnp.sum(allocate(p, 12, 1, 20) * jnp.arange(3.0))  # noqa: E731
    assert jax.grad(loss)(priorities).tolist() == [0, 0, 0]


@pytest.mark.parametrize("as_type", [int, np.int64, np.int32, np.uint8, jnp.int32, jnp.asarray])
def test_integer_types(as_type):
    priorities = np.array([4, 2, 1, 0], np.float32)
    granted = allocate(priorities, as_type(18), as_type(1), as_type(20))
    assert granted.tolist() == [9, 5, 3, 1]
    assert granted.dtype == jnp.int32 and granted.shape == (4,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_dtypes_of_priorities(dtype):
    priorities = np.array([4, 2, 1, 0]).astype(jnp.dtype(dtype))
    granted = allocate(priorities, 18, 1, 20)
    assert granted.tolist() == [9, 5, 3, 1] and granted.dtype == jnp.int32
    assert allocate(priorities.tolist(), 18, 1, 20).tolist() == [9, 5, 3, 1]


def test_x64_mode_changes_nothing():
    rng = np.random.default_rng(5)
    for number in range(6, 490, 7):  # of 30 slots each, to compile once
        *_, priorities, budget, low, high = random_case(rng, number)
        expected = run(priorities, budget, low, high)
        with jax.enable_x64(True):
            granted = allocate(priorities.astype(np.float64), np.int64(budget), low, high)
        assert granted.tolist() == expected and granted.dtype == jnp.int32


def test_strict_promotion_changes_nothing():
    with jax.numpy_dtype_promotion("strict"):
        assert run([4, 2, 1, 0], 18, 1, 20) == [9, 5, 3, 1]


def test_no_slots():
    granted = allocate(jnp.zeros(0), 5)
    assert granted.shape == (0,) and granted.dtype == jnp.int32


@pytest.mark.parametrize("shape", [(), (2, 3), (1, 1, 1)])
def test_priorities_must_be_a_vector(shape):
    with pytest.raises(ValueError, match=r"must be a vector \[slots\], got shape \("):
        allocate(jnp.ones(shape), 5)


def test_too_many_slots_are_an_error():
    too_many = jax.ShapeDtypeStruct((2**22 + 1,), jnp.float32)
    with pytest.raises(ValueError, match="at most 4194304 slots are supported, got 4194305"):
        jax.eval_shape(lambda p: allocate(p, 5), too_many)
    fits = jax.ShapeDtypeStruct((2**22,), jnp.float32)
    assert jax.eval_shape(lambda p: allocate(p, 5), fits).shape == (2**22,)
