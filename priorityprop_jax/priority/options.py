"""What a budget of updates is made with, checked, and worked out for a number of slots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.selection import decimal
from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.priority.allocation import check_spread
from priorityprop_jax.priority.scores import Magnitude, Score, check_magnitude, check_score

Budget = int | float | jax.Array | Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike] | None


class _ForTenSlots(int):
    """A budget that nobody has asked for: it is meant for ten slots and grows with their number."""


DEFAULT_BUDGET = _ForTenSlots(100)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `priorityprop` and `scale_by_priority`; documented there."""

    total_budget: Any
    min_updates: Any
    max_updates: Any
    recalc_every: Any
    spread: str
    magnitude: Magnitude
    magnitude_decay: Any
    depth_base: Any
    depth_factor: Callable[[str], float] | None
    costs: Mapping[str, float] | None
    stacked_axis: Callable[[str], int | None] | None
    group: Callable[[str], str | None] | None
    score: Score

    def check(self, extra: Sequence[str] = ()) -> None:
        """Raises for what is wrong whatever the parameters are.

        ``extra`` are magnitudes and scores that need an inner optimizer, where there is one.
        """
        check_spread(self.spread)
        check_magnitude(self.magnitude, extra)
        check_score(self.score, extra)
        bounds = {"min_updates": (0, 2**31 - 1), "max_updates": (1, 2**31 - 1)}
        bounds["recalc_every"] = (1, 46_340)
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, float | bool):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if _is_static(value) and not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most:,}, got {value}")
        if _is_static(self.min_updates, self.max_updates) and self.min_updates > self.max_updates:
            raise ValueError(
                f"min_updates={self.min_updates} is more than max_updates={self.max_updates}"
            )
        if _is_static(self.magnitude_decay) and not 0 <= self.magnitude_decay < 1:
            raise ValueError(f"magnitude_decay must be in [0, 1), got {self.magnitude_decay}")
        if _is_static(self.depth_base) and not 0 < self.depth_base < float("inf"):
            raise ValueError(f"depth_base must be finite and above 0, got {self.depth_base}")
        budget = self.total_budget
        if isinstance(budget, bool | str):
            raise TypeError(f"total_budget must be an int, a float or a schedule, got {budget!r}")
        if _is_static(budget) and not 0 <= budget < 2**31:
            raise ValueError(f"total_budget must be at least 0 and below 2**31, got {budget}")
        if budget is None and _is_static(self.max_updates, self.recalc_every):
            if not self.min_updates <= self.recalc_every <= self.max_updates:
                raise ValueError(
                    f"the full budget gives every slot recalc_every={self.recalc_every} updates, "
                    f"outside min_updates={self.min_updates} to max_updates={self.max_updates}"
                )

    def slots(self, params: Any) -> Slots:
        """The slots of parameters."""
        return find_slots(params, stacked_axis=self.stacked_axis, group=self.group)

    def at_most_one(self) -> bool:
        """Whether no slot can be updated twice at one step, whatever the budget."""
        known = _is_static(self.max_updates, self.recalc_every)
        return known and self.max_updates <= self.recalc_every

    def is_full(self) -> bool:
        """Whether every slot is known to get one update at every step: ordinary training."""
        numbers = (self.min_updates, self.max_updates, self.recalc_every)
        return _is_static(*numbers) and len(set(numbers)) == 1

    def check_present(self, slots: Slots, present: np.ndarray) -> None:
        """Raises a ValueError where a gradient is absent though every slot gets every update."""
        if self.is_full() and not present.all():
            absent = slots.names[int(np.argmin(present))]
            raise ValueError(
                f"min_updates = max_updates = recalc_every = {self.recalc_every} updates every "
                f"slot at every step, but the gradient of {absent!r} is absent; lower min_updates"
            )

    def check_feasible(self, slots: int) -> None:
        """Raises a ValueError where the number of slots makes a static budget infeasible."""
        if _is_static(self.min_updates) and slots * int(self.min_updates) >= 2**31:
            raise ValueError(
                f"min_updates={self.min_updates} for each of {slots} slots are "
                "2**31 updates a cycle or more: lower min_updates"
            )
        known = self.total_budget is None or _is_static(self.total_budget)
        known = known and _is_static(self.min_updates, self.max_updates, self.recalc_every)
        if not (known and slots):
            return
        budget = self.budget(self.total_budget, slots)
        low, high = self.min_updates, self.max_updates
        least, most = slots * low, slots * high
        if max(budget, least) >= 2**31:
            raise ValueError(f"a cycle can hand out less than 2**31 updates, not {budget}")
        if least <= budget <= most:
            return
        if budget < least:
            why = f"min_updates={low} need {least}: raise total_budget, lower min_updates"
        else:
            why = f"max_updates={high} can take {most}: lower total_budget, raise max_updates"
        raise ValueError(
            f"total_budget={self.total_budget} is {budget} updates a cycle, but {slots} slots "
            f"with {why}, give the budget as a fraction, such as 0.5, or leave total_budget out: "
            "the default fits every number of slots"
        )

    def budget(self, budget: Any, slots: int) -> Any:
        """A budget in updates a cycle: a Python int where all is static, else an int32 scalar."""
        if budget is None:
            return self.recalc_every * slots
        if isinstance(budget, _ForTenSlots):
            wanted = int(budget) * slots // 10
            least, most = times(self.min_updates, slots), times(self.max_updates, slots)
            if _is_static(least, most):
                return int(min(max(wanted, least), most))
            return jnp.clip(jnp.int32(wanted), least, most).astype(jnp.int32)
        if _is_static(budget, self.recalc_every):
            if isinstance(budget, int | np.integer):
                return int(budget)
            return math.floor(decimal(budget) * int(self.recalc_every) * slots + Fraction(1, 2))
        budget = jnp.asarray(budget)
        if jnp.issubdtype(budget.dtype, jnp.floating):
            full = jnp.asarray(self.recalc_every * slots, budget.dtype)
            budget = jnp.floor(budget * full + 0.5)
            budget = jnp.where(jnp.isnan(budget), 0, jnp.clip(budget, 0, 2**30))
        return budget.astype(jnp.int32)


def times(updates: Any, slots: int) -> Any:
    """``updates * slots``; of traced ones as much of it as an int32 holds."""
    if _is_static(updates):
        return int(updates) * slots
    return jnp.minimum(updates, (2**31 - 1) // max(slots, 1)) * slots


def _is_static(*values: Any) -> bool:
    return all(isinstance(value, int | float | np.integer | np.floating) for value in values)
