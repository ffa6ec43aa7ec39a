"""Encoders beside those of `transformers`, which is no dependency: skipped where it is absent.

To run them, in an environment of its own: `pip install torch transformers`.
"""

from __future__ import annotations

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax import models
from tests.models.test_bert import WORDS, apply
from tests.models.test_encoders import BYTES, PAIRS

absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
# Their own warnings are no matter of ours.
pytestmark = [
    pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = {"vocab_size": 30, "initializer_range": 0.2, "max_position_embeddings": 16}
WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
CONFIGS = {
    "Bert": WIDE,
    "Roberta": WIDE | {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "XLMRoberta": WIDE | {"type_vocab_size": 1, "hidden_act": "relu"},
    "DistilBert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24},
}


@pytest.fixture(params=CONFIGS)
def theirs(request):
    """A random encoder of `transformers`, as it goes into a folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **CONFIGS[request.param])
    model = getattr(transformers, f"{request.param}Model")(config).eval()
    with torch.no_grad():  # The norms and biases, too.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(pad: int):
    tokens = np.array([[5, 6, 7, 8, 9, 2], [5, 6, 2, pad, pad, pad], [5, 6, 7, 2, pad, pad]])
    return tokens, tokens != pad


def hidden_states(model, tokens, mask) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        out = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True
        )
    return [state.numpy() for state in out.hidden_states]


def test_hidden_states(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = models.load_bert(tmp_path)
    tokens, mask = inputs(ours.config.pad_token_id)
    _, found = apply(ours, jnp.asarray(tokens))
    expected = hidden_states(theirs, tokens, mask)
    worst = max(np.abs(one - other)[mask].max() for one, other in zip(found, expected, strict=True))
    print(f"{theirs.config.model_type}: hidden states differ by at most {worst:.1e}")
    assert worst < 1e-5


def test_they_read_what_is_saved(theirs, tmp_path):
    import transformers

    theirs.save_pretrained(tmp_path / "theirs")
    ours = models.load_bert(tmp_path / "theirs", classes=3)
    models.save_bert(ours, tmp_path / "ours", labels=["a", "b", "c"])
    again, info = transformers.AutoModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert all("pooler" in name for name in info["missing_keys"])
    assert set(info["unexpected_keys"]) == {"mean_classifier.weight", "mean_classifier.bias"}
    assert not info["mismatched_keys"] and again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert type(again) is type(theirs)
    tokens, mask = inputs(ours.config.pad_token_id)
    both = (hidden_states(model.eval(), tokens, mask) for model in (theirs, again))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tokens_are_theirs(tmp_path):
    from transformers import BertTokenizerFast, RobertaTokenizerFast

    texts = ["a fine films", " film  a", "fine", "", "a <mask> film"]
    roberta, bert = tmp_path / "roberta", tmp_path / "bert"
    roberta.mkdir(), bert.mkdir()
    (roberta / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(BYTES)}))
    (roberta / "merges.txt").write_text("\n".join(["#version: 0.2", *PAIRS, ""]))
    (bert / "vocab.txt").write_text("\n".join(WORDS))
    for folder, kind in ((roberta, RobertaTokenizerFast), (bert, BertTokenizerFast)):
        tokenizer = kind.from_pretrained(folder)
        expected = tokenizer(texts, padding="max_length", truncation=True, max_length=6)
        tokenizer.save_pretrained(folder / "saved")
        for place in (folder, folder / "saved"):
            found = models.tokenize(models.load_tokenizer(place), texts, 6)
            np.testing.assert_array_equal(found, expected["input_ids"])
