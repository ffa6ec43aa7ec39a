"""What meProp keeps of an output gradient, and the linear maps that it does so in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.core.fragile import laid_out, spec_of, vary, varying
from priorityprop_jax.core.frame import Tap
from priorityprop_jax.core.selection import (
    PATTERNS,
    Pattern,
    at_random,
    check_k,
    is_fraction,
    keep_largest,
    largest,
    magnitudes,
    resolve_k,
    seed_of,
)

K = int | float | tuple[int | float, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one compiled size of a layer keeps: ``k`` of each of ``groups`` equal groups."""

    pattern: str
    k: int
    tile: int
    seed: int
    groups: int = 1


def kept_columns(rule: Rule, dy: jax.Array) -> jax.Array:
    """The columns of ``dy`` ``[rows, features]`` that are kept, ``[groups * k]``, ascending."""
    width = dy.shape[1] // rule.groups
    if rule.pattern == "random":
        choose = [
            at_random(dy[:, g * width : (g + 1) * width], rule.k, rule.seed + g) + g * width
            for g in range(rule.groups)
        ]
        return jnp.concatenate(choose)
    tile = rule.tile if rule.pattern == "tile" else 1
    scores = magnitudes(dy).reshape(rule.groups, -1, tile).sum(-1)
    tiles = jax.vmap(lambda s: largest(s, rule.k // tile))(scores)  # [groups, tiles]
    within = lax.broadcasted_iota(tiles.dtype, (*tiles.shape, tile), 2)
    first = lax.broadcasted_iota(tiles.dtype, within.shape, 0) * width  # of each group
    return (tiles[..., None] * tile + within + first).reshape(-1)


def pull_kept(
    rule: Rule,
    compute: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    dy: jax.Array,
    axes: tuple[int, int],
    most: int | None = None,
) -> tuple[jax.Array, Any]:
    """The gradients of ``x`` and of the kernel of ``compute`` through what is kept of ``dy``.

    ``axes`` are those of the features in ``dy`` and in the kernel. With ``most``, the second is a
    `Tap` of so many rows.
    """
    y_axis, kernel_axis = axes
    width = dy.shape[y_axis]

    def pull(kernel: jax.Array, dy: jax.Array) -> Any:
        # The gradients of a map with fewer features: JAX's own rules for dtypes and shardings.
        return jax.vjp(compute, x, kernel)[1](dy)

    if rule.k * rule.groups == width and most is None:
        return pull(kernel, dy)
    rows = jnp.moveaxis(dy, y_axis, -1)
    if rule.pattern == "example":
        grouped = rows.reshape(-1, width // rule.groups)
        kept = keep_largest(grouped, rule.k).reshape(rows.shape)
        return pull(kernel, jnp.moveaxis(kept, -1, y_axis))
    kept = kept_columns(rule, rows.reshape(-1, width))
    part = take(dy, kept, y_axis)
    if rule.pattern == "random":
        # A column that is left out may hold a NaN that the chosen ones do not.
        part *= jnp.where(jnp.isnan(dy).any(), jnp.nan, 1.0).astype(part.dtype)
    dx, gradient = pull(take(kernel, kept, kernel_axis), part)
    if most is None:
        where = (slice(None),) * kernel_axis + (kept,)
        zeros = jnp.zeros(kernel.shape, gradient.dtype)
        return dx, zeros.at[where].set(gradient, unique_indices=True, indices_are_sorted=True)
    padding = most - rule.k
    kept = jnp.concatenate([kept, width + jnp.arange(padding, dtype=kept.dtype)])
    values = jnp.pad(gradient, ((0, padding), (0, 0)))
    return dx, Tap(values, (kept + 1).astype(jnp.float32))


def take(x: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    """``x`` at ascending and distinct places of an axis."""
    return jnp.take(x, places, axis=axis, mode="clip", unique_indices=True, indices_are_sorted=True)


def apply(linear: Any, x: Any, kernel: Any, tap: Tap | None, size: Any) -> jax.Array:
    """``linear.compute(x, kernel)``, JAX's own, backward by ``linear.pull``.

    ``pull(x, kernel, dy, size, compact)`` gives the gradients of ``x`` and of the kernel, the
    latter as a `Tap` if ``compact``. A linear map is hashable.
    """

    def results(x, kernel, *_):
        return spec_of(jax.eval_shape(linear.compute, x, kernel))

    return laid_out(functools.partial(_apply, linear), results)(x, kernel, tap, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(linear: Any, x: Any, kernel: Any, tap: Tap | None, size: Any) -> jax.Array:
    return linear.compute(x, kernel)


def _forward(linear: Any, x: Any, kernel: Any, tap: Tap | None, size: Any) -> Any:
    return linear.compute(x, kernel), (x, kernel, tap, size)


def _backward(linear: Any, residuals: Any, dy: jax.Array) -> Any:
    x, kernel, tap, size = residuals
    # Under `jax.shard_map` each shard keeps columns of its own, so what is to be summed over shards
    # is whole arrays, not the kept columns, which JAX would sum.
    axes = tuple(varying(dy) - varying(kernel))
    dx, gradient = linear.pull(x, vary(kernel, axes), dy, size, tap is not None)
    if tap is not None:
        return dx, None, Tap(gradient.values.astype(tap.values.dtype), gradient.rows), None
    return dx, lax.psum(gradient, axes) if axes else gradient, None, None


_apply.defvjp(_forward, _backward)


def at_size(size: Any, branches: list[Callable[..., Any]], *arguments: Any) -> Any:
    """The branch of a size; the largest where none is chosen."""
    if size is None or len(branches) == 1:
        return branches[-1](*arguments)
    return lax.switch(size, branches, *arguments)


@dataclasses.dataclass(frozen=True)
class Compute:
    """A function of two arrays with its options, equal and hashed by value."""

    function: Any
    positional: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, x: Any, kernel: Any) -> jax.Array:
        """``function`` with the options."""
        return self.function(x, kernel, *self.positional, **dict(self.keywords))


@dataclasses.dataclass(frozen=True)
class MeProp:
    """What a drop-in keeps; see `meprop_dot_general` for the meaning of all but the last two."""

    k: K
    pattern: Pattern = "unified"
    tile: int = 16
    seed: int = 0
    name: str = ""
    # Whether the kernel is stored (out, in) though the layer asks for a product with (in, out).
    transposed: bool = False
    inner: Any = None  # what the layer had in this place before

    def __post_init__(self):
        if not self.sizes:
            raise ValueError("k is an empty tuple: give at least one size")
        for k in self.sizes:
            check_k(k)
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")
        if self.tile < 1:
            raise ValueError(f"tile is {self.tile}, at least 1 column is needed")

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All that ``k`` may be."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    def rules(self, width: int, groups: int = 1) -> tuple[Rule, ...]:
        """Of each size, in ascending order; empty for a layer that stays dense."""
        multiple = self.tile if self.pattern == "tile" else 1
        # A group keeps its share of the layer's k.
        share = [
            k if is_fraction(k) or groups == 1 else max(1, round(k / groups)) for k in self.sizes
        ]
        each = width // groups
        sizes = sorted({resolve_k(k, each, self.name, multiple=multiple) for k in share})
        if sizes == [each]:
            return ()
        seed = seed_of(self.name, self.seed)
        return tuple(Rule(self.pattern, k, self.tile, seed, groups) for k in sizes)
