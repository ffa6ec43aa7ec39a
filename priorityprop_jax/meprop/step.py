"""Training with meProp: row-sparse gradients and updates, and a budget that decides each k."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.core.frame import LayerUse
from priorityprop_jax.core.layout import put_beside
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.program import abstract, product_flops
from priorityprop_jax.core.row_adam import RowAdamState
from priorityprop_jax.core.row_grad import find_uses, row_value_and_grad
from priorityprop_jax.core.row_optimizers import RowSparseState, row_sparse
from priorityprop_jax.core.rows import RowSparse, is_row_sparse
from priorityprop_jax.core.slots import by_layer, find_slots
from priorityprop_jax.priority.scores import depth_factors, priority

_DECAY = 0.9  # of the average of a layer's magnitudes over steps


class FeaturesState(NamedTuple):
    """The optimizer state of a training with meProp. Slots are layers, counts are of features."""

    step: jax.Array  # int32[], steps taken.
    inner_state: optax.OptState  # of the optimizer by rows.
    update_counts: jax.Array  # int32[slots], features so far.
    magnitudes: jax.Array  # float32[slots], average of mean |g| over what was kept.
    priorities: jax.Array  # float32[slots], of this cycle.
    allocation: jax.Array  # int32[slots], features a step in this cycle.
    nonfinite_counts: jax.Array  # int32[slots], NaN or infinite magnitudes seen.


def step(
    share: float | None = None,
    *,
    recalc_every: int = 10,
    depth_base: float = 1.1,
) -> Callable[[Any], FeaturesStep]:
    """Makes the training step of a model with `meprop` layers, for `Trainer`.

    Gradients and updates of these layers are row-sparse. With a ``share`` each layer's ``k`` is
    chosen anew every ``recalc_every`` steps, in proportion to its priority, among the sizes that
    `meprop` was given. With one size a layer there is nothing to choose, and ``share`` is None.

    The optimizer may be one by rows, such as `row_sparse_adam`, also inside `optax.chain`: with
    `clip_by_global_norm` of this room in front, and `on_values` of a schedule behind. Any other is
    taken for an elementwise one, and wrapped in `row_sparse`.

    Args:
      share: of the FLOPs of the `meprop` layers' backward passes, in (0, 1], that a step may spend.
      recalc_every: steps in a cycle.
      depth_base: see `priorityprop`.

    Returns:
      A function that makes the step.

    Raises:
      TypeError, ValueError: an option is of the wrong kind or makes no sense; at the first step, if
        the model has no meProp layer, ``share`` and the sizes do not go together, a layer's size
        cannot be chosen, or the share does not pay for the smallest sizes.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> from priorityprop_jax import meprop
      >>> from priorityprop_jax.training.trainer import Trainer
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 2, rngs=nnx.Rngs(1)))
      >>> meprop.meprop(model, (4, 8, 16))
      1
      >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
      >>> trainer = Trainer(model, optax.adam(1e-3), loss_fn, meprop.step(0.3), progress=False)
      >>> history = trainer.train([jnp.ones((5, 4))] * 3)
      >>> trainer.get_step_report()["layers"][0]["k"]
      8
    """
    if share is not None and (
        isinstance(share, bool) or not isinstance(share, int | float | np.number)
    ):
        raise TypeError(f"share must be a fraction or None, got {share!r}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(
            "share is the fraction of the backward FLOPs of the meProp layers, above 0 and at most "
            f"1, or None for fixed k; got {share}"
        )
    if isinstance(recalc_every, bool) or not isinstance(recalc_every, int | np.integer):
        raise TypeError(f"recalc_every must be a whole number, got {recalc_every!r}")
    if recalc_every < 1:
        raise ValueError(f"recalc_every must be at least 1, got {recalc_every}")
    if not 0 < depth_base < math.inf:
        raise ValueError(f"depth_base must be finite and above 0, got {depth_base}")
    share = None if share is None else float(share)
    return lambda setup: FeaturesStep(setup, share, int(recalc_every), depth_base)


class FeaturesStep:
    """The training step that `step` makes: one compiled and donated program for all sizes.

    Slots are layers. ``programs`` says how many programs have been compiled.
    """

    unit = "features"

    def __init__(self, setup: Any, share: float | None, cycle: int, depth_base: float) -> None:
        self._loss, self._share, self._cycle = setup.loss, share, cycle
        self._shapes, optimizer = jax.tree.map(abstract, setup.params), setup.optimizer
        by_rows = lambda node: isinstance(node, RowSparseState | RowAdamState)  # noqa: E731
        states = jax.tree.leaves(jax.eval_shape(optimizer.init, self._shapes), is_leaf=by_rows)
        knows_rows = any(map(by_rows, states))
        if any(isinstance(state, RowAdamState) for state in states):
            raise ValueError(
                "row_adam must know the rows of a step before it runs, and meProp finds them in "
                "it: use row_sparse_adam"
            )
        self._optimizer = optax.with_extra_args_support(
            optimizer if knows_rows else row_sparse(optimizer)
        )
        self.slots = find_slots(self._shapes, group=by_layer(self._shapes))
        self._factors = depth_factors(self.slots, depth_base)
        self._uses: dict[str, LayerUse] = {}
        self._layers: list[_Layer] = []  # by slot, once a batch has been seen
        self._places: list[int] = []  # of the size of each slot in this cycle
        self.compile_seconds = 0.0
        self.programs = 0
        self._step = 0
        self._flops = 0.0
        self._largest_flops = 0.0  # of a step with every layer at its largest size
        self.lay_out((None, None, None))

    def lay_out(self, layout: tuple[Any, Any, Any]) -> None:
        """Keeps parameters, rest and state laid out as `layout_of` says, from the next step on."""
        self._compiled = jax.jit(
            self._program, donate_argnums=(0, 1, 2), out_shardings=(*layout, None)
        )

    def init(self, params: Any) -> FeaturesState:
        """The optimizer state before the first step."""
        step, inner = jnp.zeros([], jnp.int32), self._optimizer.init(params)
        dtypes = (jnp.int32, jnp.float32, jnp.float32, jnp.int32, jnp.int32)
        return FeaturesState(step, inner, *(jnp.zeros(len(self.slots), d) for d in dtypes))

    # The account.

    @property
    def saved(self) -> float:
        """The share of a dense training's FLOPs that was not spent so far."""
        return 1 - self._flops / self._full_flops if self._full_flops else 0.0

    @property
    def _full_flops(self) -> float:
        """FLOPs of the steps so far if every layer kept all features."""
        more = (use.flops(use.outputs) - use.flops(use.sizes[-1]) for use in self._uses.values())
        return self._step * (self._largest_flops + sum(more))

    def report(self, opt_state: FeaturesState, seconds: float) -> dict[str, Any]:
        """What was spent, in all and by layer, against a dense training.

        ``flops`` are those of all products and convolutions of the steps, as traced, with each
        layer at its size; ``full_flops`` the same if every layer kept all features.
        """
        full, counts = self._full_flops, np.asarray(opt_state.update_counts)
        slots = zip(self.slots.names, self.slots.depths, counts, strict=True)
        # None before the first step, which learns them.
        layers = [
            {
                "layer": name,
                "depth": depth,
                "outputs": layer.outputs,
                "sizes": list(layer.sizes),
                "k": layer.sizes[place],
                "mean_k": float(kept / max(self._step, 1)),
            }
            for layer, place, (name, depth, kept) in zip(
                self._layers, self._places, slots, strict=False
            )
        ]
        return {
            "steps": self._step,
            "flops": self._flops,
            "full_flops": full,
            "share": self._flops / full if full else 1.0,
            "programs": self.programs,
            "compile_seconds": self.compile_seconds,
            "seconds": seconds,
            "layers": layers,
        }

    # Running.

    def __call__(
        self, params: Any, rest: Any, opt_state: FeaturesState, batch: Any
    ) -> tuple[Any, Any, FeaturesState, dict[str, Any]]:
        """Runs one step, see `Step`; ``updates`` are the features of all layers."""
        batch = jax.tree.map(jnp.asarray, batch)
        if not self._layers:
            self._look(rest, batch)
        if self._step % self._cycle == 0:
            opt_state = put_beside(params, self._new_cycle(opt_state))
        places = jnp.asarray(self._places, jnp.int32)
        start, programs = time.perf_counter(), self.programs
        params, rest, opt_state, values = self._compiled(params, rest, opt_state, batch, places)
        if self.programs > programs:
            self.compile_seconds += time.perf_counter() - start
        kept, flops = 0, self._largest_flops
        for layer, place in zip(self._layers, self._places, strict=True):
            kept += layer.sizes[place]
            flops -= layer.flops * (layer.sizes[-1] - layer.sizes[place])
        self._step += 1
        self._flops += flops
        return params, rest, opt_state, values | {"updates": kept, "flops": flops, "cached": 0}

    def _program(self, params, rest, state, batch, places=None):
        """The step, as a pure function; ``places``: of the sizes, ``int32[slots]``, or largest."""
        sizes = {}
        if places is not None:
            self.programs += 1  # while tracing, so once a program
            for layer, place in zip(self._layers, places, strict=True):
                if len(layer.sizes) > 1:
                    sizes[layer.name] = place
        (loss, (metrics, rest)), grads = row_value_and_grad(
            self._loss, params, rest, batch, has_aux=True, sizes=sizes, look_ups=False
        )
        # Descent goes along the conjugate of what JAX gives for complex parameters.
        grads = jax.tree.map(jnp.conj, grads)
        if places is None:
            places = [len(layer.sizes) - 1 for layer in self._layers]
        pairs = zip(self._layers, places, strict=True)
        kept = jnp.stack([jnp.asarray(layer.sizes)[place] for layer, place in pairs])
        magnitudes = self._magnitudes(grads, kept)
        updates, inner = self._optimizer.update(grads, state.inner_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        usable = jnp.isfinite(magnitudes)
        average = _DECAY * state.magnitudes + (1 - _DECAY) * magnitudes
        state = state._replace(
            step=state.step + 1,
            inner_state=inner,
            update_counts=state.update_counts + kept,
            magnitudes=jnp.where(usable, average, state.magnitudes),
            nonfinite_counts=state.nonfinite_counts + (~usable).astype(jnp.int32),
        )
        return params, rest, state, {"loss": loss, **metrics}

    def _magnitudes(self, grads: Any, kept: jax.Array) -> jax.Array:
        """Mean ``|g|`` of each layer over what was kept of it, ``[slots]``."""
        paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_row_sparse)
        found = {path_name(path): grad for path, grad in paths}
        means = []
        for name, layer, k in zip(self.slots.names, self._layers, kept, strict=True):
            leaves = [found[leaf] for leaf in self.slots.leaves({name})]
            values = [g.values if isinstance(g, RowSparse) else g for g in leaves]
            total = sum(jnp.sum(jnp.abs(x).astype(jnp.float32)) for x in values)
            elements = sum(math.prod(g.shape) for g in leaves)
            means.append(total * layer.outputs / elements / k.astype(jnp.float32))
        return jnp.stack(means)

    def _look(self, rest: Any, batch: Any) -> None:
        """Learns how the model uses its layers, and what the largest step costs."""
        start = time.perf_counter()
        rest, batch = jax.tree.map(abstract, (rest, batch))
        uses = find_uses(self._loss, self._shapes, rest, batch)
        if not uses:
            raise ValueError(
                "the model has no layer whose backward pass is meProp's: call meprop(model, k) "
                "first, with a k below the layers' widths"
            )
        for name, use in uses.items():
            if len(use.sizes) > 1 and not use.direct:
                raise ValueError(
                    f"layer {name!r} runs inside a scan, a checkpoint or a jitted function, where "
                    "its k cannot change from step to step: give it one k, or leave it dense"
                )
        if any(len(use.sizes) > 1 for use in uses.values()) != (self._share is not None):
            raise ValueError(
                "a share chooses among sizes: give meprop several, as in k=(0.02, 0.05, 0.1), and "
                "step(...) a share; or one k, and share=None"
            )
        known = [f"{leaf}/" for leaf in self.slots.leaves(self.slots.names)]
        if lost := [name for name in uses if not any(x.startswith(f"{name}/") for x in known)]:
            raise ValueError(
                f"the meProp layers {lost} are none of the model's {list(self.slots.names)}: they "
                "were prepared as a part of it; call meprop on the whole model"
            )
        self._uses = uses
        self._layers = [
            _layer(self.slots.leaves({name}), uses, self._shapes) for name in self.slots.names
        ]
        if not self._places:
            self._places = [len(layer.sizes) - 1 for layer in self._layers]
        state = jax.eval_shape(self.init, self._shapes)
        jaxpr = jax.make_jaxpr(self._program)(self._shapes, rest, state, batch)
        self._largest_flops = product_flops(jaxpr)
        self.compile_seconds += time.perf_counter() - start

    def _new_cycle(self, state: FeaturesState) -> FeaturesState:
        # A count of whole updates: of as many features as the layer has.
        widths = np.array([layer.outputs for layer in self._layers])
        counts = np.asarray(state.update_counts) / widths
        worth = np.asarray(priority(state.magnitudes, counts, self._factors))
        if self._share is not None:
            chosen = [i for i, layer in enumerate(self._layers) if len(layer.sizes) > 1]
            layers = [self._layers[i] for i in chosen]
            budget = self._share * sum(layer.flops * layer.outputs for layer in layers)
            sizes, costs = [layer.sizes for layer in layers], [layer.flops for layer in layers]
            try:
                places = choose_sizes([float(worth[i]) for i in chosen], sizes, costs, budget)
            except ValueError as error:
                raise ValueError(f"share={self._share:g}: {error}") from error
            for i, place in zip(chosen, places, strict=True):
                self._places[i] = place
        pairs = zip(self._layers, self._places, strict=True)
        granted = [layer.sizes[place] for layer, place in pairs]
        # Bound to no device where the rest is not, as a second program would be compiled for that.
        return state._replace(
            allocation=jnp.asarray(granted, jnp.int32),
            priorities=jnp.asarray(worth, jnp.float32),
        )

    # Checkpoints.

    def complete(self, opt_state: FeaturesState) -> FeaturesState:
        """The optimizer state, as it is."""
        return opt_state

    def record(self) -> dict[str, Any]:
        """What a resumed run needs beside the arrays, ready for JSON."""
        return {
            "share": self._share,
            "recalc_every": self._cycle,
            "step": self._step,
            "flops": self._flops,
            "places": [int(place) for place in self._places],
        }

    def restore(self, record: Mapping[str, Any], opt_state: FeaturesState) -> FeaturesState:
        """The inverse of `record`; changes nothing and raises where share or cycle differ."""
        for name, ours in (("share", self._share), ("recalc_every", self._cycle)):
            theirs = record.get(name, "another kind of step")
            if theirs != ours:
                raise ValueError(
                    f"the checkpoint was made with {name}={theirs}, this step has {ours}: resume "
                    "with the same, or train from the start"
                )
        self._step, self._flops = record["step"], record["flops"]
        self._places = list(record["places"])
        return opt_state

    def check_processes(self) -> None:
        """Several processes can run this step: all of them see the same counts and magnitudes."""


class _Layer(NamedTuple):
    """A slot as the budget sees it."""

    name: str  # of the meProp layer, "" where there is none
    outputs: int
    sizes: tuple[int, ...]
    flops: float  # of the backward pass, for each output feature


def _layer(leaves: frozenset[str], uses: Mapping[str, LayerUse], params: Any) -> _Layer:
    for name, use in uses.items():
        if any(leaf.startswith(f"{name}/") for leaf in leaves):
            return _Layer(name, use.outputs, use.sizes, use.flops(1))
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    width = max(x.shape[-1] if x.ndim else 1 for path, x in paths if path_name(path) in leaves)
    return _Layer("", width, (width,), 0.0)


def choose_sizes(
    priorities: Sequence[float],
    sizes: Sequence[Sequence[int]],
    costs: Sequence[float],
    budget: float,
) -> list[int]:
    r"""Each layer's ``k``, as its place in ascending ``sizes``, by priority and within a budget.

    The target is :math:`t_i = \min(\max(\lambda s_i, \text{least}_i), \text{most}_i)` with
    :math:`\sum_i \text{cost}_i t_i = B`, ``costs`` being those of one output feature. It is rounded
    down to the nearest size; what that leaves goes, size by size, to the layer that is furthest
    below its target, in relation to it, and whose next size is still paid for.
    """
    weights = np.asarray(priorities, float)
    weights = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0)
    if not weights.any():
        weights = np.ones_like(weights)
    cost = np.asarray(costs, float)
    least = np.array([s[0] for s in sizes], float)
    most = np.array([s[-1] for s in sizes], float)
    if cost @ least > budget * (1 + 1e-9):
        raise ValueError(
            f"the budget of {budget:.4g} does not pay for the smallest sizes, {cost @ least:.4g}"
        )
    low, high = 0.0, float(np.max(most[weights > 0] / weights[weights > 0]))
    for _ in range(200):  # far past the last bit
        middle = (low + high) / 2
        spent = cost @ np.clip(middle * weights, least, most)
        low, high = (middle, high) if spent <= budget else (low, middle)
    target = np.clip(low * weights, least, most)
    places = [
        max(p for p, k in enumerate(s) if k <= t * (1 + 1e-9))
        for s, t in zip(sizes, target, strict=True)
    ]
    left = budget * (1 + 1e-9) - sum(c * s[p] for c, s, p in zip(cost, sizes, places, strict=True))
    while True:
        # The layer that lags most goes first, and of several that lag alike the worthiest.
        lagging = [
            (s[p] / target[i], -weights[i], i)
            for i, (s, p) in enumerate(zip(sizes, places, strict=True))
            if p + 1 < len(s) and weights[i] > 0 and cost[i] * (s[p + 1] - s[p]) <= left
        ]
        if not lagging:
            return places
        *_, i = min(lagging)
        left -= cost[i] * (sizes[i][places[i] + 1] - sizes[i][places[i]])
        places[i] += 1
