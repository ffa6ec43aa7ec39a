"""What a step costs, by which slots are active."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.layout import bytes_held
from priorityprop_jax.core.program import abstract, bytes_beside
from priorityprop_jax.core.slots import Slots
from priorityprop_jax.core.timing import medians
from priorityprop_jax.core.work import Work, read_loss
from priorityprop_jax.partial.grad import find_active, value_and_grad_of


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What a step costs in one unit: ``floors[depth of the deepest active slot] + sum(own)``.

    The chain back to a layer is paid once, whoever uses it.

    Attributes:
      own: ``[slots]``, what a slot adds to a step whose chain reaches it anyway: its weight
        gradients.
      floors: ``[depths]``, forward pass and chain back to each depth, not decreasing.
      unit: ``"flops"``, ``"milliseconds"`` or ``"bytes"``.

    Example:
      >>> from priorityprop_jax import find_slots
      >>> from priorityprop_jax.partial.costs import StepCosts
      >>> costs = StepCosts(own=(2.0, 1.0), floors=(3.0, 5.0))
      >>> slots = find_slots({"Dense_0": 1.0, "Dense_1": 1.0})
      >>> costs.of(slots, ["Dense_1"]), costs.of(slots, ["Dense_0"]), costs.full
      (4.0, 7.0, 8.0)
    """

    own: tuple[float, ...]
    floors: tuple[float, ...]
    unit: str = "flops"

    @property
    def full(self) -> float:
        """A step with all slots."""
        return float(self.floors[-1] + sum(self.own))

    def of(self, slots: Slots, active: Iterable[str]) -> float:
        """A step with these active slots; with none, the cheapest floor."""
        active = frozenset(active)
        chosen = [i for i, name in enumerate(slots.names) if name in active]
        deepest = max((slots.depths[i] for i in chosen), default=0)
        return float(self.floors[deepest] + sum(self.own[i] for i in chosen))

    def without_prefix(self, forward: Sequence[float]) -> StepCosts:
        """Less the forward pass of what is deeper than each depth: ``forward``, ``[depths]``."""
        less = [max(a - b, 0.0) for a, b in zip(self.floors, forward, strict=True)]
        # Not decreasing, as the choice of an active set expects.
        return dataclasses.replace(self, floors=tuple(np.maximum.accumulate(less).tolist()))


def measure_costs(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    slots: Slots,
    *,
    unit: str = "flops",
    has_aux: bool = False,
    repeats: int = 5,
) -> StepCosts:
    """Measures what a step costs by which slots are active, without its optimizer.

    FLOPs are read from one trace of the loss (see `program_flops`), and nothing is compiled: a
    slot's own cost is the work that its gradient alone needs, and what is left of a step with all
    slots up to a depth is the floor that they share. Milliseconds are the median of runs on this
    machine; slots share the time between two depths as they share its FLOPs. Bytes are what a
    compiled program takes at its peak on one device, its arguments included; a slot's own are its
    gradient's. Only shapes are read.

    Args:
      loss_fn: ``(params, batch) -> loss``, or ``(loss, aux)`` with ``has_aux``.
      params: pytree of arrays or `jax.ShapeDtypeStruct`, as is ``batch``.
      batch: what the loss is given.
      slots: the slots of ``params``, see `find_slots`, with the depths that `read_loss` gives.
      unit: ``"flops"``, ``"milliseconds"`` or ``"bytes"``.
      has_aux: as in `jax.value_and_grad`.
      repeats: how often to run a step to time it.

    Returns:
      The costs.

    Raises:
      ValueError: if ``unit`` is another one, or ``slots`` has none, or is not of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import find_slots
      >>> from priorityprop_jax.partial.costs import measure_costs
      >>> params = {"Dense_0": jnp.ones((64, 64)), "Dense_1": jnp.ones((64, 64))}
      >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["Dense_0"]) @ p["Dense_1"])
      >>> slots = find_slots(params)
      >>> costs = measure_costs(loss_fn, params, jnp.ones((8, 64)), slots)
      >>> costs.of(slots, ["Dense_1"]) < costs.full
      True
    """
    if unit not in ("flops", "milliseconds", "bytes"):
        raise ValueError(f"unit must be flops, milliseconds or bytes, got {unit!r}")
    if not slots.names:
        raise ValueError("there are no slots to measure")
    params, batch = jax.tree.map(abstract, (params, batch))
    find_active(params, slots, slots.names)  # raises for slots of other parameters
    costs = costs_of(read_loss(loss_fn, params, batch, slots=slots, has_aux=has_aux), slots)
    if unit == "flops":
        return costs
    pairs = list(zip(slots.names, slots.depths, strict=True))
    upto = [[name for name, d in pairs if d <= depth] for depth in range(len(costs.floors))]
    totals = [costs.of(slots, active) for active in upto]
    # Of many depths some are compiled; those between them lie between them as their FLOPs do.
    run = np.unique(np.linspace(0, len(upto) - 1, 4).astype(int))
    programs = []
    for depth in run:
        chosen = find_active(params, slots, upto[depth])
        step = value_and_grad_of(loss_fn, chosen, has_aux=has_aux)
        programs.append(jax.jit(step).lower(params, batch).compile())
    if unit == "bytes":
        held, leaves = bytes_held((params, batch)), jax.tree.leaves(params)
        peaks = np.maximum.accumulate([held + bytes_beside(program) for program in programs])
        peaks = np.interp(totals, np.take(totals, run), peaks).tolist()
        own = [0.0] * len(slots)
        for bundle in slots.bundles:
            each = bytes_held([leaves[leaf] for leaf in bundle.leaves]) / max(bundle.slots, 1)
            own[bundle.start : bundle.start + bundle.slots] = [each] * bundle.slots
        return _costs(peaks, own, slots, unit)
    arguments = jax.tree.map(_ones, (params, batch))
    runs = [lambda run=run: jax.block_until_ready(run(*arguments)) for run in programs]
    times = 1e3 * np.array(medians(runs, 0.0, warm=1, least=repeats, most=repeats))
    times = np.interp(totals, np.take(totals, run), np.maximum.accumulate(times)).tolist()
    rate = np.diff(times, prepend=0.0) / np.maximum(np.diff(totals, prepend=0.0), 1.0)
    own = [cost * rate[depth] for cost, depth in zip(costs.own, slots.depths, strict=True)]
    return _costs(times, own, slots, unit)


def costs_of(work: Work, slots: Slots, full: float = 0.0) -> StepCosts:
    """What steps cost in FLOPs; what a full one has beyond ``work``, slots share by their sizes."""
    rate = max(full - work.cost(range(len(slots))), 0.0) / max(sum(slots.sizes), 1)
    own = [work.own(i) for i in range(len(slots))]
    upto = [
        [i for i, at in enumerate(slots.depths) if at <= depth]
        for depth in range(max(slots.depths, default=0) + 1)
    ]
    costs = _costs([work.cost(chosen) for chosen in upto], own, slots, "flops")
    own = [cost + rate * size for cost, size in zip(own, slots.sizes, strict=True)]
    return dataclasses.replace(costs, own=tuple(own))


def _costs(totals: Sequence[float], own: Sequence[float], slots: Slots, unit: str) -> StepCosts:
    """Costs from those of all slots up to each depth."""
    floors = [
        max(total - sum(o for o, d in zip(own, slots.depths, strict=True) if d <= depth), 0.0)
        for depth, total in enumerate(totals)
    ]
    floors = np.maximum.accumulate(floors).tolist()
    return StepCosts(tuple(map(float, own)), tuple(floors), unit)


def _ones(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.ones(x.shape, x.dtype)
