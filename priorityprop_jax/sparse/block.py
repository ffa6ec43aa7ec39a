"""Products with a weight of square blocks, made of small dense products.

The blocks of a line (a row of blocks, or a column for the way back) are taken a few at a time: laid
side by side they are one dense product with the rows of ``x`` gathered for them. CPUs go through
these chunks in a loop over as many as there are; elsewhere all of them are one batched product.
Both add up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.sparse.csr import zeros
from priorityprop_jax.sparse.pattern import SparsePattern

# How long the inner axis of a chunk's product is, at least. On a CPU 64 was the best of 64, 128 and
# 256 for blocks of 16, 32 and 64 and a batch of 128.
_INNER = 64


def forward(values: jax.Array, pattern: SparsePattern, x: jax.Array) -> jax.Array:
    """``y = W x``.

    Args:
      values: float32 ``[capacity, block, block]``.
      pattern: where they stand; may be traced.
      x: float32 ``[in, batch]``.

    Returns:
      ``[out, batch]``.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax.sparse import block
      >>> from priorityprop_jax.sparse.pattern import make_pattern, take_values
      >>> weight = jnp.array([[0.0, 0, 1, 2], [0, 0, 3, 4]])
      >>> pattern = make_pattern(weight, block=2)
      >>> values = take_values(weight, pattern)
      >>> block.forward(values, pattern, jnp.ones((4, 1))).tolist()
      [[3.0], [7.0]]
    """
    return lax.platform_dependent(
        values, pattern.row_starts, pattern.columns, x, cpu=_multiply_loop, default=_multiply
    )


def backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `forward`.

    Args:
      values: float32 ``[capacity, block, block]``.
      pattern: where they stand; may be traced.
      x: float32 ``[in, batch]``.
      dy: float32 ``[out, batch]``.
      inputs: whether ``dx = W^T dy`` is wanted. Static.
      weights: whether ``dvalues``, ``dy x^T`` at the places of the pattern, is wanted. Static.

    Returns:
      ``dx`` as ``x`` or None, and ``dvalues`` as ``values``, 0 at places not used, or None.
    """
    dx = dvalues = None
    if inputs:
        # The transposed weight: its rows are the columns, and its blocks are transposed.
        transposed = values[pattern.order].swapaxes(1, 2)
        dx = lax.platform_dependent(
            transposed, pattern.column_starts, pattern.rows, dy,
            cpu=_multiply_loop, default=_multiply,
        )  # fmt: skip
    if weights:
        dvalues = lax.platform_dependent(
            pattern.row_starts, pattern.columns, dy, x, cpu=_outer_loop, default=_outer
        )
    return dx, dvalues


class _Chunks(NamedTuple):
    """Groups of neighbouring places, each within one line; the first `used` of them count."""

    line: jax.Array  # int32[chunks], ascending
    start: jax.Array  # int32[chunks], the first place
    end: jax.Array  # int32[chunks], where the line ends, or 0 in chunks that do not count
    used: jax.Array  # int32[]


def _chunks(starts: jax.Array, capacity: int, size: int) -> _Chunks:
    """The chunks of lines that start at `starts`, `size` places each but for the last of a line."""
    lines = starts.shape[0] - 1
    numbers = (starts[1:] - starts[:-1] + size - 1) // size
    ends = jnp.cumsum(numbers, dtype=jnp.int32)
    # All lines together have at most this many, however the places are spread over them.
    chunk = jnp.arange(min(capacity, capacity // size + lines), dtype=jnp.int32)
    line = jnp.minimum(jnp.searchsorted(ends, chunk, side="right").astype(jnp.int32), lines - 1)
    start = starts[line] + (chunk - (ends - numbers)[line]) * size
    return _Chunks(line, start, jnp.where(chunk < ends[-1], starts[line + 1], 0), ends[-1])


def _size(block: int) -> int:
    # No more than 8: what a loop does for each place is written out, and has to compile.
    return min(8, -(-_INNER // block))


def _multiply_loop(
    values: jax.Array, starts: jax.Array, others: jax.Array, x: jax.Array
) -> jax.Array:
    """Sums ``values[k] @ x[others[k]]`` over the places ``k`` of each line."""
    capacity, block, _ = values.shape
    size, batch = _size(block), x.shape[1]
    chunks = _chunks(starts, capacity, size)

    def add(chunk, y):
        places = [chunks.start[chunk] + i for i in range(size)]
        # Slices of the right size in a row are copied; a gather would go element by element.
        lefts = [lax.dynamic_index_in_dim(values, k, keepdims=False) for k in places]
        rights = [lax.dynamic_slice(x, (others[k] * block, 0), (block, batch)) for k in places]

        def side_by_side(blocks, axis):
            # Both factors: a place that is not the line's must not bring in a NaN by either.
            kept = [
                jnp.where(k < chunks.end[chunk], one, 0)
                for k, one in zip(places, blocks, strict=True)
            ]
            return jnp.concatenate(kept, axis)

        product = side_by_side(lefts, 1) @ side_by_side(rights, 0)
        row = (chunks.line[chunk] * block, 0)
        product += lax.dynamic_slice(y, row, (block, batch))
        return lax.dynamic_update_slice(y, product, row)

    y = zeros(((starts.shape[0] - 1) * block, batch), x.dtype, values, starts, x)
    return lax.fori_loop(0, chunks.used, add, y)


def _multiply(values: jax.Array, starts: jax.Array, others: jax.Array, x: jax.Array) -> jax.Array:
    """The same as one batched product."""
    capacity, block, _ = values.shape
    lines, batch = starts.shape[0] - 1, x.shape[1]
    chunks = _chunks(starts, capacity, _size(block))
    places = chunks.start[:, None] + jnp.arange(_size(block))  # [chunks, size]
    kept = (places < chunks.end[:, None])[..., None, None]
    places = jnp.minimum(places, capacity - 1)
    left = jnp.where(kept, values[places], 0)
    right = jnp.where(kept, x.reshape(-1, block, batch)[others[places]], 0)
    y = jax.ops.segment_sum(
        jnp.einsum("ckij,ckjn->cin", left, right), chunks.line, lines, indices_are_sorted=True
    )
    return y.reshape(-1, batch)


def _outer_loop(starts: jax.Array, others: jax.Array, dy: jax.Array, x: jax.Array) -> jax.Array:
    """``dy[line] @ x[others[k]]^T`` for every place ``k``."""
    capacity, batch = others.shape[0], x.shape[1]
    block = dy.shape[0] // (starts.shape[0] - 1)
    size = _size(block)
    chunks = _chunks(starts, capacity, size)

    def put(chunk, dvalues):
        start = chunks.start[chunk]
        left = lax.dynamic_slice(dy, (chunks.line[chunk] * block, 0), (block, batch))
        right = jnp.concatenate(
            [
                lax.dynamic_slice(x, (others[start + i] * block, 0), (block, batch))
                for i in range(size)
            ]
        )
        found = (left @ right.T).reshape(block, size, block).swapaxes(0, 1)
        # What stands behind the end of a line is written over by the next chunk.
        return lax.dynamic_update_slice(dvalues, found, (start, 0, 0))

    dvalues = zeros((capacity + size, block, block), x.dtype, starts, dy, x)
    dvalues = lax.fori_loop(0, chunks.used, put, dvalues)[:capacity]
    return jnp.where((jnp.arange(capacity) < starts[-1])[:, None, None], dvalues, 0)


def _outer(starts: jax.Array, others: jax.Array, dy: jax.Array, x: jax.Array) -> jax.Array:
    """The same as one batched product."""
    capacity, batch, lines = others.shape[0], x.shape[1], starts.shape[0] - 1
    place = jnp.arange(capacity, dtype=jnp.int32)
    line = jnp.searchsorted(starts, place, side="right") - 1
    left = dy.reshape(lines, -1, batch)[jnp.minimum(line, lines - 1)]
    right = x.reshape(-1, left.shape[1], batch)[others]
    used = (place < starts[-1])[:, None, None]
    return jnp.where(used, jnp.einsum("kin,kjn->kij", left, right), 0)
