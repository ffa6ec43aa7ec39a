"""The tokenizer of an encoder: texts to rows of token ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from priorityprop_jax.models.bert import ENCODERS
from priorityprop_jax.models.files import DataError, needed, package, read_json

if TYPE_CHECKING:
    import tokenizers

# A tokenizer is in one of the first three; what the others say goes with it.
FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


def check_tokens(rows: Iterable[Any], vocabulary: int) -> None:
    """Raises a DataError for a token id that a model of so many tokens has no embedding of."""
    most = max((int(np.max(row)) for row in rows if len(row)), default=0)
    if most >= vocabulary:
        raise DataError(
            f"the tokenizer makes tokens up to {most}, and the model knows {vocabulary}: "
            "the files of another model's tokenizer lie beside it"
        )


def load_tokenizer(directory: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Loads the tokenizer of an encoder; it neither pads nor truncates, as `tokenize` does.

    Args:
      directory: holds `tokenizer.json`; or else a BERT's `vocab.txt`, one token a line, whose texts
        are lower-cased unless `tokenizer_config.json` says `"do_lower_case": false`; or else a
        RoBERTa's `vocab.json` and `merges.txt`.

    Raises:
      ValueError: `config.json` is there and takes another token for the padding.
      DataError: the files are missing, or one is damaged.
      ImportError: the package `tokenizers` is not installed.
    """
    package("tokenizers", "a model's texts need the package tokenizers", "finetune")
    from tokenizers import Tokenizer

    directory = Path(directory)
    path = needed(directory, *FILES[:3])
    makers = {"vocab.txt": _wordpiece, "vocab.json": _byte_level}
    try:
        maker = makers.get(path.name)
        tokenizer = maker(path) if maker else Tokenizer.from_file(str(path))
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(f"{path} is damaged: {error}") from error
    config = read_json(directory / "config.json", {})
    pad, expected = _padding(tokenizer), config.get("pad_token_id")
    # A decoder's may differ: it is not told by its padding which tokens are none.
    encoder = config.get("model_type") in list(ENCODERS)
    if encoder and pad is not None and expected not in (None, pad):
        raise ValueError(
            f"{path} pads with token {pad}, but config.json with pad_token_id={expected}; "
            "one of them belongs to another model"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    r"""Turns texts into rows of token ids, all of one length.

    Args:
      tokenizer: from `load_tokenizer`. It is left without padding and truncation.
      texts: one for each row.
      length: tokens in a row, with the tokenizer's own before and after each text, such as `[CLS]`
        and `[SEP]`; a text is cut at its end or filled up with `[PAD]` or `<pad>`.

    Returns:
      int32 `[rows, length]`.

    Raises:
      ValueError: `length` leaves no room for a text, or the tokenizer has no such padding.
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
    return cut_rows(tokenizer, texts, length)[0]


def cut_rows(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, int]:
    """What `tokenize` returns, and how many texts were cut."""
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of them")
    least = tokenizer.num_special_tokens_to_add(False) + 1
    if length < least:
        raise ValueError(f"length is {length}, at least {least} is needed")
    pad = _padding(tokenizer)
    if pad is None:
        raise ValueError("the tokenizer has no token [PAD] or <pad>")
    tokenizer.enable_truncation(length)
    try:
        found = tokenizer.encode_batch(list(texts))
    finally:
        tokenizer.no_truncation()
    full = [row.ids + [pad] * (length - len(row.ids)) for row in found]
    cut = sum(bool(row.overflowing) for row in found)
    return np.array(full, np.int32).reshape(-1, length), cut


def _padding(tokenizer: tokenizers.Tokenizer) -> int | None:
    ids = [tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>")]
    return next((i for i in ids if i is not None), None)


def _wordpiece(path: Path) -> tokenizers.Tokenizer:
    """What `tokenizer.json` holds for a BERT, put together from the list of its tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    config = read_json(path.with_name("tokenizer_config.json"), {})
    # Any: in some releases the type stubs take its properties for read-only.
    tokenizer: Any = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    ids = _special(tokenizer, path, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "[MASK]")
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    return tokenizer


def _byte_level(path: Path) -> tokenizers.Tokenizer:
    """What `tokenizer.json` holds for a RoBERTa, put together from its tokens and their pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    config = read_json(path.with_name("tokenizer_config.json"), {})
    space = config.get("add_prefix_space", False)
    merges = needed(path.parent, "merges.txt")
    kinds: Any = models  # in some releases the stubs ask for arguments that have defaults
    tokenizer: Any = Tokenizer(kinds.BPE.from_file(str(path), str(merges)))
    ids = _special(tokenizer, path, ("<pad>", "<unk>", "<s>", "</s>"), "<mask>")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=space
    )
    return tokenizer


def _special(tokenizer: Any, path: Path, needed: Sequence[str], mask: str) -> dict[str, int]:
    """Tells the tokenizer which of its tokens no text is made of; their ids."""
    ids = {token: tokenizer.token_to_id(token) for token in (*needed, mask)}
    if missing := [token for token in needed if ids[token] is None]:
        raise DataError(f"{path} lacks the token {missing[0]}")
    known = [token for token, i in ids.items() if i is not None]
    tokenizer.add_special_tokens(known)
    return ids
