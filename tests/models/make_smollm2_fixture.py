"""Writes smollm2_logits.json: SmolLM2's logits by `transformers`, to be run once.

In an environment with torch, transformers and this package: python -m
tests.models.make_smollm2_fixture
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from priorityprop_jax import models

TEXT = "Water boils at 100 degrees. The capital of Italy is Rome; the capital of France is"


def main() -> None:
    import torch
    import transformers

    path = models.get_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        models.save_decoder(models.load_decoder(path), folder, models.load_language(path))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].numpy()
    places, columns = [0, len(ids) // 2, len(ids) - 1], list(range(0, logits.shape[1], 4000))
    stored = {
        "text": TEXT,
        "tokens": ids,
        "places": places,
        "columns": columns,
        "logits": np.round(logits[places][:, columns].astype(float), 5).tolist(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    out = Path(__file__).with_name("smollm2_logits.json")
    out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
