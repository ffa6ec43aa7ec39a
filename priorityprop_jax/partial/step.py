"""One training step on a budget of compute: plan, prefix cache, compiled variant, account."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.layout import layout_of, put_beside, spread
from priorityprop_jax.core.program import abstract, program_flops
from priorityprop_jax.core.slots import Slots, by_layer, find_slots
from priorityprop_jax.partial.costs import Costs, StepCosts, measure_costs
from priorityprop_jax.partial.grad import (
    ActiveLeaves,
    find_active,
    value_and_grad_of,
)
from priorityprop_jax.partial.offload import STATES, ActiveState
from priorityprop_jax.partial.policies import Policy, Situation, make_policy, step_cost
from priorityprop_jax.partial.prefix_cache import PrefixCache, fingerprint, rounded
from priorityprop_jax.partial.stages import Stages
from priorityprop_jax.partial.update import ActiveUpdatesState, expected_gains, update_active
from priorityprop_jax.partial.variants import Variants
from priorityprop_jax.priority.per_slot import PerSlot
from priorityprop_jax.priority.scores import priority

# (params, rest, batch, x, start) -> (loss, (metrics, rest)); x enters stage `start`.
Loss = Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]


@dataclasses.dataclass(frozen=True)
class Compute:
    """The options of a training on a budget of compute; see `PriorityPropTrainer`.

    Attributes:
      policy: who is active when: a name that `make_policy` knows, or a function.
      costs: what steps cost, from `measure_costs`; measured at the first step by default. Give one
        unit of them, such as ``costs.milliseconds``, to spend the budget in that unit.
      max_variants: at most so many active sets are compiled.
      block_state: where the optimizer state of inactive slots is: ``"keep"`` on the device,
        ``"reset"`` nowhere, ``"offload"`` in host memory.
      cache: for the outputs of the frozen prefix; needs a model in `Stages`, and batches
        with the inputs ``x`` and the whole numbers ``id``.
      schedule: every update is multiplied by ``schedule(step)``, on the clock of steps.
      clip_norm: the largest global norm of the active gradients together.
      gain_decay: see `update_active`.
      seed: of policies that draw at random.

    Raises:
      TypeError, ValueError: an option is of the wrong kind or makes no sense.

    Example:
      >>> from priorityprop_jax import Compute
      >>> Compute(policy="suffix(2)", block_state="offload").max_variants
      8
    """

    policy: str | Policy = "priority"
    costs: Costs | StepCosts | None = None
    max_variants: int = 8
    block_state: str = "keep"
    cache: PrefixCache | None = None
    schedule: Callable[[jax.Array], jax.typing.ArrayLike] | None = None
    clip_norm: float | None = None
    gain_decay: float = 0.9
    seed: int = 0

    def __post_init__(self):
        make_policy(self.policy)
        if self.costs is not None and not isinstance(self.costs, Costs | StepCosts):
            raise TypeError(f"costs must come from measure_costs, got {self.costs!r}")
        Variants(frozenset(), self.max_variants)
        if self.block_state not in STATES:
            raise ValueError(f"block_state must be one of {STATES}, got {self.block_state!r}")
        if self.cache is not None and not isinstance(self.cache, PrefixCache):
            raise TypeError(f"cache must be a PrefixCache or None, got {self.cache!r}")
        check_updates(self.schedule, self.clip_norm)


def check_updates(schedule: Any, clip_norm: float | None) -> None:
    """Raises where the options of updates make no sense."""
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule must be a function of the step, got {schedule!r}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be finite and above 0, got {clip_norm}")


def check_cycle(recalc_every: Any) -> None:
    """Raises where this can be no number of steps."""
    if isinstance(recalc_every, bool) or not isinstance(recalc_every, int | np.integer):
        raise TypeError(f"recalc_every must be a whole number, got {recalc_every!r}")
    if recalc_every < 1:
        raise ValueError(f"recalc_every must be at least 1, got {recalc_every}")


@dataclasses.dataclass
class _Spent:
    """What the steps with one active set have cost."""

    steps: int = 0
    flops: float = 0.0
    cached: int = 0  # steps that found their prefix in the cache


class BudgetedStep:
    """Runs training steps whose active sets a policy chooses, at the cost that a budget allows.

    Each step runs a program compiled for its active set: loss, gradients of what is active, clip,
    optimizer and application in one, donated. At the start of a cycle the policy is told what it
    may spend: ``total_budget`` for all steps so far and of this cycle, less what has been spent.

    Args:
      loss: ``(params, rest, batch, x, start) -> (loss, (metrics, rest))``, pure.
      params: pytree of parameters; only shapes are read.
      optimizer: the Optax optimizer of the slots.
      compute: the options.
      total_budget: up to 1, the fraction of a full step's cost that a step may cost on average;
        above, the cost of one cycle in FLOPs (or the unit of ``costs``).
      recalc_every: steps in a cycle.
      stages: the model as stages, if it is: ``params`` and ``rest`` are by stage name then.
      stacked_axis: see `find_slots`.
      group: see `find_slots`. By default a slot is a layer: a stage of `Stages`, or leaves that
        share a depth. ``group=lambda path: None`` makes every leaf a slot; measuring the costs of
        many slots takes as many compilations.

    Attributes:
      slots: the slots.
      transformation: `update_active` around the optimizer.
      costs: what steps cost, once known.
      compile_seconds: wall time spent on tracing and compiling so far.
      programs: how many programs have been compiled for steps.

    Raises:
      TypeError, ValueError: an option makes no sense; at the first step, if the budget does not pay
        for the cheapest step.
    """

    def __init__(
        self,
        loss: Loss,
        params: Any,
        optimizer: optax.GradientTransformation,
        compute: Compute,
        total_budget: float,
        recalc_every: int,
        *,
        stages: Stages | None = None,
        stacked_axis: Callable[[str], int | None] | None = None,
        group: Callable[[str], str | None] | None = None,
    ) -> None:
        if isinstance(total_budget, bool) or not isinstance(total_budget, int | float):
            raise TypeError(
                "on a budget of compute total_budget must be a fraction such as 0.4, or FLOPs a "
                f"cycle, got {total_budget!r}"
            )
        if not 0 < total_budget < math.inf:
            raise ValueError(f"total_budget must be finite and above 0, got {total_budget}")
        check_cycle(recalc_every)
        if compute.cache is not None and stages is None:
            raise ValueError(
                "a prefix cache needs a model in stages: give the trainer nnx_stages([...]) or "
                "another of the adapters, or leave the cache out"
            )
        self._loss, self._compute, self._stages = loss, compute, stages
        self._budget, self._cycle_steps = float(total_budget), int(recalc_every)
        self._policy = make_policy(compute.policy)
        # Then the program is that of the plain optimizer, bit for bit.
        self._uniform = compute.policy == "full" and compute.block_state == "keep"
        if group is None and stacked_axis is None:
            group = by_layer(params) if stages is None else lambda path: path.split("/")[0]
        where = {"stacked_axis": stacked_axis, "group": group}
        self.slots = find_slots(params, **where)
        if stages is not None:
            self.slots = _in_order(self.slots, stages.names, params)
        self.transformation = update_active(optimizer, gain_decay=compute.gain_decay, **where)
        self._blocks = None
        if compute.block_state != "keep":
            self._blocks = ActiveState(optimizer, params, mode=compute.block_state, **where)
        self._shapes = jax.tree.map(abstract, params)
        self._per_slot = PerSlot(optax.with_extra_args_support(optimizer), self._shapes, self.slots)
        self._everything = frozenset(self.slots.names)
        self._leaves: dict[frozenset[str], ActiveLeaves] = {}
        self._where = {name: self._stage_of(name) for name in self.slots.names}

        self.costs: StepCosts | None = None
        self._planning: StepCosts | None = None  # the same, less what a cache saves
        self._charged_flops = not isinstance(compute.costs, StepCosts)
        self._variants: Variants[Any] = Variants(
            self._everything, compute.max_variants, self._expected_cost
        )
        self._programs: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.programs = 0
        self._plan: list[frozenset[str]] = []
        self._step = 0
        self._charged = 0.0  # in the unit of the budget
        self._full_flops = 0.0
        self._spent: dict[frozenset[str], _Spent] = {}
        self._cache_at: int | None = None  # the stage in front of which outputs are cached
        self._cache_key: str | None = None
        self._reopen_at: int | None = None  # the same, of the run that this one goes on with
        self._cycles_above = 0  # cycles in a row that would have been served by a later stage

    # What a user can look at.

    def init(self, params: Any) -> ActiveUpdatesState:
        """The optimizer state before the first step."""
        if self._blocks is None:
            state: Any = self.transformation.init(params)
            return state
        return self._blocks.empty()

    @property
    def saved(self) -> float:
        """The share of a full training's FLOPs that was not spent so far."""
        full = self._full_flops * self._step
        return 1 - sum(spent.flops for spent in self._spent.values()) / full if full else 0.0

    def report(self, state: ActiveUpdatesState, seconds: float = 0.0) -> dict[str, Any]:
        """What was spent, in all and by layer, against a training of everything.

        Args:
          state: the optimizer state.
          seconds: wall time of the training, shared among layers as FLOPs are.

        Returns:
          A dict of numbers, lists and strings, ready for JSON: ``steps``, ``flops`` (compiled, of
          every program run), ``full_flops`` (what as many full steps cost), ``share``,
          ``cached_steps``, ``programs``, ``variants`` and ``layers``.
        """
        flops = sum(spent.flops for spent in self._spent.values())
        full = self._full_flops * self._step
        return {
            "steps": self._step,
            "flops": flops,
            "full_flops": full,
            "share": flops / full if full else 1.0,
            "cached_steps": sum(spent.cached for spent in self._spent.values()),
            "programs": self.programs,
            "compile_seconds": self.compile_seconds,
            "variants": [
                {
                    "active": sorted(active),
                    "steps": spent.steps,
                    "flops": spent.flops,
                    "cached_steps": spent.cached,
                }
                for active, spent in self._spent.items()
            ],
            "layers": self._layers(state, flops, seconds),
        }

    def _layers(
        self, state: ActiveUpdatesState, flops: float, seconds: float
    ) -> list[dict[str, Any]]:
        """By layer from the input: updates, and FLOPs as the chain back and the slots' own."""
        counts = np.asarray(state.update_counts)
        own = np.asarray(self.costs.own if self.costs else np.zeros(len(self.slots)))
        floors = self.costs.floors if self.costs else (0.0,) * (max(self.slots.depths) + 1)
        reached = np.zeros(len(floors))
        for active, spent in self._spent.items():
            reached[: self._deepest(active) + 1] += spent.steps
        rows = []
        for depth in reversed(range(len(floors))):
            members = [i for i, d in enumerate(self.slots.depths) if d == depth]
            chain = floors[depth] - (floors[depth - 1] if depth else 0.0)
            backward = float(reached[depth] * chain) if depth else 0.0
            backward += float(sum(own[i] * counts[i] for i in members))
            rows.append(
                {
                    "layer": self.slots.layers[members[0]] if members else str(depth),
                    "depth": depth,
                    "updates": int(sum(counts[i] for i in members)),
                    "flops": backward,
                    "milliseconds": 1e3 * seconds * backward / flops if flops else 0.0,
                    "state_bytes": self._state_bytes(state, members),
                }
            )
        return rows

    def _state_bytes(self, state: ActiveUpdatesState, members: list[int]) -> int:
        """Bytes of optimizer state that these slots have on the device."""
        leaves = self._per_slot.state_treedef.flatten_up_to(state.inner_state)
        total = 0.0
        for bundle in self.slots.bundles:
            mine = [i for i in members if bundle.start <= i < bundle.start + bundle.slots]
            if self._blocks is not None:
                mine = [i for i in mine if self.slots.names[i] in self._blocks.resident]
            for i in self._per_slot.owned(bundle) if mine else ():
                rows = 1 if bundle.layers is None else leaves[i].shape[0]
                total += leaves[i].nbytes * len(mine) / max(rows, 1)
        return int(total)

    # Running.

    def __call__(
        self, params: Any, rest: Any, state: ActiveUpdatesState, batch: Any
    ) -> tuple[Any, Any, ActiveUpdatesState, dict[str, Any]]:
        """Runs one step. The arrays given are donated.

        Args:
          params: the parameters.
          rest: what else the model holds.
          state: the optimizer state.
          batch: pytree of arrays.

        Returns:
          New parameters, rest and state, and a dict: the metrics as arrays on the device, and
          ``updates``, ``flops`` and ``cached`` as numbers.
        """
        if self._planning is None:
            self._measure(rest, batch)
        if not self._plan:
            state = self._new_cycle(state)
        active = self._plan.pop(0)
        if self._blocks is not None:
            state = self._blocks.move(state, active, params)
        rest, state = put_beside(params, (rest, state))
        start = min((self._where[name] for name in active), default=0)
        x, rest, forward, cached = self._enter(params, rest, batch, start)
        batch = jax.tree.map(jnp.asarray, batch)
        chosen = self._chosen(active)
        part, frozen = chosen.split(params)
        arguments = (part, frozen, rest, state, batch, x)
        program, flops = self._variants.program(
            active,
            _key(arguments),
            lambda: self._compile_step(active, start, arguments),
        )
        part, rest, state, values = program(*arguments)
        self._charge(active, start, flops + forward, cached)
        counts = {"updates": len(active), "flops": flops + forward, "cached": int(cached)}
        return chosen.join(part, frozen), rest, state, values | counts

    def _program(self, active: frozenset[str], start: int) -> Callable[..., Any]:
        """The step of one active set, as a pure function."""
        compute = self._compute

        def step(part, frozen, rest, state, batch, x):
            chosen = self._chosen(active)
            params = chosen.join(part, frozen)
            (loss, (metrics, rest)), grads = value_and_grad_of(self._loss, chosen, has_aux=True)(
                params, rest, batch, x, start
            )
            # Descent goes along the conjugate of what JAX gives for complex parameters.
            grads = jax.tree.map(jnp.conj, grads)
            if compute.clip_norm is not None:
                clip = optax.clip_by_global_norm(compute.clip_norm)
                grads, _ = clip.update(grads, clip.init(params))
            now = state.step
            updates, state = self.transformation.update(
                grads, state, params, active=active, uniform=self._uniform, value=loss
            )
            if compute.schedule is not None:
                scale = compute.schedule(now)
                updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
            params = optax.apply_updates(params, updates)
            return chosen.split(params)[0], rest, state, {"loss": loss, **metrics}

        return step

    def _compile_step(
        self, active: frozenset[str], start: int, arguments: Any
    ) -> tuple[Any, float]:
        donate = (0, 2, 3)
        out = (*(layout_of(arguments[i]) for i in donate), None)
        return self._compile(self._program(active, start), arguments, out, donate)

    def _compile(
        self, function: Any, arguments: Any, out: Any, donate: tuple[int, ...] = ()
    ) -> tuple[Any, float]:
        """The program and its FLOPs; ``out``: see `layout_of`."""
        start = time.perf_counter()
        jitted = jax.jit(function, donate_argnums=donate, out_shardings=out)
        program = counted = jitted.lower(*arguments).compile()
        if any(spread(x) for x in jax.tree.leaves(arguments)):
            # The compiler counts the FLOPs of one device of several.
            shapes = jax.tree.map(abstract, arguments)
            counted = jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
        self.compile_seconds += time.perf_counter() - start
        self.programs += 1
        return program, program_flops(counted)

    # The prefix.

    def _enter(
        self, params: Any, rest: Any, batch: Any, start: int
    ) -> tuple[Any, Any, float, bool]:
        """What enters stage ``start``, the state behind it, FLOPs spent, whether it was cached."""
        if self._stages is None:
            return (), rest, 0.0, False
        x = jax.tree.map(jnp.asarray, batch["x"])
        if start == 0:
            self._cache_at = self._reopen_at = None  # every stage changes
            return x, rest, 0.0, False
        cache = self._compute.cache
        begin, flops = 0, 0.0
        if cache is None:
            x, rest, flops = self._forward(params, rest, x, 0, start)
            return x, rest, flops, False
        ids = _ids(batch)
        inputs = jax.tree.map(np.asarray, batch["x"])
        at = self._open_cache(params, rest, x, start)
        found = cache.lookup(ids, inputs)
        if found is None:
            x, rest, flops = self._forward(params, rest, x, 0, at, round_to=cache.dtype)
            cache.store(ids, inputs, jax.device_get(x))
        else:
            x, begin = jax.tree.map(jnp.asarray, found), at
        if start > at:
            x, rest, more = self._forward(params, rest, x, at, start)
            flops += more
        return x, rest, flops, begin > 0

    def _forward(
        self, params: Any, rest: Any, x: Any, begin: int, stop: int, round_to: str | None = None
    ) -> tuple[Any, Any, float]:
        """Runs frozen stages forward; state that they change, such as random streams, moves on."""
        stages: Any = self._stages
        names = stages.names[begin:stop]
        arguments = (
            {name: params[name] for name in names},
            {name: rest[name] for name in names},
            x,
        )

        def forward(some_params, some_rest, x):
            y, after = stages.run(
                {**stages.params, **some_params}, {**stages.state, **some_rest}, x,
                start=begin, stop=stop,
            )  # fmt: skip
            if round_to is not None:
                y = rounded(y, round_to)
            return y, {name: after[name] for name in names}

        key = (begin, stop, round_to, _key(arguments))
        if key not in self._programs:
            out = (None, layout_of(arguments[1]))
            self._programs[key] = self._compile(forward, arguments, out)
        program, flops = self._programs[key]
        y, changed = program(*arguments)
        return y, {**rest, **changed}, flops

    def _open_cache(self, params: Any, rest: Any, x: Any, start: int) -> int:
        """Makes the cache that of the present prefix; returns the stage that it enters."""
        cache, stages = self._compute.cache, self._stages
        assert cache is not None and stages is not None
        if self._cache_at is not None and cache.key != self._cache_key:
            # Closed meanwhile, or opened by another trainer.
            self._cache_at, self._reopen_at = None, self._cache_at
        if self._cache_at is not None and self._cache_at <= start:
            return self._cache_at
        upcoming = [min((self._where[n] for n in s), default=0) for s in self._plan]
        at = min([start, *(stage for stage in upcoming if stage > 0)])
        if self._reopen_at is not None and self._reopen_at <= start:
            # Outputs are rounded where they are cached, so it has to be the same place.
            at = self._reopen_at
        self._reopen_at = None
        shapes = jax.tree.map(abstract, (params, rest, x))
        stages.check_pure(*shapes, stop=at)
        names = stages.names[:at]
        prefix = ([params[name] for name in names], [rest[name] for name in names])
        outputs, _ = jax.eval_shape(lambda p, r, x: stages.run(p, r, x, stop=at), *shapes)
        like = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), outputs)
        self._cache_key = fingerprint(prefix, *names)
        cache.open(self._cache_key, like)
        self._cache_at = at
        return at

    # Planning and charging.

    def _measure(self, rest: Any, batch: Any) -> None:
        started, before = time.perf_counter(), self.compile_seconds
        inputs = () if self._stages is None else batch["x"]
        measured = self._compute.costs

        def loss(params, arguments):
            return self._loss(params, *arguments, start=0)

        # As on one device, whatever the layout: a mesh must not change what is chosen.
        arguments = jax.tree.map(abstract, (rest, batch, inputs))
        if measured is None:
            measured = measure_costs(loss, self._shapes, arguments, self.slots, has_aux=True)
        unit = measured.flops if isinstance(measured, Costs) else measured
        if len(unit.own) != len(self.slots) or len(unit.floors) <= max(self.slots.depths):
            raise ValueError(
                f"costs are of {len(unit.own)} slots and {len(unit.floors)} depths, but the model "
                f"has {len(self.slots)} slots; measure them for these slots"
            )
        self.costs = self._planning = unit
        state = jax.tree.map(abstract, jax.eval_shape(self.transformation.init, self._shapes))
        chosen = self._chosen(self._everything)
        full = (*chosen.split(self._shapes), arguments[0], state, *arguments[1:])
        _, self._full_flops = self._variants.program(
            self._everything,
            _key(full),
            lambda: self._compile_step(self._everything, 0, full),
        )
        if self._compute.cache is not None:
            flops = measured.flops.full if isinstance(measured, Costs) else self._full_flops
            forward = self._prefix_flops(arguments[0], arguments[2], len(unit.floors))
            self._planning = unit.without_prefix([f * unit.full / flops for f in forward])
        self._check_budget()
        # All of it once, the programs compiled here included.
        self.compile_seconds = before + time.perf_counter() - started

    def _check_budget(self) -> None:
        """Raises where even the cheapest step of a policy that spends the budget is too dear."""
        if self._compute.policy not in ("priority", "random"):
            return
        pairs = zip(self.slots.names, self.slots.depths, strict=True)
        head = frozenset(name for name, depth in pairs if depth == 0)
        cheapest, allowed = self._expected_cost(head), self._allowance()
        if allowed < cheapest:
            share = cheapest / self._full()
            raise ValueError(
                f"total_budget={self._budget:g} allows a step {allowed:.4g}, but the cheapest, "
                f"with the output layer alone, costs {cheapest:.4g}, {share:.0%} of a full one: "
                "raise total_budget, or save the forward pass of a frozen prefix with Stages and "
                "a PrefixCache"
            )

    def _full(self) -> float:
        """A full step's cost, in the unit of the budget."""
        assert self.costs is not None
        return self._full_flops if self._charged_flops else self.costs.full

    def _allowance(self) -> float:
        """What a step may cost on average, in the unit of the budget."""
        if self._budget > 1:
            return self._budget / self._cycle_steps
        return self._budget * self._full()

    def _prefix_flops(self, rest: Any, x: Any, depths: int) -> list[float]:
        """FLOPs of the forward pass of all stages in front of each depth."""
        stages: Any = self._stages
        depth_stage = {
            depth: self._where[name]
            for name, depth in zip(self.slots.names, self.slots.depths, strict=True)
        }
        forward = []
        for depth in range(depths):
            stop = depth_stage.get(depth, 0)
            run = jax.jit(lambda p, r, x, stop=stop: stages.run(p, r, x, stop=stop)[0])
            lowered = run.lower(self._shapes, rest, x)
            forward.append(program_flops(lowered.compile()) if stop else 0.0)
        return forward

    def _new_cycle(self, state: ActiveUpdatesState) -> ActiveUpdatesState:
        assert self._planning is not None and self.costs is not None
        cycle, steps = self._step // self._cycle_steps, self._cycle_steps
        allowed = self._allowance() * (self._step + steps) - self._charged
        values = expected_gains(state, self._compute.gain_decay)
        counts = np.asarray(state.update_counts)
        situation = Situation(
            self.slots, self._planning, allowed / steps, self._full(), cycle, steps, values,
            counts, self._compute.seed,
        )  # fmt: skip
        wanted = [frozenset(names) for names in self._policy(situation)]
        unknown = frozenset().union(*wanted) - self._everything
        if unknown or len(wanted) != steps or not all(wanted):
            raise ValueError(
                f"the policy must give {steps} sets of slots that are not empty; got "
                + (f"the unknown slot {min(unknown)!r}" if unknown else f"{len(wanted)} sets")
            )
        self._plan = self._variants.plan(wanted)
        self._move_cache()
        granted = [sum(name in names for names in self._plan) for name in self.slots.names]
        worth = priority(values, counts, 1.0)
        return state._replace(
            allocation=_like(granted, state.allocation), priorities=_like(worth, state.priorities)
        )

    def _move_cache(self) -> None:
        """Gives the cache up where a later stage would serve this cycle, and served the last.

        What froze since is then cached too. One such cycle alone may be followed by another that
        needs the earlier stage.
        """
        starts = [min(self._where[name] for name in names) for names in self._plan]
        at = self._reopen_at if self._cache_at is None else self._cache_at
        if at is None or not min(starts) > at:
            self._cycles_above = 0
            return
        self._cycles_above += 1
        if self._cycles_above > 1:
            self._cache_at, self._reopen_at, self._cycles_above = None, None, 0

    def _charge(self, active: frozenset[str], start: int, flops: float, cached: bool) -> None:
        self._step += 1
        spent = self._spent.setdefault(active, _Spent())
        spent.steps, spent.cached = spent.steps + 1, spent.cached + cached
        spent.flops += flops
        if self._cache_at is not None and start < self._cache_at:
            self._cache_at = None
        self._charged += flops if self._charged_flops else self._expected_cost(active)

    def _expected_cost(self, active: frozenset[str]) -> float:
        if self._planning is None:
            return float(len(active))
        return step_cost(self.slots, self._planning, active)

    def _chosen(self, active: frozenset[str]) -> ActiveLeaves:
        """The leaves of an active set, looked up once rather than at every step."""
        if active not in self._leaves:
            self._leaves[active] = find_active(self._shapes, self.slots, active)
        return self._leaves[active]

    def _deepest(self, active: frozenset[str]) -> int:
        pairs = zip(self.slots.names, self.slots.depths, strict=True)
        return max((depth for name, depth in pairs if name in active), default=0)

    def _stage_of(self, name: str) -> int:
        if self._stages is None:
            return 0
        leaf = min(self.slots.leaves({name}))
        return self._stages.names.index(leaf.split("/")[0])

    # Checkpoints.

    def complete(self, state: ActiveUpdatesState) -> ActiveUpdatesState:
        """The optimizer state with that of all slots, for a checkpoint."""
        return state if self._blocks is None else self._blocks.complete(state)

    def record(self) -> dict[str, Any]:
        """What a resumed run needs beside the arrays, ready for JSON."""
        return {
            "step": self._step,
            "charged": self._charged,
            "full_flops": self._full_flops,
            "costs": None if self.costs is None else dataclasses.asdict(self.costs),
            "plan": [sorted(names) for names in self._plan],
            "variants": [sorted(names) for names in self._variants.sets],
            "spent": [
                {"active": sorted(names), **dataclasses.asdict(spent)}
                for names, spent in self._spent.items()
            ],
            "cycles_above": self._cycles_above,
            "cache_at": self._reopen_at if self._cache_at is None else self._cache_at,
            "resident": sorted(self._blocks.resident) if self._blocks else [],
            "waiting": sorted(self._blocks.waiting) if self._blocks else [],
        }

    def restore(self, record: Mapping[str, Any], state: ActiveUpdatesState) -> ActiveUpdatesState:
        """The inverse of `record` and `complete`.

        Args:
          record: what `record` gave.
          state: what `complete` gave.

        Returns:
          The optimizer state to go on with.
        """
        self._step, self._charged = record["step"], record["charged"]
        self._plan = [frozenset(names) for names in record["plan"]]
        self._variants.sets = [frozenset(names) for names in record["variants"]]
        self._spent = {
            frozenset(row["active"]): _Spent(row["steps"], row["flops"], row["cached"])
            for row in record["spent"]
        }
        if record.get("costs"):
            # For a report where no step is left to run; the next step measures anew.
            self._full_flops = record["full_flops"]
            self.costs = StepCosts(**{name: tuple(c) for name, c in record["costs"].items()})
        self._cache_at, self._reopen_at = None, record["cache_at"]
        self._cycles_above = record["cycles_above"]
        if self._blocks is None:
            return state
        return self._blocks.restore(state, record["resident"], record["waiting"])


def _in_order(slots: Slots, names: tuple[str, ...], params: Any) -> Slots:
    """Slots whose layers are the stages: what is known need not be read from paths."""
    trained = [name for name in names if jax.tree.leaves(params[name])]
    layers = []
    for slot in slots.names:
        stages = {leaf.split("/")[0] for leaf in slots.leaves({slot})}
        if len(stages) > 1:
            raise ValueError(f"slot {slot!r} spans the stages {sorted(stages)}; group within one")
        layers.append(stages.pop())
    depths = tuple(len(trained) - 1 - trained.index(layer) for layer in layers)
    return dataclasses.replace(slots, layers=tuple(layers), depths=depths)


def _key(arguments: Any) -> Any:
    """Tells arguments apart that need a program of their own."""
    leaves, treedef = jax.tree.flatten(arguments)
    several = jax.device_count() > 1
    return treedef, tuple(
        (np.shape(x), x.dtype, x.sharding if several and spread(x) else None) for x in leaves
    )


def _ids(batch: Any) -> np.ndarray:
    if not isinstance(batch, Mapping) or "id" not in batch:
        raise ValueError(
            'a prefix cache needs to know the examples: give batches an array "id", one whole '
            "number for each example"
        )
    return np.asarray(batch["id"])


def _like(values: Any, reference: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(values, reference.dtype), reference.sharding)
