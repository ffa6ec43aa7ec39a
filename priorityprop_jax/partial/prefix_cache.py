"""The outputs of a frozen prefix, cached by example, so that its forward pass runs once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
import warnings
import weakref
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.paths import path_name

_DTYPES = ("bfloat16", "float32")


class PrefixCache(contextlib.AbstractContextManager["PrefixCache"]):
    """The outputs of a frozen prefix by example id, in a file or in memory.

    The file counts once the cache is closed or dropped; what a killed run leaves is thrown away. Of
    several caches that share a directory at a time, each fills a file of its own, and that of the
    last to close is kept. If there is no room on the disk, the cache warns once, switches itself
    off, and everything is a miss. It is for one thread.

    Args:
      directory: the folder of the cache, made if need be; None keeps the cache in memory.
      examples: how many examples there are, ids being below.
      dtype: what floating arrays of more bits are rounded to, ``"bfloat16"`` or ``"float32"``.
      max_bytes: the most that the cache may hold. If not all examples fit, the first ids are
        cached, and any batch with another one in it is a miss.

    Attributes:
      key: of the prefix that the cache is open for; None if it is not open.
      hits: examples served so far.
      misses: examples in batches that were not served.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind, or makes no sense.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from priorityprop_jax.partial.prefix_cache import PrefixCache, rounded
      >>> ids, x = np.array([7, 3]), np.ones([2, 5], np.float32)
      >>> y = np.asarray(rounded(x / 3))  # [batch, 5], what a frozen prefix might give
      >>> with PrefixCache(None, examples=10) as cache:
      ...     cache.open("weights at step 100", jax.ShapeDtypeStruct((5,), np.float32))
      ...     first = cache.lookup(ids, x)
      ...     cache.store(ids, x, y)
      ...     second = cache.lookup(ids, x)
      >>> first is None, bool((second == y).all()), cache.hits, cache.misses
      (True, True, 2, 2)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        examples: int,
        dtype: str = "bfloat16",
        max_bytes: int = 4 * 2**30,
    ):
        if directory is not None and not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory must be a path or None, got {directory!r}")
        for name, value in (("examples", examples), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _check_dtype(dtype)
        self._directory = None if directory is None else Path(directory).expanduser()
        self._examples, self._max_bytes = int(examples), int(max_bytes)
        self.dtype = dtype
        self.key: str | None = None
        self.hits = self.misses = 0
        self._off, self._header, self._like = False, "", None
        self._records = np.zeros(0, [("inputs", "u4")])  # by id, for the first ids
        self._keep: Any = None  # gives the file its name

    def open(self, key: str, like: Any) -> None:
        """Makes the cache that of a prefix; what was cached for another one is dropped.

        Args:
          key: tells everything that the outputs depend on.
          like: the outputs of one example, a pytree of `jax.ShapeDtypeStruct`.

        Raises:
          TypeError: `like` has something else in it than arrays that can be stored.
        """
        fields: list[Any] = [("inputs", "u4")]  # their checksum, 0 where nothing is stored
        leaves, _ = jax.tree_util.tree_flatten_with_path(like)
        for i, (path, leaf) in enumerate(leaves):
            try:
                fields.append((str(i), _stored(leaf.dtype, self.dtype), leaf.shape))
            except (AttributeError, TypeError) as error:
                raise TypeError(f"outputs {path_name(path)} cannot be cached: {leaf!r}") from error
        record = np.dtype(fields)
        limit = min(self._max_bytes // record.itemsize, self._examples)
        described = [[path_name(path), str(leaf)] for path, leaf in leaves]
        about = json.dumps([3, key, self.dtype, sys.byteorder, limit, described])
        header = hashlib.sha256(about.encode()).hexdigest()
        if self.key is not None and header == self._header:
            return
        if limit < self._examples and not self._off:
            warnings.warn(
                f"the prefix cache holds {limit} of {self._examples} examples, and a batch with "
                "any other example in it is a miss; raise max_bytes to "
                f"{self._examples * record.itemsize}",
                stacklevel=2,
            )
        self.close()
        self.key, self._header, self._like = key, header, like
        try:
            if self._directory is None or self._off or not limit:
                self._records = np.zeros(0 if self._off else limit, record)
            else:
                self._records = self._mapped(self._directory, record, limit)
        except OSError as error:
            self._off = True
            warnings.warn(
                f"the prefix cache is switched off, and training goes on without it: {error}; make "
                "room or choose another directory",
                stacklevel=2,
            )

    def lookup(self, ids: Any, inputs: Any) -> Any:
        """The outputs of a batch as NumPy arrays, or None if those of any example are not there.

        Args:
          ids: whole numbers from 0, one an example, `[batch]`.
          inputs: what the prefix is given, a pytree of arrays `[batch, ...]`: its checksum must be
            that of what the outputs were stored with.

        Raises:
          ValueError: the ids are no whole numbers below `examples`, the inputs do not fit them, an
            example has other inputs than before, or the cache is not open.
        """
        ids, checksums = self._check(ids, inputs)
        fit = ids < len(self._records)
        records = self._records[ids[fit]]
        found = records["inputs"] != 0
        if (changed := found & (records["inputs"] != checksums[fit])).any():
            raise ValueError(_CHANGED.format(ids[fit][changed][0]))
        if not fit.all() or not found.all():
            self.misses += len(ids)
            return None
        self.hits += len(ids)
        leaves, structure = jax.tree.flatten(self._like)
        arrays = [records[str(i)].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
        return structure.unflatten(arrays)

    def store(self, ids: Any, inputs: Any, outputs: Any) -> None:
        """Caches the outputs of a batch, a pytree of arrays `[batch, ...]`; see `lookup`.

        Raises:
          ValueError: as for `lookup`, or the outputs are not as `open` was told.
        """
        ids, checksums = self._check(ids, inputs)
        expected = jax.tree.map(lambda x: f"{x.dtype}{[len(ids), *x.shape]}", self._like)
        given = jax.tree.map(lambda x: f"{x.dtype}{[*x.shape]}", outputs)
        if given != expected:
            raise ValueError(f"outputs must be {expected}, got {given}")
        fit = ids < len(self._records)
        records = np.zeros(fit.sum(), self._records.dtype)
        records["inputs"] = checksums[fit]
        for number, leaf in enumerate(jax.tree.leaves(outputs) if fit.any() else ()):
            records[str(number)] = np.asarray(leaf)[fit]
        self._records[ids[fit]] = records

    def close(self) -> None:
        """Keeps the file, and lets go of it and of the memory; `open` opens the cache again."""
        self.key, self._records = None, self._records[:0].copy()
        if self._keep is not None:
            self._keep()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check(self, ids: Any, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and the checksum of the inputs of each."""
        if self.key is None:
            raise ValueError("the cache is not open; call open(key, like) first")
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"ids must be whole numbers, one an example, got {ids.dtype} of shape {ids.shape}"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self._examples:
            raise ValueError(
                f"ids must be from 0 on and below the {self._examples} examples that the cache was "
                f"made for, got {ids.min()} to {ids.max()}; correct them, or raise examples"
            )
        checksums = [0] * len(ids)
        for leaf in map(np.asarray, jax.tree.leaves(inputs)):
            if leaf.shape[:1] != ids.shape:
                raise ValueError(
                    f"inputs must have one row an id, got shape {leaf.shape} for {len(ids)} ids"
                )
            kind = f"{leaf.dtype}{leaf.shape[1:]}".encode()
            for n, row in enumerate(leaf):
                checksums[n] = zlib.crc32(row.tobytes(), zlib.crc32(kind, checksums[n]))
        seen: dict[int, int] = {}
        for i, checksum in zip(ids.tolist(), checksums, strict=True):
            if seen.setdefault(i, checksum) != checksum:
                raise ValueError(_CHANGED.format(i))
        return ids.astype(np.int64), np.maximum(checksums, 1)  # 0 says that nothing is stored

    def _mapped(self, directory: Path, record: np.dtype, limit: int) -> np.ndarray:
        """Records in a file, which has another name until it is kept."""
        directory.mkdir(parents=True, exist_ok=True)
        kept, size = directory / f"{self._header}.prefix", limit * record.itemsize
        path = directory / f"{uuid.uuid4().hex}.filling"
        if kept.exists() and kept.stat().st_size == size:
            kept.replace(path)  # as it is written to
        for other in (*directory.glob("*.prefix"), *directory.glob("*.filling")):
            if other != path:
                other.unlink(missing_ok=True)
        try:
            with path.open("ab") as file:
                # All room at once: where a disk is full, writing to a map would kill the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            records = np.memmap(path, record, "r+", shape=(limit,))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._keep = weakref.finalize(self, _keep, path, kept)
        return records


def _keep(path: Path, kept: Path) -> None:
    """Gives a file its name; what was written to a map of it is in it."""
    with contextlib.suppress(OSError):  # Another cache may have cleared the directory.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(kept)


def rounded(outputs: Any, dtype: str = "bfloat16") -> Any:
    """What the cache gives back for `outputs`: rounded to `dtype`, in the dtypes they had.

    Trained on where outputs are computed, too, a step does not depend on whether the cache was hit.
    It can be compiled, unlike a pair of casts, which XLA may drop.
    """
    _check_dtype(dtype)

    def round_leaf(leaf: Any) -> Any:
        if _stored(jnp.result_type(leaf), dtype) == jnp.result_type(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        if leaf.dtype.itemsize > 4:
            leaf = jax.lax.reduce_precision(leaf, 8, 23)
        return jax.lax.reduce_precision(leaf, 8, 7) if dtype == "bfloat16" else leaf

    return jax.tree.map(round_leaf, outputs)


def fingerprint(tree: Any, *extra: str) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of all leaves, and of further strings."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little"))  # keeps ("ab", "c") and ("a", "bc") apart
        digest.update(part)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    add(str(len(leaves)).encode())
    for path, leaf in leaves:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        add(f"{path_name(path)}\0{array.shape}\0{dtype}".encode())
        add(array.tobytes())
    for text in extra:
        add(text.encode())
    return digest.hexdigest()


_CHANGED = (
    "the inputs of example {} are not those that its outputs were cached with; augmented data, or "
    "ids that are positions in a re-ordered data set, cannot be cached: switch the prefix cache "
    "off, or give each example an id of its own"
)


def _stored(leaf: Any, dtype: str) -> np.dtype:
    """What a leaf of this dtype is stored as: `dtype` if that is a narrower float."""
    leaf, narrow = np.dtype(leaf), np.dtype(jnp.dtype(dtype))
    return narrow if jnp.issubdtype(leaf, np.floating) and leaf.itemsize > narrow.itemsize else leaf


def _check_dtype(dtype: Any) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {' or '.join(map(repr, _DTYPES))}, got {dtype!r}")
