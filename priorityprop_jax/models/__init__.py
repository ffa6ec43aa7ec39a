"""Pretrained encoders and decoders: modules, weights, tokenizers and texts, of files."""

from priorityprop_jax.models.bert import (
    BertBlock,
    BertClassifier,
    BertClassifierHead,
    BertConfig,
    BertEmbeddings,
)
from priorityprop_jax.models.decoder import (
    Decoder,
    DecoderBlock,
    DecoderConfig,
    DecoderHead,
    DecoderOutput,
    DecoderTop,
)
from priorityprop_jax.models.files import DataError, DataFile, read_file
from priorityprop_jax.models.generate import generate
from priorityprop_jax.models.hub import Language, load_decoder, load_language, save_decoder
from priorityprop_jax.models.lora import add_lora, merge_lora
from priorityprop_jax.models.packages import find_model, get_model
from priorityprop_jax.models.prompts import (
    answer_loss,
    answer_rows,
    class_rows,
    label_logits,
    label_tokens,
)
from priorityprop_jax.models.tensors import read_tensors, write_tensors
from priorityprop_jax.models.texts import Texts, labels_of, read_texts
from priorityprop_jax.models.tokenizer import load_tokenizer, tokenize
from priorityprop_jax.models.weights import load_bert, read_labels, save_bert

__all__ = [
    "BertBlock",
    "BertClassifier",
    "BertClassifierHead",
    "BertConfig",
    "BertEmbeddings",
    "DataError",
    "DataFile",
    "Decoder",
    "DecoderBlock",
    "DecoderConfig",
    "DecoderHead",
    "DecoderOutput",
    "DecoderTop",
    "Language",
    "Texts",
    "add_lora",
    "answer_loss",
    "answer_rows",
    "class_rows",
    "find_model",
    "generate",
    "get_model",
    "label_logits",
    "label_tokens",
    "labels_of",
    "load_bert",
    "load_decoder",
    "load_language",
    "load_tokenizer",
    "merge_lora",
    "read_file",
    "read_labels",
    "read_tensors",
    "read_texts",
    "save_bert",
    "save_decoder",
    "tokenize",
    "write_tensors",
]
