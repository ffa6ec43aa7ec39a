"""Convolutions with strides as one product over the patches that they look at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.core.fragile import spec_of


def conv_general_dilated(
    lhs: Any, rhs: Any, window_strides: Sequence[int], padding: Any, *args: Any, **options: Any
) -> jax.Array:
    r"""`jax.lax.conv_general_dilated` with strides, as a product of patches and kernel.

    .. math:: y_{b,i} = \sum_t x_{b, s i + t} K_t = (x_{b, s i + t})_t \; (K_t)_t

    With the patches side by side, forward pass and both gradients are products of matrices; XLA's
    CPU backend may run the gradients of a convolution with strides slowly. Where a kernel is no
    larger than the stride, as in 1 x 1 shortcuts and in the patches of a vision transformer, no
    pixel is in two patches; else there are several copies of it to write and read. Values
    and gradients are the same to rounding. For layers that take a ``conv_general_dilated``:
    `nnx.Conv` and Linen's `Conv`. What has no strides, dilations, groups of features, another
    order of axes than Flax's, or lies on a mesh of explicit axes is left as it is.

    Args:
      lhs: inputs ``[batch, *spatial, features]``.
      rhs: the kernel ``[*window, features, out features]``.
      window_strides: for every spatial axis.
      padding: as for `jax.lax.conv_general_dilated`, as is all that follows.
      *args: what else JAX knows.
      **options: the same by name.

    Returns:
      ``[batch, *spatial, out features]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import exact
      >>> dilated = exact.conv_general_dilated
      >>> layer = nnx.Conv(3, 8, (2, 2), 2, conv_general_dilated=dilated, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 6, 6, 3))).shape
      (4, 3, 3, 8)
    """
    if args or not _is_plain(lhs, rhs, window_strides, options):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, *args, **options)
    strides, window, spatial = tuple(window_strides), rhs.shape[:-2], lhs.shape[1:-1]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(spatial, window, strides, padding)
    sizes = [
        (size + low + high - taps) // stride + 1
        for size, (low, high), taps, stride in zip(spatial, padding, window, strides, strict=True)
    ]
    if min(sizes) < 1:
        return lax.conv_general_dilated(lhs, rhs, strides, padding, **options)
    # Cut or filled up so that an axis falls into steps of the stride, [steps, stride] each.
    steps = [size + (taps - 1) // stride
             for size, taps, stride in zip(sizes, window, strides, strict=True)]  # fmt: skip
    edges = [
        (low, count * stride - low - size, 0)
        for (low, _), count, stride, size in zip(padding, steps, strides, spatial, strict=True)
    ]
    x = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    pairs = itertools.chain.from_iterable(zip(steps, strides, strict=True))
    x = x.reshape(len(x), *pairs, lhs.shape[-1])

    def tap(place: Sequence[int]) -> jax.Array:
        """What one place of the window sees, ``[batch, *sizes, features]``."""
        cut: list[Any] = [slice(None)]
        for at, stride, size in zip(place, strides, sizes, strict=True):
            cut += [slice(at // stride, at // stride + size), at % stride]
        return x[tuple(cut)]

    patches = jnp.concatenate([tap(place) for place in itertools.product(*map(range, window))], -1)
    out = lax.dot_general(
        patches.reshape(-1, patches.shape[-1]),
        rhs.reshape(-1, rhs.shape[-1]),
        (((1,), (0,)), ((), ())),
        precision=options.get("precision"),
        preferred_element_type=options.get("preferred_element_type"),
    )
    return out.reshape(len(lhs), *sizes, rhs.shape[-1])


def _is_plain(lhs: Any, rhs: Any, strides: Sequence[int], options: dict[str, Any]) -> bool:
    """Whether a convolution has strides, and nothing else that is out of the ordinary."""
    last = rhs.ndim - 1
    inputs, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    order = tuple(map(tuple, options.get("dimension_numbers") or ()))
    dilations = [options.get(name) or (1,) for name in ("lhs_dilation", "rhs_dilation")]
    groups = [options.get(name, 1) for name in ("feature_group_count", "batch_group_count")]
    explicit = any(axis is not None for x in (lhs, rhs) for axis in spec_of(x))
    return (
        math.prod(strides) > 1
        and order == (inputs, kernel, inputs)
        and all(set(by) == {1} for by in dilations)
        and groups == [1, 1]
        and not explicit
        and options.get("out_sharding") is None
        and lhs.dtype == rhs.dtype
        and bool(lhs.size)
    )
