"""Types of arrays under `jax.shard_map`: along which axes of a mesh they differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax


def varying(x: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` mesh along which an array differs between shards."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The same array, of a type that differs between shards along these axes too."""
    missing = tuple(sorted(frozenset(axes) - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
