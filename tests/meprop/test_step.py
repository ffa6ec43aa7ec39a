"""Tests of `priorityprop_jax.meprop.step`, and of the trainer with it."""

from __future__ import annotations

import itertools
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.tasks.tagger import Tagger
from priorityprop_jax.cli.tasks import MLP
from priorityprop_jax.core.row_optimizers import (
    row_counts,
    row_sparse,
    row_sparse_adam,
)
from priorityprop_jax.core.rows import clip_by_global_norm, on_values
from priorityprop_jax.meprop import meprop, meprop_dot_general, step, value_and_grad
from priorityprop_jax.meprop.step import choose_sizes
from priorityprop_jax.priority.ledger import find_state
from priorityprop_jax.training.trainer import Trainer
from tests.training import worker

ROWS, SIZE = 48, 8
SIZES = (2, 4, 8, 16)
WIDTHS = (6, 16, 16, 1)
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
Y = np.sin(X[:, :1] + X[:, 1:2] * X[:, 2:3]).astype(np.float32)


# Choosing sizes.


def cases(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        n = int(rng.integers(1, 5))
        sizes = [sorted(rng.choice(np.arange(1, 33), rng.integers(1, 5), False)) for _ in range(n)]
        sizes = [[int(k) for k in s] for s in sizes]
        costs = rng.uniform(0.5, 4, n)
        worth = rng.exponential(size=n) * (rng.random(n) > 0.2)
        least = sum(c * s[0] for c, s in zip(costs, sizes, strict=True))
        most = sum(c * s[-1] for c, s in zip(costs, sizes, strict=True))
        yield worth, sizes, costs, float(rng.uniform(least, 1.2 * most))


def test_choices_keep_to_the_budget_and_leave_no_upgrade_that_it_pays_for():
    for worth, sizes, costs, budget in cases(100):
        places = choose_sizes(worth, sizes, costs, budget)
        spent = sum(c * s[p] for c, s, p in zip(costs, sizes, places, strict=True))
        assert spent <= budget * (1 + 1e-6)
        even = not np.any(worth)
        for w, s, c, p in zip(worth, sizes, costs, places, strict=True):
            assert 0 <= p < len(s)
            if (even or w > 0) and p + 1 < len(s):
                assert spent + c * (s[p + 1] - s[p]) > budget * (1 - 1e-6)
            if not even and w == 0:
                assert p == 0
        # Among all that can be paid for there is none that is better for every layer.
        affordable = [
            combination
            for combination in itertools.product(*(range(len(s)) for s in sizes))
            if sum(c * s[p] for c, s, p in zip(costs, sizes, combination, strict=True)) <= budget
        ]
        assert tuple(places) in affordable
        if even or (worth > 0).all():
            better = [c for c in affordable if c != tuple(places) and np.all(c >= np.array(places))]
            assert not better
        # A larger scale of priorities or of costs is the same question.
        assert places == choose_sizes(7 * worth, sizes, 3 * costs, 3 * budget)


def test_a_higher_priority_never_gets_fewer():
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(2, 6))
        sizes = sorted({int(k) for k in rng.integers(1, 65, 5)})
        worth = rng.exponential(size=n)
        budget = rng.uniform(n * sizes[0], n * sizes[-1])
        places = np.array(choose_sizes(worth, [sizes] * n, [2.0] * n, 2 * budget))
        assert (np.diff(places[np.argsort(worth)]) >= 0).all()


def test_choices_in_special_cases():
    sizes = [[2, 4, 8]] * 3
    assert choose_sizes([0, 0, 0], sizes, [1, 1, 1], 12) == [1, 1, 1]
    assert choose_sizes([1, 1, 1], sizes, [1, 1, 1], 12) == [1, 1, 1]
    assert choose_sizes([np.nan, 1.0, np.inf], sizes, [1, 1, 1], 12) == [0, 2, 0]
    assert choose_sizes([-1.0, 1.0, 0.0], sizes, [1, 1, 1], 12) == [0, 2, 0]
    assert choose_sizes([5.0, 1.0, 1.0], sizes, [1, 1, 1], 24) == [2, 2, 2]
    assert choose_sizes([5.0, 1.0, 1.0], sizes, [1, 1, 1], 6) == [0, 0, 0]
    assert choose_sizes([1e-30, 1e30], [[1, 2]] * 2, [1, 1], 3) == [0, 1]
    assert choose_sizes([1.0], [[3]], [2.0], 100.0) == [0]
    with pytest.raises(ValueError, match="does not pay for the smallest sizes, 6"):
        choose_sizes([1, 1, 1], sizes, [1, 1, 1], 5.9)


# Training.


class Loader:
    """Rows shuffled by epoch; interrupts before one of the batches on request."""

    def __init__(self, interrupt_at=None):
        self.interrupt_at, self.epoch = interrupt_at, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(ROWS)
        for i in range(0, ROWS, SIZE):
            if (self.epoch, i // SIZE) == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            yield X[order[i : i + SIZE]], Y[order[i : i + SIZE]]


def loss_fn(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def mlp(k=SIZES, **options):
    model = MLP(WIDTHS, rngs=nnx.Rngs(0))
    if k is not None:
        meprop(model, k, **options)
    return model


def trainer(model=None, optimizer=None, budget=0.4, every=2, where=None, **options):
    return Trainer(
        mlp() if model is None else model, optimizer or optax.adam(0.01), loss_fn,
        step(budget, recalc_every=every, **options), checkpoint_dir=where, progress=False,
    )  # fmt: skip


def batches(count):
    return [(X[i : i + SIZE], Y[i : i + SIZE]) for i in range(0, SIZE * count, SIZE)]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want, atol=1e-5):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def test_k_follows_the_priorities_in_one_program():
    ks = {}
    for favourite, base in (("layers/0", 100.0), ("layers/1", 0.01)):
        ours = trainer(depth_base=base)
        history = ours.train(Loader(), 2)
        report = ours.get_step_report()
        layers = {layer["layer"]: layer for layer in report["layers"]}
        assert list(layers) == ["layers/0", "layers/1", "layers/2"]
        ks[favourite] = [layers[f"layers/{i}"]["k"] for i in (0, 1)]
        assert all(layers[f"layers/{i}"]["sizes"] == list(SIZES) for i in (0, 1))
        assert layers["layers/2"]["sizes"] == [1] and layers["layers/2"]["mean_k"] == 1
        # The first cycle knows nothing: its sizes are even.
        assert report["programs"] == 1 and report["steps"] == 12
        assert ours.step._compiled._cache_size() == 1  # nor is one trace compiled twice
        # What is granted is what is spent, in all books.
        state = ours.optimizer_state
        counts = np.asarray(state.update_counts)
        assert sum(history.updates) == counts.sum()
        np.testing.assert_allclose([layer["mean_k"] * 12 for layer in report["layers"]], counts)
        assert np.array_equal(state.allocation, [layer["k"] for layer in report["layers"]])
        assert 0 < report["flops"] < report["full_flops"]
        np.testing.assert_allclose(report["share"], report["flops"] / report["full_flops"])
        # The rows that were touched: two a step at least, and no more than were granted.
        touched = row_counts(state.inner_state, ours.params)
        for i in (0, 1):
            assert touched[f"layers/{i}/kernel"].sum() == counts[i]
    assert ks["layers/0"][0] > ks["layers/0"][1] and ks["layers/1"][0] < ks["layers/1"][1]


def test_cycles_cost_no_more_than_the_budget():
    for budget in (0.2, 1.0):
        ours = trainer(budget=budget)
        ours.train(batches(4))
        layers = ours.get_step_report()["layers"][:2]
        inputs = (6, 16)
        spent = sum(n * layer["mean_k"] for n, layer in zip(inputs, layers, strict=True))
        assert spent <= budget * sum(16 * n for n in inputs) * (1 + 1e-6)
        if budget == 1.0:
            assert [layer["k"] for layer in layers] == [16, 16]
            assert ours.get_step_report()["share"] == pytest.approx(1.0)


def test_fixed_k_is_a_loop_by_hand():
    schedule = lambda step: 1.0 / (1 + step)  # noqa: E731
    optimizer = optax.chain(
        clip_by_global_norm(0.1),
        row_sparse(optax.adam(0.01)),
        on_values(optax.scale_by_schedule(schedule)),
    )
    ours = trainer(mlp(3), optimizer, budget=None)
    model = mlp(3)
    tx = row_sparse(optax.adam(0.01))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state, graph = tx.init(params), nnx.graphdef(model)

    @jax.jit
    def by_hand(params, state, batch, rate):
        value, grads = value_and_grad(
            lambda params, batch: loss_fn(nnx.merge(graph, params), batch)
        )(params, batch)
        clip = clip_by_global_norm(0.1)
        grads, _ = clip.update(grads, clip.init(params))
        updates, state = tx.update(grads, state, params)
        scale = on_values(optax.scale(rate))
        updates, _ = scale.update(updates, scale.init(params))
        return value, optax.apply_updates(params, updates), state

    losses = []
    for i, batch in enumerate(batches(5)):
        value, params, state = by_hand(params, state, batch, schedule(i))
        losses.append(float(value))
    history = ours.train(batches(5))
    np.testing.assert_allclose(history.loss, losses, rtol=1e-5)
    assert_close(ours.params, params)
    report = ours.get_step_report()
    assert [layer["mean_k"] for layer in report["layers"]] == [3, 3, 1]
    assert report["programs"] == 1 and history.updates == [7] * 5


@pytest.mark.parametrize(
    "k, budget, optimizer",
    [(1.0, None, optax.adam(0.01)), ((16,), None, optax.sgd(0.1, momentum=0.9)),
     ((2, 16), 1.0, row_sparse_adam(0.01))],
)  # fmt: skip
def test_all_features_train_as_ever(k, budget, optimizer):
    # A layer that keeps all of a single size is dense: nothing is left to train by rows.
    model = MLP((6, 16, 16, 1), rngs=nnx.Rngs(0))
    meprop(model, k)
    plain = mlp(None)
    reference = optax.adam(0.01) if budget else optimizer
    params = nnx.as_pure(nnx.state(plain, nnx.Param))
    state, graph = reference.init(params), nnx.graphdef(plain)
    losses = []
    pull = jax.jit(jax.value_and_grad(lambda p, batch: loss_fn(nnx.merge(graph, p), batch)))
    for batch in batches(4):
        value, grads = pull(params, batch)
        updates, state = reference.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    ours = trainer(model, optimizer, budget=budget)
    if budget is None:
        with pytest.raises(ValueError, match="no layer whose backward"):
            ours.train(batches(4))
        return
    np.testing.assert_allclose(ours.train(batches(4)).loss, losses, rtol=1e-4)
    trained = nnx.to_pure_dict(ours.params)["layers"]
    for i, layer in nnx.to_pure_dict(params)["layers"].items():
        kernel = trained[i]["kernel"]
        assert_close(kernel if i == 2 else kernel.T, layer["kernel"], atol=1e-3)


def test_a_part_of_the_model_that_was_prepared_apart():
    model = nnx.Dict(net=nnx.Sequential(nnx.Linear(6, 16, rngs=nnx.Rngs(0))))
    meprop(model.net, 4, layers=nnx.Linear)
    ours = Trainer(model, optax.sgd(0.1), lambda m, x: m.net(x).sum(), step=step(), progress=False)
    with pytest.raises(ValueError, match=r"\['layers/0'\] are none of.*on the whole model"):
        ours.train([X])


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    whole = trainer(every=4)
    whole.train(Loader(), 3)
    stopped = trainer(every=4, where=tmp_path)
    history = stopped.train(Loader((1, 3)), 3)
    assert history.interrupted and len(history.loss) == 9  # one step into a cycle of four
    resumed = trainer(every=4, where=tmp_path)
    resumed.train(Loader(), 3, resume_from=tmp_path)
    assert resumed.history.loss == whole.history.loss
    assert_same(resumed.params, whole.params)
    assert_same(resumed.optimizer_state, whole.optimizer_state)
    ours, theirs = resumed.get_step_report(), whole.get_step_report()
    for key in ("steps", "flops", "full_flops", "share", "layers"):
        assert ours[key] == theirs[key]


def test_a_tagger_with_a_recurrent_layer_learns():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 9, (16, 6))
    x = np.stack([words, words % 3, words % 2], axis=-1).astype(np.int32)
    tags = words % 4

    def loss(model, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    model = Tagger((9, 3, 2), 4, embeddings=(4, 2, 2), width=8, rngs=nnx.Rngs(0))
    assert meprop(model, 2) == 2
    ours = Trainer(model, optax.adam(0.02), loss, step(), progress=False)
    history = ours.train([(x, tags)] * 30)
    assert history.loss[-1] < 0.7 * history.loss[0]


def test_a_pytree_with_named_products():
    dot = meprop_dot_general((2, 8), name="a")
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)},
        "b": {"kernel": jnp.zeros((16, 1))},
    }

    def loss(p, batch):
        h = jnp.tanh(dot(batch[0], p["a"]["kernel"], (((1,), (1,)), ((), ()))))
        return jnp.mean((h @ p["b"]["kernel"] - batch[1]) ** 2)

    ours = Trainer(params, optax.sgd(0.1), loss, step(0.25, recalc_every=2), progress=False)
    history = ours.train(Loader(), 2)
    # Of 16 features a quarter pays for 2 but not for 8.
    assert ours.get_step_report()["layers"][0]["mean_k"] == 2
    assert history.loss[-1] < history.loss[0]


def test_on_a_mesh():
    def make_model():
        model = MLP((6, 16, 16, 2), rngs=nnx.Rngs(0))
        meprop(model, SIZES)
        return model

    mesh, alone = worker.make_mesh(), trainer(make_model())
    alone.train(batches(4))
    spread = trainer(worker.place(mesh, make_model()))
    before = worker.layouts((spread.params, spread.optimizer_state))
    spread.train([worker.spread(mesh, batch) for batch in batches(4)])
    assert worker.layouts((spread.params, spread.optimizer_state)) == before
    assert spread.step._compiled._cache_size() == 1
    assert spread.get_step_report()["layers"] == alone.get_step_report()["layers"]
    np.testing.assert_allclose(spread.history.loss, alone.history.loss, rtol=1e-4)


# Errors.


@pytest.mark.parametrize(
    "make, budget, match",
    [
        (lambda: mlp(None), 0.5, "call meprop"),
        (lambda: mlp(3), 0.5, "a share chooses among sizes"),
        (lambda: mlp(), None, "a share chooses among sizes"),
        (lambda: mlp((8, 16)), 0.2, "share=0.2: the budget of .* does not pay"),
    ],
)
def test_models_that_do_not_fit_are_refused_at_the_first_step(make, budget, match):
    with pytest.raises(ValueError, match=match):
        trainer(make(), budget=budget).train(batches(1))


def test_several_sizes_inside_a_scan_are_refused():
    class Stack(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))
            self.layers = make(jax.random.split(jax.random.key(0), 2))
            self.out = nnx.Linear(6, 1, rngs=nnx.Rngs(0))

        def __call__(self, x):
            scan = nnx.scan(lambda x, f: f(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.out(scan(x, self.layers))

    for k, budget in (((2, 4), 0.5), (3, None)):
        model = Stack()
        meprop(model, k)
        ours = trainer(model, budget=budget)
        if budget is None:
            assert np.isfinite(ours.train(batches(2)).loss).all()
        else:
            with pytest.raises(ValueError, match="layer 'layers' runs inside a scan"):
                ours.train(batches(1))


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), True, "all", 100])
def test_budgets_out_of_range(budget):
    with pytest.raises((TypeError, ValueError), match="share"):
        trainer(budget=budget)


@pytest.mark.parametrize("options", [{"depth_base": 0}, {"depth_base": math.inf}])
def test_wrong_options(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        step(**options)


@pytest.mark.parametrize("every, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_wrong_cycles(every, error):
    with pytest.raises(error, match="recalc_every"):
        step(recalc_every=every)


@pytest.mark.parametrize(
    "other, match",
    [({"budget": 0.6}, "share=0.4, this step has 0.6"), ({"every": 3}, "recalc_every=2, this")],
)
def test_a_checkpoint_of_other_options_is_refused(tmp_path, other, match):
    ours = trainer(where=tmp_path)
    ours.train(batches(2))
    theirs = trainer(**other)
    with pytest.raises(ValueError, match=match) as error:
        theirs.train(batches(2), resume_from=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="another kind of step"):
        theirs.step.restore({}, None)


def test_the_ledger_counts_features():
    ours = trainer()
    history = ours.train(batches(4))
    ledger = ours.get_priority_report()
    assert ledger.unit == "features" and ledger.total == sum(history.updates)
    assert "features" in str(ledger).splitlines()[0]
    state = find_state(ours.optimizer_state)
    assert state.update_counts.dtype == jnp.int32 and int(state.step) == 4


def test_magnitudes_that_are_not_finite_are_counted_and_left_out():
    ours = trainer(mlp(3), budget=None)
    made = ours.step
    params, rest = ours._model.split()
    params, rest = jax.tree.map(jnp.array, (params, rest))
    state = made.init(params)
    x, y = batches(1)[0]
    _, _, state, _ = made(params, rest, state, (x, np.full_like(y, np.nan)))
    assert state.nonfinite_counts.tolist() == [1, 1, 1]
    assert state.magnitudes.tolist() == [0, 0, 0]
