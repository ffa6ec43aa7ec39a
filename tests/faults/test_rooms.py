"""What has a backward pass of its own, in every mode of JAX at once, and in float64.

The reference is the plain layer, or the loss as anybody would write it. What is found here is
mended at its root, and gets a test of its own beside the code.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from priorityprop_jax import exact, highway, meprop, partial, rnn, sparse
from priorityprop_jax.core.rows import densify
from priorityprop_jax.exact.blocks import blocks, save_products

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("quickly_compiled")]


class Case(NamedTuple):
    ours: Callable[..., Any]  # of the arguments, a tree of arrays
    args: tuple[Any, ...]  # float32
    plain: Callable[..., Any] | None = None  # what gives the like; None: what ours is in float32
    some: bool = False  # the gradient has some of its entries only, and zeros for the others


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 2


def mean_square(model, x):
    return jnp.mean(model(x) ** 2)


def of_module(model, x, change, *, gradient=None, loss=mean_square, **options):
    """A changed module beside the plain one."""

    def function(model, gradient):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def run(pure, x):
            # Copies: variables may only change at the trace level that made them.
            state, others = jax.tree.map(lambda leaf: leaf, (params, rest))
            turned = lambda x, mine: x if x.shape == mine.shape else x.T  # noqa: E731
            nnx.replace_by_pure_dict(state, jax.tree.map(turned, pure, nnx.to_pure_dict(params)))
            value, grads = gradient(loss)(nnx.merge(graph, state, others), x)
            return value, densify(nnx.to_pure_dict(grads))

        return run, nnx.to_pure_dict(params)

    plain, _ = function(nnx.clone(model), nnx.value_and_grad)
    change(model)
    ours, params = function(model, gradient or nnx.value_and_grad)
    return Case(ours, (params, x), plain, **options)


def with_lengths(model, x):
    lengths = jnp.array([3, 6, 1])
    carry, y = model(x, seq_lengths=lengths, return_carry=True, reverse=True, keep_order=True)
    return jnp.mean(y**2) + sum(jnp.mean(c**2) for c in jax.tree.leaves(carry))


INIT = {"recurrent_kernel_init": nnx.initializers.normal(0.3)}  # orthogonal is not for bfloat16


def recurrent(d, cell, change, loss=mean_square):
    # Of as many rounds as there are steps the gradient is exact.
    model = nnx.RNN(cell(5, 8, param_dtype=d, rngs=nnx.Rngs(0), **INIT))
    return of_module(model, normal(3, 6, 5), change, loss=loss)


def rounds(model):
    return rnn.lean_rnn(model, iterations=6, tol=0.0)


def recurrent_of_linen(d, cell):
    def function(kind):
        model = kind(cell(8, param_dtype=d, **INIT))
        return model, jax.value_and_grad(lambda p, x: jnp.mean(model.apply(p, x) ** 2))

    (model, plain), (_, ours) = function(linen.RNN), function(rnn.LinenLeanRNN)
    x = normal(3, 6, 5)
    return Case(ours, (jax.device_get(model.init(jax.random.key(0), x.astype(d))), x), plain)


def few_columns_of_gates(d, cell):
    change = lambda model: meprop.meprop(model, 3, layers=nnx.RNN, transpose=False)  # noqa: E731
    case = recurrent(d, cell, change)
    return case._replace(plain=None)


def mlp(d):
    rngs = nnx.Rngs(0)
    linear = functools.partial(nnx.Linear, param_dtype=d, rngs=rngs)
    return nnx.Sequential(linear(6, 16), nnx.tanh, linear(16, 4))


def few_rows(d, pattern, gradient=meprop.value_and_grad, make=mlp, x=None, **options):
    change = lambda model: meprop.meprop(model, 0.25, pattern=pattern, tile=4, **options)  # noqa: E731
    x = normal(9, 6) if x is None else x
    return of_module(make(d), x, change, gradient=gradient, some=True)


def convolutions(d):
    conv = functools.partial(nnx.Conv, kernel_size=(3, 3), param_dtype=d, rngs=nnx.Rngs(0))
    return nnx.Sequential(conv(3, 8), nnx.tanh, conv(8, 4))


def einsum(d):
    made = {"param_dtype": d, "rngs": nnx.Rngs(0)}
    first = nnx.Einsum("bi,io->bo", (6, 16), (16,), **made)
    return nnx.Sequential(first, nnx.tanh, nnx.Linear(16, 4, **made))


def steps_by_rows(d):
    model = mlp(d)
    meprop.meprop(model, 0.25)
    graph, params = nnx.split(model, nnx.Param)
    tx = optax.chain(
        meprop.clip_by_global_norm(0.1), meprop.row_sparse_adam(1e-2, weight_decay=0.1)
    )

    def run(params, x):
        state = tx.init(params)
        loss = lambda params, x: mean_square(nnx.merge(graph, params), x)  # noqa: E731
        for _ in range(2):
            _, grads = meprop.value_and_grad(loss)(params, x)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.leaves(params)

    return Case(run, (params, normal(9, 6)))


def residual(w, x):
    return x + jnp.float32(0.1).astype(x.dtype) * jnp.tanh(x @ w)


def blocks_at_once(d, **options):
    def run(scan):
        def loss(w, x, b):
            y, aux = scan(lambda w, x: (residual(w, x) + b[None], jnp.sum(x)), w, x)
            return jnp.sum(y**2) + jnp.sum(aux)

        return jax.value_and_grad(loss, (0, 1, 2))

    ours = lambda f, w, x: highway.highway_scan(f, w, x, has_aux=True, **options)  # noqa: E731
    plain = lambda f, w, x: jax.lax.scan(lambda x, w: f(w, x), x, w)  # noqa: E731
    return Case(run(ours), (normal(6, 4, 4), normal(3, 4, seed=1), normal(4, seed=2)), run(plain))


def few_rounds(d):
    return blocks_at_once(d, iterations=3, guard=False)._replace(plain=None)


class Block(nnx.Module):
    def __init__(self, d, seed):
        made = {"param_dtype": d, "rngs": nnx.Rngs(seed)}
        self.up, self.down = nnx.Linear(6, 8, **made), nnx.Linear(8, 6, **made)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


class Tower(nnx.Module):
    def __init__(self, d):
        self.blocks = nnx.List([Block(d, seed) for seed in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class AtOnce(Tower):
    def __call__(self, x):
        return highway.highway_nnx(self.blocks, x, iterations=3, tol=0.0)


def modules_at_once(d):
    return of_module(Tower(d), normal(3, 6), lambda m: object.__setattr__(m, "__class__", AtOnce))


def products_saved(d):
    save = lambda model: [save_products(block, in_scan=False) for block in blocks(model)]  # noqa: E731
    return of_module(Tower(d), normal(2, 3, 6), save)


def flat_products(d):
    change = lambda model: setattr(model, "dot_general", exact.dot_general)  # noqa: E731
    return of_module(nnx.Linear(6, 4, param_dtype=d, rngs=nnx.Rngs(0)), normal(2, 3, 6), change)


def labelled_positions(d):
    labels = np.arange(15).reshape(3, 5) % 11
    where = labels > 3

    def plain(hidden, kernel, bias):
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel + bias, labels)
        return jnp.sum(jnp.where(where, losses, 0)) / where.sum()

    def ours(hidden, kernel, bias):
        return exact.cross_entropy(hidden, kernel, jnp.asarray(labels), where, bias=bias, chunk=4)

    args = normal(3, 5, 4), normal(4, 11, seed=1), normal(11, seed=2)
    return Case(jax.value_and_grad(ours, (0, 1, 2)), args, jax.value_and_grad(plain, (0, 1, 2)))


def sparse_weight(d, backend):
    mask = np.random.default_rng(0).random((16, 24)) < 0.1
    pattern, places = sparse.make_pattern(mask), np.nonzero(mask)

    if backend == "native" and d == np.float64:
        backend = None  # these have none

    def ours(x, values):
        return jnp.sum(jnp.sin(sparse.sparse_linear(x, values, pattern, backend=backend)))

    def plain(x, values):
        return jnp.sum(jnp.sin(x @ jnp.zeros(mask.shape, values.dtype).at[places].set(values).T))

    args = normal(5, 24), normal(len(places[0]), seed=1)
    return Case(jax.value_and_grad(ours, (0, 1)), args, jax.value_and_grad(plain, (0, 1)))


def sparse_layers(d):
    made = {"param_dtype": d, "rngs": nnx.Rngs(0)}
    conv = sparse.SparseConv(4, 8, (3, 3), sparsity=0.8, **made)
    model = nnx.Sequential(conv, sparse.SparseLinear(8, 16, sparsity=0.9, **made))
    dense = lambda layer: layer.to_dense()  # noqa: E731
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def value(change):
        def loss(params, x):
            model = nnx.merge(graph, params, rest)
            for layer in model.layers:
                x = change(layer)(x)
            return jnp.mean(x**2)

        return lambda params, x: jax.tree.leaves(jax.value_and_grad(loss)(params, x))

    return Case(value(lambda layer: layer), (params, normal(2, 5, 5, 4)), value(dense))


def layers_of_a_stack(d):
    rows = np.array([1, 4], np.int32)

    def ours(w, x, rows):
        loss = lambda p, x: jnp.sum(partial.stack(residual, p["w"], x) ** 2)  # noqa: E731
        grad_fn = partial.value_and_grad(loss, {"w": rows}, stacked_axis=lambda _: 0)
        return densify(grad_fn({"w": w}, x))

    def plain(w, x, rows):
        scan = lambda w: jax.lax.scan(lambda x, w: (residual(w, x), None), x, w)[0]  # noqa: E731
        value, grads = jax.value_and_grad(lambda w: jnp.sum(scan(w) ** 2))(w)
        return value, {"w": jnp.zeros_like(grads).at[rows].set(grads[rows])}

    return Case(ours, (normal(6, 4, 4), normal(3, 4, seed=1), rows), plain)


CELLS = {"gru": nnx.GRUCell, "lstm": nnx.LSTMCell, "fused lstm": nnx.OptimizedLSTMCell}
CASES: dict[str, Callable[[Any], Case]] = {
    **{f"lean {n}": lambda d, c=c: recurrent(d, c, rnn.lean_rnn) for n, c in CELLS.items()},
    "lean, lengths": lambda d: recurrent(d, nnx.LSTMCell, rnn.lean_rnn, with_lengths),
    "rounds gru": lambda d: recurrent(d, nnx.GRUCell, rounds),
    "rounds lstm": lambda d: recurrent(d, nnx.LSTMCell, rounds, with_lengths),
    "meprop gru": lambda d: few_columns_of_gates(d, nnx.GRUCell),
    "meprop lstm": lambda d: few_columns_of_gates(d, nnx.LSTMCell),
    "linen gru": lambda d: recurrent_of_linen(d, linen.GRUCell),
    "linen lstm": lambda d: recurrent_of_linen(d, linen.OptimizedLSTMCell),
    "meprop rows": lambda d: few_rows(d, "unified"),
    "meprop tiles": lambda d: few_rows(d, "tile"),
    "meprop random": lambda d: few_rows(d, "random"),
    "meprop arrays": lambda d: few_rows(d, "unified", None, transpose=False),
    "meprop examples": lambda d: few_rows(d, "example", None, transpose=False)._replace(plain=None),
    "meprop conv": lambda d: few_rows(d, "unified", None, convolutions, normal(2, 5, 5, 3)),
    "meprop einsum": lambda d: few_rows(d, "unified", None, einsum),
    "meprop steps": steps_by_rows,
    "highway scan": lambda d: blocks_at_once(d, iterations=6, tol=0.0),
    "highway scan, no guard": lambda d: blocks_at_once(d, iterations=4, guard=False)._replace(
        plain=None
    ),
    "highway modules": modules_at_once,
    "exact products saved": products_saved,
    "exact flat products": flat_products,
    "exact cross entropy": labelled_positions,
    "sparse native": lambda d: sparse_weight(d, "native"),
    "sparse csr": lambda d: sparse_weight(d, "csr"),
    "sparse masked": lambda d: sparse_weight(d, "masked"),
    "sparse layers": sparse_layers,
    "stack": layers_of_a_stack,
}


def as_dtype(tree, dtype):
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype) if floating(x) else x, tree)


@contextlib.contextmanager
def every_mode_at_once():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        yield


def results(function, args, dtype):
    found = jax.jit(lambda *args: function(*args))(*as_dtype(args, dtype))
    return [np.asarray(x) for x in jax.tree.leaves(found)]


def assert_close(found, expected, some, rtol):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        a = a.T if a.shape != b.shape else a  # meProp has kernels (out, in)
        b = np.where(a == 0, 0, b) if some else b
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0))


@pytest.mark.parametrize("name", CASES)
def test_every_mode_at_once_and_float64(name):
    case, narrow = CASES[name](np.float32), CASES[name](jnp.bfloat16)
    alone = results(case.ours, case.args, np.float32)
    with every_mode_at_once():
        jax.eval_shape(lambda *args: narrow.ours(*args), *as_dtype(case.args, jnp.bfloat16))
        with jax.enable_x64(True):
            wide = CASES[name](np.float64)
            strict = results(case.ours, case.args, np.float32)
            found = results(wide.ours, case.args, np.float64)
    assert [x.dtype for x in strict] == [x.dtype for x in alone]
    assert_close(strict, alone, False, 1e-5)
    assert {x.dtype for x in found} == {np.dtype(np.float64)}
    if wide.plain is None:
        assert_close(found, alone, False, 1e-4)
    else:
        with jax.enable_x64(True):
            assert_close(found, results(wide.plain, case.args, np.float64), wide.some, 1e-11)
    assert not wide.some or sum(map(np.count_nonzero, found)) < sum(x.size for x in found)
