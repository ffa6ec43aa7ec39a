"""Tests of `priorityprop_jax.core.slots`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax import find_slots
from priorityprop_jax.core.slots import forward_key, path_name

properties = settings(derandomize=True, deadline=None, max_examples=150)


class Pair(NamedTuple):
    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    scale: Any


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    *stack, wide, features = shape or (2, 2)
    return {"kernel": array(*stack, wide, features), "bias": array(*stack, features)}


def depths(params, **kwargs) -> dict[str, int]:
    slots = find_slots(params, **kwargs)
    return dict(zip(slots.names, slots.depths, strict=True))


def by_layer(params, **kwargs) -> list[str]:
    """The layers in forward order; checks that all slots of a layer share its depth."""
    slots = find_slots(params, **kwargs)
    pairs = set(zip(slots.depths, slots.layers, strict=True))
    assert len(pairs) == len(set(slots.depths)) == len(set(slots.layers))
    assert sorted(set(slots.depths)) == list(range(len(pairs)))
    return [layer for _, layer in sorted(pairs, reverse=True)]


# Names.


@pytest.mark.parametrize(
    ("params", "names"),
    [
        pytest.param({"b": {"c": 1.0}, "a": 1.0}, ("a", "b/c"), id="dicts"),
        pytest.param([1.0, [2.0, (3.0,)]], ("0", "1/0", "1/1/0"), id="lists and tuples"),
        pytest.param({"x": Pair(1.0, 2.0)}, ("x/weight", "x/bias"), id="NamedTuple"),
        pytest.param([Layer(1.0, {"s": 2.0})], ("0/kernel", "0/scale/s"), id="dataclass"),
        pytest.param(1.0, ("params",), id="single array"),
        pytest.param({1: 1.0, 12: 2.0}, ("1", "12"), id="integer keys"),
        pytest.param({"a": None, "b": 1.0}, ("b",), id="None is no leaf"),
        pytest.param(
            {"value": 1.0, "a": {"value": 2.0}}, ("a/value", "value"), id="value as a key"
        ),
        pytest.param({"encoder": [{"kernel": 0.0}]}, ("encoder/0/kernel",), id="docstring"),
    ],
)
def test_names_are_paths(params, names):
    slots = find_slots(params)
    assert slots.names == names and len(slots) == len(names)


def test_a_state_and_its_pure_twins_have_the_same_names():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])
            self.value = nnx.Param(jnp.ones(2))

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    expected = ("layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "value")
    for twin in (state, nnx.as_pure(state), nnx.to_pure_dict(state), dict(state)):
        assert find_slots(twin) == find_slots(state)
        assert find_slots(twin).names == expected


def test_only_an_attribute_called_value_is_left_out():
    attribute, key = jax.tree_util.GetAttrKey, jax.tree_util.DictKey
    assert path_name((key("a"), attribute("value"))) == "a"
    assert path_name((attribute("value"), key("a"))) == "value/a"
    assert path_name((key("a"), key("value"))) == "a/value"
    assert path_name((key("a"), attribute("values"))) == "a/values"
    assert path_name((attribute("value"),)) == path_name(()) == "params"
    assert path_name((jax.tree_util.FlattenedIndexKey(3), jax.tree_util.SequenceKey(1))) == "3/1"
    assert path_name(("plain", 7)) == "plain/7"


def test_two_leaves_of_one_path_are_an_error():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'; rename a key"):
        find_slots({"a": {"b": 1.0}, "a/b": 2.0})


def test_two_slots_of_one_name_are_an_error():
    params = {"w": array(2, 3), "w[1]": array(3)}
    with pytest.raises(ValueError, match=r"two slots have the name 'w\[1\]'; rename a group or a"):
        find_slots(params, stacked_axis=lambda path: 0 if path == "w" else None)


# Shapes and sizes.


def test_shapes_and_sizes():
    params = {"a": array(2, 3), "b": array(), "c": array(4, 0), "d": 1.0, "e": np.ones((5,))}
    slots = find_slots(params)
    assert slots.shapes == (((2, 3),), ((),), ((4, 0),), ((),), ((5,),))
    assert slots.sizes == (6, 1, 0, 1, 5)


def test_structs_and_tracers_are_as_good_as_arrays():
    params = {"a": jnp.ones((2, 3)), "b": [jnp.ones(4, jnp.bfloat16), jnp.ones((), jnp.complex64)]}
    seen = []
    jax.eval_shape(lambda p: seen.append(find_slots(p)), params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert find_slots(params) == find_slots(shapes) == seen[0]


@pytest.mark.parametrize("params", [{}, [], None, (), {"a": {}, "b": None}])
def test_an_empty_tree_has_no_slots(params):
    slots = find_slots(params, stacked_axis=lambda path: 0, group=lambda path: "all")
    assert len(slots) == 0
    assert set(dataclasses.asdict(slots).values()) == {()}


# Stacks.


@pytest.mark.parametrize(
    ("axis", "layers", "shape"),
    [(0, 2, (3, 4)), (1, 3, (2, 4)), (2, 4, (2, 3)), (-1, 4, (2, 3)), (-3, 2, (3, 4))],
)
def test_each_layer_of_a_stack_is_a_slot(axis, layers, shape):
    slots = find_slots({"w": array(2, 3, 4)}, stacked_axis=lambda path: axis)
    assert slots.names == tuple(f"w[{i}]" for i in range(layers))
    assert slots.shapes == ((shape,),) * layers
    assert slots.sizes == (math.prod(shape),) * layers
    assert slots.depths == tuple(reversed(range(layers)))
    (bundle,) = slots.bundles
    assert bundle.axes == (axis % 3,)
    assert (bundle.layers, bundle.slots, bundle.start, bundle.leaves) == (layers, layers, 0, (0,))


def test_stacked_axis_is_given_the_path():
    asked = []
    params = {"a": array(2), "b": {"c": array(3, 2), "d": array(2)}}
    slots = find_slots(params, stacked_axis=lambda p: asked.append(p) or {"b/c": 1}.get(p))
    assert asked == ["a", "b/c", "b/d"]
    assert slots.names == ("a", "b/c[0]", "b/c[1]", "b/d")
    assert [bundle.layers for bundle in slots.bundles] == [None, 2, None]
    assert [bundle.start for bundle in slots.bundles] == [0, 1, 3]


def test_a_stack_of_scalars_and_of_nothing():
    params = {"a": array(2), "b": array(0, 3), "c": array(2, 0)}
    slots = find_slots(params, stacked_axis=lambda path: 0)
    assert slots.names == ("a[0]", "a[1]", "c[0]", "c[1]")
    assert slots.shapes == (((),), ((),), ((0,),), ((0,),)) and slots.sizes == (1, 1, 0, 0)


@pytest.mark.parametrize(("axis", "shape"), [(2, (3, 4)), (-3, (3, 4)), (0, ()), (-1, ())])
def test_an_axis_that_is_not_there_is_an_error(axis, shape):
    with pytest.raises(ValueError, match=r"stacked_axis\('a/w'\) is -?\d, but the leaf has shape"):
        find_slots({"a": {"w": array(*shape)}}, stacked_axis=lambda path: axis)


# Groups.


def test_a_group_is_one_slot():
    params = {"attn": {"q": array(2, 3), "k": array(4)}, "mlp": array(5), "norm": array(6)}
    slots = find_slots(params, group=lambda path: "block" if path[:4] in ("attn", "mlp") else None)
    assert slots.names == ("block", "norm")
    assert slots.shapes == (((4,), (2, 3), (5,)), ((6,),)) and slots.sizes == (15, 6)
    assert [bundle.leaves for bundle in slots.bundles] == [(0, 1, 2), (3,)]
    assert slots.bundles[0].axes == (None,) * 3 and slots.bundles[0].slots == 1


def test_a_group_of_stacks_shares_layer_by_layer():
    params = {"a": array(3, 2), "b": array(4, 3), "c": array(7)}
    slots = find_slots(
        params,
        stacked_axis=lambda path: {"a": 0, "b": -1}.get(path),
        group=lambda path: "block" if path in "ab" else None,
    )
    assert slots.names == ("block[0]", "block[1]", "block[2]", "c")
    assert slots.shapes[:3] == (((2,), (4,)),) * 3 and slots.sizes == (6, 6, 6, 7)
    assert slots.bundles[0].axes == (0, 1) and slots.bundles[0].layers == 3


def test_the_order_of_slots_is_that_of_their_first_leaves():
    params = {name: array(2) for name in "abcd"}
    slots = find_slots(params, group=lambda path: {"a": "x", "c": "y", "d": "x"}.get(path))
    assert slots.names == ("x", "b", "y")
    assert [bundle.leaves for bundle in slots.bundles] == [(0, 3), (1,), (2,)]


def test_a_group_of_one_may_keep_the_name_of_its_leaf():
    params = {"a": array(2), "b": array(3)}
    assert find_slots(params, group=lambda path: path) == find_slots(params)


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        pytest.param([(2, 3), (3, 3)], [0, 0], id="lengths"),
        pytest.param([(2, 3), (2, 3)], [0, None], id="stacked and not"),
        pytest.param([(2, 3), (2, 3)], [0, 1], id="lengths on two axes"),
    ],
)
def test_a_group_must_be_stacked_alike(shapes, axes):
    params = {name: array(*shape) for name, shape in zip("ab", shapes, strict=True)}
    stacked = dict(zip("ab", axes, strict=True))
    with pytest.raises(
        ValueError, match="group 'all' mixes leaves with stacks of .* stacked alike"
    ):
        find_slots(params, stacked_axis=stacked.get, group=lambda path: "all")


@pytest.mark.parametrize("taken", ["a", "b"])
def test_a_group_must_not_be_called_as_a_leaf(taken):
    params = {"a": array(2), "b": array(2), "c": array(2)}
    with pytest.raises(ValueError, match=f"'{taken}'"):
        find_slots(params, group=lambda path: taken if path in "bc" else None)


# Depths.


def test_numbers_count_and_flatten_order_does_not():
    params = {f"Dense_{i}": dense() for i in range(1, 13)}
    layers = [f"Dense_{i}" for i in range(1, 13)]
    assert by_layer(params) == layers
    found = depths(params)
    for i, layer in enumerate(layers):
        assert found[f"{layer}/kernel"] == found[f"{layer}/bias"] == 11 - i
    assert by_layer([dense() for _ in range(12)]) == [str(i) for i in range(12)]
    assert by_layer({f"conv{i}": dense() for i in (2, 1, 11)}) == ["conv1", "conv2", "conv11"]


def test_all_of_a_numbered_layer_shares_its_depth():
    block = {"attn": {"q": dense(), "o": dense()}, "Dense_0": dense(), "Dense_1": dense()}
    params = {"embed": dense(), "Block_0": block, "Block_1": block, "head": dense()}
    found = depths(params)
    for name, depth in found.items():
        assert depth == {"embed": 3, "Block_0": 2, "Block_1": 1, "head": 0}[name.split("/")[0]]


def test_a_single_layer_has_depth_zero():
    assert set(depths({"Dense_0": dense()}).values()) == {0}
    assert depths(array(3)) == {"params": 0}


@pytest.mark.parametrize("wrap", [["params"], ["MLP_0"], ["params", "Net_0", "Trunk_3"]])
def test_what_wraps_the_whole_model_is_no_layer(wrap):
    params: dict[str, Any] = {f"Dense_{i}": dense() for i in range(12)}
    for name in reversed(wrap):
        params = {name: params}
    assert by_layer(params) == ["/".join([*wrap, f"Dense_{i}"]) for i in range(12)]


def test_linen_transformer():
    block = {
        "LayerNorm_0": {"scale": array(2), "bias": array(2)},
        "MultiHeadDotProductAttention_0": {"query": dense(), "out": dense()},
        "MlpBlock_0": {"Dense_0": dense(), "Dense_1": dense()},
    }
    params = {
        "params": {
            "token_embed": {"embedding": array(5, 2)},
            "pos_embedding": array(7, 2),
            **{f"TransformerBlock_{i}": block for i in range(11)},
            "LayerNorm_0": {"scale": array(2)},
            "lm_head": dense(),
        }
    }
    blocks = [f"params/TransformerBlock_{i}" for i in range(11)]
    layers = by_layer(params)
    assert set(layers[:2]) == {"params", "params/token_embed"}  # `params` has the positions
    assert layers[2:] == [*blocks, "params/LayerNorm_0", "params/lm_head"]


def test_nnx_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(2, rngs=rngs)
            self.out = nnx.Linear(2, 2, rngs=rngs)
            self.mlp = nnx.List([nnx.Linear(2, 2, rngs=rngs)])

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(2, 5, rngs=rngs)
            self.norm = nnx.LayerNorm(2, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(11)])
            self.embed = nnx.Embed(5, 2, rngs=rngs)

    state = jax.eval_shape(lambda: nnx.state(Transformer(nnx.Rngs(0)), nnx.Param))
    assert by_layer(state) == ["embed", *(f"blocks/{i}" for i in range(11)), "norm", "head"]


def is_block(path: str) -> int | None:
    return 0 if "blocks" in path.split("/") else None


def test_scanned_stack_next_to_embedding_and_head():
    params = {
        "embed": {"embedding": array(5, 2)},
        "blocks": {"attn": dense(12, 2, 2), "mlp": {"Dense_0": dense(12, 2, 8)}},
        "final_norm": {"scale": array(2)},
        "head": dense(),
    }
    stack = [f"blocks[{i}]" for i in range(12)]
    assert by_layer(params, stacked_axis=is_block) == ["embed", *stack, "final_norm", "head"]
    found = depths(params, stacked_axis=is_block)
    assert found["embed/embedding"] == 14 and found["head/bias"] == 0
    assert {found[f"blocks/{leaf}[3]"] for leaf in ("attn/bias", "mlp/Dense_0/kernel")} == {10}
    grouped = depths(
        params, stacked_axis=is_block, group=lambda p: "block" if is_block(p) == 0 else None
    )
    assert grouped["block[3]"] == 10 and grouped["embed/embedding"] == 14


def test_encoder_and_decoder():
    half = {"layers_0": dense(), "layers_1": dense(), "layers_10": dense(), "norm": dense()}
    params = {"head": dense(), "decoder": half, "embed": dense(), "encoder": half}
    inside = ("layers_0", "layers_1", "layers_10", "norm")
    assert by_layer(params) == [
        "embed",
        *(f"encoder/{layer}" for layer in inside),
        *(f"decoder/{layer}" for layer in inside),
        "head",
    ]


def test_two_scanned_stacks():
    half = {"blocks": dense(11, 2, 2), "norm": {"scale": array(2)}}
    stack = [f"blocks[{i}]" for i in range(11)]
    assert by_layer({"decoder": half, "encoder": half}, stacked_axis=is_block) == [
        *(f"encoder/{layer}" for layer in (*stack, "norm")),
        *(f"decoder/{layer}" for layer in (*stack, "norm")),
    ]


@pytest.mark.parametrize(
    "order",
    [
        ["embed", "Dense_2", "Dense_10", "head"],
        ["wte", "h_0", "h_1", "ln_f", "lm_head"],
        ["patch_embed", "stage1", "stage2", "norm", "classifier"],
        ["stem", "blocks[2]", "blocks[10]", "final_norm", "logits"],
        ["input_proj", "encoder/9", "encoder/10", "bridge", "decoder/0", "output"],
        ["position_embedding", "hidden", "posterior_norm", "zeta", "out"],
        ["conv1", "conv2", "conv10"],
        ["a", "a_1", "a_2"],
    ],
)
def test_forward_key(order):
    assert sorted(order, key=forward_key) == order
    assert sorted(reversed(order), key=forward_key) == order


def test_forward_key_tells_input_from_output_in_any_case():
    for first, last in [("Embed", "Head"), ("TOKENS", "LOGITS"), ("Stem", "Readout")]:
        assert forward_key(first) < forward_key("Middle_3") < forward_key(last)


# Bundles.

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
words = st.sampled_from(["a", "b", "Dense_1", "Dense_10", "head", "embed"])


@st.composite
def trees(draw):
    paths = draw(st.lists(st.lists(words, min_size=1, max_size=3).map(tuple), max_size=8))
    tree: dict[str, Any] = {}
    axes, groups = {}, {}
    for path in paths:
        shape = draw(shapes)
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        name = "/".join((*path, "leaf"))
        node["leaf"] = array(*shape)
        axes[name] = (
            draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
            if (shape)
            else None
        )
        layers = None if axes[name] is None else shape[axes[name]]
        groups[name] = draw(st.sampled_from([None, f"group 1 of {layers}", f"group 2 of {layers}"]))
    return tree, axes, groups


@properties
@given(trees())
def test_bundles_cover_every_leaf_once_and_slots_are_contiguous(case):
    tree, axes, groups = case
    slots = find_slots(tree, stacked_axis=axes.get, group=groups.get)
    leaves = jax.tree.leaves(tree)
    assert sorted(i for bundle in slots.bundles for i in bundle.leaves) == list(range(len(leaves)))
    start = 0
    for bundle in slots.bundles:
        assert bundle.start == start and len(bundle.axes) == len(bundle.leaves)
        for i, axis in zip(bundle.leaves, bundle.axes, strict=True):
            assert bundle.layers == (None if axis is None else leaves[i].shape[axis])
        names = slots.names[start : start + bundle.slots]
        if bundle.layers is None:
            assert names == (bundle.name,)
        else:
            assert names == tuple(f"{bundle.name}[{layer}]" for layer in range(bundle.layers))
        start += bundle.slots
    assert start == len(slots) == len(set(slots.names))
    fields = (slots.shapes, slots.sizes, slots.depths, slots.layers)
    assert {len(field) for field in fields} == {len(slots)}
    assert sum(slots.sizes) == sum(math.prod(leaf.shape) for leaf in leaves)
    for inside, size in zip(slots.shapes, slots.sizes, strict=True):
        assert size == sum(math.prod(shape) for shape in inside)
    # Depths are 0 to the number of layers, one for each.
    pairs = set(zip(slots.layers, slots.depths, strict=True))
    assert sorted(depth for _, depth in pairs) == list(range(len(set(slots.layers))))
