"""The native kernels through XLA, each instruction set that runs here, against dense products."""

import dataclasses
import functools
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from priorityprop_jax.core import native as core_native
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.sparse import native
from priorityprop_jax.sparse.functional import sparse_linear
from priorityprop_jax.sparse.pattern import ConvGeometry, make_pattern

AVAILABLE, STATUS = native.native_status()
needs_native = pytest.mark.skipif(not AVAILABLE, reason=STATUS)
NAMES = ["avx512", "avx2", "base"]


@pytest.fixture(params=NAMES)
def instruction_set(request, monkeypatch):
    """Has the kernels of one instruction set used."""
    paths = core_native._installed()
    if request.param not in paths or not core_native._can_run(paths, request.param):
        pytest.skip(f"{request.param} was not built, or does not run here")
    monkeypatch.setattr(
        core_native, "_load_best", lambda: core_native._Library(request.param, "forced")
    )


def random_case(outs, ins, batch, density, *, spare=3, seed=0):
    """A pattern with room to spare, values with NaN where there is no place, and arrays."""
    rng = np.random.default_rng(seed)
    mask = rng.random((outs, ins)) < density
    pattern = make_pattern(mask, capacity=int(mask.sum()) + spare)
    values = rng.normal(size=pattern.capacity).astype(np.float32)
    values[pattern.capacity - spare :] = np.nan
    x = rng.normal(size=(batch, ins)).astype(np.float32)
    dy = rng.normal(size=(batch, outs)).astype(np.float32)
    return mask, pattern, jnp.asarray(values), jnp.asarray(x), jnp.asarray(dy)


def reference(mask, values, x, dy):
    """The three products in float64."""
    weight = np.zeros(mask.shape)
    weight[mask] = np.asarray(values)[: mask.sum()]
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    dvalues = np.zeros(len(values))
    dvalues[: mask.sum()] = (dy.T @ x)[mask]
    return x @ weight.T, dy @ weight, dvalues


@needs_native
@pytest.mark.parametrize(
    ("outs", "ins", "batch", "density"),
    [
        (5, 7, 1, 0.5),
        (33, 20, 37, 0.2),
        (64, 100, 128, 0.1),
        (20, 30, 300, 0.5),
        (130, 300, 64, 0.5),
        (9, 8, 16, 0.0),
        (4, 4, 3, 1.0),
        (3, 4, 0, 1.0),
        (257, 1100, 513, 0.3),
        (1, 3000, 17, 0.9),
    ],
)
def test_products_are_those_of_the_dense_weight(instruction_set, outs, ins, batch, density):
    mask, pattern, values, x, dy = random_case(outs, ins, batch, density)
    y, dx, dvalues = reference(mask, values, x, dy)
    close = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(native.forward(values, pattern, x), y, **close)
    both = native.backward(values, pattern, x, dy)
    np.testing.assert_allclose(both[0], dx, **close)
    np.testing.assert_allclose(both[1], dvalues, **close)
    only_dx = native.backward(values, pattern, x, dy, weights=False)
    only_dvalues = native.backward(values, pattern, x, dy, inputs=False)
    assert only_dx[1] is None and only_dvalues[0] is None
    np.testing.assert_allclose(only_dx[0], dx, **close)
    np.testing.assert_allclose(only_dvalues[1], dvalues, **close)
    assert native.backward(values, pattern, x, dy, inputs=False, weights=False) == (None, None)
    one = 2 * pattern.capacity * batch
    count = lambda function, **which: program_flops(  # noqa: E731
        jax.make_jaxpr(functools.partial(function, pattern=pattern, **which))(values, x=x)
    )
    assert count(native.forward) == one
    assert count(native.backward, dy=dy) == 2 * one
    assert count(native.backward, dy=dy, weights=False) == one


@needs_native
def test_what_is_not_finite_goes_only_where_it_belongs(instruction_set):
    mask, pattern, values, x, dy = random_case(40, 50, 20, 0.2)
    x = x.at[5, 3].set(jnp.nan)
    dy = dy.at[2, 7].set(jnp.inf)
    y = np.asarray(native.forward(values, pattern, x))
    dx, dvalues = map(np.asarray, native.backward(values, pattern, x, dy))
    rows, columns = np.nonzero(mask)
    expected = np.zeros(y.shape, bool)
    expected[5, mask[:, 3]] = True
    np.testing.assert_array_equal(np.isnan(y), expected)
    expected = np.zeros(dx.shape, bool)
    expected[2, mask[7]] = True
    np.testing.assert_array_equal(np.isinf(dx), expected)
    np.testing.assert_array_equal(np.isfinite(dvalues[:-3]), (columns != 3) & (rows != 7))
    assert not dvalues[-3:].any()


@needs_native
def test_starts_of_columns_that_were_never_filled_in_are_an_error(instruction_set):
    _, pattern, values, x, dy = random_case(6, 8, 5, 0.5)
    empty = dataclasses.replace(pattern, column_starts=jnp.zeros_like(pattern.column_starts))
    with pytest.raises(jax.errors.JaxRuntimeError, match="count the same places"):
        jax.block_until_ready(native.backward(values, empty, x, dy))


@needs_native
@pytest.mark.parametrize("name", ["row_starts", "columns", "column_starts", "rows", "order"])
def test_indices_out_of_bounds_are_an_error(instruction_set, name):
    _, pattern, values, x, dy = random_case(6, 8, 5, 0.5)
    for bad in (-1, 2**31 - 1):
        array = getattr(pattern, name)
        place = -1 if name.endswith("starts") else 2
        corrupt = dataclasses.replace(pattern, **{name: array.at[place].set(bad)})
        with pytest.raises(jax.errors.JaxRuntimeError, match="of a sparse pattern"):
            if name in ("row_starts", "columns"):
                native.forward(values, corrupt, x).block_until_ready()
            else:
                jax.block_until_ready(native.backward(values, corrupt, x, dy))


@needs_native
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_those_of_the_dense_kernel(instruction_set, groups):
    geometry = ConvGeometry((3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2), groups)
    rng = np.random.default_rng(groups)
    mask = rng.random((6, 4 // groups * 6)) < 0.5
    pattern = make_pattern(mask, capacity=int(mask.sum()) + 2)
    values = jnp.asarray(rng.normal(size=pattern.capacity), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 7, 6, 4)), jnp.float32)
    rows, columns = np.nonzero(mask)

    @jax.jit
    def dense(values, x):
        kernel = jnp.zeros(mask.shape).at[rows, columns].set(values[: len(rows)])
        return lax.conv_general_dilated(
            x,
            kernel.reshape(6, 4 // groups, 3, 2),
            geometry.strides,
            geometry.padding,
            rhs_dilation=geometry.dilation,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision="highest",
        )

    y, vjp = jax.vjp(dense, values, x)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    dvalues, dx = vjp(dy)
    close = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(native.forward(values, pattern, x, geometry), y, **close)
    both = native.backward(values, pattern, x, dy, geometry)
    np.testing.assert_allclose(both[0], dx, **close)
    np.testing.assert_allclose(both[1], dvalues, **close)
    only_dx = native.backward(values, pattern, x, dy, geometry, weights=False)
    only_dvalues = native.backward(values, pattern, x, dy, geometry, inputs=False)
    np.testing.assert_allclose(only_dx[0], dx, **close)
    np.testing.assert_allclose(only_dvalues[1], dvalues, **close)


@needs_native
@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_of_a_batch(check_vma):
    mask, pattern, values, x, dy = random_case(12, 10, 16, 0.4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(values, pattern, x, dy):
        dx, dvalues = native.backward(values, pattern, x, dy)
        assert dvalues is not None
        return native.forward(values, pattern, x), dx, lax.psum(dvalues, "data")

    batch, whole = P("data"), P()
    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(whole, whole, batch, batch),
        out_specs=(batch, batch, whole),
        check_vma=check_vma,
    )
    results = jax.jit(sharded)(values, pattern, x, dy)
    for result, expected in zip(results, reference(mask, values, x, dy), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_vmap_goes_one_by_one():
    mask, pattern, values, x, dy = random_case(6, 8, 5, 0.5)
    stacked = jnp.stack([x, 2 * x])
    y = jax.vmap(lambda x: native.forward(values, pattern, x))(stacked)
    np.testing.assert_array_equal(y[1], 2 * y[0])
    np.testing.assert_allclose(y[0], reference(mask, values, x, dy)[0], rtol=1e-5, atol=1e-5)


@needs_native
def test_shapes_that_do_not_fit_are_an_error():
    _, pattern, values, x, dy = random_case(6, 8, 5, 0.5)
    with pytest.raises(ValueError, match=r"x \[batch, in\]"):
        native.forward(values, pattern, x[:, :-1])
    with pytest.raises(ValueError, match="capacity"):
        native.forward(values[:-1], pattern, x)
    with pytest.raises(ValueError, match="output"):
        native.backward(values, pattern, x, dy[:-1])
    with pytest.raises(ValueError, match=r"height, width, 2\]"):
        native.forward(values, pattern, x, ConvGeometry((2, 2)))
    with pytest.raises(ValueError, match="output"):
        images = jnp.ones((1, 4, 4, 2))
        native.backward(values, pattern, images, images, ConvGeometry((2, 2)))


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs to know its own size")
@pytest.mark.parametrize("geometry", [None, ConvGeometry((1, 1))])
def test_no_memory_is_an_error_and_not_an_end(geometry):
    """What a kernel works in is larger than its arrays: there is memory for these alone."""
    features = 1 << 21
    pattern = make_pattern(np.eye(1, features, dtype=bool))
    x = jnp.ones((1, features) if geometry is None else (1, 1, 1, features))
    run = jax.jit(lambda x: native.forward(jnp.ones(1), pattern, x, geometry)).lower(x).compile()
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (24 << 20), before[1]))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED: out of memory"):
            run(x).block_until_ready()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert run(x).ravel().tolist() == [1.0]


def test_status_says_why_there_is_none(monkeypatch):
    load = core_native._load_best.__wrapped__
    if AVAILABLE:
        monkeypatch.setattr(core_native, "_running_version", lambda: 2)
        assert "FFI version" in load().status and load().name is None
        monkeypatch.setattr(core_native, "_running_version", lambda: None)
        assert "no headers" in load().status and load().name is None
        monkeypatch.setattr(core_native, "_running_version", lambda: 999)
        monkeypatch.setattr(core_native, "_can_run", lambda paths, name: name == "base")
        assert load() == ("base", "baseline kernels")
    monkeypatch.setattr(core_native, "_installed", dict)
    assert "compiler" in load().status and load().name is None
    monkeypatch.setattr(core_native, "_load_best", load)
    _, pattern, values, x, _ = random_case(6, 8, 5, 0.5)
    with pytest.raises(RuntimeError, match="compiler"):
        native.forward(values, pattern, x)


def test_a_library_that_cannot_be_loaded_falls_back_with_one_warning(monkeypatch, tmp_path):
    load = core_native._load_best.__wrapped__
    broken = tmp_path / "_priorityprop_base.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(core_native, "_installed", lambda: {"base": broken})
    monkeypatch.setattr(core_native, "_load_best", functools.cache(load))
    with pytest.warns(RuntimeWarning, match="cannot be loaded") as warned:
        for _ in range(3):
            available, why = native.native_status()
            assert not available and "cannot be loaded" in why
    assert len(warned) == 1
    mask, pattern, values, x, dy = random_case(6, 8, 5, 0.5)
    y = sparse_linear(x, values, pattern)
    np.testing.assert_allclose(y, reference(mask, values, x, dy)[0], rtol=1e-5, atol=1e-5)


@needs_native
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(core_native, "_INTERFACE", 1)
    assert core_native._load_best.__wrapped__().name is None
    assert "other sources" in core_native._load_best.__wrapped__().status


def test_version_of_this_jaxlib_is_known():
    version = core_native._running_version()
    assert version is not None and version >= 3
