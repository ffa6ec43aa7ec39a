"""Top-k of the elements: the elementwise end of spending updates where they matter."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from priorityprop_jax.core.fragile import laid_out, spec_of
from priorityprop_jax.core.rows import beside
from priorityprop_jax.core.selection import check_k, is_fraction, resolve_k


class TopKUpdatesState(NamedTuple):
    """State of `top_k_updates`."""

    residual: optax.Updates  # what was held back, as the updates; () without error feedback.


def top_k_updates(k: int | float, *, error_feedback: bool = False) -> optax.GradientTransformation:
    r"""Lets through only the elements of each leaf's update that are largest in magnitude.

    With ``T`` the indices of the ``k`` largest ``|u_i|`` of a leaf,

    .. math:: u'_i = u_i \text{ for } i \in T, \quad 0 \text{ otherwise.}

    With error feedback ``u`` is the update plus what earlier steps held back, and what is held back
    now is kept for later: nothing is lost, only delayed.

    The threshold is found by bisection on the bits of ``|u|``: exact, no sort, and on a mesh no
    gather. Among equals the earlier element goes first. NaN ranks above all and is let through.
    Absent updates (None) stay absent, and what was held back of them waits.

    Args:
      k: an int, the number of elements; or a float in ``(0, 1]``, the fraction of them (rounded
        to the nearest, at least one). An int is capped by the size of the leaf. Static.
      error_feedback: whether to keep what is held back, in the dtype of the parameters.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: if ``k`` is neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority import top_k_updates
      >>> tx = top_k_updates(2)
      >>> updates, _ = tx.update(jnp.array([0.1, -3.0, 0.5, 2.0]), tx.init(jnp.zeros(4)))
      >>> updates.tolist()
      [0.0, -3.0, 0.0, 2.0]

    References:
      Aji and Heafield, *Sparse Communication for Distributed Gradient Descent*, 2017,
      arXiv 1704.05021; error feedback: Stich et al., 2018, arXiv 1809.07599.
    """
    check_k(k)

    def init_fn(params):
        return TopKUpdatesState(optax.tree.zeros_like(params) if error_feedback else ())

    def of_leaf(update, residual):
        """What is let through and what is held back."""
        if update is None:
            return None, residual
        if residual is not None:
            update = update + residual.astype(update.dtype)
        # Placed by the compiler on an explicit mesh too: counts of equals run over all axes.
        mask = laid_out(lambda u: _top_k_mask(u, k), spec_of)(update)
        zeros = jnp.zeros_like(update)
        held = None if residual is None else jnp.where(mask, zeros, update).astype(residual.dtype)
        return jnp.where(mask, update, zeros), held

    def update_fn(updates, state, params=None):
        del params
        if not error_feedback:
            return jax.tree.map(lambda update: of_leaf(update, None)[0], updates), state
        held, structure = jax.tree.flatten(state.residual)
        pairs = [*map(of_leaf, beside(updates, state.residual), held)]
        state = TopKUpdatesState(structure.unflatten([held for _, held in pairs]))
        kept = [kept for kept, _ in pairs if kept is not None]
        return jax.tree.unflatten(jax.tree.structure(updates), kept), state

    return optax.GradientTransformation(init_fn, update_fn)


def _top_k_mask(update: jax.Array, k: int | float) -> jax.Array:
    """``bool``, of the update's shape: where its k elements of the largest magnitude are."""
    k = resolve_k(k, update.size) if is_fraction(k) else min(int(k), update.size)
    if k == update.size:
        return jnp.ones(update.shape, bool)
    # Magnitudes as integers of the same order; a bit less than they have, as they have no sign.
    double = update.dtype in (jnp.float64, jnp.complex128)
    wide, integer = (jnp.float64, jnp.int64) if double else (jnp.float32, jnp.int32)
    highest = jnp.iinfo(integer).bits - 2
    bits = lax.bitcast_convert_type(jnp.abs(update).astype(wide), integer)

    def bisect(i: Any, threshold: jax.Array) -> jax.Array:
        higher = threshold | (integer(1) << (highest - i).astype(integer))
        return jnp.where(jnp.sum(bits >= higher, dtype=jnp.int32) >= k, higher, threshold)

    # The k-th largest.
    threshold = lax.fori_loop(jnp.int32(0), jnp.int32(highest + 1), bisect, integer(0))
    above, equal = bits > threshold, bits == threshold
    room = k - jnp.sum(above, dtype=jnp.int32)

    def first_equals() -> jax.Array:
        return equal & (jnp.cumsum(equal.reshape(-1)).reshape(equal.shape) <= room)

    # Ranking equals takes a cumulative sum; where all of them fit it is not run.
    return above | lax.cond(jnp.sum(equal, dtype=jnp.int32) > room, first_equals, lambda: equal)
