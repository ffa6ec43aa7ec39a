"""Rows of different length without much padding: batches by length, or several rows in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from priorityprop_jax.training.loader import ArrayLoader


def bucket_lengths(
    lengths: Sequence[int] | np.ndarray,
    most: int = 8,
    multiple: int = 8,
    longest: int | None = None,
) -> list[int]:
    """The few lengths to pad rows to that leave the least padding, found exactly.

    Args:
      lengths: of the rows.
      most: lengths to choose.
      multiple: each chosen length is a multiple of this.
      longest: no chosen length is above this, a model's context, which may be no multiple.

    Returns:
      At most `most` lengths, ascending; the last has room for the longest row.

    Raises:
      ValueError: there is no row, a number is too small, or a row is longer than `longest`.

    Example:
      >>> bucket_lengths([3, 5, 5, 6, 30, 31, 90], most=3)
      [8, 32, 96]
    """
    if len(lengths) == 0 or min(lengths) < 0 or most < 1 or multiple < 1:
        raise ValueError("lengths, at least 0, most and multiple, at least 1, are needed")
    if longest is not None and max(1, max(lengths)) > longest:
        raise ValueError(f"a row of {max(lengths)} is longer than longest={longest}")
    rounded = np.maximum(-(-np.asarray(lengths) // multiple), 1) * multiple
    rounded = rounded if longest is None else np.minimum(rounded, longest)
    sizes, counts = np.unique(rounded, return_counts=True)  # [sizes]
    rows = np.concatenate([[0], np.cumsum(counts)])  # [sizes + 1], rows of the first i sizes
    # best[i]: the fewest tokens, padding and all, of the first i sizes with so many buckets.
    best = np.full(len(sizes) + 1, np.inf)
    best[0] = 0
    froms = []  # for each number of buckets, where its last one begins: [sizes + 1]
    for _ in range(min(most, len(sizes))):
        begins, totals = [0], [np.inf]
        for i, size in enumerate(sizes):
            total = best[: i + 1] + size * (rows[i + 1] - rows[: i + 1])
            begins.append(int(np.argmin(total)))
            totals.append(total[begins[-1]])
        best = np.array(totals)
        froms.append(begins)
    end, chosen = len(sizes), []
    for begins in reversed(froms):
        chosen.append(int(sizes[end - 1]))
        end = begins[end]
    return chosen[::-1]


def buckets(
    arrays: Mapping[str, Sequence[np.ndarray]],
    batch_size: int,
    *,
    by: str | None = None,
    most: int = 8,
    multiple: int = 8,
    longest: int | None = None,
    pad: Mapping[str, int] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
) -> ArrayLoader:
    """A loader over rows of different length whose batches hold rows of about the same length.

    Each batch is padded to one of `bucket_lengths`, so that a step compiles for at most `most`
    shapes, and one more for a last batch that is not full. What does not fill a batch of its
    length goes on to the next longer one.

    It is used as an `ArrayLoader`: a function of seed and epoch, with `len` and `set_epoch`. Its
    `lengths` are those that batches are padded to, ascending. Shuffled, rows and batches come in
    another order each epoch; otherwise from the shortest length to the longest, and rows of one
    length in the order given. A batch that is not full is the last. Rows that `drop_last` leaves
    out, fewer than `batch_size`, are others each epoch with `shuffle`, and the last ones without.

    Args:
      arrays: a row's array `[length, ...]` by name, or a number for the row, such as a label or an
        `id`. All arrays of a row are of one length.
      batch_size: rows in a batch.
      by: the name whose lengths count; by default the first.
      most: different lengths of batches.
      multiple: each length of a batch is a multiple of this.
      longest: no length of a batch is above this, a model's context, which may be no multiple.
      pad: what fills up the arrays of a name; by default 0.
      shuffle: whether rows and batches are shuffled anew each epoch.
      seed: of the order.
      drop_last: whether to leave out what does not fill a batch.

    Raises:
      ValueError: as `ArrayLoader` and `bucket_lengths`, or the arrays of a row differ in length,
        or a name is unknown.

    Example:
      >>> tokens = [np.arange(1, n + 1) for n in (3, 12, 2, 5)]
      >>> loader = buckets({"x": tokens, "y": [0, 1, 1, 0]}, batch_size=2)
      >>> [(batch["x"].shape, batch["y"].tolist()) for batch in loader]
      [((2, 8), [0, 1]), ((2, 16), [0, 1])]
    """
    options = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last}
    return _Buckets(arrays, batch_size, by, (most, multiple, longest), pad or {}, **options)


class _Buckets(ArrayLoader):
    def __init__(self, arrays, batch_size, by, limits, pad, **options):
        numbers = {name: np.arange(len(rows)) for name, rows in arrays.items()}
        super().__init__(numbers, batch_size, **options)
        by = next(iter(arrays)) if by is None else by
        if unknown := {by, *pad} - set(arrays):
            raise ValueError(f"by or pad names {sorted(unknown)}, the arrays are {list(arrays)}")
        self.columns = {name: [np.asarray(row) for row in rows] for name, rows in arrays.items()}
        sizes = _sizes(self.columns, by, numbers=True)  # [rows]
        self.pad, self.lengths = pad, bucket_lengths(sizes, *limits)
        self.bucket = np.searchsorted(self.lengths, sizes)  # [rows]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        order, size = np.arange(self.rows), self.batch_size
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle:
            order = rng.permutation(self.rows)
        order = order[: len(self) * size]
        batches, waiting = [], order[:0]
        for number, length in enumerate(self.lengths):
            waiting = np.concatenate([waiting, order[self.bucket[order] == number]])
            full = len(waiting) // size
            batches += [(rows, length) for rows in waiting[: full * size].reshape(full, size)]
            waiting = waiting[full * size :]
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        if len(waiting):
            batches.append((waiting, self.lengths[-1]))
        for rows, length in batches:
            yield {name: self._batch(name, rows, length) for name in self.columns}

    def _batch(self, name: str, rows: np.ndarray, length: int) -> np.ndarray:
        """The arrays of a name in these rows, `[batch, length, ...]`, or its numbers `[batch]`."""
        parts = [self.columns[name][row] for row in rows]
        if parts[0].ndim == 0:
            return np.stack(parts)
        shape = (len(parts), length, *parts[0].shape[1:])
        batch = np.full(shape, self.pad.get(name, 0), np.result_type(*parts))
        for row, part in zip(batch, parts, strict=True):
            row[: len(part)] = part
        return batch


def packed(rows: Mapping[str, Sequence[np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Puts several short examples into each row: first-fit decreasing, always the same.

    Attention may go from one place to another where both have the same number in `segments`, and
    positions are counted from where a segment begins: then no example sees another.

    Args:
      rows: arrays `[tokens]` of each example by name, for an example all of one length.
      length: places in a row of the result.

    Returns:
      Each array, int or float `[rows, length]`, filled up with 0; and `segments`, int32
      `[rows, length]`, 1, 2, ... for the examples in a row, and 0 where there is none.

    Raises:
      ValueError: an example is empty or longer than `length`, its arrays differ in length, there is
        none, or a name is `segments`.

    Example:
      >>> found = packed({"x": [np.array([7]), np.array([1, 2, 3]), np.array([4, 5])]}, 4)
      >>> found["x"]
      array([[1, 2, 3, 7],
             [4, 5, 0, 0]])
      >>> found["segments"]
      array([[1, 1, 1, 2],
             [1, 1, 0, 0]], dtype=int32)
    """
    if not rows or "segments" in rows:
        raise ValueError(f"arrays by name are needed, none of them segments; got {list(rows)}")
    columns = {name: [np.asarray(row) for row in column] for name, column in rows.items()}
    sizes = _sizes(columns, next(iter(columns)))  # [examples]
    if long := int((sizes > length).sum()):
        raise ValueError(
            f"{long} of {len(sizes)} rows are longer than {length}, the longest has {sizes.max()}: "
            "cut them, or raise length"
        )
    if len(sizes) == 0 or sizes.min() == 0:
        raise ValueError("every example needs at least one token, and there must be an example")
    places = _first_fit(sizes, length)  # [examples]
    shape = (int(places.max()) + 1, length)
    found = {name: np.zeros(shape, np.result_type(*column)) for name, column in columns.items()}
    segments = found["segments"] = np.zeros(shape, np.int32)
    filled, count = np.zeros(shape[0], int), np.zeros(shape[0], int)
    for i in np.lexsort((-sizes, places)):  # stable: by row, the longest first
        place, start, end = places[i], filled[places[i]], filled[places[i]] + sizes[i]
        count[place] += 1
        segments[place, start:end] = count[place]
        for name, column in columns.items():
            found[name][place, start:end] = column[i]
        filled[place] = end
    return found


def _first_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row that each example goes to: the first with room for it, the longest example first."""
    places, free = np.empty(len(sizes), int), np.zeros(0, int)
    for size in np.unique(sizes)[::-1]:  # all of one size at once: they fill up row after row
        examples = np.flatnonzero(sizes == size)
        missing = max(0, len(examples) - int((free // size).sum()))
        free = np.concatenate([free, np.full(-(-missing // (length // size)), length)])
        places[examples] = np.repeat(np.arange(len(free)), free // size)[: len(examples)]
        free -= size * np.bincount(places[examples], minlength=len(free))
    return places


def _sizes(columns: Mapping[str, list[np.ndarray]], by: str, numbers: bool = False) -> np.ndarray:
    """Lengths `[rows]` of the arrays of a name, which those of the other names must have too."""
    sizes = {
        name: np.array([len(row) if row.ndim else -1 for row in column], int)
        for name, column in columns.items()
    }
    for name, found in sizes.items():
        if numbers and name != by and (found == -1).all():
            continue
        if len(found) != len(sizes[by]):
            raise ValueError(f"{len(found)} rows of {name!r}, {len(sizes[by])} of {by!r}")
        wrong = np.flatnonzero((found != sizes[by]) | (found < 0))
        if len(wrong):
            shapes = [columns[of][wrong[0]].shape for of in (name, by)]
            raise ValueError(
                f"row {wrong[0]} has the shape {shapes[0]} in {name!r} and {shapes[1]} in {by!r}; "
                "an example's arrays have one length"
            )
    return sizes[by]
