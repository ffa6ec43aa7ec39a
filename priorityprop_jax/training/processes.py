"""Several processes that train together, one `jax.distributed` program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from priorityprop_jax.core.paths import path_name

# What JAX, gloo, NCCL and its coordinator say when a process does not answer.
_LOST = ("gloo", "nccl", "unavailable", "connection", "heartbeat", "barrier", "deadline_exceeded")


class WorkerLostError(RuntimeError):
    """Another of several processes has ended or does not answer; go on from the checkpoint."""


def raise_if_lost(error: BaseException, saved_to: str | None) -> None:
    """Raises a `WorkerLostError` if this error is due to another process."""
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return
    said = str(error).strip().partition("\n")[0]
    if any(word in said.lower() for word in _LOST):
        how = "" if saved_to is None else f", with resume_from={saved_to!r}"
        raise WorkerLostError(
            f"another process has ended or does not answer; start all of them again{how} "
            f"({said[:200]})"
        ) from None


def wait_and_get(tree: Any) -> Any:
    """`jax.device_get` that raises what has gone wrong at any device of this process.

    Where a process is lost, some devices of the others learn of it and some wait on: to wait for
    one after the other could be to wait for the wrong one.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    left = [shard.data for array in arrays for shard in array.addressable_shards]
    while left:
        ready = [array.is_ready() for array in left]
        jax.block_until_ready([array for array, done in zip(left, ready, strict=True) if done])
        left = [array for array, done in zip(left, ready, strict=True) if not done]
        time.sleep(1e-3 if left else 0)
    return jax.device_get(tree)


def agreed(make: Callable[[], int]) -> int:
    """What the first process makes, in all of them; they wait for it."""
    if jax.process_count() == 1:
        return make()
    value = 0 if jax.process_index() else make()
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_params(params: Any) -> None:
    """Raises a ValueError unless the parameters are of all processes."""
    alone = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _alone(leaf)]
    if jax.process_count() > 1 and alone:
        raise ValueError(
            f"{jax.process_count()} processes train together, but {path_name(alone[0])!r} is an "
            "array of this one alone: put the parameters on a mesh of all devices first, with "
            "jax.device_put and a NamedSharding"
        )


def check_batch(batch: Any) -> None:
    """Raises a ValueError unless a batch is of all processes."""
    if jax.process_count() == 1:
        return
    if any(np.ndim(leaf) and _alone(leaf) for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            "several processes train together, but a batch holds an array of this one alone: make "
            "it with jax.make_array_from_process_local_data(sharding, rows_of_this_process)"
        )


def _alone(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
