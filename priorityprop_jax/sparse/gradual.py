"""Gradual magnitude pruning (Zhu & Gupta, 2017) as an Optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from priorityprop_jax.sparse.masks import (
    check_scope,
    check_sparsity,
    choose_leaves,
    keep_largest,
    kept_count,
    scope_groups,
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
    dense its moments go on moving. Once the masks are final, `sparsify` makes layers sparse.

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
      >>> from priorityprop_jax.sparse import gradual_pruning
      >>> tx = optax.chain(optax.sgd(0.5), gradual_pruning(0.5, begin=0, end=0, every=1))
      >>> params = {"kernel": jnp.array([[4.0, -3.0], [2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[3.5, -3.5], [0.0, 0.0]]
      >>> state[1].masks["kernel"].tolist()
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
        masks = jax.tree.structure(params).unflatten(masks)
        return GradualPruningState(jnp.zeros([], jnp.int32), masks)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("requires the current value of parameters: pass params to update")
        weights, treedef = jax.tree.flatten(params)
        new_updates = treedef.flatten_up_to(updates)
        masks = treedef.flatten_up_to(state.masks)
        step = state.step

        def prune():
            pruned = list(masks)
            done = (step - begin).astype(jnp.float32) / max(end - begin, 1)
            left = (1 - jnp.where(step >= end, 1.0, done)) ** 3
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
        step = jnp.asarray(optax.safe_increment(step))
        state = GradualPruningState(step, treedef.unflatten(masks))
        return treedef.unflatten(new_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _after(weight: jax.Array, update: Any) -> jax.Array:
    if update is None:
        return weight
    return (weight + update).astype(weight.dtype)  # as optax.apply_updates


def _masked(update: jax.Array, weight: jax.Array, mask: jax.Array) -> jax.Array:
    dtype = jnp.result_type(update, weight)
    return jnp.where(mask, jnp.asarray(update).astype(dtype), -weight.astype(dtype))
