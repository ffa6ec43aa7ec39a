"""What the steps of a run have cost, and what they would have cost in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.partial.costs import StepCosts
from priorityprop_jax.priority.per_slot import PerSlot

Names = frozenset[str]


@dataclasses.dataclass
class Spent:
    """What some steps have cost."""

    steps: int = 0
    flops: float = 0.0
    cached_steps: int = 0  # that found their prefix in the cache


class Account:
    """Counts steps by active set."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots  # with the depths of the program, once they are known
        self.charged = 0.0  # in the unit of the budget
        self.full_flops = 0.0  # of a step with all slots
        self.costs: StepCosts | None = None  # FLOPs by slot, once they are known
        self.total, self.spent = Spent(), dict[Names, Spent]()  # the latter by active set

    def charge(self, active: Names, flops: float, cost: float, cached: bool) -> None:
        """Adds a step, whose cost in the unit of the budget is ``cost``."""
        for spent in (self.total, self.spent.setdefault(active, Spent())):
            spent.steps += 1
            spent.flops += flops
            spent.cached_steps += cached
        self.charged += cost

    @property
    def saved(self) -> float:
        """The share of as many full steps' FLOPs that was not spent."""
        full = self.full_flops * self.total.steps
        return 1 - self.total.flops / full if full else 0.0

    def report(self, counts: Any, state_bytes: Any, seconds: float) -> dict[str, Any]:
        """What was spent, in all, by active set and by layer from the input.

        A layer's FLOPs are its part of the chain back and its slots' own. ``counts`` and
        ``state_bytes`` are over slots: updates, and bytes on the device.
        """
        slots, total, layers = self.slots, self.total, []
        depths = max(slots.depths, default=-1) + 1
        # There are none where there was no step.
        costs = self.costs or StepCosts((0.0,) * len(slots), (0.0,) * depths)
        depth_of = dict(zip(slots.names, slots.depths, strict=True))
        deepest = [(max(depth_of[n] for n in names), s.steps) for names, s in self.spent.items()]
        for depth in reversed(range(depths)):
            members = [i for i, d in enumerate(slots.depths) if d == depth]
            chain = costs.floors[depth] - costs.floors[depth - 1] if depth else 0.0
            reached = sum(steps for deep, steps in deepest if deep >= depth)
            flops = float(reached * chain + sum(costs.own[i] * counts[i] for i in members))
            layers.append(
                {
                    "layer": ", ".join(dict.fromkeys(slots.layers[i] for i in members)),
                    "updates": int(sum(counts[i] for i in members)),
                    "flops": flops,
                    "milliseconds": 1e3 * seconds * flops / total.flops if total.flops else 0.0,
                    "state_bytes": int(sum(state_bytes[i] for i in members)),
                }
            )
        by_set = [
            {"active": sorted(names), **dataclasses.asdict(s)} for names, s in self.spent.items()
        ]
        totals = {"full_flops": self.full_flops * total.steps, "share": 1 - self.saved}
        return dataclasses.asdict(total) | totals | {"variants": by_set, "layers": layers}

    def record(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        costs = self.costs
        return {
            "charged": self.charged,
            "full_flops": self.full_flops,
            "depths": self.slots.depths,
            "costs": None if costs is None else [costs.own, costs.floors],
            "total": dataclasses.astuple(self.total),
            "spent": [[sorted(names), *dataclasses.astuple(s)] for names, s in self.spent.items()],
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """The inverse of `record`."""
        self.charged, self.full_flops = record["charged"], record["full_flops"]
        self.slots = dataclasses.replace(self.slots, depths=tuple(record["depths"]))
        if record["costs"] is not None:  # for a report where no step is left to run
            own, floors = map(tuple, record["costs"])
            self.costs = StepCosts(own, floors)
        self.total = Spent(*record["total"])
        self.spent = {frozenset(names): Spent(*rest) for names, *rest in record["spent"]}


def state_bytes(per_slot: PerSlot, inner_state: Any, resident: Names) -> list[float]:
    """Bytes of optimizer state of each slot, for those whose state is on the device."""
    leaves = per_slot.state_treedef.flatten_up_to(inner_state)
    found = [0.0] * len(per_slot.slots)
    for bundle in per_slot.slots.bundles:
        places = range(bundle.start, bundle.start + bundle.slots)
        mine = [i for i in places if per_slot.slots.names[i] in resident]
        for i in mine:
            found[i] = sum(leaves[leaf].nbytes for leaf in per_slot.owned(bundle)) / len(mine)
    return found
