"""One call that tries all exact savings on a model, and keeps those that are measured faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import lax

from priorityprop_jax.core.modules import check_module, pure_loss, walk
from priorityprop_jax.core.tables import aligned
from priorityprop_jax.core.timing import compared, sooner
from priorityprop_jax.exact.blocks import blocks, restore_block, save_products
from priorityprop_jax.exact.convolutions import conv_general_dilated
from priorityprop_jax.exact.embeddings import restore_embedding
from priorityprop_jax.exact.products import dot_general
from priorityprop_jax.rnn.fused import restore_rnn, swap
from priorityprop_jax.rnn.lean import LeanRNN

SECONDS = 3.0  # for timing one saving, compiling left out


class Saving(NamedTuple):
    """A row of the table of `apply`."""

    saving: str
    parts: int  # of the model, that it changes
    before_ms: float | None  # milliseconds of a gradient without it; None if there is nothing to do
    after_ms: float | None  # with it
    kept: bool


def apply(model: nnx.Module, loss_fn: Callable[..., Any], batch: Any) -> list[Saving]:
    """Makes the backward pass of a model sooner, in place, where that is measured to be so.

    One after the other each saving is tried on top of those that were kept: the gradient of the
    whole loss is compiled with it and without, both run in turn, warm, for 3 seconds and at least 5
    times, and it is kept if the median and the fastest fall by at least 3 %. Gradients are the same
    to rounding, parameters and their paths stay, and so do modes and random streams. Prints the
    table that it returns. Call it before the training step is compiled; the choice holds for this
    machine and these shapes.

    - ``lean rnn``: see `priorityprop_jax.rnn.lean_rnn`.
    - ``flat products``: see `dot_general`, in each layer whose product is JAX's own.
    - ``patches``: see `conv_general_dilated`, where a kernel is no larger than its stride.
    - ``strided convolutions``: the same in all others with a stride.
    - ``products saved``: blocks keep their products alone for the backward pass and compute norms,
      activations and biases again, which is less to write and read, and less memory. Blocks are
      modules with several products in them that stand beside others of their kind, or that
      `nnx.vmap` has stacked for `nnx.scan`.
    - ``products saved, in a scan``: the same without the barrier that a loop does not need.

    Args:
      model: the module, as it is trained; changed in place.
      loss_fn: ``(model, batch) -> loss`` or ``(loss, aux)``.
      batch: what the loss is given; its shapes matter, and values where they decide on the work.

    Returns:
      A row for each saving.

    Raises:
      TypeError: if the model is no `nnx.Module`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import exact
      >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> rows = exact.apply(model, loss_fn, jnp.ones((2, 8)))  # doctest: +ELLIPSIS
      saving                     parts  before ms  after ms  kept
      lean rnn                       0          -         -    no
      flat products                  1  ...
      patches                        0          -         -    no
      strided convolutions           0          -         -    no
      products saved                 0          -         -    no
      products saved, in a scan      0          -         -    no
      >>> _ = exact.restore(model)
    """
    check_module(model)
    rows, kept = [], []
    twin, run = nnx.clone(model), None
    for name, change in _SAVINGS.items():
        tried = nnx.clone(twin)
        parts = change(tried)
        if not parts:
            rows.append(Saving(name, 0, None, None, False))
            continue
        run, new = run or _gradient(twin, loss_fn, batch), _gradient(tried, loss_fn, batch)
        before, after = compared([run, new], SECONDS)
        faster = sooner(before, after)
        rows.append(Saving(name, parts, 1e3 * before[0], 1e3 * after[0], faster))
        if faster:
            twin, run = tried, new
            kept.append(change)
    for change in kept:
        change(model)
    header = ("saving", "parts", "before ms", "after ms", "kept")
    print("\n".join(map(str.rstrip, aligned([header, *map(_cells, rows)]))))
    return rows


def restore(model: nnx.Module) -> int:
    """Takes out what `apply` and `embed_rows` put in, in place.

    Returns:
      How many modules were changed back. `apply` has an example.

    Raises:
      TypeError: if the model is no `nnx.Module`.
    """
    check_module(model)
    changed = 0
    for _, part in list(walk(model)):
        changed += restore_block(part) + restore_embedding(part)
        if isinstance(part, LeanRNN) and part.lean_iterations is None:
            changed += restore_rnn(part)
        for name in _DROP_INS:
            if isinstance(drop_in := getattr(part, name, None), _DropIn):
                setattr(part, name, drop_in.before)
                changed += 1
    return changed


_DROP_INS = {"dot_general": dot_general, "conv_general_dilated": conv_general_dilated}


@dataclasses.dataclass(frozen=True)
class _DropIn:
    """What a layer computes with, and did before."""

    name: str
    before: Any

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _DROP_INS[self.name](*args, **kwargs)


def _put_in(name: str, layers: list[Any]) -> int:
    """Where a layer has JAX's own: a user's goes before ours."""
    layers = [x for x in layers if getattr(x, name) in (None, getattr(lax, name))]
    for layer in layers:
        setattr(layer, name, _DropIn(name, getattr(layer, name)))
    return len(layers)


def _flatten(model: nnx.Module) -> int:
    parts = [part for _, part in walk(model)]
    # The step of a recurrent layer sees rows already, and a lean one must know its products.
    cells = {id(x) for part in parts if isinstance(part, nnx.RNN) for _, x in walk(part)}
    layers = [x for x in parts if isinstance(x, nnx.Linear | nnx.LinearGeneral)]
    layers = [x for x in layers if id(x) not in cells]
    layers = [x for x in layers if getattr(x, "dot_general_cls", None) is None]
    return _put_in("dot_general", layers)


def _stride(model: nnx.Module, patches: bool) -> int:
    found = []
    for _, part in walk(model):
        if isinstance(part, nnx.Conv) and part.strides is not None:
            strides = np.broadcast_to(part.strides, len(part.kernel_size))
            inside = bool(np.all(np.asarray(part.kernel_size) <= strides))
            found += [part] if strides.max() > 1 and inside == patches else []
    return _put_in("conv_general_dilated", found)


def _save(model: nnx.Module, in_scan: bool) -> int:
    for block in (found := blocks(model)):
        restore_block(block)
        save_products(block, in_scan=in_scan)
    return len(found)


def _lean(model: nnx.Module) -> int:
    plain = [part for _, part in walk(model) if type(part) is nnx.RNN]  # what is in use stays
    return sum(swap(rnn, LeanRNN, lean_iterations=None, lean_tol=None) for rnn in plain)


_SAVINGS: dict[str, Callable[[nnx.Module], int]] = {
    "lean rnn": _lean,
    "flat products": _flatten,
    "patches": lambda model: _stride(model, True),
    "strided convolutions": lambda model: _stride(model, False),
    "products saved": lambda model: _save(model, False),
    "products saved, in a scan": lambda model: _save(model, True),
}


def _gradient(model: nnx.Module, loss_fn: Callable[..., Any], batch: Any) -> Callable[[], Any]:
    """Runs the whole gradient of a model that stays as it is."""
    loss, params, rest = pure_loss(model, loss_fn)
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, rest, batch).compile()
    return lambda: jax.block_until_ready(compiled(params, rest, batch))


def _cells(row: Saving) -> tuple[str, ...]:
    times = ["-" if ms is None else f"{ms:.2f}" for ms in (row.before_ms, row.after_ms)]
    return row.saving, str(row.parts), *times, "yes" if row.kept else "no"
