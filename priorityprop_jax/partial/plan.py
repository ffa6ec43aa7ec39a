"""What a step would cost that trains some layers only, before anyone trains."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from priorityprop_jax.core.layout import layout_of
from priorityprop_jax.core.modules import first, pure_loss
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.core.rows import is_row_sparse
from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.core.tables import aligned, short
from priorityprop_jax.partial.engine import in_order
from priorityprop_jax.partial.grad import ActiveLeaves, find_active, value_and_grad_of
from priorityprop_jax.partial.policies import Situation, make_policy
from priorityprop_jax.partial.stack import read, slots_of, unrolled
from priorityprop_jax.partial.stages import Stages

_PATIENCE = 10.0  # seconds after which no turn of measuring is begun
LEGEND = "suffix(k): the output layer and k layers before it; cached: what the others give is kept"


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
            ms = "-" if c.milliseconds is None else f"{c.milliseconds:,.1f}"
            sizes = (f"{_mebibytes(n):,.1f} MiB" for n in (c.peak_bytes, c.state_bytes))
            row = (c.name, short(c.parameters), short(c.flops), f"{c.share:.0%}", ms, *sizes)
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
        memory = None if self.memory is None else _mebibytes(self.memory)
        panels = [
            ("milliseconds a step", [c.milliseconds or 0 for c in choices], self.milliseconds),
            ("peak memory, MiB", [_mebibytes(c.peak_bytes) for c in choices], memory),
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
    memory: float | None = None,
    milliseconds: float | None = None,
    beside: Mapping[str, tuple[Any, Any]] | None = None,
    repeats: int = 5,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
) -> Plan:
    """What each choice of layers to train would cost, on this model and this machine.

    The choices are ``full``; ``suffix(k)`` for up to six k, the largest of which leaves out the
    input layer (the embedding of a language model) alone; ``lisa(2)``; ``badam(1)`` at the
    turn of the first layer that has one; and of `Stages`, ``suffix(k)`` in the last half with the
    outputs of the frozen prefix cached, whose look-up is not timed. Each is compiled and run as a
    loop of one's own would: gradients by `value_and_grad`, and optimizer state of what is trained
    alone, as with `freeze`, and with the states ``"reset"`` and ``"offload"`` of `step`.

    Args:
      model: a pytree of parameters, an `nnx.Module`, or `Stages`. It stays as it is.
      loss_fn: ``(model, batch) -> loss`` or ``(loss, metrics)``.
      batch: an example, a pytree of arrays; of `Stages`, with the inputs ``x``.
      optimizer: any Optax optimizer.
      memory: bytes that a step may take, by default what the device says it has. What takes more
        is not run.
      milliseconds: what a step may take.
      beside: other models to compare with by name, all of which is trained, each with a batch: the
        model with LoRA, or its last blocks on what those below make of a batch.
      repeats: how often each is timed, in turns, after one run to warm up; where a turn takes
        longer than ten seconds, that one run counts.
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
    limits = {"memory": memory, "milliseconds": milliseconds, "repeats": repeats}
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    loss, params, rest = _pure(model, loss_fn)
    if not jax.tree.leaves(params):
        raise ValueError("the model has no parameters to train")
    params, rest, batch = jax.tree.map(jnp.asarray, (params, rest, batch))
    stages = model if isinstance(model, Stages) else None
    where = {"stacked_axis": stacked_axis, "group": group}
    if stacked_axis is group is None:
        where = slots_of(model, params, stages is not None)
    slots = find_slots(params, **where)
    if stages is not None:
        slots = in_order(slots, stages.names, params)
    else:
        work, _ = read(loss, params, rest, batch, None, 0, slots=slots)
        slots = dataclasses.replace(slots, depths=work.depths)
    wanted = [(name, active, 0) for name, active in _choices(slots).items()]
    if stages is not None and isinstance(batch, Mapping) and "x" in batch:
        first = {s: stages.names.index(at) for s, at in zip(slots.names, slots.layers, strict=True)}
        for name, active, _ in wanted[1:]:
            start = min(first[slot] for slot in active)
            # Of the last half, which has most to gain
            if name.startswith("suffix") and 2 * start >= len(stages):
                wanted.append((f"{name}, cached", active, start))
    tx = optax.with_extra_args_support(optimizer)

    def candidate(name, active, start, loss, slots, *arrays):
        chosen = find_active(arrays[0], slots, active)
        step = _step(functools.partial(loss, start=start), chosen, tx)
        size = dict(zip(slots.names, slots.sizes, strict=True))
        arguments = functools.partial(_arguments, chosen, tx, *arrays)
        return _Candidate(name, sum(size[slot] for slot in active), step, arguments)

    candidates = []
    for name, active, start in wanted:
        x = None if stages is None or not start else _enters(stages, params, rest, batch, start)
        arrays = params, rest, batch, x
        candidates.append(candidate(name, active, start, loss, slots, *arrays))
    for name, (other, example) in (beside or {}).items():
        loss, *arrays = _pure(other, loss_fn)
        arrays = jax.tree.map(jnp.asarray, (*arrays, example, None))
        slots = find_slots(arrays[0])
        candidates.append(candidate(name, frozenset(slots.names), 0, loss, slots, *arrays))
    # Traced and lowered in this thread, where the caller's context holds; compiled in several.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_Candidate.compile, candidates))
    if memory is None:  # what the device has, where it says so
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    run = [c for c in candidates if memory is None or c.peak_bytes <= memory]
    times = dict(zip((c.name for c in run), _timed(run, repeats), strict=True))
    choices = []
    for c in candidates:
        ms, flops = times.get(c.name), c.flops
        fits = ms is not None and (milliseconds is None or ms <= milliseconds)
        share, sizes = flops / candidates[0].flops, (c.peak_bytes, c.state_bytes)
        choices.append(Choice(c.name, c.count, flops, share, ms, *sizes, fits))
    return Plan(tuple(choices), memory, milliseconds)


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


def _choices(slots: Slots) -> dict[str, frozenset[str]]:
    """The active set of each choice, by its name."""
    deepest, zeros = max(slots.depths), np.zeros(len(slots))
    layers = zip(slots.layers, slots.depths, strict=True)
    input_layer = ", ".join(sorted({layer for layer, depth in layers if depth == deepest}))

    def asked(policy: str, cycle: int = 0) -> frozenset[str]:
        at = Situation(slots, None, math.inf, math.inf, cycle, 1, zeros, zeros.astype(int))
        return make_policy(policy)(at)[0]

    found = {"full": asked("full")}
    for k in sorted(set(np.linspace(0, max(deepest - 1, 0), 6).round().astype(int).tolist())):
        last = f", all but {input_layer}" if k == deepest - 1 and k else ""
        found[f"suffix({k}){last}"] = asked(f"suffix({k})")
    found["lisa(2)"] = asked("lisa(2)")
    found["badam(1), dearest turn"] = asked("badam(1)", max(deepest - 2, 0))
    # Of few layers several choices are the same, and the first name is enough.
    names: dict[frozenset[str], str] = {}
    for name, active in found.items():
        names.setdefault(active, name)
    return {name: active for active, name in names.items()}


def _enters(stages: Stages, params: Any, rest: Any, batch: Any, start: int) -> Any:
    """Something like what enters a stage; what it costs to go on from there is the same."""
    run = functools.partial(stages.run, stop=start)
    like, _ = jax.eval_shape(run, params, rest, batch["x"])
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)


def _step(loss: Any, chosen: ActiveLeaves, optimizer: Any) -> Callable[..., Any]:
    """A step of a loop that trains some layers."""

    def step(part, frozen, rest, state, batch, x):
        params = chosen.join(part, frozen)
        run = value_and_grad_of(loss, chosen, has_aux=True)
        (value, rest), grads = run(params, rest, batch, x)
        dense = lambda g: jnp.conj(g.values if is_row_sparse(g) else g)  # noqa: E731
        grads, own = jax.tree.map(dense, grads, is_leaf=is_row_sparse), chosen.part(params)
        updates, state = optimizer.update(grads, state, own, value=value)
        params = chosen.replace(params, optax.apply_updates(own, updates))
        return chosen.split(params)[0], rest, state, value

    return step


def _arguments(chosen: ActiveLeaves, optimizer: Any, params: Any, *others: Any) -> tuple[Any, ...]:
    """Arguments of a step, new ones where they are donated."""
    copied = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)  # noqa: E731
    (part, frozen), (rest, batch, x) = chosen.split(params), others
    state = copied(optimizer.init(chosen.part(params)))
    return copied(part), frozen, copied(rest), state, batch, x


class _Candidate:
    """A choice, traced, and after `compile` ready to run."""

    def __init__(self, name: str, count: int, step: Any, arguments: Any) -> None:
        self.name, self.count, self.arguments = name, count, arguments
        given, donated = arguments(), (0, 2, 3)
        out = (*(layout_of(given[i]) for i in donated), None)
        traced = jax.jit(step, donate_argnums=donated, out_shardings=out).trace(*given)
        with unrolled():  # a stack's loop would count once
            self.flops = program_flops(jax.make_jaxpr(step)(*given))
        self._lowered = traced.lower()
        self.held_bytes, self.state_bytes = _bytes(given), _bytes(given[3])

    def compile(self) -> None:
        """Compiles the step, and asks for its memory."""
        self.run = self._lowered.compile()
        found: Any = self.run.memory_analysis()
        beside = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        # All arguments, as the compiler leaves out those that a program does not read.
        self.peak_bytes = self.held_bytes + beside


def _bytes(tree: Any) -> int:
    """On one device."""
    sizes = (
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    return sum(sizes)


def _timed(candidates: list[_Candidate], repeats: int) -> list[float]:
    """Milliseconds of each: the median, in turns, so that a drift is shared."""
    samples: list[list[float]] = [[] for _ in candidates]
    began = time.perf_counter()
    for turn in range(repeats + 1):  # the first one warms up, which matters to short steps
        if turn and time.perf_counter() - began > _PATIENCE:
            break
        for candidate, times in zip(candidates, samples, strict=True):
            arguments = jax.block_until_ready(candidate.arguments())
            start = time.perf_counter()
            jax.block_until_ready(candidate.run(*arguments))
            times.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(times[1:] or times)) for times in samples]


def _mebibytes(size: float) -> float:
    return size / 2**20
