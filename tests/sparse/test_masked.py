"""Dense products on scattered values against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.sparse import masked
from priorityprop_jax.sparse.pattern import make_pattern


def test_products_are_those_of_the_dense_weight():
    forward, backward = jax.jit(masked.forward), jax.jit(masked.backward)
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 10), (3, 6)))
    for density in (0, 0.02, 0.4, 1):
        mask = rng.random((6, 10)) < density
        pattern = make_pattern(mask, capacity=60)
        weight = (rng.normal(size=mask.shape) * mask).astype(np.float32)
        values, expected = np.full(60, np.nan, np.float32), np.zeros(60)
        values[: mask.sum()] = weight[mask]
        expected[: mask.sum()] = (dy.astype(np.float64).T @ x)[mask]
        y, (dx, dvalues) = forward(values, pattern, x), backward(values, pattern, x, dy)
        exact = weight.astype(np.float64)
        np.testing.assert_allclose(y, x @ exact.T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx, dy @ exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dvalues, expected, rtol=1e-5, atol=1e-6)
        assert not np.any(np.asarray(dvalues)[mask.sum() :])
    x, dy = map(jnp.asarray, (x, dy))
    assert masked.backward(values, pattern, x, dy, inputs=False)[0] is None
    assert masked.backward(values, pattern, x, dy, weights=False)[1] is None
