"""Tests of a `Trainer` with any optimizer, any model and any step."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import find_slots, priorityprop
from priorityprop_jax.core.slots import by_layer
from priorityprop_jax.priority import inner_state
from priorityprop_jax.training import PriorityPropTrainer, Trainer, as_model
from tests.training.test_trainer import (
    Loader,
    Net,
    _assert_same,
    _batches,
    _nnx_loss,
    _params,
    _pure_loss,
    _state,
    _step_by_hand,
    _values,
)


def _trainer(optimizer, **options):
    return Trainer(_params(), optimizer, _pure_loss, progress=False, **options)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.03),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.03), optax.scale(0.5)),
        optax.MultiSteps(optax.adam(0.03), 2),
        optax.lion(0.01),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.03),
    ],
    ids=["adam", "chain", "MultiSteps", "lion", "inject_hyperparams"],
)
def test_is_the_loop_by_hand(optimizer):
    trainer = _trainer(optimizer)
    history = trainer.train(_batches(), 2)
    params = _params()
    state = optimizer.init(params)
    step, losses = _step_by_hand(optimizer), []
    for batch in _batches() * 2:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    np.testing.assert_allclose(history.loss, losses, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (trainer.params, params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert history.updates == [4] * 16  # every slot at every step
    assert trainer.step.compiled._cache_size() == 1
    assert trainer.get_step_report() == {}
    with pytest.raises(ValueError, match="wrap the optimizer in priorityprop"):
        trainer.get_priority_report()


@pytest.mark.parametrize("budgeted", [False, True])
def test_evaluation_at_what_the_state_says(budgeted):
    free = optax.contrib.schedule_free_eval_params
    inner = optax.contrib.schedule_free_sgd(0.05)
    if budgeted:
        tx = priorityprop(inner, 10, 1, 4, recalc_every=4)
        of_state = lambda state, params: free(inner_state(state, inner, params), params)  # noqa: E731
    else:
        tx, of_state = inner, free
    trainer = _trainer(tx, eval_params=of_state)
    history = trainer.train(_batches(), 2, eval_data=_batches())
    averaged = of_state(trainer.optimizer_state, trainer.params)
    expected = float(np.mean([_pure_loss(averaged, batch) for batch in _batches()]))
    assert history.evals[-1]["loss"] == pytest.approx(expected, rel=1e-5)
    at_params = float(np.mean([_pure_loss(trainer.params, batch) for batch in _batches()]))
    assert abs(at_params / expected - 1) > 1e-3
    assert trainer.evaluate(_batches())["loss"] == history.evals[-1]["loss"]


def test_lbfgs_is_given_what_its_line_search_needs():
    batch = _batches(64)
    history = _trainer(optax.lbfgs()).train(batch * 10)
    assert history.loss[-1] < 0.2 * history.loss[0]


@pytest.mark.parametrize(
    ("wrap", "every"),
    [
        (lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx), 1),
        (lambda tx: optax.MultiSteps(tx, 2), 2),
    ],
    ids=["chain", "MultiSteps"],
)
def test_a_priorityprop_anywhere_in_the_optimizer_has_a_ledger(wrap, every):
    trainer = _trainer(wrap(priorityprop(optax.adam(0.03), 10, 1, 4, recalc_every=4)))
    history = trainer.train(Loader(_batches()), 2)
    ledger = trainer.get_priority_report()
    assert ledger.total == sum(history.updates) == 10 * 4 // every
    if every == 2:  # every other step only accumulates
        assert not any(history.updates[::2]) and any(history.updates[1::2])


def test_slots_of_a_group_are_told_to_the_trainer():
    group = by_layer(_params())
    make = lambda: priorityprop(optax.adam(0.03), 0.5, recalc_every=4, group=group)  # noqa: E731
    blind = _trainer(make())
    blind.train(_batches())
    with pytest.raises(ValueError, match="slots=find_slots"):
        blind.get_priority_report()
    seeing = _trainer(make(), slots=find_slots(_params(), group=group))
    history = seeing.train(_batches())
    assert seeing.get_priority_report().names == find_slots(_params(), group=group).names
    assert seeing.get_priority_report().total == sum(history.updates)
    # `PriorityPropTrainer` tells it itself.
    wrapped = PriorityPropTrainer(
        _params(), optax.adam(0.03), _pure_loss, 0.5, recalc_every=4, group=group, progress=False
    )
    assert _values(wrapped.train(_batches())) == _values(history)


def test_resumes_without_a_ledger(tmp_path):
    whole = _trainer(optax.adam(0.03))
    whole.train(Loader(_batches()), 2)
    _trainer(optax.adam(0.03), checkpoint_dir=tmp_path).train(Loader(_batches(), (1, 3)), 2)
    resumed = _trainer(optax.adam(0.03))
    resumed.train(Loader(_batches()), 2, resume_from=tmp_path)
    assert _values(resumed.history) == _values(whole.history)
    _assert_same(_state(resumed), _state(whole))


@pytest.mark.parametrize(
    ("optimizer", "match"), [(3, "GradientTransformation"), ("nnx", "give its .tx")]
)
def test_no_optimizer(optimizer, match):
    if optimizer == "nnx":
        optimizer = nnx.Optimizer(Net(), optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=match):
        _trainer(optimizer)


class LastLayer:
    """A model of its own making: an `nnx.Sequential` of which the last layer alone is trained."""

    def __init__(self, module):
        self.module = module
        self.graph, *_ = nnx.split(module, self.is_trained, ...)

    def is_trained(self, path, _):
        return path[:2] == ("layers", 1)

    def split(self):
        _, last, rest = nnx.split(self.module, self.is_trained, ...)
        return last, rest

    def join(self, params, rest):
        nnx.update(self.module, params, rest)

    def loss(self, loss_fn, params, rest, batch, **kwargs):
        return loss_fn(nnx.merge(self.graph, params, rest), batch), rest

    def evaluator(self, params, rest):
        return nnx.merge(self.graph, params, rest)


def test_a_model_that_has_the_methods_itself():
    module = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 1, rngs=nnx.Rngs(1)))

    model = LastLayer(module)
    assert as_model(model) is model
    first = np.array(module.layers[0].kernel[...])
    trainer = Trainer(model, optax.adam(0.05), _nnx_loss, progress=False)
    before = trainer.evaluate(_batches())["loss"]
    history = trainer.train(_batches(), 3, eval_data=_batches())
    assert history.evals[-1]["loss"] < before and set(history.updates) == {2}
    np.testing.assert_array_equal(module.layers[0].kernel[...], first)
    assert trainer.evaluate(_batches())["loss"] == history.evals[-1]["loss"]
    assert jax.tree.structure(trainer.params) == jax.tree.structure(model.split()[0])


class Twice:
    """Wraps the plain step, counts, and keeps the count for a resumed run."""

    def __init__(self, setup):
        self.plain = setup.plain()
        self.done = 0

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def __call__(self, *arguments):
        *rest, values = self.plain(*arguments)
        self.done += 1
        return *rest, values | {"flops": 3.0, "cached": self.done % 2}

    saved = 0.25

    def report(self, opt_state, seconds):
        return {"steps": self.done, "seconds": seconds}

    def record(self):
        return {"done": self.done, "kind": "twice"}

    def restore(self, record, opt_state):
        if record["done"] > 8:
            raise ValueError("too many steps")
        self.done = record["done"]
        return opt_state


def test_a_step_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    trainer = Trainer(_params(), optax.adam(0.03), _pure_loss, Twice, checkpoint_dir=tmp_path)
    history = trainer.train(_batches())
    assert "saved=25%" in capsys.readouterr().err
    assert history.column("flops") == [3.0] * 8 and history.column("cached") == [1, 0] * 4
    report = trainer.get_step_report()
    assert report["steps"] == 8 and report["seconds"] == pytest.approx(sum(history.seconds))
    # Only what the same step has written can be resumed.
    with pytest.raises(ValueError, match="with the step Twice, but this one's is PlainStep"):
        _trainer(optax.adam(0.03)).restore(tmp_path)
    again = Trainer(_params(), optax.adam(0.03), _pure_loss, Twice, progress=False)
    again.train(_batches(), 2, resume_from=tmp_path)
    assert again.step.done == 16


def test_a_step_may_refuse_to_resume(tmp_path):
    first = Trainer(
        _params(), optax.adam(0.03), _pure_loss, Twice, checkpoint_dir=tmp_path, progress=False
    )
    first.train(_batches(), 2)
    trainer = Trainer(_params(), optax.adam(0.03), _pure_loss, Twice, progress=False)
    before = _state(trainer)
    with pytest.raises(ValueError, match="too many steps"):
        trainer.train(_batches(), 3, resume_from=tmp_path)
    _assert_same(_state(trainer), before)
    assert trainer.step.done == 0 and not trainer.history.steps


def test_processes_ask_the_step(monkeypatch):
    class Alone(Twice):
        def check_processes(self):
            raise ValueError("alone")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("priorityprop_jax.training.trainer.check_params", lambda params: None)
    with pytest.raises(ValueError, match="alone"):
        Trainer(_params(), optax.adam(0.03), _pure_loss, Alone)
