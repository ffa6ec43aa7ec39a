"""Where the non-zeros of a weight are: index arrays by row and by column, of fixed size."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from priorityprop_jax.core.rows import SCATTER

ARRAYS = ("row_starts", "columns", "column_starts", "rows", "order")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=list(ARRAYS), meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class SparsePattern:
    """The places of a weight ``(out, in)`` that may be non-zero, a pytree of int32 arrays.

    Values stand by row, columns ascending; a second set of arrays goes through the same places by
    column, as the backward pass does. All arrays have room for `capacity` places, the first
    ``row_starts[-1]`` of which are used: another pattern of the same capacity needs no new
    compilation.

    Attributes:
      row_starts: int32 ``[out + 1]``: the first place of each row, then the places used.
      columns: int32 ``[capacity]``: the column of each place; 0 for those that are not used.
      column_starts: int32 ``[in + 1]``: the first place of each column in ``rows``.
      rows: int32 ``[capacity]``: by column, rows ascending, the row of each place.
      order: int32 ``[capacity]``: for each entry of ``rows``, the same place in ``columns``.
      shape: ``(out, in)``.
    """

    row_starts: jax.Array
    columns: jax.Array
    column_starts: jax.Array
    rows: jax.Array
    order: jax.Array
    shape: tuple[int, int]

    @property
    def capacity(self) -> int:
        """The places that the arrays have room for."""
        return self.columns.shape[-1]


class ConvGeometry(NamedTuple):
    """What a convolution over two axes is but for its weight; static."""

    kernel: tuple[int, int]  # height and width
    strides: tuple[int, int] = (1, 1)  # steps between two outputs
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))  # in front of, behind axes
    dilation: tuple[int, int] = (1, 1)  # steps between two elements of the kernel
    groups: int = 1  # that the channels are split into

    def output(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for those of an input, at least 0."""
        axes = zip(size, self.kernel, self.strides, self.padding, self.dilation, strict=True)
        height, width = (
            max(0, (length + low + high - (kernel - 1) * dilation - 1) // stride + 1)
            for length, kernel, stride, (low, high), dilation in axes
        )
        return height, width


def make_pattern(mask: Any, *, capacity: int | None = None) -> SparsePattern:
    """The pattern of a mask.

    Args:
      mask: bool ``[out, in]`` (or numbers: non-zero is kept). A traced one needs a ``capacity``;
        should it keep more places, `check_pattern` and the native kernels refuse what comes out.
      capacity: room for as many places; by default as many as are used, and at least 1.

    Raises:
      TypeError: if the mask is traced and no capacity is given.
      ValueError: if it is no matrix, or the capacity is too small.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax import sparse
      >>> pattern = sparse.make_pattern(np.array([[0, 1, 1], [1, 0, 0]]), capacity=4)
      >>> pattern.row_starts.tolist(), pattern.columns.tolist()
      ([0, 2, 3], [1, 2, 0, 0])
      >>> pattern.column_starts.tolist(), pattern.rows.tolist(), pattern.order.tolist()
      ([0, 1, 2, 3], [1, 0, 0, 0], [2, 0, 1, 3])
    """
    traced = isinstance(mask, Tracer)
    if traced and capacity is None:
        raise TypeError(
            "the number of places of a traced mask is not known: give a capacity, or make the "
            "pattern outside of jit"
        )
    xp: Any = jnp if traced else np
    mask = xp.asarray(mask) != 0
    if mask.ndim != 2:
        raise ValueError(f"a mask must be a matrix (out, in), got shape {mask.shape}")
    outs, ins = mask.shape
    # How many places stand before each entry of the mask, and in the end all of them.
    before = xp.cumsum(mask.reshape(-1), dtype=xp.int32)
    before = xp.concatenate([xp.zeros(1, xp.int32), before])
    used: Any = before[-1] if traced else int(before[-1])
    capacity = max(used, 1) if capacity is None else capacity
    if not traced and used > capacity:
        raise ValueError(f"the mask keeps {used} places, more than the capacity, {capacity}")
    if mask.size + capacity >= 2**31:
        raise ValueError(f"places of a weight {mask.shape} do not fit into int32: split the weight")

    def places(mask):
        if traced:
            return jnp.flatnonzero(mask, size=capacity, fill_value=0)
        return np.pad(np.flatnonzero(mask), (0, capacity - used))

    by_column = places(mask.T)
    rows, columns = by_column % max(outs, 1), by_column // max(outs, 1)
    slots = xp.arange(capacity)
    arrays = {
        "row_starts": before[::ins] if ins else xp.zeros(outs + 1),
        "columns": places(mask) % max(ins, 1),
        "column_starts": xp.concatenate([xp.zeros(1), xp.cumsum(mask.sum(0))]),
        "rows": rows,
        "order": xp.where(slots < used, before[rows * ins + columns], slots),
    }
    arrays = {name: jnp.asarray(array.astype(np.int32)) for name, array in arrays.items()}
    return SparsePattern(**arrays, shape=(outs, ins))


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
    outs, ins = pattern.shape
    capacity = pattern.capacity
    lengths = {"row_starts": outs + 1, "column_starts": ins + 1}
    for name in ARRAYS:
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
    columns = np.asarray(pattern.columns)[:used]
    inside = np.all((columns >= 0) & (columns < ins))
    if not inside or np.any(np.diff(_flat(pattern)) <= 0):
        raise ValueError(
            f"columns of a sparse pattern must lie in [0, {ins}), ascending in each row"
        )
    again = make_pattern(mask_of(pattern), capacity=capacity)
    lengths = {"column_starts": ins + 1, "rows": used, "order": capacity}
    for name, length in lengths.items():
        if not np.array_equal(getattr(pattern, name)[:length], getattr(again, name)[:length]):
            raise ValueError(
                "column_starts, rows and order of a sparse pattern do not go through the places of "
                "row_starts and columns: make them together, by make_pattern"
            )


def change_pattern(pattern: SparsePattern, mask: Any) -> tuple[SparsePattern, jax.Array]:
    """A concrete mask ``[out, in]`` in arrays of the same size, and where its values come from.

    That is int32 ``[capacity]``: for each new place the one that it had before, -1 for one that is
    new or not used. A mask of another shape, or that needs more room, is a ValueError.
    """
    mask = np.asarray(mask) != 0
    if mask.shape != pattern.shape:
        raise ValueError(f"the mask must be of shape {pattern.shape}, got {mask.shape}")
    changed = make_pattern(mask, capacity=pattern.capacity)
    before, after = _flat(pattern), _flat(changed)
    places = np.searchsorted(before, after)
    found = np.append(before, -1)[places] == after
    source = np.full(pattern.capacity, -1, np.int32)
    source[: len(after)] = np.where(found, places, -1)
    return changed, jnp.asarray(source)


def carry(values: jax.Array, source: jax.Array) -> jax.Array:
    """Values ``[capacity]``, or what an optimizer keeps of them, where `change_pattern` sends them.

    Those at new places are zero.
    """
    if not len(source):
        return values
    return jnp.where(source >= 0, values[jnp.maximum(source, 0)], jnp.zeros((), values.dtype))


def mask_of(pattern: SparsePattern) -> np.ndarray:
    """The mask of a concrete pattern, bool ``[out, in]``."""
    mask = np.zeros(pattern.shape[0] * pattern.shape[1], bool)
    mask[_flat(pattern)] = True
    return mask.reshape(pattern.shape)


def densify_values(values: jax.Array, pattern: SparsePattern) -> jax.Array:
    """The weight ``[out, in]`` of values ``[capacity]``; both may be traced."""
    flat = jnp.zeros(math.prod(pattern.shape), values.dtype)
    # Places that are not used point behind the last one, and are dropped.
    return flat.at[_flat_traced(pattern)].set(values, **SCATTER).reshape(pattern.shape)


def take_values(dense: jax.Array, pattern: SparsePattern) -> jax.Array:
    """The inverse of `densify_values`: ``[capacity]``, zero at places that are not used."""
    if not dense.size:
        return jnp.zeros(pattern.capacity, dense.dtype)
    places = dense.reshape(-1).at[_flat_traced(pattern)]
    return places.get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)


def _flat(pattern: SparsePattern) -> np.ndarray:
    """The places in use as ascending indices into the flattened weight."""
    starts = np.asarray(pattern.row_starts)
    rows = np.repeat(np.arange(pattern.shape[0], dtype=np.int64), np.diff(starts))
    return rows * pattern.shape[1] + np.asarray(pattern.columns)[: starts[-1]]


def _flat_traced(pattern: SparsePattern) -> jax.Array:
    """The same for traced patterns, ``[capacity]``; places that are not used lie past the end."""
    outs, ins = pattern.shape
    places = jnp.arange(pattern.capacity, dtype=jnp.int32)
    rows = jnp.searchsorted(pattern.row_starts, places, side="right").astype(jnp.int32) - 1
    used = places < pattern.row_starts[-1]
    return jnp.where(used, rows * ins + pattern.columns, outs * ins + places)
