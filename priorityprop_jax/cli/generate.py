"""The command `priorityprop generate`: text from a decoder, to look at what it has learnt."""

from __future__ import annotations

import argparse
from typing import Any

from priorityprop_jax.cli import tuning
from priorityprop_jax.cli.runs import Failure, number, told, whole

TEXT = "Goes on with a prompt, with a model that was fine-tuned or any decoder."
POSITIONAL: dict[str, dict[str, Any]] = {
    "model": {"metavar": "RUN", "help": "folder of a run, or a model as finetune takes it"},
    "prompt": {"metavar": "PROMPT", "help": "the beginning of the text"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tokens": {"type": whole(1), "default": 64, "help": "at most so many"},
    "temperature": {
        "type": number(float, 0), "help": "draw tokens by their probabilities (default: take the "
        "likeliest)"
    },
    "chat": {"action": "store_true", "help": "put the prompt to the model as a user's message"},
    "seed": {"type": whole(0), "default": 0, "help": "of what is drawn"},
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    from priorityprop_jax.models import generate, load_decoder, load_language

    arguments.model = tuning.path_or_name(arguments.model)
    path = tuning.model_path(arguments)
    path = path / "model" if (path / "model").is_dir() else path
    if path.is_dir() and not tuning.is_decoder(path):
        raise Failure(f"{path} holds no decoder, which alone can write")
    with told(ValueError):
        model, language = load_decoder(path), load_language(path)
        prompt = arguments.prompt
        prompt.encode()  # before the tokenizer, whose error of half a character says little
        if arguments.chat:
            prompt = language.chat([{"role": "user", "content": prompt}], answer=True)
        options = {name: getattr(arguments, name) for name in ("tokens", "seed")}
        options["temperature"] = arguments.temperature or 0.0
        print(arguments.prompt, end="\n" if arguments.chat else "", flush=True)
        pieces = generate(model, language, prompt, **options)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0
