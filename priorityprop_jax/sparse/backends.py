"""Which kernels multiply by a sparse weight, and why those."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from priorityprop_jax.sparse import csr, masked, native
from priorityprop_jax.sparse.pattern import ConvGeometry, SparsePattern

# The shares of non-zeros up to which a sparse kernel beats a dense product with the weight put
# together for it, from benchmarks/speed/sparse_layers.py. That takes longer than a layer that is
# dense from the start: whether to swap one is for `sparsify` to measure.
NATIVE_UP_TO = 0.4
CSR_UP_TO = 0.2


class Kernel(Protocol):
    """The products of a backend: they multiply, and know nothing of derivatives or meshes."""

    def forward(
        self, values: Any, pattern: SparsePattern, x: Any, geometry: ConvGeometry | None = None
    ) -> Any:
        """``y = x W^T``, ``[batch, out]``, or the convolution of a geometry, with ``out`` last.

        Of values ``[capacity]``, those at unused places being anything, and a pattern ``(out, in)``
        or, of a kernel OIHW, ``(out, in / groups * height * width)``, which may be traced. ``x`` is
        ``[batch, in]``, or images ``[batch, height, width, in]``.
        """
        ...

    def backward(
        self,
        values: Any,
        pattern: SparsePattern,
        x: Any,
        dy: Any,
        geometry: ConvGeometry | None = None,
        *,
        inputs: bool = True,
        weights: bool = True,
    ) -> tuple[Any, Any]:
        """``dx = dy W``, ``dvalues = dy^T x`` at the places in use; None for what is not wanted."""
        ...


KERNELS: dict[str, Any] = {"native": native, "csr": csr, "masked": masked}


class Backend(NamedTuple):
    """What multiplies by a sparse weight, and why."""

    name: str  # "native", "csr" or "masked"
    why: str  # a sentence for people


def sparse_backend(
    pattern: SparsePattern | None = None,
    *,
    geometry: ConvGeometry | None = None,
    dtype: Any = jnp.float32,
    platform: str | None = None,
) -> Backend:
    """Tells which kernels multiply by a sparse weight here, and why.

    - ``"native"``: C++ kernels on a CPU, in dtypes of 32 or 16 bits.
    - ``"csr"``: blocked CSR in JAX alone, for matrix products on CPUs without those.
    - ``"masked"``: one dense product with the weight put together for it: where a weight is not
      sparse enough, for convolutions without native kernels, and on GPUs and TPUs.

    Args:
      pattern: of the weight; by default one that is sparse enough for anything.
      geometry: of a convolution; None for a matrix product.
      dtype: of the product.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; by default where JAX puts arrays.

    Returns:
      Its name, and the reason.

    Example:
      >>> import numpy as np
      >>> from priorityprop_jax import sparse
      >>> sparse.sparse_backend(sparse.make_pattern(np.ones((4, 4))), platform="cpu").name
      'masked'
    """
    platform = platform or native.platform()
    kept = 0.0 if pattern is None else pattern.capacity / max(math.prod(pattern.shape), 1)
    if platform != "cpu":
        return Backend("masked", f"single values are no work for a {platform}: dense is faster")
    available, status = native.native_status()
    wide = jnp.dtype(dtype).itemsize > 4 or not jnp.issubdtype(dtype, jnp.floating)
    if available and not wide:
        if kept > NATIVE_UP_TO:
            return Backend("masked", f"{kept:.0%} of the weight is kept: dense is faster")
        return Backend("native", status)
    without = f"{jnp.dtype(dtype)} has no native kernels" if available else status
    if geometry is not None:
        return Backend("masked", f"{without}, and only these convolve")
    if kept > CSR_UP_TO:
        return Backend("masked", f"{without}, and with {kept:.0%} kept dense is faster")
    return Backend("csr", without)


def choose_backend(
    asked: str | None,
    pattern: SparsePattern,
    dtype: Any,
    geometry: ConvGeometry | None,
    shape: tuple[Any, ...],
) -> str:
    """The backend asked for, a ValueError where it cannot do it, or that of `sparse_backend`.

    For inputs of a shape, which may be symbolic, as `jax.export` has them.
    """
    symbolic = not all(isinstance(size, int) for size in shape)
    if symbolic and asked == "csr":
        raise ValueError(f"the backend 'csr' has no symbolic shapes, got {shape}: use 'masked'")
    if asked is None and symbolic:
        return "masked"
    if asked is None:
        return sparse_backend(pattern, geometry=geometry, dtype=dtype).name
    if asked not in KERNELS:
        raise ValueError(f"backend must be one of {', '.join(KERNELS)} or None, got {asked!r}")
    if asked == "csr" and geometry is not None:
        raise ValueError("the backend 'csr' has no convolutions: use 'masked', or leave it out")
    if asked == "native":
        available, status = native.native_status()
        if not available or native.platform() != "cpu":
            why = f"{status}, on {native.platform()}"
            raise ValueError(f"the backend 'native' cannot be used here: {why}")
        if jnp.dtype(dtype).itemsize > 4:
            raise ValueError(f"the backend 'native' multiplies in float32, not in {dtype}")
    return asked
