"""Sparse products on a CPU by kernels in C++, where the installation has them.

The kernels are built when the package is installed, once for each instruction set that the compiler
knows; the best that the processor has is loaded with the first use. Nothing here can be
differentiated: the custom rules around it are elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import pathlib
import re
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.varying import vary, varying
from priorityprop_jax.sparse.geometry import ConvGeometry
from priorityprop_jax.sparse.pattern import SparsePattern

# Best first.
_INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "base": "baseline"}
_HANDLERS = ("linear_forward", "linear_backward", "conv_forward", "conv_backward")
_lock = threading.Lock()


class _Library(NamedTuple):
    name: str | None  # of an instruction set; None without native kernels
    status: str


def native_status() -> tuple[bool, str]:
    """Whether sparse products run by native kernels here, and which, or why not.

    Example:
      >>> from priorityprop_jax.sparse.native import native_status
      >>> available, status = native_status()
    """
    library = _library()
    return library.name is not None, library.status


def forward(values: jax.Array, pattern: SparsePattern, x: jax.Array) -> jax.Array:
    """``y = x W^T``.

    Args:
      values: float32 ``[capacity]``; those at places not used are not read.
      pattern: of a weight ``(out, in)``, of single values.
      x: float32 ``[batch, in]``.

    Returns:
      float32 ``[batch, out]``.

    Raises:
      RuntimeError: if there are no native kernels; `native_status` says why.
      ValueError: if the pattern is one of blocks, or shapes do not fit together.
    """
    _check(pattern, values, (x, 1))
    shape = (x.shape[0], pattern.shape[0])
    (y,) = _call("linear_forward", [shape], values, pattern.row_starts, pattern.columns, x)
    return y


def backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """``dx = dy W``, and ``dvalues = dy^T x`` at the places of the pattern.

    Args:
      values: float32 ``[capacity]``.
      pattern: of a weight ``(out, in)``, of single values.
      x: float32 ``[batch, in]``.
      dy: float32 ``[batch, out]``.
      inputs: whether ``dx`` is wanted.
      weights: whether ``dvalues`` is wanted.

    Returns:
      float32 ``dx`` ``[batch, in]`` and ``dvalues`` ``[capacity]``, zero at places not used; None
      for what is not wanted.

    Raises:
      RuntimeError: if there are no native kernels; `native_status` says why.
      ValueError: if the pattern is one of blocks, or shapes do not fit together.
    """
    _check(pattern, values, (x, 1), (dy, 0))
    if len(x) != len(dy):
        raise ValueError(f"batches of x {x.shape} and dy {dy.shape} differ")
    places = (pattern.column_starts, pattern.rows, pattern.order)
    shapes = [x.shape if inputs else (0,), values.shape if weights else (0,)]
    operands = (values, *places, x, dy)
    return _wanted("linear_backward", shapes, operands, inputs=inputs, weights=weights)


def conv_forward(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry
) -> jax.Array:
    """A convolution with a sparse kernel.

    Args:
      values: float32 ``[capacity]``.
      pattern: of a weight ``(OC, IC / groups * KH * KW)``: a kernel OIHW, flattened.
      x: float32 ``[batch, height, width, IC]``.
      geometry: strides, padding and so on.

    Returns:
      float32 ``[batch, *geometry.output((height, width)), OC]``.

    Raises:
      RuntimeError: if there are no native kernels; `native_status` says why.
      ValueError: if the pattern is one of blocks, or shapes do not fit together.
    """
    shape = _conv_output(values, pattern, x, geometry)
    operands = (values, pattern.row_starts, pattern.columns, x)
    (y,) = _call("conv_forward", [shape], *operands, geometry=_flat(geometry))
    return y


def conv_backward(
    values: jax.Array,
    pattern: SparsePattern,
    x: jax.Array,
    dy: jax.Array,
    geometry: ConvGeometry,
    *,
    inputs: bool = True,
    weights: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients of `conv_forward`.

    Args:
      values: float32 ``[capacity]``.
      pattern: as for `conv_forward`.
      x: float32 ``[batch, height, width, IC]``.
      dy: float32, of the shape of the output.
      geometry: strides, padding and so on.
      inputs: whether ``dx`` is wanted.
      weights: whether ``dvalues`` is wanted.

    Returns:
      float32 ``dx`` like ``x`` and ``dvalues`` ``[capacity]``, zero at places not used; None for
      what is not wanted.

    Raises:
      RuntimeError: if there are no native kernels; `native_status` says why.
      ValueError: if the pattern is one of blocks, or shapes do not fit together.
    """
    shape = _conv_output(values, pattern, x, geometry)
    if dy.shape != shape:
        raise ValueError(f"the output of this convolution is {shape}, and dy is {dy.shape}")
    shapes = [x.shape if inputs else (0,), values.shape if weights else (0,)]
    operands = (values, pattern.row_starts, pattern.columns, x, dy)
    numbers = _flat(geometry)
    return _wanted(
        "conv_backward", shapes, operands, inputs=inputs, weights=weights, geometry=numbers
    )


def _conv_output(
    values: jax.Array, pattern: SparsePattern, x: jax.Array, geometry: ConvGeometry
) -> tuple[int, ...]:
    """Checks the operands of a convolution, and gives the shape of its output."""
    _check(pattern, values)
    outs, places = pattern.shape
    height, width = geometry.kernel
    channels = places // (height * width) * geometry.groups
    if x.ndim != 4 or x.shape[3] != channels or places % (height * width) or outs % geometry.groups:
        raise ValueError(
            f"a weight of shape {pattern.shape} with {geometry} takes x [batch, height, width, "
            f"{channels}], got {x.shape}"
        )
    return (x.shape[0], *geometry.output((x.shape[1], x.shape[2])), outs)


def _flat(geometry: ConvGeometry) -> np.ndarray:
    """What the kernels need of a geometry; padding behind an axis follows from the output."""
    low = [low for low, _ in geometry.padding]
    numbers = [*geometry.kernel, *geometry.strides, *low, *geometry.dilation, geometry.groups]
    return np.array(numbers, np.int64)


def _check(pattern: SparsePattern, values: jax.Array, *arrays: tuple[jax.Array, int]) -> None:
    """Checks shapes; each array comes with the side of the weight that its features are."""
    if pattern.block != 1:
        raise ValueError("native kernels take patterns of single values, not of blocks")
    fits = values.shape == (pattern.capacity,) and all(
        array.ndim == 2 and array.shape[1] == pattern.shape[side] for array, side in arrays
    )
    if not fits:
        shapes = ", ".join(str(array.shape) for array in (values, *(array for array, _ in arrays)))
        raise ValueError(
            f"a weight of shape {pattern.shape} and capacity {pattern.capacity} takes values "
            f"[capacity], x [batch, in] and dy [batch, out], got shapes {shapes}"
        )


def _wanted(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    operands: Sequence[jax.Array],
    *,
    inputs: bool,
    weights: bool,
    **attributes: object,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The results of a backward kernel, None for what is not wanted."""
    if not (inputs or weights):
        return None, None
    dx, dvalues = _call(name, shapes, *operands, inputs=inputs, weights=weights, **attributes)
    return dx if inputs else None, dvalues if weights else None


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
    varies = {}
    if axes:
        mesh = jax.sharding.get_abstract_mesh()
        varies["sharding"] = jax.sharding.NamedSharding(mesh, jax.P())
        varies["manual_axis_type"] = jax.sharding.ManualAxisType(varying=axes)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32, **varies) for shape in shapes]
    call = jax.ffi.ffi_call(_target(name, library.name), results, vmap_method="sequential")
    return call(*operands, **attributes)


# Loading.


def _library() -> _Library:
    """The kernels to use, loaded once."""
    with _lock:
        return _load_best()


@functools.cache
def _load_best() -> _Library:
    paths = _installed()
    if "base" not in paths:
        return _Library(
            None,
            "no native library was built with this installation (was there a C++ compiler?)",
        )
    version, ours = _running_version(), _probe(paths["base"]).priorityprop_ffi_version()
    if version is None:
        return _Library(None, "the FFI version of this jaxlib is unknown: it has no headers")
    if ours // 1000 != version // 1000 or ours > version:
        return _Library(
            None,
            f"the native library was built for FFI version {ours // 1000}.{ours % 1000}, and this "
            f"jaxlib has {version // 1000}.{version % 1000}: install priorityprop_jax again",
        )
    for name, title in _INSTRUCTION_SETS.items():
        if name in paths and _can_run(paths, name):
            _load(name)
            return _Library(name, f"{title} kernels")
    return _Library(None, "no native library that was built can run on this processor")


@functools.cache
def _load(name: str) -> ctypes.CDLL:
    """Loads the kernels of an instruction set that the processor has, and tells XLA of them."""
    library = ctypes.CDLL(str(_installed()[name]))
    handlers = {handler: getattr(library, f"priorityprop_{handler}", None) for handler in _HANDLERS}
    for handler, function in handlers.items():
        if function is not None:
            jax.ffi.register_ffi_target(
                _target(handler, name), jax.ffi.pycapsule(function), platform="cpu"
            )
    return library


def _can_run(paths: dict[str, pathlib.Path], name: str) -> bool:
    return bool(_probe(paths["base"]).priorityprop_can_run(name.encode()))


def _probe(path: pathlib.Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


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
