"""meProp inside the RNN modules of Flax: one backward pass over the whole sequence."""

from __future__ import annotations

from typing import Any

from priorityprop_jax.core.frame import LayerUse, enter
from priorityprop_jax.core.selection import check_k, resolve_k
from priorityprop_jax.rnn.fused import FusedRNN, is_fusible, swap
from priorityprop_jax.rnn.recurrent import run_cell


class MePropRNN(FusedRNN):
    """`flax.nnx.RNN` whose backward pass is meProp's, see `run_cell`; made by `swap_rnn`.

    Under `jax.jit` on a CPU the values of cells with fused gates are the plain RNN's to the bit;
    those of `nnx.LSTMCell` too, unless the compiler joins the products of its gates.
    """

    meprop_k: int | float = 1.0  # columns of each gate, or the fraction of them
    meprop_name: str = ""  # of the layer

    own = ("meprop_k", "meprop_name")

    def run(self, params, carry, xs, all_carries, per_gate):
        """See `FusedRNN.run`."""
        outputs, hidden = params.recurrent_kernel.shape
        kept = outputs // hidden * resolve_k(self.meprop_k, hidden, self.meprop_name)
        rows, features = xs.size // xs.shape[-1], hidden + xs.shape[-1]
        enter(self.meprop_name, LayerUse(rows, features, outputs, (kept,), by_rows=False))
        options = {"all_carries": all_carries, "unroll": self.unroll, "per_gate": per_gate}
        return run_cell(params, carry, xs, k=self.meprop_k, **options)


def swap_rnn(rnn: Any, k: int | float, name: str = "") -> bool:
    """Turns an `nnx.RNN` into a `MePropRNN` in place, or gives one a new ``k``; whether it could.

    It can't with a subclass of `nnx.RNN` or with a cell that `is_fusible` does not know.
    """
    check_k(k)
    if not is_fusible(rnn):
        return False
    resolve_k(k, rnn.cell.hidden_features, name)
    return swap(rnn, MePropRNN, meprop_k=k, meprop_name=name)
