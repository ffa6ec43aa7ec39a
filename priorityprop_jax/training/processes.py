"""Several processes that train together, one `jax.distributed` program."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from priorityprop_jax.core.paths import path_name

# What JAX, gloo, NCCL and its coordinator say when a process does not answer.
_LOST = ("gloo", "nccl", "unavailable", "connection", "heartbeat", "barrier", "deadline_exceeded")
_GRACE = 10.0  # seconds for the others to end as well


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


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Within, an error that nobody catches ends this process soon, for the others to know."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            leave_soon(error)
        raise


def leave_soon(error: BaseException | None = None) -> None:
    """Has this process end in seconds once it ends, if with this error, or in any case.

    Other processes know nothing of the error: they wait for this one's part of a step, while JAX
    has this one wait for theirs in minutes. As soon as it is gone, they are told.
    """

    def leave() -> None:
        if error is not None and error not in _chain(getattr(sys, "last_value", None)):
            return  # somebody has caught it
        if jax.process_count() > 1 and not isinstance(error, WorkerLostError):
            waiting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
            waiting.start()
            waiting.join(_GRACE)
            if not waiting.is_alive():
                return  # they all ended
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    atexit.register(leave)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def wait_and_get(tree: Any) -> Any:
    """`jax.device_get`, after `wait`; what is no array is left alone, as that takes time too."""
    leaves, treedef = jax.tree.flatten(wait(tree))
    arrays = iter(jax.device_get([x for x in leaves if isinstance(x, jax.Array)]))
    return treedef.unflatten(next(arrays) if isinstance(x, jax.Array) else x for x in leaves)


def wait(tree: Any) -> Any:
    """Waits for arrays, returns them, and raises what went wrong at any device of this process.

    Where one fails, or a process is lost, some devices learn of it and some wait on: to wait for
    one after the other could be to wait for the wrong one.
    """
    if jax.device_count() == 1:
        return jax.block_until_ready(tree)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    left: list[Any] = [shard.data for array in arrays for shard in array.addressable_shards]
    if len(left) == len(arrays):
        return jax.block_until_ready(tree)
    left = [data for data in left if hasattr(data, "is_ready")]  # random keys have not
    while left:
        ready = [array.is_ready() for array in left]
        try:
            jax.block_until_ready([array for array, done in zip(left, ready, strict=True) if done])
        except BaseException as error:
            if not all(ready):
                error.add_note(
                    "other devices wait for this one: arrays can be read, but nothing can be "
                    "computed any more in this process, which XLA may end in a minute"
                )
                leave_soon(error)
            raise
        left = [array for array, done in zip(left, ready, strict=True) if not done]
        time.sleep(1e-4 if left else 0)
    return tree


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
