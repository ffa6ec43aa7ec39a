"""Where the non-zeros of a weight are: index arrays by row and by column, of fixed size."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_starts", "columns", "column_starts", "rows", "order"],
    meta_fields=["shape", "block"],
)
@dataclasses.dataclass(frozen=True)
class SparsePattern:
    """The places of a weight ``(out, in)`` that may be non-zero, a pytree of int32 arrays.

    Values stand by row, columns ascending; a second set of arrays goes through the same places by
    column, as the backward pass does. All arrays have room for `capacity` places, the first
    ``row_starts[-1]`` of which are used: another pattern of the same capacity needs no new
    compilation. With ``block`` > 1 places are square blocks, and rows and columns count blocks.

    Attributes:
      row_starts: int32 ``[out / block + 1]``: the first place of each row, then the places used.
      columns: int32 ``[capacity]``: the column of each place; 0 for those that are not used.
      column_starts: int32 ``[in / block + 1]``: the first place of each column in ``rows``.
      rows: int32 ``[capacity]``: by column, rows ascending, the row of each place.
      order: int32 ``[capacity]``: for each entry of ``rows``, the same place in ``columns``.
      shape: ``(out, in)``, in features.
      block: the side of a block; 1 for single values.
    """

    row_starts: jax.Array
    columns: jax.Array
    column_starts: jax.Array
    rows: jax.Array
    order: jax.Array
    shape: tuple[int, int]
    block: int = 1

    @property
    def capacity(self) -> int:
        """The places that the arrays have room for."""
        return self.columns.shape[-1]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """The shape of the values that belong to it."""
        return (self.capacity, *((self.block, self.block) if self.block > 1 else ()))

    @property
    def grid(self) -> tuple[int, int]:
        """``(out, in)`` in blocks."""
        return self.shape[0] // self.block, self.shape[1] // self.block


def make_pattern(mask: Any, *, capacity: int | None = None, block: int = 1) -> SparsePattern:
    """The pattern of a mask.

    Args:
      mask: bool ``[out, in]`` (or numbers: non-zero is kept), a concrete array.
      capacity: room for as many places; by default as many as are used, and at least 1.
      block: the side of the blocks to keep: a block is kept when anything in it is.

    Raises:
      TypeError: if the mask is traced: the number of its places would not be known.
      ValueError: if it is no matrix, blocks do not divide it, or the capacity is too small.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax.sparse.pattern import make_pattern
      >>> pattern = make_pattern(np.array([[0, 1, 1], [1, 0, 0]]), capacity=4)
      >>> pattern.row_starts.tolist(), pattern.columns.tolist()
      ([0, 2, 3], [1, 2, 0, 0])
      >>> pattern.column_starts.tolist(), pattern.rows.tolist(), pattern.order.tolist()
      ([0, 1, 2, 3], [1, 0, 0, 0], [2, 0, 1, 3])
    """
    if isinstance(mask, Tracer):
        raise TypeError("a mask must be a concrete array: make patterns outside of jit")
    mask = np.asarray(mask) != 0
    if mask.ndim != 2:
        raise ValueError(f"a mask must be a matrix (out, in), got shape {mask.shape}")
    if block < 1 or mask.shape[0] % block or mask.shape[1] % block:
        raise ValueError(f"blocks of {block} x {block} do not divide a mask of shape {mask.shape}")
    shape = mask.shape
    if block > 1:
        mask = _blocks(mask, block).any(axis=(2, 3))
    rows, columns = np.nonzero(mask)
    used = len(rows)
    capacity = max(used, 1) if capacity is None else capacity
    if used > capacity:
        raise ValueError(f"the mask keeps {used} places, more than the capacity, {capacity}")
    if mask.size + capacity >= 2**31:
        raise ValueError(f"places of a weight {shape} do not fit into int32: split the weight")
    order = np.lexsort((rows, columns))
    padding = (0, capacity - used)
    arrays = {
        "row_starts": _starts(rows, mask.shape[0]),
        "columns": np.pad(columns, padding),
        "column_starts": _starts(columns, mask.shape[1]),
        "rows": np.pad(rows[order], padding),
        "order": np.concatenate([order, np.arange(used, capacity)]),
    }
    return SparsePattern(
        **{name: jnp.asarray(x.astype(np.int32)) for name, x in arrays.items()},
        shape=shape,
        block=block,
    )


def check_pattern(pattern: SparsePattern) -> None:
    """Refuses index arrays that no mask gives: out of range, unsorted, or not of one pattern.

    For patterns that come from elsewhere than `make_pattern`, such as a file.

    Args:
      pattern: concrete index arrays.

    Raises:
      ValueError: if anything about them is wrong.

    Example:
      >>> import dataclasses, numpy as np
      >>> from priorityprop_jax.sparse.pattern import check_pattern, make_pattern
      >>> pattern = make_pattern(np.eye(3))
      >>> check_pattern(dataclasses.replace(pattern, columns=pattern.columns + 3))
      Traceback (most recent call last):
      ...
      ValueError: columns of a sparse pattern must lie in [0, 3), ascending in each row
    """
    outs, ins = pattern.grid
    capacity = pattern.capacity
    lengths = {"row_starts": outs + 1, "column_starts": ins + 1, "rows": capacity}
    for name in ("row_starts", "columns", "column_starts", "rows", "order"):
        array, length = getattr(pattern, name), lengths.get(name, capacity)
        if array.shape != (length,) or array.dtype != jnp.int32:
            raise ValueError(
                f"{name} of a sparse pattern must be int32 [{length}], got "
                f"{array.dtype} {list(array.shape)}"
            )
    starts = np.asarray(pattern.row_starts)
    used = int(starts[-1])
    if starts[0] != 0 or np.any(np.diff(starts) < 0) or used > capacity:
        raise ValueError(f"row_starts must ascend from 0 to at most the capacity, {capacity}")
    rows = np.repeat(np.arange(outs), np.diff(starts))
    columns = np.asarray(pattern.columns)[:used].astype(np.int64)
    inside = np.all((columns >= 0) & (columns < ins))
    if not inside or np.any(np.diff(rows * ins + columns) <= 0):
        raise ValueError(
            f"columns of a sparse pattern must lie in [0, {ins}), ascending in each row"
        )
    order = np.lexsort((rows, columns))
    same = (
        np.array_equal(pattern.column_starts, _starts(columns, ins))
        and np.array_equal(pattern.rows[:used], rows[order])
        and np.array_equal(pattern.order, [*order, *range(used, capacity)])
    )
    if not same:
        raise ValueError(
            "column_starts, rows and order of a sparse pattern do not go through the places of "
            "row_starts and columns: make them together, by make_pattern"
        )


def change_pattern(pattern: SparsePattern, mask: Any) -> tuple[SparsePattern, jax.Array]:
    """Another mask for a weight, in arrays of the same size, and where its values come from.

    Args:
      pattern: the pattern so far.
      mask: bool ``[out, in]``, concrete, with at most as many places as the pattern has room for.

    Returns:
      The new pattern, and int32 ``[capacity]``: for each of its places the place that it had
      before, -1 for one that is new or not used. `carry` takes values and moments along.

    Raises:
      ValueError: if the mask has another shape, or needs more room.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax.sparse.pattern import carry, change_pattern, make_pattern
      >>> pattern = make_pattern(np.array([[1, 1, 0]]))
      >>> pattern, source = change_pattern(pattern, np.array([[0, 1, 1]]))
      >>> carry(jnp.array([5.0, 7.0]), source).tolist()
      [7.0, 0.0]
    """
    mask = np.asarray(mask) != 0
    if mask.shape != pattern.shape:
        raise ValueError(f"the mask must be of shape {pattern.shape}, got {mask.shape}")
    changed = make_pattern(mask, capacity=pattern.capacity, block=pattern.block)
    before, after = _flat(pattern), _flat(changed)
    places = np.searchsorted(before, after)
    found = np.append(before, -1)[places] == after
    source = np.full(pattern.capacity, -1, np.int32)
    source[: len(after)] = np.where(found, places, -1)
    return changed, jnp.asarray(source)


def carry(values: jax.Array, source: jax.Array) -> jax.Array:
    """Values, or what an optimizer keeps of them, after `change_pattern`: zero where new.

    Args:
      values: ``[capacity, ...]``.
      source: int32 ``[capacity]``, from `change_pattern`.
    """
    kept = jnp.expand_dims(source >= 0, tuple(range(1, values.ndim)))
    return jnp.where(kept, values[jnp.maximum(source, 0)], jnp.zeros((), values.dtype))


def mask_of(pattern: SparsePattern) -> np.ndarray:
    """The mask of a concrete pattern, bool ``[out, in]``.

    Args:
      pattern: concrete index arrays.
    """
    outs, ins = pattern.grid
    mask = np.zeros(outs * ins, bool)
    mask[_flat(pattern)] = True
    return np.kron(mask.reshape(outs, ins), np.ones((pattern.block, pattern.block), bool))


def densify_values(values: jax.Array, pattern: SparsePattern) -> jax.Array:
    """The weight as a dense array.

    Args:
      values: ``[capacity]``, or ``[capacity, block, block]`` of a pattern of blocks.
      pattern: where they stand; may be traced.

    Returns:
      ``[out, in]``, zero where the pattern has no place.
    """
    outs, ins = pattern.grid
    flat = jnp.zeros((outs * ins, *values.shape[1:]), values.dtype)
    # Places that are not used point behind the last one, and are dropped.
    flat = flat.at[_flat_traced(pattern)].set(
        values, mode="drop", unique_indices=True, indices_are_sorted=True
    )
    if pattern.block == 1:
        return flat.reshape(outs, ins)
    return (
        flat.reshape(outs, ins, pattern.block, pattern.block).swapaxes(1, 2).reshape(pattern.shape)
    )


def take_values(dense: jax.Array, pattern: SparsePattern) -> jax.Array:
    """The inverse of `densify_values`: what stands at the places of the pattern.

    Args:
      dense: ``[out, in]``.
      pattern: may be traced.

    Returns:
      ``[capacity]`` or ``[capacity, block, block]``, zero at places that are not used.
    """
    if pattern.block > 1:
        dense = _blocks(dense, pattern.block).reshape(-1, pattern.block, pattern.block)
    else:
        dense = dense.reshape(-1)
    return dense.at[_flat_traced(pattern)].get(
        mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )


def _starts(lines: np.ndarray, count: int) -> np.ndarray:
    """Where each line (row or column) starts among places that are sorted by it."""
    return np.concatenate([[0], np.cumsum(np.bincount(lines, minlength=count))])


def _blocks(array: Any, block: int) -> Any:
    """``[out, in]`` as ``[out / block, in / block, block, block]``."""
    outs, ins = array.shape
    return array.reshape(outs // block, block, ins // block, block).swapaxes(1, 2)


def _flat(pattern: SparsePattern) -> np.ndarray:
    """The places in use as ascending indices into the flattened grid."""
    starts = np.asarray(pattern.row_starts)
    rows = np.repeat(np.arange(pattern.grid[0], dtype=np.int64), np.diff(starts))
    return rows * pattern.grid[1] + np.asarray(pattern.columns)[: starts[-1]]


def _flat_traced(pattern: SparsePattern) -> jax.Array:
    """The same for traced patterns, ``[capacity]``; places that are not used lie past the end."""
    outs, ins = pattern.grid
    places = jnp.arange(pattern.capacity, dtype=jnp.int32)
    rows = jnp.searchsorted(pattern.row_starts, places, side="right").astype(jnp.int32) - 1
    used = places < pattern.row_starts[-1]
    return jnp.where(used, rows * ins + pattern.columns, outs * ins + places)
