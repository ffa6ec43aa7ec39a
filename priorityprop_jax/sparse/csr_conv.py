"""Convolutions with a sparse kernel in plain JAX: products of `csr` with patches of few images."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.sparse.csr import (
    Lines,
    cheaper_dense,
    product,
    sampled_product,
    take_places,
    zeros,
)
from priorityprop_jax.sparse.geometry import ConvGeometry
from priorityprop_jax.sparse.pattern import SparsePattern

# Patches of as many images are made at once as give about so many outputs of a channel: patches
# hold each input KH * KW times, and never do so for the whole batch.
_OUTPUTS = 512


def conv_forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry
) -> jax.Array:
    """A convolution with a sparse kernel.

    Args:
      values: ``[capacity]``; those at places that are not used may be anything.
      pattern: of single values and of shape ``(OC, IC / groups * KH * KW)``; may be traced.
      x: ``[B, H, W, IC]``.
      geometry: what the convolution is but for its weight.

    Returns:
      ``[B, OH, OW, OC]`` in the common dtype of `values` and `x`; sums are float32 at least.

    Raises:
      ValueError: if the pattern is one of blocks, or its shape is not that of the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.sparse.csr_conv import conv_forward
      >>> from priorityprop_jax.sparse.geometry import ConvGeometry
      >>> from priorityprop_jax.sparse.pattern import make_pattern
      >>> pattern = make_pattern([[1, 0, 0, 1]])
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> y = conv_forward(jnp.array([1.0, 10.0]), pattern, x, ConvGeometry((2, 2)))
      >>> y[0, :, :, 0].tolist()
      [[40.0, 51.0], [73.0, 84.0]]
    """
    _check(pattern, x, geometry)
    outs = pattern.shape[0]
    height, width = geometry.output((x.shape[1], x.shape[2]))
    dtype = jnp.result_type(values, x)
    if 0 in (x.shape[0], height, width, outs):
        return jnp.zeros((x.shape[0], height, width, outs), dtype)
    lines = _row_lines(pattern, geometry)
    images = _images(height, width)

    def some(x):
        y = product(values, pattern.columns, lines, _patches(geometry)(x))
        return jnp.moveaxis(y.reshape(outs, images, height, width), 0, -1)

    return _join(lax.map(some, _split(x, images)), x.shape[0])


def conv_backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    geometry: ConvGeometry,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `conv_forward`.

    Args:
      values: ``[capacity]``; those at places that are not used may be anything.
      pattern: of single values and of shape ``(OC, IC / groups * KH * KW)``; may be traced.
      x: ``[B, H, W, IC]``.
      dy: ``[B, OH, OW, OC]``.
      geometry: what the convolution is but for its weight.
      inputs: whether to compute the gradient of `x`.
      weights: whether to compute that of `values`.

    Returns:
      The gradients of `x` and `values`, in their dtypes, ``None`` for one that is not wanted. That
      of places that are not used is 0.

    Raises:
      ValueError: if the pattern is one of blocks, or its shape is not that of the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.sparse.csr_conv import conv_backward
      >>> from priorityprop_jax.sparse.geometry import ConvGeometry
      >>> from priorityprop_jax.sparse.pattern import make_pattern
      >>> pattern = make_pattern([[1, 0, 0, 1]])
      >>> x, dy = jnp.arange(9.0).reshape(1, 3, 3, 1), jnp.ones((1, 2, 2, 1))
      >>> dx, dvalues = conv_backward(
      ...     jnp.array([1.0, 10.0]), pattern, x, dy, ConvGeometry((2, 2))
      ... )
      >>> dx[0, :, :, 0].tolist(), dvalues.tolist()
      ([[1.0, 1.0, 0.0], [1.0, 11.0, 10.0], [0.0, 10.0, 10.0]], [8.0, 24.0])
    """
    _check(pattern, x, geometry)
    outs = pattern.shape[0]
    height, width = dy.shape[1:3]
    if 0 in (*x.shape, *dy.shape):
        return (
            jnp.zeros_like(x) if inputs else None,
            jnp.zeros(pattern.capacity, values.dtype) if weights else None,
        )
    images = _images(height, width)
    xs, dys = _split(x, images), _split(dy, images)

    def columns_first(dy):
        return jnp.moveaxis(dy, -1, 0).reshape(outs, -1)

    dx = dvalues = None
    if inputs:
        by_column = jnp.take(values, pattern.order, mode="clip")
        lines = _column_lines(pattern, geometry)
        dtype = jnp.result_type(values, dy)
        some_x = zeros(xs.shape[1:], dtype, values, pattern.columns, dy)
        add_up = jax.linear_transpose(_patches(geometry), some_x)

        def some(dy):
            return add_up(product(by_column, pattern.rows, lines, columns_first(dy)))[0]

        dx = _join(lax.map(some, dys), x.shape[0]).astype(x.dtype)
    if weights:
        lines, groups = _row_lines(pattern, geometry), geometry.groups
        wide = jnp.promote_types(jnp.result_type(x, dy), jnp.float32)
        dense = cheaper_dense(pattern)

        def more(total, tiles):
            x, dy = (tile.astype(wide) for tile in tiles)
            patches, dy = _patches(geometry)(x), columns_first(dy)
            if not dense:
                return total + sampled_product(pattern.columns, lines, patches, dy), None
            by_group = (a.reshape(groups, -1, a.shape[1]) for a in (dy, patches))
            part = jnp.einsum("gon,gin->goi", *by_group, precision=lax.Precision.HIGHEST)
            return total + part.reshape(total.shape), None

        shape = pattern.shape if dense else (pattern.capacity,)
        dvalues = lax.scan(more, zeros(shape, wide, pattern.columns, x, dy), (xs, dys))[0]
        if dense:
            dvalues = take_places(dvalues, pattern)
        dvalues = dvalues.astype(values.dtype)
    return dx, dvalues


def _check(pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry) -> None:
    channels, groups = x.shape[3], geometry.groups
    area = geometry.kernel[0] * geometry.kernel[1]
    if pattern.block != 1:
        raise ValueError(
            f"this kernel takes patterns of single values, got blocks of side {pattern.block}"
        )
    if channels % groups or pattern.shape[0] % groups:
        raise ValueError(
            f"{groups} groups must divide the channels, {channels} in and {pattern.shape[0]} out"
        )
    if pattern.shape[1] != channels // groups * area:
        raise ValueError(
            f"the pattern has {pattern.shape[1]} columns, and a kernel {geometry.kernel} over "
            f"{channels} channels in {groups} groups has {channels // groups * area}"
        )


def _images(height: int, width: int) -> int:
    return max(1, round(_OUTPUTS / (height * width)))


def _split(x: jax.Array, images: int) -> jax.Array:
    """``[B, ...]`` as ``[tiles, images, ...]``; images that are added are 0."""
    x = jnp.pad(x, ((0, -x.shape[0] % images), (0, 0), (0, 0), (0, 0)))
    return x.reshape(-1, images, *x.shape[1:])


def _join(tiles: jax.Array, batch: int) -> jax.Array:
    return tiles.reshape(-1, *tiles.shape[2:])[:batch]


def _patches(geometry: ConvGeometry) -> Callable[[jax.Array], jax.Array]:
    """The linear map from images ``[B, H, W, IC]`` to patches ``[IC * KH * KW, B * OH * OW]``."""
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.strides, geometry.dilation

    def patches(x):
        height, width = geometry.output((x.shape[1], x.shape[2]))
        # Padding may be negative, as in `lax.conv_general_dilated`.
        x = lax.pad(
            jnp.transpose(x, (3, 0, 1, 2)),
            jnp.zeros((), x.dtype),
            [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in geometry.padding)],
        )
        taps = []
        for i in range(geometry.kernel[0]):
            for j in range(geometry.kernel[1]):
                top, left = i * dilation_h, j * dilation_w
                bottom, right = top + (height - 1) * stride_h + 1, left + (width - 1) * stride_w + 1
                taps.append(x[:, :, top:bottom:stride_h, left:right:stride_w])
        return jnp.stack(taps, axis=1).reshape(x.shape[0] * len(taps), -1)

    return patches


def _row_lines(pattern: SparsePattern, geometry: ConvGeometry) -> Lines:
    """Rows of the pattern over patches of all groups."""
    starts, groups = pattern.row_starts, geometry.groups
    group = jnp.arange(pattern.shape[0], dtype=jnp.int32) // (pattern.shape[0] // groups)
    return Lines(starts[:-1], jnp.diff(starts), group * pattern.shape[1] if groups > 1 else None)


def _column_lines(pattern: SparsePattern, geometry: ConvGeometry) -> Lines:
    """For each column of patches of all groups, the places whose rows are of its group."""
    starts, groups = pattern.column_starts, geometry.groups
    if groups == 1:
        return Lines(starts[:-1], jnp.diff(starts), None)
    outs, ins = pattern.shape
    places = jnp.arange(pattern.capacity, dtype=jnp.int32)
    column = jnp.take(pattern.columns, pattern.order, mode="clip")
    cell = pattern.rows // (outs // groups) * ins + column
    # Places that are not used are dropped.
    cell = jnp.where(places < starts[-1], cell, groups * ins)
    lengths = jnp.zeros(groups * ins, jnp.int32).at[cell].add(1, mode="drop")
    lengths = lengths.reshape(groups, ins)
    # Rows ascend within a column, and so do their groups.
    starts = starts[:-1] + jnp.cumsum(lengths, axis=0) - lengths
    return Lines(starts.reshape(-1), lengths.reshape(-1), None)
