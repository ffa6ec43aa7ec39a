"""Tests of `priorityprop_jax.training.trainer`."""

from __future__ import annotations

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import PriorityPropState, priorityprop, scale_by_priority
from priorityprop_jax.training import History, NonFiniteLossError, PriorityPropTrainer

ROWS = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
TARGETS = (ROWS @ np.array([[1.0], [-2.0], [0.5], [3.0]]) + 0.5).astype(np.float32)


def _batches(size=8, rows=64):
    x, y = ROWS[:rows], TARGETS[:rows]
    return [(x[i : i + size], y[i : i + size]) for i in range(0, rows, size)]


class Loader:
    """Batches whose order depends on the epoch; sends SIGINT before one of them on request."""

    def __init__(self, batches, interrupt_at=None):
        self.batches = batches
        self.interrupt_at = interrupt_at  # (epoch, batch)
        self.epoch = None
        self.epochs = []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.batches))
        for i, batch in enumerate(order):
            if (self.epoch, i) == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            yield self.batches[batch]


class Net(nnx.Module):
    def __init__(self, seed=0, width=8):
        rngs = nnx.Rngs(params=seed, dropout=seed + 1)
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        # What `sow` does outside of `nnx.capture`, which newer Flax deprecates.
        self.hidden = nnx.Intermediate((x,))
        return self.head(x)


def _nnx_loss(model, batch):
    x, y = batch
    error = model(x) - y
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


def _params(width=6):
    rng = np.random.default_rng(3)
    shapes = {"Dense_0": (4, width), "Dense_1": (width, 1)}
    return {
        name: {
            "w": jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32),
            "b": jnp.asarray(np.zeros(shape[1], np.float32)),
        }
        for name, shape in shapes.items()
    }


def _predict(params, x):
    x = jnp.tanh(x @ params["Dense_0"]["w"] + params["Dense_0"]["b"])
    return x @ params["Dense_1"]["w"] + params["Dense_1"]["b"]


def _pure_loss(params, batch):
    x, y = batch
    return jnp.mean((_predict(params, x) - y) ** 2)


def _pure(**kwargs):
    kwargs = {"total_budget": 0.6, "recalc_every": 5, "progress": False} | kwargs
    return PriorityPropTrainer(_params(), optax.adam(0.03), _pure_loss, **kwargs)


def _nnx(**kwargs):
    kwargs = {"total_budget": 0.6, "recalc_every": 5, "progress": False} | kwargs
    return PriorityPropTrainer(Net(), optax.adam(0.1), _nnx_loss, **kwargs)


def _leaves(tree):
    leaves = jax.tree.leaves(tree)
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in leaves
    ]


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(_leaves(a), _leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def _state(trainer):
    model = trainer.model
    if isinstance(model, nnx.Module):
        model = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Intermediate)))
    return model, trainer.optimizer_state


def _values(history):
    """The history without what the clock says."""
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in history.steps]
    return records, history.evals


def _step_by_hand(tx):
    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(_pure_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


class TestTraining:
    @pytest.mark.parametrize("make", [_pure, _nnx])
    def test_reduces_the_loss_and_keeps_the_books(self, make):
        trainer = make(min_updates=0)
        history = trainer.train(Loader(_batches()), epochs=5, eval_data=_batches(32))
        assert history is trainer.history and not history.interrupted
        assert np.mean(history.loss[-8:]) < 0.5 * np.mean(history.loss[:8])
        assert history.evals[-1]["loss"] < 0.5 * history.evals[0]["loss"]
        assert [r["step"] for r in history.steps] == list(range(1, 41))
        assert [r["epoch"] for r in history.steps] == np.repeat(np.arange(1, 6), 8).tolist()
        assert [(r["epoch"], r["step"]) for r in history.evals] == [(e, 8 * e) for e in range(1, 6)]
        assert all(type(u) is int for u in history.updates)
        assert all(s >= 0 for s in history.seconds) and history.compile_seconds > 0
        assert sum(history.seconds) < history.compile_seconds  # Which is not hidden in them.
        slots = len(trainer.optimizer_state.update_counts)
        assert sum(history.updates) == round(0.6 * slots * 5) * 8  # Eight whole cycles.
        ledger = trainer.get_priority_report()
        assert ledger.total == sum(history.updates)
        assert ledger.steps == list(range(0, 41, 5))
        json.dumps(history.as_dict())
        assert History.from_dict(json.loads(json.dumps(history.as_dict()))) == history

    def test_is_the_loop_by_hand_bit_for_bit(self):
        trainer = _pure(spread="nested")
        history = trainer.train(_batches(), epochs=2)

        tx = priorityprop(optax.adam(0.03), 0.6, recalc_every=5, spread="nested")
        params = _params()
        state = tx.init(params)

        step = _step_by_hand(tx)
        losses = []
        for batch in _batches() * 2:
            params, state, loss = step(params, state, batch)
            losses.append(float(loss))
        assert history.loss == losses
        _assert_same(trainer.params, params)
        _assert_same(trainer.optimizer_state, state)

    def test_full_budget_is_the_inner_optimizer(self):
        trainer = _pure(total_budget=None, min_updates=5, max_updates=5)
        trainer.train(_batches())
        tx, params = optax.adam(0.03), _params()
        state = tx.init(params)

        step = _step_by_hand(tx)
        for batch in _batches():
            params, state, _ = step(params, state, batch)
        # XLA fuses the two programs differently, which is worth a last bit.
        for ours, theirs in zip(_leaves(trainer.params), _leaves(params), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_leaves_what_it_was_given_alone(self):
        params = _params()
        before = jax.tree.map(np.array, params)
        trainer = PriorityPropTrainer(params, optax.adam(0.1), _pure_loss, 0.5, progress=False)
        first, state = trainer.params, trainer.optimizer_state
        trainer.train(_batches())
        _assert_same(params, before)
        _assert_same(first, before)
        second = trainer.params
        trainer.train(_batches())
        assert all(np.isfinite(x).all() for x in _leaves(second))  # Not donated.
        assert int(state.step) == 0 and int(trainer.optimizer_state.step) == 16

    def test_repeated_training_continues(self):
        whole, parts = _nnx(), _nnx()
        loader = Loader(_batches())
        whole.train(loader, epochs=3)
        loader = Loader(_batches())
        parts.train(loader)
        parts.train(loader, epochs=2)
        assert loader.epochs == [0, 1, 2]
        assert _values(parts.history) == _values(whole.history)
        _assert_same(_state(parts), _state(whole))

    def test_nnx_model_is_trained_in_place(self):
        model = Net()
        snapshot = nnx.state(model, nnx.Param)
        before = jax.tree.map(np.array, nnx.to_pure_dict(snapshot))
        trainer = PriorityPropTrainer(model, optax.adam(0.1), _nnx_loss, 0.6, progress=False)
        modes = []
        trainer.train(_batches(), log=lambda _: modes.append(trainer.model.norm.mean[...] + 0))
        assert trainer.model is model
        assert not np.array_equal(model.first.kernel[...], before["first"]["kernel"])
        assert np.abs(model.norm.mean[...]).max() > 0  # BatchNorm's statistics went along.
        assert int(model.dropout.rngs.count[...]) == 8
        assert not hasattr(model, "hidden") and len(modes) == 8

    @pytest.mark.parametrize("make", [_pure, _nnx])
    def test_compiles_once_and_again_for_a_ragged_batch(self, make):
        trainer = make()
        trainer.train(_batches(16), epochs=3, eval_data=_batches(16))
        assert trainer.step.traces == 1 and trainer.step.compiled._cache_size() == 1
        assert trainer._evaluate.compiled._cache_size() == 1
        trainer.train(_batches(16, rows=40), epochs=2)
        assert trainer.step.traces == 2 and trainer.step.compiled._cache_size() == 2

    @pytest.mark.parametrize(
        "inner",
        [
            optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
            optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau()),
            optax.contrib.schedule_free_adamw(0.01),
            optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 5),
        ],
        ids=["inject", "plateau", "schedule_free", "apply_if_finite"],
    )
    def test_other_optimizers(self, inner):
        trainer = PriorityPropTrainer(_params(), inner, _pure_loss, 0.5, progress=False)
        before = trainer.evaluate(_batches())["loss"]
        trainer.train(_batches(), epochs=2)
        assert trainer.evaluate(_batches())["loss"] < before
        assert trainer.step.compiled._cache_size() == 1

    def test_complex_parameters_descend(self):
        trainer = PriorityPropTrainer(
            {"z": jnp.array(1 + 1j, jnp.complex64)},
            optax.sgd(0.1),
            lambda params, batch: jnp.abs(params["z"] - batch) ** 2,
            total_budget=None,
            progress=False,
        )
        assert trainer.train([jnp.array(2 - 3j)] * 50).loss[-1] < 1e-4

    def test_log_gets_every_record(self):
        records = []
        history = _pure().train(_batches(), 2, eval_data=_batches(), log=records.append)
        kinds = ["step"] * 8 + ["eval"]
        assert [record.pop("kind") for record in records] == kinds * 2
        assert records == history.steps[:8] + history.evals[:1] + history.steps[8:] + [
            history.evals[1]
        ]

    def test_quiet_off_a_terminal(self, capsys):
        _pure(progress=True).train(_batches())
        assert capsys.readouterr() == ("", "")

    def test_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        _pure(progress=True).train(_batches(), 2)
        text = capsys.readouterr().err
        assert "16/16" in text and "loss=" in text
        _pure(progress=False).train(_batches())
        assert capsys.readouterr().err == ""


class TestEvaluate:
    def test_weighs_batches_by_rows(self):
        trainer = _pure()
        ragged = trainer.evaluate(_batches(24))  # 24, 24 and 16 rows.
        expected = float(_pure_loss(_params(), (ROWS, TARGETS)))
        assert ragged == {"loss": pytest.approx(expected, rel=1e-5)}

    def test_is_in_evaluation_mode_and_changes_nothing(self):
        trainer = _nnx()
        trainer.train(_batches())
        before = _state(trainer)
        assert trainer.evaluate(_batches(32)) == trainer.evaluate(_batches(32))
        _assert_same(_state(trainer), before)
        trainer.model.eval()
        loss, metrics = _nnx_loss(trainer.model, (ROWS, TARGETS))
        values = trainer.evaluate([(ROWS, TARGETS)])
        assert values["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert values["worst"] == pytest.approx(float(metrics["worst"]), rel=1e-5)

    def test_metric_fn(self):
        trainer = _pure(metric_fn=lambda params, batch: {"bias": params["Dense_1"]["b"][0]})
        assert trainer.evaluate(_batches()) == {"bias": 0.0}
        history = trainer.train(_batches(), eval_data=_batches())
        assert set(history.evals[0]) == {"epoch", "step", "bias"}

    def test_empty(self):
        with pytest.raises(ValueError, match="empty"):
            _pure().evaluate([])


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"loss_fn": 3}, TypeError, "loss_fn"),
            ({"metric_fn": 3}, TypeError, "metric_fn"),
            ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir"),
            ({"optimizer": 3}, TypeError, "GradientTransformation"),
            ({"optimizer": priorityprop(optax.sgd(0.1), 0.5)}, ValueError, "wraps it itself"),
            (
                {"optimizer": optax.chain(optax.sgd(0.1), scale_by_priority(8))},
                ValueError,
                "wraps it itself",
            ),
            ({"model": {}}, ValueError, "no parameters"),
            ({"model": {"w": jnp.zeros(2, jnp.int32)}}, TypeError, "'w' is an array of int32"),
            ({"model": nnx.relu}, TypeError, "nnx.Module"),
            ({"total_budget": 3}, ValueError, "total_budget=3"),
            ({"spread": "odd"}, ValueError, "spread"),
            ({"nonsense": 1}, TypeError, "nonsense"),
        ],
    )
    def test_construction(self, change, error, match):
        kwargs = {"model": _params(), "optimizer": optax.sgd(0.1), "loss_fn": _pure_loss}
        with pytest.raises(error, match=match):
            PriorityPropTrainer(**({"total_budget": 0.5} | kwargs | change))

    @pytest.mark.parametrize(
        ("kwargs", "error", "match"),
        [
            ({"epochs": 0}, ValueError, "at least 1"),
            ({"epochs": 1.5}, TypeError, "whole number"),
            ({"loader": []}, ValueError, "loader is empty"),
            ({"loader": 3}, TypeError, "iterable of batches"),
            ({"loader": iter(_batches()), "epochs": 2}, ValueError, "loader is an iterator"),
            ({"eval_data": iter(_batches()), "epochs": 2}, ValueError, "eval_data is an iterator"),
        ],
    )
    def test_train(self, kwargs, error, match):
        trainer = _pure()
        with pytest.raises(error, match=match):
            trainer.train(**({"loader": _batches()} | kwargs))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(trainer.train(iter(_batches())).loss) == 8

    @pytest.mark.parametrize(
        ("result", "error", "match"),
        [
            (lambda loss: loss[None], ValueError, "real scalar"),
            (lambda loss: (loss, [loss]), TypeError, "dict of scalars"),
            (lambda loss: (loss, {"updates": loss}), ValueError, "'updates'"),
            (lambda loss: (loss, {"m": loss[None]}), ValueError, "'m' must be a scalar"),
        ],
    )
    def test_loss_fn(self, result, error, match):
        trainer = PriorityPropTrainer(
            _params(), optax.sgd(0.1), lambda p, b: result(_pure_loss(p, b)), 0.5, progress=False
        )
        with pytest.raises(error, match=match):
            trainer.train(_batches())
        _assert_same(trainer.params, _params())


class TestNonFinite:
    def test_names_the_step_and_keeps_history_and_checkpoint(self, tmp_path):
        trainer = _pure(checkpoint_dir=tmp_path)
        trainer.train(_batches())
        good = sorted(os.listdir(tmp_path))
        bad = _batches()
        bad[3] = (bad[3][0], bad[3][1] * np.nan)
        with pytest.raises(NonFiniteLossError, match=r"nan at step 12; .*learning rate") as caught:
            trainer.train(bad)
        assert caught.value.step == 12 and isinstance(caught.value, FloatingPointError)
        assert [r["step"] for r in trainer.history.steps] == list(range(1, 12))
        assert sorted(os.listdir(tmp_path)) == good
        fresh = _pure()
        assert len(fresh.train(_batches(), 2, resume_from=tmp_path).loss) == 16

    def test_nan_parameters_are_not_saved(self, tmp_path):
        # Infinity times a gradient of zero.
        trainer = PriorityPropTrainer(
            {"w": jnp.zeros(2)},
            optax.sgd(float("inf")),
            lambda params, batch: jnp.sum(params["w"] ** 2 * batch),
            total_budget=None,
            checkpoint_dir=tmp_path,
        )
        with pytest.raises(NonFiniteLossError, match="parameters became NaN"):
            trainer.train([np.ones(2, np.float32)])
        assert os.listdir(tmp_path) == []


class TestResume:
    # Batch 3 of the second epoch: step 11 is within a cycle of 5; the others end one, or an epoch.
    @pytest.mark.parametrize(
        ("make", "at"), [(_nnx, (1, 3)), (_pure, (1, 3)), (_pure, (0, 5)), (_pure, (2, 0))]
    )
    def test_bit_for_bit(self, make, at, tmp_path):
        whole = make()
        whole.train(Loader(_batches()), epochs=3, eval_data=_batches(32))

        stopped = make(checkpoint_dir=tmp_path)
        history = stopped.train(Loader(_batches(), at), epochs=3, eval_data=_batches(32))
        assert history.interrupted and len(history.loss) == at[0] * 8 + at[1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert stopped.get_priority_report().total == sum(history.updates)

        resumed = make(checkpoint_dir=tmp_path)
        loader = Loader(_batches())
        resumed.train(loader, epochs=3, eval_data=_batches(32), resume_from=tmp_path)
        assert loader.epochs == list(range(at[0], 3))
        assert _values(resumed.history) == _values(whole.history)
        assert not resumed.history.interrupted
        _assert_same(_state(resumed), _state(whole))
        assert resumed.get_priority_report().as_dict() == whole.get_priority_report().as_dict()
        assert isinstance(resumed.optimizer_state, PriorityPropState)
        assert len([name for name in os.listdir(tmp_path) if name.isdecimal()]) == 2
        # It is finished: resuming again does nothing.
        again = make()
        again.train(Loader(_batches()), epochs=3, resume_from=tmp_path)
        _assert_same(_state(again), _state(whole))

    def test_interrupted_evaluation_is_made_up_for(self, tmp_path):
        whole = _pure()
        whole.train(Loader(_batches()), epochs=2, eval_data=_batches(32))
        stopped = _pure(checkpoint_dir=tmp_path)
        bad = Loader(_batches(32), (None, 1))
        history = stopped.train(Loader(_batches()), epochs=2, eval_data=bad)
        assert history.interrupted and len(history.loss) == 8 and not history.evals
        resumed = _pure(checkpoint_dir=tmp_path)
        resumed.train(Loader(_batches()), 2, eval_data=_batches(32), resume_from=tmp_path)
        assert _values(resumed.history) == _values(whole.history)
        _assert_same(_state(resumed), _state(whole))

    def test_second_interrupt_raises(self):
        class Stubborn(Loader):
            def __iter__(self):
                yield self.batches[0]
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError("not reached")

        # In the loader nothing is at stake, so it ends the training as the first one does.
        trainer = _pure()
        history = trainer.train(Stubborn(_batches()))
        assert history.interrupted and len(history.loss) == 1

        def log(record):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        trainer = _nnx()
        with pytest.raises(KeyboardInterrupt):
            trainer.train(_batches(), log=log)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert np.isfinite(trainer.evaluate(_batches())["loss"])

    def test_plain_train_after_an_interruption_begins_an_epoch(self):
        trainer = _pure()
        trainer.train(Loader(_batches(), (0, 3)))
        loader = Loader(_batches())
        history = trainer.train(loader)
        assert loader.epochs == [1] and len(history.loss) == 11 and not history.interrupted

    def test_error_of_the_loader_keeps_the_history(self):
        def batches():
            yield from _batches()[:3]
            raise RuntimeError("disk gone")

        trainer = _nnx()
        with pytest.raises(RuntimeError, match="disk gone"):
            trainer.train(batches())
        assert len(trainer.history.loss) == 3
        assert np.isfinite(trainer.evaluate(_batches())["loss"])

    def test_empty_and_odd_arrays_survive(self, tmp_path):
        def make():
            params = {
                "a b/c.d": jnp.zeros((0, 3)),
                "w": jnp.ones(2, jnp.bfloat16),
                "z": jnp.ones((), jnp.complex64),
            }

            def loss_fn(params, batch):
                return jnp.sum(jnp.abs(params["w"] * batch).astype(jnp.float32)) + jnp.abs(
                    params["z"]
                )

            return PriorityPropTrainer(
                params, optax.sgd(0.1), loss_fn, 0.5, checkpoint_dir=tmp_path, progress=False
            )

        trainer = make()
        trainer.train([np.ones(2, np.float32)] * 3)
        resumed = make()
        resumed.train([np.ones(2, np.float32)] * 3, resume_from=tmp_path)
        _assert_same(_state(resumed), _state(trainer))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            _pure().train(_batches(), resume_from=tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            _pure().train(_batches(), resume_from=tmp_path)

    def test_does_not_fit(self, tmp_path):
        _pure(checkpoint_dir=tmp_path).train(_batches())
        for model, inner, match in [
            (_params(width=7), optax.adam(0.03), r"\[6\] where the trainer has .*\[7\]"),
            (_params(), optax.sgd(0.03, momentum=0.9), "does not fit"),
            (_params() | {"more": jnp.ones(2)}, optax.adam(0.03), "does not fit"),
        ]:
            trainer = PriorityPropTrainer(model, inner, _pure_loss, 0.6, progress=False)
            with pytest.raises(ValueError, match=match):
                trainer.train(_batches(), resume_from=tmp_path)
        with pytest.raises(ValueError, match="does not fit"):
            _nnx().train(_batches(), resume_from=tmp_path)

    def test_short_loader(self, tmp_path):
        _pure(checkpoint_dir=tmp_path).train(Loader(_batches(), (0, 5)))
        with pytest.raises(ValueError, match="ended after 2 batches"):
            _pure().train(_batches()[:2], resume_from=tmp_path)

    def test_damaged(self, tmp_path):
        _pure(checkpoint_dir=tmp_path).train(_batches())
        for folder, _, files in os.walk(tmp_path):
            for name in files:
                with open(os.path.join(folder, name), "r+b") as file:
                    file.truncate(os.path.getsize(file.name) // 2)
        with pytest.raises(ValueError, match="cannot be read"):
            _pure().train(_batches(), resume_from=tmp_path)

    def test_other_runs_checkpoints_are_safe(self, tmp_path):
        first = _pure(checkpoint_dir=tmp_path)
        first.train(_batches())
        with pytest.raises(ValueError, match="another run"):
            _pure(checkpoint_dir=tmp_path).train(_batches())
        assert len(first.train(_batches()).loss) == 16  # Its own it may go on with.
