"""Tests of when checkpoints are written, what they hold, and who may write them."""

from __future__ import annotations

import datetime
import itertools
import json
import multiprocessing
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax.core.modules import FrozenWeight
from priorityprop_jax.training import Trainer, checkpoints
from tests.training.test_trainer import Loader, _assert_same, _batches, _pure, _state


class Ended(Exception):
    """Raised by a loader to end a run as a lost machine would, without a last checkpoint."""


class Breaking(Loader):
    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 5)
        raise Ended


@pytest.fixture
def saves(monkeypatch):
    """The steps at which checkpoints are saved."""
    found, save = [], checkpoints.save

    def noting(manager, arrays, about, *rest):
        found.append(about["steps"])
        return save(manager, arrays, about, *rest)

    monkeypatch.setattr(checkpoints, "save", noting)
    return found


class TestWhen:
    def test_every_few_steps_and_at_the_last(self, saves, tmp_path):
        trainer = _pure(checkpoint_dir=tmp_path, checkpoint_every=3)
        trainer.train(Loader(_batches()), 2)
        assert saves == [3, 6, 9, 12, 15, 16]  # not the end of the first epoch, step 8

    def test_short_epochs_do_not_save_each(self, saves, tmp_path):
        _pure(checkpoint_dir=tmp_path, checkpoint_every=100).train(_batches()[:1] * 1, 5)
        assert saves == [5]

    def test_by_time(self, saves, tmp_path, monkeypatch):
        now = itertools.count()
        clock = types.SimpleNamespace(monotonic=lambda: next(now))
        monkeypatch.setattr(checkpoints, "time", clock)
        every = datetime.timedelta(seconds=4)
        _pure(checkpoint_dir=tmp_path, checkpoint_every=every).train(_batches())
        assert 2 <= len(saves) <= 4 and saves[-1] == 8

    def test_a_run_that_is_lost_within_an_epoch_goes_on_there(self, tmp_path):
        whole = _pure()
        whole.train(Loader(_batches()), 2)
        with pytest.raises(Ended):
            _pure(checkpoint_dir=tmp_path, checkpoint_every=2).train(Breaking(_batches()))
        again = _pure(checkpoint_dir=tmp_path)
        history = again.train(Loader(_batches()), 2, resume_from=tmp_path)
        assert [record["step"] for record in history.steps] == list(range(1, 17))
        assert history.loss == whole.history.loss
        _assert_same(_state(again), _state(whole))

    def test_without_a_folder_it_is_told(self, saves, tmp_path):
        trainer = _pure(checkpoint_every=3)
        with pytest.warns(UserWarning, match="does nothing without a checkpoint_dir"):
            trainer.train(_batches()[:1])
        trainer.checkpoint_dir = tmp_path
        trainer.train(_batches()[:2])
        assert set(saves) == {3}

    @pytest.mark.parametrize(
        ("every", "error", "match"),
        [
            (0, ValueError, "at least 1 step"),
            (True, TypeError, "number of steps or a datetime.timedelta"),
            (0.5, TypeError, "number of steps or a datetime.timedelta"),
            (datetime.timedelta(0), ValueError, "above zero"),
        ],
    )
    def test_wrong(self, every, error, match):
        with pytest.raises(error, match=match):
            _pure(checkpoint_every=every)


@pytest.mark.parametrize("other", [{"total_budget": 0.7}, {"recalc_every": 4}, {"score": "gain"}])
def test_a_run_of_another_budget_is_refused_and_nothing_changes(tmp_path, other):
    _pure(checkpoint_dir=tmp_path, score="robin").train(_batches()[:2])
    trainer = _pure(**{"score": "robin"} | other)
    before = _state(trainer)
    with pytest.raises(ValueError, match=rf"a run with {next(iter(other))}=.*: resume with"):
        trainer.train(_batches(), resume_from=tmp_path)
    _assert_same(_state(trainer), before)
    assert trainer.history.steps == []


class TestRecordsOfSteps:
    def test_are_written_once(self, tmp_path):
        trainer = _pure(checkpoint_dir=tmp_path)
        trainer.train(Loader(_batches()), 3)
        (file,) = tmp_path.glob("steps-*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines == trainer.history.steps
        about = [path.stat().st_size for path in tmp_path.rglob("about/*")]
        assert max(about) < 5000

    def test_what_an_interrupted_save_has_left_is_written_over(self, tmp_path):
        _pure(checkpoint_dir=tmp_path).train(Loader(_batches()), 1)
        (file,) = tmp_path.glob("steps-*.jsonl")
        with open(file, "a") as appended:
            appended.write('{"step": 9, "loss": 1')  # and then the machine went down
        trainer = _pure(checkpoint_dir=tmp_path)
        trainer.train(Loader(_batches()), 2, resume_from=tmp_path)
        assert list(map(json.loads, file.read_text().splitlines())) == trainer.history.steps

    def test_go_along_to_another_folder(self, tmp_path):
        _pure(checkpoint_dir=tmp_path / "a").train(Loader(_batches()), 1)
        trainer = _pure(checkpoint_dir=tmp_path / "b")
        trainer.train(Loader(_batches()), 2, resume_from=tmp_path / "a")
        fresh = _pure()
        fresh.restore(tmp_path / "b")
        assert fresh.history == trainer.history and len(fresh.history.steps) == 16

    @pytest.mark.parametrize(("keep", "match"), [(100, "cut off"), (None, "cannot be read")])
    def test_damage_is_told(self, keep, match, tmp_path):
        _pure(checkpoint_dir=tmp_path).train(_batches())
        (file,) = tmp_path.glob("steps-*.jsonl")
        if keep is None:
            file.unlink()
        else:  # to a whole number of lines
            file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
        with pytest.raises(ValueError, match=match):
            _pure().restore(tmp_path)


class WithFrozen(nnx.Module):
    def __init__(self, scale):
        self.frozen = FrozenWeight(scale * jnp.arange(4096.0))
        self.counted = nnx.Variable(jnp.zeros(()))
        self.slope = nnx.Param(jnp.zeros(()))


def slope_loss(model, batch):
    model.counted[...] += 1.0
    return jnp.mean((batch * model.slope[...] - model.frozen[...][: len(batch)]) ** 2)


def with_frozen(scale=1.0, **options):
    return Trainer(WithFrozen(scale), optax.adam(0.1), slope_loss, progress=False, **options)


class TestFrozenWeights:
    def test_are_left_out(self, tmp_path):
        batches = [jnp.ones(8)] * 3
        trainer = with_frozen(checkpoint_dir=tmp_path)
        trainer.train(batches)
        held = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert held < 4096 * 4
        again = with_frozen()
        again.train(batches, 2, resume_from=tmp_path)
        trainer.train(batches)
        assert again.history.loss == trainer.history.loss
        assert again.model.counted[...] == 6
        np.testing.assert_array_equal(again.model.frozen[...], jnp.arange(4096.0))

    def test_of_another_model_are_told(self, tmp_path):
        with_frozen(checkpoint_dir=tmp_path).train([jnp.ones(8)])
        with pytest.raises(ValueError, match="the weights that are not trained are others"):
            with_frozen(2.0).restore(tmp_path)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_have_one_checksum_wherever_they_lie(self, dtype):
        array = jax.random.normal(jax.random.key(0), (16, 6)).astype(dtype)
        mesh = jax.make_mesh((8,), ("data",))
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        (one,), (other,) = (
            checkpoints._parted(FrozenWeight(x))[1] for x in (array, jax.device_put(array, layout))
        )
        bits = np.asarray(array).view(np.uint32 if dtype == jnp.float32 else np.uint16)
        assert one == other == int(bits.sum(dtype=np.uint64)) % 2**32


def hold(folder, held, done):
    with checkpoints.open_folder(folder, ()):
        held.set()
        done.wait()


@pytest.mark.skipif(checkpoints.fcntl is None, reason="this system has no fcntl")
class TestTwoWriters:
    def test_are_told(self, tmp_path):
        with (
            checkpoints.open_folder(tmp_path, ()),
            pytest.raises(ValueError, match="another run is writing checkpoints"),
        ):
            _pure(checkpoint_dir=tmp_path).train(_batches())
        _pure(checkpoint_dir=tmp_path).train(_batches())

    def test_a_killed_one_holds_nothing(self, tmp_path):
        context = multiprocessing.get_context("spawn")
        held, done = context.Event(), context.Event()
        process = context.Process(target=hold, args=(tmp_path, held, done))
        process.start()
        try:
            assert held.wait(60)
            with pytest.raises(ValueError, match="another run is writing"):
                _pure(checkpoint_dir=tmp_path).train(_batches())
        finally:
            process.kill()
            process.join()
        _pure(checkpoint_dir=tmp_path).train(_batches())


class TestBadBatches:
    """With apply_if_finite around the optimizer a training outlives some of them."""

    def run(self, bad, tmp_path=None, most=2):
        batches = _batches()
        for i in bad:
            batches[i] = (batches[i][0], batches[i][1] * jnp.nan)
        tx = optax.apply_if_finite(optax.adam(0.1), most)
        loss = lambda p, batch: jnp.mean((batch[0] @ p["w"] - batch[1]) ** 2)  # noqa: E731
        width = _batches()[0][0].shape[-1], *_batches()[0][1].shape[1:]
        trainer = Trainer(
            {"w": jnp.zeros(width)}, tx, loss, progress=False, checkpoint_dir=tmp_path
        )
        return trainer, batches

    def test_are_counted_and_passed_over(self, tmp_path):
        trainer, batches = self.run([3, 6], tmp_path)
        with pytest.warns(UserWarning, match="step 4 is NaN or infinite.*apply_if_finite"):
            history = trainer.train(batches)
        assert history.nonfinite == 2 and len(history.steps) == 8
        plain, _ = self.run([])
        plain.train([batch for i, batch in enumerate(_batches()) if i not in (3, 6)])
        _assert_same(trainer.params, plain.params)
        fresh, _ = self.run([])
        fresh.restore(tmp_path)
        assert fresh.history.nonfinite == 2

    def test_too_many_in_a_row_end_it(self):
        trainer, batches = self.run([2, 3, 4, 5])
        with pytest.raises(FloatingPointError, match="nan at step 3"):
            trainer.train(batches)
        assert len(trainer.history.steps) == 2


class TestLoaders:
    @pytest.mark.parametrize("error", [NotImplementedError, ValueError, RuntimeError])
    def test_that_raise_when_asked_for_their_length(self, error):
        class Stream:
            def __iter__(self):
                yield from _batches()

            def __len__(self):
                raise error("unknown")

        assert len(_pure().train(Stream()).loss) == 8

    @pytest.mark.parametrize(
        "single", [{"x": jnp.ones((4, 2))}, "train.csv", b"x", jnp.ones((4, 2))]
    )
    def test_that_are_one_batch_are_told(self, single):
        with pytest.raises(TypeError, match="loader must be an iterable of batches, got a single"):
            _pure().train(single)

    def test_a_batch_without_rows_is_told(self):
        empty = tuple(array[:0] for array in _batches()[0])
        with pytest.raises(ValueError, match="a batch has no rows"):
            _pure().train([*_batches(), empty])


def test_short_cycles_are_fetched_together(monkeypatch):
    trainer = _pure(recalc_every=1, total_budget=1.0)
    fetches, fetch = [], trainer._books.fetch
    note = lambda *args: fetches.append(fetch(*args)) or fetches[-1]  # noqa: E731
    monkeypatch.setattr(trainer._books, "fetch", note)
    trainer.train(_batches() * 3)
    assert fetches[:2] == [5, 5]


def test_folders_may_be_paths_of_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = _pure(checkpoint_dir=os.path.join("a", "b"))
    trainer.train(_batches())
    assert (tmp_path / "a" / "b").is_dir()
