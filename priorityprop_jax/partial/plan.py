"""What a step would cost that trains some layers only, before anyone trains."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from priorityprop_jax.core.layout import bytes_held, layout_of
from priorityprop_jax.core.modules import first, pure_loss
from priorityprop_jax.core.program import build, bytes_beside, program_flops
from priorityprop_jax.core.rows import is_row_sparse
from priorityprop_jax.core.slots import Bundle, Slots, find_slots
from priorityprop_jax.core.tables import aligned, bytes_of, mebibytes, short
from priorityprop_jax.core.timing import medians
from priorityprop_jax.core.work import Work
from priorityprop_jax.partial.by_row import ByRow
from priorityprop_jax.partial.grad import Names, choose, find_active, value_and_grad_of
from priorityprop_jax.partial.policies import Situation, is_one_set, make_policy
from priorityprop_jax.partial.stack import read, unrolled
from priorityprop_jax.partial.stages import Stages, in_order, slots_of

_PATIENCE = 5.0  # seconds of measuring
LEGEND = (
    "suffix(k): the output layer and k layers before it; cached: what the others give is kept\n"
    "~: not run, but on the line between two that were, as layers are alike"
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one step costs that trains some layers."""

    name: str  # of the policy, as `make_policy` takes it, and what else is special
    parameters: int  # that are trained
    flops: float  # see `measure_costs`
    share: float  # of a full step's FLOPs
    milliseconds: float | None  # measured; None where it was not run, for want of memory
    peak_bytes: int  # arguments, what the program has beside them, and its new results
    state_bytes: int  # of optimizer state
    fits: bool  # keeps to the limits given
    measured: bool = True  # else it is on the line between two that were


@dataclasses.dataclass(frozen=True)
class Plan:
    """The choices, the full step first, and the limits that were given; ``str`` is a table."""

    choices: tuple[Choice, ...]
    memory: float | None = None  # bytes
    milliseconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        limited = self.memory is not None or self.milliseconds is not None
        heads = ("", "trained", "FLOPs", "of full", "ms", "peak memory", "optimizer")
        rows: list[tuple[str, ...]] = [(*heads, "fits") if limited else heads]
        for c in self.choices:
            mark = "" if c.measured else "~"
            ms = "-" if c.milliseconds is None else f"{mark}{c.milliseconds:,.1f}"
            peak, state = (f"{mebibytes(n):,.1f} MiB" for n in (c.peak_bytes, c.state_bytes))
            counts = (short(c.parameters), short(c.flops), f"{c.share:.0%}")
            row = (c.name, *counts, ms, mark + peak, state)
            rows.append((*row, "yes" if c.fits else "no") if limited else row)
        return "\n".join(line.rstrip() for line in aligned(rows))

    def plot(self, path: str | Path) -> Path:
        """Draws milliseconds and peak memory of each choice, the full step's as a line.

        What does not fit is pale. Needs matplotlib (the extra ``demo``).
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        choices = self.choices
        figure = Figure(figsize=(9, 1.4 + 0.3 * len(choices)), layout="constrained")
        FigureCanvasAgg(figure)
        memory = None if self.memory is None else mebibytes(self.memory)
        panels = [
            ("milliseconds a step", [c.milliseconds or 0 for c in choices], self.milliseconds),
            ("peak memory, MiB", [mebibytes(c.peak_bytes) for c in choices], memory),
        ]
        colors = ["#0072B2" if c.fits else "#B3CDE0" for c in choices]
        for axes, (label, values, limit) in zip(
            figure.subplots(1, 2, sharey=True), panels, strict=True
        ):
            bars = axes.barh([c.name for c in choices], values, color=colors)
            texts = [f"{value:,.4g}" if value else "not run" for value in values]
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.bar_label(bars, texts, padding=3, fontsize=8, bbox=white)
            if values[0]:
                axes.axvline(values[0], color="black", linewidth=0.8, linestyle="--", label="full")
            if limit is not None:
                axes.axvline(limit, color="#D55E00", linewidth=1.5, label="limit")
            axes.set(xlabel=label, xlim=(0, 1.2 * max(*values, limit or 0)))
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower right", frameon=False, fontsize=8)
        figure.axes[0].invert_yaxis()
        pale = "" if all(c.fits for c in choices) else " (pale: does not fit)"
        figure.suptitle(f"What a step costs, by what is trained{pale}\n{LEGEND}", fontsize=10)
        figure.savefig(path, dpi=130)
        return Path(path)


def plan(
    model: Any,
    loss_fn: Callable[[Any, Any], Any],
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    memory: float | str | None = None,
    milliseconds: float | None = None,
    beside: Mapping[str, tuple[Any, Any]] | None = None,
    repeats: int = 5,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
) -> Plan:
    """What each choice of layers to train would cost, on this model and this machine.

    The choices are ``full``; ``suffix(k)``, the largest of which leaves out the input layer (the
    embedding of a language model) alone; ``lisa(2)``; ``badam(1)`` at the turn of the first layer
    that has one; and of `Stages`, ``suffix(k)`` in the last half with the outputs of the frozen
    prefix cached, whose look-up is not timed. Each is compiled and run as a loop of one's own
    would: gradients by `value_and_grad`, and optimizer state of what is trained alone, as with
    `freeze`, and with the states ``"reset"`` and ``"offload"`` of `step`.

    Of layers that are alike, in shapes and FLOPs, the first and the last k are run, and what those
    between cost is on the line from one to the other. Of others there are at most six k.

    Args:
      model: a pytree of parameters, an `nnx.Module`, or `Stages`. It stays as it is.
      loss_fn: ``(model, batch) -> loss`` or ``(loss, metrics)``.
      batch: an example, a pytree of arrays; of `Stages`, with the inputs ``x``.
      optimizer: any Optax optimizer.
      memory: bytes that a step may take, or a text such as ``"4GiB"``; by default what the device
        says it has. What takes more is not run.
      milliseconds: what a step may take.
      beside: other models to compare with by name, all of which is trained, each with a batch: the
        model with LoRA, or its last blocks on what those below make of a batch.
      repeats: how often each is timed, in turns, after one run to warm up; where a turn takes
        longer than five seconds, that one run counts.
      stacked_axis: see `find_slots`.
      group: see `find_slots`. By default a slot is a layer: a stage, or leaves that share a depth.

    Returns:
      The `Plan`. Memory is one device's, as the compiler counts it.

    Raises:
      ValueError: there are no parameters, or a limit or ``repeats`` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import partial
      >>> params = {f"Dense_{i}": jnp.ones((8, 8)) for i in range(3)}
      >>> def loss_fn(params, x):
      ...     for i in range(3):
      ...         x = jnp.tanh(x @ params[f"Dense_{i}"])
      ...     return x.mean()
      >>> found = partial.plan(params, loss_fn, jnp.ones((4, 8)), optax.adam(1e-3), repeats=1)
      >>> [choice.name for choice in found.choices]
      ['full', 'suffix(0)', 'suffix(1), all but Dense_0']
      >>> found.choices[1].state_bytes  # two moments of 8 x 8 float32, and a count
      516
    """
    memory = bytes_of(memory) if isinstance(memory, str) else memory
    limits = {"memory": memory, "milliseconds": milliseconds, "repeats": repeats}
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    loss, params, rest = _pure(model, loss_fn)
    if not jax.tree.leaves(params):
        raise ValueError("the model has no parameters to train")
    params, rest, batch = jax.tree.map(jnp.asarray, (params, rest, batch))
    if memory is None:  # what the device has, where it says so
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    stages = model if isinstance(model, Stages) else None
    where = {"stacked_axis": stacked_axis, "group": group}
    if stacked_axis is group is None:
        where = slots_of(model, params, stages is not None)
    slots, tx = find_slots(params, **where), optax.with_extra_args_support(optimizer)
    work, stacks = read(loss, params, rest, batch, None, 0, slots=slots)
    if stages is None:
        slots = dataclasses.replace(slots, depths=work.depths)
    else:
        slots = in_order(slots, stages.names, params)

    def candidate(asked):
        x = None
        if stages is not None and asked.start:
            x = _enters(stages, params, rest, batch, asked.start)
        from_there = functools.partial(loss, start=asked.start)
        of = slots, asked.active, stacks, is_one_set(asked.name.split(",")[0])
        return _Candidate(from_there, *of, tx, params, rest, batch, x)

    def other(model, example):
        loss, *arrays = _pure(model, loss_fn)
        arrays = jax.tree.map(jnp.asarray, (*arrays, example, None))
        slots, loss = find_slots(arrays[0]), functools.partial(loss, start=0)
        return _Candidate(loss, slots, slots.names, None, True, tx, *arrays)

    cached = stages if isinstance(batch, Mapping) and "x" in batch else None
    choices = {asked.name: asked for asked in _choices(slots, work, cached)}
    jobs = {name: functools.partial(candidate, asked) for name, asked in choices.items()
            if asked.between is None}  # fmt: skip
    jobs |= {name: functools.partial(other, *pair) for name, pair in (beside or {}).items()}
    found = _compiled(jobs)
    most = math.inf if memory is None else memory
    for low, high in {asked.between[:2] for asked in choices.values() if asked.between}:
        # Where the upper end does not fit, the last that does takes its place.
        peaks = found[low].peak_bytes, found[high].peak_bytes
        inside = {name: a.between[2] for name, a in choices.items()
                  if a.between and a.between[:2] == (low, high)}  # fmt: skip
        inside = {n: at for n, at in inside.items() if _on_line(at, *peaks) <= most < peaks[1]}
        for end in list(inside)[-1:]:
            found |= _compiled({end: functools.partial(candidate, choices[end])})
            for name, at in inside.items():
                between = None if name == end else (low, end, at / inside[end])
                choices[name] = choices[name]._replace(between=between)
    run = {name: c for name, c in found.items() if c.peak_bytes <= most}
    runs, given = ([getattr(c, part) for c in run.values()] for part in ("run", "arguments"))
    times = medians(runs, _PATIENCE, given=given, warm=1, least=0, most=repeats)
    milliseconds_of = {name: 1e3 * seconds for name, seconds in zip(run, times, strict=True)}
    told = {name: (c.count, c.flops, milliseconds_of.get(name), c.peak_bytes, c.state_bytes)
            for name, c in found.items()}  # fmt: skip
    full, rows = found["full"].flops, []
    for name in dict.fromkeys((*choices, *found)):
        between = choices[name].between if name in choices else None
        if between is None:
            count, flops, ms, *sizes = told[name]
        else:
            pairs = zip(told[between[0]], told[between[1]], strict=True)
            count, flops, ms, *sizes = (_on_line(between[2], *pair) for pair in pairs)
        fits = ms is not None and (milliseconds is None or ms <= milliseconds)
        peak, state = map(round, sizes)
        measured = between is None
        rows.append(
            Choice(name, round(count), flops, flops / full, ms, peak, state, fits, measured)
        )
    return Plan(tuple(rows), memory, milliseconds)


def _pure(model: Any, loss_fn: Any) -> tuple[Callable[..., Any], Any, Any]:
    """A pure ``(params, rest, batch, x, start) -> (loss, rest)``, parameters and rest.

    Stage ``start`` is given ``x``, where that is not None.
    """

    def of_tree(params, rest, batch, x, start):
        return first(loss_fn(params, batch)), rest

    def of_stages(params, rest, batch, x, start):
        states = []

        def forward(inputs):
            entry = (inputs, 0) if x is None else (x, start)
            y, state = model.run(params, rest, entry[0], start=entry[1])
            states.append(state)
            return y

        return first(loss_fn(forward, batch)), states[-1]

    if isinstance(model, Stages):
        return of_stages, model.params, model.state
    if not isinstance(model, nnx.Module):
        return of_tree, model, {}
    loss, params, rest = pure_loss(model, loss_fn)
    return lambda params, rest, batch, x, start: loss(params, rest, batch), params, rest


class _Asked(NamedTuple):
    """A choice, before it is compiled."""

    name: str
    active: frozenset[str]
    start: int = 0  # the stage that a step begins at
    between: tuple[str, str, float] | None = None  # two others, and where between them


def _choices(slots: Slots, work: Work, cached: Stages | None) -> list[_Asked]:
    """All choices, with those on the outputs of a frozen prefix in ``cached``."""
    deepest, zeros = max(slots.depths), np.zeros(len(slots))
    layers = zip(slots.layers, slots.depths, strict=True)
    input_layer = ", ".join(sorted({layer for layer, depth in layers if depth == deepest}))

    def asked(policy: str, cycle: int = 0) -> frozenset[str]:
        at = Situation(slots, None, math.inf, math.inf, cycle, 1, zeros, zeros.astype(int))
        return make_policy(policy)(at)[0]

    ends, others = _ends(slots, work)
    suffixes = {}
    for k in sorted({*ends, *others}):
        last = f", all but {input_layer}" if k == deepest - 1 and k else ""
        suffixes[k] = _Asked(f"suffix({k}){last}", asked(f"suffix({k})"))
    found = [
        _Asked("full", asked("full")),
        *_between(suffixes, ends),
        _Asked("lisa(2)", asked("lisa(2)")),
        _Asked("badam(1), dearest turn", asked("badam(1)", max(deepest - 2, 0))),
    ]
    # Of few layers several choices are the same, and the first name is enough.
    names: dict[frozenset[str], _Asked] = {}
    for choice in found:
        names.setdefault(choice.active, choice)
    found = list(names.values())
    if cached is not None:
        first = {s: cached.names.index(at) for s, at in zip(slots.names, slots.layers, strict=True)}
        starts = {k: min(first[slot] for slot in a.active) for k, a in suffixes.items()}
        # Of the last half, which has most to gain
        group = {k: _Asked(f"{a.name}, cached", a.active, starts[k]) for k, a in suffixes.items()
                 if 2 * starts[k] >= len(cached)}  # fmt: skip
        found += _between(group, ends)
    return found


def _ends(slots: Slots, work: Work) -> tuple[list[int], list[int]]:
    """The k of which ``suffix(k)`` is run, and those on lines between: layers there are alike."""
    last = max(max(slots.depths) - 1, 0)
    at = [[i for i, depth in enumerate(slots.depths) if depth <= k] for k in range(last + 1)]
    flops = [work.cost(chosen) for chosen in at]
    kinds = [
        sorted(slots.shapes[i] for i in at[k] if slots.depths[i] == k) for k in range(last + 1)
    ]

    def straight(k: int) -> bool:
        before, after = flops[k] - flops[k - 1], flops[k + 1] - flops[k]
        alike = kinds[k - 1] == kinds[k] == kinds[k + 1]
        return alike and math.isclose(before, after, rel_tol=0.01)

    others = [k for k in range(1, last) if straight(k)]
    ends = [k for k in range(last + 1) if k not in others]
    if len(ends) > 6:
        return [ends[i] for i in np.linspace(0, len(ends) - 1, 6).round().astype(int)], []
    return ends, others


def _between(group: dict[int, _Asked], ends: list[int]) -> list[_Asked]:
    """Choices by k: those that are no ends, between two that are, or the last."""
    run = sorted({*ends, *list(group)[-1:]} & group.keys())
    found = []
    for k, asked in group.items():
        if k not in run:
            low, high = max(i for i in run if i < k), min(i for i in run if i > k)
            where = (k - low) / (high - low)
            asked = asked._replace(between=(group[low].name, group[high].name, where))
        found.append(asked)
    return found


def _enters(stages: Stages, params: Any, rest: Any, batch: Any, start: int) -> Any:
    """Something like what enters a stage; what it costs to go on from there is the same."""
    run = functools.partial(stages.run, stop=start)
    like, _ = jax.eval_shape(run, params, rest, batch["x"])
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)


class _Candidate:
    """A choice, traced, and after `compile` ready to run.

    It is a step of a loop that trains some layers; those of ``stacks`` it is told by number, or
    they are ``known``. None stands for stacks that nobody looked for, all of which is trained.
    """

    def __init__(
        self,
        loss: Any,
        slots: Slots,
        active: Names,
        stacks: frozenset[Bundle] | None,
        known: bool,
        optimizer: Any,
        *arrays: Any,
    ) -> None:
        params, *others = arrays
        self._by_row = by_row = ByRow(build)
        by_row.stacks = stacks or frozenset()
        static, rows = by_row.told(slots, choose(slots.names, active))
        all_of_it = find_active(params, slots, static, rows)
        self._kept = kept = by_row.kept(all_of_it, rows)

        def step(part, frozen, rest, state, batch, x, told_rows):
            chosen = all_of_it if known else find_active(params, slots, static, told_rows)
            whole = kept.join(part, frozen)
            run = value_and_grad_of(loss, chosen, has_aux=True)
            (value, rest), grads = run(whole, rest, batch, x)
            dense = lambda g: jnp.conj(g.values if is_row_sparse(g) else g)  # noqa: E731
            grads, own = jax.tree.map(dense, grads, is_leaf=is_row_sparse), chosen.part(whole)
            updates, state = optimizer.update(grads, state, own, value=value)
            part, told = by_row.applied(chosen, rows, part, chosen.as_rows(whole, updates))
            return part, rest, state, value, told

        def arguments():
            copied = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)  # noqa: E731
            (part, frozen), leaves = kept.split(params), jax.tree.leaves(params)
            written = {id(leaves[i]) for i in by_row.leaves(rows)}
            frozen = [copied(x) if id(x) in written else x for x in frozen]
            rest, batch, x = others
            state = copied(optimizer.init(all_of_it.part(params)))
            given = copied(part), frozen, copied(rest), state, batch, x, rows
            return jax.block_until_ready(given)

        self.arguments = arguments
        given, donated = arguments(), (0, 2, 3)
        out = (*(layout_of(given[i]) for i in donated), None, by_row.layout(params, rows))
        traced = jax.jit(step, donate_argnums=donated, out_shardings=out).trace(*given)
        program = traced.jaxpr
        if stacks or stacks is None:  # whose loop would count once
            with unrolled():  # another function, or JAX traces no more
                program = jax.make_jaxpr(functools.partial(step, told_rows=rows))(*given[:-1])
        written = sum(leaf.size for leaf in jax.tree.leaves(traced.out_info[-1]))
        self._lowered, self.flops = traced.lower(), program_flops(program) + written
        self.held_bytes, self.state_bytes = bytes_held(given), bytes_held(given[3])
        self.count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(all_of_it.part, params)))

    def compile(self) -> _Candidate:
        """Compiles the step, and asks for its memory."""
        self._program = self._lowered.compile()
        # All arguments, as the compiler leaves out those that a program does not read.
        self.peak_bytes = self.held_bytes + bytes_beside(self._program)
        return self

    def run(self, *given: Any) -> None:
        """One step of arguments like those of `arguments`."""
        part, *new, updates = self._program(*given)
        params, rows = self._kept.join(part, given[1]), given[-1]
        jax.block_until_ready((self._by_row.written(params, updates, rows) if rows else part, new))


def _compiled(jobs: Mapping[str, Callable[[], _Candidate]]) -> dict[str, _Candidate]:
    """Traced and lowered in this thread, where the caller's context holds; compiled in several."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = {name: pool.submit(job().compile) for name, job in jobs.items()}
    return {name: done.result() for name, done in pending.items()}


def _on_line(where: float, low: Any, high: Any) -> Any:
    return None if low is None or high is None else low + where * (high - low)
