"""Products with sparse weights that can be differentiated, mapped and sharded, over any kernel.

A kernel multiplies, and knows nothing else: here it gets its gradients, of any order in reverse
mode, its rule for `jax.vmap` and its rule for meshes. `functional.py` is what users call.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from priorityprop_jax.core.varying import vary, varying
from priorityprop_jax.sparse.backends import Kernel, kernel_of
from priorityprop_jax.sparse.geometry import ConvGeometry


class Product(NamedTuple):
    """All about a product that is static.

    Attributes:
      backend: the name of its kernels.
      geometry: of a convolution; None for a matrix product.
    """

    backend: str
    geometry: ConvGeometry | None = None

    @property
    def kernel(self) -> Kernel:
        """The functions that do the work."""
        return kernel_of(self.backend, self.geometry)


class _Wanted(NamedTuple):
    """Which gradients somebody asked for."""

    inputs: bool
    weights: bool


def multiply(product: Product, values: jax.Array, pattern: Any, x: jax.Array) -> jax.Array:
    """``y = x W^T`` of a weight that is zero outside of a pattern.

    Args:
      product: which, and by which kernels.
      values: the weight at the places of the pattern.
      pattern: those places.
      x: ``[batch, in]``, or images ``[batch, height, width, in]``.

    Returns:
      ``[batch, out]`` or ``[batch, height, width, out]``, in the dtype that ``values`` and ``x``
      promote to. Dtypes of 16 bits are accumulated in float32.
    """
    # Kernels see one set of axes; that the values' gradient is summed over those that they lacked
    # follows from this line.
    axes = frozenset().union(*map(varying, jax.tree.leaves((values, pattern, x))))
    values, pattern, x = jax.tree.map(lambda leaf: vary(leaf, axes), (values, pattern, x))
    return _multiply(product, values, pattern, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: Product, values: Any, pattern: Any, x: Any) -> Any:
    return _forward(product, values, pattern, x)


def _multiply_forward(product: Product, values: Any, pattern: Any, x: Any) -> Any:
    # Whether an argument is differentiated at all is known here: a first layer's input is not, and
    # half of its backward pass need not be run.
    wanted = _Wanted(x.perturbed, values.perturbed)
    pattern = jax.tree.map(
        lambda leaf: leaf.value, pattern, is_leaf=lambda leaf: hasattr(leaf, "perturbed")
    )
    # By the rule itself, not by the kernel: who differentiates twice comes through here.
    y = _multiply(product, values.value, pattern, x.value)
    return y, (_Static(wanted), values.value, pattern, x.value)


def _multiply_backward(product: Product, residuals: Any, dy: Any) -> Any:
    wanted, values, pattern, x = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    found: Any = _gradients(product, wanted.value, values, pattern, x, dy)
    dx, dvalues = found
    return dvalues, None, dx


_multiply.defvjp(_multiply_forward, _multiply_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(
    product: Product, wanted: _Wanted, values: Any, pattern: Any, x: Any, dy: Any
) -> Any:
    return _backward(product, wanted, values, pattern, x, dy)


def _gradients_forward(
    product: Product, wanted: _Wanted, values: Any, pattern: Any, x: Any, dy: Any
) -> Any:
    found = _gradients(product, wanted, values, pattern, x, dy)
    return found, (values, pattern, x, dy)


def _gradients_backward(product: Product, wanted: _Wanted, residuals: Any, cotangents: Any) -> Any:
    """Gradients of gradients: with ``dx = dy W`` and ``dvalues = (dy^T x)`` at the places.

    For cotangents ``u`` of ``dx`` and ``c`` of ``dvalues``, with ``C`` the matrix of values ``c``:
    that of ``dy`` is ``u W^T + x C^T``, that of ``x`` is ``dy C``, and that of ``values`` is
    ``(dy^T u)`` at the places.
    """
    values, pattern, x, dy = residuals
    multiply_again: Any = _multiply  # custom rules have no type of their own
    gradients: Any = _gradients
    u, c = cotangents
    ddy = jnp.zeros_like(dy)
    values_bar, x_bar = jnp.zeros_like(values), jnp.zeros_like(x)
    if wanted.inputs:
        ddy += multiply_again(product, values, pattern, u).astype(dy.dtype)
        _, values_bar = gradients(product, _Wanted(False, True), values, pattern, u, dy)
    if wanted.weights:
        ddy += multiply_again(product, c, pattern, x).astype(dy.dtype)
        x_bar, _ = gradients(product, _Wanted(True, False), c, pattern, x, dy)
    return values_bar, None, x_bar, ddy


_gradients.defvjp(_gradients_forward, _gradients_backward)


@jax.tree_util.register_static
class _Static(NamedTuple):
    """Carries what is known while tracing from the forward to the backward pass."""

    value: Any


def _forward(product: Product, values: Any, pattern: Any, x: Any) -> jax.Array:
    dtype = jnp.result_type(values, x)
    inner = _accumulator(dtype)
    y = _mapped_forward(product)(values.astype(inner), pattern, x.astype(inner))
    return y.astype(dtype)


def _backward(
    product: Product, wanted: _Wanted, values: Any, pattern: Any, x: Any, dy: Any
) -> tuple[Any, Any]:
    inner = _accumulator(jnp.result_type(values, x))
    outputs = _mapped_backward(product, wanted)(
        values.astype(inner), pattern, x.astype(inner), dy.astype(inner)
    )
    found = iter(outputs)
    dx = next(found).astype(x.dtype) if wanted.inputs else None
    dvalues = next(found).astype(values.dtype) if wanted.weights else None
    return dx, dvalues


def _accumulator(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


@functools.cache
def _mapped_forward(product: Product) -> Any:
    """The forward kernel with a rule for `jax.vmap`: mapped examples join the batch."""
    forward = _partitioned_forward(product)

    @custom_vmap
    def mapped(values, pattern, x):
        return forward(values, pattern, x)

    @mapped.def_vmap
    def rule(size, batched, values, pattern, x):
        in_values, in_pattern, in_x = _any_batched(batched)
        if not (in_values or in_pattern) and in_x:
            return _unfold(mapped(values, pattern, _fold(x)), size), True
        return _one_by_one(lambda *a: mapped(*a), size, batched, values, pattern, x), True

    return mapped


@functools.cache
def _mapped_backward(product: Product, wanted: _Wanted) -> Any:
    """The backward kernel with a rule for `jax.vmap`.

    Gradients of inputs join the batch; those of the values are wanted for each example.
    """
    backward = _partitioned_backward(product, wanted)

    @custom_vmap
    def mapped(values, pattern, x, dy):
        return backward(values, pattern, x, dy)

    @mapped.def_vmap
    def rule(size, batched, values, pattern, x, dy):
        in_values, in_pattern, in_x, in_dy = _any_batched(batched)
        outputs = [True] * sum(wanted)
        if in_values or in_pattern or not wanted.inputs:
            return _one_by_one(
                lambda *a: mapped(*a), size, batched, values, pattern, x, dy
            ), outputs
        x = x if in_x else jnp.broadcast_to(x, (size, *x.shape))
        dy = dy if in_dy else jnp.broadcast_to(dy, (size, *dy.shape))
        only_inputs = _mapped_backward(product, _Wanted(True, False))
        [dx] = only_inputs(values, pattern, _fold(x), _fold(dy))
        found = [_unfold(dx, size)]
        if wanted.weights:
            only_weights = _mapped_backward(product, _Wanted(False, True))
            found += lax.map(lambda a: only_weights(values, pattern, *a), (x, dy))
        return found, outputs

    return mapped


def _any_batched(batched: Any) -> list[bool]:
    return [any(jax.tree.leaves(argument)) for argument in batched]


def _one_by_one(function: Any, size: int, batched: Any, *arguments: Any) -> Any:
    """Calls a function for each example of those arguments that have them."""
    leaves, treedef = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(batched)

    def one(mapped):
        found = iter(mapped)
        every = [next(found) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(treedef, every))

    mapped = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
    return lax.map(one, mapped, batch_size=None)


def _fold(x: jax.Array) -> jax.Array:
    """``[mapped, batch, ...]`` with the mapped axis in the batch."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _unfold(y: jax.Array, size: int) -> jax.Array:
    """The inverse of `_fold`."""
    return y.reshape(size, y.shape[0] // size, *y.shape[1:])


def _partitioned_forward(product: Product) -> Any:
    """The forward kernel with a rule for meshes: the batch may be sharded, nothing else."""
    kernel = product.kernel
    if not kernel.opaque:  # the compiler sees into it
        return kernel.forward

    def forward(values, pattern, x):
        return _with_partitions(
            product, kernel.forward, _Wanted(False, False), (values, pattern, x)
        )

    return forward


def _partitioned_backward(product: Product, wanted: _Wanted) -> Any:
    kernel = product.kernel

    def backward(values, pattern, x, dy):
        dx, dvalues = kernel.backward(
            values, pattern, x, dy, inputs=wanted.inputs, weights=wanted.weights
        )
        return [gradient for gradient in (dx, dvalues) if gradient is not None]

    if not kernel.opaque:
        return backward

    def partitioned(values, pattern, x, dy):
        return _with_partitions(product, backward, wanted, (values, pattern, x, dy))

    return partitioned


def _with_partitions(product: Product, function: Any, wanted: _Wanted, arguments: Any) -> Any:
    """Calls a kernel under a rule by which a compiler that shards arrays may split the batch.

    Without one it would gather whole arrays on every device.
    """
    if any(varying(leaf) for leaf in jax.tree.leaves(arguments)):
        return function(*arguments)  # inside of `jax.shard_map` all is split already
    gradients = any(wanted)

    def batch_names(shape):
        spec = tuple(shape.sharding.spec)
        return spec[0] if spec else None

    def partition(mesh, shapes, _):
        names = batch_names(shapes[2])
        over_batch, whole = NamedSharding(mesh, jax.P(names)), NamedSharding(mesh, jax.P())
        by_argument = [
            jax.tree.map(lambda _, place=place: over_batch if place >= 2 else whole, argument)
            for place, argument in enumerate(shapes)
        ]
        results = [over_batch] * wanted.inputs + [whole] * wanted.weights

        def lower(*parts):
            found = function(*parts)
            if wanted.weights and names is not None:
                found[-1] = lax.psum(found[-1], names)
            return found

        return mesh, lower, results if gradients else over_batch, tuple(by_argument)

    call = custom_partitioning(function)
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=None,
        **_sharding_rule(product, wanted, arguments),
    )
    return call(*arguments)


def _sharding_rule(product: Product, wanted: _Wanted, arguments: Any) -> dict[str, Any]:
    """An einsum-like rule: of all axes the batch alone may be sharded."""
    values, pattern, *arrays = arguments
    fixed = [f"w{place}" for place in range(1 + len(jax.tree.leaves(pattern)))]
    inputs, outputs = (
        (["b", "i"], ["b", "o"])
        if product.geometry is None
        else (["b", "h", "v", "i"], ["b", "y", "z", "o"])
    )
    names = [" ".join(inputs), " ".join(outputs)]
    operands = [*fixed, *names[: len(arrays)]]
    if any(wanted):
        results = [names[0]] * wanted.inputs + [fixed[0]] * wanted.weights
    else:
        results = [names[1]]
    # In the order in which they appear, as the rule asks.
    used = dict.fromkeys(axis for name in (*operands, *results) for axis in name.split())
    return {
        "sharding_rule": f"{', '.join(operands)} -> {', '.join(results)}",
        "need_replication_factors": tuple(axis for axis in used if axis != "b"),
    }
