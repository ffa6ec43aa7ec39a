"""Tests of `priorityprop_jax.training.loader`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax.training.loader import ArrayLoader


def _rows(loader: ArrayLoader, name: str = "y") -> np.ndarray:
    return np.concatenate([batch[name] for batch in loader])


class TestArrayLoader:
    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(
        rows=st.integers(1, 30),
        batch_size=st.integers(1, 35),
        shuffle=st.booleans(),
        drop_last=st.booleans(),
        max_batches=st.one_of(st.none(), st.integers(1, 5)),
        seed=st.integers(0, 2**32),
        epoch=st.integers(0, 1000),
    )
    def test_invariants(self, rows, batch_size, shuffle, drop_last, max_batches, seed, epoch):
        if drop_last:
            batch_size = min(batch_size, rows)
        y = np.arange(rows)

        def epoch_of(loader):
            loader.set_epoch(epoch)
            return list(loader)

        make = lambda: ArrayLoader(  # noqa: E731
            (np.stack([y, -y], axis=1), y),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            max_batches=max_batches,
        )
        loader = make()
        batches = epoch_of(loader)

        kept = rows - rows % batch_size if drop_last else rows
        kept = min(kept, batch_size * (max_batches or rows))
        sizes = [min(batch_size, kept - start) for start in range(0, kept, batch_size)]
        assert [len(batch["y"]) for batch in batches] == sizes
        assert len(loader) == len(batches)
        seen = np.concatenate([batch["y"] for batch in batches])
        assert len(set(seen.tolist())) == kept  # No row twice.
        if not shuffle:
            np.testing.assert_array_equal(seen, y[:kept])
        x = np.concatenate([batch["x"] for batch in batches])
        np.testing.assert_array_equal(x, np.stack([seen, -seen], axis=1))  # Rows stay together.
        # A pure function of seed and epoch: for this loader again, and for one that resumes.
        for again in (list(loader), epoch_of(make())):
            np.testing.assert_array_equal(np.concatenate([b["y"] for b in again]), seen)

    def test_order_is_pinned(self):
        # A change here breaks the resuming of every run that was begun before it.
        loader = ArrayLoader((np.arange(8), np.arange(8)), 8, shuffle=True, seed=3)
        loader.set_epoch(2)
        assert _rows(loader).tolist() == [1, 7, 4, 0, 2, 6, 3, 5]

    def test_epochs_and_seeds_differ(self):
        orders = []
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            loader = ArrayLoader((np.arange(50), np.arange(50)), 7, shuffle=True, seed=seed)
            loader.set_epoch(epoch)
            orders.append(tuple(_rows(loader).tolist()))
        assert len(set(orders)) == 4

    def test_set_epoch_leaves_a_running_iteration_alone(self):
        loader = ArrayLoader((np.arange(50), np.arange(50)), 7, shuffle=True)
        expected = _rows(loader)
        iterator = iter(loader)
        seen = [next(iterator)["y"]]
        loader.set_epoch(1)
        np.testing.assert_array_equal(
            np.concatenate([*seen, *(b["y"] for b in iterator)]), expected
        )

    def test_named_arrays_keep_their_names_and_dtypes(self):
        loader = ArrayLoader({"a": np.ones((3, 2), np.float32), "b": np.ones(3, np.int8)}, 2)
        batch = next(iter(loader))
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "a": ((2, 2), np.float32),
            "b": ((2,), np.int8),
        }

    @pytest.mark.parametrize(
        ("arrays", "batch_size", "options", "match"),
        [
            ({}, 4, {}, "arrays is empty"),
            ((np.ones(3),), 4, {}, "pair"),
            ((np.ones((0, 2)), np.ones(0)), 4, {}, "no rows"),
            ({"x": np.ones(3), "y": np.ones(4)}, 4, {}, "'x': 3, 'y': 4"),
            ({"x": np.ones(3), "y": np.float32(1)}, 4, {}, "scalar"),
            ((np.ones(3), np.ones(3)), 0, {}, "batch_size is 0"),
            ((np.ones(3), np.ones(3)), 4, {"drop_last": True}, "no batch of 4 out of 3 rows"),
            ((np.ones(3), np.ones(3)), 2, {"max_batches": 0}, "max_batches is 0"),
            ((np.ones(3), np.ones(3)), 2, {"seed": -1}, "seed is -1"),
        ],
    )
    def test_errors(self, arrays, batch_size, options, match):
        with pytest.raises(ValueError, match=match):
            ArrayLoader(arrays, batch_size, **options)

    def test_negative_epoch(self):
        with pytest.raises(ValueError, match="epoch is -1"):
            ArrayLoader((np.ones(3), np.ones(3)), 2).set_epoch(-1)
