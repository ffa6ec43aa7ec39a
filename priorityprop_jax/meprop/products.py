"""meProp: backward passes of products through the top-k output gradients only.

They compute what JAX's own compute, bit for bit, and go where Flax's layers take a
``dot_general``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from opt_einsum import parser

from priorityprop_jax.core.fragile import varying
from priorityprop_jax.core.frame import LayerUse, enter
from priorityprop_jax.core.selection import Pattern
from priorityprop_jax.meprop.keep import Compute, K, MeProp, Rule, apply, at_size, pull_kept

# Three groups of axes of one array.
_Axes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of inputs and a kernel: its axes, and how JAX computes it."""

    compute: Compute
    x_axes: _Axes  # batch, free, contracted
    kernel_axes: _Axes  # batch, features, contracted
    y_axes: _Axes  # batch, free, features
    rules: tuple[Rule, ...]  # of each compiled size, in ascending order of k

    def pull(self, x: Any, kernel: Any, dy: Any, size: Any, compact: bool) -> tuple[Any, Any]:
        """See `apply`."""
        batch, features, contracted = self.kernel_axes
        # A feature of the kernel is a row, as in (out, in), or a column.
        by_rows = not contracted or (bool(features) and features[0] < contracted[0])
        order = (batch, features, contracted) if by_rows else (batch, contracted, features)
        axis = 0 if by_rows else 1
        most = self.rules[-1].k if compact else None

        taken_over = ("precision", "preferred_element_type")
        given = {name: x for name, x in self.compute.keywords if name in taken_over}

        def multiply(x, kernel):
            numbers = (((1,), (1 - axis,)), ((), ()))
            return lax.dot_general(x, kernel, numbers, **given)

        def branch(rule: Rule) -> Callable[..., Any]:
            one: Any = functools.partial(pull_kept, rule, multiply, axes=(1, axis), most=most)
            for _ in batch:
                one = jax.vmap(one)
            return one

        dx, gradient = at_size(
            size,
            [branch(rule) for rule in self.rules],
            _matrix(x, self.x_axes),  # [*batch, rows, in]
            _matrix(kernel, order),  # [*batch, out, in] or [*batch, in, out]
            _matrix(dy, self.y_axes),  # [*batch, rows, out]
        )
        dx = _unmatrix(dx, x, self.x_axes)
        return dx, gradient if compact else _unmatrix(gradient, kernel, order)


def _matrix(x: jax.Array, axes: _Axes) -> jax.Array:
    """``x`` as ``[*axes[0], axes[1], axes[2]]``, the last two flattened."""
    batch, first, second = axes
    shape = [x.shape[axis] for axis in batch]
    sizes = [math.prod(x.shape[axis] for axis in group) for group in (first, second)]
    return x.transpose(*batch, *first, *second).reshape(*shape, *sizes)


def _unmatrix(matrix: jax.Array, like: jax.Array, axes: _Axes) -> jax.Array:
    """The inverse of `_matrix`, for an array of the shape of ``like``."""
    order = [axis for group in axes for axis in group]
    shape = [like.shape[axis] for axis in order]
    return matrix.reshape(shape).transpose(*np.argsort(order).tolist())


class MePropDot(MeProp):
    """A ``dot_general`` with meProp's backward pass, made by `meprop_dot_general`."""

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """As `jax.lax.dot_general`; ``rhs`` is the kernel."""
        (x_contracted, contracted), (x_batch, batch) = (
            tuple(tuple(int(axis) for axis in axes) for axes in pair) for pair in dimension_numbers
        )
        if self.transposed:
            # The layer counts axes of a kernel (in, out); this one is (out, in).
            outs = rhs.ndim - len(contracted) - len(batch)
            contracted = tuple(axis + outs for axis in contracted)
        numbers = ((x_contracted, contracted), (x_batch, batch))
        keywords = {name: value for name, value in kwargs.items() if value is not None}
        keywords |= {"precision": precision, "preferred_element_type": preferred_element_type}
        compute = Compute(self.inner or lax.dot_general, (numbers,), tuple(keywords.items()))
        free = tuple(a for a in range(lhs.ndim) if a not in x_contracted and a not in x_batch)
        features = tuple(a for a in range(rhs.ndim) if a not in contracted and a not in batch)
        places = iter(range(len(batch) + len(free) + len(features)))
        y_axes = tuple(tuple(next(places) for _ in group) for group in (batch, free, features))
        x_axes, kernel_axes = (x_batch, free, x_contracted), (batch, features, contracted)
        return self._product(compute, lhs, rhs, x_axes, kernel_axes, y_axes)

    def _product(
        self, compute: Any, x: Any, kernel: Any, x_axes: _Axes, kernel_axes: _Axes, y_axes: _Axes
    ) -> jax.Array:
        batch, features, contracted = (
            math.prod(kernel.shape[axis] for axis in axes) for axes in kernel_axes
        )
        rules = self.rules(features)
        if not rules:
            return compute(x, kernel)
        rows = batch * math.prod(x.shape[axis] for axis in x_axes[1])
        by_rows = kernel_axes == ((), (0,), (1,)) and self.pattern != "example"
        by_rows = by_rows and varying(x) <= varying(kernel)
        use = LayerUse(rows, contracted, features, tuple(rule.k for rule in rules), by_rows)
        tap, size = enter(self.name, use)
        return apply(_Product(compute, x_axes, kernel_axes, y_axes, rules), x, kernel, tap, size)


class MePropEinsum(MePropDot):
    """An ``einsum`` of inputs and a kernel with meProp's backward pass, for `flax.nnx.Einsum`."""

    def __call__(  # type: ignore[override]
        self, einsum_str: str, x: jax.Array, kernel: jax.Array, **kwargs: Any
    ) -> jax.Array:
        """As `jax.numpy.einsum`; the second operand is the kernel."""
        operands, out, _ = parser.parse_einsum_input((einsum_str, x, kernel))
        ins = tuple(operands.split(","))
        given = {name: value for name, value in kwargs.items() if value is not None}
        compute = Compute(_einsum, (einsum_str, self.inner), tuple(given.items()))
        shared = set(ins[0]) & set(ins[1])
        batch = [c for c in out if c in shared]
        contracted = [c for c in ins[0] if c in shared and c not in out]
        free = [c for c in out if c in ins[0] and c not in shared]
        features = [c for c in out if c in ins[1] and c not in shared]
        labels = [len(ins[0]), len(ins[1])]
        if labels != [len({*batch, *free, *contracted}), len({*batch, *features, *contracted})]:
            raise ValueError(
                f"layer {self.name!r}: {einsum_str!r} sums over an axis of one operand, or repeats "
                "one; meProp needs a product, leave the layer out with layers="
            )

        def axes(text: str, *groups: list[str]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(text.index(c) for c in group) for group in groups)

        return self._product(
            compute,
            x,
            kernel,
            axes(ins[0], batch, free, contracted),
            axes(ins[1], batch, features, contracted),
            axes(out, batch, free, features),
        )


def _einsum(x: Any, kernel: Any, einsum_str: str, inner: Any, **keywords: Any) -> jax.Array:
    return (inner or jnp.einsum)(einsum_str, x, kernel, **keywords)


def meprop_dot_general(
    k: K,
    *,
    pattern: Pattern = "unified",
    tile: int = 16,
    seed: int = 0,
    name: str = "",
) -> MePropDot:
    r"""A `jax.lax.dot_general` whose gradient flows back through few output features.

    For a layer ``y = x W`` with output gradient ``dy``, the forward pass is unchanged, and in the
    backward pass only a set ``K`` of ``k`` of the ``n`` output features counts,

    .. math:: dx = dy_{:,K} W_{:,K}^\top, \qquad dW_{:,K} = x^\top dy_{:,K},

    and ``dW`` is zero elsewhere: ``k / n`` of the work. At ``k = n`` it is the ordinary gradient.
    The bias of a layer is added after the product, and keeps its whole gradient.

    Give it to a layer as ``dot_general``, or ``functools.partial(meprop_dot_general, k)`` as
    ``dot_general_cls``. Kernels of Flax are ``(in, out)``: their columns are dear to gather, and
    the gradient returned is a whole array. `meprop` and `value_and_grad` avoid both.

    Under `jax.vmap` over single examples every example has a pattern of its own, and under
    `jax.shard_map` every shard. Forward-mode derivatives (`jax.jvp`) are an error.

    Args:
      k: output features to keep: a whole number, or a fraction in (0, 1] of the layer's. A tuple
        gives several compiled sizes for a budget to choose from; the largest is the default.
      pattern: how to choose them. ``"unified"``: the largest ``sum_m |dy_mj|`` over all examples.
        ``"example"``: each example its own largest ``|dy_mj|``, as in the paper; its products stay
        dense and save nothing. ``"tile"``: as unified, in contiguous tiles. ``"random"``.
      tile: features in a tile, for that pattern; ``k`` is rounded to a multiple of it.
      seed: of random choices.
      name: of the layer, for errors and `value_and_grad`.

    Returns:
      A function with the signature of `jax.lax.dot_general`, whose second operand is the kernel.
      It is hashable, and equal to another one with the same options.

    Raises:
      TypeError, ValueError: an option makes no sense; when called, if ``k`` is more than the
        layer's output features, or ``tile`` does not divide them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.meprop import meprop_dot_general
      >>> dot = meprop_dot_general(1)
      >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> loss = lambda kernel: dot(x, kernel, (((1,), (0,)), ((), ()))) @ jnp.arange(4.0)
      >>> jax.grad(lambda kernel: loss(kernel).sum())(kernel)[0].tolist()
      [0.0, 0.0, 0.0, 6.0]

    References:
      Sun et al., `meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced
      Overfitting <https://arxiv.org/abs/1706.06197>`_, 2017
    """
    return MePropDot(k, pattern, tile, seed, name)
