"""Text from a decoder."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.models.decoder import Decoder
from priorityprop_jax.models.hub import Language
from priorityprop_jax.models.tokenizer import check_tokens

_STEP = nnx.jit(lambda model, tokens, cache, at: model.step(tokens, cache, at))


def generate(
    model: Decoder,
    language: Language,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Goes on with a prompt, piece by piece, until the model ends the text.

    Args:
      model: the decoder.
      language: its words.
      prompt: what to go on with.
      tokens: at most so many.
      temperature: the likeliest token is taken at 0; above, tokens are drawn by their
        probabilities to the power of ``1 / temperature``.
      seed: of what is drawn.

    Yields:
      Pieces of the text.

    Raises:
      ValueError: the prompt is empty, the context does not hold it and `tokens` more, the model
        tells classes, or an option is out of range.
    """
    if tokens < 1 or not 0 <= temperature < np.inf:
        raise ValueError(f"tokens is {tokens} and temperature {temperature}: at least 1 and 0")
    if model.config.classes:
        raise ValueError("the model tells classes by a head, and cannot write")
    given = language.encode(prompt)
    context = model.config.max_position_embeddings
    if not given:
        raise ValueError("the prompt is empty")
    check_tokens([given], model.config.vocab_size)
    if len(given) + tokens > context:
        raise ValueError(
            f"the prompt has {len(given)} tokens, and with {tokens} more it is longer than the "
            f"model's context of {context}"
        )
    # Few shapes: what pads the prompt is overwritten, token by token.
    padded = min(-(-len(given) // 32) * 32, context)
    cache = model.empty_cache(1, min(-(-(padded + tokens) // 32) * 32, context))
    row = np.zeros((1, padded), np.int32)
    row[0, : len(given)] = given
    (hidden, weight), cache = _STEP(model, jnp.asarray(row), cache, 0)
    hidden, key = hidden[0, len(given) - 1], jax.random.key(seed)
    found: list[int] = []
    shown = ""
    for i in range(tokens):
        logits = (weight @ hidden).astype(jnp.float32)
        if temperature:
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        else:
            token = jnp.argmax(logits)
        found.append(int(token))
        if found[-1] == language.end:
            return
        text = language.decode(found)
        # The last bytes may be half a letter.
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
        next_row = jnp.asarray([[found[-1]]], jnp.int32)
        (hidden, weight), cache = _STEP(model, next_row, cache, len(given) + i)
        hidden = hidden[0, 0]
