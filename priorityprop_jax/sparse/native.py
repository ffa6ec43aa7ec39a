"""Sparse products on a CPU by kernels in C++, where the installation has them.

They are built with the package, once for each instruction set that the compiler knows; the best
that the processor has is loaded with the first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
import pathlib
import re
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.fragile import vary, varying, varying_type
from priorityprop_jax.core.walk import register_flops
from priorityprop_jax.sparse.pattern import ConvGeometry, SparsePattern

# Best first.
_INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "base": "baseline"}
_HANDLERS = ("linear_forward", "linear_backward", "conv_forward", "conv_backward")
_INTERFACE = 2  # of the handlers, as csrc/ffi.cc has it
_AGAIN = "install priorityprop_jax again"
_lock = threading.Lock()


class _Library(NamedTuple):
    name: str | None  # of an instruction set; None without native kernels
    status: str


def native_status() -> tuple[bool, str]:
    """Whether sparse products run by native kernels here, and which, or why not."""
    library = _library()
    return library.name is not None, library.status


def forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry | None = None
) -> jax.Array:
    """``y = x W^T``, or a convolution, of float32 arrays: see `Kernel`."""
    shape = _output(values, pattern, x, geometry)
    operands = (values, pattern.row_starts, pattern.columns, x)
    if geometry is None:
        (y,) = _call("linear_forward", [shape], *operands)
    else:
        (y,) = _call("conv_forward", [shape], *operands, geometry=_flat(geometry))
    return y


def backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    geometry: ConvGeometry | None = None,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `forward`, in float32: see `Kernel`."""
    shape = _output(values, pattern, x, geometry)
    if dy.shape != shape:
        raise ValueError(f"the output of this product is {shape}, and dy is {dy.shape}")
    if not (inputs or weights):
        return None, None
    shapes = [x.shape if inputs else (0,), values.shape if weights else (0,)]
    wanted: dict[str, Any] = {"inputs": inputs, "weights": weights}
    if geometry is None:
        places = (pattern.row_starts, pattern.column_starts, pattern.rows, pattern.order)
        dx, dvalues = _call("linear_backward", shapes, values, *places, x, dy, **wanted)
    else:
        places = (pattern.row_starts, pattern.columns)
        wanted["geometry"] = _flat(geometry)
        dx, dvalues = _call("conv_backward", shapes, values, *places, x, dy, **wanted)
    return dx if inputs else None, dvalues if weights else None


def _output(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry | None
) -> tuple[int, ...]:
    """Checks the operands of a product, and gives the shape of its output."""
    (outs, columns), taken = pattern.shape, "[batch, in]"
    expected: tuple[int, ...] = (columns,)
    fits = values.shape == (pattern.capacity,)
    if geometry is not None:
        taps = geometry.kernel[0] * geometry.kernel[1]
        channels = columns // taps * geometry.groups
        taken, expected = f"[batch, height, width, {channels}]", (*x.shape[1:3], channels)
        fits &= x.ndim == 4 and columns % taps == 0 and outs % geometry.groups == 0
    if not fits or x.ndim < 2 or x.shape[1:] != expected:
        raise ValueError(
            f"a weight of shape {pattern.shape} and capacity {pattern.capacity} takes values "
            f"[capacity] and x {taken}, got shapes {values.shape} and {x.shape}"
        )
    if geometry is None:
        return (x.shape[0], outs)
    return (x.shape[0], *geometry.output((x.shape[1], x.shape[2])), outs)


def _flat(geometry: ConvGeometry) -> np.ndarray:
    """What the kernels need of a geometry; padding behind an axis follows from the output."""
    low = [low for low, _ in geometry.padding]
    numbers = [*geometry.kernel, *geometry.strides, *low, *geometry.dilation, geometry.groups]
    return np.array(numbers, np.int64)


def _call(
    name: str, shapes: Sequence[tuple[int, ...]], *operands: jax.Array, **attributes: object
) -> Sequence[jax.Array]:
    """Calls a kernel whose results are float32 arrays of the shapes."""
    library = _library()
    if library.name is None:
        raise RuntimeError(f"sparse products have no native kernels here: {library.status}")
    # Within `jax.shard_map` operands must vary along the same axes, and results are told to.
    axes = frozenset[str]().union(*map(varying, operands))
    operands = tuple(vary(x, axes) for x in operands)
    kind = varying_type(axes)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32, **kind) for shape in shapes]
    call = jax.ffi.ffi_call(_target(name, library.name), results, vmap_method="sequential")
    return call(*operands, **attributes)


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
        message = f"sparse products run by JAX alone, as {why}; {_AGAIN}"
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
def _load(name: str) -> None:
    """Loads the kernels of an instruction set that the processor has, and tells XLA of them."""
    library = ctypes.CDLL(str(_installed()[name]))
    for handler in _HANDLERS:
        function = getattr(library, f"priorityprop_{handler}")
        target, flops = _target(handler, name), _flops_backward if "back" in handler else _flops
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
        register_flops(target, flops)


def _flops(operands: Sequence[Any], results: Sequence[Any], _: Any) -> float:
    """Two for each stored weight at each position of each example."""
    return 2.0 * operands[0].size * math.prod(results[0].shape[:-1])


def _flops_backward(operands: Sequence[Any], _: Any, attributes: Mapping[str, Any]) -> float:
    """The same, for each of the two gradients that is asked for."""
    gradients = bool(attributes["inputs"]) + bool(attributes["weights"])
    return gradients * _flops(operands, operands[-1:], None)


def _can_run(paths: dict[str, pathlib.Path], name: str) -> bool:
    return bool(ctypes.CDLL(str(paths["base"])).priorityprop_can_run(name.encode()))


def _target(handler: str, name: str) -> str:
    return f"priorityprop_{handler}_{name}"


@functools.cache
def _installed() -> dict[str, pathlib.Path]:
    """The libraries by instruction set: beside this file, or where the package was installed to.

    The two differ where the package is run from its sources.
    """
    folders = [pathlib.Path(__file__).parent]
    folders += map(pathlib.Path, sys.modules[__package__].__path__ if __package__ else ())
    try:
        distribution = importlib.metadata.distribution("priorityprop-jax")
        folders.append(pathlib.Path(str(distribution.locate_file("priorityprop_jax/sparse"))))
    except importlib.metadata.PackageNotFoundError:
        pass
    paths = {}
    for name in _INSTRUCTION_SETS:
        for folder in folders:
            path = folder / f"_priorityprop_{name}.so"
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
