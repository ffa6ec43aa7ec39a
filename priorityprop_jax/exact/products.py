"""Products of layers over rows of features, whatever axes there are in front."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax

from priorityprop_jax.core.fragile import spec_of


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.dot_general` of two matrices, into which inputs and kernel are reshaped.

    The kernel's gradient of a product over ``[batch, length, features]`` sums over two axes, which
    XLA's CPU backend may do slowly; of a product over ``[batch * length, features]`` it sums over
    one. Values and gradients are the same to rounding. For layers that take a ``dot_general``:
    `nnx.Linear`, `nnx.LinearGeneral`, attention (``qkv_dot_general``, ``out_dot_general``), and
    Linen's `Dense` and `DenseGeneral`. Other products, those with axes of a batch among them, and
    those on a mesh of explicit axes, are left as they are.

    Args:
      lhs: inputs ``[..., contracted]``, the contracted axes last.
      rhs: the kernel ``[contracted, ...]``, the contracted axes first.
      dimension_numbers: as for `jax.lax.dot_general`, as is all that follows.
      precision: of the product.
      preferred_element_type: of the sums.
      **options: what else JAX knows, such as ``out_sharding``.

    Returns:
      The product ``[..., ...]``: the inputs' other axes, then the kernel's.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import exact
      >>> layer = nnx.Linear(8, 4, dot_general=exact.dot_general, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 3, 8))).shape
      (2, 3, 4)
    """
    options |= {"precision": precision, "preferred_element_type": preferred_element_type}
    (of_lhs, of_rhs), batch = dimension_numbers
    free, count = lhs.ndim - len(of_lhs), len(of_lhs)
    in_order = tuple(of_lhs) == (*range(free, lhs.ndim),) and tuple(of_rhs) == (*range(count),)
    if any(map(len, batch)) or not in_order or max(free, count, rhs.ndim - count) < 2:
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    explicit = any(axis is not None for x in (lhs, rhs) for axis in spec_of(x))
    if options.get("out_sharding") is not None or explicit:  # a reshape may be refused
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    rows, inner = lhs.shape[:free], math.prod(rhs.shape[:count])
    y = lax.dot_general(
        lhs.reshape(math.prod(rows), inner),
        rhs.reshape(inner, math.prod(rhs.shape[count:])),
        (((1,), (0,)), ((), ())),
        **options,
    )
    return y.reshape(*rows, *rhs.shape[count:])
