"""Where batches come from: arrays in memory, and what a trainer asks of any loader."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


class ArrayLoader:
    """Batches of arrays that share their first axis, the same each time for a seed and an epoch.

    So a run that resumes at epoch 3 with `set_epoch(3)` sees the batches that the unbroken run saw.

    Args:
      arrays: arrays of shape `[rows, ...]` by name, or a pair `(x, y)`.
      batch_size: rows in a batch.
      shuffle: whether the rows are shuffled anew each epoch; otherwise they keep their order.
      seed: of the order.
      drop_last: whether to leave out a last batch that is not full.
      max_batches: at most so many batches in an epoch; `None` for all of them.

    Raises:
      ValueError: there is no array, no row or no full batch, the arrays differ in length, or
        `batch_size`, `max_batches` or `seed` is too small.

    Example:
      >>> from priorityprop_jax.training import ArrayLoader
      >>> loader = ArrayLoader((np.zeros((10, 4)), np.arange(10)), batch_size=4)
      >>> [batch["y"].tolist() for batch in loader]
      [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
      >>> len(loader)
      3
    """

    def __init__(
        self,
        arrays: tuple[np.ndarray, np.ndarray] | Mapping[str, np.ndarray],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        max_batches: int | None = None,
    ):
        if isinstance(arrays, tuple):
            if len(arrays) != 2:
                raise ValueError(f"arrays is a pair (x, y) or a dict, got {len(arrays)} in a tuple")
            arrays = {"x": arrays[0], "y": arrays[1]}
        if not arrays:
            raise ValueError("arrays is empty: nothing to make batches of")
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if any(array.ndim == 0 for array in self.arrays.values()):
            raise ValueError("every array needs a first axis of rows, got a scalar")
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays differ in length: {lengths}")
        self.rows = next(iter(lengths.values()))
        if self.rows == 0:
            raise ValueError("the arrays have no rows: nothing to make batches of")
        limits = ("batch_size", batch_size, 1), ("max_batches", max_batches, 1), ("seed", seed, 0)
        for name, value, least in limits:
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, at least {least} is needed")
        if drop_last and self.rows < batch_size:
            raise ValueError(
                f"drop_last leaves no batch of {batch_size} out of {self.rows} rows; "
                "lower batch_size or set drop_last=False"
            )
        self.batch_size, self.max_batches, self.drop_last = batch_size, max_batches, drop_last
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows; 0 at first."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, at least 0 is needed")
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        full = self.rows // self.batch_size
        batches = full if self.drop_last else math.ceil(self.rows / self.batch_size)
        return batches if self.max_batches is None else min(batches, self.max_batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields dicts of arrays, each `[batch, ...]`."""
        order = np.arange(self.rows)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]  # [batch]
            yield {name: array[rows] for name, array in self.arrays.items()}


def check_epochs(epochs: Any) -> None:
    """Raises unless this is a number of epochs."""
    if isinstance(epochs, bool) or not isinstance(epochs, int | np.integer):
        raise TypeError(f"epochs must be a whole number, got {epochs!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")


def skip(batches: Iterator[Any], count: int, stop: Any) -> None:
    """Passes over the batches that a resumed run has seen; raises if there are fewer."""
    skipped = sum(1 for _ in itertools.islice(batches, count))
    if skipped < count and not stop:
        raise ValueError(
            f"the loader ended after {skipped} batches, but the checkpoint is {count} batches into "
            "the epoch; resume with the loader that the run was started with"
        )


def length(loader: Any) -> int:
    """How many batches a loader says that it has; 0 where it cannot tell, whatever it raises."""
    try:
        return operator.length_hint(loader)
    except Exception:
        return 0


def check_rows(batch: Any) -> None:
    """Raises a ValueError for a batch without rows, whose mean loss would be NaN."""
    leaves = jax.tree.leaves(batch)
    if leaves and (shape := np.shape(leaves[0]))[:1] == (0,):
        raise ValueError(
            f"a batch has no rows: its first array has the shape {list(shape)}; leave such batches "
            "out of the loader"
        )


def check_iterable(name: str, batches: Any, epochs: int) -> None:
    """Raises unless batches can be got from this for so many epochs."""
    single = isinstance(batches, str | bytes | Mapping) or hasattr(batches, "dtype")
    if single or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        what = f"a single {type(batches).__name__}" if single else repr(batches)
        raise TypeError(
            f"{name} must be an iterable of batches, got {what}; ArrayLoader makes them of arrays"
        )
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be gone through once, but {epochs} epochs need it "
            "anew each time: give a list or an object whose __iter__ starts afresh, or train one "
            "epoch"
        )
