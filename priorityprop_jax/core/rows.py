"""Gradients of which only some rows exist, and what must know of them besides the optimizer.

A backward pass that lets the top k of n output gradients through changes k of n rows of a weight
stored ``(out, in)``. As a dense array, such a gradient costs as much to write, and its optimizer as
much to run, as a whole one; `RowSparse` carries the k rows alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

# What every scatter of rows may rely on; padding is out of bounds, and dropped.
SCATTER: dict[str, Any] = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True, eq=False)
class RowSparse:
    """An array that is zero except for some rows: ``zeros(shape).at[rows].set(values)``.

    A pytree node with the children ``rows`` and ``values``. Functions that map over arrays see
    both: `optax.scale` would multiply the row numbers too. `on_values` keeps them out of it.

    ``array + row_sparse`` adds the rows, as `optax.apply_updates` does: the sum has the array's
    dtype, all other rows are the very same, and compiled with the array donated they are not even
    read. It raises a TypeError if arithmetic was done on row numbers, and a ValueError if shapes
    differ.

    Attributes:
      rows: ``int32[k]``, ascending and distinct, none negative. What is ``>= shape[0]`` is padding:
        it means no row, and its values, even NaN, are ignored.
      values: ``[k, *shape[1:]]``, of any float dtype.
      shape: the shape of the whole, a tuple. Static.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.rows import RowSparse
      >>> some = RowSparse(jnp.array([0, 3]), jnp.ones((2, 2)), (3, 2))
      >>> some.densify().tolist()
      [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
      >>> (jnp.ones((3, 2)) + some).tolist()
      [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
    """

    rows: jax.Array
    values: jax.Array
    shape: tuple[int, ...]

    # NumPy would take this for a number, and add it to each of its elements.
    __array_ufunc__ = None

    def __radd__(self, whole: Any) -> jax.Array:
        check_rows(self)
        whole = jnp.asarray(whole)
        if self.shape != whole.shape:
            raise ValueError(f"rows of a shape {self.shape} do not fit an array of {whole.shape}")
        if 0 in whole.shape or not len(self.rows):
            return whole
        at = whole.at[self.rows]
        if self.values.dtype == whole.dtype:
            return at.add(self.values, **SCATTER)
        # As optax has it: the sum is rounded to the parameter's dtype, not the update.
        moved = (at.get(mode="clip") + self.values).astype(whole.dtype)
        return at.set(lax.optimization_barrier(moved), **SCATTER)

    def densify(self) -> jax.Array:
        """The whole array, ``[*shape]``."""
        check_rows(self)
        return jnp.zeros(self.shape, self.values.dtype).at[self.rows].set(self.values, **SCATTER)

    def map_values(self, function: Callable[[jax.Array], jax.Array]) -> RowSparse:
        """The same rows with ``function(values)``, which must keep zero at zero."""
        return RowSparse(self.rows, function(self.values), self.shape)


def is_row_sparse(x: Any) -> bool:
    """Whether ``x`` is a `RowSparse`; the ``is_leaf`` of functions that map over trees of them."""
    return isinstance(x, RowSparse)


def check_rows(x: RowSparse) -> None:
    """Refuses row numbers that arithmetic has been done on.

    Args:
      x: the array in question.

    Raises:
      TypeError: if its rows are no integers.
    """
    if not jnp.issubdtype(x.rows.dtype, jnp.integer):
        raise TypeError(
            f"the row numbers of a RowSparse of shape {x.shape} are {x.rows.dtype}: something that "
            "maps over arrays, such as optax.clip_by_global_norm or optax.scale, has changed them. "
            "Use clip_by_global_norm or on_values from priorityprop_jax.core.rows in its "
            "place, or densify the tree first"
        )


def densify(tree: Any) -> Any:
    """Makes every `RowSparse` of a tree a dense array, for what does not know them.

    Args:
      tree: pytree of arrays, None and `RowSparse`.

    Returns:
      The tree with arrays in their place; every other leaf is the very same.

    Raises:
      TypeError: if row numbers are no longer integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.rows import RowSparse, densify
      >>> grads = {"kernel": RowSparse(jnp.array([1]), jnp.ones((1, 2)), (2, 2)), "bias": None}
      >>> grads = densify(grads)
      >>> grads["kernel"].tolist(), grads["bias"]
      ([[0.0, 0.0], [1.0, 1.0]], None)
    """
    return _map(lambda x: x.densify(), tree)


def global_norm(tree: Any) -> jax.Array:
    """`optax.tree.norm` for trees with `RowSparse`: the norm of all elements together.

    Args:
      tree: pytree of arrays, None and `RowSparse`.

    Returns:
      A scalar, that of the densified tree.

    Raises:
      TypeError: if row numbers are no longer integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.rows import RowSparse, global_norm
      >>> kernel = RowSparse(jnp.array([1, 2]), jnp.array([[3.0], [jnp.nan]]), (2, 1))
      >>> float(global_norm({"kernel": kernel, "bias": jnp.array([4.0])}))
      5.0
    """
    return optax.tree.norm(_map(_real_values, tree))


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an Optax transformation see the values of `RowSparse` updates, not the row numbers.

    For what scales or clips, in front of a row optimizer or behind it: `optax.scale`,
    `optax.scale_by_schedule`, `optax.clip`, `optax.clip_by_global_norm`. Padding appears as zeros.

    Args:
      inner: a transformation that needs no parameters and whose state has not their shapes.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of ``inner``.

    Raises:
      TypeError: if ``inner`` is no transformation; when called, if row numbers are no longer
        integers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax.core.rows import RowSparse, on_values
      >>> tx = on_values(optax.scale(-0.5))
      >>> grads = RowSparse(jnp.array([1]), jnp.ones((1, 2)), (3, 2))
      >>> updates, _ = tx.update(grads, tx.init(jnp.zeros((3, 2))))
      >>> updates.rows.tolist(), updates.values.tolist()
      ([1], [[-0.5, -0.5]])
    """
    check_transformation(inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        del params  # of another shape than the values
        values, state = inner.update(_map(_real_values, updates), state, None, **extra_args)

        def put_back(old, new):
            return RowSparse(old.rows, new, old.shape) if is_row_sparse(old) else new

        return jax.tree.map(put_back, updates, values, is_leaf=is_row_sparse), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for trees with `RowSparse`.

    Args:
      max_norm: the largest norm of all updates together, above 0; may be traced.

    Returns:
      An `optax.GradientTransformationExtraArgs` without state.

    Raises:
      TypeError: when called, if row numbers are no longer integers.
      ValueError: if ``max_norm`` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.rows import RowSparse, clip_by_global_norm
      >>> tx = clip_by_global_norm(1.0)
      >>> grads = RowSparse(jnp.array([7]), jnp.array([[3.0, 4.0]]), (9, 2))
      >>> updates, _ = tx.update(grads, tx.init(jnp.zeros((9, 2))))
      >>> updates.rows.tolist(), updates.values.round(3).tolist()
      ([7], [[0.6..., 0.8...]])
    """
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    return on_values(optax.clip_by_global_norm(max_norm))


def check_transformation(inner: Any) -> None:
    """Refuses what is no Optax transformation.

    Args:
      inner: what a user has given as one.

    Raises:
      TypeError: if it lacks ``init`` or ``update``.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}")


def _map(function: Callable[[RowSparse], Any], tree: Any) -> Any:
    return jax.tree.map(
        lambda x: function(x) if is_row_sparse(x) else x, tree, is_leaf=is_row_sparse
    )


def _real_values(x: RowSparse) -> jax.Array:
    """The values, zero where they are padding."""
    check_rows(x)
    real = (x.rows < x.shape[0]).reshape(-1, *[1] * (x.values.ndim - 1))
    return jnp.where(real, x.values, 0)
