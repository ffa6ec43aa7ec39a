"""Sparse products on a CPU by kernels in C++, where the installation has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from priorityprop_jax.core.native import call
from priorityprop_jax.core.native import native_status as native_status
from priorityprop_jax.core.native import platform as platform
from priorityprop_jax.sparse.pattern import ConvGeometry, SparsePattern


def forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry | None = None
) -> jax.Array:
    """``y = x W^T``, or a convolution, of float32 arrays: see `Kernel`."""
    shape = _output(values, pattern, x, geometry)
    operands = (values, pattern.row_starts, pattern.columns, x)
    if geometry is None:
        (y,) = call("linear_forward", _flops, [shape], *operands)
    else:
        (y,) = call("conv_forward", _flops, [shape], *operands, geometry=_flat(geometry))
    return y


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
    """The gradients of `forward`, in float32: see `Kernel`."""
    shape = _output(values, pattern, x, geometry)
    if dy.shape != shape:
        raise ValueError(f"the output of this product is {shape}, and dy is {dy.shape}")
    if not (inputs or weights):
        return None, None
    shapes = [x.shape if inputs else (0,), values.shape if weights else (0,)]
    wanted: dict[str, Any] = {"inputs": inputs, "weights": weights}
    if geometry is None:
        places = (pattern.row_starts, pattern.column_starts, pattern.rows, pattern.order)
        dx, dvalues = call(
            "linear_backward", _flops_backward, shapes, values, *places, x, dy, **wanted
        )
    else:
        places = (pattern.row_starts, pattern.columns)
        wanted["geometry"] = _flat(geometry)
        dx, dvalues = call(
            "conv_backward", _flops_backward, shapes, values, *places, x, dy, **wanted
        )
    return dx if inputs else None, dvalues if weights else None


def _output(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry | None
) -> tuple[int, ...]:
    """Checks the operands of a product, and gives the shape of its output."""
    (outs, columns), taken = pattern.shape, "[batch, in]"
    expected: tuple[int, ...] = (columns,)
    fits = values.shape == (pattern.capacity,)
    if geometry is not None:
        taps = geometry.kernel[0] * geometry.kernel[1]
        channels = columns // taps * geometry.groups
        taken, expected = f"[batch, height, width, {channels}]", (*x.shape[1:3], channels)
        fits &= x.ndim == 4 and columns % taps == 0 and outs % geometry.groups == 0
    if not fits or x.ndim < 2 or x.shape[1:] != expected:
        raise ValueError(
            f"a weight of shape {pattern.shape} and capacity {pattern.capacity} takes values "
            f"[capacity] and x {taken}, got shapes {values.shape} and {x.shape}"
        )
    if geometry is None:
        return (x.shape[0], outs)
    return (x.shape[0], *geometry.output((x.shape[1], x.shape[2])), outs)


def _flat(geometry: ConvGeometry) -> np.ndarray:
    """What the kernels need of a geometry; padding behind an axis follows from the output."""
    low = [low for low, _ in geometry.padding]
    numbers = [*geometry.kernel, *geometry.strides, *low, *geometry.dilation, geometry.groups]
    return np.array(numbers, np.int64)


def _flops(operands: Sequence[Any], results: Sequence[Any], _: Any) -> float:
    """Two for each stored weight at each position of each example."""
    return 2.0 * operands[0].size * math.prod(results[0].shape[:-1])


def _flops_backward(operands: Sequence[Any], _: Any, attributes: Mapping[str, Any]) -> float:
    """The same, for each of the two gradients that is asked for."""
    gradients = bool(attributes["inputs"]) + bool(attributes["weights"])
    return gradients * _flops(operands, operands[-1:], None)
