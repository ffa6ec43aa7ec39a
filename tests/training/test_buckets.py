"""Tests of `priorityprop_jax.training.buckets`."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax.training.buckets import bucket_lengths, buckets, packed

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=60)
few = settings(deadline=None, max_examples=40, derandomize=True)


def tokens(lengths, start=1):
    """Rows of these lengths, in which no token comes twice and none is 0."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) + start for n, end in zip(lengths, ends, strict=True)]


def padding(lengths, chosen):
    return sum(min(c for c in chosen if c >= n) - n for n in lengths)


class TestBucketLengths:
    @few
    @given(
        st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 8),
        st.none() | st.integers(0, 9),
    )  # fmt: skip
    def test_least_padding(self, lengths, most, multiple, room):
        longest = None if room is None else max(1, *lengths, 1) + room
        chosen = bucket_lengths(lengths, most, multiple, longest)
        assert len(chosen) <= most and chosen == sorted(set(chosen))
        assert all(c % multiple == 0 and c > 0 for c in chosen[:-1])
        top = chosen[-1]
        rounded = max(1, -(-max(lengths) // multiple)) * multiple
        assert top == (rounded if longest is None else min(rounded, longest))
        every = range(multiple, top, multiple)
        least = min(
            padding(lengths, (*some, top))
            for count in range(min(most, len(lengths)))
            for some in itertools.combinations(every, count)
        )
        assert padding(lengths, chosen) == least

    def test_many_lengths(self):
        chosen = bucket_lengths(np.arange(1, 4097))
        assert chosen == list(range(512, 4097, 512))

    def test_errors(self):
        for wrong in (([],), ([-1],), ([1], 0), ([1], 8, 0)):
            with pytest.raises(ValueError, match="needed"):
                bucket_lengths(*wrong)
        with pytest.raises(ValueError, match="a row of 14 is longer than longest=13"):
            bucket_lengths([3, 14], longest=13)


class TestBuckets:
    @few
    @given(
        lengths=LENGTHS, size=st.integers(1, 9), most=st.integers(1, 8),
        shuffle=st.booleans(), drop=st.booleans(), epoch=st.integers(0, 3),
    )  # fmt: skip
    def test_invariants(self, lengths, size, most, shuffle, drop, epoch):
        size = min(size, len(lengths)) if drop else size
        rows = tokens(lengths)
        arrays = {"x": rows, "y": [np.stack([-row, row], 1) for row in rows]}
        arrays["id"] = np.arange(len(rows), dtype=np.int32)
        make = lambda: buckets(  # noqa: E731
            arrays, size, most=most, pad={"y": -1}, shuffle=shuffle, drop_last=drop, seed=5
        )
        loader = make()
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(loader) == len(batches)
        assert all(len(batch["id"]) == size for batch in batches[:-1])
        assert len(batches[-1]["id"]) == size or not drop
        full = {batch["x"].shape for batch in batches if len(batch["id"]) == size}
        assert len(full) <= most
        assert {shape[1] for shape in full} <= set(loader.lengths)
        seen = np.concatenate([batch["id"] for batch in batches])
        assert seen.dtype == np.int32
        assert len(set(seen.tolist())) == len(seen) == len(rows) - (len(rows) % size if drop else 0)
        for batch in batches:
            for i, x, y in zip(batch["id"], batch["x"], batch["y"], strict=True):
                np.testing.assert_array_equal(x[: lengths[i]], rows[i])
                np.testing.assert_array_equal(y[: lengths[i]], arrays["y"][i])
                assert (x[lengths[i] :] == 0).all() and (y[lengths[i] :] == -1).all()
        other = make()
        other.set_epoch(epoch)
        for one, two in zip(batches, other, strict=True):
            for name in arrays:
                np.testing.assert_array_equal(one[name], two[name])

    def test_order_without_shuffle(self):
        (batch,) = buckets({"x": tokens([13, 2])}, 2, longest=13)
        assert batch["x"].shape == (2, 13)  # a model's context, which is no multiple of 8
        loader = buckets({"x": tokens([20, 3, 9, 4, 5, 20, 2, 1])}, 3)
        assert loader.lengths == [8, 16, 24]
        found = [(batch["x"].shape, np.count_nonzero(batch["x"], 1).tolist()) for batch in loader]
        # The rows of length 2 and 1 fill up the next batch.
        assert found == [((3, 8), [3, 4, 5]), ((3, 16), [2, 1, 9]), ((2, 24), [20, 20])]

    def test_order_is_pinned(self):
        # A change here breaks the resuming of every run that was begun before it.
        arrays = {"x": tokens([20, 3, 9, 4, 5, 20, 2, 1, 7]), "id": range(9)}
        loader = buckets(arrays, 2, shuffle=True, seed=3)
        loader.set_epoch(2)
        assert [batch["id"].tolist() for batch in loader] == [[1, 8], [3, 7], [4, 6], [2, 0], [5]]

    def test_other_rows_are_left_out_each_epoch(self):
        # One row is much longer, and always the last to be put into a batch.
        lengths = [3] * 20 + [90]
        loader = buckets({"x": tokens(lengths), "id": range(21)}, 4, shuffle=True, drop_last=True)
        count = collections.Counter()
        for epoch in range(40):
            loader.set_epoch(epoch)
            count.update(np.concatenate([batch["id"] for batch in loader]).tolist())
        assert len(count) == 21 and count[20] > 30 and max(count.values()) < 41

    def test_batches_are_shuffled(self):
        loader = buckets({"x": tokens(list(range(1, 65)))}, 4, shuffle=True)
        shapes = [batch["x"].shape[1] for batch in loader]
        assert shapes != sorted(shapes) and sorted(shapes) == sorted(loader.lengths * 2)

    def test_errors(self):
        rows = tokens([3, 4])
        wrong = {
            "row 1 has the shape": {"x": rows, "y": [rows[0], rows[0]]},
            r"row 0 has the shape \(\) in 'y'": {"x": rows, "y": [1, rows[0]]},
            "differ in length": {"x": rows, "y": rows[:1]},
            "empty": {},
            "no rows": {"x": []},
            r"the shape \(\) in 'x'": {"x": [1, 2]},
        }
        for message, arrays in wrong.items():
            with pytest.raises(ValueError, match=message):
                buckets(arrays, 2)
        for name in ({"by": "z"}, {"pad": {"z": 0}}):
            with pytest.raises(ValueError, match="by or pad names"):
                buckets({"x": rows}, 2, **name)
        with pytest.raises(ValueError, match="drop_last leaves no batch"):
            buckets({"x": rows}, 3, drop_last=True)

    def test_by(self):
        loader = buckets({"id": range(2), "x": tokens([3, 12])}, 1, by="x")
        assert loader.lengths == [8, 16]


def first_fit(lengths, length):
    """First-fit decreasing, one example at a time."""
    places, free = {}, []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((p for p, room in enumerate(free) if room >= lengths[i]), len(free))
        free += [length] * (place == len(free))
        free[place] -= lengths[i]
        places[i] = place
    return places


class TestPacked:
    @few
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 40))
    def test_invariants(self, lengths, length):
        rows = tokens(lengths)
        found = packed({"x": rows, "y": [row / 2 for row in rows]}, length)
        x, segments = found["x"], found["segments"]
        assert x.shape == segments.shape == found["y"].shape and segments.dtype == np.int32
        np.testing.assert_array_equal(found["y"], x / 2)
        assert ((x == 0) == (segments == 0)).all()
        places = first_fit(lengths, length)
        assert len(x) == max(places.values()) + 1
        pieces = {}
        for place, (tokens_, numbers) in enumerate(zip(x, segments, strict=True)):
            count = numbers.max()
            # 1, 1, 2, 2, 2, ..., 0, 0: no gap, no segment in two pieces
            used = numbers[: np.count_nonzero(numbers)]
            assert (np.diff(used) >= 0).all() and set(used) == set(range(1, count + 1))
            for number in range(1, count + 1):
                piece = tokens_[numbers == number]
                pieces[piece[0]] = place, piece
        assert len(pieces) == len(rows)
        for i, row in enumerate(rows):
            assert pieces[row[0]][0] == places[i]
            np.testing.assert_array_equal(pieces[row[0]][1], row)

    def test_errors(self):
        rows = tokens([3, 4, 9])
        wrong = {
            "2 of 3 rows are longer than 3, the longest has 9": {"x": rows},
            "at least one token": {"x": tokens([1, 0])},
            "there must be an example": {"x": []},
            "row 1 has the shape": {"x": rows[:2], "y": [rows[0], rows[0]]},
            "2 rows of 'y', 3 of 'x'": {"x": rows, "y": rows[:2]},
            "none of them segments": {"segments": rows},
            "arrays by name": {},
            r"the shape \(\)": {"x": rows[:1], "y": [1]},
        }
        for message, arrays in wrong.items():
            with pytest.raises(ValueError, match=message):
                packed(arrays, 3)
