"""What a step costs, by which slots are active: read off compiled programs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.program import abstract, analysis, has_shape
from priorityprop_jax.core.slots import Slots
from priorityprop_jax.partial.grad import ActiveLeaves, find_active


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What a step costs in one unit: a floor by the deepest active slot, and each slot's own.

    Attributes:
      own: ``[slots]``, what a slot adds to a step whose chain reaches it anyway: its weight
        gradients and, where the optimizer was measured too, its update.
      floors: ``[depths]``, forward pass and chain back to each depth.
      totals: ``[depths]``, a step with all slots up to each depth, as measured. The last is a full
        step.
    """

    own: tuple[float, ...]
    floors: tuple[float, ...]
    totals: tuple[float, ...]

    @property
    def full(self) -> float:
        """A step with all slots."""
        return self.totals[-1]

    def without_prefix(self, forward: Sequence[float]) -> StepCosts:
        """The costs where the outputs of the frozen prefix are cached.

        Args:
          forward: ``[depths]``, the forward pass of everything deeper than each depth.

        Returns:
          The costs with those forward passes left out of floors and totals.
        """
        if len(forward) != len(self.floors):
            raise ValueError(f"{len(forward)} forward costs for {len(self.floors)} depths")
        less = [max(a - b, 0.0) for a, b in zip(self.floors, forward, strict=True)]
        # Not decreasing, as the choice of an active set expects.
        floors = tuple(np.maximum.accumulate(less).tolist())
        totals = [max(a - b, 0.0) for a, b in zip(self.totals, forward, strict=True)]
        return StepCosts(self.own, floors, tuple(totals))


@dataclasses.dataclass(frozen=True)
class Costs:
    """What steps cost: FLOPs, bytes moved, and milliseconds where they were timed.

    Attributes:
      names: the slots, in the order of the vectors over slots.
      flops: floating-point operations.
      bytes: bytes that the compiled program reads and writes.
      milliseconds: wall time on this machine, or None.
    """

    names: tuple[str, ...]
    flops: StepCosts
    bytes: StepCosts
    milliseconds: StepCosts | None = None


def measure_costs(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    slots: Slots,
    *,
    has_aux: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    timed: int = 0,
) -> Costs:
    r"""Measures what a step costs by which slots are active.

    For every depth, the step with all slots up to there is compiled, and for every slot the step
    that reaches one layer further without it: the difference is the slot's own cost, and what is
    left of a step without the slots' own costs is the floor that all slots of that depth share.
    Costs are the compiler's own account of the compiled programs (``compiled.costanalysis()``).
    Only shapes are used: no array is allocated, unless steps are timed.

    Args:
      loss_fn: ``(params, batch) -> loss``, or ``(loss, aux)`` with ``has_aux``.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`.
      slots: the slots of ``params``, see `find_slots`.
      has_aux: as in `jax.value_and_grad`.
      optimizer: an optimizer whose update of the active slots is a part of the step.
      timed: how often to run each depth's step to take its median time; 0 for not at all. Slots
        share the time between two depths as they share its FLOPs.

    Returns:
      The costs.

    Raises:
      ValueError: if ``slots`` has none, or is not of ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax import find_slots, measure_costs
      >>> params = {"Dense_0": jnp.ones((64, 64)), "Dense_1": jnp.ones((64, 64))}
      >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["Dense_0"]) @ p["Dense_1"])
      >>> costs = measure_costs(loss_fn, params, jnp.ones((8, 64)), find_slots(params))
      >>> costs.flops.totals[0] < costs.flops.full
      True
    """
    if not slots.names:
        raise ValueError("there are no slots to measure")
    params, batch = jax.tree.map(abstract, params), jax.tree.map(abstract, batch)
    depths = np.asarray(slots.depths)
    count = int(depths.max()) + 1
    pairs = list(zip(slots.names, depths, strict=True))
    suffixes = [frozenset(name for name, d in pairs if d <= depth) for depth in range(count)]
    # One layer deeper, so that the chain is as long without the slot as with it.
    within = [min(depth + 1, count - 1) for depth in depths]
    without = [suffixes[at] - {name} for at, name in zip(within, slots.names, strict=True)]

    def compile_step(active: frozenset[str]) -> Any:
        chosen = find_active(params, slots, active)
        return _compile(loss_fn, params, batch, chosen, has_aux, optimizer)

    wanted = list(dict.fromkeys([*suffixes, *without]))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = dict(zip(wanted, pool.map(compile_step, wanted), strict=True))
    analyses = {active: analysis(program) for active, program in programs.items()}

    def costs(key: str) -> StepCosts:
        totals = [analyses[active][key] for active in suffixes]
        own = [
            max(totals[at] - analyses[active][key], 0.0)
            for at, active in zip(within, without, strict=True)
        ]
        return _step_costs(own, totals, depths)

    flops = costs("flops")
    milliseconds = None
    if timed:
        milliseconds = _timed([programs[active] for active in suffixes], flops, depths, timed)
    return Costs(tuple(slots.names), flops, costs("bytes accessed"), milliseconds)


def _step_costs(own: Sequence[float], totals: Sequence[float], depths: np.ndarray) -> StepCosts:
    floors = [
        max(total - sum(o for o, d in zip(own, depths, strict=True) if d <= depth), 0.0)
        for depth, total in enumerate(totals)
    ]
    return StepCosts(
        tuple(map(float, own)),
        tuple(np.maximum.accumulate(floors).tolist()),
        tuple(map(float, totals)),
    )


def _compile(
    loss_fn: Any,
    params: Any,
    batch: Any,
    chosen: ActiveLeaves,
    has_aux: bool,
    optimizer: optax.GradientTransformation | None,
) -> Any:
    active, frozen = chosen.split(params)
    state = () if optimizer is None else jax.eval_shape(optimizer.init, chosen.part(params))

    def step(active, state, frozen, batch):
        params = chosen.join(active, frozen)
        part = chosen.part(params)
        value, grads = jax.value_and_grad(
            lambda part: loss_fn(chosen.replace(params, part), batch), has_aux=has_aux
        )(part)
        if optimizer is None:
            return grads, value
        updates, state = optimizer.update(grads, state, part)
        new, _ = chosen.split(chosen.replace(params, optax.apply_updates(part, updates)))
        return new, state, value

    lowered = jax.jit(step, donate_argnums=(0, 1) if optimizer else ()).lower(
        active, state, frozen, batch
    )
    return lowered.compile()


def _timed(
    programs: Sequence[Any],
    flops: StepCosts,
    depths: np.ndarray,
    repeats: int,
) -> StepCosts:
    samples: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats + 1):  # the first round warms up
        for program, times in zip(programs, samples, strict=True):
            arguments = jax.tree.map(
                lambda x: jnp.ones(x.shape, x.dtype), program.args_info[0], is_leaf=has_shape
            )
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times.append(1e3 * (time.perf_counter() - start))
    totals = np.maximum.accumulate([float(np.median(times[1:])) for times in samples])
    steps = np.diff(totals, prepend=0.0)
    flop_steps = np.diff(np.asarray(flops.totals), prepend=0.0)
    own = [
        float(o * steps[depth] / flop_steps[depth]) if flop_steps[depth] > 0 else 0.0
        for o, depth in zip(flops.own, depths, strict=True)
    ]
    return _step_costs(own, totals.tolist(), depths)
