"""meProp inside the RNN modules of Flax: one backward pass over the whole sequence."""

from __future__ import annotations

from typing import Any

import jax

from priorityprop_jax.core.selection import check_k, resolve_k
from priorityprop_jax.meprop.frame import LayerUse, enter
from priorityprop_jax.rnn.fused import FusedRNN, LinenFusedRNN, is_fusible, swap
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams, run_cell


def meprop_rnn(
    params: LSTMParams | GRUParams,
    carry: Any,
    xs: jax.Array,
    *,
    k: int | float,
    all_carries: bool = False,
    unroll: int = 1,
    per_gate: bool = False,
) -> tuple[Any, ...]:
    r"""An LSTM or GRU over a sequence, of whose gradients few columns flow back at each step.

    The forward pass is exact, see `highway_rnn` for the formulas. Backward, the gradient of what
    enters each gate keeps the ``k`` columns of its ``hidden`` whose magnitudes, summed over the
    batch, are largest. Only these reach :math:`x_t`, :math:`h_{t-1}` and the kernels: the products
    have ``k`` rows of the kernels for each gate in place of ``hidden``. The gradients of biases are
    cheap, and kept exact, as is the path through c of an LSTM. In the gate n of a GRU the gradients
    that enter W and U differ by the factor r, and each keeps its own ``k`` columns.

    With ``k`` = hidden the gradient is exact, the weight gradients being one product after the
    scan. Weight gradients are summed in float32 at least. NaN is never dropped. Forward-mode
    derivatives are not defined.

    Args:
      params: kernels ``(out, in)``, whose rows are cheap to pick. Inputs and h enter a product in
        the dtype of its kernel.
      carry: h, ``[*batch, hidden]``; of an LSTM ``(c, h)``.
      xs: ``[time, *batch, inputs]``.
      k: columns kept of each gate: a number, or a fraction of hidden. Static.
      all_carries: whether to return the carries of all steps too.
      unroll: steps a turn of both loops, as in `jax.lax.scan`.
      per_gate: whether the forward pass has a product for each gate, as cells with a layer for each
        gate do. Rounds as they do.

    Returns:
      The last carry, and h of all steps ``[time, *batch, hidden]``; with ``all_carries`` also the
      carries of all steps.

    Raises:
      TypeError: if ``params`` are of another type.
      ValueError: if ``k`` is impossible, or shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.meprop.rnn import meprop_rnn
      >>> from priorityprop_jax.rnn import GRUParams
      >>> params = GRUParams(jnp.ones((12, 3)), jnp.ones((12, 4)))
      >>> h, xs = jnp.ones((2, 4)), jnp.ones((1, 2, 3)) / 3
      >>> loss_fn = lambda params: jnp.sum(meprop_rnn(params, h, xs, k=1)[1])
      >>> grads = jax.grad(loss_fn)(params)
      >>> int(jnp.sum(jnp.any(grads.input_kernel != 0, axis=1)))
      3

    References:
      Sun et al., `meProp <https://arxiv.org/abs/1706.06197>`_, 2017
    """
    options = {"all_carries": all_carries, "unroll": unroll, "per_gate": per_gate}
    return run_cell(params, carry, xs, k=k, **options)


class MePropRNN(FusedRNN):
    """`flax.nnx.RNN` whose backward pass is meProp's; made by `swap_rnn`.

    Values, parameters and their paths are the RNN's; see `FusedRNN`. Under `jax.jit` on a CPU the
    values of cells with fused gates are the plain RNN's to the bit; those of `nnx.LSTMCell` too,
    unless the compiler joins the products of its gates.

    Attributes:
      meprop_k: columns of each gate that the gradient flows back through at a step: a number, or
        a fraction of the hidden width. Static.
      meprop_name: what to call the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.meprop.rnn import swap_rnn
      >>> rnn = nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
      >>> swap_rnn(rnn, 2, "encoder")
      True
      >>> loss_fn = lambda rnn, x: jnp.sum(rnn(x, initial_carry=jnp.ones((4, 8))))
      >>> grads = nnx.grad(loss_fn)(rnn, jnp.ones((4, 1, 3)))
      >>> int(jnp.sum(jnp.any(grads["cell"]["dense_i"]["kernel"][...] != 0, axis=0)))
      6
    """

    meprop_k: int | float = 1.0
    meprop_name: str = ""

    own = ("meprop_k", "meprop_name")

    def run(self, params, carry, xs, all_carries, per_gate):
        """See `FusedRNN.run`."""
        outputs, hidden = params.recurrent_kernel.shape
        kept = outputs // hidden * resolve_k(self.meprop_k, hidden, self.meprop_name)
        rows, features = xs.size // xs.shape[-1], hidden + xs.shape[-1]
        enter(self.meprop_name, LayerUse(rows, features, outputs, (kept,), by_rows=False))
        options = {"all_carries": all_carries, "unroll": self.unroll, "per_gate": per_gate}
        return meprop_rnn(params, carry, xs, k=self.meprop_k, **options)


def swap_rnn(rnn: Any, k: int | float, name: str = "") -> bool:
    """Turns an `nnx.RNN` into a `MePropRNN` in place; parameters and paths stay.

    Args:
      rnn: the module. A `MePropRNN` gets the new ``k``.
      k: columns kept of each gate: a number, or a fraction of the hidden width.
      name: what to call the layer in an error.

    Returns:
      Whether it could: False for a subclass of `nnx.RNN`, another cell than those of `MePropRNN`,
      other functions than sigmoid and tanh, or layers with a ``dot_general`` unknown here.

    Raises:
      TypeError: if ``k`` is no number.
      ValueError: if ``k`` is impossible for the cell's width.
    """
    check_k(k)
    if not is_fusible(rnn):
        return False
    resolve_k(k, rnn.cell.hidden_features, name)
    return swap(rnn, MePropRNN, meprop_k=k, meprop_name=name)


class LinenMePropRNN(LinenFusedRNN, kw_only=True):
    """`flax.linen.RNN` whose backward pass is meProp's.

    Parameters and their paths are those of `flax.linen.RNN` with the same cell, so that either
    runs what the other was initialized with. Values are the same as far as those of `MePropRNN`.

    Attributes:
      k: columns of each gate that the gradient flows back through at a step: a number, or a
        fraction of the hidden width. Static.

    Raises:
      TypeError: when called, if the cell is not `nn.OptimizedLSTMCell`, `nn.LSTMCell` or
        `nn.GRUCell` with sigmoid and tanh.
      ValueError: when called, if ``k`` is impossible for the cell's width.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from priorityprop_jax.meprop import LinenMePropRNN
      >>> rnn = LinenMePropRNN(nn.GRUCell(8), k=2)
      >>> x = jnp.ones((4, 1, 3))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> grads = jax.grad(lambda variables: jnp.sum(rnn.apply(variables, x)))(variables)
      >>> int(jnp.sum(grads["params"]["cell"]["iz"]["kernel"].any(axis=0)))
      2
    """

    k: int | float

    def check(self, features: int) -> None:
        """See `LinenFusedRNN.check`."""
        resolve_k(self.k, features, "/".join(self.path) or type(self).__name__)

    def run(self, params, carry, xs, all_carries, per_gate):
        """See `FusedRNN.run`."""
        options = {"all_carries": all_carries, "unroll": self.unroll, "per_gate": per_gate}
        return meprop_rnn(params, carry, xs, k=self.k, **options)
