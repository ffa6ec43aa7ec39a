"""Updates that work number by number are chosen, not looped over: same values, less work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import priorityprop
from priorityprop_jax.priority.one_slot import OneSlot
from tests.priority.test_transform import gradients, make_params, train

ADAM = optax.adam(1e-2)
KERNELS = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
LABELS = lambda tree: jax.tree.map(lambda x: "ab"[x.ndim > 1], tree)  # noqa: E731
CHOSEN = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": ADAM,
    "adam, short moments": optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "nadamw": optax.nadamw(1e-2, weight_decay=0.1, mask=KERNELS),
    "amsgrad": optax.amsgrad(1e-2),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-2),
    "schedule": optax.adam(optax.linear_schedule(1e-2, 0.0, 20)),
    "injected": optax.inject_hyperparams(optax.adam)(1e-2),
}
# Some slots of these, or all, need more than one number at a time.
LOOPED = {
    "lamb": optax.lamb(1e-2),
    "some of each": optax.partition({"a": ADAM, "b": optax.lamb(1e-2)}, LABELS),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), ADAM),
}


def run(inner, steps=14, *, looped=False, **options):
    tx = priorityprop(inner, **{"total_budget": 0.4, "min_updates": 0, "max_updates": 4,
                                "recalc_every": 4, **options})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if looped:
            patch.setattr(OneSlot, "choosable", lambda *_: None)
        return train(tx, make_params(), steps)


def loops(inner, **options):
    """Loops of a step, but for those of scoring and allocation."""
    params = make_params()
    tx = priorityprop(
        inner, 0.4, **{"min_updates": 0, "max_updates": 4, "recalc_every": 4} | options
    )
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    return sum(eqn.primitive.name in ("while", "scan") for eqn in program.jaxpr.eqns)


@pytest.mark.parametrize("name", [*CHOSEN, *LOOPED])
@pytest.mark.parametrize("spread", ["even", "nested"])
def test_what_is_chosen_is_what_loops_make(name, spread):
    inner = (CHOSEN | LOOPED)[name]
    ours, theirs = run(inner, spread=spread), run(inner, looped=True, spread=spread)
    assert ours[1].update_counts.tolist() == theirs[1].update_counts.tolist()
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert bool(jnp.all(a == b))
        elif jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)


def test_no_slot_is_looped_over_whose_update_works_number_by_number():
    assert {name: loops(inner) for name, inner in CHOSEN.items()} == dict.fromkeys(CHOSEN, 0)
    assert loops(LOOPED["lamb"]) == 12 and loops(LOOPED["some of each"]) == 6
    # Where a slot may have two updates at a step, each is a loop, and one beside for none.
    assert loops(ADAM, max_updates=8) == 12


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="an older XLA keeps |g| of all slots while it scores"
)
def test_a_step_takes_no_memory_of_the_size_of_the_parameters():
    params = {f"layer_{i}": jnp.ones((256, 256)) for i in range(8)}
    tx = priorityprop(ADAM, 0.25, 0, 4, 4)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    assert program.memory_analysis().temp_size_in_bytes < params["layer_0"].nbytes / 4


def test_nan_of_a_slot_that_is_not_chosen_goes_nowhere():
    params = make_params()
    tx = priorityprop(ADAM, 9, 0, 4, 4, spread="nested")
    state, update, idle = tx.init(params), jax.jit(tx.update), 0
    for i in range(4):
        ahead = update(gradients(params, i), state, params)[1]
        moved = np.asarray(ahead.update_counts - state.update_counts)
        idle += np.sum(moved == 0)
        leaves, treedef = jax.tree.flatten(gradients(params, i))
        bad = [
            g if n or not i else jnp.full_like(g, jnp.nan)
            for g, n in zip(leaves, moved, strict=True)
        ]
        updates, state = update(treedef.unflatten(bad), state, params)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, state)))
    assert idle > 10


def test_a_mesh_of_devices_is_no_matter():
    params = make_params()
    tx = priorityprop(ADAM, 12, 0, 4, 4)
    state = tx.init(params)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    plain = tx.update(gradients(params, 0), state, params)
    with jax.set_mesh(mesh):
        laid = tx.update(gradients(params, 0), state, params)
    for a, b in zip(*map(jax.tree.leaves, (plain, laid)), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6)
