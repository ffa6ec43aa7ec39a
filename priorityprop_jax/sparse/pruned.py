"""From a dense model that `gradual_pruning` has pruned to sparse layers, in any training loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.sparse.gradual import GradualPruningState
from priorityprop_jax.sparse.layers import as_matrix
from priorityprop_jax.sparse.pattern import take_values
from priorityprop_jax.sparse.swap import dense_layers, replace, to_sparse


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
      >>> from priorityprop_jax.sparse import gradual_pruning, sparse_from_pruned
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
        where = f"/{path_name(path)}"
        # One name may end like another: the longest is meant.
        owner = max((n for n in patterns if where.endswith(f"/{n}")), key=len, default=None)
        if owner is not None and jnp.shape(leaves[place]) != jnp.shape(expected):
            leaves[place] = take_values(as_matrix(leaves[place]), patterns[owner])
    return model, treedef.unflatten(leaves)


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


def _is_state(node: Any) -> bool:
    return isinstance(node, GradualPruningState)
