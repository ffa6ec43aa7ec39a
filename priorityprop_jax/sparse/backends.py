"""Which kernels multiply by a sparse weight, and why those."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from priorityprop_jax.sparse import native
from priorityprop_jax.sparse.geometry import ConvGeometry
from priorityprop_jax.sparse.two_four import TwoFourPattern

# The shares of non-zeros up to which a sparse kernel beats a dense product with the weight put
# together for it. That takes longer than a layer that is dense from the start: whether to swap one
# is for `sparsify` to measure. Figures are from benchmarks/sparse_layers.py: at a share of 0.2 the
# native kernels are about twice as fast as a dense layer, and CSR is slower than it, but not slower
# than putting the weight together.
NATIVE_UP_TO = 0.4
CSR_UP_TO = 0.2
BLOCKS_UP_TO = 0.5

# Where forward and backward of each live: for products, and for convolutions.
_MODULES = {
    "native": ("native", "native"),
    "csr": ("csr", "csr_conv"),
    "block": ("block", None),
    "masked": ("masked", "masked_conv"),
    "two_four": ("two_four", None),
}


class Backend(NamedTuple):
    """What multiplies by a sparse weight.

    Attributes:
      name: ``"native"``, ``"csr"``, ``"block"``, ``"masked"`` or ``"two_four"``.
      why: the reason, a sentence for people.
    """

    name: str
    why: str


class Kernel(NamedTuple):
    """The two functions of a backend, for arrays ``[batch, features]`` or images.

    Attributes:
      forward: ``(values, pattern, x) -> y``.
      backward: ``(values, pattern, x, dy, *, inputs, weights) -> (dx, dvalues)``.
      opaque: whether the compiler cannot see into it.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    opaque: bool


def sparse_backend(
    pattern: Any = None,
    *,
    geometry: ConvGeometry | None = None,
    dtype: Any = jnp.float32,
    platform: str | None = None,
) -> Backend:
    """Tells which kernels multiply by a sparse weight here, and why.

    - ``"native"``: C++ kernels on a CPU, for single values in dtypes of 32 or 16 bits.
    - ``"csr"``: blocked CSR in JAX alone, on CPUs without those.
    - ``"block"``: gathered dense products of blocks, on all platforms.
    - ``"masked"``: one dense product with the weight put together for it: where a weight is not
      sparse enough, and for single values on GPUs and TPUs.
    - ``"two_four"``: the same for weights that keep two of every four inputs.

    Args:
      pattern: of the weight; by default one of single values that is sparse enough for anything.
      geometry: of a convolution; None for a matrix product.
      dtype: of the product.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; by default where JAX puts arrays.

    Returns:
      Its name, and the reason.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax.sparse.backends import sparse_backend
      >>> from priorityprop_jax.sparse.pattern import make_pattern
      >>> sparse_backend(make_pattern(np.ones((4, 4))), platform="cpu").name
      'masked'
    """
    platform = platform or _platform()
    if isinstance(pattern, TwoFourPattern):
        return Backend("two_four", "two of every four inputs are kept: unpacked, then dense")
    block = 1 if pattern is None else pattern.block
    kept = 0.0 if pattern is None else _density(pattern)
    if block > 1:
        if geometry is not None:
            return Backend("masked", "convolutions have no kernels for blocks")
        if kept > BLOCKS_UP_TO:
            return Backend("masked", f"{kept:.0%} of the blocks are kept: dense is faster")
        return Backend("block", f"blocks of {block} x {block}")
    if platform != "cpu":
        return Backend("masked", f"single values are no work for a {platform}: dense is faster")
    available, status = native.native_status()
    wide = jnp.dtype(dtype).itemsize > 4 or not jnp.issubdtype(dtype, jnp.floating)
    if available and not wide:
        if kept > NATIVE_UP_TO:
            return Backend("masked", f"{kept:.0%} of the weight is kept: dense is faster")
        return Backend("native", status)
    without = f"{jnp.dtype(dtype)} has no native kernels" if available else status
    if kept > CSR_UP_TO:
        return Backend("masked", f"{without}, and with {kept:.0%} kept dense is faster")
    return Backend("csr", without)


def choose_backend(
    asked: str | None, pattern: Any, dtype: Any, geometry: ConvGeometry | None
) -> str:
    """The name of a backend: what was asked for, if it can do the work.

    Args:
      asked: a name, or None for the choice of `sparse_backend`.
      pattern: of the weight.
      dtype: of the product.
      geometry: of a convolution, or None.

    Raises:
      ValueError: if there is no such backend, or it cannot multiply by such a weight here.
    """
    if asked is None:
        return sparse_backend(pattern, geometry=geometry, dtype=dtype).name
    if asked not in _MODULES:
        raise ValueError(f"backend must be one of {', '.join(_MODULES)} or None, got {asked!r}")
    if (asked == "two_four") != isinstance(pattern, TwoFourPattern):
        raise ValueError(
            f"the backend {asked!r} does not fit a {type(pattern).__name__}: leave it out"
        )
    if _MODULES[asked][geometry is not None] is None:
        raise ValueError(
            f"the backend {asked!r} has no convolutions: use 'masked', or leave it out"
        )
    if asked in ("native", "csr") and pattern.block > 1:
        raise ValueError(f"the backend {asked!r} takes single values, not blocks: use 'block'")
    if asked == "block" and pattern.block == 1:
        raise ValueError("the backend 'block' takes blocks: make the pattern with block=16, say")
    if asked == "native":
        available, status = native.native_status()
        if not available or _platform() != "cpu":
            raise ValueError(
                f"the backend 'native' cannot be used here: {status}, on {_platform()}"
            )
        if jnp.dtype(dtype).itemsize > 4:
            raise ValueError(f"the backend 'native' multiplies in float32, not in {dtype}")
    return asked


@functools.cache
def kernel_of(name: str, geometry: ConvGeometry | None) -> Kernel:
    """The functions of a backend.

    Args:
      name: of the backend.
      geometry: of a convolution, or None for products.
    """
    place = _MODULES[name][geometry is not None]
    module = importlib.import_module(f"priorityprop_jax.sparse.{place}")
    opaque = name == "native"
    if geometry is None:
        return Kernel(module.forward, module.backward, opaque) if opaque else _turned(module)

    def forward(values, pattern, x):
        return module.conv_forward(values, pattern, x, geometry)

    def backward(values, pattern, x, dy, **wanted):
        return module.conv_backward(values, pattern, x, dy, geometry, **wanted)

    return Kernel(forward, backward, opaque)


def _turned(module: Any) -> Kernel:
    """The kernels of a module that has the batch innermost, for arrays that have it first.

    The compiler sees the transposes, and drops those between neighbours.
    """

    def forward(values, pattern, x):
        return module.forward(values, pattern, x.T).T

    def backward(values, pattern, x, dy, **wanted):
        dx, dvalues = module.backward(values, pattern, x.T, dy.T, **wanted)
        return None if dx is None else dx.T, dvalues

    return Kernel(forward, backward, opaque=False)


def _platform() -> str:
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _density(pattern: Any) -> float:
    outs, ins = pattern.grid
    return pattern.capacity / max(outs * ins, 1)
