"""How near an approximate gradient is to the exact one, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.tables import aligned

ALL = "all"


class GradientQuality(NamedTuple):
    """Of one layer, or of all as one vector."""

    iterations: int | None  # the setting that gave the approximate gradient
    layer: str  # the name of a leaf, "layer 3" of a stack, or "all"
    cosine: float  # of the angle to the exact gradient, -1 to 1; NaN where either is zero
    norm_ratio: float  # norm of the approximate gradient over that of the exact one


def gradient_quality(
    exact: Any, approximate: Any, *, axis: int | None = None, iterations: int | None = None
) -> list[GradientQuality]:
    r"""Compares an approximate gradient to the exact one, layer by layer.

    .. math::
        \cos = \frac{\langle \tilde g, g \rangle}{\lVert \tilde g \rVert \lVert g \rVert}, \qquad
        \text{norm ratio} = \frac{\lVert \tilde g \rVert}{\lVert g \rVert}

    Args:
      exact: gradients, a pytree of arrays.
      approximate: the same tree of approximate gradients.
      axis: the axis of layers of a stack, which all leaves share: a row is one layer of it. By
        default a row is one leaf.
      iterations: written into the rows.

    Returns:
      A row for every layer, and one for all together.

    Raises:
      ValueError: if the trees or their shapes differ, hold no array, or do not share ``axis``.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.highway.quality import gradient_quality
      >>> exact = {"kernel": jnp.eye(2), "bias": jnp.ones(2)}
      >>> near = {"kernel": 2 * jnp.eye(2), "bias": jnp.array([1.0, 0.0])}
      >>> for row in gradient_quality(exact, near):
      ...     print(f"{row.layer}: {row.cosine:.2f} {row.norm_ratio:.2f}")
      bias: 0.71 0.71
      kernel: 1.00 2.00
      all: 0.83 1.50
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(exact)
    others, other_structure = jax.tree.flatten(approximate)
    shapes, other_shapes = [np.shape(g) for _, g in leaves], [np.shape(g) for g in others]
    if structure != other_structure or shapes != other_shapes:
        raise ValueError(
            "the approximate gradient must be a tree of the exact one's structure and shapes, got "
            f"{other_structure} of {other_shapes} for {structure} of {shapes}"
        )
    if not leaves:
        raise ValueError("there is no gradient to compare")
    products = [_products(g, other, axis) for (_, g), other in zip(leaves, others, strict=True)]
    if axis is None:
        names = [path_name(path) for path, _ in leaves]
        sums = np.array(products)  # [layers, 3]
    else:
        counts = sorted({len(p) for p in products})
        if len(counts) > 1:
            raise ValueError(f"leaves must share axis {axis} of layers, got sizes {counts}")
        names = [f"layer {i}" for i in range(counts[0])]
        sums = np.sum(products, axis=0)
    return [
        _row(iterations, name, *triple)
        for name, triple in zip([*names, ALL], [*sums, sums.sum(0)], strict=True)
    ]


def gradient_quality_table(
    make_loss: Callable[[int | None], Callable[..., Any]],
    iterations: Sequence[int],
    params: Any,
    *args: Any,
    axis: int | None = None,
    select: Callable[[Any], Any] | None = None,
) -> list[GradientQuality]:
    """Compares the gradients of several settings to the exact ones.

    Use parameters as they are in training: what is near on a fresh model may not be later, as a
    trained model's Jacobians are larger.

    Args:
      make_loss: ``k -> loss_fn``, with ``loss_fn(params, *args)``; ``make_loss(None)`` has the
        exact gradient.
      iterations: the settings ``k`` to compare.
      params: differentiated.
      *args: of ``loss_fn``.
      axis: as in `gradient_quality`.
      select: takes the part of the gradients to compare, such as ``lambda g: g["blocks"]``.

    Returns:
      The rows of `gradient_quality` for each ``k``.

    Raises:
      ValueError: if there are no ``iterations``, and as `gradient_quality`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.highway import format_quality, gradient_quality_table, highway_scan
      >>> block = lambda p, x: x + jnp.tanh(x @ p)
      >>> make_loss = lambda k: lambda p, x: jnp.sum(highway_scan(block, p, x, iterations=k) ** 2)
      >>> params = 0.1 * jnp.stack([jnp.eye(4)] * 3)
      >>> print(format_quality(gradient_quality_table(
      ...     make_loss, [0, 1], params, jnp.ones(4), axis=0)))
      layer    cosine, k = 0  cosine, k = 1  norm ratio, k = 0  norm ratio, k = 1
      layer 0         1.0000         1.0000             0.8284             0.9919
      layer 1         1.0000         1.0000             0.9103             1.0000
      layer 2         1.0000         1.0000             1.0000             1.0000
      all             0.9971         1.0000             0.9154             0.9973
    """
    if not iterations:
        raise ValueError("name at least one setting in iterations")
    rows, exact = [], None
    for k in (None, *iterations):
        grads = jax.jit(jax.grad(make_loss(k)))(params, *args)
        grads = grads if select is None else select(grads)
        if k is None:
            exact = grads
        else:
            rows += gradient_quality(exact, grads, axis=axis, iterations=k)
    return rows


def format_quality(rows: Sequence[GradientQuality]) -> str:
    """Rows as a table of text: a line for each layer, two columns for each setting."""
    if not rows:
        raise ValueError("there are no rows")
    columns: dict[int | None, dict[str, GradientQuality]] = {}
    for row in rows:
        columns.setdefault(row.iterations, {})[row.layer] = row
    layers = columns[rows[0].iterations]
    table = [["layer", *layers]]
    for name, field in (("cosine", "cosine"), ("norm ratio", "norm_ratio")):
        for k, of in columns.items():
            title = name if k is None else f"{name}, k = {k}"
            table.append([title, *(f"{getattr(of[layer], field):.4f}" for layer in layers)])
    return "\n".join(aligned([*zip(*table, strict=True)]))


def _products(g: Any, other: Any, axis: int | None) -> np.ndarray:
    """``<g, other>, <g, g>, <other, other>``: ``[3]``, or ``[layers, 3]`` along an axis."""
    # In float64, as a float32 sum over a large leaf is off in the fourth digit of a cosine.
    g, other = (
        np.asarray(a).astype(np.complex128 if jnp.iscomplexobj(a) else float) for a in (g, other)
    )
    if axis is None:
        g, other = g.reshape(1, -1), other.reshape(1, -1)
    else:
        if not -g.ndim <= axis < g.ndim:
            raise ValueError(f"a leaf of shape {list(g.shape)} has no axis {axis} of layers")
        g, other = (np.moveaxis(a, axis, 0).reshape(g.shape[axis], -1) for a in (g, other))
    out = np.stack(
        [np.sum(np.conj(a) * b, axis=1).real for a, b in ((g, other), (g, g), (other, other))],
        axis=-1,
    )
    return out[0] if axis is None else out


def _row(iterations: int | None, layer: str, both: float, exact: float, near: float) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.clip(both / np.sqrt(exact) / np.sqrt(near), -1, 1)
        return GradientQuality(iterations, layer, float(cosine), float(np.sqrt(near / exact)))
