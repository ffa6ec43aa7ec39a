"""A share of the matrices a step: who is chosen, what they get, and what is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import Ledger
from priorityprop_jax.priority import budgeted, matrix_slots, orthogonalize
from priorityprop_jax.priority.ledger import find_state

# Three classes: seven matrices of 2 x 3, two vectors of 4, one scalar.
SHAPES = {
    "a": (2, 3),
    "b": (2, 2, 3),
    "c": (2, 3),
    "v": (4,),
    "w": (4,),
    "x": (1, 3, 2, 3),
    "y": (),
}
NAMES = ("a", "b[0]", "b[1]", "c", "v", "w", "x[0]", "x[1]", "x[2]", "y")
CLASSES = ((0, 1, 2, 3, 6, 7, 8), (4, 5), (9,))


def gradients(step):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def matrices(tree):
    """One NumPy array a slot, None where it is absent."""
    found = []
    for name, shape in SHAPES.items():
        count = int(np.prod(shape[:-2]))
        missing = tree[name] is None
        found += [None] * count if missing else list(np.reshape(tree[name], (count, *shape[-2:])))
    return found


def own_score(look):
    return look.measure(lambda grads, params, updates: jnp.abs(jnp.sum(grads[0]) - params[0].sum()))


def reference(kind, budget, grads, params, counts, last):
    """The definition, slot by slot: updates, who got one, and the magnitudes last seen."""
    grads, params = matrices(grads), matrices(params)
    size = [0.0 if g is None else np.mean(np.abs(g)) for g in grads]
    scores = {
        "robin": max(counts) - counts,
        "change": np.abs(size - last),
        own_score: [0 if g is None else abs(g.sum() - p.sum()) for g, p in zip(grads, params)],  # noqa: B905
    }[kind]
    updates, chosen = [None if g is None else 0 * g for g in grads], np.zeros(len(grads), int)
    for members in CLASSES:
        here = [i for i in members if grads[i] is not None]
        k = max(1, int(budget * len(here) + 0.5))
        for i in sorted(here, key=lambda i: (-scores[i], counts[i], i))[:k]:
            updates[i] = np.sqrt(len(here) / k) * 2 * grads[i]
            chosen[i] = 1
    return updates, chosen, np.where(chosen, size, last)


def rising(step):
    return jnp.array([0.3, 0.8, 0.05, 1.0, 0.3, 0.45])[jnp.minimum(step, 5)]


@pytest.mark.parametrize("budget", [0.3, rising])
@pytest.mark.parametrize("kind", ["robin", "change", own_score])
def test_equals_the_slow_reference(kind, budget):
    params = gradients(99)
    tx = budgeted(lambda x: 2 * x, budget, score=kind)
    state, step = tx.init(params), jax.jit(tx.update)
    assert matrix_slots(params).names == NAMES
    counts, last = np.zeros(10, int), np.zeros(10)
    for t in range(9):
        grads = gradients(t) | ({"b": None, "v": None} if t in (3, 4) else {})
        updates, state = step(grads, state, params)
        expected, chosen, seen = reference(
            kind, float(budget(t)) if callable(budget) else budget, grads, params, counts, last
        )
        for got, wanted in zip(matrices(updates), expected, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                np.testing.assert_allclose(got, wanted, rtol=5e-6)
        counts += chosen
        if kind == "change":
            last = seen
        np.testing.assert_array_equal(state.update_counts, counts)
        np.testing.assert_array_equal(state.allocation, chosen)
        np.testing.assert_allclose(state.magnitudes, last, rtol=5e-6)
    assert state.step == 9 and step._cache_size() == 2  # with and without the absent ones
    if kind == "robin" and budget == 0.3:
        assert np.ptp(counts[[0, 3, 6, 7, 8]]) <= 1
    ledger = Ledger(matrix_slots(params))
    ledger.record(state)
    assert ledger.total == counts.sum()


def dear(x):
    return x @ x.T @ x


def test_the_full_budget_is_the_function_and_a_share_is_a_share_of_the_work():
    params = {name: jnp.ones((2, 16, 24)) * (i + 1) for i, name in enumerate("abcd")}  # 8 matrices
    flops = {}
    for budget in (1, 1 / 2, 1 / 8):
        tx = budgeted(dear, budget)
        program = jax.jit(tx.update).lower(params, tx.init(params)).compile()
        flops[budget] = program.cost_analysis()["flops"]
        updates, _ = program(params, tx.init(params))
        wanted = jax.vmap(dear)(params["a"]) / budget**0.5
        last = jnp.zeros_like(wanted) if budget < 1 else jax.vmap(dear)(params["d"])
        np.testing.assert_allclose(updates["a"][0], wanted[0], rtol=5e-6)
        np.testing.assert_allclose(updates["d"], last, rtol=5e-6)
    one = 2 * 2 * 16 * 16 * 24
    assert flops[1] >= 8 * one
    # Choosing costs a handful of operations a number, of which dear ones have 64 here.
    assert flops[1 / 2] < 0.6 * flops[1] and flops[1 / 8] < 0.25 * flops[1]
    assert flops[1 / 2] - flops[1 / 8] == pytest.approx(3 * one, rel=0.1)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.7, 1.0, -1.0, 7.0, np.nan])
def test_a_traced_share_runs_what_is_chosen_alone(share):
    called = []

    def counted(x):
        jax.debug.callback(lambda: called.append(1))
        return dear(x)

    params = {"a": jnp.ones((5, 3, 4)), "b": jnp.ones((3, 4)), "c": jnp.ones((3, 3))}
    tx = budgeted(counted, jnp.float32(share))
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    jax.block_until_ready(updates)
    jax.effects_barrier()
    k = (
        1 if np.isnan(share) else min(6, max(1, int(np.floor(share * 6 + 0.5))))
    )  # out of range: clamped
    assert len(called) == k + 1  # and the one of the other shape
    assert state.allocation.tolist() == [1] * k + [0] * (6 - k) + [1]
    wanted = dear(params["b"]) * (6 / k) ** 0.5
    np.testing.assert_allclose(updates["a"][0], wanted, rtol=5e-6)
    np.testing.assert_allclose(updates["b"], wanted if k == 6 else 0 * wanted, rtol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_a_traced_share_keeps_types_under_strict_rules(dtype):
    tree = {"a": jnp.ones((3, 2, 2), dtype)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced, static = (
            budgeted(orthogonalize, budget) for budget in (lambda step: jnp.float32(0.7), 0.7)
        )
        got, wanted = (jax.jit(tx.update)(tree, tx.init(tree))[0]["a"] for tx in (traced, static))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wanted)


def test_a_traced_share_in_shards():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"a": jnp.arange(48.0).reshape(4, 3, 4)}  # two matrices a shard, of which one is chosen
    tx = budgeted(dear, lambda step: jnp.float32(0.5))

    def per_shard(tree):
        return tx.update(tree, tx.init(tree))[0]

    spec = jax.P("x")
    got = jax.jit(jax.shard_map(per_shard, mesh=mesh, in_specs=spec, out_specs=spec))(tree)
    wanted = 2**0.5 * jax.vmap(dear)(tree["a"]) * jnp.array([1, 0, 1, 0])[:, None, None]
    np.testing.assert_allclose(got["a"], wanted, rtol=5e-6)


@pytest.mark.parametrize("budget", [1 / 2, lambda step: jnp.float32(1 / 2)])
def test_what_is_not_chosen_is_zero_even_where_it_is_nan(budget):
    tree = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.full((2, 2), jnp.nan, jnp.bfloat16)}
    tx = budgeted(orthogonalize, budget, score="priorityprop")  # a NaN has no score
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    assert updates["a"].dtype == jnp.bfloat16 and not updates["b"].any()
    assert find_state(state).allocation.tolist() == [1, 0]


def test_random_draws_every_step_anew():
    tree = {"a": jnp.ones((16, 1, 1))}
    tx = budgeted(lambda x: x, 1 / 4, score="random")
    state, seen = tx.init(tree), []
    step = jax.jit(tx.update)
    for _ in range(40):
        _, state = step(tree, state)
        seen.append(tuple(state.allocation.tolist()))
        assert sum(seen[-1]) == 4
    assert len(set(seen)) > 35 and min(state.update_counts) > 1


def test_equal_scores_go_to_who_has_had_the_fewest():
    tree = {"a": jnp.ones((5, 1, 1))}
    tx = budgeted(lambda x: x, 2 / 5, score="uniform")
    state, step = tx.init(tree), jax.jit(tx.update)
    for expected in ([1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 1]):
        _, state = step(tree, state)
        assert state.allocation.tolist() == expected


def test_what_makes_no_sense_is_refused():
    for budget in (0, -0.1, 1.5, True):
        with pytest.raises(ValueError, match="a share above 0 and at most 1"):
            budgeted(dear, budget)
    for score in ("gain", "nosuch"):
        with pytest.raises(ValueError, match="score must be one of"):
            budgeted(dear, score=score)
    tree = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    tx = budgeted(dear, lambda step: 1.5)
    with pytest.raises(ValueError, match="a share above 0 and at most 1, got 1.5"):
        tx.update(tree, tx.init(tree))
    tx = budgeted(dear, score=lambda look: 1.0)
    with pytest.raises(ValueError, match="one number a slot"):
        tx.update(tree, tx.init(tree))
    with pytest.raises(ValueError, match="made for 2 matrices, not 1"):
        tx.update({"a": tree["a"], "b": None}, tx.init(tree))


def test_in_a_chain_of_optax():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    mask = {"a": True, "b": True, "bias": False}
    tx = optax.chain(optax.trace(0.9), optax.masked(budgeted(lambda x: x, 1 / 2), mask))
    tx = optax.MultiSteps(optax.apply_if_finite(tx, 3), 2)
    _, states = jax.lax.scan(
        lambda state, _: (tx.update(params, state, params)[1],) * 2, tx.init(params), None, 4
    )
    counts = find_state(states).update_counts.tolist()
    assert counts == [[0, 0], [1, 0], [1, 0], [1, 1]]
