"""CIFAR-10 from one file of JPEGs, and a small residual network for it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.suite.workloads import Rows
from priorityprop_jax.cli.tasks import cross_entropy
from priorityprop_jax.models.files import ENV_VAR, DataError, cache_folder

FILE = "cifar10_jpeg.npz"


class ResidualBlock(nnx.Module):
    """Two 3 x 3 convolutions with group normalization, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.norm_1 = nnx.GroupNorm(inputs, num_groups=8, rngs=rngs)
        self.conv_1 = nnx.Conv(inputs, outputs, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm_2 = nnx.GroupNorm(outputs, num_groups=8, rngs=rngs)
        self.conv_2 = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.skip = nnx.data(
            nnx.Conv(inputs, outputs, (1, 1), stride, use_bias=False, rngs=rngs)
            if stride > 1 or inputs != outputs
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm_1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv_2(nnx.relu(self.norm_2(self.conv_1(h))))


class SmallResNet(nnx.Module):
    """A stem, three groups of residual blocks at 32, 16 and 8 pixels, and a linear layer.

    Args:
      width: channels of the first group, doubled in each further one.
      depth: blocks in a group.
      rngs: of the weights.
    """

    def __init__(self, *, width: int = 32, depth: int = 2, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        blocks, channels = [], width
        for group in range(3):
            for i in range(depth):
                stride, outputs = (2 if group and i == 0 else 1), width * 2**group
                blocks.append(ResidualBlock(channels, outputs, stride, rngs=rngs))
                channels = outputs
        self.blocks = nnx.List(blocks)
        self.norm = nnx.GroupNorm(channels, num_groups=8, rngs=rngs)
        self.head = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[batch, 32, 32, 3]` to logits `[batch, 10]`."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


def flipped_and_shifted(
    batch: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Mirrors half of the images, and moves each by up to 4 pixels, zeros at the border."""
    images = batch["x"]
    rows = np.arange(len(images))[:, None, None]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    top, left = rng.integers(0, 9, (2, len(images), 1, 1))
    down, right = np.arange(32)[None, :, None], np.arange(32)[None, None, :]
    right = np.where(rng.random((len(images), 1, 1)) < 0.5, right, 31 - right)
    return batch | {"x": padded[rows, top + down, left + right]}


def load(
    *, train_rows: int | None = None, sizes: dict[str, int] | None = None
) -> tuple[Rows, Callable[[int], nnx.Module], Any]:
    """45,000 / 5,000 / 10,000 images, or `train_rows` of the first; decoded once."""
    arrays = np.load(_find(), allow_pickle=False)
    offsets, labels, is_test = arrays["offsets"], arrays["labels"], arrays["is_test"].astype(bool)
    jpeg = arrays["jpeg"]
    # The rows are in the order of their labels, and RandomState's stream is frozen for ever.
    order = np.random.RandomState(0).permutation(len(labels))
    chosen, test = order[~is_test[order]], order[is_test[order]]
    train, validation = chosen[:45_000][:train_rows], chosen[45_000:]
    if train_rows is not None:
        validation, test = validation[:train_rows], test[:train_rows]

    def part(rows: np.ndarray) -> dict[str, np.ndarray]:
        images = [_decode(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in rows]
        x = (np.stack(images).astype(np.float32) - 120.0) / 62.0  # about zero mean, unit variance
        return {"x": x, "y": labels[rows].astype(np.int32)}

    rows = Rows(part(train), part(validation), part(test), flipped_and_shifted)
    return rows, lambda seed: SmallResNet(rngs=nnx.Rngs(seed), **(sizes or {})), cross_entropy


def _decode(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))  # [32, 32, 3], uint8


def _find() -> Path:
    folders = [Path(os.environ[ENV_VAR])] if os.environ.get(ENV_VAR) else []
    for folder in (*folders, cache_folder()):
        if (folder / FILE).is_file():
            return folder / FILE
    raise DataError(
        f"no {FILE} in {' or '.join(map(str, (*folders, cache_folder())))}: 60,000 images as JPEG "
        "bytes, `jpeg[offsets[i]:offsets[i + 1]]`, with `labels` and `is_test`"
    )
