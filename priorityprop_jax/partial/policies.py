"""Which slots are active in the coming cycle."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.partial.choose import choose_active
from priorityprop_jax.partial.costs import StepCosts
from priorityprop_jax.priority.scores import priority


@dataclasses.dataclass(frozen=True)
class Situation:
    """All that a policy may look at when it plans a cycle.

    Attributes:
      slots: the slots.
      costs: what steps cost, or None where it has not been measured.
      budget: what a step of this cycle may cost on average, in the unit of ``costs``; infinite
        where there is no budget.
      full: what a step with all slots costs.
      cycle: number of the cycle, from 0.
      steps: steps in the cycle.
      values: expected decrease of the loss by one update of each slot, NaN where unknown.
      update_counts: updates that each slot has had.
      seed: of the random policies.
    """

    slots: Slots
    costs: StepCosts | None
    budget: float
    full: float
    cycle: int
    steps: int
    values: np.ndarray
    update_counts: np.ndarray
    seed: int = 0

    @property
    def everything(self) -> frozenset[str]:
        """All slots."""
        return frozenset(self.slots.names)

    def rng(self, *more: int) -> np.random.Generator:
        """Random numbers that are a function of the seed, the cycle and further numbers."""
        return np.random.default_rng((self.seed, self.cycle, *more))

    def at_depths(self, depths: Iterable[int]) -> frozenset[str]:
        """The slots of layers at some depths."""
        wanted = set(depths)
        pairs = zip(self.slots.names, self.slots.depths, strict=True)
        return frozenset(name for name, depth in pairs if depth in wanted)

    @property
    def known_costs(self) -> StepCosts:
        """The costs; a ValueError where there are none."""
        if self.costs is None:
            raise ValueError(
                "this policy needs costs, which are measured where a budget is given: a share, "
                "flops, milliseconds or memory; or give it costs from measure_costs"
            )
        return self.costs

    def cost(self, active: Iterable[str]) -> float:
        """What a step with these active slots is expected to cost."""
        return self.known_costs.of(self.slots, active)


Policy = Callable[[Situation], Sequence[frozenset[str]]]


def by_priority(*, scoring_share: float = 0.1, always: Iterable[int] = (0,)) -> Policy:
    """PriorityProp's policy: the active set that is worth most for the budget, see `choose_active`.

    A slot is worth its expected decrease of the loss times the count discount ``1 / update_count``,
    a bonus for slots that have not been updated for long. As values of slots that are not updated
    go stale, some cycles begin with a full step, which scores all: the first cycle, and then as
    often as ``scoring_share`` of the budget pays. The rest of the cycle makes up for it. Slots at
    the depths ``always`` are always active.

    There are no such steps where the rest of a cycle cannot make up for them, in a budget of memory
    and in short cycles: what has never been updated counts as much as the best that has.
    """
    always = tuple(always)

    def policy(at: Situation) -> list[frozenset[str]]:
        costs, budget = at.known_costs, at.budget
        known = at.values[np.isfinite(at.values)]
        values = np.where(np.isnan(at.values), known.max(initial=0.0) or 1.0, at.values)
        spare = scoring_share * at.budget / at.full * at.steps
        scoring = at.cycle == 0 or math.floor(spare * (at.cycle + 1)) > math.floor(spare * at.cycle)
        # A tenth of a cycle's budget may be left to the cycles after it: 0.2 % of that of 50.
        least = at.at_depths(always) or at.at_depths([0])  # the cheapest that trains anything
        left = at.full + (at.steps - 1) * at.cost(least) - at.steps * budget
        scoring &= costs.unit != "bytes" and left <= 0.1 * at.steps * budget
        if costs.unit == "bytes":
            # What every step takes is no part of the choice, so that the rest is cut finely.
            budget -= costs.floors[0]
            floors = tuple(floor - costs.floors[0] for floor in costs.floors)
            costs = dataclasses.replace(costs, floors=floors)
        if scoring and at.steps > 1:
            budget = max(at.budget * at.steps - at.full, 0.0) / (at.steps - 1)
        worth = np.asarray(priority(values.astype(np.float32), at.update_counts, 1.0))
        active = least
        if (worth > 0).any() and budget > 0:
            must = np.flatnonzero(np.isin(at.slots.depths, always))
            chosen = choose_active(worth, at.slots.depths, costs, budget, always=must)
            active = frozenset(np.array(at.slots.names)[chosen].tolist()) or least
        return [at.everything if scoring else active] + [active] * (at.steps - 1)

    return policy


def at_random(*, always: Iterable[int] = (0,)) -> Policy:
    """Layers drawn at random each cycle, as many as the budget pays: the control for `by_priority`.

    Slots at the depths ``always`` are always active.
    """
    always = tuple(always)

    def policy(at: Situation) -> list[frozenset[str]]:
        active = at.at_depths(always)
        others = sorted(set(at.slots.depths) - set(always))
        for depth in at.rng().permutation(others).tolist():
            larger = active | at.at_depths([depth])
            if at.cost(larger) <= at.budget:
                active = larger
        return [active or at.at_depths([0])] * at.steps

    return policy


def suffix(k: int) -> Policy:
    """The output layer and the ``k`` layers before it, all along."""
    return lambda at: [at.at_depths(range(k + 1))] * at.steps


def lisa(k: int) -> Policy:
    """LISA: input and output layers always, and ``k`` random layers between them each cycle.

    See Pan et al. (2024), https://arxiv.org/abs/2403.17919
    """

    def policy(at: Situation) -> list[frozenset[str]]:
        deepest = max(at.slots.depths, default=0)
        middle = np.arange(1, deepest)
        drawn = at.rng().choice(middle, size=min(k, len(middle)), replace=False).tolist()
        return [at.at_depths([0, deepest, *drawn])] * at.steps

    return policy


def badam(k: int = 1) -> Policy:
    """BAdam: ``k`` layers a cycle in turn, from the output to the input and again.

    The output layer is active all along, as a new classifier has to be learned; the input layer
    has no turn, as in the paper, which resets optimizer states between turns (``state="reset"``).
    See Luo, Yu and Li (2024), https://arxiv.org/abs/2404.02827
    """

    def policy(at: Situation) -> list[frozenset[str]]:
        deepest = max(at.slots.depths, default=0)
        middle = list(range(1, max(deepest, 2)))
        turns = [middle[i : i + k] for i in range(0, len(middle), k)]
        return [at.at_depths([0, *turns[at.cycle % len(turns)]])] * at.steps

    return policy


def full() -> Policy:
    """Every slot at every step: ordinary training."""
    return lambda at: [at.everything] * at.steps


# By name: what makes the policy, and of how many layers at least, where it is told.
_POLICIES: dict[str, tuple[Callable[..., Policy], int | None]] = {
    "priority": (by_priority, None),
    "random": (at_random, None),
    "suffix": (suffix, 0),
    "lisa": (lisa, 1),
    "badam": (badam, 1),
    "full": (full, None),
}
SPENDING = ("priority", "random")  # what they run is what a budget pays


def is_one_set(policy: str | Policy) -> bool:
    """Whether a policy asks for the same slots at every step."""
    return isinstance(policy, str) and written_as(policy)[0] in ("suffix", "full")


def make_policy(policy: str | Policy) -> Policy:
    """A policy by its name, with the number of layers behind it where it takes one.

    Args:
      policy: ``"priority"``, ``"random"``, ``"suffix(2)"`` or ``"suffix:2"``, ``"lisa(2)"``,
        ``"badam(1)"``, ``"full"``; or a function from a `Situation` to the active set of each step
        of the cycle.

    Returns:
      The policy.

    Raises:
      ValueError: if there is no policy of the name, or its number of layers is missing or wrong.
      TypeError: if it is neither a name nor a function.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax import find_slots
      >>> from priorityprop_jax.partial.policies import Situation, make_policy
      >>> slots = find_slots({"layer_0": 1.0, "layer_1": 1.0, "layer_2": 1.0})
      >>> at = Situation(slots, None, 1.0, 1.0, 0, 2, np.zeros(3), np.zeros(3, int))
      >>> [sorted(active) for active in make_policy("suffix(1)")(at)]
      [['layer_1', 'layer_2'], ['layer_1', 'layer_2']]
    """
    if callable(policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a function, got {policy!r}")
    name, number = written_as(policy)
    if name not in _POLICIES:
        raise ValueError(
            f"there is no policy {policy!r}; the policies are priority, random, suffix(k), "
            "lisa(k), badam(k) and full"
        )
    make, least = _POLICIES[name]
    if number is None and least is None:
        return make()
    if number is None or least is None or number < least:
        form = name if least is None else f"{name}(k), k layers from {least} on"
        raise ValueError(f"the policy is written {form}, got {policy!r}")
    return make(number)


def written_as(policy: str) -> tuple[str, int | None]:
    """The name of a policy and its number: ``suffix:8``, ``suffix(8)``, ``full``; or nothing."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+)|\((\d+)\))?", policy)
    if match is None:
        return "", None
    number = match[2] or match[3]
    return match[1], None if number is None else int(number)
