"""Convolutions with a sparse kernel against loops over their taps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse.csr_conv import conv_backward, conv_forward
from priorityprop_jax.sparse.geometry import ConvGeometry
from priorityprop_jax.sparse.pattern import make_pattern

FORWARD = jax.jit(conv_forward, static_argnames="geometry")
BACKWARD = jax.jit(conv_backward, static_argnames=("geometry", "inputs", "weights"))


def dense(kernel, x, dy, geometry):
    """The output, and the gradients of `x` and of the kernel, by the definition."""
    (sh, sw), (dh, dw), groups = geometry.strides, geometry.dilation, geometry.groups
    padding = ((0, 0), *geometry.padding, (0, 0))
    kernel, x, dy = (a.astype(np.float64) for a in (kernel, np.pad(x, padding), dy))
    y, dx, dkernel = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    height, width = dy.shape[1:3]
    outs, ins = kernel.shape[0] // groups, kernel.shape[1]
    for group in range(groups):
        o, c = slice(group * outs, (group + 1) * outs), slice(group * ins, (group + 1) * ins)
        for i in range(kernel.shape[2]):
            for j in range(kernel.shape[3]):
                rows = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
                at = (slice(None), rows, columns, c)
                y[..., o] += x[at] @ kernel[o, :, i, j].T
                dx[at] += dy[..., o] @ kernel[o, :, i, j]
                dkernel[o, :, i, j] = np.einsum("bhwo,bhwi->oi", dy[..., o], x[at])
    (top, bottom), (left, right) = geometry.padding
    dx = dx[:, top : dx.shape[1] - bottom, left : dx.shape[2] - right]
    return y, dx, dkernel


def case(geometry, size, *, ins, outs, batch=3, keep=0.3, spare=5, seed=0):
    rng = np.random.default_rng(seed)
    shape = (outs, ins // geometry.groups, *geometry.kernel)
    mask = rng.random(shape) < keep
    kernel = np.where(mask, rng.normal(size=shape), 0).astype(np.float32)
    flat = mask.reshape(outs, -1)
    pattern = make_pattern(flat, capacity=mask.sum() + spare)
    values = np.full(pattern.capacity, np.nan, np.float32)
    values[: mask.sum()] = kernel[mask]
    x = rng.normal(size=(batch, *size, ins)).astype(np.float32)
    dy = rng.normal(size=(batch, *geometry.output(size), outs)).astype(np.float32)
    return pattern, jnp.asarray(values), x, dy, kernel, mask


def close(result, expected):
    assert result.shape == expected.shape
    largest = np.max(np.abs(expected), initial=0)
    assert np.max(np.abs(np.asarray(result) - expected), initial=0) <= 1e-6 * largest


SAME = ((1, 1), (1, 1))
CASES = {
    "3x3": (ConvGeometry((3, 3), padding=SAME), (6, 7), {"ins": 5, "outs": 4}),
    "strides, dilation": (
        ConvGeometry((3, 2), (2, 3), ((2, 0), (0, 1)), (2, 3)),
        (8, 9),
        {"ins": 3, "outs": 4},
    ),
    "strides past the kernel": (ConvGeometry((1, 2), (3, 4)), (8, 9), {"ins": 3, "outs": 4}),
    "groups": (
        ConvGeometry((2, 3), (1, 2), SAME, (1, 1), 2),
        (5, 6),
        {"ins": 6, "outs": 4, "spare": 0},
    ),
    "depthwise, few": (
        ConvGeometry((3, 3), (1, 1), SAME, (1, 1), 8),
        (5, 5),
        {"ins": 8, "outs": 8},
    ),
    "groups, few places": (
        ConvGeometry((3, 3), (1, 1), SAME, (1, 1), 2),
        (5, 5),
        {"ins": 16, "outs": 8, "keep": 0.04},
    ),
    "ragged tiles of images": (
        ConvGeometry((3, 3), padding=SAME),
        (16, 17),
        {"ins": 3, "outs": 2, "batch": 5},
    ),
}


def assert_dense(geometry, size, **options):
    pattern, values, x, dy, kernel, mask = case(geometry, size, **options)
    y, dx, dkernel = dense(kernel, x, dy, geometry)
    close(FORWARD(values, pattern, x, geometry), y)
    dx_, dvalues = BACKWARD(values, pattern, x, dy, geometry)
    close(dx_, dx)
    close(dvalues[: mask.sum()], dkernel[mask])
    assert not np.asarray(dvalues[mask.sum() :]).any()


@pytest.mark.parametrize("name", CASES)
def test_convolutions_are_those_of_the_dense_kernel(name):
    geometry, size, options = CASES[name]
    assert_dense(geometry, size, **options)


def test_halves_that_are_not_wanted_are_none():
    geometry, size, options = CASES["3x3"]
    pattern, values, x, dy, _, _ = case(geometry, size, **options)
    for inputs, weights in ((True, False), (False, True), (False, False)):
        dx, dvalues = jax.eval_shape(
            lambda *a, i=inputs, w=weights: conv_backward(*a, geometry, inputs=i, weights=w),
            *(values, pattern, x, dy),
        )
        assert (dx is not None, dvalues is not None) == (inputs, weights)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_no_places_and_all_places(keep):
    geometry, size, _ = CASES["3x3"]
    assert_dense(geometry, size, ins=2, outs=3, keep=keep)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_what_the_dense_convolution_reads(bad):
    geometry, size, options = CASES["3x3"]
    pattern, values, x, dy, _, mask = case(geometry, size, **options)
    x[0, 2, 3, 1] = dy[1, 4, 0, 2] = bad
    # The places that read an entry, from a dense product of ones.
    marks = [np.where(np.isfinite(a), 0.0, 1.0) for a in (x, dy)]
    reads_x, reads_dy, _ = dense(mask, *marks, geometry)
    y = FORWARD(values, pattern, x, geometry)
    np.testing.assert_array_equal(~np.isfinite(y), reads_x > 0)
    dx, _ = BACKWARD(values, pattern, x, dy, geometry)
    np.testing.assert_array_equal(~np.isfinite(dx), reads_dy > 0)


@pytest.mark.parametrize("empty", ["batch", "output"])
def test_nothing_to_compute(empty):
    geometry = ConvGeometry((3, 3))
    x = jnp.ones((0, 4, 4, 2) if empty == "batch" else (1, 2, 4, 2))
    pattern = make_pattern(np.ones((3, 18)))
    values = jnp.ones(pattern.capacity)
    y = conv_forward(values, pattern, x, geometry)
    assert y.shape == (x.shape[0], *geometry.output(x.shape[1:3]), 3)
    dx, dvalues = conv_backward(values, pattern, x, y, geometry)
    assert dx.shape == x.shape and not dx.any()
    assert dvalues.shape == values.shape and not dvalues.any()


@pytest.mark.parametrize(
    ("pattern", "geometry", "message"),
    [
        (make_pattern(np.ones((4, 4)), block=2), ConvGeometry((1, 1)), "blocks of side 2"),
        (make_pattern(np.ones((3, 18))), ConvGeometry((3, 3), groups=2), "2 groups must divide"),
        (make_pattern(np.ones((4, 9))), ConvGeometry((3, 3)), "has 9 columns.* has 36"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(pattern, geometry, message):
    x = jnp.ones((1, 5, 5, 4))
    values = jnp.ones((pattern.capacity, *(pattern.block,) * 2 * (pattern.block > 1)))
    with pytest.raises(ValueError, match=message):
        conv_forward(values, pattern, x, geometry)
    with pytest.raises(ValueError, match=message):
        conv_backward(values, pattern, x, jnp.ones((1, 3, 3, 4)), geometry)
