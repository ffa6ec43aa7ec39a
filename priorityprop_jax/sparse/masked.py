"""Products with a sparse weight as dense ones: the choice where a weight is hardly sparse."""

from __future__ import annotations

import jax

from priorityprop_jax.sparse.pattern import SparsePattern, densify_values, take_values


def forward(values: jax.Array, pattern: SparsePattern, x: jax.Array) -> jax.Array:
    """``y = W x``.

    Zeros of the weight take part in the product: a NaN or an infinity in ``x`` reaches all outputs,
    as it does in a dense layer.

    Args:
      values: float32 ``[capacity]``, or ``[capacity, block, block]``.
      pattern: where they stand; may be traced.
      x: float32 ``[in, batch]``.

    Returns:
      ``[out, batch]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.sparse import masked
      >>> from priorityprop_jax.sparse.pattern import make_pattern
      >>> pattern = make_pattern([[0, 1], [1, 1]])
      >>> masked.forward(jnp.array([1.0, 2.0, 3.0]), pattern, jnp.ones((2, 1))).tolist()
      [[1.0], [5.0]]
    """
    return densify_values(values, pattern) @ x


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
      values: float32 ``[capacity]``, or ``[capacity, block, block]``.
      pattern: where they stand; may be traced.
      x: float32 ``[in, batch]``.
      dy: float32 ``[out, batch]``.
      inputs: whether ``dx = W^T dy`` is wanted. Static.
      weights: whether ``dvalues``, ``dy x^T`` at the places of the pattern, is wanted. Static.

    Returns:
      ``dx`` as ``x`` or None, and ``dvalues`` as ``values``, 0 at places not used, or None.
    """
    dx = densify_values(values, pattern).T @ dy if inputs else None
    dvalues = take_values(dy @ x.T, pattern) if weights else None
    return dx, dvalues
