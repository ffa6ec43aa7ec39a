"""Where arrays lie: on one device or laid out on a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax


def spread(x: Any) -> bool:
    """Whether an array is on several devices."""
    sharding = getattr(x, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def layout_of(tree: Any) -> Any:
    """Where the arrays on several devices are, for `out_shardings`; None for the others.

    Left to itself the compiler lays results out as it likes: the second step would be compiled
    anew, and a resumed run round otherwise than the unbroken one.
    """
    if not any(map(spread, jax.tree.leaves(tree))):
        return None  # what the compiler takes whatever the structure of the results
    return jax.tree.map(lambda x: x.sharding if spread(x) else None, tree)


def bytes_held(tree: Any) -> int:
    """Bytes of arrays, or of what stands for them, on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def put_beside(params: Any, tree: Any) -> Any:
    """The arrays on the devices that the parameters are on, where that is not the first alone."""
    first = jax.tree.leaves(params)[0]
    sharding = getattr(first, "sharding", None)
    if sharding is None or sharding.device_set == {jax.local_devices()[0]}:
        return tree
    everywhere = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    def place(x: Any) -> Any:
        there = isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(place, tree)
