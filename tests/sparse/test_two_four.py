"""Packed 2:4 weights against the masks that they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse import two_four
from priorityprop_jax.sparse.masks import two_four_mask


def make(shape, seed=0):
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return weight, np.asarray(two_four_mask(weight))


@jax.jit
def there_and_back(weight, pattern):
    values = two_four.take_two_four(weight, pattern)
    return values, two_four.densify_two_four(values, pattern)


@pytest.mark.parametrize("ins", [4, 8, 12])
def test_packing_and_back(ins):
    weight, mask = make((5, ins), ins)
    pattern = two_four.pack_two_four(mask)
    assert pattern.positions.dtype == np.uint8 and pattern.positions.shape == (5, -(-ins // 8))
    assert two_four.is_two_four(mask)
    values, dense = there_and_back(weight, pattern)
    np.testing.assert_array_equal(values, weight[mask].reshape(5, ins // 2))
    np.testing.assert_array_equal(dense, weight * mask)


def test_all_six_pairs():
    pairs = [[int(i in pair) for i in range(4)] for pair in
             ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]  # fmt: skip
    pattern = two_four.pack_two_four(np.array(pairs))
    assert two_four.densify_two_four(jnp.array([[1.0, 2.0]] * 6), pattern).tolist() == [
        [1, 2, 0, 0], [1, 0, 2, 0], [1, 0, 0, 2], [0, 1, 2, 0], [0, 1, 0, 2], [0, 0, 1, 2],
    ]  # fmt: skip


def test_products_are_those_of_the_dense_weight():
    weight, mask = make((6, 12))
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((12, 3), (6, 3)))
    pattern = two_four.pack_two_four(mask)
    values, _ = there_and_back(weight, pattern)
    exact = (weight * mask).astype(np.float64)
    y = jax.jit(two_four.forward)(values, pattern, x)
    dx, dvalues = jax.jit(two_four.backward)(values, pattern, x, dy)
    np.testing.assert_allclose(y, exact @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, exact.T @ dy, rtol=1e-5, atol=1e-6)
    expected = (dy.astype(np.float64) @ x.T)[mask].reshape(6, 6)
    np.testing.assert_allclose(dvalues, expected, rtol=1e-5, atol=1e-6)
    assert two_four.backward(values, pattern, x, dy, inputs=False, weights=False) == (None, None)


def test_a_nan_among_the_values_stays_in_its_row():
    _, mask = make((3, 8))
    pattern = two_four.pack_two_four(mask)
    values = np.ones((3, 4), np.float32)
    values[1, 2] = np.nan
    dense = np.asarray(two_four.densify_two_four(values, pattern))
    np.testing.assert_array_equal(dense != 0, mask)
    np.testing.assert_array_equal(two_four.mask_of_two_four(pattern), mask)
    assert np.isnan(dense).sum() == 1 and np.isnan(dense[1]).any()


def test_wrong_masks_are_refused():
    assert not two_four.is_two_four(np.ones((2, 4)))
    assert not two_four.is_two_four(np.array([[1, 0, 0, 0]]))
    assert not two_four.is_two_four(np.array([1, 1, 0, 0]))
    with pytest.raises(ValueError, match="multiple of 4 inputs, got 6"):
        two_four.pack_two_four(np.ones((2, 6)))
    with pytest.raises(ValueError, match="exactly two of every four"):
        two_four.pack_two_four(np.ones((2, 4)))
    with pytest.raises(ValueError, match="must be a matrix"):
        two_four.pack_two_four(np.array([1, 1, 0, 0]))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(two_four.pack_two_four)(np.array([[1, 1, 0, 0]]))
