"""meProp: backward passes of linear maps through the top-k output gradients only.

Products and convolutions that compute what JAX's own compute, bit for bit, and differ in their
backward pass. They go where Flax's layers take a ``dot_general`` or ``conv_general_dilated``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import tracers
from jax import lax
from opt_einsum import parser

from priorityprop_jax.core.selection import (
    PATTERNS,
    Pattern,
    at_random,
    check_k,
    keep_largest,
    largest,
    magnitudes,
    resolve_k,
    seed_of,
)
from priorityprop_jax.core.varying import vary, varying

K = int | float | tuple[int | float, ...]

# Three groups of axes of one array.
_Axes = tuple[tuple[int, ...], ...]


# What is kept.


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What one compiled size of a layer keeps: ``k`` of each of ``groups`` equal groups."""

    pattern: str
    k: int
    block: int
    seed: int
    unbiased: bool
    groups: int = 1


def _columns(rule: _Rule, dy: jax.Array) -> jax.Array:
    """The columns of ``dy`` ``[rows, features]`` that are kept, ``[groups * k]``, ascending."""
    width = dy.shape[1] // rule.groups
    if rule.pattern == "random":
        choose = [
            at_random(dy[:, g * width : (g + 1) * width], rule.k, rule.seed + g) + g * width
            for g in range(rule.groups)
        ]
        return jnp.concatenate(choose)
    scores = magnitudes(dy).reshape(rule.groups, width)
    if rule.pattern == "block":
        scores = scores.reshape(rule.groups, -1, rule.block).sum(-1)
        blocks = jax.vmap(lambda s: largest(s, rule.k // rule.block))(scores)  # [groups, blocks]
        kept = (blocks[..., None] * rule.block + jnp.arange(rule.block)).reshape(rule.groups, -1)
    else:
        kept = jax.vmap(lambda s: largest(s, rule.k))(scores)  # [groups, k]
    return (kept + jnp.arange(rule.groups)[:, None] * width).reshape(-1)


def _scaled(rule: _Rule, dy: jax.Array, kept: jax.Array, width: int) -> jax.Array:
    """The kept part of ``dy``, what a random choice needs besides."""
    if rule.pattern != "random":
        return kept
    # A column that is left out may hold a NaN that the chosen ones do not.
    factor = jnp.where(jnp.isnan(dy).any(), jnp.nan, width / rule.k if rule.unbiased else 1.0)
    return kept * factor.astype(kept.dtype)


# Products.


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of inputs and a kernel: its axes, and how JAX computes it.

    Attributes:
      compute: ``(x, kernel) -> y``, JAX's own.
      x_axes: axes of ``x``: batch, free, contracted.
      kernel_axes: axes of the kernel: batch, features, contracted.
      y_axes: axes of ``y``: batch, free, features.
      rules: of each compiled size, in ascending order of ``k``.
    """

    compute: Callable[..., jax.Array]
    x_axes: _Axes
    kernel_axes: _Axes
    y_axes: _Axes
    rules: tuple[_Rule, ...]

    @property
    def by_rows(self) -> bool:
        """Whether a feature of the kernel is a row, as in ``(out, in)``, rather than a column."""
        _, features, contracted = self.kernel_axes
        return not contracted or (bool(features) and features[0] < contracted[0])


class Tap(NamedTuple):
    """A zero argument whose cotangent carries the compact gradient out of the backward pass."""

    values: jax.Array  # [k, in]
    rows: jax.Array  # [k] float32, which is exact for whole numbers up to 2**24

    @classmethod
    def zeros(cls, k: int, kernel: jax.Array) -> Tap:
        """For ``k`` rows of a kernel ``[out, in]``."""
        return cls(jnp.zeros((k, kernel.shape[1]), kernel.dtype), jnp.zeros(k, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _Product, x: Any, kernel: Any, tap: Tap | None, size: Any) -> jax.Array:
    return product.compute(x, kernel)


def _multiply_forward(product: _Product, x: Any, kernel: Any, tap: Tap | None, size: Any) -> Any:
    return product.compute(x, kernel), (x, kernel, tap, size)


def _multiply_backward(product: _Product, residuals: Any, dy: jax.Array) -> Any:
    x, kernel, tap, size = residuals
    # Under `jax.shard_map` each shard keeps columns of its own, so what is to be summed over shards
    # is whole arrays, not the kept columns, which JAX would sum.
    axes = tuple(varying(dy) - varying(kernel))
    kernel = vary(kernel, axes)
    by_rows = product.by_rows
    batch, features, contracted = product.kernel_axes
    order = (batch, features, contracted) if by_rows else (batch, contracted, features)
    x3 = _matrix(x, product.x_axes)  # [*batch, rows, in]
    kernel3 = _matrix(kernel, order)  # [*batch, out, in] or [*batch, in, out]
    dy3 = _matrix(dy, product.y_axes)  # [*batch, rows, out]
    most = product.rules[-1].k

    def branch(rule: _Rule) -> Callable[..., Any]:
        def one(x, kernel, dy):
            return _backward(rule, product, x, kernel, dy, None if tap is None else most)

        for _ in batch:
            one = jax.vmap(one)
        return one

    dx3, gradient = _at_size(size, [branch(rule) for rule in product.rules], x3, kernel3, dy3)
    dx = _unmatrix(dx3, x, product.x_axes)
    if tap is not None:
        return dx, None, Tap(gradient.values.astype(tap.values.dtype), gradient.rows), None
    gradient = _unmatrix(gradient, kernel, order)
    return dx, lax.psum(gradient, axes) if axes else gradient, None, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _at_size(size: Any, branches: list[Callable[..., Any]], *arguments: Any) -> Any:
    """The branch of a size; the largest where none is chosen."""
    if size is None or len(branches) == 1:
        return branches[-1](*arguments)
    return lax.switch(size, branches, *arguments)


def _backward(
    rule: _Rule, product: _Product, x: Any, kernel: Any, dy: Any, compact: int | None
) -> tuple[jax.Array, Any]:
    """Gradients of one matrix product: ``x [rows, in]``, ``dy [rows, out]``.

    Returns:
      That of ``x``, and that of the kernel in its layout, or a `Tap` of ``compact`` rows.
    """
    by_rows, width = product.by_rows, dy.shape[1]
    axis = 0 if by_rows else 1  # of the features in the kernel

    def multiply(x, kernel):
        return lax.dot_general(
            x, kernel, (((1,), (1 - axis,)), ((), ())), **_keywords(product.compute)
        )

    # The gradients of a product with fewer columns: JAX's own rules for dtypes and shardings hold.
    if rule.k == width and compact is None:
        return jax.vjp(multiply, x, kernel)[1](dy)
    if rule.pattern == "example":
        return jax.vjp(multiply, x, kernel)[1](keep_largest(dy, rule.k))
    kept = _columns(rule, dy)
    some = _scaled(rule, dy, _take(dy, kept, 1), width)
    dx, gradient = jax.vjp(multiply, x, _take(kernel, kept, axis))[1](some)
    if compact is None:
        return dx, _whole(gradient, kernel.shape, kept, axis)
    more = compact - rule.k
    rows = jnp.concatenate([kept, width + jnp.arange(more, dtype=kept.dtype)])
    return dx, Tap(jnp.pad(gradient, ((0, more), (0, 0))), rows.astype(jnp.float32))


def _take(x: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    return jnp.take(x, places, axis=axis, mode="clip", unique_indices=True, indices_are_sorted=True)


def _whole(part: jax.Array, shape: tuple[int, ...], places: jax.Array, axis: int) -> jax.Array:
    """Zeros of a shape with a part put in its places along an axis."""
    where = (slice(None),) * axis + (places,)
    zeros = jnp.zeros(shape, part.dtype)
    return zeros.at[where].set(part, unique_indices=True, indices_are_sorted=True)


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


# What a layer is told while its model is traced.


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """How a model uses a layer in one pass.

    Attributes:
      rows: examples (and positions) that pass through it.
      inputs: features that are contracted, those of one group for convolutions.
      outputs: output features.
      sizes: the numbers of output features that its compiled sizes keep, in ascending order.
      by_rows: whether its kernel is a matrix ``(out, in)`` whose gradient can be row-sparse.
      calls: how often it is called.
      direct: whether all calls are outside of `jax.jit`, `jax.lax.scan` and other functions that
        trace what they are given.
    """

    rows: int
    inputs: int
    outputs: int
    sizes: tuple[int, ...]
    by_rows: bool
    calls: int = 1
    direct: bool = True

    def flops(self, k: int) -> float:
        """FLOPs of both products of its backward pass, ``4 rows inputs k``, in all calls."""
        return 4.0 * self.rows * self.inputs * k * self.calls


class Frame:
    """What a loss is traced with: taps and sizes for layers by name; records who is called."""

    def __init__(
        self, taps: Mapping[str, Any] | None = None, sizes: Mapping[str, Any] | None = None
    ) -> None:
        self.taps, self.sizes = dict(taps or {}), dict(sizes or {})
        self.uses: dict[str, LayerUse] = {}
        self.level: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Makes this the frame of what is traced inside."""
        # A layer inside a scan or a jitted function is traced once and run often, or traced never
        # as its program is cached: what belongs to this pass must not be handed to it.
        self.level = tracers.current_trace()
        token = _frame.set(self)
        try:
            yield
        finally:
            _frame.reset(token)

    def enter(self, name: str, use: LayerUse) -> tuple[Tap | None, Any]:
        """Records a call; its tap and its size."""
        direct = tracers.current_trace() == self.level
        if name in self.uses:
            last = self.uses[name]
            use = dataclasses.replace(
                last, calls=last.calls + 1, by_rows=False, direct=last.direct and direct
            )
        else:
            use = dataclasses.replace(use, direct=direct)
        self.uses[name] = use
        return (self.taps.get(name), self.sizes.get(name)) if direct else (None, None)


_frame: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("meprop", default=None)


def enter(name: str, use: LayerUse) -> tuple[Tap | None, Any]:
    """Tells the frame, if there is one, that a layer is called; the layer's tap and size."""
    frame = _frame.get()
    return (None, None) if frame is None or not name else frame.enter(name, use)


# The drop-ins.


@dataclasses.dataclass(frozen=True)
class MeProp:
    """What a drop-in keeps; see `meprop_dot_general` for the meaning of all but the last two.

    Attributes:
      transposed: whether the layer's kernel is stored ``(out, in)`` though the layer asks for a
        product with ``(in, out)``.
      inner: what the layer had in this place before, for `restore`.
    """

    k: K
    pattern: Pattern = "unified"
    block: int = 16
    min_features: int = 0
    unbiased: bool = False
    seed: int = 0
    name: str = ""
    transposed: bool = False
    inner: Any = None

    def __post_init__(self):
        for k in self.k if isinstance(self.k, tuple) else (self.k,):
            check_k(k)
        if self.k == ():
            raise ValueError("k is an empty tuple: give at least one size")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")
        if self.block < 1:
            raise ValueError(f"block is {self.block}, at least 1 column is needed")
        if self.min_features < 0:
            raise ValueError(f"min_features is {self.min_features}, at least 0 is needed")
        if self.unbiased and self.pattern != "random":
            raise ValueError('unbiased scales a random choice: it needs pattern="random"')

    def rules(self, width: int, groups: int = 1) -> tuple[_Rule, ...]:
        """Of each size, in ascending order; empty for a layer that stays dense."""
        if width < self.min_features:
            return ()
        multiple = self.block if self.pattern == "block" else 1
        several = self.k if isinstance(self.k, tuple) else (self.k,)
        sizes = sorted(
            {
                # A group keeps its share of the layer's k.
                resolve_k(
                    k if isinstance(k, float) or groups == 1 else max(1, round(k / groups)),
                    width // groups,
                    self.name,
                    multiple=multiple,
                )
                for k in several
            }
        )
        if sizes == [width // groups]:
            return ()
        seed = seed_of(self.name, self.seed)
        return tuple(_Rule(self.pattern, k, self.block, seed, self.unbiased, groups) for k in sizes)


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
        compute = _Compute(
            self.inner or lax.dot_general,
            (numbers,),
            tuple(
                {
                    **{name: value for name, value in kwargs.items() if value is not None},
                    "precision": precision,
                    "preferred_element_type": preferred_element_type,
                }.items()
            ),
        )
        free = tuple(a for a in range(lhs.ndim) if a not in x_contracted and a not in x_batch)
        features = tuple(a for a in range(rhs.ndim) if a not in contracted and a not in batch)
        places = iter(range(len(batch) + len(free) + len(features)))
        y_axes = tuple(tuple(next(places) for _ in group) for group in (batch, free, features))
        x_axes, kernel_axes = (x_batch, free, x_contracted), (batch, features, contracted)
        return self._product(compute, lhs, rhs, x_axes, kernel_axes, y_axes)

    def _product(
        self, compute: Any, x: Any, kernel: Any, x_axes: _Axes, kernel_axes: _Axes, y_axes: _Axes
    ) -> jax.Array:
        width = math.prod(kernel.shape[axis] for axis in kernel_axes[1])
        rules = self.rules(width)
        if not rules:
            return compute(x, kernel)
        product = _Product(compute, x_axes, kernel_axes, y_axes, rules)
        inputs = math.prod(kernel.shape[axis] for axis in kernel_axes[2])
        batch = math.prod(kernel.shape[axis] for axis in kernel_axes[0])
        rows = batch * math.prod(x.shape[axis] for axis in x_axes[1])
        by_rows = product.by_rows and kernel.ndim == 2 and self.pattern != "example"
        by_rows = by_rows and varying(x) <= varying(kernel)
        use = LayerUse(rows, inputs, width, tuple(rule.k for rule in rules), by_rows)
        tap, size = enter(self.name, use)
        if tap is not None:
            kernel = lax.stop_gradient(kernel)  # its gradient is the tap's
        return _multiply(product, x, kernel, tap, size)


class MePropEinsum(MePropDot):
    """An ``einsum`` of inputs and a kernel with meProp's backward pass, for `flax.nnx.Einsum`."""

    def __call__(  # type: ignore[override]
        self, einsum_str: str, x: jax.Array, kernel: jax.Array, **kwargs: Any
    ) -> jax.Array:
        """As `jax.numpy.einsum`; the second operand is the kernel."""
        operands, out, _ = parser.parse_einsum_input((einsum_str, x, kernel))
        ins = tuple(operands.split(","))
        given = {name: value for name, value in kwargs.items() if value is not None}
        compute = _Compute(_einsum, (einsum_str, self.inner), tuple(given.items()))
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


@dataclasses.dataclass(frozen=True)
class _Compute:
    """A function of two arrays with its options, equal and hashed by value."""

    function: Any
    positional: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, x: Any, kernel: Any) -> jax.Array:
        return self.function(x, kernel, *self.positional, **dict(self.keywords))


def _keywords(compute: Any) -> dict[str, Any]:
    """What the gradients' own products take over."""
    names = ("precision", "preferred_element_type")
    return {name: value for name, value in compute.keywords if name in names}


def meprop_dot_general(
    k: K,
    *,
    pattern: Pattern = "unified",
    block: int = 16,
    min_features: int = 0,
    unbiased: bool = False,
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
    the gradient returned is a whole array. `meprop` and `meprop_value_and_grad` avoid both.

    Under `jax.vmap` over single examples every example has a pattern of its own, and under
    `jax.shard_map` every shard; with an output axis that is sharded, the choice gathers the sums
    of magnitudes from all devices. Forward-mode derivatives (`jax.jvp`) are an error.

    Args:
      k: output features to keep: a whole number, or a fraction in (0, 1] of the layer's. A tuple
        gives several compiled sizes for a budget to choose from; the largest is the default.
      pattern: how to choose them. ``"unified"``: the largest ``sum_m |dy_mj|`` over all examples.
        ``"example"``: each example its own largest ``|dy_mj|``, as in the paper; its products stay
        dense and save nothing. ``"block"``: as unified, in contiguous blocks. ``"random"``.
      block: features in a block, for that pattern; ``k`` is rounded to a multiple of it.
      min_features: layers with fewer output features stay dense.
      unbiased: whether a random choice is scaled by ``n / k``, so that its mean is the gradient.
      seed: of random choices.
      name: of the layer, for errors and `meprop_value_and_grad`.

    Returns:
      A function with the signature of `jax.lax.dot_general`, whose second operand is the kernel.
      It is hashable, and equal to another one with the same options.

    Raises:
      TypeError, ValueError: an option makes no sense; when called, if ``k`` is more than the
        layer's output features, or ``block`` does not divide them.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import meprop_dot_general
      >>> dot = meprop_dot_general(1)
      >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> loss = lambda kernel: dot(x, kernel, (((1,), (0,)), ((), ()))) @ jnp.arange(4.0)
      >>> jax.grad(lambda kernel: loss(kernel).sum())(kernel)[0].tolist()
      [0.0, 0.0, 0.0, 6.0]

    References:
      Sun et al., `meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced
      Overfitting <https://arxiv.org/abs/1706.06197>`_, 2017
    """
    return MePropDot(k, pattern, block, min_features, unbiased, seed, name)


# Convolutions.


@dataclasses.dataclass(frozen=True)
class _Convolution:
    compute: Callable[..., jax.Array]
    y_axis: int  # of the output features in the output
    kernel_axis: int  # of the output features in the kernel
    rules: tuple[_Rule, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(convolution: _Convolution, x: Any, kernel: Any, size: Any) -> jax.Array:
    return convolution.compute(x, kernel)


def _convolve_forward(convolution: _Convolution, x: Any, kernel: Any, size: Any) -> Any:
    return convolution.compute(x, kernel), (x, kernel, size)


def _convolve_backward(convolution: _Convolution, residuals: Any, dy: jax.Array) -> Any:
    x, kernel, size = residuals
    axis, width = convolution.kernel_axis, dy.shape[convolution.y_axis]
    rows = jnp.moveaxis(dy, convolution.y_axis, -1)
    flat = rows.reshape(-1, width)  # [batch * positions, features]

    def branch(rule: _Rule) -> Callable[..., Any]:
        def gradients(x, kernel, dy, flat):
            pull = lambda kernel, dy: jax.vjp(convolution.compute, x, kernel)[1](dy)  # noqa: E731
            if rule.k * rule.groups == width:
                return pull(kernel, dy)
            if rule.pattern == "example":
                grouped = flat.reshape(-1, width // rule.groups)
                kept = keep_largest(grouped, rule.k).reshape(rows.shape)
                return pull(kernel, jnp.moveaxis(kept, -1, convolution.y_axis))
            kept = _columns(rule, flat)
            some = _take(dy, kept, convolution.y_axis)
            some = _scaled(rule, flat, some, width // rule.groups)
            dx, gradient = pull(_take(kernel, kept, axis), some)
            return dx, _whole(gradient, kernel.shape, kept, axis)

        return gradients

    branches = [branch(rule) for rule in convolution.rules]
    axes = tuple(varying(dy) - varying(kernel))  # as for products
    kernel = vary(kernel, axes)
    dx, gradient = _at_size(size, branches, x, kernel, dy, flat)
    return dx, lax.psum(gradient, axes) if axes else gradient, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


class MePropConv(MeProp):
    """A convolution with meProp's backward pass, made by `meprop_conv_general_dilated`."""

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Any,
        padding: Any,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        **kwargs: Any,
    ) -> jax.Array:
        """As `jax.lax.conv_general_dilated`; ``rhs`` is the kernel."""
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        keywords = {
            "window_strides": _hashable(window_strides),
            "padding": _hashable(padding),
            "lhs_dilation": _hashable(lhs_dilation),
            "rhs_dilation": _hashable(rhs_dilation),
            "dimension_numbers": numbers,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
            **{name: value for name, value in kwargs.items() if value is not None},
        }
        compute = _Compute(self.inner or lax.conv_general_dilated, (), tuple(keywords.items()))
        axis = numbers.rhs_spec[0]
        width = rhs.shape[axis]
        rules = self.rules(width, feature_group_count) if batch_group_count == 1 else ()
        if not rules:
            return compute(lhs, rhs)
        convolution = _Convolution(compute, numbers.out_spec[1], axis, rules)
        y = jax.eval_shape(compute, lhs, rhs)
        sizes = tuple(rule.k * rule.groups for rule in rules)
        use = LayerUse(y.size // width, rhs.size // width, width, sizes, by_rows=False)
        _, size = enter(self.name, use)
        return _convolve(convolution, lhs, rhs, size)


def _hashable(option: Any) -> Any:
    if isinstance(option, list | tuple | np.ndarray):
        return tuple(_hashable(entry) for entry in option)
    return option


def meprop_conv_general_dilated(
    k: K,
    *,
    pattern: Pattern = "unified",
    block: int = 16,
    min_features: int = 0,
    unbiased: bool = False,
    seed: int = 0,
    name: str = "",
) -> MePropConv:
    """A `jax.lax.conv_general_dilated` whose gradient flows back through few output channels.

    As `meprop_dot_general`, with the output channels for its output features, and the positions of
    all examples for its examples: the pattern ``"example"`` gives each position of each example its
    own channels. With feature groups, every group keeps its share of ``k``. With batch groups the
    convolution stays as it is.

    Args:
      k: see `meprop_dot_general`, as for the others.
      pattern: how to choose.
      block: channels in a block.
      min_features: convolutions with fewer output channels stay dense.
      unbiased: whether a random choice is scaled.
      seed: of random choices.
      name: of the layer.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`, for the argument
      ``conv_general_dilated`` of Flax's layers.

    Raises:
      TypeError, ValueError: see `meprop_dot_general`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import meprop_conv_general_dilated
      >>> conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0),
      ...                 conv_general_dilated=meprop_conv_general_dilated(2))
      >>> grads = nnx.grad(lambda conv: (conv(jnp.ones((1, 8, 8, 3))) ** 2).sum())(conv)
      >>> int(jnp.any(grads["kernel"][...] != 0, axis=(0, 1, 2)).sum())
      2
    """
    return MePropConv(k, pattern, block, min_features, unbiased, seed, name)
