"""Layers with sparse weights as functions: for Linen, and for whoever keeps parameters himself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from priorityprop_jax.core.fragile import laid_out, spec_of
from priorityprop_jax.sparse.backends import choose_backend
from priorityprop_jax.sparse.pattern import ConvGeometry, SparsePattern
from priorityprop_jax.sparse.products import Product, multiply

# What `flax.nnx.Conv` takes as padding.
Padding = str | int | Sequence[int | tuple[int, int]]


def sparse_linear(
    x: jax.Array, values: jax.Array, pattern: SparsePattern, *, backend: str | None = None
) -> jax.Array:
    """``y = x W^T`` with a weight that is zero outside of a pattern.

    Forward pass, input gradient and weight gradient take time in proportion to the non-zeros
    (SparseProp, arXiv 2302.04852): with ``dy`` the gradient of ``y``, that of ``x`` is ``dy W`` and
    that of ``values`` is ``dy^T x`` at the places of the pattern. Gradients of gradients work in
    reverse mode; forward mode (`jax.jvp`) does not, as JAX says where it is tried.

    Args:
      x: ``[..., in]``.
      values: ``[capacity]``. Those at unused places are not read.
      pattern: where they stand. It may be traced.
      backend: which kernels; by default the choice of `sparse_backend`. Static.

    Returns:
      ``[..., out]`` in the dtype that ``x`` and ``values`` promote to; dtypes of 16 bits are
      accumulated in float32.

    Raises:
      TypeError: if ``x`` or ``values`` are no floating-point numbers.
      ValueError: if shapes do not fit together, or the backend cannot do it.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax import sparse
      >>> pattern = sparse.make_pattern(np.array([[0, 1], [1, 1]]))
      >>> values = jnp.array([1.0, 2.0, 3.0])
      >>> sparse.sparse_linear(jnp.array([10.0, 1.0]), values, pattern).tolist()
      [1.0, 23.0]
    """
    x, values, dtype = _checked(x, values, pattern)
    ins = pattern.shape[1]
    if x.ndim < 1 or x.shape[-1] != ins:
        raise ValueError(f"x must be [..., {ins}] for a weight {pattern.shape}, got {x.shape}")
    product = Product(choose_backend(backend, pattern, dtype, None, x.shape))

    def run(x, values, pattern):
        y = multiply(product, values, pattern, x.reshape(math.prod(x.shape[:-1]), ins))
        return y.reshape(*x.shape[:-1], pattern.shape[0])

    return laid_out(run, lambda x, *_: jax.P(*spec_of(x)[:-1], None))(x, values, pattern)


def sparse_conv(
    x: jax.Array,
    values: jax.Array,
    pattern: SparsePattern,
    *,
    kernel_size: Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    backend: str | None = None,
) -> jax.Array:
    """A convolution over one or two axes with a kernel that is zero outside of a pattern.

    The options are those of `flax.nnx.Conv`; gradients are as for `sparse_linear`.

    Args:
      x: ``[..., length, in]`` or ``[..., height, width, in]``.
      values: ``[capacity]``.
      pattern: of the kernel as a matrix ``(out, in / groups * height * width)``, columns in that
        order of axes.
      kernel_size: one or two sizes.
      strides: steps between outputs, of each axis or of all.
      padding: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"`` (one axis), or
        how many zeros: one number, one of each axis, or ``(low, high)`` of each axis.
      kernel_dilation: steps between elements of the kernel, of each axis or of all.
      feature_group_count: groups of channels.
      backend: as for `sparse_linear`.

    Returns:
      ``[..., length, out]`` or ``[..., height, width, out]``.

    Raises:
      TypeError: if ``x`` or ``values`` are no floating-point numbers.
      ValueError: if shapes or options do not fit together, or the backend cannot do it.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax import sparse
      >>> pattern = sparse.make_pattern(np.array([[1, 0, 1]]))  # one channel, kernel of 3
      >>> x, values = jnp.arange(5.0)[:, None], jnp.array([1.0, 10.0])
      >>> y = sparse.sparse_conv(x, values, pattern, kernel_size=(3,), padding="VALID")
      >>> y[:, 0].tolist()
      [20.0, 31.0, 42.0]
    """
    x, values, dtype = _checked(x, values, pattern)
    axes = len(kernel_size)
    if axes not in (1, 2):
        raise ValueError(f"sparse convolutions have one or two axes, got kernel_size {kernel_size}")
    sizes = tuple(int(size) for size in kernel_size)
    steps = _each(strides, axes, "strides")
    dilation = _each(kernel_dilation, axes, "kernel_dilation")
    groups = feature_group_count
    channels = x.shape[-1] if x.ndim > axes else -1
    taps = sizes[0] * sizes[-1] if axes == 2 else sizes[0]
    outs, columns = pattern.shape
    if groups < 1 or outs % groups or channels < 0 or channels * taps != columns * groups:
        raise ValueError(
            f"x {x.shape} does not fit a kernel {sizes} of shape {pattern.shape} in {groups} "
            "groups: x is [..., *sizes, in], the kernel (out, in / groups * taps)"
        )
    batch = x.shape[: -axes - 1]

    def run(x, values, pattern):
        x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
        x, pads = _pad(x, sizes, steps, dilation, padding)
        geometry = ConvGeometry(sizes, steps, pads, dilation, groups)  # type: ignore[arg-type]
        if axes == 1:  # an image of height 1
            x, pads = x[:, None], ((0, 0), *pads)
            geometry = ConvGeometry((1, *sizes), (1, *steps), pads, (1, *dilation), groups)  # type: ignore[arg-type]
        chosen = choose_backend(backend, pattern, dtype, geometry, x.shape)
        y = multiply(Product(chosen, geometry), values, pattern, x)
        return y.reshape(*batch, *y.shape[2 if axes == 1 else 1 :])

    def results(x, *_):
        return jax.P(*spec_of(x)[: len(batch)], *[None] * (axes + 1))

    return laid_out(run, results)(x, values, pattern)


def _checked(x: Any, values: Any, pattern: SparsePattern) -> tuple[jax.Array, jax.Array, Any]:
    x, values = jnp.asarray(x), jnp.asarray(values)
    dtype = jnp.result_type(x, values)
    for name, array in {"x": x, "values": values}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a real floating-point dtype, got {array.dtype}")
    if values.shape != (pattern.capacity,):
        raise ValueError(f"values of this pattern must be [{pattern.capacity}], got {values.shape}")
    return x, values, dtype


def _each(option: int | Sequence[int] | None, axes: int, name: str) -> tuple[int, ...]:
    """An option for each axis; None, as `flax.nnx` has it, is 1."""
    option = 1 if option is None else option
    given: Any = [option] * axes if np.ndim(option) == 0 else option
    found = tuple(map(int, given))
    if len(found) != axes or min(found) < 1:
        raise ValueError(f"{name} must be {axes} positive numbers, got {option}")
    return found


def _pad(
    x: jax.Array,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: Padding,
) -> tuple[jax.Array, tuple[tuple[int, int], ...]]:
    """The zeros around each axis; other kinds of padding are put around ``x`` here."""
    axes = len(sizes)
    spans = tuple((size - 1) * step + 1 for size, step in zip(sizes, dilation, strict=True))
    none = ((0, 0),) * axes
    if isinstance(padding, str):
        kind = padding.upper()
        if kind == "CAUSAL" and axes == 1:
            return x, ((spans[0] - 1, 0),)
        if kind in ("CIRCULAR", "REFLECT"):
            pads = [(0, 0), *(((span - 1) // 2, span // 2) for span in spans), (0, 0)]
            return jnp.pad(x, pads, mode="wrap" if kind == "CIRCULAR" else "reflect"), none
        if kind in ("SAME", "VALID", "SAME_LOWER"):
            found = lax.padtype_to_pads(x.shape[1:-1], spans, strides, kind)
            return x, tuple((int(low), int(high)) for low, high in found)
        raise ValueError(f"padding {padding!r} does not fit a convolution over {axes} axes")
    pads = [padding] * axes if np.ndim(padding) == 0 else list(padding)  # type: ignore[arg-type]
    pairs = tuple((pad, pad) if np.ndim(pad) == 0 else tuple(pad) for pad in pads)  # type: ignore[arg-type]
    if len(pairs) != axes or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(f"padding must be zeros for each of {axes} axes, got {padding}")
    return x, pairs  # type: ignore[return-value]
