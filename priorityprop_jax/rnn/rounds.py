"""Rounds of a fixed-point iteration over all layers, or all steps, at once, under a guard."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from priorityprop_jax.core.precision import wide_type


class HighwayReport(NamedTuple):
    """How the rounds of a backward pass went: float32 scalars.

    Attributes:
      rounds: rounds whose result was kept; 0 where the gradient is exact by plain autodiff.
      correction: by how much the last round that ran changed the cotangents, relative to their
        norm.
      stopped: 1 if the guard ended the iteration, because corrections grew or were NaN, else 0.
    """

    rounds: jax.Array  # []
    correction: jax.Array  # []
    stopped: jax.Array  # []


def check_iterations(iterations: Any, tol: Any) -> None:
    """Raises unless these can be options of `highway_rnn`, or of `highway_scan`."""
    whole, number = (int, np.integer), (int, float, np.integer, np.floating)
    if iterations is not None and (
        isinstance(iterations, bool) or not isinstance(iterations, whole)
    ):
        raise TypeError(f"iterations must be a whole number or None, got {iterations!r}")
    if iterations is not None and iterations < 0:
        raise ValueError(f"iterations must be 0 or more, or None for all, got {iterations}")
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, number)):
        raise TypeError(f"tol must be a number or None, got {tol!r}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be 0 or more, got {tol}")
    if tol is not None and iterations is None:
        raise ValueError("tol ends rounds, and without iterations there are none: give both")


def iterate(
    step: Callable[[Any], Any], w: Any, rounds: int, tol: float | None, guard: bool = True
) -> tuple[Any, HighwayReport]:
    """Rounds of ``w = step(w)`` under a guard; `highway_scan` says when they stop."""
    size = _norm(w)
    # Under `jax.shard_map` it has to vary over the axes that the norms vary over.
    zero = jnp.where(jnp.isnan(size), 0, jnp.zeros_like(size))
    if tol is None and not guard:
        last = w
        for _ in range(rounds):
            last, w = w, step(w)
        correction = _ratio(_distance(w, last), _norm(w))
        return w, _report(zero + rounds, correction, zero)

    def body(state: Any) -> Any:
        w, allowed, report, _ = state
        new = step(w)
        moved, size = _distance(new, w), _norm(new)
        worse = (moved > allowed) & guard  # not so if it is NaN, which the gradient has to show
        w = jax.tree.map(lambda new, w: jnp.where(worse, w, new), new, w)
        stopped = worse | jnp.isnan(moved)
        done = stopped if tol is None else stopped | (moved <= tol * size)
        kept = report.rounds + jnp.where(worse, 0, 1)
        return w, moved, HighwayReport(kept, _ratio(moved, size), stopped.astype(kept.dtype)), done

    def going(state: Any) -> Any:
        return ~state[3] & (state[2].rounds < rounds)

    state = w, size, HighwayReport(zero, zero, zero), zero > 0
    w, _, report, _ = body(state) if rounds == 1 else lax.while_loop(going, body, state)
    return w, _report(*report)


def _report(*numbers: jax.Array) -> HighwayReport:
    return HighwayReport(*(x.astype(jnp.float32) for x in numbers))


def _norm(w: Any) -> jax.Array:
    """In the widest type of the leaves: in float32, the norm of small numbers of float64 is 0."""
    leaves = jax.tree.leaves(w)
    wide = wide_type(*leaves)
    squares = [jnp.sum(jnp.square(leaf.astype(wide))) for leaf in leaves]
    return jnp.sqrt(functools.reduce(operator.add, squares))


def _distance(a: Any, b: Any) -> jax.Array:
    return _norm(jax.tree.map(jnp.subtract, a, b))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
