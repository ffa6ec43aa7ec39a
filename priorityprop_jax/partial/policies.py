"""Which slots are active in the coming cycle: policies, and the exact choice under a budget."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.priority.schedule import repeats
from priorityprop_jax.priority.scores import priority


class StepCosts(Protocol):
    """What a step costs, in any unit. `measure_costs` measures them.

    A step costs ``floors[depth]``, with ``depth`` that of the deepest active slot, and ``own[i]``
    more for every active slot ``i``: the chain back to a layer is paid once, whoever uses it.
    """

    @property
    def own(self) -> Sequence[float]:
        """Marginal cost of each slot, ``[slots]``."""
        ...

    @property
    def floors(self) -> Sequence[float]:
        """Forward pass and chain back to each depth, ``[depths]``, not decreasing."""
        ...


@dataclasses.dataclass(frozen=True)
class Situation:
    """All that a policy may look at when it plans a cycle.

    Attributes:
      slots: the slots.
      costs: what steps cost, or None where it has not been measured.
      budget: what a step of this cycle may cost on average, in the unit of ``costs``.
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
        """Random numbers that are a function of the seed and the cycle."""
        return np.random.default_rng((self.seed, self.cycle, *more))

    def at_depths(self, depths: Iterable[int]) -> frozenset[str]:
        """The slots of layers at some depths."""
        wanted = set(depths)
        pairs = zip(self.slots.names, self.slots.depths, strict=True)
        return frozenset(name for name, depth in pairs if depth in wanted)

    def cost(self, active: Iterable[str]) -> float:
        """What a step with these active slots is expected to cost."""
        if self.costs is None:
            raise ValueError("this policy needs costs: give it those that measure_costs measures")
        return step_cost(self.slots, self.costs, active)


Policy = Callable[[Situation], Sequence[frozenset[str]]]


def step_cost(slots: Slots, costs: StepCosts, active: Iterable[str]) -> float:
    """What a step with these active slots is expected to cost, in the unit of ``costs``.

    Args:
      slots: the slots.
      costs: what steps cost.
      active: names of slots; for none, the forward pass alone is counted as the cheapest floor.

    Returns:
      ``floors[depth of the deepest] + sum(own)``.
    """
    active = frozenset(active)
    chosen = [i for i, name in enumerate(slots.names) if name in active]
    deepest = max((slots.depths[i] for i in chosen), default=0)
    return float(costs.floors[deepest] + sum(costs.own[i] for i in chosen))


def choose_active(
    values: Any,
    depths: Sequence[int],
    costs: StepCosts,
    budget: float,
    *,
    always: Iterable[int] = (),
    resolution: int = 4096,
) -> np.ndarray:
    r"""The set of slots worth most among those that a budget can pay, by dynamic programming.

    .. math::
        \max_A \sum_{i \in A} v_i \quad \text{subject to} \quad
        f_{\max_{i \in A} \text{depth}_i} + \sum_{i \in A} c_i \le B

    with ``v`` the values, ``f`` the floors and ``c`` the own costs. For every depth that the
    backward pass may reach, what is left after its floor is a knapsack over the slots up to there;
    one table from the output inwards solves them all. Exact for costs that are multiples of
    ``budget / resolution``; others are rounded up to it, so the budget is never exceeded.

    Args:
      values: ``float[slots]``; NaN, infinite and negative ones count as 0.
      depths: ``int[slots]``, 0 at the output.
      costs: what steps cost.
      budget: what the step may cost.
      always: indices of slots that are active whatever they are worth.
      resolution: units that the budget is cut into.

    Returns:
      ``bool[slots]``. Only ``always`` where the budget does not even pay for those.

    Raises:
      ValueError: if lengths differ, the budget is not above 0 and finite, or a cost is negative.

    Example:
      >>> import types
      >>> from priorityprop_jax import choose_active
      >>> costs = types.SimpleNamespace(own=[1, 1, 1], floors=[2, 4, 6])
      >>> choose_active([5.0, 2.0, 9.0], [0, 1, 2], costs, budget=7).tolist()
      [True, True, False]
      >>> choose_active([5.0, 2.0, 9.0], [0, 1, 2], costs, budget=8).tolist()
      [True, False, True]

    References:
      GreenTrainer (Huang et al., 2023, https://arxiv.org/abs/2309.13192) chooses tensors by their
      importance and backward cost with the same kind of table.
    """
    values = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    values = np.maximum(values, 0.0)
    own = np.asarray(costs.own, np.float64)
    floors = np.asarray(costs.floors, np.float64)
    order: list[int] = np.argsort(np.asarray(depths, int), kind="stable").tolist()
    if not len(values) == len(depths) == len(own):
        raise ValueError(f"{len(values)} values, {len(depths)} depths and {len(own)} own costs")
    if len(floors) <= max(depths, default=-1):
        raise ValueError(f"there are slots at depth {max(depths)}, but {len(floors)} floors")
    if not 0 < budget < math.inf:
        raise ValueError(f"budget must be finite and above 0, got {budget}")
    if (own < 0).any() or (floors < 0).any():
        raise ValueError("costs must not be negative")
    forced = np.zeros(len(values), bool)
    forced[list(always)] = True

    unit = budget / resolution
    units = np.ceil(own / unit - 1e-9).astype(int)
    chosen = forced.copy()
    deepest_forced = max((depths[int(i)] for i in np.flatnonzero(forced)), default=0)
    # best[c]: the most that the slots so far are worth for at most c units.
    best = np.zeros(resolution + 1)
    taken = np.zeros((len(values), resolution + 1), bool)
    top, place = -1.0, (0, 0)  # the best value, and after how many slots, at which capacity
    for n, i in enumerate(order):
        with_slot = np.full(resolution + 1, -np.inf)
        if units[i] <= resolution:
            with_slot[units[i] :] = best[: resolution + 1 - units[i]] + values[i]
        taken[n] = forced[i] | (with_slot > best)
        best = np.where(taken[n], with_slot, best)
        last_of_depth = n + 1 == len(order) or depths[order[n + 1]] > depths[i]
        if last_of_depth and depths[i] >= deepest_forced:
            room = int(np.floor((budget - floors[depths[i]]) / unit + 1e-9))
            if room >= 0 and best[room] > top:
                top, place = best[room], (n + 1, room)
    n, room = place
    if top < 0:
        return chosen
    while n:
        n -= 1
        if taken[n, room]:
            chosen[order[n]] = True
            room -= units[order[n]]
    return chosen


def by_priority(*, scoring_share: float = 0.1, always: Iterable[int] = (0,)) -> Policy:
    """PriorityProp's policy: the active set that is worth most for the budget.

    The value of a slot is its expected decrease of the loss times the count discount
    ``1 / update_count``, a bonus for slots that have not been updated for long; which slots to
    spend the budget on is then chosen exactly (see `choose_active`). As values of slots that are
    not updated go stale, some cycles begin with a full step, an ordinary update of all slots that
    scores them as well: the first cycle, and then as often as ``scoring_share`` of the budget pays.
    They are charged like any step, and the rest of the cycle makes up for them.

    Args:
      scoring_share: the share of the budget to spend on full steps after the first; 0 for none.
      always: depths whose slots are always active; the output layer by default.

    Returns:
      The policy.

    Raises:
      ValueError: if ``scoring_share`` is not in [0, 1].
    """
    if not 0 <= scoring_share <= 1:
        raise ValueError(f"scoring_share must be in [0, 1], got {scoring_share}")
    always = tuple(always)

    def policy(at: Situation) -> list[frozenset[str]]:
        if at.costs is None:
            raise ValueError("the policy priority needs costs, such as measure_costs measures")
        spare = scoring_share * at.budget / at.full * at.steps
        scoring = at.cycle == 0 or math.floor(spare * (at.cycle + 1)) > math.floor(spare * at.cycle)
        budget = at.budget
        if scoring and at.steps > 1:
            budget = max(at.budget * at.steps - at.full, 0.0) / (at.steps - 1)
        worth = np.asarray(priority(at.values, at.update_counts, 1.0))
        must = [i for i, depth in enumerate(at.slots.depths) if depth in always]
        if not (worth > 0).any() or budget <= 0:
            chosen = np.isin(np.arange(len(worth)), must)
        else:
            chosen = choose_active(worth, at.slots.depths, at.costs, budget, always=must)
        active = frozenset(name for name, on in zip(at.slots.names, chosen, strict=True) if on)
        if not scoring:
            return [active] * at.steps
        return [at.everything] + [active] * (at.steps - 1)

    return policy


def at_random(*, always: Iterable[int] = (0,)) -> Policy:
    """Layers drawn at random each cycle, as many as the budget pays: the control for `by_priority`.

    Args:
      always: depths whose slots are always active; the output layer by default.

    Returns:
      The policy.
    """
    always = tuple(always)

    def policy(at: Situation) -> list[frozenset[str]]:
        active = at.at_depths(always)
        others = sorted(set(at.slots.depths) - set(always))
        for depth in at.rng().permutation(others).tolist():
            larger = active | at.at_depths([depth])
            if at.cost(larger) <= at.budget:
                active = larger
        return [active] * at.steps

    return policy


def suffix(k: int) -> Policy:
    """The output layer and the ``k`` layers before it, all along.

    Args:
      k: number of layers, at least 0.

    Returns:
      The policy.
    """
    _check_layers("suffix", k, 0)
    return lambda at: [at.at_depths(range(k + 1))] * at.steps


def lisa(k: int) -> Policy:
    """LISA: input and output layers always, and ``k`` random layers between them each cycle.

    Args:
      k: number of layers, at least 1.

    Returns:
      The policy.

    References:
      LISA (Pan et al., 2024), https://arxiv.org/abs/2403.17919
    """
    _check_layers("lisa", k, 1)

    def policy(at: Situation) -> list[frozenset[str]]:
        deepest = max(at.slots.depths, default=0)
        middle = np.arange(1, deepest)
        drawn = at.rng().choice(middle, size=min(k, len(middle)), replace=False).tolist()
        return [at.at_depths([0, deepest, *drawn])] * at.steps

    return policy


def badam(k: int = 1) -> Policy:
    """BAdam: blocks of ``k`` layers, one block a cycle, from the output to the input and again.

    The output layer is active all along, as a new classifier has to be learned whichever block has
    its turn; the input layer (embeddings) has no turn, as in the paper.

    Args:
      k: layers in a block, at least 1.

    Returns:
      The policy. Use it with ``block_state="reset"``, as the paper does.

    References:
      BAdam (Luo, Yu, Li, 2024), https://arxiv.org/abs/2404.02827
    """
    _check_layers("badam", k, 1)

    def policy(at: Situation) -> list[frozenset[str]]:
        deepest = max(at.slots.depths, default=0)
        middle = list(range(1, max(deepest, 2)))
        blocks = [middle[i : i + k] for i in range(0, len(middle), k)]
        return [at.at_depths([0, *blocks[at.cycle % len(blocks)]])] * at.steps

    return policy


def full() -> Policy:
    """Every slot at every step: ordinary training.

    Returns:
      The policy.
    """
    return lambda at: [at.everything] * at.steps


_POLICIES: dict[str, tuple[Callable[..., Policy], bool]] = {
    "priority": (by_priority, False),
    "random": (at_random, False),
    "suffix": (suffix, True),
    "lisa": (lisa, True),
    "badam": (badam, True),
    "full": (full, False),
}


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
      >>> from priorityprop_jax import Situation, find_slots, make_policy
      >>> slots = find_slots({"layer_0": 1.0, "layer_1": 1.0, "layer_2": 1.0})
      >>> at = Situation(slots, None, 1.0, 1.0, 0, 2, np.zeros(3), np.zeros(3, int))
      >>> [sorted(active) for active in make_policy("suffix(1)")(at)]
      [['layer_1', 'layer_2'], ['layer_1', 'layer_2']]
    """
    if callable(policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a function, got {policy!r}")
    match = re.fullmatch(r"([a-z]+)(?:[:(](\d+)\)?)?", policy)
    if match is None or match[1] not in _POLICIES:
        raise ValueError(
            f"there is no policy {policy!r}; the policies are priority, random, suffix(k), "
            "lisa(k), badam(k) and full"
        )
    make, has_layers = _POLICIES[match[1]]
    if has_layers != (match[2] is not None):
        form = f"{match[1]}(k), k layers" if has_layers else match[1]
        raise ValueError(f"the policy is written {form}, got {policy!r}")
    return make(int(match[2])) if has_layers else make()


def active_sets(
    slots: Slots, allocation: Any, recalc_every: int, spread: str = "nested"
) -> list[frozenset[str]]:
    """The active set of every step of a cycle, from an allocation of `priorityprop`.

    With ``spread="nested"`` the sets shrink from step to step and are few, which is what compiled
    variants of a partial backward pass want.

    Args:
      slots: the slots.
      allocation: ``int[slots]``, updates granted for the cycle, as in `PriorityPropState`.
      recalc_every: steps in the cycle.
      spread: see `repeats`.

    Returns:
      ``recalc_every`` sets of slot names.

    Example:
      >>> from priorityprop_jax import active_sets, find_slots
      >>> slots = find_slots({"a": 1.0, "b": 1.0})
      >>> [sorted(names) for names in active_sets(slots, [3, 1], 3)]
      [['a', 'b'], ['a'], ['a']]
    """
    steps = (np.asarray(repeats(allocation, t, recalc_every, spread)) for t in range(recalc_every))
    return [
        frozenset(name for name, n in zip(slots.names, counts, strict=True) if n > 0)
        for counts in steps
    ]


def _check_layers(name: str, k: Any, least: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < least:
        raise ValueError(f"{name}(k) needs a whole number of layers from {least} on, got {k!r}")
