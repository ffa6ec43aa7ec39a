"""Masks of weights: by magnitude, at random, or made elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from priorityprop_jax.core.paths import path_name

SCOPES = ("uniform", "global")


def magnitude_masks(
    params: Any,
    sparsity: float,
    *,
    scope: str = "uniform",
    where: Callable[[str], bool] | None = None,
) -> Any:
    """Masks that keep the weights of the largest magnitude.

    Of ``n`` weights exactly ``round((1 - sparsity) * n)`` are kept; of equal ones the earlier in
    the flattened array, and in an earlier leaf. A NaN counts as larger than all numbers. Leaves of
    fewer than two dimensions, such as biases, are left alone, as are integers.

    Args:
      params: pytree of arrays; may be traced.
      sparsity: the fraction to prune, in [0, 1]. Static.
      scope: ``"uniform"``: every leaf is pruned to this sparsity; ``"global"``: all chosen leaves
        together are, by one threshold.
      where: given the path of a leaf, such as ``"Dense_0/kernel"``, whether to prune it.

    Returns:
      As ``params``: bool arrays, True where a weight is kept, and None for leaves left alone.

    Raises:
      ValueError: for a sparsity outside [0, 1] or an unknown scope.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.sparse.masks import magnitude_masks
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.ones(2)}
      >>> masks = magnitude_masks(params, 0.5)
      >>> masks["kernel"].tolist(), masks["bias"]
      ([[False, True], [True, False]], None)
    """
    check_sparsity("sparsity", sparsity)
    check_scope(scope)
    treedef = jax.tree.structure(params)
    leaves = choose_leaves(params, where)
    masks: list[Any] = list(leaves)
    for group in scope_groups(leaves, scope):
        chosen = [jnp.asarray(leaves[i]) for i in group]
        count = kept_count(chosen, sparsity)
        for i, mask in zip(group, keep_largest(chosen, count), strict=True):
            masks[i] = mask
    return treedef.unflatten(masks)


def random_mask(key: jax.Array, shape: Sequence[int], sparsity: float) -> jax.Array:
    """A mask that keeps ``round((1 - sparsity) * n)`` of ``n`` weights, drawn at random."""
    check_sparsity("sparsity", sparsity)
    size = math.prod(shape)
    kept = jnp.arange(size) < kept_of(size, sparsity)
    return jax.random.permutation(key, kept).reshape(shape)


def as_mask(mask: Any, shape: tuple[int, ...], name: str) -> jax.Array:
    """A mask that was made elsewhere as bools of a shape; ``name`` is for errors.

    It is concrete zeros and ones (or bools), or the same packed to uint8 ``[ceil(size / 8)]`` as by
    `numpy.packbits`, as in the state of `jaxpruner`.
    """
    mask, size = np.asarray(mask), math.prod(shape)
    if mask.shape != shape and mask.dtype == np.uint8 and mask.shape == (-(-size // 8),):
        mask = np.unpackbits(mask, count=size).reshape(shape)
    if mask.shape != shape:
        raise ValueError(f"the mask of {name!r} must be of shape {shape}, got {mask.shape}")
    if not np.array_equal(mask, mask != 0):
        raise ValueError(f"the mask of {name!r} must hold zeros and ones only")
    return jnp.asarray(mask != 0)


def check_sparsity(name: str, sparsity: float) -> None:
    """Raises a ValueError unless a sparsity lies in [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {sparsity}")


def check_scope(scope: str) -> None:
    """Raises a ValueError for an unknown scope."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")


def choose_leaves(params: Any, where: Callable[[str], bool] | None = None) -> list[Any]:
    """The leaves to prune, in flatten order, and None for those left alone: `magnitude_masks`."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return [
        leaf
        if np.ndim(leaf) >= 2
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and (where is None or where(path_name(path)))
        else None
        for path, leaf in with_paths
    ]


def scope_groups(leaves: Sequence[Any], scope: str) -> list[list[int]]:
    """Which leaves share a threshold: lists of indices of those that are not None."""
    chosen = [i for i, leaf in enumerate(leaves) if leaf is not None]
    if scope == "global":
        return [chosen] if chosen else []
    return [[i] for i in chosen]


def kept_of(size: int, sparsity: float) -> int:
    """How many of so many weights a sparsity keeps."""
    return round((1 - sparsity) * size)


def kept_count(leaves: Sequence[Any], sparsity: float) -> int:
    """How many weights of all leaves together a sparsity keeps."""
    return kept_of(sum(math.prod(np.shape(leaf)) for leaf in leaves), sparsity)


@jax.jit
def keep_largest(
    weights: Sequence[jax.Array],
    count: jax.typing.ArrayLike,
    among: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Masks of the `count` largest magnitudes of all leaves, of those `among` them if given.

    Of equal ones the earlier; a NaN counts as largest. The threshold is found bit by bit, each by
    counting: unlike a sort, that moves no element, so that it costs one pass a bit and sharded
    leaves stay where they are.
    """
    sizes = [math.prod(x.shape) for x in weights]
    if sum(sizes) >= 2**31:
        raise ValueError(f"one threshold can rank fewer than 2**31 weights, not {sum(sizes)}")
    dtype = jnp.result_type(*weights)
    keys = [_keys(x, dtype) for x in weights]
    here = [jnp.ones(x.shape, bool) for x in weights] if among is None else among
    count = jnp.asarray(count, jnp.int32)
    threshold = _threshold(keys, here, count)
    above = [(key > threshold) & chosen for key, chosen in zip(keys, here, strict=True)]
    ties = [(key == threshold) & chosen for key, chosen in zip(keys, here, strict=True)]
    # The earlier a tie, the higher it ranks.
    ranks, rest = [], sum(sizes)
    for x, size in zip(weights, sizes, strict=True):
        ranks.append(jnp.uint32(rest) - lax.iota(jnp.uint32, size).reshape(x.shape))
        rest -= size
    threshold = _threshold(ranks, ties, count - _count(above), bits=sum(sizes).bit_length())
    return [
        higher | (tie & (rank >= threshold))
        for higher, tie, rank in zip(above, ties, ranks, strict=True)
    ]


def _keys(weights: jax.Array, dtype: Any) -> jax.Array:
    """Unsigned integers in the order of magnitudes, NaN last: their bits, taken in one dtype."""
    magnitudes = jnp.abs(weights.astype(dtype))
    if magnitudes.dtype.itemsize == 8:
        return lax.bitcast_convert_type(magnitudes, jnp.uint64)
    return lax.bitcast_convert_type(magnitudes.astype(jnp.float32), jnp.uint32)


def _threshold(
    keys: Sequence[jax.Array], among: Sequence[jax.Array], count: jax.Array, bits: int | None = None
) -> jax.Array:
    """The largest number, of so many bits, that at least `count` keys reach."""
    dtype = keys[0].dtype
    # The sign bit of a magnitude is never set.
    bits = 8 * dtype.itemsize - 1 if bits is None else bits

    def decide(i, threshold):
        raised = threshold | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        reached = [(key >= raised) & chosen for key, chosen in zip(keys, among, strict=True)]
        return jnp.where(_count(reached) >= count, raised, threshold)

    return lax.fori_loop(0, bits, decide, jnp.zeros((), dtype))


def _count(masks: Sequence[jax.Array]) -> jax.Array:
    counts = [jnp.sum(mask, dtype=jnp.int32) for mask in masks]
    return sum(counts[1:], counts[0])
