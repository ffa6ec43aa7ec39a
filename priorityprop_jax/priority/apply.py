"""Runs an optimizer on every slot as often as it is told."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from priorityprop_jax.core.slots import Bundle
from priorityprop_jax.priority.one_slot import OneSlot
from priorityprop_jax.priority.per_slot import PerSlot, layer_of, like
from priorityprop_jax.priority.scores import precision


@dataclasses.dataclass
class Work:
    """One step of an optimizer slot by slot; nothing is computed before a method is called."""

    per_slot: PerSlot
    grads: list[Any]  # flat, None where absent
    state: list[jax.Array]  # the leaves of the inner state for all slots
    params: Sequence[Any] | None  # flat
    extra_args: dict[str, Any]  # handed on to the inner optimizer

    def __post_init__(self) -> None:
        self._one = OneSlot(self.per_slot, self.grads, self.state, self.params, self.extra_args)

    def leave_out_frozen(self) -> np.ndarray:
        """Takes out the gradients of slots whose updates are zeros, as by a label.

        Returns which slots these are: ``bool[slots]``.
        """
        frozen = np.zeros(len(self.per_slot.slots), bool)
        for bundle in self.per_slot.slots.bundles:
            if self._one.is_frozen(bundle):
                frozen[bundle.start : bundle.start + bundle.slots] = True
                for leaf in bundle.leaves:
                    self.grads[leaf] = None
        return frozen

    def _update_one(self, bundle, slot, grads, params, own, shared):
        """One inner update of one slot. ``own`` is its state, ``shared`` the vectors over slots.

        Both are dicts by the number of the state's leaf.
        """
        mine = dict(own)
        for i, vector in shared.items():
            mine[i] = lax.dynamic_index_in_dim(vector, slot, keepdims=False)
        layer = jnp.maximum(slot - bundle.start, 0)
        updates, new = self._one.run(bundle, layer, grads, params, mine)
        shared = {
            i: lax.dynamic_update_index_in_dim(vector, new[i], slot, 0)
            for i, vector in shared.items()
        }
        return updates, {i: new[i] for i in own}, shared

    def measure(self, fn: Callable[..., Any]) -> jax.Array:
        """See `Look.measure`; the inner updates are then forgotten."""
        wide = precision(jax.tree.leaves(self.grads))
        values = [jnp.zeros(0, wide)]
        shared = {i: self.state[i] for i in self.per_slot.shared}
        for bundle in self.per_slot.slots.bundles:

            def of_layer(layer, bundle=bundle):
                grads, params, own = self._of_layer(bundle, layer, self.grads, self.state)
                slot = bundle.start + jnp.asarray(layer, jnp.int32)
                updates, *_ = self._update_one(bundle, slot, grads, params, own, shared)
                return jnp.asarray(fn(grads, params, updates), wide).reshape(())

            if self.grads[bundle.leaves[0]] is None:
                values.append(jnp.zeros(bundle.slots, wide))
            elif bundle.layers is None:
                values.append(of_layer(0)[None])
            else:
                values.append(lax.map(of_layer, jnp.arange(bundle.layers, dtype=jnp.int32)))
        return jnp.concatenate(values)

    def _of_layer(self, bundle: Bundle, layer: Any, grads: Any, state: Any) -> tuple[Any, Any, Any]:
        """Gradients, parameters and own state of one slot."""
        leaf = lambda x, i: layer_of(x[i], self.per_slot.stack_axis.get(i), layer)  # noqa: E731
        axes = {i: self.per_slot.state_axis.get(i) for i in self.per_slot.owned(bundle)}
        return (
            [leaf(grads, i) for i in bundle.leaves],
            None if self.params is None else [leaf(self.params, i) for i in bundle.leaves],
            {i: layer_of(state[i], axis, layer) for i, axis in axes.items()},
        )

    def apply_plain(self, counts: jax.Array) -> tuple[list[Any], optax.OptState]:
        """One inner update of all slots at once, where their shared state is known to be equal."""
        per_slot, state = self.per_slot, list(self.state)
        first = jnp.minimum(counts[0], 0)
        for i in self.per_slot.shared:
            # Index 0, but only once `counts` is known: the scoring that it waits for must have
            # read the gradients before updates may take their place.
            state[i] = lax.dynamic_index_in_dim(state[i], first, keepdims=False)
        state = per_slot.state_treedef.unflatten(state)
        params = None if self.params is None else per_slot.treedef.unflatten(self.params)
        grads = per_slot.treedef.unflatten(self.grads)
        new, inner = per_slot.inner.update(grads, state, params, **self.extra_args)
        flat = jax.tree.leaves(inner)
        for i in self.per_slot.shared:
            flat[i] = jnp.broadcast_to(flat[i], (len(per_slot.slots), *flat[i].shape))
        return per_slot.flatten(new), per_slot.state_treedef.unflatten(map(like, flat, self.state))

    def apply(self, counts: jax.Array, *, at_most_one: bool) -> tuple[list[Any], optax.OptState]:
        """Runs the inner optimizer ``counts[slot]`` times on every slot.

        Where no slot can have two, those whose update works number by number are updated by
        choice. The others run one after another, each in a loop that is not entered where its count
        is 0. There the update takes the gradient's place, so that no second buffer of its size is
        needed, and the number of the slot travels along as a value, so that the kernels of slots of
        one shape are the same and XLA compiles them once.
        """
        per_slot = self.per_slot
        updates, state = dict(enumerate(self.grads)), dict(enumerate(self.state))
        shared = {i: state[i] for i in per_slot.shared}
        chosen = self._choose(counts, updates, state, shared) if at_most_one else ()
        if len(per_slot.slots):
            slot = jnp.minimum(counts[0], 0)  # 0, but XLA does not know
        for bundle in per_slot.slots.bundles:
            if bundle in chosen or self.grads[bundle.leaves[0]] is None:
                slot = slot + bundle.slots
                continue
            own = {i: state[i] for i in per_slot.owned(bundle)}
            carry = (slot, shared, own, {i: jnp.asarray(self.grads[i]) for i in bundle.leaves})
            run = functools.partial(self._run, bundle, counts, at_most_one)
            if bundle.layers is None:
                slot, shared, own, new = run(0, carry)
            else:
                slot, shared, own, new = lax.fori_loop(0, bundle.layers, run, carry)
            state |= own
            updates |= new
        inner_state = per_slot.state_treedef.unflatten((state | shared).values())
        return list(updates.values()), inner_state

    def _choose(self, counts, updates, state, shared) -> Collection[Bundle]:
        """Updates those slots whose inner update works number by number, all at once.

        Changes the dicts, and returns whose slots are done.
        """
        numbers, slots = self._one.numbers(shared), self.per_slot.slots
        if numbers is None:
            return ()
        there = [b for b in slots.bundles if b.layers is None and updates[b.leaves[0]] is not None]
        parts = {bundle: self._one.choosable(bundle, numbers) for bundle in there}
        chosen = {bundle: part for bundle, part in parts.items() if part is not None}
        if not chosen:
            return ()
        # Computed once; one number a slot, so that slots of one shape are the same to a compiler.
        read = {x for part in chosen.values() for x in part.needed}
        given = {x: vector for x, vector in numbers.items() if x in read}
        once = lax.optimization_barrier((counts > 0, given))
        single = lambda vector: {b.start: vector[b.start] for b in chosen}  # noqa: E731
        active, given = lax.optimization_barrier(jax.tree.map(single, once))
        for bundle, part in chosen.items():
            on, own = active[bundle.start], {x: one[bundle.start] for x, one in given.items()}
            grads, params, mine = self._of_layer(bundle, 0, updates, state)
            new, mine = self._one.choose(bundle, part, on, own, grads, params, mine)
            updates |= zip(bundle.leaves, map(like, new, grads), strict=True)
            state |= mine
        done = np.isin(range(len(slots)), [*active])
        for i, old in shared.items():
            after = self._one.shared_after(i, numbers).astype(old.dtype)
            shared[i] = jnp.where((counts > 0) & done, after, old)
        return chosen

    def _run(self, bundle, counts, at_most_one, layer, carry):
        """Runs one slot. ``carry`` holds its number, the state, and gradients to be replaced."""

        def put(stacks, axes, layers):
            update = functools.partial(lax.dynamic_update_index_in_dim, index=layer)
            return {
                i: update(stacks[i], x, axis=axes[i]) if i in axes else x for i, x in layers.items()
            }

        axes, own_axes = self.per_slot.stack_axis, self.per_slot.state_axis

        def active(carry):
            slot, shared, own, x = carry
            grads, params, mine = self._of_layer(bundle, layer, x, own)
            update = self._update_one if at_most_one else functools.partial(self._repeat, counts)
            new, mine, shared = update(bundle, slot, grads, params, mine, shared)
            new = dict(zip(bundle.leaves, map(like, new, grads), strict=True))
            slot = jnp.maximum(slot, -1)  # the same slot, but XLA does not know
            return slot, shared, put(own, own_axes, mine), put(x, axes, new)

        def inactive(carry):
            slot, shared, own, x = carry
            zeros = {i: jnp.zeros_like(layer_of(a, axes.get(i), layer)) for i, a in x.items()}
            return slot, shared, own, put(x, axes, zeros)

        # Loops of at most one round rather than branches: XLA updates a loop's carry in place.
        def when(predicate, body, carry):
            go = lambda c: (jnp.bool_(False), *body(c[1:]))  # noqa: E731
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
            add = lambda t, u: jnp.where(done == 0, u, t + u).astype(t.dtype)  # noqa: E731
            return done + 1, slot, own, shared, [*map(add, total, new)]

        more = lambda c: c[0] < lax.dynamic_index_in_dim(counts, c[1], keepdims=False)  # noqa: E731
        start = (jnp.int32(0), slot, own, shared, [*map(jnp.zeros_like, grads)])
        *_, own, shared, total = lax.while_loop(more, body, start)
        return total, own, shared
