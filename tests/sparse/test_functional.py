"""Sparse layers as functions against dense sums in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from priorityprop_jax.sparse import native
from priorityprop_jax.sparse.functional import sparse_conv, sparse_linear
from priorityprop_jax.sparse.layers import SparseConv
from priorityprop_jax.sparse.pattern import make_pattern, mask_of

AVAILABLE, STATUS = native.native_status()
needs_native = pytest.mark.skipif(not AVAILABLE, reason=STATUS)
NATIVE = pytest.param("native", marks=needs_native)
TOLERANCE = 1e-6


def close(result, expected, largest=None):
    """Errors relative to the largest entry, or to that of a larger array."""
    assert result.shape == expected.shape
    largest = np.max(np.abs(expected if largest is None else largest), initial=0)
    worst = np.max(np.abs(np.asarray(result, np.float64) - expected), initial=0)
    assert worst <= TOLERANCE * largest


def spoiled(pattern, rng):
    """Values with NaN at the places that are not used."""
    values = rng.normal(size=pattern.capacity).astype(np.float32)
    values[int(pattern.row_starts[-1]) :] = np.nan
    return values


def weight_of(values, pattern):
    """The dense weight in float64."""
    mask = mask_of(pattern)
    weight = np.zeros(mask.shape)
    weight[mask] = values[: mask.sum()]
    return weight


def masks(shape, rng):
    """From all to nothing, with lines that are empty, full, and a single place."""
    cases = [rng.random(shape) >= sparsity for sparsity in (0.0, 0.3, 0.9, 0.99, 1.0)]
    lines = rng.random(shape) < 0.3
    lines[::3] = lines[:, 1::4] = False
    lines[4] = lines[:, 2] = True
    one = np.zeros(shape, bool)
    one[-1, -1] = True
    return [*cases, lines, one]


def linear_function(backend):
    """The output and both gradients, compiled."""

    @jax.jit
    def run(values, pattern, x, dy):
        y, pullback = jax.vjp(
            lambda values, x: sparse_linear(x, values, pattern, backend=backend), values, x
        )
        return y, *pullback(dy)

    return run


def check_linear(result, weight, mask, x, dy, taken):
    y, dvalues, dx = result
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    count = math.prod(x.shape[:-1])
    dense = dy.reshape(count, dy.shape[-1]).T @ x.reshape(count, x.shape[-1])
    close(y, x @ weight.T)
    close(dx, dy @ weight)
    close(dvalues[: len(taken(dense))], taken(dense), dense)
    assert not np.asarray(dvalues[len(taken(dense)) :]).any()


@pytest.mark.parametrize(
    ("backend", "batches"),
    [
        pytest.param("native", [(), (7,), (130,), (1, 3), (3, 1, 3)], marks=needs_native),
        ("csr", [(3, 3)]),
        ("masked", [(7,)]),
        (None, [(9,)]),
    ],
)
def test_products_of_all_sparsities_and_batches(backend, batches):
    rng = np.random.default_rng(0)
    shape, run = (37, 45), linear_function(backend)
    for batch in batches:
        x = rng.normal(size=(*batch, shape[1])).astype(np.float32)
        dy = rng.normal(size=(*batch, shape[0])).astype(np.float32)
        for mask in masks(shape, rng):
            pattern = make_pattern(mask, capacity=mask.size)
            values = spoiled(pattern, rng)
            result = run(values, pattern, x, dy)
            weight = weight_of(values, pattern)
            check_linear(result, weight, mask, x, dy, lambda dense, mask=mask: dense[mask])
    assert run._cache_size() == len(batches)


@pytest.mark.parametrize(
    ("backend", "cases"),
    [
        pytest.param("native", [((1, 70), 17, 0.4), ((5, 0), 2, 0.0)], marks=needs_native),
        ("csr", [((200, 6), 130, 0.02)]),
    ],
)
def test_products_of_other_shapes(backend, cases):
    rng = np.random.default_rng(1)
    run = linear_function(backend)
    for shape, batch, kept in cases:
        mask = rng.random(shape) < kept
        pattern = make_pattern(mask, capacity=int(mask.sum()) + 2)
        values = spoiled(pattern, rng)
        x = rng.normal(size=(batch, shape[1])).astype(np.float32)
        dy = rng.normal(size=(batch, shape[0])).astype(np.float32)
        result = run(values, pattern, x, dy)
        check_linear(
            result, weight_of(values, pattern), mask, x, dy, lambda dense, mask=mask: dense[mask]
        )


def reads(length, size, stride, dilation, padding):
    """For each output and tap of one axis, which input it reads, and whether it is none."""
    span = (size - 1) * dilation + 1
    if padding == "SAME":
        outputs = -(-length // stride)
        low = max((outputs - 1) * stride + span - length, 0) // 2
    else:
        low, high = {
            "VALID": (0, 0),
            "CAUSAL": (span - 1, 0),
            "CIRCULAR": ((span - 1) // 2, span // 2),
            "REFLECT": ((span - 1) // 2, span // 2),
        }.get(padding, padding)
        outputs = (length + low + high - span) // stride + 1
    places = np.arange(outputs)[:, None] * stride + np.arange(size) * dilation - low
    if padding == "CIRCULAR":
        places %= length
    elif padding == "REFLECT":
        places = np.abs(places)
        places = np.minimum(places, 2 * (length - 1) - places)
    inside = (places >= 0) & (places < length)
    return np.where(inside, places, 0), inside


def convolve(weight, x, dy, axes, groups):
    """``(y, dweight, dx)`` tap by tap; ``axes`` are what `reads` gives for height and width."""
    (ys, in_y), (xs, in_x) = axes
    outs, taps = weight.shape[0], (ys.shape[1], xs.shape[1])
    weight = weight.reshape(groups, outs // groups, -1, *taps)
    y, dx = np.zeros((len(x), len(ys), len(xs), outs)), np.zeros(x.shape)
    dy = dy.reshape(*y.shape[:3], groups, -1)
    dweight = np.zeros(weight.shape)
    for i, j in np.ndindex(*taps):
        inside = (in_y[:, i, None] & in_x[:, j])[None, :, :, None]
        index = (slice(None), ys[:, i, None], xs[None, :, j])
        patch = (x[index] * inside).reshape(*y.shape[:3], groups, -1)
        y += np.einsum("bhwgi,goi->bhwgo", patch, weight[..., i, j]).reshape(y.shape)
        dweight[..., i, j] = np.einsum("bhwgo,bhwgi->goi", dy, patch)
        back = np.einsum("bhwgo,goi->bhwgi", dy, weight[..., i, j])
        np.add.at(dx, index, back.reshape(*y.shape[:3], -1) * inside)
    return y, dweight.reshape(outs, -1), dx


# Input, channels out, kernel, groups, options: channels last, batch first.
CONVOLUTIONS = {
    "one image": ((1, 5, 5, 2), 3, (3, 3), {"padding": "VALID"}),
    "nine images": ((9, 4, 5, 3), 8, (2, 3), {"strides": 2}),
    "all options": (
        (7, 9, 8, 6),
        4,
        (3, 2),
        {
            "strides": (2, 1),
            "padding": ((2, 0), (1, 3)),
            "kernel_dilation": (1, 2),
            "feature_group_count": 2,
        },
    ),
    "circular": ((2, 6, 7, 2), 3, (4, 3), {"padding": "CIRCULAR", "strides": (1, 2)}),
    "reflect": ((2, 6, 7, 2), 3, (3, 3), {"padding": "REFLECT"}),
    "depthwise": ((2, 5, 6, 4), 8, (3, 3), {"feature_group_count": 4, "padding": 1}),
    "causal": ((3, 9, 4), 5, (3,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "circular sequence": ((130, 6, 3), 2, (5,), {"padding": "CIRCULAR"}),
    "sequence": ((3, 8, 6), 4, (3,), {"strides": 2, "feature_group_count": 2}),
}


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        pytest.param("native", [*CONVOLUTIONS][:-1], marks=needs_native),
        ("masked", ["sequence", "all options"]),
        (None, ["causal"]),
    ],
)
def test_convolutions(backend, names):
    for name in names:
        shape, outs, kernel, options = CONVOLUTIONS[name]
        rng = np.random.default_rng(4)
        groups, count = options.get("feature_group_count", 1), len(kernel)

        def each(option, count=count, options=options):
            found = options.get(option, 1)
            return (found,) * count if isinstance(found, int) else found

        padding = options.get("padding", "SAME")
        if isinstance(padding, int):
            padding = (padding, padding), (padding, padding)
        elif isinstance(padding, str):
            padding = (padding,) * count
        axes = [
            reads(*of_axis)
            for of_axis in zip(
                shape[1:-1], kernel, each("strides"), each("kernel_dilation"), padding, strict=True
            )
        ]
        sizes = tuple(len(places) for places, _ in axes)
        columns = shape[-1] // groups * int(np.prod(kernel))

        @jax.jit
        def run(values, pattern, x, dy, kernel=kernel, options=options):
            y, pullback = jax.vjp(
                lambda values, x: sparse_conv(
                    x, values, pattern, kernel_size=kernel, backend=backend, **options
                ),
                values,
                x,
            )
            return y, *pullback(dy)

        x = rng.normal(size=shape).astype(np.float32)
        dy = rng.normal(size=(shape[0], *sizes, outs)).astype(np.float32)
        if count == 1:  # as images of one row
            axes = [reads(1, 1, 1, 1, "VALID"), *axes]
        for kept in (0.0, 0.2, 1.0):
            mask = rng.random((outs, columns)) < kept
            pattern = make_pattern(mask, capacity=mask.size)
            values = spoiled(pattern, rng)
            y, dvalues, dx = run(values, pattern, x, dy)
            image, grad = (
                np.expand_dims(a.astype(np.float64), 1) if count == 1 else a.astype(np.float64)
                for a in (x, dy)
            )
            found = convolve(weight_of(values, pattern), image, grad, axes, groups)
            close(y, found[0].reshape(dy.shape))
            close(dx, found[2].reshape(shape))
            close(dvalues[: mask.sum()], found[1][mask], found[1])
            assert not np.asarray(dvalues[mask.sum() :]).any()


@pytest.mark.parametrize("backend", [NATIVE])
def test_filters_of_more_places_than_16_bits_count(backend):
    rng = np.random.default_rng(5)
    channels = 2**15 + 70
    pattern = make_pattern(np.ones((1, channels)))
    # Sums of small whole numbers are exact, so that not one place may be missing.
    values = rng.integers(-2, 3, channels).astype(np.float32)
    x = rng.integers(-2, 3, (3, 1, 1, channels)).astype(np.float32)

    @jax.jit
    def run(values, x):
        def loss(values, x):
            y = sparse_conv(x, values, pattern, kernel_size=(1, 1), backend=backend)
            return jnp.sum(y * jnp.arange(1.0, 4)[:, None, None, None]), y

        return jax.grad(loss, (0, 1), has_aux=True)(values, x)

    (dvalues, dx), y = run(values, x)
    np.testing.assert_array_equal(y[:, 0, 0, 0], x[:, 0, 0] @ values)
    np.testing.assert_array_equal(dvalues, np.arange(1, 4) @ x[:, 0, 0])
    np.testing.assert_array_equal(dx[:, 0, 0], np.arange(1, 4)[:, None] * values)


def test_batches_of_images_with_any_leading_axes():
    pattern = make_pattern(np.arange(24).reshape(2, 12) % 5 == 0)
    values = jnp.arange(1.0, pattern.capacity + 1)
    x = jnp.arange(90.0).reshape(6, 5, 3)  # six sequences

    @jax.jit
    def convolve(x):
        return sparse_conv(x, values, pattern, kernel_size=(4,))

    y = convolve(x)
    np.testing.assert_array_equal(convolve(x[0]), y[0])
    np.testing.assert_array_equal(convolve(x.reshape(1, 2, 3, 5, 3))[0, 1, 2], y[5])
    assert convolve(x[:0]).shape == (0, 5, 2)


def test_options_of_a_convolution_may_be_numbers_of_numpy():
    options = {"strides": 2, "padding": 1, "kernel_dilation": 2}
    numpy = {name: np.int64(option) for name, option in options.items()}
    sizes, x, rngs = (3, 2), jnp.ones((1, 7, 6, 2)), nnx.Rngs
    layers = [
        SparseConv(2, 3, sizes, sparsity=0.5, rngs=rngs(0), **given)
        for sizes, given in ((sizes, options), (np.array(sizes), numpy))
    ]
    np.testing.assert_array_equal(*(layer(x) for layer in layers))


def test_in_a_linen_module():
    class Layer(linen.Module):
        pattern: object
        features: int

        @linen.compact
        def __call__(self, x):
            values = self.param("values", linen.initializers.ones_init(), (self.pattern.capacity,))
            bias = self.param("bias", linen.initializers.zeros_init(), (self.features,))
            return sparse_linear(x, values, self.pattern) + bias

    mask = np.random.default_rng(6).random((4, 6)) < 0.5
    layer, x = Layer(make_pattern(mask), 4), jnp.arange(12.0).reshape(2, 6)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, params)["params"] == {"bias": (4,), "values": (mask.sum(),)}
    gradient = jax.jit(jax.grad(lambda params: layer.apply(params, x).sum()))(params)
    dense = np.ones((2, 4)).T @ np.asarray(x)
    np.testing.assert_allclose(gradient["params"]["values"], dense[mask], rtol=5e-6)


def test_input_that_does_not_fit_is_an_error():
    pattern = make_pattern(np.ones((4, 6)))
    values, x = (np.ones(shape, np.float32) for shape in (24, (2, 6)))
    with pytest.raises(ValueError, match=r"x must be \[..., 6\]"):
        sparse_linear(x[:, :5], values, pattern)
    with pytest.raises(ValueError, match=r"x must be \[..., 6\]"):
        sparse_linear(values[0], values, pattern)
    with pytest.raises(ValueError, match=r"values of this pattern must be \[24\]"):
        sparse_linear(x, values[1:], pattern)
    with pytest.raises(TypeError, match="x must be of a real floating-point dtype, got int32"):
        sparse_linear(x.astype(int), values, pattern)
    with pytest.raises(TypeError, match="values must be of a real floating-point dtype, got bool"):
        sparse_linear(x, values > 0, pattern)
    with pytest.raises(TypeError, match="got complex64"):
        sparse_linear(x + 1j, values, pattern)
    with pytest.raises(ValueError, match="backend must be one of"):
        sparse_linear(x, values, pattern, backend="dense")

    def conv(shape=(2, 5, 3), **options):
        options = {"kernel_size": (2,), **options}
        return sparse_conv(np.ones(shape, np.float32), values, pattern, **options)

    assert jax.eval_shape(conv).shape == (2, 5, 4)
    for options, message in [
        ({"shape": (2, 5, 4)}, "does not fit a kernel"),
        ({"shape": (3,)}, "does not fit a kernel"),
        ({"feature_group_count": 3, "shape": (2, 5, 9)}, "does not fit a kernel"),
        ({"feature_group_count": 0}, "does not fit a kernel"),
        ({"kernel_size": (1, 2, 1)}, "one or two axes"),
        ({"strides": 0}, "strides must be 1 positive"),
        ({"kernel_dilation": (1, 1)}, "kernel_dilation must be 1 positive"),
        ({"padding": "FULL"}, "padding 'FULL'"),
        ({"padding": ((1, 2, 3),)}, "padding must be"),
        ({"padding": -1}, "padding must be"),
        ({"padding": "CAUSAL", "kernel_size": (2, 1), "shape": (2, 5, 5, 3)}, "over 2 axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            conv(**options)
