"""Dynamic sparse training at a fixed number of non-zeros (RigL; Evci et al., 2020)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from priorityprop_jax.sparse.pattern import SparsePattern, change_pattern


def drop_and_grow(
    values: Any, pattern: SparsePattern, scores: Any, *, fraction: float
) -> tuple[SparsePattern, jax.Array]:
    """Moves a fraction of the places of a weight from small values to where scores are large.

    Of ``n`` places in use the ``round(fraction * n)`` of the smallest magnitude are dropped, and as
    many grown where nothing stood and scores are largest. Only when there are too few of these
    do dropped places stay, those with the largest scores. Of equal ones the earlier place by row
    is kept, or grown. A value of NaN counts as infinite, a score of NaN as minus infinity.
    Places are blocks where the pattern's are, and count by the sum of magnitudes, or of scores.

    It runs on the host, between compiled steps.

    Args:
      values: ``[capacity]`` or ``[capacity, block, block]``, concrete.
      pattern: where they stand, concrete.
      scores: ``[out, in]``, concrete: for RigL the magnitude of the dense gradient, or any
        priority.
      fraction: of the places, in [0, 1]; see `cosine_fraction`.

    Returns:
      A pattern of the same capacity and number of places, and where its values come from: see
      `change_pattern`. With this, `carry` takes values and moments along, zero where new.

    Raises:
      TypeError: if an argument is traced.
      ValueError: if shapes do not fit the pattern, or the fraction is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax.sparse.dynamic import drop_and_grow
      >>> from priorityprop_jax.sparse.pattern import carry, make_pattern, mask_of
      >>> pattern = make_pattern(np.array([[1, 1, 0, 0]]))
      >>> values, scores = jnp.array([0.1, 2.0]), jnp.array([[9.0, 9.0, 1.0, 3.0]])
      >>> pattern, source = drop_and_grow(values, pattern, scores, fraction=0.5)
      >>> mask_of(pattern).astype(int).tolist(), carry(values, source).tolist()
      ([[0, 1, 0, 1]], [2.0, 0.0])

    References:
      Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134
    """
    if any(isinstance(x, Tracer) for x in (values, pattern.columns, scores, fraction)):
        raise TypeError("drop_and_grow runs on the host, on concrete arrays: call it outside jit")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    block, (outs, ins) = pattern.block, pattern.grid
    values, scores = _to_float(values), _to_float(scores)
    expected = (pattern.capacity, *((block, block) if block > 1 else ()))
    if values.shape != expected or scores.shape != pattern.shape:
        raise ValueError(
            f"values must be of shape {expected} and scores of {pattern.shape}, got "
            f"{values.shape} and {scores.shape}"
        )
    starts = np.asarray(pattern.row_starts)
    used = int(starts[-1])
    rows = np.repeat(np.arange(outs, dtype=np.int64), np.diff(starts))
    places = rows * ins + np.asarray(pattern.columns)[:used]
    magnitudes = np.abs(values[:used])
    if block > 1:
        magnitudes = magnitudes.sum(axis=(1, 2))
        scores = scores.reshape(outs, block, ins, block).sum(axis=(1, 3))
    scores = np.where(np.isnan(scores), -np.inf, scores).reshape(-1)

    moved = round(float(fraction) * used)
    magnitudes = np.where(np.isnan(magnitudes), np.inf, magnitudes)
    dropped = places[~_largest(magnitudes, used - moved)]
    mask = np.zeros(outs * ins, bool)
    mask[places] = True
    free = np.flatnonzero(~mask)
    mask[dropped] = False
    grown = min(moved, len(free))
    mask[free[_largest(scores[free], grown)]] = True
    mask[dropped[_largest(scores[dropped], moved - grown)]] = True
    mask = mask.reshape(outs, ins)
    if block > 1:
        # One element of a block is enough to name it.
        whole = np.zeros((outs, block, ins, block), bool)
        whole[:, 0, :, 0] = mask
        mask = whole.reshape(pattern.shape)
    return change_pattern(pattern, mask)


def cosine_fraction(step: jax.typing.ArrayLike, end: int, initial: float = 0.3) -> jax.Array:
    r"""The fraction to move at a step, as RigL decays it.

    .. math:: f_t = \frac{\alpha}{2} \left(1 + \cos \frac{t \pi}{T}\right)

    Args:
      step: :math:`t`; may be traced.
      end: :math:`T`; the fraction is 0 from there on.
      initial: :math:`\alpha`, in [0, 1].

    Returns:
      float32, in the shape of ``step``.

    Raises:
      ValueError: if ``end`` is below 1, or ``initial`` outside [0, 1].

    Example:
      >>> from priorityprop_jax.sparse.dynamic import cosine_fraction
      >>> [round(float(cosine_fraction(t, 100)), 2) for t in (0, 50, 100, 200)]
      [0.3, 0.15, 0.0, 0.0]

    References:
      Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134
    """
    if end < 1 or not 0 <= initial <= 1:
        raise ValueError(
            f"end must be at least 1 and initial in [0, 1], got end={end}, initial={initial}"
        )
    step = jnp.asarray(step)
    fraction = initial / 2 * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / end))
    return jnp.where(step >= end, 0.0, fraction)


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Which are the `count` largest, of equal ones the first; without a sort. No NaN."""
    if count == 0:
        return np.zeros(len(scores), bool)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def _to_float(array: Any) -> np.ndarray:
    """Floating point that NumPy computes in: bfloat16 as float32."""
    array = np.asarray(array)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
