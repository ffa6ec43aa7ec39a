"""A decoder in one GGUF file: its configuration, its tensors and its tokenizer."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from priorityprop_jax.models.files import DataError, package

if TYPE_CHECKING:
    import tokenizers

# What the file calls the entries of a `config.json`, behind the name of the architecture.
_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How texts are cut before the byte-level BPE, by the name that the file gives.
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {"smollm": None, "gpt-2": "", "llama-bpe": _LLAMA % "{1,3}", "qwen2": _LLAMA % ""}


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """The contents of a file; the last one is kept, as reading the words takes seconds."""
    path = Path(path)
    stat = path.stat() if path.is_file() else None
    return _opened(path, stat and (stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=1)
def _opened(path: Path, version: Any) -> Gguf:
    return Gguf(path)


class Gguf:
    """What a GGUF file holds, by the names of the Hugging Face hub.

    Raises:
      DataError: the file is missing or damaged.
      ImportError: the package `gguf` is not installed.
      ValueError: what it holds is not supported.
    """

    def __init__(self, path: Path):
        gguf = package("gguf", f"{path.name} needs the package gguf", "finetune")
        self.path = path
        if not path.is_file():
            raise DataError(f"{path} is not a file")
        with self._reading():
            reader = gguf.GGUFReader(path)
            self._fields: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._dequantize = gguf.quants.dequantize

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        # The reader checks little, so that a damaged file may raise anything.
        except Exception as error:
            raise DataError(f"{self.path} is damaged: not a whole GGUF file ({error})") from error

    def config(self) -> dict[str, Any]:
        """What a `config.json` would say."""
        kind = self._fields.get("general.architecture")
        config: dict[str, Any] = {"model_type": kind}
        for name, ours in _CONFIG.items():
            config[ours] = self._fields.get(f"{kind}.{name}")
        config["vocab_size"] = len(self._tokens())
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        config["use_sliding_window"] = config["sliding_window"] is not None
        scaling = self._fields.get(f"{kind}.rope.scaling.type", "none")
        if scaling == "linear":
            factor = self._fields.get(f"{kind}.rope.scaling.factor")
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        elif scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path} scales its rotary positions in a way that GGUF files do not say in "
                "full; load the model from a folder with a config.json"
            )
        return config

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors by name, float32."""
        found = {}
        for name, tensor in self._tensors.items():
            *block, part, end = name.split(".")
            if part not in _PARTS:
                continue
            place = f"model.layers.{block[1]}." if len(block) == 2 else ""
            with self._reading():
                value = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
                value = value.reshape(tuple(reversed(tensor.shape.tolist())))
            heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(part)
            if heads and self._fields.get("general.architecture") == "llama":
                # These files pair up neighbours in a head; the hub's, its halves.
                count = self._fields[f"llama.attention.{heads}"]
                value = value.reshape(count, -1, 2, *value.shape[1:]).swapaxes(1, 2)
                value = value.reshape(-1, *value.shape[3:])
            found[f"{place}{_PARTS[part]}.{end}"] = value
        return found

    def _tokens(self) -> list[str]:
        tokens = self._fields.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise DataError(f"{self.path} has no tokens")
        return tokens

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The byte-level BPE of the file."""
        from tokenizers import (
            AddedToken,
            Regex,
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
            processors,
        )  # fmt: skip

        kind, cut = (self._fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        if kind != "gpt2" or cut not in _CUTS:
            raise ValueError(
                f"the tokenizer of {self.path} is {kind!r} with {cut!r}: only gpt2 with "
                f"{', '.join(_CUTS)} is supported; load the model from a folder"
            )
        tokens = self._tokens()
        with self._reading():
            merges = [tuple(pair.split(" ")) for pair in self._fields["tokenizer.ggml.merges"]]
            vocab = {token: i for i, token in enumerate(tokens)}
            tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges))
            first: list[Any] = []
            if cut == "smollm":
                first = [pre_tokenizers.Digits(individual_digits=True)]
            elif _CUTS[cut]:
                first = [pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated")]
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not _CUTS[cut])
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
            tokenizer.decoder = decoders.ByteLevel()
            kinds = self._fields["tokenizer.ggml.token_type"]
            special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
            tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
            if self._fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe"):
                bos = self._fields["tokenizer.ggml.bos_token_id"]
                kinds: Any = processors  # in some releases the stubs ask for more than is needed
                tokenizer.post_processor = kinds.TemplateProcessing(
                    single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
                )
        return tokenizer

    def words(self) -> dict[str, Any]:
        """What a `tokenizer_config.json` would say of special tokens and the chat's template."""
        tokens, found = self._tokens(), {}
        for name in ("bos", "eos", "padding"):
            if (at := self._fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
                found[f"{'pad' if name == 'padding' else name}_token"] = tokens[at]
        if template := self._fields.get("tokenizer.chat_template"):
            found["chat_template"] = template
        return found
