"""The transformations as good citizens: inside Optax, inside Flax, under every JAX transform."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from priorityprop_jax import find_slots, priorityprop, scale_by_priority
from priorityprop_jax.priority import top_k_updates
from tests.priority.test_transform import (
    STACKED,
    assert_same,
    axis_of,
    flat,
    gradients,
    make_params,
    train,
)

FACES = {
    "wrap": lambda **options: priorityprop(optax.adam(0.01), **options),
    "scale": lambda **options: optax.chain(optax.adam(0.01), scale_by_priority(**options)),
    "scale-before": lambda **options: optax.chain(scale_by_priority(**options), optax.adam(0.01)),
}
OPTIONS = dict(total_budget=12, min_updates=0, max_updates=8, recalc_every=4)
faces = pytest.mark.parametrize("face", FACES)
# Where the place in a chain makes no difference
both = pytest.mark.parametrize("face", ["wrap", "scale"])


def signature(tree):
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, getattr(x, "weak_type", False), x.sharding)
        for x in jax.tree.leaves(tree)
    ]


def moved(before, after):
    return {name for name, x in flat(before).items() if not np.array_equal(x, flat(after)[name])}


@faces
def test_state_keeps_structure_dtypes_weak_types_and_sharding(face):
    params = make_params()
    tx = FACES[face](**OPTIONS)
    state = tx.init(params)
    step = jax.jit(tx.update)
    updates, after = step(gradients(params, 0), state, params)
    assert signature(after) == signature(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    for i in range(1, 9):
        _, after = step(gradients(params, i), after, params)
    assert step._cache_size() == 1
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


@both
def test_init_on_shapes_only(face):
    params = make_params(1, STACKED)
    shapes = jax.eval_shape(lambda: params)
    tx = FACES[face](stacked_axis=axis_of, **OPTIONS)
    assert_same(tx.init(shapes), tx.init(params))


@both
def test_with_and_without_jit_agree(face):
    params = make_params()
    tx = FACES[face](**OPTIONS)
    state = tx.init(params)
    for i in range(3):
        grads = gradients(params, i)
        eager, eager_state = tx.update(grads, state, params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        chex.assert_trees_all_close(eager, updates, rtol=1e-5, atol=1e-8)
        assert eager_state[-1 if face == "scale" else 0] is not None


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adam(0.1)])
def test_params_may_be_left_out_if_the_optimizer_does_not_need_them(inner):
    params = make_params()
    tx = priorityprop(inner, **OPTIONS)
    grads = gradients(params, 0)
    step = jax.jit(tx.update)
    without, _ = step(grads, tx.init(params))
    with_params, _ = step(grads, tx.init(params), params)
    assert_same(without, with_params)
    needs = priorityprop(optax.adamw(0.1), **OPTIONS)
    with pytest.raises(ValueError, match="params"):
        needs.update(grads, needs.init(params))


def test_extra_arguments_reach_the_inner_optimizer_and_unknown_ones_do_no_harm():
    params = make_params()
    grads = gradients(params, 0)
    tx = priorityprop(optax.polyak_sgd(), None, 1, 1, 1)
    step = jax.jit(tx.update)
    small, _ = step(grads, tx.init(params), params, value=0.1)
    large, _ = step(grads, tx.init(params), params, value=0.2)
    chex.assert_trees_all_close(jax.tree.map(lambda x: 2 * x, small), large, rtol=1e-5)
    for face in FACES.values():
        tx = face(**OPTIONS)
        jax.eval_shape(
            lambda grads, tx=tx: tx.update(
                grads, tx.init(params), params, value=0.1, unknown="thing"
            ),
            grads,
        )


TREES = {
    "empty": {},
    "none-leaves": {"a": jnp.ones(3), "b": None, "c": {"d": None, "e": jnp.ones(2)}},
    "scalars": {"a": jnp.float32(2.0), "b": jnp.ones(())},
    "zero-size": {"a": jnp.ones((0, 3)), "b": jnp.ones(2)},
    "one-array": jnp.ones((2, 2)),
    "list": [jnp.ones(2), (jnp.ones(3), jnp.ones(1))],
    "bfloat16": {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)},
    "complex": {"a": jnp.ones(3, jnp.complex64), "b": jnp.ones(2)},
}


@pytest.mark.parametrize(("face", "high"), [("wrap", 4), ("wrap", 50), ("scale", 50)])
@pytest.mark.parametrize("tree", TREES)
def test_any_tree(face, tree, high):
    params = TREES[tree]
    tx = FACES[face](total_budget=0.5, min_updates=0, max_updates=high, recalc_every=4)
    state = tx.init(params)
    grads = jax.tree.map(lambda x: (x * 0.5).astype(x.dtype), params)
    step = jax.jit(tx.update)
    for _ in range(5):
        updates, after = step(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert signature(after) == signature(state)
        state = after
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert u.dtype == g.dtype and u.shape == g.shape and np.all(np.isfinite(u))
        params = optax.apply_updates(params, updates)


def test_bfloat16_parameters_with_float32_state():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    tx = priorityprop(optax.adam(0.01, mu_dtype=jnp.float32), **OPTIONS)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(gradients(params, 0), state, params)
    assert {x.dtype for x in jax.tree.leaves(after.inner_state[0].mu)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert after.priorities.dtype == jnp.float32
    assert signature(after) == signature(state)


def test_tied_parameters_are_two_leaves():
    shared = jnp.ones(3)
    params = {"embed": shared, "head": shared}
    tx = priorityprop(optax.adam(0.1), 2, 1, 1, 1)
    grads = {"embed": jnp.ones(3), "head": -jnp.ones(3)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["embed"], -updates["head"])


@both
def test_inside_optax_wrappers(face):
    params = make_params()
    budgeted = FACES[face](**{**OPTIONS, "min_updates": 1})
    labels = {"Dense_0": "a", "Dense_1": "b", "Dense_2": "a"}
    half = FACES[face](total_budget=0.5, max_updates=8, recalc_every=4)
    wrapped = {
        "clip": optax.chain(optax.clip_by_global_norm(0.5), budgeted),
        "schedule": optax.chain(budgeted, optax.scale_by_schedule(lambda step: 0.1 * step)),
        "masked": optax.masked(half, {"Dense_0": True, "Dense_1": False, "Dense_2": True}),
        "partition": optax.partition({"a": half, "b": optax.sgd(0.1)}, labels),
        "multi-steps": optax.MultiSteps(budgeted, 2).gradient_transformation(),
        "if-finite": optax.apply_if_finite(budgeted, 3),
        "top-k": optax.chain(budgeted, top_k_updates(0.1)),
        "named": optax.named_chain(("budget", budgeted)),
    }
    if face == "scale":  # those that look into what they wrap, or change what it sees
        wrapped = {name: wrapped[name] for name in ("masked", "partition", "multi-steps")}
    for name, tx in wrapped.items():
        new, state = train(tx, params, 9)
        assert moved(params, new), name
        assert all(np.all(np.isfinite(x)) for x in flat(new).values()), name
        state = jax.device_get(state)
        doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
        assert jax.tree.structure(doubled) == jax.tree.structure(state), name
        chex.assert_trees_all_close(
            optax.tree.get(doubled, "mu"),
            jax.tree.map(lambda x: 2 * x, optax.tree.get(state, "mu")),
        ) if name not in ("masked", "partition") else None


def test_clipping_in_front_sees_all_gradients():
    params = make_params()
    tx = optax.chain(optax.clip_by_global_norm(0.5), priorityprop(optax.sgd(1.0), None, 4, 4, 4))
    updates, _ = jax.jit(tx.update)(gradients(params, 0), tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wrap", "scale"])
def test_inject_hyperparams_changes_the_budget_without_recompiling(name):
    params = make_params()
    if name == "wrap":
        make = optax.inject_hyperparams(priorityprop, static_args=("inner",))
        tx = make(inner=optax.adam(0.01), total_budget=12, min_updates=0, max_updates=8)
    else:
        tx = optax.inject_hyperparams(scale_by_priority)(total_budget=12, min_updates=0)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for budget in (12, 30, 48):
        state.hyperparams["total_budget"] = jnp.asarray(budget, jnp.int32)
        for i in range(10):
            _, state = step(gradients(params, i), state, params)
        assert int(state.inner_state.allocation.sum()) == budget
    assert step._cache_size() == 1


def test_injected_learning_rate_inside_holds_for_every_slot():
    params = make_params()
    tx = priorityprop(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), None, 1, 1, 1)
    state = tx.init(params)
    grads = gradients(params, 0)
    state.inner_state.hyperparams["learning_rate"] = jnp.float32(0.5)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.5 * g, grads), rtol=5e-6)


@both
def test_scan_over_steps_equals_a_loop(face):
    params = make_params()
    tx = FACES[face](**OPTIONS)

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(gradients(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(9)))(
        (params, tx.init(params))
    )
    looped, looped_state = train(tx, params, 9)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=1e-6)
    assert (
        optax.tree.get(state, "update_counts").tolist()
        == optax.tree.get(looped_state, "update_counts").tolist()
    )


@both
def test_vmap_over_seeds_equals_one_run_a_seed(face):
    seeds = [make_params(seed) for seed in range(3)]
    tx = FACES[face](total_budget=20, min_updates=0, max_updates=20, recalc_every=4)

    def step(i, carry):
        params, state = carry
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(params):
        params, state = jax.lax.fori_loop(0, 5, step, (params, tx.init(params)))
        return params, optax.tree.get(state, "update_counts")

    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: np.stack(x), *seeds))
    apart = [run(params) for params in seeds]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *x: np.stack(x), *apart), rtol=1e-5, atol=1e-6
    )
    assert len({tuple(counts.tolist()) for _, counts in apart}) > 1


def test_under_remat():
    params = make_params()
    tx = priorityprop(optax.adam(0.01), **OPTIONS)
    state = tx.init(params)
    grads = gradients(params, 0)
    plain, _ = jax.jit(tx.update)(grads, state, params)
    remat, _ = jax.jit(jax.remat(tx.update))(grads, state, params)
    assert_same(plain, remat)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@both
def test_nnx_optimizer(face):
    model = Net(nnx.Rngs(0))
    tx = FACES[face](**OPTIONS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, y = jax.random.normal(jax.random.key(1), (2, 16, 8))
    y = y[:, :4]

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(nnx_loss)(model, x, y)
        optimizer.update(model, grads)
        return loss

    pure_params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < losses[0]

    # The same in a bare loop over the pure parameters
    def loss(pure):
        merged = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, pure)), rest)
        return nnx_loss(merged, x, y)

    @jax.jit
    def pure_step(pure, state):
        updates, state = tx.update(jax.grad(loss)(pure), state, pure)
        return optax.apply_updates(pure, updates), state

    state = tx.init(pure_params)
    for _ in range(12):
        pure_params, state = pure_step(pure_params, state)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(trained, pure_params, rtol=1e-4, atol=1e-5)
    names = find_slots(nnx.state(model, nnx.Param)).names
    assert names == find_slots(pure_params).names
    assert "layers/0/kernel" in names


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(4)(x)


@faces
def test_linen_train_state(face):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    net = LinenNet()
    params = net.init(jax.random.key(1), x)["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=FACES[face](**OPTIONS))
    state = state.replace(step=jnp.int32(0))  # a Python 0 at first, which costs a compile

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - x[:, :4]) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(12):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0] and step._cache_size() == 1
    assert find_slots(params).depths == (2, 2, 1, 1, 0, 0)


BIG = {"Dense_0": {"kernel": (16, 8), "bias": (8,)}, "blocks": {"kernel": (2, 8, 16)}}


@pytest.mark.parametrize(("face", "high"), [("wrap", 4), ("wrap", 12), ("scale", 12)])
def test_a_mesh_of_eight_devices_makes_the_same_decisions(face, high):
    params = make_params(2, BIG)
    options = dict(
        total_budget=0.6,
        min_updates=0,
        max_updates=high,
        recalc_every=4,
        stacked_axis=lambda path: 0 if "blocks" in path else None,
    )
    tx = FACES[face](**options)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    specs = {
        "Dense_0": {"kernel": P("data", "model"), "bias": P("model")},
        "blocks": {"kernel": P(None, "model", "data")},
    }
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    sharded = jax.device_put(params, shardings)
    plain, plain_state = train(tx, params, 9)

    state = jax.jit(tx.init)(sharded)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(9):
        sharded, state = step(sharded, state, i)
    for name in ("update_counts", "allocation"):
        a, b = (optax.tree.get(s, name).tolist() for s in (state, plain_state))
        assert a == b
    chex.assert_trees_all_close(sharded, plain, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda x, s: s.is_equivalent_to(x.sharding, x.ndim) or pytest.fail("lost"),
        sharded,
        shardings,
    )
    if face == "wrap":
        mu = state.inner_state[0].mu["Dense_0"]["kernel"]
        assert mu.sharding.is_equivalent_to(shardings["Dense_0"]["kernel"], 2)


def test_nnx_optimizer_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:8]), ("model",))

    class Sharded(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.linear = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)
            self.head = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.linear(x)))

    def run(mesh):
        model = Sharded(nnx.Rngs(0))
        if mesh is not None:
            kernel = model.linear.kernel
            kernel[...] = jax.device_put(kernel[...], NamedSharding(mesh, P(None, "model")))
        optimizer = nnx.Optimizer(model, priorityprop(optax.adam(0.01), **OPTIONS), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(nnx_loss)(model, x, y)
            optimizer.update(model, grads)

        for _ in range(6):
            step(model, optimizer)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer.opt_state.update_counts

    x, y = jax.random.normal(jax.random.key(1), (2, 16, 8))
    y = y[:, :4]
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("model",))):
        alone, counts = run(None)
    with jax.set_mesh(mesh):
        together, sharded_counts = run(mesh)
    assert np.asarray(counts).tolist() == np.asarray(sharded_counts).tolist()
    chex.assert_trees_all_close(flat(alone), flat(together), rtol=1e-4, atol=1e-5)


@both
def test_orbax_restores_bit_for_bit(face, tmp_path):
    params = make_params()
    tx = FACES[face](**OPTIONS)
    middle, state = train(tx, params, 6)  # in the middle of a cycle
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": middle, "state": state})
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_same(restored["state"], state)

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    runs = []
    for p, s in ((middle, state), (restored["params"], restored["state"])):
        for i in range(6, 14):
            p, s = step(p, s, i)
        runs.append((p, s))
    assert_same(*runs)
