"""Dense products on scattered values against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse import masked
from priorityprop_jax.sparse.pattern import make_pattern


@pytest.mark.parametrize("block", [1, 2])
def test_products_are_those_of_the_dense_weight(block):
    forward, backward = jax.jit(masked.forward), jax.jit(masked.backward)
    rng = np.random.default_rng(block)
    x, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((10, 3), (6, 3)))
    grid = 6 // block, 10 // block
    for density in (0, 0.02, 0.4, 1):
        mask = np.kron(rng.random(grid) < density, np.ones((block, block)))
        pattern = make_pattern(mask, capacity=grid[0] * grid[1], block=block)
        used = int(pattern.row_starts[-1])
        weight = (rng.normal(size=mask.shape) * mask).astype(np.float32)
        values = np.full((pattern.capacity, block, block), np.nan, np.float32)
        product = dy.astype(np.float64) @ x.T
        expected = np.zeros(values.shape)
        rows, columns = np.nonzero(mask[::block, ::block])
        for k, (i, j) in enumerate(zip(rows * block, columns * block, strict=True)):
            values[k] = weight[i : i + block, j : j + block]
            expected[k] = product[i : i + block, j : j + block]
        if block == 1:
            values, expected = values.reshape(-1), expected.reshape(-1)
        y, (dx, dvalues) = forward(values, pattern, x), backward(values, pattern, x, dy)
        exact = weight.astype(np.float64)
        np.testing.assert_allclose(y, exact @ x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx, exact.T @ dy, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dvalues, expected, rtol=1e-5, atol=1e-6)
        assert not np.any(np.asarray(dvalues)[used:])
    arrays = map(jnp.asarray, (x, dy))
    x, dy = arrays
    assert masked.backward(values, pattern, x, dy, inputs=False)[0] is None
    assert masked.backward(values, pattern, x, dy, weights=False)[1] is None
