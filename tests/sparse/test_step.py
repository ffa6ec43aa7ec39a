"""Dropping and growing against a sort in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse.pattern import (
    carry,
    check_pattern,
    densify_values,
    make_pattern,
    mask_of,
)
from priorityprop_jax.sparse.step import cosine_fraction, drop_and_grow


def reference(values, mask, scores, fraction):
    """The new mask of single places; `values` by row as in the pattern."""
    mask, scores = mask.copy(), np.where(np.isnan(scores), -np.inf, scores)
    places = [(int(i), int(j)) for i, j in zip(*np.nonzero(mask), strict=True)]
    moved = round(fraction * len(places))
    size = {place: abs(float(v)) for place, v in zip(places, values, strict=False)}
    size = {place: np.inf if np.isnan(v) else v for place, v in size.items()}
    dropped = sorted(places, key=lambda place: -size[place])[len(places) - moved :]
    outside = sorted(
        (place for place in np.ndindex(mask.shape) if not mask[place]),
        key=lambda place: -scores[place],
    )
    back = sorted(sorted(dropped), key=lambda place: -scores[place])
    for place in dropped:
        mask[place] = False
    for place in (outside + back)[:moved]:
        mask[place] = True
    return mask


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_places_move_from_small_values_to_large_scores(density):
    rng = np.random.default_rng(int(10 * density))
    mask = rng.random((6, 7)) < density
    pattern = make_pattern(mask, capacity=45)
    values = np.full(45, np.nan, np.float32)
    used = int(mask.sum())
    values[:used] = rng.integers(-3, 4, used)  # many of one magnitude
    values[1:used:9] = np.nan
    scores = rng.integers(0, 4, (6, 7)).astype(np.float32)
    scores[rng.random((6, 7)) < 0.1] = np.nan
    for fraction in (0.0, 0.3, 1.0):
        changed, source = drop_and_grow(values, pattern, scores, fraction=fraction)
        check_pattern(changed)
        assert changed.capacity == 45 and int(changed.row_starts[-1]) == used
        expected = reference(values, mask, scores, fraction)
        np.testing.assert_array_equal(mask_of(changed), expected)
        before = np.zeros((6, 7), np.float32)
        before[mask] = values[:used]
        after = densify_values(carry(jnp.asarray(values), source), changed)
        np.testing.assert_array_equal(after, np.where(mask & expected, before, 0))


def test_bfloat16_is_taken():
    pattern = make_pattern(np.array([[1, 1, 0]]))
    values = jnp.array([1, 2], jnp.bfloat16)
    changed, _ = drop_and_grow(values, pattern, values[jnp.array([[0, 0, 1]])], fraction=0.5)
    assert mask_of(changed).tolist() == [[False, True, True]]


def test_the_schedule_is_the_papers():
    steps = np.arange(150)
    expected = np.where(steps < 100, 0.15 * (1 + np.cos(np.pi * steps / 100)), 0)
    np.testing.assert_allclose(cosine_fraction(steps, 100), expected, atol=1e-6)
    assert float(jax.jit(lambda t: cosine_fraction(t, 10, 0.5))(0)) == 0.5
    with pytest.raises(ValueError, match="end must be at least 1"):
        cosine_fraction(0, 0)


def test_wrong_input_is_refused():
    pattern = make_pattern(np.array([[1, 1, 0]]))
    values, scores = np.ones(2), np.ones((1, 3))
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
        drop_and_grow(values, pattern, scores, fraction=1.5)
    with pytest.raises(ValueError, match="must be of shape"):
        drop_and_grow(values, pattern, scores.T, fraction=0.5)
    with pytest.raises(ValueError, match="must be of shape"):
        drop_and_grow(np.ones(3), pattern, scores, fraction=0.5)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda v: drop_and_grow(v, pattern, scores, fraction=0.5))(values)
