"""The tokenizer of a BERT: texts to rows of token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from priorityprop_jax.models.files import DataError, needed, package, read_json

if TYPE_CHECKING:
    import tokenizers


def load_tokenizer(directory: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Loads the tokenizer of a BERT; it neither pads nor truncates, as `tokenize` does.

    Args:
      directory: holds `tokenizer.json`; or else `vocab.txt`, one token a line, whose texts are
        lower-cased unless `tokenizer_config.json` says `"do_lower_case": false`.

    Raises:
      DataError: both files are missing, or one is damaged.
      ImportError: the package `tokenizers` is not installed.
    """
    package("tokenizers", "a BERT's texts need the package tokenizers", "finetune")
    from tokenizers import Tokenizer

    directory = Path(directory)
    path = needed(directory, "tokenizer.json", "vocab.txt")
    try:
        json = path.suffix == ".json"
        tokenizer = Tokenizer.from_file(str(path)) if json else _wordpiece(path)
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(f"{path} is damaged: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    r"""Turns texts into rows of token ids, all of one length.

    Args:
      tokenizer: from `load_tokenizer`. It is left without padding and truncation.
      texts: one for each row.
      length: tokens in a row, with the `[CLS]` before and the `[SEP]` after each text, which is
        cut at its end or filled up with `[PAD]`.

    Returns:
      int32 `[rows, length]`.

    Raises:
      ValueError: `length` leaves no room for a text, or the tokenizer has no `[PAD]`.
      TypeError: `texts` is one string.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "##s"]
      ...     _ = (Path(folder) / "vocab.txt").write_text("\n".join(words))
      ...     tokenizer = load_tokenizer(folder)
      >>> tokenizer.encode("A fine FILMS").tokens
      ['[CLS]', 'a', 'fine', 'film', '##s', '[SEP]']
      >>> tokenize(tokenizer, ["a fine film", "fine"], 4)
      array([[2, 5, 6, 3],
             [2, 6, 3, 0]], dtype=int32)
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of them")
    least = tokenizer.num_special_tokens_to_add(False) + 1
    if length < least:
        raise ValueError(f"length is {length}, at least {least} is needed")
    pad = tokenizer.token_to_id("[PAD]")
    if pad is None:
        raise ValueError("the tokenizer has no token [PAD]")
    tokenizer.enable_truncation(length)
    try:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    finally:
        tokenizer.no_truncation()
    full = [row + [pad] * (length - len(row)) for row in rows]
    return np.array(full, np.int32).reshape(-1, length)


def _wordpiece(path: Path) -> tokenizers.Tokenizer:
    """What `tokenizer.json` holds for a BERT, put together from the list of its tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    config = read_json(path.with_name("tokenizer_config.json"), {})
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    # Any: in some releases the type stubs take its properties for read-only.
    tokenizer: Any = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    ids = {token: tokenizer.token_to_id(token) for token in special}
    known = {token: i for token, i in ids.items() if i is not None}
    missing = [token for token in special[:4] if token not in known]
    if missing:
        raise DataError(f"{path} lacks the token {missing[0]}")
    tokenizer.add_special_tokens(list(known))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", known["[SEP]"]), ("[CLS]", known["[CLS]"])
    )
    return tokenizer
