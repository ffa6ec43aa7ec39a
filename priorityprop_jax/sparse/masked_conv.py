"""Convolutions with a sparse weight as dense ones."""

from __future__ import annotations

import jax
from jax import lax

from priorityprop_jax.sparse.geometry import ConvGeometry
from priorityprop_jax.sparse.pattern import SparsePattern, densify_values, take_values


def conv_forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry
) -> jax.Array:
    """The convolution of `lax.conv_general_dilated` with the weight put together for it.

    Args:
      values: ``[capacity]``, or ``[capacity, block, block]``.
      pattern: of the kernel as a matrix ``(out, in / groups * height * width)``.
      x: ``[batch, height, width, in]``.
      geometry: all else.

    Returns:
      ``[batch, height, width, out]``.
    """
    return _convolve(densify_values(values, pattern), x, geometry)


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
      values: as there.
      pattern: as there.
      x: as there.
      dy: the gradient of its result.
      geometry: as there.
      inputs: whether that of ``x`` is wanted.
      weights: whether that of ``values`` is wanted.

    Returns:
      Both, None for what is not wanted.
    """
    weight = densify_values(values, pattern)
    dx = dvalues = None
    if inputs:
        [dx] = jax.vjp(lambda x: _convolve(weight, x, geometry), x)[1](dy)
    if weights:
        [dweight] = jax.vjp(lambda weight: _convolve(weight, x, geometry), weight)[1](dy)
        dvalues = take_values(dweight, pattern)
    return dx, dvalues


def _convolve(weight: jax.Array, x: jax.Array, geometry: ConvGeometry) -> jax.Array:
    kernel = weight.reshape(weight.shape[0], -1, *geometry.kernel).transpose(2, 3, 1, 0)
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
    )
