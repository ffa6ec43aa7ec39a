"""Weights of a pretrained encoder, as they lie in a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.models.bert import BertClassifier, BertConfig
from priorityprop_jax.models.files import DataError, needed, read_json, written
from priorityprop_jax.models.tensors import read_tensors, write_tensors
from priorityprop_jax.models.tokenizer import FILES

# What the files call the layers of the embeddings and of a block, and their parameters; the second
# name of a parameter is an old one.
_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
}
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTILBERT = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp_in": "ffn.lin1",
    "mlp_out": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_PARAMETERS: dict[type, dict[str, tuple[str, ...]]] = {
    nnx.Embed: {"embedding": ("weight",)},
    nnx.Linear: {"kernel": ("weight",), "bias": ("bias",)},
    nnx.LayerNorm: {"scale": ("weight", "gamma"), "bias": ("bias", "beta")},
}
# Ours: a classifier of the hub's reads the first token, this one the mean over all.
_HEAD = "mean_classifier"


def load_bert(
    directory: str | os.PathLike[str],
    *,
    classes: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> BertClassifier:
    """Loads a pretrained BERT, RoBERTa or DistilBERT, with a head to classify with.

    Args:
      directory: holds `config.json` and `model.safetensors`, or its parts and their index, with the
        names of the Hugging Face hub: with or without `bert.` before them, with `weight` and `bias`
        or `gamma` and `beta` in the LayerNorms. Other tensors, such as a pooler or a head that
        `save_bert` did not write, are ignored.
      classes: number of classes; by default those of the head that `save_bert` wrote, or else 2.
        A head that was saved with another number gives way to a fresh one.
      dropout: rate, in every place where a BERT has it; those of `config.json` are not taken.
      seed: of a fresh head's weights, which do not depend on the rate, and of the dropout.

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
    prefix = _prefix(config) if any(name.startswith(_prefix(config)) for name in tensors) else ""

    def take(names: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
        name = next((name for name in names if name in tensors), None)
        if name is None:
            raise ValueError(f"{directory} has no tensor {' or '.join(names)}")
        if (found := tensors[name]).shape != shape:
            raise ValueError(
                f"{directory}: tensor {name} is of shape {found.shape}, the configuration asks for "
                f"{shape}"
            )
        return found

    # What makes it large is held against the files before a model of that size is made.
    for name, rows in _sizes(config):
        take([f"{prefix}{name}.weight"], (rows, config.hidden_size))
    head = tensors.get(f"{_HEAD}.weight")  # [classes, width]
    saved = None if head is None else head.size // config.hidden_size
    classes = classes if classes is not None else saved if saved is not None else 2
    # One stream each: the head of a seed is the same at every rate of dropout.
    rngs = nnx.Rngs(params=seed, dropout=seed)
    model = BertClassifier(config, classes=classes, dropout=dropout, empty=True, rngs=rngs)
    for names, param, turn in _parameters(model, prefix, head=saved == classes):
        found = take(names, param.shape[::-1] if turn else param.shape)
        param.set_value(jnp.asarray(found.T if turn else found))
    return model


def save_bert(
    model: BertClassifier,
    directory: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Writes an encoder and its head into a folder, which `load_bert` reads bit for bit.

    `AutoModel` of `transformers` reads the encoder. The head is a linear layer on the mean over the
    tokens, `mean_classifier.weight` `[classes, width]` and `mean_classifier.bias`; `transformers`,
    whose classifiers read the first token alone, has none like it and leaves it out.

    Args:
      model: the encoder.
      directory: is made where it does not exist.
      labels: names of the classes, for `config.json`; by default `LABEL_0`, `LABEL_1` and so on.
        With one class alone `config.json` says that it is a regression.
      tokenizer: a folder whose tokenizer goes with the model.

    Raises:
      ValueError: `labels` are not as many as there are classes, or two are alike.
      DataError: `tokenizer` holds none, or a file cannot be written.
      ImportError: the package `safetensors` is not installed.
    """
    directory, classes = Path(directory), model.head.out.out_features
    labels = [f"LABEL_{i}" for i in range(classes)] if labels is None else list(labels)
    if len(set(labels)) != classes or len(labels) != classes:
        raise ValueError(f"labels are {labels}, one for each of {classes} classes is needed")
    files = []
    if tokenizer is not None:
        source = needed(Path(tokenizer), *FILES[:3]).parent
        files = [source / name for name in FILES if (source / name).is_file()]
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for names, param, turn in _parameters(model, _prefix(model.config), head=True):
        value = np.asarray(jax.device_get(param[...]))
        tensors[names[0]] = value.T if turn else value
    write_tensors(directory / "model.safetensors", tensors)
    for file in files:
        written(directory / file.name, partial(shutil.copyfile, file))
    contents = {
        **model.config.contents(),
        "problem_type": "regression" if classes == 1 else "single_label_classification",
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    # Last, as it tells that the folder is whole.
    written(directory / "config.json", json.dumps(contents, indent=2))


def read_labels(directory: str | os.PathLike[str]) -> list[str]:
    """The names of the classes of a folder of `save_bert` or `save_decoder`, in their order.

    Raises:
      DataError: its `config.json` is missing or damaged, or has none.
    """
    path = needed(Path(directory), "config.json")
    labels = read_json(path).get("id2label")
    if not isinstance(labels, dict) or any(labels.get(str(i)) is None for i in range(len(labels))):
        raise DataError(f"{path} has no id2label with the names of classes 0, 1 and so on")
    return [str(labels[str(i)]) for i in range(len(labels))]


def _prefix(config: BertConfig) -> str:
    """What comes before the names of an encoder that is a part of something."""
    return config.model_type.removeprefix("xlm-") + "."


def _layer(config: BertConfig, attribute: str, block: int | None = None) -> str:
    """What the files call a layer of the embeddings or of a block, without the prefix."""
    if block is None:
        return f"embeddings.{_EMBEDDINGS[attribute]}"
    if config.model_type == "distilbert":
        return f"transformer.layer.{block}.{_DISTILBERT[attribute]}"
    return f"encoder.layer.{block}.{_BERT[attribute]}"


def _sizes(config: BertConfig) -> Iterator[tuple[str, int]]:
    """The layers that tell how large an encoder is, and the rows of their weights."""
    yield _layer(config, "word"), config.vocab_size
    yield _layer(config, "position"), config.max_position_embeddings
    yield _layer(config, "mlp_in", config.num_hidden_layers - 1), config.intermediate_size
    if config.type_vocab_size:
        yield _layer(config, "token_type"), config.type_vocab_size


def _parameters(
    model: BertClassifier, prefix: str, *, head: bool
) -> Iterator[tuple[list[str], nnx.Param, bool]]:
    """The parameters, each with its names in the files, and whether it is transposed there."""
    layers = {
        prefix + _layer(model.config, name): getattr(model.embed, name) for name in _EMBEDDINGS
    }
    for i, block in enumerate(model.blocks):
        layers |= {prefix + _layer(model.config, name, i): getattr(block, name) for name in _BERT}
    if head:
        layers[_HEAD] = model.head.out
    for name, layer in layers.items():
        known = next((ends for kind, ends in _PARAMETERS.items() if isinstance(layer, kind)), {})
        for attribute, ends in known.items():
            names = [f"{name}.{end}" for end in ends]
            yield names, getattr(layer, attribute), attribute == "kernel"
