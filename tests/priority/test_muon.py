"""Muon on a budget, against Optax's and against the definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from priorityprop_jax.priority import muon, orthogonalize
from priorityprop_jax.priority.ledger import find_state
from priorityprop_jax.priority.muon import NS_COEFFS

Numbers = optax.contrib.MuonDimensionNumbers
SHAPES = {
    "embed": (9, 4), "wide": (4, 10), "tall": (10, 4), "square": (4, 4), "bias": (4,),
    "heads": (4, 2, 5), "stack": (3, 4, 10),
}  # fmt: skip
NUMBERS = {
    "embed": None, "wide": Numbers(), "tall": Numbers(), "square": Numbers(), "bias": None,
    "heads": Numbers(0, (1, 2)), "stack": Numbers(1, 2),
}  # fmt: skip
TWO = NS_COEFFS[:2]  # steps, to compile less
HIDDEN = ["heads", "square", "stack", "tall", "wide"]  # of 4 x 10 there are six


def gradients(step, dtype=jnp.float32):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def run(tx, steps):
    """Updates of every step, on gradients that do not depend on the parameters, and the state."""
    return run_on(tx, tx.init(gradients(100)), 0, steps)


def run_on(tx, state, start, stop, programs=1):
    """The same, from a state on."""
    params, step, made = gradients(100), jax.jit(tx.update), []
    for t in range(start, stop):
        updates, state = step(gradients(t), state, params)
        made.append(updates)
    assert step._cache_size() == programs
    return made, state


def slow(x, coefficients=NS_COEFFS):
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    if x.shape[0] > x.shape[1]:
        return slow(x.T, coefficients).T
    x = x / np.linalg.norm(x)
    for a, b, c in coefficients:
        gram = x @ x.T.conj()
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (6, 24), (24, 6)])
def test_orthogonalize_is_the_iteration(shape, dtype):
    rng = np.random.default_rng(0)
    # Singular values over three decades, as momenta have them
    x = rng.normal(size=(2, *shape)) * np.logspace(0, -3, shape[1])
    x = (x * (1 + 1j) if dtype == np.complex64 else x).astype(dtype)
    got = jax.jit(orthogonalize)(x)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, [slow(y) for y in x], atol=2e-5)


def test_orthogonalize_takes_its_own_coefficients_half_precision_and_zeros():
    x = np.random.default_rng(0).normal(size=(4, 8))
    rows = np.array([[2.0, -1.5, 0.5], [1.5, -0.5, 0.0]], np.float32)
    np.testing.assert_allclose(orthogonalize(jnp.float32(x), rows), slow(x, rows), atol=1e-5)
    half = orthogonalize(jnp.bfloat16(x), rows)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), slow(x, rows), atol=0.02)
    for dtype in (jnp.float16, jnp.float32):
        assert not orthogonalize(jnp.zeros((2, 3), dtype)).any()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        orthogonalize(jnp.zeros(3))


def test_long_matrices_take_fewer_flops():
    def flops(*shape):
        program = jax.jit(orthogonalize).lower(jnp.zeros(shape)).compile()
        return program.cost_analysis()["flops"]

    steps = len(NS_COEFFS)
    assert flops(32, 128) == flops(128, 32) < 0.6 * steps * 2 * 32**2 * (2 * 128 + 32)


def test_the_full_budget_is_optax_muon():
    rate = optax.linear_schedule(0.1, 0.01, 3)
    ours = muon(
        rate, 1, weight_dimension_numbers=NUMBERS, ns_coeffs=TWO, consistent_rms=None,
        weight_decay=0.1, adam_learning_rate=0.3,
    )  # fmt: skip
    optaxs = optax.contrib.muon(
        rate, ns_steps=2, muon_weight_dimension_numbers=NUMBERS, weight_decay=0.1,
        adam_weight_decay=0.1, adam_learning_rate=0.3,
    )  # fmt: skip
    for own, theirs in zip(run(ours, 4)[0], run(optaxs, 4)[0], strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(own[name], theirs[name], atol=1e-5, err_msg=name)


def test_a_share_gets_longer_updates_in_turn_and_all_momenta_go_on():
    optaxs = optax.contrib.muon(
        0.1, ns_steps=2, muon_weight_dimension_numbers=NUMBERS, consistent_rms=0.2
    )
    full, _ = run(optaxs, 6)
    made, state = run(muon(0.1, 1 / 3, weight_dimension_numbers=NUMBERS, ns_coeffs=TWO), 6)
    counts = {name: np.zeros(3 if name == "stack" else 1, int) for name in HIDDEN}
    for whole, own in zip(full, made, strict=True):
        for name in ("embed", "bias"):
            np.testing.assert_allclose(own[name], whole[name], rtol=5e-6)
        for name in HIDDEN:
            x, y = (np.reshape(u[name], (counts[name].size, -1)) for u in (own, whole))
            chosen = np.abs(x).max(axis=1) > 0
            longer = 1 if name == "square" else 3**0.5
            np.testing.assert_allclose(x, longer * y * chosen[:, None], rtol=1e-4, atol=1e-6)
            counts[name] += chosen
    counted = np.concatenate([counts[name] for name in HIDDEN])
    assert counted.tolist() == [2, 6, 2, 2, 2, 2, 2]
    np.testing.assert_array_equal(find_state(state).update_counts, counted)


def test_what_is_absent_keeps_its_moments():
    params = gradients(100)
    tx = muon(0.1, 1 / 2, weight_dimension_numbers=NUMBERS, ns_coeffs=TWO)
    step = jax.jit(tx.update)
    _, state = step(gradients(0), tx.init(params), params)
    absent = {"wide": None, "bias": None, "square": None}
    updates, after = step(gradients(1) | absent, state, params)
    assert {name for name, update in updates.items() if update is None} == set(absent)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    paths = jax.tree_util.tree_leaves_with_path(state)
    kept = 0
    for (path, old), new in zip(paths, jax.tree.leaves(after), strict=True):
        own = {getattr(entry, "key", None) for entry in path} & set(SHAPES)
        if own:
            assert np.array_equal(old, new) == bool(own & set(absent)), path
            kept += bool(own & set(absent))
    assert kept == 4  # a momentum each of two, two moments of the bias
    assert find_state(after).allocation[1] == 0


def hidden_only(params):
    return {name: name in HIDDEN for name in params}


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({}, 4),  # those of two axes, the embedding too
        ({"mask": hidden_only}, 3),
        ({"mask": {**dict.fromkeys(SHAPES, True), "embed": False}}, 3),
        ({"mask": hidden_only, "weight_dimension_numbers": NUMBERS}, 7),
        ({"weight_dimension_numbers": lambda params: NUMBERS}, 7),
    ],
)
def test_which_parameters_are_orthogonalized(options, matrices):
    nested = {"model": gradients(0)}
    options = {
        name: (lambda tree, f=x: {"model": f(tree["model"])}) if callable(x) else {"model": x}
        for name, x in options.items()
    }
    state = muon(0.1, **options).init(jax.eval_shape(lambda: nested))
    assert find_state(state).update_counts.shape == (matrices,)
    none = muon(0.1, mask={"model": False}).init(nested)  # a prefix of the tree
    assert find_state(none).update_counts.shape == (0,)


def test_an_axis_named_twice_is_refused():
    tx = muon(0.1, weight_dimension_numbers=Numbers(0, (0, 1)))
    with pytest.raises(ValueError, match=r"an axis of a leaf of shape \(2, 3\) twice"):
        tx.init({"a": jnp.ones((2, 3))})


def test_hyperparameters_are_injected_and_half_precision_stays():
    params = gradients(0, jnp.bfloat16)
    tx = optax.inject_hyperparams(muon, static_args="budget")(0.5, 1 / 2, ns_coeffs=TWO)
    state, step = tx.init(params), jax.jit(tx.update)
    first, _ = step(params, state, params)
    state.hyperparams["learning_rate"] /= 2
    second, after = step(params, state, params)
    assert step._cache_size() == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for name, update in first.items():
        assert update.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(update), 2 * np.float32(second[name]))


def shares(step):
    return jnp.where(step < 3, 1.0, 1 / 3)  # of six matrices of one shape


def test_a_schedule_of_the_budget_is_each_of_its_budgets_in_its_time():
    options = {"weight_dimension_numbers": NUMBERS, "ns_coeffs": TWO}
    made, state = run(muon(0.1, shares, **options), 7)
    full, middle = run(muon(0.1, 1, **options), 3)
    third, end = run_on(muon(0.1, 1 / 3, **options), middle, 3, 7)
    for got, wanted in zip(made, full + third, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(same, state, end)
    assert find_state(state).update_counts.tolist()[1] == 7  # the square one is alone
    assert sum(find_state(state).update_counts.tolist()) == 3 * 7 + 4 * 3


def test_a_budget_is_injected_and_a_checkpoint_goes_on_with_it(tmp_path):
    options = {"weight_dimension_numbers": NUMBERS, "ns_coeffs": TWO}
    made = optax.inject_hyperparams(muon, static_args=("weight_dimension_numbers", "ns_coeffs"))
    scheduled = made(0.1, shares, **options)
    wanted, end = run(muon(0.1, shares, **options), 5)
    got, _ = run(scheduled, 2)
    _, state = run(scheduled, 2)
    assert float(state.hyperparams["budget"]) == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(scheduled.init, gradients(100))
        state = checkpointer.restore(tmp_path / "state", target)
    # Two, as what Optax injects is of a weak type, which no checkpoint keeps
    after, state = run_on(scheduled, state, 2, 5, programs=2)
    assert float(state.hyperparams["budget"]) == pytest.approx(1 / 3)
    for own, its in zip(got + after, wanted, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(own[name], its[name], rtol=1e-5, atol=1e-6)
    counts = find_state(state).update_counts
    np.testing.assert_array_equal(counts, find_state(end).update_counts)
    # By hand, without a new program
    tx = made(0.1, 1.0, **options)
    state, step, params = tx.init(gradients(100)), jax.jit(tx.update), gradients(100)
    spent = []
    for budget in (1.0, 1 / 2, 1 / 6):
        state.hyperparams["budget"] = jnp.float32(budget)
        _, state = step(params, state, params)
        spent.append(int(find_state(state).allocation.sum()))
    assert spent == [7, 4, 2] and step._cache_size() == 1


def test_a_mesh_of_explicit_axes_changes_nothing():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    shapes = {"heads": (4, 2, 5), "square": (4, 4), "tall": (10, 4)}
    params = {name: gradients(0)[name] for name in shapes}
    numbers = {name: NUMBERS[name] for name in shapes}
    tx = muon(0.1, 1 / 2, weight_dimension_numbers=numbers, ns_coeffs=TWO)
    plain, _ = jax.jit(tx.update)(params, tx.init(params), params)
    place = jax.sharding.NamedSharding(mesh, jax.P("x"))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, place)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for name in shapes:
        np.testing.assert_allclose(updates[name], plain[name], atol=1e-6)
        assert updates[name].sharding.is_equivalent_to(place, len(shapes[name]))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(("budget", "chosen"), [(1, 12), (1 / 4, 3)])  # neither a multiple of eight
def test_each_device_has_whole_matrices_of_its_own(kind, budget, chosen):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys("abcd", (16, 32)) | {"stack": (8, 16, 32)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    numbers = dict.fromkeys("abcd", Numbers()) | {"stack": Numbers(1, 2)}
    tx = muon(0.1, budget, weight_dimension_numbers=numbers)
    wanted, after = jax.jit(tx.update)(params, tx.init(params), params)

    specs = {name: jax.P(*[None] * (len(s) - 2), "x", "y") for name, s in shapes.items()}
    place = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        laid_out = jax.device_put(params, place)
        step = jax.jit(tx.update, out_shardings=(place, None) if kind == "Auto" else None)
        program = step.lower(laid_out, tx.init(laid_out), laid_out).compile()
        updates, state = program(laid_out, tx.init(laid_out), laid_out)
    for name in shapes:
        np.testing.assert_allclose(updates[name], wanted[name], atol=1e-6)
    np.testing.assert_array_equal(find_state(state).allocation, find_state(after).allocation)
    # No device gathers matrices, or a part of an iteration; each iterates its one or two.
    gathers = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce)", program.as_text())
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n]) for kind, dims in gathers if kind == "f32"
    ]
    assert max(sizes, default=0) <= 16 * 32  # at most one
    own = -(-chosen // 8) * 5 * 2 * (16 * 16 * 32 + 2 * 16**3)
    assert program.cost_analysis()["flops"] < 1.5 * own + 100 * 16 * 32


def test_trees_with_nothing_in_them_and_without_parameters():
    params = {"a": jnp.ones((2, 2)), "none": None, "empty": jnp.zeros((0, 3)), "b": jnp.ones(2)}
    tx = muon(
        0.1, weight_dimension_numbers={"a": Numbers(), "none": None, "empty": Numbers(), "b": None}
    )
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state)
    assert jax.tree.structure((updates, after)) == jax.tree.structure((params, state))
    # Optax finds what belongs to a parameter: a momentum, and the two moments of the bias
    marked = optax.tree.map_params(tx, lambda x: x + 1, state)
    pairs = zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True)
    assert sum(x.size and not np.array_equal(x, y) for x, y in pairs) == 3


def test_trains_an_nnx_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attend = nnx.MultiHeadAttention(2, 4, rngs=rngs, use_bias=False, decode=False)
            self.last = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(self.attend(x))

    def numbers(params):
        return jax.tree_util.tree_map_with_path(number, params)

    def number(path, x):
        if x.ndim == 3:
            return Numbers((0, 1), 2) if "out" in str(path) else Numbers(0, (1, 2))
        return Numbers() if x.ndim == 2 else None

    model, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (8, 3, 4))
    tx = muon(0.02, 1 / 4, weight_dimension_numbers=numbers)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean((model(x) - x[:, ::-1]) ** 2)  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < losses[0]
    counts = jax.tree.leaves(find_state(optimizer.opt_state).update_counts)[0]
    assert counts.tolist() == [3, 3, 2, 2, 2]
