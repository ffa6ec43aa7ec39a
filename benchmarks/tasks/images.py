"""MNIST's images, for a multilayer perceptron."""

from __future__ import annotations

import math
import os
import struct

import numpy as np
from flax import nnx

from priorityprop_jax.cli.tasks import MLP, Task
from priorityprop_jax.cli.tasks import split as cut
from priorityprop_jax.models.files import DataError, DataFile, gunzip, read_file

_MNIST_HOMES = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
# The 10,000 images that MNIST publishes as its test set.
_MNIST_IMAGES = DataFile(
    names=("mnist10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
    urls=tuple(home + "t10k-images-idx3-ubyte.gz" for home in _MNIST_HOMES),
    sha256="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
)
_MNIST_LABELS = DataFile(
    names=("mnist10k-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    urls=tuple(home + "t10k-labels-idx1-ubyte.gz" for home in _MNIST_HOMES),
    sha256="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)

SPLITS = ("shuffled", "in order")


def mnist(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    hidden: tuple[int, ...] = (500, 500),
    split: str = "shuffled",
) -> Task:
    """The 10,000 images that MNIST publishes as its test set.

    Args:
      data_dir: folder of the two files.
      seed: of the weights and of the order of the training rows.
      hidden: widths of the hidden layers.
      split: `shuffled`, 7,000 / 2,000 / 1,000 after a shuffle that is the same for ever; or
        `in order`, 8,000 / 1,000 / 1,000 as they are in the file, whose second half is of other
        writers than the first: the test rows are harder than those of the validation. Records from
        before the shuffle are of it.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, not one of {', '.join(SPLITS)}")
    images, labels = (
        parse_idx(
            gunzip(read_file(file, data_dir=data_dir), source=file.names[0]),
            source=file.names[0],
        )
        for file in (_MNIST_IMAGES, _MNIST_LABELS)
    )
    # RandomState's stream is frozen for ever.
    order, held_out = np.random.RandomState(0).permutation(len(labels)), (2000, 1000)
    if split == "in order":
        order, held_out = np.arange(len(labels)), (1000, 1000)
    x = images.reshape(len(images), -1)[order].astype(np.float32) / 255  # [10000, 784], in [0, 1]
    y = labels[order].astype(np.int32)
    model = MLP((x.shape[1], *hidden, 10), rngs=nnx.Rngs(seed))
    return Task("mnist-mlp", model, cut(x, y, *held_out), seed, 128, 1e-3, 10)


def parse_idx(raw: bytes, *, source: str) -> np.ndarray:
    """Reads an array of bytes in the IDX format, the format of the MNIST files.

    Args:
      raw: two zero bytes, the type code `0x08`, the number of dimensions, each dimension as a
        big-endian uint32, then the values.
      source: what to call the data in an error.

    Returns:
      A uint8 array of the shape that the header gives.

    Raises:
      DataError: the magic number, the header or the length is wrong.
    """
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] == 0:
        raise DataError(
            f"{source} is not an IDX file of bytes: it starts with 0x{raw[:4].hex()}, not 0x000008 "
            "and the number of dimensions"
        )
    ndim = raw[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise DataError(f"{source} is damaged: it ends inside its header of {start} bytes")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{source} is damaged: its header says {shape}, that is {math.prod(shape)} values, and "
            f"{len(raw) - start} follow"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
