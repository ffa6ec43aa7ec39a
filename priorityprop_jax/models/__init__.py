"""Pretrained models, their tokenizers and weights."""
