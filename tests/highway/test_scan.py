"""Highway-BP against sums over paths written out, and against exact gradients."""

import functools
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from priorityprop_jax.highway.scan import highway_nnx, highway_report, highway_scan

LAYERS, BATCH, WIDTH = 4, 2, 3


def draw(seed, *shape, scale=1.0, dtype=float):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def mlp(p, x):
    return x + jnp.tanh(x @ p["in"]) @ p["out"]


def mlp_params(layers=LAYERS, width=WIDTH, scale=0.5, dtype=float):
    return {
        name: draw(seed, layers, width, width, scale=scale, dtype=dtype)
        for seed, name in enumerate(("in", "out"))
    }


def plain(block, params, x):
    """All outputs of the stack, ``[layers, ...]``, by JAX's own scan."""
    return lax.scan(lambda x, p: (block(p, x),) * 2, x, params)[1]


def close(a, b, tolerance=1e-10):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def relative(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# What it computes.


def gated(p, x):
    return p["gate"] * mlp(p, x)


@jax.jit
def linearized(params, x):
    """Inputs and Jacobians of all layers of a gated stack."""
    inputs = jnp.concatenate([x[None], plain(gated, params, x)[:-1]])
    return inputs, jax.vmap(jax.jacobian(gated, 1))(params, inputs)


@jax.jit
def pulled(params, inputs, cotangents):
    one = lambda p, x, w: jax.vjp(gated, p, x)[1](w)  # noqa: E731
    return jax.vmap(one)(params, inputs, cotangents)


def path_sum(params, x, bars, diagonals, k):
    """Theorem 1: gradients as sums over all paths through at most k blocks, path by path."""
    inputs, jacobians = linearized(params, x)
    size = x.size
    jacobians = np.asarray(jacobians).reshape(LAYERS, size, size)
    residuals = [np.diag(np.broadcast_to(d, x.shape).ravel()) for d in diagonals]
    cotangents = np.zeros(inputs.shape)  # of the outputs
    for i in range(LAYERS):
        for loss in range(i, LAYERS):
            between = range(i + 1, loss + 1)
            for number in range(min(k, len(between)) + 1):
                for through in itertools.combinations(between, number):
                    w = np.asarray(bars[loss]).ravel()
                    for j in reversed(between):
                        step = residuals[j]
                        w = (jacobians[j] - step if j in through else step).T @ w
                    cotangents[i] += w.reshape(x.shape)
    params_bar, inputs_bar = pulled(params, inputs, jnp.asarray(cotangents))
    return params_bar, inputs_bar[0]


def test_k_rounds_sum_the_paths_through_at_most_k_blocks():
    ks, diagonals = (0, 1, 2), [1.0] * LAYERS
    with jax.enable_x64(True):
        params, x = mlp_params(), draw(5, BATCH, WIDTH)
        params["gate"] = jnp.asarray(np.random.default_rng(9).uniform(0.5, 1, (LAYERS, WIDTH)))
        bars = jnp.zeros((LAYERS, BATCH, WIDTH)).at[-1].set(draw(6, BATCH, WIDTH))

        @jax.jit
        def run(params, x):
            def loss(params, x, k):
                y = highway_scan(gated, params, x, iterations=k, guard=False)
                return jnp.sum(y * bars[-1])

            return [jax.grad(loss, argnums=(0, 1))(params, x, k) for k in ks]

        exact = path_sum(params, x, bars, diagonals, LAYERS)
        for k, grad in zip(ks, run(params, x), strict=True):
            close(grad, path_sum(params, x, bars, diagonals, k))
            assert relative(grad, exact) > 1e-4


def transformer(p, x):
    def norm(x):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, axis=-1)
    x = x + jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v @ p["o"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def resnet(p, x):
    h = x
    for name in ("first", "second"):
        h = lax.conv_general_dilated(
            jax.nn.relu(h), p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return x + h


STACKS = {
    "mlp": (mlp, {"in": (WIDTH, 5), "out": (5, WIDTH)}, (BATCH, WIDTH)),
    "transformer": (
        transformer,
        {"qkv": (4, 12), "o": (4, 4), "up": (4, 8), "down": (8, 4)},
        (BATCH, 3, 4),
    ),
    "resnet": (resnet, {"first": (3, 3, 2, 2), "second": (3, 3, 2, 2)}, (BATCH, 4, 4, 2)),
}


@pytest.mark.parametrize("name", STACKS)
def test_as_many_rounds_as_layers_are_exact(name):
    block, shapes, shape = STACKS[name]
    with jax.enable_x64(True):
        params = {key: draw(i, LAYERS, *s, scale=0.4) for i, (key, s) in enumerate(shapes.items())}
        x, bar = draw(5, *shape), draw(6, *shape)

        def highway(params, x, probe):
            options = {"tol": 0.0, "guard": False, "probe": probe}
            return highway_scan(block, params, x, iterations=LAYERS, **options)

        @jax.jit
        def run(*args):
            def grads(stack):
                def loss(*args):
                    y = stack(*args)
                    return jnp.sum(y * bar), y

                return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)

            return grads(highway), grads(lambda params, x, _: plain(block, params, x)[-1])

        out, ((_, expected), (*exact, _)) = run(params, x, highway_report())
        (_, y), (*grads, report) = out
        np.testing.assert_array_equal(y, expected)
        close(grads, exact)
        assert report.rounds == LAYERS and report.correction < 1e-12 and not report.stopped


def test_no_limit_is_plain_autodiff():
    params, x, bar = mlp_params(), draw(5, BATCH, WIDTH), draw(6, BATCH, WIDTH)

    def loss(params, probe, k):
        return jnp.sum(highway_scan(mlp, params, x, iterations=k, probe=probe) * bar)

    @jax.jit
    def run(params, probe):
        grads = [jax.grad(loss, (0, 1))(params, probe, k) for k in (None, LAYERS - 1, LAYERS)]
        return grads, jax.grad(lambda p: jnp.sum(plain(mlp, p, x)[-1] * bar))(params)

    grads, exact = run(params, highway_report())
    for grad, report in grads:
        jax.tree.map(np.testing.assert_array_equal, grad, exact)
        assert not any(report)


def test_the_backward_pass_does_not_go_layer_by_layer():
    params, x = mlp_params(), draw(5, BATCH, WIDTH)

    def scans(k):
        def loss(params):
            return jnp.sum(highway_scan(mlp, params, x, iterations=k, guard=False) ** 2)

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("= scan[")

    assert [scans(None), scans(1)] == [2, 1]


def test_one_round_costs_as_much_as_the_chain_of_a_backward_pass_and_no_copy_of_the_params():
    layers, width = 3, 64
    params, x = mlp_params(layers, width), draw(5, BATCH, width)
    product = 2 * x.size * width

    def measure(k):
        def loss(params):
            return jnp.sum(highway_scan(mlp, params, x, iterations=k, guard=False))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (none, memory), (one, _) = measure(0), measure(1)
    assert one - none == pytest.approx(2 * layers * product, rel=0.1)
    assert memory < 0.5 * sum(p.nbytes for p in params.values())


# When it ends.


@pytest.fixture(scope="module")
def reported():
    """The gradient and the report for a stack whose blocks are as large as asked."""

    @jax.jit
    def run(scale, last):
        params, x = draw(4, 8, WIDTH, WIDTH, scale=0.5), draw(5, BATCH, WIDTH)

        def loss(params, probe, **options):
            block = lambda p, x: x + scale * x @ p  # noqa: E731
            y = highway_scan(block, params, x, iterations=6, probe=probe, **options)
            return last * jnp.sum(y * draw(6, BATCH, WIDTH))

        return {
            name: jax.grad(lambda p, r, o=options: loss(p, r, **o), (0, 1))(
                params, highway_report()
            )
            for name, options in {
                "guarded": {},
                "free": {"guard": False},
                "adaptive": {"tol": 1e-2},
            }.items()
        }

    return run


def test_the_guard_lets_a_shrinking_correction_pass(reported):
    runs = reported(0.3, 1.0)
    grads, report = runs["guarded"]
    close(grads, runs["free"][0], 1e-6)
    assert report.rounds == 6 == runs["free"][1].rounds and not report.stopped
    np.testing.assert_allclose(report.correction, runs["free"][1].correction, rtol=1e-3)


def test_a_tolerance_ends_the_iteration_sooner(reported):
    _, report = reported(0.3, 1.0)["adaptive"]
    assert 1 < report.rounds < 6 and 0 < report.correction <= 1e-2 and not report.stopped


def test_the_guard_stops_before_a_growing_correction(reported):
    runs = reported(4.0, 1.0)
    grads, report = runs["guarded"]
    assert report.stopped == 1 and report.rounds < 6
    size = lambda g: sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(g)) ** 0.5  # noqa: E731
    assert runs["free"][1].stopped == 0 and size(runs["free"][0]) > 3 * size(grads) > 0


def test_a_nan_is_seen(reported):
    grads, report = reported(0.3, jnp.nan)["guarded"]
    assert report.stopped == 1 and report.rounds == 1 and np.isnan(report.correction)
    assert all(np.isnan(g).any() for g in jax.tree.leaves(grads))


def test_no_cotangent_is_no_correction(reported):
    grads, report = reported(0.3, 0.0)["guarded"]
    assert not report.stopped and report.correction == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


# What it works with.


def test_activations_may_be_trees_with_aux_losses_keys_and_shared_arrays():
    """Every k >= 1 of a two-layer stack is exact, so plain autodiff is the reference."""
    params = mlp_params(3)
    params["key"] = jax.random.split(jax.random.key(0), 3)
    params["index"] = jnp.arange(3)
    shared, x = draw(7, WIDTH), {"a": draw(5, BATCH, WIDTH), "b": draw(6, WIDTH)}

    def run(scan, differentiated, x):
        weights, shared = differentiated

        def block(p, x):
            drop = jax.random.bernoulli(p["key"], 0.7, x["a"].shape)
            h = jnp.where(drop, jnp.tanh(x["a"] @ p["in"]) * shared + x["b"], 0) @ p["out"]
            aux = {"size": jnp.sum(h**2), "index": p["index"], "none": None}
            return {"a": x["a"] + h, "b": x["b"] + 0.1 * h.mean(0)}, aux

        y, aux = scan(block, params | weights, x)
        assert aux["none"] is None
        loss = jnp.sum(y["a"] ** 2) + jnp.sum(y["b"]) + jnp.sum(aux["size"] * jnp.arange(1, 4))
        return loss, aux["index"]

    def exact(block, params, x):
        return lax.scan(lambda x, p: block(p, x), x, params)

    def highway(block, params, x):
        options = {"iterations": 3, "tol": 0.0, "guard": False, "has_aux": True}
        return highway_scan(jax.checkpoint(block), params, x, **options)

    args = ({"in": params["in"], "out": params["out"]}, shared), x
    outs = [
        jax.jit(jax.value_and_grad(lambda w, x, s=s: run(s, w, x), (0, 1), has_aux=True))(*args)
        for s in (highway, exact)
    ]
    (_, index), _ = outs[0]
    assert index.tolist() == [0, 1, 2]
    close(*outs, 1e-5)


def test_bfloat16_accumulates_wide():
    """Sums over layers that are rounded at their end only."""
    layers, width = 64, 100
    # So few digits that a layer's own products are exact.
    params = np.random.default_rng(0).integers(-32, 32, (layers, width)) / 64
    params[0] = 0

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def grads(params, x, shared):
        def run(block, x):
            y = highway_scan(block, params, x, iterations=1, guard=False)
            return jnp.sum(y.astype(jnp.float32))

        # One round: the paths through no block or one.
        return run(lambda p, x: x + p * x, x) + run(lambda p, x: x + p * shared, 0 * x)

    ones = jnp.ones(width, jnp.bfloat16)
    params_bar, x_bar, shared_bar = grads(jnp.asarray(params, jnp.bfloat16), ones, ones)
    assert params_bar.dtype == x_bar.dtype == shared_bar.dtype == jnp.bfloat16
    round_off = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), float)  # noqa: E731
    np.testing.assert_array_equal(np.asarray(shared_bar, float), round_off(params.sum(0)))
    np.testing.assert_array_equal(np.asarray(x_bar, float), round_off(1 + params.sum(0)))


def test_vmap_is_a_loop_over_examples():
    params, xs = mlp_params(), draw(5, 3, BATCH, WIDTH)
    scales = jnp.asarray([0.5, 1.0, 6.0])  # the guard stops one of them sooner

    def grads(x, scale):
        def loss(params, probe):
            block = lambda p, x: x + scale * jnp.tanh(x @ p["in"]) @ p["out"]  # noqa: E731
            return jnp.sum(highway_scan(block, params, x, iterations=2, probe=probe) ** 2)

        return jax.grad(loss, (0, 1))(params, highway_report())

    together = jax.jit(jax.vmap(grads))(xs, scales)
    one = jax.jit(grads)
    each = [one(*args) for args in zip(xs, scales, strict=True)]
    close(together, jax.tree.map(lambda *g: jnp.stack(g), *each), 1e-5)
    assert len(set(np.asarray(together[1].rounds).tolist())) > 1


def test_a_data_parallel_mesh_computes_the_same():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    params, x = mlp_params(), draw(5, 8, WIDTH)

    def loss(params, probe, x):
        return jnp.sum(highway_scan(mlp, params, x, iterations=2, probe=probe) ** 2)

    grad = jax.jit(jax.grad(loss, (0, 1)))
    expected = grad(params, highway_report(), x)
    close(
        grad(
            *jax.device_put((params, highway_report()), NamedSharding(mesh, PartitionSpec())),
            jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
        ),
        expected,
        1e-5,
    )

    def shards(params, x):
        grads = jax.grad(lambda p: loss(p, None, x))(params)
        return grads

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        shards, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec()
    )
    close(jax.jit(mapped)(params, x), expected[0], 1e-5)


def test_second_derivatives_are_of_the_approximate_gradient_or_refused():
    with jax.enable_x64(True):
        params, x = mlp_params(), draw(5, BATCH, WIDTH)

        def size(params, guard, iterations=1):
            def loss(params):
                y = highway_scan(mlp, params, x, iterations=iterations, guard=guard)
                return jnp.sum(y**2)

            return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(params)))

        @jax.jit
        def compare(params, direction):
            def shifted(h):
                return size(jax.tree.map(lambda p, d: p + h * d, params, direction), False)

            ahead, behind = jax.vmap(shifted)(jnp.asarray([1e-5, -1e-5]))
            return (ahead - behind) / 2e-5, jax.grad(size)(params, False)

        direction = mlp_params(scale=1.0)
        slope, grads = compare(params, direction)
        inner = sum(jnp.sum(g * direction[name]) for name, g in grads.items())
        np.testing.assert_allclose(inner, slope, rtol=5e-6)
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            jax.eval_shape(jax.grad(lambda params: size(params, True, 2)), params)
    with pytest.raises(TypeError, match="custom_vjp"):
        run = lambda x: highway_scan(mlp, mlp_params(), x, iterations=1)  # noqa: E731
        jax.jvp(run, (draw(5, BATCH, WIDTH),), (draw(5, BATCH, WIDTH),))


# Flax.


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(WIDTH))

    def __call__(self, x):
        self.mean[...] = self.mean[...] + x.mean(0)
        return x + self.dropout(jnp.tanh(self.linear(x)))


def test_nnx_modules_in_a_list_or_stacked():
    """With as many rounds as layers, against the modules called one by one."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0)
    def make(rngs):
        return Block(rngs)

    graphdef, stacked = nnx.split(make(nnx.Rngs(0)))
    x = draw(5, 4, WIDTH)
    options = {"iterations": 3, "tol": 0.0, "guard": False}

    def each():
        slices = [jax.tree.map(lambda s, i=i: s[i], stacked) for i in range(3)]
        return nnx.List([nnx.merge(graphdef, state) for state in slices])

    def one_by_one(blocks, x):
        for block in blocks:
            x = block(x)
        return x

    def with_options(stack, x):
        y, sizes = highway_nnx(
            stack,
            x,
            has_aux=True,
            call=lambda block, x: (block(x), jnp.sum(x)),
            **options,
        )
        assert sizes.shape == (3,)
        return y

    def measure(run, blocks):
        grads = nnx.jit(nnx.value_and_grad(lambda blocks, x: jnp.sum(run(blocks, x) ** 2)))
        return *grads(blocks, x), nnx.state(blocks, (nnx.BatchStat, nnx.RngCount))

    exact = measure(one_by_one, each())
    listed = measure(lambda blocks, x: highway_nnx(blocks, x, **options), each())
    assert jax.tree.structure(listed) == jax.tree.structure(exact)
    close(listed, exact, 1e-4)
    assert all(np.any(s) for s in jax.tree.leaves(listed[2]))  # the means and counts moved on

    value, *states = measure(with_options, nnx.merge(graphdef, stacked))
    close(value, exact[0], 1e-5)
    for state, expected in zip(states, exact[1:], strict=True):
        slices = [nnx.to_pure_dict(expected)[i] for i in range(3)]
        together = jax.tree.map(lambda *s: np.stack(s), *slices)
        close(nnx.to_pure_dict(state), together, 1e-4)


class LinenBlock(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(flax.linen.Dense(WIDTH)(x)), None


def test_a_scanned_linen_stack():
    scanned = flax.linen.scan(
        LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = draw(5, BATCH, WIDTH)
    params = scanned.init(jax.random.key(0), x, None)["params"]

    def highway(params, x):
        block = lambda p, x: LinenBlock().apply({"params": p}, x, None)[0]  # noqa: E731
        return highway_scan(block, params, x, iterations=3, tol=0.0)

    runs = [highway, lambda params, x: scanned.apply({"params": params}, x, None)[0]]
    grads = [jax.jit(jax.grad(lambda p, r=run: jnp.sum(r(p, x) ** 2)))(params) for run in runs]
    close(*grads, 1e-5)


# What it refuses.


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"block": 3}, TypeError, "block must be a function"),
        ({"block": lambda p, x: (x, x)}, TypeError, "has_aux"),
        ({"block": lambda p, x: x[0]}, TypeError, "like of x"),
        ({"iterations": 1.5}, TypeError, "iterations must be a whole number"),
        ({"iterations": True}, TypeError, "iterations must be a whole number"),
        ({"iterations": -1}, ValueError, "0 or more, or None for all, got -1"),
        ({"tol": -0.1}, ValueError, "tol must be"),
        ({"tol": float("nan")}, ValueError, "tol must be"),
        ({"x": jnp.arange(3)}, TypeError, "floating-point"),
        ({"x": {}}, TypeError, "floating-point"),
        ({"params": {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}}, ValueError, "first axis"),
        ({"params": jnp.ones(())}, ValueError, "first axis"),
        ({"params": {}}, ValueError, "first axis"),
    ],
)
def test_what_can_not_be(change, error, match):
    args = {
        "block": lambda p, x: x + p * x,
        "params": jnp.ones((LAYERS, WIDTH)),
        "x": jnp.ones((BATCH, WIDTH)),
        "iterations": 1,
    }
    with pytest.raises(error, match=match):
        highway_scan(**(args | change))


def test_modules_that_are_no_stack():
    with pytest.raises(TypeError, match="modules"):
        highway_nnx([], jnp.ones((1, 2)), iterations=1)
    with pytest.raises(ValueError, match="module 1 is not of the shape of module 0"):
        two = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0))]
        highway_nnx(two, jnp.ones((1, 2)), iterations=1)


class Noisy(nnx.Module):
    def __init__(self, rngs, mean):
        self.rngs, self.mean = rngs, mean

    def __call__(self, x):
        return x + jax.random.normal(self.rngs.noise(), x.shape) + self.mean[...]


def test_nnx_modules_that_share_what_a_call_changes():
    # What all of them only read they may share.
    rngs, mean = nnx.Rngs(noise=0), nnx.BatchStat(jnp.zeros(2))
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match=r"share rngs/noise/count, .*rngs\.fork"):
        highway_nnx([Noisy(rngs, mean) for _ in range(3)], x, iterations=1)
    own = [Noisy(rngs.fork(), mean) for _ in range(3)]
    expected = x
    for block in nnx.clone(own):
        expected = block(expected)
    close(highway_nnx(own, x, iterations=1), expected, 1e-6)
