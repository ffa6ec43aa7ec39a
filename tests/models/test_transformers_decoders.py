"""Decoders beside those of `transformers`, which is no dependency: skipped where it is absent.

To run them, in an environment of its own: `pip install torch transformers`.
"""

from __future__ import annotations

import importlib.util

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


@pytest.mark.parametrize("kind", ["llama", "smollm", "mistral", "qwen2", "qwen3"])
def test_what_we_write(tmp_path, kind):
    model = small(kind)
    models.save_decoder(model, tmp_path)
    np.testing.assert_allclose(theirs(tmp_path), model(tokens(2, 12)), rtol=1e-4, atol=1e-4)
