"""Gradual magnitude pruning (Zhu & Gupta, 2017) as an Optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.sparse.layers import as_matrix
from priorityprop_jax.sparse.masks import (
    check_scope,
    check_sparsity,
    choose_leaves,
    keep_largest,
    kept_count,
    scope_groups,
)
from priorityprop_jax.sparse.pattern import take_values
from priorityprop_jax.sparse.swap import dense_layers, owner_of, replace, to_sparse

# Optax's own words, which it keeps private.
_NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are "
    "not passing `params` when calling `update`."
)


class GradualPruningState(NamedTuple):
    """State of `gradual_pruning`."""

    step: jax.Array  # int32[], steps taken.
    masks: Any  # as the parameters: bool arrays, True where kept; None for leaves left alone.


def gradual_pruning(
    final_sparsity: float,
    *,
    begin: int,
    end: int,
    every: int,
    scope: str = "uniform",
    where: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes weights of small magnitude little by little while a network trains.

    At step :math:`t_0`, ``begin``, each ``every`` steps from there and at :math:`t_1`, ``end``, the
    weights are pruned to the sparsity

    .. math:: s_t = s_f \left(1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3\right)

    of which :math:`s_f` is ``final_sparsity``: of those still there the ones of the largest
    magnitude after this step's update are kept, in the numbers and order of `magnitude_masks`. What
    is pruned once stays pruned. Put it last in a chain: it replaces the updates of pruned weights
    by what makes them zero, so that nothing may change these updates behind it, and leaves the
    others as they come. Leaves of fewer than two dimensions, such as biases, are left alone.

    An optimizer in front still spends memory and time on pruned weights, and where a gradient is
    dense its moments go on moving. Once the masks are final, go on with
    `sparse_from_pruned`.

    Args:
      final_sparsity: in [0, 1].
      begin: the step of the first pruning, from 0.
      end: the step of the last.
      every: steps between two.
      scope: ``"uniform"`` or ``"global"``, see `magnitude_masks`.
      where: given the path of a leaf, whether to prune it.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `GradualPruningState`. An update
      has the parameter's dtype where its own is narrower, as zero would not be reached by it. An
      absent update (None) stays None: its leaf's weights are zeroed with its next update.

    Raises:
      ValueError: for options that make no sense; by ``update``, without ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax.sparse.gradual import gradual_pruning, masks_of
      >>> tx = optax.chain(optax.sgd(0.5), gradual_pruning(0.5, begin=0, end=0, every=1))
      >>> params = {"kernel": jnp.array([[4.0, -3.0], [2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[3.5, -3.5], [0.0, 0.0]]
      >>> masks_of(state)["kernel"].tolist()
      [[True, True], [False, False]]

    References:
      Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878
    """
    check_sparsity("final_sparsity", final_sparsity)
    check_scope(scope)
    if not 0 <= begin <= end < 2**31 or every < 1:
        raise ValueError(
            "steps must have 0 <= begin <= end < 2**31 and every >= 1, got "
            f"begin={begin}, end={end}, every={every}"
        )

    def init_fn(params):
        leaves = choose_leaves(params, where)
        masks = [None if x is None else jnp.full_like(x, True, dtype=bool) for x in leaves]
        return GradualPruningState(
            step=jnp.zeros([], jnp.int32),
            masks=jax.tree.structure(params).unflatten(masks),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        weights, treedef = jax.tree.flatten(params)
        new_updates = treedef.flatten_up_to(updates)
        masks = treedef.flatten_up_to(state.masks)
        step = state.step

        def prune():
            pruned = list(masks)
            left = _left(step, begin, end)
            for group in scope_groups(masks, scope):
                after = [_after(weights[i], new_updates[i]) for i in group]
                # Counts rather than fractions: both ends are exact.
                least = kept_count(after, final_sparsity)
                more = kept_count(after, 0.0) - least
                count = least + jnp.round(more * left).astype(jnp.int32)
                kept = keep_largest(after, count, [masks[i] for i in group])
                for i, mask in zip(group, kept, strict=True):
                    pruned[i] = mask
            return pruned

        on_time = ((step - begin) % every == 0) | (step == end)
        masks = lax.cond((step >= begin) & (step <= end) & on_time, prune, lambda: masks)
        new_updates = [
            update if update is None or mask is None else _masked(update, weight, mask)
            for update, weight, mask in zip(new_updates, weights, masks, strict=True)
        ]
        state = GradualPruningState(
            step=jnp.asarray(optax.safe_increment(step)),
            masks=treedef.unflatten(masks),
        )
        return treedef.unflatten(new_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def masks_of(state: Any) -> Any:
    """The masks in the state of an optimizer, ready for sparsification.

    Args:
      state: a `GradualPruningState`, or any state of Optax or `flax.nnx.Optimizer` with one in it.

    Returns:
      As the parameters: bool arrays, True where a weight is kept, and None for leaves left alone.

    Raises:
      ValueError: unless exactly one is in it.
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_state)
    found = [node for node in nodes if _is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"found {len(found)} states of gradual_pruning in {type(state).__name__}: give the "
            "one whose masks are meant"
        )
    return found[0].masks


def sparse_from_pruned(
    model: nnx.Module, opt_state: Any, optimizer: optax.GradientTransformation
) -> tuple[Any, Any]:
    """Sparse layers, and the state of their optimizer, in place of what `gradual_pruning` pruned.

    For any training loop: what follows is the same training without the weights that are pruned.
    What the optimizer kept of these is let go.

    Args:
      model: the dense model; it is left alone. Only kernels of its `nnx.Linear` and `nnx.Conv` have
        been pruned.
      opt_state: the state of ``optax.chain(optimizer, gradual_pruning(...))`` or of any other
        optimizer whose state is, in this order, that of ``optimizer`` and a `GradualPruningState`.
      optimizer: the one that goes on.

    Returns:
      The sparse model, and the state of ``optimizer`` for its parameters.

    Raises:
      ValueError: if a leaf is pruned that is no such kernel, or the state is of another optimizer.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from priorityprop_jax.sparse.gradual import gradual_pruning, sparse_from_pruned
      >>> model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(0)))
      >>> params = nnx.state(model, nnx.Param)
      >>> pruning = optax.chain(optax.adam(0.1), gradual_pruning(0.9, begin=0, end=0, every=1))
      >>> _, state = pruning.update(params, pruning.init(params), params)
      >>> model, state = sparse_from_pruned(model, state, optax.adam(0.1))
      >>> model.layers[0].nonzeros, state[0].mu["layers"][0]["values"].shape
      (51, (51,))
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(masks_of(opt_state))
    masks = {path_name(path).removesuffix("kernel").rstrip("/"): mask for path, mask in flat}
    model = nnx.clone(model)
    layers = {name: layer for name, layer in dense_layers(model).items() if name in masks}
    if others := masks.keys() - layers.keys():
        raise ValueError(
            "only kernels of nnx.Linear and nnx.Conv become sparse, but pruned are also "
            f"{', '.join(sorted(others))}: choose by where= of gradual_pruning"
        )
    new = {id(layer): to_sparse(layer, masks[name]) for name, layer in layers.items()}
    patterns = {f"{name}/values".lstrip("/"): new[id(layers[name])].pattern for name in layers}
    model = replace(model, new)
    like, treedef = jax.tree_util.tree_flatten_with_path(
        optimizer.init(nnx.state(model, nnx.Param))
    )
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_state)
    leaves = [leaf for leaf in nodes if not _is_state(leaf)]
    if len(leaves) != len(like):
        raise ValueError(
            f"the state without its masks has {len(leaves)} arrays, but the optimizer keeps "
            f"{len(like)}: give the optimizer in front of gradual_pruning"
        )
    for place, (path, expected) in enumerate(like):
        owner = owner_of(path, patterns)
        if owner is not None and jnp.shape(leaves[place]) != jnp.shape(expected):
            leaves[place] = take_values(as_matrix(leaves[place]), patterns[owner])
    return model, treedef.unflatten(leaves)


def _is_state(node: Any) -> bool:
    return isinstance(node, GradualPruningState)


def _left(step: jax.Array, begin: int, end: int) -> jax.Array:
    """What is left to prune: 1 at `begin`, 0 at `end`, cubic between."""
    done = (step - begin).astype(jnp.float32) / max(end - begin, 1)
    done = jnp.where(step >= end, 1.0, done)
    return (1 - done) ** 3


def _after(weight: jax.Array, update: Any) -> jax.Array:
    if update is None:
        return weight
    return (weight + update).astype(weight.dtype)  # as optax.apply_updates


def _masked(update: jax.Array, weight: jax.Array, mask: jax.Array) -> jax.Array:
    dtype = jnp.result_type(update, weight)
    return jnp.where(mask, jnp.asarray(update).astype(dtype), -weight.astype(dtype))
