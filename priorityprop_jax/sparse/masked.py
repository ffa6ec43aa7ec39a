"""Products and convolutions with a sparse weight as dense ones, with the weight put together."""

from __future__ import annotations

import jax
from jax import lax

from priorityprop_jax.sparse.pattern import ConvGeometry, SparsePattern, densify_values, take_values


def forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry | None = None
) -> jax.Array:
    """``y = x W^T``, or a convolution: see `Kernel`.

    Zeros of the weight take part in the product: a NaN or an infinity in ``x`` reaches all outputs,
    as it does in a dense layer.
    """
    return _product(densify_values(values, pattern), x, geometry)


def backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    geometry: ConvGeometry | None = None,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `forward`: see `Kernel`."""
    weight = densify_values(values, pattern)
    dx = dvalues = None
    if inputs:
        [dx] = jax.vjp(lambda x: _product(weight, x, geometry), x)[1](dy)
    if weights:
        [dweight] = jax.vjp(lambda weight: _product(weight, x, geometry), weight)[1](dy)
        dvalues = take_values(dweight, pattern)
    return dx, dvalues


def _product(weight: jax.Array, x: jax.Array, geometry: ConvGeometry | None) -> jax.Array:
    if geometry is None:
        return (weight @ x.T).T
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
