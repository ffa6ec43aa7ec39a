"""Highway-BP over depth: the blocks of a residual stack go backward all at once."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from priorityprop_jax.core.fragile import closed_over
from priorityprop_jax.core.precision import wide_type
from priorityprop_jax.rnn.rounds import (
    HighwayReport,
    check_iterations,
    iterate,
)

Block = Callable[[Any, Any], Any]


def highway_report() -> HighwayReport:
    """A zero `HighwayReport`, for the argument ``probe`` of `highway_scan`.

    A backward pass has no output but gradients: that of the loss for the probe *is* the report.
    Give each `highway_scan` a probe of its own, as reports add up, like gradients do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.highway.scan import highway_report, highway_scan
      >>> def loss_fn(params, probe, x):
      ...     block = lambda p, x: x + 0.1 * jnp.tanh(x @ p)
      ...     return jnp.sum(highway_scan(block, params, x, iterations=2, probe=probe) ** 2)
      >>> params = jax.random.normal(jax.random.key(0), (6, 4, 4))
      >>> grad_fn = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))
      >>> grads, report = grad_fn(params, highway_report(), jnp.ones(4))
      >>> int(report.rounds), bool(report.stopped)
      (2, False)
    """
    return HighwayReport(*(jnp.zeros((), jnp.float32) for _ in HighwayReport._fields))


def highway_scan(
    block: Block,
    params: Any,
    x: Any,
    *,
    iterations: int | None,
    tol: float | None = None,
    guard: bool = True,
    has_aux: bool = False,
    probe: HighwayReport | None = None,
) -> Any:
    r"""Applies a stack of residual blocks; backward, all blocks at once, a few times over.

    The forward pass is `jax.lax.scan` over the layers, bit for bit. Of the gradient, which is a sum
    over all paths from a loss back to a layer, the backward pass keeps those that go through at
    most :math:`k` (``iterations``) blocks and along the residuals of all others. With
    :math:`x_i = x_{i-1} + g_i(x_{i-1})`, and :math:`b` the cotangent of the last of them,

    .. math::
        w^{(0)}_i = b, \qquad w^{(j+1)}_i = b + \sum_{l > i} J_{g_l}^\top w^{(j)}_l

    where all products of blocks' Jacobians with their cotangents are one. One more gives the
    gradients of all parameters from :math:`w^{(k)}`, and that of ``x``. With :math:`L` layers,
    :math:`k = L - 1` rounds are exact in exact arithmetic.

    This is no saving of work: forward and backward cost :math:`(3 + k) / 3` of those of plain
    backpropagation. It shortens the chain of dependent products from :math:`L` to :math:`k + 1`,
    which pays where a device is idle for most of a block, as with small batches and narrow layers.
    What ``k`` a model needs is for `gradient_quality_table` to tell.

    Differentiating the gradient again needs a single round, or ``guard=False`` and no ``tol``, as
    JAX has no reverse mode for the loop that they need. Cotangents are accumulated in float32 at
    least. Under `jax.checkpoint` a block is computed again in every round.

    Args:
      block: ``(params_i, x) -> x``, the whole layer with its residual; the output is like ``x``.
        Arrays that it closes over are seen by all layers, and get gradients too.
      params: pytree of arrays, ``[layers, ...]``. What else differs by layer, such as the keys of
        dropout, goes here as well.
      x: pytree of floating-point arrays, the input of the first layer.
      iterations: rounds, :math:`k \ge 0`, at most if ``tol`` or ``guard`` end them sooner. None, or
        :math:`k \ge L - 1` without ``tol``, means the exact gradient by plain autodiff of the
        scan, which is less work than as many rounds.
      tol: stop once a round's relative correction is not above it.
      guard: stop before a round whose correction is larger than the last one's (the first one's is
        compared to the cotangents), as the rounds after it would mostly lead further away. A
        correction that is NaN stops too, and the gradient shows the NaN.
      has_aux: ``block`` returns ``(x, aux)``. The gradients of ``aux`` are exact for the
        parameters of the same layer, and a path from there goes through one block at least.
      probe: a zero report, see `highway_report`. Its gradient is the report of the backward pass.

    Returns:
      The last layer's output; or ``(x, aux)`` with ``has_aux``, ``aux`` ``[layers, ...]``.

    Raises:
      TypeError: if ``block`` does not return the like of ``x``, ``x`` is not of floating-point
        arrays, or an option is of a wrong type.
      ValueError: if an option is impossible, or ``params`` do not share one number of layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.highway.scan import highway_scan
      >>> block = lambda p, x: x + 0.1 * jnp.tanh(x @ p)
      >>> params = jax.random.normal(jax.random.key(0), (6, 4, 4))
      >>> def loss_fn(params, iterations):
      ...     return jnp.sum(highway_scan(block, params, jnp.ones(4), iterations=iterations) ** 2)
      >>> exact, near = (jax.grad(loss_fn)(params, k) for k in (None, 2))
      >>> bool(jnp.linalg.norm(near - exact) < 0.05 * jnp.linalg.norm(exact))
      True

    References:
      Fagnou et al., `Accelerated Training through Iterative Gradient Propagation Along the Residual
      Path <https://arxiv.org/abs/2501.17086>`_, 2025
    """
    layers = _check(block, params, x, iterations, tol)
    rounds = layers if iterations is None else iterations

    def layer(p: Any, x: Any) -> Any:
        y, aux = block(p, x) if has_aux else (block(p, x), None)
        _check_same(x, y)
        # A number is of the rest, so that what is differentiated is the floating-point alone.
        differentiated, others = _split(jax.tree.leaves(aux))
        structure.append(jax.tree.structure(aux))
        return (y, differentiated), others

    structure: list[Any] = []
    first = jax.tree.map(lambda p: p[0], params)
    hoisted, consts = closed_over(layer, first, x)
    tree = jax.tree.structure(params)
    trained, fixed = _split(jax.tree.leaves(params))  # [layers, ...]
    shared, others = _split(consts)

    def apply(trained: list, shared: list, x: Any, fixed: list, others: list) -> Any:
        return hoisted(_join(shared, others), jax.tree.unflatten(tree, _join(trained, fixed)), x)

    def scan(trained, shared, x, fixed, others, probe):
        def body(x, p):
            (y, aux), rest = apply(p[0], shared, x, p[1], others)
            return y, (aux, rest)

        return lax.scan(body, x, (trained, fixed), length=layers)

    def forward(trained, shared, x, fixed, others, probe):
        def body(x, p):
            run = functools.partial(apply, fixed=p[1], others=others)
            (y, aux), pullback, rest = jax.vjp(run, p[0], shared, x, has_aux=True)
            # The scan stacks what a pullback needs; what it has from the params is not copied.
            return y, ((aux, rest), pullback)

        y, (outputs, pullbacks) = lax.scan(body, x, (trained, fixed), length=layers)
        return (y, outputs), pullbacks

    def backward(pullbacks, bars):
        y_bar, (aux_bar, _) = bars
        narrow = lambda w: jax.tree.map(lambda w, y: w.astype(y.dtype), w, y_bar)  # noqa: E731

        def pull(w: Any) -> Any:
            return jax.vmap(lambda pullback, *bars: pullback(bars))(pullbacks, w, aux_bar)

        # Along the residuals every layer's output gets what the last one's does.
        first = jax.tree.map(lambda y: jnp.stack([y] * layers), _wide(y_bar))

        def step(w: Any) -> Any:
            w = narrow(w)  # as the blocks see it
            u = jax.tree.map(jnp.subtract, _wide(pull(w)[2]), _wide(w))
            through = jax.tree.map(lambda u: lax.cumsum(u[1:], axis=0, reverse=True), u)
            return jax.tree.map(lambda w, u: w.at[:-1].add(u), first, through)

        w, report = iterate(step, first, rounds, tol, guard)
        trained_bar, shared_bar, x_bar = pull(narrow(w))
        add = lambda g: jnp.sum(g, 0, dtype=wide_type(g)).astype(g.dtype)  # noqa: E731
        shared_bar = jax.tree.map(add, shared_bar)
        x_bar = jax.tree.map(lambda g: g[0], x_bar)
        probe_bar = None if probe is None else report
        return trained_bar, shared_bar, x_bar, None, None, probe_bar

    run = scan
    if rounds < layers - 1 or tol is not None and iterations is not None:
        run = jax.custom_vjp(scan)
        run.defvjp(forward, backward)
    y, (aux, rest) = run(trained, shared, x, fixed, others, probe)
    return (y, jax.tree.unflatten(structure[0], _join(aux, rest))) if has_aux else y


def highway_nnx(
    modules: Sequence[nnx.Module] | nnx.Module,
    x: Any,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    **options: Any,
) -> Any:
    """`highway_scan` over `flax.nnx` modules of one shape.

    Gradients reach the modules' parameters under `flax.nnx.grad` of the model that holds them.
    What else a call changes in a module, such as the counts of its random streams and the
    statistics of its norms, is changed as if the modules had been called one after the other.

    Args:
      modules: a list of modules that differ in the values of their arrays only, or one module whose
        arrays all have a leading axis of layers, as `flax.nnx.vmap` over a constructor makes it. A
        list costs a copy of all parameters in every step.
      x: pytree of floating-point arrays, the input of the first module.
      call: ``(module, x) -> x``, or ``(x, aux)`` with ``has_aux``; by default ``module(x)``.
      **options: of `highway_scan`.

    Returns:
      As `highway_scan`.

    Raises:
      TypeError: if ``modules`` are none.
      ValueError: if they are not of one shape, or share what a call changes, as a random stream.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.highway.scan import highway_nnx
      >>> class Block(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(4, 4, rngs=rngs)
      ...     def __call__(self, x):
      ...         return x + jnp.tanh(self.linear(x))
      >>> blocks = nnx.List([Block(nnx.Rngs(i)) for i in range(6)])
      >>> loss_fn = lambda blocks, x: jnp.sum(highway_nnx(blocks, x, iterations=2) ** 2)
      >>> grads = nnx.grad(loss_fn)(blocks, jnp.ones((1, 4)))
      >>> grads[0]["linear"]["kernel"].shape
      (4, 4)
    """
    stacked = isinstance(modules, nnx.Module) and not isinstance(modules, nnx.List)
    items: list[Any] = [modules] if stacked else list(modules)  # pyright: ignore[reportArgumentType]
    if not items or not all(isinstance(module, nnx.Module) for module in items):
        raise TypeError(f"modules must be flax.nnx modules, got {modules!r}")
    run = call or (lambda module, x: module(x))
    graphdef, params, state = nnx.split(items[0], nnx.Param, ...)
    if not stacked:
        splits = [nnx.split(module, nnx.Param, ...) for module in items]
        for i, split in enumerate(splits):
            if jax.tree.map(jnp.shape, split) != jax.tree.map(jnp.shape, splits[0]):
                raise ValueError(f"module {i} is not of the shape of module 0")
        states = [split[1:] for split in splits]
        params, state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    has_aux = options.pop("has_aux", False)

    shared = _shared(items)

    def block(p: Any, x: Any) -> Any:
        module = nnx.merge(graphdef, *p)
        before = _variables(module)
        out = run(module, x)
        y, aux = out if has_aux else (out, None)
        changed = [k for k, new in _variables(module).items() if before.get(k, new) is not new]
        if once := sorted(shared.intersection(changed)):
            raise ValueError(
                f"the modules share {', '.join(once)}, and a call changes it: run at once, all "
                "would start from the same, as from one random stream; give each module its own, "
                "as rngs.fork() does"
            )
        return y, (aux, nnx.state(module, nnx.Not(nnx.Param)))

    y, (aux, state) = highway_scan(block, (params, state), x, has_aux=True, **options)
    for i, module in enumerate(items):
        nnx.update(module, state if stacked else jax.tree.map(lambda s, i=i: s[i], state))
    return (y, aux) if has_aux else y


def _variables(module: nnx.Module, of: Callable[[Any], Any] = lambda x: x.get_raw_value()) -> Any:
    """What the variables of a module are, by path, but for parameters."""
    found = nnx.iter_graph(module)
    kept = ((path, x) for path, x in found if isinstance(x, nnx.Variable))
    return {"/".join(map(str, path)): of(x) for path, x in kept if not isinstance(x, nnx.Param)}


def _shared(modules: Sequence[nnx.Module]) -> set[str]:
    """Paths of variables that more than one of the modules holds."""
    found = [_variables(module, id) for module in modules]
    count = collections.Counter(x for each in found for x in set(each.values()))
    return {path for each in found for path, x in each.items() if count[x] > 1}


def _wide(tree: Any) -> Any:
    """In float32 at least."""
    return jax.tree.map(lambda x: x.astype(wide_type(x)), tree)


def _split(leaves: Sequence[Any]) -> tuple[list, list]:
    """What can be differentiated, and what can not; None in the place of the other kind."""
    inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]
    pairs = list(zip(leaves, inexact, strict=True))
    return [a if yes else None for a, yes in pairs], [None if yes else a for a, yes in pairs]


def _join(some: Sequence[Any], others: Sequence[Any]) -> list:
    """What `_split` took apart."""
    return [b if a is None else a for a, b in zip(some, others, strict=True)]


def _check(block: Any, params: Any, x: Any, iterations: Any, tol: Any) -> int:
    """Refuses what is no stack of layers, or else says how many layers it has."""
    if not callable(block):
        raise TypeError(f"block must be a function (params_i, x) -> x, got {block!r}")
    # Without rounds there is nothing that tol could end.
    check_iterations(iterations, None if iterations is None else tol)
    leaves = jax.tree.leaves(x)
    if not leaves or not all(jnp.issubdtype(jnp.result_type(a), jnp.floating) for a in leaves):
        raise TypeError(
            f"x must hold floating-point arrays only, got {jax.tree.map(jnp.result_type, x)}; what "
            "is no activation goes into params, or is closed over by block"
        )
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        raise ValueError(
            "the arrays of params must share a first axis of at least one layer, got first axes "
            f"{sorted(sizes)}"
        )
    return sizes.pop()[0]


def _check_same(x: Any, y: Any) -> None:
    """Refuses a layer's output ``y`` that is not like its input."""
    kinds = [
        (jax.tree.structure(tree), [(a.shape, a.dtype) for a in map(jnp.asarray, leaves)])
        for tree in (x, y)
        for leaves in [jax.tree.leaves(tree)]
    ]
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"block must return the like of x, {jax.tree.map(jax.typeof, x)}, got "
            f"{jax.tree.map(jax.typeof, y)}; is has_aux missing or too much?"
        )
