"""meProp inside the RNN modules of Flax: one backward pass over the whole sequence."""

from __future__ import annotations

from typing import Any

from priorityprop_jax.core.selection import check_k, resolve_k
from priorityprop_jax.meprop.frame import LayerUse, enter
from priorityprop_jax.rnn.fused import FusedRNN, LinenFusedRNN, is_fusible, swap
from priorityprop_jax.rnn.recurrent import GRUParams, gru, lstm


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
        return _run(self, self.meprop_k, params, carry, xs, all_carries, per_gate)


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
        return _run(self, self.k, params, carry, xs, all_carries, per_gate)


def _run(rnn, k, params, carry, xs, all_carries, per_gate):
    function: Any = gru if isinstance(params, GRUParams) else lstm
    options = {"all_carries": all_carries, "unroll": rnn.unroll, "per_gate": per_gate}
    return function(params, carry, xs, k=k, **options)
