"""Training with sparse weights: where they come from, and how their places move."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from priorityprop_jax.core.modules import walk
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.sparse.gradual import gradual_pruning, masks_of
from priorityprop_jax.sparse.layers import SparseLayer, as_matrix
from priorityprop_jax.sparse.pattern import ARRAYS, carry, take_values
from priorityprop_jax.sparse.step import cosine_fraction, drop_and_grow
from priorityprop_jax.sparse.swap import (
    layers_to_prune,
    move_state,
    owner_of,
    replace,
    sparse_layers,
)

if TYPE_CHECKING:
    from priorityprop_jax.training.trainer import PriorityPropTrainer

Loss = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class DynamicSparsity:
    """Dynamic sparse training with priority as the growth rule; for `PriorityPropTrainer`.

    Before step ``every``, ``2 * every`` and so on, up to ``end``, each `SparseLinear` and
    `SparseConv` drops a fraction of its places, where values are smallest, and grows as many where
    its priority is largest: see `drop_and_grow` and `cosine_fraction`. The priority of a place is
    the magnitude of the dense gradient of that batch. Counts and depths, which priorities of slots
    have as factors, are those of the layer: at a fixed number of non-zeros for each layer they
    decide nothing, so this is RigL. New values are zero, and so is what the optimizer keeps of
    them. In between, steps cost what the non-zeros cost, and nothing is compiled anew.

    Attributes:
      end: the step from which places stay, such as three quarters of the run.
      every: steps between two changes.
      fraction: of the places that move, at first; it falls to 0 at ``end``.

    Raises:
      ValueError: an option makes no sense.

    Example:
      >>> from priorityprop_jax import DynamicSparsity
      >>> DynamicSparsity(end=7500).every
      100

    References:
      Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134
    """

    end: int
    every: int = 100
    fraction: float = 0.3

    def __post_init__(self):
        for name in ("end", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise ValueError(f"{name} must be a whole number of steps from 1 on, got {value}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, got {self.fraction}")


class SparsityChange:
    """Changes the places of a model's sparse layers between two steps; it has no state.

    Args:
      options: when and how much.
      loss: ``(model, batch) -> loss``, or ``(loss, metrics)``.
      model: in the mode that trains; only its structure is kept.

    Attributes:
      compile_seconds: wall time spent on tracing and compiling so far.

    Raises:
      ValueError: if the model has no sparse layer.
    """

    def __init__(self, options: DynamicSparsity, loss: Loss, model: nnx.Module) -> None:
        layers = sparse_layers(model)
        if not layers:
            raise ValueError(
                "the model has no SparseLinear or SparseConv whose places could move: put them in "
                "first, such as by sparse_start(model, 0.9)"
            )
        self._options, self._loss = options, loss
        self._graph = nnx.graphdef(model)
        self._scores = jax.jit(self._dense_gradients)
        self._compiled = False
        self.compile_seconds = 0.0

    def __call__(
        self, step: int, params: Any, rest: Any, opt_state: Any, batch: Any
    ) -> tuple[Any, Any, Any]:
        """Moves places, if it is time.

        Args:
          step: steps done.
          params: the parameters, an `nnx.State`.
          rest: all other variables, the index arrays among them.
          opt_state: any pytree; arrays in it go with the values whose path and shape they have.
          batch: of the coming step.

        Returns:
          ``params``, ``rest`` and ``opt_state``, of the same shapes.
        """
        options = self._options
        if not 0 < step < options.end or step % options.every:
            return params, rest, opt_state
        fraction = float(cosine_fraction(step, options.end, options.fraction))
        start = time.perf_counter()
        scores = jax.device_get(self._scores(params, rest, batch))
        if not self._compiled:
            self._compiled = True
            self.compile_seconds += time.perf_counter() - start
        model = self._merged(params, rest)
        moved = {}
        for name, layer in sparse_layers(model).items():
            pattern, source = drop_and_grow(
                layer.values[...], layer.pattern, as_matrix(scores[name]), fraction=fraction
            )
            for array in ARRAYS:
                index = layer.index[array]
                index.set_value(_like(getattr(pattern, array), index[...]))
            values = layer.values[...]
            layer.values.set_value(_like(carry(values, source), values))
            moved[name] = layer.values.shape, source
        opt_state = move_state(opt_state, moved, _like)
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param)), opt_state

    def _merged(self, params: Any, rest: Any) -> Any:
        # Fresh trees: those given are the caller's.
        return nnx.merge(self._graph, *jax.tree.map(lambda leaf: leaf, (params, rest)))

    def _dense_gradients(self, params: Any, rest: Any, batch: Any) -> dict[str, jax.Array]:
        """Magnitudes of the gradients of all kernels as if they were dense, by layer."""

        def loss(kernels):
            model = self._merged(params, rest)
            dense = {}
            for name, layer in sparse_layers(model).items():
                dense[id(layer)] = layer.to_dense()
                dense[id(layer)].kernel.set_value(kernels[name])
            model = replace(model, dense)
            result = self._loss(model, batch)
            return result[0] if isinstance(result, tuple) else result

        layers = sparse_layers(self._merged(params, rest))
        kernels = {name: layer.kernel() for name, layer in layers.items()}
        return jax.tree.map(jnp.abs, jax.grad(loss)(kernels))


def pruned_optimizer(
    optimizer: optax.GradientTransformation,
    model: nnx.Module,
    sparsity: float,
    *,
    begin: int,
    end: int,
) -> optax.GradientTransformation:
    """An optimizer that also prunes the layers of a dense model little by little.

    Args:
      optimizer: any.
      model: its `layers_to_prune` are pruned, each to ``sparsity``.
      sparsity: in [0, 1).
      begin: the first step that prunes.
      end: the last; twenty steps are the most between two.

    Returns:
      `gradual_pruning` behind the optimizer; hand over to sparse layers by `continue_pruned`.
    """
    chosen = {f"{name}/kernel" for name in layers_to_prune(model)}
    every = min(20, max(1, (end - begin) // 10))
    pruning = gradual_pruning(sparsity, begin=begin, end=end, every=every)

    # Masked, as the masks that it leaves absent (None) tell `priorityprop` nothing.
    def choose(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in chosen, params)

    return optax.chain(optimizer, optax.masked(pruning, choose))


def continue_pruned(trainer: PriorityPropTrainer, pruned: PriorityPropTrainer) -> None:
    """Goes on with sparse layers where a training with `pruned_optimizer` has come to its end.

    Values, moments, all other state, the counts of steps and epochs, and the history are taken
    over. What the optimizer kept of weights that are pruned is let go.

    Args:
      trainer: of a model made by `sparse_start` with the same sparsity, and the optimizer alone.
      pruned: the trainer of the dense model.
    """
    model, dense = trainer.model, pruned.model
    state = pruned.optimizer_state
    flat, _ = jax.tree_util.tree_flatten_with_path(masks_of(state))
    masks = {path_name(path): mask for path, mask in flat}
    patterns = {}
    for name, layer in sparse_layers(model).items():
        layer.change_mask(masks[f"{name}/kernel"])
        patterns[f"{name}/values"] = layer.pattern

    def taken(old, new):
        """A tree of the dense model's arrays as one of the sparse model's."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(new)
        leaves = []
        for (path, like), leaf in zip(paths, jax.tree.leaves(old), strict=True):
            if leaf.shape != like.shape:
                leaf = take_values(as_matrix(leaf), patterns[owner_of(path, patterns)])
            leaves.append(leaf)
        return treedef.unflatten(leaves)

    params = taken(nnx.state(dense, nnx.Param), nnx.state(model, nnx.Param))
    nnx.update(model, params, nnx.state(dense, nnx.Not(nnx.Param)))
    inner: Any = state.inner_state
    inner = taken(inner[0], trainer.optimizer_state.inner_state)
    trainer.take_over(pruned, state._replace(inner_state=inner))


def layer_table(model: nnx.Module) -> list[dict[str, Any]]:
    """The layers of a model that are sparse or could be: path, shape, non-zeros, weights.

    Args:
      model: any module.

    Returns:
      One dict a layer, in the order of `sparse_start`, ready for JSON.

    Example:
      >>> from flax import nnx
      >>> from priorityprop_jax.sparse.training import layer_table
      >>> layer_table(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      [{'layer': '', 'shape': [4, 8], 'nonzeros': 32, 'weights': 32}]
    """
    rows = []
    for name, layer in walk(model):
        if isinstance(layer, SparseLayer | nnx.Linear | nnx.Conv):
            sparse = isinstance(layer, SparseLayer)
            shape = layer.kernel_shape if sparse else layer.kernel.shape
            count = layer.nonzeros if sparse else math.prod(shape)
            row = {"layer": name, "shape": list(shape), "nonzeros": count}
            rows.append({**row, "weights": math.prod(shape)})
    return rows


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    """Where the old one was, as for anything else a step would be compiled anew."""
    return jax.device_put(new, old.sharding) if old.committed else new
