"""The outputs of a frozen prefix, cached by example, so that its forward pass runs once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.paths import path_name

try:
    import fcntl
except ImportError:  # Windows, which has no such lock.
    fcntl = None

_VERSION = 1
_DTYPES = ("bfloat16", "float32")
_HEADER, _RECORDS, _LOCK = "prefix.json", "prefix.bin", "prefix.lock"
_HEAD = 8  # Bytes in front of the payload: the checksums of the record and of its inputs.


class PrefixCache:
    """The outputs of a frozen prefix by example id, in a file or in memory.

    An example's record is found by its id, is of a fixed size, and counts only if its checksum fits
    its content, its id and the key of the cache: whenever a process is killed, no entry is read
    wrongly later. Each record is verified the first time it is read after `open`.

    The cache never stops a training: if the disk is full or fails, it warns once, switches itself
    off, and everything is a miss. It is for one thread of one process; with several processes give
    each its own directory.

    Args:
      directory: the folder of the cache, made if need be; None keeps the cache in memory.
      examples: how many examples there are, ids being below; None if unknown.
      dtype: what floating arrays of more bits are stored as: ``"bfloat16"``, or ``"float32"``,
        which is exact for arrays of up to 32 bits. See `rounded`.
      max_bytes: the most that the cache may hold. If not all examples fit, the first ids are
        cached, and any batch with another one in it is a miss.

    Attributes:
      dtype: as given.
      hits: examples served so far.
      misses: examples in batches that were not served.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: `dtype` is another one, or `examples` or `max_bytes` is below 1.

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
        examples: int | None,
        dtype: str = "bfloat16",
        max_bytes: int = 4 * 2**30,
    ):
        if directory is not None and not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory must be a path or None, got {directory!r}")
        for name, value in (("examples", examples), ("max_bytes", max_bytes)):
            if name == "examples" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _check_dtype(dtype)
        self._directory = None if directory is None else Path(directory).expanduser()
        self._examples = examples
        self.dtype = dtype
        self._max_bytes = int(max_bytes)
        self.hits = 0
        self.misses = 0
        self._off = False
        self._layout: _Layout | None = None
        self._header = b""
        self._seed = 0
        self._limit = 0  # Ids below are cached.
        # The checksum of the inputs of every record that was verified since `open`; None for a
        # record that is not there.
        self._known: dict[int, int | None] = {}
        self._memory: dict[int, np.ndarray] = {}  # Records, where there is no directory.
        self._file: Any = None
        self._lock: int | None = None

    def open(self, key: str, like: Any) -> None:
        """Makes the cache that of a prefix; what was cached for another one is dropped.

        Args:
          key: a fingerprint of everything that the outputs depend on: the parameters and the state
            of the prefix, its stages, its mode. See `fingerprint`.
          like: the outputs of one example: a pytree of `jax.ShapeDtypeStruct` without the batch
            axis.

        Raises:
          TypeError: `key` is no string, or `like` has something else in it.
          ValueError: another process (or another `PrefixCache`) has the directory open.
        """
        if not isinstance(key, str):
            raise TypeError(f"key must be a string, such as fingerprint(params), got {key!r}")
        layout = _make_layout(like, self.dtype)
        header = {
            "version": _VERSION,
            "key": key,
            "byteorder": sys.byteorder,
            "leaves": [
                [leaf.name, list(leaf.shape), str(leaf.dtype), str(leaf.stored)]
                for leaf in layout.leaves
            ],
        }
        content = json.dumps(header, sort_keys=True).encode()
        if self._layout is not None and content == self._header:
            return
        self._layout, self._header, self._seed = layout, content, zlib.crc32(content)
        self._known, self._memory = {}, {}
        self._limit = self._max_bytes // layout.bytes
        if self._examples is not None:
            if self._limit < self._examples and not self._off:
                warnings.warn(
                    f"the prefix cache holds {self._limit} of {self._examples} examples, and a "
                    "batch with any other example in it is a miss; raise max_bytes to "
                    f"{self._examples * layout.bytes}",
                    stacklevel=2,
                )
            self._limit = min(self._limit, self._examples)
        if self._directory is not None and not self._off:
            try:
                self._open_files()
            except OSError as error:
                self._switch_off(error)

    def lookup(self, ids: Any, inputs: Any) -> Any:
        """The outputs of a batch, if all of its examples are cached.

        Args:
          ids: whole numbers from 0, one an example, `[batch]`.
          inputs: what the prefix is given: a pytree of arrays `[batch, ...]`. Their checksum is
            compared with that of the inputs that the outputs were stored with.

        Returns:
          A pytree of NumPy arrays `[batch, ...]` of the dtypes of `like`, rounded as `rounded`
          does; None if the outputs of any example are not there.

        Raises:
          ValueError: the ids are no whole numbers from 0, or not below `examples`; the inputs do
            not fit them; an example came with other inputs than it was stored with; or the cache
            is not open.
        """
        layout = self._opened()
        ids, checksums = self._check(ids, inputs)
        if self._off:
            self.misses += len(ids)
            return None
        block = np.empty((len(ids), layout.bytes), np.uint8)  # [batch, record]
        try:
            complete = self._find(ids, checksums, block)
        except OSError as error:
            self._switch_off(error)
            complete = False
        if not complete:
            self.misses += len(ids)
            return None
        self.hits += len(ids)
        return layout.unpack(block)

    def store(self, ids: Any, inputs: Any, outputs: Any) -> None:
        """Caches the outputs of a batch; examples that do not fit `max_bytes` are left out.

        Args:
          ids: whole numbers from 0, one an example, `[batch]`.
          inputs: what the prefix was given, a pytree of arrays `[batch, ...]`.
          outputs: what it returned, a pytree of arrays `[batch, ...]` like `like`.

        Raises:
          ValueError: as for `lookup`, or the outputs are not like `like`.
        """
        layout = self._opened()
        ids, checksums = self._check(ids, inputs)
        if self._off:
            return
        block = layout.pack(outputs, len(ids))  # [batch, record]
        try:
            self._find(ids, checksums)
            batch: dict[int, int] = {}
            for i, checksum in zip(ids, checksums, strict=True):
                if batch.setdefault(i, checksum) != checksum:
                    raise ValueError(_CHANGED.format(i))
            for i, checksum, row in zip(ids, checksums, block, strict=True):
                if i < self._limit:
                    row[:_HEAD].view(np.uint32)[:] = 0, checksum
                    row[:4].view(np.uint32)[0] = self._checksum(i, row)
                    # Until it is written whole it is not there.
                    self._known[i] = None
                    self._write(i, row)
                    self._known[i] = checksum
        except OSError as error:
            self._switch_off(error)

    def invalidate(self) -> None:
        """Drops everything that is cached; the cache stays open."""
        self._known, self._memory = {}, {}
        if self._file is not None:
            try:
                self._file.truncate(0)
            except OSError as error:
                self._switch_off(error)

    def close(self) -> None:
        """Lets go of the files and of the memory; `open` opens the cache again."""
        self._known, self._memory, self._layout, self._header = {}, {}, None, b""
        self._close_files()

    @property
    def key(self) -> str | None:
        """The key of the prefix that the cache is open for; None if it is not open."""
        return json.loads(self._header)["key"] if self._layout is not None else None

    @property
    def bytes(self) -> int:
        """What the records take on disk or in memory."""
        if self._file is not None:
            try:
                status = os.fstat(self._file.fileno())
            except OSError:
                return 0
            # Records that were never written are holes, which take no space.
            return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
        return sum(row.nbytes for row in self._memory.values())

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _opened(self) -> _Layout:
        if self._layout is None:
            raise ValueError("the cache is not open; call open(key, like) first")
        return self._layout

    def _check(self, ids: Any, inputs: Any) -> tuple[list[int], list[int]]:
        """The ids, and the checksum of the inputs of each."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                "ids must be whole numbers, one an example, got an array of shape "
                f"{array.shape} and dtype {array.dtype}"
            )
        numbers = [int(i) for i in array.tolist()]
        if numbers and min(numbers) < 0:
            raise ValueError(f"ids must be 0 or more, got {min(numbers)}")
        if numbers and self._examples is not None and max(numbers) >= self._examples:
            raise ValueError(
                f"ids must be below the {self._examples} examples that the cache was made for, got "
                f"{max(numbers)}; correct the ids, or raise examples"
            )
        checksums = [0] * len(numbers)
        for leaf in jax.tree.leaves(inputs):
            leaf = np.ascontiguousarray(leaf)
            if leaf.ndim == 0 or len(leaf) != len(numbers):
                raise ValueError(
                    f"inputs must have one row an id, got an array of shape {leaf.shape} for "
                    f"{len(numbers)} ids"
                )
            kind = f"{leaf.dtype}{leaf.shape[1:]}".encode()
            rows = _as_bytes(leaf)
            checksums = [
                zlib.crc32(row.data, zlib.crc32(kind, checksum))
                for row, checksum in zip(rows, checksums, strict=True)
            ]
        return numbers, checksums

    def _find(
        self, ids: Sequence[int], checksums: Sequence[int], block: np.ndarray | None = None
    ) -> bool:
        """Whether all records are there; they are read into `block`, if it is given.

        Raises `ValueError` for a record that was stored with other inputs.
        """
        spare = np.empty(self._opened().bytes, np.uint8)
        complete, read = True, set()
        for place, (i, checksum) in enumerate(zip(ids, checksums, strict=True)):
            if i not in self._known and i < self._limit:
                row = spare if block is None else block[place]
                self._known[i] = None
                if self._read(i, row):
                    head = row[:_HEAD].view(np.uint32)
                    if head[0] and head[0] == self._checksum(i, row):
                        self._known[i] = int(head[1])
                        read.add(place)
            known = self._known.get(i)
            if known is None:
                complete = False
            elif known != checksum:
                raise ValueError(_CHANGED.format(i))
        if complete and block is not None:
            for place, i in enumerate(ids):
                if place not in read and not self._read(i, block[place]):
                    self._known[i] = None  # Someone cut the file short.
                    return False
        return complete

    def _checksum(self, i: int, row: np.ndarray) -> int:
        # Starts from that of the header, so that records of another key never fit. Zero is what
        # a hole in the file reads as.
        start = zlib.crc32(i.to_bytes(8, "little"), self._seed)
        return zlib.crc32(row[4:].data, start) or 1

    # Records are written and read by plain calls, not through a memory map: where a disk is full or
    # a file is cut short, these raise an error, and a map kills the process.

    def _read(self, i: int, row: np.ndarray) -> bool:
        if self._file is None:
            record = self._memory.get(i)
            if record is not None:
                row[:] = record
            return record is not None
        self._file.seek(i * len(row))
        return self._file.readinto(row) == len(row)

    def _write(self, i: int, row: np.ndarray) -> None:
        if self._file is None:
            self._memory[i] = row.copy()
            return
        self._file.seek(i * len(row))
        view = row.data
        while view:
            view = view[self._file.write(view) :]

    def _open_files(self) -> None:
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self._file is not None:
            self._file.close()
            self._file = None
        header, records = self._directory / _HEADER, self._directory / _RECORDS
        try:
            same = header.read_bytes() == self._header
        except FileNotFoundError:
            same = False
        if not same:
            # Whatever is killed here leaves records that do not fit the header, which their
            # checksums tell.
            with contextlib.suppress(FileNotFoundError):
                records.unlink()
            temporary = self._directory / (_HEADER + ".tmp")
            temporary.write_bytes(self._header)
            temporary.replace(header)
        self._file = open(os.open(records, os.O_RDWR | os.O_CREAT | _BINARY, 0o666), "r+b", 0)

    def _take_lock(self) -> None:
        if self._lock is not None or fcntl is None:
            return
        assert self._directory is not None
        lock = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            self._layout, self._header = None, b""
            raise ValueError(
                f"the prefix cache in {str(self._directory)!r} is open already, maybe in another "
                "process; close it there, or give each its own directory"
            ) from None
        except OSError:
            pass  # Some network file systems have no locks.
        self._lock = lock

    def _close_files(self) -> None:
        file, lock = self._file, self._lock
        self._file = self._lock = None
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()
        if lock is not None:
            os.close(lock)

    def _switch_off(self, error: OSError) -> None:
        self._off = True
        self._known, self._memory = {}, {}
        self._close_files()
        warnings.warn(
            f"the prefix cache is switched off, and training goes on without it: {error}; make "
            "room or choose another directory",
            stacklevel=3,
        )


def rounded(outputs: Any, dtype: str = "bfloat16") -> Any:
    """What the cache gives back for `outputs`: rounded to `dtype`, in the dtypes they had.

    Train on the rounded outputs where they are computed, too, so that a step does not depend on
    whether the cache was hit. It can be compiled, unlike a mere pair of casts, which XLA may drop.

    Args:
      outputs: a pytree of arrays.
      dtype: that of the cache, ``"bfloat16"`` or ``"float32"``.

    Returns:
      A pytree like `outputs`. Floating arrays of more bits than `dtype` are rounded to the nearest
      value, ties to even; others are as they are.

    Raises:
      ValueError: `dtype` is another one.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.partial.prefix_cache import rounded
      >>> jax.jit(rounded)(jnp.array([1.0, 1.001, 3.14159]))
      Array([1.    , 1.    , 3.140625], dtype=float32)
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
    """SHA-256 over the names, shapes, dtypes and bytes of all leaves, and over further strings.

    Args:
      tree: a pytree of arrays (random keys and numbers included). Arrays on a device are fetched.
      *extra: whatever else matters, such as the names of the stages.

    Returns:
      64 hexadecimal digits.

    Raises:
      TypeError: a leaf is no array, or an extra no string.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax.partial.prefix_cache import fingerprint
      >>> a = fingerprint({"kernel": np.zeros([2, 3])}, "embed")
      >>> b = fingerprint({"kernel": np.zeros([3, 2])}, "embed")
      >>> len(a), a == b
      (64, False)
    """
    digest = hashlib.sha256()

    def add(part: bytes | memoryview) -> None:
        # The length in front keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    add(str(len(leaves)).encode())
    for path, leaf in leaves:
        name = path_name(path)
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype == object:
            raise TypeError(f"{name} must be an array, got {type(leaf).__name__}")
        add(f"{name}\0{array.shape}\0{dtype or array.dtype}".encode())
        add(_as_bytes(np.ascontiguousarray(array)[None])[0].data)
    for text in extra:
        if not isinstance(text, str):
            raise TypeError(f"extra must be strings, got {text!r}")
        add(text.encode())
    return digest.hexdigest()


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends.

_CHANGED = (
    "the inputs of example {} are not those that its outputs were cached with; augmented data, or "
    "ids that are positions in a re-ordered data set, cannot be cached: switch the prefix cache "
    "off, or give each example an id of its own"
)


class _Leaf(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype  # Of the outputs.
    stored: np.dtype  # In the record.
    start: int  # Bytes from the start of the record.
    bytes: int


class _Layout(NamedTuple):
    """Where the leaves of an example's outputs are in its record."""

    leaves: tuple[_Leaf, ...]
    structure: Any
    bytes: int

    def pack(self, outputs: Any, batch: int) -> np.ndarray:
        """Records `[batch, record]` without their checksums."""
        arrays, structure = jax.tree.flatten(outputs)
        if structure != self.structure:
            raise ValueError(
                f"outputs must have the structure that the cache was opened for, {self.structure}, "
                f"got {structure}"
            )
        block = np.zeros((batch, self.bytes), np.uint8)
        for leaf, array in zip(self.leaves, arrays, strict=True):
            array = np.asarray(array)
            if array.shape != (batch, *leaf.shape) or array.dtype != leaf.dtype:
                raise ValueError(
                    f"outputs {leaf.name} must be {leaf.dtype}{[batch, *leaf.shape]}, got "
                    f"{array.dtype}{list(array.shape)}"
                )
            if array.dtype.itemsize > 4 and leaf.stored != leaf.dtype:
                array = array.astype(np.float32)  # As `rounded` does, in two steps.
            rows = _as_bytes(np.ascontiguousarray(array.astype(leaf.stored, copy=False)))
            block[:, leaf.start : leaf.start + leaf.bytes] = rows
        return block

    def unpack(self, block: np.ndarray) -> Any:
        """The outputs in records `[batch, record]`."""
        arrays = []
        for leaf in self.leaves:
            rows = block[:, leaf.start : leaf.start + leaf.bytes]
            if leaf.stored == leaf.dtype or not leaf.bytes:
                array = np.ascontiguousarray(rows).view(leaf.dtype)
            elif leaf.stored.name == "bfloat16" and leaf.dtype == np.float32:
                # A bfloat16 is the upper half of a float32.
                array = rows.view(np.uint16).astype(np.uint32)
                array <<= 16
                array = array.view(np.float32)
            else:
                array = rows.view(leaf.stored).astype(leaf.dtype)
            arrays.append(array.reshape(len(block), *leaf.shape))
        return jax.tree.unflatten(self.structure, arrays)


def _make_layout(like: Any, dtype: str) -> _Layout:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    found, start = [], _HEAD
    for path, leaf in leaves:
        name = path_name(path)
        shape, kind = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or kind is None:
            raise TypeError(
                f"like must be a pytree of jax.ShapeDtypeStruct, got {type(leaf).__name__} as "
                f"{name}"
            )
        try:
            kind = np.dtype(kind)
        except TypeError as error:
            raise TypeError(f"outputs {name} of dtype {kind} cannot be cached") from error
        stored = _stored(kind, dtype)
        size = stored.itemsize * int(np.prod(shape, dtype=np.int64))
        found.append(_Leaf(name, tuple(map(int, shape)), kind, stored, start, size))
        start += -(-size // 8) * 8
    return _Layout(tuple(found), structure, start)


def _stored(leaf: Any, dtype: str) -> np.dtype:
    """What a leaf of this dtype is stored as: `dtype` if that is a narrower float."""
    leaf, narrow = np.dtype(leaf), np.dtype(jnp.dtype(dtype))
    return narrow if jnp.issubdtype(leaf, np.floating) and leaf.itemsize > narrow.itemsize else leaf


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, `[rows, bytes]`."""
    size = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return array.reshape(-1).view(np.uint8).reshape(len(array), size)


def _check_dtype(dtype: Any) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {' or '.join(map(repr, _DTYPES))}, got {dtype!r}")
