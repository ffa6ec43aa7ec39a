"""Element-level top-k against NumPy's stable sort."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax.priority import top_k_updates


def reference(update, k):
    """Keeps the k largest magnitudes, the earlier element among equals."""
    update = np.asarray(update)
    k = min(k, update.size) if isinstance(k, int) else max(1, round(k * update.size))
    keep = np.zeros(update.size, bool)
    keep[np.argsort(-np.abs(update).reshape(-1), kind="stable")[:k]] = True
    return np.where(keep.reshape(update.shape), update, 0)


def make_updates(seed, ties):
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(-3, 4, s)) if ties else (lambda s: rng.normal(size=s))
    return {
        name: jnp.asarray(draw(s), jnp.float32)
        for name, s in (("a", (4, 5)), ("b", (7,)), ("c", ()), ("d", (2, 3, 2)))
    }


@pytest.mark.parametrize("k", [1, 7, 30, 1000, 0.01, 0.25, 1.0])
def test_equals_a_stable_sort(k):
    tx = top_k_updates(k)
    step = jax.jit(tx.update)
    for seed, ties in itertools.product(range(5), [False, True]):
        updates = make_updates(seed, ties)
        kept, _ = step(updates, tx.init(updates))
        for name, update in updates.items():
            np.testing.assert_array_equal(kept[name], reference(update, k))
    assert step._cache_size() == 1


def test_magnitude_counts_and_not_the_sign():
    updates = jnp.array([1.0, -5.0, 3.0, -4.0])
    kept, _ = top_k_updates(2).update(updates, top_k_updates(2).init(updates))
    assert kept.tolist() == [0.0, -5.0, 0.0, -4.0]


def test_error_feedback_delays_and_never_loses():
    tx = top_k_updates(0.1, error_feedback=True)
    params = make_updates(0, False)
    state = tx.init(params)
    sent = given = jax.tree.map(np.zeros_like, params)
    step = jax.jit(tx.update)
    for seed in range(20):
        updates = make_updates(seed, False)
        kept, state = step(updates, state)
        sent = jax.tree.map(np.add, sent, kept)
        given = jax.tree.map(np.add, given, updates)
        for name in params:
            assert np.sum(np.asarray(kept[name]) != 0) <= max(1, round(params[name].size / 10))
            np.testing.assert_allclose(
                sent[name] + state.residual[name], given[name], rtol=1e-5, atol=1e-5
            )
    without = top_k_updates(0.1)
    assert without.init(params).residual == ()


def test_dtypes_nan_complex_and_empty_leaves():
    tx = top_k_updates(1)
    updates = {
        "nan": jnp.array([1.0, jnp.nan, 2.0]),
        "half": jnp.array([1.0, -2.0], jnp.bfloat16),
        "complex": jnp.array([1 + 1j, 3j], jnp.complex64),
        "empty": jnp.zeros((0, 2)),
        "none": None,
    }
    kept, _ = jax.jit(tx.update)(updates, tx.init(updates))
    assert np.isnan(kept["nan"][1]) and kept["nan"][2] == 0  # it is let through, not hidden
    assert kept["half"].dtype == jnp.bfloat16 and kept["half"].tolist() == [0.0, -2.0]
    assert kept["complex"].tolist() == [0, 3j]
    assert kept["empty"].shape == (0, 2) and kept["none"] is None


def test_vmap_takes_the_top_of_each():
    updates = jnp.array([[1.0, 2.0, 2.0], [5.0, -5.0, 1.0]])
    tx = top_k_updates(1)
    kept = jax.vmap(lambda u: tx.update(u, tx.init(u))[0])(updates)
    assert kept.tolist() == [[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]]


def test_in_a_chain_moves_few_weights_a_step():
    params = {"w": jnp.ones((20, 20))}
    tx = optax.chain(optax.adam(0.1), top_k_updates(0.02))
    grads = {"w": jnp.arange(400.0).reshape(20, 20) - 200}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert int(jnp.sum(updates["w"] != 0)) == 8


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, float("nan"), "3", True])
def test_impossible_k_is_refused(k):
    with pytest.raises((ValueError, TypeError), match="k "):
        top_k_updates(k)


def test_a_fraction_is_the_nearest_whole_number():
    for fraction, kept in ((0.07, 7), (0.29, 29), (0.001, 1), (0.995, 100)):
        tx = top_k_updates(fraction)
        updates, _ = tx.update(jnp.arange(1.0, 101.0), tx.init(jnp.zeros(100)))
        assert int(jnp.sum(updates != 0)) == kept, fraction


def test_magnitudes_of_double_precision_are_told_apart():
    with jax.enable_x64(True):
        updates = {"a": jnp.array([1e-60, 1e-50, 0.0]), "b": jnp.array([1.0], jnp.float32)}
        tx = top_k_updates(1)
        kept, _ = jax.jit(tx.update)(updates, tx.init(updates))
        assert kept["a"].dtype == jnp.float64 and kept["a"].tolist() == [0.0, 1e-50, 0.0]
        assert kept["b"].tolist() == [1.0]


def test_absent_updates_keep_what_was_held_back_of_them():
    tx = top_k_updates(1, error_feedback=True)
    state = tx.init({"a": jnp.zeros(3), "b": jnp.zeros(3)})
    updates = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array([1.0, 2.0, 3.0])}
    _, state = tx.update(updates, state)
    kept, state = jax.jit(tx.update)(updates | {"a": None}, state)
    assert kept["a"] is None and kept["b"].tolist() == [0.0, 4.0, 0.0]
    assert state.residual["a"].tolist() == [1.0, 2.0, 0.0]
    kept, _ = tx.update({"a": jnp.zeros(3), "b": None}, state)
    assert kept["a"].tolist() == [0.0, 2.0, 0.0] and kept["b"] is None
