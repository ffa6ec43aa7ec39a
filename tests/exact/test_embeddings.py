"""Gradients of embeddings as rows against the whole arrays of JAX."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from priorityprop_jax import exact, meprop
from priorityprop_jax.core.row_grad import _warn_whole
from priorityprop_jax.core.rows import RowSparse, densify, is_row_sparse, summed

IDS = jnp.array([[7, 3, 7, 0], [-1, 39, 3, 99]])  # negative, double, and out of bounds


class Model(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(40, 6, rngs=rngs, **options)
        self.place = nnx.Embed(4, 6, rngs=rngs)
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, ids):
        hidden = jnp.nan_to_num(self.embed(ids)) + self.place(jnp.arange(ids.shape[1]))
        return self.out(jnp.tanh(hidden))


def loss_fn(model, ids):
    return jnp.sum(model(ids).astype(jnp.float32) ** 2)


def check(got, want, rtol=1e-5):
    got, want = jax.tree.leaves(densify(got)), jax.tree.leaves(want)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol, 1e-5)


def test_rows_are_summed():
    random = np.random.default_rng(0)
    for size in (1, 2, 9, 30):
        ids, values = random.integers(0, 12, size), random.normal(size=(size, 3))
        expected = np.zeros((10, 3))
        for i, row in zip(ids, values, strict=True):
            if i < 10:
                expected[i] += row
        found = summed(jnp.asarray(ids), jnp.asarray(values, jnp.float32), (10, 3))
        np.testing.assert_allclose(found.densify(), expected, rtol=1e-5, atol=1e-6)
        rows = np.asarray(found.rows)
        assert (np.diff(rows) > 0).all()
        assert set(rows[rows < 10]) == set(ids[ids < 10])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8])
def test_gradients_are_whole_gradients_in_rows(jit, options, dtype):
    model, plain, ids = Model(nnx.Rngs(0), **options), Model(nnx.Rngs(0), **options), IDS
    ids = ids.astype(dtype)
    run = nnx.jit if jit else lambda f: f
    assert exact.embed_rows(model) == 2 and exact.embed_rows(model) == 0
    value, grads = run(exact.value_and_grad(loss_fn))(model, ids)
    expected, wanted = run(nnx.value_and_grad(loss_fn))(plain, ids)
    np.testing.assert_allclose(value, expected, rtol=5e-6)
    check(grads, wanted, 0.05 if options else 1e-5)  # sums of bfloat16 are rounded
    rows = grads["embed"]["embedding"].get_value()
    assert isinstance(rows, RowSparse) and rows.values.shape == (8, 6)
    # There are no fewer ids than rows of the other one.
    assert not is_row_sparse(grads["place"]["embedding"].get_value())
    # Any other gradient is what it was.
    check(run(nnx.grad(loss_fn))(model, ids), wanted, 0.05 if options else 1e-5)
    assert exact.restore(model) == 2 and type(model.embed) is nnx.Embed
    check(exact.value_and_grad(loss_fn)(model, ids)[1], wanted)
    assert exact.embed_rows(model) == 2
    assert isinstance(nnx.clone(model).embed, nnx.Embed)


def test_a_table_that_is_looked_up_twice_sums_both():
    def loss(params, a, b):
        x, y = (exact.take(params["table"], ids) for ids in (a, b))
        return jnp.sum(jnp.sin(x).sum(0) * jnp.cos(y).sum(0))

    params = {"table": jax.random.normal(jax.random.key(0), (20, 3))}
    a, b = jnp.array([3, 5, 3]), jnp.array([5, 7])
    with jax.debug_nans(True):
        value, grads = jax.jit(exact.value_and_grad(loss))(params, a, b)
    expected, wanted = jax.value_and_grad(loss)(params, a, b)
    np.testing.assert_allclose(value, expected, rtol=5e-6)
    check(grads, wanted)
    assert sorted(x for x in np.asarray(grads["table"].rows) if x < 20) == [3, 5, 7]


def test_a_linen_module_by_its_parameters():
    class Embed(nn.Embed):
        def __call__(self, inputs):
            return exact.take(self.embedding, inputs)

    model = Embed(40, 6)
    params = model.init(jax.random.key(0), IDS[0])
    loss = lambda params, ids: jnp.sum(jnp.nan_to_num(model.apply(params, ids)) ** 2)  # noqa: E731
    _, grads = exact.value_and_grad(loss)(params, IDS)
    assert is_row_sparse(grads["params"]["embedding"])
    check(grads, jax.grad(loss)(params, IDS))


def tied(model, ids):
    return jnp.sum(model.attend(model(ids)) ** 2)


def scanned(model, ids):
    return jax.lax.scan(lambda c, i: (c + model(i).sum(), None), 0.0, ids)[0]


def in_a_checkpoint(model, ids):
    return jnp.sum(nnx.remat(lambda model, ids: model(ids))(model, ids) ** 2)


def decayed(model, ids):
    return jnp.sum(model(ids)) + jnp.sum(model.embedding[...] ** 2)


@pytest.mark.parametrize("loss", [tied, scanned, in_a_checkpoint, decayed])
def test_what_is_read_otherwise_is_a_whole_array_and_warns_once(loss):
    _warn_whole.cache_clear()
    model, ids = nnx.Embed(40, 6, rngs=nnx.Rngs(0)), jnp.array([1, 2, 1])
    wanted = nnx.grad(loss)(model, ids)
    exact.embed_rows(model)
    with pytest.warns(UserWarning, match=r"shape \(40, 6\) is a whole array"):
        _, grads = exact.value_and_grad(loss)(model, ids)
    assert not is_row_sparse(grads["embedding"].get_value())
    check(grads, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact.value_and_grad(loss)(model, ids)


def test_what_has_no_gradient_warns_of_nothing():
    model = Model(nnx.Rngs(0))
    exact.embed_rows(model)
    value_and_grad = exact.value_and_grad(loss_fn, wrt=nnx.All(nnx.Param, nnx.PathContains("out")))
    _warn_whole.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(value_and_grad(model, IDS)[1]) == ["out"]
        stopped = lambda model, ids: loss_fn(model, ids) * 0 + jnp.sum(model.out.bias[...])  # noqa: E731
        _, grads = exact.value_and_grad(stopped)(model, IDS)
    assert np.all(np.asarray(densify(grads)["embed"]["embedding"].get_value()) == 0)


@pytest.mark.parametrize("clipped", [False, True])
def test_sgd_by_rows_is_sgd(clipped):
    model, plain = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    exact.embed_rows(model)
    by_rows = meprop.row_sparse(optax.sgd(0.1))
    tx = optax.sgd(0.1)
    if clipped:
        by_rows = optax.chain(meprop.clip_by_global_norm(0.01), by_rows)
        tx = optax.chain(optax.clip_by_global_norm(0.01), tx)
    ours = nnx.Optimizer(model, by_rows, wrt=nnx.Param)
    theirs = nnx.Optimizer(plain, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, ids):
        value, grads = exact.value_and_grad(loss_fn)(model, ids)
        optimizer.update(model, grads)
        return value

    @nnx.jit
    def plain_step(model, optimizer, ids):
        value, grads = nnx.value_and_grad(loss_fn)(model, ids)
        optimizer.update(model, grads)
        return value

    for seed in range(10):
        ids = jax.random.randint(jax.random.key(seed), (2, 4), -1, 43)
        np.testing.assert_allclose(
            step(model, ours, ids), plain_step(plain, theirs, ids), rtol=1e-5
        )
    check(nnx.state(model, nnx.Param), nnx.state(plain, nnx.Param))


def test_a_step_by_rows_does_not_write_the_whole_table():
    table = jnp.ones((4096, 64))

    def step(table, ids):
        loss = lambda table: jnp.sum(jnp.sin(exact.take(table, ids)))  # noqa: E731
        _, grads = exact.value_and_grad(loss)(table)
        return optax.apply_updates(table, grads.with_values(-0.1 * grads.values))

    ids = jnp.arange(16)
    compiled = jax.jit(step, donate_argnums=0).lower(table, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 4
    assert "f32[4096,64]{1,0} copy" not in compiled.as_text()


def test_meprop_has_whole_gradients_of_embeddings():
    from priorityprop_jax.training.trainer import Trainer

    losses = []
    for by_rows in (False, True):
        model = Model(nnx.Rngs(0))
        meprop.meprop(model, 2, layers=nnx.Linear)
        if by_rows:
            exact.embed_rows(model)
        trainer = Trainer(model, optax.adam(1e-2), loss_fn, meprop.step(), progress=False)
        losses.append(trainer.train([IDS] * 5).loss)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_wrong_models():
    with pytest.raises(TypeError, match="nnx"):
        exact.embed_rows(object())
    with pytest.raises(ValueError, match=r"no nnx\.Embed"):
        exact.embed_rows(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind, spec", [(AxisType.Auto, P("data")), (AxisType.Explicit, P())])
def test_on_a_mesh(kind, spec):
    """Ids that are split along explicit axes JAX itself takes no rows by."""
    mesh = jax.make_mesh((4,), ("data",), (kind,))
    params = {"table": jax.random.normal(jax.random.key(0), (40, 3))}
    ids = jax.random.randint(jax.random.key(1), (8, 2), 0, 40)
    loss = lambda params, ids: jnp.sum(jnp.sin(exact.take(params["table"], ids)) ** 2)  # noqa: E731
    expected, wanted = jax.value_and_grad(loss)(params, ids)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        ids = jax.device_put(ids, NamedSharding(mesh, spec))
        value, grads = jax.jit(exact.value_and_grad(loss))(params, ids)
        moved = jax.jit(optax.apply_updates)(params, grads)
    np.testing.assert_allclose(value, expected, rtol=5e-6)
    assert is_row_sparse(grads["table"])
    check(moved, optax.apply_updates(jax.device_get(params), wanted))


def test_in_a_shard_map():
    _warn_whole.cache_clear()
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    table = jax.random.normal(jax.random.key(0), (40, 3))
    ids = jax.random.randint(jax.random.key(1), (8, 2), 0, 40)
    loss = lambda table, ids: jnp.sum(jnp.sin(exact.take(table, ids)) ** 2)  # noqa: E731

    def local(table, ids):
        value, grads = exact.value_and_grad(loss)(table, ids)
        return jax.lax.psum(value, "data"), grads

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    with pytest.warns(UserWarning, match="shards of a mesh"):
        value, grads = jax.jit(run)(table, ids)
    expected, wanted = jax.value_and_grad(loss)(table, ids)
    np.testing.assert_allclose(value, expected, rtol=5e-6)
    check(grads, wanted)
