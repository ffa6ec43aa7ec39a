"""Tests of what is left of a training after an error or Ctrl-C."""

from __future__ import annotations

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

from priorityprop_jax.training import PriorityPropTrainer, Trainer
from tests.training.test_trainer import (
    Loader,
    Net,
    _assert_same,
    _batches,
    _nnx,
    _nnx_loss,
    _params,
    _pure,
    _pure_loss,
    _state,
    _values,
)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def _agree(trainer, steps):
    """History, ledger and optimizer state are of these steps."""
    state, ledger = trainer.optimizer_state, trainer.get_priority_report()
    assert [record["step"] for record in trainer.history.steps] == list(range(1, steps + 1))
    assert int(state.step) == steps == ledger.steps[-1]
    assert ledger.history[-1] == state.update_counts.tolist()
    assert sum(trainer.history.updates) == ledger.total == int(sum(state.update_counts))


class TestErrors:
    @pytest.mark.parametrize("make", [_pure, _nnx])
    def test_of_the_loader(self, make):
        def batches():
            yield from _batches()[:3]
            raise RuntimeError("disk gone")

        records = []
        trainer, whole = make(), make()
        with pytest.raises(RuntimeError, match="disk gone"):
            trainer.train(batches(), log=records.append)
        _agree(trainer, 3)
        assert len(records) == 3
        whole.train(_batches()[:3])
        _assert_same(_state(trainer), _state(whole))

    @pytest.mark.parametrize("make", [_pure, _nnx])
    def test_of_the_logger(self, make):
        def log(record):
            if record["step"] == 7:
                raise RuntimeError("disk full")

        trainer, whole = make(), make()
        with pytest.raises(RuntimeError, match="disk full"):
            trainer.train(_batches(), log=log)
        _agree(trainer, 8)  # fetched at the end of the epoch
        whole.train(_batches())
        _assert_same(_state(trainer), _state(whole))
        trainer.train(_batches())
        whole.train(_batches())
        assert _values(trainer.history) == _values(whole.history)

    def test_of_both(self):
        def batches():
            yield from _batches()[:3]
            raise RuntimeError("disk gone")

        def log(record):
            raise ValueError("disk full")

        trainer = _pure()
        with pytest.raises(RuntimeError, match="disk gone"):
            trainer.train(batches(), log=log)
        _agree(trainer, 3)


class TestErrorsAtAnyPlace:
    """In each the trainer goes on as one that never failed, from the steps that were run."""

    def _failing(self, number, values):
        """A sequence of so many that fails at one of them."""
        for i, value in enumerate(values):
            if i == number:
                raise RuntimeError("gone")
            yield value

    @pytest.mark.parametrize("make", [_pure, _nnx])
    @pytest.mark.parametrize("number", [0, 7])  # the first batch and the last
    def test_of_the_loader(self, make, number):
        trainer, whole = make(), make()
        with pytest.raises(RuntimeError, match="gone"):
            trainer.train(self._failing(number, _batches()), eval_data=_batches()[:1])
        assert trainer.history.evals == []
        self._goes_on(trainer, whole, number, _batches()[:number])

    def test_of_set_epoch(self):
        class Late(Loader):
            def set_epoch(self, epoch):
                if epoch:
                    raise RuntimeError("gone")
                super().set_epoch(epoch)

        trainer, whole = _pure(), _pure()
        with pytest.raises(RuntimeError, match="gone"):
            trainer.train(Late(_batches()), 2)
        self._goes_on(trainer, whole, 8, Loader(_batches()))

    @pytest.mark.parametrize("number", [0, 1])
    def test_of_data_to_evaluate_on(self, number):
        trainer, whole = _pure(), _pure()
        with pytest.raises(RuntimeError, match="gone"):
            trainer.train(_batches(), eval_data=self._failing(number, _batches()[:2]))
        assert trainer.history.evals == []
        self._goes_on(trainer, whole, 8, _batches())

    def test_of_the_log_of_an_evaluation(self):
        def log(record):
            if record["kind"] == "eval":
                raise RuntimeError("gone")

        trainer, whole = _nnx(), _nnx()
        with pytest.raises(RuntimeError, match="gone"):
            trainer.train(_batches(), 2, eval_data=_batches()[:1], log=log)
        assert [record["step"] for record in trainer.history.evals] == [8]
        trainer.history.evals.clear()
        self._goes_on(trainer, whole, 8, _batches())

    def test_of_metric_fn(self):
        def metric_fn(params, batch):
            if failing:
                raise RuntimeError("gone")
            return {"loss": _pure_loss(params, batch)}

        failing, trainer, whole = True, _pure(metric_fn=metric_fn), _pure()
        with pytest.raises(RuntimeError, match="gone"):
            trainer.train(_batches(), eval_data=_batches()[:1])
        failing = False
        self._goes_on(trainer, whole, 8, _batches())
        assert np.isfinite(trainer.evaluate(_batches())["loss"])

    def _goes_on(self, trainer, whole, steps, batches):
        if steps:
            _agree(trainer, steps)
            whole.train(batches)
            _assert_same(_state(trainer), _state(whole))
        else:
            assert trainer.history.steps == [] and int(trainer.optimizer_state.step) == 0
        for each in (trainer, whole):
            each.train(_batches())
            _agree(each, steps + 8)
        assert trainer.history.loss == whole.history.loss
        _assert_same(_state(trainer), _state(whole))


def _calls_back(how):
    """A loss whose host callback fails at the first target above 100."""

    def look(y):
        if y[0, 0] > 100:
            raise RuntimeError("host gone")
        return np.float32(0)

    def loss_fn(model, batch):
        x, y = batch
        loss = _nnx_loss(model, batch)[0] if isinstance(model, Net) else _pure_loss(model, batch)
        if how == "debug":
            jax.debug.callback(look, y)  # pyright: ignore
            return loss
        call = jax.pure_callback if how == "pure" else io_callback
        # Within a scan, as in a model of scanned layers.
        nothing = lambda carry, _: (carry + call(look, jnp.zeros(()), y), None)  # noqa: E731
        return loss + jax.lax.stop_gradient(jax.lax.scan(nothing, jnp.zeros(()), None, 1)[0])

    return loss_fn


class Failing:
    """The plain step, which at its twelfth run takes the arrays and fails, as without memory."""

    def __init__(self, setup):
        self.plain, self.steps = setup.plain(), 0

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def __call__(self, params, rest, opt_state, batch):
        self.steps += 1
        if self.steps == 12:
            jax.tree.map(lambda x: x.delete(), (params, rest, opt_state))
            raise RuntimeError("out of memory")
        return self.plain(params, rest, opt_state, batch)


class TestErrorsWithinAStep:
    @pytest.fixture
    def bad(self):
        batches = _batches()
        x, y = batches[3]
        return [*batches[:3], (x, y + 1000), *batches[4:]]

    @pytest.mark.parametrize(("model", "how"), [(Net, "io"), (_params, "pure"), (_params, "debug")])
    def test_of_the_host_lose_nothing(self, model, how, bad):
        given = model()
        trainer, whole = (
            Trainer(model, optax.sgd(0.03, 0.9), _calls_back(how), progress=False)
            for model in (given, model())
        )
        with pytest.raises(Exception, match="host gone") as caught:
            trainer.train(bad)
        assert "arrays" not in str(getattr(caught.value, "__notes__", ""))
        assert len(trainer.history.steps) == 3
        whole.train(bad[:3])
        _assert_same(_state(trainer), _state(whole))
        if model is Net:
            assert np.isfinite(given.head.kernel[...]).all()
        # It goes on from there.
        whole.train(_batches())
        trainer.train(_batches())
        assert _values(trainer.history) == _values(whole.history)

    def test_of_evaluation_lose_nothing(self, bad):
        model = Net()
        trainer = Trainer(
            model, optax.adam(0.03), _nnx_loss, progress=False,
            metric_fn=lambda model, batch: {"loss": _calls_back("pure")(model, batch)},
        )  # fmt: skip
        with pytest.raises(Exception, match="host gone"):
            trainer.train(_batches(), eval_data=bad)
        assert len(trainer.history.steps) == 8 and np.isfinite(model(bad[0][0])).all()

    def test_of_nan_lose_nothing(self, bad):
        """JAX's own search for NaN raises within the step, too."""
        model = _params()
        batches = [*bad[:3], (bad[3][0] * np.nan, bad[3][1])]
        trainer = Trainer(model, optax.adam(0.03), _pure_loss, progress=False)
        with jax.debug_nans(True), pytest.raises(FloatingPointError):
            trainer.train(batches)
        assert len(trainer.history.steps) == 3
        assert np.isfinite(trainer.evaluate(_batches())["loss"])

    @pytest.mark.parametrize("make", [_pure, _nnx])
    def test_of_anything_else_go_back_to_the_checkpoint(self, make, tmp_path):
        trainer, whole = make(step=Failing, checkpoint_dir=tmp_path), make()
        trainer.train(_batches())
        with pytest.raises(Exception, match="out of memory") as caught:
            trainer.train(_batches())
        assert "back at the latest checkpoint, of step 8" in caught.value.__notes__[-1]
        _agree(trainer, 8)
        whole.train(_batches())
        _assert_same(_state(trainer), _state(whole))
        whole.train(_batches())
        trainer.train(_batches())
        assert _values(trainer.history) == _values(whole.history)

    def test_says_so_where_there_is_none(self):
        trainer = Trainer(Net(), optax.adam(0.03), _nnx_loss, Failing, progress=False)
        with pytest.raises(Exception, match="out of memory") as caught:
            trainer.train(_batches(), 2)
        assert "with a checkpoint_dir" in caught.value.__notes__[-1]

    def test_a_loss_that_calls_nobody_is_run_without_copies(self):
        taken = []

        def step(setup):
            plain = setup.plain()
            run = plain.compiled
            plain.lay_out = lambda layout: None
            plain.compiled = lambda *given: [taken.append(given), run(*given)][1]
            return plain

        Trainer(_params(), optax.sgd(0.1), _pure_loss, step, progress=False).train(_batches()[:2])
        assert len(taken) == 2
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves([given[:3] for given in taken]))

    def test_of_the_loss_while_tracing_loses_nothing(self):
        def loss_fn(model, batch):
            if len(batch[0]) != 8:
                raise RuntimeError("odd batch")
            return _nnx_loss(model, batch)

        trainer = Trainer(Net(), optax.adam(0.03), loss_fn, progress=False)
        with pytest.raises(RuntimeError, match="odd batch"):
            trainer.train([*_batches()[:3], *_batches(16)])
        assert len(trainer.history.steps) == 3
        assert np.isfinite(trainer.evaluate(_batches())["loss"])


class Interrupting:
    """The plain step, with Ctrl-C pressed between its end and what the trainer does then."""

    def __init__(self, setup, presses):
        self.plain, self.presses, self.steps = setup.plain(), presses, 0

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def __call__(self, *arguments):
        result = self.plain(*arguments)
        self.steps += 1
        for _ in range(self.presses if self.steps == 3 else 0):
            interrupt()
        return result


class TestInterrupts:
    @pytest.mark.parametrize("presses", [1, 2])
    def test_within_a_step(self, presses):
        trainer = PriorityPropTrainer(
            Net(), optax.adam(0.03), _nnx_loss, 0.6, recalc_every=5, progress=False,
            step=lambda setup: Interrupting(setup, presses),
        )  # fmt: skip
        if presses == 1:
            assert trainer.train(_batches()).interrupted
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(_batches())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        _agree(trainer, 3)
        assert np.isfinite(trainer.evaluate(_batches())["loss"])

    def test_the_third_is_not_kept_waiting(self):
        trainer = Trainer(
            _params(), optax.adam(0.03), _pure_loss, lambda s: Interrupting(s, 3), progress=False
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.train(_batches())
        assert len(trainer.history.steps) == 2

    def test_where_an_error_came_after_it_is_told(self):
        def batches():
            yield from _batches()[:2]
            interrupt()
            raise RuntimeError("disk gone")

        trainer = _pure()
        with pytest.raises(RuntimeError, match="disk gone"):
            trainer.train(batches())
        assert trainer.history.interrupted and len(trainer.history.steps) == 2

    def test_while_the_arrays_are_handed_back(self, monkeypatch):
        model = Net()
        trainer = Trainer(model, optax.adam(0.03), _nnx_loss, progress=False)
        join = trainer._model.join
        late = lambda: trainer.history.steps and interrupt()  # noqa: E731
        monkeypatch.setattr(trainer._model, "join", lambda *given: [late(), join(*given)])
        assert trainer.train(_batches()[:2]).interrupted
        assert np.isfinite(model(_batches()[0][0])).all()

    def test_after_the_last_evaluation_is_told(self, tmp_path):
        def log(record):
            if record["kind"] == "eval" and record["epoch"] == 2:
                interrupt()

        trainer = _pure(checkpoint_dir=tmp_path)
        history = trainer.train(Loader(_batches()), 2, eval_data=_batches(), log=log)
        assert history.interrupted and len(history.steps) == 16 and len(history.evals) == 2
        # Nothing is left to do, and a call that is not interrupted says so.
        assert not _pure().train(Loader(_batches()), 2, resume_from=tmp_path).interrupted


class TestLoadersThatCannotTell:
    @pytest.mark.parametrize("error", [TypeError, None])
    def test_length(self, error, capsys, monkeypatch):
        class Stream:
            def __iter__(self):
                yield from _batches()

        class Unsized(Stream):
            def __len__(self):
                raise TypeError("a stream has no length")

        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        history = _pure(progress=True).train(Unsized() if error else Stream(), 2)
        assert len(history.loss) == 16
        assert "16step" in capsys.readouterr().err


def test_an_older_checkpoint_is_refused_in_one_line(tmp_path):
    _pure(checkpoint_dir=tmp_path).train(_batches())
    about = next(
        path
        for path in tmp_path.rglob("about/*")
        if path.read_bytes()[:1] == b"{" and b"leaves" in path.read_bytes()
    )
    values = json.loads(about.read_text())
    about.write_text(json.dumps(values | {"format": "priorityprop_jax-1"}))
    with pytest.raises(ValueError, match="has the format 'priorityprop_jax-1', but only") as caught:
        _pure().train(_batches(), resume_from=tmp_path)
    assert "\n" not in str(caught.value)
