"""One slot at a time: masks, labels, random keys and hyperparameters of the inner optimizer."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import partial, priorityprop
from priorityprop_jax.priority import inner_state
from tests.priority.test_transform import gradients, make_params, train

PLAIN = dict(total_budget=None, min_updates=0, max_updates=4, recalc_every=1)  # but slot by slot


def by_map(test):
    return lambda tree: jax.tree.map(test, tree)


def by_path(test):
    def label(path, x):
        return test(np.zeros(2 if path[-1].key == "kernel" else 1))

    return lambda tree: jax.tree_util.tree_map_with_path(label, tree)


def by_name(test):
    return lambda tree: {
        layer: {name: test(np.zeros(2) if name == "kernel" else np.zeros(())) for name in leaves}
        for layer, leaves in tree.items()
    }


def by_shape(test):
    return lambda tree: {
        layer: {name: test(x) for name, x in leaves.items()} for layer, leaves in tree.items()
    }


def by_count(test):
    def label(tree):
        leaves, treedef = jax.tree.flatten(tree)
        assert len(leaves) == 6, "the whole tree, whichever slot is updated"
        return treedef.unflatten([test(x) for x in leaves])

    return label


def by_place(test):
    """The last leaves of so many."""

    def label(tree):
        leaves, treedef = jax.tree.flatten(tree)
        half = np.ones(len(leaves) // 2)
        return treedef.unflatten(
            [test(half if i < len(half) else half[:0]) for i in range(len(leaves))]
        )

    return label


FUNCTIONS = {
    "map": (by_map, lambda x: x.ndim > 1),
    "path": (by_path, lambda x: x.size > 1),
    "name": (by_name, lambda x: x.ndim > 0),
    "shape": (by_shape, lambda x: x.ndim > 1 and x.size > 6),
    "count": (by_count, lambda x: x.ndim > 1),
    "place": (by_place, lambda x: x.size > 0),
}


@pytest.mark.parametrize(
    ("kind", "wrapper"),
    [("map", "masked"), ("path", "labels"), ("name", "labels"), ("shape", "masked")]
    + [("shape", "labels"), ("name", "decay")]
    + [(kind, wrapper) for kind in ("count", "place") for wrapper in ("masked", "labels", "decay")],
)
def test_masks_and_labels_may_be_functions_of_the_tree(kind, wrapper):
    make, test = FUNCTIONS[kind]
    inner = {
        "masked": lambda: optax.masked(optax.adam(0.1), make(test)),
        "labels": lambda: optax.partition(
            {"yes": optax.adam(0.1), "no": optax.sgd(0.3, momentum=0.9)},
            make(lambda x: "yes" if test(x) else "no"),
        ),
        "decay": lambda: optax.adamw(0.1, weight_decay=0.5, mask=make(test)),
    }[wrapper]()
    params = make_params()
    plain, _ = train(inner, params, 4)
    ours, _ = train(
        priorityprop(inner, **PLAIN, depth_base=1.0, magnitude=lambda g: 1.0), params, 4
    )
    chex.assert_trees_all_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_an_error_of_the_users_own_is_passed_on():
    def broken(tree):
        raise AttributeError("of my own")

    params = make_params()
    tx = priorityprop(optax.masked(optax.sgd(0.1), broken), 0.5)
    with pytest.raises((AttributeError, TypeError), match="of my own"):
        tx.init(params)


@pytest.mark.parametrize("name", [None, "rng_key", "seed", "count"])  # None: a key with a type
def test_every_slot_draws_noise_of_its_own(name):
    params = {
        "a": jnp.zeros(64),
        "b": jnp.zeros(64),
        "stack": jnp.zeros((3, 64)),
    }
    noisy = raw_noise(jax.random.PRNGKey(3), name) if name else noise(jax.random.key(3))
    noisy = counted_noise() if name == "count" else noisy
    inner = optax.chain(noisy, optax.sgd(1.0))
    axis = lambda path: 0 if path == "stack" else None  # noqa: E731
    ways = [priorityprop(inner, **PLAIN, stacked_axis=axis), inner]
    ways.append(partial.update_active(inner, stacked_axis=axis))
    ours, alone, active = ([] for _ in ways)
    for tx, draws in zip(ways, (ours, alone, active), strict=True):
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            updates, after = step(params, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            state = after
            draws.append(updates)
    correlation = np.corrcoef(np.concatenate([[x["a"], x["b"], *x["stack"]] for x in ours]))
    assert np.all(np.abs(correlation - np.eye(len(correlation))) < 0.6)
    chex.assert_trees_all_equal(active, ours)
    for x, y in zip(ours, alone, strict=True):
        chex.assert_trees_all_equal(x | {"stack": 0}, y | {"stack": 0})


def noise(key):
    return optax.add_noise(1.0, 0.5, key=key)


def raw_noise(key, name):
    """As Optax kept its keys before they had a type."""

    def update(updates, state, params=None):
        del params
        new, own = jax.random.split(state[name])
        return drawn(own, updates), {name: new}

    return optax.GradientTransformation(lambda params: {name: key}, update)


def counted_noise():
    """Without a key in its state."""

    def update(updates, state, params=None):
        del params
        return drawn(jax.random.fold_in(jax.random.key(7), state), updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def drawn(key, updates):
    keys = optax.tree.split_key_like(key, updates)
    return jax.tree.map(lambda u, key: u + jax.random.normal(key, u.shape), updates, keys)


def test_noise_of_ordinary_training_is_the_inner_optimizers():
    inner = lambda: optax.chain(noise(jax.random.key(3)), optax.sgd(0.1))  # noqa: E731
    params = make_params()
    plain, _ = train(inner(), params, 4)
    ours, _ = train(priorityprop(inner(), None, 5, 5, 5), params, 4)
    chex.assert_trees_all_equal(ours, plain)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), jnp.float32(0.5)], ids=repr)
def test_a_hyperparameter_is_set_to_one_number_for_all_slots(value):
    params = make_params()
    tx = priorityprop(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), None, 0, 1, 1)
    state = optax.tree.set(tx.init(params), learning_rate=value)
    grads = gradients(params, 0)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(grads, state, params)
        chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.5 * g, grads), rtol=5e-6)
    assert float(state.inner_state.hyperparams["learning_rate"]) == 0.5
    state.inner_state.hyperparams["learning_rate"] = jnp.full(6, 0.5)
    with pytest.raises(ValueError, match="one value of shape"):
        step(grads, state, params)


def test_a_hyperparameter_on_a_schedule_is_one_of_each_slot():
    params = make_params()
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = priorityprop(optax.inject_hyperparams(optax.adam)(schedule, b1=0.8), 0.5, 0, 20, 1)
    state = tx.init(params)
    for step in range(4):
        _, state = jax.jit(tx.update)(gradients(params, step), state, params)
    hyper, counts = state.inner_state.hyperparams, np.asarray(state.update_counts)
    assert float(hyper["b1"]) == np.float32(0.8) and len(set(counts)) > 1
    wanted = [schedule(max(n - 1, 0)) for n in counts]
    np.testing.assert_allclose(hyper["learning_rate"], wanted, rtol=5e-6)


FREEZERS = {
    "labels": lambda inner: optax.partition({"yes": inner, "no": optax.set_to_zero()}, labels),
    "freeze": lambda inner: optax.chain(
        inner, optax.masked(optax.set_to_zero(), lambda p: is_frozen(labels(p)))
    ),
    "scaled": lambda inner: optax.partition(
        {"yes": inner, "no": optax.chain(optax.set_to_zero(), optax.scale(-2.0))}, labels
    ),
}


def labels(tree):
    return {name: "no" if name in ("embed", "stack") else "yes" for name in tree}


def is_frozen(labels):
    return {name: label == "no" for name, label in labels.items()}


@pytest.mark.parametrize("name", FREEZERS)
@pytest.mark.parametrize("budget", [0.5, 12, 100])
def test_a_frozen_label_takes_no_budget(name, budget):
    rng = np.random.default_rng(0)
    shapes = {"embed": (4, 3), "head": (3,), "stack": (3, 3, 2), "w": (2, 2)}
    params = {
        key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()
    }
    trained = {key: params[key] for key in ("head", "w")}
    options = dict(total_budget=budget, min_updates=3, max_updates=50, depth_base=1.0)
    stacked = lambda path: 0 if path == "stack" else None  # noqa: E731

    def run(tx, params):
        state, step = tx.init(params), jax.jit(tx.update)
        for i in range(12):
            grads = {key: jnp.sin(3 * x + len(key) + i) for key, x in params.items()}
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    tx = priorityprop(FREEZERS[name](optax.adam(0.1)), **options, stacked_axis=stacked)
    ours, state = run(tx, params)
    alone, wanted = run(priorityprop(optax.adam(0.1), **options), trained)
    for field in ("allocation", "update_counts"):
        counts = np.asarray(getattr(state, field))
        np.testing.assert_array_equal(counts[[1, 5]], getattr(wanted, field))
        assert counts[[0, 2, 3, 4]].sum() == 0
    assert int(state.clamped_cycles) == 0
    chex.assert_trees_all_close({key: ours[key] for key in trained}, alone, rtol=5e-6)
    chex.assert_trees_all_equal(ours | trained, params | trained)


def test_a_budget_that_is_too_small_is_refused_by_the_slots_that_share_it():
    params = {"embed": jnp.ones(2), "head": jnp.ones(2)}
    tx = lambda budget: priorityprop(FREEZERS["labels"](optax.sgd(0.1)), budget, 3)  # noqa: E731
    tx(3).init(params)
    with pytest.raises(ValueError, match="1 slots"):
        tx(2).init(params)


def test_private_gradients_are_refused():
    private = optax.contrib.differentially_private_aggregate(1.0, 0.1, jax.random.key(0))
    with pytest.raises(TypeError, match=r"in front, as in optax\.chain"):
        priorityprop(optax.chain(private, optax.sgd(0.1))).init(make_params())


MODES = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug nans": lambda: jax.debug_nans(True),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "double": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("mode", MODES)
def test_under_every_mode_of_jax(mode):
    with contextlib.ExitStack() as stack:
        stack.enter_context(MODES[mode]())
        dtype = jnp.float64 if mode == "double" else jnp.bfloat16
        params = {"a": jnp.ones((2, 3), dtype), "stack": jnp.ones((2, 3), jnp.float32)}
        for options in (
            dict(total_budget=0.5, max_updates=30, magnitude="gain", magnitude_decay=0.5),
            dict(total_budget=lambda step: 0.5, depth_base=jnp.float32(1.1), max_updates=10),
        ):
            tx = priorityprop(
                optax.adam(0.1),  # which mixes dtypes by itself
                **options,
                stacked_axis=lambda path: 0 if path == "stack" else None,
            )
            updates, state = jax.jit(tx.update)(params, tx.init(params), params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            assert int(state.allocation.sum()) == 15


def test_the_inner_state_is_read_as_its_optimizer_knows_it():
    params = make_params()
    steps = optax.MultiSteps(optax.inject_hyperparams(optax.adam)(learning_rate=0.25), 2)
    inner = steps.gradient_transformation()
    tx = priorityprop(inner, None, 1, 1, 1)
    state, step = tx.init(params), jax.jit(tx.update)
    for updated in (False, True):
        _, state = step(gradients(params, 0), state, params)
        own = inner_state((optax.EmptyState(), state), inner, params)
        assert bool(steps.has_updated(own)) == updated
    assert float(optax.tree.get(own, "learning_rate")) == 0.25
    chex.assert_trees_all_equal_shapes_and_dtypes(own, inner.init(params))


def test_what_needs_all_parameters_together_is_refused_at_once():
    params = make_params()
    for inner, what in (
        (optax.lbfgs(), "line search"),
        (optax.contrib.sophia(0.1), "Hessian"),
        (optax.lookahead(optax.adam(0.1), 5, 0.5), "put it around"),
    ):
        with pytest.raises(TypeError, match=what):
            priorityprop(inner).init(params)
    around = optax.lookahead(priorityprop(optax.sgd(0.1)), 5, 0.5)
    both = optax.LookaheadParams(params, params)
    jax.eval_shape(lambda: around.update(params, around.init(both), both))
