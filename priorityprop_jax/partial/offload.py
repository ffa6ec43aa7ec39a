"""Optimizer state for the active slots only: the others' is dropped, or waits in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.layout import spread
from priorityprop_jax.core.slots import Bundle, find_slots
from priorityprop_jax.partial.grad import Names, active_rows, check_axis, choose
from priorityprop_jax.partial.update import ActiveUpdatesState, new_state
from priorityprop_jax.priority.per_slot import PerSlot

STATES = ("keep", "reset", "offload")

Row = dict[int, Any]  # the state of one slot: number of the state's leaf -> array


class ActiveState:
    """Keeps the inner state of the active slots on the device, and no other.

    With ``"reset"`` a slot that becomes active starts from a fresh state, its count included, as
    BAdam does. With ``"offload"`` its state waits in host memory and comes back bit for bit.
    Between two steps, `move` goes from one active set to the next; its state has None in place of
    what is absent, and the ``k`` active layers ``[k, ...]`` of a stacked leaf, as `update_active`
    takes it.

    Args:
      inner: the optimizer that `update_active` was made with.
      params: pytree of parameters, or of `jax.ShapeDtypeStruct`; only shapes are read.
      mode: ``"reset"`` or ``"offload"``.
      stacked_axis: see `find_slots`.
      group: see `find_slots`.

    Attributes:
      resident: the slots whose state is on the device.
      waiting: by slot the state that waits in host memory.

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
        self.waiting: dict[str, Row] = {}
        self._laid_out = False  # whether what is resident lies where the parameters do

    def empty(self) -> ActiveUpdatesState:
        """The state before the first step, with no slot's own state on the device."""
        flat: list[Any] = [None] * len(self.per_slot.state_shapes)
        if self.per_slot.shared and self.slots.bundles:
            params = [jnp.zeros(shape) for shape in self.slots.shapes[0]]
            first = self.per_slot.init_slot(self.slots.bundles[0], params)
            for i in self.per_slot.shared:
                flat[i] = self.per_slot.for_every_slot(first[i])
        return new_state(self.slots, self.per_slot.state_treedef.unflatten(flat))

    def move(self, state: ActiveUpdatesState, active: Names, params: Any) -> ActiveUpdatesState:
        """The state with that of the active slots, and no other, resident. Waits for the device.

        Args:
          state: with the state of the slots in ``resident``.
          active: the slots that are to be resident, see `value_and_grad`.
          params: the parameters as they are now, from which fresh states are made.

        Raises:
          ValueError: if there is no slot of a name.
        """
        active = choose(self.slots.names, active)
        if active == self.resident and self._laid_out:
            return state
        leaves, flat = self.per_slot.flatten(params), self._flat(state)
        for bundle in self.slots.bundles:
            before = active_rows(bundle, self.slots, self.resident)
            after = active_rows(bundle, self.slots, active)
            if before == after:
                continue
            rows = self._rows(flat, bundle, before)
            for layer in set(before) - set(after) if self.mode == "offload" else ():
                self.waiting[self._name(bundle, layer)] = _copied(rows[layer])
            for layer in set(after) - set(before):
                rows[layer] = self._enter(flat, bundle, layer, leaves)
            self._put(flat, bundle, after, rows, jnp.stack)
        for bundle in self.slots.bundles:
            for i in self.per_slot.owned(bundle):
                param = leaves[self.per_slot.owners[i]]
                flat[i] = _place(flat[i], param, bundle.layers is not None)
        self.resident, self._laid_out = active, True
        return self._with(state, flat)

    def _enter(self, flat: list[Any], bundle: Bundle, layer: int, params: list[Any]) -> Row:
        """The state of a slot that becomes active; what it shares is put into ``flat``."""
        owned, stacked = self.per_slot.owned(bundle), bundle.layers is not None
        waiting = self.waiting.pop(self._name(bundle, layer), None)
        if waiting is not None:
            return {i: jnp.array(waiting[i], copy=True) for i in owned}
        own = [params[i][layer] if stacked else params[i] for i in bundle.leaves]
        fresh = self.per_slot.init_slot(bundle, own)
        for i in self.per_slot.shared:
            flat[i] = flat[i].at[bundle.start + layer].set(fresh[i])
        # The step donates its state, and an optimizer may keep the parameters themselves.
        return {i: jnp.array(fresh[i], copy=True) for i in owned}

    def complete(self, state: ActiveUpdatesState) -> ActiveUpdatesState:
        """The state of all slots, for a checkpoint: what is absent from the device in host memory.

        Zeros stand for slots that start afresh when they become active.
        """
        flat = self._flat(state)
        for bundle in self.slots.bundles:
            present = active_rows(bundle, self.slots, self.resident)
            if len(present) == bundle.slots:
                continue
            shapes = {i: self.per_slot.state_shapes[i] for i in self.per_slot.owned(bundle)}
            zeros = {i: np.zeros(one.shape, one.dtype) for i, one in shapes.items()}
            every = range(bundle.slots)
            away = {n: self.waiting.get(self._name(bundle, n), zeros) for n in every}
            rows = away | self._rows(flat, bundle, present)
            self._put(flat, bundle, every, rows, np.stack)
        return self._with(state, flat)

    def restore(
        self, complete: ActiveUpdatesState, resident: Iterable[str], waiting: Iterable[str]
    ) -> ActiveUpdatesState:
        """The inverse of `complete`: the state with that of the resident slots.

        Args:
          complete: the state of all slots.
          resident: the slots whose state was on the device.
          waiting: the slots whose state was waiting.
        """
        self.resident, waiting = frozenset(resident), frozenset(waiting)
        self.waiting, self._laid_out = {}, False
        flat = self._flat(complete)
        for bundle in self.slots.bundles:
            rows = self._rows(flat, bundle, range(bundle.slots))
            for layer, own in rows.items():
                if (name := self._name(bundle, layer)) in waiting:
                    self.waiting[name] = _copied(own)
            present = active_rows(bundle, self.slots, self.resident)
            self._put(flat, bundle, present, rows, jnp.stack)
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jnp.array(x, copy=True),
            self._with(complete, flat),
        )

    def _name(self, bundle: Bundle, layer: int) -> str:
        return self.slots.names[bundle.start + layer]

    def _flat(self, state: ActiveUpdatesState) -> list[Any]:
        return self.per_slot.state_treedef.flatten_up_to(state.inner_state)

    def _with(self, state: ActiveUpdatesState, flat: list[Any]) -> ActiveUpdatesState:
        return state._replace(inner_state=self.per_slot.state_treedef.unflatten(flat))

    def _rows(self, flat: list[Any], bundle: Bundle, layers: Sequence[int]) -> dict[int, Row]:
        """What a flat state that has just these layers has of each."""
        owned, stacked = self.per_slot.owned(bundle), bundle.layers is not None
        return {
            layer: {i: flat[i][place] if stacked else flat[i] for i in owned}
            for place, layer in enumerate(layers)
        }

    def _put(self, flat: Any, bundle: Bundle, layers: Any, rows: Any, stack: Any) -> None:
        """Puts the layers into a flat state: None for no layers, ``[k, ...]`` for some."""
        for i in self.per_slot.owned(bundle):
            own = [rows[layer][i] for layer in layers]
            flat[i] = None if not own else own[0] if bundle.layers is None else stack(own)


def _copied(row: Row) -> dict[int, np.ndarray]:
    """In host memory. On a CPU an array would otherwise share the device's buffer."""
    return {i: np.array(x, copy=True) for i, x in row.items()}


def _place(x: Any, param: Any, stacked: bool) -> Any:
    """On several devices, laid out as the parameter is if it has its shape, but for the layers."""
    if x is None or not spread(param) or x.shape[stacked:] != param.shape[stacked:]:
        return x
    layout = param.sharding
    if stacked:  # of which some are here
        if not isinstance(layout, jax.sharding.NamedSharding):
            return x
        spec = jax.sharding.PartitionSpec(None, *layout.spec[1:])
        layout = jax.sharding.NamedSharding(layout.mesh, spec)
    return jax.device_put(x, layout)
