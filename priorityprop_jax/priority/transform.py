"""The Optax transformations that spend a budget of updates by priority, and their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from priorityprop_jax.core.fragile import laid_out, spec_of
from priorityprop_jax.core.rows import Frozen, beside, densify
from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.priority.allocation import allocate, repeats
from priorityprop_jax.priority.apply import Work
from priorityprop_jax.priority.ledger import find_state
from priorityprop_jax.priority.one_slot import frozen_slots
from priorityprop_jax.priority.options import DEFAULT_BUDGET, Budget, Options, times
from priorityprop_jax.priority.per_slot import PerSlot
from priorityprop_jax.priority.scores import (
    Look,
    Magnitude,
    Score,
    cost_vector,
    depth_factors,
    gain,
    magnitude,
    measure,
    precision,
    score,
)  # fmt: skip


class PriorityPropState(NamedTuple):
    """State of `priorityprop` and `scale_by_priority`. All vectors are over slots.

    What is learnt about a slot lives in vectors rather than in a tree shaped like the parameters:
    a tree of scalars would inherit each parameter's sharding in `flax.nnx`.
    """

    step: jax.Array  # int32[], steps taken.
    cycle_step: jax.Array  # int32[], the place in the cycle; 0 scores and allocates.
    inner_state: optax.OptState  # as the inner optimizer's, its counts one a slot.
    update_counts: jax.Array  # int32[slots], updates that each slot has had.
    magnitudes: jax.Array  # float[slots], average before bias correction; float64 if a leaf is.
    score_counts: jax.Array  # int32[slots], how often each slot has been scored.
    priorities: jax.Array  # float[slots], of this cycle.
    allocation: jax.Array  # int32[slots], updates granted for this cycle.
    nonfinite_counts: jax.Array  # int32[slots], NaN or infinite magnitudes seen.
    clamped_cycles: jax.Array  # int32[], cycles whose budget was infeasible and was clamped.


def priorityprop(
    inner: optax.GradientTransformation,
    total_budget: Budget = DEFAULT_BUDGET,
    min_updates: jax.typing.ArrayLike = 1,
    max_updates: jax.typing.ArrayLike = 20,
    recalc_every: jax.typing.ArrayLike = 10,
    *,
    spread: str = "even",
    magnitude: Magnitude = "mean",
    magnitude_decay: jax.typing.ArrayLike = 0.0,
    depth_base: float | jax.Array = 1.1,
    depth_factor: Callable[[str], float] | None = None,
    costs: Mapping[str, float] | None = None,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
    score: Score = "priorityprop",
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that each slot gets updates in proportion to its priority.

    Every ``recalc_every`` steps (a cycle) each slot, by default a leaf, is scored,

    .. math:: s_i = m_i \cdot \frac{1}{c_i} \cdot d_i,

    with ``m_i`` the magnitude of its gradient, ``c_i`` the updates that it has had (from 1) and
    ``d_i`` its depth factor, and ``total_budget`` whole updates are handed out in proportion
    (see `allocate`) and spread over the steps of the cycle (see `repeats`).

    A slot that gets several updates at a step has the inner optimizer run that often on the same
    gradient, each time from the parameters and the state that the last one left. A slot that gets
    none keeps its parameters **and its inner state** bit for bit, which zeroing its gradient would
    not do: momentum would go on moving it. The inner state is the inner optimizer's, but with a
    step count for every slot, so that bias correction is right for each. Learning-rate schedules
    inside ``inner`` therefore run on the slot's own count; for one on the clock of steps, chain
    `optax.scale_by_learning_rate` behind this transformation. What no update changes, such as a
    rate by `optax.inject_hyperparams`, is one value. Each update is a part of the inner optimizer's
    on all parameters: masks, labels and random numbers are those of the whole tree, and the layers
    of a stack draw numbers of their own. Where it needs other slots' gradients it sees those of one
    slot: put what must see all, such as `optax.clip_by_global_norm`, in front. A slot that
    `optax.set_to_zero` freezes by a label or a mask takes no part of the budget.

    With ``min_updates = max_updates = recalc_every`` and the full budget it is the inner optimizer.

    Gradients may be absent: a leaf that is ``None`` or left out keeps its slot's last magnitude,
    state and count. Its update is a `Frozen`, which `optax.apply_updates` leaves in place. (What
    demands updates of the gradients' structure, as `optax.apply_if_finite` around this does, must
    be given a `Frozen` instead.)

    Args:
      inner: any Optax optimizer.
      total_budget: updates to hand out in one cycle: an int; a float, as a fraction of the full
        budget (``recalc_every`` times the number of slots); a schedule, a function of the step that
        returns either; or None, the full budget. Traceable. PriorityProp's 100 is meant for ten
        slots; left out, it becomes ten updates a slot, within the two bounds that follow.
      min_updates: the least updates of a slot in a cycle; 0 is allowed. Traceable.
      max_updates: the most updates of a slot in a cycle. Traceable; no slot is ever updated twice
        at one step where it is a Python int of at most ``recalc_every``. What works number by
        number, as Adam, then costs as by itself, or less; else slots are looped over.
      recalc_every: steps in a cycle, at most 46,340. Traceable.
      spread: ``"even"`` or ``"nested"``, see `repeats`.
      magnitude: ``"mean"`` of ``|g|``, ``"sum"``, ``"rms"``, ``"norm"``, or ``"gain"``: the
        first-order decrease ``|<g, u>|`` that the inner update promises (one more inner update a
        cycle); or a function of the list of a slot's gradients that returns a scalar.
      magnitude_decay: decay of an exponential moving average of the magnitude over cycles, with
        bias correction; 0 keeps the last magnitude only. Traceable.
      depth_base: ``d_i = depth_base ** depth_i`` with depth 0 at the output layer, see
        `find_slots`; 1 switches the factor off.
      depth_factor: given a slot's name, its ``d_i``; replaces ``depth_base``.
      costs: relative price of one update by slot name; turns priority into priority per cost.
      stacked_axis: see `find_slots`.
      group: see `find_slots`.
      score: what is shared in proportion to: ``"priorityprop"``, the formula above; ``"gain"`` (see
        ``magnitude``); ``"change"`` of the magnitude since the last cycle; ``"random"``;
        ``"robin"``, in turn; ``"uniform"``; or a function of a `Look` that returns a number that is
        not negative for every slot.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `PriorityPropState`. Extra
      arguments of ``update`` are handed on to ``inner``.

    Raises:
      ValueError: for options that make no sense, at once; for a budget that the number of slots
        makes infeasible, when the transformation is initialised. Traced budgets are clamped
        instead, and counted in ``clamped_cycles``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import priorityprop
      >>> params = {"Dense_0": jnp.ones((2, 3)), "Dense_1": jnp.ones((3, 1))}
      >>> tx = priorityprop(optax.adam(1e-3), total_budget=0.5)
      >>> state = tx.init(params)
      >>> grads = {"Dense_0": jnp.full((2, 3), 0.2), "Dense_1": jnp.full((3, 1), 0.1)}
      >>> updates, state = tx.update(grads, state, params)
      >>> state.allocation  # 10 of 20 updates: the larger gradient gets the most
      Array([7, 3], dtype=int32)

    References:
      PriorityProp 0.1.0 by Omur Bera Isik, https://pypi.org/project/priorityprop/
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}")
    inner = optax.with_extra_args_support(inner)
    options = Options(
        total_budget, min_updates, max_updates, recalc_every, spread, magnitude, magnitude_decay,
        depth_base, depth_factor, costs, stacked_axis, group, score,
    )  # fmt: skip
    options.check(extra=("gain",))

    def spend(options, slots, tree, grads, state, params, extra_args):
        per_slot = PerSlot(inner, tree, slots)
        parameters = None if params is None else per_slot.flatten(params)
        inner_state = per_slot.state_leaves(state.inner_state)
        work = Work(per_slot, list(grads), inner_state, parameters, extra_args)
        if options.is_full() and len(slots) and not per_slot.stack_axis:
            state, counts = _plan(options, slots, grads, state, work.measure)
            new_updates, inner_state = work.apply_plain(counts)
        else:
            frozen = work.leave_out_frozen()
            state, counts = _plan(options, slots, work.grads, state, work.measure, frozen)
            new_updates, inner_state = work.apply(counts, at_most_one=options.at_most_one())
            pairs = zip(new_updates, grads, strict=True)
            new_updates = [
                jnp.zeros_like(g) if u is None and g is not None else u for u, g in pairs
            ]
        return new_updates, state._replace(inner_state=inner_state)

    def first_state(slots, params):
        per_slot = PerSlot(inner, params, slots)
        options.check_feasible(len(slots) - frozen_slots(per_slot))
        return per_slot.init(params)

    return _transformation(options, first_state, spend)


def scale_by_priority(
    total_budget: Budget = DEFAULT_BUDGET,
    min_updates: jax.typing.ArrayLike = 1,
    max_updates: jax.typing.ArrayLike = 20,
    recalc_every: jax.typing.ArrayLike = 10,
    *,
    spread: str = "even",
    magnitude: Magnitude = "mean",
    magnitude_decay: jax.typing.ArrayLike = 0.0,
    depth_base: float | jax.Array = 1.1,
    depth_factor: Callable[[str], float] | None = None,
    costs: Mapping[str, float] | None = None,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
    score: Score = "priorityprop",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each slot's update by the number of updates that its priority earns at this step.

    The chainable piece of `priorityprop`: the same scores, allocation and schedule, and
    ``u_i * r_i(t)`` in place of ``r_i(t)`` runs of an optimizer.

    Put it **after** an optimizer: it then scales what the optimizer made. Put before one it scales
    the gradient, which an optimizer that is invariant to the gradient's scale, such as Adam, mostly
    cancels. Either way an optimizer in the chain goes on updating its own state for every slot at
    every step; `priorityprop` does not.

    The options are those of `priorityprop`, but for the magnitude and the score ``"gain"``, which
    need an inner optimizer and are refused. Magnitudes are those of the incoming updates.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `PriorityPropState`.

    Raises:
      ValueError: as `priorityprop`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import scale_by_priority
      >>> params = {"Dense_0": jnp.ones(2), "Dense_1": jnp.ones(2)}
      >>> tx = optax.chain(optax.sgd(1.0), scale_by_priority(40, max_updates=30))
      >>> state = tx.init(params)
      >>> grads = {"Dense_0": jnp.full(2, 3.0), "Dense_1": jnp.full(2, 2.0)}
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["Dense_0"].tolist(), state[1].allocation.tolist()
      ([-6.0, -6.0], [25, 15])
    """
    options = Options(
        total_budget, min_updates, max_updates, recalc_every, spread, magnitude, magnitude_decay,
        depth_base, depth_factor, costs, stacked_axis, group, score,
    )  # fmt: skip
    options.check()

    def spend(options, slots, tree, leaves, state, params, extra_args):
        plain = lambda fn: measure(slots, fn, leaves, parameters)  # noqa: E731
        parameters = None if params is None else jax.tree.leaves(params)
        state, counts = _plan(options, slots, leaves, state, plain)
        if options.is_full():
            return leaves, state
        scaled = list(leaves)
        for bundle in slots.bundles:
            times = counts[bundle.start : bundle.start + bundle.slots]
            for leaf, axis in zip(bundle.leaves, bundle.axes, strict=True):
                if leaves[leaf] is not None:
                    scaled[leaf] = _times(leaves[leaf], times, axis)
        return scaled, state

    def first_state(slots, params):
        options.check_feasible(len(slots))
        return optax.EmptyState()

    return _transformation(options, first_state, spend)


def inner_state(opt_state: Any, inner: optax.GradientTransformation, params: Any) -> Any:
    """The inner optimizer's state as it knows it, for functions that read it.

    What every slot has its own of, as step counts and hyperparameters, is that of the slot with the
    most updates (the first of them).

    Args:
      opt_state: an optimizer state with one `PriorityPropState` in it.
      inner: the optimizer that `priorityprop` was given.
      params: the parameters.

    Raises:
      ValueError: if there is no such state, or it does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import priorityprop
      >>> from priorityprop_jax.priority import inner_state
      >>> params = {"Dense_0": jnp.ones((2, 3)), "Dense_1": jnp.ones((3, 1))}
      >>> inner = optax.contrib.schedule_free_sgd(0.1)
      >>> state = priorityprop(inner).init(params)
      >>> own = inner_state(state, inner, params)
      >>> optax.contrib.schedule_free_eval_params(own, params)["Dense_1"].shape
      (3, 1)
    """
    state = find_state(opt_state)
    per_slot = PerSlot(optax.with_extra_args_support(inner), params, find_slots(params))
    leaves = per_slot.state_leaves(state.inner_state)
    most = jnp.argmax(state.update_counts)
    for i in per_slot.shared:
        leaves[i] = leaves[i][most]
    return per_slot.state_treedef.unflatten(leaves)


def _transformation(
    options: Options, first_state: Callable[..., Any], spend: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of the slots: its first inner state, and what it does at a step."""

    def init_fn(params):
        slots = options.slots(params)
        wide = precision(jax.tree.leaves(params))
        return _new_state(slots, wide, first_state(slots, params))

    def update_fn(updates, state, params=None, **extra_args):
        tree = updates if params is None else params
        slots = options.slots(tree)
        if state.update_counts.shape != (len(slots),):
            raise ValueError(
                f"the state was made for {state.update_counts.shape[0]} slots, the parameters have "
                f"{len(slots)}; gradients that are absent need params to be given to update"
            )
        grads = densify(beside(updates, tree))
        # What is an array, and may lie on a mesh, goes in as an argument.
        given, structure = jax.tree.flatten((vars(options), extra_args))
        arrays = {i: x for i, x in enumerate(given) if isinstance(x, jax.Array)}

        def run(arrays, grads, state, params):
            given_now = [arrays.get(i, x) for i, x in enumerate(given)]
            known, extra = structure.unflatten(given_now)
            return spend(Options(**known), slots, tree, grads, state, params, extra)

        specs = lambda arrays, *like: jax.tree.map(spec_of, like[:2])  # noqa: E731
        new, state = laid_out(run, specs)(arrays, grads, state, params)
        absent = None if params is None else Frozen()
        new = [absent if grad is None else u for u, grad in zip(new, grads, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(tree), new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _times(update: jax.Array, times: jax.Array, axis: int | None) -> jax.Array:
    update = jnp.asarray(update)
    times = times.reshape([times.size if place == axis else 1 for place in range(update.ndim)])
    # A slot without an update gets zeros even where its update is NaN.
    return jnp.where(times == 0, jnp.zeros_like(update), update * times.astype(update.dtype))


def _new_state(slots: Slots, wide: Any, inner_state: Any) -> PriorityPropState:
    """The state before the first step."""
    # Arrays of their own: a step that is compiled in place donates each of them.
    number = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    whole = lambda: jnp.zeros(len(slots), jnp.int32)  # noqa: E731
    real = lambda: jnp.zeros(len(slots), wide)  # noqa: E731
    return PriorityPropState(
        step=number(), cycle_step=number(), inner_state=inner_state, update_counts=whole(),
        magnitudes=real(), score_counts=whole(), priorities=real(), allocation=whole(),
        nonfinite_counts=whole(), clamped_cycles=number(),
    )  # fmt: skip


def _present(slots: Slots, leaves: Sequence[Any]) -> np.ndarray:
    """Which slots have a gradient. Static: ``bool[slots]``."""
    present = np.zeros(len(slots), bool)
    for bundle in slots.bundles:
        absent = [leaves[leaf] is None for leaf in bundle.leaves]
        if any(absent) and not all(absent):
            raise ValueError(
                f"some leaves of slot {bundle.name!r} have gradients and some have none; "
                "a slot's gradients are present or absent together"
            )
        present[bundle.start : bundle.start + bundle.slots] = not all(absent)
    return present


def _plan(
    options: Options,
    slots: Slots,
    grads: list[Any],
    state: PriorityPropState,
    measured: Callable[[Callable[..., Any]], jax.Array],
    frozen: Any = False,
) -> tuple[PriorityPropState, jax.Array]:
    """Scores and allocates where a cycle starts; ``frozen`` slots, ``bool[slots]``, get nothing.

    Returns the state after the step, but for the inner one, and ``r(t)``: int32[slots].
    """
    present = _present(slots, grads)
    options.check_present(slots, present | frozen)
    sharing = np.flatnonzero(~np.broadcast_to(frozen, present.shape))
    factors = depth_factors(slots, options.depth_base, options.depth_factor)
    costs = 1.0 if options.costs is None else cost_vector(slots, options.costs)
    wide = state.magnitudes.dtype
    decay = jnp.asarray(options.magnitude_decay, wide)

    def recalculate(state):
        kind = options.magnitude
        if kind == "gain":
            fresh = measured(lambda grads, params, updates: gain(grads, updates))
        else:
            fresh = measure(slots, lambda grads, *_: magnitude(grads, kind), grads)
        fresh = fresh.astype(wide)
        finite = jnp.isfinite(fresh)
        mean = decay * state.magnitudes + (1 - decay) * jnp.where(finite, fresh, 0.0)
        mean = jnp.where(present, mean, state.magnitudes)
        score_counts = state.score_counts + present.astype(np.int32)
        weight = 1 - decay ** score_counts.astype(wide)
        unbiased = jnp.where(score_counts > 0, mean / jnp.where(weight > 0, weight, 1), 0.0)
        look = Look(
            slots, state.step, state.update_counts, factors, costs, state.magnitudes,
            measured, weigh=lambda: unbiased,
        )  # fmt: skip
        priorities = score(look, options.score).astype(wide)

        budget = options.total_budget
        budget = jnp.asarray(budget(state.step)) if callable(budget) else budget
        budget = jnp.asarray(options.budget(budget, len(sharing)), jnp.int32)
        least = jnp.asarray(times(options.min_updates, len(sharing)), jnp.int32)
        own = priorities if len(sharing) == len(slots) else priorities[sharing]
        if options.is_full():
            allocation = jnp.full(len(sharing), options.max_updates, jnp.int32)
        else:
            allocation = allocate(own, budget, options.min_updates, options.max_updates)
        if len(sharing) < len(slots):
            allocation = jnp.zeros(len(slots), jnp.int32).at[sharing].set(allocation)
        clamped = (budget < least) | (jnp.sum(allocation) < budget)
        nonfinite = state.nonfinite_counts + (present & ~finite).astype(jnp.int32)
        return state._replace(
            magnitudes=mean, score_counts=score_counts, priorities=priorities,
            allocation=allocation, nonfinite_counts=nonfinite,
            clamped_cycles=state.clamped_cycles + clamped.astype(jnp.int32),
        )  # fmt: skip

    # The inner state has no part in this; keep it out, lest the branch copy it.
    light = state._replace(inner_state=())
    light = lax.cond(state.cycle_step == 0, recalculate, lambda state: state, light)
    counts = repeats(light.allocation, light.cycle_step, options.recalc_every, options.spread)
    counts = counts * present.astype(np.int32)
    following = state.cycle_step + 1
    state = light._replace(
        step=optax.safe_increment(state.step),
        cycle_step=jnp.where(following >= options.recalc_every, 0, following).astype(jnp.int32),
        inner_state=state.inner_state,
        update_counts=state.update_counts + counts,
    )
    return state, counts
