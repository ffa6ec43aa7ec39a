"""Scores and a budget in, whole updates for every slot out: in a cycle, and at each of its steps.

The allocation is exact. Shares are compared as integers, never as rounded floats, so that a budget
is spent to the last update, equal priorities get equal shares, and a higher priority never gets
fewer. 64-bit integers are pairs of ``uint32`` here, as JAX has no ``int64`` unless asked for it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Weights keep 40 bits below the largest one's leading bit, so that sums over 2**22 slots fit 63.
_WEIGHT_BITS = 40
_MAX_SLOTS = 2**22

SPREADS = ("even", "nested")


class _U64(NamedTuple):
    """An unsigned 64-bit integer as two words."""

    hi: jax.Array  # uint32
    lo: jax.Array  # uint32


def _add(a: _U64, b: _U64) -> _U64:
    lo = a.lo + b.lo
    return _U64(a.hi + b.hi + (lo < b.lo).astype(jnp.uint32), lo)


def _subtract(a: _U64, b: _U64) -> _U64:
    return _U64(a.hi - b.hi - (a.lo < b.lo).astype(jnp.uint32), a.lo - b.lo)


def _at_least(a: _U64, b: _U64) -> jax.Array:
    return (a.hi > b.hi) | ((a.hi == b.hi) & (a.lo >= b.lo))


def _select(mask: jax.Array, a: _U64, b: _U64) -> _U64:
    return _U64(jnp.where(mask, a.hi, b.hi), jnp.where(mask, a.lo, b.lo))


def _multiply_divide(a: jax.Array, b: _U64, c: _U64) -> tuple[jax.Array, _U64]:
    """``floor(a * b / c)`` and ``(a * b) mod c``, for ``b <= c < 2**63`` and ``0 <= a < 2**31``.

    Schoolbook multiplication by the bits of ``a``, all ``[slots]`` and ``c`` perhaps a scalar,
    reduced modulo ``c`` after every step, so that nothing grows past ``2 * c``.
    """

    def reduce(quotient, remainder):
        over = _at_least(remainder, c)
        remainder = _select(over, _subtract(remainder, c), remainder)
        return quotient + over.astype(jnp.uint32), remainder

    def body(i, carry):
        quotient, remainder = carry
        quotient, remainder = reduce(quotient << 1, _add(remainder, remainder))
        bit = (a >> (30 - i).astype(a.dtype)) & 1
        return reduce(quotient, _select(bit == 1, _add(remainder, b), remainder))

    zero = jnp.zeros(a.shape, jnp.uint32)
    quotient, remainder = lax.fori_loop(0, 31, body, (zero, _U64(zero, zero)))
    return quotient.astype(jnp.int32), remainder


def _sums_from(x: _U64) -> _U64:
    """The sum of every number ``[slots]`` and all that follow it.

    A round adds what stands twice as far behind as the round before: a loop of few operations,
    where a scan of unrolled rounds is most of what `allocate` would take to compile.
    """
    slots = len(x.lo)

    def body(k, sums):
        behind = lambda x: lax.dynamic_slice(  # noqa: E731
            jnp.append(x, jnp.zeros_like(x)), (jnp.left_shift(1, k),), (slots,)
        )
        return _add(sums, _U64(*map(behind, sums)))

    return lax.fori_loop(0, (slots - 1).bit_length(), body, x)


def _weights(priorities: jax.Array) -> _U64:
    """The priorities as integers: the largest one leads with bit 39, what is below bit 0 goes."""
    bits = lax.bitcast_convert_type(priorities, jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32)
    mantissa = jnp.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0).astype(jnp.uint32)
    shift = jnp.minimum(jnp.max(exponent, initial=0) - exponent, _WEIGHT_BITS)
    hi, lo = mantissa >> 16, mantissa << 16  # mantissa * 2**16, in 40 bits
    near = jnp.minimum(shift, 31).astype(jnp.uint32)  # shifts of a whole word are undefined
    far = jnp.clip(shift - 32, 0, 31).astype(jnp.uint32)
    carried = jnp.where(near == 0, 0, hi << ((32 - near) & 31))
    shifted = _U64(hi >> near, (lo >> near) | carried)
    return _select(shift < 32, shifted, _U64(jnp.uint32(0), hi >> far))


def allocate(
    priorities: jax.typing.ArrayLike,
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike = 0,
    max_updates: jax.typing.ArrayLike = 2**31 - 1,
) -> jax.Array:
    r"""Hands out a budget of whole updates in proportion to priority.

    Every slot gets ``min_updates``; what is left of the budget, ``E``, is shared in proportion:

    .. math:: x_i = \min(\text{max} - \text{min},\ \lambda s_i), \qquad \sum_i x_i = E,

    and rounded by largest remainders: ``floor(x_i)``, then one more for each of the largest
    fractional parts until the budget is spent (equal parts: the higher priority first, then the
    earlier slot). When every slot with a priority is at ``max_updates``, the rest is split evenly
    among the slots without one; all-zero priorities therefore mean an even split.

    The arithmetic is exact (integer) for priorities that are resolved to ``2**-39`` of the
    largest one's leading bit; smaller priorities rank by size but weigh nothing.

    Args:
      priorities: ``[slots]``, floating point, read as float32; of float64 beside the largest
        where that is beyond it.
        NaN, infinite, negative and subnormal ones count as 0.
      budget: updates to hand out, a whole number below ``2**31``. Traceable: one compiled program
        serves every budget. Where it is infeasible it is clamped to
        ``[slots * min_updates, slots * max_updates]``.
      min_updates: the least updates of a slot. Traceable.
      max_updates: the most updates of a slot. Traceable.

    Returns:
      ``int32[slots]`` with ``min_updates <= n <= max_updates`` and ``sum(n) == budget``.

    Raises:
      ValueError: if ``priorities`` is not a vector, or is longer than ``2**22``.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import allocate
      >>> allocate(jnp.array([4.0, 2.0, 1.0, 0.0]), budget=18, min_updates=1, max_updates=20)
      Array([9, 5, 3, 1], dtype=int32)

    References:
      The quota is PriorityProp 0.1.0's; the rounding is Hamilton's method, see M. L. Balinski and
      H. P. Young, *Fair Representation*, 1982.
    """
    priorities = jnp.asarray(priorities)
    if priorities.dtype == jnp.float64:  # of which float32 may hold none
        priorities = jnp.where(jnp.isfinite(priorities), priorities, 0.0)
        _, exponent = jnp.frexp(jnp.max(priorities, initial=0.0))
        beyond = (exponent > 128) | (exponent < -60)
        priorities = jnp.ldexp(priorities, -jnp.where(beyond, exponent, 0))
    priorities = priorities.astype(jnp.float32)
    if priorities.ndim != 1:
        raise ValueError(f"priorities must be a vector [slots], got shape {priorities.shape}")
    if priorities.shape[0] > _MAX_SLOTS:
        raise ValueError(f"at most {_MAX_SLOTS} slots are supported, got {priorities.shape[0]}")
    if not priorities.shape[0]:
        return jnp.zeros((0,), jnp.int32)
    as_int = lambda x: jnp.asarray(x).astype(jnp.int32)  # noqa: E731
    return _allocate(priorities, as_int(budget), as_int(min_updates), as_int(max_updates))


@jax.jit
def _allocate(priorities, budget, min_updates, max_updates):
    slots = priorities.shape[0]
    min_updates = jnp.minimum(min_updates, (2**31 - 1) // slots)  # what an int32 can count
    index = jnp.arange(slots, dtype=jnp.int32)
    tiny = jnp.finfo(jnp.float32).tiny
    priorities = jnp.where(jnp.isfinite(priorities) & (priorities >= tiny), priorities, 0.0)

    # All that follows is in order of priority, highest first, the earlier slot first among equals.
    keys, order = lax.sort((-priorities, index), num_keys=1, is_stable=True)
    none, one = (_U64(jnp.uint32(0), jnp.uint32(x)) for x in (0, 1))
    weights = _weights(-keys)
    positive = jnp.sum((weights.hi | weights.lo) != 0, dtype=jnp.int32)

    left = jnp.maximum(budget - slots * min_updates, 0)
    cap = jnp.clip(max_updates - min_updates, 0, left)  # nobody gets more than all of it
    rounds = left // jnp.maximum(cap, 1)  # how many slots `left` can fill to the cap
    left = jnp.where((rounds >= slots) | (cap == 0), slots * cap, left)

    # Slots that weigh nothing share evenly, and only what the others cannot take.
    overflow = positive <= rounds
    weights = _select(overflow & (index >= positive), one, weights)

    # Slot k is full if it would be with all slots before it full. The full slots come first, as
    # filling one raises the share of all the rest.
    sums = _sums_from(weights)
    sums = _select((sums.hi | sums.lo) == 0, one, sums)
    rest = jnp.where(index <= rounds, left - jnp.minimum(index, rounds) * cap, 0)
    share, _ = _multiply_divide(rest, weights, sums)
    full = jnp.argmin(jnp.append((share >= cap) & (rest >= cap), False)).astype(jnp.int32)
    full = jnp.where(overflow, jnp.maximum(full, positive), full)

    rest = left - full * cap
    total = _U64(*(jnp.append(word, jnp.uint32(1))[full] for word in sums))
    open_ = index >= full
    inside = _select(open_, weights, none)
    share, remainder = _multiply_divide(jnp.where(open_, rest, 0), inside, total)
    granted = jnp.where(open_, share, cap)

    # The top-k of the remainders, with k traced: sort them all, keep the first k places.
    leftover = left - jnp.sum(granted, dtype=jnp.int32)
    *_, ranked = lax.sort((~remainder.hi, ~remainder.lo, index), num_keys=2, is_stable=True)
    granted = granted.at[ranked].add((index < leftover).astype(jnp.int32))
    return jnp.zeros_like(order).at[order].set(min_updates + granted)


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
      >>> from priorityprop_jax.priority import repeats
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
    even = (t + 1) * rest // steps - t * rest // steps
    return allocation // steps + (even if spread == "even" else (t < rest).astype(jnp.int32))


def check_spread(spread: str) -> None:
    """Raises a ValueError if ``spread`` is none of `SPREADS`."""
    if spread not in SPREADS:
        raise ValueError(f"spread must be one of {SPREADS}, got {spread!r}")
