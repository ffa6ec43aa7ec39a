"""An optimizer for the slots that are active, and for no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.slots import Bundle, Slots, find_slots
from priorityprop_jax.priority.per_slot import PerSlot
from priorityprop_jax.priority.scores import gain
from priorityprop_jax.priority.transform import PriorityPropState, new_state


def update_active(
    inner: optax.GradientTransformation,
    *,
    gain_decay: float = 0.9,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Updates each active slot once, and keeps account of what the update promises.

    The half of `priorityprop` that runs behind a partial backward pass: who is active was decided
    before the gradients were computed, by a policy, and is known at compile time. A slot that is
    not active keeps its parameters and its inner state bit for bit; inner step counts are per slot,
    so that bias correction is right for each. For every active slot the state carries an
    exponential moving average of its gain, the first-order decrease that the update promises,

    .. math:: v_i \leftarrow \beta v_i + (1 - \beta) |\langle g_i, u_i \rangle|.

    What must see all active gradients, such as `optax.clip_by_global_norm`, goes in front: absent
    gradients have no part in it. What runs on the clock of steps, such as a learning-rate schedule,
    goes behind: inside ``inner`` it runs on the slot's own count.

    Args:
      inner: any Optax optimizer.
      gain_decay: the decay of the average gain, in [0, 1). Static.
      stacked_axis: see `find_slots`; layers stacked on axis 0.
      group: see `find_slots`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `PriorityPropState`, whose
      ``magnitudes`` are the averages of the gain before bias correction. ``update`` needs
      ``params`` and takes the extra argument ``active``, a set of slot names (static); without it,
      the slots whose gradients are present are active. The extra argument ``uniform=True`` (static)
      promises that all slots are active at every step: then the update is the plain optimizer's,
      bit for bit, and no gains are taken. Updates are None where a leaf is inactive
      and ``[k, ...]`` where ``k`` layers of a stacked leaf are active, as the gradients are.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: if ``gain_decay`` is not in [0, 1); when called, if gradients of active slots are
        absent or those of inactive slots are there.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import partial_value_and_grad, update_active
      >>> params = {"Dense_0": jnp.ones((2, 2)), "Dense_1": jnp.ones(2)}
      >>> tx = update_active(optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> loss_fn = lambda p: jnp.sum(p["Dense_0"] @ p["Dense_1"])
      >>> _, grads = partial_value_and_grad(loss_fn, {"Dense_1"})(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["Dense_0"], state.update_counts.tolist()
      (None, [0, 1])
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}")
    if not 0 <= gain_decay < 1:
        raise ValueError(f"gain_decay must be in [0, 1), got {gain_decay}")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        slots = find_slots(params, stacked_axis=stacked_axis, group=group)
        return new_state(slots, PerSlot(inner, params, slots).init(params))

    def update_fn(updates, state, params=None, *, active=None, uniform=False, **extra_args):
        if params is None:
            raise ValueError("update_active needs the parameters: update(grads, state, params)")
        slots = find_slots(params, stacked_axis=stacked_axis, group=group)
        per_slot = PerSlot(inner, params, slots)
        grads, leaves = per_slot.flatten(updates), per_slot.flatten(params)
        rows = _active_rows(slots, grads, active)
        if uniform and len(slots):
            if any(
                len(own) < bundle.slots for own, bundle in zip(rows, slots.bundles, strict=True)
            ):
                raise ValueError(
                    "uniform=True promises that all slots are active, but some are not"
                )
            return _update_all(per_slot, slots, updates, state, params, extra_args)
        inner_state = per_slot.state_treedef.flatten_up_to(state.inner_state)
        for i in per_slot.shared:
            shape = per_slot.state_shapes[i].shape
            # A hyperparameter that a user has set to one value holds for every slot.
            if jnp.shape(inner_state[i]) == shape:
                inner_state[i] = jnp.broadcast_to(inner_state[i], (len(slots), *shape))
        new_updates: list[Any] = [None] * len(leaves)
        gains: list[jax.Array] = []
        updated: list[int] = []
        for bundle, active_rows in zip(slots.bundles, rows, strict=True):
            if not active_rows:
                continue
            new, gained = _update_rows(
                per_slot, bundle, active_rows, grads, leaves, inner_state, extra_args
            )
            for leaf, update in zip(bundle.leaves, new, strict=True):
                new_updates[leaf] = update
            gains.append(gained)
            updated.extend(bundle.start + row for row in active_rows)
        state = state._replace(
            step=optax.safe_increment(state.step),
            inner_state=per_slot.state_treedef.unflatten(inner_state),
        )
        if updated:
            state = _account(state, np.asarray(updated), jnp.concatenate(gains), gain_decay)
        return per_slot.treedef.unflatten(new_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _update_all(
    per_slot: PerSlot,
    slots: Slots,
    updates: Any,
    state: PriorityPropState,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, PriorityPropState]:
    """One inner update of all slots at once, where their counts are known to be equal."""
    flat = per_slot.state_treedef.flatten_up_to(state.inner_state)
    for i in per_slot.shared:
        flat[i] = flat[i][0] if flat[i].shape != per_slot.state_shapes[i].shape else flat[i]
    updates, inner_state = per_slot.inner.update(
        updates, per_slot.state_treedef.unflatten(flat), params, **extra_args
    )
    flat = jax.tree.leaves(inner_state)
    for i in per_slot.shared:
        flat[i] = jnp.broadcast_to(flat[i], (len(slots), *flat[i].shape))
    return updates, state._replace(
        step=optax.safe_increment(state.step),
        inner_state=per_slot.state_treedef.unflatten(flat),
        update_counts=state.update_counts + 1,
    )


def expected_gains(state: PriorityPropState, gain_decay: float = 0.9) -> np.ndarray:
    """The average gain of every slot, with bias correction. Waits for the device.

    Args:
      state: the state of `update_active`.
      gain_decay: as given to it.

    Returns:
      ``float64[slots]``; NaN where a slot has never been updated.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import update_active
      >>> from priorityprop_jax.partial.update import expected_gains
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> tx = update_active(optax.sgd(0.5))
      >>> state = tx.init(params)
      >>> _, state = tx.update({"a": jnp.ones(2), "b": None}, state, params)
      >>> expected_gains(state).round(6).tolist()
      [1.0, nan]
    """
    mean, counts = np.asarray(state.magnitudes, np.float64), np.asarray(state.score_counts)
    weight = 1 - gain_decay ** counts.astype(np.float64)
    return np.where(counts > 0, mean / np.where(counts > 0, weight, 1.0), np.nan)


def active_rows(bundle: Bundle, slots: Slots, active: Iterable[str]) -> tuple[int, ...]:
    """The active layers of a bundle, in ascending order; ``(0,)`` for one that is not stacked."""
    active = frozenset(active)
    return tuple(i for i in range(bundle.slots) if slots.names[bundle.start + i] in active)


def _active_rows(
    slots: Slots, grads: Sequence[Any], active: Iterable[str] | None
) -> list[tuple[int, ...]]:
    rows = []
    if active is not None:
        active = frozenset(active)
        unknown = active - set(slots.names)
        if unknown:
            raise ValueError(f"there is no slot {min(unknown)!r}")
    for bundle in slots.bundles:
        present = [grads[leaf] is not None for leaf in bundle.leaves]
        if any(present) and not all(present):
            raise ValueError(
                f"some leaves of slot {bundle.name!r} have gradients and some have none; "
                "a slot's gradients are present or absent together"
            )
        if active is None:
            own = tuple(range(bundle.slots)) if all(present) else ()
        else:
            own = active_rows(bundle, slots, active)
        if bool(own) != all(present):
            state = "active, but its gradient is absent" if own else "not active, but has gradients"
            raise ValueError(f"slot {bundle.name!r} is {state}")
        if own and bundle.layers is not None:
            for leaf, axis in zip(bundle.leaves, bundle.axes, strict=True):
                if axis != 0 and len(own) < bundle.layers:
                    raise ValueError(
                        f"{bundle.name!r} is stacked on axis {axis}; layers can be active one by "
                        "one where they are stacked on axis 0"
                    )
                found = jnp.shape(grads[leaf])[axis or 0]
                if found != len(own):
                    raise ValueError(
                        f"{len(own)} layers of {bundle.name!r} are active, but its gradient has "
                        f"{found}; give update the set of active slots that the gradients are of"
                    )
        rows.append(own)
    return rows


def _update_rows(
    per_slot: PerSlot,
    bundle: Bundle,
    rows: tuple[int, ...],
    grads: Sequence[Any],
    params: Sequence[Any],
    state: list[Any],
    extra_args: dict[str, Any],
) -> tuple[list[jax.Array], jax.Array]:
    """Updates active layers of a bundle. Puts their state into ``state``; returns the gains too."""
    owned, shared = per_slot.owned(bundle), per_slot.shared
    own_grads = [jnp.asarray(grads[i]) for i in bundle.leaves]
    own_params = [params[i] for i in bundle.leaves]
    for i in owned:
        if state[i] is None:
            raise ValueError(f"slot {bundle.name!r} is active, but its optimizer state is absent")
    if bundle.layers is None:
        mine = {i: state[i] for i in owned} | {i: state[i][bundle.start] for i in shared}
        updates, new = per_slot.update_slot(bundle, own_grads, own_params, mine, extra_args)
        for i in owned:
            state[i] = new[i]
        for i in shared:
            state[i] = state[i].at[bundle.start].set(new[i])
        return _cast(updates, own_grads), gain(own_grads, updates)[None]

    layers, k = bundle.layers, len(rows)
    at = np.asarray(rows)
    every = k == layers
    axes = list(bundle.axes)
    state_axes = {i: per_slot.state_axis[i] for i in owned}
    if not every:
        own_params = [x[at] for x in own_params]  # [k, ...]
    # A state without the inactive layers has k of them already.
    whole = {i: state[i].shape[state_axes[i]] == layers for i in owned}
    mine = {i: state[i][at] if whole[i] and not every else state[i] for i in owned}
    mine |= {i: state[i][bundle.start + at] for i in shared}
    in_axes = {i: state_axes.get(i, 0) for i in mine}

    def one(grads, params, mine):
        updates, new = per_slot.update_slot(bundle, grads, params, mine, extra_args)
        return _cast(updates, grads), new, gain(grads, updates)

    updates, new, gains = jax.vmap(
        one, in_axes=(axes, axes, in_axes), out_axes=(axes, in_axes, 0), axis_size=k
    )(own_grads, own_params, mine)
    for i in owned:
        state[i] = state[i].at[at].set(new[i]) if whole[i] and not every else new[i]
    for i in shared:
        state[i] = state[i].at[bundle.start + at].set(new[i])
    return updates, gains


def _cast(updates: Sequence[jax.Array], grads: Sequence[jax.Array]) -> list[jax.Array]:
    return [u.astype(g.dtype) for u, g in zip(updates, grads, strict=True)]


def _account(
    state: PriorityPropState, updated: np.ndarray, gains: jax.Array, decay: float
) -> PriorityPropState:
    finite = jnp.isfinite(gains)
    before = state.magnitudes[updated]
    mean = jnp.float32(decay) * before + jnp.float32(1 - decay) * jnp.where(finite, gains, 0.0)
    return state._replace(
        update_counts=state.update_counts.at[updated].add(1),
        magnitudes=state.magnitudes.at[updated].set(mean),
        score_counts=state.score_counts.at[updated].add(1),
        nonfinite_counts=state.nonfinite_counts.at[updated].add((~finite).astype(jnp.int32)),
    )
