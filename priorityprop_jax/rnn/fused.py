"""Backward passes of our own inside the RNN modules of Flax, which keep their parameters.

A module is turned into a subclass of itself in place, and back, so that parameters and paths stay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from priorityprop_jax.core.fragile import flip_sequences, laid_out, spec_of
from priorityprop_jax.core.modules import check_module, walk
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams

# A cell's layers on the input and on the state, in the order of the gates
_LAYERS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    nnx.OptimizedLSTMCell: (("dense_i",), ("dense_h",)),
    nnx.LSTMCell: (("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")),
    nnx.GRUCell: (("dense_i",), ("dense_h",)),
}


def standard(cell: Any, layers: Any) -> bool:
    """Whether the cell is one of these, not a subclass, with the functions of its formula."""
    return (
        type(cell) in layers and cell.gate_fn is jax.nn.sigmoid and cell.activation_fn is jnp.tanh
    )


def options_of(rnn: Any, **given: bool | None) -> dict[str, Any]:
    """What a call leaves open is as the module was made."""
    return {name: getattr(rnn, name) if x is None else x for name, x in given.items()}


def sizes_of(inputs: jax.Array, time_major: bool) -> tuple[int, tuple[int, ...]]:
    """The number of steps, and the shape of one step's inputs, ``[*batch, features]``."""
    time_axis = 0 if time_major else inputs.ndim - 2
    return inputs.shape[time_axis], inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]


def over_sequence(
    run: Callable[..., Any],
    fuse: Callable[..., tuple[jax.Array, jax.Array, Any]],
    layers: tuple[Any, Any],
    carry: Any,
    inputs: jax.Array,
    *,
    seq_lengths: jax.Array | None,
    return_carry: bool,
    time_major: bool,
    reverse: bool,
    keep_order: bool,
) -> Any:
    """What both modules of Flax do around their scan, which is ``run``.

    ``fuse`` of the layers on the input, or on the state, and of what enters them gives that in
    their dtype, and kernels ``(out, in)`` and biases side by side.
    """

    def flip(x, seq_lengths):
        return flip_sequences(x, seq_lengths, num_batch_dims=x.ndim - 2, time_major=time_major)

    def flipped(x):
        return laid_out(flip, lambda x, _: spec_of(x))(x, seq_lengths)

    xs = flipped(inputs) if reverse else inputs
    xs = xs if time_major else jnp.moveaxis(xs, -2, 0)
    is_lstm = isinstance(carry, tuple | list)
    xs, input_kernel, input_bias = fuse(layers[0], xs)
    _, kernel, bias = fuse(layers[1], carry[1] if is_lstm else carry)
    if is_lstm:
        params: Any = LSTMParams(input_kernel, kernel, bias)
    else:
        params = GRUParams(input_kernel, kernel, input_bias, bias)
    slice_carry = seq_lengths is not None and return_carry
    final, outputs, *carries = run(params, carry, xs, slice_carry)
    if seq_lengths is not None and return_carry:
        pick = lambda x, lengths: x[lengths - 1, jnp.arange(x.shape[1])]  # noqa: E731
        pick = laid_out(pick, lambda x, _: jax.P(*spec_of(x)[1:]))
        final = jax.tree.map(lambda x: pick(x, seq_lengths), carries[0])
    if not time_major:
        outputs = jnp.moveaxis(outputs, 0, -2)
    if reverse and keep_order:
        outputs = flipped(outputs)
    return (final, outputs) if return_carry else outputs


def joined(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays one after the other, along the first axis."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _layers(cell: Any) -> tuple[list[Any], list[Any]]:
    """A cell's layers on the input and on the state."""
    to_input, to_state = _LAYERS[type(cell)]
    return [getattr(cell, name) for name in to_input], [getattr(cell, name) for name in to_state]


def _runs(rnn: nnx.RNN) -> bool:
    """Whether the cell is one that `run_cell` can stand in for."""
    cell = rnn.cell
    if not standard(cell, _LAYERS):
        return False
    to_input, to_state = _layers(cell)
    # What else somebody has put into a layer, we do not know how to run.
    known = all(
        type(layer) is nnx.Linear
        and (layer.dot_general is lax.dot_general or hasattr(layer.dot_general, "transposed"))
        and layer.precision is None
        and layer.preferred_element_type is None
        for layer in (*to_input, *to_state)
    )
    if not known:
        return False
    is_gru = type(cell) is nnx.GRUCell  # with a bias, if any, on the input; an LSTM on the state
    biases = [[layer.bias is not None for layer in layers] for layers in (to_input, to_state)]
    if any(biases[is_gru]) or not (is_gru or all(biases[1])):
        return False
    # An axis over which parameters would be scanned: a kernel for every step
    return not any(isinstance(axis, int) for axis in rnn.state_axes.values())


def is_fusible(rnn: Any) -> bool:
    """Whether `swap` can turn this module into a `FusedRNN`, or has done so."""
    return (type(rnn) is nnx.RNN or isinstance(rnn, FusedRNN)) and _runs(rnn)


def _fused(layers: Sequence[Any], x: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    kernels, biases = [], []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias[...]
        promoted, kernel, bias = layer.promote_dtype(
            (x, layer.kernel[...], bias), dtype=layer.dtype
        )
        # A drop-in for the product, such as meProp's, may have the kernel stored (out, in).
        transposed = getattr(layer.dot_general, "transposed", False)
        kernels.append(kernel if transposed else kernel.T)
        biases.append(bias)
    return promoted, joined(kernels), None if biases[0] is None else joined(biases)


class FusedRNN(nnx.RNN):
    """`flax.nnx.RNN` whose scan is one function of ours, with its own backward pass.

    A subclass says which function, by `run`. Other cells than `is_fusible`'s run as ever.
    """

    own: tuple[str, ...] = ()  # attributes that `restore_rnn` takes away

    def left_alone(self, rows, steps, **more):
        """Whether the module runs as it was, with so many rows a step; checks what is more."""
        if more:
            raise TypeError(f"{type(self).__name__} takes no argument {', '.join(more)}")
        return False

    def run(self, params, carry, xs, all_carries, per_gate):
        """The last carry, the outputs and, if asked for, the carries of all steps."""
        raise NotImplementedError

    def __call__(
        self,
        inputs,
        *,
        initial_carry=None,
        seq_lengths=None,
        return_carry=None,
        time_major=None,
        reverse=None,
        keep_order=None,
        rngs=None,
        **more,
    ):
        """As `flax.nnx.RNN.__call__`; what is more goes to `run`."""
        options = options_of(
            self,
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
        )
        options["seq_lengths"] = seq_lengths
        steps, shape = sizes_of(inputs, options["time_major"])
        if self.left_alone(math.prod(shape[:-1]), steps, **more) or not _runs(self):
            return super().__call__(inputs, initial_carry=initial_carry, rngs=rngs, **options)
        cell: Any = self.cell
        if rngs is None:
            rngs = self.rngs
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.carry.fork()
        if initial_carry is None:
            initial_carry = cell.initialize_carry(shape, rngs)
        layers = _layers(cell)
        run = functools.partial(self.run, per_gate=len(layers[0]) > 1, **more)
        return over_sequence(run, _fused, layers, initial_carry, inputs, **options)


def swap(rnn: Any, kind: type[FusedRNN], **attributes: Any) -> bool:
    """Turns an `nnx.RNN`, or what it was turned into, into ``kind`` in place, if that can be."""
    if not is_fusible(rnn):
        return False
    restore_rnn(rnn)
    # An assignment would be noted down as an attribute of the module's graph.
    object.__setattr__(rnn, "__class__", kind)
    for name, value in attributes.items():
        setattr(rnn, name, value)
    return True


def restore_rnn(rnn: Any) -> bool:
    """Undoes `swap`, in place; returns whether the module was a `FusedRNN`."""
    if not isinstance(rnn, FusedRNN):
        return False
    for attribute in rnn.own:
        if attribute in vars(rnn):
            delattr(rnn, attribute)
    object.__setattr__(rnn, "__class__", nnx.RNN)
    return True


def restore(model: nnx.Module) -> int:
    """Gives every `nnx.RNN` of a model its own backward pass again, in place.

    Returns:
      How many RNNs were changed back.

    Raises:
      TypeError: if ``model`` is no `nnx.Module`.

    Example:
      >>> from priorityprop_jax import rnn
      >>> model = nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
      >>> rnn.lean_rnn(model), rnn.restore(model)
      (1, 1)
    """
    check_module(model)
    return sum(restore_rnn(part) for _, part in walk(model))
