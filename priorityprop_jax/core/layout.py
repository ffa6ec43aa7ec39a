"""Where arrays lie: on one device or laid out on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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


def over_devices(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``fn``, which maps rows of axis 0 one by one, with whole rows on each device of the mesh.

    That is the mesh that is set (`jax.set_mesh`); without one it is ``fn`` as it stands.
    """
    mesh = jax.sharding.get_abstract_mesh()
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(axis for axis, kind in pairs if kind == jax.sharding.AxisType.Auto)
    n, devices = len(x), math.prod(mesh.shape[axis] for axis in axes)
    if devices < 2:
        return fn(x)
    rows = -(-n // devices) * devices
    more = jnp.zeros((rows - n, *x.shape[1:]), x.dtype)  # as many for each
    # Axis by axis, as the compiler cannot move two at once and would copy all to every device.
    free = [jax.P.UNCONSTRAINED] * (x.ndim - 1)
    steps = [jax.P(axes[:i], *free) for i in range(1, len(axes))]
    whole = jax.P(axes, *[None] * (x.ndim - 1))
    x = jnp.concatenate([x, more])
    for spec in (*steps, whole):
        x = jax.lax.with_sharding_constraint(x, spec)
    x = fn(x)
    for spec in (whole, *steps[::-1]):
        x = jax.lax.with_sharding_constraint(x, spec)
    return x[:n]
