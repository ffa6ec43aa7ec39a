"""Gradients of which only some rows exist, and what must know of them besides the optimizer.

As a dense array, a gradient of k of n rows (output features of a weight, layers of a stack) costs
as much to write, and its optimizer to run, as a whole one; `RowSparse` carries the k rows alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from priorityprop_jax.core.fragile import laid_out, seal, spec_of, unseal
from priorityprop_jax.core.paths import path_name

# What every scatter of rows may rely on; padding is out of bounds, and dropped.
SCATTER: dict[str, Any] = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Traced row numbers that no function over pytrees reaches; those of a trace stay in it."""

    array: jax.Array  # int32[k]

    def __len__(self) -> int:
        return len(self.array)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class RowSparse:
    """An array that is zero except for some rows: ``zeros(shape).at[rows].set(values)``.

    A pytree node. Where its rows are known at compile time or `Held`, ``values`` are its only
    child. Where they are an array, they are a child too, of a dtype of their own that knows no
    arithmetic: what maps over arrays, such as `optax.scale`, raises a TypeError of JAX for the
    dtype ``key<RowSparse rows>`` there, and `on_values` keeps the rows out of it.

    ``array + row_sparse`` adds the rows, as `optax.apply_updates` does: the sum has the array's
    dtype, all other rows are the very same, and compiled with the array donated they are not even
    read. It raises a ValueError if shapes differ.

    Attributes:
      rows: ascending and distinct, none negative: a tuple of whole numbers (static), `Held`, or
        ``int32[k]``. In an array, what is ``>= shape[0]`` is padding: it means no row, and its
        values, even NaN, are ignored.
      values: ``[k, *shape[1:]]``, of any float dtype.
      shape: the shape of the whole, a tuple. Static.

    Raises:
      TypeError: if row numbers are not whole.
      ValueError: if they are known, and are negative, out of order or not distinct. Where they are
        traced, nothing can be raised, and all values become NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.rows import RowSparse
      >>> some = RowSparse(jnp.array([0, 3]), jnp.ones((2, 2)), (3, 2))
      >>> some.densify().tolist()
      [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
      >>> (jnp.ones((3, 2)) + some).tolist()
      [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
    """

    sealed: Any  # the rows, an array of them out of reach of arithmetic
    values: jax.Array
    shape: tuple[int, ...]

    # NumPy would take this for a number, and add it to each of its elements.
    __array_ufunc__ = None

    def __init__(self, rows: Any, values: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(rows, Held) and shape:
            good = are_ascending(rows, shape[0])
            values = values if good is True else jnp.where(good, values, jnp.nan)
        self._set(rows if isinstance(rows, tuple | Held) else seal(rows), values, shape)

    def _set(self, *fields: Any) -> None:
        for name, field in zip(("sealed", "values", "shape"), fields, strict=True):
            object.__setattr__(self, name, field)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """For JAX: the children with their keys, and what is static."""
        values = (jax.tree_util.GetAttrKey("values"), self.values)
        if isinstance(self.sealed, tuple | Held):
            return (values,), (self.sealed, self.shape)
        return ((jax.tree_util.GetAttrKey("rows"), self.sealed), values), (None, self.shape)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> RowSparse:
        """For JAX: the inverse of `tree_flatten_with_keys`."""
        sealed, shape = static
        one = object.__new__(cls)
        one._set(*((sealed, *children) if sealed is not None else children), shape)
        return one

    @classmethod
    def of_sorted(cls, rows: jax.Array, values: Any, shape: tuple[int, ...]) -> RowSparse:
        """Of rows ``int32[k]`` that need no check, as they are made ascending and distinct."""
        return cls.tree_unflatten((None, shape), (seal(rows), values))

    @property
    def rows(self) -> Any:
        """The row numbers: a tuple, `Held` or ``int32[k]``."""
        return self.sealed if isinstance(self.sealed, tuple | Held) else unseal(self.sealed)

    def __radd__(self, whole: Any) -> jax.Array:
        whole = jnp.asarray(whole)
        if self.shape != whole.shape:
            raise ValueError(f"rows of a shape {self.shape} do not fit an array of {whole.shape}")
        if 0 in whole.shape or not len(self.rows):
            return whole
        if isinstance(self.rows, tuple):
            moved = (take(whole, self.rows) + self.values).astype(whole.dtype)
            return put(whole, self.rows, moved)
        return laid_out(_add, lambda whole, *_: spec_of(whole))(whole, self.index, self.values)

    @property
    def index(self) -> Any:
        """The row numbers as what indexes an array."""
        return self.sealed.array if isinstance(self.sealed, Held) else self.rows

    def with_values(self, values: Any) -> RowSparse:
        """The same rows with other values."""
        return self.tree_unflatten((self.sealed, self.shape), (values,))

    def densify(self) -> jax.Array:
        """The whole array, ``[*shape]``."""
        rows = jnp.asarray(self.index, jnp.int32)
        return jnp.zeros(self.shape, self.values.dtype).at[rows].set(self.values, **SCATTER)


def row_numbers(ids: jax.Array, size: int) -> jax.Array:
    """Indices as `jax.numpy.take` knows them as rows ``int32[n]``; ``size`` where out of bounds."""
    ids = jnp.asarray(ids).reshape(-1)
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)  # which holds the size
    ids = jnp.where(ids < 0, ids + size, ids)
    return jnp.where((ids < 0) | (ids >= size), size, ids).astype(jnp.int32)


def distinct(rows: jax.Array, size: int) -> jax.Array:
    """Rows once each and ascending, then padding to as many as were given."""
    rows = jnp.sort(rows)
    return jnp.sort(jnp.where(_is_new(rows) & (rows < size), rows, _padding(rows, size)))


def summed(rows: jax.Array, values: jax.Array, shape: tuple[int, ...]) -> RowSparse:
    """The sum of rows in any order, which may repeat; none negative, and padding out of bounds."""
    order = jnp.argsort(rows)
    places = jnp.cumsum(_is_new(rows[order])) - 1
    values = jax.ops.segment_sum(values[order], places, len(rows), indices_are_sorted=True)
    return RowSparse.of_sorted(distinct(rows, shape[0]), values, shape)


def _is_new(rows: jax.Array) -> jax.Array:
    return (jnp.arange(len(rows)) == 0) | (rows != jnp.roll(rows, 1))


def _padding(rows: jax.Array, size: int) -> jax.Array:
    return size + jnp.arange(len(rows), dtype=rows.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Frozen:
    """The update of a parameter that stays: ``array + Frozen()`` is the array, bit for bit.

    A pytree node without leaves, so that whatever maps over updates leaves it alone. What maps over
    parameters beside them, such as `optax.add_decayed_weights`, raises an error: it belongs inside
    of the optimizer that said so, where it sees what is trained only.
    """

    __array_ufunc__ = None  # as for `RowSparse`

    def __radd__(self, whole: Any) -> Any:
        return whole


def _add(whole: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    at = whole.at[rows]
    if values.dtype == whole.dtype:
        return at.add(values, **SCATTER)
    # As optax has it: the sum is rounded to the parameter's dtype, not the update.
    moved = (at.get(mode="clip") + values).astype(whole.dtype)
    return at.set(lax.optimization_barrier(moved), **SCATTER)


def take(x: Any, rows: tuple[int, ...] | Held) -> Any:
    """Rows of axis 0 of an array or a `jax.ShapeDtypeStruct`, ``[k, ...]``."""
    if isinstance(rows, Held):
        return x.at[rows.array].get(unique_indices=True, indices_are_sorted=True)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(rows), *x.shape[1:]), x.dtype)
    if len(runs := _runs(rows)) == 1:
        return x[rows[0] : rows[0] + len(rows)]  # a slice is cheaper than a gather
    return jnp.concatenate([x[rows[i] : rows[i] + n] for i, n in runs]) if runs else x[:0]


def put(x: Any, rows: tuple[int, ...] | Held, new: jax.Array) -> jax.Array:
    """The inverse of `take`: the array with these rows replaced, in place where it is donated."""
    x = jnp.asarray(x)
    if isinstance(rows, Held):
        return x.at[rows.array].set(new, **SCATTER)
    for i, n in _runs(rows):
        x = lax.dynamic_update_slice_in_dim(x, new[i : i + n], rows[i], 0)
    return x


def _runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where runs of rows that follow one another begin, and how long they are."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [(i, j - i) for i, j in zip(starts, [*starts[1:], len(rows)], strict=True)]


def is_row_sparse(x: Any) -> bool:
    """Whether ``x`` is a `RowSparse`; the ``is_leaf`` of functions that map over trees of them."""
    return isinstance(x, RowSparse)


def are_ascending(rows: Any, size: int, *, padding: bool = True) -> Any:
    """Whether no row of an axis would be lost or counted twice: True, or traced as the rows are.

    ``padding``: rows may be out of bounds, behind the others. Raises where rows are known and not
    in order.
    """
    if isinstance(rows, jax.ShapeDtypeStruct) or np.ndim(rows) != 1:
        return True
    known = not isinstance(rows, Tracer)
    rows = np.asarray(rows) if known else rows
    if len(rows) and not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"the row numbers of a RowSparse must be whole numbers, got {rows.dtype}")
    if not len(rows):
        return True
    good = (rows[0] >= 0) & ((rows[1:] > rows[:-1]) | (rows[1:] >= size)).all()
    good = good if padding else good & (rows < size).all()
    if known and not good:
        raise ValueError(
            f"row numbers must be ascending and distinct, none negative{'' if padding else ' and '}"
            f"{'' if padding else f'all below {size}'}; got {rows.tolist()}: sum the values of "
            "equal rows first, as jax.ops.segment_sum does"
        )
    return known or good


def beside(grads: Any, params: Any) -> list[Any]:
    """The gradient of every leaf of ``params``; None where it is None, `Frozen` or left out.

    A ValueError for one of another shape, or of no parameter.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_row_sparse)
    by_name = {path_name(path): grad for path, grad in flat}
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    found = []
    for path, leaf in leaves:
        name = path_name(path)
        grad = by_name.pop(name, None)
        if is_row_sparse(grad) and not isinstance(grad.rows, tuple | Held):
            grad = grad.densify()  # which rows it has is not known
        if grad is not None and np.shape(grad) != np.shape(leaf):
            raise ValueError(
                f"the gradient of {name!r} has the shape {np.shape(grad)}, but the parameter has "
                f"{np.shape(leaf)}; of some layers of a stack it is a RowSparse, as "
                "partial.value_and_grad returns it; aggregate those of single examples in front"
            )
        found.append(grad)
    if by_name:
        raise ValueError(f"there is a gradient {min(by_name)!r}, but no parameter of that name")
    return found


def densify(tree: Any) -> Any:
    """Makes every `RowSparse` of a tree a dense array, for what does not know them.

    Args:
      tree: pytree of arrays, None and `RowSparse`.

    Returns:
      The tree with arrays in their place; every other leaf is the very same.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.rows import RowSparse, densify
      >>> grads = {"kernel": RowSparse(jnp.array([1]), jnp.ones((1, 2)), (2, 2)), "bias": None}
      >>> grads = densify(grads)
      >>> grads["kernel"].tolist(), grads["bias"]
      ([[0.0, 0.0], [1.0, 1.0]], None)
    """
    return _map(lambda x: x.densify(), tree)


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an Optax transformation see the values of `RowSparse` updates, not the row numbers.

    For what scales or clips, in front of a row optimizer or behind it, such as `optax.scale` and
    `optax.clip`. Padding appears as zeros.

    Args:
      inner: a transformation that needs no parameters and whose state has not their shapes.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of ``inner``.

    Raises:
      TypeError: if ``inner`` is no transformation.

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
            return old.with_values(new) if is_row_sparse(old) else new

        return jax.tree.map(put_back, updates, values, is_leaf=is_row_sparse), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for trees with `RowSparse`.

    Args:
      max_norm: the largest norm of all updates together, above 0; may be traced.

    Returns:
      An `optax.GradientTransformationExtraArgs` without state.

    Raises:
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
    """Raises a TypeError for what a user gave as an Optax transformation and is none."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}")


def _map(function: Callable[[RowSparse], Any], tree: Any) -> Any:
    return jax.tree.map(
        lambda x: function(x) if is_row_sparse(x) else x, tree, is_leaf=is_row_sparse
    )


def _real_values(x: RowSparse) -> jax.Array:
    """The values, zero where they are padding."""
    if isinstance(x.sealed, tuple | Held):
        return x.values
    real = (x.rows < x.shape[0]).reshape(-1, *[1] * (x.values.ndim - 1))
    return jnp.where(real, x.values, 0)
