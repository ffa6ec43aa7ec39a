"""What JAX and Flax do not promise to keep: each behind one function, which nothing else goes past.

CONTRIBUTING.md lists them, and tests/core/test_fragile.py says which of them a release has changed.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import tracers
from jax import lax
from jax.custom_batching import custom_vmap as custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning as custom_partitioning
from jax.extend import core
from jax.extend.random import define_prng_impl
from jax.interpreters import mlir, partial_eval

_MOST = 2**31 - 1


def varying(x: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` mesh along which an array differs between shards."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The same array, of a type that differs between shards along these axes too."""
    missing = tuple(sorted(frozenset(axes) - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(tree: Any) -> Any:
    """Arrays that differ between shards along the axes along which one of them does.

    The gradient of one that did not is summed over the shards by the rule of this cast.
    """
    axes = frozenset[str]().union(*map(varying, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: vary(x, axes), tree) if axes else tree


def zeros(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.Array:
    """Zeros for a loop to start from that adds up what comes of other arrays.

    Inside of `jax.shard_map` they must be of a type that differs between shards as those do.
    """
    return vary(jnp.zeros(shape, dtype), frozenset[str]().union(*map(varying, like)))


def varying_type(axes: frozenset[str]) -> dict[str, Any]:
    """What tells a `jax.ShapeDtypeStruct` that it differs between shards along these axes."""
    if not axes:
        return {}
    whole = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P())
    return {"sharding": whole, "manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}


def laid_out(function: Callable[..., Any], results: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on a mesh with explicit axes as on one where the compiler lays arrays out.

    ``results`` of the arguments gives the `jax.sharding.PartitionSpec` of each result.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None:
            return function(*args)
        place = lambda spec: jax.sharding.NamedSharding(mesh, spec)  # noqa: E731
        shardings = jax.tree.map(place, results(*args))
        axes = tuple(mesh.explicit_axes)
        return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*args)

    return run


def spec_of(x: Any) -> Any:
    """How an array lies along the explicit axes of a mesh."""
    return jax.typeof(x).sharding.spec


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """Where no mesh is set, as inside of a rule of `custom_partitioning`, which one device runs."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def here_or(native: Callable[..., Any], portable: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A function that is ``native`` in a program compiled for the CPU here, else ``portable``.

    Both take the same arrays, and give lists of results of the same types. What `jax.export` writes
    down runs on other machines, and on which platforms it does is known no sooner than this.
    """

    def run(*args: Any) -> list[Any]:
        jaxpr = jax.make_jaxpr(native)(*args)
        # Not as a program, which would be counted as one that runs.
        return _here.bind(*args, native=jaxpr, portable=lambda: portable)

    return run


def _lower_here(ctx: Any, *args: Any, native: Any, portable: Any) -> Any:
    module = ctx.module_context
    here = tuple(module.platforms) == ("cpu",) and not module.lowering_parameters.for_export
    function = core.jaxpr_as_fun(native) if here else portable()
    return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


_here = core.Primitive("here_or_portable")
_here.multiple_results = True
_here.def_impl(lambda *args, native, **_: core.jaxpr_as_fun(native)(*args))
_here.def_abstract_eval(lambda *_, native, **__: native.out_avals)
mlir.register_lowering(_here, _lower_here)


def current_trace() -> Any:
    """What traces the program at this moment; equal to itself only."""
    return tracers.current_trace()


def closed_over(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` with the arrays that it closes over as a first argument, and those arrays.

    A custom VJP must not close over anything that is traced.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    # The function may be kept longer than what is traced may live.
    empty = core.ClosedJaxpr(closed.jaxpr, [None] * len(closed.consts))
    tree = jax.tree.structure(shape)

    def converted(consts: list[Any], *args: Any) -> Any:
        run = core.jaxpr_as_fun(core.ClosedJaxpr(empty.jaxpr, consts))
        return jax.tree.unflatten(tree, run(*jax.tree.leaves(args)))

    return converted, list(closed.consts)


def calls_python(jaxpr: Any) -> bool:
    """Whether a program calls Python back, which may raise."""
    return re.search(r"\w_callback\[", str(jaxpr)) is not None


def flip_sequences(*args: Any, **options: Any) -> jax.Array:
    """The function by which the RNN modules of Flax turn sequences of several lengths round."""
    from flax.nnx.nn import recurrent

    return recurrent.flip_sequences(*args, **options)


def name_of(eqn: Any) -> str | None:
    """The name that `jax.ad_checkpoint.checkpoint_name` gave to what an equation passes on."""
    return eqn.params["name"] if eqn.primitive.name == "name" else None


def is_cast(eqn: Any) -> bool:
    """Whether an equation changes the dtype of its operand or where it lies, and nothing else."""
    return eqn.primitive.name in ("convert_element_type", "reshard", "mesh_cast")


def is_stop(eqn: Any) -> bool:
    """Whether an equation is a `jax.lax.stop_gradient`."""
    return eqn.primitive.name == "stop_gradient"


def bind(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation of a jaxpr, of other operands than its own."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def needed_part(jaxpr: Any, results: Collection[int]) -> tuple[Any, Sequence[bool]]:
    """The jaxpr of some results, what is inside of it cut too, and which arguments it takes."""
    return partial_eval.dce_jaxpr(jaxpr, [i in results for i in range(len(jaxpr.outvars))])


def _never(*_: Any) -> Any:
    raise TypeError("row numbers are no random key")


@functools.cache
def _rows_dtype() -> Any:
    """A dtype of 32 bits without arithmetic, whose name is read in the errors of JAX."""
    options: dict[str, Any] = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), _never)
    options |= {"name": "row_numbers", "tag": "RowSparse rows: use on_values"}
    return define_prng_impl(key_shape=(1,), **options)


def seal(rows: Any) -> Any:
    """Row numbers ``int32[k]`` as an array out of reach of arithmetic; zeros of it are padding."""
    if isinstance(rows, jax.ShapeDtypeStruct):
        return jax.eval_shape(seal, rows)
    flipped = _MOST - jnp.asarray(rows, jnp.int32)
    return jax.random.wrap_key_data(flipped.astype(jnp.uint32)[..., None], impl=_rows_dtype())


def unseal(sealed: Any) -> Any:
    """The inverse of `seal`; what is no such array raises a TypeError."""
    if isinstance(sealed, jax.ShapeDtypeStruct):
        return jax.eval_shape(unseal, sealed)
    if not jnp.issubdtype(getattr(sealed, "dtype", float), jax.dtypes.prng_key):
        raise TypeError(
            f"the row numbers of a RowSparse have become {sealed!r}: something that maps over "
            "arrays has changed them; use on_values or clip_by_global_norm from "
            "priorityprop_jax.core.rows in its place, or densify the tree first"
        )
    return _MOST - jax.random.key_data(sealed)[..., 0].astype(jnp.int32)
