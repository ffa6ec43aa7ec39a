"""State of the active slots only: its bytes, and its bits when it comes back."""

import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from priorityprop_jax.core.rows import RowSparse
from priorityprop_jax.partial import ActiveState, update_active

SLOTS = 4
INNER = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "adamw with a schedule": optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_schedule(lambda count: -1e-2 / (count + 1)),
    ),
}


def make_params(shape=(2, 3), count=SLOTS):
    rng = np.random.default_rng(0)
    return {f"w{i}": jnp.asarray(rng.normal(size=shape), jnp.float32) for i in range(count)}


def make_stack():
    rng = np.random.default_rng(0)
    return {
        "head": jnp.asarray(rng.normal(size=3), jnp.float32),
        "stack": jnp.asarray(rng.normal(size=(SLOTS, 2, 3)), jnp.float32),
    }


def stacked_axis(path):
    return 0 if path == "stack" else None


APART = ["w3", "w3 w2", "w0", "w2", "w0 w1 w2 w3", "w3 w1", "w3 w1", "w0"]
STACKED = ["head s3", "s3 s1", "s0", "head", "s0 s1 s2 s3", "head s1 s2", "s2", "head s0 s3"]
MODELS = {
    "apart": (make_params, None, [frozenset(names.split()) for names in APART]),
    "stacked": (
        make_stack,
        stacked_axis,
        [
            frozenset(n if n == "head" else f"stack[{n[1]}]" for n in names.split())
            for names in STACKED
        ],
    ),
}


def gradients(params, step, active):
    """Gradients of the active slots; rows for some layers of a stacked leaf."""
    grads = {}
    for i, (name, x) in enumerate(params.items()):
        g = jnp.sin(3 * x + i + 0.7 * step) * (1 + i)
        rows = [layer for layer in range(len(x)) if f"{name}[{layer}]" in active]
        grads[name] = g if name in active or len(rows) == len(g) else None
        if 0 < len(rows) < len(g):
            grads[name] = RowSparse(tuple(rows), g[np.array(rows)], g.shape)
    return grads


class Run:
    """A run step by step, with `ActiveState` or with the full state where ``mode`` is keep."""

    def __init__(self, model, inner, mode):
        make, axis, self.sets = MODELS[model]
        self.params = make()
        self.inner, self.axis, self.mode = inner, axis, mode
        self.tx = update_active(inner, stacked_axis=axis)
        self.states = None
        if mode == "keep":
            self.state = self.tx.init(self.params)
        else:
            self.states = ActiveState(inner, self.params, mode=mode, stacked_axis=axis)
            self.state = self.states.empty()

    def step(self, number):
        active = self.sets[number]
        if self.states is not None:
            self.state = self.states.move(self.state, active, self.params)
            assert self.states.resident == active
        grads = gradients(self.params, number, active)
        updates, self.state = self.tx.update(grads, self.state, self.params, active=active)
        self.params = optax.apply_updates(self.params, updates)

    def restored(self):
        """Another run that goes on from a checkpoint of this one, in host memory."""
        other = Run.__new__(Run)
        other.__dict__.update(self.__dict__)
        saved = jax.device_get(self.states.complete(self.state))
        other.states = ActiveState(self.inner, self.params, mode=self.mode, stacked_axis=self.axis)
        other.state = other.states.restore(saved, self.states.resident, self.states.waiting)
        return other


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    a, b = jax.tree.map(_data, (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# Offload.


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*INNER, "noise"])
def test_an_offloaded_run_is_the_run_that_keeps_its_state(name, model):
    # Every slot, and every layer of a stack, draws noise of its own.
    inner = INNER.get(name) or optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1e-2))
    offload, keep = Run(model, inner, "offload"), Run(model, inner, "keep")
    for step in range(len(keep.sets)):
        offload.step(step)
        keep.step(step)
        assert_same(offload.params, keep.params)
    seen = frozenset().union(*keep.sets)
    assert set(offload.states.waiting) == seen - keep.sets[-1]
    assert_same(offload.states.complete(offload.state), keep.state)


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_without_a_bit_changed(model):
    run = Run(model, INNER["adam"], "offload")
    for step in range(2):
        run.step(step)
    one, other = run.sets[1], run.sets[2]
    before = jax.device_get(run.state)
    away = run.states.move(run.state, other, run.params)
    assert run.states.resident == other and one <= set(run.states.waiting)
    assert_same(jax.device_get(run.states.move(away, one, run.params)), before)
    assert other <= set(run.states.waiting)


def test_what_waits_is_a_copy():
    run = Run("apart", INNER["momentum"], "offload")
    run.step(0)
    trace = run.state.inner_state[0].trace["w3"]
    expected = np.array(trace)
    state = run.states.move(run.state, {"w0"}, run.params)
    trace.delete()  # as a step that donates its state does
    state = run.states.move(state, {"w3"}, run.params)
    np.testing.assert_array_equal(state.inner_state[0].trace["w3"], expected)


def test_nothing_moves_where_the_set_stays():
    run = Run("apart", INNER["adam"], "offload")
    run.step(0)
    assert run.states.move(run.state, ["w3"], run.params) is run.state
    moved = run.states.move(run.state, {"w3", "w1"}, run.params)
    assert moved.inner_state[0].mu["w3"] is run.state.inner_state[0].mu["w3"]


def test_state_comes_back_to_where_its_parameter_lies():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {name: jax.device_put(jnp.ones((8, 2)), sharding) for name in ("a", "b")}
    states = ActiveState(optax.adam(0.1), params, mode="offload")
    state = states.move(states.empty(), {"a"}, params)
    state = states.move(state, {"b"}, params)
    state = states.move(state, {"a"}, params)
    assert state.inner_state[0].mu["a"].sharding.is_equivalent_to(sharding, 2)


# Reset.


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", INNER)
def test_reset_starts_a_slot_afresh(name, model):
    run, inner = Run(model, INNER[name], "reset"), INNER[name]
    names = run.states.slots.names

    def slot(params, slot_name):
        key, _, layer = slot_name.partition("[")
        return params[key][int(layer[:-1])] if layer else params[key]

    reference = {slot_name: slot(run.params, slot_name) for slot_name in names}
    states, active_before = {}, frozenset()
    for step, active in enumerate(run.sets):
        for slot_name in names:
            if slot_name not in active:
                continue
            if slot_name not in active_before:
                states[slot_name] = inner.init(reference[slot_name])
            number = list(run.params).index(slot_name.partition("[")[0])
            x = reference[slot_name]
            g = jnp.sin(3 * x + number + 0.7 * step) * (1 + number)
            u, states[slot_name] = inner.update(g, states[slot_name], x)
            reference[slot_name] = x + u
        run.step(step)
        active_before = active
        for slot_name in names:
            np.testing.assert_allclose(
                slot(run.params, slot_name), reference[slot_name], rtol=1e-5, atol=1e-6
            )
    assert not run.states.waiting


def test_the_count_starts_afresh_too():
    run = Run("apart", INNER["adam"], "reset")
    counts = []
    for step in range(len(run.sets)):
        run.step(step)
        counts.append(run.state.inner_state[0].count.tolist())
    # w3 is active at steps 0, 1, then 4 to 6.
    assert [count[3] for count in counts[:2]] == [1, 2]
    assert [count[3] for count in counts[4:7]] == [1, 2, 3]
    np.testing.assert_array_equal(run.state.update_counts, [3, 3, 3, 5])  # of all its lives


def test_fresh_states_are_no_parameters():
    """An optimizer may start from the parameters themselves, which a step must not donate."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g, s: g - s, updates, state), state

    inner = optax.GradientTransformation(lambda params: params, update)
    params = make_params()
    states = ActiveState(inner, params, mode="reset")
    state = states.move(states.empty(), {"w1"}, params)
    np.testing.assert_array_equal(state.inner_state["w1"], params["w1"])
    state.inner_state["w1"].delete()
    assert not params["w1"].is_deleted()


# Bytes.


@pytest.mark.parametrize("mode", ["reset", "offload"])
@pytest.mark.parametrize("k", [1, 4])
def test_bytes_on_the_device_are_those_of_the_active_slots(mode, k, request):
    count, names = 8, [f"w{i}" for i in range(8)]
    params = make_params((32, 32), count)
    tx = update_active(INNER["adam"])
    full = nbytes(tx.init(params).inner_state)
    gc.collect()
    gc.freeze()  # what is here now need not be gone through again
    request.addfinalizer(gc.unfreeze)
    base = nbytes(jax.live_arrays())
    state = None
    for first in (0, 3, 4):
        active = set(names[first : first + k])
        if state is None:
            states = ActiveState(INNER["adam"], params, mode=mode)
            state = states.empty()
        state = states.move(state, active, params)
        updates, state = tx.update(gradients(params, 0, active), state, params, active=active)
        del updates
        gc.collect()
        own = nbytes(state.inner_state)
        assert own == pytest.approx(k / count * full, rel=0.1)
        others = nbytes(state._replace(inner_state=()))
        assert nbytes(jax.live_arrays()) - base <= 1.1 * k / count * full + others


def test_bytes_of_stacked_layers():
    params = {"stack": jnp.ones((8, 32, 32))}
    tx = update_active(INNER["adam"], stacked_axis=lambda path: 0)
    full = nbytes(tx.init(params).inner_state)
    states = ActiveState(INNER["adam"], params, mode="offload", stacked_axis=lambda path: 0)
    assert nbytes(states.empty().inner_state) < 0.01 * full
    state = states.move(states.empty(), {"stack[2]", "stack[5]"}, params)
    assert state.inner_state[0].mu["stack"].shape == (2, 32, 32)
    assert nbytes(state.inner_state) == pytest.approx(2 / 8 * full, rel=0.1)
    state = states.move(state, set(), params)
    assert state.inner_state[0].mu["stack"] is None
    assert set(states.waiting) == {"stack[2]", "stack[5]"}


def test_only_shapes_of_parameters_are_read():
    shapes = {f"w{i}": jax.ShapeDtypeStruct((100_000, 100_000), jnp.float32) for i in range(3)}
    states = ActiveState(INNER["adam"], shapes, mode="reset")
    assert states.slots.names == ("w0", "w1", "w2")


# Checkpoints.


@pytest.mark.parametrize("mode", ["reset", "offload"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_restored_run_goes_on_as_it_would_have(model, mode, stop):
    run = Run(model, INNER["adam"], mode)
    for step in range(stop):
        run.step(step)
    other = run.restored()
    assert other.states.resident == run.states.resident
    assert_same(other.states.waiting, run.states.waiting)
    assert_same(other.state, run.state)
    for step in range(stop, len(run.sets)):
        run.step(step)
        other.step(step)
    assert_same(other.params, run.params)
    assert_same(other.state, run.state)


def test_a_complete_state_has_the_shapes_of_the_full_one():
    run = Run("stacked", INNER["adamw with a schedule"], "reset")
    for step in range(3):
        run.step(step)
    complete = run.states.complete(run.state)
    full = jax.eval_shape(run.tx.init, run.params)
    assert jax.tree.structure(complete) == jax.tree.structure(full)
    for a, b in zip(jax.tree.leaves(complete), jax.tree.leaves(full), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    mu = complete.inner_state[0].mu["stack"]
    np.testing.assert_array_equal(mu[0], run.state.inner_state[0].mu["stack"][0])
    assert not np.asarray(mu[1:]).any()  # they will start afresh


# Groups and errors.


def test_leaves_of_a_group_move_together():
    params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "z": jnp.ones(3)}
    options = {"group": lambda path: "a" if path.startswith("a/") else None}
    states = ActiveState(INNER["adam"], params, mode="offload", **options)
    state = states.move(states.empty(), {"a"}, params)
    assert state.inner_state[0].nu["z"] is None
    assert state.inner_state[0].nu["a"]["w"].shape == (2, 2)
    state = states.move(state, {"z"}, params)
    assert state.inner_state[0].nu["a"] == {"b": None, "w": None}
    assert set(states.waiting) == {"a"}


def test_an_optimizer_without_state():
    states = ActiveState(optax.sgd(0.1), make_params(), mode="offload")
    state = states.move(states.empty(), {"w1"}, make_params())
    assert jax.tree.leaves(state.inner_state) == []


def test_errors():
    params = make_params()
    for mode in ("keep", "drop", None):
        with pytest.raises(ValueError, match="mode must be one of"):
            ActiveState(INNER["adam"], params, mode=mode)
    states = ActiveState(INNER["adam"], params, mode="reset")
    with pytest.raises(ValueError, match="no slot is called 'v'"):
        states.move(states.empty(), {"w1", "v"}, params)
    tx = update_active(INNER["adam"])
    state = states.move(states.empty(), {"w1"}, params)
    with pytest.raises(ValueError, match="'w2' is active, but its optimizer state is absent"):
        tx.update(gradients(params, 0, {"w2"}), state, params)


def test_stacks_on_another_axis_are_refused():
    with pytest.raises(ValueError, match="axis 1"):
        ActiveState(
            INNER["adam"], {"w": jnp.ones((3, 3))}, mode="offload", stacked_axis=lambda path: 1
        )


def test_every_layer_of_a_stack_draws_noise_of_its_own():
    inner = optax.chain(optax.add_noise(1.0, 0.5, key=jax.random.key(3)), optax.sgd(1.0))
    params = {"stack": jnp.zeros((3, 4)), "w": jnp.zeros(4)}
    axis = {"stack": 0}.get
    states = ActiveState(inner, params, mode="reset", stacked_axis=axis)
    state = states.move(states.empty(), states.slots.names, params)
    tx = update_active(inner, stacked_axis=axis)
    drawn = [tx.update(params, one, params)[0] for one in (state, tx.init(params))]
    chex.assert_trees_all_equal(*drawn)
    draws = [*map(tuple, np.asarray(drawn[0]["stack"])), tuple(np.asarray(drawn[0]["w"]))]
    assert len(set(draws)) == 4
