"""Updates per cycle in, updates at each step of it out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SPREADS = ("even", "nested")


def repeats(
    allocation: jax.typing.ArrayLike,
    cycle_step: jax.typing.ArrayLike,
    recalc_every: jax.typing.ArrayLike,
    spread: str = "even",
) -> jax.Array:
    r"""The updates that each slot gets at one step of a cycle.

    With ``n`` the allocation and ``R`` the steps in a cycle, at step ``t``:

    .. math::
        \text{even:}\quad   r(t) &= \lfloor (t+1) n / R \rfloor - \lfloor t n / R \rfloor \\
        \text{nested:}\quad r(t) &= \lfloor n / R \rfloor + [t < n \bmod R]

    Both add up to ``n`` over a cycle. ``"even"`` spaces a slot's updates; ``"nested"`` packs them
    to the front, so that the active sets of a cycle shrink from step to step and are few.

    Args:
      allocation: ``int32[slots]``, updates granted for the cycle.
      cycle_step: the step ``t`` in the cycle, from 0. Traceable.
      recalc_every: the steps ``R`` in a cycle, at most 46,340. Traceable.
      spread: ``"even"`` or ``"nested"``. Static.

    Returns:
      ``int32[slots]``, updates at this step.

    Raises:
      ValueError: if ``spread`` is neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import repeats
      >>> n = jnp.array([5, 2, 1])
      >>> [repeats(n, t, 4).tolist() for t in range(4)]
      [[1, 0, 0], [1, 1, 0], [1, 0, 0], [2, 1, 1]]
      >>> [repeats(n, t, 4, spread="nested").tolist() for t in range(4)]
      [[2, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    """
    check_spread(spread)
    allocation = jnp.asarray(allocation, jnp.int32)
    t = jnp.asarray(cycle_step, jnp.int32)
    steps = jnp.asarray(recalc_every, jnp.int32)
    # Whole rounds apart, so that no product grows past R * R.
    rest = allocation % steps
    if spread == "even":
        extra = (t + 1) * rest // steps - t * rest // steps
    else:
        extra = (t < rest).astype(jnp.int32)
    return allocation // steps + extra


def check_spread(spread: str) -> None:
    """Raises a ValueError if ``spread`` is none of `SPREADS`."""
    if spread not in SPREADS:
        raise ValueError(f"spread must be one of {SPREADS}, got {spread!r}")
