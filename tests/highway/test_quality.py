"""Cosines and norm ratios against NumPy's own."""

import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.highway.quality import (
    format_quality,
    gradient_quality,
    gradient_quality_table,
)
from priorityprop_jax.highway.scan import highway_scan


def draw(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(3, 4, 5)), "b": [rng.normal(size=(3, 2))]}


def expected(g, other):
    norms = np.linalg.norm(g), np.linalg.norm(other)
    return np.vdot(g, other) / norms[0] / norms[1], norms[1] / norms[0]


def flat(tree, index=...):
    return np.concatenate([tree["a"][index].ravel(), tree["b"][0][index].ravel()])


def test_a_row_is_a_leaf_or_a_layer():
    exact, near = draw(0), draw(1)
    rows = {row.layer: row for row in gradient_quality(exact, near)}
    assert list(rows) == ["a", "b/0", "all"]
    np.testing.assert_allclose(rows["a"][2:], expected(exact["a"], near["a"]))
    np.testing.assert_allclose(rows["b/0"][2:], expected(exact["b"][0], near["b"][0]))
    np.testing.assert_allclose(rows["all"][2:], expected(flat(exact), flat(near)))
    rows = gradient_quality(exact, near, axis=0, iterations=2)
    assert [row.layer for row in rows] == ["layer 0", "layer 1", "layer 2", "all"]
    assert {row.iterations for row in rows} == {2}
    for i, row in enumerate(rows[:3]):
        np.testing.assert_allclose(row[2:], expected(flat(exact, i), flat(near, i)))
    np.testing.assert_allclose(rows[3][2:], expected(flat(exact), flat(near)))


def test_nothing_has_no_direction_and_a_nan_is_seen():
    zero, one = np.zeros(2), jnp.ones(2, jnp.bfloat16)
    (row, _) = gradient_quality({"a": one}, {"a": zero})
    assert np.isnan(row.cosine) and row.norm_ratio == 0
    (row, _) = gradient_quality({"a": one}, {"a": one * np.nan})
    assert np.isnan(row.cosine) and np.isnan(row.norm_ratio)


@pytest.mark.parametrize(
    ("exact", "near", "axis", "match"),
    [
        ({"a": np.ones(2)}, {"b": np.ones(2)}, None, "structure"),
        ({"a": np.ones(2)}, {"a": np.ones(3)}, None, "shapes"),
        ({}, {}, None, "no gradient"),
        ({"a": np.ones(2), "b": np.ones(3)},) * 2 + (0, r"sizes \[2, 3\]"),
        ({"a": np.ones(2)},) * 2 + (1, "no axis 1"),
    ],
)
def test_what_can_not_be_compared(exact, near, axis, match):
    with pytest.raises(ValueError, match=match):
        gradient_quality(exact, near, axis=axis)


def test_more_rounds_come_nearer_in_the_table():
    params = {"head": jnp.ones(3), "blocks": 0.2 * np.random.default_rng(0).normal(size=(4, 3, 3))}

    def make_loss(k):
        def loss(params, x):
            y = highway_scan(lambda p, x: x + x @ p, params["blocks"], x, iterations=k)
            return jnp.sum(y * params["head"])

        return loss

    pick = lambda grads: grads["blocks"]  # noqa: E731
    rows = gradient_quality_table(
        make_loss, [0, 1, 3], params, jnp.ones((2, 3)), axis=0, select=pick
    )
    whole = [row.cosine for row in rows if row.layer == "all"]
    assert whole == sorted(whole) and whole[0] < 0.999 and whole[-1] == pytest.approx(1)
    lines = format_quality(rows).splitlines()
    assert len(lines) == 6 and "cosine, k = 3" in lines[0]
    assert lines[1].split()[:3] == ["layer", "0", f"{rows[0].cosine:.4f}"]
    leaves = gradient_quality(params, params)
    assert "k =" not in format_quality(leaves)
    with pytest.raises(ValueError, match="no rows"):
        format_quality([])
    with pytest.raises(ValueError, match="at least one"):
        gradient_quality_table(make_loss, [], params)
