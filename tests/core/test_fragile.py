"""What JAX and Flax do not promise to keep, each with what stops working when it has changed."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from priorityprop_jax.core import fragile
from priorityprop_jax.core.walk import Walk, is_var
from tests.test_house import ROOT

P = jax.P
TABLE = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Fragile")[1].split("\n## ")[0]


def mesh(kind):
    return jax.make_mesh((4,), ("x",), axis_types=(kind,))


def traced(function, *args):
    return jax.make_jaxpr(function)(*args).eqns


def test_the_table_names_every_function_and_its_test():
    named = re.findall(r"^\| `(\w+)`.*\| `(test_\w+)` \|$", TABLE, re.MULTILINE)
    functions = {name for name, x in vars(fragile).items() if name[0] != "_" and is_own(x)}
    assert functions <= set(re.findall(r"`(\w+)`", TABLE)), "CONTRIBUTING.md lacks a row"
    assert {test for _, test in named} == {
        name for name in globals() if name.startswith("test_") and "table" not in name
    }


def is_own(x):
    wrapped = (fragile.custom_vmap, fragile.custom_partitioning)
    return getattr(x, "__module__", "") == fragile.__name__ or x in wrapped


def test_nothing_goes_past_the_table():
    """Imports and attributes that are private or experimental are in these files alone."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.ImportFrom(module=str(module), names=names):
                    used = {module, *(f"{module}.{alias.name}" for alias in names)}
                case ast.Import(names=names):
                    used = {alias.name for alias in names}
                case ast.Attribute(attr=attr):
                    used = {attr}
                case _:
                    continue
            if any(re.match(PRIVATE, name) for name in used):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"core/fragile.py", "core/walk.py", "core/cut.py"}


PACKAGE = ROOT / "priorityprop_jax"
PRIVATE = (
    r"(jax|optax)\._src|jax\.(interpreters|extend|custom_batching)|jax\.experimental\.custom_part|"
    r"flax\.core|flax\.nnx\.\w+\.|(manual_axis_type|ManualAxisType|pcast|primitive|auto_axes|"
    r"use_abstract_mesh|custom_vmap|custom_partitioning|_src)$"
)


def test_types_of_shards():
    def shard(x, whole):
        broken = "arrays inside of shard_map do not say along which axes they differ: {}"
        assert fragile.varying(x) == {"x"}, broken.format("jax.typeof(x).manual_axis_type.varying")
        assert fragile.varying(whole) == frozenset(), broken.format("what is whole varies")
        assert fragile.varying(fragile.vary(whole, {"x"})) == {"x"}, broken.format("lax.pcast")
        assert all(fragile.varying(y) for y in fragile.vary_alike([x, whole]))
        assert fragile.varying(fragile.zeros((2,), jnp.float32, x)) == {"x"}
        assert fragile.varying_type(frozenset()) == {}
        kind = jax.ShapeDtypeStruct((), x.dtype, **fragile.varying_type(frozenset({"x"})))
        assert kind.manual_axis_type.varying == {"x"}, "jax.ffi results cannot be told to vary"
        return x

    run = jax.shard_map(shard, mesh=mesh(AxisType.Auto), in_specs=(P("x"), P()), out_specs=P("x"))
    jax.eval_shape(run, jnp.ones(4), jnp.ones(3))


def test_explicit_axes():
    gather = fragile.laid_out(lambda x, i: x[i], lambda x, i: fragile.spec_of(i))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh(AxisType.Explicit), spec))  # noqa: E731
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x, i = place(jnp.arange(8.0), P("x")), place(jnp.array([7, 0, 3, 3]), P("x"))
        with pytest.raises(Exception, match="out_sharding"):
            x[i]  # if JAX does it by itself, laid_out may go
        found = jax.jit(gather)(x, i)
    assert found.sharding.spec == P("x"), "jax.sharding.auto_axes lays results out otherwise"
    np.testing.assert_array_equal(found, [7, 0, 3, 3])
    np.testing.assert_array_equal(gather(jnp.arange(8.0), jnp.array([7])), [7])


def test_what_is_compiled_here():
    either = fragile.here_or(lambda x: [x + 1, 2 * x], lambda x: [x + 10, x])
    step = jax.jit(lambda x: either(x))
    x = jnp.ones(3)
    for found in (either(x), step(x)):
        assert [y[0] for y in found] == [2, 2], "programs for the CPU here do not have its kernels"
    for platforms in (None, ("cpu",), ("cpu", "tpu")):
        found = jax.export.export(step, platforms=platforms)(x).call(x)
        broken = "programs that are exported have kernels of this machine: for_export"
        assert [y[0] for y in found] == [11, 1], broken
    elsewhere = step.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "10.0" in elsewhere or "1.000000e+01" in elsewhere, "ModuleContext.platforms"


def test_no_mesh():
    with jax.set_mesh(mesh(AxisType.Explicit)), fragile.no_mesh():
        found = jax.sharding.get_abstract_mesh()
    assert not found.axis_names, "use_abstract_mesh leaves the mesh: native kernels fail on one"


def test_current_trace():
    broken = "meProp cannot tell a layer inside a scan from one outside: current_trace says {}"
    outside, inside = [], []

    def f(x):
        outside.extend([fragile.current_trace(), fragile.current_trace()])
        jax.lax.map(lambda y: inside.append(fragile.current_trace()) or y, x)
        return x

    traced(f, jnp.ones(2))
    assert outside[0] == outside[1], broken.format("that one trace is two")
    assert outside[0] not in inside, broken.format("that two traces are one")


def test_sealed_rows():
    rows = jnp.array([3, 0, 2**31 - 1])
    sealed = jax.jit(fragile.seal)(rows)
    assert sealed.shape == (3,), "key arrays have other shapes: RowSparse cannot hold its rows"
    np.testing.assert_array_equal(jax.jit(fragile.unseal)(sealed), rows)
    with pytest.raises(TypeError, match="use on_values"):
        sealed * 2  # else optax.scale updates other rows in silence
    assert fragile.unseal(jnp.zeros_like(sealed)).min() == 2**31 - 1, "zeros name a row"
    abstract = fragile.seal(jax.ShapeDtypeStruct((3,), jnp.int32))
    assert fragile.unseal(abstract) == jax.ShapeDtypeStruct((3,), jnp.int32)


def test_names_of_primitives():
    broken = "meProp finds no kernel that is row-sparse, all gradients are dense: {}"
    (name,) = traced(lambda x: checkpoint_name(x, "mark"), 1.0)
    assert fragile.name_of(name) == "mark", broken.format("checkpoint_name")
    (cast,) = traced(lambda x: x.astype(jnp.bfloat16), jnp.ones(2))
    assert fragile.is_cast(cast) and fragile.name_of(cast) is None, broken.format("casts")
    (stop,) = traced(jax.lax.stop_gradient, 1.0)
    assert fragile.is_stop(stop) and not fragile.is_cast(stop), broken.format("stop_gradient")


def test_programs_as_functions():
    def outer(x, y):
        convert, consts = fragile.closed_over(lambda x: {"out": x * y}, x)
        assert consts == [y], "make_jaxpr hides what a function closes over: highway_scan fails"
        held.append(convert)
        return convert([2 * y], x)["out"]

    held = []
    with jax.checking_leaks():  # else what is kept of the function holds the trace
        assert jax.jit(outer)(3.0, 5.0) == 30

    def asks(x):
        return jax.debug.callback(print, x)

    calls = lambda f: fragile.calls_python(jax.make_jaxpr(jax.jit(f))(1.0))  # noqa: E731
    assert calls(asks), "host callbacks have other names: one that raises aborts a mesh"
    assert calls(lambda x: jax.pure_callback(lambda x: x, jax.typeof(x), x))
    assert calls(lambda x: jax.experimental.io_callback(lambda x: x, jax.typeof(x), x))
    assert not calls(lambda callback: 2 * callback)


def test_flip_sequences():
    x = jnp.arange(3.0)[None, :, None]
    turned = fragile.flip_sequences(x, jnp.array([2]), num_batch_dims=1, time_major=False)
    assert turned[0, :2, 0].tolist() == [1, 0], "reversed RNNs with seq_lengths read another order"


def test_rules_for_batches_and_shards():
    @fragile.custom_vmap
    def double(x):
        return 2 * x

    sizes = []

    @double.def_vmap
    def _(size, batched, x):
        sizes.append((size, batched))
        return 2 * x, True

    jax.eval_shape(jax.vmap(double), jnp.ones(3))
    assert sizes == [(3, [True])], "custom_vmap calls its rule otherwise: vmap of sparse layers"

    split = []

    def partition(mesh, shapes, result):
        split.append(shapes[0].sharding.spec)
        place = jax.NamedSharding(mesh, P("x"))
        return mesh, lambda x: 2 * x, place, (place,)

    call = fragile.custom_partitioning(lambda x: 2 * x)
    call.def_partition(
        partition=partition, infer_sharding_from_operands=None, sharding_rule="b -> b"
    )
    x = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh(AxisType.Auto), P("x")))
    np.testing.assert_array_equal(jax.jit(call)(x), 2 * np.ones(4))
    assert split == [P("x")], "custom_partitioning: native kernels gather whole batches"


WORK = {
    "scan": lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0],
    "cond": lambda f, x: jax.lax.cond(x[0, 0] > 0, f, lambda x: x, x),
    "while": lambda f, x: jax.lax.while_loop(lambda c: c[0, 0] > 0, f, x),
    "jit": lambda f, x: jax.jit(f)(x),
    "remat": lambda f, x: jax.checkpoint(f)(x),
    "shard_map": lambda f, x: jax.shard_map(
        f, mesh=mesh(AxisType.Auto), in_specs=P("x"), out_specs=P("x")
    )(x),
}


def test_programs_inside_of_programs():
    w = jnp.ones((4, 4))
    for name, run in WORK.items():
        jaxpr = jax.make_jaxpr(lambda x, run=run: run(lambda x: x @ w, x))(w)
        counts, needed = Walk(products_only=True).over(jaxpr, [1])
        times = 3 if name == "scan" else 1
        broken = f"the walk in core/walk.py no longer sees into {name}: FLOPs and depths are wrong"
        assert sum(counts.values()) == times * 2 * 4**3 and needed == [1], broken


def test_equations_run_on_other_operands():
    def whole(x, flag):
        return jax.lax.cond(flag, jnp.sin, jnp.cos, x) * 2, jnp.split(x, 2)[0]

    program = jax.make_jaxpr(whole)(jnp.ones(4), True)
    values = dict(zip(program.jaxpr.invars, [jnp.arange(4.0), jnp.bool_(True)], strict=True))
    for eqn in program.jaxpr.eqns:
        own = [values[x] if is_var(x) else x.val for x in eqn.invars]
        values |= zip(eqn.outvars, fragile.bind(eqn, own), strict=True)
    found = [values[x] for x in program.jaxpr.outvars]
    broken = "an equation is bound otherwise: optimizers inside of priorityprop fail"
    for x, y in zip(found, whole(jnp.arange(4.0), True), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=broken)


def test_parts_of_branches():
    def whole(x, y):
        both = lambda x, y: (jnp.sin(x), jnp.cos(y))  # noqa: E731
        return jax.lax.cond(True, both, lambda x, y: (x, y), x, y)

    program = jax.make_jaxpr(whole)(1.0, 2.0)
    part, needed = fragile.needed_part(program.jaxpr, [1])
    broken = "dce_jaxpr does not look into branches: MultiSteps inside of priorityprop hides masks"
    assert list(needed) == [False, True] and len(part.outvars) == 1, broken
