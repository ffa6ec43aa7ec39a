"""Weights that keep two of every four inputs: half the values, and four bits for where they stand.

Products are dense, on the weight unpacked for them; what is saved is memory between them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["positions"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class TwoFourPattern:
    """Which two of every four consecutive inputs a weight ``(out, in)`` keeps; a pytree.

    Values belong to it as ``[out, in / 2]``, inputs ascending.

    Attributes:
      positions: uint8 ``[out, ceil(in / 8)]``: four positions of 2 bits in a byte, the first in the
        lowest bits.
      shape: ``(out, in)``.
    """

    positions: jax.Array
    shape: tuple[int, int]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """The shape of the values that belong to it."""
        return self.shape[0], self.shape[1] // 2


def is_two_four(mask: Any) -> bool:
    """Whether a mask keeps exactly two of every four consecutive inputs.

    Args:
      mask: bool ``[out, in]`` (or numbers: non-zero is kept), a concrete array.

    Returns:
      False also for what is no matrix, or where ``in`` is no multiple of 4.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax.sparse.two_four import is_two_four
      >>> is_two_four(np.array([[1, 0, 0, 1, 0, 1, 1, 0]])), is_two_four(np.array([[1, 1, 1, 0]]))
      (True, False)
    """
    mask = np.asarray(mask) != 0
    if mask.ndim != 2 or mask.shape[1] % 4:
        return False
    return bool(np.all(mask.reshape(-1, 4).sum(1) == 2))


def pack_two_four(mask: Any) -> TwoFourPattern:
    """The pattern of a 2:4 mask.

    Args:
      mask: bool ``[out, in]`` (or numbers: non-zero is kept), a concrete array.

    Raises:
      TypeError: if the mask is traced.
      ValueError: if it is no matrix, ``in`` is no multiple of 4, or a group keeps other than two.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax.sparse.two_four import densify_two_four, pack_two_four
      >>> pattern = pack_two_four(np.array([[1, 0, 0, 1, 0, 1, 1, 0]]))
      >>> densify_two_four(jnp.array([[1.0, 2.0, 3.0, 4.0]]), pattern).tolist()
      [[1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0]]
    """
    if isinstance(mask, Tracer):
        raise TypeError("a mask must be a concrete array: make patterns outside of jit")
    mask = np.asarray(mask) != 0
    if mask.ndim != 2:
        raise ValueError(f"a mask must be a matrix (out, in), got shape {mask.shape}")
    outs, ins = mask.shape
    if ins % 4:
        raise ValueError(f"a 2:4 mask needs a multiple of 4 inputs, got {ins} in {mask.shape}")
    if not is_two_four(mask):
        raise ValueError(
            "a 2:4 mask keeps exactly two of every four consecutive inputs; this one does not: "
            "make one with two_four_mask"
        )
    positions = (np.nonzero(mask)[1] % 4).astype(np.uint8).reshape(outs, ins // 2)
    positions = np.pad(positions, ((0, 0), (0, -(ins // 2) % 4))).reshape(outs, -(-ins // 8), 4)
    packed = np.bitwise_or.reduce(positions << np.arange(0, 8, 2, dtype=np.uint8), axis=2)
    return TwoFourPattern(jnp.asarray(packed), (outs, ins))


def mask_of_two_four(pattern: TwoFourPattern) -> np.ndarray:
    """The mask of a concrete pattern, bool ``[out, in]``."""
    outs, ins = pattern.shape
    return np.asarray(densify_two_four(jnp.ones((outs, ins // 2), bool), pattern))


def densify_two_four(values: jax.Array, pattern: TwoFourPattern) -> jax.Array:
    """The weight as a dense array.

    Args:
      values: ``[out, in / 2]``.
      pattern: where they stand; may be traced.

    Returns:
      ``[out, in]``, zero where the pattern keeps nothing.
    """
    outs, ins = pattern.shape
    positions = _positions(pattern)
    values = values.reshape(outs, ins // 4, 2)
    zero = jnp.zeros((), values.dtype)
    # A choice by position rather than a scatter: it is one pass that vectorizes.
    dense = [
        jnp.where(
            positions[..., 0] == i,
            values[..., 0],
            jnp.where(positions[..., 1] == i, values[..., 1], zero),
        )
        for i in range(4)
    ]
    return jnp.stack(dense, axis=-1).reshape(outs, ins)


def take_two_four(dense: jax.Array, pattern: TwoFourPattern) -> jax.Array:
    """The inverse of `densify_two_four`: what stands at the places of the pattern.

    Args:
      dense: ``[out, in]``.
      pattern: may be traced.

    Returns:
      ``[out, in / 2]``.
    """
    outs, ins = pattern.shape
    positions = _positions(pattern)
    groups = dense.reshape(outs, ins // 4, 1, 4)
    taken = groups[..., 3]
    for i in range(3):
        taken = jnp.where(positions == i, groups[..., i], taken)
    return taken.reshape(outs, ins // 2)


def forward(values: jax.Array, pattern: TwoFourPattern, x: jax.Array) -> jax.Array:
    """``y = W x``.

    Zeros of the weight take part in the product: a NaN or an infinity in ``x`` reaches all outputs,
    as it does in a dense layer.

    Args:
      values: float32 ``[out, in / 2]``.
      pattern: where they stand; may be traced.
      x: float32 ``[in, batch]``.

    Returns:
      ``[out, batch]``.
    """
    return densify_two_four(values, pattern) @ x


def backward(
    values: jax.Array,
    pattern: TwoFourPattern,
    x: jax.Array,
    dy: jax.Array,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `forward`.

    Args:
      values: float32 ``[out, in / 2]``.
      pattern: where they stand; may be traced.
      x: float32 ``[in, batch]``.
      dy: float32 ``[out, batch]``.
      inputs: whether ``dx = W^T dy`` is wanted. Static.
      weights: whether ``dvalues``, ``dy x^T`` at the places of the pattern, is wanted. Static.

    Returns:
      ``dx`` as ``x`` or None, and ``dvalues`` as ``values`` or None.
    """
    dx = densify_two_four(values, pattern).T @ dy if inputs else None
    dvalues = take_two_four(dy @ x.T, pattern) if weights else None
    return dx, dvalues


def _positions(pattern: TwoFourPattern) -> jax.Array:
    """uint8 ``[out, in / 4, 2]``."""
    outs, ins = pattern.shape
    positions = (pattern.positions[..., None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8)) & 3
    return positions.reshape(outs, -1)[:, : ins // 2].reshape(outs, ins // 4, 2)
