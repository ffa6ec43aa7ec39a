"""What the steps of a run have cost, and what they would have cost in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.partial.costs import StepCosts
from priorityprop_jax.priority.per_slot import PerSlot


@dataclasses.dataclass
class Spent:
    """What the steps with one active set have cost."""

    steps: int = 0
    flops: float = 0.0
    cached: int = 0  # steps that found their prefix in the cache
    widened: int = 0  # steps that asked for less


class Account:
    """Counts steps by active set.

    Args:
      slots: the slots.

    Attributes:
      steps: how many have been run.
      charged: what they have cost in the unit of the budget.
      full_flops: what a step with all slots costs.
      spent: by active set.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.steps, self.charged, self.full_flops = 0, 0.0, 0.0
        self.spent: dict[frozenset[str], Spent] = {}

    def charge(
        self, active: frozenset[str], flops: float, cost: float, *, cached: bool, widened: bool
    ) -> None:
        """Adds a step, whose cost in the unit of the budget is ``cost``."""
        spent = self.spent.setdefault(active, Spent())
        spent.steps += 1
        spent.flops += flops
        spent.cached += cached
        spent.widened += widened
        self.steps += 1
        self.charged += cost

    @property
    def flops(self) -> float:
        """Of all steps."""
        return sum(spent.flops for spent in self.spent.values())

    @property
    def saved(self) -> float:
        """The share of as many full steps' FLOPs that was not spent."""
        full = self.full_flops * self.steps
        return 1 - self.flops / full if full else 0.0

    def report(
        self,
        costs: StepCosts | None,
        counts: Sequence[int],
        state_bytes: Sequence[float],
        seconds: float,
    ) -> dict[str, Any]:
        """What was spent, in all, by active set and by layer; see `PartialStep.report`."""
        total = lambda field: sum(getattr(spent, field) for spent in self.spent.values())  # noqa: E731
        return {
            "steps": self.steps,
            "flops": self.flops,
            "full_flops": self.full_flops * self.steps,
            "share": 1 - self.saved,
            "cached_steps": total("cached"),
            "widened_steps": total("widened"),
            "variants": [
                {
                    "active": sorted(active),
                    "steps": spent.steps,
                    "flops": spent.flops,
                    "cached_steps": spent.cached,
                    "widened_steps": spent.widened,
                }
                for active, spent in self.spent.items()
            ],
            "layers": self._layers(costs, counts, state_bytes, seconds),
        }

    def _layers(
        self, costs: StepCosts | None, counts: Any, state_bytes: Any, seconds: float
    ) -> list[dict[str, Any]]:
        """By layer from the input: updates, and FLOPs as the chain back and the slots' own."""
        slots = self._slots
        depths = max(slots.depths, default=-1) + 1
        if costs is None:
            costs = StepCosts((0.0,) * len(slots), (0.0,) * depths)
        reached = np.zeros(depths)
        for active, spent in self.spent.items():
            pairs = zip(slots.names, slots.depths, strict=True)
            reached[: max(depth for name, depth in pairs if name in active) + 1] += spent.steps
        rows, flops = [], self.flops
        for depth in reversed(range(depths)):
            members = [i for i, d in enumerate(slots.depths) if d == depth]
            chain = costs.floors[depth] - costs.floors[depth - 1] if depth else 0.0
            backward = float(
                reached[depth] * chain + sum(costs.own[i] * counts[i] for i in members)
            )
            rows.append(
                {
                    "layer": slots.layers[members[0]] if members else str(depth),
                    "depth": depth,
                    "updates": int(sum(counts[i] for i in members)),
                    "flops": backward,
                    "milliseconds": 1e3 * seconds * backward / flops if flops else 0.0,
                    "state_bytes": int(sum(state_bytes[i] for i in members)),
                }
            )
        return rows

    def record(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        return {
            "steps": self.steps,
            "charged": self.charged,
            "full_flops": self.full_flops,
            "spent": [[sorted(names), *dataclasses.astuple(s)] for names, s in self.spent.items()],
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """The inverse of `record`."""
        self.steps, self.charged = record["steps"], record["charged"]
        self.full_flops = record["full_flops"]
        self.spent = {frozenset(names): Spent(*rest) for names, *rest in record["spent"]}


def state_bytes(per_slot: PerSlot, inner_state: Any, resident: frozenset[str]) -> list[float]:
    """Bytes of optimizer state of each slot, for those whose state is on the device."""
    slots = per_slot.slots
    leaves = per_slot.state_treedef.flatten_up_to(inner_state)
    found = [0.0] * len(slots)
    for bundle in slots.bundles:
        mine = [
            i
            for i in range(bundle.start, bundle.start + bundle.slots)
            if slots.names[i] in resident
        ]
        for i in mine:
            found[i] = sum(leaves[leaf].nbytes for leaf in per_slot.owned(bundle)) / len(mine)
    return found
