"""RNN modules of Flax with an exact backward pass that is leaner than the automatic one."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype

from priorityprop_jax.core.modules import check_module, walk
from priorityprop_jax.rnn import native
from priorityprop_jax.rnn.fused import (
    FusedRNN,
    joined,
    options_of,
    over_sequence,
    sizes_of,
    standard,
    swap,
)
from priorityprop_jax.rnn.highway import check_probe, highway_rnn
from priorityprop_jax.rnn.rounds import check_iterations

# On a CPU with more rows than this in a step its product keeps the cores busy, and what the lean
# backward pass stores for each step costs more time than it saves: see benchmarks/speed/highway.py.
# Where native kernels run it, they are sooner with any number of rows.
_MOST_ROWS = 64


def _too_many(cell: Any, rows: Any, steps: Any, iterations: int | None) -> bool:
    known = isinstance(rows, int)  # and not of a symbolic shape, as `jax.export` has them
    if iterations is not None or not known or rows <= _MOST_ROWS or jax.default_backend() != "cpu":
        return False
    # A cell that was put in later may have neither.
    dtype = getattr(cell, "dtype", None) or getattr(cell, "param_dtype", None)
    return not (dtype == jnp.float32 and isinstance(steps, int) and native.are_here(steps))


class LeanRNN(FusedRNN):
    """`flax.nnx.RNN` with the backward pass of `highway_rnn`; made by `lean_rnn`, see there."""

    lean_iterations: int | None = None
    lean_tol: float | None = None
    own = ("lean_iterations", "lean_tol")

    def left_alone(self, rows, steps, probe=None, **more):
        """See `FusedRNN.left_alone`."""
        check_probe(probe)  # of its report there is nothing but zeros where autodiff runs
        many = _too_many(self.cell, rows, steps, self.lean_iterations)
        return super().left_alone(rows, steps, **more) or many

    def run(self, params, carry, xs, all_carries, per_gate, probe=None):
        """See `FusedRNN.run`."""
        options = {"all_carries": all_carries, "unroll": self.unroll, "probe": probe}
        rounds = {"iterations": self.lean_iterations, "tol": self.lean_tol}
        return highway_rnn(params, carry, xs, **rounds, **options)


def lean_rnn(model: nnx.Module, *, iterations: int | None = None, tol: float | None = None) -> int:
    """Gives every `nnx.RNN` of a model a leaner backward pass, in place.

    By default gradients are exact to rounding: the automatic derivative of a scan adds to the
    gradients of the kernels at every step, this backward pass makes each of them by one product
    over all steps. On a CPU with AVX2 native kernels run cells in float32 over eight steps and
    more, forward and backward, where the installation has them. What they do not run is left to
    autodiff there where a step has more than 64 rows, as that is no slower. With ``iterations`` the
    backward pass is that of `highway_rnn`, approximate, all steps at once.

    Values are the plain RNN's to rounding, parameters and their paths the same; masks by
    ``seq_lengths`` and all other options of the module hold. A call takes one argument more,
    ``probe``, see `highway_rnn`. It knows `nnx.GRUCell`,
    `nnx.LSTMCell` and `nnx.OptimizedLSTMCell` with sigmoid and tanh, and leaves others as they
    are; what `meprop` put into an RNN it replaces. `restore` undoes it.

    Args:
      model: the module; changed in place.
      iterations: see `highway_rnn`, as for ``tol``.
      tol: the correction at which rounds stop.

    Returns:
      How many RNNs have this backward pass now.

    Raises:
      TypeError: if ``model`` is no `nnx.Module`, or an option no number.
      ValueError: if the model has no RNN with one of these cells, or an option makes no sense.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.rnn import lean_rnn
      >>> model = nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
      >>> lean_rnn(model)
      1
      >>> grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((4, 6, 3)))))(model)
    """
    check_module(model)
    check_iterations(iterations, tol)
    rnns = {name: part for name, part in walk(model) if isinstance(part, nnx.RNN)}
    options = {"lean_iterations": iterations, "lean_tol": tol}
    changed = sum(swap(rnn, LeanRNN, **options) for rnn in rnns.values())
    if not changed:
        found = {name: type(rnn.cell).__name__ for name, rnn in rnns.items()}
        raise ValueError(
            f"no RNN was changed: the model's are {found or 'none'}, and the cells known are "
            "GRUCell, LSTMCell and OptimizedLSTMCell with sigmoid and tanh, and the biases that "
            "Flax gives them"
        )
    return changed


# The layers of Linen's cells on the input and on the state, in the order of the gates, and those
# that Flax reads a bias of: what else is in the parameters, it leaves alone.
_LAYERS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.OptimizedLSTMCell: (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
    nn.LSTMCell: (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
    nn.GRUCell: (("ir", "iz", "in"), ("hr", "hz", "hn")),
}
_OF_STATE = ("hi", "hf", "hg", "ho")
_BIASES: dict[Any, tuple[str, ...]] = {
    nn.OptimizedLSTMCell: _OF_STATE,
    nn.LSTMCell: _OF_STATE,
    nn.GRUCell: ("ir", "iz", "in", "hn"),
}


class LinenLeanRNN(nn.RNN, kw_only=True):
    """`flax.linen.RNN` whose backward pass is that of `highway_rnn`; see `lean_rnn`.

    Parameters and their paths are those of `flax.linen.RNN` with the same cell, so that either
    runs what the other was initialized with. A call takes ``probe`` too, see `highway_rnn`.

    Attributes:
      iterations: rounds at most, or None for exact gradients. Static.
      tol: the correction at which rounds stop, or None. Static.

    Raises:
      TypeError, ValueError: when called, if the cell is not `nn.OptimizedLSTMCell`, `nn.LSTMCell`
        or `nn.GRUCell` with sigmoid and tanh, or an option makes no sense.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from priorityprop_jax.rnn import LinenLeanRNN
      >>> rnn, x = LinenLeanRNN(nn.GRUCell(8)), jnp.ones((4, 6, 3))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> grads = jax.grad(lambda variables: jnp.sum(rnn.apply(variables, x)))(variables)
    """

    iterations: int | None = None
    tol: float | None = None

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
        probe=None,
    ):
        """As `flax.linen.RNN.__call__`."""
        cell: Any = self.cell
        if not standard(cell, _LAYERS):
            known = ", ".join(kind.__name__ for kind in _LAYERS)
            raise TypeError(
                f"LinenLeanRNN knows the cells {known} with sigmoid and tanh, got {cell!r}: use "
                "nn.RNN"
            )
        check_iterations(self.iterations, self.tol)
        check_probe(probe)
        options = options_of(
            self,
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
        )
        options["seq_lengths"] = seq_lengths
        steps, shape = sizes_of(inputs, options["time_major"])
        many = _too_many(cell, math.prod(shape[:-1]), steps, self.iterations)
        if self.is_initializing() or many:
            return super().__call__(
                inputs, initial_carry=initial_carry, init_key=init_key, **options
            )
        if initial_carry is None:
            init_key = jax.random.key(0) if init_key is None else init_key
            initial_carry = cell.initialize_carry(init_key, shape)
        layers = nn.unbox(cell.variables["params"])

        def fuse(names, x) -> Any:
            kernel = jnp.concatenate([layers[name]["kernel"].T for name in names])
            biases = [layers[name]["bias"] for name in names if name in _BIASES[type(cell)]]
            return promote_dtype(x, kernel, joined(biases) if biases else None, dtype=cell.dtype)

        def run(params, carry, xs, all_carries):
            options = {"all_carries": all_carries, "unroll": self.unroll, "probe": probe}
            rounds = {"iterations": self.iterations, "tol": self.tol}
            return highway_rnn(params, carry, xs, **rounds, **options)

        return over_sequence(run, fuse, _LAYERS[type(cell)], initial_carry, inputs, **options)
