"""What JAX does with functions, done with products of sparse weights, against dense ones."""

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax import lax

from priorityprop_jax.sparse import native
from priorityprop_jax.sparse.functional import sparse_conv, sparse_linear
from priorityprop_jax.sparse.pattern import make_pattern, mask_of
from priorityprop_jax.sparse.products import Product, multiply

AVAILABLE, STATUS = native.native_status()
needs_native = pytest.mark.skipif(not AVAILABLE, reason=STATUS)
NATIVE = pytest.param("native", marks=needs_native)
NATIVE_CONV = pytest.param("native conv", marks=needs_native)

OUT, IN, BATCH, EXAMPLES = 12, 24, 9, 3
# 24 columns are 6 channels of a kernel of 2 x 2.
KERNEL, IMAGE = (2, 2), (4, 3, 6)


def kernel_name(case):
    return case.split()[0]


def shape_of_x(case, batch=BATCH):
    return (batch, *IMAGE) if case.endswith("conv") else (batch, IN)


@functools.cache
def pattern_of(case):
    rng = np.random.default_rng(0)
    mask = rng.random((OUT, IN)) < 0.2
    return make_pattern(mask, capacity=int(mask.sum()) + 5)


def mask(case):
    return mask_of(pattern_of(case))


def taken(case, dense):
    """What stands at the places of the pattern, zero where one is not used."""
    pattern, dense = pattern_of(case), np.asarray(dense, np.float64)
    found = dense.reshape(-1, OUT, IN)[:, mask(case)]
    values = np.zeros((len(found), pattern.capacity))
    values[:, : found.shape[1]] = found
    return values.reshape(*dense.shape[:-2], pattern.capacity)


def sparse(case):
    """``(values, x) -> y`` with batches first."""
    if case.endswith("conv"):
        return lambda values, x: sparse_conv(
            x, values, pattern_of(case), kernel_size=KERNEL, backend=kernel_name(case)
        )
    return lambda values, x: sparse_linear(x, values, pattern_of(case), backend=kernel_name(case))


@functools.cache
def dense(case):
    """The same of a dense weight, of which places outside of the pattern are not used."""
    return dense_conv(mask(case)) if case.endswith("conv") else dense_linear(mask(case))


def dense_linear(mask):
    return lambda weight, x: x @ (weight * mask).T


def dense_conv(mask):
    return lambda weight, x: lax.conv_general_dilated(
        x,
        (weight * mask).reshape(OUT, -1, *KERNEL),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )


def data(case, batch=BATCH, dtype=np.float32):
    """Three dense weights that are zero outside of the pattern, and three batches."""
    rng = np.random.default_rng(1)
    weights = np.where(mask(case), rng.normal(size=(EXAMPLES, OUT, IN)), 0)
    return weights.astype(dtype), rng.normal(size=(EXAMPLES, *shape_of_x(case, batch))).astype(
        dtype
    )


def loss(f):
    return lambda w, x: jnp.sum(jnp.sin(f(w, x)))


def gradient(f):
    return jax.grad(loss(f), (0, 1))


def per_example(f, w, ws, xs):
    return jax.vmap(gradient(f), (None, 0))(w, xs)


def summed(f, w, ws, xs):
    return gradient(jax.vmap(f, (None, 0)))(w, xs)


def both_mapped(f, w, ws, xs):
    return jax.vmap(gradient(f))(ws, xs)


def twice(f, w, ws, xs):
    def length(w, x):
        return sum(jnp.sum(jnp.cos(part)) for part in gradient(f)(w, x))

    return jax.grad(length, (0, 1))(w, xs[0])


def loop(f, w, ws, xs):
    """Through `lax.scan`, each step computed again on the way back."""

    def total(w):
        @jax.checkpoint
        def step(total, x):
            return total + loss(f)(w, x), None

        return lax.scan(step, 0.0, xs)[0]

    return jax.grad(total)(w), xs


def strided(f, w, ws, xs):
    """Cotangents that are transposed, reversed, and zeros between."""

    def part(w, x):
        y = f(w, x)
        return jnp.sum(jnp.sin(y.T[::-2, ...]) * jnp.arange(float(len(y))))

    return jax.grad(part, (0, 1))(w, xs[0])


def only_input(f, w, ws, xs):
    return w, jax.grad(loss(f), 1)(w, xs[0])


EVERYTHING = (
    per_example, summed, twice, loop, strided, only_input,
)  # fmt: skip


@functools.cache
def compiled(f, transformations):
    @jax.jit
    def run(w, ws, xs):
        return [transformation(f, w, ws, xs) for transformation in transformations]

    return run


@functools.cache
def dense_results(case, transformations):
    with jax.enable_x64(True):
        weights, xs = data(case, dtype=np.float64)
        return jax.device_get(compiled(dense(case), transformations)(weights[0], weights, xs))


@pytest.mark.parametrize(
    ("case", "transformations"),
    [
        pytest.param("native", EVERYTHING, marks=needs_native),
        pytest.param("native conv", (per_example, twice), marks=needs_native),
        ("csr", (both_mapped,)),
        ("masked", (per_example, twice)),
    ],
)
def test_transformations(case, transformations):
    weights, xs = data(case)
    values = taken(case, weights).astype(np.float32)
    results = compiled(sparse(case), transformations)(values[0], values, xs)
    expected = dense_results(case, transformations)
    for transformation, result, (dense_w, dense_x) in zip(
        transformations, results, expected, strict=True
    ):
        pairs = {"values": (result[0], taken(case, dense_w)), "x": (result[1], dense_x)}
        for name, (found, want) in pairs.items():
            assert found.shape == want.shape
            error = np.max(np.abs(found - want)) / np.max(np.abs(want))
            # Gradients of gradients are products of three.
            allowed = 2e-6 if transformation is twice else 1e-6
            assert error < allowed, f"{transformation.__name__}, {name}: {error:.2e}"


@pytest.mark.parametrize("case", [NATIVE, NATIVE_CONV])
def test_gradients_by_differences(case):
    weights, xs = data(case, batch=2)
    f = jax.jit(sparse(case))
    jax.test_util.check_grads(
        f, (taken(case, weights[0]).astype(np.float32), xs[0]), 2, ["rev"], 1e-2, 1e-2, 0.03
    )


def test_float64():
    with jax.enable_x64(True):
        weights, xs = data("csr", dtype=np.float64)
        y = jax.jit(sparse("csr"))(taken("csr", weights[0]), xs[0])
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, xs[0] @ weights[0].T, rtol=1e-13, atol=1e-13)


def mesh(kind="Auto"):
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[kind],))


@functools.cache
def sharded_reference(case):
    weights, xs = data(case, batch=16)
    with jax.enable_x64(True):
        step = jax.jit(jax.value_and_grad(loss(dense(case)), (0, 1)))
        w, x = weights[0].astype(np.float64), xs[0].astype(np.float64)
        value, (dw, dx) = jax.device_get(step(w, x))
    return taken(case, weights[0]).astype(np.float32), xs[0], (value, (taken(case, dw), dx))


def assert_close(results, expected):
    for found, want in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert found.shape == want.shape
        assert np.max(np.abs(found - want)) < 5e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("case", [NATIVE, NATIVE_CONV, "csr", "masked", "masked conv"])
def test_shards_of_shard_map(case):
    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=(jax.P(), jax.P("data")),
        out_specs=(jax.P(), (jax.P(), jax.P("data"))),
        check_vma=True,
    )
    def run(values, x):
        def total(values, x):
            return lax.psum(loss(sparse(case))(values, x), "data")

        return jax.value_and_grad(total, (0, 1))(values, x)

    values, x, expected = sharded_reference(case)
    assert_close(run(values, x), expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("case", [NATIVE, NATIVE_CONV, "csr"])
def test_shards_that_the_compiler_makes(case, kind):
    values, x, expected = sharded_reference(case)
    whole, split = (jax.NamedSharding(mesh(kind), jax.P(*axes)) for axes in ((), ("data",)))
    values, x = jax.device_put(values, whole), jax.device_put(x, split)
    with jax.set_mesh(mesh(kind)):
        step = jax.jit(jax.value_and_grad(loss(sparse(case)), (0, 1))).lower(values, x).compile()
    assert "all-gather" not in step.as_text()
    result = step(values, x)
    assert_close(result, expected)
    assert result[1][1].sharding.is_equivalent_to(split, x.ndim)


@pytest.mark.parametrize("case", ["masked", NATIVE_CONV])
def test_a_symbolic_batch_is_exported_by_jax_alone(case):
    # What is exported runs on other machines, which may not have the kernels of this one.
    weights, xs = data(case)
    values = taken(case, weights[0]).astype(np.float32)
    chosen = {"kernel_size": KERNEL} if case.endswith("conv") else {}
    run = sparse_conv if chosen else sparse_linear
    step = jax.jit(jax.grad(lambda x: jnp.sum(run(x, values, pattern_of(case), **chosen) ** 2)))
    shape = (*jax.export.symbolic_shape("batch"), *xs[0].shape[1:])
    exported = jax.export.export(step)(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(exported.call(xs[0]), step(xs[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="csr.* no symbolic shapes.*use 'masked'"):
        jax.export.export(jax.jit(lambda x: sparse("csr")(values, x)))(
            jax.ShapeDtypeStruct((shape[0], IN), jnp.float32)
        )


@pytest.mark.parametrize("case", [NATIVE, NATIVE_CONV])
def test_what_is_exported_has_no_kernels_of_this_machine(case):
    weights, xs = data(case)
    values = jnp.asarray(taken(case, weights[0]), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss(sparse(case)), (0, 1)))
    exported = jax.export.export(step)(values, xs[0])
    kernels = f"priorityprop_{'conv' if case.endswith('conv') else 'linear'}_"
    assert kernels not in exported.mlir_module()
    assert kernels in step.lower(values, xs[0]).as_text()
    for found, want in zip(
        *map(jax.tree.leaves, (exported.call(values, xs[0]), step(values, xs[0]))), strict=True
    ):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [NATIVE, "csr", "masked"])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_weights_without_an_element(shape, backend):
    pattern, x = make_pattern(np.zeros(shape)), jnp.ones((2, shape[1]))
    f = lambda x, values: sparse_linear(x, values, pattern, backend=backend)  # noqa: E731
    assert f(x, jnp.ones(1)).shape == (2, shape[0])
    dx, dvalues = jax.grad(lambda *args: f(*args).sum(), (0, 1))(x, jnp.ones(1))
    assert dx.shape == x.shape and dvalues.tolist() == [0]


@pytest.mark.parametrize("case", [NATIVE, "masked"])
def test_forward_mode_is_an_error_that_says_so(case):
    weights, xs = data(case)
    values = taken(case, weights[0]).astype(np.float32)
    with pytest.raises(TypeError, match=r"can't apply forward-mode autodiff \(jvp\)"):
        jax.jit(lambda x: jax.jvp(lambda x: sparse(case)(values, x), (x,), (x,)))(xs[0])


@pytest.mark.parametrize("backend", [NATIVE, "csr", "masked"])
def test_sums_of_16_bits_are_taken_in_32(backend):
    # Sums in bfloat16 of more than 256 ones stay at 256.
    count = 600
    mask = np.zeros((count, count), bool)
    mask[3] = mask[:, 5] = True
    pattern = make_pattern(mask)
    ones = jnp.ones((count, count), jnp.bfloat16)
    values = jnp.ones(pattern.capacity, jnp.bfloat16)

    @jax.jit
    def run(values, x, dy):
        y, pullback = jax.vjp(
            lambda values, x: sparse_linear(x, values, pattern, backend=backend), values, x
        )
        return y, *pullback(dy)

    y, dvalues, dx = run(values, ones, ones)
    assert y.dtype == dvalues.dtype == dx.dtype == jnp.bfloat16
    assert (y[:, 3] == count).all() and (y[:, 4] == 1).all()
    assert (dx[:, 5] == count).all() and (dvalues == count).all()


@pytest.mark.parametrize("case", [NATIVE, "csr", NATIVE_CONV])
def test_what_is_not_finite_flows_and_what_is_not_used_is_not_read(case):
    weights, xs = data(case)
    values = taken(case, weights[0]).astype(np.float32)
    used = int(pattern_of(case).row_starts[-1])
    rows, columns = np.nonzero(mask(case))

    @jax.jit
    def run(values, x, dy):
        y, pullback = jax.vjp(sparse(case), values, x)
        return y, *pullback(dy)

    def finite(values, x, scale):
        y, dvalues, dx = (np.asarray(part) for part in run(values, x, scale))
        assert not dvalues[used:].any()
        return np.isfinite(y), np.isfinite(dvalues[:used]), np.isfinite(dx)

    dy = np.ones(jax.eval_shape(sparse(case), values, xs[0]).shape, np.float32)
    values[used:] = np.nan
    assert all(part.all() for part in finite(values, xs[0], dy))
    bad = values.copy()
    bad[2] = np.inf
    y, dvalues, dx = finite(bad, xs[0], dy)
    assert dvalues.all()
    assert (y.all(axis=tuple(range(y.ndim - 1))) == (np.arange(OUT) != rows[2])).all()
    x = xs[0].copy()
    x[1, ..., columns[0] // (4 if case.endswith("conv") else 1)] = np.nan
    y, dvalues, dx = finite(values, x, dy)
    assert dx.all() and y[[0, *range(2, BATCH)]].all() and not y[1, ..., rows[0]].all()
    assert not dvalues[0]
    bad_dy = dy.copy()
    bad_dy[2, ..., rows[0]] = np.inf
    y, dvalues, dx = finite(values, xs[0], bad_dy)
    assert y.all() and dx[:2].all() and not dx[2].all()
    np.testing.assert_array_equal(dvalues, rows != rows[0])


@pytest.mark.parametrize("case", [NATIVE])
def test_donated_values_are_updated_in_place(case):
    weights, xs = data(case)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(values, x):
        return values - 0.1 * jax.grad(loss(sparse(case)))(values, x)

    values = jnp.asarray(taken(case, weights[0]), jnp.float32)
    new = step(values, xs[0])
    assert values.is_deleted()
    cosine = np.cos(xs[0] @ weights[0].T)
    expected = weights[0] - 0.1 * cosine.T @ xs[0]
    np.testing.assert_allclose(new, taken(case, expected), rtol=1e-5, atol=1e-5)


def test_a_batch_of_patterns():
    rng = np.random.default_rng(2)
    masks = rng.random((3, 5, 7)) < 0.4
    patterns = [make_pattern(mask, capacity=35) for mask in masks]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *patterns)
    values, x = rng.normal(size=(3, 35)), rng.normal(size=(4, 7))
    values, x = values.astype(np.float32), x.astype(np.float32)
    product = Product("native" if AVAILABLE else "csr")
    y = jax.jit(jax.vmap(functools.partial(multiply, product), (0, 0, None)))(values, together, x)
    for found, mask, of_mask in zip(y, masks, values, strict=True):
        weight = np.zeros(mask.shape)
        weight[mask] = of_mask[: mask.sum()]
        np.testing.assert_allclose(found, x @ weight.T, rtol=1e-5, atol=1e-5)


@needs_native
def test_gradients_of_many_threads_at_once():
    rng = np.random.default_rng(3)
    mask = rng.random((40, 50)) < 0.3
    pattern = make_pattern(mask)
    step = jax.jit(
        jax.grad(
            lambda v, x, dy: jnp.vdot(sparse_linear(x, v, pattern, backend="native"), dy), (0, 1)
        )
    )
    # Small whole numbers: whatever the order of the sums, they are exact.
    inputs = [
        [
            rng.integers(-3, 4, shape).astype(np.float32)
            for shape in (mask.sum(), (64, 50), (64, 40))
        ]
        for _ in range(8)
    ]
    inputs = [[jnp.asarray(array) for array in one] for one in inputs]
    step(*inputs[0])
    start = threading.Barrier(8)
    results = [concurrent.futures.Future() for _ in range(8)]

    def work(thread):
        try:
            values, x, dy = map(np.asarray, inputs[thread])
            weight = np.zeros(mask.shape, np.float32)
            weight[mask] = values
            expected = (dy.T @ x)[mask], dy @ weight
            start.wait(30)
            wrong = 0
            for _ in range(200):
                found = step(*inputs[thread])
                wrong += not all(map(np.array_equal, found, expected))
            results[thread].set_result(wrong)
        except BaseException as error:
            results[thread].set_exception(error)

    for thread in range(8):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    # A hang is an error of its own: `result` gives up.
    assert [result.result(timeout=120) for result in results] == [0] * 8


@pytest.mark.parametrize("backend", [NATIVE, "csr"])
def test_memory_is_that_of_the_non_zeros(backend):
    features, batch = 2048, 16
    mask = np.random.default_rng(4).random((features, features)) < 0.01
    pattern = make_pattern(mask)
    values = jax.ShapeDtypeStruct((pattern.capacity,), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, features), jnp.float32)
    held = 4 * pattern.capacity + sum(leaf.nbytes for leaf in jax.tree.leaves(pattern))
    assert held <= 20 * pattern.capacity + 8 * (features + 1)

    def total(values, pattern, x):
        return jnp.sum(sparse_linear(x, values, pattern, backend=backend) ** 2)

    step = jax.jit(jax.grad(total, (0, 2))).lower(values, pattern, x).compile()
    analysis = step.memory_analysis()
    if analysis is None:
        pytest.skip("the compiler does not tell")
    dense = 4 * features**2
    assert analysis.temp_size_in_bytes < dense / 4
    assert analysis.output_size_in_bytes < dense / 4


@pytest.mark.parametrize("case", [NATIVE, NATIVE_CONV, "csr", "masked", "masked conv"])
def test_no_examples_and_no_places(case):
    empty = make_pattern(np.zeros((OUT, IN)), capacity=0)

    def product(x, values, pattern):
        if case.endswith("conv"):
            options = {"kernel_size": KERNEL, "backend": kernel_name(case)}
            return sparse_conv(x, values, pattern, **options)
        return sparse_linear(x, values, pattern, backend=kernel_name(case))

    @functools.partial(jax.jit, static_argnums=2)
    def run(values, xs, over_values, pattern):
        def total(values, x):
            return jnp.sum(product(x, values, pattern) ** 2)

        axes = (0 if over_values else None, 0)
        return jax.vmap(jax.value_and_grad(total, (0, 1)), axes)(values, xs)

    shape = shape_of_x(case)
    used = pattern_of(case)
    none = jnp.zeros((0, *shape))
    for over_values in (False, True):
        values = jnp.ones((0,) * over_values + (used.capacity,))
        value, (dvalues, dx) = run(values, none, over_values, used)
        assert value.shape == (0,) and dx.shape == none.shape
        assert dvalues.shape == (0, used.capacity)
    value, (dvalues, dx) = run(jnp.zeros(0), jnp.ones((2, *shape)), False, empty)
    assert dvalues.shape == (2, 0) and not value.any() and not dx.any()


@pytest.mark.parametrize("case", [NATIVE, "csr", "masked", "masked conv"])
def test_ranks_are_promoted_by_nobody_else(case):
    weights, xs = data(case)
    values = taken(case, weights).astype(np.float32)
    with jax.numpy_rank_promotion("raise"):
        few = make_pattern(np.eye(40, 200))  # few enough for the values one by one
        if case == "csr":
            jax.jit(jax.grad(lambda v, x: sparse_linear(x, v, few, backend="csr").sum(), (0, 1)))(
                jnp.ones(40), jnp.ones((3, 200))
            )
        jax.block_until_ready(
            jax.jit(functools.partial(per_example, sparse(case)))(values[0], values, xs)
        )
