"""Products with a sparse weight in plain JAX: for every platform, dtype and pattern.

Rows are sorted by length and cut into slices (the layout SELL-C-sigma of Kreutzer et al. 2014), and
each is walked a few places of every row at a time: one fused operation, which XLA shares among
cores; a loop per row would stay on one.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.core.fragile import zeros
from priorityprop_jax.core.precision import wide_type
from priorityprop_jax.sparse.pattern import SparsePattern

# Rows of a slice, and places of each row in one fused step.
_ROWS = 128
_STEP = 16
# The largest tile of the batch: a row of a tile is read in one go.
_TILE = 512
# From one place in as many on, the gradient of the values is taken out of that of a dense weight,
# which then needs at most as many times the room.
_DENSE = 12


def forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: None = None
) -> jax.Array:
    """``y = x W^T``: see `Kernel`. Sums are float32 at least."""
    return product(values, pattern.columns, _row_lines(pattern), x.T).T


def backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    geometry: None = None,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `forward`: see `Kernel`."""
    dx = dvalues = None
    # The compiler sees these transposes, and drops those between neighbours.
    dy = dy.T
    if inputs:
        starts = pattern.column_starts
        lines = Lines(starts[:-1], jnp.diff(starts))
        by_column = values[pattern.order] if pattern.capacity == 0 else _take(values, pattern.order)
        # Starts that were never filled in would pass for a weight without a place.
        broken = starts[-1] != pattern.row_starts[-1]
        dx = product(by_column, pattern.rows, lines, dy).T
        dx = jnp.where(broken, jnp.nan, dx).astype(x.dtype)
    if weights:
        x = x.T
        if cheaper_dense(pattern):
            wide = wide_type(x, dy)
            dense = jnp.dot(dy.astype(wide), x.astype(wide).T, precision=lax.Precision.HIGHEST)
            dvalues = take_places(dense, pattern)
        else:
            dvalues = sampled_product(pattern.columns, _row_lines(pattern), x, dy)
        dvalues = dvalues.astype(values.dtype)
    return dx, dvalues


def cheaper_dense(pattern: SparsePattern) -> bool:
    """Whether all of ``dy x^T`` takes less time than its entries at the places, one by one."""
    return pattern.capacity * _DENSE >= pattern.shape[0] * pattern.shape[1]


def take_places(dense: jax.Array, pattern: SparsePattern) -> jax.Array:
    """What stands at the places of a pattern, as `take_values` does, in less time."""
    if not dense.size:
        return jnp.zeros(pattern.capacity, dense.dtype)
    # The row of each place is known by column only, and to search for it costs more than to
    # scatter; reads by row go through `dense` in order.
    rows = jnp.zeros_like(pattern.rows).at[pattern.order]
    rows = rows.set(pattern.rows, mode="promise_in_bounds", unique_indices=True)
    used = jnp.arange(pattern.capacity, dtype=jnp.int32) < pattern.row_starts[-1]
    return jnp.where(used, dense.at[rows, pattern.columns].get(mode="clip"), 0)


class Lines(NamedTuple):
    """Rows (or columns) of a pattern, as stretches of its places."""

    starts: jax.Array  # int32[lines], the first place of each
    lengths: jax.Array  # int32[lines], how many places it has


def product(values: jax.Array, indices: jax.Array, lines: Lines, x: jax.Array) -> jax.Array:
    """For each line, the sum of ``values[k] * x[indices[k]]`` over its places, ``[lines, batch]``.

    `values` and `indices` are ``[capacity]``, `x` is ``[rows, batch]``.
    """
    count, dtype = lines.starts.shape[0], jnp.result_type(values, x)
    if 0 in x.shape or count == 0 or not len(indices):
        return jnp.zeros((count, x.shape[1]), dtype)
    wide = wide_type(values, x)
    values = values.astype(wide)
    slices, _, place = _slices(lines)

    def of_tile(tile):
        def of_slice(lines):
            def step(i, total):
                used, places, rows = _places(lines, i, indices, nothing=x.shape[0])
                weights = jnp.where(used, _take(values, places), 0)
                for weight, row in zip(weights, rows, strict=True):
                    total += weight[:, None] * _take(tile, row)
                return total

            nothing = zeros((lines.starts.shape[0], tile.shape[1]), wide, values, lines.starts, x)
            return lax.fori_loop(0, _steps(lines), step, nothing)

        return lax.map(of_slice, slices).reshape(-1, tile.shape[1])

    # Steps past the end of a line read a row of zeros: an infinity in a real one would be NaN.
    tiles = _tiles(x.astype(wide), extra=1)
    y = of_tile(tiles[0])[None] if tiles.shape[0] == 1 else lax.map(of_tile, tiles)
    y = jnp.moveaxis(_take(y, place, axis=1), 0, 1)
    return y.reshape(count, -1)[:, : x.shape[1]].astype(dtype)


def sampled_product(indices: jax.Array, lines: Lines, x: jax.Array, dy: jax.Array) -> jax.Array:
    """For each place ``k`` of each line ``l``, the sum of ``x[indices[k]] * dy[l]`` over the batch.

    ``[capacity]``, as `indices`; zero at places that are in no line. `dy` is ``[lines, batch]``.
    """
    capacity, dtype = indices.shape[0], jnp.result_type(x, dy)
    wide = wide_type(x, dy)
    total = zeros((capacity,), wide, lines.starts, x, dy)
    if 0 in x.shape or 0 in dy.shape or capacity == 0:
        return total.astype(dtype)
    slices, order, _ = _slices(lines)

    def of_tile(total, tiles):
        # Sums run over whole vectors, and within one only at the end: XLA keeps the order of a
        # sum over the innermost axis, which would be one addition at a time.
        x_parts, dy_parts = (_parts(tile) for tile in tiles)

        def of_slice(total, slice_):
            lines, members = slice_

            def step(i, total):
                used, places, rows = _places(lines, i, indices, nothing=0)
                parts = zip(x_parts, dy_parts, strict=True)
                lanes = [_take(x, rows) * _take(dy, members)[None] for x, dy in parts]
                lanes = functools.reduce(operator.add, lanes)  # [step, rows of a slice, lanes]
                ones = jnp.ones(lanes.shape[-1], wide)
                sums = jnp.dot(lanes, ones, precision=lax.Precision.HIGHEST)
                places = jnp.where(used, places, capacity)
                return total.at[places].add(sums, mode="drop", unique_indices=True)

            return lax.fori_loop(0, _steps(lines), step, total), None

        return lax.scan(of_slice, total, (slices, order))[0], None

    tiles = _tiles(x.astype(wide)), _tiles(dy.astype(wide))
    return lax.scan(of_tile, total, tiles)[0].astype(dtype)


def _row_lines(pattern: SparsePattern) -> Lines:
    return Lines(pattern.row_starts[:-1], jnp.diff(pattern.row_starts))


def _slices(lines: Lines) -> tuple[Lines, jax.Array, jax.Array]:
    """Lines by falling length ``[slices, rows]``, which each is, and for each where it went."""
    count = lines.starts.shape[0]
    rows = min(_ROWS, count)
    padding = (0, -count % rows)
    # One slice waits for its longest line: neighbours should be of about the same length.
    # One sort of plain numbers is several times faster than one that carries indices along.
    longest = (2**31 - 1) // count - 1
    keys = (longest - jnp.minimum(lines.lengths, longest)) * count
    order = lax.sort(keys + jnp.arange(count, dtype=jnp.int32), is_stable=False) % count
    numbers = jnp.arange(count, dtype=jnp.int32)
    place = jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)

    def slices(a):
        return jnp.pad(a, padding).reshape(-1, rows)

    return jax.tree.map(lambda a: slices(a[order]), lines), slices(order), place


def _steps(lines: Lines) -> jax.Array:
    return (jnp.max(lines.lengths) + _STEP - 1) // _STEP


def _places(
    lines: Lines, step: jax.Array, indices: jax.Array, *, nothing: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one step reads of a slice, each ``[step, rows]``: if used, places, and their indices.

    Where there is nothing to read, the index is `nothing`.
    """
    slots = step * _STEP + jnp.arange(_STEP, dtype=jnp.int32)[:, None]
    used = slots < lines.lengths[None]
    places = jnp.minimum(lines.starts[None] + slots, indices.shape[0] - 1)
    found = _take(indices, places)
    return used, places, jnp.where(used, found, nothing)


def _tiles(x: jax.Array, *, extra: int = 0) -> jax.Array:
    """``[rows, batch]`` as ``[tiles, rows + extra, tile]``, what is added being 0."""
    rows, batch = x.shape
    count = -(-batch // _TILE)
    tile = -(-batch // count)
    tile += -tile % (16 if tile <= 128 else 64)
    x = jnp.pad(x, ((0, extra), (0, count * tile - batch)))
    return jnp.moveaxis(x.reshape(rows + extra, count, tile), 1, 0)


def _parts(tile: jax.Array) -> list[jax.Array]:
    """The columns of a tile in up to 8 parts, each at least 16 wide."""
    width = tile.shape[1]
    parts = max(n for n in range(1, 9) if width % (16 * n) == 0)
    return jnp.split(tile, parts, axis=1)


def _take(array: jax.Array, indices: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.take(array, indices, axis=axis, mode="clip")
