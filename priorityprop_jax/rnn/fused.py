"""Backward passes of our own inside the RNN modules of Flax, which keep their parameters.

A module is turned into a subclass of itself in place, and back, so that parameters and paths stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from flax.nnx.nn.recurrent import flip_sequences
from jax import lax

from priorityprop_jax.core.modules import check_module, walk
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams

# A cell's layers on the input and on the state, in the order of the gates
_NNX_LAYERS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    nnx.OptimizedLSTMCell: (("dense_i",), ("dense_h",)),
    nnx.LSTMCell: (("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")),
    nnx.GRUCell: (("dense_i",), ("dense_h",)),
}
_LINEN_LAYERS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.OptimizedLSTMCell: (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
    nn.LSTMCell: (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
    nn.GRUCell: (("ir", "iz", "in"), ("hr", "hz", "hn")),
}


def _standard(cell: Any, layers: dict[Any, Any]) -> bool:
    """Whether the cell is one of these, not a subclass, with the functions of its formula."""
    return (
        type(cell) in layers and cell.gate_fn is jax.nn.sigmoid and cell.activation_fn is jnp.tanh
    )


def _options(rnn: Any, **given: bool | None) -> dict[str, Any]:
    """What a call leaves open is as the module was made."""
    return {name: getattr(rnn, name) if x is None else x for name, x in given.items()}


def _shape_of_step(inputs: jax.Array, time_major: bool) -> tuple[int, ...]:
    """The shape of one step's inputs."""
    time_axis = 0 if time_major else inputs.ndim - 2
    return inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]


def _params(is_gru: bool, input_kernel: Any, kernel: Any, input_bias: Any, bias: Any) -> Any:
    if is_gru:
        return GRUParams(input_kernel, kernel, input_bias, bias)
    return LSTMParams(input_kernel, kernel, bias)


def _over_sequence(
    run: Callable[..., Any],
    inputs: jax.Array,
    *,
    seq_lengths: jax.Array | None,
    return_carry: bool,
    time_major: bool,
    reverse: bool,
    keep_order: bool,
) -> Any:
    """What both modules of Flax do around their scan."""

    def flipped(x):
        return flip_sequences(x, seq_lengths, num_batch_dims=x.ndim - 2, time_major=time_major)

    xs = flipped(inputs) if reverse else inputs
    slice_carry = seq_lengths is not None and return_carry
    final, outputs, *carries = run(xs if time_major else jnp.moveaxis(xs, -2, 0), slice_carry)
    if seq_lengths is not None and return_carry:
        last = seq_lengths - 1
        final = jax.tree.map(lambda x: x[last, jnp.arange(x.shape[1])], carries[0])
    if not time_major:
        outputs = jnp.moveaxis(outputs, 0, -2)
    if reverse and keep_order:
        outputs = flipped(outputs)
    return (final, outputs) if return_carry else outputs


def _transposed(layer: Any) -> bool:
    """Whether a drop-in for its product, such as meProp's, wants the kernel stored (out, in)."""
    return getattr(layer.dot_general, "transposed", False)


def _nnx_runs(rnn: nnx.RNN) -> bool:
    """Whether the cell is one that `run_cell` can stand in for."""
    cell = rnn.cell
    if not _standard(cell, _NNX_LAYERS):
        return False
    to_input, to_state = (
        [getattr(cell, name) for name in names] for names in _NNX_LAYERS[type(cell)]
    )
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
    return (type(rnn) is nnx.RNN or isinstance(rnn, FusedRNN)) and _nnx_runs(rnn)


def _nnx_fused(layers: Sequence[Any], x: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """The promoted input, kernels ``(out, in)`` and biases of layers side by side."""
    kernels, biases = [], []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias[...]
        promoted, kernel, bias = layer.promote_dtype(
            (x, layer.kernel[...], bias), dtype=layer.dtype
        )
        kernels.append(kernel if _transposed(layer) else kernel.T)
        biases.append(bias)
    return promoted, _joined(kernels), None if biases[0] is None else _joined(biases)


def _joined(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


class FusedRNN(nnx.RNN):
    """`flax.nnx.RNN` whose scan is one function of ours, with its own backward pass.

    Values, parameters and their paths are the RNN's. A subclass says which function, by `run`. It
    applies where the cell is `nnx.OptimizedLSTMCell`, `nnx.LSTMCell` or `nnx.GRUCell` with sigmoid
    and tanh; other cells run as ever.
    """

    own: tuple[str, ...] = ()  # attributes that `restore_rnn` takes away

    def left_alone(self, rows):
        """Whether the module runs as it was where a step has so many rows."""
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
        options = _options(
            self,
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
        )
        options["seq_lengths"] = seq_lengths
        rows = math.prod(_shape_of_step(inputs, options["time_major"])[:-1])
        if not _nnx_runs(self) or self.left_alone(rows):
            return super().__call__(inputs, initial_carry=initial_carry, rngs=rngs, **options)
        cell: Any = self.cell
        if rngs is None:
            rngs = self.rngs
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.carry.fork()
        if initial_carry is None:
            shape = _shape_of_step(inputs, options["time_major"])
            initial_carry = cell.initialize_carry(shape, rngs)
        to_input, to_state = (
            [getattr(cell, name) for name in names] for names in _NNX_LAYERS[type(cell)]
        )

        def run(xs, all_carries):
            is_gru = type(cell) is nnx.GRUCell
            h = initial_carry if is_gru else initial_carry[1]
            xs, input_kernel, input_bias = _nnx_fused(to_input, xs)
            _, kernel, bias = _nnx_fused(to_state, h)
            params = _params(is_gru, input_kernel, kernel, input_bias, bias)
            per_gate = len(to_input) > 1
            return self.run(params, initial_carry, xs, all_carries, per_gate, **more)

        return _over_sequence(run, inputs, **options)


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

    Args:
      model: the module; changed in place.

    Returns:
      How many RNNs were changed back.

    Raises:
      TypeError: if ``model`` is no `nnx.Module`.

    Example:
      >>> from flax import nnx
      >>> from priorityprop_jax import rnn
      >>> model = nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
      >>> rnn.lean_rnn(model), rnn.restore(model)
      (1, 1)
    """
    check_module(model)
    return sum(restore_rnn(part) for _, part in walk(model))


def _linen_fused(
    layers: dict[str, Any], names: Sequence[str], x: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """The promoted input, kernels ``(out, in)`` and biases, where there are any, side by side."""
    kernel = jnp.concatenate([layers[name]["kernel"].T for name in names])
    biases = [layers[name]["bias"] for name in names if "bias" in layers[name]]
    bias = _joined(biases) if biases else None
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
    return x, kernel, bias


class LinenFusedRNN(nn.RNN, kw_only=True):
    """`flax.linen.RNN` whose scan is one function of ours: what `FusedRNN` is for `flax.nnx`."""

    def check(self, features: int) -> None:
        """Raises where the options do not fit a cell of this width."""

    def left_alone(self, rows):
        """See `FusedRNN.left_alone`."""
        return False

    def run(self, params, carry, xs, all_carries, per_gate):
        """See `FusedRNN.run`."""
        raise NotImplementedError

    def __call__(
        self,
        inputs,
        *,
        initial_carry=None,
        init_key=None,
        seq_lengths=None,
        return_carry=None,
        time_major=None,
        reverse=None,
        keep_order=None,
        **more,
    ):
        """As `flax.linen.RNN.__call__`; what is more goes to `run`."""
        cell: Any = self.cell
        if not _standard(cell, _LINEN_LAYERS):
            known = ", ".join(kind.__name__ for kind in _LINEN_LAYERS)
            raise TypeError(
                f"{type(self).__name__} knows the cells {known} with sigmoid and tanh, got "
                f"{cell!r}: use nn.RNN"
            )
        self.check(cell.features)
        options = _options(
            self,
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
        )
        options["seq_lengths"] = seq_lengths
        rows = math.prod(_shape_of_step(inputs, options["time_major"])[:-1])
        if self.is_initializing() or self.left_alone(rows):
            return super().__call__(
                inputs, initial_carry=initial_carry, init_key=init_key, **options
            )
        if initial_carry is None:
            shape = _shape_of_step(inputs, options["time_major"])
            init_key = jax.random.key(0) if init_key is None else init_key
            initial_carry = cell.initialize_carry(init_key, shape)
        layers = nn.unbox(cell.variables["params"])
        to_input, to_state = _LINEN_LAYERS[type(cell)]

        def run(xs, all_carries):
            is_gru = type(cell) is nn.GRUCell
            h = initial_carry if is_gru else initial_carry[1]
            xs, input_kernel, input_bias = _linen_fused(layers, to_input, xs, cell.dtype)
            _, kernel, bias = _linen_fused(layers, to_state, h, cell.dtype)
            params = _params(is_gru, input_kernel, kernel, input_bias, bias)
            per_gate = type(cell) is not nn.OptimizedLSTMCell
            return self.run(params, initial_carry, xs, all_carries, per_gate, **more)

        return _over_sequence(run, inputs, **options)
