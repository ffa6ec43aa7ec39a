"""Runs an Optax optimizer slot by slot, each as often as it is told, on one shared state.

The state has the inner optimizer's own structure. What belongs to a parameter (Adam's moments) is
stored as the optimizer stores it; what belongs to none (Adam's count) becomes a vector over slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from priorityprop_jax.core.slots import Bundle, Slots
from priorityprop_jax.priority.scores import gain

_SHARED = -1
_SMALL = 2**14  # elements


class PerSlot:
    """The inner optimizer over the slots of one parameter tree.

    Args:
      inner: the optimizer, taking extra arguments.
      tree: parameters, or updates of their structure; only shapes are read.
      slots: its slots.

    Raises:
      TypeError: if the state of ``inner`` cannot be told apart by parameter.
    """

    def __init__(
        self, inner: optax.GradientTransformationExtraArgs, tree: Any, slots: Slots
    ) -> None:
        self.inner = inner
        self.slots = slots
        self.treedef = jax.tree.structure(tree)
        self.stack_axis: dict[int, int] = {
            leaf: axis
            for bundle in slots.bundles
            for leaf, axis in zip(bundle.leaves, bundle.axes, strict=True)
            if axis is not None
        }
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), _dtype(x)) for x in jax.tree.leaves(tree)]
        one_layer = [_without_axis(x, self.stack_axis.get(i)) for i, x in enumerate(shapes)]
        state = jax.eval_shape(inner.init, self.treedef.unflatten(one_layer))
        self.state_shapes, self.state_treedef = jax.tree.flatten(state)
        self.owners = self._owners(state, len(shapes))
        # The layers of a state leaf lie along its parameter's axis if it has its parameter's shape.
        self.state_axis = {
            i: self.stack_axis[owner] if x.shape == one_layer[owner].shape else 0
            for i, (x, owner) in enumerate(zip(self.state_shapes, self.owners, strict=True))
            if owner in self.stack_axis
        }

    def _owners(self, state: Any, leaves: int) -> list[int]:
        """For every leaf of the inner state, the parameter that it belongs to, or _SHARED."""
        try:
            owners = optax.tree.map_params(
                self.inner,
                lambda x, owner: x if isinstance(x, optax.MaskedNode) else owner,
                state,
                self.treedef.unflatten(range(leaves)),
                transform_non_params=lambda _: _SHARED,
                is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(
                "cannot tell which part of the inner optimizer's state belongs to which parameter: "
                f"optax.tree.map_params does not work on it ({error})"
            ) from error
        flat = jax.tree.leaves(owners)
        if len(flat) != len(self.state_shapes):
            raise TypeError(
                "cannot tell which part of the inner optimizer's state belongs to which parameter"
            )
        return flat

    def flatten(self, tree: Any) -> list[Any]:
        """The leaves of a tree of the parameters' structure; None where a leaf is absent."""
        return self.treedef.flatten_up_to(tree)

    def init(self, params: Any) -> optax.OptState:
        """The inner state for all slots."""
        leaves = jax.tree.leaves(params)
        first = [_layer(x, self.stack_axis.get(i), 0) for i, x in enumerate(leaves)]
        state, treedef = jax.tree.flatten(self.inner.init(self.treedef.unflatten(first)))
        for bundle in self.slots.bundles:
            if bundle.layers is None:
                continue
            own = self.owned(bundle)

            def init_layer(*layer, bundle=bundle, own=own):
                replaced = list(first)
                for leaf, value in zip(bundle.leaves, layer, strict=True):
                    replaced[leaf] = value
                flat = jax.tree.leaves(self.inner.init(self.treedef.unflatten(replaced)))
                return tuple(flat[i] for i in own)

            stacked = jax.vmap(
                init_layer,
                in_axes=bundle.axes,
                out_axes=tuple(self.state_axis[i] for i in own),
                axis_size=bundle.layers,
            )(*(_concrete(leaves[i]) for i in bundle.leaves))
            for i, value in zip(own, stacked, strict=True):
                state[i] = value
        for i, owner in enumerate(self.owners):
            if owner == _SHARED:
                value = jnp.asarray(state[i])
                state[i] = jnp.broadcast_to(value, (len(self.slots), *value.shape))
        return treedef.unflatten(state)

    def owned(self, bundle: Bundle) -> list[int]:
        """The leaves of the inner state that belong to the bundle's parameters."""
        return [i for i, owner in enumerate(self.owners) if owner in bundle.leaves]

    def begin(
        self,
        grads: Sequence[Any],
        state: optax.OptState,
        params: Sequence[Any] | None,
        extra_args: dict[str, Any],
    ) -> _Work:
        """Lays out one step's work; nothing is computed before `_Work.apply`.

        Args:
          grads: flat gradients, None where absent.
          state: the inner state for all slots.
          params: flat parameters, or None.
          extra_args: handed on to the inner optimizer.
        """
        flat, treedef = jax.tree.flatten(state)
        if treedef != self.state_treedef:
            raise ValueError(
                "the inner state does not fit these parameters: expected the structure "
                f"{self.state_treedef}, got {treedef}"
            )
        for i, (x, owner) in enumerate(zip(self.state_shapes, self.owners, strict=True)):
            # A hyperparameter that a user has set to one value holds for every slot.
            if owner == _SHARED and flat[i].shape == x.shape:
                flat[i] = jnp.broadcast_to(flat[i], (len(self.slots), *x.shape))
        return _Work(self, list(grads), flat, params, extra_args)

    def update_slot(
        self,
        bundle: Bundle,
        grads: Sequence[jax.Array],
        params: Sequence[jax.Array] | None,
        mine: dict[int, jax.Array],
        extra_args: dict[str, Any],
    ) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        """One inner update of one slot, all others hidden.

        Args:
          bundle: the slot's bundle.
          grads: gradients of the slot's leaves.
          params: its parameters, or None.
          mine: its part of the inner state, by the number of the state's leaf.
          extra_args: handed on to the inner optimizer.

        Returns:
          The updates of the slot's leaves, and its new part of the state.
        """

        def tree(leaves):
            return _masked_tree(self.treedef, dict(zip(bundle.leaves, leaves, strict=True)))

        updates, state = self.inner.update(
            tree(grads),
            _masked_tree(self.state_treedef, mine),
            None if params is None else tree(params),
            **extra_args,
        )
        updates, state = jax.tree.leaves(updates), jax.tree.leaves(state)
        if len(updates) != len(bundle.leaves) or len(state) != len(mine):
            raise TypeError(
                "the inner optimizer changed the structure of its updates or of its state "
                f"when it updated slot {bundle.name!r} alone"
            )
        new = dict(zip(sorted(mine), state, strict=True))
        return updates, {i: _like(new[i], mine[i]) for i in new}

    def init_slot(self, bundle: Bundle, params: Sequence[Any]) -> dict[int, jax.Array]:
        """A fresh state of one slot, by the number of the state's leaf; the shared part included.

        Args:
          bundle: the slot's bundle.
          params: the parameters of the slot's leaves, of one layer where they are stacked.
        """
        tree = _masked_tree(self.treedef, dict(zip(bundle.leaves, params, strict=True)))
        mine = sorted({*self.owned(bundle), *self.shared})
        state = jax.tree.leaves(self.inner.init(tree))
        if len(state) != len(mine):
            raise TypeError(
                "the inner optimizer has another state for one slot alone than for all of them"
            )
        return {i: jnp.asarray(x) for i, x in zip(mine, state, strict=True)}

    @property
    def shared(self) -> list[int]:
        """The leaves of the inner state that belong to no parameter, one value a slot."""
        return [i for i, owner in enumerate(self.owners) if owner == _SHARED]


@dataclasses.dataclass
class _Work:
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
            [_layer(grads[i], axis(i), layer) for i in bundle.leaves],
            None
            if self.params is None
            else [_layer(self.params[i], axis(i), layer) for i in bundle.leaves],
            [_layer(state[i], per_slot.state_axis.get(i), layer) for i in per_slot.owned(bundle)],
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
            [_like(x, old) for x, old in zip(flat, self.state, strict=True)]
        )

    def apply(self, counts: jax.Array, *, at_most_one: bool) -> tuple[Any, optax.OptState]:
        """Runs the inner optimizer ``counts[slot]`` times on every slot.

        Slots run one after another, each in a loop that is not entered where its count is 0. The
        update takes the gradient's place, so that no second buffer of its size is needed. The
        number of the slot travels along as a value: the kernels of slots of the same shape are
        then the same, and XLA compiles them once. Small slots are cheaper to compute and to
        forget than to skip: a loop costs more to compile than they cost to update.

        Args:
          counts: ``int32[slots]``.
          at_most_one: whether all counts are known to be 0 or 1, which takes less code.

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

        count = lax.dynamic_index_in_dim(counts, carry[0], keepdims=False)
        if at_most_one and bundle.layers is None and sum(x.size for x in carry[3]) <= _SMALL:
            slot, shared, own, x = carry
            params = None if self.params is None else [self.params[i] for i in bundle.leaves]
            new, mine, later = self._update_one(bundle, slot, x, params, own, shared)
            zeros = [jnp.zeros_like(g) for g in x]
            new = [_like(u, g) for u, g in zip(new, x, strict=True)]
            return (
                jnp.maximum(slot, -1) + 1,
                *jax.tree.map(
                    functools.partial(jnp.where, count > 0),
                    (later, mine, new),
                    (shared, own, zeros),
                ),
            )

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
            new = [_like(u, g) for u, g in zip(new, grads, strict=True)]
            return (
                jnp.maximum(slot, -1),  # the same slot, but XLA does not know
                shared,
                [_put(a, b, axis, layer) for a, b, axis in zip(own, mine, own_axes, strict=True)],
                [_put(a, b, axis, layer) for a, b, axis in zip(x, new, axes, strict=True)],
            )

        def inactive(carry):
            slot, shared, own, x = carry
            zeros = [
                jnp.zeros_like(_layer(a, axis, layer)) for a, axis in zip(x, axes, strict=True)
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


def _masked_tree(treedef: Any, leaves: dict[int, Any]) -> Any:
    """The tree with the leaves given; the others as `optax.masked` would hide them."""
    return treedef.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(treedef.num_leaves)])


def _layer(x: Any, axis: int | None, layer: Any) -> Any:
    if axis is None:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return _without_axis(x, axis)
    return lax.dynamic_index_in_dim(x, layer, axis, keepdims=False)


def _put(stack: jax.Array, x: jax.Array, axis: int | None, layer: Any) -> jax.Array:
    return x if axis is None else lax.dynamic_update_index_in_dim(stack, x, layer, axis)


def _without_axis(x: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
    if axis is None:
        return x
    return jax.ShapeDtypeStruct(x.shape[:axis] + x.shape[axis + 1 :], x.dtype)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.asarray(x).dtype


def _concrete(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def _like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """``x`` in the dtype of ``reference``, not weakly typed: loops must not change types."""
    return lax.convert_element_type(x, reference.dtype)
