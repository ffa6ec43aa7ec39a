"""Products with a sparse weight against dense ones in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse import csr
from priorityprop_jax.sparse.pattern import make_pattern

# More rows and columns than a slice has, and more places in a row than a step takes.
OUT, IN, BATCH = 150, 140, 20


# References here are products of columns, ``W x``; kernels take batches of rows.
@jax.jit
def FORWARD(values, pattern, x):
    return csr.forward(values, pattern, x.T).T


@functools.partial(jax.jit, static_argnames=("inputs", "weights"))
def BACKWARD(values, pattern, x, dy, **wanted):
    dx, dvalues = csr.backward(values, pattern, x.T, dy.T, **wanted)
    return None if dx is None else dx.T, dvalues


@jax.jit
def one_by_one(pattern, x, dy):
    """The gradient of the values that patterns of few places take."""
    return csr.sampled_product(pattern.columns, csr._row_lines(pattern), x, dy)


def masks():
    rng = np.random.default_rng(0)
    shape = (OUT, IN)
    cases = {f"{p:.0%}": rng.random(shape) >= p for p in (0.0, 0.5, 0.9, 0.99, 1.0)}
    cases["one"] = np.zeros(shape, bool)
    cases["one"][-1, -1] = True
    cases["empty lines"] = rng.random(shape) < 0.3
    cases["empty lines"][::3] = False
    cases["empty lines"][:, 1::4] = False
    cases["heavy lines"] = rng.random(shape) < 0.02
    cases["heavy lines"][7] = cases["heavy lines"][:, 9] = True
    return cases


def case(mask, batch=BATCH, capacity=None, seed=1):
    """Pattern, values (NaN where not used), x, dy, and the dense weight in float64."""
    rng = np.random.default_rng(seed)
    pattern = make_pattern(mask, capacity=capacity)
    weight = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    values = np.full(pattern.capacity, np.nan, np.float32)
    values[: mask.sum()] = weight[mask]
    x, dy = (rng.normal(size=(n, batch)).astype(np.float32) for n in mask.shape[::-1])
    return pattern, jnp.asarray(values), x, dy, weight.astype(np.float64)


def close(result, expected, tolerance=2e-6, largest=None):
    """Errors relative to the largest entry, or to that of a larger array."""
    assert result.shape == expected.shape
    result = np.asarray(result, np.float64)
    largest = np.max(np.abs(expected if largest is None else largest), initial=0)
    assert np.max(np.abs(result - expected), initial=0) <= tolerance * largest


def check(pattern, values, x, dy, weight, mask, tolerance=2e-6):
    used = int(pattern.row_starts[-1])
    dense = dy.astype(np.float64) @ x.astype(np.float64).T
    close(FORWARD(values, pattern, x), weight @ x, tolerance)
    dx, dvalues = BACKWARD(values, pattern, x, dy)
    close(dx, weight.T @ dy, tolerance)
    for result in (dvalues, one_by_one(pattern, x, dy)):
        close(result[:used], dense[mask], tolerance, dense)
        assert not np.asarray(result[used:]).any()


@pytest.mark.parametrize("name", masks())
def test_products_are_those_of_the_dense_weight(name):
    mask = masks()[name]
    check(*case(mask, capacity=OUT * IN), mask)


def test_patterns_of_few_places_take_the_other_way_for_the_values():
    mask = masks()["99%"]
    pattern, values, x, dy, _ = case(mask, capacity=mask.sum() + 3)
    assert not csr.cheaper_dense(pattern)
    _, dvalues = BACKWARD(values, pattern, x, dy, inputs=False)
    dense = dy.astype(np.float64) @ x.astype(np.float64).T
    close(dvalues[:-3], dense[mask], largest=dense)
    assert not np.asarray(dvalues[-3:]).any()


@pytest.mark.parametrize("batch", [1, 1100])
def test_batches_of_any_size(batch):
    mask = np.random.default_rng(2).random((9, 21)) < 0.4
    check(*case(mask, batch), mask)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (3, 4)])
def test_batches_of_nothing(shape):
    pattern = make_pattern(np.ones(shape))
    values = jnp.ones(pattern.capacity)
    x, dy = jnp.ones((0, shape[1])), jnp.ones((0, shape[0]))
    assert csr.forward(values, pattern, x).shape == (0, shape[0])
    dx, dvalues = csr.backward(values, pattern, x, dy)
    assert dx.shape == x.shape and not dvalues.any()


def test_starts_of_columns_that_were_never_filled_in_are_seen():
    pattern = make_pattern(np.eye(3))
    empty = dataclasses.replace(pattern, column_starts=jnp.zeros_like(pattern.column_starts))
    dx, _ = csr.backward(jnp.ones(3), empty, jnp.ones((2, 3)), jnp.ones((2, 3)))
    assert np.isnan(dx).all()


def test_halves_that_are_not_wanted_are_none_and_cost_nothing():
    pattern, values, x, dy, _ = case(masks()["90%"])
    x, dy = x.T, dy.T
    for inputs, weights in ((True, False), (False, True), (False, False)):
        both = functools.partial(csr.backward, inputs=inputs, weights=weights)
        dx, dvalues = jax.eval_shape(both, values, pattern, x, dy)
        assert (dx is not None, dvalues is not None) == (inputs, weights)
    # Gradients that do not need an argument do not read it.
    only = functools.partial(csr.backward, weights=False)
    used = jax.make_jaxpr(only)(values, pattern, x, dy).jaxpr
    x_var = used.invars[-2]
    assert all(x_var is not v for eqn in used.eqns for v in eqn.invars)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_what_the_dense_product_reads(bad):
    mask = masks()["empty lines"].copy()
    mask[:, 0] = np.arange(OUT) == 1
    mask[4] = np.arange(IN) == 2
    pattern, values, x, dy, weight = case(mask, capacity=OUT * IN)
    x[0, 3] = dy[4, 5] = bad
    y = np.asarray(FORWARD(values, pattern, x))
    expected = np.zeros(y.shape, bool)
    expected[1, 3] = True
    np.testing.assert_array_equal(~np.isfinite(y), expected)
    dx, dvalues = BACKWARD(values, pattern, x, dy)
    expected = np.zeros(dx.shape, bool)
    expected[2, 5] = True
    np.testing.assert_array_equal(~np.isfinite(dx), expected)
    rows, columns = np.nonzero(mask)
    for result in (dvalues, one_by_one(pattern, x, dy)):
        reads = (columns == 0) | (rows == 4)
        np.testing.assert_array_equal(~np.isfinite(result[: len(rows)]), reads)
        assert not np.asarray(result[len(rows) :]).any()
    values = values.at[0].set(bad)
    assert np.isin(np.nonzero(~np.isfinite(FORWARD(values, pattern, x)))[0], [1, rows[0]]).all()
    assert not np.isfinite(FORWARD(values, pattern, x)[rows[0]]).any()


def test_sums_of_bfloat16_are_float32():
    mask = np.ones((4, 300), bool)
    pattern, values, x, dy, _ = case(mask)
    values, x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (values, x, dy))
    weight, x64, dy64 = (np.asarray(a, np.float64) for a in (values.reshape(mask.shape), x, dy))
    y = FORWARD(values, pattern, x)
    dx, dvalues = BACKWARD(values, pattern, x, dy)
    assert y.dtype == dx.dtype == dvalues.dtype == jnp.bfloat16
    # One rounding of the result, 2^-9 of it, and no more.
    close(y, weight @ x64, 2**-8)
    close(dx, weight.T @ dy64, 2**-8)
    close(dvalues, (dy64 @ x64.T)[mask], 2**-8)


def test_float64():
    mask = np.random.default_rng(3).random((9, 21)) < 0.4
    with jax.enable_x64(True):
        pattern, values, x, dy, _ = case(mask)
        values, x, dy = (np.asarray(a, np.float64) for a in (values, x, dy))
        weight = np.zeros(mask.shape)
        weight[mask] = values
        check(pattern, jnp.asarray(values), x, dy, weight, mask, 1e-14)


def test_another_pattern_of_the_same_capacity_compiles_nothing():
    compiled = jax.jit(lambda *args: csr.forward(*args))
    for name in ("50%", "90%", "one"):
        pattern, values, x, _, _ = case(masks()[name], capacity=OUT * IN)
        compiled(values, pattern, x.T)
    assert compiled._cache_size() == 1
