"""`update_active` against a slow reference: an optimizer for each slot alone, by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from priorityprop_jax import find_slots, partial
from priorityprop_jax.core.rows import Frozen, RowSparse
from priorityprop_jax.partial import update_active
from priorityprop_jax.partial.grad import active_rows, choose
from priorityprop_jax.partial.update import ActiveUpdatesState, expected_gains
from priorityprop_jax.priority.ledger import Ledger

SHAPES = {
    "Dense_0": {"kernel": (3, 4), "bias": (4,)},
    "Dense_1": {"kernel": (4, 2), "bias": ()},
}
NAMES = ("Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel")
SETS = [
    set(NAMES),
    {"Dense_1/kernel"},
    {"Dense_1/bias", "Dense_0/kernel"},
    {"Dense_1/kernel", "Dense_1/bias"},
    {"Dense_0/kernel"},
]
INNER = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(3e-3, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2),
}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradient(x, i, step):
    return jnp.sin(3 * x + i + 0.7 * step) * (1 + i)


def gradients(params, step, active):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [
            gradient(x, i, step) if name in active else None
            for i, (x, name) in enumerate(zip(leaves, NAMES, strict=True))
        ]
    )


def slot_state(state, slot, treedef):
    """One slot's part of the inner state, its counts included, as a list of arrays."""
    items = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dict))
    return [treedef.flatten_up_to(x)[slot] if isinstance(x, dict) else x[slot] for x in items]


def reference(inner, params, sets, decay=0.9):
    leaves = jax.tree.leaves(params)
    states = [inner.init(x) for x in leaves]
    means, counts = np.zeros(len(leaves)), np.zeros(len(leaves), int)
    for step, active in enumerate(sets):
        for i, name in enumerate(NAMES):
            if name not in active:
                continue
            g = gradient(leaves[i], i, step)
            u, states[i] = inner.update(g, states[i], leaves[i])
            means[i] = decay * means[i] + (1 - decay) * abs(np.sum(np.asarray(g * u, np.float64)))
            leaves[i], counts[i] = leaves[i] + u, counts[i] + 1
    return leaves, [jax.tree.leaves(state) for state in states], means, counts


def train(tx, params, sets):
    state = tx.init(params)
    for step, active in enumerate(sets):
        updates, state = tx.update(gradients(params, step, active), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Against the reference.


@pytest.mark.parametrize("name", INNER)
def test_every_slot_is_trained_as_if_alone(name):
    params, sets = make_params(), SETS * 2
    trained, state = train(update_active(INNER[name]), params, sets)
    leaves, states, means, counts = reference(INNER[name], params, sets)
    for slot, (x, expected) in enumerate(zip(jax.tree.leaves(trained), leaves, strict=True)):
        np.testing.assert_allclose(x, expected, rtol=5e-6, atol=1e-7)
        mine = slot_state(state.inner_state, slot, jax.tree.structure(params))
        assert len(mine) == len(states[slot])
        for a, b in zip(mine, states[slot], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-7)
    np.testing.assert_array_equal(state.update_counts, counts)
    np.testing.assert_allclose(state.gains, means, rtol=1e-5)
    assert state.step == len(sets) and not state.nonfinite_counts.any()


def test_bias_correction_is_on_the_slots_own_count():
    params = make_params()
    tx = update_active(optax.adam(1e-2))
    _, state = train(tx, params, [{"Dense_1/kernel"}] * 5)
    np.testing.assert_array_equal(state.inner_state[0].count, [0, 0, 0, 5])
    updates, _ = tx.update(gradients(params, 0, {"Dense_0/kernel"}), state, params)
    # Adam's first step is the learning rate times the sign; on a count of 5 it would be smaller.
    np.testing.assert_allclose(np.abs(updates["Dense_0"]["kernel"]), 1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_inactive_slots_do_not_change_by_a_bit(name):
    params = make_params()
    tx = update_active(INNER[name])
    params, state = train(tx, params, [set(NAMES)] * 2)
    active = {"Dense_0/kernel"}
    updates, after = jax.jit(tx.update)(gradients(params, 2, active), state, params)
    new = optax.apply_updates(params, updates)
    treedef = jax.tree.structure(params)
    for slot, slot_name in enumerate(NAMES):
        before = slot_state(state.inner_state, slot, treedef)
        now = slot_state(after.inner_state, slot, treedef)
        if slot_name in active:
            assert not all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))
            continue
        assert_same(before, now)
        assert_same(jax.tree.leaves(params)[slot], jax.tree.leaves(new)[slot])
        for field in ("update_counts", "gains", "nonfinite_counts"):
            assert getattr(after, field)[slot] == getattr(state, field)[slot]


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_with_every_slot_active_it_is_the_plain_optimizer(name):
    params, tx = make_params(), update_active(INNER[name])
    state, plain_params, plain_state = tx.init(params), params, INNER[name].init(params)
    update, plain_update = jax.jit(tx.update), jax.jit(INNER[name].update)
    for step in range(4):
        updates, state = update(gradients(params, step, NAMES), state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain_update(
            gradients(plain_params, step, NAMES), plain_state, plain_params
        )
        plain_params = optax.apply_updates(plain_params, updates)
    close = functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=1e-6)
    jax.tree.map(close, params, plain_params)
    jax.tree.map(close, state.inner_state, plain_state)


def test_groups_are_updated_together():
    params = make_params()
    tx = update_active(optax.adam(1e-2), group=lambda path: path.split("/")[0])
    active = {"Dense_1/kernel", "Dense_1/bias"}
    trained, state = train(tx, params, [active] * 3)
    leaves, states, *_ = reference(optax.adam(1e-2), params, [active] * 3)
    np.testing.assert_allclose(trained["Dense_1"]["kernel"], leaves[3], rtol=5e-6)
    np.testing.assert_allclose(trained["Dense_1"]["bias"], leaves[2], rtol=5e-6)
    np.testing.assert_array_equal(state.update_counts, [0, 3])
    with pytest.raises(ValueError, match="present or absent together"):
        train(tx, params, [{"Dense_1/bias"}])


# Stacked leaves.

LAYERS = 4


def stacked_axis(path):
    return 0 if path.startswith("stack") else None


def make_stack():
    rng = np.random.default_rng(0)
    return {
        "head": jnp.asarray(rng.normal(size=3), jnp.float32),
        "stack": jnp.asarray(rng.normal(size=(LAYERS, 2, 3)), jnp.float32),
    }


def unstack(stack):
    return {"head": stack["head"], **{f"stack[{i}]": stack["stack"][i] for i in range(LAYERS)}}


STACKED_SETS = [
    {"stack[1]", "stack[2]"},
    {"head", "stack[0]", "stack[3]"},
    {"stack[2]"},
    {"head"},
    {"head", *(f"stack[{i}]" for i in range(LAYERS))},
]


def test_stacked_layers_are_trained_as_layers_apart():
    stacked, apart = make_stack(), unstack(make_stack())
    tx = update_active(INNER["adam"], stacked_axis=stacked_axis)
    plain = update_active(INNER["adam"])
    assert find_slots(stacked, stacked_axis=stacked_axis).names == tuple(apart)
    state, plain_state = tx.init(stacked), plain.init(apart)
    for step, active in enumerate(STACKED_SETS):
        rows = [i for i in range(LAYERS) if f"stack[{i}]" in active]
        full = jnp.sin(3 * stacked["stack"] + step)
        grads = {
            "head": jnp.cos(stacked["head"] + step) if "head" in active else None,
            "stack": RowSparse(tuple(rows), full[np.array(rows)], full.shape) if rows else None,
        }
        if len(rows) == LAYERS:
            grads["stack"] = full
        updates, state = tx.update(grads, state, stacked)
        update = updates["stack"]
        if 0 < len(rows) < LAYERS:
            assert update.rows == tuple(rows) and update.values.shape == (len(rows), 2, 3)
        else:
            assert isinstance(update, jax.Array if rows else Frozen)
        stacked = optax.apply_updates(stacked, updates)
        grads = {k: None for k in apart} | {
            **({"head": grads["head"]} if "head" in active else {}),
            **{f"stack[{i}]": full[i] for i in rows},
        }
        updates, plain_state = plain.update(grads, plain_state, apart)
        apart = optax.apply_updates(apart, updates)
    close = functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=1e-7)
    jax.tree.map(close, unstack(stacked), apart)
    treedef, plain_treedef = jax.tree.structure(stacked), jax.tree.structure(apart)
    for slot in range(1 + LAYERS):
        mine = slot_state(plain_state.inner_state, slot, plain_treedef)
        items = jax.tree.leaves(state.inner_state, is_leaf=lambda x: isinstance(x, dict))
        for x, b in zip(items, mine, strict=True):
            if isinstance(x, dict):
                leaves = treedef.flatten_up_to(x)
                close(leaves[0] if slot == 0 else leaves[1][slot - 1], b)
            else:
                close(x[slot], b)
    for a, b in zip(
        state._replace(inner_state=()), plain_state._replace(inner_state=()), strict=True
    ):
        jax.tree.map(functools.partial(close, rtol=1e-5), a, b)


def test_layers_on_another_axis_are_active_together():
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    tx = update_active(optax.adam(1e-1), stacked_axis=lambda path: 1)
    state = tx.init(params)
    updates, state = tx.update({"w": jnp.ones((2, 3))}, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * np.ones((2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(state.update_counts, [1, 1, 1])
    with pytest.raises(ValueError, match="stacked on axis 1"):
        tx.update({"w": jnp.ones((2, 3))}, state, params, active={"w[0]", "w[1]"})


def test_active_rows():
    slots = find_slots(make_stack(), stacked_axis=stacked_axis)
    head, stack = slots.bundles
    assert active_rows(head, slots, {"head", "stack[1]"}) == (0,)
    assert active_rows(head, slots, {"stack[1]"}) == ()
    assert active_rows(stack, slots, ["stack[3]", "stack[1]"]) == (1, 3)


# The account of gains.


def test_the_average_gain_and_values_that_are_not_finite():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    decay, rate = 0.8, 0.5
    tx = update_active(optax.sgd(rate), gain_decay=decay)
    state, mean, count = tx.init(params), 0.0, 0
    for g in (1.0, 3.0, np.nan, 2.0, np.inf):
        _, state = tx.update({"a": None, "b": jnp.array([g, 0.0])}, state, params)
        gain = rate * g * g
        mean = decay * mean + (1 - decay) * (gain if np.isfinite(gain) else 0.0)
        count += 1
        np.testing.assert_allclose(state.gains, [0.0, mean], rtol=5e-6)
    np.testing.assert_array_equal(state.nonfinite_counts, [0, 2])
    np.testing.assert_array_equal(state.update_counts, [0, count])
    expected = mean / (1 - decay**count)
    np.testing.assert_allclose(expected_gains(state, decay), [np.nan, expected], rtol=5e-6)
    assert expected_gains(state, decay).dtype == np.float64


def test_the_expected_gain_of_equal_updates_is_their_gain():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for decay in (0.0, 0.9, 0.99):
        tx = update_active(optax.sgd(0.5), gain_decay=decay)
        state = tx.init(params)
        assert np.isnan(expected_gains(state, decay)).all()
        for _ in range(3):
            _, state = tx.update({"a": jnp.full(2, 2.0), "b": None}, state, params)
            np.testing.assert_allclose(expected_gains(state, decay), [4.0, np.nan], rtol=1e-5)


# Composition.


def test_a_clip_in_front_sees_active_gradients_only():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), update_active(optax.sgd(1.0)))
    updates, _ = tx.update({"a": None, "b": jnp.array([3.0, 4.0])}, tx.init(params), params)
    assert isinstance(updates["a"], Frozen)
    np.testing.assert_allclose(updates["b"], [-0.6, -0.8], rtol=5e-6)
    both = {"a": jnp.array([0.0, 12.0]), "b": jnp.array([3.0, 4.0])}
    updates, _ = tx.update(both, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], [-3 / 13, -4 / 13], rtol=5e-6)


def test_a_schedule_behind_is_on_the_clock_of_steps_and_inside_on_the_slots():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    schedule = lambda count: jnp.float32(1.0) * (count + 1)  # noqa: E731
    inside = update_active(optax.sgd(schedule))
    behind = optax.chain(update_active(optax.identity()), optax.scale_by_learning_rate(schedule))
    found = {"inside": [], "behind": []}
    for name, tx in (("inside", inside), ("behind", behind)):
        state = tx.init(params)
        for active in ("b", "b", "a", "b"):
            grads = {key: jnp.ones(1) if key == active else None for key in params}
            updates, state = tx.update(grads, state, params)
            found[name].append(float(-updates[active][0]))
    assert found["inside"] == [1.0, 2.0, 1.0, 3.0]
    assert found["behind"] == [1.0, 2.0, 3.0, 4.0]


def test_a_hyperparameter_set_to_one_value_holds_for_every_slot():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx = update_active(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    state = tx.init(params)
    state.inner_state.hyperparams["learning_rate"] = jnp.float32(2.0)
    updates, state = tx.update({"a": None, "b": jnp.ones(2)}, state, params)
    np.testing.assert_allclose(updates["b"], [-2.0, -2.0])
    assert float(state.inner_state.hyperparams["learning_rate"]) == 2.0


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, factor=1.0):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx = update_active(inner)
    updates, _ = tx.update({"a": jnp.ones(2), "b": None}, tx.init(params), params, factor=3.0)
    np.testing.assert_array_equal(updates["a"], [3.0, 3.0])


def test_updates_have_the_dtype_of_gradients():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    tx = update_active(optax.adam(1e-2, mu_dtype=jnp.float32))
    state = tx.init(params)
    updates, after = tx.update({"a": jnp.ones(2, jnp.bfloat16), "b": None}, state, params)
    assert updates["a"].dtype == jnp.bfloat16
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(after)]


def test_one_program_for_each_active_set():
    params = make_stack()
    tx = update_active(optax.adam(1e-2), stacked_axis=stacked_axis)

    def loss(params):
        return jnp.sum(jnp.tanh(params["stack"].sum((0, 1))) * params["head"])

    @functools.partial(jax.jit, static_argnames="active")
    def step(params, state, active):
        _, grads = partial.value_and_grad(loss, active, stacked_axis=stacked_axis)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    one, other = frozenset({"head", "stack[1]"}), frozenset({"head"})
    for active in (one, other, one, frozenset(one), other):
        params, state = step(params, state, active)
    assert step._cache_size() == 2
    np.testing.assert_array_equal(state.update_counts, [5, 0, 3, 0, 0])


# Errors.


def test_errors():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match="GradientTransformation"):
        update_active(0.1)
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="gain_decay"):
            update_active(optax.sgd(0.1), gain_decay=decay)
    tx = update_active(optax.sgd(0.1, momentum=0.9))
    state, grads = tx.init(params), {"a": None, "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, state)
    with pytest.raises(ValueError, match="no slot is called 'c'"):
        tx.update(grads, state, params, active={"b", "c"})
    with pytest.raises(ValueError, match="'a' is active, but its gradient is absent"):
        tx.update(grads, state, params, active={"a", "b"})
    with pytest.raises(ValueError, match="a gradient 'c', but no parameter"):
        tx.update(grads | {"c": jnp.ones(2)}, state, params)
    with pytest.raises(ValueError, match=r"'b' has the shape \(3,\), but the parameter has \(2,\)"):
        tx.update({"b": jnp.ones(3)}, state, params)
    rows = RowSparse((1,), jnp.ones(1), (2,))
    with pytest.raises(ValueError, match="give update_active the stacked_axis"):
        tx.update({"b": rows}, state, params)
    absent = jax.tree.map(lambda x: x, state)
    absent.inner_state[0].trace["b"] = None
    with pytest.raises(ValueError, match="optimizer state is absent"):
        tx.update(grads, absent, params)


def test_stacked_gradients_must_fit():
    params = make_stack()
    tx = update_active(optax.sgd(0.1), stacked_axis=stacked_axis)
    state = tx.init(params)
    for k in (1, 2):  # what broadcasts and what does not
        with pytest.raises(ValueError, match="of some layers of a stack it is a RowSparse"):
            tx.update({"stack": jnp.ones((k, 2, 3))}, state, params)
    some = RowSparse((1, 2), jnp.ones((2, 2, 3)), (LAYERS, 2, 3))
    with pytest.raises(ValueError, match=r"'stack\[0\]' is active, but its gradient is absent"):
        tx.update({"stack": some}, state, params, active={"stack[0]"})


# Updates that add themselves.


def as_tree(tree):
    return jax.tree.map(np.asarray, tree)


def test_frozen_parameters_are_the_very_same_and_negative_zeros_stay():
    params = {
        "a": jnp.array([-0.0, 1.0]),
        "b": np.array([-0.0, 1.0], np.float32),
        "c": jnp.bfloat16(-0.0),
    }
    for apply in (optax.apply_updates, jax.jit(optax.apply_updates)):
        new = apply(params, dict.fromkeys(params, Frozen()))
        assert jax.tree.map(lambda x: x.dtype, new) == {k: x.dtype for k, x in params.items()}
        assert np.signbit(new["a"][0]) and np.signbit(new["b"][0]) and np.signbit(new["c"])
    stack = jnp.full((4, 2), -0.0)
    for rows in ((1,), (1, 2), (0, 3)):
        new = jax.jit(optax.apply_updates)(stack, RowSparse(rows, jnp.ones((len(rows), 2)), (4, 2)))
        np.testing.assert_array_equal(new, np.isin(np.arange(4), rows)[:, None] * np.ones(2))
        np.testing.assert_array_equal(
            np.signbit(new), ~np.isin(np.arange(4), rows)[:, None] * [True, True]
        )


def test_updates_of_rows_are_rounded_as_whole_ones_are():
    rng = np.random.default_rng(0)
    whole = jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16)
    update = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    expected = optax.apply_updates(whole, update)
    for rows in ((1, 2), (0, 3)):
        at = np.array(rows)
        new = optax.apply_updates(whole, RowSparse(rows, update[at], whole.shape))
        np.testing.assert_array_equal(new[at], expected[at])
        assert new.dtype == whole.dtype


@pytest.mark.parametrize("jit", [False, True])
def test_a_chain_behind_sees_what_is_active_only(jit):
    params = make_stack() | {"frozen": jnp.array([-0.0, 2.0])}
    schedule = lambda count: 2.0 * (count + 1)  # noqa: E731
    tx = optax.chain(
        update_active(optax.identity(), stacked_axis=stacked_axis),
        optax.scale(-1),
        optax.scale_by_schedule(schedule),
    )
    update = jax.jit(tx.update) if jit else tx.update
    grads = {"head": jnp.ones(3), "stack": RowSparse((1, 3), jnp.ones((2, 2, 3)), (4, 2, 3))}
    state, new = tx.init(params), params
    for _ in range(2):
        updates, state = update(grads, state, new)
        new = optax.apply_updates(new, updates)
    assert updates["stack"].rows == (1, 3) and isinstance(updates["frozen"], Frozen)
    moved = np.zeros((4, 1, 1))
    moved[[1, 3]] = -6
    np.testing.assert_allclose(new["stack"], params["stack"] + moved, rtol=5e-6)
    np.testing.assert_allclose(new["head"], params["head"] - 6, rtol=5e-6)
    np.testing.assert_array_equal(new["stack"][::2], params["stack"][::2])
    assert np.signbit(new["frozen"][0])


@pytest.mark.parametrize(
    "behind", [optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale_by_trust_ratio()]
)
@pytest.mark.parametrize("active", ["head", "stack[1]"])
def test_what_reads_parameters_behind_raises_and_never_broadcasts(behind, active):
    params = make_stack()
    tx = optax.chain(update_active(optax.sgd(0.1), stacked_axis=stacked_axis), behind)
    loss = lambda p: jnp.sum(p["stack"] ** 2) + jnp.sum(p["head"] ** 2)  # noqa: E731
    _, grads = partial.value_and_grad(loss, active, stacked_axis=stacked_axis)(params)
    with pytest.raises(ValueError, match=r"core\.rows\.(Frozen|RowSparse)"):
        tx.update(grads, tx.init(params), params)


def test_weight_decay_inside_sees_what_is_active_only():
    params = make_stack()
    tx = update_active(optax.adamw(0.1, weight_decay=0.5), stacked_axis=stacked_axis)
    grads = {"stack": RowSparse((2,), jnp.ones((1, 2, 3)), (4, 2, 3))}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for layer in (0, 1, 3):
        np.testing.assert_array_equal(new["stack"][layer], params["stack"][layer])
    expected = params["stack"][2] - 0.1 * (1 + 0.5 * params["stack"][2])
    np.testing.assert_allclose(new["stack"][2], expected, rtol=1e-5)
    np.testing.assert_array_equal(new["head"], params["head"])


def test_bytes_touched_are_those_of_what_is_active():
    params = {name: jnp.ones((2000, 2000)) for name in ("frozen", "stack")}  # 32 MB
    tx = update_active(optax.sgd(0.1), stacked_axis=lambda path: 0 if path == "stack" else None)
    shapes = jax.eval_shape(lambda: params)
    for rows in ((3,), (3, 4), (3, 1000)):
        grads = {"stack": RowSparse(rows, jnp.ones((len(rows), 2000)), (2000, 2000))}

        def step(params, grads, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        program = jax.jit(step, donate_argnums=(0, 2)).lower(
            shapes, grads, jax.eval_shape(tx.init, params)
        )
        program = program.compile()
        assert program.cost_analysis()["bytes accessed"] < 250_000  # of 32,000,000
        assert program.memory_analysis().temp_size_in_bytes < 250_000
        assert program.memory_analysis().alias_size_in_bytes >= 32_000_000


# In other people's loops.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def nnx_loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


@pytest.mark.parametrize("active", ["*", ["head", "layers/2"], lambda path: "bias" in path])
def test_nnx_optimizer_takes_gradients_and_updates_as_they_are(active):
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    before = as_tree(nnx.as_pure(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, update_active(optax.adamw(1e-2)), wrt=nnx.Param)
    names = find_slots(before).names
    x, traces = jnp.ones((4, 3)), []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        loss, grads = partial.value_and_grad(nnx_loss, active)(model, x)
        optimizer.update(model, grads)
        return loss

    # The plain optimizer on what is active alone, by an `nnx` filter.
    trained = choose(names, active)
    wrt = lambda path, x: "/".join(map(str, path)) in trained  # noqa: E731
    reference = nnx.Optimizer(plain, optax.adamw(1e-2), wrt=wrt)
    for _ in range(3):
        loss = step(model, optimizer, x)
        expected, grads = nnx.value_and_grad(nnx_loss, argnums=nnx.DiffState(0, wrt))(plain, x)
        reference.update(plain, grads)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert len(traces) == 1
    after = as_tree(nnx.as_pure(nnx.state(model, nnx.Param)))
    wanted = as_tree(nnx.as_pure(nnx.state(plain, nnx.Param)))
    rows = zip(names, *map(jax.tree.leaves, (before, after, wanted)), strict=True)
    for name, old, new, expected in rows:
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)
        if name not in trained:
            np.testing.assert_array_equal(new, old)
    ledger = Ledger(find_slots(before))
    ledger.record(optimizer.opt_state)
    assert {row["slot"] for row in ledger.rows() if row["updates"] == 3} == trained
    assert ledger.total == 3 * len(trained)


def test_nnx_optimizer_takes_rows_of_a_stack_and_active():
    class Stack(nnx.Module):
        def __init__(self):
            self.stack = nnx.Param(jnp.arange(1.0, 13.0).reshape(4, 3) / 9)
            self.head = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            for i in range(4):
                x = jnp.tanh(x * self.stack[i])
            return x * self.head[...]

    model = Stack()
    before = as_tree(nnx.as_pure(nnx.state(model)))
    optimizer = nnx.Optimizer(
        model, update_active(optax.adam(0.1), stacked_axis=stacked_axis), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x):
        grad_fn = partial.value_and_grad(nnx_loss, "stack[2]", stacked_axis=stacked_axis)
        optimizer.update(model, grad_fn(model, x)[1])

    step(model, optimizer, jnp.ones((2, 3)))
    moved = np.any(np.asarray(model.stack[...]) != before["stack"], 1)
    np.testing.assert_array_equal(moved, [False, False, True, False])
    _, grads = nnx.value_and_grad(nnx_loss)(model, jnp.ones((2, 3)))
    optimizer.update(model, grads, active=frozenset({"stack[0]"}))
    moved = np.any(np.asarray(model.stack[...]) != before["stack"], 1)
    np.testing.assert_array_equal(moved, [True, False, True, False])
    np.testing.assert_array_equal(model.head[...], before["head"])


def test_linens_train_state_and_its_chain():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))

    model, x = Mlp(), jnp.ones((4, 3))
    tx = optax.chain(
        optax.clip_by_global_norm(0.1),
        update_active(optax.adamw(1.0)),
        optax.scale_by_schedule(lambda count: 1e-2),
    )
    params = model.init(jax.random.key(0), x)["params"]
    first = state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    first = state = state.replace(step=jnp.int32(0))  # a number would compile once more

    @jax.jit
    def step(state, x):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)  # noqa: E731
        _, grads = partial.value_and_grad(loss, "Dense_1")(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state, x)
    assert step._cache_size() == 1
    assert_same(as_tree(first.params["Dense_0"]), as_tree(state.params["Dense_0"]))
    for leaf in ("bias", "kernel"):
        moved = np.abs(state.params["Dense_1"][leaf] - first.params["Dense_1"][leaf])
        np.testing.assert_allclose(moved, 0.03, rtol=0.05)


# Optax's contract.


def test_state_is_of_one_structure_from_shapes_to_the_second_step():
    params = make_params() | {"nothing": None, "half": jnp.ones(2, jnp.bfloat16)}
    tx = update_active(optax.adam(1e-2))
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for other in (tx.init(shapes), jax.eval_shape(tx.init, params)):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
    assert isinstance(state, ActiveUpdatesState)
    update = jax.jit(tx.update)
    grads = {"Dense_1": params["Dense_1"], "half": jnp.ones(2, jnp.bfloat16)}
    for _ in range(3):
        updates, state = update(grads, state, params)
        new = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    assert updates["half"].dtype == new["half"].dtype == jnp.bfloat16
    assert new["nothing"] is None and updates["nothing"] is None
    assert new["Dense_0"]["kernel"] is params["Dense_0"]["kernel"]


def test_multi_steps_around_with_the_active_slots_told():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.MultiSteps(update_active(optax.sgd(0.5)), 2)
    state, new = tx.init(params), params
    update = jax.jit(functools.partial(tx.update, active=("b",)))
    for scale in (1.0, 3.0, 1.0):
        grads = {name: jnp.full(2, scale) for name in params}
        updates, state = update(grads, state, new)
        new = optax.apply_updates(new, updates)
    np.testing.assert_array_equal(new["a"], params["a"])
    np.testing.assert_array_equal(new["b"], 1 - 0.5 * 2)


@pytest.mark.parametrize("whole", [True, False])
def test_masked_and_multi_transform_around(whole):
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    grads = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2) if whole else None}
    tx = optax.masked(update_active(optax.sgd(0.5)), {"a": True, "b": False, "c": True})
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["a"], [-0.5, -0.5])
    np.testing.assert_array_equal(updates["b"], grads["b"])  # as `optax.masked` has it
    np.testing.assert_array_equal(state.inner_state.update_counts, [1, int(whole)])
    tx = optax.multi_transform(
        {"x": update_active(optax.sgd(0.5)), "y": optax.sgd(1.0)}, {"a": "x", "b": "y", "c": "x"}
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["a"], [0.5, 0.5])
    np.testing.assert_array_equal(new["b"], [0.0, 0.0])
    np.testing.assert_array_equal(new["c"], [0.5, 0.5] if whole else params["c"])


@pytest.mark.parametrize("inner", [optax.adafactor(1e-2), optax.lars(1e-2)])
def test_all_slots_of_a_stack_at_once_keep_the_shapes_of_their_state(inner):
    params = {"w": jnp.full((3, 4, 4), 0.3), "h": jnp.ones((4, 1))}
    tx = update_active(inner, stacked_axis=lambda path: 0 if path == "w" else None)
    state, theirs = tx.init(params), inner.init(params)
    for _ in range(2):
        updates, new = tx.update(params, state, params, uniform=True)
        expected, theirs = inner.update(params, theirs, params)
        shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, new))
        assert next(shapes) == next(shapes)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        state = new
