"""An optimizer for the slots that are active, and for no other."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.rows import (
    Frozen,
    Held,
    RowSparse,
    beside,
    check_transformation,
    is_row_sparse,
    take,
)
from priorityprop_jax.core.slots import Bundle, Slots, find_slots
from priorityprop_jax.partial.grad import Names, active_rows, check_axis, choose
from priorityprop_jax.priority.one_slot import OneSlot
from priorityprop_jax.priority.per_slot import PerSlot
from priorityprop_jax.priority.scores import gain


class ActiveUpdatesState(NamedTuple):
    """State of `update_active`. All vectors are over slots."""

    step: jax.Array  # int32[], steps taken.
    inner_state: optax.OptState  # as the inner optimizer's, its counts one a slot.
    update_counts: jax.Array  # int32[slots], updates that each slot has had.
    gains: jax.Array  # float32[slots], average before bias correction.
    nonfinite_counts: jax.Array  # int32[slots], NaN or infinite gains seen.
    # What a policy that plans cycles found and decided; zeros where there is none.
    priorities: jax.Array  # float32[slots], of this cycle.
    allocation: jax.Array  # int32[slots], updates planned for this cycle.


# The slots of the step that an optimizer is in, and what was found in it.
_STEP: contextvars.ContextVar[tuple[dict[str, Any], list[Any]] | None] = contextvars.ContextVar(
    "step", default=None
)


@contextlib.contextmanager
def slots_by(**where: Any) -> Iterator[list[tuple[Any, float, dict[str, Any]]]]:
    """Within, an `update_active` that was not told its slots has those of the step that it is in.

    Yields a list to which each `update_active` that is initialised adds what it was made with: the
    inner optimizer, ``gain_decay``, and its ``stacked_axis`` and ``group``.
    """
    token = _STEP.set((where, found := []))
    try:
        yield found
    finally:
        _STEP.reset(token)


def update_active(
    inner: optax.GradientTransformation,
    *,
    gain_decay: float = 0.9,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Updates each active slot once, and keeps account of what the update promises.

    The half of `priorityprop` that runs behind a partial backward pass: who is active is known at
    compile time. A slot that is not keeps its parameters and its inner state bit for bit; inner
    step counts are per slot, so that bias correction is right for each. For every active slot the
    state carries an average of its gain, the first-order decrease that the update promises,

    .. math:: v_i \leftarrow \beta v_i + (1 - \beta) |\langle g_i, u_i \rangle|.

    What must see all active gradients, such as `optax.clip_by_global_norm`, goes in front. What
    runs on the clock of steps, such as a learning-rate schedule, goes behind: inside ``inner`` it
    runs on the slot's own count. What reads parameters, such as weight decay, goes inside.

    Args:
      inner: any Optax optimizer.
      gain_decay: the decay of the average gain, in [0, 1). Static.
      stacked_axis: see `find_slots`; layers stacked on axis 0.
      group: see `find_slots`. Within a `partial.step` that of the step, where neither is given.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `ActiveUpdatesState`. ``update``
      needs ``params``. The slots whose gradients are present are active, and the layers that a
      `RowSparse` gradient has, as `value_and_grad` returns them; a leaf may be None or left out.
      The extra argument ``active`` (see `value_and_grad`) leaves out all others. ``uniform=True``
      (static) promises that all slots are active at every step: then the update is the plain
      optimizer's, bit for bit, and no gains are taken. Updates have the structure of ``params``:
      `Frozen` where a leaf is inactive, and `RowSparse` where some layers of a stacked leaf are
      active. Both add themselves, so that `optax.apply_updates` takes them.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: if ``gain_decay`` is not in [0, 1); when called, if gradients of active slots are
        absent or do not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import partial
      >>> params = {"Dense_0": jnp.ones((2, 2)), "Dense_1": jnp.ones(2)}
      >>> tx = partial.update_active(optax.sgd(0.25))
      >>> state = tx.init(params)
      >>> loss_fn = lambda p: jnp.sum(p["Dense_0"] @ p["Dense_1"])
      >>> _, grads = partial.value_and_grad(loss_fn, "Dense_1")(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["Dense_0"], state.update_counts.tolist()
      (Frozen(), [0, 1])
      >>> optax.apply_updates(params, updates)["Dense_1"].tolist()
      [0.5, 0.5]
    """
    check_transformation(inner)
    if not 0 <= gain_decay < 1:
        raise ValueError(f"gain_decay must be in [0, 1), got {gain_decay}")
    inner = optax.with_extra_args_support(inner)

    def where():
        step = _STEP.get()
        own = {"stacked_axis": stacked_axis, "group": group}
        return own if step is None or any(own.values()) else step[0]

    def init_fn(params):
        step = _STEP.get()
        if step is not None:
            step[1].append((inner, gain_decay, where()))
        slots = find_slots(params, **where())
        return new_state(slots, PerSlot(inner, params, slots).init(params))

    def update_fn(updates, state, params=None, *, active=None, uniform=False, **extra_args):
        if params is None:
            raise ValueError("update_active needs the parameters: update(grads, state, params)")
        slots = find_slots(params, **where())
        per_slot = PerSlot(inner, params, slots)
        leaves = per_slot.flatten(params)
        grads = beside(updates, params)
        rows = _active_rows(slots, grads, active)
        if uniform and len(slots):
            if sum(map(len, rows)) < len(slots):
                raise ValueError("uniform=True promises that all slots are active; some are not")
            return _update_all(per_slot, grads, state, params, extra_args)
        inner_state = per_slot.state_treedef.flatten_up_to(state.inner_state)
        per_slot.fill_in(inner_state)
        one = OneSlot(per_slot, grads, inner_state, leaves, extra_args)
        new_updates: list[Any] = [Frozen()] * len(leaves)
        gains, updated = [], []
        for bundle, own in zip(slots.bundles, rows, strict=True):
            if not own:
                continue
            new, gained = _update_rows(per_slot, one, bundle, own, grads, leaves, inner_state)
            for leaf, update in zip(bundle.leaves, new, strict=True):
                part = len(own) < bundle.slots
                shape = np.shape(leaves[leaf])
                new_updates[leaf] = RowSparse(own, update, shape) if part else update
            gains.append(gained)
            at = own.array if isinstance(own, Held) else np.asarray(own)
            updated.append(bundle.start + at)
        state = state._replace(
            step=optax.safe_increment(state.step),
            inner_state=per_slot.state_treedef.unflatten(inner_state),
        )
        if updated:
            static = all(isinstance(at, np.ndarray) for at in updated)
            places = (np if static else jnp).concatenate(updated)
            gained = jnp.concatenate([x.astype(jnp.float32) for x in gains])
            state = _account(state, places, gained, gain_decay)
        return per_slot.treedef.unflatten(new_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def new_state(slots: Slots, inner_state: optax.OptState) -> ActiveUpdatesState:
    """The state before the first step, around one of the inner optimizer."""
    # Arrays of their own: a step that is compiled in place donates each of them.
    dtypes = (jnp.int32, jnp.float32, jnp.int32, jnp.float32, jnp.int32)
    vectors = (jnp.zeros(len(slots), dtype) for dtype in dtypes)
    return ActiveUpdatesState(jnp.zeros((), jnp.int32), inner_state, *vectors)


def _update_all(
    per_slot: PerSlot, grads: list[Any], state: ActiveUpdatesState, params: Any, extra: Any
) -> tuple[Any, ActiveUpdatesState]:
    """One inner update of all slots at once, where their counts are known to be equal."""
    treedef = per_slot.state_treedef
    flat = treedef.flatten_up_to(state.inner_state)
    per_slot.fill_in(flat)
    for i in per_slot.shared:
        flat[i] = flat[i][0]
    updates, inner_state = per_slot.inner.update(
        per_slot.treedef.unflatten(grads), treedef.unflatten(flat), params, **extra
    )
    # What stands for nothing, as in adafactor's state of small parameters, is there for each layer.
    each = zip(jax.tree.leaves(inner_state), treedef.flatten_up_to(state.inner_state), strict=True)
    flat = [jnp.broadcast_to(x, old.shape) if x.shape == (1,) == old.shape[1:] else x
            for x, old in each]  # fmt: skip
    for i in per_slot.shared:
        flat[i] = per_slot.for_every_slot(flat[i])
    return updates, state._replace(
        step=optax.safe_increment(state.step),
        inner_state=treedef.unflatten(flat),
        update_counts=state.update_counts + 1,
    )


def expected_gains(state: ActiveUpdatesState, gain_decay: float = 0.9) -> np.ndarray:
    """The average gain of every slot, with bias correction: ``float64[slots]``.

    NaN where a slot has never been updated. Waits for the device.
    """
    mean, counts = np.asarray(state.gains, np.float64), np.asarray(state.update_counts)
    weight = 1 - gain_decay ** counts.astype(np.float64)
    return np.where(counts > 0, mean / np.where(counts > 0, weight, 1.0), np.nan)


def _active_rows(slots: Slots, grads: list[Any], active: Names | None) -> list[Any]:
    """The active layers of every bundle. Of the gradients, only theirs are left in ``grads``."""
    wanted = None if active is None else choose(slots.names, active)
    found = []
    for bundle in slots.bundles:
        present = {_rows_of(grads[leaf], bundle) for leaf in bundle.leaves}
        if len(present) > 1:
            raise ValueError(
                f"some leaves of slot {bundle.name!r} have gradients and some have none; "
                "a slot's gradients are present or absent together"
            )
        there, places = present.pop(), None
        own = there if wanted is None else active_rows(bundle, slots, wanted)
        if isinstance(there, Held):
            if wanted is not None and 0 < len(own) < bundle.slots:
                raise ValueError(
                    f"the layers of {bundle.name!r} whose gradients are present are traced: leave "
                    "active out, or name all of them"
                )
            own = there if own else ()
        elif absent := set(own) - set(there):
            name = slots.names[bundle.start + min(absent)]
            raise ValueError(f"slot {name!r} is active, but its gradient is absent")
        elif own != there:
            places = tuple(map(there.index, own))
        if own and len(own) < bundle.slots:
            check_axis(bundle)
        for leaf in bundle.leaves if own else ():
            grad = grads[leaf]
            grads[leaf] = grad.values if is_row_sparse(grad) else jnp.asarray(grad)
            if places is not None:
                grads[leaf] = take(grads[leaf], places)
        found.append(own)
    return found


def _rows_of(grad: Any, bundle: Bundle) -> Any:
    """The layers of a bundle that a gradient of one of its leaves has."""
    if not is_row_sparse(grad):
        return () if grad is None else tuple(range(bundle.slots))
    if bundle.layers is None:
        raise ValueError(
            f"the gradient of {bundle.name!r} has rows {grad.rows} only, but the leaf is one slot; "
            "give update_active the stacked_axis that the gradients were taken with"
        )
    return grad.rows


def _update_rows(
    per_slot: PerSlot,
    one_slot: OneSlot,
    bundle: Bundle,
    rows: Any,
    grads: Any,
    params: Any,
    state: Any,
) -> tuple[list[jax.Array], jax.Array]:
    """Updates active layers of a bundle. Puts their state into ``state``; returns the gains too."""
    owned, shared = per_slot.owned(bundle), per_slot.shared
    own_grads = [grads[i] for i in bundle.leaves]
    own_params = [params[i] for i in bundle.leaves]
    for i in owned:
        if state[i] is None:
            raise ValueError(f"slot {bundle.name!r} is active, but its optimizer state is absent")

    def one(layer, grads, params, mine):
        updates, new = one_slot.run(bundle, layer, grads, params, mine)
        updates = [u.astype(g.dtype) for u, g in zip(updates, grads, strict=True)]
        return updates, new, gain(grads, updates)

    if bundle.layers is None:
        cut, at = [], 0
        mine = {i: state[i] for i in owned} | {i: state[i][bundle.start] for i in shared}
        updates, new, gains = one(0, own_grads, own_params, mine)
    else:
        k, axes = len(rows), list(bundle.axes)
        at = rows.array if isinstance(rows, Held) else np.asarray(rows)
        some = k < bundle.layers
        if some:
            own_params = [take(x, rows) for x in own_params]  # [k, ...]
        # A state without the inactive layers has k of them already.
        cut = [i for i in owned if some and state[i].shape[per_slot.state_axis[i]] > k]
        mine = {i: take(state[i], rows) if i in cut else state[i] for i in owned}
        mine |= {i: state[i][bundle.start + at] for i in shared}
        in_axes = {i: per_slot.state_axis.get(i, 0) for i in mine}
        updates, new, gains = jax.vmap(
            one, in_axes=(0, axes, axes, in_axes), out_axes=(axes, in_axes, 0), axis_size=k
        )(jnp.asarray(at, jnp.int32), own_grads, own_params, mine)
    for i in owned:
        state[i] = state[i].at[at].set(new[i]) if i in cut else new[i]
    for i in shared:
        state[i] = state[i].at[bundle.start + at].set(new[i])
    return updates, jnp.reshape(gains, -1)


def _account(
    state: ActiveUpdatesState, updated: Any, gains: jax.Array, decay: float
) -> ActiveUpdatesState:
    finite = jnp.isfinite(gains)
    before = state.gains[updated]
    mean = jnp.float32(decay) * before + jnp.float32(1 - decay) * jnp.where(finite, gains, 0.0)
    return state._replace(
        update_counts=state.update_counts.at[updated].add(1),
        gains=state.gains.at[updated].set(mean),
        nonfinite_counts=state.nonfinite_counts.at[updated].add((~finite).astype(jnp.int32)),
    )
