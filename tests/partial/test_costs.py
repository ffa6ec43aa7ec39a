"""Predicted costs against those of compiled programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax import find_slots
from priorityprop_jax.core.program import build, constants, product_flops, program_flops
from priorityprop_jax.partial import StepCosts, measure_costs, value_and_grad

LAYERS, WIDTH, INNER, BATCH = 2, 24, 48, 16


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    "embed": {"kernel": array(WIDTH, WIDTH)},
    **{
        f"layer_{i}": {
            "up": array(WIDTH, INNER),
            "up_bias": array(INNER),
            "down": array(INNER, WIDTH),
            "scale": array(WIDTH),
        }
        for i in range(LAYERS)
    },
    "head": {"kernel": array(WIDTH, 8)},
}
X = array(BATCH, WIDTH)


def loss_fn(params, x):
    h = x @ params["embed"]["kernel"]
    for i in range(LAYERS):
        p = params[f"layer_{i}"]
        z = h * p["scale"] * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
        h = h + jax.nn.relu(z @ p["up"] + p["up_bias"]) @ p["down"]
    return jnp.mean(jax.nn.logsumexp(h @ params["head"]["kernel"], axis=-1))


def by_layer(path):
    return path.split("/")[0]


def compiled(slots, active):
    step = value_and_grad(loss_fn, active)
    return jax.jit(step).lower(PARAMS, X).compile()


@pytest.fixture(scope="module")
def slots():
    return find_slots(PARAMS)


@pytest.fixture(scope="module")
def measured(slots):
    return measure_costs(loss_fn, PARAMS, X, slots)


def up_to(slots, depth):
    return {name for name, d in zip(slots.names, slots.depths, strict=True) if d <= depth}


# What is predicted.


def some_sets(slots, seed=0, count=8):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen = rng.random(len(slots)) < rng.choice([0.2, 0.5, 0.8])
        yield {name for name, on in zip(slots.names, chosen, strict=True) if on} or {"head/kernel"}


def test_floors_and_own_costs_predict_any_active_set(slots, measured):
    depths = dict(zip(slots.names, slots.depths, strict=True))
    product = 2 * BATCH * WIDTH * INNER
    for active in some_sets(slots):
        deepest = max(depths[name] for name in active)
        first = [name for name in active if depths[name] == deepest and "layer" in name]
        found = program_flops(compiled(slots, active))
        predicted = measured.of(slots, active)
        # A floor is of the chain back through all of a layer, which its last slots do not need.
        spare = 0 if not first or f"layer_{LAYERS - deepest}/scale" in active else 2 * product
        assert 0.97 * found <= predicted <= 1.03 * found + spare, sorted(active)


def test_one_slot_a_layer():
    slots = find_slots(PARAMS, group=by_layer)
    costs = measure_costs(loss_fn, PARAMS, X, slots)
    for active in [{"head"}, {"layer_1"}, {"embed"}, {"layer_0", "head"}, {"embed", "layer_1"}]:
        found = program_flops(compiled(slots, active))
        predicted = costs.of(slots, active)
        np.testing.assert_allclose(predicted, found, rtol=0.04, err_msg=str(active))


def test_a_full_step_is_that_of_the_compiler(slots, measured):
    found = program_flops(compiled(slots, set(slots.names)))
    assert measured.full == pytest.approx(found, rel=0.02)


def test_loops_count_as_often_as_they_run():
    """A scanned stack costs what its layers one by one do; the compiler says otherwise."""
    params = {"stack": array(6, 32, 32), "head": array(32, 4)}

    def scanned(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
        return jnp.sum(x @ params["head"])

    def unrolled(params, x):
        for i in range(6):
            x = jnp.tanh(x @ params["stack"][i])
        return jnp.sum(x @ params["head"])

    slots, x = find_slots(params), array(8, 32)
    one, other = (measure_costs(loss, params, x, slots) for loss in (scanned, unrolled))
    np.testing.assert_allclose(one.floors, other.floors, rtol=0.05)
    # Unrolled, gradients of layers are put together by sums.
    np.testing.assert_allclose(one.own, other.own, rtol=0.1)


def test_vectors(slots, measured):
    costs = measured
    assert costs.unit == "flops"
    assert len(costs.own) == len(slots)
    assert len(costs.floors) == max(slots.depths) + 1
    assert all(a <= b for a, b in itertools.pairwise(costs.floors))
    assert min(costs.own) >= 0 and min(costs.floors) > 0
    assert costs.full == costs.of(slots, slots.names)
    # A weight gradient is a product of its own.
    own = dict(zip(slots.names, costs.own, strict=True))
    assert own["layer_1/up"] == pytest.approx(2 * BATCH * WIDTH * INNER, rel=0.1)
    assert own["layer_1/up_bias"] < 0.1 * own["layer_1/up"]


def test_a_model_of_one_slot():
    params = {"w": array(8, 8)}
    costs = measure_costs(lambda p, x: jnp.sum(x @ p["w"]), params, array(4, 8), find_slots(params))
    assert costs.floors[0] + costs.own[0] == costs.full > 0


def test_aux_and_batches_of_more_than_arrays(slots, measured):
    def with_aux(params, batch):
        return loss_fn(params, batch["x"]), {"loss": 1.0}

    slots = find_slots(PARAMS, group=lambda path: "all")
    batch = {"x": X, "number": 3, "fraction": 0.5}
    costs = measure_costs(with_aux, PARAMS, batch, slots, has_aux=True)
    assert costs.full == pytest.approx(measured.full, rel=0.01)


def test_stacked_layers():
    params = {"stack": {"kernel": array(3, 16, 16)}, "head": {"kernel": array(16, 4)}}

    def loss(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["stack"]["kernel"][i])
        return jnp.sum(x @ params["head"]["kernel"])

    axis = lambda path: 0 if "stack" in path else None  # noqa: E731
    slots = find_slots(params, stacked_axis=axis)
    costs = measure_costs(loss, params, array(8, 16), slots)
    for active in ({"stack/kernel[2]"}, {"stack/kernel[0]", "stack/kernel[2]", "head/kernel"}):
        step = value_and_grad(loss, active, stacked_axis=axis)
        found = program_flops(jax.jit(step).lower(params, array(8, 16)).compile())
        # Moving layers in and out of their stack counts here, where layers are tiny.
        np.testing.assert_allclose(costs.of(slots, active), found, rtol=0.1)


# Only shapes are used.


def test_nothing_is_allocated():
    wide = {"embed": array(200_000, 50_000), "head": array(50_000, 10)}  # 40 GB

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["embed"]) @ params["head"])

    slots = find_slots(wide)
    before = {id(x) for x in jax.live_arrays()}
    costs = measure_costs(loss, wide, array(4, 200_000), slots)
    assert {id(x) for x in jax.live_arrays()} <= before
    assert costs.full > 3 * 2 * 4 * 200_000 * 50_000 / 2
    own = dict(zip(slots.names, costs.own, strict=True))
    assert own["embed"] > 1e3 * own["head"]


def test_arrays_are_not_touched():
    params = {"Dense_0": jnp.ones((8, 8)), "Dense_1": jnp.ones((8, 8))}
    x = np.ones((4, 8), np.float32)
    measure_costs(
        lambda p, x: jnp.sum(jnp.tanh(x @ p["Dense_0"]) @ p["Dense_1"]),
        params,
        x,
        find_slots(params),
    )
    assert not any(p.is_deleted() for p in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["Dense_0"], np.ones((8, 8)))


# Time.


def test_timed_floors_do_not_decrease():
    params = {f"Dense_{i}": array(64, 64) for i in range(3)}

    def loss(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"Dense_{i}"])
        return jnp.sum(x)

    slots = find_slots(params)
    times = measure_costs(loss, params, array(64, 64), slots, unit="milliseconds", repeats=2)
    assert times.unit == "milliseconds"
    assert all(a <= b for a, b in itertools.pairwise(times.floors))
    assert len(times.own) == 3 and min(times.own) >= 0
    assert 0 < times.full < 60_000


def test_timed_with_random_keys():
    loss = lambda p, key: jnp.sum(p["w"] * jax.random.normal(key, (4,)))  # noqa: E731
    params = {"w": array(4)}
    costs = measure_costs(
        loss, params, jax.random.key(0), find_slots(params), unit="milliseconds", repeats=1
    )
    assert costs.full > 0


# Without the prefix.


def test_without_prefix():
    costs = StepCosts(own=(1.0, 2.0, 3.0), floors=(10.0, 12.0, 14.0), unit="milliseconds")
    less = costs.without_prefix([7.0, 4.0, 0.0])
    assert less == StepCosts((1.0, 2.0, 3.0), (3.0, 8.0, 14.0), "milliseconds")
    # Neither negative nor decreasing, whatever the forward passes are said to cost.
    assert costs.without_prefix([5.0, 11.0, 100.0]).floors == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="shorter"):
        costs.without_prefix([1.0, 2.0])


# Errors.


def test_errors():
    params = {"w": array(2, 2)}

    def loss(params, x):
        return jnp.sum(x @ params["w"])

    with pytest.raises(ValueError, match="unit must be flops, milliseconds or bytes"):
        measure_costs(loss, params, array(2, 2), find_slots(params), unit="seconds")
    with pytest.raises(ValueError, match="no slots"):
        measure_costs(loss, {}, array(2, 2), find_slots({}))
    with pytest.raises(ValueError, match="none of that name"):
        measure_costs(loss, params, array(2, 2), find_slots({"v": array(2, 2)}))


def test_product_flops_count_loops_and_the_dearest_branch():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    one = 2 * 4 * 8 * 8

    def looped(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0].sum()

    def count(function, *arguments):
        return product_flops(jax.make_jaxpr(function)(*arguments))

    assert count(looped, x, w) == 5 * one
    # Backward: two products for each of the forward pass.
    assert count(jax.grad(looped, (0, 1)), x, w) == 15 * one
    assert count(
        jax.jit(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, jnp.sin, x)), x
    ) == (2 * one)
    images, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 7))
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count(conv, images, kernel) == 2 * (2 * 5 * 5 * 7) * (3 * 3 * 3)
    # What a compiler counts for a program without loops
    step = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) @ w))
    compiled = program_flops(jax.jit(step).lower(w).compile())
    assert abs(count(step, w) / compiled - 1) < 0.2
    # And its own account, which is of more than products.
    assert product_flops(jax.make_jaxpr(step)(w)) < program_flops(jax.make_jaxpr(step)(w))
    assert abs(program_flops(jax.make_jaxpr(step)(w)) / compiled - 1) < 0.05


def test_program_flops_leave_out_what_nothing_reads():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    # It makes the gradients of both, whoever wants them.
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, dy: (dy @ r[1].T, r[0].T @ dy))
    one = 2 * 4 * 8 * 8
    for wrapped in (product, jax.jit(product), jax.checkpoint(product)):
        loss = lambda x, w, f=wrapped: jnp.sum(f(x, w))  # noqa: E731
        once, twice = (jax.make_jaxpr(jax.grad(loss, n))(x, w) for n in (1, (0, 1)))
        # A sum that nobody reads is not run either.
        assert product_flops(twice) - product_flops(once) == one
        assert product_flops(once) <= 2 * one


def test_program_flops_of_all_devices():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    w = jnp.ones((8, 8))
    spread = jax.shard_map(lambda x: x @ w, mesh=mesh, in_specs=spec, out_specs=spec)
    assert program_flops(jax.make_jaxpr(spread)(jnp.ones((16, 8)))) == 2 * 16 * 8 * 8


def test_constants_of_all_parts():
    table = np.arange(3.0, dtype=np.float32)
    found = list(constants(jax.make_jaxpr(jax.jit(lambda x: x + table))(jnp.ones(3))))
    assert any(np.array_equal(x, table) for x in found)


def test_what_can_wait_runs_while_a_program_compiles():
    done = []
    program = build(lambda x: x + 1, (jnp.ones(2),), None, meanwhile=[lambda: done.append(1)])
    np.testing.assert_array_equal(program.run(jnp.ones(2)), [2.0, 2.0])
    assert done == [1]

    def fails():
        raise KeyError("of my own")

    with pytest.raises(KeyError, match="of my own"):
        build(lambda x: x + 2, (jnp.ones(2),), None, meanwhile=[fails])
