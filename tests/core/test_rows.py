"""Row-sparse arrays against the dense arrays that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax.core.rows import (
    RowSparse,
    are_ascending,
    clip_by_global_norm,
    densify,
    is_row_sparse,
    on_values,
)

SHAPE = (6, 3)


def make(rows, shape=SHAPE, dtype=jnp.float32, seed=0):
    """Random values; NaN where a row is padding."""
    values = np.random.default_rng(seed).normal(size=(len(rows), *shape[1:]))
    values[np.asarray(rows, int) >= shape[0]] = np.nan
    return RowSparse(jnp.asarray(rows, jnp.int32), jnp.asarray(values, dtype), shape)


def dense(x):
    whole = np.zeros(x.shape, np.float32)
    for row, values in zip(np.asarray(x.rows), np.asarray(x.values, np.float32), strict=True):
        if row < x.shape[0]:
            whole[row] = values
    return whole


ROWS = {"some": [1, 4], "padded": [0, 5, 6, 9], "all": list(range(6)), "none": [], "pad": [7]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("shape", [SHAPE, (6, 2, 3), (6,)], ids=str)
def test_densify(rows, shape):
    x = make(rows, shape)
    tree = densify({"a": [x, jnp.ones(2)], "b": None})
    np.testing.assert_array_equal(tree["a"][0], dense(x))
    np.testing.assert_array_equal(tree["a"][1], [1.0, 1.0])
    assert tree["b"] is None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_dtypes(dtype):
    x = make(ROWS["padded"], dtype=dtype)
    assert x.densify().dtype == dtype
    np.testing.assert_array_equal(np.asarray(jax.jit(densify)(x), np.float32), dense(x))


def test_no_rows_at_all():
    assert make([], (0, 3)).densify().shape == (0, 3)
    assert make([1], (4, 0)).densify().shape == (4, 0)


def test_is_a_pytree_with_paths():
    x = make([1, 4])
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path({"w": x})]
    assert paths == ["['w'].rows", "['w'].values"]
    assert jax.tree.map(lambda leaf: leaf, x).rows.tolist() == [1, 4]
    assert jax.tree.map(lambda _: None, x).values is None
    assert jax.tree.structure(x) == jax.tree.structure(make([2, 3]))
    assert jax.tree.structure(x) != jax.tree.structure(make([2, 3], (7, 3)))
    assert [is_row_sparse(y) for y in (x, x.rows, None)] == [True, False, False]


def test_transformations_of_jax():
    x = make([1, 4])
    np.testing.assert_array_equal(jax.jit(lambda x: x)(x).densify(), dense(x))
    abstract = jax.eval_shape(
        lambda x: RowSparse(x.rows, x.values.astype(jnp.bfloat16), x.shape), x
    )
    assert abstract.values == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    assert jax.eval_shape(RowSparse.densify, abstract).shape == SHAPE
    two = jax.tree.map(lambda *leaves: jnp.stack(leaves), x, make([0, 8], seed=1))
    for i, whole in enumerate(jax.vmap(RowSparse.densify)(two)):
        np.testing.assert_array_equal(whole, dense([x, make([0, 8], seed=1)][i]))


@pytest.mark.parametrize("rows", [(), (2,), (3, 4, 5), (0, 2, 3, 5)])
def test_static_rows_are_no_child(rows):
    x = make(rows)
    static = RowSparse(rows, x.values, x.shape)
    assert [leaf.shape for leaf in jax.tree.leaves(static)] == [x.values.shape]
    halved, _ = optax.scale(-0.5).update(static, optax.EmptyState())
    same, _ = on_values(optax.scale(-0.5)).update(static, optax.EmptyState())
    whole = jnp.ones(SHAPE)
    for found in (halved, same, jax.jit(lambda x: x)(halved)):
        assert found.rows == rows
        np.testing.assert_array_equal(found.densify(), -0.5 * dense(x))
        np.testing.assert_allclose(whole + found, 1 - 0.5 * dense(x), rtol=5e-6)
        np.testing.assert_allclose(np.ones(SHAPE, np.float32) + found, whole + found)


def make_tree():
    return {
        "w": make([0, 2, 6, 7]),
        "half": make([1, 5], dtype=jnp.bfloat16),
        "b": jnp.array([1.0, -2.0]),
        "absent": None,
    }


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_is_that_of_the_dense_tree(max_norm):
    tree, tx, plain = (
        make_tree(),
        clip_by_global_norm(max_norm),
        optax.clip_by_global_norm(max_norm),
    )
    expected, _ = plain.update(densify(tree), plain.init(None))
    found, state = jax.jit(tx.update)(tree, tx.init(densify(tree)))
    assert state == tx.init(densify(tree))
    assert found["w"].rows.tolist() == [0, 2, 6, 7] and found["absent"] is None
    assert found["half"].values.dtype == jnp.bfloat16
    for name, x in densify(found).items():
        if x is not None:
            tolerance = 1e-2 if name == "half" else 1e-6
            np.testing.assert_allclose(
                np.asarray(x, np.float32), np.asarray(expected[name], np.float32), rtol=tolerance
            )
    if max_norm < 1:
        np.testing.assert_allclose(optax.tree.norm(densify(found)), max_norm, rtol=1e-2)


def test_clip_with_a_norm_that_is_not_finite():
    tree = {"w": RowSparse(jnp.array([1]), jnp.array([[1.0, jnp.nan, 1.0]]), SHAPE)}
    found, _ = clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    assert np.isnan(found["w"].values).all()


def test_on_values_forwards_state_and_extra_arguments():
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append((jax.tree.map(jnp.shape, updates), params, value))
        return jax.tree.map(lambda u: u + state, updates), state + 1

    tx = on_values(optax.GradientTransformationExtraArgs(lambda params: 1, update))
    tree = {"w": make([1, 7]), "b": jnp.ones(2), "absent": None}
    found, state = tx.update(tree, tx.init(None), densify(tree), value=3)
    assert state == 2
    assert seen == [({"w": (2, 3), "b": (2,), "absent": None}, None, 3)]
    np.testing.assert_allclose(found["w"].values, [tree["w"].values[0] + 1, [1, 1, 1]])
    np.testing.assert_array_equal(found["w"].rows, [1, 7])


# Each of these changed the numbers of an int32 array, and no error came of it.
REACH_FOR_ROWS = {
    "scale": optax.scale(2),
    "negated": optax.scale(-1),
    "sign": optax.scale_by_sign(),
    "clip": optax.clip(1),
    "schedule": optax.scale_by_schedule(lambda step: 2),
    "momentum": optax.trace(0.5),
    "decay": optax.add_decayed_weights(1),
    "norm": optax.clip_by_global_norm(1.0),
    "float": optax.scale(0.5),
}


@pytest.mark.parametrize("tx", REACH_FOR_ROWS.values(), ids=REACH_FOR_ROWS.keys())
def test_no_arithmetic_reaches_row_numbers(tx):
    x = make([1, 4])
    with pytest.raises((TypeError, NotImplementedError)):
        tx.update(x, tx.init(x), jax.tree.map(lambda leaf: leaf, x))
    with pytest.raises(TypeError, match="RowSparse rows: use on_values"):
        jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x))(x)


def test_what_only_looks_at_rows_or_empties_them():
    x = make([1, 4])
    tx = optax.apply_if_finite(optax.identity(), 3)
    kept, state = jax.jit(tx.update)(x, tx.init(x))
    assert kept.rows.tolist() == [1, 4] and state.total_notfinite == 0
    none = jax.tree.map(jnp.zeros_like, x)  # zeros name no row
    np.testing.assert_array_equal(jnp.ones(SHAPE) + none, np.ones(SHAPE))
    assert min(none.rows) >= SHAPE[0]
    with pytest.raises(TypeError, match="have become True.*use on_values"):
        _ = jax.tree.map(lambda leaf: True, x).rows


@pytest.mark.parametrize("rows", [[1, 1], [4, 1], [-1, 2], (0, 0), np.array([2, 2, 9])], ids=str)
def test_rows_that_would_be_lost_or_counted_twice(rows):
    rows = rows if isinstance(rows, tuple | np.ndarray) else jnp.array(rows)
    with pytest.raises(ValueError, match="ascending and distinct.*segment_sum"):
        RowSparse(rows, jnp.ones((len(rows), 3)), SHAPE)
    with pytest.raises(TypeError, match="must be whole numbers, got float32"):
        RowSparse(jnp.ones(2), jnp.ones((2, 3)), SHAPE)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.integers(-2, 9), max_size=4), st.booleans())
def test_traced_rows_are_are_ascending_exactly_where_known_ones_are_taken(rows, padding):
    real = [row for row in rows if row < SHAPE[0]] if padding else rows
    behind = rows == real + rows[len(real) :]  # padding comes last
    right = behind and real == sorted(set(real)) and all(0 <= row < SHAPE[0] for row in real)
    traced = IN_ORDER(jnp.array(rows, jnp.int32), padding)
    try:
        known = are_ascending(np.array(rows, np.int32), SHAPE[0], padding=padding)
    except ValueError:
        known = False
    assert known == bool(traced) == right


IN_ORDER = jax.jit(
    lambda rows, padding: are_ascending(rows, SHAPE[0], padding=padding), static_argnums=1
)


def test_traced_rows_that_repeat_are_seen_in_what_they_are_added_to():
    @jax.jit
    def moved(rows):
        return jnp.ones(SHAPE) + RowSparse(rows, jnp.ones((2, 3)), SHAPE)

    np.testing.assert_array_equal(moved(jnp.array([1, 3]))[:, 0], [1, 2, 1, 2, 1, 1])
    np.testing.assert_array_equal(moved(jnp.array([4, 9]))[:, 0], [1, 1, 1, 1, 2, 1])
    for rows in ([3, 3], [3, 1], [-1, 2]):
        found = moved(jnp.array(rows))
        assert np.isnan(found[rows[1]]).all() and not np.isnan(found[0]).any()
    each = jax.vmap(moved)(jnp.array([[1, 3], [3, 3]]))
    assert np.isnan(each).any((1, 2)).tolist() == [False, True]
    with pytest.raises(TypeError, match="must be whole numbers, got float32"):
        moved(jnp.ones(2))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="max_norm must be above 0, got -1"):
        clip_by_global_norm(-1)
    with pytest.raises(TypeError, match=r"optax\.GradientTransformation, got 3"):
        on_values(3)
