"""RNN modules of Flax with an exact backward pass that is leaner than the automatic one."""

from __future__ import annotations

import jax
from flax import nnx

from priorityprop_jax.core.modules import check_module, walk
from priorityprop_jax.rnn.fused import FusedRNN, LinenFusedRNN, swap
from priorityprop_jax.rnn.highway import check_iterations, highway_rnn

# On a CPU with more rows than this in a step its product keeps the cores busy, and what the lean
# backward pass stores for each step costs more time than it saves: see benchmarks/highway.py.
_MOST_ROWS = 64


def _too_many(rows: int, iterations: int | None) -> bool:
    return iterations is None and rows > _MOST_ROWS and jax.default_backend() == "cpu"


class LeanRNN(FusedRNN):
    """`flax.nnx.RNN` whose backward pass is that of `highway_rnn`; made by `lean_rnn`.

    Values are the plain RNN's to rounding; parameters and their paths are the same. A call takes
    one argument more than that of `flax.nnx.RNN`: ``probe``, see `highway_rnn`.

    Attributes:
      lean_iterations: rounds at most, or None for exact gradients. Static.
      lean_tol: the correction at which rounds stop, or None. Static.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.rnn.lean import lean_rnn
      >>> rnn = nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
      >>> lean_rnn(rnn, iterations=2)
      1
      >>> x, h = jnp.ones((4, 6, 3)), jnp.zeros((4, 8))
      >>> loss_fn = lambda probe: jnp.sum(rnn(x, initial_carry=h, probe=probe))
      >>> rounds, correction, stopped = jax.grad(loss_fn)(jnp.zeros(3)).tolist()
      >>> rounds, stopped
      (2.0, 0.0)
    """

    lean_iterations: int | None = None
    lean_tol: float | None = None
    own = ("lean_iterations", "lean_tol")

    def left_alone(self, rows):
        """See `FusedRNN.left_alone`."""
        return _too_many(rows, self.lean_iterations)

    def run(self, params, carry, xs, all_carries, per_gate, probe=None):
        """See `FusedRNN.run`."""
        options = {"all_carries": all_carries, "unroll": self.unroll, "probe": probe}
        rounds = {"iterations": self.lean_iterations, "tol": self.lean_tol}
        return highway_rnn(params, carry, xs, **rounds, **options)


def lean_rnn(model: nnx.Module, *, iterations: int | None = None, tol: float | None = None) -> int:
    """Gives every `nnx.RNN` of a model a leaner backward pass, in place.

    By default gradients are exact to rounding: the automatic derivative of a scan adds to the
    gradients of the kernels at every step, this backward pass makes each of them by one product
    over all steps. With ``iterations`` it is that of `highway_rnn`, approximate, all steps at once.

    On a CPU an exact one is left to autodiff where a step has more than 64 rows, as it is no slower
    there.

    Values are the plain RNN's to rounding, parameters and their paths the same; masks by
    ``seq_lengths`` and all other options of the module hold. It knows `nnx.GRUCell`,
    `nnx.LSTMCell` and `nnx.OptimizedLSTMCell` with sigmoid and tanh, and leaves others as they
    are; what `meprop` put into an RNN it replaces. `restore` undoes it.

    Args:
      model: the module; changed in place.
      iterations: rounds of `highway_rnn` at most, or None for exact gradients.
      tol: the correction at which rounds stop, see `highway_rnn`.

    Returns:
      How many RNNs have this backward pass now.

    Raises:
      TypeError: if ``model`` is no `nnx.Module`, or an option no number.
      ValueError: if the model has no RNN with one of these cells, or an option makes no sense.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.rnn.lean import lean_rnn
      >>> model = nnx.Bidirectional(
      ...     nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))),
      ...     nnx.RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(1))),
      ... )
      >>> lean_rnn(model)
      2
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
            "GRUCell, LSTMCell and OptimizedLSTMCell with sigmoid and tanh"
        )
    return changed


class LinenLeanRNN(LinenFusedRNN, kw_only=True):
    """`flax.linen.RNN` whose backward pass is that of `highway_rnn`; see `lean_rnn`.

    Parameters and their paths are those of `flax.linen.RNN` with the same cell, so that either
    runs what the other was initialized with. A call takes ``probe`` too, see `highway_rnn`.

    Attributes:
      iterations: rounds at most, or None for exact gradients. Static.
      tol: the correction at which rounds stop, or None. Static.

    Raises:
      TypeError: when called, if the cell is not `nn.OptimizedLSTMCell`, `nn.LSTMCell` or
        `nn.GRUCell` with sigmoid and tanh, or an option no number.
      ValueError: when called, if an option makes no sense.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from priorityprop_jax.rnn.lean import LinenLeanRNN
      >>> rnn, x = LinenLeanRNN(nn.GRUCell(8)), jnp.ones((4, 6, 3))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> grads = jax.grad(lambda variables: jnp.sum(rnn.apply(variables, x)))(variables)
    """

    iterations: int | None = None
    tol: float | None = None

    def check(self, features: int) -> None:
        """See `LinenFusedRNN.check`."""
        check_iterations(self.iterations, self.tol)

    def left_alone(self, rows):
        """See `FusedRNN.left_alone`."""
        return _too_many(rows, self.iterations)

    def run(self, params, carry, xs, all_carries, per_gate, probe=None):
        """See `FusedRNN.run`."""
        options = {"all_carries": all_carries, "unroll": self.unroll, "probe": probe}
        rounds = {"iterations": self.iterations, "tol": self.tol}
        return highway_rnn(params, carry, xs, **rounds, **options)
