"""Index arrays: what `make_pattern` gives, and changing masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from priorityprop_jax.sparse.pattern import (
    carry,
    change_pattern,
    check_pattern,
    densify_values,
    make_pattern,
    mask_of,
    take_values,
)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(bool, st.tuples(st.integers(0, 6), st.integers(0, 6))),
    st.integers(0, 3),
)
def test_both_orders_go_through_the_places_of_the_mask(mask, spare):
    used = int(mask.sum())
    pattern = make_pattern(mask, capacity=used + spare)
    rows, columns = np.nonzero(mask)
    assert pattern.capacity == used + spare and pattern.shape == mask.shape
    assert pattern.row_starts.tolist() == [np.sum(rows < row) for row in range(len(mask) + 1)]
    assert pattern.columns.tolist() == [*columns, *[0] * spare]
    starts = [np.sum(columns < column) for column in range(mask.shape[1] + 1)]
    assert pattern.column_starts.tolist() == starts
    by_column = [(r, c) for c, r in sorted(zip(columns, rows, strict=True))]
    order, found = np.asarray(pattern.order)[:used], np.asarray(pattern.rows)[:used]
    assert list(zip(found, columns[order], strict=True)) == by_column
    assert sorted(pattern.order.tolist()) == list(range(pattern.capacity))
    assert np.array_equal(mask_of(pattern), mask)


def test_values_to_dense_and_back():
    rng = np.random.default_rng(0)
    for kept in (0.0, 0.4, 1.0):
        mask = rng.random((6, 10)) < kept
        pattern = make_pattern(mask, capacity=60)
        used = mask.sum()
        weight = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
        values = jax.jit(take_values)(weight, pattern)
        assert values.shape == (60,) and not np.asarray(values[used:]).any()
        # What stands at places that are not used goes nowhere.
        values = values.at[used:].set(jnp.nan)
        assert np.array_equal(jax.jit(densify_values)(values, pattern), weight)


def test_masks_that_give_no_pattern():
    for options, message in [
        ({"mask": np.ones(3)}, r"a matrix \(out, in\), got shape \(3,\)"),
        ({"mask": np.ones((4, 6)), "capacity": 23}, "24 places, more than the capacity, 23"),
        ({"mask": np.ones((4, 6)), "capacity": 2**31 - 24}, "do not fit into int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_pattern(**options)
    with pytest.raises(TypeError, match="give a capacity, or make the pattern outside of jit"):
        jax.eval_shape(make_pattern, jnp.ones((2, 2)))


def test_traced_masks_give_the_same_pattern():
    rng = np.random.default_rng(2)
    make = jax.jit(functools.partial(make_pattern, capacity=30))
    for kept in (0.0, 0.3, 0.5):
        mask = rng.random((5, 8)) < kept
        patterns = make(mask), make_pattern(mask, capacity=30)
        for found, expected in zip(*map(jax.tree.leaves, patterns), strict=True):
            assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_changed_masks_carry_what_stays():
    rng = np.random.default_rng(1)
    before, after = (rng.random((7, 9)) < kept for kept in (0.5, 0.4))
    pattern = make_pattern(before, capacity=45)
    weight = np.where(before, rng.normal(size=before.shape), 0).astype(np.float32)
    changed, source = change_pattern(pattern, after)
    expected = make_pattern(after, capacity=45)
    for found, array in zip(*map(jax.tree.leaves, (changed, expected)), strict=True):
        np.testing.assert_array_equal(found, array)
    assert jax.tree.structure(changed) == jax.tree.structure(pattern)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, pattern)
    values = take_values(jnp.asarray(weight), pattern)
    values = values.at[int(pattern.row_starts[-1]) :].set(jnp.nan)
    carried = carry(values, source)
    used = int(changed.row_starts[-1])
    assert not np.asarray(carried[used:]).any() and (np.asarray(source[used:]) == -1).all()
    assert np.array_equal(densify_values(carried, changed), np.where(after, weight, 0))
    # The way back: what was kept in both, and nothing else.
    again, source = change_pattern(changed, before)
    assert np.array_equal(mask_of(again), before)
    back = densify_values(carry(carried, source), again)
    assert np.array_equal(back, np.where(before & after, weight, 0))


def test_changed_masks_that_do_not_fit():
    pattern = make_pattern(np.eye(3), capacity=4)
    with pytest.raises(ValueError, match=r"must be of shape \(3, 3\), got \(3, 4\)"):
        change_pattern(pattern, np.ones((3, 4)))
    with pytest.raises(ValueError, match="9 places, more than the capacity, 4"):
        change_pattern(pattern, np.ones((3, 3)))
    nothing, source = change_pattern(pattern, np.zeros((3, 3)))
    assert int(nothing.row_starts[-1]) == 0 and (np.asarray(source) == -1).all()


def test_index_arrays_of_no_mask_are_refused():
    pattern = make_pattern(np.array([[1, 0, 1], [0, 1, 1]]), capacity=6)
    check_pattern(pattern)

    def check(**changes):
        arrays = {
            name: value if isinstance(value, jax.Array) else jnp.array(value, jnp.int32)
            for name, value in changes.items()
        }
        check_pattern(dataclasses.replace(pattern, **arrays))

    check(columns=[0, 2, 1, 2, 9, -9])  # places that are not used may hold anything
    for name in ("row_starts", "columns", "column_starts", "rows", "order"):
        array = getattr(pattern, name)
        for wrong in (array[:-1], array.astype(float), array[None]):
            with pytest.raises(ValueError, match="of a sparse pattern must be int32"):
                check(**{name: wrong})
    for changes, message in [
        ({"row_starts": [0, 3, 2]}, "row_starts must ascend"),
        ({"row_starts": [1, 2, 4]}, "row_starts must ascend"),
        ({"row_starts": [0, 2, 7]}, "row_starts must ascend"),
        ({"columns": [0, 3, 1, 2, 0, 0]}, r"must lie in \[0, 3\)"),
        ({"columns": [-1, 2, 1, 2, 0, 0]}, r"must lie in \[0, 3\)"),
        ({"columns": [2, 0, 1, 2, 0, 0]}, "ascending in each row"),
        ({"columns": [0, 2, 2, 2, 0, 0]}, "ascending in each row"),
        ({"columns": [0, 1, 1, 2, 0, 0]}, "do not go through the places"),
        ({"column_starts": [0, 1, 3, 4]}, "do not go through the places"),
        ({"column_starts": [0, 0, 0, 0]}, "do not go through the places"),
        ({"rows": [0, 1, 0, 0, 0, 0]}, "do not go through the places"),
        ({"rows": [0, 9, 0, 1, 0, 0]}, "do not go through the places"),
        ({"order": [0, 2, 3, 1, 4, 5]}, "do not go through the places"),
        ({"order": [0, 2, 1, 3, 5, 4]}, "do not go through the places"),
        ({"order": [0, 2, 1, 3, 4, 6]}, "do not go through the places"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(**changes)
