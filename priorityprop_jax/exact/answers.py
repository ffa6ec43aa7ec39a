"""The loss of a language model without an array of all its logits, at labelled positions alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from priorityprop_jax.core.precision import wide_type


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    where: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    chunk: int = 1024,
    transposed: bool = False,
) -> jax.Array:
    r"""Mean cross-entropy of the classes that a linear output layer gives, some rows at a time.

    .. math:: \frac{1}{|S|} \sum_{i \in S} \log \sum_v e^{z_{iv}} - z_{i y_i}, \qquad
       z_i = h_i W + b

    over the labelled positions ``S``. Rows that are labelled are put in front, and chunks of them
    run one after the other, each with its gradients, as long as there are any: there is never an
    array of ``[positions, classes]``, and positions without a label (prompts, padding) cost
    nothing. Value and gradients are those of the whole to rounding; sums are in float32 at least.

    Args:
      hidden: ``[..., width]``, what the output layer is given.
      kernel: ``[width, classes]``.
      labels: int ``[...]``, from 0 to classes - 1 where they count.
      where: bool ``[...]``, which positions are labelled; by default all.
      bias: ``[classes]``.
      chunk: rows at a time, at least 1; a few hundred keep the cores busy.
      transposed: whether the kernel is ``[classes, width]``, as a tied embedding is: of ``table.T``
        XLA makes an array.

    Returns:
      The mean in nats, ``float32[]``, or float64 as the arguments are; 0 if no position is
      labelled. It has gradients in reverse mode, with respect to ``hidden``, ``kernel`` and
      ``bias``, once.

    Raises:
      ValueError: shapes do not fit each other, or ``chunk`` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import exact
      >>> labels = jnp.array([[0, 5, 9]])
      >>> hidden, kernel = jnp.ones((1, 3, 4)), jnp.zeros((4, 10))
      >>> loss = exact.cross_entropy(hidden, kernel, labels, labels > 0)
      >>> print(f"{loss:.4f}")  # the logarithm of 10
      2.3026

    References:
      Gradients along with the value, chunk by chunk: Hsu et al., *Liger Kernel*, 2024, arXiv
      2410.10989.
    """
    width, classes = kernel.shape[::-1] if transposed else kernel.shape
    where = jnp.ones(labels.shape, bool) if where is None else where
    fits = hidden.shape == (*labels.shape, width) and where.shape == labels.shape
    if not fits or (bias is not None and bias.shape != (classes,)):
        raise ValueError(
            f"hidden {hidden.shape}, kernel {kernel.shape}, labels {labels.shape}, where "
            f"{where.shape} and bias {None if bias is None else bias.shape} do not fit: they are "
            f"[..., width], {'[classes, width]' if transposed else '[width, classes]'}, [...], "
            "[...] and [classes]"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    if not labels.size:
        return jnp.zeros((), wide_type(hidden, kernel, bias))
    rows = hidden.reshape(-1, width)
    order = jnp.argsort(~where.reshape(-1), stable=True)  # labelled rows come first
    count = jnp.sum(where, dtype=jnp.int32)
    # Whole chunks; what pads them counts as not labelled.
    chunk = min(chunk, len(rows))
    order = jnp.pad(order, (0, -len(order) % chunk))
    labels = labels.reshape(-1)[order]
    return _mean((chunk, int(transposed)), rows[order], kernel, bias, labels, count)


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int, dtype: Any = None) -> jax.Array:
    """Of two matrices, over an axis of each."""
    over = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, over, preferred_element_type=dtype)


def _of_chunk(logits: jax.Array, bias: Any, y: jax.Array, on: Any, ct: Any, dtype: Any) -> Any:
    """The sum of a chunk's losses, and gradients of its logits; those need ``ct``."""
    wide = logits.dtype
    logits = logits if bias is None else logits + bias.astype(wide)[None]
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    e = jnp.exp(logits - largest)
    total = jnp.sum(e, axis=-1, keepdims=True)
    right = jnp.take_along_axis(logits, y[:, None], axis=-1)
    loss = jnp.sum(jnp.where(on, (jnp.log(total) + largest - right)[:, 0], 0.0))
    if ct is None:
        return loss, None
    is_right = lax.broadcasted_iota(y.dtype, e.shape, 1) == y[:, None]
    d = jnp.where(on[:, None], (e / total - is_right.astype(wide)) * ct, 0.0)  # [chunk, classes]
    return loss, d.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean(options, rows, kernel, bias, labels, count):
    return _run(options, (rows, kernel, bias), labels, count, (False,) * 3)[0]


def _run(options, arrays, labels, count, wanted):
    """The mean, and the gradients of it that are wanted."""
    (chunk, of_width), (rows, kernel, bias) = options, arrays  # the kernel's axis of the width
    wide = wide_type(*arrays)
    share = 1.0 / jnp.maximum(count, 1).astype(wide)
    ct = share if any(wanted) else None
    zeros = lambda a, on: jnp.zeros(a.shape, wide) if on else None  # noqa: E731
    like = jnp.zeros_like(rows) if wanted[0] else None
    start = (jnp.zeros((), wide), like, zeros(kernel, wanted[1]), zeros(bias, wanted[2]))

    def one(i, carry):
        total, d_rows, d_kernel, d_bias = carry
        at = i * chunk
        on = at + jnp.arange(chunk, dtype=at.dtype) < count
        x, y = (lax.dynamic_slice_in_dim(a, at, chunk) for a in (rows, labels))
        logits = _product(x, kernel, 1, of_width, wide)  # [chunk, classes]
        loss, d = _of_chunk(logits, bias, y, on, ct, rows.dtype)
        if d_rows is not None:
            d_x = _product(d, kernel, 1, 1 - of_width).astype(rows.dtype)
            d_rows = lax.dynamic_update_slice_in_dim(d_rows, d_x, at, 0)
        if d_kernel is not None:
            # What is not labelled may hold anything, also NaN.
            x = jnp.where(on[:, None], x, 0)
            d_kernel += _product(*((d, x) if of_width else (x, d)), 0, 0, wide)
        if d_bias is not None:
            d_bias += d.sum(0, dtype=wide)
        return total + loss, d_rows, d_kernel, d_bias

    total, *grads = lax.fori_loop(0, (count + chunk - 1) // chunk, one, start)
    return total * share, tuple(grads)


def _forward(options, *primals):
    rows, kernel, bias, labels, count = jax.tree.map(
        lambda p: p.value, primals, is_leaf=lambda p: isinstance(p, CustomVJPPrimal)
    )
    wanted = tuple(p is not None and p.perturbed for p in primals[:3])
    value, grads = _run(options, (rows, kernel, bias), labels, count, wanted)
    dtypes = [jnp.zeros((), a.dtype) if a is not None else None for a in (rows, kernel, bias)]
    return value, (grads, dtypes)


def _backward(_, kept, ct):
    grads, dtypes = kept
    scaled = [
        None if g is None else (g.astype(ct.dtype) * ct).astype(like.dtype)
        for g, like in zip(grads, dtypes, strict=True)
    ]
    return (*scaled, None, None)


_mean.defvjp(_forward, _backward, symbolic_zeros=True)
