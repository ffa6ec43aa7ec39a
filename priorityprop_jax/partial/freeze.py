"""Static freezing: an optimizer for what is left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.rows import Frozen, check_transformation
from priorityprop_jax.partial.grad import choose
from priorityprop_jax.partial.update import beside

_LABELS = {True: True, "freeze": True, "frozen": True, False: False, "train": False}


def freeze(
    which: str | Iterable[str] | Callable[..., Any], optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The optimizer on everything but what is named, which stays bit for bit.

    What is frozen has no optimizer state and no update, and needs no gradient: a compiled step does
    not compute those that nothing reads, nor the part of the backward pass that only they need. A
    clip by global norm belongs inside, where it sees what is trained only.

    Args:
      which: a leaf's path (``"encoder/0/kernel"``), a module's (``"encoder"``), a glob
        (``"encoder/*"``, whose ``*`` matches ``/`` too), or several; or a predicate
        ``(path, leaf) -> bool``; or a function of the parameters that returns a tree of labels (or
        a prefix of one): True or ``"freeze"`` for what is frozen, False or ``"train"`` for the
        rest. Static.
      optimizer: any Optax optimizer.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of `optax.masked`. Updates are
      `Frozen` where a leaf is frozen, which `optax.apply_updates`, `flax.nnx.Optimizer` and Linen's
      ``TrainState`` take. Gradients may be None or left out, as `value_and_grad` does; then nothing
      changes.

    Raises:
      TypeError: if ``optimizer`` is no transformation.
      ValueError: when initialised, if a name or glob matches nothing, or a label is another; when
        called, if gradients do not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import partial
      >>> params = {"encoder": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
      >>> tx = partial.freeze("encoder/*", optax.sgd(0.5))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["encoder"]["w"].tolist(), params["head"]["w"].tolist()
      ([1.0, 1.0], [0.5, 0.5])
    """
    check_transformation(optimizer)

    def trained(params):
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = [path_name(path) for path, _ in flat]
        if not callable(which):
            frozen = choose(names, which, "leaf")
            return treedef.unflatten([name not in frozen for name in names])
        if len(inspect.signature(which).parameters) > 1:
            kept = [not which(name, leaf) for name, (_, leaf) in zip(names, flat, strict=True)]
            return treedef.unflatten(kept)
        labels = which(params)
        return jax.tree.map(lambda x, part: jax.tree.map(lambda _: _kept(x), part), labels, params)

    def update_fn(updates, state, params=None, **extra_args):
        whole = updates if params is None else params
        mask, treedef = trained(whole), jax.tree.structure(whole)
        grads = treedef.unflatten(beside(updates, whole))
        new, state = optax.masked(optimizer, mask).update(grads, state, params, **extra_args)
        flat = treedef.flatten_up_to(new)
        kept = jax.tree.leaves(mask)
        flat = [u if k and u is not None else Frozen() for k, u in zip(kept, flat, strict=True)]
        return treedef.unflatten(flat), state

    return optax.GradientTransformationExtraArgs(optax.masked(optimizer, trained).init, update_fn)


def _kept(label: Any) -> bool:
    if label not in _LABELS:
        raise ValueError(
            f"the label {label!r} is none of {[*_LABELS]}: True or 'freeze' freezes a leaf, False "
            "or 'train' trains it"
        )
    return not _LABELS[label]
