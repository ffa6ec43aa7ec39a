"""Look-ups of rows of a table, whose gradient is these rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.fragile import spec_of, varying
from priorityprop_jax.core.frame import LayerUse, look_up
from priorityprop_jax.core.modules import as_it_was, check_module, walk
from priorityprop_jax.core.rows import row_numbers


def embed_rows(model: nnx.Module) -> int:
    r"""Lets `value_and_grad` give the gradients of embeddings as rows, in place.

    A batch of ``n`` ids touches at most ``n`` rows of a table ``[ids, width]``, and the gradient

    .. math:: dE_{i,:} = \sum_{m : t_m = i} dy_m

    is zero elsewhere: a `RowSparse` of ``n`` rows holds it, exactly, and an optimizer by rows such
    as ``meprop.row_sparse(optax.sgd(1e-2))`` or `row_adam` leaves the others alone. Values, other
    gradients, parameters and their paths stay; so do the gradients of `nnx.value_and_grad` and of
    `priorityprop_jax.partial`, which are whole arrays. So is a look-up of as many ids as there are
    rows or more, and a table that `value_and_grad` says it cannot do by rows. `restore` undoes it.

    Args:
      model: the module; each `nnx.Embed` in it is changed, but for those with a ``__call__`` of
        their own.

    Returns:
      How many embeddings were changed.

    Raises:
      TypeError: if the model is no `nnx.Module`.
      ValueError: if it has no `nnx.Embed`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> from priorityprop_jax import exact, meprop
      >>> model = nnx.Embed(1000, 4, rngs=nnx.Rngs(0))
      >>> exact.embed_rows(model)
      1
      >>> optimizer = nnx.Optimizer(model, meprop.row_sparse(optax.sgd(0.1)), wrt=nnx.Param)
      >>> loss_fn = lambda model, ids: model(ids).sum()
      >>> value, grads = exact.value_and_grad(loss_fn)(model, jnp.array([7, 3, 7]))
      >>> rows = grads["embedding"].get_value()
      >>> rows.values[:2].tolist()  # those of 3 and 7; the third is padding
      [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]
      >>> updates = optimizer.update(model, grads)
      >>> exact.restore(model)
      1
    """
    check_module(model)
    found = [part for _, part in walk(model) if isinstance(part, nnx.Embed)]
    if not found:
        raise ValueError("the model has no nnx.Embed whose gradient could be rows")
    found = [part for part in found if type(part).__call__ is nnx.Embed.__call__]
    for part in found:
        object.__setattr__(part, "__class__", _by_rows(type(part)))  # no part of the graph
    return len(found)


def restore_embedding(part: nnx.Module) -> bool:
    """Undoes `embed_rows` for one module, in place; whether there was anything to undo."""
    return as_it_was(part, "rows_of")


@functools.cache
def _by_rows(kind: type) -> type:
    def __call__(self, inputs, *args, **kwargs):
        whole = self.num_embeddings == 1 or args or kwargs
        if whole or not jnp.issubdtype(inputs.dtype, jnp.integer):
            return kind.__call__(self, inputs, *args, **kwargs)
        rows = take(self.embedding[...], inputs)
        return self.promote_dtype((rows,), dtype=self.dtype, inexact=False)[0]

    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__call__": __call__}
    return type(kind.__name__, (kind,), {**names, "rows_of": kind})


def take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``jnp.take(table, ids, axis=0)``, whose gradient `value_and_grad` gives as rows.

    For models that are no `nnx.Module`, where the table is a leaf of the parameters; see
    `embed_rows`, of which it is the inside.

    Args:
      table: ``[rows, width]``.
      ids: whole numbers ``[...]``; negative ones count from the end, and others that are out of
        bounds give NaN and have no gradient.

    Returns:
      ``[..., width]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import exact
      >>> params = {"table": jnp.ones((1000, 4))}
      >>> loss_fn = lambda params, ids: exact.take(params["table"], ids).sum()
      >>> value, grads = exact.value_and_grad(loss_fn)(params, jnp.array([7, 3, 7]))
      >>> grads["table"].values.shape
      (3, 4)
    """
    n, count = ids.size, len(table)
    # Row numbers come out of the backward pass as float32, exact for whole numbers up to 2**24.
    fits = table.ndim == 2 and 0 < n < count and n + count < 2**24
    local = varying(ids) <= varying(table)  # else shards must sum whole arrays
    explicit = any(axis is not None for x in (table, ids) for axis in spec_of(x))
    tap = None
    if fits and jnp.issubdtype(table.dtype, jnp.floating):
        tap = look_up(LayerUse(n, table.shape[1], count, (n,), local and not explicit))
    return jnp.take(table, ids, axis=0) if tap is None else _tapped(table, *tap, ids)


@jax.custom_vjp
def _tapped(table: jax.Array, values: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0)


def _forward(table: jax.Array, values: jax.Array, rows: jax.Array, ids: jax.Array) -> Any:
    return jnp.take(table, ids, axis=0), (row_numbers(ids, len(table)), values)


def _backward(residuals: Any, dy: jax.Array) -> Any:
    rows, values = residuals
    rows = rows.astype(jnp.float32) + 1
    return None, dy.reshape(values.shape).astype(values.dtype), rows, None


_tapped.defvjp(_forward, _backward)
