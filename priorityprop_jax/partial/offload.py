"""Optimizer state for the active slots only: the others' is dropped, or waits in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.slots import Bundle, find_slots
from priorityprop_jax.partial.grad import active_rows, check_axis, choose
from priorityprop_jax.partial.update import ActiveUpdatesState, new_state
from priorityprop_jax.priority.per_slot import PerSlot

STATES = ("keep", "reset", "offload")


class ActiveState:
    """Keeps the inner state of the active slots on the device, and no other.

    With ``"reset"`` a slot that becomes active starts from a fresh state, its count for bias
    correction included, as BAdam does. With ``"offload"`` its state waits in host memory and comes
    back bit for bit. Between two steps, `move` goes from one active set to the next; the state
    that it returns has None in place of what is absent, and the ``k`` active layers ``[k, ...]`` of
    a stacked leaf, which is what `update_active` expects.

    Args:
      inner: the optimizer that `update_active` was made with.
      params: pytree of parameters, or of `jax.ShapeDtypeStruct`; only shapes are read.
      mode: ``"reset"`` or ``"offload"``.
      stacked_axis: see `find_slots`.
      group: see `find_slots`.

    Attributes:
      resident: the slots whose state is on the device.

    Raises:
      ValueError: if ``mode`` is neither, or layers are stacked on another axis than 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import partial
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> states = partial.ActiveState(optax.adam(0.1), params, mode="offload")
      >>> state = states.move(states.empty(), {"b"}, params)
      >>> state.inner_state[0].mu
      {'a': None, 'b': Array([0., 0.], dtype=float32)}

    References:
      BAdam (Luo, Yu, Li, 2024), https://arxiv.org/abs/2404.02827
    """

    def __init__(
        self,
        inner: optax.GradientTransformation,
        params: Any,
        *,
        mode: str,
        stacked_axis: Callable[[str], int | None] | None = None,
        group: Callable[[str], str | None] | None = None,
    ) -> None:
        if mode not in STATES[1:]:
            raise ValueError(f"mode must be one of {STATES[1:]}, got {mode!r}")
        self.mode = mode
        self.resident: frozenset[str] = frozenset()
        self.slots = find_slots(params, stacked_axis=stacked_axis, group=group)
        for bundle in self.slots.bundles:
            check_axis(bundle)
        self.per_slot = PerSlot(optax.with_extra_args_support(inner), params, self.slots)
        self._waiting: dict[str, dict[int, np.ndarray]] = {}  # slot -> state leaf -> array

    def empty(self) -> ActiveUpdatesState:
        """The state before the first step, with no slot's own state on the device."""
        shapes, per_slot = self.per_slot.state_shapes, self.per_slot
        flat: list[Any] = [None] * len(shapes)
        if per_slot.shared and self.slots.bundles:
            bundle = self.slots.bundles[0]
            first = per_slot.init_slot(
                bundle,
                [jnp.zeros(shape) for shape in self.slots.shapes[bundle.start]],
            )
            for i in per_slot.shared:
                flat[i] = jnp.broadcast_to(first[i], (len(self.slots), *first[i].shape))
        return new_state(self.slots, per_slot.state_treedef.unflatten(flat))

    def move(
        self, state: ActiveUpdatesState, active: Iterable[str], params: Any
    ) -> ActiveUpdatesState:
        """Makes the active slots' state, and no other, resident. Waits for the device.

        Args:
          state: with the state of the slots in ``resident``.
          active: names of the slots that are to be resident.
          params: the parameters as they are now, from which fresh states are made.

        Returns:
          The state with that of the active slots.

        Raises:
          ValueError: if there is no slot of a name.
        """
        active = choose(self.slots.names, active)
        if active == self.resident:
            return state
        leaves = self.per_slot.flatten(params)
        flat = self.per_slot.state_treedef.flatten_up_to(state.inner_state)
        for bundle in self.slots.bundles:
            before = active_rows(bundle, self.slots, self.resident)
            after = active_rows(bundle, self.slots, active)
            if before != after:
                self._move_bundle(bundle, before, after, flat, leaves)
        self.resident = active
        return state._replace(inner_state=self.per_slot.state_treedef.unflatten(flat))

    def _move_bundle(
        self,
        bundle: Bundle,
        before: tuple[int, ...],
        after: tuple[int, ...],
        flat: list[Any],
        params: list[Any],
    ) -> None:
        owned, stacked = self.per_slot.owned(bundle), bundle.layers is not None
        rows: dict[int, dict[int, Any]] = {}  # layer -> state leaf -> array
        for place, layer in enumerate(before):
            own = {i: flat[i][place] if stacked else flat[i] for i in owned}
            if layer in after:
                rows[layer] = own
            elif self.mode == "offload":
                # A copy: on a CPU the array would otherwise share the device's buffer.
                name = self.slots.names[bundle.start + layer]
                self._waiting[name] = {i: np.array(x, copy=True) for i, x in own.items()}
        for layer in after:
            if layer in rows:
                continue
            slot = bundle.start + layer
            waiting = self._waiting.pop(self.slots.names[slot], None)
            if waiting is not None:
                rows[layer] = {
                    i: _place(waiting[i], None if stacked else params[self.per_slot.owners[i]])
                    for i in owned
                }
                continue
            fresh = self.per_slot.init_slot(
                bundle, [params[i][layer] if stacked else params[i] for i in bundle.leaves]
            )
            # The step donates its state, and an optimizer may keep the parameters themselves.
            rows[layer] = {i: jnp.array(fresh[i], copy=True) for i in owned}
            for i in self.per_slot.shared:
                flat[i] = flat[i].at[slot].set(fresh[i])
        for i in owned:
            if not after:
                flat[i] = None
            elif stacked:
                flat[i] = jnp.stack([rows[layer][i] for layer in after])  # [k, ...]
            else:
                flat[i] = rows[0][i]

    def complete(self, state: ActiveUpdatesState) -> ActiveUpdatesState:
        """The state of all slots, for a checkpoint: what is absent from the device in host memory.

        Zeros stand for slots that start afresh when they become active.
        """
        flat = self.per_slot.state_treedef.flatten_up_to(state.inner_state)
        for bundle in self.slots.bundles:
            rows = active_rows(bundle, self.slots, self.resident)
            if len(rows) == bundle.slots:
                continue
            for i in self.per_slot.owned(bundle):
                one = self.per_slot.state_shapes[i]
                whole = np.zeros((bundle.slots, *one.shape), one.dtype)
                for layer in range(bundle.slots):
                    name = self.slots.names[bundle.start + layer]
                    if layer in rows:
                        whole[layer] = np.asarray(flat[i][rows.index(layer)])
                    elif name in self._waiting:
                        whole[layer] = self._waiting[name][i]
                flat[i] = whole if bundle.layers is not None else whole[0]
        return state._replace(inner_state=self.per_slot.state_treedef.unflatten(flat))

    def restore(
        self, complete: ActiveUpdatesState, resident: Iterable[str], waiting: Iterable[str]
    ) -> ActiveUpdatesState:
        """The inverse of `complete`.

        Args:
          complete: the state of all slots.
          resident: the slots whose state was on the device.
          waiting: the slots whose state was waiting, see `waiting`.

        Returns:
          The state with that of the resident slots.
        """
        self.resident, waiting = frozenset(resident), frozenset(waiting)
        self._waiting = {}
        flat = self.per_slot.state_treedef.flatten_up_to(complete.inner_state)
        for bundle in self.slots.bundles:
            rows = active_rows(bundle, self.slots, self.resident)
            owned = self.per_slot.owned(bundle)
            for layer in range(bundle.slots):
                name = self.slots.names[bundle.start + layer]
                if name in waiting:
                    self._waiting[name] = {
                        i: np.array(flat[i] if bundle.layers is None else flat[i][layer], copy=True)
                        for i in owned
                    }
            for i in owned:
                if not rows:
                    flat[i] = None
                elif bundle.layers is not None:
                    flat[i] = jnp.asarray(flat[i])[np.asarray(rows)]
        state = complete._replace(inner_state=self.per_slot.state_treedef.unflatten(flat))
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jnp.array(x, copy=True), state
        )

    @property
    def waiting(self) -> frozenset[str]:
        """The slots whose state waits in host memory."""
        return frozenset(self._waiting)


def _place(x: np.ndarray, like: Any) -> jax.Array:
    """On the device, laid out as the parameter is if it has its shape."""
    if isinstance(like, jax.Array) and like.shape == x.shape:
        return jax.device_put(x, like.sharding)
    return jnp.array(x, copy=True)
