"""Products of blocks against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse import block
from priorityprop_jax.sparse.pattern import make_pattern, mask_of

B, OUTS, INS, BATCH, CAPACITY = 16, 5, 7, 3, 35


@functools.cache
def kernels(form):
    """The forms by platform; `loop` is what a CPU gets from the public functions."""
    if form == "loop":
        return jax.jit(block.forward), jax.jit(block.backward)

    @jax.jit
    def forward(values, pattern, x):
        return block._multiply(values, pattern.row_starts, pattern.columns, x)

    @jax.jit
    def backward(values, pattern, x, dy):
        transposed = values[pattern.order].swapaxes(1, 2)
        dx = block._multiply(transposed, pattern.column_starts, pattern.rows, dy)
        return dx, block._outer(pattern.row_starts, pattern.columns, dy, x)

    return forward, backward


def make(mask, seed=0, side=B):
    """Values with NaN at the places that are not used."""
    rng = np.random.default_rng(seed)
    pattern = make_pattern(np.kron(mask, np.ones((side, side))), capacity=CAPACITY, block=side)
    values = rng.normal(size=(CAPACITY, side, side)).astype(np.float32)
    values[int(pattern.row_starts[-1]) :] = np.nan
    x = rng.normal(size=(INS * side, BATCH)).astype(np.float32)
    dy = rng.normal(size=(OUTS * side, BATCH)).astype(np.float32)
    return values, pattern, x, dy


def reference(values, pattern, x, dy):
    """Block by block in float64, only the places in use."""
    side = pattern.block
    y, dx, dvalues = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(values.shape)
    starts, columns = np.asarray(pattern.row_starts), np.asarray(pattern.columns)
    for row in range(pattern.grid[0]):
        for k in range(starts[row], starts[row + 1]):
            here = slice(row * side, (row + 1) * side)
            there = slice(columns[k] * side, (columns[k] + 1) * side)
            value = values[k].astype(np.float64)
            y[here] += value @ x[there]
            dx[there] += value.T @ dy[here]
            dvalues[k] = dy[here].astype(np.float64) @ x[there].T.astype(np.float64)
    return y, dx, dvalues


def masks():
    rng = np.random.default_rng(1)
    one = np.zeros((OUTS, INS))
    one[3, 5] = 1
    uneven = rng.random((OUTS, INS)) < 0.3
    uneven[1], uneven[2], uneven[:, 4] = True, False, False  # full and empty lines
    yield from (np.zeros((OUTS, INS)), one, uneven, np.ones((OUTS, INS)))
    yield from (rng.random((OUTS, INS)) < density for density in (0.1, 0.5, 0.8))


@pytest.mark.parametrize("form", ["loop", "batched"])
def test_products_are_those_of_the_dense_weight(form):
    forward, backward = kernels(form)
    for seed, mask in enumerate(masks()):
        case = make(mask, seed)
        expected = reference(*case)
        found = forward(*case[:3]), *backward(*case)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * max(1, abs(other).max()))
        used = int(case[1].row_starts[-1])
        assert not np.any(np.asarray(found[2])[used:])
        again = forward(*case[:3]), *backward(*case)
        jax.tree.map(np.testing.assert_array_equal, found, again)
    assert forward._cache_size() == backward._cache_size() == 1


@pytest.mark.parametrize("form", ["loop", "batched"])
def test_a_nan_reaches_what_is_connected_to_it_and_nothing_else(form):
    forward, backward = kernels(form)
    values, pattern, x, dy = make(np.random.default_rng(3).random((OUTS, INS)) < 0.4, 3)
    mask = mask_of(pattern)
    for bad in (np.nan, np.inf):
        hit_x, hit_dy = x.copy(), dy.copy()
        hit_x[2 * B + 1, 1] = hit_dy[3 * B + 2, 0] = bad
        y = np.asarray(forward(values, pattern, hit_x))
        np.testing.assert_array_equal(np.isfinite(y[:, 1]), ~mask[:, 2 * B + 1])
        assert np.isfinite(y[:, [0, 2]]).all()
        dx, dvalues = backward(values, pattern, x, hit_dy)
        np.testing.assert_array_equal(np.isfinite(dx)[:, 0], ~mask[3 * B + 2])
        lines = np.repeat(np.arange(OUTS), np.diff(pattern.row_starts))
        finite = np.isfinite(dvalues)[: len(lines)].all(axis=(1, 2))
        np.testing.assert_array_equal(finite, lines != 3)


@pytest.mark.parametrize("side", [2, 96])
def test_small_and_large_blocks(side):
    case = make(np.random.default_rng(side).random((OUTS, INS)) < 0.6, side, side=side)
    found = jax.jit(lambda *case: (block.forward(*case[:3]), *block.backward(*case)))(*case)
    for one, other in zip(found, reference(*case), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted():
    values, pattern, x, dy = make(np.eye(OUTS, INS))
    shape = functools.partial(jax.eval_shape, block.backward)
    none = shape(values, pattern, x, dy)
    assert [one.shape for one in none] == [x.shape, values.shape]
    for inputs, weights in ((True, False), (False, True), (False, False)):
        wanted = functools.partial(block.backward, inputs=inputs, weights=weights)
        dx, dvalues = jax.eval_shape(wanted, values, pattern, x, dy)
        assert (dx is not None, dvalues is not None) == (inputs, weights)


def test_work_follows_the_places():
    def flops(mask):
        capacity = int(mask.sum())
        pattern = make_pattern(np.kron(mask, np.ones((B, B))), block=B)
        shapes = jnp.zeros((capacity, B, B)), pattern, jnp.zeros((INS * B, BATCH))
        batched = jax.jit(lambda v, p, x: block._multiply(v, p.row_starts, p.columns, x))
        return batched.lower(*shapes).compile().cost_analysis()["flops"]

    assert flops(np.eye(OUTS, INS)) < 0.5 * flops(np.ones((OUTS, INS)))
