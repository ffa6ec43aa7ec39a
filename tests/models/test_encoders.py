"""Tests of RoBERTa and DistilBERT beside BERT, and of what is saved of all three."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax import models
from priorityprop_jax.models import DataError
from tests.models.test_bert import (
    CONFIG,
    POSITIONS,
    WORDS,
    apply,
    assert_same_weights,
    random_tensors,
    slow_bert,
    weights,
    write_bert,
)

KINDS = ("bert", "roberta", "distilbert")
# What DistilBERT calls the layers of a BERT, and the names in its configuration.
DISTILBERT = {
    "encoder.layer": "transformer.layer",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
DISTILBERT_CONFIG = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
# A byte-level tokenizer; Ġ is the space before a word.
PAIRS = ["f i", "fi n", "fin e", "fi l", "fil m", "Ġ fine", "Ġ film", "Ġ a"]
BYTES = ["<s>", "<pad>", "</s>", "<unk>", *"afinelmsĠ", *(p.replace(" ", "") for p in PAIRS)]
BYTES += ["<mask>"]


def write_encoder(folder: Path, kind: str, **changes) -> Path:
    """A small folder of one kind with the weights of `random_tensors`."""
    if kind == "bert":
        return write_bert(folder, **changes)
    tensors, config = random_tensors(), CONFIG | {"model_type": kind}
    if kind == "roberta":
        types = "embeddings.token_type_embeddings.weight"
        tensors |= {types: tensors[types][:1]}
        config |= {"type_vocab_size": 1, "pad_token_id": 1}
    else:
        del tensors["embeddings.token_type_embeddings.weight"]
        for ours, theirs in DISTILBERT.items():
            tensors = {name.replace(ours, theirs): value for name, value in tensors.items()}
        config = {DISTILBERT_CONFIG.get(name, name): value for name, value in config.items()}
        config |= dict.fromkeys([*DISTILBERT_CONFIG, "type_vocab_size"], "absent")
    tensors = {f"{kind}.{name}": value for name, value in tensors.items()}
    tensors["classifier.weight"] = np.ones((7, 16), np.float32)  # not for the mean
    write_bert(folder, tensors, **config | changes)
    if kind == "roberta":
        (folder / "vocab.txt").unlink()
        ids = {token: i for i, token in enumerate(BYTES)}
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        merges = "\n".join(["#version: 0.2", *PAIRS])
        (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    return folder


def slow_encoder(kind: str, tokens: list[int]) -> list[np.ndarray]:
    """The hidden states `[time, width]` of one text without padding."""
    tensors = random_tensors()
    if kind == "roberta":  # Its first token is at position 2.
        name = "embeddings.position_embeddings.weight"
        tensors[name] = tensors[name][2:]
    if kind == "distilbert":
        tensors["embeddings.token_type_embeddings.weight"][:] = 0
    return slow_bert(tensors, tokens)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


class TestKinds:
    TEXT = (0, 6, 7, 8, 9, 2)

    @pytest.mark.parametrize("kind", ["roberta", "distilbert"])
    def test_against_the_formula(self, tmp_path, kind):
        eps = {} if kind == "roberta" else {"layer_norm_eps": CONFIG["layer_norm_eps"]}
        model = models.load_bert(write_encoder(tmp_path, kind, **eps))
        pad = 1 if kind == "roberta" else 0
        text = [token + 3 for token in self.TEXT]
        found, states = apply(model, jnp.array([[*text, pad, pad], [*text, 4, 4]]))
        for state, layer in zip(states, slow_encoder(kind, text), strict=True):
            np.testing.assert_allclose(state[0, :6], layer, rtol=1e-4, atol=2e-5)
        for row, tokens in enumerate((text, [*text, 4, 4])):
            mean = slow_encoder(kind, tokens)[-1].mean(axis=0)  # [width]
            logits = mean @ model.head.out.kernel[...] + model.head.out.bias[...]
            np.testing.assert_allclose(found[row], logits, rtol=1e-4, atol=2e-5)

    def test_positions_of_roberta_count_tokens(self, tmp_path):
        model = models.load_bert(write_encoder(tmp_path, "roberta"))
        tokens = np.array([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7], [5, 1, 6, 7, 1], [1] * 5])
        positions = np.zeros_like(tokens)
        for row, text in enumerate(tokens):
            place = 1  # that of padding
            for i, token in enumerate(text):
                place += token != 1
                positions[row, i] = place if token != 1 else 1
        t = random_tensors()
        hidden = t["embeddings.word_embeddings.weight"][tokens]
        hidden = hidden + t["embeddings.position_embeddings.weight"][positions]
        hidden = hidden + t["embeddings.token_type_embeddings.weight"][0]
        found, mask = model.embed(jnp.asarray(tokens))
        np.testing.assert_allclose(found, model.embed.norm(hidden), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(mask, tokens != 1)

    def test_the_longest_input(self, tmp_path, kind):
        model = models.load_bert(write_encoder(tmp_path, kind))
        longest = POSITIONS - 2 if kind == "roberta" else POSITIONS
        assert model.config.max_length == longest
        model.embed(jnp.full((1, longest), 5))
        with pytest.raises(ValueError, match=f"longer than the {longest} positions"):
            model.embed(jnp.full((1, longest + 1), 5))

    def test_xlm_roberta_is_a_roberta(self, tmp_path):
        one = models.load_bert(write_encoder(tmp_path / "one", "roberta"))
        folder = write_encoder(tmp_path / "other", "roberta")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "xlm-roberta"}))
        assert_same_weights(one, models.load_bert(folder))

    def test_shards(self, tmp_path, kind):
        folder = write_encoder(tmp_path, kind)
        whole, tensors = models.load_bert(folder), dict(models.read_tensors(folder))
        (folder / "model.safetensors").unlink()
        places = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(places.values()):
            part = {name: value for name, value in tensors.items() if places[name] == shard}
            models.write_tensors(folder / shard, part)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        assert_same_weights(models.load_bert(folder), whole)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"model_type": "llama"}, "'llama' is no encoder.*load_decoder loads those"),
            ({"model_type": ["bert"]}, r"\['bert'\] is no encoder"),
            ({"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\] is not supported"),
            ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small', a number from 0"),
            ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
            ({"model_type": "roberta", "max_position_embeddings": 1}, "leaves no position"),
            ({"model_type": "distilbert"}, "lacks dim, n_layers, n_heads, hidden_dim"),
            ({"num_hidden_layers": 10**9}, "no tensor encoder.layer.999999999.inter"),
            ({"intermediate_size": 10**9}, r"asks for \(1000000000, 16\)"),
            ({"type_vocab_size": 10**9}, r"asks for \(1000000000, 16\)"),
            ({"max_position_embeddings": 10**9}, r"asks for \(1000000000, 16\)"),
        ],
    )
    def test_configurations_that_cannot_be(self, tmp_path, changes, match):
        folder = write_bert(tmp_path, **changes)
        with pytest.raises(ValueError, match=match):
            models.load_bert(folder)

    def test_names_in_errors_are_those_of_the_kind(self, tmp_path):
        folder = write_encoder(tmp_path, "distilbert", n_layers=3)
        match = "has no tensor distilbert.transformer.layer.2.ffn.lin1.weight"
        with pytest.raises(ValueError, match=match):
            models.load_bert(folder)


class TestSave:
    LABELS = ("bad", "good", "neither")

    def test_round_trip(self, tmp_path, kind):
        source, folder = write_encoder(tmp_path / "source", kind), tmp_path / "new" / "saved"
        model = models.load_bert(source, classes=3, seed=4)
        model.head.out.bias.set_value(jnp.array([0.5, -1.0, 2.0]))
        models.save_bert(model, folder, labels=self.LABELS, tokenizer=source)
        again = models.load_bert(folder)
        assert_same_weights(model, again)
        assert again.config == model.config
        tokens = jnp.array([[5, 6, 7, 8, 9, 2]])
        np.testing.assert_array_equal(apply(again, tokens)[0], apply(model, tokens)[0])
        assert models.read_labels(folder) == list(self.LABELS)
        texts = ["a fine film", "films"]
        one, other = (
            models.tokenize(models.load_tokenizer(at), texts, 7) for at in (source, folder)
        )
        np.testing.assert_array_equal(one, other)
        # Again, over itself; and all of a name of its own kind.
        models.save_bert(again, folder, labels=self.LABELS, tokenizer=folder)
        assert_same_weights(models.load_bert(folder), model)
        names = set(models.read_tensors(folder))
        assert {name.split(".")[0] for name in names} == {kind, "mean_classifier"}
        there = {name for name in models.read_tensors(source) if "pooler" not in name}
        theirs = {name if "." in name and kind in name else f"bert.{name}" for name in there}
        assert names >= {name for name in theirs if "classifier" not in name}

    def test_number_of_classes(self, tmp_path):
        source, folder = write_bert(tmp_path / "source"), tmp_path / "saved"
        assert models.load_bert(source).head.out.out_features == 2
        model = models.load_bert(source, classes=3, seed=4)
        models.save_bert(model, folder)
        assert models.read_labels(folder) == ["LABEL_0", "LABEL_1", "LABEL_2"]
        assert_same_weights(models.load_bert(folder, classes=3), model)
        fresh, other = models.load_bert(folder, classes=2), models.load_bert(source, classes=2)
        assert_same_weights(fresh, other)

    def test_a_fresh_head_is_that_of_a_fresh_model(self, tmp_path):
        model = models.load_bert(write_bert(tmp_path), classes=3, seed=4)
        rngs = nnx.Rngs(params=4, dropout=4)
        fresh = models.BertClassifier(model.config, classes=3, rngs=rngs)
        assert_same_weights(model.head, fresh.head)
        assert np.asarray(fresh.embed.word.embedding[...]).std() > 0

    def test_regression(self, tmp_path):
        model = models.load_bert(write_bert(tmp_path / "source"), classes=1)
        models.save_bert(model, tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert config["problem_type"] == "regression" and config["id2label"] == {"0": "LABEL_0"}
        assert_same_weights(models.load_bert(tmp_path / "saved"), model)

    def test_on_a_mesh(self, tmp_path):
        model = models.load_bert(write_bert(tmp_path / "source"))
        whole = weights(model)
        mesh = jax.make_mesh((2,), ("x",))
        for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            place = jax.P("x") if leaf.shape[0] % 2 == 0 else jax.P()
            leaf.set_value(jax.device_put(leaf[...], jax.NamedSharding(mesh, place)))
        models.save_bert(model, tmp_path / "saved")
        found = weights(models.load_bert(tmp_path / "saved"))
        for name, value in whole.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)

    @pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], ["a", "a"]])
    def test_labels_that_do_not_fit(self, tmp_path, labels):
        model = models.load_bert(write_bert(tmp_path / "source"))
        message = re.escape(f"labels are {labels}, one for each of 2 classes")
        with pytest.raises(ValueError, match=message):
            models.save_bert(model, tmp_path / "saved", labels=labels)
        assert not (tmp_path / "saved").exists()

    def test_nothing_to_copy(self, tmp_path):
        model = models.load_bert(write_bert(tmp_path / "source"))
        (tmp_path / "source" / "vocab.txt").unlink()
        with pytest.raises(DataError, match="no tokenizer.json or vocab.txt or vocab.json in"):
            models.save_bert(model, tmp_path / "saved", tokenizer=tmp_path / "source")
        assert not (tmp_path / "saved").exists()

    def test_what_cannot_be_written_leaves_what_was(self, tmp_path, monkeypatch):
        model = models.load_bert(write_bert(tmp_path / "source"))
        models.save_bert(model, tmp_path / "saved")
        models.save_bert(model, tmp_path / "saved", labels=["a", "b"])

        def full(*arguments):
            raise OSError("no space left on device")

        monkeypatch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(DataError, match="model.safetensors cannot be written: no space left"):
            models.save_bert(model, tmp_path / "saved", labels=["c", "d"])
        assert models.read_labels(tmp_path / "saved") == ["a", "b"]
        assert_same_weights(models.load_bert(tmp_path / "saved"), model)

    @pytest.mark.parametrize("labels", [None, ["a"], {"0": "a", "2": "b"}, {"0": None}])
    def test_labels_that_cannot_be_read(self, tmp_path, labels):
        with pytest.raises(DataError, match="config.json has no id2label"):
            models.read_labels(write_bert(tmp_path, id2label=labels))


class TestTokenizer:
    def test_byte_level(self, tmp_path):
        tokenizer = models.load_tokenizer(write_encoder(tmp_path, "roberta"))
        named = [BYTES[token] for token in tokenizer.encode("a films <mask>").ids]
        assert named == ["<s>", "a", "Ġfilm", "s", "Ġ", "<mask>", "</s>"]
        rows = models.tokenize(tokenizer, ["a fine films", "film", ""], 5)
        named = [[BYTES[token] for token in row] for row in rows]
        assert named == [
            ["<s>", "a", "Ġfine", "Ġfilm", "</s>"],
            ["<s>", "film", "</s>", "<pad>", "<pad>"],
            ["<s>", "</s>", "<pad>", "<pad>", "<pad>"],
        ]
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        again = models.load_tokenizer(tmp_path)
        np.testing.assert_array_equal(models.tokenize(again, ["a fine films", "film", ""], 5), rows)

    def test_space_before_the_first_word(self, tmp_path):
        folder = write_encoder(tmp_path, "roberta")
        (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
        tokens = models.load_tokenizer(folder).encode("fine").tokens
        assert tokens == ["<s>", "Ġfine", "</s>"]

    def test_missing_and_damaged_files(self, tmp_path):
        folder = write_encoder(tmp_path, "roberta")
        (folder / "vocab.json").write_text(json.dumps({"a": 0, "<pad>": 1}))
        (folder / "merges.txt").write_text("")
        with pytest.raises(DataError, match="vocab.json lacks the token <unk>"):
            models.load_tokenizer(folder)
        (folder / "vocab.json").write_text("[" * 100_000)
        with pytest.raises(DataError, match="vocab.json is damaged"):
            models.load_tokenizer(folder)
        (folder / "merges.txt").unlink()
        with pytest.raises(DataError, match="no merges.txt in"):
            models.load_tokenizer(folder)

    def test_padding_of_another_model(self, tmp_path):
        folder = write_encoder(tmp_path, "roberta")
        config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 0}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="pads with token 1, but config.json.*pad_token_id=0"):
            models.load_tokenizer(folder)
        config["model_type"] = "llama"
        (folder / "config.json").write_text(json.dumps(config))
        models.load_tokenizer(folder)

    def test_none_at_all(self, tmp_path):
        tokenizer = models.load_tokenizer(write_encoder(tmp_path, "distilbert"))
        assert models.tokenize(tokenizer, ["a"], 4).tolist() == [[3, WORDS.index("a"), 4, 0]]
        text = tokenizer.to_str().replace("[PAD]", "[GAP]")
        other = type(tokenizer).from_str(text)
        with pytest.raises(ValueError, match=r"no token \[PAD\] or <pad>"):
            models.tokenize(other, ["a"], 4)
