"""Row-wise optimizers against NumPy row by row, and against Optax on dense gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from priorityprop_jax.core.row_optimizers import (
    RowSparseState,
    row_counts,
    row_sparse,
    row_sparse_adam,
)
from priorityprop_jax.core.rows import RowSparse, clip_by_global_norm, densify, on_values

N, D, K = 7, 3, 4


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {"b": normal(N), "layers": [{"kernel": normal(N, D)}, {"kernel": normal(N, 2, D)}]}


def make_grads(seed, shape=(N, D), k=K, dtype=jnp.float32):
    """Distinct ascending rows; sometimes the last ones are padding, with values of NaN."""
    rng = np.random.default_rng(seed)
    padding = int(rng.integers(0, k))
    rows = np.sort(rng.choice(shape[0], k - padding, replace=False))
    values = rng.normal(size=(k, *shape[1:]))
    values[k - padding :] = np.nan
    rows = np.concatenate([rows, shape[0] + np.arange(padding)])
    return RowSparse(jnp.asarray(rows, jnp.int32), jnp.asarray(values, dtype), shape)


def make_tree(seed, dtype=jnp.float32):
    bias = jnp.asarray(np.random.default_rng(seed).normal(size=N), dtype)
    first, second = make_grads(seed, dtype=dtype), make_grads(seed + 100, (N, 2, D), dtype=dtype)
    return {"b": bias, "layers": [{"kernel": first}, {"kernel": second}]}


@functools.lru_cache
def compiled(make_tx, **jit_options):
    tx = make_tx()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step, **jit_options)


def run(make_tx, params, steps):
    tx, step = compiled(make_tx)
    state = tx.init(params)
    for grads in steps:
        params, state = step(params, state, grads)
    return params, state


def find(state, kind):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [node for node in nodes if isinstance(node, kind)]


def assert_close(found, expected, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float32),
            np.asarray(y, np.float32),
            **({"rtol": 1e-5, "atol": 1e-6} | tolerance),
        ),
        found,
        expected,
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.weak_type, x.shape) == (y.dtype, y.weak_type, y.shape)
        np.testing.assert_array_equal(x, y)


# Adam by row.


def lazy_adam(w, steps, *, learning_rate, weight_decay=0.0):
    """The slow reference: one row at a time, in float64."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    w = np.array(w, np.float64)
    m, v, count = np.zeros_like(w), np.zeros_like(w), np.zeros(len(w))
    for t, grads in enumerate(steps):
        for row, g in zip(np.asarray(grads.rows), np.asarray(grads.values), strict=True):
            if row >= len(w):
                continue
            count[row] += 1
            m[row] = b1 * m[row] + (1 - b1) * g
            v[row] = b2 * v[row] + (1 - b2) * g * g
            m_hat, v_hat = m[row] / (1 - b1 ** count[row]), v[row] / (1 - b2 ** count[row])
            direction = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * w[row]
            w[row] -= learning_rate(t) * direction
    return w, m, v, count


def schedule(step):
    return 0.1 / (1.0 + step)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_is_the_reference_row_by_row(weight_decay):
    w = make_params()["layers"][0]["kernel"]
    steps = [make_grads(seed) for seed in range(20)]
    options = {"weight_decay": weight_decay}
    found, state = run(lambda: row_sparse_adam(schedule, **options), w, steps)
    expected, m, v, count = lazy_adam(w, steps, learning_rate=schedule, **options)
    assert_close(found, expected)
    (adam,) = find(state, optax.ScaleByAdamState)
    assert_close((adam.mu, adam.nu), (m, v))
    np.testing.assert_array_equal(adam.count, count)
    touched = np.concatenate([g.rows for g in steps])
    counts = row_counts(state, w)["params"]
    np.testing.assert_array_equal(counts, np.bincount(touched[touched < N], minlength=N))
    assert find(state, RowSparseState)[0].step == 20


def test_what_has_no_gradient_stays():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3), "scale": jnp.float32(2.0), "none": None}
    grads = dict.fromkeys(params)
    for tx in (row_sparse_adam(0.1, weight_decay=0.1), row_sparse(optax.sgd(0.1))):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert_same(optax.apply_updates(params, updates), params)


# Any inner optimizer.

INNER = {
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.2),
    "momentum": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "sgd": lambda: optax.sgd(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, centered=True, momentum=0.5),
    "lion": lambda: optax.lion(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
}


@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_dense_gradients_give_the_plain_optimizer(make_inner):
    params = make_params()
    steps = [densify(make_tree(seed)) for seed in range(3)]
    found, state = run(lambda: row_sparse(make_inner()), params, steps)
    expected, _ = run(make_inner, params, steps)
    assert_close(found, expected)
    assert all((counts == 3).all() for counts in row_counts(state, params).values())


@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_each_row_is_a_parameter_of_its_own(make_inner):
    """Rows that have had the same gradients are the same, whenever these came."""
    w = jnp.ones((4, 2))
    g = [jnp.array([[0.5, -1.0]]), jnp.array([[2.0, 0.3]])]
    order = [(0, 0), (1, 0), (1, 1), (3, 0), (0, 1), (3, 1)]
    steps = [RowSparse(jnp.array([row, 4]), jnp.repeat(g[i], 2, 0), (4, 2)) for row, i in order]
    found, state = run(lambda: row_sparse(make_inner()), w, steps)
    expected, _ = run(make_inner, w[0], [x[0] for x in g])
    assert_close(found, jnp.stack([expected, expected, w[2], expected]))
    np.testing.assert_array_equal(row_counts(state, w)["params"], [2, 2, 0, 2])


def test_adam_of_dense_gradients_is_that_of_optax():
    params, steps = make_params(), [densify(make_tree(seed)) for seed in range(3)]
    pairs = [
        (row_sparse_adam(schedule, 0.8, 0.9, 1e-3), optax.adam(schedule, 0.8, 0.9, 1e-3)),
        (row_sparse_adam(0.1, weight_decay=0.2), optax.adamw(0.1, weight_decay=0.2)),
        (row_sparse_adam(0.1), optax.adam(0.1)),
    ]
    for tx, plain in pairs:
        found, expected = (
            run(lambda tx=tx: tx, params, steps),
            run(lambda tx=plain: tx, params, steps),
        )
        assert_close(found[0], expected[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_what_is_not_touched_stays_bit_for_bit(dtype):
    params = make_params(dtype)
    make_tx = lambda: row_sparse_adam(0.1, weight_decay=0.1)  # noqa: E731
    params, state = run(make_tx, params, [densify(make_tree(0, dtype))])
    _, step = compiled(make_tx)
    grads = make_tree(5, dtype) | {"b": None}
    new_params, new_state = step(params, state, grads)
    for i in range(2):
        rows = np.asarray(grads["layers"][i]["kernel"].rows)
        still, moved = np.setdiff1d(np.arange(N), rows), rows[rows < N]
        old = (params["layers"][i], state[0].row_counts[i + 1], state[0].inner_states[i + 1])
        new = (new_params["layers"][i], new_state[0].row_counts[i + 1])
        new = (*new, new_state[0].inner_states[i + 1])
        for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            assert_same(x[still], y[still])
            # An update may be rounded away, but not those of a whole row.
            assert (x[moved] != y[moved]).reshape(len(moved), -1).any(-1).all()
    assert_same(new_params["b"], params["b"])
    assert_same(new_state[0].inner_states[0], state[0].inner_states[0])


weakly_typed = optax.GradientTransformation(
    lambda params: jnp.asarray(1.0), lambda updates, state, params=None: (updates, state * 2.0)
)


def test_state_has_one_structure_and_compiles_once():
    params = make_params()
    for make_tx in (
        lambda: row_sparse(optax.inject_hyperparams(optax.adamw)(0.1)),
        lambda: row_sparse(weakly_typed),
        lambda: row_sparse_adam(schedule, weight_decay=0.1),
        lambda: row_sparse(optax.sgd(0.1, 0.9)),
    ):
        tx, step = compiled(make_tx)
        first = tx.init(params)
        state, moved = first, params
        for seed in range(3):
            moved, state = step(moved, state, make_tree(seed))
        assert step._cache_size() == 1
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
            assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        assert jax.tree.structure(first) == jax.tree.structure(state)
        abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
        assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, first)
        direct = tx.init(jax.eval_shape(lambda: params))
        assert jax.tree.map(jnp.shape, direct) == jax.tree.map(jnp.shape, first)


def test_schedule_runs_on_steps():
    w = jnp.zeros((2, 1))
    g = [RowSparse(jnp.array([row]), jnp.ones((1, 1)), (2, 1)) for row in (0, 0, 1)]
    expected = [[-schedule(0) - schedule(1)], [-schedule(2)]]

    def behind():
        scale = on_values(optax.scale_by_learning_rate(schedule))
        return optax.chain(row_sparse(optax.identity()), scale)

    assert_close(run(behind, w, g)[0], np.asarray(expected))
    inside = run(lambda: row_sparse(optax.sgd(schedule)), w, g)[0]
    assert_close(inside, np.asarray([[-schedule(0) - schedule(1)], [-schedule(0)]]))


def test_learning_rate_can_be_injected():
    tx = optax.inject_hyperparams(row_sparse_adam)(learning_rate=0.1, weight_decay=0.1)
    w = jnp.ones((N, D))
    state = tx.init(w)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, state = tx.update(make_grads(0), state, w)
    assert not np.asarray(updates.values[0]).any()


# In chains.


def test_clipping_in_front():
    params, steps = make_params(), [make_tree(seed) for seed in range(3)]
    found, state = run(
        lambda: optax.chain(clip_by_global_norm(0.5), row_sparse(optax.sgd(0.1))), params, steps
    )
    expected, _ = run(
        lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
        params,
        [densify(grads) for grads in steps],
    )
    assert_close(found, expected)
    assert sorted(row_counts(state, params)) == ["layers/0/kernel", "layers/1/kernel"]


def test_scaling_behind():
    params, steps = make_params(), [make_tree(seed) for seed in range(3)]
    chained = run(
        lambda: optax.chain(
            clip_by_global_norm(0.5),
            row_sparse(optax.scale_by_adam()),
            on_values(optax.scale_by_learning_rate(schedule)),
        ),
        params,
        steps,
    )
    whole = run(
        lambda: optax.chain(clip_by_global_norm(0.5), row_sparse_adam(schedule)), params, steps
    )
    assert_close(chained[0], whole[0])


def test_transformations_that_would_change_the_row_numbers():
    w, grads = jnp.zeros((N, D)), make_grads(0)
    tx = optax.chain(optax.scale(0.5), row_sparse_adam(0.1))
    with pytest.raises(TypeError, match="RowSparse rows: use on_values"):
        tx.update(grads, tx.init(w), w)
    tx = optax.chain(row_sparse(optax.adam(0.1)), optax.scale(0.5))
    with pytest.raises(TypeError, match="RowSparse rows: use on_values"):
        tx.update(grads, tx.init(w), w)


def test_masked_and_extra_arguments():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        seen.append(value)
        return jax.tree.map(lambda u: value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, grads = make_params(), make_tree(0)
    tx = optax.masked(row_sparse(inner), {"b": False, "layers": True})
    updates, _ = tx.update(grads, tx.init(params), params, value=2.0)
    assert seen == [2.0, 2.0]
    np.testing.assert_array_equal(updates["b"], grads["b"])
    assert_close(
        densify(updates["layers"]), jax.tree.map(lambda g: 2 * g, densify(grads["layers"]))
    )


# Odd leaves.


def test_odd_leaves():
    params = {
        "none": None,
        "no_rows": jnp.zeros((0, 3)),
        "no_columns": jnp.zeros((3, 0)),
        "scalar": jnp.float32(1.0),
        "empty": jnp.zeros(0),
        "vector": jnp.ones(3),
        "w": jnp.ones((3, 2)),
    }
    tx = row_sparse_adam(0.1, weight_decay=0.1)
    grads = {
        "none": None,
        "no_rows": RowSparse(jnp.array([0]), jnp.ones((1, 3)), (0, 3)),
        "no_columns": RowSparse(jnp.array([0]), jnp.ones((1, 0)), (3, 0)),
        "scalar": jnp.float32(1.0),
        "empty": jnp.zeros(0),
        "vector": RowSparse(jnp.array([1, 3]), jnp.array([1.0, jnp.nan]), (3,)),
        "w": RowSparse(jnp.zeros(0, jnp.int32), jnp.zeros((0, 2)), (3, 2)),
    }
    for g in (grads, densify(grads)):
        updates, state = jax.jit(tx.update)(g, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, params)
        assert float(moved["scalar"]) < 1 and float(moved["vector"][1]) < 1
        assert sorted(row_counts(state, params)) == ["no_columns", "no_rows", "w"]
    for empty in ({}, [], None):
        assert tx.update(empty, tx.init(empty), empty)[0] == empty
        assert optax.apply_updates(empty, empty) == empty


def test_rows_that_are_nan_arrive():
    w = jnp.ones((3, 2))
    grads = RowSparse(jnp.array([1, 3]), jnp.array([[jnp.nan, 1.0], [jnp.nan] * 2]), (3, 2))
    found, state = run(lambda: row_sparse_adam(0.1), w, [grads])
    np.testing.assert_array_equal(np.isnan(found), [[0, 0], [1, 0], [0, 0]])
    assert np.isnan(find(state, optax.ScaleByAdamState)[0].mu).sum() == 1


def test_under_vmap():
    params = jnp.stack([make_params(seed=i)["layers"][0]["kernel"] for i in range(2)])
    grads = jax.tree.map(lambda *x: jnp.stack(x), *[make_grads(i, k=2) for i in range(2)])
    tx = row_sparse_adam(0.1)

    @jax.jit
    def step(w, g):
        updates, _ = tx.update(g, tx.init(w), w)
        return optax.apply_updates(w, updates)

    found = jax.vmap(step)(params, grads)
    for i in range(2):
        assert_close(found[i], step(params[i], jax.tree.map(lambda x, i=i: x[i], grads)))


# Applying updates.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_updates_are_applied_as_optax_does(dtype):
    params, updates = make_params(dtype), make_tree(3)
    for apply in (optax.apply_updates, jax.jit(optax.apply_updates)):
        found = apply(params, updates)
        assert_same(found, optax.apply_updates(params, densify(updates)))
        numbers = jax.tree.map(np.asarray, params)
        assert_same(apply(numbers, updates), found)


def test_updates_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(7, 3\) do not fit an array of \(6, 3\)"):
        optax.apply_updates(jnp.zeros((6, 3)), make_grads(0))
    with pytest.raises(ValueError):
        optax.apply_updates({"w": jnp.zeros((7, 3))}, {"v": make_grads(0)})


# What is compiled.


def large_results(compiled_step, shape):
    """The operations of a program that give an array of a shape, by name."""
    size = ",".join(map(str, shape))
    for line in compiled_step.as_text().splitlines():
        left, _, right = line.partition(" = ")
        if right.startswith(f"f32[{size}]"):
            yield right.split("}", 1)[1].split("(")[0].strip(), left.strip()


@pytest.mark.parametrize(
    "make_tx",
    [
        lambda: row_sparse_adam(schedule),
        lambda: row_sparse_adam(0.1, weight_decay=0.1),
        lambda: optax.chain(clip_by_global_norm(1.0), row_sparse(optax.sgd(0.1, 0.9))),
    ],
    ids=["adam", "adamw", "momentum"],
)
def test_nothing_of_the_size_of_a_weight_is_copied(make_tx):
    n, k = 512, 16
    tx = make_tx()
    params = {"w1": jnp.ones((n, n)), "w2": jnp.ones((n, n))}

    def step(params, state, x):
        # Two layers of meProp: the gradient of the first reads the weight of the second.
        h = jnp.tanh(x @ params["w1"].T)
        dy = h @ params["w2"].T
        grads = {}
        for name, below in (("w2", h), ("w1", x)):
            rows = jnp.sort(jax.lax.top_k(jnp.abs(dy).sum(0), k)[1])
            part = dy[:, rows]
            grads[name] = RowSparse(rows, part.T @ below, (n, n))
            dy = dy @ params[name]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x = jnp.ones((4, n))
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), x).compile()
    found = list(large_results(program, (n, n)))
    writes = [name for op, name in found if op == "fusion" and "scatter" in name]
    arrays = sum(leaf.shape == (n, n) for leaf in jax.tree.leaves((params, tx.init(params))))
    assert len(writes) == arrays
    others = {op for op, name in found if "scatter" not in name}
    assert others <= {"parameter", "get-tuple-element"}, found
    assert program.memory_analysis().temp_size_in_bytes < n * n * 4 / 2


# Where it runs.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=str)
def test_mesh(spec, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.ones(3)}
    steps = [{"w": make_grads(i, (16, 8)), "b": jnp.ones(3)} for i in range(3)]
    steps.append({"w": jnp.ones((16, 8)), "b": None})
    make_tx = lambda: optax.chain(clip_by_global_norm(1.0), row_sparse_adam(0.1))  # noqa: E731
    expected = run(make_tx, params, steps)
    sharded = {
        "w": jax.device_put(params["w"], sharding),
        "b": jax.device_put(params["b"], NamedSharding(mesh, PartitionSpec())),
    }
    with jax.set_mesh(mesh):
        first = make_tx().init(sharded)[1][0]
        found = run(make_tx, sharded, steps)
    assert first.inner_states[1].mu.sharding == sharding
    assert first.row_counts[1].sharding.spec == PartitionSpec(spec[0])
    assert_close(jax.device_get(found), jax.device_get(expected))
    assert found[0]["w"].sharding.is_equivalent_to(sharding, 2)


def test_checkpoint(tmp_path):
    params, steps = make_params(), [make_tree(seed) for seed in range(4)]
    make_tx = lambda: optax.chain(clip_by_global_norm(1.0), row_sparse_adam(schedule))  # noqa: E731
    tx, step = compiled(make_tx)
    params, state = run(make_tx, params, steps[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": state})
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    assert_same(restored, {"params": params, "state": state})
    again = restored["params"], restored["state"]
    for grads in steps[2:]:
        params, state = step(params, state, grads)
        again = step(*again, grads)
    assert_same(again, (params, state))


def test_flax_nnx_optimizer():
    model, plain = (nnx.Linear(3, 4, rngs=nnx.Rngs(0)) for _ in range(2))
    tx = row_sparse_adam(0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    expected = nnx.Optimizer(plain, optax.adam(0.1), wrt=nnx.Param)
    x = jnp.ones((2, 3))

    def loss_fn(model):
        return jnp.sum(jnp.square(model(x)))

    for _ in range(2):
        optimizer.update(model, nnx.grad(loss_fn)(model))
        expected.update(plain, nnx.grad(loss_fn)(plain))
    assert_close(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(plain)))
    counts = row_counts(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert {name: np.asarray(x).tolist() for name, x in counts.items()} == {"kernel": [2, 2, 2]}
    # Initialised with variables, it holds arrays, and updates trees of arrays.
    state = tx.init(nnx.state(model, nnx.Param))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    pure = nnx.as_pure(nnx.state(model, nnx.Param))
    grads = jax.tree.map(
        lambda x: RowSparse(jnp.array([2]), x[2:], x.shape) if x.ndim > 1 else None, pure
    )
    updates, state = tx.update(grads, state, pure)
    moved = optax.apply_updates(pure, updates)
    np.testing.assert_array_equal(moved["kernel"][:2], pure["kernel"][:2])
    assert (moved["kernel"][2] != pure["kernel"][2]).all()


def test_flax_linen_parameters():
    params = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
    state = row_sparse(optax.sgd(0.1, 0.9)).init(params)
    assert list(row_counts(state, params)) == ["params/kernel"]


# Errors.


def test_gradients_that_do_not_fit():
    w = jnp.zeros((6, 3))
    tx = row_sparse(optax.sgd(0.1))
    state = tx.init(w)
    for params in (w, None):
        with pytest.raises(ValueError, match=r"\(7, 3\) with 4 rows .* does not fit"):
            tx.update(make_grads(0), state, params)
    short = RowSparse(jnp.arange(2), jnp.ones((3, 3)), (6, 3))
    with pytest.raises(ValueError, match=r"2 rows and values \(3, 3\)"):
        tx.update(short, state, w)
    with pytest.raises(ValueError, match="2 gradients and 1 leaves"):
        tx.update([w, w], state, [w, w])


def test_no_row_counts():
    params = make_params()
    with pytest.raises(ValueError, match="found 0; it is the state of row_sparse"):
        row_counts(optax.adam(0.1).init(params), params)
    state = row_sparse_adam(0.1).init(params)
    with pytest.raises(ValueError, match="found 2"):
        row_counts((state, state), params)
    with pytest.raises(ValueError, match="not of these parameters"):
        row_counts(state, params["layers"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: row_sparse(3), TypeError, r"optax\.GradientTransformation, got 3"),
        (lambda: row_sparse_adam(None), TypeError, "a number or a schedule"),
        (lambda: row_sparse_adam("0.1"), TypeError, "learning_rate must be a number"),
        (lambda: row_sparse_adam(-1.0), ValueError, "learning_rate must be at least 0"),
        (lambda: row_sparse_adam(0.1, 1.0), ValueError, r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: row_sparse_adam(0.1, b2=-0.1), ValueError, "b2 must be in"),
        (lambda: row_sparse_adam(0.1, eps=float("nan")), ValueError, "eps must be"),
        (lambda: row_sparse_adam(0.1, weight_decay=True), TypeError, "weight_decay must be"),
        (lambda: row_sparse_adam(float("inf")), ValueError, "learning_rate must be at least 0 and"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
