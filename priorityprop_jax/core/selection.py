"""Which output features of a linear map the gradient flows back through: meProp's top-k."""

from __future__ import annotations

import zlib
from fractions import Fraction
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from priorityprop_jax.core.precision import wide_type

Pattern = Literal["example", "unified", "tile", "random"]

PATTERNS: tuple[str, ...] = get_args(Pattern)


def is_fraction(k: int | float) -> bool:
    """Whether ``k``, which may be NumPy's, is a fraction of features, not their number."""
    return not isinstance(k, int | np.integer)


def check_k(k: int | float) -> None:
    """Raises where ``k`` can be neither a number of things to keep nor a fraction of them."""
    if isinstance(k, bool) or not isinstance(k, int | float | np.integer | np.floating):
        raise TypeError(f"k must be a whole number or a fraction such as 0.04, got {k!r}")
    if is_fraction(k):
        if not 0 < k <= 1:
            raise ValueError(f"k is {k}: a fraction is above 0 and at most 1")
    elif k < 1:
        raise ValueError(f"k is {k}: at least 1 must be kept")


def decimal(fraction: float) -> Fraction:
    """A fraction as it is written: .07 of 100 is 7, where the nearest float's product is above."""
    return Fraction(str(fraction))


def resolve_k(k: int | float, width: int, name: str = "", *, multiple: int = 1) -> int:
    """The number of output features, from 1 to ``width``, that ``k`` means for a layer.

    ``k`` is a number, or a fraction in (0, 1] of the width; rounded to the nearest ``multiple``, at
    least one, for tiles. Raises as `check_k`, and where ``width`` is no multiple.
    """
    check_k(k)
    layer = f"layer {name!r}" if name else "the layer"
    if not is_fraction(k):
        if k > width:
            raise ValueError(
                f"k={k} is more than the {width} output features of {layer}: lower k, give it as a "
                "fraction, or leave narrow layers dense with layers="
            )
        number = int(k)
    else:
        number = max(1, round(decimal(k) * width))
    if width % multiple:
        raise ValueError(
            f"the {width} output features of {layer} are no multiple of tile={multiple}: choose a "
            "tile that divides them, or leave the layer out with layers="
        )
    return min(width, max(1, round(number / multiple)) * multiple)


def _size(dy: jax.Array) -> jax.Array:
    return jnp.abs(dy).astype(wide_type(dy))


def magnitudes(dy: jax.Array) -> jax.Array:
    """Summed magnitude ``sum_m |dy_mj|`` of each column of ``[rows, features]``, float32 at least.

    A NaN counts as infinite, so that it is chosen and seen, never dropped.
    """
    total = jnp.sum(_size(dy), axis=0)
    return jnp.where(jnp.isnan(total), jnp.inf, total)


def largest(scores: jax.Array, k: int) -> jax.Array:
    """Places of the ``k`` largest of scores ``[n]`` without NaN, ascending, ``int32[k]``.

    Of equal ones the first; on a TPU the choice is `jax.lax.approx_max_k`'s.
    """
    exact = lambda s: lax.top_k(s, k)[1]  # noqa: E731
    places = lax.platform_dependent(scores, default=exact, tpu=lambda s: lax.approx_max_k(s, k)[1])
    return jnp.sort(places)


def at_random(dy: jax.Array, k: int, seed: int) -> jax.Array:
    """``k`` columns drawn without replacement, every set as likely, in ascending order.

    ``int32[k]``, of ``dy`` of ``[rows, features]``. A backward pass is given no key: the draw is a
    hash of the seed and of all bits of ``dy``.
    """
    bits = lax.bitcast_convert_type(dy.astype(jnp.float32), jnp.uint32)
    # Weighted by place, as a plain sum does not see an exchange; whole numbers add up the same in
    # any order, so that sharded and unsharded runs agree.
    place = lax.broadcasted_iota(jnp.uint32, bits.shape, 0) * jnp.uint32(2654435761)
    place += lax.broadcasted_iota(jnp.uint32, bits.shape, 1) * jnp.uint32(40503) + jnp.uint32(1)
    key = jax.random.fold_in(jax.random.key(seed), jnp.sum(bits * place, dtype=jnp.uint32))
    draws = jax.random.uniform(key, (dy.shape[1],), jnp.float32)
    return jnp.sort(lax.top_k(draws, k)[1])


def seed_of(name: str, seed: int) -> int:
    """A seed of a layer's own, so that equal gradients in two layers draw apart."""
    return zlib.crc32(f"{seed}:{name}".encode()) & 0x7FFFFFFF


def keep_largest(dy: jax.Array, k: int) -> jax.Array:
    """``dy``, of ``[rows, features]``, with all but the ``k`` largest magnitudes of each row zero.

    Of equal ones the first are kept; NaN ranks above all.
    """
    size = _size(dy)
    size = jnp.where(jnp.isnan(size), jnp.inf, size)
    kept = lax.top_k(size, k)[1]  # [rows, k]
    mask = jnp.zeros(dy.shape, bool).at[jnp.arange(dy.shape[0])[:, None], kept].set(True)
    return jnp.where(mask, dy, jnp.zeros((), dy.dtype))
