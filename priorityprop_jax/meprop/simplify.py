"""meSimp: a smaller model, without the rows of its layers that meProp's top-k hardly ever chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.core.modules import walk

M = TypeVar("M", bound=nnx.Module)


def prune_unused(
    model: M,
    counts: Mapping[str, Any],
    threshold: int | float,
    *,
    chain: Sequence[str] | None = None,
) -> tuple[M, dict[str, np.ndarray]]:
    r"""Removes the output rows of linear layers that the backward pass hardly ever chose.

    Of a layer in which row :math:`j` was chosen :math:`c_j` times, the rows

    .. math:: \{j : c_j \ge \tau \max_i c_i\} \quad \text{or} \quad \{j : c_j \ge \tau\}

    stay, for a fraction or a whole number :math:`\tau`. The others leave its kernel and its bias,
    and the inputs that they fed leave the kernel of the next layer. So the smaller model computes
    what the model would if the next layers' weights for those inputs were zero. The rows of the
    last layer, and of layers without counts, all stay; of any other layer at least one does, the
    first that was chosen most.

    What stands between two layers of the chain must be elementwise, such as a ReLU or dropout: what
    holds arrays of the layer's width, such as a norm, is not made smaller. An optimizer's state is
    to be made anew, and a whole number ``k`` of meProp chosen anew where a layer is now narrower.

    Args:
      model: holds `flax.nnx.Linear` layers that form a chain; is left as it is. Kernels are
        ``[in, out]``, or ``[out, in]`` where ``layer.dot_general.transposed`` is true.
      counts: how often each output row was chosen, ``[out]``, by the name of the layer
        (``"layers/0"``) or of its kernel (``"layers/0/kernel"``), as `row_counts` has them for
        kernels ``[out, in]``; the rows of a kernel ``[in, out]`` are its inputs, so leave those
        out. Those of the last layer are not looked at.
      threshold: a fraction in (0, 1) of the layer's largest count, or a whole number from 1 on.
      chain: names of the layers, each of which feeds the next. By default all `flax.nnx.Linear`
        layers in the order in which the model's attributes were set. `flax.nnx.clone` and
        `flax.nnx.merge` return models that have lost this order for that of the alphabet, and so
        is the smaller model one: name the chain of those.

    Returns:
      The smaller model, of the same class, and the rows that stayed of each layer of the chain, in
      its order: ascending indices ``[rows]`` into the rows of ``model``.

    Raises:
      TypeError: if ``threshold`` is no number, or ``chain`` is a string.
      ValueError: if ``threshold`` is impossible, a layer of ``chain`` or ``counts`` is unknown or
        named twice, a layer's inputs are not as many as the outputs of the one before it, a kernel
        is no matrix, or counts do not fit their layer.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from priorityprop_jax.meprop.simplify import prune_unused
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(2, 4, rngs=rngs), jax.nn.relu, nnx.Linear(4, 3, rngs=rngs)
      ... )
      >>> smaller, kept = prune_unused(model, {"layers/0": [90, 1, 0, 75]}, 0.05)
      >>> smaller.layers[0].kernel.shape, smaller.layers[2].kernel.shape
      ((2, 2), (2, 3))
      >>> kept["layers/0"].tolist()
      [0, 3]

    References:
      Sun et al., `Training Simplification and Model Simplification for Deep Learning: A Minimal
      Effort Back Propagation Method <https://arxiv.org/abs/1711.06528>`_, 2017
    """
    _check_threshold(threshold)
    if isinstance(chain, str):
        raise TypeError(f"chain must be a sequence of names, got the string {chain!r}")
    layers = _linears(model)
    names = list(layers) if chain is None else list(chain)
    _check_chain(layers, names)

    kept = {name: np.arange(layers[name].out_features) for name in names}
    counted = set()
    for key, value in counts.items():
        name = key.removesuffix("/kernel")
        if name not in kept:
            raise ValueError(f"counts for {key!r}, but the layers are {', '.join(names)}")
        if name in counted:
            raise ValueError(f"counts for layer {name!r} twice: by its name and by its kernel's")
        counted.add(name)
        if name == names[-1]:
            continue
        chosen = np.asarray(value)
        if chosen.shape != kept[name].shape:
            raise ValueError(
                f"counts of shape {chosen.shape} for layer {name!r} of {kept[name].size} output "
                "features: one count for each is needed"
            )
        kept[name] = _rows(chosen, threshold)

    smaller = nnx.clone(model)
    layers = _linears(smaller)
    columns = None  # Of the next layer's inputs, those that are still fed.
    for name in names:
        layer = layers[name]
        out = 0 if getattr(layer.dot_general, "transposed", False) else 1
        kernel = jnp.take(layer.kernel[...], kept[name], axis=out)
        if columns is not None:
            kernel = jnp.take(kernel, columns, axis=1 - out)
        layer.kernel.set_value(kernel)
        if layer.bias is not None:
            layer.bias.set_value(layer.bias[...][kept[name]])
        layer.in_features, layer.out_features = kernel.shape[1 - out], kernel.shape[out]
        columns = kept[name]
    return smaller, kept


def _check_threshold(threshold: int | float) -> None:
    if isinstance(threshold, bool) or not isinstance(
        threshold, int | float | np.integer | np.floating
    ):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    whole = isinstance(threshold, int | np.integer)
    if threshold < 1 if whole else not 0 < threshold < 1:
        raise ValueError(
            f"threshold is {threshold}: a whole number from 1 on, or a fraction between 0 and 1 of "
            "the largest count, is needed"
        )


def _check_chain(layers: dict[str, nnx.Linear], names: list[str]) -> None:
    if not names:
        raise ValueError("there is no nnx.Linear in the chain: nothing to prune")
    if len(set(names)) < len(names):
        raise ValueError(f"chain names a layer twice: {', '.join(names)}")
    for name in names:
        if name not in layers:
            raise ValueError(
                f"no nnx.Linear is called {name!r}; the model has {', '.join(layers) or 'none'}"
            )
        shape = layers[name].kernel.shape
        if len(shape) != 2:
            raise ValueError(f"the kernel of layer {name!r} is {shape}: only matrices are pruned")
    for before, after in zip(names[:-1], names[1:], strict=True):
        if layers[before].out_features != layers[after].in_features:
            raise ValueError(
                f"layer {before!r} has {layers[before].out_features} outputs, and {after!r} behind "
                f"it {layers[after].in_features} inputs: name layers that form a chain with chain="
            )


def _rows(counts: np.ndarray, threshold: int | float) -> np.ndarray:
    most = counts.max()
    if isinstance(threshold, int | np.integer):
        kept = counts >= threshold
    elif most > 0:
        kept = counts / most >= threshold  # A quotient, as 0.1 * 30 is above 3.
    else:
        kept = np.ones(counts.shape, bool)  # Nothing was chosen, so nothing is known.
    return np.flatnonzero(kept) if kept.any() else np.array([np.argmax(counts)])


def _linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The linear layers by name, each once, in the order in which attributes were set."""
    return {name: layer for name, layer in walk(model) if isinstance(layer, nnx.Linear)}
