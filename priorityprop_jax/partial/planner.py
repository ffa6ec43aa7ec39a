"""Plans cycles: what a policy may spend, and what it asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.partial.account import Account
from priorityprop_jax.partial.costs import StepCosts
from priorityprop_jax.partial.policies import SPENDING, Policy, Situation, make_policy
from priorityprop_jax.partial.prefix_cache import PrefixCache


@dataclasses.dataclass(frozen=True)
class Options:
    """What `step` was given; ``budget`` is its unit and amount, or None."""

    policy: str | Policy
    budget: tuple[str, float] | None
    recalc_every: int
    costs: StepCosts | None
    max_variants: int
    state: str
    cache: PrefixCache | None
    gain_decay: float
    seed: int
    where: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with, for JSON."""
        name = getattr(self.policy, "__qualname__", type(self.policy).__name__)
        return {
            "policy": self.policy if isinstance(self.policy, str) else f"the function {name}",
            "recalc_every": self.recalc_every,
            "budget": "none" if self.budget is None else "{}={:g}".format(*self.budget),
            "state": self.state,
        }


class Planner:
    """At the start of a cycle tells the policy what it may spend, and takes what it asks for.

    It may spend the budget of all steps so far and of this cycle, less what has been spent.
    """

    def __init__(self, options: Options, slots: Slots, account: Account) -> None:
        self._options, self.slots, self._account = options, slots, account
        self._policy = make_policy(options.policy)
        self.costs: StepCosts | None = None  # as the next steps are expected to, once known
        self._measured: StepCosts | None = None  # without a cache; in the unit of the budget
        self._front: list[float] = []  # what a hit in the cache spares, by depth
        self._cached = 0  # steps that found their prefix there, before this cycle
        self._full = 0.0  # what a step with all slots costs; 0 where only its FLOPs are known
        self._allowed = math.inf  # what a step may cost on average
        self.plan: list[frozenset[str]] = []  # the active sets of the steps left of the cycle

    def know(self, costs: StepCosts, front: Sequence[float] | None) -> None:
        """Takes in what steps cost; raises if the budget does not pay for the cheapest.

        Where outputs are cached, ``front`` is FLOPs of the forward pass in front of each depth.
        """
        options, slots = self._options, self.slots
        if len(costs.own) != len(slots) or len(costs.floors) <= max(slots.depths):
            raise ValueError(
                f"costs are of {len(costs.own)} slots and {len(costs.floors)} depths, but the "
                f"model has {len(slots)} slots; measure them for these slots"
            )
        self._full = self._account.full_flops if costs.unit == "flops" else costs.full
        if front is not None:
            rate = self._full / self._account.full_flops
            self._front = [rate * flops for flops in front]
        self._measured = costs
        self.costs = self._of_hits(1.0)
        if options.budget is not None:
            unit, amount = options.budget
            self._allowed = amount * self._full if unit == "share" else amount
        pairs = zip(slots.names, slots.depths, strict=True)
        cheapest = self.cost(frozenset(name for name, depth in pairs if depth == 0))
        if options.policy in SPENDING and self._allowed < cheapest:
            raise ValueError(
                f"the budget allows a step {self._allowed:.4g}, but the cheapest, with the output "
                f"layer alone, costs {cheapest:.4g}, {cheapest / self._full:.0%} of a full one: "
                "raise it, or cache what a frozen prefix gives, with Stages and a PrefixCache"
            )

    def cost(self, active: frozenset[str]) -> float:
        """What a step is expected to cost, in the unit of the budget; its slots, if unknown."""
        return float(len(active)) if self.costs is None else self.costs.of(self.slots, active)

    def _of_hits(self, share: float) -> StepCosts | None:
        """What steps cost where so many find the outputs of their prefix in the cache."""
        if self._measured is None or not self._front:
            return self._measured
        return self._measured.without_prefix([share * cost for cost in self._front])

    def charge(self, active: frozenset[str], flops: float, cached: bool) -> float:
        """What a step that has run is charged, in the unit of the budget."""
        costs = self._of_hits(float(cached))
        return flops if costs is None or costs.unit == "flops" else costs.of(self.slots, active)

    def new_cycle(self, values: np.ndarray, counts: np.ndarray) -> list[int]:
        """Plans the next cycle; returns the updates that each slot has in it.

        ``values`` and ``counts`` are over slots: what an update is worth, and updates so far.
        """
        done, steps = self._account.total.steps, self._options.recalc_every
        # As many find their prefix in the cache as did in the cycle before.
        cached, self._cached = self._cached, self._account.total.cached_steps
        self.costs = self._of_hits((self._cached - cached) / steps)
        allowed = max(self._allowed * (done + steps) - self._account.charged, 0.0)
        situation = Situation(
            self.slots, self.costs, allowed / steps, self._full or self._account.full_flops,
            done // steps, steps, values, counts, self._options.seed,
        )  # fmt: skip
        wanted = [frozenset(names) for names in self._policy(situation)]
        unknown = frozenset().union(*wanted) - situation.everything
        if unknown or len(wanted) != steps or not all(wanted):
            raise ValueError(
                f"the policy must give {steps} sets of slots that are not empty; got "
                + (f"the unknown slot {min(unknown)!r}" if unknown else f"{len(wanted)} sets")
            )
        self.plan = wanted
        return [sum(name in active for active in wanted) for name in self.slots.names]

    def record(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        return {"plan": [sorted(active) for active in self.plan], "cached": self._cached}

    def restore(self, record: Mapping[str, Any]) -> None:
        """The inverse of `record`."""
        self.plan = [frozenset(active) for active in record["plan"]]
        self._cached = record["cached"]
