"""Runs an arm: compiled steps for most of them, a `Trainer` where the library makes the step."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.suite.arms import Arm, arm_of
from benchmarks.suite.workloads import EVALUATED, Stream, Workload, load
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
from priorityprop_jax.priority import muon
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
    """

    flops: dict[str, float | None]
    peak_bytes: dict[str, int | None]
    compile_seconds: float

    def train(self, batches: Batches) -> None:
        """Trains on these, and returns when the device is done."""
        ...

    def evaluate(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Loss and accuracy over all rows."""
        ...

    def where(self) -> list[tuple[str, float]] | None:
        """Which share of the budget went to which layer."""
        ...

    def params(self) -> Any: ...


def pace(step: Any, steps: Any) -> jax.Array:
    """Warm-up over a twentieth of the steps, then a cosine to zero; the same for all arms."""
    first = jnp.maximum(1, jnp.asarray(steps) // 20)
    left = jnp.clip((step - first) / jnp.maximum(1, steps - first), 0.0, 1.0)
    return jnp.minimum((step + 1) / first, 0.5 * (1 + jnp.cos(jnp.pi * left)))


class PacedState(NamedTuple):
    """Rate and length are arrays, so that all runs of an arm share their programs."""

    count: jax.Array  # [], of steps
    rate: jax.Array  # []
    steps: jax.Array  # []


def paced(rate: float, steps: int) -> optax.GradientTransformation:
    """Times the rate and `pace`."""

    def init(params: Any) -> PacedState:
        return PacedState(jnp.zeros((), jnp.int32), jnp.float32(rate), jnp.int32(steps))

    def update(updates: Any, state: PacedState, params: Any = None) -> Any:
        factor = state.rate * pace(state.count, state.steps)
        return optax.tree.scale(factor, updates), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def build(
    workload: Workload, name: str, batch: int, rate: float, seed: int, steps: int, arm: Any = None
) -> Runner:
    """A fresh run of an arm, whose schedule ends after `steps`; `arm` stands for that name's."""
    arm = arm_of(name) if arm is None else arm
    kind = CompiledRun if arm.policy is None else TrainerRun
    return kind(arm, workload, batch, rate, seed, steps)


def cycle_of(steps: int) -> int:
    """Steps between two decisions of a policy."""
    return max(CYCLE, min(5 * CYCLE, steps // 20))


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


def transformation(arm: Arm, rate: Any, steps: Any) -> optax.GradientTransformation:
    """The optimizer of an arm; rate and steps may be traced."""
    options = dict(arm.options)
    if any(name == "lora" for name, _ in arm.edits):
        rate = 10 * rate  # thin factors want about ten times the rate of whole weights

    def scheduled(step: Any) -> Any:
        return rate * pace(step, steps)

    if arm.rows:
        return meprop.row_sparse_adam(scheduled, weight_decay=WEIGHT_DECAY)
    if arm.optimizer == "muon":
        return muon(
            scheduled, **options, weight_dimension_numbers=hidden_matrices,
            weight_decay=WEIGHT_DECAY,
        )  # fmt: skip
    if arm.optimizer == "cautious":
        return optax.chain(
            cautious(optax.scale_by_adam()),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.scale_by_learning_rate(scheduled),
        )
    if arm.optimizer == "schedule_free":

        def warmed(step: Any) -> Any:
            return rate * jnp.minimum((step + 1) / jnp.maximum(1, jnp.asarray(steps) // 20), 1.0)

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
        make = INNER[options.pop("inner", "adamw")]
        chosen = priorityprop(make(rate, weight_decay=WEIGHT_DECAY), **options)
        # The schedule is on the clock of steps, the optimizer on that of each slot.
        factor = optax.scale_by_schedule(lambda step: pace(step, steps))
        return optax.chain(chosen, factor)
    make = optax.nadamw if arm.optimizer == "nadam" else optax.adamw
    return make(scheduled, weight_decay=WEIGHT_DECAY, **options)


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates against the sign of the gradient are left out, the others scaled up.

    Liang et al., *Cautious optimizers*, 2024, arXiv 2411.16085.
    """

    def kept(update: jax.Array, grad: jax.Array) -> jax.Array:
        mask = (update * grad > 0).astype(update.dtype)
        return update * mask / jnp.maximum(mask.mean(), 1e-3)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(kept, updates, grads), state

    return optax.GradientTransformation(inner.init, update)


def hidden_matrices(params: Any) -> Any:
    """How Muon is to read each leaf: kernels but the output layer's, those of convolutions too."""
    slots = find_slots(params)
    output = {n for n, depth in zip(slots.names, slots.depths, strict=True) if depth == 0}

    def numbers(path: Any, leaf: Any) -> Any:
        name, axes = path_name(path), jnp.ndim(leaf)
        if not name.endswith("kernel") or name in output or axes not in (2, 4):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(axes - 1)), axes - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _from_gradient(grads: Any) -> jax.Array:
    """A number in (0, 1) that the digits of the gradient draw: no information in it."""
    total = sum(jnp.sum(jnp.abs(g.astype(jnp.float32))) for g in grads)
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    return jax.random.uniform(jax.random.fold_in(jax.random.key(0), bits), minval=1e-3)


INNER: dict[str, Any] = {
    "adamw": optax.adamw,
    "adamw b1 0.8": functools.partial(optax.adamw, b1=0.8),
    "nadam": optax.nadamw,
}
MAGNITUDES: dict[Any, Any] = {"constant": lambda grads: jnp.ones(()), "random": _from_gradient}


def _without_counts(look: Look) -> jax.Array:
    """PriorityProp's score without its count discount."""
    return priority(look.magnitudes, 0, look.depth_factors, look.costs)


@functools.lru_cache(maxsize=64)
def _programs(arm: Arm, workload: Workload, batch: int) -> Any:
    """The compiled step and evaluation of an arm; seed, rate and steps are arguments."""
    rows, make_model, loss_fn = load(workload)
    graph, params, rest = nnx.split(edited(make_model(0), arm, 0), nnx.Param, ...)
    params = nnx.as_pure(params)

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest), batch)

    make_gradient = meprop.value_and_grad if arm.rows else jax.value_and_grad
    gradient = make_gradient(loss, has_aux=True)

    def step(params: Any, state: Any, rest: Any, batch: Any, rate: Any, steps: Any) -> Any:
        (value, _), grads = gradient(params, rest, batch)
        updates, state = transformation(arm, rate, steps).update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = transformation(arm, 1.0, 1).init(params)
    given = (params, state, rest, Stream(rows, batch, 0).take(1)[0], jnp.float32(1), jnp.int32(1))
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
    return compiled, jax.jit(loss), time.perf_counter() - started


class CompiledRun:
    """One program, its buffers donated."""

    def __init__(
        self, arm: Arm, workload: Workload, batch: int, rate: float, seed: int, steps: int
    ):
        self._arm = arm
        self._program, self._loss, self.compile_seconds = _programs(arm, workload, batch)
        _, make_model, _ = load(workload)
        _, params, self._rest = nnx.split(edited(make_model(seed), arm, seed), nnx.Param, ...)
        self._params = jax.tree.map(jnp.array, nnx.as_pure(params))
        state = transformation(arm, rate, steps).init(self._params)
        # A buffer can be donated once, and schedule-free keeps the parameters themselves.
        self._state = jax.tree.map(jnp.array, state)
        self._paced = jnp.float32(rate), jnp.int32(steps)
        self.flops = {"train": program_flops(self._program)}
        self.peak_bytes = {"train": _peak(self._program)}

    def train(self, batches: Batches) -> None:
        value = jnp.zeros(())
        for batch in batches:
            self._params, self._state, value = self._program(
                self._params, self._state, self._rest, batch, *self._paced
            )
        jax.block_until_ready((self._params, self._state))
        if not np.isfinite(float(value)):
            raise FloatingPointError("the loss became NaN or infinite")

    def params(self) -> Any:
        if self._arm.optimizer == "schedule_free":
            return optax.contrib.schedule_free_eval_params(self._state, self._params)
        return self._params

    def evaluate(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        params = self.params()
        return _averages(lambda part: self._loss(params, self._rest, part), arrays)

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
    """`Trainer` with a step of `partial`, trained a piece at a time."""

    def __init__(
        self, arm: Arm, workload: Workload, batch: int, rate: float, seed: int, steps: int
    ):
        rows, make_model, loss_fn = load(workload)
        model: Any = edited(make_model(seed), arm, seed)
        policy: Any = half if arm.policy == "suffix(half)" else arm.policy
        share = None
        if arm.policy in ("priority", "random"):
            share = workload.least + (1 - workload.least) * arm.backward
        cache = None
        if arm.cached:
            model = partial.nnx_stages(model.stages())
            cache = partial.PrefixCache(None, examples=int(rows.train["id"].max()) + 1)
        step = partial.step(
            policy, share=share, recalc_every=cycle_of(steps), cache=cache, seed=seed
        )
        adamw = optax.adamw(1.0, weight_decay=WEIGHT_DECAY)  # times the rate at each step
        optimizer = optax.chain(partial.update_active(adamw), paced(rate, steps))
        self._trainer = Trainer(model, optimizer, loss_fn, step, progress=False)

    @property
    def peak_bytes(self) -> dict[str, int | None]:
        """Of the largest program so far, what it keeps between steps included."""
        trainer: Any = self._trainer
        beside = [own.beside for some in trainer.step._programs.values() for own in some.values()]
        held = jax.tree.leaves((trainer.params, trainer._opt_state))
        return {"train": sum(x.nbytes for x in held) + max(beside)} if beside else {}

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

    def evaluate(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        return self._trainer.evaluate(_cut(arrays, EVALUATED))

    def where(self) -> list[tuple[str, float]] | None:
        layers = self._trainer.get_step_report()["layers"]
        spent = [layer["flops"] for layer in layers]
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


def _averages(loss: Any, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over all rows; by the weight of the mask, where there is one."""
    total, sums = 0.0, np.zeros(2)
    for part in _cut(arrays, EVALUATED):
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
