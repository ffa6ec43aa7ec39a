"""Tests of decoders: their outputs, their files, their parts, and what they write."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax import exact, models
from priorityprop_jax.core.modules import pure_loss
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.models.decoder import Decoder, DecoderConfig
from priorityprop_jax.models.files import DataError
from priorityprop_jax.models.lora import add_lora, merge_lora
from priorityprop_jax.training import packed

pytest.importorskip("safetensors", reason="priorityprop-jax[finetune] is not installed")

BASE = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama": {"attention_bias": True, "rope_scaling": LLAMA3},
    "smollm": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 6},
}


def small(kind="llama", seed=0, **options):
    """A random decoder whose norms and biases do something."""
    config = DecoderConfig.from_dict(BASE | KINDS[kind])
    model = Decoder(config, rngs=nnx.Rngs(seed), **options)
    rng = np.random.default_rng(seed)
    noise = lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(noise, nnx.state(model)))
    return model


def tokens(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 23, shape), jnp.int32)


def reference(model, row):
    """Logits of one row of tokens, one position and one head at a time."""
    c, state = model.config, jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    embedding = state["embed"]["embedding"].astype(np.float64)

    def norm(x, part):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.rms_norm_eps) * part["scale"]

    def linear(x, part):
        return x @ part["kernel"].astype(np.float64) + part.get("bias", 0.0)

    def turned(x, position):
        out = np.zeros_like(x)
        half = len(x) // 2
        for i in range(half):
            frequency = c.rope_theta ** (-2 * i / len(x))
            if c.rope_scaling is not None and len(c.rope_scaling) == 1:
                frequency /= c.rope_scaling[0]
            elif c.rope_scaling is not None:
                factor, low, high, length = c.rope_scaling
                wave = 2 * math.pi / frequency
                smooth = (length / wave - low) / (high - low)
                if wave > length / low:
                    frequency /= factor
                elif wave >= length / high:
                    frequency = (1 - smooth) * frequency / factor + smooth * frequency
            angle = position * frequency
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    h = embedding[np.asarray(row)]
    for layer in range(c.num_hidden_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], state["blocks"]["block"])
        x = norm(h, block["attention_norm"])
        q, k, v = (
            linear(x, block[name]).reshape(len(row), -1, c.head_dim)
            for name in ("query", "key", "value")
        )
        if "query_norm" in block:
            q, k = norm(q, block["query_norm"]), norm(k, block["key_norm"])
        out = np.zeros_like(q)
        for head in range(c.num_attention_heads):
            shared = head // (c.num_attention_heads // c.num_key_value_heads)
            for i in range(len(row)):
                first = 0 if c.sliding_window is None else max(0, i - c.sliding_window + 1)
                query = turned(q[i, head], i)
                scores = [
                    query @ turned(k[j, shared], j) / math.sqrt(c.head_dim)
                    for j in range(first, i + 1)
                ]
                weights = np.exp(scores - np.max(scores))
                weights /= weights.sum()
                out[i, head] = weights @ v[first : i + 1, shared]
        h = h + linear(out.reshape(len(row), -1), block["attention_out"])
        x = norm(h, block["mlp_norm"])
        gate = linear(x, block["gate"])
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, block["up"]), block["down"])
    weight = embedding if c.tie_word_embeddings else state["head"]["weight"]
    return norm(h, state["head"]["norm"]) @ weight.T


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_reference(kind):
    model, x = small(kind), tokens(2, 9)
    expected = np.stack([reference(model, row) for row in x])
    np.testing.assert_allclose(model(x), expected, rtol=2e-4, atol=2e-4)


def test_padding_and_neighbours_have_no_influence():
    model, x = small("smollm"), tokens(2, 6)
    padded = jnp.pad(x, ((0, 0), (0, 3)), constant_values=5)
    np.testing.assert_allclose(model(padded)[:, :6], model(x), rtol=1e-5, atol=1e-5)
    packed = jnp.concatenate([x[:1, :4], x[1:], jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 4 + [2] * 6 + [0] * 2])
    found = model(packed, segments)[0]
    np.testing.assert_allclose(found[:4], model(x)[0, :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[4:10], model(x)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(tmp_path, kind):
    model, x = small(kind), tokens(1, 5)
    models.save_decoder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert DecoderConfig.from_dict(config) == model.config
    loaded = models.load_decoder(tmp_path)
    chex_equal(nnx.state(model), nnx.state(loaded))
    np.testing.assert_array_equal(model(x), loaded(x))


@pytest.mark.parametrize("kind", ["qwen2", "smollm"])
def test_a_head_tells_classes(tmp_path, kind):
    plain, x = small(kind), tokens(2, 5)
    models.save_decoder(plain, tmp_path / "plain")
    model = models.load_decoder(tmp_path / "plain", classes=3, seed=1)
    weight = model.head.weight[...]
    assert weight.shape == (3, 12) and 0.01 < jnp.std(weight) < 0.03
    expected = plain.outputs(x).hidden @ weight.T  # [batch, time, classes]
    np.testing.assert_allclose(model(x), expected, rtol=5e-6, atol=1e-6)
    labels = ["good", "bad", "so so"]
    models.save_decoder(model, tmp_path / "head", labels=labels)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    family = "Qwen2" if kind == "qwen2" else "Llama"
    assert config["architectures"] == [f"{family}ForSequenceClassification"]
    assert config["id2label"] == {"0": "good", "1": "bad", "2": "so so"}
    again = models.load_decoder(tmp_path / "head")
    chex_equal(nnx.state(model), nnx.state(again))
    chex_equal(nnx.state(model), nnx.state(models.load_decoder(tmp_path / "head", classes=3)))
    other = models.load_decoder(tmp_path / "head", classes=4)
    assert other.head.weight.shape == (4, 12)
    chex_equal(nnx.state(other.blocks), nnx.state(model.blocks))
    top = model.top(1)
    assert not hasattr(top, "weight")  # the head is trained, and no embedding is kept for it
    top.head.weight[...] += 1
    model.put_top(top)
    np.testing.assert_array_equal(model.head.weight[...], weight + 1)
    for wrong, said in (({"classes": 0}, "classes is 0"), ({"classes": -2}, "classes is -2")):
        with pytest.raises(ValueError, match=said):
            models.load_decoder(tmp_path / "plain", **wrong)
    with pytest.raises(ValueError, match="2 labels, and the model has 3"):
        models.save_decoder(model, tmp_path / "no", labels=labels[:2])
    assert not (tmp_path / "no").exists()


def test_lora_trains_a_head():
    config = dataclasses.replace(small("smollm").config, classes=2)
    model = Decoder(config, rngs=nnx.Rngs(0))
    add_lora(model, rank=1)
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)), strict=True)
    names = {path_name(path).rpartition("/")[2] for path in paths}
    assert names == {"a", "b", "weight"}


def reference_accuracy(rows):
    """How often the likeliest of some tokens is right, example by example."""
    return np.mean([logits.argmax() == label for logits, label in rows])


def test_packed_rows_have_the_loss_and_gradients_of_single_ones():
    model, rng = small("llama"), np.random.default_rng(0)
    known = [3, 8, 4]
    sizes = [1, 5, 3, 2, 7, 1]  # of one token too, behind and before others
    x = [rng.integers(0, 23, size).astype(np.int32) for size in sizes]
    y = [np.array([-1] * (size - 1) + [rng.choice(known)], np.int32) for size in sizes]
    y[4][-2] = 8  # two tokens of an answer, of which the first tells the label
    singles = [{"x": a[None], "y": b[None]} for a, b in zip(x, y, strict=True)]
    together = packed({"x": x, "y": y}, 10)
    together["y"] = np.where(together["segments"] == 0, -1, together["y"])
    assert len(together["x"]) < len(x)
    loss_fn = models.answer_loss(known)

    def single(model):
        losses = [(loss_fn(model, row)[0], (row["y"] >= 0).sum()) for row in singles]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    one, grads = nnx.value_and_grad(single)(model)
    (other, metrics), again = nnx.value_and_grad(loss_fn, has_aux=True)(model, together)
    np.testing.assert_allclose(other, one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    starts = [int(np.argmax(b >= 0)) for b in y]
    pairs = [
        (np.asarray(model(a[None]))[0, i, known], known.index(b[i]))
        for a, b, i in zip(x, y, starts, strict=True)
    ]
    np.testing.assert_allclose(metrics["accuracy"], reference_accuracy(pairs), rtol=5e-6)


def chex_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_top_on_what_is_below_is_the_whole(blocks):
    model, x = small("smollm"), tokens(2, 5)
    top = model.top(blocks)
    logits = top.outputs(model.below(x, 3 - blocks)).logits()
    np.testing.assert_allclose(logits, model(x), rtol=1e-5, atol=1e-5)
    # The output layer is the frozen embedding; the blocks and the last norm are trained.
    assert len(jax.tree.leaves(nnx.state(top, nnx.Param))) == 9 + 1
    top.head.norm.scale[...] *= 2
    kept = jax.tree.map(jnp.array, nnx.state(model.blocks))
    nnx.update(top.blocks, jax.tree.map(lambda x: x + 1, nnx.state(top.blocks)))
    model.put_top(top)
    for old, new in zip(
        jax.tree.leaves(kept), jax.tree.leaves(nnx.state(model.blocks)), strict=True
    ):
        np.testing.assert_array_equal(new[: 3 - blocks], old[: 3 - blocks])
        np.testing.assert_array_equal(new[3 - blocks :], old[3 - blocks :] + 1)
    np.testing.assert_array_equal(model.head.norm.scale[...], top.head.norm.scale[...])


@pytest.mark.parametrize("part", ["whole", "top", "predict"])
def test_a_tied_embedding_is_not_transposed(part):
    """As XLA does to one that is given as ``table.T``, or of whose transpose columns are picked."""
    config = dataclasses.replace(small("smollm").config, vocab_size=1000)
    model, x = Decoder(config, rngs=nnx.Rngs(0)), tokens(2, 5)
    if part == "predict":
        score = nnx.jit(lambda m, x: models.label_logits(m.outputs(x), jnp.array([4, 4]), [1, 2]))
        text = score.lower(model, x).compile().as_text()
    else:
        given = model.top(1) if part == "top" else model
        rows = model.below(x, 2) if part == "top" else x
        loss, params, rest = pure_loss(given, models.answer_loss([1, 2]))
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        batch = {"x": rows, "y": jnp.full(x.shape, -1).at[:, -1].set(1)}
        text = gradient.lower(params, rest, batch).compile().as_text()
    assert "f32[1000,12]" in text and "= f32[12,1000]" not in text


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_cache_changes_nothing(kind):
    model, x = small(kind), tokens(2, 8)
    cache = model.empty_cache(2, 8)
    outputs, cache = model.step(x[:, :5], cache, 0)
    found = [outputs.logits()]
    for i in range(5, 8):
        outputs, cache = model.step(x[:, i : i + 1], cache, i)
        found.append(outputs.logits())
    np.testing.assert_allclose(jnp.concatenate(found, 1), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["products", "all"])
def test_remat_changes_no_gradient(remat):
    plain, saving, x = small("smollm"), small("smollm", remat=remat), tokens(2, 5)

    def loss(model):
        return exact.cross_entropy(*model.outputs(x), x, transposed=True)

    one, other = nnx.grad(loss)(plain), nnx.grad(loss)(saving)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize(
    ("remat", "features"), [("all", [12]), ("products", [8, 8, 12, 12, 20, 20, 24, 24])]
)
def test_remat_keeps_what_it_says_and_no_weights(remat, features, lora):
    model, x = small("smollm", remat=remat), tokens(2, 5)
    if lora:
        add_lora(model, rank=2)
    loss, params, rest = pure_loss(model, lambda m, x: jnp.mean(m.outputs(x).hidden ** 2))
    traced = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(params, rest, x)
    forward, _ = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan")
    _, *kept = (var.aval.shape for var in forward.outvars)
    assert sorted(kept) == [(3, 2, 5, count) for count in features]


def test_bfloat16_computes_and_keeps_its_weights():
    model, x = small("smollm", dtype=jnp.bfloat16), tokens(1, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits = model(x)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), small("smollm")(x), rtol=0, atol=0.06)


def test_lora_starts_as_the_model_and_is_merged():
    model, x = small("qwen2"), tokens(2, 5)
    before = model(x)
    add_lora(model, rank=2, alpha=8.0)
    np.testing.assert_array_equal(model(x), before)
    trained = nnx.state(model, nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 3 * 2 * (
        (12 + 24) * 2 + (12 + 8) * 2 + (12 + 20) * 3
    )
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, trained))
    moved = model(x)
    assert jnp.abs(moved - before).max() > 0.1
    merge_lora(model)
    np.testing.assert_allclose(model(x), moved, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(small("qwen2")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_key_value_heads": 4}, "do not divide"),
        ({"head_dim": 3}, "even"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_a_configuration_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        DecoderConfig.from_dict(BASE | changes)


def test_what_is_too_long_or_missing(tmp_path):
    model = small("smollm")
    with pytest.raises(ValueError, match="context of 32"):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match="segments"):
        model(tokens(1, 4), tokens(1, 3))
    with pytest.raises(ValueError, match="blocks"):
        model.top(4)
    with pytest.raises(ValueError, match="remat"):
        small("smollm", remat="some")
    with pytest.raises(DataError):
        models.load_decoder(tmp_path)
    models.save_decoder(small("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, said in (
        ({"intermediate_size": 21}, "gate_proj.*shape"),
        ({"num_hidden_layers": 4}, "no tensor model.layers.3"),
        ({"model_type": "qwen3"}, "q_norm"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=said):
            models.load_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {**models.read_tensors(tmp_path)}
    name = "model.layers.1.mlp.up_proj.weight"  # one block's, unlike the others'
    models.write_tensors(tmp_path / "model.safetensors", tensors | {name: tensors[name][1:]})
    with pytest.raises(ValueError, match=rf"tensor {name} is of shape \(19, 12\), .* \(20, 12\)"):
        models.load_decoder(tmp_path)


def test_a_config_is_whole():
    config = dataclasses.asdict(small("mistral").config)
    assert config["sliding_window"] == 3 and config["qkv_bias"] is False
