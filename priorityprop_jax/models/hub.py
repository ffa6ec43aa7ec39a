"""Decoders in the files of the Hugging Face hub or in GGUF: weights, tokenizers and chats."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.models.decoder import Decoder, DecoderConfig
from priorityprop_jax.models.files import DataError, needed, package, read_json, written
from priorityprop_jax.models.gguf import open_gguf
from priorityprop_jax.models.tensors import read_tensors, write_tensors
from priorityprop_jax.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import tokenizers

# What the files call the layers of a block.
_LAYERS = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_HEAD = "score.weight"
_ENDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return Path(path).suffix.lower() == ".gguf"


def load_decoder(
    path: str | os.PathLike[str],
    *,
    classes: int | None = None,
    dtype: Any = None,
    remat: str = "none",
    seed: int = 0,
) -> Decoder:
    """Loads a pretrained decoder: Llama, Mistral, Qwen 2 or 3, SmolLM2.

    Args:
      path: a folder with `config.json` and `model.safetensors`, or its shards and their index, by
        the names of the Hugging Face hub; or a GGUF file, whose weights are dequantized.
      classes: puts a head that tells so many classes in the place of the output layer; by default
        there is one if `save_decoder` or `transformers` wrote one (`LlamaForSequenceClassification`
        and its like). A head that was saved with another number gives way to a fresh one.
      dtype: of the computation; see `Decoder`.
      remat: see `Decoder`.
      seed: of a fresh head's weights.

    Returns:
      The model; its weights are float32, whatever the file holds.

    Raises:
      ValueError: the configuration is not supported, `classes` is below 1, or a tensor is missing
        or has another shape than it says.
      DataError: a file is missing or damaged.
      ImportError: the package `safetensors` or `gguf` is not installed.
    """
    path = Path(path)
    if is_gguf(path):
        file = open_gguf(path)
        contents, tensors = file.config(), file.tensors()
    else:
        contents, tensors = read_json(needed(path, "config.json")), read_tensors(path)
    try:
        saved = config = DecoderConfig.from_dict(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if classes is not None:
        config = dataclasses.replace(config, classes=classes)
    make = lambda: Decoder(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))  # noqa: E731
    model = nnx.eval_shape(make)
    for name, variable, turn, stacked in _variables(model):
        if name == _HEAD and config != saved:
            init = nnx.initializers.normal(config.initializer_range)
            variable.set_value(init(jax.random.key(seed), variable.shape))
            continue
        rows = range(config.num_hidden_layers) if stacked else [None]
        shape = variable.shape[stacked:][:: -1 if turn else 1]
        found = [_tensor(tensors, name.format(row), shape, path) for row in rows]
        value = np.stack(found) if stacked else found[0]
        value = np.swapaxes(value, -1, -2) if turn else value
        variable.set_value(jnp.asarray(value, jnp.float32))
    return model


def save_decoder(
    model: Decoder,
    directory: str | os.PathLike[str],
    language: Language | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """Writes a decoder into a folder, as `load_decoder` and `transformers` read it.

    Args:
      model: the decoder.
      directory: is made where it does not exist.
      language: what goes beside it, if anything.
      labels: names of the classes that a head tells; by default `LABEL_0`, `LABEL_1` and so on.

    Raises:
      ValueError: `labels` are not as many as the classes.
    """
    contents = {**model.config.as_dict(), "torch_dtype": "float32"}
    if labels is not None:
        if len(labels) != model.config.classes:
            raise ValueError(f"{len(labels)} labels, and the model has {model.config.classes}")
        contents["id2label"] = {str(i): label for i, label in enumerate(labels)}
        contents["label2id"] = {label: i for i, label in enumerate(labels)}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, variable, turn, stacked in _variables(model):
        value = np.asarray(jax.device_get(variable[...]))
        for row, part in enumerate(value if stacked else [value]):
            # What is transposed has to be laid out anew.
            tensors[name.format(row)] = np.ascontiguousarray(part.T if turn else part)
    write_tensors(directory / "model.safetensors", tensors)
    if language is not None:
        if model.config.classes:  # `transformers` tells the last token of a text by its padding
            language = language._replace(pad_token=language.pad_token or language.eos_token)
        config = {k: v for k, v in language._asdict().items() if k != "tokenizer" and v}
        for name in ("eos", "bos", "pad"):
            if token := config.get(f"{name}_token"):
                contents[f"{name}_token_id"] = language.tokenizer.token_to_id(token)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        written(directory / "tokenizer.json", language.tokenizer.to_str())
        written(directory / "tokenizer_config.json", json.dumps(config, indent=2))
    # Last, as it tells that the folder is whole.
    written(directory / "config.json", json.dumps(contents, indent=2))


def _variables(model: Decoder) -> Iterator[tuple[str, Any, bool, bool]]:
    """For every weight its name in the files, with a place for the number of a block; the variable;
    whether it is transposed; whether it is one of all blocks.
    """  # noqa: D205
    yield "model.embed_tokens.weight", model.embed.embedding, False, False
    for ours, theirs in _LAYERS.items():
        for kind, end in _ENDS.items():
            variable = getattr(getattr(model.blocks.block, ours, None), kind, None)
            if variable is not None:
                yield f"model.layers.{{}}.{theirs}.{end}", variable, kind == "kernel", True
    yield "model.norm.weight", model.head.norm.scale, False, False
    if not model.config.tied:
        yield _HEAD if model.config.classes else "lm_head.weight", model.head.weight, False, False


def _tensor(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], path: Path
) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{path} has no tensor {name}")
    if (found := tensors[name]).shape != shape:
        raise ValueError(
            f"{path}: tensor {name} is of shape {found.shape}, the configuration asks for {shape}"
        )
    return found


class Language(NamedTuple):
    """The words of a language model: its tokenizer, special tokens, and how it writes a chat."""

    tokenizer: tokenizers.Tokenizer
    eos_token: str  # ends a text
    bos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None  # Jinja

    @property
    def end(self) -> int:
        """The token that ends a text."""
        token: Any = self.tokenizer.token_to_id(self.eos_token)
        return token

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts in front."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(list(tokens))

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = False) -> str:
        """Messages as the model's template writes them; with `answer` up to where it answers.

        Raises:
          ValueError: there is no template, or it refuses the messages.
          ImportError: the package `jinja2` is not installed.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template, so that it cannot learn messages")
        jinja2 = package("jinja2.sandbox", "a chat needs the package jinja2", "finetune")

        def refuse(message: str) -> None:
            raise ValueError(message)

        try:
            environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            environment.globals["raise_exception"] = refuse
            words = {"bos_token": self.bos_token or "", "eos_token": self.eos_token}
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=answer, **words)
        # A template is a program, which may fail in any way.
        except Exception as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def load_language(path: str | os.PathLike[str]) -> Language:
    """Loads the words of a language model from the folder or GGUF file of a decoder.

    Raises:
      ValueError: what it says is not supported.
      DataError: a file is missing or damaged.
      ImportError: a package is not installed.
    """
    path = Path(path)
    if is_gguf(path):
        file = open_gguf(path)
        tokenizer, words = file.tokenizer(), file.words()
    else:
        tokenizer = load_tokenizer(path)
        words = read_json(path / "tokenizer_config.json", {})
        if (template := path / "chat_template.jinja").is_file():
            words["chat_template"] = template.read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    for name in ("eos_token", "bos_token", "pad_token"):
        token = words.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            found[name] = token
    if "eos_token" not in found:
        raise DataError(f"{path} does not say which token ends a text (eos_token)")
    template = words.get("chat_template")
    found["chat_template"] = template if isinstance(template, str) else None
    return Language(tokenizer, **found)
