"""What kernels lack: gradients of any order in reverse mode, rules for `jax.vmap` and meshes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from priorityprop_jax.core.fragile import (
    custom_partitioning,
    custom_vmap,
    here_or,
    no_mesh,
    vary_alike,
    varying,
)
from priorityprop_jax.core.precision import wide_type
from priorityprop_jax.sparse.backends import KERNELS
from priorityprop_jax.sparse.pattern import ConvGeometry


class Product(NamedTuple):
    """All about a product that is static."""

    backend: str
    geometry: ConvGeometry | None = None  # None for a matrix product


@jax.tree_util.register_static
class _Wanted(NamedTuple):
    """Which gradients somebody asked for; neither in a forward pass."""

    inputs: bool
    weights: bool


_FORWARD = _Wanted(False, False)


def multiply(product: Product, values: jax.Array, pattern: Any, x: jax.Array) -> jax.Array:
    """``y = x W^T`` of a weight that is zero outside of a pattern; for shapes see `Kernel`.

    In the dtype that ``values`` and ``x`` promote to; those of 16 bits are accumulated in float32.
    """
    # Kernels see one set of axes; that the values' gradient is summed over those that they lacked
    # follows from this line.
    return _multiply(product, *vary_alike((values, pattern, x)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: Product, values: Any, pattern: Any, x: Any) -> Any:
    dtype = jnp.result_type(values, x)
    inner = wide_type(values, x)
    [y] = _mapped(product, _FORWARD)(values.astype(inner), pattern, x.astype(inner))
    return y.astype(dtype)


def _multiply_forward(product: Product, values: Any, pattern: Any, x: Any) -> Any:
    # Whether an argument is differentiated at all is known here: a first layer's input is not, and
    # half of its backward pass need not be run.
    wanted = _Wanted(x.perturbed, values.perturbed)
    pattern = jax.tree.map(
        lambda leaf: leaf.value, pattern, is_leaf=lambda leaf: hasattr(leaf, "perturbed")
    )
    # By the rule itself, not by the kernel: who differentiates twice comes through here.
    y = _multiply(product, values.value, pattern, x.value)
    return y, (wanted, values.value, pattern, x.value)


def _multiply_backward(product: Product, residuals: Any, dy: Any) -> Any:
    wanted, values, pattern, x = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    gradients: Any = _gradients  # custom rules have no type of their own
    dx, dvalues = gradients(product, wanted, values, pattern, x, dy)
    return dvalues, None, dx


_multiply.defvjp(_multiply_forward, _multiply_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(
    product: Product, wanted: _Wanted, values: Any, pattern: Any, x: Any, dy: Any
) -> Any:
    inner = wide_type(values, x)
    arrays = values.astype(inner), pattern, x.astype(inner), dy.astype(inner)
    found = iter(_mapped(product, wanted)(*arrays) if any(wanted) else ())
    dx = next(found).astype(x.dtype) if wanted.inputs else None
    dvalues = next(found).astype(values.dtype) if wanted.weights else None
    return dx, dvalues


def _gradients_forward(product: Product, wanted: _Wanted, *arrays: Any) -> Any:
    return _gradients(product, wanted, *arrays), arrays


def _gradients_backward(product: Product, wanted: _Wanted, residuals: Any, cotangents: Any) -> Any:
    """Gradients of gradients: with ``dx = dy W`` and ``dvalues = (dy^T x)`` at the places.

    For cotangents ``u`` of ``dx`` and ``c`` of ``dvalues``, with ``C`` the matrix of values ``c``:
    that of ``dy`` is ``u W^T + x C^T``, that of ``x`` is ``dy C``, and that of ``values`` is
    ``(dy^T u)`` at the places.
    """
    values, pattern, x, dy = residuals
    multiply_again: Any = _multiply
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


@functools.cache
def _mapped(product: Product, wanted: _Wanted) -> Any:
    """A kernel with a rule for `jax.vmap`: ``(values, pattern, x[, dy])`` to a list of results.

    Mapped examples join the batch. Gradients of the values are wanted for each of them.
    """

    @custom_vmap
    def mapped(values, pattern, *arrays):
        return _partitioned(product, wanted, values, pattern, *arrays)

    @mapped.def_vmap
    def rule(size, batched, values, pattern, *arrays):
        in_values, in_pattern, *in_arrays = [any(jax.tree.leaves(part)) for part in batched]
        outputs = [True] * max(sum(wanted), 1)
        if in_values or in_pattern or (wanted.weights and not wanted.inputs):
            return _one_by_one(mapped, batched, (values, pattern, *arrays)), outputs
        arrays = [
            array if there else jnp.broadcast_to(array, (size, *array.shape))
            for array, there in zip(arrays, in_arrays, strict=True)
        ]
        over_batch = _mapped(product, wanted._replace(weights=False))
        batch = arrays[0].shape[1]
        flat = [array.reshape(size * batch, *array.shape[2:]) for array in arrays]
        [found] = over_batch(values, pattern, *flat)
        results = [found.reshape(size, batch, *found.shape[1:])]
        if wanted.weights:
            only_weights = _mapped(product, _Wanted(False, True))
            results += lax.map(lambda each: only_weights(values, pattern, *each), tuple(arrays))
        return results, outputs

    return mapped


def _one_by_one(function: Any, batched: Any, arguments: Any) -> Any:
    """Calls a function for each example of those arguments that have them."""
    leaves, treedef = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(batched)

    def one(mapped):
        found = iter(mapped)
        every = [next(found) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(treedef, every))

    return lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag])


def _partitioned(product: Product, wanted: _Wanted, *arguments: Any) -> list[Any]:
    """A kernel under a rule by which a compiler that shards arrays may split the batch.

    Without one it would gather whole arrays on every device.
    """
    geometry = product.geometry

    def run(backend, values, pattern, *arrays):
        kernel = KERNELS[backend]
        if not any(wanted):
            return [kernel.forward(values, pattern, *arrays, geometry)]
        gradients = kernel.backward(values, pattern, *arrays, geometry, **wanted._asdict())
        return [gradient for gradient in gradients if gradient is not None]

    function = functools.partial(run, product.backend)
    if product.backend != "native":  # the compiler sees into it
        return function(*arguments)
    leaves, treedef = jax.tree.flatten(arguments)

    def here_or_by_jax(native):
        flat = lambda function: lambda *leaves: function(*treedef.unflatten(leaves))  # noqa: E731
        return here_or(flat(native), flat(functools.partial(run, "masked")))(*leaves)

    if any(map(varying, leaves)):  # inside of `jax.shard_map` all is split already
        return here_or_by_jax(function)

    def partition(mesh, shapes, _):
        spec = shapes[2].sharding.spec
        names = spec[0] if spec else None
        over_batch, whole = NamedSharding(mesh, jax.P(names)), NamedSharding(mesh, jax.P())
        by_argument = [
            jax.tree.map(lambda _, place=place: over_batch if place >= 2 else whole, argument)
            for place, argument in enumerate(shapes)
        ]

        def lower(*parts):
            with no_mesh():  # of the caller: all is split already
                found = function(*parts)
                if wanted.weights and names is not None:
                    found[-1] = lax.psum(found[-1], names)
            return found

        per_batch = not wanted.weights or wanted.inputs
        results = [over_batch] * per_batch + [whole] * wanted.weights
        return mesh, lower, results, tuple(by_argument)

    call = custom_partitioning(function)
    rule = _sharding_rule(product, wanted, arguments)
    call.def_partition(partition=partition, infer_sharding_from_operands=None, **rule)
    return here_or_by_jax(call)


def _sharding_rule(product: Product, wanted: _Wanted, arguments: Any) -> dict[str, Any]:
    """An einsum-like rule: of all axes the batch alone may be sharded."""
    _, pattern, *arrays = arguments
    fixed = [f"w{place}" for place in range(1 + len(jax.tree.leaves(pattern)))]
    names = ["b i", "b o"] if product.geometry is None else ["b h v i", "b y z o"]
    operands = [*fixed, *names[: len(arrays)]]
    results = [names[0]] * wanted.inputs + [fixed[0]] * wanted.weights or [names[1]]
    # In the order in which they appear, as the rule asks.
    used = dict.fromkeys(axis for name in (*operands, *results) for axis in name.split())
    return {
        "sharding_rule": f"{', '.join(operands)} -> {', '.join(results)}",
        "need_replication_factors": tuple(axis for axis in used if axis != "b"),
    }
