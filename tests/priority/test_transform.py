"""The transformations against a slow reference that calls one optimizer a slot, by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import (
    PriorityPropState,
    allocate,
    find_slots,
    priorityprop,
    scale_by_priority,
)
from priorityprop_jax.core.rows import Frozen
from priorityprop_jax.priority.allocation import repeats
from priorityprop_jax.priority.scores import depth_factors

SHAPES = {
    "Dense_0": {"kernel": (5, 7), "bias": (7,)},
    "Dense_1": {"kernel": (7, 3), "bias": (3,)},
    "Dense_2": {"kernel": (3, 2), "bias": ()},
}
INNER = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(3e-3, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "lamb": optax.lamb(1e-2),
}


def make_params(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@jax.jit
def gradients(params, step):
    """Gradients that differ in size from leaf to leaf and from step to step."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [jnp.sin(3 * x + i + 0.7 * step) * (1 + i) for i, x in enumerate(leaves)]
    )


def train(tx, params, steps, **extra):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    assert step._cache_size() == 1
    return params, state


def flat(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def reference(inner, params, steps, budget, low, high, every, spread="even", base=1.1):
    """One optimizer a leaf; plain Python around `allocate`, which has tests of its own."""
    slots = find_slots(params)
    leaves, treedef = jax.tree.flatten(params)
    states = [inner.init(x) for x in leaves]
    counts = np.zeros(len(leaves), int)
    factors = depth_factors(slots, base)
    granted = None

    @jax.jit
    def apply(grads, state, x):
        updates, state = inner.update(grads, state, x)
        return optax.apply_updates(x, updates), state

    for step in range(steps):
        grads = jax.tree.leaves(gradients(treedef.unflatten(leaves), step))
        t = step % every
        if t == 0:
            scores = [
                np.float32(np.mean(np.abs(g))) * np.float32(1 / (1 + c)) * d
                for g, c, d in zip(grads, counts, factors, strict=True)
            ]
            granted = np.asarray(allocate(jnp.asarray(scores), budget, low, high))
        for i, n in enumerate(granted.tolist()):
            if spread == "even":
                r = (t + 1) * n // every - t * n // every
            else:
                r = n // every + (t < n % every)
            for _ in range(r):
                leaves[i], states[i] = apply(grads[i], states[i], leaves[i])
            counts[i] += r
    return treedef.unflatten(leaves), states, counts


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb"])
def test_full_budget_is_the_inner_optimizer_bit_for_bit(name):
    params = make_params()
    plain_params, plain_state = train(INNER[name], params, 50)
    tx = priorityprop(INNER[name], None, min_updates=10, max_updates=10, recalc_every=10)
    our_params, our_state = train(tx, params, 50)
    assert_same(our_params, plain_params)
    ours, plain = flat(our_state.inner_state), flat(plain_state)
    for path, value in plain.items():
        expected = value if ours[path].shape == value.shape else np.broadcast_to(value, (6,))
        np.testing.assert_array_equal(ours[path], expected, err_msg=path)
    assert our_state.update_counts.tolist() == [50] * 6
    if name == "adamw":
        scaled = optax.chain(INNER[name], scale_by_priority(None, 10, 10, 10))
        assert_same(train(scaled, params, 50)[0], plain_params)


@pytest.mark.parametrize(
    ("name", "budget", "low", "high", "spread"),
    [
        *((name, 30, 1, 20, "even") for name in ("sgd", "adamw", "lion", "rmsprop")),
        ("adam", 17, 0, 5, "nested"),
        ("adam", 60, 0, 40, "even"),
        ("lamb", 70, 2, 30, "nested"),
        ("momentum", 17, 0, 5, "even"),
        ("adam", 13, 0, 5, "even"),
    ],
)
def test_follows_one_optimizer_a_leaf_called_by_hand(name, budget, low, high, spread):
    params = make_params()
    tx = priorityprop(INNER[name], budget, low, high, 5, spread=spread)
    ours, state = train(tx, params, 15)
    theirs, their_states, counts = reference(INNER[name], params, 15, budget, low, high, 5, spread)
    assert state.update_counts.tolist() == counts.tolist()
    assert int(counts.sum()) == 3 * budget
    chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-5)
    for field in ("mu", "nu", "trace"):
        kept = optax.tree.get_all_with_path(state.inner_state, field)
        if kept:
            moments = [optax.tree.get(s, field) for s in their_states]
            chex.assert_trees_all_close(jax.tree.leaves(kept[0][1]), moments, rtol=1e-4, atol=1e-5)
    if name == "adam":
        assert state.inner_state[0].count.tolist() == counts.tolist()


def test_inactive_slots_keep_parameters_and_inner_state_bit_for_bit():
    params = make_params()
    tx = priorityprop(optax.adamw(1e-2), 12, 0, 4, 4)
    state = tx.init(params)
    slots = find_slots(params)
    seen = set()
    for i in range(24):
        grads = gradients(params, i)
        updates, new_state = jax.jit(tx.update)(grads, state, params)
        new = optax.apply_updates(params, updates)
        before, after = flat((params, state.inner_state[0])), flat((new, new_state.inner_state[0]))
        moved = np.asarray(new_state.update_counts - state.update_counts)
        for slot, leaf in enumerate(slots.names):
            for path, old in before.items():
                key = "".join(f"['{part}']" for part in leaf.split("/"))
                if path.endswith(key):
                    same = np.array_equal(old, after[path])
                    assert same == (moved[slot] == 0), (path, i)
                    seen.add(bool(same))
            one = before["[1].count"][slot] + moved[slot] == after["[1].count"][slot]
            assert one
        params, state = new, new_state
    assert seen == {True, False}


def test_repeats_run_the_inner_optimizer_on_one_gradient():
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    grads = {"w": jnp.array([0.3, -0.2, 0.1])}
    inner = optax.adamw(0.1)
    tx = priorityprop(inner, 7, 0, 7, 1)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, inner_state = params, inner.init(params)
    for _ in range(7):
        u, inner_state = inner.update(grads, inner_state, expected)
        expected = optax.apply_updates(expected, u)
    chex.assert_trees_all_close(optax.apply_updates(params, updates), expected, rtol=5e-6)
    chex.assert_trees_all_close(state.inner_state[0].nu, inner_state[0].nu, rtol=5e-6)
    assert state.inner_state[0].count.tolist() == [7]


STACKED = {"blocks": {"kernel": (3, 4, 4), "bias": (4, 3)}, "head": {"kernel": (4, 2)}}


def axis_of(path):
    return {"blocks/kernel": 0, "blocks/bias": 1}.get(path)


def unstack(params):
    blocks = params["blocks"]
    return {
        **{
            f"block_{i}": {"kernel": blocks["kernel"][i], "bias": blocks["bias"][:, i]}
            for i in range(3)
        },
        "head": params["head"],
    }


@pytest.mark.parametrize(
    ("inner", "grouped", "high"),  # every pair of them
    [
        (optax.adam(0.01), False, 4),
        (optax.adam(0.01), True, 12),
        (optax.lamb(0.01), False, 12),
        (optax.lamb(0.01), True, 4),
        (optax.adafactor(0.01), False, 12),
        (optax.adafactor(0.01), True, 4),
    ],
)
def test_layers_of_a_stack_are_slots_like_any_other(inner, grouped, high):
    params = make_params(1, STACKED)
    slots = 4 if grouped else 7
    group = (lambda path: path.split("/")[0]) if grouped else None
    stacked = priorityprop(
        inner, 2 * slots, 0, high, 4, stacked_axis=axis_of, group=group, depth_base=1.5
    )
    apart = priorityprop(inner, 2 * slots, 0, high, 4, group=group, depth_base=1.5)
    a, state_a, b, state_b = params, stacked.init(params), unstack(params), None
    state_b = apart.init(b)

    @jax.jit
    def step(a, state_a, b, state_b, i):
        grads = gradients(a, i)
        u, state_a = stacked.update(grads, state_a, a)
        v, state_b = apart.update(unstack(grads), state_b, b)
        return optax.apply_updates(a, u), state_a, optax.apply_updates(b, v), state_b

    for i in range(12):
        a, state_a, b, state_b = step(a, state_a, b, state_b, i)
        chex.assert_trees_all_close(unstack(jax.device_get(a)), b, rtol=1e-5, atol=1e-6)
    names_a = find_slots(params, stacked_axis=axis_of, group=group).names
    names_b = find_slots(b, group=group).names
    counts_a = dict(zip(names_a, state_a.update_counts.tolist(), strict=True))
    counts_b = dict(zip(names_b, state_b.update_counts.tolist(), strict=True))
    rename = lambda name: (  # noqa: E731
        name.replace("block_", "blocks[") + "]"
        if grouped and "block_" in name
        else (f"blocks/{name.split('/')[1]}[{name[6]}]" if "block_" in name else name)
    )
    assert {rename(k): v for k, v in counts_b.items()} == counts_a
    assert len(set(counts_a.values())) > 1


def test_absent_gradients_touch_nothing_and_keep_their_magnitude():
    params = make_params()
    tx = priorityprop(optax.adam(0.01), 24, 1, 10, 4, spread="nested")
    state = tx.init(params)
    # the scoring step is a full one
    _, state = jax.jit(tx.update)(gradients(params, 0), state, params)
    grads = gradients(params, 1)
    grads["Dense_1"] = {"kernel": None, "bias": None}
    updates, new = jax.jit(tx.update)(grads, state, params)
    assert updates["Dense_1"] == {"kernel": Frozen(), "bias": Frozen()}
    assert_same(optax.apply_updates(params, updates)["Dense_1"], params["Dense_1"])
    left_out = {name: layer for name, layer in grads.items() if name != "Dense_1"}
    assert_same(jax.jit(tx.update)(left_out, state, params), (updates, new))
    there = {**grads, "Dense_1": {"kernel": Frozen(), "bias": Frozen()}}
    around = optax.apply_if_finite(tx, 3)
    kept, _ = jax.jit(around.update)(there, around.init(params), params)
    assert jax.tree.structure(kept) == jax.tree.structure(updates)
    slots = find_slots(params).names
    for i, name in enumerate(slots):
        absent = name.startswith("Dense_1")
        if absent:
            assert new.update_counts[i] == state.update_counts[i]
            layer, leaf = name.split("/")
            for moment in ("mu", "nu"):
                old, now = (getattr(s.inner_state[0], moment)[layer][leaf] for s in (state, new))
                np.testing.assert_array_equal(old, now)
    # Over a cycle's start the magnitude stays
    update = jax.jit(tx.update)
    for i in range(2, 5):
        grads = gradients(params, i)
        grads["Dense_1"] = {"kernel": None, "bias": None}
        _, new = update(grads, new, params)
    assert new.score_counts.tolist() == [2 - name.startswith("Dense_1") for name in slots]
    for i, name in enumerate(slots):
        assert (new.magnitudes[i] == state.magnitudes[i]) == name.startswith("Dense_1")
    assert jax.tree.structure(state) == jax.tree.structure(new)


def test_absent_gradients_are_refused_where_they_make_no_sense():
    params = make_params()
    grads = gradients(params, 0)
    grads["Dense_1"]["bias"] = None
    full = priorityprop(optax.sgd(0.1), None, 5, 5, 5)
    with pytest.raises(ValueError, match="'Dense_1/bias' is absent"):
        full.update(grads, full.init(params), params)
    grouped = priorityprop(optax.sgd(0.1), 0.5, group=lambda path: path.split("/")[0])
    with pytest.raises(ValueError, match="some leaves of slot 'Dense_1'"):
        grouped.update(grads, grouped.init(params), params)
    tx = priorityprop(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match="need params"):
        tx.update(grads, tx.init(params))


@pytest.mark.parametrize("face", [priorityprop, None])
def test_magnitudes_priorities_and_counts_are_the_formulas(face):
    params = make_params()
    names = find_slots(params).names
    costs = {name: 1.0 + i for i, name in enumerate(names)}
    options = dict(depth_factor=lambda path: 2.0 if "kernel" in path else 1.0, costs=costs)
    if face is None:
        tx = scale_by_priority(24, 0, 20, 4, magnitude="rms", **options)
    else:
        tx = face(optax.sgd(0.1), 24, 0, 20, 4, magnitude="rms", **options)
    state = tx.init(params)
    counts = np.zeros(6, int)
    update = jax.jit(tx.update)
    for i in range(9):
        grads = gradients(params, i)
        _, state = update(grads, state, params)
        if i % 4 == 0:
            rms = [np.sqrt(np.mean(np.square(g))) for g in jax.tree.leaves(jax.device_get(grads))]
            factor = [2.0 if "kernel" in name else 1.0 for name in names]
            expected = np.array(rms) / (1 + counts) * factor / np.arange(1, 7)
            np.testing.assert_allclose(state.priorities, expected, rtol=1e-5)
            granted = np.asarray(allocate(state.priorities, 24, 0, 20))
            assert state.allocation.tolist() == granted.tolist()
        counts += np.asarray(repeats(granted, i % 4, 4))
        assert state.update_counts.tolist() == counts.tolist()
        assert int(state.step) == i + 1
        assert int(state.cycle_step) == (i + 1) % 4


def test_gain_is_the_decrease_that_the_inner_update_promises():
    params = make_params(1, STACKED)
    inner = optax.adam(0.01)
    tx = priorityprop(inner, 14, 0, 8, 2, magnitude="gain", stacked_axis=axis_of)
    state = tx.init(params)
    for i in range(2):
        grads = gradients(params, i)
        updates, state = jax.jit(tx.update)(grads, state, params)
        if i == 0:
            promised, _ = jax.jit(inner.update)(grads, inner.init(params), params)
            product = jax.tree.map(lambda g, u: np.multiply(g, u), grads, promised)
            expected = np.concatenate(
                [
                    np.abs(np.sum(product["blocks"]["bias"], axis=0)),
                    np.abs(np.sum(product["blocks"]["kernel"], axis=(1, 2))),
                    np.abs(np.sum(product["head"]["kernel"]))[None],
                ]
            )
            np.testing.assert_allclose(state.magnitudes, expected, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, 2])
def test_a_score_of_ones_own_sees_gradients_parameters_and_updates(layers):
    shape = (2,) if layers is None else (layers, 2)
    params = {"a": jnp.full(shape, 2.0), "b": jnp.full(shape, 3.0)}
    grads = {"a": jnp.full(shape, 5.0), "b": jnp.full(shape, 7.0)}
    own = lambda grads, params, updates: jnp.sum(grads[0] * params[0] - 10 * updates[0])  # noqa: E731
    tx = priorityprop(
        optax.sgd(0.1), 0.5, 0, 4, 4, score=lambda look: look.measure(own) * (look.counts + 1),
        stacked_axis=None if layers is None else lambda name: 0,
    )  # fmt: skip
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(state.priorities, np.repeat([30, 56], layers or 1))
    beside = lambda grads, params, updates: jnp.sum(grads[0] * params[0])  # noqa: E731
    tx = scale_by_priority(4, score=lambda look: look.measure(beside))
    _, state = jax.jit(tx.update)(grads["a"], tx.init(params["a"]), params["a"])
    np.testing.assert_allclose(state.priorities, [20 * (layers or 1)])


def test_moving_average_of_the_magnitude_is_unbiased():
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    tx = scale_by_priority(4, 0, 4, 1, magnitude_decay=0.9, depth_base=1.0)
    state = tx.init(params)
    seen, update = {"a": [], "b": []}, jax.jit(tx.update)
    for i in range(4):
        grads = {"a": jnp.full(4, 1.0 + i), "b": jnp.full(4, 5.0 - i)}
        seen = {k: [*v, float(grads[k][0])] for k, v in seen.items()}
        counts = np.asarray(state.update_counts)
        _, state = update(grads, state, params)
        weights = 0.9 ** np.arange(i, -1, -1)
        means = [np.sum(weights * np.array(seen[k])) / np.sum(weights) for k in ("a", "b")]
        np.testing.assert_allclose(state.priorities, np.array(means) / (1 + counts), rtol=1e-5)


def test_nonfinite_magnitudes_count_as_nothing_and_are_counted():
    params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}
    grads = {"a": jnp.array([1.0, jnp.nan, 1.0]), "b": jnp.full(3, jnp.inf), "c": jnp.ones(3)}
    tx = priorityprop(optax.adam(0.1), 3, 0, 3, 1)
    updates, state = tx.update(grads, tx.init(params), params)
    assert state.nonfinite_counts.tolist() == [1, 1, 0]
    assert state.allocation.tolist() == [0, 0, 3]
    assert jnp.all(updates["a"] == 0) and jnp.all(updates["b"] == 0)
    scaled, _ = scale_by_priority(3, 0, 3, 1).update(grads, tx.init(params), params)
    assert jnp.all(scaled["a"] == 0) and jnp.all(scaled["c"] == 3)


def test_traced_budgets_are_clamped_and_flagged():
    params = make_params()
    for budget, expected, flagged in ((jnp.int32(1), 6, 1), (jnp.int32(500), 120, 1), (50, 50, 0)):
        tx = scale_by_priority(budget)
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert int(state.allocation.sum()) == expected
        assert int(state.clamped_cycles) == flagged


def test_budget_as_fraction_schedule_or_none():
    params = make_params()
    schedule = lambda step: jnp.where(step < 10, 0.5, 1.0)  # noqa: E731
    for budget, expected in ((0.5, (30, 30)), (None, (60, 60)), (schedule, (30, 60)), (7, (7, 7))):
        tx = scale_by_priority(budget, 0)
        state, totals = tx.init(params), []
        update = jax.jit(tx.update)
        for i in range(11):
            _, state = update(gradients(params, i), state, params)
            totals.append(int(state.allocation.sum()))
        assert (totals[0], totals[10]) == expected


def test_scale_by_priority_multiplies_after_an_optimizer():
    params = make_params()
    tx = optax.chain(
        optax.adam(0.01),
        scale_by_priority(24, 0, 20, 5, depth_factor=lambda path: 9.0 if "0" in path else 1.0),
    )
    plain = optax.adam(0.01)
    state, plain_state, plain_step = tx.init(params), plain.init(params), jax.jit(plain.update)
    zeros = most = 0
    for i in range(7):
        grads = gradients(params, i)
        before = np.asarray(state[1].update_counts)
        updates, state = jax.jit(tx.update)(grads, state, params)
        u, plain_state = plain_step(grads, plain_state, params)
        times = np.asarray(state[1].update_counts) - before
        expected = [r * np.asarray(x) for r, x in zip(times, jax.tree.leaves(u), strict=True)]
        chex.assert_trees_all_close(jax.tree.leaves(updates), expected, rtol=1e-5)
        zeros += np.sum(times == 0)
        most = max(most, times.max())
    assert zeros > 0 and most > 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(spread="odd"), ValueError, "spread"),
        (dict(magnitude="max"), ValueError, "magnitude"),
        (dict(score="max"), ValueError, "score"),
        (dict(min_updates=-1), ValueError, "min_updates"),
        (dict(max_updates=0), ValueError, "max_updates"),
        (dict(min_updates=5, max_updates=4), ValueError, "more than max_updates"),
        (dict(recalc_every=0), ValueError, "recalc_every"),
        (dict(recalc_every=50_000), ValueError, "46,340"),
        (dict(recalc_every=2.0), TypeError, "whole number"),
        (dict(total_budget=-1), ValueError, "total_budget"),
        (dict(total_budget="all"), TypeError, "total_budget"),
        (dict(total_budget=True), TypeError, "total_budget"),
        (dict(total_budget=float("nan")), ValueError, "total_budget"),
        (dict(total_budget=None, max_updates=5), ValueError, "full budget"),
        (dict(magnitude_decay=1.0), ValueError, "magnitude_decay"),
        (dict(depth_base=0.0), ValueError, "depth_base"),
    ],
)
@pytest.mark.parametrize(
    "face", [functools.partial(priorityprop, optax.sgd(0.1)), scale_by_priority]
)
def test_wrong_options_are_refused_at_once(face, options, error, match):
    with pytest.raises(error, match=match):
        face(**options)


def test_what_needs_the_slots_is_refused_at_initialisation():
    params = make_params()
    for options, match in (
        (dict(total_budget=5), "raise total_budget"),
        (dict(total_budget=121), "raise max_updates"),
        (dict(costs={"a": 1.0}), "costs must name every slot"),
    ):
        tx = priorityprop(optax.sgd(0.1), **options)
        with pytest.raises(ValueError, match=match):
            tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="gain"):
        scale_by_priority(magnitude="gain")
    with pytest.raises(TypeError, match="GradientTransformation"):
        priorityprop(0.1)
    with pytest.raises(TypeError, match="one array for each parameter"):
        priorityprop(optax.sm3(0.1), 0.5).init(params)
    tx = priorityprop(optax.sgd(0.1), 0.5)
    state = tx.init(params)
    with pytest.raises(ValueError, match="made for 6 slots"):
        tx.update({"a": jnp.ones(2)}, state, {"a": jnp.ones(2)})


def test_the_state_is_one_named_tuple_of_vectors():
    params = make_params()
    state = priorityprop(optax.adam(0.1), 0.5).init(params)
    assert isinstance(state, PriorityPropState)
    for field in set(PriorityPropState._fields) - {
        "step",
        "cycle_step",
        "inner_state",
        "clamped_cycles",
    }:
        assert optax.tree.get(state, field).shape == (6,), field
        assert optax.tree.get(state, field).dtype in (jnp.int32, jnp.float32)
    assert optax.tree.get(state, "count").shape == (6,)
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "mu"), params)
