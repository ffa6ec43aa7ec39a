"""Pretrained encoders: modules, weights, tokenizers and examples from files, verified files."""

from priorityprop_jax.models.bert import (
    BertBlock,
    BertClassifier,
    BertClassifierHead,
    BertConfig,
    BertEmbeddings,
)
from priorityprop_jax.models.files import DataError, DataFile, read_file
from priorityprop_jax.models.tensors import read_tensors, write_tensors
from priorityprop_jax.models.texts import Texts, labels_of, read_texts
from priorityprop_jax.models.tokenizer import load_tokenizer, tokenize
from priorityprop_jax.models.weights import find_minilm, load_bert, read_labels, save_bert

__all__ = [
    "BertBlock",
    "BertClassifier",
    "BertClassifierHead",
    "BertConfig",
    "BertEmbeddings",
    "DataError",
    "DataFile",
    "Texts",
    "find_minilm",
    "labels_of",
    "load_bert",
    "load_tokenizer",
    "read_file",
    "read_labels",
    "read_tensors",
    "read_texts",
    "save_bert",
    "tokenize",
    "write_tensors",
]
