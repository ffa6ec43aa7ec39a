"""Tests of `priorityprop_jax.priority.scores`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax import find_slots
from priorityprop_jax.priority import scores

NUMPY = {
    "mean": lambda x: np.mean(np.abs(x)),
    "sum": lambda x: np.sum(np.abs(x)),
    "rms": lambda x: np.sqrt(np.mean(np.abs(x) ** 2)),
    "norm": lambda x: np.sqrt(np.sum(np.abs(x) ** 2)),
}
KINDS = sorted(NUMPY)
properties = settings(derandomize=True, deadline=None, max_examples=200)


def normal(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return (x + 1j * rng.normal(size=shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def chain(length: int):
    """Slots with the depths ``length - 1`` to 0."""
    return find_slots({f"layer_{i:03}": 1.0 for i in range(length)})


# Magnitudes.


def test_all_magnitudes_are_tested():
    assert sorted(scores.MAGNITUDES) == KINDS


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_of_one_array(kind, shape, dtype, jit):
    x = jnp.asarray(normal(shape, dtype))
    call = (
        jax.jit(lambda g: scores.magnitude(g, kind)) if jit else lambda g: scores.magnitude(g, kind)
    )
    got = call(x)
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, NUMPY[kind](np.asarray(x)), rtol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_of_a_group_is_that_of_all_its_elements(kind):
    parts = {"a": normal((3, 4)), "b": [normal((5,), seed=1), normal((), seed=2)], "none": None}
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(parts)])
    got = scores.magnitude(jax.tree.map(jnp.asarray, parts), kind)
    np.testing.assert_allclose(got, NUMPY[kind](flat), rtol=5e-6)
    mixed = [jnp.asarray(normal((4,), np.complex64)), jnp.asarray(normal((3,)), jnp.bfloat16)]
    flat = np.concatenate([np.asarray(x).astype(np.complex64) for x in mixed])
    np.testing.assert_allclose(scores.magnitude(mixed, kind), NUMPY[kind](flat), rtol=5e-6)


def test_the_mean_is_the_default():
    assert scores.magnitude(jnp.array([3.0, -4.0])) == 3.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_accumulates_in_float32(kind, dtype):
    # 10,000 has no place in a bfloat16 sum of ones, which stops at 256, nor 300 ** 2 in float16.
    ones = jnp.ones((10_000,), dtype)
    got = scores.magnitude(ones, kind)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, {"sum": 10_000, "norm": 100}.get(kind, 1), rtol=5e-6)
    large = jnp.full((300,), 304, dtype)
    np.testing.assert_allclose(
        scores.magnitude(large, kind), NUMPY[kind](np.full(300, 304.0)), rtol=5e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_the_magnitude_zero(kind):
    for empty in (jnp.zeros((0, 3)), [], None, [jnp.zeros(0), jnp.zeros((2, 0), jnp.bfloat16)]):
        got = scores.magnitude(empty, kind)
        assert got == 0 and got.shape == () and got.dtype == jnp.float32
    beside = [jnp.zeros((0,)), jnp.array([-2.0])]
    assert scores.magnitude(beside, kind) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_passed_on(kind):
    assert jnp.isnan(scores.magnitude(jnp.array([1.0, jnp.nan]), kind))
    assert jnp.isposinf(scores.magnitude(jnp.array([1.0, -jnp.inf]), kind))


def test_a_users_function_gets_the_list_of_gradients():
    grads = {"b": jnp.array([1.0, -5.0]), "a": jnp.array([2.0])}
    seen = []

    def largest(leaves):
        seen.append([leaf.tolist() for leaf in leaves])
        return max(jnp.max(jnp.abs(leaf)) for leaf in leaves)

    assert scores.magnitude(grads, largest) == 5
    assert seen == [[[2.0], [1.0, -5.0]]]
    np.testing.assert_allclose(scores.magnitude(grads, optax.tree.norm), np.sqrt(30), rtol=5e-6)


def test_a_users_function_is_read_as_float32_and_not_negative():
    for value in (-3, -3.0, np.float64(-3), jnp.array([-3.0]), jnp.bfloat16(-3)):
        got = scores.magnitude(jnp.ones(2), lambda leaves, value=value: value)
        assert got == 3 and got.shape == () and got.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["max", "Mean", "", None, 2])
def test_unknown_magnitudes_are_errors(kind):
    with pytest.raises(ValueError, match=r"magnitude must be one of .*'mean'.* or a function, got"):
        scores.check_magnitude(kind)
    if isinstance(kind, str):
        with pytest.raises(ValueError, match="magnitude must be one of"):
            scores.magnitude(jnp.ones(2), kind)


def test_extra_magnitudes():
    scores.check_magnitude("gain", ("gain",))
    scores.check_magnitude(len)
    with pytest.raises(ValueError, match=r"'gain'\) or a function, got 'gian'"):
        scores.check_magnitude("gian", ("gain",))


# Gain.


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_gain_is_the_inner_product(dtype, shape):
    g, u = normal(shape, dtype), normal(shape, dtype, seed=1)
    for sign in (1, -1):
        got = scores.gain(jnp.asarray(g), jnp.asarray(sign * u))
        assert got.shape == () and got.dtype == jnp.float32
        np.testing.assert_allclose(got, abs(np.real(np.vdot(g, u))), rtol=1e-5)


def test_gain_of_a_group_adds_before_it_takes_the_size():
    g = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    u = {"a": jnp.array([2.0, 2.0]), "b": jnp.array(-1.0)}
    assert scores.gain(g, u) == 3
    assert scores.gain({"a": jnp.zeros((0, 2))}, {"a": jnp.zeros((0, 2))}) == 0
    assert scores.gain([], []) == 0


def test_gain_of_complex_numbers_conjugates_the_gradient():
    one, i = jnp.array([1 + 0j]), jnp.array([1j])
    assert scores.gain(i, i) == 1 and scores.gain(one, i) == 0


def test_gain_accumulates_in_float32():
    ones = jnp.ones((10_000,), jnp.bfloat16)
    got = scores.gain(ones, -ones)
    assert got == 10_000 and got.dtype == jnp.float32
    assert scores.gain(ones, jnp.full((10_000,), 0.5)) == 5_000  # updates of another dtype
    third = jnp.full((3,), 1 / 3, jnp.bfloat16)
    exact = 3 * float(third[0]) ** 2
    np.testing.assert_allclose(scores.gain(third, third), exact, rtol=5e-6)


# Priority.

floats = st.one_of(st.floats(width=32), st.floats(2.0**-20, 2.0**20, width=32))
factors = st.floats(2.0**-10, 2.0**10, width=32)


@properties
@given(
    st.lists(st.tuples(floats, st.integers(0, 2**31 - 1), factors, factors), min_size=4, max_size=4)
)
def test_priority_is_magnitude_by_count_times_depth_by_cost(rows):
    m, c, d, cost = (np.array(column) for column in zip(*rows, strict=True))
    m = np.where(np.abs(m) < 2.0**-80, 0, m)  # XLA flushes subnormal numbers
    with np.errstate(over="ignore"):
        expected = (np.where(np.isfinite(m), m, 0) / (1.0 + c) * d / cost).astype(np.float32)
    got = scores.priority(
        m.astype(np.float32), c.astype(np.int32), d.astype(np.float32), cost.astype(np.float32)
    )
    assert got.shape == (4,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=5e-6)


def test_counts_are_from_one():
    got = scores.priority(np.full(5, 60.0), [0, 1, 2, 3, 9], np.ones(5))
    np.testing.assert_allclose(got, [60, 30, 20, 15, 6], rtol=5e-6)


def test_magnitudes_that_are_not_finite_count_as_zero():
    got = scores.priority([jnp.nan, jnp.inf, -jnp.inf, 2.0], np.zeros(4), np.full(4, 3.0))
    assert got.tolist() == [0, 0, 0, 6]


def test_costs_default_to_one_and_may_be_a_scalar():
    m, c, d = np.array([1.0, 2.0]), np.array([0, 1]), np.array([1.0, 3.0])
    assert scores.priority(m, c, d).tolist() == [1, 3]
    assert scores.priority(m, c, d, 2.0).tolist() == [0.5, 1.5]
    assert scores.priority(m, c, d, np.array([4.0, 1.0])).tolist() == [0.25, 3]


@pytest.mark.parametrize("x64", [False, True])
def test_priority_traces_and_keeps_its_precision(x64):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        arguments = (
            np.array([4.0, 6.0]),
            np.array([1, 2]),
            np.array([1.0, 2.0]),
            np.array([1.0, 4.0]),
        )
        for call in (scores.priority, jax.jit(scores.priority)):
            got = call(*arguments)
            assert got.dtype == (jnp.float64 if x64 else jnp.float32)
            np.testing.assert_allclose(got, [2, 1], rtol=5e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_neither_overflow_nor_vanish(scale):
    x = normal((5,)) * np.float32(scale)
    wide = np.linalg.norm(x.astype(np.float64))
    np.testing.assert_allclose(scores.magnitude(x, "norm"), wide, rtol=5e-6)
    np.testing.assert_allclose(scores.magnitude([x, x[:0]], "rms"), wide / 5**0.5, rtol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_and_gain_have_the_precision_of_their_leaves(kind):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = jnp.asarray(normal((5,), np.float64))
        assert x.dtype == jnp.float64
        assert scores.magnitude(x.astype(jnp.float32), kind).dtype == jnp.float32
        for scale in (1e-200, 1e200):
            got = scores.magnitude([x * scale, x.astype(jnp.bfloat16)[:0]], kind)
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, scores.magnitude(x, kind) * scale, rtol=1e-12)
        for y in (x, x.astype(jnp.float32), x.astype(jnp.bfloat16), x.astype(jnp.complex64)):
            assert scores.gain(x, y).dtype == jnp.float64


# Depth factors and costs.


def test_depth_factors_are_powers():
    got = scores.depth_factors(chain(4), 3.0)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    assert got.tolist() == [27, 9, 3, 1]
    np.testing.assert_allclose(scores.depth_factors(chain(3)), [1.21, 1.1, 1], rtol=5e-6)
    assert scores.depth_factors(chain(3), 1).tolist() == [1, 1, 1]
    assert scores.depth_factors(chain(3), 0.5).tolist() == [0.25, 0.5, 1]


def test_a_users_depth_factor_is_given_the_names():
    table = {"layer_000": 2, "layer_001": 0.5, "layer_002": np.float32(7)}
    assert scores.depth_factors(chain(3), depth_factor=table.__getitem__).tolist() == [2, 0.5, 7]
    # It replaces the base, whatever that is.
    assert scores.depth_factors(chain(2), -1.0, lambda name: 5).tolist() == [5, 5]


def test_no_slots():
    empty = find_slots({})
    assert scores.depth_factors(empty).shape == (0,)
    assert scores.depth_factors(empty, depth_factor=len).shape == (0,)
    assert scores.cost_vector(empty, {}).shape == (0,)
    assert scores.priority(jnp.zeros(0), jnp.zeros(0, jnp.int32), np.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("base", "length", "depth"),
    [
        pytest.param(0.0, 2, 1, id="zero"),
        pytest.param(-1.1, 2, 1, id="negative"),
        pytest.param(float("nan"), 2, 1, id="nan"),
        pytest.param(float("inf"), 2, 1, id="infinite"),
        pytest.param(2.0, 200, 199, id="too large for float32"),
        pytest.param(1e300, 3, 2, id="too large for a float"),
        pytest.param(0.5, 200, 199, id="too small for float32"),
    ],
)
def test_bases_that_give_no_factor_are_errors(base, length, depth):
    message = (
        rf"depth_base={re.escape(str(base))} at depth {depth} is .*, "
        "but must be a finite float32 above 0"
    )
    with pytest.raises(ValueError, match=message):
        scores.depth_factors(chain(length), base)


BAD = [0, -1.0, float("nan"), float("inf"), 1e39, 1e-60]


@pytest.mark.parametrize("value", BAD)
def test_users_factors_must_be_above_zero_in_float32(value):
    factor = lambda name: value if name == "layer_001" else 1.0  # noqa: E731
    with pytest.raises(ValueError, match=r"depth_factor\('layer_001'\) is .* finite float32 above"):
        scores.depth_factors(chain(3), depth_factor=factor)


def test_costs_are_ordered_as_the_slots():
    slots = find_slots(
        {"b": 1.0, "a": jnp.ones((2, 3))}, stacked_axis=lambda p: 0 if p == "a" else None
    )
    got = scores.cost_vector(slots, {"b": 3, "a[1]": 2.0, "a[0]": 0.5})
    assert got.tolist() == [0.5, 2, 3] and got.dtype == np.float32


@pytest.mark.parametrize(
    ("costs", "odd"),
    [
        ({"layer_000": 1.0}, "layer_001"),
        ({"layer_000": 1.0, "layer_001": 1.0, "layer_007": 1.0}, "layer_007"),
        ({}, "layer_000"),
    ],
)
def test_costs_must_name_every_slot_and_no_other(costs, odd):
    with pytest.raises(ValueError, match=f"every slot and no other; look at '{odd}'"):
        scores.cost_vector(chain(2), costs)


@pytest.mark.parametrize("value", BAD)
def test_costs_must_be_above_zero_in_float32(value):
    with pytest.raises(
        ValueError, match=r"costs\['layer_001'\] is .*, but must be a finite float32"
    ):
        scores.cost_vector(chain(2), {"layer_000": 1.0, "layer_001": value})


# Scores by name, and of one's own.


def look(**changes):
    slots, ones = chain(3), jnp.ones(3)
    grads = [jnp.array([1.0, 3.0]), None, jnp.array([-5.0])]
    given = dict(
        slots=slots, step=jnp.int32(7), counts=jnp.array([4, 1, 2]), depth_factors=2 * ones,
        costs=jnp.array([1.0, 1.0, 4.0]), last=ones,
        measure=lambda fn: scores.measure(slots, fn, grads), weigh=lambda: jnp.array([2.0, 0, 5]),
    )  # fmt: skip
    return scores.Look(**(given | changes))


def test_scores_by_name():
    expected = {
        "priorityprop": [2 * 2 / 5, 0, 5 * 2 / 3 / 4],
        "gain": [10 / 1, 0, 25 / 4],
        "change": [1, 1, 4],
        "robin": [0, 3, 2],
        "uniform": [1, 1, 1],
    }
    with_updates = lambda fn: jnp.array([fn([g], None, [g]) for g in at], jnp.float32)  # noqa: E731
    at = [jnp.array([1.0, 3.0]), jnp.zeros(1), jnp.array([-5.0])]
    for name, wanted in expected.items():
        np.testing.assert_allclose(scores.score(look(measure=with_updates), name), wanted)
    draws = [scores.score(look(step=jnp.int32(i)), "random") for i in (1, 1, 2)]
    assert jnp.all((draws[0] >= 0) & (draws[0] < 1)) and not jnp.array_equal(draws[0], draws[2])
    np.testing.assert_array_equal(draws[0], draws[1])
    assert set(scores.SCORES) == {*expected, "random"}


def test_a_score_of_ones_own_is_a_vector_and_counts_as_zero_where_it_is_not_finite():
    own = lambda look: look.measure(lambda grads, params, updates: grads[0].sum())  # noqa: E731
    assert scores.score(look(), own).tolist() == [4, 0, -5]
    assert scores.score(look(), lambda _: jnp.array([jnp.nan, jnp.inf, 2])).tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match=r"a vector of one number a slot, \[3\], got shape \(1,\)"):
        scores.score(look(), lambda _: jnp.ones(1))
    with pytest.raises(ValueError, match="score must be one of .*'robin'.* got 'gian'"):
        scores.check_score("gian", ("gain",))
