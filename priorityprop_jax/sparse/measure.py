"""Sparse layers for the weights of a pruned model, where they are measured to be faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.core.modules import check_module, walk
from priorityprop_jax.core.tables import aligned
from priorityprop_jax.core.timing import compared, sooner
from priorityprop_jax.sparse.backends import sparse_backend
from priorityprop_jax.sparse.layers import SparseConv, SparseLayer
from priorityprop_jax.sparse.masks import check_sparsity
from priorityprop_jax.sparse.pattern import ConvGeometry
from priorityprop_jax.sparse.swap import dense_layers, is_dense, replace, to_sparse, untied

SECONDS = 0.3  # for measuring one layer, compiling left out


class LayerChoice(NamedTuple):
    """A row of the table of `sparsify`."""

    layer: str  # its path
    sparsity: float  # the share of its kernel that is zero
    dense_ms: float | None  # milliseconds of both passes, over all calls; None if not measured
    sparse_ms: float | None  # those of the sparse layer
    backend: str  # its kernels
    choice: str  # "sparse" or "dense": what is in the model now


def sparsify(
    model: nnx.Module, sample_input: Any, *, min_sparsity: float = 0.8
) -> list[LayerChoice]:
    """Makes those layers of a pruned model sparse, in place, that get faster by it.

    An `nnx.Linear` or `nnx.Conv` is swapped when enough of its kernel is zero and its sparse layer
    is faster, forward and backward, on inputs of the shapes that it gets when the model is called
    with the sample: by at least 3 %, in the median and the fastest of runs in turn with the dense
    one, warm. Zeros stay zero from then on, and a layer that shares parameters stays dense. Prints
    the table that it returns. Make the optimizer behind it, as there are other parameters.

    Args:
      model: a module, such as after `prune`.
      sample_input: what the model is called with, a tuple for several arguments. Only shapes
        matter; the model's own state, such as of dropout or batch statistics, is left as it is.
      min_sparsity: the share of zeros from which a layer is tried.

    Returns:
      A row for each layer that could be sparse, in the order in which attributes were set.

    Raises:
      TypeError: if the model is no `nnx.Module`.
      ValueError: if the model itself is such a layer, or ``min_sparsity`` is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> model = nnx.Sequential(
      ...     nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 4, rngs=nnx.Rngs(1)))
      >>> masks = sparse.prune(model, 0.5)
      >>> rows = sparse.sparsify(model, jnp.ones((4, 8)))
      layer     sparsity  dense ms  sparse ms  backend  choice
      layers/0     50.0%         -          -        -   dense
      layers/2      0.0%         -          -        -   dense
    """
    check_module(model)
    check_sparsity("min_sparsity", min_sparsity)
    if is_dense(model):
        raise ValueError("the model is one layer: take SparseLinear.from_dense or SparseConv's")
    layers = dense_layers(model)
    kernels = {name: np.asarray(layer.kernel[...]) for name, layer in layers.items()}
    zeros = {name: 1 - np.count_nonzero(x) / max(x.size, 1) for name, x in kernels.items()}
    tried = untied(model, {n: layers[n] for n, share in zeros.items() if share >= min_sparsity})
    inputs = _inputs_of(model, tried, sample_input) if tried else {}
    rows, new = [], {}
    for name, layer in layers.items():
        if not inputs.get(name):
            rows.append(LayerChoice(name, zeros[name], None, None, "-", "dense"))
            continue
        sparse = to_sparse(layer)
        times = _milliseconds(layer, sparse, inputs[name])
        choice = "sparse" if sooner(*times) else "dense"
        if choice == "sparse":
            new[id(layer)] = sparse
        (dense_ms, _), (sparse_ms, _) = times.tolist()
        backend = _backend(sparse, inputs[name][0])
        rows.append(LayerChoice(name, zeros[name], dense_ms, sparse_ms, backend, choice))
    replace(model, new)
    header = ("layer", "sparsity", "dense ms", "sparse ms", "backend", "choice")
    print("\n".join(aligned([header, *map(_cells, rows)])))
    return rows


def layer_table(model: nnx.Module) -> list[dict[str, Any]]:
    """Path, shape, non-zeros and weights of each layer that is sparse or could be, for JSON."""
    rows = []
    for name, layer in walk(model):
        if isinstance(layer, SparseLayer | nnx.Linear | nnx.Conv):
            sparse = isinstance(layer, SparseLayer)
            shape = layer.kernel_shape if sparse else layer.kernel.shape
            count = layer.nonzeros if sparse else math.prod(shape)
            row = {"layer": name, "shape": list(shape), "nonzeros": count}
            rows.append({**row, "weights": math.prod(shape)})
    return rows


def _cells(row: LayerChoice) -> tuple[str, ...]:
    times = ["-" if ms is None else f"{ms:.3f}" for ms in (row.dense_ms, row.sparse_ms)]
    return (row.layer, f"{row.sparsity:.1%}", *times, row.backend, row.choice)


def _inputs_of(
    model: nnx.Module, layers: Mapping[str, Any], sample_input: Any
) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of what each layer gets at each of its calls."""
    found: dict[str, list[jax.ShapeDtypeStruct]] = {name: [] for name in layers}
    arguments = sample_input if isinstance(sample_input, tuple) else (sample_input,)
    graph, state = nnx.split(model)

    def call(state):
        copy = nnx.merge(graph, state)
        for name, layer in walk(copy):
            if name in found:
                # A copy of its own, which may become something else.
                object.__setattr__(layer, "__class__", _recording(type(layer), found[name]))
        copy(*arguments)  # type: ignore[operator]

    jax.eval_shape(call, state)
    return found


def _recording(kind: Any, found: list[jax.ShapeDtypeStruct]) -> Any:
    """A kind of layer that notes what it is called with."""

    class Recording(kind):
        def __call__(self, inputs, *rest, **options):
            inputs = jnp.asarray(inputs)
            found.append(jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
            return super().__call__(inputs, *rest, **options)

    return Recording


def _backend(layer: SparseLayer, x: jax.ShapeDtypeStruct) -> str:
    geometry = ConvGeometry((1, 1)) if isinstance(layer, SparseConv) else None  # any will do
    dtype = layer.dtype or jnp.result_type(x.dtype, layer.values.dtype)
    return sparse_backend(layer.pattern, geometry=geometry, dtype=dtype).name


def _milliseconds(dense: Any, sparse: Any, inputs: list[jax.ShapeDtypeStruct]) -> np.ndarray:
    """Of both passes of two layers, over all calls of a step: medians and fastest, `[2, 2]`."""
    both = lambda shape: [_both_passes(layer, shape) for layer in (dense, sparse)]  # noqa: E731
    times = [inputs.count(shape) * compared(both(shape), SECONDS) for shape in set(inputs)]
    return 1e3 * np.sum(times, axis=0)


def _both_passes(layer: Any, shape: jax.ShapeDtypeStruct) -> Callable[[], Any]:
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def program(params, rest, x, dy):
        def forward(params, x):
            return nnx.merge(graph, params, rest)(x)

        y, pull = jax.vjp(forward, params, x)
        return y, pull(dy)

    dtype = shape.dtype if jnp.issubdtype(shape.dtype, jnp.floating) else jnp.float32
    x = jax.random.normal(jax.random.key(0), shape.shape).astype(dtype)
    y = jax.eval_shape(layer, x)
    dy = jax.random.normal(jax.random.key(1), y.shape).astype(y.dtype)
    compiled = jax.jit(program)
    return lambda: jax.block_until_ready(compiled(params, rest, x, dy))
