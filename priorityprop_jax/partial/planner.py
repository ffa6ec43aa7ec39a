"""Plans cycles: what a policy may spend, and what it asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.core.tables import mebibytes
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


def budget_of(
    policy: str | Policy, units: Mapping[str, Any], costs: StepCosts | None
) -> tuple[str, float] | None:
    """The one budget among those given by unit; raises where it fits neither policy nor costs."""
    for unit, value in units.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{unit} must be a number, got {value!r}")
        if not 0 < value < math.inf or (unit == "share" and value > 1):
            most = "at most 1" if unit == "share" else "finite"
            raise ValueError(f"{unit} must be above 0 and {most}, got {value}")
    spends, fixed = policy in SPENDING, isinstance(policy, str) and policy not in SPENDING
    if len(units) > 1 or (fixed and units.keys() - {"memory"}) or (spends and not units):
        asked = ", ".join(f"{unit}={value:g}" for unit, value in units.items()) or "no budget"
        raise ValueError(
            f"the policy {policy!r} was given {asked}: priority and random need one of share, "
            "flops, milliseconds and memory, a function takes at most one, and the others memory "
            "or none"
        )
    if costs is not None and not isinstance(costs, StepCosts):
        raise TypeError(f"costs must come from measure_costs, got {costs!r}")
    unit, amount = next(iter(units.items()), ("", 0.0))
    paid = {"share": ("flops", "milliseconds"), "memory": ("bytes",)}.get(unit, (unit,))
    if costs is not None and unit and not fixed and costs.unit not in paid:
        raise ValueError(
            f"the budget is in {unit}, but costs are in {costs.unit}: measure them in that"
        )
    return (unit, float(amount)) if unit else None


class Planner:
    """At the start of a cycle tells the policy what it may spend, and takes what it asks for.

    It may spend the budget of all steps so far and of this cycle, less what has been spent. Of
    memory, every step may take all.
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
        memory = options.budget is not None and options.budget[0] == "memory"
        self.limit = options.budget[1] if options.budget and memory else None  # bytes of a step
        self.fixed = isinstance(options.policy, str) and options.policy not in SPENDING
        self._beyond = 0.0  # bytes that a program has taken beyond its expected cost
        self._refused: set[frozenset[str]] = set()
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
        if not self._full / 10 <= costs.full <= 10 * self._full:  # no optimizer is in costs
            raise ValueError(
                f"costs say that a step with all slots takes {costs.full:.3g} FLOPs, but this "
                f"model's takes {self._full:.3g}: measure them for its loss and batches"
            )
        if front is not None and costs.unit != "bytes":
            rate = self._full / self._account.full_flops
            self._front = [rate * flops for flops in front]
        self._measured = costs
        self.costs = self._of_hits(1.0)
        if options.budget is not None:
            unit, amount = options.budget
            self._allowed = amount * self._full if unit == "share" else amount
        pairs = zip(slots.names, slots.depths, strict=True)
        cheapest = self.cost(frozenset(name for name, depth in pairs if depth == 0))
        if options.policy in SPENDING and self.limit is None and self._allowed < cheapest:
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

    def fits(self, active: frozenset[str], taken: float) -> bool:
        """Whether memory suffices for a step that takes so many bytes.

        If not, the next plan is for less; raises where the policy asks for this in any case.
        """
        if self.limit is None or taken <= self.limit:
            return True
        if self.fixed or active in self._refused:
            depths = dict(zip(self.slots.names, self.slots.depths, strict=True))
            part = f"{len({depths[name] for name in active})} of {max(depths.values()) + 1} layers"
            least = "a step" if self.fixed else "the smallest step"
            state = ", or a state of 'reset' or 'offload'" * (self._options.state == "keep")
            raise ValueError(
                f"memory is {mebibytes(self.limit):,.1f} MiB, but {least} that the policy "
                f"{self._options.policy!r} asks for, of {part}, takes {math.ceil(taken)} bytes, "
                f"{mebibytes(taken):,.1f} MiB: raise memory to that, or take smaller batches, a "
                f"policy of fewer layers{state}; partial.plan tells what each choice takes"
            )
        self._refused.add(active)
        self._beyond = max(self._beyond, taken - self.cost(active))
        self.plan = []
        return False

    def new_cycle(self, values: np.ndarray, counts: np.ndarray) -> list[int]:
        """Plans the next cycle; returns the updates that each slot has in it.

        ``values`` and ``counts`` are over slots: what an update is worth, and updates so far.
        """
        done, steps = self._account.total.steps, self._options.recalc_every
        # As many find their prefix in the cache as did in the cycle before.
        cached, self._cached = self._cached, self._account.total.cached_steps
        self.costs = self._of_hits((self._cached - cached) / steps)
        allowed = max(self._allowed * (done + steps) - self._account.charged, 0.0) / steps
        if self.limit is not None:
            allowed = max(self.limit - self._beyond, 0.0)
        situation = Situation(
            self.slots, self.costs, allowed, self._full or self._account.full_flops,
            done // steps, steps, values, counts, self._options.seed,
        )  # fmt: skip
        wanted = [frozenset(names) for names in self._policy(situation)]
        unknown = frozenset().union(*wanted) - situation.everything
        if unknown or len(wanted) != steps or not all(wanted):
            raise ValueError(
                f"the policy must give {steps} sets of slots that are not empty; got "
                + (f"the unknown slot {min(unknown)!r}" if unknown else f"{len(wanted)} sets")
            )
        self.plan = wanted[done % steps :]  # the rest, where the cycle is planned anew
        return [sum(name in active for active in wanted) for name in self.slots.names]

    def record(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        plan = [sorted(active) for active in self.plan]
        return {"plan": plan, "cached": self._cached, "beyond": self._beyond}

    def restore(self, record: Mapping[str, Any]) -> None:
        """The inverse of `record`."""
        self.plan = [frozenset(active) for active in record["plan"]]
        self._cached, self._beyond = record["cached"], record["beyond"]
