"""Whatever a user wants to train, as a `Model`: `nnx` modules and pytrees of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.training.history import check_metrics
from priorityprop_jax.training.step import Loss, LossFn, Model


def as_model(model: Any) -> Model:
    """Makes a `Model` of an `nnx` module or a pytree; what has the methods is one already."""
    if all(callable(getattr(model, name, None)) for name in ("split", "join", "loss", "evaluator")):
        return model
    return NnxModel(model) if isinstance(model, nnx.Module) else TreeModel(model)


class NnxModel(Model):
    """An `nnx` module, which is trained in place; its own mode is left alone."""

    def __init__(self, module: nnx.Module) -> None:
        self.module = module
        # Modes are part of the static graph, so both come from a copy. What `sow` collects is no
        # state: it would grow at each step.
        twin = nnx.clone(module)
        nnx.pop(twin, nnx.Intermediate)
        twin.train()
        self._train_graph = nnx.graphdef(twin)
        twin.eval()
        self._eval_graph = nnx.graphdef(twin)

    def split(self) -> tuple[Any, Any]:
        """The parameters, and the state of all else but `Intermediate`."""
        _, params, _, rest = nnx.split(self.module, nnx.Param, nnx.Intermediate, ...)
        return params, rest

    def join(self, params: Any, rest: Any) -> None:
        """Updates the module."""
        nnx.update(self.module, params, rest)

    def loss(self, loss_fn: LossFn, params, rest, batch, **kwargs) -> tuple[Any, Any]:
        """See `Model`."""
        # A fresh tree: variables may only change at the trace level that made them.
        module = nnx.merge(self._train_graph, params, jax.tree.map(lambda leaf: leaf, rest))
        result = loss_fn(module, batch, **kwargs)
        nnx.pop(module, nnx.Intermediate)
        return result, nnx.state(module, nnx.Not(nnx.Param))

    def evaluator(self, params: Any, rest: Any) -> Any:
        """A module in evaluation mode."""
        return nnx.merge(self._eval_graph, params, rest)


class TreeModel(Model):
    """Parameters as a pytree of floating-point arrays, which are copied."""

    def __init__(self, params: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
                found = f"an array of {leaf.dtype}" if hasattr(leaf, "dtype") else type(leaf)
                raise TypeError(
                    "model must be a flax.nnx.Module, Stages or a pytree of floating-point arrays, "
                    f"but {path_name(path)!r} is {found}; for a Linen module give its parameters, "
                    "and a loss_fn that applies it"
                )
        # The training step donates its arguments, and the caller may go on using these.
        self._params = copy(params)

    def split(self) -> tuple[Any, Any]:
        """The parameters, and nothing."""
        return self._params, {}

    def join(self, params: Any, rest: Any) -> None:
        """Keeps the parameters for the next `split`."""
        self._params = params

    def loss(self, loss_fn: LossFn, params, rest, batch, **kwargs) -> tuple[Any, Any]:
        """See `Model`."""
        return loss_fn(params, batch, **kwargs), rest

    def evaluator(self, params: Any, rest: Any) -> Any:
        """The parameters."""
        return params


def loss_of(model: Model, loss_fn: LossFn) -> Loss:
    """The user's loss as a pure function of arrays, checked."""

    def loss(params, rest, batch, **kwargs):
        result, rest = model.loss(loss_fn, params, rest, batch, **kwargs)
        value, metrics = split_result(result)
        return value, (metrics, rest)

    return loss


def split_result(result: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and the metrics in what a ``loss_fn`` has returned, checked."""
    pair: Any = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    loss, metrics = pair
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            "loss_fn must return a real scalar, or a pair of one and a dict of metrics; got a loss "
            f"of shape {jnp.shape(loss)} and dtype {jnp.result_type(loss)}"
        )
    return loss, check_metrics("the second result of loss_fn", metrics, of_step=True)


def copy(tree: Any) -> Any:
    """A pytree of arrays of its own; Python's numbers become arrays."""
    # An explicit dtype also makes Python floats strongly typed, as the step returns them.
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True), tree)
