"""Runs an arm: compiled steps for most of them, a `Trainer` where the library makes the step."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.suite.arms import Arm
from benchmarks.suite.workloads import Stream, Workload, load
from benchmarks.tasks.char import CharTransformer
from priorityprop_jax import (
    find_slots,
    meprop,
    partial,
    priorityprop,
    rnn,
    scale_by_priority,
    sparse,
)
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.models.lora import add_lora
from priorityprop_jax.priority.scores import Look, priority
from priorityprop_jax.priority.transform import PriorityPropState
from priorityprop_jax.training import Trainer

WEIGHT_DECAY = 0.01
CYCLE = 10
Batches = list[dict[str, np.ndarray]]


class Runner(Protocol):
    """A run of an arm.

    Attributes:
      flops: of a step, as compiled, by phase; None where the compiler cannot say.
      peak_bytes: of the program, by phase.
      compile_seconds: so far.
      row_losses: rows and their losses at the last steps, where a stream prunes by them.
    """

    flops: dict[str, float | None]
    peak_bytes: dict[str, int | None]
    compile_seconds: float
    row_losses: list[tuple[np.ndarray, np.ndarray]]

    def train(self, batches: Batches) -> None:
        """Trains on these, and returns when the device is done."""
        ...

    def evaluate(self, arrays: dict[str, np.ndarray], batch: int) -> dict[str, float]:
        """Loss and accuracy over all rows."""
        ...

    def where(self) -> list[tuple[str, float]] | None:
        """Which share of the budget went to which layer."""
        ...

    def params(self) -> Any: ...


def schedule(steps: int) -> Callable[[Any], jax.Array]:
    """Warm-up over a twentieth of the steps, then a cosine to zero; the same for all arms."""
    first = max(1, steps // 20)

    def factor(step: Any) -> jax.Array:
        left = jnp.clip((step - first) / max(1, steps - first), 0.0, 1.0)
        return jnp.minimum((step + 1) / first, 0.5 * (1 + jnp.cos(jnp.pi * left)))

    return factor


def build(arm: Arm, workload: Workload, rate: float, seed: int, steps: int | None = None) -> Runner:
    """A fresh run of an arm; its schedule ends after `steps`."""
    steps = arm.steps(workload) if steps is None else steps
    if arm.policy is not None or arm.top_k is not None:
        return TrainerRun(arm, workload, rate, seed, steps)
    return CompiledRun(arm, workload, rate, seed, steps)


def cycle_of(arm: Arm, workload: Workload) -> int:
    """Steps between two decisions of a policy."""
    return max(CYCLE, arm.steps(workload) // 20)


# Changes of the model.


def edited(model: Any, arm: Arm, seed: int) -> Any:
    for name, pairs in arm.edits:
        options = dict(pairs)
        if name == "lora":
            add_lora(model, seed=seed, **options)
        elif name == "meprop":
            meprop.meprop(model, options.pop("k"), **options)
        elif name == "sparse":
            # The places are the same for all seeds of a run's program; values are the seed's.
            sparse.sparse_start(
                model, options["sparsity"], seed=seed, places=options.get("places", "random")
            )
        elif name == "lean":
            rnn.lean_rnn(model)
        elif name == "highway" and isinstance(model, CharTransformer):
            model.iterations = options["iterations"]
        elif name == "highway":
            rnn.lean_rnn(model, iterations=options["iterations"])
        else:
            raise ValueError(f"no edit {name!r}")
    return model


# One compiled step.


def transformation(arm: Arm, rate: Any, steps: int) -> optax.GradientTransformation:
    factor, options = schedule(steps), dict(arm.options)
    if any(name == "lora" for name, _ in arm.edits):
        rate = 10 * rate  # thin factors want about ten times the rate of whole weights

    def scheduled(step: Any) -> Any:
        return rate * factor(step)

    if arm.rows:
        return meprop.row_sparse_adam(scheduled, weight_decay=WEIGHT_DECAY)
    if arm.optimizer == "muon":
        return muon(scheduled)
    if arm.optimizer == "schedule_free":
        first = max(1, steps // 20)

        def warmed(step: Any) -> Any:
            return rate * jnp.minimum((step + 1) / first, 1.0)

        inner = optax.adamw(warmed, b1=0.0, weight_decay=WEIGHT_DECAY)
        return optax.contrib.schedule_free(inner, learning_rate=warmed, b1=0.9)
    if arm.optimizer == "scale_by_priority":
        return optax.chain(
            optax.adamw(scheduled, weight_decay=WEIGHT_DECAY),
            scale_by_priority(**{"total_budget": None, "recalc_every": CYCLE, **options}),
        )
    if arm.optimizer == "priorityprop":
        options = {"total_budget": None, "recalc_every": CYCLE, **options}
        if not options.pop("count_discount", True):
            options["score"] = _without_counts
        options["magnitude"] = MAGNITUDES.get(
            options.get("magnitude"), options.get("magnitude", "mean")
        )
        chosen = priorityprop(optax.adamw(rate, weight_decay=WEIGHT_DECAY), **options)
        # The schedule is on the clock of steps, the optimizer on that of each slot.
        return optax.chain(chosen, optax.scale_by_schedule(factor))
    return optax.adamw(scheduled, weight_decay=WEIGHT_DECAY)


def _from_gradient(grads: Any) -> jax.Array:
    """A number in (0, 1) that the digits of the gradient draw: no information in it."""
    total = sum(jnp.sum(jnp.abs(g.astype(jnp.float32))) for g in grads)
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    return jax.random.uniform(jax.random.fold_in(jax.random.key(0), bits), minval=1e-3)


MAGNITUDES: dict[Any, Any] = {"constant": lambda grads: jnp.ones(()), "random": _from_gradient}


def _without_counts(look: Look) -> jax.Array:
    """PriorityProp's score without its count discount."""
    return priority(look.magnitudes, 0, look.depth_factors, look.costs)


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon on hidden matrices, AdamW on all else, at one learning rate.

    Updates of matrices `[m, n]` are scaled by `0.2 * sqrt(max(m, n))`, so that their root mean
    square is that of Adam's (Liu et al., 2025, arXiv 2502.16982).
    """

    def scaled(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u: u * 0.2 * math.sqrt(max(u.shape)), updates)

    def labels(params: Any) -> Any:
        slots = find_slots(params)
        output = {n for n, depth in zip(slots.names, slots.depths, strict=True) if depth == 0}

        def label(path: Any, leaf: Any) -> str:
            name = path_name(path)
            hidden = name.endswith("kernel") and jnp.ndim(leaf) == 2 and name not in output
            return "muon" if hidden else "adamw"

        return jax.tree_util.tree_map_with_path(label, params)

    def dimensions(tree: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)

    matrices = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions),
        optax.stateless(scaled),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(rate),
    )
    rest = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    return optax.partition({"muon": matrices, "adamw": rest}, labels)


@functools.lru_cache(maxsize=16)
def _programs(arm: Arm, workload: Workload, steps: int) -> Any:
    """The compiled step and evaluation of an arm; seed and rate are arguments."""
    rows, make_model, loss_fn = load(workload)
    graph, params, rest = nnx.split(edited(make_model(0), arm, 0), nnx.Param, ...)
    params = nnx.as_pure(params)

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest), batch)

    make_gradient = meprop.value_and_grad if arm.rows else jax.value_and_grad
    gradient = make_gradient(loss, has_aux=True)

    def step(params: Any, state: Any, rest: Any, batch: Any, rate: Any) -> Any:
        tx = transformation(arm, rate, steps)
        (value, aux), grads = gradient(params, rest, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, aux.get("rows")

    if arm.pruned:
        evaluated, loss = (
            loss,
            lambda params, rest, batch: _weighted(nnx.merge(graph, params, rest), batch),
        )
    else:
        evaluated = loss
    batch = Stream(rows, arm.rows_of(workload), 0, pruned=arm.pruned).take(1)[0]
    state = transformation(arm, 1.0, steps).init(params)
    given = (params, state, rest, batch, jnp.float32(1.0))
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
    seconds = time.perf_counter() - started
    return compiled, jax.jit(evaluated), seconds


def _weighted(model: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean cross-entropy, and that of each row."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])
    axes = tuple(range(1, losses.ndim))
    mask = batch.get("mask", jnp.ones_like(losses))
    rows = jnp.sum(losses * mask, axes) / jnp.maximum(jnp.sum(mask, axes), 1.0)  # [batch]
    return jnp.average(rows, weights=batch["weight"]), {"rows": rows}


class CompiledRun:
    """One program, its buffers donated."""

    def __init__(self, arm: Arm, workload: Workload, rate: float, seed: int, steps: int):
        self._arm, self._steps = arm, steps
        self._program, self._loss, self.compile_seconds = _programs(arm, workload, steps)
        _, make_model, _ = load(workload)
        _, params, self._rest = nnx.split(edited(make_model(seed), arm, seed), nnx.Param, ...)
        self._params = jax.tree.map(jnp.array, nnx.as_pure(params))
        state = transformation(arm, rate, steps).init(self._params)
        # A buffer can be donated once, and schedule-free keeps the parameters themselves.
        self._state = jax.tree.map(jnp.array, state)
        self._rate = jnp.float32(rate)
        self.row_losses: list[tuple[np.ndarray, np.ndarray]] = []
        self.flops = {"train": program_flops(self._program)}
        self.peak_bytes = {"train": _peak(self._program)}

    def train(self, batches: Batches) -> None:
        value = jnp.zeros(())
        seen: list[Any] = []
        for batch in batches:
            self._params, self._state, value, rows = self._program(
                self._params, self._state, self._rest, batch, self._rate
            )
            if rows is not None:
                seen.append((batch["row"], rows))
        jax.block_until_ready((self._params, self._state))
        self.row_losses = [(row, np.asarray(losses)) for row, losses in seen]
        if not np.isfinite(float(value)):
            raise FloatingPointError("the loss became NaN or infinite")

    def params(self) -> Any:
        if self._arm.optimizer == "schedule_free":
            return optax.contrib.schedule_free_eval_params(self._state, self._params)
        return self._params

    def evaluate(self, arrays: dict[str, np.ndarray], batch: int) -> dict[str, float]:
        params = self.params()
        return _averages(lambda part: self._loss(params, self._rest, part), arrays, batch)

    def where(self) -> list[tuple[str, float]] | None:
        states = [
            node
            for node in jax.tree.leaves(
                self._state, is_leaf=lambda node: isinstance(node, PriorityPropState)
            )
            if isinstance(node, PriorityPropState)
        ]
        if not states:
            return None
        counts = np.asarray(states[0].update_counts, float)
        return _shares(find_slots(self._params).names, counts)


# A step that the library makes.


class TrainerRun:
    """`Trainer` with a step of `partial` or `meprop`, trained a piece at a time."""

    def __init__(self, arm: Arm, workload: Workload, rate: float, seed: int, steps: int):
        rows, make_model, loss_fn = load(workload)
        model: Any = edited(make_model(seed), arm, seed)
        cycle, schedule_of = cycle_of(arm, workload), optax.scale_by_schedule(schedule(steps))
        adamw = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
        if arm.top_k is not None:
            step = meprop.step(arm.top_k, recalc_every=cycle)
            optimizer = optax.chain(meprop.row_sparse(adamw), meprop.on_values(schedule_of))
        else:
            policy: Any = half if arm.policy == "suffix(half)" else arm.policy
            share = None
            if arm.policy in ("priority", "random"):
                share = workload.least + (1 - workload.least) * arm.backward
            cache = None
            if arm.cached:
                model = partial.nnx_stages(model.stages())
                cache = partial.PrefixCache(None, examples=int(rows.train["id"].max()) + 1)
            step = partial.step(policy, share=share, recalc_every=cycle, cache=cache, seed=seed)
            optimizer = optax.chain(partial.update_active(adamw), schedule_of)
        self._trainer = Trainer(model, optimizer, loss_fn, step, progress=False)
        self.peak_bytes: dict[str, int | None] = {}
        self.row_losses: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def compile_seconds(self) -> float:
        return self._trainer.history.compile_seconds

    @property
    def flops(self) -> dict[str, float | None]:
        report = self._trainer.get_step_report()
        return {"train": report["flops"] / max(1, report["steps"])}

    @property
    def share(self) -> float:
        """Of the FLOPs of as many full steps."""
        return self._trainer.get_step_report()["share"]

    def train(self, batches: Batches) -> None:
        self._trainer.train(batches, 1)

    def params(self) -> Any:
        return self._trainer.params

    def evaluate(self, arrays: dict[str, np.ndarray], batch: int) -> dict[str, float]:
        return self._trainer.evaluate(_cut(arrays, batch))

    def where(self) -> list[tuple[str, float]] | None:
        layers = self._trainer.get_step_report()["layers"]
        # Where k is chosen the layers' features are what was spent.
        spent = [layer.get("flops", layer.get("mean_k")) for layer in layers]
        return _shares([layer["layer"] for layer in layers], np.array(spent))


def half(at: Any) -> list[frozenset[str]]:
    """The policy of a static suffix: the half of the layers next to the output."""
    layers = max(at.slots.depths, default=0) + 1
    return [at.at_depths(range((layers + 1) // 2))] * at.steps


# Numbers.


def _cut(arrays: dict[str, np.ndarray], batch: int) -> Batches:
    rows = len(next(iter(arrays.values())))
    return [
        {name: array[i : i + batch] for name, array in arrays.items()}
        for i in range(0, rows, batch)
    ]


def _averages(loss: Any, arrays: dict[str, np.ndarray], batch: int) -> dict[str, float]:
    """Means over all rows; by the weight of the mask, where there is one."""
    total, sums = 0.0, np.zeros(2)
    for part in _cut(arrays, batch):
        value, metrics = loss(part)
        weight = float(part["mask"].sum()) if "mask" in part else len(part["y"])
        total += weight
        sums += weight * np.array([float(value), float(metrics["accuracy"])])
    return {"loss": float(sums[0] / total), "accuracy": float(sums[1] / total)}


def _shares(names: Any, amounts: np.ndarray) -> list[tuple[str, float]]:
    total = float(amounts.sum()) or 1.0
    return [(name, float(amount) / total) for name, amount in zip(names, amounts, strict=True)]


def _peak(program: Any) -> int | None:
    memory = program.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
