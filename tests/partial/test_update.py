"""`update_active` against a slow reference: an optimizer for each slot alone, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import (
    apply_active_updates,
    find_slots,
    nnx_partial_value_and_grad,
    partial_value_and_grad,
    update_active,
)
from priorityprop_jax.partial.update import active_rows, expected_gains

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
        params = apply_active_updates(params, updates, active)
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
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7)
        mine = slot_state(state.inner_state, slot, jax.tree.structure(params))
        assert len(mine) == len(states[slot])
        for a, b in zip(mine, states[slot], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(state.update_counts, counts)
    np.testing.assert_array_equal(state.score_counts, counts)
    np.testing.assert_allclose(state.magnitudes, means, rtol=1e-5)
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
    new = apply_active_updates(params, updates, active)
    treedef = jax.tree.structure(params)
    for slot, slot_name in enumerate(NAMES):
        before = slot_state(state.inner_state, slot, treedef)
        now = slot_state(after.inner_state, slot, treedef)
        if slot_name in active:
            assert not all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))
            continue
        assert_same(before, now)
        assert_same(jax.tree.leaves(params)[slot], jax.tree.leaves(new)[slot])
        for field in ("update_counts", "magnitudes", "score_counts", "nonfinite_counts"):
            assert getattr(after, field)[slot] == getattr(state, field)[slot]


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_with_every_slot_active_it_is_the_plain_optimizer(name):
    params, tx = make_params(), update_active(INNER[name])
    state, plain_params, plain_state = tx.init(params), params, INNER[name].init(params)
    update, plain_update = jax.jit(tx.update), jax.jit(INNER[name].update)
    for step in range(4):
        updates, state = update(gradients(params, step, NAMES), state, params)
        params = apply_active_updates(params, updates, NAMES)
        updates, plain_state = plain_update(
            gradients(plain_params, step, NAMES), plain_state, plain_params
        )
        plain_params = optax.apply_updates(plain_params, updates)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, params, plain_params)
    jax.tree.map(close, state.inner_state, plain_state)


def test_groups_are_updated_together():
    params = make_params()
    tx = update_active(optax.adam(1e-2), group=lambda path: path.split("/")[0])
    active = {"Dense_1/kernel", "Dense_1/bias"}
    trained, state = train(tx, params, [active] * 3)
    leaves, states, *_ = reference(optax.adam(1e-2), params, [active] * 3)
    np.testing.assert_allclose(trained["Dense_1"]["kernel"], leaves[3], rtol=1e-6)
    np.testing.assert_allclose(trained["Dense_1"]["bias"], leaves[2], rtol=1e-6)
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
            "stack": full[np.array(rows)] if rows else None,
        }
        updates, state = tx.update(grads, state, stacked, active=active)
        assert updates["stack"] is None if not rows else updates["stack"].shape == (len(rows), 2, 3)
        stacked = apply_active_updates(stacked, updates, active)
        grads = {k: None for k in apart} | {
            **({"head": grads["head"]} if "head" in active else {}),
            **{f"stack[{i}]": full[i] for i in rows},
        }
        updates, plain_state = plain.update(grads, plain_state, apart)
        apart = apply_active_updates(apart, updates, active)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
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
        tx.update({"w": jnp.ones((2, 2))}, state, params, active={"w[0]", "w[1]"})


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
        np.testing.assert_allclose(state.magnitudes, [0.0, mean], rtol=1e-6)
    np.testing.assert_array_equal(state.nonfinite_counts, [0, 2])
    np.testing.assert_array_equal(state.score_counts, [0, count])
    expected = mean / (1 - decay**count)
    np.testing.assert_allclose(expected_gains(state, decay), [np.nan, expected], rtol=1e-6)
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
    assert updates["a"] is None
    np.testing.assert_allclose(updates["b"], [-0.6, -0.8], rtol=1e-6)
    both = {"a": jnp.array([0.0, 12.0]), "b": jnp.array([3.0, 4.0])}
    updates, _ = tx.update(both, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], [-3 / 13, -4 / 13], rtol=1e-6)


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
    assert state.inner_state.hyperparams["learning_rate"].shape == (2,)


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


def test_nnx_modules():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((4, 3))
    tx = update_active(optax.adam(1e-2))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    kernel = np.asarray(model.kernel[...])
    for _ in range(2):
        _, grads = nnx_partial_value_and_grad(lambda m: jnp.mean(m(x) ** 2), {"bias"})(model)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        updates, state = tx.update(grads, state, params)
        nnx.update(model, apply_active_updates(params, updates, {"bias"}))
    np.testing.assert_array_equal(model.kernel[...], kernel)
    np.testing.assert_allclose(np.abs(model.bias[...]), 0.02, rtol=0.02)
    np.testing.assert_array_equal(state.update_counts, [2, 0])


def test_one_program_for_each_active_set():
    params = make_stack()
    tx = update_active(optax.adam(1e-2), stacked_axis=stacked_axis)

    def loss(params):
        return jnp.sum(jnp.tanh(params["stack"].sum((0, 1))) * params["head"])

    @functools.partial(jax.jit, static_argnames="active")
    def step(params, state, active):
        _, grads = partial_value_and_grad(loss, active)(params)
        updates, state = tx.update(grads, state, params, active=active)
        return apply_active_updates(params, updates, active), state

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
    with pytest.raises(ValueError, match="no slot 'c'"):
        tx.update(grads, state, params, active={"b", "c"})
    with pytest.raises(ValueError, match="'a' is active, but its gradient is absent"):
        tx.update(grads, state, params, active={"a", "b"})
    with pytest.raises(ValueError, match="'b' is not active, but has gradients"):
        tx.update(grads, state, params, active=set())
    absent = jax.tree.map(lambda x: x, state)
    absent.inner_state[0].trace["b"] = None
    with pytest.raises(ValueError, match="optimizer state is absent"):
        tx.update(grads, absent, params)


def test_stacked_gradients_must_be_those_of_the_active_set():
    params = make_stack()
    tx = update_active(optax.sgd(0.1), stacked_axis=stacked_axis)
    grads = {"head": None, "stack": jnp.ones((2, 2, 3))}
    state = tx.init(params)
    with pytest.raises(ValueError, match="4 layers of 'stack' are active, but its gradient has 2"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="1 layers of 'stack' are active"):
        tx.update(grads, state, params, active={"stack[0]"})
