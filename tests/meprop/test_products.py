"""meProp's products and convolutions against the paper's formula, written out slowly."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from priorityprop_jax.core.program import program_flops
from priorityprop_jax.core.rows import densify
from priorityprop_jax.core.selection import at_random, resolve_k, seed_of
from priorityprop_jax.meprop import (
    meprop,
    meprop_conv_general_dilated,
    meprop_dot_general,
    value_and_grad,
)

PATTERNS = ("example", "unified", "tile", "random")
COLUMNS = (((1,), (0,)), ((), ()))  # kernel (in, out)
ROWS = (((1,), (1,)), ((), ()))  # kernel (out, in)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def kept(dy, pattern, k, tile, seed=0, name=""):
    """The paper's rule for one matrix of output gradients: dy where it is kept, 0 elsewhere."""
    dy = np.asarray(dy)
    rows, n = dy.shape
    mask = np.zeros((rows, n), bool)
    if pattern == "example":
        for m in range(rows):
            order = sorted(range(n), key=lambda j: (-abs(dy[m, j]), j))
            mask[m, order[:k]] = True
    elif pattern == "random":
        mask[:, np.asarray(at_random(jnp.asarray(dy), k, seed_of(name, seed)))] = True
    else:
        width = tile if pattern == "tile" else 1
        totals = [float(np.abs(dy[:, b : b + width]).sum()) for b in range(0, n, width)]
        order = sorted(range(len(totals)), key=lambda b: (-totals[b], b))
        for b in order[: k // width]:
            mask[:, b * width : (b + 1) * width] = True
    return np.where(mask, dy, 0)


def output_gradient(y):
    """Of the loss below."""
    return jnp.cos(y) * jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size


def loss(y):
    return jnp.sum(jnp.sin(y) * jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size)


@pytest.mark.parametrize("dims", [COLUMNS, ROWS])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_those_of_the_papers_formula(pattern, dims):
    x, w = normal(0, 6, 5), normal(1, *((5, 32) if dims is COLUMNS else (32, 5)))
    dot = meprop_dot_general(8, pattern=pattern, tile=4)
    y, pull = jax.vjp(lambda x, w: dot(x, w, dims), x, w)
    dx, dw = pull(output_gradient(y))

    matrix = np.asarray(w if dims is COLUMNS else w.T)
    dy = kept(output_gradient(y), pattern, 8, 4)
    np.testing.assert_allclose(dx, dy @ matrix.T, rtol=1e-5, atol=1e-5)
    expected = np.asarray(x).T @ dy
    np.testing.assert_allclose(dw, expected if dims is COLUMNS else expected.T, atol=1e-5)
    if pattern != "example":
        columns = np.any(np.asarray(dw) != 0, axis=0 if dims is COLUMNS else 1)
        assert columns.sum() == 8


BATCHED = ((((2,), (1,)), ((0,), (0,))), (2, 6, 5), (2, 5, 32))


@pytest.mark.parametrize(
    "pattern, dims, x_shape, w_shape",
    [
        *((pattern, *BATCHED) for pattern in PATTERNS),
        ("unified", COLUMNS, (6, 5), (5, 32)),
        ("unified", ROWS, (6, 5), (32, 5)),
        ("unified", (((1, 2), (0, 1)), ((), ())), (6, 5, 3), (5, 3, 4, 8)),  # several axes
        ("unified", (((1, 2), (2, 3)), ((), ())), (6, 5, 3), (4, 8, 5, 3)),
        ("unified", (((0,), (0,)), ((1,), (1,))), (5, 2, 6), (5, 2, 32)),
    ],
)
def test_all_features_make_the_ordinary_gradient(pattern, dims, x_shape, w_shape):
    x, w = normal(0, *x_shape), normal(1, *w_shape)

    def value_and_grads(dot):
        return jax.jit(jax.value_and_grad(lambda x, w: loss(dot(x, w, dims)), (0, 1)))(x, w)

    # Of two sizes the larger is the default, and it is every feature.
    value, grads = value_and_grads(meprop_dot_general((4, 32), pattern=pattern, tile=4))
    plain, expected = value_and_grads(lax.dot_general)
    assert value == plain
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_size_that_is_every_feature_is_the_plain_product():
    x, w = normal(0, 6, 5), normal(1, 5, 32)
    for k in (32, 1.0):
        assert not meprop_dot_general(k).rules(32)
        grads = jax.grad(lambda w: loss(meprop_dot_general(k)(x, w, COLUMNS)))(w)  # noqa: B023
        np.testing.assert_allclose(grads, jax.grad(lambda w: loss(x @ w))(w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_values_are_those_of_the_plain_layer_to_the_bit(pattern, dtype):
    x = normal(0, 3, 7, 24, dtype=dtype)
    plain = nnx.Linear(24, 40, dtype=dtype, rngs=nnx.Rngs(0))
    ours = nnx.Linear(
        24,
        40,
        dtype=dtype,
        rngs=nnx.Rngs(0),
        dot_general=meprop_dot_general(4, pattern=pattern, tile=4),
    )
    for run in (lambda f: f, nnx.jit):
        assert jnp.array_equal(run(plain)(x), run(ours)(x))
    grads = nnx.grad(lambda layer: layer(x).astype(jnp.float32).sum())(ours)
    assert grads["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("pattern", ["unified", "tile", "random"])
@pytest.mark.parametrize("dims", [COLUMNS, ROWS])
def test_compiled_flops_fall_with_k(pattern, dims):
    x = normal(0, 64, 64)
    w = normal(1, 64, 128) if dims is COLUMNS else normal(1, 128, 64)

    def flops(dot):
        def backward(x, w, dy):
            return jax.vjp(lambda x, w: dot(x, w, dims), x, w)[1](dy)

        return program_flops(jax.jit(backward).lower(x, w, normal(2, 64, 128)).compile())

    dense = flops(lax.dot_general)
    assert flops(meprop_dot_general(16, pattern=pattern)) < 0.3 * dense


def test_random_choice_has_its_share_of_the_gradient_as_its_mean():
    x, w, dy = normal(0, 4, 3), normal(1, 3, 16), normal(2, 4, 16)
    dot = meprop_dot_general(4, pattern="random")
    # The draw follows the bits of the gradients, so these are 1,000 draws for nearly the same.
    dys = dy * (1 + 1e-6 * normal(3, 1000, 4, 16))
    pull = jax.vjp(lambda w: dot(x, w, COLUMNS), w)[1]
    mean = jax.jit(jax.vmap(lambda dy: pull(dy)[0]))(dys).mean(0)
    exact = x.T @ dy
    spread = jnp.linalg.norm(4 * mean - exact) / jnp.linalg.norm(exact)
    assert spread < 0.11  # sqrt((16 - 4) / 4 / 1000) is 0.055


def test_random_draws_are_uniform_and_follow_the_gradients():
    draw = jax.jit(jax.vmap(lambda dy: at_random(dy, 3, 7)))
    dys = normal(0, 600, 2, 12)
    columns = np.asarray(draw(dys))
    counts = np.bincount(columns.ravel(), minlength=12)
    assert counts.sum() == 1800
    assert 110 < counts.min() and counts.max() < 190  # 150 each, 12 apart
    assert np.array_equal(columns, draw(dys))
    assert np.all(np.diff(columns, axis=1) > 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("place", [0, 31])
def test_nan_is_never_dropped(pattern, place):
    x, w = normal(0, 6, 5), normal(1, 5, 32)
    dy = normal(2, 6, 32).at[3, place].set(jnp.nan)
    dot = meprop_dot_general(4, pattern=pattern, tile=4)
    dx, dw = jax.jit(lambda x, w: jax.vjp(lambda x, w: dot(x, w, COLUMNS), x, w)[1](dy))(x, w)
    assert jnp.isnan(dx[3]).all() and jnp.isnan(dw).any()


def test_exact_setting_passes_check_grads():
    x, w = normal(0, 4, 5), normal(1, 5, 8)
    dot = meprop_dot_general((2, 8))
    check_grads(lambda x, w: dot(x, w, COLUMNS), (x, w), order=2, modes=["rev"], eps=1e-2)


def test_second_derivatives_work_and_forward_mode_is_an_error():
    x, w = normal(0, 4, 5), normal(1, 5, 8)
    dot = meprop_dot_general(3)
    hessian = jax.grad(lambda w: jnp.sum(jax.grad(lambda w: loss(dot(x, w, COLUMNS)))(w) ** 2))(w)
    assert jnp.isfinite(hessian).all() and jnp.any(hessian != 0)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda w: dot(x, w, COLUMNS), (w,), (w,))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_transformations(pattern):
    dot = meprop_dot_general(4, pattern=pattern, tile=4)
    xs, w = normal(0, 3, 6, 5), normal(1, 5, 32)

    def gradient(x, w, wrap=lambda f: f):
        return jax.grad(lambda w: loss(wrap(lambda w: dot(x, w, COLUMNS))(w)))(w)

    one = jax.jit(gradient)
    each = np.stack([one(x, w) for x in xs])
    together = jax.jit(jax.vmap(lambda x: gradient(x, w)))(xs)
    np.testing.assert_allclose(together, each, atol=1e-5)
    np.testing.assert_allclose(gradient(xs[0], w), each[0], atol=1e-5)
    again = jax.jit(lambda x: gradient(x, w, jax.checkpoint))(xs[0])
    np.testing.assert_allclose(again, each[0], atol=1e-5)

    def scanned(w):
        return lax.scan(lambda total, x: (total + loss(dot(x, w, COLUMNS)), None), 0.0, xs)[0]

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(w), each.sum(0), atol=1e-4)


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data")])
def test_a_mesh_makes_the_same_choice(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = normal(0, 16, 8), normal(1, 8, 64)
    step = jax.jit(jax.grad(lambda x, w: loss(meprop_dot_general(8)(x, w, COLUMNS)), (0, 1)))
    expected = step(x, w)
    placed = (
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
        jax.device_put(w, NamedSharding(mesh, spec)),
    )
    for got, want in zip(step(*placed), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_shard_map_gives_each_shard_its_pattern():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = normal(0, 16, 8), normal(1, 8, 32)

    def gradient(x, w):
        return jax.grad(lambda x: loss(meprop_dot_general(4)(x, w, COLUMNS)))(x)

    spread = jax.jit(
        jax.shard_map(
            gradient, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()),
            out_specs=PartitionSpec("data"),
        )
    )  # fmt: skip
    expected = jnp.concatenate([gradient(part, w) for part in jnp.split(x, 8)])
    np.testing.assert_allclose(spread(x, w), expected, atol=1e-5)


def test_sizes_are_sorted_and_the_rules_of_k_are_kept():
    dot = meprop_dot_general((0.5, 2, 0.1), name="mlp")
    assert [rule.k for rule in dot.rules(20)] == [2, 10]
    assert resolve_k(1, 7) == 1 and resolve_k(0.001, 7) == 1 and resolve_k(np.int64(3), 7) == 3


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"k": 0}, ValueError, "at least 1"),
        ({"k": 1.5}, ValueError, "fraction"),
        ({"k": math.nan}, ValueError, "fraction"),
        ({"k": "3"}, TypeError, "k must be"),
        ({"k": True}, TypeError, "k must be"),
        ({"k": ()}, ValueError, "empty"),
        ({"k": 3, "pattern": "rows"}, ValueError, "pattern"),
        ({"k": 3, "tile": 0}, ValueError, "tile"),
    ],
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        meprop_dot_general(**options)
    with pytest.raises(error, match=match):
        meprop_conv_general_dilated(**options)


def test_impossible_k_names_the_layer_and_its_width():
    x, w = normal(0, 6, 5), normal(1, 5, 32)
    with pytest.raises(ValueError, match="k=33 is more than the 32 output features of layer 'mlp'"):
        meprop_dot_general(33, name="mlp")(x, w, COLUMNS)
    with pytest.raises(ValueError, match="32 output features of layer 'mlp' are no multiple"):
        meprop_dot_general(3, pattern="tile", tile=5, name="mlp")(x, w, COLUMNS)


# Layers of Flax.


def test_layers_of_nnx_and_linen_take_it():
    dot = meprop_dot_general(4)
    x = normal(0, 3, 6, 8)

    def check(grads, columns):
        kernel = np.asarray(grads).reshape(-1, columns)
        assert np.any(kernel != 0, axis=0).sum() == 4

    layer = nnx.LinearGeneral((8,), (4, 8), dot_general=dot, rngs=nnx.Rngs(0))
    check(nnx.jit(nnx.grad(lambda m: loss(m(x))))(layer)["kernel"], 32)
    made = functools.partial(meprop_dot_general, 4)
    for options in ({"dot_general": dot}, {"dot_general_cls": made}):
        dense = linen.Dense(32, **options)
        params = {"params": {"kernel": normal(1, 8, 32), "bias": normal(2, 32)}}
        check(jax.grad(lambda p: loss(dense.apply(p, x)))(params)["params"]["kernel"], 32)  # noqa: B023
        plain = linen.Dense(32).apply(params, x)
        assert jnp.array_equal(dense.apply(params, x), plain)
    attention = linen.MultiHeadDotProductAttention(
        2, qkv_features=32, out_features=32, qkv_dot_general=dot, out_dot_general=dot
    )
    shapes = jax.eval_shape(attention.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(3, *leaf.shape), shapes)
    grads = jax.jit(jax.grad(lambda p: loss(attention.apply(p, x))))(params)["params"]
    for name in ("query", "value", "out"):
        check(grads[name]["kernel"], 32)


# Convolutions.


def convolution(kernel, x, dot, *, groups=1, **options):
    return dot(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups, **options,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_convolution_keeps_channels(pattern, groups):
    x, kernel = normal(0, 2, 5, 5, 4), normal(1, 3, 3, 4 // groups, 16)
    ours = meprop_conv_general_dilated(4, pattern=pattern, tile=2)
    y = convolution(kernel, x, lax.conv_general_dilated, groups=groups)
    got = jax.grad(lambda k, x: loss(convolution(k, x, ours, groups=groups)), (0, 1))(kernel, x)

    # The reference: the plain convolution's gradients for the output gradient that is kept.
    rows = np.asarray(output_gradient(y)).reshape(-1, 16)
    width = 16 // groups
    parts = [
        kept(rows[:, g * width : (g + 1) * width], pattern, 4 // groups, 2, 0, "")
        if pattern != "random"
        else None
        for g in range(groups)
    ]
    if pattern == "random":
        channels = np.any(np.asarray(got[0]) != 0, axis=(0, 1, 2))
        assert channels.sum() == 4
        dy = np.where(channels, rows, 0)
    else:
        dy = np.concatenate(parts, axis=1)
    _, pull = jax.vjp(
        lambda k, x: convolution(k, x, lax.conv_general_dilated, groups=groups), kernel, x
    )
    for a, b in zip(got, pull(jnp.asarray(dy).reshape(y.shape)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_convolution_with_all_channels_is_exact_and_its_flops_fall_with_k(pattern):
    x = normal(0, 2, 8, 8, 4)
    layers = {
        k: nnx.Conv(
            4, 32, (3, 3), strides=2, padding="CIRCULAR", kernel_dilation=2, rngs=nnx.Rngs(0),
            conv_general_dilated=meprop_conv_general_dilated(k, pattern=pattern, tile=2),
        )
        for k in (4, 1.0, (4, 32))
    }  # fmt: skip
    plain = nnx.Conv(
        4, 32, (3, 3), strides=2, padding="CIRCULAR", kernel_dilation=2, rngs=nnx.Rngs(0)
    )

    def gradient(layer):
        return nnx.grad(lambda m: loss(m(x)))(layer)["kernel"]

    def flops(layer):
        graph, state = nnx.split(layer)
        dy = jnp.ones_like(plain(x))
        pull = lambda s, x: jax.vjp(lambda s, x: nnx.merge(graph, s)(x), s, x)[1](dy)  # noqa: E731
        return program_flops(jax.jit(pull).lower(state, x).compile())

    for layer in layers.values():
        assert jnp.array_equal(layer(x), plain(x))
    np.testing.assert_allclose(gradient(layers[1.0]), gradient(plain), atol=1e-5)
    np.testing.assert_allclose(gradient(layers[4, 32]), gradient(plain), atol=1e-5)
    assert not np.allclose(gradient(layers[4]), gradient(plain))
    if pattern != "example":
        assert flops(layers[4]) < 0.35 * flops(plain)


def test_convolution_nan_depthwise_and_linen():
    x, kernel = normal(0, 2, 5, 5, 4), normal(1, 3, 3, 1, 4)
    ours = meprop_conv_general_dilated(2)
    # One channel a group: each group keeps its own.
    got = jax.grad(lambda k: loss(convolution(k, x, ours, groups=4)))(kernel)
    plain = jax.grad(lambda k: loss(convolution(k, x, lax.conv_general_dilated, groups=4)))(kernel)
    np.testing.assert_allclose(got, plain, atol=1e-5)

    conv = linen.Conv(16, (3, 3), conv_general_dilated=meprop_conv_general_dilated(2))
    params = {"params": {"kernel": normal(1, 3, 3, 4, 16), "bias": normal(2, 16)}}
    grads = jax.jit(jax.grad(lambda p: loss(conv.apply(p, x))))(params)["params"]["kernel"]
    assert np.any(np.asarray(grads) != 0, axis=(0, 1, 2)).sum() == 2
    for pattern in PATTERNS:
        dot = meprop_conv_general_dilated(2, pattern=pattern, tile=2)
        _, pull = jax.vjp(lambda k: convolution(k, x, dot), normal(2, 3, 3, 4, 16))  # noqa: B023
        (dk,) = pull(normal(3, 2, 5, 5, 16).at[0, 1, 1, 15].set(jnp.nan))
        assert jnp.isnan(dk).any()


@pytest.mark.parametrize("text", ["ab,cd->abcd", "ab,c->abc", "ab,b->ab", "ab,bd->abd"])
def test_einsum_without_a_contraction(text):
    class Model(nnx.Module):
        def __init__(self):
            shapes = {"b": 3, "c": 4, "d": 5}
            shape = tuple(shapes[c] for c in text.split("->")[0].split(",")[1])
            init = nnx.initializers.normal()
            self.layer = nnx.Einsum(text, shape, kernel_init=init, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)

    x = normal(0, 6, 3)
    for k in (0.5, 1.0):
        model = Model()
        plain = model(x)
        meprop(model, k, layers=nnx.Einsum)
        np.testing.assert_array_equal(model(x), plain)
        function = lambda model: loss(model(x))  # noqa: E731
        _, grads = value_and_grad(function)(model)
        expected = nnx.grad(function)(model)
        found = densify(grads)["layer"]["kernel"][...]
        np.testing.assert_allclose(found, expected["layer"]["kernel"][...], rtol=1e-5, atol=1e-6)


def test_fractions_may_be_those_of_numpy():
    for k in (0.5, np.float32(0.5), np.float64(0.5), (np.float32(0.5), np.float16(0.25))):
        for groups in (1, 2):
            assert meprop_dot_general(k).rules(16, groups)[-1].k == 8 // groups
    assert meprop_dot_general(np.int64(4)).rules(16, 2)[-1].k == 2
