"""Checkpoints of a run: a folder that holds the latest two, written and read with Orbax."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from priorityprop_jax.core.paths import path_name

_FORMAT = "priorityprop_jax-2"

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
        yield manager


def save(manager: ocp.CheckpointManager, arrays: Any, about: Mapping[str, Any]) -> None:
    """Writes arrays, and what else belongs to a run, ready for JSON."""
    present = {
        key: jax.random.key_data(leaf) if _is_key(leaf) else leaf for key, leaf in _numbered(arrays)
    }
    about = {**about, "format": _FORMAT, "leaves": _describe(arrays)}
    items = {"arrays": ocp.args.StandardSave(present), "about": ocp.args.JsonSave(about)}
    latest = manager.latest_step()
    # Not the training step: an interruption can end two runs at the same one.
    manager.save(0 if latest is None else latest + 1, args=ocp.args.Composite(**items))


def load(source: Path, like: Any, made_by: str) -> tuple[Any, dict[str, Any]]:
    """Reads the latest checkpoint: arrays, laid out as in ``like``, and what belongs to them."""
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
    leaves, treedef = jax.tree.flatten(like)
    for key, leaf in _numbered(like):
        array = found[key]
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        leaves[int(key)] = array
    return treedef.unflatten(leaves), about


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
