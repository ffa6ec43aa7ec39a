"""The outputs of a frozen prefix, cached by example, so that its forward pass runs once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.paths import path_name

try:
    import fcntl
except ImportError:  # Windows, which has no such lock.
    fcntl = None

_DTYPES = ("bfloat16", "float32")


class PrefixCache(contextlib.AbstractContextManager["PrefixCache"]):
    """The outputs of a frozen prefix by example id, in a file or in memory.

    A record counts only if its checksum fits its content, its id and the key of the cache, so that
    none is read wrongly after a kill. If the disk is full or fails, the cache warns once, switches
    itself off, and everything is a miss. It is for one thread of one process, and locks its
    directory until it is closed or dropped.

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
        self._off, self._header, self._like = False, b"", None
        self._record, self._limit = np.dtype("u4"), 0  # ids below the limit are cached
        self._verified: set[int] = set()
        self._memory: dict[int, bytes] = {}  # records, where there is no directory
        self._file: Any = None
        self._release: Any = None  # closes the file and the lock

    def open(self, key: str, like: Any) -> None:
        """Makes the cache that of a prefix; what was cached for another one is dropped.

        Args:
          key: tells everything that the outputs depend on.
          like: the outputs of one example, a pytree of `jax.ShapeDtypeStruct`.

        Raises:
          TypeError, ValueError: `like` has something else in it than arrays that can be stored, or
            another `PrefixCache` has the directory open.
        """
        fields: list[Any] = [("check", "u4"), ("inputs", "u4")]
        leaves, _ = jax.tree_util.tree_flatten_with_path(like)
        for i, (path, leaf) in enumerate(leaves):
            try:
                fields.append((str(i), _stored(leaf.dtype, self.dtype), leaf.shape))
            except (AttributeError, TypeError) as error:
                raise TypeError(f"outputs {path_name(path)} cannot be cached: {leaf!r}") from error
        record = np.dtype(fields)
        described = [[path_name(path), str(leaf)] for path, leaf in leaves]
        header = json.dumps([2, key, self.dtype, sys.byteorder, described]).encode()
        if self.key is not None and header == self._header:
            return
        limit = min(self._max_bytes // record.itemsize, self._examples)
        if limit < self._examples and not self._off:
            warnings.warn(
                f"the prefix cache holds {limit} of {self._examples} examples, and a batch with "
                "any other example in it is a miss; raise max_bytes to "
                f"{self._examples * record.itemsize}",
                stacklevel=2,
            )
        self.close()
        self._like, self._record, self._limit, self._header = like, record, limit, header
        if self._directory is not None and not self._off:
            with self._guarded():
                self._open_files(self._directory)
        self.key = key

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
        records, raw = self._empty(len(ids))
        found = True
        with self._guarded():
            for i, checksum, record, row in zip(ids, checksums, records, raw, strict=True):
                there = not self._off and self._read(i, row)
                if there and record["inputs"] != checksum:
                    raise ValueError(_CHANGED.format(i))
                found = found and there
        if self._off or not found:
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
        records, raw = self._empty(len(ids))
        expected = jax.tree.map(lambda x: f"{x.dtype}{[len(ids), *x.shape]}", self._like)
        given = jax.tree.map(lambda x: f"{x.dtype}{[*x.shape]}", outputs)
        if given != expected:
            raise ValueError(f"outputs must be {expected}, got {given}")
        for number, leaf in enumerate(jax.tree.leaves(outputs)):
            records[str(number)] = leaf
        with self._guarded():
            for i, checksum, record, row in zip(ids, checksums, records, raw, strict=True):
                if i < self._limit and not self._off:
                    record["inputs"] = checksum
                    row[:4] = np.frombuffer(self._checksum(i, row), np.uint8)
                    self._verified.discard(i)
                    self._write(i, row)

    def close(self) -> None:
        """Lets go of the files and of the memory; `open` opens the cache again."""
        self.key, self._verified, self._memory, self._file = None, set(), {}, None
        if self._release is not None:
            with contextlib.suppress(OSError):  # of a disk that fails
                self._release()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check(self, ids: Any, inputs: Any) -> tuple[list[int], list[int]]:
        """The ids, and the checksum of the inputs of each."""
        if self.key is None:
            raise ValueError("the cache is not open; call open(key, like) first")
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"ids must be whole numbers, one an example, got {ids.dtype} of shape {ids.shape}"
            )
        numbers = [int(i) for i in ids.tolist()]
        if not all(0 <= i < self._examples for i in numbers):
            raise ValueError(
                f"ids must be from 0 on and below the {self._examples} examples that the cache was "
                f"made for, got {min(numbers)} to {max(numbers)}; correct them, or raise examples"
            )
        checksums = [0] * len(numbers)
        for leaf in map(np.asarray, jax.tree.leaves(inputs)):
            if leaf.shape[:1] != ids.shape:
                raise ValueError(
                    f"inputs must have one row an id, got shape {leaf.shape} for {len(ids)} ids"
                )
            kind = f"{leaf.dtype}{leaf.shape[1:]}".encode()
            for n, row in enumerate(leaf):
                checksums[n] = zlib.crc32(row.tobytes(), zlib.crc32(kind, checksums[n]))
        seen: dict[int, int] = {}
        for i, checksum in zip(numbers, checksums, strict=True):
            if seen.setdefault(i, checksum) != checksum:
                raise ValueError(_CHANGED.format(i))
        return numbers, checksums

    def _empty(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Records, and the bytes of each."""
        records = np.zeros(count, self._record)
        return records, records.view(np.uint8).reshape(count, self._record.itemsize)

    def _checksum(self, i: int, row: np.ndarray) -> bytes:
        # With the header, so that records of another key never fit, and with the id. Zero is what
        # a hole in the file reads as.
        start = zlib.crc32(i.to_bytes(8, "little"), zlib.crc32(self._header))
        return (zlib.crc32(row[4:].data, start) or 1).to_bytes(4, "little")

    # Records are read and written by plain calls, not through a memory map: where a disk is full or
    # a file is cut short, these raise an error, and a map kills the process.

    def _read(self, i: int, row: np.ndarray) -> bool:
        if self._file is None:
            record = self._memory.get(i, b"")
            row[: len(record)] = np.frombuffer(record, np.uint8)
            return bool(record)
        self._file.seek(i * len(row))
        if self._file.readinto(row) != len(row):
            return False
        if i not in self._verified and row[:4].tobytes() != self._checksum(i, row):
            return False
        self._verified.add(i)
        return True

    def _write(self, i: int, row: np.ndarray) -> None:
        if self._file is None:
            self._memory[i] = row.tobytes()
            return
        self._file.seek(i * len(row))
        view = row.data
        while view:
            view = view[self._file.write(view) :]

    def _open_files(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        header, records = directory / "prefix.json", directory / "prefix.bin"
        with contextlib.ExitStack() as stack:
            lock = os.open(directory / "prefix.lock", os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            _take(lock, directory)
            if not header.exists() or header.read_bytes() != self._header:
                # Whatever is killed here leaves records that do not fit the header, which their
                # checksums tell.
                records.unlink(missing_ok=True)
                temporary = directory / "prefix.json.tmp"
                temporary.write_bytes(self._header)
                temporary.replace(header)
            records.touch()
            self._file = stack.enter_context(records.open("r+b", 0))
            # Also where a cache is dropped without being closed.
            self._release = weakref.finalize(self, stack.pop_all().close)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Switches the cache off where a disk fails."""
        try:
            yield
        except OSError as error:
            key, self._off = self.key, True
            self.close()
            self.key = key
            warnings.warn(
                f"the prefix cache is switched off, and training goes on without it: {error}; make "
                "room or choose another directory",
                stacklevel=4,
            )


def _take(lock: int, directory: Path) -> None:
    """Locks a file, or raises if another process has."""
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"the prefix cache in {str(directory)!r} is open already, maybe in another process; "
            "close it there, or give each its own directory"
        ) from None
    except OSError:
        pass  # Some network file systems have no locks.


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
