"""Checkpoints of a run: a folder that holds the latest two, written and read with Orbax.

Records of steps are appended to one file beside them, so that a save takes as long at the end of a
long run as at its start; a checkpoint says how much of the file is its own. Weights that are not
trained are left out: a checkpoint has a checksum of them.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from priorityprop_jax.core.modules import FrozenWeight
from priorityprop_jax.core.paths import path_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FORMAT = "priorityprop_jax-3"

Path = str | os.PathLike[str]


@contextlib.contextmanager
def open_folder(folder: Path | None, known: Sequence[Path | None]) -> Iterator[Any]:
    """Opens a folder to save to, unless it holds checkpoints and is none of the known ones."""
    if folder is None:
        yield None
        return
    path = _absolute(folder)
    with _manager(path, create=True) as manager:
        if manager.latest_step() is not None and path not in [_absolute(k) for k in known if k]:
            raise ValueError(
                f"{path} holds the checkpoints of another run; continue that with resume_from, "
                "choose another checkpoint_dir, or remove the folder"
            )
        with _locked(path):
            yield manager


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Lets no other run write here; the system takes the lock back however this one ends."""
    if fcntl is None or "://" in folder or jax.process_index():
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(
            f"another run is writing checkpoints to {folder}: choose another checkpoint_dir, or "
            "wait for it to end"
        ) from None
    finally:
        os.close(opened)


def check_folder(folder: Any) -> None:
    """Raises a TypeError unless this is a path or none."""
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"checkpoint_dir must be a path or None, got {folder!r}")


def schedule(every: int | datetime.timedelta | None) -> Callable[[int], bool] | None:
    """Tells after so many steps whether a checkpoint is due; none where that is at ends of epochs.

    Raises a TypeError or ValueError unless this is a number of steps or a time from above zero.
    """
    if every is None:
        return None
    if isinstance(every, bool) or not isinstance(every, int | np.integer | datetime.timedelta):
        raise TypeError(
            f"checkpoint_every must be a number of steps or a datetime.timedelta, got {every!r}"
        )
    if not isinstance(every, datetime.timedelta):
        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 step, got {every}")
        return lambda steps: steps % every == 0
    seconds, last = every.total_seconds(), time.monotonic()
    if seconds <= 0:
        raise ValueError(f"checkpoint_every must be a time above zero, got {every}")
    if jax.process_count() > 1:
        raise ValueError("clocks of several processes differ: give checkpoint_every in steps")

    def due(steps: int) -> bool:
        nonlocal last
        if (now := time.monotonic()) - last < seconds:
            return False
        last = now
        return True

    return due


def warn_without(folder: Path | None, due: Callable[[int], bool] | None) -> None:
    """Warns the caller of `train` that what is due has no place to go."""
    if due is not None and folder is None:
        text = "checkpoint_every does nothing without a checkpoint_dir: no checkpoint is written"
        warnings.warn(text, stacklevel=3)


class Written(NamedTuple):
    """The file of a run's records of steps, and how much of it a checkpoint has."""

    folder: str = ""
    name: str = ""
    records: int = 0
    size: int = 0  # bytes


def save(
    manager: ocp.CheckpointManager,
    arrays: Any,
    about: Mapping[str, Any],
    steps: Sequence[Any],
    written: Written,
) -> Written:
    """Writes arrays, what else belongs to a run, ready for JSON, and the records of its steps.

    Of these only what is new since ``written``, what this returned or `load` did before.
    """
    arrays, frozen = _parted(arrays)
    present = {
        key: jax.random.key_data(leaf) if _is_key(leaf) else leaf for key, leaf in _numbered(arrays)
    }
    latest, folder = manager.latest_step(), os.fspath(manager.directory)
    # Not the training step: an interruption can end two runs at the same one.
    number = 0 if latest is None else latest + 1
    # A bucket can't append to a file.
    if written.folder != folder or "://" in folder:
        written = Written(folder, f"steps-{number}.jsonl")
    written = _append(manager.directory / written.name, written, steps)
    about = {**about, "format": _FORMAT, "leaves": _describe(arrays), "steps_in": written[1:]}
    about["frozen"] = frozen
    items = {"arrays": ocp.args.StandardSave(present), "about": ocp.args.JsonSave(about)}
    manager.save(number, args=ocp.args.Composite(**items))
    return written


def _append(path: Any, written: Written, steps: Sequence[Any]) -> Written:
    """Writes the new records over what an interrupted save may have left behind the old ones."""
    new = "".join(json.dumps(record) + "\n" for record in steps[written.records :]).encode()
    if jax.process_index() == 0:
        if not written.size:
            path.write_bytes(new)
        else:
            with open(path, "r+b") as file:
                file.truncate(written.size)
                file.seek(written.size)
                file.write(new)
    return written._replace(records=len(steps), size=written.size + len(new))


def load(source: Path, like: Any, made_by: str) -> tuple[Any, dict[str, Any], list[Any], Written]:
    """Reads the latest checkpoint.

    Arrays, laid out as in ``like``, what belongs to them, records of steps, and where these are.
    """
    folder = _absolute(source)
    if "://" not in folder and not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder} to resume from")
    with _manager(folder, create=False) as manager:
        latest = manager.latest_step()
        if latest is None:
            raise FileNotFoundError(f"there is no checkpoint in {folder} to resume from")
        where = f"checkpoint {latest} in {folder}"
        about = _read(manager, latest, where, about=ocp.args.JsonRestore())
        written = about.get("format") if isinstance(about, dict) else None
        if written != _FORMAT:
            raise ValueError(
                f"{where} has the format {written!r}, but only {_FORMAT!r} can be read: finish "
                "that run with the version of priorityprop_jax that wrote it, or train anew"
            )
        if about["made_by"] != made_by:
            raise ValueError(
                f"{where} does not fit this trainer: it was written with the step "
                f"{about['made_by']}, but this one's is {made_by}. Give the trainer the same step"
            )
        whole, (like, frozen) = like, _parted(like)
        if about.get("frozen", frozen) != frozen:
            raise ValueError(
                f"{where} does not fit this trainer: the weights that are not trained are others. "
                "Resume with the model that the run began with"
            )
        pairs = itertools.zip_longest(about["leaves"], _describe(like), fillvalue=["nothing", ""])
        for theirs, ours in pairs:
            if list(theirs) != list(ours):
                raise ValueError(
                    f"{where} does not fit this trainer: it has {' '.join(theirs).strip()} where "
                    f"the trainer has {' '.join(ours).strip()}. Resume with the model, the "
                    "optimizer and the slots that it was saved with"
                )
        wanted = {key: _abstract(leaf) for key, leaf in _numbered(like)}
        found = _read(manager, latest, where, arrays=ocp.args.StandardRestore(wanted))
        written = Written(folder, *about["steps_in"])
        steps = _records(manager.directory / written.name, written, where)
    leaves, treedef = jax.tree.flatten(like)
    for key, leaf in _numbered(like):
        array = found[key]
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        leaves[int(key)] = array
    return _joined(whole, treedef.unflatten(leaves)), about, steps, written


def _parted(tree: Any) -> tuple[Any, list[int]]:
    """A tree without its `FrozenWeight`s, and the checksum of each of these."""
    frozen = [leaf[...] for leaf in jax.tree.leaves(tree, is_leaf=_is_frozen) if _is_frozen(leaf)]
    kept = jax.tree.map(lambda x: None if _is_frozen(x) else x, tree, is_leaf=_is_frozen)
    return kept, [int(_checksum(array)) for array in frozen]


def _joined(whole: Any, kept: Any) -> Any:
    return jax.tree.map(
        lambda old, new: old if _is_frozen(old) else new, whole, kept, is_leaf=_is_frozen
    )


def _is_frozen(leaf: Any) -> bool:
    return isinstance(leaf, FrozenWeight)


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sum of the bits: the same wherever the parts of an array lie."""
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    return jnp.sum(bits.astype(jnp.uint32))


def _records(path: Any, written: Written, where: str) -> list[Any]:
    try:
        content = path.read_bytes()[: written.size]
        records = [json.loads(line) for line in content.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{written.name} of {where} cannot be read: {error}") from error
    if len(records) != written.records:
        raise ValueError(
            f"{written.name} of {where} is cut off: it has {len(records)} of {written.records} "
            "records of steps"
        )
    return records


def _absolute(path: Path) -> str:
    # Orbax wants absolute paths; those of cloud storage are.
    path = os.fspath(path)
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def _manager(folder: str, *, create: bool) -> ocp.CheckpointManager:
    options = {"max_to_keep": 2, "create": create, "enable_async_checkpointing": False}
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


def _read(manager: ocp.CheckpointManager, number: int, where: str, **item: Any) -> Any:
    """Restores the one item of a checkpoint."""
    (name,) = item
    try:
        return manager.restore(number, args=ocp.args.Composite(**item))[name]
    except Exception as error:  # Orbax and its file formats raise many kinds.
        raise ValueError(
            f"{where} cannot be read; it is damaged or was not written by a Trainer. Remove it to "
            "resume from the one before"
        ) from error


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbered(tree: Any) -> list[tuple[str, Any]]:
    # Numbers rather than paths, in which a user may have put any character. Orbax refuses arrays of
    # no elements.
    return [(f"{i:05d}", leaf) for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size]


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    # Also of an array that is deleted, whose shape and sharding are still known.
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None)  # none for what is in host memory
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _describe(tree: Any) -> list[list[str]]:
    """Name, and dtype with shape, of every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [[path_name(path), f"{leaf.dtype}{list(leaf.shape)}"] for path, leaf in leaves]
