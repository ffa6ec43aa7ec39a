"""Kernels in C++ for a CPU, where the installation has them: they are loaded and called here.

They are built with the package, once for each instruction set that the compiler knows, and lie in
the room `sparse`; the best that the processor has is loaded with the first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import pathlib
import re
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from priorityprop_jax.core.fragile import vary, varying, varying_type
from priorityprop_jax.core.walk import Formula, register_flops

# Best first.
_INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "base": "baseline"}
_INTERFACE = 4  # of the handlers, as csrc/ffi.cc has it
_AGAIN = "install priorityprop_jax again"
_lock = threading.Lock()


class _Library(NamedTuple):
    name: str | None  # of an instruction set; None without native kernels
    status: str


def native_status() -> tuple[bool, str]:
    """Whether there are native kernels here, and which, or why not."""
    library = _library()
    return library.name is not None, library.status


def instruction_set() -> str | None:
    """Whose kernels run here: ``"avx512"``, ``"avx2"`` or ``"base"``; None without any."""
    return _library().name


def platform() -> str:
    """Where JAX puts arrays: ``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def call(
    handler: str,
    flops: Formula,
    shapes: Sequence[tuple[int, ...]],
    *operands: jax.Array,
    in_place: Mapping[int, int] | None = None,
    **attributes: object,
) -> Sequence[jax.Array]:
    """Calls a kernel whose results are float32 arrays of the shapes.

    Args:
      handler: its name in csrc/ffi.cc.
      flops: what it costs, see `register_flops`; of a handler always the same function.
      shapes: of the results.
      *operands: what it takes.
      in_place: operands that results may be written over, ``{operand: result}``.
      **attributes: static ones.
    """
    library = _library()
    if library.name is None:
        raise RuntimeError(f"there are no native kernels here: {library.status}")
    # Within `jax.shard_map` operands must vary along the same axes, and results are told to.
    axes = frozenset[str]().union(*map(varying, operands))
    operands = tuple(vary(x, axes) for x in operands)
    kind = varying_type(axes)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32, **kind) for shape in shapes]
    with _lock:
        target = _registered(handler, library.name, flops)
    options: Any = {"vmap_method": "sequential", "input_output_aliases": dict(in_place or {})}
    return jax.ffi.ffi_call(target, results, **options)(*operands, **attributes)


@functools.cache
def _registered(handler: str, name: str, flops: Formula) -> str:
    """The target that XLA knows the kernel of an instruction set by, which it is told of."""
    function = getattr(_load(name), f"priorityprop_{handler}")
    target = f"priorityprop_{handler}_{name}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    register_flops(target, flops)
    return target


def _library() -> _Library:
    """The kernels to use, loaded once."""
    with _lock:
        return _load_best()


@functools.cache
def _load_best() -> _Library:
    paths = _installed()
    if "base" not in paths:
        why = "no native library was built with this installation (was there a C++ compiler?)"
        return _Library(None, why)
    try:
        return _load_of(paths)
    except (OSError, AttributeError) as error:
        why = f"the native library cannot be loaded: {error}"
        message = f"all runs by JAX alone, as {why}; {_AGAIN}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return _Library(None, why)


def _load_of(paths: dict[str, pathlib.Path]) -> _Library:
    version, base = _running_version(), ctypes.CDLL(str(paths["base"]))
    if version is None:
        return _Library(None, "the FFI version of this jaxlib is unknown: it has no headers")
    ours = base.priorityprop_ffi_version()
    if ours // 1000 != version // 1000 or ours > version:
        why = (
            f"was built for FFI version {ours // 1000}.{ours % 1000}, and this jaxlib has "
            f"{version // 1000}.{version % 1000}"
        )
        return _Library(None, f"the native library {why}: {_AGAIN}")
    if getattr(base, "priorityprop_interface", lambda: 1)() != _INTERFACE:
        why = "was built from other sources than these"
        return _Library(None, f"the native library {why}: {_AGAIN}")
    for name, title in _INSTRUCTION_SETS.items():
        if name in paths and _can_run(paths, name):
            _load(name)
            return _Library(name, f"{title} kernels")
    return _Library(None, "no native library that was built can run on this processor")


@functools.cache
def _load(name: str) -> ctypes.CDLL:
    """The kernels of an instruction set that the processor has."""
    return ctypes.CDLL(str(_installed()[name]))


def _can_run(paths: dict[str, pathlib.Path], name: str) -> bool:
    return bool(ctypes.CDLL(str(paths["base"])).priorityprop_can_run(name.encode()))


@functools.cache
def _installed() -> dict[str, pathlib.Path]:
    """The libraries by instruction set: in these sources, or where the package was installed to.

    The two differ where the package is run from its sources.
    """
    package = __name__.split(".")[0]
    roots = [pathlib.Path(__file__).parents[1]]
    roots += map(pathlib.Path, sys.modules[package].__path__)
    try:
        distribution = importlib.metadata.distribution("priorityprop-jax")
        roots.append(pathlib.Path(str(distribution.locate_file(package))))
    except importlib.metadata.PackageNotFoundError:
        pass
    paths = {}
    for name in _INSTRUCTION_SETS:
        for root in roots:
            path = root / "sparse" / f"_priorityprop_{name}.so"
            if path.is_file():
                paths.setdefault(name, path)
    return paths


def _running_version() -> int | None:
    """The version of XLA's foreign function interface, major * 1000 + minor."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text("utf-8")
    except OSError:
        return None
    numbers = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if None in numbers:
        return None
    major, minor = (int(number[1]) for number in numbers if number)
    return major * 1000 + minor
