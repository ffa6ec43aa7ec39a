"""A budget where an update is dear: a share of the matrices a step, the rest is not computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from priorityprop_jax.core.fragile import laid_out, spec_of, zeros
from priorityprop_jax.core.layout import over_devices
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.priority.scores import (
    Look,
    Score,
    check_score,
    depth_factors,
    magnitude,
    measure,
    precision,
    score,
)  # fmt: skip

Share = float | jax.Array | Callable[[Any], Any]


class BudgetedState(NamedTuple):
    """State of `budgeted`. All vectors are over slots, see `matrix_slots`."""

    step: jax.Array  # int32[], steps taken.
    update_counts: jax.Array  # int32[slots], updates that each slot has had.
    priorities: jax.Array  # float[slots], the scores of this step.
    allocation: jax.Array  # int32[slots], 1 for those updated at this step.
    magnitudes: jax.Array  # float[slots], at the last update; 0 where the score asks for none.


def matrix_slots(tree: Any) -> Slots:
    """The slots of `budgeted`: a leaf of up to two axes is one, all of more are stacks of matrices.

    Matrix 3 of a stack is ``"name[3]"``; of several axes in front the last counts fastest.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority.budgeted import matrix_slots
      >>> matrix_slots({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4, 3))}).names
      ('a', 'b[0]', 'b[1]')
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(_stacked(jnp.shape(x)), x.dtype), tree)
    with_paths, _ = jax.tree_util.tree_flatten_with_path(shapes)
    stacks = {path_name(path) for path, x in with_paths if len(x.shape) == 3}
    return find_slots(shapes, stacked_axis=lambda name: 0 if name in stacks else None)


def _stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 3 else (math.prod(shape[:-2]), *shape[-2:])


def budgeted(
    fn: Callable[[jax.Array], jax.Array],
    budget: Share = 0.25,
    *,
    score: Score = "robin",
) -> optax.GradientTransformation:
    r"""Applies a dear function to a share of the matrices a step, and skips its work for the rest.

    Matrices of one shape and dtype, from all leaves, are a class. Of the ``n`` of a class,
    ``k = max(1, round(budget * n))`` are chosen at a step and go through ``fn`` in one batch; the
    update of the others is zero.

    .. math:: u_i = \sqrt{n / k}\; f(g_i) \text{ if chosen, else } 0

    Updates that ``fn`` brings to one length, as `orthogonalize` does, would with ``k / n`` of them
    go ``k / n`` of the way where they agree and ``sqrt(k / n)`` of it where they don't; the factor
    makes up for the second.

    The choice is by score, among equals by who has had the fewest updates, then in the order of
    the leaves. What is in front of this transformation, such as momentum, goes on for all.
    Gradients may be absent (None): they stay absent, and those of the class that are there share
    the budget. A NaN in a matrix that is not chosen goes nowhere.

    On a mesh that is set (`jax.set_mesh`) each device runs ``fn`` on whole matrices of its own,
    unless ``budget`` is traced.

    Args:
      fn: a function of one matrix that returns one of its shape; leaves of fewer axes go into it as
        they are. It must keep no state.
      budget: the share of each class, above 0 and at most 1. A number is static: the chosen are one
        batch of a size that is compiled. A schedule of steps, or what `optax.inject_hyperparams`
        makes of a number, is traced: a loop runs the chosen one by one, as many as there are. Out
        of its range a traced one is clamped, so that each class has at least one.
      score: ``"robin"``, in turn; ``"priorityprop"``, ``"change"``, ``"random"``; or a function of
        a `Look`. Magnitudes are means of ``|g|`` of what comes in.

    Returns:
      An `optax.GradientTransformation` with the state `BudgetedState`. Its slots are those of
      `matrix_slots`, for a `Ledger`.

    Raises:
      ValueError: if ``budget`` is no share, or there is no such score.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax.priority import budgeted, orthogonalize
      >>> tx = optax.chain(optax.trace(0.9), budgeted(orthogonalize, 1 / 2))
      >>> params = {"a": jnp.eye(2), "b": 2 * jnp.eye(2)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state)
      ...     print([bool(jnp.any(update)) for update in updates.values()])
      [True, False]
      [False, True]

    References:
      Drop-Muon, Gruntkowska et al., 2025, arXiv 2510.02239, updates a random subset of layers.
    """
    kind = score
    check_score(kind)
    if not callable(budget):
        _check_share(budget)

    def init_fn(params):
        slots = len(matrix_slots(params))
        whole = lambda: jnp.zeros(slots, jnp.int32)  # noqa: E731
        real = lambda: jnp.zeros(slots, precision(jax.tree.leaves(params)))  # noqa: E731
        return BudgetedState(jnp.zeros((), jnp.int32), whole(), real(), whole(), real())

    def update_fn(updates, state, params=None):
        tree = updates if params is None else params
        slots, treedef = matrix_slots(tree), jax.tree.structure(tree)
        if state.update_counts.shape != (len(slots),):
            raise ValueError(
                f"the state was made for {state.update_counts.shape[0]} matrices, not "
                f"{len(slots)}; gradients that are absent need params to be given to update"
            )
        flat = treedef.flatten_up_to(updates)
        grads = [None if x is None else jnp.reshape(x, _stacked(jnp.shape(x))) for x in flat]
        given = None
        if params is not None:
            given = [jnp.reshape(x, _stacked(jnp.shape(x))) for x in jax.tree.leaves(params)]
        look = Look(
            slots, state.step, state.update_counts, depth_factors(slots),
            np.ones(len(slots), np.float32), state.magnitudes,
            measure=lambda fn: measure(slots, fn, grads, given),
            weigh=lambda: measure(slots, lambda grads, *_: magnitude(grads), grads),
        )  # fmt: skip
        share = budget(state.step) if callable(budget) else budget
        _check_share(share)
        new, chosen, scores = _choose_and_apply(fn, share, kind, look, grads)
        last = state.magnitudes
        if "magnitudes" in vars(look):  # the score has asked for them
            last = jnp.where(chosen == 1, look.magnitudes.astype(last.dtype), last)
        new = [y if y is None else y.reshape(jnp.shape(x)) for x, y in zip(flat, new, strict=True)]
        step = jnp.asarray(optax.safe_increment(state.step))
        state = BudgetedState(step, state.update_counts + chosen, scores, chosen, last)
        return treedef.unflatten(new), state

    return optax.GradientTransformation(init_fn, on_any_mesh(update_fn))


def _check_share(share: Any) -> None:
    if isinstance(share, bool) or not (isinstance(share, jax.Array) or 0 < share <= 1):
        raise ValueError(f"budget must be a share above 0 and at most 1, got {share!r}")


def on_any_mesh(update_fn: Callable[..., Any]) -> Callable[..., Any]:
    """An update of matrices that may be laid out on a mesh of explicit axes."""

    def results(updates, state, params):
        del params
        return jax.tree.map(spec_of, updates), jax.tree.map(lambda x: jax.P(), state)

    anywhere = laid_out(update_fn, results)
    return lambda updates, state, params=None: anywhere(updates, state, params)


def _choose_and_apply(
    fn: Callable[[jax.Array], jax.Array],
    share: float | jax.Array,
    kind: Score,
    look: Look,
    grads: list[Any],
) -> tuple[list[Any], jax.Array, jax.Array]:
    """Updates, who has got one (``int32[slots]``), and the scores."""
    values = score(look, kind)
    classes: dict[Any, list[int]] = {}
    for bundle in look.slots.bundles:  # one a leaf
        (leaf,) = bundle.leaves
        if bundle.slots and (x := grads[leaf]) is not None:
            classes.setdefault((x.shape[-2:], x.dtype), []).append(leaf)
    new, chosen = list(grads), jnp.zeros(len(look.slots), jnp.int32)
    for members in classes.values():
        bundles = [look.slots.bundles[leaf] for leaf in members]
        stacks = [
            grads[leaf] if bundle.layers else grads[leaf][None]
            for leaf, bundle in zip(members, bundles, strict=True)
        ]
        places = np.concatenate([np.arange(b.start, b.start + b.slots) for b in bundles])
        n, stack = len(places), jnp.concatenate(stacks)  # [n, ...]
        keys = (-values[places], look.counts[places], jnp.arange(n))
        order = lax.sort(keys, num_keys=2, is_stable=True)[2]
        take = _take_some if n > 1 and isinstance(share, jax.Array) else _take_batch
        out, own = take(fn, 1.0 if n == 1 else share, order, stack)
        starts = np.cumsum([0] + [bundle.slots for bundle in bundles])
        for leaf, start, stop in zip(members, starts[:-1], starts[1:], strict=True):
            new[leaf] = out(start, stop)
        chosen = chosen.at[places].set(own.astype(jnp.int32))
    return new, chosen, values.astype(look.last.dtype)


def _take_batch(fn: Any, share: Any, order: jax.Array, stack: jax.Array) -> tuple[Any, jax.Array]:
    """The first of an order in one batch: a function that gives updates, and who is chosen."""
    n = len(order)
    k = min(n, max(1, math.floor(share * n + 0.5)))
    rank = jnp.arange(n)  # the place among the chosen, k for the others
    if k < n:
        rank, stack = jnp.full(n, k).at[order[:k]].set(jnp.arange(k)), stack[order[:k]]
    out = (over_devices(jax.vmap(fn), stack) * math.sqrt(n / k)).astype(stack.dtype)  # [k, ...]

    def updates(start, stop):
        if k == n:
            return out[start:stop]
        own = rank[start:stop]
        shown = (own < k).reshape(-1, *[1] * (out.ndim - 1))
        return jnp.where(shown, out[jnp.minimum(own, k - 1)], jnp.zeros((), out.dtype))

    return updates, rank < k


def _take_some(fn: Any, share: Any, order: jax.Array, stack: jax.Array) -> tuple[Any, jax.Array]:
    """The same of a traced share: the loop runs as often as there are chosen ones."""
    n = len(order)
    wanted = jnp.floor(share.astype(jnp.float32) * n + 0.5)
    k = jnp.where(wanted > 1, jnp.minimum(wanted, n), 1).astype(jnp.int32)
    scale = jnp.sqrt(n / k)

    def one(i, out):
        y = fn(stack[order[i]])
        return out.at[order[i]].set((y * scale.astype(y.dtype)).astype(out.dtype))

    out = lax.fori_loop(0, k, one, zeros(stack.shape, stack.dtype, stack))  # [n, ...]
    own = jnp.zeros(n, bool).at[order].set(jnp.arange(n) < k)
    return lambda start, stop: out[start:stop], own
