"""Layers of stacks that a program is told by number, and how their new weights are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from priorityprop_jax.core.layout import layout_of
from priorityprop_jax.core.program import Program
from priorityprop_jax.core.rows import Held, RowSparse
from priorityprop_jax.core.slots import Bundle, Slots
from priorityprop_jax.partial.grad import ActiveLeaves, active_rows
from priorityprop_jax.partial.prefix import arguments_key

Rows = Mapping[int, Any]  # int32[k], the active layers, by the first slot of their stack


class ByRow:
    """The stacks whose layers are told by number.

    A program that updates some layers reads their stack, and gives the updates; another one writes
    them in place. One that did both would copy each stack as a whole, as it cannot change what its
    loops over layers read.
    """

    def __init__(self, build: Callable[..., Program]) -> None:
        self.stacks: frozenset[Bundle] = frozenset()
        self._build = build
        self._programs: dict[Hashable, Program] = {}

    def told(self, slots: Slots, active: frozenset[str]) -> tuple[frozenset[str], dict[int, Any]]:
        """Active slots without layers that are told by number, and these."""
        rows = {}
        for stack in self.stacks:
            own = active_rows(stack, slots, active)
            if 0 < len(own) < stack.slots:
                rows[stack.start] = np.asarray(own, np.int32)
                active -= {slots.names[stack.start + i] for i in own}
        return active, rows

    def leaves(self, rows: Rows) -> dict[int, Any]:
        """For each leaf of these stacks its active layers."""
        return {i: rows[s.start] for s in self.stacks if s.start in rows for i in s.leaves}

    def kept(self, chosen: ActiveLeaves, rows: Rows) -> ActiveLeaves:
        """Without the leaves of these stacks, so that `ActiveLeaves.split` has them as frozen."""
        told = self.leaves(rows)
        kept = (None if i in told else own for i, own in enumerate(chosen.rows))
        return dataclasses.replace(chosen, rows=tuple(kept))

    def applied(self, chosen: ActiveLeaves, rows: Rows, part: Any, updates: Any) -> tuple[Any, Any]:
        """The other active leaves with their updates, and the updates of layers told by number."""
        kept, flat = self.kept(chosen, rows), chosen.treedef.flatten_up_to(updates)
        own = [update for on, update in zip(kept.rows, flat, strict=True) if on is not None]
        return optax.apply_updates(part, own), {i: flat[i].values for i in self.leaves(rows)}

    def layout(self, params: Any, rows: Rows) -> Any:
        """Where updates are to be, for `out_shardings`: beside their stacks."""
        leaves = jax.tree.leaves(params)
        found = layout_of({i: leaves[i] for i in self.leaves(rows)})
        whole = lambda at: isinstance(at, NamedSharding) and not any(at.spec[:1])  # noqa: E731
        return found and {i: at if whole(at) else None for i, at in found.items()}

    def written(self, params: Any, updates: Mapping[int, Any], rows: Rows) -> Any:
        """The parameters with updates of layers, ``[k, ...]`` by leaf, in place."""
        leaves, treedef = jax.tree.flatten(params)

        def write(stacks, updates, rows):
            at = self.leaves(rows)
            own = {i: RowSparse(Held(at[i]), new, stacks[i].shape) for i, new in updates.items()}
            return optax.apply_updates(stacks, own)

        arguments = {i: leaves[i] for i in updates}, dict(updates), dict(rows)
        key = arguments_key(arguments)
        if key not in self._programs:
            self._programs[key] = self._build(write, arguments, layout_of(arguments[0]), (0,))
        for i, new in self._programs[key].run(*arguments).items():
            leaves[i] = new
        return treedef.unflatten(leaves)

    def clear(self) -> None:
        """Forgets its programs, which keep the layout of what they were compiled for."""
        self._programs.clear()
