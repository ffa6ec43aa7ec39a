"""One inner update of one slot: its part of the update of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from priorityprop_jax.core.cut import Cut, Part
from priorityprop_jax.core.slots import Bundle
from priorityprop_jax.priority.per_slot import PerSlot, layer_of, like


class OneSlot:
    """Updates slots one at a time; the inner update is traced once, on the whole tree.

    So masks, labels and random numbers are those of the whole tree; the layers of a stack draw
    numbers of their own. An update that needs the gradients of other slots too, as for a global
    norm, is traced for each slot alone, all others hidden.

    Args:
      per_slot: the optimizer and the slots.
      grads: the flat gradients, None where absent. Of these and the next two types are read.
      state: the leaves of the inner state for all slots, or None where they are not at hand.
      params: the flat parameters, or None.
      extra_args: handed on to the inner optimizer.
    """

    def __init__(
        self,
        per_slot: PerSlot,
        grads: Sequence[Any],
        state: Sequence[Any],
        params: Sequence[Any] | None,
        extra_args: dict[str, Any],
    ) -> None:
        axes, state_axes = per_slot.stack_axis, dict.fromkeys(per_slot.shared, 0)
        self._grads = _types(grads, axes, per_slot.shapes)
        self._params = None if params is None else _types(params, axes, per_slot.shapes)
        self._state = _types(state, per_slot.state_axis | state_axes, per_slot.state_shapes)
        self._fixed = {i: state[i] for i in per_slot.fixed}
        self._per_slot, self._extra_args = per_slot, extra_args
        self._parts: dict[Bundle, tuple[Part, bool]] = {}

    def run(
        self,
        bundle: Bundle,
        layer: Any,
        grads: Sequence[jax.Array],
        params: Sequence[jax.Array] | None,
        mine: dict[int, jax.Array],
    ) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        """The updates of a slot, and its state after them.

        Gradients, parameters and updates are those of the slot's leaves; ``mine``, and what it is
        afterwards, its part of the inner state by the number of the state's leaf.
        """
        if bundle not in self._parts:
            part = self._whole.part(*self._numbers(bundle))
            self._parts[bundle] = (part or self._alone(bundle), part is not None)
        part, of_all = self._parts[bundle]
        stream = bundle.start + layer if not of_all else layer if bundle.layers else None
        known = [*grads, *(x for _, x in sorted((mine | self._fixed).items())), *(params or ())]
        _, numbers = self._numbers(bundle)
        results = part.run(dict(zip(numbers, known, strict=True)), stream)
        state = zip(sorted(mine), results[len(grads) :], strict=True)
        return results[: len(grads)], {i: like(jnp.asarray(x), mine[i]) for i, x in state}

    def numbers(self, shared: Mapping[int, jax.Array]) -> Mapping[int, jax.Array] | None:
        """What follows for every slot from its shared state alone, ``[slots]`` each, by its value.

        None where some of that state follows from more.
        """
        count = len(self._grads)
        part = self._whole.numbers([count + i for i in (*shared, *self._fixed)])
        if not {self._whole.value(count + i) for i in shared} <= {*part.wanted}:
            return None
        places = lambda own: {count + i: x for i, x in (own | self._fixed).items()}  # noqa: E731
        vectors = jax.vmap(lambda own: part.run(places(own)))(dict(shared)) if shared else []
        return dict(zip(part.wanted, vectors, strict=bool(shared)))

    def shared_after(self, i: int, numbers: Mapping[int, jax.Array]) -> jax.Array:
        """A leaf of the shared state of all slots, each after an update."""
        return numbers[self._whole.value(len(self._grads) + i)]

    def choosable(self, bundle: Bundle, numbers: Collection[int]) -> Part | None:
        """The update of a slot for `choose`; None where it does not work number by number."""
        results, places = self._numbers(bundle)
        shared = {len(self._grads) + i for i in self._per_slot.shared}
        part = self._whole.part([i for i in results if i not in shared], places, numbers)
        return part if part is not None and part.is_elementwise() else None

    def choose(
        self,
        bundle: Bundle,
        part: Part,
        on: jax.Array,
        numbers: Mapping[int, jax.Array],
        grads: Sequence[jax.Array],
        params: Sequence[jax.Array] | None,
        own: dict[int, jax.Array],
    ) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        """As `run`, but where ``on`` does not hold the updates are zeros and the state stays.

        All is computed of the chosen state, so that state and parameters change in place, in as few
        loops as those of all slots at once; and of a loop whose choice is one for all of it a
        compiler leaves out the work where nothing is chosen.
        """
        count, after = len(self._grads), len(self._grads) + len(self._state)
        args = dict(numbers) | {count + i: x for i, x in (own | self._fixed).items()}
        args |= zip(bundle.leaves, grads, strict=True)
        args |= zip((after + i for i in bundle.leaves), params or (), strict=params is not None)
        held = sorted(own)
        either = lambda old, new: jnp.where(on, new, old.astype(new.dtype))  # noqa: E731
        instead = {len(grads) + n: functools.partial(either, own[i]) for n, i in enumerate(held)}
        found = part.run(args, instead=instead)
        updates = [jnp.where(on, u, jnp.zeros_like(u)) for u in found[: len(grads)]]
        state = zip(held, found[len(grads) :], strict=True)
        return updates, {i: like(jnp.asarray(x), own[i]) for i, x in state}

    def is_frozen(self, bundle: Bundle) -> bool:
        """Whether the updates of these slots are zeros whatever the gradients, as by a label."""
        return all(map(self._whole.is_zero, bundle.leaves))

    @functools.cached_property
    def _whole(self) -> Cut:
        return self._per_slot.program(self._grads, self._state, self._params, self._extra_args)

    def _numbers(self, bundle: Bundle) -> tuple[list[int], list[int]]:
        """The results of the whole update that are a slot's, and the arguments that it has."""
        count, after = len(self._grads), len(self._grads) + len(self._state)
        own = [count + i for i in sorted([*self._per_slot.owned(bundle), *self._per_slot.shared])]
        state = sorted([*own, *(count + i for i in self._fixed)])
        params = [] if self._params is None else [after + i for i in bundle.leaves]
        return [*bundle.leaves, *own], [*bundle.leaves, *state, *params]

    def _alone(self, bundle: Bundle) -> Part:
        """The update of a slot by itself."""
        per_slot, (results, numbers) = self._per_slot, self._numbers(bundle)
        every = [*self._grads, *self._state, *(self._params or ())]
        count, after = len(self._grads), len(self._grads) + len(self._state)
        owners = [*range(count), *per_slot.owners, *range(count)]

        def update(args: Sequence[Any], hide: Callable[[int], Any]) -> Sequence[Any]:
            own = dict(zip(numbers, args, strict=True))
            leaves = [own[i] if i in own else hide(owners[i]) for i in range(len(every))]
            return jax.tree.leaves(per_slot.update(leaves, self._extra_args))

        types = [every[i] for i in numbers]
        try:
            program = Cut(lambda args: update(args, lambda _: optax.MaskedNode()), types)
        except AttributeError as error:
            if optax.MaskedNode.__name__ not in str(error):
                raise
            # A mask or labels that are a function of the tree: it asks what is hidden for a shape.
            program = Cut(lambda args: update(args, per_slot.stand_in), types)
        kept = [i for i in numbers if i < after]
        if program.results != len(kept):
            raise TypeError(
                "the inner optimizer changed the structure of its updates or of its state "
                f"when it updated slot {bundle.name!r} alone"
            )
        return program.whole([kept.index(i) for i in results], numbers)


def frozen_slots(per_slot: PerSlot) -> int:
    """How many slots an optimizer freezes; 0 where it needs extra arguments to be read."""
    nothing = [None] * len(per_slot.shapes)
    one = OneSlot(per_slot, nothing, [None] * len(per_slot.state_shapes), nothing, {})
    try:
        return sum(bundle.slots for bundle in per_slot.slots.bundles if one.is_frozen(bundle))
    except Exception:
        return 0


def _types(leaves: Sequence[Any], axes: dict[int, int], otherwise: Sequence[Any]) -> list[Any]:
    """What each is of, of one layer where layers are stacked on an axis."""
    there = {
        i: x
        for i, x in enumerate(leaves)
        if x is not None and (i not in axes or jnp.shape(x)[axes[i]])
    }
    types = jax.eval_shape(
        lambda xs: {i: layer_of(jnp.asarray(x), axes.get(i), 0) for i, x in xs.items()}, there
    )
    return [types.get(i, default) for i, default in enumerate(otherwise)]
