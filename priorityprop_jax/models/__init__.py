"""Pretrained encoders: modules, weights and tokenizers from files, and verified data files."""

from priorityprop_jax.models.bert import (
    BertBlock,
    BertClassifier,
    BertClassifierHead,
    BertConfig,
    BertEmbeddings,
)
from priorityprop_jax.models.files import DataError, DataFile, read_file
from priorityprop_jax.models.tensors import read_tensors, write_tensors
from priorityprop_jax.models.tokenizer import load_tokenizer, tokenize
from priorityprop_jax.models.weights import find_minilm, load_bert

__all__ = [
    "BertBlock",
    "BertClassifier",
    "BertClassifierHead",
    "BertConfig",
    "BertEmbeddings",
    "DataError",
    "DataFile",
    "find_minilm",
    "load_bert",
    "load_tokenizer",
    "read_file",
    "read_tensors",
    "tokenize",
    "write_tensors",
]
