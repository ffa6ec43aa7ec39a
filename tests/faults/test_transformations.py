"""Transformations over any tree, around any optimizer of Optax, on any mesh, in every mode of JAX.

The inner optimizer alone is the reference. What is found here is mended at its root, and gets a
test of its own beside the code.
"""

import contextlib
import dataclasses
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from priorityprop_jax import priorityprop, scale_by_priority
from priorityprop_jax.core.row_optimizers import row_sparse_adam
from priorityprop_jax.priority import top_k_updates

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("quickly_compiled")]

# What they need beside a learning rate.
MORE = {
    "dpsgd": dict(l2_norm_clip=1.0, noise_multiplier=0.1, seed=0),
    "noisy_sgd": dict(key=jax.random.key(0)),
    "schedule_free": dict(base_optimizer=optax.sgd(0.1)),
}
# They need the loss of all parameters, or keep what belongs to no parameter.
REFUSED = {"lbfgs", "sm3", "sophia"}
NO_OPTIMIZERS = {"dpsgd", "_deprecated_dpsgd", "scale_by_learning_rate", "optimistic_adam"}
# Those that make of each parameter's gradient that parameter's update, and of nothing else.
SEPARABLE = (
    "adabelief adadelta adafactor adagrad adam adamax adamw adan amsgrad fromage lamb lars lion "
    "nadam noisy_sgd novograd optimistic_adam_v2 radam rmsprop rprop sgd sign_sgd signum yogi "
    "ademamix adopt schedule_free_adamw schedule_free_sgd simplified_ademamix"
).split()
COMPLEX = {"adam", "sgd", "adamw", "rmsprop"}


def optimizers() -> dict[str, Any]:
    """Every optimizer of `optax` and `optax.contrib` that a learning rate makes."""
    found = {}
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            if "learning_rate" in inspect.signature(make).parameters and name not in NO_OPTIMIZERS:
                found[name] = lambda make=make, name=name: make(
                    learning_rate=0.01, **MORE.get(name, {})
                )
    return found


OPTIMIZERS = optimizers()


class Pair(NamedTuple):
    value: Any
    other: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: Any
    bias: Any


CONTAINERS = {
    "dict": lambda a, b: {"a": a, "b": b},
    "named tuple": Pair,
    "dataclass": Block,
    "list": lambda a, b: [a, (b,)],
    "state": lambda a, b: nnx.State(
        {"a": nnx.Param(a) if isinstance(a, np.ndarray) else {"own": a}, "b": {"in": b}}
    ),
}
LEAVES = {
    "matrix": ((2, 3), np.float32),
    "vector": ((3,), np.float32),
    "scalar": ((), np.float32),
    "zero-size": ((0, 2), np.float32),
    "bfloat16": ((2,), jnp.bfloat16),
    "float64": ((2,), np.float64),
    "complex": ((2,), np.complex64),
}


def leaf(kind: str, seed: int) -> Any:
    if kind in ("none", "empty"):
        return None if kind == "none" else {}
    shape, dtype = LEAVES[kind]
    return np.asarray(np.random.default_rng(seed).normal(size=shape) + 0.1).astype(dtype)


def signature(tree: Any) -> Any:
    about = [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), about


@jax.jit
def gradients(params):
    return jax.tree.map(lambda x: jnp.sin(3 * x).astype(x.dtype), params)


FACES = {
    "all at once": lambda inner: priorityprop(inner, None, 2, 2, 2),
    "slot by slot": lambda inner: priorityprop(inner, None, 1, 4, 1),
    "scaled": lambda inner: optax.chain(inner, scale_by_priority(None, 2, 2, 2)),
}


@st.composite
def cases(draw):
    face = draw(st.sampled_from(sorted(FACES)))
    among = SEPARABLE if face == "slot by slot" else sorted(set(OPTIMIZERS) - REFUSED)
    name = draw(st.sampled_from(among))
    kinds = sorted({*LEAVES, "none", "empty"} - (set() if name in COMPLEX else {"complex"}))
    kinds = [*draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=3)), "vector"]
    leaves = [leaf(kind, i) for i, kind in enumerate(kinds)]
    if draw(st.booleans()):
        leaves.append(leaves[-1])  # tied
    tree = leaves.pop()
    for one in leaves:
        tree = CONTAINERS[draw(st.sampled_from(sorted(CONTAINERS)))](tree, one)
    return face, name, kinds, tree


@settings(max_examples=10, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(cases())
def test_a_full_budget_is_the_optimizer_itself(case):
    face, name, kinds, tree = case
    with jax.enable_x64("float64" in kinds):
        params = jax.tree.map(jnp.asarray, tree)
        inner = optax.with_extra_args_support(OPTIMIZERS[name]())
        more = {"value": jnp.float32(0.5)}
        try:
            jax.eval_shape(lambda p: inner.update(gradients(p), inner.init(p), p, **more), params)
        except Exception:
            return  # the optimizer alone can't have this tree either
        tx = FACES[face](inner)

        @jax.jit
        def both(params):
            def step(_, carry):  # JAX refuses a state that changes its structure or types
                a, state, b, mine, *_ = carry
                u, state = inner.update(gradients(a), state, a, **more)
                v, mine = tx.update(gradients(b), mine, b, **more)
                assert jax.tree.structure(u) == jax.tree.structure(v)
                return optax.apply_updates(a, u), state, optax.apply_updates(b, v), mine

            start = params, inner.init(params), params, tx.init(params)
            return jax.lax.fori_loop(0, 2, step, start)

        a, _, b, _ = both(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
        chex.assert_trees_all_close(a, b, rtol=2e-2 if "bfloat16" in kinds else 1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_its_structure_or_is_refused_at_once(name):
    params = {"a": jnp.ones((2, 3)), "b": [jnp.ones(4)], "stack": jnp.ones((3, 2, 2))}
    tx = priorityprop(
        OPTIMIZERS[name](), 0.5, stacked_axis=lambda path: 0 if path == "stack" else None
    )
    if name in REFUSED:
        with pytest.raises((TypeError, ValueError)):
            tx.init(params)
        return
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(
        lambda s: tx.update(params, s, params, value=jnp.float32(0.5)), state
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert signature(new) == signature(state)


TRANSFORMATIONS = {
    "wrap": lambda axis: priorityprop(optax.adamw(0.1), 0.5, max_updates=30, stacked_axis=axis),
    "score": lambda axis: optax.chain(
        optax.lion(0.1), scale_by_priority(0.5, magnitude="rms", stacked_axis=axis)
    ),
    "top-k": lambda axis: optax.chain(optax.sgd(0.1), top_k_updates(0.3, error_feedback=True)),
    "rows": lambda axis: row_sparse_adam(0.1, weight_decay=0.1),
}


SPECS = {"kernel": P("data", "model"), "bias": P("model"), "stack": P("data", None, "model")}


def two_steps(places=None):
    """The parameters after two steps with all transformations, one behind the other."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 2), "bias": (4,), "stack": (4, 2, 4)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    txs = [make(lambda p: 0 if p == "stack" else None) for make in TRANSFORMATIONS.values()]

    def step(_, carry):
        params, *states = carry
        for i, tx in enumerate(txs):
            updates, states[i] = tx.update(gradients(params), states[i], params)
            params = optax.apply_updates(params, updates)
        return params, *states

    @jax.jit
    def run(params):
        return jax.lax.fori_loop(0, 2, step, (params, *[tx.init(params) for tx in txs]))[0]

    return run(params if places is None else jax.device_put(params, places))


def in_strict_modes(mesh):
    with contextlib.ExitStack() as modes:
        places: Any = None
        if mesh is not None:
            kind = getattr(AxisType, mesh)
            devices = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
            modes.enter_context(jax.set_mesh(devices))
            places = {name: NamedSharding(devices, spec) for name, spec in SPECS.items()}
        modes.enter_context(jax.numpy_dtype_promotion("strict"))
        modes.enter_context(jax.numpy_rank_promotion("raise"))
        modes.enter_context(jax.debug_nans(True))
        modes.enter_context(jax.checking_leaks())
        params = two_steps(places)
        for name, x in params.items() if mesh == "Explicit" else ():
            assert x.sharding.is_equivalent_to(places[name], x.ndim)
        return jax.device_get(params)


def test_on_every_mesh_in_the_strictest_modes_at_once():
    alone = in_strict_modes(None)
    for mesh in ("Auto", "Explicit"):
        chex.assert_trees_all_close(in_strict_modes(mesh), alone, rtol=1e-4, atol=1e-5)
