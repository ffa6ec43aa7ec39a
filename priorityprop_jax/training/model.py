"""Whatever a user wants to train, as a `Model`, and averages over data with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.fragile import calls_python
from priorityprop_jax.core.modules import attributes, check_unchanged, modes, trainable, warn_off
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.training.history import check_metrics
from priorityprop_jax.training.interrupts import Stop
from priorityprop_jax.training.processes import check_batch, wait_and_get
from priorityprop_jax.training.step import Loss, LossFn, Model

MetricFn = Callable[[Any, Any], Mapping[str, Any]]


def as_model(model: Any) -> Model:
    """Makes a `Model` of an `nnx` module or a pytree; what has the methods is one already."""
    if all(callable(getattr(model, name, None)) for name in ("split", "join", "loss", "evaluator")):
        return model
    return _NnxModel(model) if isinstance(model, nnx.Module) else _TreeModel(model)


class _NnxModel(Model):
    """An `nnx` module, which is trained in place, in its own modes."""

    def __init__(self, module: nnx.Module) -> None:
        self.module = module
        self._modes = modes(module)
        if self._modes.off:
            warn_off("the model", 5)

    def split(self) -> tuple[Any, Any]:
        _, params, _, rest = nnx.split(self.module, trainable, nnx.Intermediate, ...)
        return params, rest

    def join(self, params: Any, rest: Any) -> None:
        nnx.update(self.module, params, rest)

    def loss(self, loss_fn: LossFn, params, rest, batch, **kwargs) -> tuple[Any, Any]:
        # A fresh tree: variables may only change at the trace level that made them.
        module = nnx.merge(self._modes.given, params, jax.tree.map(lambda leaf: leaf, rest))
        before = attributes(module)
        result = loss_fn(module, batch, **kwargs)
        nnx.pop(module, nnx.Intermediate)
        check_unchanged(module, self._modes.given, before, "loss_fn")
        return result, nnx.state(module, nnx.Not(trainable))

    def evaluator(self, params: Any, rest: Any) -> Any:
        return nnx.merge(self._modes.evaluation, params, rest)


class _TreeModel(Model):
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
        return self._params, {}

    def join(self, params: Any, rest: Any) -> None:
        self._params = params

    def loss(self, loss_fn: LossFn, params, rest, batch, **kwargs) -> tuple[Any, Any]:
        return loss_fn(params, batch, **kwargs), rest

    def evaluator(self, params: Any, rest: Any) -> Any:
        return params


def loss_of(model: Model, loss_fn: LossFn) -> Loss:
    """The user's loss as a pure function of arrays, checked."""

    def loss(params, rest, batch, **kwargs):
        result, rest = model.loss(loss_fn, params, rest, batch, **kwargs)
        value, metrics = split_result(result)
        return value, (metrics, rest)

    return loss


def fragile(loss: Loss, params: Any, rest: Any, batch: Any) -> bool:
    """Whether a compiled step on a loss may raise: it calls Python back, or JAX looks for NaN."""
    if any(getattr(jax.config, f"jax_debug_{what}") for what in ("nans", "infs")):
        return True
    try:
        traced = jax.make_jaxpr(loss)(params, rest, batch)
    except Exception:  # The step will raise it again.
        return False
    return calls_python(traced)


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


class Evaluation:
    """A compiled evaluation, by a ``metric_fn`` or, if that is None, by the loss.

    At the parameters, or what ``eval_params`` makes of the optimizer's state and them.
    """

    def __init__(
        self, model: Model, loss_fn: LossFn, metric_fn: MetricFn | None, eval_params: Any
    ) -> None:
        self._model, self._loss_fn, self._metric_fn = model, loss_fn, metric_fn
        self._params_of = None if eval_params is None else jax.jit(eval_params)
        self.compiled = jax.jit(self._metrics)

    def __call__(
        self, params: Any, rest: Any, opt_state: Any, data: Iterable[Any], stop: Stop
    ) -> dict[str, float] | None:
        """The averages over the rows of some batches, or None if it was stopped."""
        if self._params_of is not None:
            params = self._params_of(opt_state, params)
        # What a step gave is bound to its device and what it never touched is not: left so, there
        # would be a program for each of these cases.
        params, rest = jax.tree.map(_bound, (params, rest))
        results, rows = [], []
        for batch in stop.until(data):
            check_batch(batch)
            shape = jnp.shape(next(iter(jax.tree.leaves(batch)), 0))
            rows.append(shape[0] if shape else 1)
            results.append(self.compiled(params, rest, batch))
        if stop:
            return None
        if not sum(rows):
            raise ValueError("the data to evaluate on are empty")
        values = wait_and_get(results)
        return {
            name: math.fsum(n * float(value[name]) for n, value in zip(rows, values, strict=True))
            / sum(rows)
            for name in values[0]
        }

    def _metrics(self, params: Any, rest: Any, batch: Any) -> dict[str, Any]:
        model = self._model.evaluator(params, rest)
        if self._metric_fn is not None:
            return check_metrics("metric_fn", self._metric_fn(model, batch))
        loss, metrics = split_result(self._loss_fn(model, batch))
        return {"loss": loss, **metrics}


def _bound(leaf: Any) -> jax.Array:
    """An array that is committed to the devices where it is."""
    array = jnp.asarray(leaf)
    return array if array.committed else jax.device_put(array, array.sharding)


def copy(tree: Any) -> Any:
    """A pytree of arrays of its own; Python's numbers become arrays."""
    # An explicit dtype also makes Python floats strongly typed, as the step returns them.
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True), tree)
