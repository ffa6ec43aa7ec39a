"""Gradual pruning against NumPy step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax.sparse.gradual import gradual_pruning

BEGIN, END, EVERY, FINAL = 2, 9, 3, 0.9  # prunes at 2, 5, 8 and 9


def make_params():
    """Eighths, as all that becomes of them: exact even in bfloat16, and many are equal."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.integers(-30, 31, size=(7, 9)) / 8, jnp.float32)
    other = jnp.asarray(rng.integers(-30, 31, size=(6, 5)) / 8, jnp.bfloat16)
    return {"a": {"kernel": kernel, "bias": jnp.ones(9)}, "b": {"kernel": other}}


def make_grads(step):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.integers(-3, 4, size=x.shape), x.dtype), make_params()
    )


@functools.cache
def make(scope):
    tx = optax.chain(
        optax.sgd(1.0),
        gradual_pruning(FINAL, begin=BEGIN, end=END, every=EVERY, scope=scope),
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return tx, step


def kept_at(step, size):
    left = (1 - (step - BEGIN) / (END - BEGIN)) ** 3
    least = round((1 - FINAL) * size)
    return least + round((size - least) * left)


def prune(after, masks, step):
    """The largest of what is still there, in all arrays together."""
    flat = np.concatenate([np.abs(np.asarray(x, np.float64)).reshape(-1) for x in after])
    there = np.concatenate([mask.reshape(-1) for mask in masks])
    kept = np.zeros(flat.size, bool)
    order = np.argsort(-np.where(there, flat, -1), kind="stable")
    kept[order[: kept_at(step, flat.size)]] = True
    parts = np.split(kept, np.cumsum([x.size for x in masks])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, masks, strict=True)]


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_weights_are_pruned_on_time_and_stay_pruned(scope):
    tx, step = make(scope)
    plain = optax.sgd(1.0)
    params = make_params()
    state, plain_state = tx.init(params), plain.init(params)
    structure = jax.tree.structure(state)
    masks = [np.ones((7, 9), bool), np.ones((6, 5), bool)]
    for t in range(END + 3):
        grads = make_grads(t)
        updates, plain_state = plain.update(grads, plain_state, params)
        dense = optax.apply_updates(params, updates)
        after = [dense["a"]["kernel"], dense["b"]["kernel"]]
        if t in (2, 5, 8, 9):
            if scope == "global":
                masks = prune(after, masks, t)
            else:
                pairs = zip(after, masks, strict=True)
                masks = [prune([one], [mask], t)[0] for one, mask in pairs]
        params, state, updates = step(params, state, grads)
        found = state[1].masks
        assert found["a"]["bias"] is None
        np.testing.assert_array_equal(params["a"]["bias"], dense["a"]["bias"])
        for name, mask, one in zip("ab", masks, after, strict=True):
            np.testing.assert_array_equal(found[name]["kernel"], mask)
            weight = np.asarray(params[name]["kernel"], np.float32)
            assert not np.any(weight[~mask])
            np.testing.assert_allclose(weight[mask], np.asarray(one, np.float32)[mask], rtol=5e-6)
        assert int(state[1].step) == t + 1
        assert jax.tree.structure(state) == structure
    kept = sum(mask.sum() for mask in masks)
    assert kept == (round(0.1 * 93) if scope == "global" else round(0.1 * 63) + round(0.1 * 30))
    assert [x.dtype for x in jax.tree.leaves(params)] == [
        x.dtype for x in jax.tree.leaves(make_params())
    ]
    assert step._cache_size() == 1


def test_narrow_updates_still_reach_zero():
    tx = gradual_pruning(0.5, begin=0, end=0, every=1)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates, state = update({"w": jnp.full((4, 4), 1e-3, jnp.bfloat16)}, state, params)
    mask = np.asarray(state.masks["w"])
    weight = np.asarray(optax.apply_updates(params, updates)["w"])
    assert mask.sum() == 8 and np.array_equal(weight != 0, mask)
    # A NaN in the update of a pruned weight is replaced as well; an absent update stays absent.
    updates, state = update({"w": jnp.full((4, 4), jnp.nan)}, state, params)
    assert np.array_equal(np.isnan(updates["w"]), mask)
    updates, _ = update({"w": None}, state, params)
    assert updates == {"w": None}


def test_with_nnx_and_leaves_by_path():
    model = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)))
    paths = []

    def where(path):
        paths.append(path)
        return "layers/0" in path

    tx = optax.chain(optax.adam(0.1), gradual_pruning(0.5, begin=0, end=1, every=1, where=where))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(jnp.ones((1, 4))) - 3) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    assert paths == ["layers/0/kernel", "layers/1/kernel"]
    mask = np.asarray(nnx.as_pure(optimizer.opt_state)[1].masks["layers"][0]["kernel"])
    assert mask.sum() == 8
    np.testing.assert_array_equal(model.layers[0].kernel[...] != 0, mask)
    assert np.all(model.layers[1].kernel[...] != 0)


def test_wrong_options_are_refused():
    good = {"begin": 0, "end": 10, "every": 2}
    with pytest.raises(ValueError, match=r"final_sparsity must be in \[0, 1\], got 95"):
        gradual_pruning(95, **good)
    for bad in ({"begin": -1}, {"end": -1}, {"every": 0}, {"begin": 11}):
        with pytest.raises(ValueError, match="0 <= begin <= end"):
            gradual_pruning(0.5, **{**good, **bad})
    with pytest.raises(ValueError, match="scope must be one of"):
        gradual_pruning(0.5, scope="all", **good)
    tx = gradual_pruning(0.5, **good)
    state = tx.init({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        tx.update({"w": jnp.ones((2, 2))}, state)


def test_ranks_are_promoted_by_nobody_else():
    with jax.numpy_rank_promotion("raise"):
        tx, params = gradual_pruning(0.5, begin=0, end=0, every=1), make_params()
        jax.jit(tx.update)(make_grads(0), tx.init(params), params)
