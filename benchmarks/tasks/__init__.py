"""The tasks that benchmarks, tests and notebooks train on: data, a small model, loss, defaults.

| name | data (train / validation / test) | model |
|---|---|---|
| `digits` | scikit-learn's digits, 1,297 / 250 / 250 images of 8 x 8 | MLP 64-128-128-10 |
| `mnist-mlp` | MNIST's test images, 7,000 / 2,000 / 1,000 of 28 x 28 | MLP 784-500-500-10 |
| `char-lm` | Tiny Shakespeare, 90 / 5 / 5 % of 1,115,394 characters | transformer, 4 blocks |
| `sst2` | Stanford Sentiment Treebank, 6,920 / 872 / 1,821 sentences | MiniLM, 6 blocks |
| `pos-tag` | UD English EWT, 12,544 / 2,001 / 2,077 sentences, XPOS tags | BiLSTM, 2 x 500 |
| `cifar-conv` | CIFAR-10, 45,000 / 5,000 / 10,000 images of 32 x 32 | residual network |

The split never depends on the seed, which is that of the weights and of the order of the training
rows; where weights are pretrained, it is that of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tasks import char, cifar, images, tagger
from priorityprop_jax.cli import tasks as ours
from priorityprop_jax.cli.tasks import Task

TASKS: dict[str, Callable[..., Task]] = {
    "digits": ours.digits,
    "mnist-mlp": images.mnist,
    "char-lm": char.load,
    "sst2": ours.sst2,
    "pos-tag": tagger.load,
    "cifar-conv": cifar.load,
}


def load(name: str, **options: Any) -> Task:
    """Verified data, a fresh model, and defaults that train it.

    Args:
      name: one of `TASKS`.
      options: of the function that `TASKS` names: `seed` and `data_dir` (the folder of the data; by
        default that of `PRIORITYPROP_DATA`, then the cache folder, then a download) for all of
        them, and what only one of them takes, such as `hidden`.

    Raises:
      ValueError: there is no such task, or an option does not fit it.
      DataError: its data are missing, damaged or out of reach.
      ImportError: a package that the data come from or with is not installed.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name](**options)
