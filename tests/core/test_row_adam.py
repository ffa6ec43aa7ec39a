"""Adam by rows against Optax's own, of whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from priorityprop_jax import exact, meprop
from priorityprop_jax.core.row_adam import RowAdamState, _missed, _sizes, row_adam
from priorityprop_jax.core.rows import Held, RowSparse, densify
from priorityprop_jax.training import Trainer

ROWS, WIDTH, STEPS = 30, 3, 230

constant = 0.05
warm_up = optax.warmup_cosine_decay_schedule(0.0, 0.1, 40, 200)
steps_down = optax.piecewise_constant_schedule(0.1, {50: 0.1, 120: 3.0})
OPTIONS = [
    {"learning_rate": constant},
    {"learning_rate": warm_up, "b1": 0.8},
    {"learning_rate": steps_down, "weight_decay": 0.1},
    {"learning_rate": constant, "weight_decay": 0.3, "b1": 0.0},
    {"learning_rate": warm_up, "eps": 0.1, "b2": 0.99},
    {"learning_rate": constant, "b1": 0.9, "b2": 0.9, "weight_decay": 0.01},
]


def touches(seed):
    """Which rows have a gradient at a step: some often, others after long gaps, one never."""
    random = np.random.default_rng(seed)
    often = random.integers(0, 5, 2)
    rarely = random.integers(5, ROWS - 1, 1) if random.random() < 0.15 else np.zeros(0, int)
    return np.concatenate([often, rarely, often[:1]])


def params_of(dtype):
    table = jax.random.normal(jax.random.key(0), (ROWS, WIDTH), dtype)
    return {"bias": jnp.ones(WIDTH, dtype), "kernel": jnp.ones((4, WIDTH), dtype), "table": table}


def loss_fn(params, ids, y):
    hidden = exact.take(params["table"], ids)
    # Of gradients of very different sizes, so that eps counts for some.
    scale = 10.0 ** -jnp.arange(0, 3 * WIDTH, 3, dtype=hidden.dtype)
    return jnp.sum(
        (jnp.sin(hidden @ params["kernel"].T + y) * params["bias"].sum()) ** 2
    ) + jnp.sum(hidden**3 * scale)


def both(options, dtype, steps=STEPS, clip=None):
    """Parameters after steps by rows, all caught up, and after steps of Optax."""
    adam = optax.adamw if "weight_decay" in options else optax.adam
    ours, theirs = row_adam(**options), adam(**options)
    if clip:
        ours = optax.chain(meprop.clip_by_global_norm(clip), ours)
        theirs = optax.chain(optax.clip_by_global_norm(clip), theirs)
    found = expected = params_of(dtype)
    state, plain = ours.init(found), theirs.init(expected)

    @jax.jit
    def step(params, state, ids, y):
        params, state = exact.catch_up(params, state, {"table": ids})
        value, grads = exact.value_and_grad(loss_fn)(params, ids, y)
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def plain_step(params, state, ids, y):
        value, grads = jax.value_and_grad(loss_fn)(params, ids, y)
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    ids = [jnp.asarray(touches(seed)) for seed in range(steps)]
    ids = [jnp.pad(x, (0, 4 - len(x)), mode="edge") for x in ids]
    values = []
    for i, own in enumerate(ids):
        y = jnp.asarray(0.01 * i, dtype)
        found, state, value = step(found, state, own, y)
        expected, plain, other = plain_step(expected, plain, own, y)
        values.append((value, other))
    assert step._cache_size() == 1
    found, state = jax.jit(exact.catch_up)(found, state)
    return found, state, expected, plain, np.asarray(values)


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_adam_of_all_rows(options):
    with jax.enable_x64(True):
        found, state, expected, plain, values = both(options, jnp.float64)
        np.testing.assert_allclose(*values.T, rtol=1e-9)
        for name, want in expected.items():
            np.testing.assert_allclose(found[name], want, rtol=1e-9, atol=1e-11)
        adam = next(s for s in plain if isinstance(s, optax.ScaleByAdamState))
        np.testing.assert_allclose(state.adam.mu["table"], adam.mu["table"], atol=1e-14)
        np.testing.assert_allclose(state.adam.nu["table"], adam.nu["table"], rtol=1e-8)
        assert (state.last[2] == STEPS).all()


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_in_float32_it_is_so_to_rounding(options, clip):
    found, state, expected, _, values = both(options, jnp.float32, clip=clip)
    np.testing.assert_allclose(*values.T, rtol=1e-3)
    # A training that went another way would be off by many rates.
    np.testing.assert_allclose(found["table"], expected["table"], rtol=1e-4, atol=1e-4)


def test_lazy_adam_is_another_algorithm():
    """Else the tests above would tell nothing."""
    found, *_ = both(OPTIONS[0], jnp.float32)
    params, tx = params_of(jnp.float32), meprop.row_sparse_adam(constant)
    state = tx.init(params)
    grad_fn = jax.jit(jax.grad(loss_fn))
    for seed in range(STEPS):
        grads = grad_fn(params, touches(seed), 0.01 * seed)
        rows = np.unique(touches(seed))
        grads["table"] = RowSparse(jnp.asarray(rows), grads["table"][rows], (ROWS, WIDTH))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.abs(params["table"] - found["table"]).max() > 0.05


@pytest.mark.parametrize("b1, b2", [(0.9, 0.999), (0.9, 0.9), (0.99, 0.999), (0.5, 0.99999)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_gap_is_the_sum_over_its_steps(b1, b2, dtype):
    with jax.enable_x64(True):
        rule = row_adam(0.1, b1, b2).init({"x": jnp.zeros((1, 1))}).rule
        random = np.random.default_rng(0)
        m = random.normal(size=40)
        v = (m * 10 ** random.uniform(-9, 1, 40)) ** 2
        one, two = (float(np.asarray(b, dtype)) for b in (b1, b2))
        run = jax.jit(lambda p, m, v, now, last: _missed(rule, now, (), p, m, v, last, ()))
        for last, gap in [(1, 1), (1, 2), (1, 9000), (3, 40), (700, 5), (40_000, 300)]:
            j = np.arange(1, gap + 1)[:, None]
            c = np.sqrt(two**j / (1 - two ** (last + j)))
            moved = 0.1 * np.sum(m * one**j / (1 - one ** (last + j)) / (np.sqrt(v) * c + 1e-8), 0)
            args = (jnp.asarray(x, dtype) for x in (np.zeros(40), m, v))
            p, mu, nu, *_ = run(*args, jnp.int32(last + gap), jnp.int32(last))
            exactly = {"rtol": 1e-10 if dtype == jnp.float64 else 1e-4}
            np.testing.assert_allclose(p, -moved, **exactly)
            np.testing.assert_allclose(mu, m * one**gap, **exactly, atol=1e-30)
            np.testing.assert_allclose(nu, v * two**gap, **exactly)


def test_what_it_costs_is_known():
    assert _sizes(0.9, 0.999, 23) == (192, 12)


def test_no_gap_changes_no_bit():
    params, tx = params_of(jnp.float32), row_adam(0.1, weight_decay=0.1)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    for ids in (None, {"table": jnp.arange(7)}):
        again, after = exact.catch_up(params, state, ids)
        jax.tree.map(np.testing.assert_array_equal, (params, state), (again, after))


def test_a_row_that_was_not_caught_up_gets_nan():
    params, tx = params_of(jnp.float32), row_adam(0.1)
    state = tx.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    for row, good in ((3, True), (3, True), (4, False)):
        grads["table"] = RowSparse(jnp.array([row, ROWS]), jnp.ones((2, WIDTH)), (ROWS, WIDTH))
        updates, state = tx.update(grads, state, params)
        values = updates["table"].values
        assert jnp.isfinite(values).all() == good and jnp.isfinite(updates["kernel"]).all()
    assert not jnp.isfinite(tx.update(densify(grads), state, params)[0]["table"]).any()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_nnx_optimizer(decay):
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(50, 4, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

        def __call__(self, ids):
            return self.out(self.embed(ids))

    def of(model, ids):
        return jnp.sum(jnp.sin(model(ids)) ** 2)

    model, plain = Model(), Model()
    exact.embed_rows(model)
    ours = nnx.Optimizer(model, row_adam(0.1, weight_decay=decay), wrt=nnx.Param)
    theirs = nnx.Optimizer(plain, optax.adamw(0.1, weight_decay=decay), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, ids):
        exact.catch_up(model, optimizer, {"embed/embedding": ids})
        value, grads = exact.value_and_grad(of)(model, ids)
        optimizer.update(model, grads)
        return value

    @nnx.jit
    def plain_step(model, optimizer, ids):
        value, grads = nnx.value_and_grad(of)(model, ids)
        optimizer.update(model, grads)
        return value

    for seed in range(20):
        ids = jax.random.randint(jax.random.key(seed), (3, 2), -5, 50)
        a, b = step(model, ours, ids), plain_step(plain, theirs, ids)
        np.testing.assert_allclose(a, b, rtol=1e-4)
    exact.catch_up(model, ours)
    states = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), *states)


def test_a_step_by_rows_does_not_write_the_whole_table():
    tx, params = row_adam(0.1, weight_decay=0.1), {"table": jnp.ones((8192, 64))}
    state, ids = tx.init(params), jnp.arange(16)

    def step(params, state, ids):
        params, state = exact.catch_up(params, state, {"table": ids})
        loss = lambda params: jnp.sum(jnp.sin(exact.take(params["table"], ids)))  # noqa: E731
        _, grads = exact.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["table"].nbytes / 4
    assert "f32[8192,64]{1,0} copy" not in compiled.as_text()


def test_it_is_a_citizen_of_optax():
    params, tx = params_of(jnp.float32), row_adam(warm_up, weight_decay=0.1)
    first = tx.init(params)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, first)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, first, params, value=1.0)
    assert jax.tree.structure(first) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
    read = serialization.from_bytes(state, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, state, read)
    labels = {"bias": "plain", "kernel": "plain", "table": "rows"}
    parts = optax.partition({"plain": optax.sgd(0.1), "rows": tx}, labels)
    state = parts.init(params)
    params, state = exact.catch_up(params, state)
    updates, state = parts.update(grads, state, params)
    assert isinstance(updates["kernel"], jax.Array)


def test_other_rows_than_embeddings():
    """Rows that are known, or held, as partial training has them."""
    params, tx = {"w": jnp.ones((5, 2))}, row_adam(0.1)
    state = tx.init(params)
    for rows in ((1, 3), Held(jnp.array([1, 3]))):
        grads = {"w": RowSparse(rows, jnp.ones((2, 2)), (5, 2))}
        updates, after = tx.update(grads, state, params)
        moved = optax.apply_updates(params, updates)["w"]
        np.testing.assert_allclose(moved, jnp.ones((5, 2)).at[jnp.array([1, 3])].add(-0.1), 1e-5)
        assert after.last[0].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"b1": 0.99, "b2": 0.9}, "root of b2"),
        ({"eps": 0.0}, "eps above 0"),
        ({"weight_decay": 20.0}, "below 1"),
        ({"b2": 1.5}, "b2 must be in"),
    ],
)
def test_numbers_that_make_no_sense(options, match):
    with pytest.raises(ValueError, match=match):
        row_adam(0.1, **options)


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(TypeError, match="a schedule of steps"):
        optax.inject_hyperparams(row_adam)(0.1).init(params_of(jnp.float32))
    params, tx = {"w": jnp.ones((5, 2), jnp.bfloat16)}, row_adam(0.1)
    state = tx.init(params)
    grads = {"w": RowSparse(jnp.array([1]), jnp.ones((1, 2), jnp.bfloat16), (5, 2))}
    with pytest.raises(ValueError, match="in float32 or float64"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="a gradient for each"):
        tx.update({"w": None}, state, params)
    with pytest.raises(ValueError, match="is called 'v'"):
        exact.catch_up(params, state, {"v": jnp.arange(2)})
    with pytest.raises(ValueError, match="found 0"):
        exact.catch_up(params, optax.adam(0.1).init(params))
    assert isinstance(state, RowAdamState)
    with pytest.raises(ValueError, match="params"):
        tx = row_adam(0.1, weight_decay=0.1)
        tx.update({"w": jnp.ones((5, 2))}, tx.init({"w": jnp.ones((5, 2))}))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P("data")])
def test_on_a_mesh(kind, spec):
    mesh = jax.make_mesh((4,), ("data",), (kind,))
    tx, theirs = row_adam(0.1, weight_decay=0.1), optax.adamw(0.1, weight_decay=0.1)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 2))}
    grads = {"w": jax.random.normal(jax.random.key(1), (8, 2))}
    expected, _ = theirs.update(grads, theirs.init(params), params)
    with jax.set_mesh(mesh):
        place = lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
        params, grads = place(params), place(grads)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        again, _ = jax.jit(exact.catch_up)(params, state)
        if kind is AxisType.Explicit:  # else the compiler chooses
            before = tx.init(params).last[0].sharding
            assert state.last[0].sharding.is_equivalent_to(before, 1)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
    np.testing.assert_array_equal(again["w"], params["w"])


def test_leaves_of_all_kinds():
    params = {"none": None, "empty": jnp.zeros((0, 3)), "one": jnp.ones(()), "i": jnp.ones(2) * 1j}
    ours, theirs = row_adam(0.1), optax.adam(0.1)
    grads = jax.tree.map(lambda x: x + 2, params)
    updates, state = ours.update(grads, ours.init(params), params)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, params, exact.catch_up(params, state)[0])


def test_meprop_refuses_it():
    model = nnx.Sequential(nnx.Linear(2, 9, rngs=nnx.Rngs(0)), nnx.Linear(9, 2, rngs=nnx.Rngs(1)))
    meprop.meprop(model, 2)
    with pytest.raises(ValueError, match="use row_sparse_adam"):
        Trainer(model, row_adam(0.1), lambda model, x: model(x).sum(), meprop.step()).train([])
