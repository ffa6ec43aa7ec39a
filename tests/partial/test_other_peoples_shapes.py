"""Models as other people write them: order of layers, costs, and what is trained."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from priorityprop_jax import find_slots, partial
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.core.slots import by_layer
from priorityprop_jax.core.work import read_loss
from priorityprop_jax.partial.grad import value_and_grad
from priorityprop_jax.training.trainer import Trainer

WIDTH, BATCH = 8, 4


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32) * 0.3


def dense(*shape, seed=0):
    return {"kernel": normal(*shape, seed=seed), "bias": np.zeros(shape[-1], np.float32)}


def apply(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def norms():
    return {"scale": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}


def squares(y):
    return jnp.mean((y - 1) ** 2)


@dataclasses.dataclass
class Model:
    params: dict
    loss: object  # (params, batch) -> loss
    batch: object
    order: list  # of slots, from the output: those of a depth together
    where: dict = dataclasses.field(default_factory=dict)
    unrolled: object = None  # the loss without loops

    def slots(self):
        where = self.where or {"group": by_layer(self.params)}
        return find_slots(self.params, **where)


def roberta():
    """Embeddings, an encoder and `qa_outputs`: in alphabetical order the head is no last."""
    names = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    block = lambda: {  # noqa: E731
        "attention": {
            "self": {n: dense(WIDTH, WIDTH) for n in ("query", "key", "value")},
            "output": {"dense": dense(WIDTH, WIDTH), "LayerNorm": norms()},
        },
        "intermediate": dense(WIDTH, 2 * WIDTH),
        "output": {"dense": dense(2 * WIDTH, WIDTH), "LayerNorm": norms()},
    }
    params = {
        "embeddings": {n: {"embedding": normal(7, WIDTH)} for n in names} | {"LayerNorm": norms()},
        "encoder": {"layer": {str(i): block() for i in range(2)}},
        "qa_outputs": dense(WIDTH, 2),
    }

    def loss(p, batch):
        tables = p["embeddings"]
        x = tables["word_embeddings"]["embedding"][batch["ids"]]
        x += tables["position_embeddings"]["embedding"][jnp.arange(batch["ids"].shape[1])]
        x = norm(tables["LayerNorm"], x + tables["token_type_embeddings"]["embedding"][0])
        for i in range(2):
            q = p["encoder"]["layer"][str(i)]
            query, key, value = (apply(q["attention"]["self"][n], x) for n in
                                 ("query", "key", "value"))  # fmt: skip
            weights = jax.nn.softmax(query @ key.mT / WIDTH**0.5)
            y = apply(q["attention"]["output"]["dense"], weights @ value)
            x = norm(q["attention"]["output"]["LayerNorm"], x + y)
            y = apply(q["output"]["dense"], jax.nn.gelu(apply(q["intermediate"], x)))
            x = norm(q["output"]["LayerNorm"], x + y)
        spans = apply(p["qa_outputs"], x)
        losses = optax.softmax_cross_entropy_with_integer_labels(spans.mT, batch["spans"])
        return losses.mean()

    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, 7, (BATCH, 6)), "spans": rng.integers(0, 6, (BATCH, 2))}
    tables = [f"embeddings/{n}" for n in sorted(names)]
    order = [["qa_outputs"], *([f"encoder/layer/{i}"] for i in (1, 0)),
             ["embeddings/LayerNorm"], tables]  # fmt: skip
    return Model(params, loss, batch, order)


def numbered():
    """Leaves without a module, as in a tutorial."""
    params = {"W1": normal(WIDTH, WIDTH), "b1": np.zeros(WIDTH, np.float32),
              "W2": normal(WIDTH, WIDTH), "b2": np.zeros(WIDTH, np.float32),
              "W3": normal(WIDTH, 2), "b3": np.zeros(2, np.float32)}  # fmt: skip

    def loss(p, x):
        x = jnp.tanh(x @ p["W1"] + p["b1"])
        return squares(jnp.tanh(x @ p["W2"] + p["b2"]) @ p["W3"] + p["b3"])

    return Model(params, loss, normal(BATCH, WIDTH), [["W3", "b3"], ["W2", "b2"], ["W1", "b1"]])


def two_towers():
    """Each tower is as deep as it is long; what both stand on is below both."""
    params = {
        "image": {f"dense_{i}": dense(WIDTH, WIDTH, seed=i) for i in range(2)},
        "text": {f"dense_{i}": dense(WIDTH, WIDTH, seed=5 + i) for i in range(3)},
        "shared": dense(WIDTH, WIDTH),
        "unused": dense(WIDTH, WIDTH),
        "scale": np.float32(1.0),
    }

    def loss(p, batch):
        outs = []
        for name in ("image", "text"):
            x = jnp.tanh(apply(p["shared"], batch[name]))
            for i in range(len(p[name])):
                x = jnp.tanh(apply(p[name][f"dense_{i}"], x))
            outs.append(x)
        logits = outs[0] @ outs[1].T * p["scale"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(BATCH)).mean()

    batch = {"image": normal(BATCH, WIDTH), "text": normal(BATCH, WIDTH, seed=1)}
    order = [["scale", "unused"], ["image/dense_1", "text/dense_2"],
             ["image/dense_0", "text/dense_1"], ["text/dense_0"], ["shared"]]  # fmt: skip
    return Model(params, loss, batch, order)


def tied():
    """A tied embedding is as deep as its deepest use; the automatic names are Linen's."""
    params = {"Embed_0": {"embedding": normal(9, WIDTH)},
              "Dense_0": dense(WIDTH, WIDTH), "Dense_1": dense(WIDTH, WIDTH)}  # fmt: skip

    def loss(p, ids):
        x = p["Embed_0"]["embedding"][ids]
        for name in ("Dense_1", "Dense_0"):  # used in this order
            x = x + jax.checkpoint(lambda q, x: jnp.tanh(apply(q, x)))(p[name], x)
        logits = x @ p["Embed_0"]["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    ids = np.random.default_rng(0).integers(0, 9, (BATCH, 5))
    return Model(params, loss, ids, [["Dense_0"], ["Dense_1"], ["Embed_0"]])


def decoder(reverse=False, layers=4):
    """Blocks stacked on axis 0, which one scan runs through."""
    params = {
        "embed": {"embedding": normal(9, WIDTH)},
        "blocks": {"up": normal(layers, WIDTH, 2 * WIDTH), "down": normal(layers, 2 * WIDTH, WIDTH),
                   "norm": {"scale": np.ones((layers, WIDTH), np.float32),
                            "bias": np.zeros((layers, WIDTH), np.float32)}},
        "lm_head": dense(WIDTH, 9),
    }  # fmt: skip

    def block(p, x):
        return x + jax.nn.relu(norm(p["norm"], x) @ p["up"]) @ p["down"]

    def head(p, x, ids):
        logits = apply(p["lm_head"], x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    def loss(p, ids):
        body = jax.checkpoint(lambda x, q: (block(q, x), None), policy=None)
        x = p["embed"]["embedding"][ids]
        return head(p, jax.lax.scan(body, x, p["blocks"], reverse=reverse)[0], ids)

    def unrolled(p, ids):
        x = p["embed"]["embedding"][ids]
        for i in reversed(range(layers)) if reverse else range(layers):
            q = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
            x = jax.checkpoint(lambda x, q: block(q, x))(x, q)
        return head(p, x, ids)

    ids = np.random.default_rng(0).integers(0, 9, (BATCH, 5))
    inner = [[f"blocks[{i}]"] for i in range(layers)]
    order = [["lm_head"], *(inner if reverse else inner[::-1]), ["embed"]]
    where = {"stacked_axis": lambda path: 0 if path.startswith("blocks") else None,
             "group": lambda path: path.split("/")[0]}  # fmt: skip
    return Model(params, loss, ids, order, where, unrolled)


def rnn(steps=16):
    """A GRU through time below a head."""
    cell = {"hidden": dense(WIDTH, 3 * WIDTH), "input": {"kernel": normal(WIDTH, 3 * WIDTH)}}
    params = {"embed": normal(9, WIDTH), "gru": cell, "classify": dense(WIDTH, 3)}

    def cell_step(p, h, x):
        a, b = apply(p["hidden"], h), x @ p["input"]["kernel"]
        r, z = (jax.nn.sigmoid(a[:, i : i + WIDTH] + b[:, i : i + WIDTH]) for i in (0, WIDTH))
        n = jnp.tanh(b[:, 2 * WIDTH :] + r * a[:, 2 * WIDTH :])
        return (1 - z) * n + z * h

    def head(p, h):
        return optax.softmax_cross_entropy(apply(p["classify"], h), jnp.ones(3) / 3).mean()

    def loss(p, ids):
        xs = p["embed"][ids].swapaxes(0, 1)
        run = lambda h, x: (cell_step(p["gru"], h, x), None)  # noqa: E731
        return head(p, jax.lax.scan(run, jnp.zeros((BATCH, WIDTH)), xs)[0])

    def unrolled(p, ids):
        h = jnp.zeros((BATCH, WIDTH))
        for t in range(steps):
            h = cell_step(p["gru"], h, p["embed"][ids[:, t]])
        return head(p, h)

    ids = np.random.default_rng(0).integers(0, 9, (BATCH, steps))
    where = {"group": lambda path: path.split("/")[0]}
    return Model(params, loss, ids, [["classify"], ["gru"], ["embed"]], where, unrolled)


def experts():
    """Each example goes to the best of three experts, and there is a loss of balance beside."""
    params = {
        f"layer_{i}": {
            "router": dense(WIDTH, 3, seed=i),
            "experts": normal(3, WIDTH, WIDTH, seed=i),
        }
        for i in range(3)
    }
    params |= {"answer": dense(WIDTH, 2)}  # fmt: skip

    def loss(p, x):
        penalty = 0.0
        for i in range(3):
            q = p[f"layer_{i}"]
            gates = jax.nn.softmax(apply(q["router"], x))
            chosen = jax.nn.one_hot(gates.argmax(-1), 3)
            outs = jnp.tanh(jnp.einsum("bi,eio->beo", x, q["experts"]))
            x = x + jnp.einsum("be,beo->bo", chosen * gates, outs)
            penalty += 3 * jnp.sum(chosen.mean(0) * gates.mean(0))
        decay = sum(0.1 * jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        return squares(apply(p["answer"], x)) + 0.01 * penalty + 0.001 * decay

    order = [["answer"], ["layer_2"], ["layer_1"], ["layer_0"]]
    return Model(params, loss, normal(BATCH, WIDTH), order)


class Block(nnx.Module):
    def __init__(self, ins, outs, rngs):
        self.conv1 = nnx.Conv(ins, outs, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(outs, rngs=rngs)
        self.conv2 = nnx.Conv(outs, outs, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(outs, rngs=rngs)
        self.downsample = nnx.Conv(ins, outs, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.downsample(x) + self.bn2(self.conv2(y)))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.layer1 = nnx.List([Block(4, 4, rngs)])
        self.layer2 = nnx.List([Block(4, 6, rngs)])
        self.fc = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        for block in [*self.layer1, *self.layer2]:
            x = block(x)
        return self.fc(x.mean((1, 2)))


class LinenResNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        for name, width in (("conv1", 4), ("layer1", 4), ("layer2", 6)):
            y = linen.Conv(width, (3, 3), use_bias=False, name=name)(x)
            y = linen.GroupNorm(
                2, name=name.replace("conv", "bn") + ("" if "conv" in name else "_norm")
            )(y)
            x = linen.relu(y)
        return linen.Dense(2, name="fc")(x.mean((1, 2)))


def resnet():
    graph, params, rest = nnx.split(ResNet(nnx.Rngs(0)), nnx.Param, ...)

    def loss(p, x):
        return squares(nnx.merge(graph, p, rest, copy=True)(x))

    order = [["fc"], ["layer2"], ["layer1"], ["bn1"], ["conv1"]]
    return Model(nnx.to_pure_dict(params), loss, normal(2, 6, 6, 1), order)


def linen_resnet():
    model, x = LinenResNet(), normal(2, 6, 6, 1)
    params = model.init(jax.random.key(0), x)["params"]
    order = [["fc"], ["layer2_norm"], ["layer2"], ["layer1_norm"], ["layer1"], ["bn1"], ["conv1"]]
    return Model(params, lambda p, x: squares(model.apply({"params": p}, x)), x, order)


def unet():
    """What goes down comes up, and each level up also gets what its level down gave."""
    names = ["down1", "down2", "middle", "up1", "up2", "final_conv"]
    sizes = {"up1": 2 * WIDTH, "up2": 2 * WIDTH}
    params = {name: dense(sizes.get(name, WIDTH), WIDTH) for name in names}

    def loss(p, x):
        one = jnp.tanh(apply(p["down1"], x))
        two = jnp.tanh(apply(p["down2"], one))
        y = jnp.tanh(apply(p["middle"], two))
        y = jnp.tanh(apply(p["up2"], jnp.concatenate([y, two], -1)))
        y = jnp.tanh(apply(p["up1"], jnp.concatenate([y, one], -1)))
        return squares(apply(p["final_conv"], y))

    order = [["final_conv"], ["up1"], ["up2"], ["middle"], ["down2"], ["down1"]]
    return Model(params, loss, normal(BATCH, WIDTH), order)


def two_heads():
    """A detector: one trunk, a head of two layers and a head of one, each with its loss."""
    names = ["backbone_0", "backbone_1", "bbox_embed_0", "bbox_embed_1", "class_embed"]
    params = {name: dense(WIDTH, WIDTH, seed=i) for i, name in enumerate(names)}

    def loss(p, x):
        for name in names[:2]:
            x = jnp.tanh(apply(p[name], x))
        boxes = apply(p["bbox_embed_1"], jnp.tanh(apply(p["bbox_embed_0"], x)))
        return squares(boxes) + 0.5 * squares(apply(p["class_embed"], x))

    order = [["bbox_embed_1", "class_embed"], ["bbox_embed_0"], ["backbone_1"], ["backbone_0"]]
    return Model(params, loss, normal(BATCH, WIDTH), order)


class LinenNames(linen.Module):
    """Automatic names, of layers that are used in another order than they are numbered in."""

    @linen.compact
    def __call__(self, x):
        last = linen.Dense(2)  # named when it is first used
        second, first = linen.Dense(WIDTH), linen.Dense(WIDTH)
        return last(linen.LayerNorm()(nnx.tanh(second(nnx.tanh(first(x))))))


def linen_names():
    model, x = LinenNames(), normal(BATCH, WIDTH)
    params = model.init(jax.random.key(0), x)["params"]
    order = [["Dense_0"], ["LayerNorm_0"], ["Dense_1"], ["Dense_2"]]
    return Model(params, lambda p, x: squares(model.apply({"params": p}, x)), x, order)


def indexed(pick):
    """Blocks stacked on axis 0, which a loop in Python takes one by one."""
    params = {"embed": normal(WIDTH, WIDTH), "w": normal(4, WIDTH, WIDTH), "head": normal(WIDTH, 2)}

    def loss(p, x):
        x = x @ p["embed"]
        for i in range(4):
            x = jnp.tanh(x @ pick(p["w"], i))
        return squares(x @ p["head"])

    order = [["head"], *([f"w[{i}]"] for i in (3, 2, 1, 0)), ["embed"]]
    where = {"stacked_axis": lambda path: 0 if path == "w" else None}
    return Model(params, loss, normal(BATCH, WIDTH), order, where)


EVERY = (resnet, linen_resnet, roberta, numbered, two_towers, tied, decoder, rnn, experts)
MODELS = {make.__name__: make for make in EVERY}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def ordered(model, loss=None):
    slots = model.slots()
    work = read_loss(loss or model.loss, model.params, model.batch, slots=slots)
    by_depth = [[] for _ in range(max(work.depths) + 1)]
    for name, depth in zip(slots.names, work.depths, strict=True):
        by_depth[depth].append(name)
    return [sorted(names) for names in by_depth]


def test_order(model):
    assert ordered(model) == model.order


@pytest.mark.parametrize("make", [unet, two_heads, linen_names])
def test_order_of_branches_and_of_names_that_mislead(make):
    model = make()
    assert ordered(model) == model.order


PICKS = {
    "w[i]": lambda w, i: w[i],
    "w[i - 4]": lambda w, i: w[i - 4],
    "w[i, :, :]": lambda w, i: w[i, :, :],
    "w[i : i + 1][0]": lambda w, i: w[i : i + 1][0],
    "w[jnp.int32(i)]": lambda w, i: w[jnp.int32(i)],
    "jnp.take": lambda w, i: jnp.take(w, i, axis=0),
    "jnp.split": lambda w, i: jnp.split(w, 4)[i][0],
    "list": lambda w, i: list(w)[i],
    "dynamic": lambda w, i: jax.lax.dynamic_index_in_dim(w, i, 0, keepdims=False),
    "transposed": lambda w, i: w.mT[i].mT,
    "cast": lambda w, i: w.astype(jnp.bfloat16)[i].astype(w.dtype),
    "reshaped": lambda w, i: w.reshape(2, 2, WIDTH, WIDTH)[i // 2][i % 2],
}


@pytest.mark.parametrize("pick", PICKS)
def test_layers_of_a_stack_that_are_picked_one_by_one(pick):
    model = indexed(PICKS[pick])
    slots = model.slots()
    assert ordered(model) == model.order
    work = read_loss(model.loss, model.params, model.batch, slots=slots)
    everything = jax.grad(model.loss)(model.params, model.batch)
    for layers in ((3,), (0, 2)):
        active = [f"w[{i}]" for i in layers]
        run = value_and_grad(model.loss, active, **model.where)
        _, grads = run(model.params, model.batch)
        np.testing.assert_allclose(
            grads["w"].values, everything["w"][np.array(layers)], rtol=1e-3, atol=1e-6
        )
        # What is planned is what runs: the chain of all of them.
        planned = work.cost([slots.names.index(name) for name in active])
        ran = program_flops(jax.make_jaxpr(run)(model.params, model.batch))
        assert planned == pytest.approx(ran, rel=0.05)


@pytest.mark.parametrize("change", [{"reverse": True}, {"layers": 2}])
def test_order_of_a_scan(change):
    model = decoder(**change)
    assert ordered(model) == model.order
    assert ordered(model, model.unrolled) == model.order


def test_embeddings_that_are_added_are_equally_deep():
    params = {
        "head": dense(WIDTH, 2), "mlp": dense(WIDTH, WIDTH),
        "wpe": normal(5, WIDTH), "wte": normal(9, WIDTH),
    }  # fmt: skip

    def loss(p, ids):
        x = jnp.take(p["wte"], ids, axis=0) + jnp.take(p["wpe"], jnp.arange(5), axis=0)
        return squares(apply(p["head"], jnp.tanh(apply(p["mlp"], x))))

    slots = find_slots(params, group=lambda path: path.split("/")[0])
    work = read_loss(loss, params, np.zeros((2, 5), int), slots=slots)
    found = dict(zip(slots.names, work.depths, strict=True))
    assert found == {"head": 0, "mlp": 1, "wpe": 2, "wte": 2}


def test_order_of_layers_picked_by_a_traced_number():
    model = decoder()

    def loss(p, ids):
        def block(i, x):
            q = jax.tree.map(lambda leaf: leaf[i], p["blocks"])
            return x + jax.nn.relu(norm(q["norm"], x) @ q["up"]) @ q["down"]

        x = jax.lax.fori_loop(0, 4, block, p["embed"]["embedding"][ids])
        return squares(apply(p["lm_head"], x))

    assert ordered(model, loss) == model.order


@pytest.mark.parametrize("make", [decoder, rnn])
def test_costs_are_those_of_the_unrolled_program(make):
    model = make()
    slots = model.slots()
    looped, flat = (
        read_loss(loss, model.params, model.batch, slots=slots)
        for loss in (model.loss, model.unrolled)
    )
    index = {name: i for i, name in enumerate(slots.names)}
    stack = [i for name, i in index.items() if "[" in name]
    for name, i in index.items():
        if name not in ("embed",):
            # A scan over layers makes the gradients of all of them.
            chosen = stack if i in stack else [i]
            assert looped.cost(chosen) == pytest.approx(flat.cost(chosen), rel=0.05), name
    assert looped.cost(range(len(slots))) == pytest.approx(flat.cost(range(len(slots))), rel=0.05)


def test_costs_are_those_of_each_program(model):
    """What is read off one trace, is what the program of each set has."""
    slots = model.slots()
    work = read_loss(model.loss, model.params, model.batch, slots=slots)
    rng = np.random.default_rng(0)
    for _ in range(4):
        active = set(rng.choice(slots.names, size=rng.integers(1, 4)))
        step = value_and_grad(
            model.loss, active, **(model.where or {"group": by_layer(model.params)})
        )
        found = program_flops(jax.make_jaxpr(step)(model.params, model.batch))
        cost = work.cost(i for i, name in enumerate(slots.names) if name in active)
        assert cost == pytest.approx(found, rel=0.05), active


def trained(model, policy, batches=1, every=1, **options):
    step = partial.step(policy, recalc_every=every, **model.where, **options)
    trainer = Trainer(model.params, optax.sgd(1.0), model.loss, step, progress=False)
    trainer.train([model.batch] * batches)
    return trainer


def check_step(model, trainer, active):
    """One step of plain descent with these slots, and nothing else."""
    assert trainer.history.updates == [len(active)]
    assert [v["active"] for v in trainer.get_step_report()["variants"]] == [sorted(active)]
    before, slots = jax.tree.leaves(model.params), model.slots()
    after = list(map(np.asarray, jax.tree.leaves(trainer.params)))
    grads = jax.jit(jax.grad(model.loss))(model.params, model.batch)
    grads = list(map(np.asarray, jax.tree.leaves(grads)))
    for bundle in slots.bundles:
        on = np.array([name in active for name in slots.names[bundle.start :][: bundle.slots]])
        for i in bundle.leaves:
            rows = on if bundle.layers else np.full(np.shape(before[i])[:1], on[0])
            np.testing.assert_array_equal(after[i][~rows], np.asarray(before[i])[~rows])
            wanted = (before[i] - grads[i])[rows]
            np.testing.assert_allclose(after[i][rows], wanted, rtol=1e-4, atol=1e-6)


def test_suffix(model):
    check_step(model, trained(model, "suffix(1)"), model.order[0] + model.order[1])


@pytest.mark.parametrize("make", [roberta, two_towers, decoder])
def test_lisa_and_badam(make):
    model = make()
    lisa = trained(model, "lisa(1)")
    (ran,) = lisa.get_step_report()["variants"]
    drawn = set(ran["active"]) - {*model.order[0], *model.order[-1]}
    assert sorted(drawn) in model.order[1:-1]
    check_step(model, lisa, ran["active"])
    turns = trained(model, "badam(1)", batches=2).get_step_report()["variants"]
    for turn, ran in enumerate(turns, 1):
        assert ran["active"] == sorted(model.order[0] + model.order[turn])


@pytest.mark.parametrize("make", [numbered, experts, rnn])
def test_priority(make):
    model = make()
    trainer = trained(model, "priority", 6, every=6, share=0.8)
    first, other = trainer.get_step_report()["variants"]
    assert first["active"] == sorted(model.slots().names)
    assert set(model.order[0]) <= set(other["active"]) < set(first["active"])
    # What was planned for is what was spent, the optimizer included.
    planner = trainer.step._planner
    for ran in (first, other):
        planned = planner.cost(frozenset(ran["active"]))
        assert planned == pytest.approx(ran["flops"] / ran["steps"], rel=0.02)
    assert trainer.get_step_report()["share"] <= 0.8


def test_wide_layers_of_a_small_batch_are_planned_with_their_optimizer():
    sizes = {f"dense_{i}": normal(256, 256, seed=i) for i in range(4)}

    def loss(p, x):
        for i in range(4):
            x = jnp.tanh(x @ p[f"dense_{i}"])
        return squares(x)

    step = partial.step("random", share=0.6, recalc_every=2)
    trainer = Trainer(sizes, optax.adam(1e-3), loss, step, progress=False)
    trainer.train([normal(2, 256)] * 2)
    (ran,) = trainer.get_step_report()["variants"]
    planned = trainer.step._planner.cost(frozenset(ran["active"]))
    assert planned == pytest.approx(ran["flops"] / ran["steps"], rel=0.05)


def test_thirty_blocks_in_three_seconds(caplog):
    """By shapes alone, and without the compiler."""
    block = {n: jax.ShapeDtypeStruct((WIDTH, WIDTH), np.float32) for n in ("q", "k", "v", "o")}
    params = {f"block_{i}": block | {"up": block["q"], "down": block["q"]} for i in range(30)}

    def loss(p, x):
        for i in range(30):
            b = p[f"block_{i}"]
            weights = jax.nn.softmax((x @ b["q"]) @ (x @ b["k"]).mT / WIDTH**0.5)
            x = x + weights @ (x @ b["v"]) @ b["o"]
            x = x + jax.nn.gelu(x @ b["up"]) @ b["down"]
        return squares(x)

    slots = find_slots(params, group=by_layer(params))
    x = jax.ShapeDtypeStruct((2, 5, WIDTH), np.float32)
    with jax.log_compiles():
        start = time.process_time()
        work = read_loss(loss, params, x, slots=slots)
        assert time.process_time() - start < 3
    assert "XLA compilation" not in caplog.text
    depths = dict(zip(slots.names, work.depths, strict=True))
    assert [depths[f"block_{i}"] for i in range(30)] == list(range(29, -1, -1))


def test_order_through_what_wraps_work():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    def spread(x, w):
        return jnp.tanh(x @ w)

    @jax.custom_vjp
    def product(x, w):
        return jnp.tanh(x @ w)

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, dy: (dy @ r[1].T, r[0].T @ dy))

    def loss(p, x):
        x = product(spread(x, p["z_0"]), p["z_1"])
        x = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ p["y"]), lambda x: 2 * x, x)
        x = jax.jit(jax.checkpoint(lambda x, w: jnp.tanh(x @ (w / jnp.linalg.norm(w)))))(x, p["x"])
        target = jax.lax.stop_gradient(jnp.tanh(x @ p["target"]))
        return jnp.mean((x @ p["w"] - target) ** 2)

    params = {name: normal(WIDTH, WIDTH) for name in ("z_0", "z_1", "y", "x", "w", "target")}
    order = [["target", "w"], ["x"], ["y"], ["z_1"], ["z_0"]]
    where = {"group": lambda path: None}
    model = Model(params, loss, normal(BATCH, WIDTH), order, where)
    assert ordered(model) == order
    # So wide that what is no product counts for less than a hundredth.
    slots, size = model.slots(), 1024
    square = jax.ShapeDtypeStruct((size, size), jnp.float32)
    work = read_loss(loss, dict.fromkeys(params, square), square, slots=slots)
    assert work.cost([slots.names.index("target")]) == work.cost([])
    # The branch with the product counts, both halves of the mesh, and what is computed again.
    one = 2 * size**3
    assert work.cost([]) == pytest.approx(6 * one, rel=0.01)
    assert work.cost(range(6)) - work.cost([]) == pytest.approx(10 * one, rel=0.01)
