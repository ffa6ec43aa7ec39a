"""Optimizers that update the rows a gradient has, and leave the others alone.

XLA writes in place only where every read of the old array comes before, and copies the whole of it
otherwise: what looks idle below puts the reads first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from priorityprop_jax.core.fragile import laid_out, spec_of
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.rows import (
    SCATTER,
    Frozen,
    Held,
    RowSparse,
    check_transformation,
    is_row_sparse,
    on_values,
)


class RowSparseState(NamedTuple):
    """The state of `row_sparse`; tuples are of the leaves of the parameters in flatten order."""

    step: jax.Array  # int32[], updates so far
    row_counts: tuple[Any, ...]  # int32[rows], how often each was touched; () below two dimensions
    inner_states: tuple[Any, ...]  # with an axis of rows in front, from two dimensions on


def row_sparse(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs an elementwise optimizer row by row, on the rows that have a gradient.

    A leaf of at least two dimensions is row-wise: each row (index of axis 0) has its own moments
    and its own step count, so that bias correction is right for each. A row without a gradient
    keeps its parameters and its state bit for bit, the *lazy* variant of momentum and Adam. A dense
    gradient touches all rows, and gives what ``inner`` alone would give. Leaves of fewer
    dimensions, such as biases, are updated by ``inner`` as a whole. Where a gradient is None
    nothing changes: its update is `Frozen`, or None too without ``params``.

    ``inner`` sees one row (or one leaf of fewer dimensions) at a time: what depends on other
    elements, such as LAMB's trust ratio or clipping by norm, takes each row for a parameter of its
    own. A schedule inside ``inner`` runs on the row's count; one on the clock of steps goes behind,
    as in ``optax.chain(row_sparse(optax.scale_by_adam()),
    on_values(optax.scale_by_learning_rate(schedule)))``.

    Args:
      inner: an elementwise Optax optimizer, as Adam, SGD, RMSProp, Lion and Adagrad are.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `RowSparseState`. Where the gradient
      is `RowSparse`, so is the update, of the same rows, which `optax.apply_updates` adds.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: when called, if gradients do not fit the state or the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax.core.row_optimizers import row_sparse
      >>> from priorityprop_jax.core.rows import RowSparse
      >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}
      >>> tx = row_sparse(optax.adam(0.5))
      >>> state = tx.init(params)
      >>> kernel = RowSparse(jnp.array([1]), jnp.ones((1, 2)), (3, 2))
      >>> updates, state = tx.update({"kernel": kernel, "bias": jnp.ones(3)}, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].round(3).tolist()
      [[0.0, 0.0], [-0.5, -0.5], [0.0, 0.0]]
    """
    check_transformation(inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        leaves = _leaves(params)
        return RowSparseState(
            step=jnp.zeros([], jnp.int32),
            row_counts=tuple(
                beside_rows(jnp.zeros(jnp.shape(x)[0], jnp.int32), x) if _row_wise(x) else ()
                for x in leaves
            ),
            inner_states=tuple(_init_leaf(inner, x) for x in leaves),
        )

    def update_fn(updates, state, params=None, **extra_args):
        grads, treedef = jax.tree.flatten(updates, is_leaf=_is_leaf)
        leaves = [None] * len(grads) if params is None else _leaves(params)
        if not len(grads) == len(leaves) == len(state.inner_states):
            raise ValueError(
                f"there are {len(grads)} gradients and {len(state.inner_states)} leaves in the "
                "state; absent gradients are None, leaf by leaf"
            )

        def update(grad, state, param):
            with jax.numpy_dtype_promotion("standard"):  # the optimizer's own affair
                return inner.update(grad, state, param, **extra_args)

        new = [
            _update_leaf(update, *leaf)
            for leaf in zip(grads, state.row_counts, state.inner_states, leaves, strict=True)
        ]
        state = RowSparseState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            row_counts=tuple(counts for _, counts, _ in new),
            inner_states=tuple(inner_state for _, _, inner_state in new),
        )
        return treedef.unflatten(all_first([updates for updates, _, _ in new])), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init_leaf(inner: optax.GradientTransformation, leaf: Any) -> Any:
    if leaf is None:
        return ()
    if isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jnp.zeros(leaf.shape, leaf.dtype)
    leaf = jnp.asarray(leaf)
    state = (jax.vmap(inner.init) if _row_wise(leaf) else inner.init)(leaf)
    # A weak type would be gone after the first update, and the second would compile again.
    return jax.tree.map(lambda x: beside_rows(jnp.asarray(x).astype(x.dtype), leaf), state)


def beside_rows(x: jax.Array, leaf: Any) -> jax.Array:
    """On the mesh of the leaf, if it has one: sharded as the leaf is, or as its rows are."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return x
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return x  # stays free to follow the parameters to any device
    if x.shape != leaf.shape:
        by_row = _row_wise(leaf) and len(sharding.spec) > 0
        spec = PartitionSpec(sharding.spec[0]) if by_row else PartitionSpec()
        sharding = NamedSharding(sharding.mesh, spec)
    return jax.device_put(x, sharding)


def _update_leaf(update: Any, grad: Any, counts: Any, state: Any, param: Any) -> tuple[Any, ...]:
    """The update, the row counts and the inner state of one leaf."""
    if grad is None:
        return None if param is None else Frozen(), counts, state
    whole = isinstance(counts, tuple)  # a leaf of fewer than two dimensions
    if is_row_sparse(grad):
        if isinstance(grad.sealed, tuple | Held):
            rows = jnp.asarray(grad.index, jnp.int32)
            grad = RowSparse.of_sorted(rows, grad.values, grad.shape)
        shape = grad.shape if param is None else jnp.shape(param)
        found, k = jnp.shape(grad.values), len(grad.rows)
        fits = whole or counts.shape == shape[:1]
        if grad.shape != shape or found != (k, *shape[1:]) or not fits:
            raise ValueError(
                f"a gradient of shape {grad.shape} with {k} rows and values {found} does not fit a "
                f"parameter of shape {shape}"
            )
        if whole:
            grad = grad.densify()
    if not is_row_sparse(grad):

        def move(grad, state, param):
            updates, new = (update if whole else jax.vmap(update))(grad, state, param)
            return updates, jax.tree.map(lambda x, y: y.astype(x.dtype), state, new)

        specs = lambda grad, state, _: jax.tree.map(spec_of, (grad, state))  # noqa: E731
        updates, new = laid_out(move, specs)(grad, state, param)
        return updates, counts if whole else optax.safe_increment(counts), new
    if 0 in grad.shape or not len(grad.rows):
        return grad, counts, state

    def touch(rows, values, counts, state, param):
        own_state, own_param, own_counts = jax.tree.map(
            lambda x: x.at[rows].get(mode="clip"), (state, param, counts)
        )
        updates, new = jax.vmap(update)(values, own_state, own_param)
        own_counts = optax.safe_increment(own_counts)
        # Every read of the old state comes before the first write to it.
        updates, new, own_counts, rows = lax.optimization_barrier((updates, new, own_counts, rows))
        counts, state = jax.tree.map(
            lambda x, y: x.at[rows].set(y.astype(x.dtype), **SCATTER),
            (counts, state),
            (own_counts, new),
        )
        return updates, counts, state

    def results(rows, values, counts, state, param):
        return spec_of(values), *jax.tree.map(spec_of, (counts, state))

    arrays = grad.rows, grad.values, counts, state, param
    updates, counts, state = laid_out(touch, results)(*arrays)
    return grad.with_values(updates), counts, state


def row_sparse_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam by `row_sparse`; `optax.adamw` where gradients are dense.

    Args:
      learning_rate: a number, or a schedule of steps (not of a row's updates).
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, at least 0.
      weight_decay: decoupled, times the learning rate: of the touched rows, and of all of a leaf
        whose gradient is dense. At least 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `row_sparse` for what it takes and gives.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if a number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.row_optimizers import row_sparse_adam
      >>> from priorityprop_jax.core.rows import RowSparse
      >>> params, tx = jnp.zeros((3, 2)), row_sparse_adam(0.5)
      >>> grads = RowSparse(jnp.array([1]), jnp.ones((1, 2)), params.shape)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates.rows.tolist(), updates.values.round(3).tolist()
      ([1], [[-0.5, -0.5]])
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "a number or a schedule")
    check_number("b1", b1, below=1)
    check_number("b2", b2, below=1)
    check_number("eps", eps)
    check_number("weight_decay", weight_decay)
    inner = optax.scale_by_adam(b1, b2, eps)
    # 0 would do no harm, but ask for parameters where none are needed.
    if not isinstance(weight_decay, int | float) or weight_decay:
        inner = optax.chain(inner, optax.add_decayed_weights(weight_decay))
    # Behind the rows: inside, a schedule would run on each row's own count.
    return optax.chain(row_sparse(inner), on_values(optax.scale_by_learning_rate(learning_rate)))


def all_first(updates: list[Any]) -> list[Any]:
    """The same updates, such that no row can be written before all of them are computed.

    The backward pass reads a weight after its own update is known, and XLA would copy it whole. It
    drops the barrier on CPUs before it decides what to copy; so the row numbers depend on an
    element of each update too.
    """
    if not any(map(is_row_sparse, updates)):
        return updates
    updates = lax.optimization_barrier(updates)
    never = jnp.array(False)
    for x in jax.tree.leaves([u.values if is_row_sparse(u) else u for u in updates]):
        if x.size:
            corner = laid_out(lambda x: x[(0,) * x.ndim], lambda _: PartitionSpec())(x)
            never |= (corner != corner) & (corner == 0)  # false, which XLA does not find out
    later = lambda u: u.of_sorted(u.rows + never.astype(u.rows.dtype), u.values, u.shape)  # noqa: E731
    return [later(u) if is_row_sparse(u) else u for u in updates]


def row_counts(opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """How often each row was updated, by the names of the row-wise leaves.

    Args:
      opt_state: an optimizer's state with a `RowSparseState` somewhere in it.
      params: the parameters that the optimizer was initialised with.

    Returns:
      ``int32[rows]`` for every leaf of at least two dimensions.

    Raises:
      ValueError: if there is no `RowSparseState`, or more than one, or it is not of these
        parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.row_optimizers import row_counts, row_sparse_adam
      >>> params = {"layers": [{"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}]}
      >>> state = row_sparse_adam(0.1).init(params)
      >>> {name: counts.tolist() for name, counts in row_counts(state, params).items()}
      {'layers/0/kernel': [0, 0, 0]}
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RowSparseState))
    states = [node for node in nodes if isinstance(node, RowSparseState)]
    if len(states) != 1:
        raise ValueError(
            f"expected one RowSparseState in the optimizer's state, found {len(states)}; it is the "
            "state of row_sparse and row_sparse_adam"
        )
    paths, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None)
    counts = [jax.tree.leaves(own) for own in states[0].row_counts]
    if [len(own) for own in counts] != [_row_wise(x) for _, x in paths]:
        raise ValueError("the optimizer's state is not of these parameters")
    return {path_name(path): own[0] for (path, _), own in zip(paths, counts, strict=True) if own}


def _is_leaf(x: Any) -> bool:
    return x is None or is_row_sparse(x)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _row_wise(leaf: Any) -> bool:
    return leaf is not None and len(jnp.shape(leaf)) >= 2


def check_number(name: str, x: Any, kind: str = "a number", *, below: float = float("inf")) -> None:
    """Raises for what is no number, or out of its range."""
    if isinstance(x, bool) or not (isinstance(x, int | float) or hasattr(x, "dtype")):
        raise TypeError(f"{name} must be {kind}, got {x!r}")
    if isinstance(x, int | float) and not 0 <= x < below:
        limits = "at least 0 and finite" if below == float("inf") else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {limits}, got {x}")
