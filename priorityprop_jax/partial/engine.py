"""One training step on a budget of compute: plan, prefix, compiled variant, account."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.layout import bytes_held, layout_of, put_beside, spread
from priorityprop_jax.core.program import Program, abstract, build, program_flops
from priorityprop_jax.core.slots import find_slots
from priorityprop_jax.core.tables import bytes_of
from priorityprop_jax.partial.account import Account, state_bytes
from priorityprop_jax.partial.by_row import ByRow
from priorityprop_jax.partial.costs import StepCosts, costs_of, measure_costs
from priorityprop_jax.partial.grad import find_active, value_and_grad_of
from priorityprop_jax.partial.offload import STATES, ActiveState
from priorityprop_jax.partial.planner import Options, Planner, budget_of
from priorityprop_jax.partial.policies import Policy, is_one_set, make_policy
from priorityprop_jax.partial.prefix import Prefix, shapes_of
from priorityprop_jax.partial.prefix_cache import PrefixCache
from priorityprop_jax.partial.stack import read
from priorityprop_jax.partial.stages import Stages, in_order, slots_of
from priorityprop_jax.partial.update import (
    ActiveUpdatesState,
    expected_gains,
    slots_by,
    update_active,
)
from priorityprop_jax.priority.per_slot import PerSlot
from priorityprop_jax.priority.scores import priority


def step(
    policy: str | Policy = "priority",
    *,
    share: float | None = None,
    flops: float | None = None,
    milliseconds: float | None = None,
    memory: float | str | None = None,
    recalc_every: int = 10,
    costs: StepCosts | None = None,
    max_variants: int = 8,
    state: str = "keep",
    cache: PrefixCache | None = None,
    gain_decay: float = 0.9,
    seed: int = 0,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
) -> Callable[[Any], PartialStep]:
    """Steps that train some slots each, chosen by a policy, and run only their part.

    Each step runs one program compiled for its active set. What is inactive costs nothing, and
    keeps parameters and optimizer state bit for bit.

    The optimizer is put into `update_active`, unless it has one already. There a clip by global
    norm belongs in front of it, and a schedule on the clock of steps behind it:
    ``optax.chain(optax.clip_by_global_norm(1.0), partial.update_active(optax.adamw(1e-3)),
    optax.scale_by_schedule(schedule))``.

    What a policy asks for is what runs. Layers of a `Stack`, or of what the loss gives to `stack`,
    share one program, whichever are active. Every other active set has a program of its own; where
    a policy asks for more than `max_variants` of them, what was not used for longest is compiled
    anew, and a warning tells once.

    Args:
      policy: who is active when: a name that `make_policy` knows, or a function.
      share: the budget: what a step may cost on average, as a share of a full one, in (0, 1]. The
        policies priority and random need a share, `flops`, `milliseconds` or `memory`; suffix,
        lisa, badam and full cost what they cost, and take `memory` alone.
      flops: the same as FLOPs of a step.
      milliseconds: the same as milliseconds of a step, as measured on this machine.
      memory: what no step may exceed: bytes, or a text such as ``"4GiB"``. They are those of one
        device, as the compiler counts them for each program before it runs: parameters, optimizer
        state, batch, and all that a step makes. Within it priority and random train what fits, and
        priority has no steps that score all slots, but tries those whose worth is unknown.
      recalc_every: steps in a cycle, for which the policy plans.
      costs: what steps cost, from `measure_costs`, in the unit of the budget; by default they are
        measured at the first step where there is a budget.
      max_variants: for so many active sets programs are kept.
      state: where the optimizer state of inactive slots is: ``"keep"`` on the device, ``"reset"``
        nowhere, ``"offload"`` in host memory.
      cache: for the outputs of the frozen prefix; needs a model in `Stages`, and batches with the
        inputs ``x`` and the whole numbers ``id``.
      gain_decay: see `update_active`.
      seed: of policies that draw at random.
      stacked_axis: see `find_slots`.
      group: see `find_slots`. By default a slot is a layer: a stage of `Stages`, or leaves whose
        paths say so. With ``lambda path: None`` every leaf is a slot. How deep a slot is, the
        program of the loss tells.

    Returns:
      What a `Trainer` takes as its `step`.

    Raises:
      TypeError, ValueError: an option is of the wrong kind or makes no sense; at the first step, if
        the budget does not pay for the cheapest step; before a step that exceeds `memory`, with
        the bytes that it takes.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import partial
      >>> from priorityprop_jax.training.trainer import Trainer
      >>> params = {"Dense_0": jnp.ones((2, 2)), "Dense_1": jnp.ones(2)}
      >>> loss_fn = lambda p, x: jnp.mean((x @ p["Dense_0"] @ p["Dense_1"] - 1) ** 2)
      >>> trainer = Trainer(params, optax.sgd(0.1), loss_fn, partial.step("suffix(0)"))
      >>> history = trainer.train([jnp.ones((4, 2))] * 3)
      >>> history.updates, bool((trainer.params["Dense_0"] == 1).all())
      ([1, 1, 1], True)
    """
    make_policy(policy)
    memory = bytes_of(memory) if isinstance(memory, str) else memory
    units = {"share": share, "flops": flops, "milliseconds": milliseconds, "memory": memory}
    budget = budget_of(policy, {unit: x for unit, x in units.items() if x is not None}, costs)
    if isinstance(recalc_every, bool) or not isinstance(recalc_every, int | np.integer):
        raise TypeError(f"recalc_every must be a whole number, got {recalc_every!r}")
    if recalc_every < 1:
        raise ValueError(f"recalc_every must be at least 1, got {recalc_every}")
    if isinstance(max_variants, bool) or not isinstance(max_variants, int) or max_variants < 1:
        raise ValueError(f"max_variants must be a whole number of at least 1, got {max_variants!r}")
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
    if cache is not None and not isinstance(cache, PrefixCache):
        raise TypeError(f"cache must be a PrefixCache or None, got {cache!r}")
    update_active(optax.identity(), gain_decay=gain_decay)
    options = Options(
        policy, budget, int(recalc_every), costs, max_variants, state, cache, gain_decay, seed,
        {"stacked_axis": stacked_axis, "group": group},
    )  # fmt: skip
    return lambda setup: PartialStep(setup, options)


class PartialStep:
    """The `Step` that `step` makes of the `Setup` of a trainer; see there."""

    unit = "updates"

    def __init__(self, setup: Any, options: Options) -> None:
        stages = setup.model if isinstance(setup.model, Stages) else None
        if options.cache is not None and stages is None:
            raise ValueError(
                "a prefix cache needs a model in stages, such as nnx_stages([...]): give the "
                "trainer one, or leave the cache out"
            )
        self._loss, self._options = setup.loss, options
        self._loss_of = lambda params, arguments: setup.loss(params, *arguments)
        # Then the program is that of the plain optimizer, bit for bit.
        self._uniform = options.policy == "full" and options.state == "keep"
        self._one_set = is_one_set(options.policy)
        self._shapes = shapes = jax.tree.map(abstract, setup.params)
        where = dict(options.where)
        self._by_stacks = where == {"stacked_axis": None, "group": None}
        if self._by_stacks:
            where = slots_of(getattr(setup.model, "module", None), shapes, stages is not None)
        self._optimizer, self._state, found = _initialized(setup.optimizer, shapes, where)
        if not found:
            wrapped = update_active(setup.optimizer, gain_decay=options.gain_decay, **where)
            self._optimizer, self._state, found = _initialized(wrapped, shapes, where)
        if len(found) > 1:
            raise ValueError(
                f"the optimizer has update_active {len(found)} times; put the parts that it is "
                "around into one, such as optax.multi_transform"
            )
        inner, self._gain_decay, self._where = found[0]
        self.slots = find_slots(shapes, **self._where)
        if stages is not None:
            self.slots = in_order(self.slots, stages.names, shapes)
        self.compile_seconds, self._built = 0.0, 0
        self._programs: dict[Any, dict[Any, Program]] = {}  # those used last come last
        self._evicted: set[Any] = set()
        self._warned = False
        self._by_row = ByRow(functools.partial(self._build, counted=False))
        self._prefix: Any = None
        if stages is not None:
            self._prefix = Prefix(stages, self.slots, options.cache, self._build)
        self._states: Any = None
        if options.state != "keep":
            self._states = ActiveState(inner, shapes, mode=options.state, **self._where)
        self._per_slot = PerSlot(optax.with_extra_args_support(inner), shapes, self.slots)
        self._chosen = functools.cache(functools.partial(find_active, shapes, self.slots))
        self._flops = functools.cache(self._counted)
        self._account = Account(self.slots)
        self._planner = Planner(options, self.slots, self._account)
        self._work: Any = None  # what gradients take, once known
        self._update_flops = 0.0  # of all slots
        self._front: list[float] = []  # FLOPs in front of each depth, of stages
        self._arguments: Any = None  # rest and batch of the first step, as shapes
        self._fit: set[Any] = set()  # active sets and shapes of batches that memory suffices for

    def init(self, params: Any) -> Any:
        """The optimizer state before the first step."""
        with slots_by(**self._where):
            if self._states is None:
                return self._optimizer.init(params)
            empty = lambda state: self._states.empty()  # noqa: E731
            # Compiled, so that what is replaced is not even made.
            return jax.jit(lambda p: _changed(self._optimizer.init(p), empty))(params)

    def lay_out(self, layout: Any) -> None:
        """Every program keeps the layout of what it was compiled for: others are compiled anew."""
        self._programs.clear()
        self._by_row.clear()

    @property
    def saved(self) -> float:
        """The share of a full training's FLOPs that was not spent so far."""
        return self._account.saved

    def check_processes(self) -> None:
        """Raises where several processes cannot run this step together."""
        if self._options.state != "keep" or self._options.cache is not None:
            raise ValueError(
                "several processes share no host memory: leave state as 'keep', and the cache out"
            )

    def report(self, opt_state: Any, seconds: float = 0.0) -> dict[str, Any]:
        """What was spent, in all and by layer, against a training of everything, ready for JSON.

        ``seconds`` of wall time are shared among layers as FLOPs are. ``flops`` are of every
        program run, see `program_flops`, and ``full_flops`` what as many full steps cost.
        """
        state = next(s for s in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(s))
        resident = frozenset(self.slots.names) if self._states is None else self._states.resident
        counts = np.asarray(state.update_counts).tolist()
        held = state_bytes(self._per_slot, state.inner_state, resident)
        return {"programs": self._built, **self._account.report(counts, held, seconds)}

    def __call__(
        self, params: Any, rest: Any, opt_state: Any, batch: Any
    ) -> tuple[Any, Any, Any, dict[str, Any]]:
        """One step, which donates parameters, rest and state; see `Step`."""
        meanwhile: Sequence[Callable[[], None]] = ()
        if self._arguments is None:
            start = time.perf_counter()
            meanwhile = self._prepare(params, rest, opt_state, batch)
            self.compile_seconds += time.perf_counter() - start
        if not self._planner.plan:
            opt_state = _changed(opt_state, self._new_cycle)
        active = self._planner.plan.pop(0)
        if self._states is not None:
            opt_state = _changed(opt_state, lambda s: self._states.move(s, active, params))
        rest, opt_state = put_beside(params, (rest, opt_state))
        before, x, start, forward, cached = rest, None, 0, 0.0, False
        if self._prefix is not None:
            start = self._prefix.start(active)
            upcoming = map(self._prefix.start, self._planner.plan)
            x, rest, forward, cached = self._prefix.enter(params, rest, batch, start, upcoming)
        static, rows = self._by_row.told(self.slots, active)
        chosen = self._by_row.kept(self._chosen(active), rows)
        part, frozen = chosen.split(params)
        leaves, treedef = jax.tree.flatten((batch, x))
        leaves = [_as_array(leaf) for leaf in leaves]
        batch, x = treedef.unflatten(leaves)
        arguments = (part, frozen, rest, opt_state, batch, x, rows)
        shapes = treedef, shapes_of(leaves)
        program = self._compiled(static, start, arguments, shapes, params, meanwhile)
        if self._planner.limit is not None and (active, shapes) not in self._fit:
            beside = max(program.beside, self._prefix.beside if self._prefix is not None else 0)
            if not self._planner.fits(active, bytes_held(arguments) + beside):
                return self(params, before, opt_state, batch)  # as it is planned anew
            self._fit.add((active, shapes))
        part, rest, opt_state, values, updates = program.run(*arguments)
        params = chosen.join(part, frozen)
        if rows:
            params = self._by_row.written(params, updates, rows)
        flops = forward + (self._flops(active, start) if rows else program.flops)
        cost = self._planner.charge(active, flops, cached)
        self._account.charge(active, flops, cost, cached=cached)
        counts = {"updates": len(active), "flops": flops, "cached": int(cached)}
        return params, rest, opt_state, values | counts

    def _program(self, active: frozenset[str], start: int, known: Any) -> Callable[..., Any]:
        """The step of an active set and of layers, ``known`` or else given, as a pure function."""

        def step(part, frozen, rest, opt_state, batch, x, rows):
            rows = known or rows  # for those that are constants less is kept
            chosen = find_active(self._shapes, self.slots, active, rows)
            params = self._by_row.kept(chosen, rows).join(part, frozen)
            entry = {} if x is None else {"x": x, "start": start}
            run = value_and_grad_of(self._loss, chosen, has_aux=True)
            (loss, (metrics, rest)), grads = run(params, rest, batch, **entry)
            # Descent goes along the conjugate of what JAX gives for complex parameters.
            grads = jax.tree.map(jnp.conj, grads)
            updates, opt_state = self._update(grads, opt_state, params, loss)
            part, told = self._by_row.applied(chosen, rows, part, updates)
            return part, rest, opt_state, {"loss": loss, **metrics}, told

        return step

    def _update(self, grads: Any, opt_state: Any, params: Any, loss: Any) -> tuple[Any, Any]:
        """The updates and the new state."""
        with slots_by(**self._where):
            return self._optimizer.update(
                grads, opt_state, params, uniform=self._uniform, value=loss
            )

    def _compiled(
        self,
        active: frozenset[str],
        start: int,
        arguments: Any,
        shapes: Any,
        params: Any,
        meanwhile: Sequence[Callable[[], None]],
    ) -> Program:
        """The program of an active set, but for the numbers of layers told by rows.

        ``shapes`` are those of the batch, which tell all others; ``meanwhile``: see `build`.
        """
        key = active, start, tuple((at, len(rows)) for at, rows in arguments[-1].items())
        programs = self._programs.pop(key, {})
        self._programs[key] = programs
        if len(self._programs) > self._options.max_variants:
            self._evicted.add(out := next(iter(self._programs)))
            del self._programs[out]
        if shapes not in programs:
            if key in self._evicted and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the policy {self._options.policy!r} asks for more than max_variants="
                    f"{self._options.max_variants} active sets, and programs are compiled again "
                    "and again: raise it, or put like blocks into a partial.Stack, whose layers "
                    "share one program",
                    stacklevel=4,
                )
            donate = (0, 2, 3)
            told = self._by_row.layout(params, arguments[-1])
            out = (*(layout_of(arguments[i]) for i in donate), None, told)
            known = arguments[-1] if self._one_set else None
            build = functools.partial(self._build, self._program(active, start, known), arguments)
            programs[shapes] = build(out, donate, meanwhile)
        return programs[shapes]

    def _build(self, *arguments: Any, counted: bool = True) -> Program:
        """`build`, with an account of programs and seconds."""
        program = build(*arguments)
        self._built += counted
        self.compile_seconds += program.seconds
        return program

    def _prepare(
        self, params: Any, rest: Any, opt_state: Any, batch: Any
    ) -> Sequence[Callable[[], None]]:
        """Finds out how deep slots are, and what steps cost; returns what of it may wait.

        By shapes, whatever the layout: a mesh changes no choice but that of memory.
        """
        self._arguments = jax.tree.map(abstract, (rest, batch))
        costs = functools.partial(self._find_costs, params, opt_state, (rest, batch))
        jobs = (self._find_depths, costs)
        waits = self._planner.fixed and self._options.budget is None and self._prefix is None
        now = 2 if not waits else 0 if self._options.policy == "full" else 1
        for job in jobs[:now]:
            job()
        return jobs[now:]

    def _find_depths(self) -> None:
        """How deep slots are, and which stacks are told their active layers by number."""
        self._work, self._by_row.stacks = read(
            self._loss_of, self._shapes, self._arguments, slots=self.slots
        )
        stacked = {bundle.name for bundle in self.slots.bundles if bundle.layers}
        hidden = stacked - {stack.name for stack in self._by_row.stacks}
        if self._by_stacks and hidden:
            warnings.warn(
                f"something stands between the parameters of {min(hidden)} and its partial.Stack, "
                "such as a cast: each active set compiles a program of its own, whose backward "
                "pass is that of the whole stack",
                stacklevel=2,
            )
        if self._prefix is None:  # else the stages tell
            self.slots = dataclasses.replace(self.slots, depths=self._work.depths)
            self._planner.slots = self._account.slots = self.slots

    def _find_costs(self, params: Any, opt_state: Any, given: Any) -> None:
        """What steps cost, of the first step's arguments."""
        options, work, about = self._options, self._work, {"slots": self.slots, "has_aux": True}
        update = jax.make_jaxpr(self._update)
        self._update_flops = sum(self.slots.sizes) + program_flops(
            update(self._shapes, self._state, self._shapes, jnp.zeros(()))
        )
        full_flops = work.cost(range(len(self.slots))) + self._update_flops
        self._account.full_flops = full_flops
        self._account.costs = counted = costs_of(work, self.slots, full_flops)
        if (costs := options.costs) is not None and costs.unit == "flops":
            self._account.costs = costs
        elif costs is None and options.budget is not None:
            costs, unit = counted, options.budget[0]
            if unit == "milliseconds":
                costs = measure_costs(
                    self._loss_of, self._shapes, self._arguments, unit=unit, **about
                )
            elif unit == "memory" and not self._planner.fixed:
                laid = jax.tree.map(_laid_out, (params, given))
                costs = measure_costs(self._loss_of, *laid, unit="bytes", **about)
                costs = self._with_state(costs, opt_state)
        if self._prefix is not None:
            rest, batch = self._arguments
            self._front = self._prefix.flops(self._shapes, rest, batch["x"])
        if costs is not None:
            self._planner.know(costs, self._front if options.cache else None)

    def _with_state(self, costs: StepCosts, opt_state: Any) -> StepCosts:
        """Costs in bytes with those of optimizer state: of all slots, or of the active ones."""
        held, own, per_slot = bytes_held(opt_state), np.array(costs.own), self._per_slot
        for bundle in per_slot.slots.bundles if self._states is not None else ():
            state = [per_slot.state_shapes[i] for i in per_slot.owned(bundle)]
            own[bundle.start : bundle.start + bundle.slots] += bytes_held(state)
        floors = tuple(floor + held for floor in costs.floors)
        return dataclasses.replace(costs, own=tuple(own.tolist()), floors=floors)

    def _counted(self, active: frozenset[str], start: int) -> float:
        """The FLOPs of a step whose program is also that of others."""
        slots = self.slots
        chosen = [i for i, name in enumerate(slots.names) if name in active]
        share = sum(slots.sizes[i] for i in chosen) / max(sum(slots.sizes), 1)
        front = self._front[max(slots.depths[i] for i in chosen)] if start else 0.0
        return self._work.cost(chosen) + self._update_flops * share - front

    def _new_cycle(self, state: ActiveUpdatesState) -> ActiveUpdatesState:
        values = expected_gains(state, self._gain_decay)
        counts = np.asarray(state.update_counts)
        granted = self._planner.new_cycle(values, counts)
        return state._replace(
            allocation=np.asarray(granted, state.allocation.dtype),
            priorities=np.asarray(priority(values, counts, 1.0), state.priorities.dtype),
        )

    def complete(self, opt_state: Any) -> Any:
        """The optimizer state with that of all slots, for a checkpoint."""
        return opt_state if self._states is None else _changed(opt_state, self._states.complete)

    def record(self) -> dict[str, Any]:
        """What a resumed run needs beside the arrays, ready for JSON."""
        return {
            "options": self._options.record,
            "account": self._account.record(),
            "planner": self._planner.record(),
            "prefix": None if self._prefix is None else self._prefix.at,
            "resident": sorted(self._states.resident) if self._states else [],
            "waiting": sorted(self._states.waiting) if self._states else [],
        }

    def restore(self, record: Mapping[str, Any], opt_state: Any) -> Any:
        """The inverse of `record` and `complete`; a ValueError for a run with other options."""
        for name, mine in self._options.record.items():
            if (theirs := record["options"][name]) != mine:
                raise ValueError(
                    f"the checkpoint is of a run with {name} {theirs}, not {mine}: resume with the "
                    "options of partial.step that it was saved with"
                )
        self._account.restore(record["account"])
        self._planner.restore(record["planner"])
        if self._prefix is not None:
            self._prefix.restore(record["prefix"])
        if self._states is None:
            return opt_state
        slots = record["resident"], record["waiting"]
        return _changed(opt_state, lambda state: self._states.restore(state, *slots))


def _is_ours(state: Any) -> bool:
    return isinstance(state, ActiveUpdatesState)


def _changed(opt_state: Any, function: Callable[..., ActiveUpdatesState]) -> Any:
    """An optimizer's state with a function of that of `update_active` in its place."""
    return jax.tree.map(lambda s: function(s) if _is_ours(s) else s, opt_state, is_leaf=_is_ours)


def _initialized(optimizer: Any, params: Any, where: dict[str, Any]) -> tuple[Any, Any, list]:
    """The optimizer with extra arguments, its state's shapes, and what `slots_by` finds in it."""
    optimizer = optax.with_extra_args_support(optimizer)
    with slots_by(**where) as found:
        return optimizer, jax.eval_shape(optimizer.init, params), found


def _laid_out(x: Any) -> Any:
    """Shape and dtype, and the layout on several devices."""
    at = {"sharding": x.sharding} if spread(x) else {}
    return jax.ShapeDtypeStruct(x.shape, x.dtype, **at) if at else abstract(x)


def _as_array(x: Any) -> Any:
    """A leaf of a batch as JAX has it; what a program takes as it is costs no call of JAX."""
    fits = isinstance(x, np.ndarray) and x.dtype == jax.dtypes.canonicalize_dtype(x.dtype)
    return x if fits or isinstance(x, jax.Array) else jnp.asarray(x)
