"""CIFAR-10 from one file of JPEGs, and a small residual network for it."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from priorityprop_jax.cli.tasks import Task
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
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    train_rows: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Task:
    """CIFAR-10, without `flipped_and_shifted`, which is for batches that are trained on.

    Args:
      data_dir: folder of the file; it is not downloaded.
      seed: of the weights and of the order of the training rows.
      train_rows: at most so many rows of each part.
      sizes: of the model, as `SmallResNet` takes them.
    """
    parts = _parts(str(_find(data_dir)), train_rows)
    model = SmallResNet(rngs=nnx.Rngs(seed), **(sizes or {}))
    return Task("cifar-conv", model, parts, seed, 128, 1e-3, 20)


@functools.lru_cache(maxsize=1)
def _parts(path: str, train_rows: int | None) -> tuple[dict[str, np.ndarray], ...]:
    """Training, validation and test rows, decoded once."""
    arrays = np.load(path, allow_pickle=False)
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

    return part(train), part(validation), part(test)


def _decode(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))  # [32, 32, 3], uint8


def _find(data_dir: str | os.PathLike[str] | None) -> Path:
    env = os.environ.get(ENV_VAR)
    folders = [*([Path(env)] if env else []), cache_folder()]
    if data_dir is not None:
        folders = [Path(data_dir)]
    for folder in folders:
        if (folder.expanduser() / FILE).is_file():
            return folder.expanduser() / FILE
    raise DataError(
        f"no {FILE} in {' or '.join(map(str, folders))}: 60,000 images as JPEG bytes, "
        "`jpeg[offsets[i]:offsets[i + 1]]`, with `labels` and `is_test`"
    )
