"""Masks against a stable sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse.masks import as_mask, magnitude_masks, random_mask


def reference(arrays, sparsity):
    """The largest magnitudes of all arrays by a stable sort, NaN first."""
    flat = np.concatenate([np.abs(np.asarray(x, np.float64)).reshape(-1) for x in arrays])
    flat = np.where(np.isnan(flat), np.inf, flat)
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[: round((1 - sparsity) * flat.size)]] = True
    parts = np.split(kept, np.cumsum([x.size for x in arrays])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True)]


def make_params():
    rng = np.random.default_rng(0)
    ties = rng.integers(-3, 4, size=(8, 9)).astype(np.float32)
    ties[2, 3] = np.nan
    return {
        "a": {"kernel": jnp.asarray(ties), "bias": jnp.ones(9)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.bfloat16)},
        "steps": jnp.ones((2, 2), jnp.int32),
    }


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_magnitude_masks_keep_the_largest(scope):
    params = make_params()
    kernels = [params["a"]["kernel"], params["b"]["kernel"]]
    for sparsity in (0.0, 0.3, 0.5, 0.9, 0.99, 1.0):
        masks = magnitude_masks(params, sparsity, scope=scope)
        found = [masks["a"]["kernel"], masks["b"]["kernel"]]
        if scope == "global":
            expected = reference(kernels, sparsity)
        else:
            expected = [reference([kernel], sparsity)[0] for kernel in kernels]
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == bool
            np.testing.assert_array_equal(one, other)
        assert masks["a"]["bias"] is None and masks["steps"] is None


def test_leaves_are_chosen_by_path_and_dimensions():
    params = make_params()
    masks = magnitude_masks(params, 0.5, where=lambda path: path == "a/kernel")
    assert masks["b"]["kernel"] is None and masks["a"]["kernel"] is not None
    assert magnitude_masks({"bias": jnp.ones(3)}, 0.5, scope="global") == {"bias": None}


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 80"):
        magnitude_masks({}, 80)
    with pytest.raises(ValueError, match="scope must be one of"):
        magnitude_masks({}, 0.5, scope="layer")
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\]"):
        random_mask(jax.random.key(0), (2,), -0.1)


def test_random_masks_keep_exactly_as_many():
    key = jax.random.key(1)
    mask = random_mask(key, (4, 5), 0.75)
    assert mask.dtype == bool and mask.shape == (4, 5) and int(mask.sum()) == 5
    np.testing.assert_array_equal(mask, random_mask(key, (4, 5), 0.75))
    assert np.any(np.asarray(mask) != random_mask(jax.random.key(2), (4, 5), 0.75))


def test_masks_of_jaxpruner_are_accepted():
    expected = np.random.default_rng(0).random((3, 5)) < 0.4
    for mask in (expected, expected.astype(np.uint8), expected * 1.0, jnp.packbits(expected)):
        found = as_mask(mask, (3, 5), "kernel")
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == bool


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"'kernel' must be of shape \(3, 5\), got \(5, 3\)"):
        as_mask(jnp.ones((5, 3)), (3, 5), "kernel")
    for wrong in (2, jnp.nan):
        with pytest.raises(ValueError, match="zeros and ones only"):
            as_mask(jnp.full((3, 5), wrong), (3, 5), "kernel")


def test_ranks_are_promoted_by_nobody_else():
    with jax.numpy_rank_promotion("raise"):
        magnitude_masks(make_params(), 0.5, scope="global")
