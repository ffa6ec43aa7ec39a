"""Decoders beside those of `transformers`, which is no dependency: skipped where it is absent.

To run them, in an environment of its own: `pip install torch transformers`.
"""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from priorityprop_jax import models
from tests.models.test_decoder import LLAMA3, small, tokens

absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
# Their own warnings are no matter of ours.
pytestmark = [
    pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}"),
    pytest.mark.filterwarnings("ignore"),
]
WIDE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONFIGS = {
    "Llama": {"rope_scaling": LLAMA3 | {"rope_theta": 500.0}, "attention_bias": True},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
}


def theirs(folder):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(tokens(2, 12)))).logits.numpy()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shard", ["100GB", "10KB"])
def test_what_they_write(tmp_path, kind, shard):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WIDE, **CONFIGS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # The norms and biases, too.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    ours = models.load_decoder(tmp_path)(tokens(2, 12))
    np.testing.assert_allclose(ours, theirs(tmp_path), rtol=1e-4, atol=1e-4)


def their_classes(folder):
    """What their pipeline makes of two texts of other lengths, by label, and ours."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = np.array([[3, 4, 5, 6], [7, 8, 0, 0]])  # 0 is the padding
    with torch.no_grad():
        return model.config.id2label, model(torch.tensor(rows)).logits.numpy()


@pytest.mark.parametrize("kind", CONFIGS)
def test_heads_that_tell_classes(tmp_path, kind):
    import torch
    import transformers

    torch.manual_seed(0)
    labels = {0: "good", 1: "bad", 2: "so so"}
    config = getattr(transformers, f"{kind}Config")(
        **WIDE, **CONFIGS[kind], id2label=labels, pad_token_id=0
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(tmp_path)
    ours = models.load_decoder(tmp_path)
    found = np.stack([ours(np.array([[3, 4, 5, 6]]))[0, -1], ours(np.array([[7, 8]]))[0, -1]])
    names, expected = their_classes(tmp_path)
    assert names == labels
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    models.save_decoder(ours, tmp_path / "ours", labels=list(labels.values()))
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 0}))
    names, again = their_classes(tmp_path / "ours")
    assert names == labels
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "smollm", "mistral", "qwen2", "qwen3"])
def test_what_we_write(tmp_path, kind):
    model = small(kind)
    models.save_decoder(model, tmp_path)
    np.testing.assert_allclose(theirs(tmp_path), model(tokens(2, 12)), rtol=1e-4, atol=1e-4)
