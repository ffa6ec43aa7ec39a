"""Gradients of the active leaves only: what is not asked for is not computed.

XLA leaves out the dead part of a backward pass only where it is dead for every value of the
arguments, so the set of active leaves is static: one compiled program for each set.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.core.modules import through_module
from priorityprop_jax.core.paths import path_name

_ROW = re.compile(r"(.*)\[(\d+)\]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ActiveLeaves:
    """Which leaves of a pytree, and which layers of its stacked leaves, are active.

    Attributes:
      treedef: the pytree's structure.
      rows: for every leaf: None (inactive), True (the whole leaf), or the active layers of a leaf
        that stacks layers on axis 0, in ascending order.
    """

    treedef: Any
    rows: tuple[bool | tuple[int, ...] | None, ...]

    def part(self, tree: Any) -> Any:
        """The active leaves of a tree of this structure.

        Returns:
          The same structure with None in place of inactive leaves; a stacked leaf ``[layers, ...]``
          of which ``k`` layers are active becomes ``[k, ...]``.
        """
        return self.map(lambda rows, x: None if rows is None else take(x, rows), tree)

    def split(self, tree: Any) -> tuple[Any, Any]:
        """Splits a tree by leaf into those with anything active and the others, None for absent.

        A stacked leaf with at least one active layer is on the active side as a whole.
        """
        return (
            self.map(lambda rows, x: None if rows is None else x, tree),
            self.map(lambda rows, x: x if rows is None else None, tree),
        )

    def join(self, active: Any, other: Any) -> Any:
        """The inverse of `split`."""
        return self.map(lambda rows, a, b: b if rows is None else a, active, other)

    def replace(self, tree: Any, part: Any) -> Any:
        """The tree with its active leaves and layers replaced by ``part``'s."""
        return self.map(lambda rows, x, new: x if rows is None else put(x, rows, new), tree, part)

    def map(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Maps ``(rows, leaf of each tree)`` to a tree; None counts as a leaf."""
        leaves = (self.treedef.flatten_up_to(tree) for tree in trees)
        return self.treedef.unflatten(
            [function(*row) for row in zip(self.rows, *leaves, strict=True)]
        )


def find_active(tree: Any, active: Iterable[str]) -> ActiveLeaves:
    """Finds the leaves, and layers of stacked leaves, that a set of names means.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`.
      active: names: a leaf's path joined by ``/``, as in ``"encoder/0/kernel"``, or with ``[3]``
        behind it for layer 3 of a leaf that stacks layers on axis 0.

    Returns:
      What is active.

    Raises:
      TypeError: if ``active`` is a string rather than a set of them.
      ValueError: if a name means no leaf, or a layer that does not exist.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.partial.grad import find_active
      >>> params = {"blocks": jnp.ones((4, 2)), "embed": jnp.ones(3), "head": jnp.ones(3)}
      >>> find_active(params, {"head", "blocks[3]", "blocks[1]"}).rows
      ((1, 3), None, True)
    """
    active = _names(active)
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    index = {path_name(path): i for i, (path, _) in enumerate(paths)}
    if len(index) < len(paths):
        raise ValueError("two leaves have the same path; rename a key of the parameters")
    rows: list[Any] = [None] * len(paths)
    for name in active:
        if name in index:
            rows[index[name]] = True
            continue
        match = _ROW.fullmatch(name)
        if match is None or match[1] not in index:
            known = ", ".join(sorted(index)[:4])
            raise ValueError(f"no leaf is called {name!r}; the leaves are {known}, ...")
        leaf, layer = index[match[1]], int(match[2])
        shape = np.shape(paths[leaf][1])
        if not shape or layer >= shape[0]:
            raise ValueError(f"{match[1]!r} of shape {shape} has no layer {layer} on its axis 0")
        if rows[leaf] is not True:
            rows[leaf] = (rows[leaf] or set()) | {layer}
    for i, (_, leaf) in enumerate(paths):
        if isinstance(rows[i], set):
            rows[i] = True if len(rows[i]) == np.shape(leaf)[0] else tuple(sorted(rows[i]))
    return ActiveLeaves(treedef, tuple(rows))


def _names(active: Iterable[str]) -> frozenset[str]:
    if isinstance(active, str):
        raise TypeError(f"active must be a set of names, got the string {active!r}")
    return frozenset(active)


def _checked(loss_fn: Any, active: Iterable[str]) -> frozenset[str]:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    return _names(active)


def take(x: Any, rows: bool | tuple[int, ...] | None) -> Any:
    """The active layers ``[k, ...]`` of a stacked leaf; the whole leaf where ``rows`` is True."""
    if rows is None or isinstance(rows, bool):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(rows), *x.shape[1:]), x.dtype)
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]  # a slice is cheaper than a gather
    return x[np.asarray(rows)]


def put(x: jax.Array, rows: bool | tuple[int, ...] | None, new: jax.Array) -> jax.Array:
    """The inverse of `take`: ``x`` with its active layers replaced."""
    if rows is None or isinstance(rows, bool):
        return new
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return jax.lax.dynamic_update_slice_in_dim(x, new, rows[0], 0)
    return jnp.asarray(x).at[np.asarray(rows)].set(new)


def partial_value_and_grad(
    loss_fn: Callable[..., Any], active: Iterable[str], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    r"""`jax.value_and_grad` for the active leaves only; the other gradients are absent.

    The loss is the same function of all parameters,

    .. math:: g_i = \partial L(\theta) / \partial \theta_i \quad \text{for active } i,

    but what is inactive enters it as a constant, so that XLA has neither its weight gradients nor
    the part of the chain that only they need to compute. A backward pass that stops at a layer near
    the output costs what the layers behind it cost. Inside a `jax.lax.scan` over layers all of them
    run the same program: there the chain stops early only if the scan is split
    (`priorityprop_jax.partial.stages` does).

    Args:
      loss_fn: ``(params, *args, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux``.
      active: names of active leaves, ``"encoder/0/kernel"``, and of active layers of leaves that
        stack layers on axis 0, ``"blocks/kernel[3]"``; see `Slots.leaves` for those of slots.
        Static.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      A function ``(params, *args, **kwargs) -> (value, grads)``, with ``grads`` of the structure of
      ``params``: None in place of inactive leaves, and ``[k, ...]`` for a stacked leaf of which
      ``k`` layers are active. The value is what ``loss_fn`` returns, ``aux`` included.

    Raises:
      TypeError: if ``loss_fn`` is no function, or ``active`` is a string.
      ValueError: when called, if a name means no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import partial_value_and_grad
      >>> params = {"Dense_0": jnp.ones((2, 2)), "Dense_1": jnp.ones(2)}
      >>> loss_fn = lambda p, x: jnp.sum(x @ p["Dense_0"] @ p["Dense_1"])
      >>> value, grads = partial_value_and_grad(loss_fn, {"Dense_1"})(params, jnp.ones(2))
      >>> float(value), grads["Dense_0"], grads["Dense_1"].tolist()
      (4.0, None, [2.0, 2.0])
    """
    active = _checked(loss_fn, active)

    def value_and_grad(params, *args, **kwargs):
        chosen = find_active(params, active)

        def of_part(part):
            return loss_fn(chosen.replace(params, part), *args, **kwargs)

        return jax.value_and_grad(of_part, has_aux=has_aux)(chosen.part(params))

    return value_and_grad


def nnx_partial_value_and_grad(
    loss_fn: Callable[..., Any],
    active: Iterable[str],
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
) -> Callable[..., tuple[Any, Any]]:
    """`flax.nnx.value_and_grad` for the active parameters of a module only.

    The twin of `partial_value_and_grad`. What else the loss changes in the module (batch
    statistics, random number counts) is changed as `nnx.value_and_grad` would.

    Args:
      loss_fn: ``(model, *args, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux``.
      active: see `partial_value_and_grad`; names are paths in the module. Static.
      has_aux: as in `jax.value_and_grad`.
      wrt: filter of the variables that are parameters.

    Returns:
      A function ``(model, *args, **kwargs) -> (value, grads)``, with ``grads`` an `nnx.State` of
      all variables that ``wrt`` lets through, None in place of the inactive ones.

    Raises:
      TypeError: if ``loss_fn`` is no function, or ``active`` is a string.
      ValueError: when called, if a name means no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import nnx_partial_value_and_grad
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: model(x).sum()
      >>> value, grads = nnx_partial_value_and_grad(loss_fn, {"bias"})(model, jnp.ones((3, 2)))
      >>> grads["kernel"], grads["bias"]
      (None, Array([3.], dtype=float32))
    """
    active = _checked(loss_fn, active)

    def value_and_grad(model, *args, **kwargs):
        def of_model(model):
            return loss_fn(model, *args, **kwargs)

        return through_module(
            lambda loss: partial_value_and_grad(loss, active, has_aux=True),
            of_model,
            model,
            has_aux=has_aux,
            wrt=wrt,
        )

    return value_and_grad


def apply_active_updates(params: Any, updates: Any, active: Iterable[str]) -> Any:
    """`optax.apply_updates` where some updates are absent.

    Args:
      params: pytree of parameters.
      updates: pytree of the same structure: None where a leaf is inactive, ``[k, ...]`` where ``k``
        layers of a stacked leaf are active.
      active: the names that the gradients were taken with. Static.

    Returns:
      The new parameters; inactive leaves and layers are the very same, bit for bit.

    Raises:
      ValueError: if a name means no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import apply_active_updates
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> apply_active_updates(params, {"a": None, "b": -jnp.ones(2)}, {"b"})["b"].tolist()
      [0.0, 0.0]
    """

    def moved(rows, x, update):
        if rows is None or update is None:
            return x
        return put(x, rows, _moved(take(x, rows), update))

    return find_active(params, active).map(moved, params, updates)


def _moved(x: jax.Array, update: jax.Array) -> jax.Array:
    return jnp.asarray(x + update, dtype=jnp.asarray(x).dtype)
