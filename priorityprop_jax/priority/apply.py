"""Runs an optimizer on every slot as often as it is told."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from priorityprop_jax.core.slots import Bundle
from priorityprop_jax.priority.per_slot import PerSlot, layer_of, like
from priorityprop_jax.priority.scores import gain


@dataclasses.dataclass
class Work:
    """One step of an optimizer slot by slot; nothing is computed before a method is called.

    Args:
      per_slot: the optimizer.
      grads: flat gradients, None where absent.
      state: the leaves of the inner state for all slots.
      params: flat parameters, or None.
      extra_args: handed on to the inner optimizer.
    """

    per_slot: PerSlot
    grads: list[Any]
    state: list[jax.Array]
    params: Sequence[Any] | None
    extra_args: dict[str, Any]

    def _update_one(
        self,
        bundle: Bundle,
        slot: jax.Array,
        grads: Sequence[jax.Array],
        params: Sequence[jax.Array] | None,
        own: Sequence[jax.Array],
        shared: Sequence[jax.Array],
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """One inner update of one slot. ``own`` is its state, ``shared`` the vectors over slots."""
        owned, common = self.per_slot.owned(bundle), self.per_slot.shared
        mine = dict(zip(owned, own, strict=True))
        for i, vector in zip(common, shared, strict=True):
            mine[i] = lax.dynamic_index_in_dim(vector, slot, keepdims=False)
        updates, new = self.per_slot.update_slot(bundle, grads, params, mine, self.extra_args)
        return (
            updates,
            [new[i] for i in owned],
            [
                lax.dynamic_update_index_in_dim(vector, new[i], slot, 0)
                for i, vector in zip(common, shared, strict=True)
            ],
        )

    def gains(self) -> jax.Array:
        """``float32[slots]``: ``|<g, u>|`` of one inner update that is then forgotten."""
        values = []
        shared = [self.state[i] for i in self.per_slot.shared]
        for bundle in self.per_slot.slots.bundles:
            if self.grads[bundle.leaves[0]] is None:
                values.append(jnp.zeros((bundle.slots,), jnp.float32))
                continue

            def gain_of(layer, bundle=bundle):
                grads, params, own = self._of_layer(bundle, layer, self.grads, self.state)
                slot = bundle.start + jnp.asarray(layer, jnp.int32)
                updates, *_ = self._update_one(bundle, slot, grads, params, own, shared)
                return gain(grads, updates)

            if bundle.layers is None:
                values.append(gain_of(0)[None])
            else:
                values.append(lax.map(gain_of, jnp.arange(bundle.layers, dtype=jnp.int32)))
        return jnp.concatenate(values) if values else jnp.zeros((0,), jnp.float32)

    def _of_layer(self, bundle: Bundle, layer: Any, grads: Any, state: Any) -> tuple[Any, Any, Any]:
        per_slot = self.per_slot
        axis = per_slot.stack_axis.get
        return (
            [layer_of(grads[i], axis(i), layer) for i in bundle.leaves],
            None
            if self.params is None
            else [layer_of(self.params[i], axis(i), layer) for i in bundle.leaves],
            [layer_of(state[i], per_slot.state_axis.get(i), layer) for i in per_slot.owned(bundle)],
        )

    def apply_plain(self, updates: Any, counts: jax.Array) -> tuple[Any, optax.OptState]:
        """One inner update of all slots at once, where their shared state is known to be equal."""
        per_slot, state = self.per_slot, list(self.state)
        first = jnp.minimum(counts[0], 0)
        for i in self.per_slot.shared:
            # Index 0, but only once `counts` is known: the scoring that it waits for must have
            # read the gradients before updates may take their place.
            state[i] = lax.dynamic_index_in_dim(state[i], first, keepdims=False)
        new, inner = per_slot.inner.update(
            updates,
            per_slot.state_treedef.unflatten(state),
            None if self.params is None else per_slot.treedef.unflatten(self.params),
            **self.extra_args,
        )
        flat = jax.tree.leaves(inner)
        for i in self.per_slot.shared:
            flat[i] = jnp.broadcast_to(flat[i], (len(per_slot.slots), *flat[i].shape))
        return new, per_slot.state_treedef.unflatten(
            [like(x, old) for x, old in zip(flat, self.state, strict=True)]
        )

    def apply(self, counts: jax.Array, *, at_most_one: bool) -> tuple[Any, optax.OptState]:
        """Runs the inner optimizer ``counts[slot]`` times on every slot.

        Slots run one after another, each in a loop that is not entered where its count is 0. The
        update takes the gradient's place, so that no second buffer of its size is needed. The
        number of the slot travels along as a value: the kernels of slots of the same shape are
        then the same, and XLA compiles them once, in 8 s of the processor's time instead of 14
        (55 leaves, Adam).

        Args:
          counts: ``int32[slots]``.
          at_most_one: whether all counts are known to be 0 or 1: without the loop over repeats
            the same program compiles in 7 s instead of 9.

        Returns:
          The updates, None where gradients are absent, and the inner state.
        """
        per_slot = self.per_slot
        updates, state = list(self.grads), list(self.state)
        common = self.per_slot.shared
        shared = [state[i] for i in common]
        if len(per_slot.slots):
            slot = jnp.minimum(counts[0], 0)  # 0, but XLA does not know
        for bundle in per_slot.slots.bundles:
            if self.grads[bundle.leaves[0]] is None:
                slot = slot + bundle.slots
                continue
            owned = per_slot.owned(bundle)
            carry = (
                slot,
                shared,
                [state[i] for i in owned],
                [jnp.asarray(self.grads[i]) for i in bundle.leaves],
            )
            run = functools.partial(self._run, bundle, counts, at_most_one)
            if bundle.layers is None:
                slot, shared, own, new = run(0, carry)
            else:
                slot, shared, own, new = lax.fori_loop(0, bundle.layers, run, carry)
            for i, value in zip(owned, own, strict=True):
                state[i] = value
            for i, value in zip(bundle.leaves, new, strict=True):
                updates[i] = value
        for i, vector in zip(common, shared, strict=True):
            state[i] = vector
        return per_slot.treedef.unflatten(updates), per_slot.state_treedef.unflatten(state)

    def _run(
        self, bundle: Bundle, counts: jax.Array, at_most_one: bool, layer: Any, carry: Any
    ) -> Any:
        """Runs one slot. ``carry`` holds its number, the state, and gradients to be replaced."""
        per_slot = self.per_slot
        owned = per_slot.owned(bundle)
        axes = [per_slot.stack_axis.get(i) for i in bundle.leaves]
        own_axes = [per_slot.state_axis.get(i) for i in owned]

        def active(carry):
            slot, shared, own, x = carry
            grads, params, mine = self._of_layer(
                bundle,
                layer,
                dict(zip(bundle.leaves, x, strict=True)),
                dict(zip(owned, own, strict=True)),
            )
            update = self._update_one if at_most_one else functools.partial(self._repeat, counts)
            new, mine, shared = update(bundle, slot, grads, params, mine, shared)
            new = [like(u, g) for u, g in zip(new, grads, strict=True)]
            return (
                jnp.maximum(slot, -1),  # the same slot, but XLA does not know
                shared,
                [_put(a, b, axis, layer) for a, b, axis in zip(own, mine, own_axes, strict=True)],
                [_put(a, b, axis, layer) for a, b, axis in zip(x, new, axes, strict=True)],
            )

        def inactive(carry):
            slot, shared, own, x = carry
            zeros = [
                jnp.zeros_like(layer_of(a, axis, layer)) for a, axis in zip(x, axes, strict=True)
            ]
            x = [_put(a, b, axis, layer) for a, b, axis in zip(x, zeros, axes, strict=True)]
            return slot, shared, own, x

        # Loops of at most one round rather than branches: XLA updates a loop's carry in place.
        def when(predicate, body, carry):
            def go(carry):
                return (jnp.bool_(False), *body(carry[1:]))

            count = lax.dynamic_index_in_dim(counts, carry[0], keepdims=False)
            return lax.while_loop(lambda c: c[0], go, (predicate(count), *carry))[1:]

        slot, *rest = when(lambda n: n == 0, inactive, when(lambda n: n > 0, active, carry))
        return (slot + 1, *rest)

    def _repeat(self, counts, bundle, slot, grads, params, own, shared):
        """As many inner updates of one slot as its count says, at least one, on one gradient."""

        def body(carry):
            done, slot, own, shared, total = carry
            # Keeps XLA from hoisting products with the gradient out of the loop, one buffer each.
            fresh, _ = lax.optimization_barrier((grads, done))
            moved: Any = None if params is None else optax.apply_updates(params, total)
            new, own, shared = self._update_one(bundle, slot, fresh, moved, own, shared)
            total = [
                jnp.where(done == 0, u, t + u).astype(t.dtype)
                for t, u in zip(total, new, strict=True)
            ]
            return done + 1, slot, own, shared, total

        *_, own, shared, total = lax.while_loop(
            lambda c: c[0] < lax.dynamic_index_in_dim(counts, c[1], keepdims=False),
            body,
            (jnp.int32(0), slot, own, shared, [jnp.zeros_like(g) for g in grads]),
        )
        return total, own, shared


def _put(stack: jax.Array, x: jax.Array, axis: int | None, layer: Any) -> jax.Array:
    return x if axis is None else lax.dynamic_update_index_in_dim(stack, x, layer, axis)
