"""The active set that is worth most for a budget, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from priorityprop_jax.partial.costs import StepCosts


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
    one table from the output inwards solves them all. Costs are rounded up to multiples of
    ``budget / resolution``, so the budget is never exceeded.

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
      >>> from priorityprop_jax.partial.choose import choose_active
      >>> from priorityprop_jax.partial.costs import StepCosts
      >>> costs = StepCosts(own=(1, 1, 1), floors=(2, 4, 6))
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

    order: list[int] = np.argsort(np.asarray(depths, int), kind="stable").tolist()
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
    while n:  # none where the budget pays for nothing
        n -= 1
        if taken[n, room]:
            chosen[order[n]] = True
            room -= units[order[n]]
    return chosen
