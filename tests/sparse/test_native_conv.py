"""Native kernels of sparse convolutions, against sums over the places of the kernel in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import lax

from priorityprop_jax.sparse import native
from priorityprop_jax.sparse.pattern import ConvGeometry, make_pattern, mask_of

available, status = native.native_status()
needs_kernels = pytest.mark.skipif(not available, reason=status)

SAME = ((1, 1), (1, 1))
# Batch, height, width, in and out channels, geometry, share of the weight that is kept.
CASES = {
    "plain": (16, 6, 14, 16, 16, ConvGeometry((3, 3), padding=SAME), 0.3),
    "ragged": (19, 5, 9, 5, 7, ConvGeometry((3, 3), padding=SAME), 0.5),
    "one image": (1, 6, 5, 3, 4, ConvGeometry((3, 3), padding=SAME), 0.5),
    "wide": (2, 3, 40, 17, 37, ConvGeometry((3, 3), padding=SAME), 0.2),
    "pointwise": (33, 4, 7, 18, 34, ConvGeometry((1, 1)), 0.4),
    "strides": (17, 9, 8, 4, 6, ConvGeometry((3, 3), (2, 2), SAME), 0.5),
    "pointwise, strides": (4, 8, 7, 4, 6, ConvGeometry((1, 1), (2, 2)), 0.5),
    "strides past the kernel": (3, 12, 11, 3, 4, ConvGeometry((2, 1), (3, 4)), 0.8),
    "uneven": (
        18, 11, 13, 6, 4,
        ConvGeometry((2, 4), (3, 1), ((0, 2), (3, 1)), (1, 2), 2),
        0.6,
    ),
    "cropped": (5, 8, 9, 2, 3, ConvGeometry((2, 3), padding=((-1, -2), (2, -3))), 0.7),
    "dilated far": (4, 1, 60, 3, 2, ConvGeometry((1, 3), dilation=(1, 17)), 0.7),
    "larger than its input": (3, 2, 3, 2, 3, ConvGeometry((5, 7), padding=((2, 2), (3, 3))), 0.6),
    "depthwise": (6, 7, 7, 20, 40, ConvGeometry((3, 3), padding=SAME, groups=20), 0.6),
    "one row": (20, 1, 30, 8, 8, ConvGeometry((1, 5), (1, 2), ((0, 0), (2, 2))), 0.4),
    "one column": (3, 30, 1, 4, 4, ConvGeometry((5, 1), padding=((2, 2), (0, 0))), 0.4),
    "patches": (5, 12, 16, 3, 6, ConvGeometry((4, 4), (4, 4)), 0.5),
    "many in a filter": (2, 1, 2, 33000, 1, ConvGeometry((1, 1)), 1.0),
    "no places": (3, 4, 4, 2, 2, ConvGeometry((3, 3), (2, 1), SAME), 0.0),
    "no images": (0, 4, 4, 2, 2, ConvGeometry((3, 3)), 0.5),
    "no output": (2, 2, 2, 2, 2, ConvGeometry((3, 3)), 0.5),
}  # fmt: skip


def make(case, seed=0):
    """Arrays for a case: values, NaN where they must not be read, the pattern, x, dy, geometry."""
    batch, height, width, ins, outs, geometry, kept = case
    rng = np.random.default_rng(seed)
    places = ins // geometry.groups * np.prod(geometry.kernel)
    mask = rng.random((outs, places)) < kept
    pattern = make_pattern(mask, capacity=int(mask.sum()) + 3)
    values = rng.standard_normal(pattern.capacity).astype(np.float32)
    values[mask.sum() :] = np.nan
    x = rng.standard_normal((batch, height, width, ins)).astype(np.float32)
    dy = rng.standard_normal((batch, *geometry.output((height, width)), outs)).astype(np.float32)
    return values, pattern, x, dy, geometry


def reference(values, pattern, x, dy, geometry):
    """``(y, dx, dvalues)``, place of the kernel by place of the kernel."""
    mask = mask_of(pattern)
    weight = np.zeros(mask.shape)
    weight[mask] = values[: mask.sum()]
    groups, (height, width) = geometry.groups, geometry.kernel
    weight = weight.reshape(groups, mask.shape[0] // groups, -1, height, width)
    (top, bottom), (left, right) = (np.maximum(pair, 0) for pair in geometry.padding)
    crops = [slice(max(-lo, 0), -max(-hi, 0) or None) for lo, hi in geometry.padding]
    pads = ((0, 0), (top, bottom), (left, right), (0, 0))
    padded = np.pad(x.astype(np.float64), pads)[:, crops[0], crops[1]]
    dpadded = np.zeros_like(np.pad(x.astype(np.float64), pads))
    dcropped, dweight, y = dpadded[:, crops[0], crops[1]], np.zeros_like(weight), np.zeros(dy.shape)
    for i in range(height if y.size else 0):
        for j in range(width):
            at = tuple(
                slice(t * d, t * d + (n - 1) * s + 1, s)
                for t, d, s, n in zip(
                    (i, j), geometry.dilation, geometry.strides, dy.shape[1:3], strict=True
                )
            )
            read = padded[:, at[0], at[1]].reshape(*dy.shape[:3], groups, -1)
            grad = dy.reshape(*dy.shape[:3], groups, -1)
            w = weight[..., i, j]
            y += np.einsum("bhwgi,goi->bhwgo", read, w).reshape(dy.shape)
            dweight[..., i, j] = np.einsum("bhwgi,bhwgo->goi", read, grad)
            back = np.einsum("bhwgo,goi->bhwgi", grad, w)
            dcropped[:, at[0], at[1]] += back.reshape(*dy.shape[:3], -1)
    height, width = x.shape[1:3]
    dx = dpadded[:, top : top + height, left : left + width]
    dvalues = np.zeros(pattern.capacity)
    dvalues[: mask.sum()] = dweight.reshape(mask.shape)[mask]
    return y, dx, dvalues


def close(got, want):
    # Sums of up to thousands of products: the rounding of the largest is that of all.
    assert got.shape == want.shape and got.dtype == np.float32
    scale = np.abs(want).max(initial=1)
    np.testing.assert_allclose(np.asarray(got) / scale, want / scale, rtol=0, atol=3e-6)


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_sum_over_the_kernel(name):
    arrays = values, pattern, x, dy, geometry = make(CASES[name])
    y, dx, dvalues = reference(*arrays)
    close(native.forward(values, pattern, x, geometry), y)
    both = native.backward(*arrays)
    close(both[0], dx)
    close(both[1], dvalues)
    # Either half alone, to the bit.
    got, none = native.backward(*arrays, weights=False)
    assert none is None
    np.testing.assert_array_equal(got, both[0])
    none, got = native.backward(*arrays, inputs=False)
    assert none is None
    close(got, dvalues)


def test_the_reference_is_a_convolution():
    arrays = values, pattern, x, dy, geometry = make(CASES["uneven"])
    mask = mask_of(pattern)
    weight = np.zeros(mask.shape, np.float32)
    weight[mask] = values[: mask.sum()]
    weight = weight.reshape(len(mask), -1, *geometry.kernel)

    def dense(x, weight):
        return lax.conv_general_dilated(
            x, weight, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation,
            dimension_numbers=("NHWC", "OIHW", "NHWC"), feature_group_count=geometry.groups,
        )  # fmt: skip

    @jax.jit
    def run(x, weight, dy):
        y, vjp = jax.vjp(dense, x, weight)
        return y, *vjp(dy)

    y, dx, dweight = run(x, weight, dy)
    want = reference(*arrays)
    close(y, want[0])
    close(dx, want[1])
    close(np.asarray(dweight).reshape(mask.shape)[mask], want[2][: mask.sum()])


@needs_kernels
def test_values_that_are_not_finite_flow_through():
    values, pattern, x, dy, geometry = make((3, 5, 5, 2, 3, ConvGeometry((3, 3)), 0.6))
    x[0, 2, 2, 0], dy[1, 1, 1, 2] = np.nan, np.inf
    y = np.asarray(native.forward(values, pattern, x, geometry))
    dx, dvalues = map(np.asarray, native.backward(values, pattern, x, dy, geometry))
    want_y, want_dx, want_dvalues = reference(values, pattern, np.nan_to_num(x), dy, geometry)
    column, rows = np.asarray(pattern.columns), np.asarray(pattern.row_starts)
    for out in range(3):
        reads = column[rows[out] : rows[out + 1]] < 9
        assert np.isnan(y[0, ..., out]).any() == reads.any()
    assert np.isfinite(y[1:]).all()
    close(y[1:], want_y[1:])
    assert not np.isfinite(dx[1]).all() and np.isfinite(dx[[0, 2]]).all()
    close(dx[[0, 2]], want_dx[[0, 2]])
    # The first output channel meets the NaN in x only at places of its first input channel.
    safe = np.flatnonzero(column[: rows[2]] >= 9)
    np.testing.assert_allclose(dvalues[safe], want_dvalues[safe], rtol=1e-4, atol=1e-5)
    assert np.isnan(dvalues[: rows[-1]]).any() and (dvalues[rows[-1] :] == 0).all()


@needs_kernels
def test_traced_patterns_under_jit_with_the_same_bits():
    arrays = values, pattern, x, dy, geometry = make(CASES["strides"])

    @jax.jit
    def run(values, pattern, x, dy):
        y = native.forward(values, pattern, x, geometry)
        return y, *native.backward(values, pattern, x, dy, geometry)

    first = run(values, pattern, x, dy)
    for got, want in zip(first, reference(*arrays), strict=True):
        close(got, want)
    for _ in range(5):
        for again, before in zip(run(values, pattern, x, dy), first, strict=True):
            np.testing.assert_array_equal(again, before)


@needs_kernels
@pytest.mark.parametrize("field, place, number", [
    ("columns", 0, -1), ("columns", 1, 54), ("row_starts", 0, 1), ("row_starts", 2, 2**30),
    ("row_starts", -1, 10**6),
])  # fmt: skip
def test_corrupt_index_arrays_are_refused(field, place, number):
    values, pattern, x, dy, geometry = make((2, 5, 5, 6, 4, ConvGeometry((3, 3)), 0.5))
    array = getattr(pattern, field).at[place].set(number)
    pattern = dataclasses.replace(pattern, **{field: array})
    with pytest.raises(Exception, match=f"{field} of a sparse convolution"):
        native.forward(values, pattern, x, geometry).block_until_ready()
    with pytest.raises(Exception, match=f"{field} of a sparse convolution"):
        jax.block_until_ready(native.backward(values, pattern, x, dy, geometry))


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    values, pattern, x, dy, geometry = make(CASES["plain"])
    with pytest.raises(ValueError, match=r"x \[batch, height, width, 16\]"):
        native.forward(values, pattern, x[..., :3], geometry)
    with pytest.raises(ValueError, match="dy"):
        native.backward(values, pattern, x, dy[:, :2], geometry)


@needs_kernels
def test_arrays_that_the_caches_do_not_keep():
    """They are written past the caches, in huge pages; a batch that fills no tile is not."""
    case = (35, 66, 64, 32, 32, ConvGeometry((3, 3), padding=SAME), 0.05)
    values, pattern, x, dy, geometry = make(case)
    assert x.nbytes > 16 << 20 and dy.nbytes > 16 << 20
    mask = mask_of(pattern)
    weight = np.zeros(mask.shape, np.float32)
    weight[mask] = values[: mask.sum()]
    kernel = weight.reshape(32, 32, 3, 3).transpose(2, 3, 1, 0)

    def dense(x, kernel):
        names = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=names)

    y, pull = jax.vjp(dense, x, kernel)
    dx, dkernel = pull(dy)
    expected = np.asarray(dkernel).transpose(3, 2, 0, 1).reshape(mask.shape)[mask]
    for _ in range(2):  # once in fresh memory, once perhaps not
        found = native.forward(values, pattern, x, geometry)
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)
        found, dvalues = native.backward(values, pattern, x, dy, geometry)
        np.testing.assert_allclose(found, dx, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dvalues[:-3], expected, rtol=1e-3, atol=0.02)
