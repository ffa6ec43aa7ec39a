"""Highway-BP over devices: a stack cut into stages, whose backward passes run side by side."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from priorityprop_jax.highway import scan as highway


class Collective(NamedTuple):
    """Operations of one kind between devices.

    Attributes:
      count: how many there are in the program.
      bytes: what one device holds of their results.
    """

    count: int
    bytes: int


def highway_stages(
    stage_fn: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    mesh: Mesh,
    axis: str = "stage",
    *,
    iterations: int = 1,
) -> Any:
    r"""Applies a residual stack that is cut into stages over devices; backward, all at once.

    Each of the :math:`D` devices along ``axis`` holds one stage, :math:`L / D` layers. The gradient
    is that of `highway_scan` with a whole stage as its block and identity residuals: exact inside
    each stage, and between stages a sum over the paths that go through at most :math:`k`
    (``iterations``) whole stages between a layer's own and the loss. With :math:`D - 1` rounds it
    is exact; more are not run. In a round every stage pulls its cotangent back through its layers,
    and the devices add up what comes after them, in :math:`1 + \lceil \log_2 (D - 1) \rceil`
    permutes of one activation each. That is never more than a gather's :math:`D - 1` activations,
    and less from :math:`D = 5` on.

    **When an exact pipeline is better.** Whenever the batch can be split into several microbatches:
    with :math:`M` of them a pipeline keeps its devices busy for :math:`M / (M + D - 1)` of the time
    and wastes nothing on approximations. Here the forward pass still goes from stage to stage while
    all other devices wait; of the backward pass, in units of a stage's forward pass, the
    :math:`2 D` of a sequential one become :math:`3 + k` (one to compute the stage's activations
    again, ``k`` rounds, two for the gradients). So this is for a batch too small to be split that
    is wanted soon, on devices with a fast link, and for models on which few rounds are near enough
    (`gradient_quality_table` tells). There is no guard: a stack whose stages are far from the
    identity gets a poor gradient, or a large one.

    Call it inside `jax.jit`, with ``params`` sharded along ``axis`` over their first axis. Other
    axes of the mesh, such as one of data, stay with the compiler.

    Args:
      stage_fn: ``(params_s, x) -> x``, a whole stage, with params ``[layers / stages, ...]``; the
        output is like ``x``. It must not close over arrays that are traced, and not communicate
        along ``axis``. What all layers share goes into ``params``, broadcast over layers.
      params: pytree of arrays, ``[layers, ...]``.
      x: pytree of floating-point arrays, the input of the first stage.
      mesh: has ``axis``.
      axis: of stages.
      iterations: rounds, :math:`k \ge 0`.

    Returns:
      The last stage's output, on all devices.

    Raises:
      TypeError: if ``iterations`` is no whole number, or ``stage_fn`` returns anything but the like
        of ``x`` or closes over traced arrays.
      ValueError: if ``iterations`` is negative, the mesh has no such axis, or the layers do not
        divide evenly among stages.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import Mesh
      >>> from priorityprop_jax.highway.stages import highway_stages
      >>> def stage_fn(params, x):  # the layers of one stage
      ...     return jax.lax.scan(lambda x, p: (x + 0.1 * jnp.tanh(x @ p), None), x, params)[0]
      >>> mesh = Mesh(jax.devices()[:1], ("stage",))
      >>> params = jnp.stack([jnp.eye(3)] * 4)
      >>> loss_fn = jax.jit(lambda p, x: jnp.sum(highway_stages(stage_fn, p, x, mesh)))
      >>> jax.grad(loss_fn)(params, jnp.ones(3)).shape
      (4, 3, 3)
    """
    layers = highway.check(stage_fn, params, x, iterations)
    if axis not in mesh.shape:
        raise ValueError(f"mesh has no axis {axis!r}, but {', '.join(mesh.shape)}")
    stages = mesh.shape[axis]
    if layers % stages:
        raise ValueError(f"{layers} layers do not divide evenly among {stages} stages")
    if iterations is None:
        raise TypeError("iterations must be a whole number, got None")
    rounds = min(iterations, stages - 1)

    def stage(p: Any, x: Any) -> Any:
        y = stage_fn(p, x)
        highway.check_same(x, y)
        return y

    local = jax.eval_shape(
        lambda params: jax.tree.map(lambda p: p[: layers // stages], params), params
    )
    _, consts = highway.hoist(stage, local, x)
    traced = [jax.typeof(a) for a in consts if isinstance(a, Tracer)]
    if traced:
        raise TypeError(
            f"stage_fn closes over traced arrays, {traced}: put them into params, broadcast over "
            "layers"
        )
    tree = jax.tree.structure(params)
    trained, fixed = highway.split(jax.tree.leaves(params))

    def apply(trained: list, x: Any, fixed: list) -> Any:
        return stage_fn(jax.tree.unflatten(tree, highway.join(trained, fixed)), x)

    def send(tree: Any, by: int) -> Any:
        pairs = [(i, i + by) for i in range(stages) if 0 <= i + by < stages]
        return jax.tree.map(lambda a: lax.ppermute(a, axis, pairs), tree)

    def share(tree: Any, mine: jax.Array) -> Any:
        def one(a: jax.Array) -> jax.Array:
            # Adding -0.0 changes no number, not even a zero's sign. XLA's CPU compiler aborts on
            # narrow types here.
            (wide,) = highway.wide([a])
            return lax.psum(jnp.where(mine, wide, -0.0), axis).astype(a.dtype)

        return jax.tree.map(one, tree)

    def sum_after(u: Any) -> Any:
        """For each stage, the sum over the stages after it."""
        total, by = send(u, -1), 1
        while by < stages - 1:
            total = jax.tree.map(jnp.add, total, send(total, -by))
            by *= 2
        return total

    def run_stages(trained, x, fixed, places) -> Any:
        def hop(carry: Any, now: jax.Array) -> Any:
            x, y = carry
            run = functools.partial(apply, trained, x, fixed)
            y = lax.cond(now == places[0], run, lambda: y)
            came = send(y, 1)
            x = jax.tree.map(lambda a, b: jnp.where(now + 1 == places[0], a, b), came, x)
            return (x, y), None

        (x, y), _ = lax.scan(hop, (x, x), jnp.arange(stages))
        return share(y, places[0] == stages - 1), jax.tree.map(lambda a: a[None], x)

    def pull_stages(trained, inputs, fixed, y_bar, places) -> Any:
        x = jax.tree.map(lambda a: a[0], inputs)
        run = functools.partial(apply, fixed=fixed)
        _, pull = jax.vjp(run, trained, x)
        narrow = lambda w: jax.tree.map(lambda a, b: a.astype(b.dtype), w, x)  # noqa: E731
        w = b = highway.wide(y_bar)
        for _ in range(rounds):
            w = narrow(w)
            u = jax.tree.map(jnp.subtract, highway.wide(pull(w)[1]), highway.wide(w))
            w = jax.tree.map(jnp.add, b, sum_after(u))
        trained_bar, x_bar = pull(narrow(w))
        return trained_bar, share(x_bar, places[0] == 0)

    one, split = PartitionSpec(), PartitionSpec(axis)
    mapped = functools.partial(jax.shard_map, mesh=mesh, axis_names={axis}, check_vma=False)
    # `lax.axis_index` does not compile where other axes of the mesh are the compiler's. An array of
    # NumPy, as the rules of a custom VJP must not close over one that is traced.
    places = np.arange(stages)
    run_all: Any = mapped(run_stages, in_specs=(split, one, split, split), out_specs=(one, split))
    pull_all: Any = mapped(
        pull_stages,
        in_specs=(split, split, split, one, split),
        out_specs=(split, one),
    )

    @jax.custom_vjp
    def run(trained, x, fixed) -> Any:
        return run_all(trained, x, fixed, places)[0]

    def forward(trained, x, fixed) -> Any:
        y, inputs = run_all(trained, x, fixed, places)
        return y, (trained, inputs, fixed)

    def backward(residuals: Any, y_bar: Any) -> Any:
        return *pull_all(*residuals, y_bar, places), None

    run.defvjp(forward, backward)
    return run(trained, x, fixed)


_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_OPERATION = re.compile(rf"= (.*?) ({_KINDS})(?:-done)?\(")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def communication(compiled_text: str) -> dict[str, Collective]:
    """Counts what the devices of a compiled program send each other.

    An operation in a loop counts once, however often the loop runs: of `highway_stages` that is the
    forward pass, which permutes one activation for each stage. The rounds of its backward pass are
    no loop.

    Args:
      compiled_text: the program, from ``jax.jit(f).lower(*args).compile().as_text()``.

    Returns:
      The operations by their kind, such as ``"collective-permute"`` and ``"all-reduce"``.

    Example:
      >>> from priorityprop_jax.highway.stages import communication
      >>> communication("%p = f32[2,8]{1,0} collective-permute(%x), channel_id=1")
      {'collective-permute': Collective(count=1, bytes=64)}
    """
    found: dict[str, Collective] = {}
    for shape, kind in _OPERATION.findall(compiled_text):
        size = sum(
            int(bits or 8) * math.prod(int(n) for n in dims.split(",") if n) // 8
            for bits, dims in _ARRAY.findall(shape)
        )
        count, total = found.get(kind, (0, 0))
        found[kind] = Collective(count + 1, total + size)
    return found
