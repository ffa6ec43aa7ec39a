"""A stack of blocks: values of a scan, gradients of `jax.grad`, and one program for every set."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from priorityprop_jax import partial
from priorityprop_jax.core.layout import bytes_held
from priorityprop_jax.core.program import build, program_flops
from priorityprop_jax.partial import engine
from priorityprop_jax.partial.stack import unrolled
from priorityprop_jax.training.trainer import Trainer

LAYERS, WIDTH = 5, 4
PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / 2,
    "b": jax.random.normal(jax.random.key(1), (LAYERS, WIDTH)),
}
X = jax.random.normal(jax.random.key(2), (3, WIDTH))
SETS = [(), (4,), (0,), (1, 3), (2, 3, 4), (0, 1, 2, 3, 4)]
STACKED = {"stacked_axis": lambda path: 0 if path.startswith("blocks") else None}


def block(w, x):
    return x + jnp.tanh(x @ w["w"] + w["b"])


def by_scan(params, x, block=block):
    return lax.scan(lambda h, w: (block(w, h), None), x, params)[0]


def mask(layers):
    return np.isin(np.arange(LAYERS), layers)


def assert_rows(found, expected, layers, rtol=1e-4):
    """Active rows are those of the whole gradient, and the others are zero."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        on = mask(layers)
        assert not np.asarray(a)[~on].any()
        np.testing.assert_allclose(np.asarray(a)[on], np.asarray(b)[on], rtol=rtol, atol=1e-6)


class TestStack:
    def test_values_and_gradients_in_one_program(self):
        loss = lambda run: lambda p, x, *on: jnp.sum(run(p, x, *on) ** 2)  # noqa: E731
        stacked = lambda p, x, on: partial.stack(block, p, x, on)  # noqa: E731
        grad = jax.jit(jax.value_and_grad(loss(stacked)))
        value, whole = jax.jit(jax.value_and_grad(loss(by_scan)))(PARAMS, X)
        for layers in SETS:
            found, grads = grad(PARAMS, X, mask(layers))
            np.testing.assert_allclose(found, value, rtol=5e-6)
            assert_rows(grads, whole, layers)
        assert grad._cache_size() == 1
        assert partial.stack(block, PARAMS, X, mask((1,))).tolist() == by_scan(PARAMS, X).tolist()

    @pytest.mark.parametrize("layers", SETS)
    def test_the_gradient_of_the_input_goes_all_the_way(self, layers):
        both = jax.jit(
            jax.grad(lambda p, x: partial.stack(block, p, x, mask(layers)).sum(), argnums=(0, 1))
        )
        expected = jax.jit(jax.grad(lambda p, x: by_scan(p, x).sum(), argnums=(0, 1)))
        (grads, dx), (whole, expected_dx) = both(PARAMS, X), expected(PARAMS, X)
        assert_rows(grads, whole, layers)
        np.testing.assert_allclose(dx, expected_dx, rtol=5e-6)

    @pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
    def test_remat_vmap_and_what_a_block_closes_over(self, policy):
        def loss(params, shared, x, on, run):
            def inner(w, x):
                return block(w, x) * shared

            return run(jax.checkpoint(inner, policy=policy), params, x, on).sum()

        stacked = lambda f, p, x, on: partial.stack(f, p, x, on)  # noqa: E731
        scanned = lambda f, p, x, on: by_scan(p, x, f)  # noqa: E731
        ons = jnp.stack([mask((1, 3)), mask((4,))])
        grad = jax.grad(loss, argnums=(0, 1))
        found = jax.jit(jax.vmap(lambda on: grad(PARAMS, 0.5, X, on, stacked)))(ons)
        whole, shared = jax.jit(lambda: grad(PARAMS, 0.5, X, None, scanned))()
        for i, layers in enumerate([(1, 3), (4,)]):
            assert_rows(jax.tree.map(lambda a, i=i: a[i], found[0]), whole, layers)
        np.testing.assert_allclose(found[1], [shared, shared], rtol=1e-5)

    def test_keys_outputs_and_their_gradients(self):
        keys = jax.random.split(jax.random.key(5), LAYERS)

        def dropped(w, x, key):
            x = block(w, x) * jax.random.bernoulli(key, 0.7, x.shape)
            return x, {"mean": x.mean(), "key": jax.random.fold_in(key, 1), "n": jnp.int32(1)}

        def loss(params, on):
            x, outs = partial.stack(dropped, params, X, on, per_layer=keys, has_aux=True)
            return x.sum() + (outs["mean"] * jnp.arange(LAYERS)).sum(), outs

        def reference(params):
            body = lambda x, at: dropped(*at[:1], x, at[1])  # noqa: E731
            x, outs = lax.scan(body, X, (params, keys))
            return x.sum() + (outs["mean"] * jnp.arange(LAYERS)).sum(), outs

        whole, expected = jax.jit(jax.grad(reference, has_aux=True))(PARAMS)
        for layers in [(2, 4), (0,)]:
            grads, outs = jax.jit(jax.grad(loss, has_aux=True))(PARAMS, mask(layers))
            assert_rows(grads, whole, layers)
            np.testing.assert_array_equal(outs["mean"], expected["mean"])
            same = jax.random.key_data(outs["key"]) == jax.random.key_data(expected["key"])
            assert same.all() and outs["n"].sum() == LAYERS

    def test_per_layer_numbers_get_their_gradients(self):
        scale = jnp.arange(1.0, LAYERS + 1)
        scaled = lambda w, x, s: block(w, x) * s  # noqa: E731
        body = lambda x, at: (scaled(at[0], x, at[1]), None)  # noqa: E731
        loss = lambda s: partial.stack(scaled, PARAMS, X, mask((3,)), per_layer=s).sum()  # noqa: E731
        expected = jax.jit(jax.grad(lambda s: lax.scan(body, X, (PARAMS, s))[0].sum()))(scale)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(scale), expected, rtol=5e-6)

    def test_the_backward_pass_is_as_long_as_what_is_trained(self):
        """Compiled, so that a loop that goes too far would be seen: it divides by zero there."""

        def flops(layers):
            chosen = {f"blocks/{k}[{i}]" for k in PARAMS for i in layers}
            grad = partial.value_and_grad(model_loss, chosen, **STACKED)
            with unrolled():
                return program_flops(jax.make_jaxpr(grad)(model_params(), X))

        forward = 2 * X.size * WIDTH
        for layers in SETS[1:]:
            chain, own = LAYERS - 1 - min(layers), len(layers)
            products = forward * (LAYERS + chain + own) + 2 * 2 * X.size
            assert products < flops(layers) < 1.9 * products

        def trap(x, w):  # the backward pass through the two deepest layers gives NaN
            return jnp.where(w["b"].sum() > 1e3, x * jnp.sqrt(jnp.zeros(())), 0)

        params = {**PARAMS, "b": PARAMS["b"].at[:2].set(1e4)}
        trapped = lambda w, x: block({**w, "b": 0 * w["b"]}, x) + trap(x, w)  # noqa: E731
        loss = lambda p, x, on: partial.stack(trapped, p, x, on).sum()  # noqa: E731
        grads = jax.jit(jax.grad(loss))(params, X, mask((2, 4)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))

    @pytest.mark.parametrize(
        ("params", "active", "message"),
        [
            ({}, None, "the same number of layers"),
            ({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, None, "the same number of layers"),
            ({"w": jnp.ones(())}, None, "the same number of layers"),
            (PARAMS, jnp.ones(LAYERS), "bool"),
            (PARAMS, jnp.ones(LAYERS + 1, bool), "bool"),
        ],
    )
    def test_bad_input(self, params, active, message):
        with pytest.raises(ValueError, match=message):
            partial.stack(block, params, X, active)


def model_params():
    head = jax.random.normal(jax.random.key(3), (WIDTH, 2))
    return {"blocks": PARAMS, "embed": jnp.eye(WIDTH), "head": head}


def model_loss(p, x):
    return jnp.mean((partial.stack(block, p["blocks"], x @ p["embed"]) @ p["head"] - 1) ** 2)


class TestRows:
    def test_traced_layers_in_a_loop_of_ones_own(self):
        tx = optax.chain(
            optax.clip_by_global_norm(0.1),
            partial.update_active(optax.adamw(1e-2), **STACKED),
            optax.scale_by_schedule(lambda step: 1.0),
        )
        traces = []

        @jax.jit
        def step(params, state, x, layers):
            traces.append(1)
            active = {"blocks": layers, "head": True}
            _, grads = partial.value_and_grad(model_loss, active, **STACKED)(params, x)
            updates, state = tx.update(grads, state, params)
            norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)) ** 0.5
            return optax.apply_updates(params, updates), state, norm

        @jax.jit
        def reference(params, state, x, layers):
            """The same with arrays of all layers, and a program for each set."""
            active = {f"blocks/{k}[{i}]" for k in PARAMS for i in layers} | {"head"}
            _, grads = partial.value_and_grad(model_loss, active, **STACKED)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        full = jax.jit(jax.grad(model_loss))
        ours = theirs = (model_params(), tx.init(model_params()))
        for layers in [(1, 3), (0, 4), (3, 4)]:
            whole = full(ours[0], X)
            active = [
                jax.tree.map(lambda a, i=layers: a[np.array(i)], whole["blocks"]),
                whole["head"],
            ]
            *ours, norm = step(*ours, X, jnp.array(layers))
            expected = sum(jnp.sum(g**2) for g in jax.tree.leaves(active)) ** 0.5
            np.testing.assert_allclose(norm, expected, rtol=1e-5)
            theirs = jax.jit(reference.__wrapped__, static_argnums=3)(*theirs, X, layers)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, list(theirs)
            )
        assert len(traces) == 1
        np.testing.assert_array_equal(ours[0]["embed"], np.eye(WIDTH))
        np.testing.assert_array_equal(ours[0]["blocks"]["w"][2], PARAMS["w"][2])

    def test_traced_layers_that_repeat_have_no_gradient_that_passes_for_one(self):
        @jax.jit
        def grads(layers):
            active = {"blocks": layers, "head": True}
            return partial.value_and_grad(model_loss, active, **STACKED)(model_params(), X)[1]

        for right in ([1, 3], [0, 1, 2, 3, 4]):
            assert not any(np.isnan(g).any() for g in jax.tree.leaves(grads(jnp.array(right))))
        # As many as there are, not all of which are meant.
        for wrong in ([3, 3], [3, 1], [1, 9], [0, 0, 1, 2, 3], [0, 1, 2, 3, 9]):
            assert all(np.isnan(g).all() for g in jax.tree.leaves(grads(jnp.array(wrong))))

    @pytest.mark.parametrize("layers", [(4,), (2, 3), (0, 4)])
    def test_layers_that_are_known_keep_nothing_of_those_below(self, layers):
        x = jnp.ones((2000, WIDTH))

        def compiled(active):
            grad_fn = partial.value_and_grad(model_loss, active, **STACKED)
            return jax.jit(grad_fn).lower(model_params(), x).compile()

        known = {f"blocks/{k}[{i}]" for k in PARAMS for i in layers} | {"head"}
        whole = jax.grad(model_loss)(model_params(), x)
        _, grads = (program := compiled(known))(model_params(), x)
        assert_rows(jax.tree.map(lambda g: g.densify(), grads["blocks"],
                                 is_leaf=lambda g: hasattr(g, "densify")),
                    whole["blocks"], layers)  # fmt: skip
        taken = program.memory_analysis().temp_size_in_bytes
        above = compiled(known | {"embed"})
        assert above.memory_analysis().temp_size_in_bytes - taken >= (layers[0] - 0.1) * x.nbytes

    @pytest.mark.parametrize("layers", SETS)
    def test_a_mask_that_is_known_keeps_nothing_of_those_below(self, layers):
        x = jnp.ones((2000, WIDTH))

        def compiled(on):
            loss = lambda p, on: jnp.sum(partial.stack(block, p, x, on) ** 2)  # noqa: E731
            known = jax.jit(lambda p: jax.grad(loss)(p, on)).lower(PARAMS).compile()
            return known, jax.jit(jax.grad(loss)).lower(PARAMS, on).compile()

        known, traced = compiled(mask(layers))
        whole = jax.grad(lambda p: jnp.sum(by_scan(p, x) ** 2))(PARAMS)
        assert_rows(known(PARAMS), whole, layers)
        taken, most = (p.memory_analysis().temp_size_in_bytes for p in (known, traced))
        assert most - taken >= (min([*layers, LAYERS - 1]) - 0.1) * x.nbytes

    @pytest.mark.parametrize(
        "active",
        [{"blocks/w[3]", "blocks/b"}, {"blocks/w[3]", "blocks/b[1]"}, {"blocks/w[3]", "embed"}],
    )
    def test_leaves_whose_layers_differ(self, active):
        whole = jax.grad(model_loss)(model_params(), X)
        _, grads = partial.value_and_grad(model_loss, active, **STACKED)(model_params(), X)
        dense = lambda g: g.densify() if hasattr(g, "densify") else g  # noqa: E731
        for name in ("w", "b"):
            own = [i for i in range(LAYERS) if {f"blocks/{name}[{i}]", f"blocks/{name}"} & active]
            if own:
                assert_rows(dense(grads["blocks"][name]), whole["blocks"][name], own)
        if "embed" in active:
            np.testing.assert_allclose(grads["embed"], whole["embed"], rtol=1e-4, atol=1e-6)

    def test_without_a_stack_the_gradients_are_right_too(self):
        def loss(p, x):
            return jnp.mean((by_scan(p["blocks"], x @ p["embed"]) @ p["head"] - 1) ** 2)

        grad = partial.value_and_grad(loss, {"blocks/w": jnp.array([0, 2])}, **STACKED)
        _, grads = grad(model_params(), X)
        assert grads["head"] is None and grads["blocks"]["b"] is None
        whole = jax.grad(loss)(model_params(), X)["blocks"]["w"]
        assert_rows(grads["blocks"]["w"].densify(), whole, (0, 2))

    @pytest.mark.parametrize(
        ("active", "error", "message"),
        [
            ({"blocks": jnp.array([0.5])}, TypeError, "True or an int32"),
            ({"blocks": [0, 1]}, TypeError, "True or an int32"),
            ({"blocks/w[1]": jnp.array([1])}, ValueError, "only partly meant"),
            ({"head": jnp.array([1])}, ValueError, "is not stacked"),
            ({"nothing": True}, ValueError, "no slot is called"),
            ({"blocks": jnp.array([2, 2])}, ValueError, "ascending and distinct.*all below 5"),
            ({"blocks": jnp.array([1, 9])}, ValueError, "ascending and distinct.*all below 5"),
        ],
    )
    def test_bad_input(self, active, error, message):
        with pytest.raises(error, match=message):
            partial.value_and_grad(model_loss, active, **STACKED)(model_params(), X)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.tanh(self.linear(self.norm(x))))


class Net(nnx.Module):
    def __init__(self, stacked):
        blocks = [Block(nnx.Rngs(i)) for i in range(LAYERS)]
        self.embed = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(8))
        self.blocks = partial.Stack(blocks) if stacked else nnx.Sequential(*blocks)
        self.head = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(9))

    def __call__(self, x):
        return self.head(self.blocks(self.embed(x)))


def net_loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


class TestModule:
    def test_is_the_modules_in_a_row(self):
        stacked, plain = Net(True), Net(False)
        for _ in range(2):  # dropout and statistics go on
            np.testing.assert_allclose(stacked(X), plain(X), rtol=1e-5, atol=1e-6)
        for net in (stacked, plain):
            net.eval()
        np.testing.assert_allclose(stacked(X), plain(X), rtol=1e-5, atol=1e-6)
        mean = [block.norm.mean[...] for block in plain.blocks.layers]
        np.testing.assert_allclose(stacked.blocks.block.norm.mean[...], mean, atol=1e-7)
        with pytest.raises(ValueError, match="2 structures"):
            partial.Stack([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
        with pytest.raises(ValueError, match="got 0"):
            partial.Stack([])

    def test_trainer_runs_what_lisa_asks_for_in_one_program(self):
        trainers = []
        for stacked, state in [(True, "keep"), (True, "offload"), (False, "keep")]:
            step = partial.step("lisa(2)", recalc_every=3, state=state, max_variants=20)
            trainer = Trainer(Net(stacked), optax.adam(1e-2), net_loss, step, progress=False)
            trainer.train([X] * 9)
            trainers.append(trainer)
        first, *others = (trainer.history.loss for trainer in trainers)
        for loss in others:
            np.testing.assert_allclose(first, loss, rtol=1e-4)
        one, offloaded, theirs = (trainer.get_step_report() for trainer in trainers)
        assert one["programs"] == offloaded["programs"] == 1 < theirs["programs"]
        assert one["share"] == pytest.approx(theirs["share"], rel=0.05)
        for report in (one, theirs):
            assert {len(v["active"]) for v in report["variants"]} == {4}
        assert trainers[0].history.updates == [4] * 9

    def test_a_step_takes_memory_for_what_it_trains(self, monkeypatch):
        """Beside parameters and batch: a part of what a full step takes."""
        sizes, count, width = [], 12, 64

        def noted(function, arguments, *rest):
            program = build(function, arguments, *rest)
            if len(arguments) > 3:  # a step
                sizes.append(program.beside + bytes_held(arguments[3]))
            return program

        monkeypatch.setattr(engine, "build", noted)
        blocks = [nnx.Linear(width, width, rngs=nnx.Rngs(i)) for i in range(count)]
        model = nnx.Sequential(partial.Stack(blocks), nnx.Linear(width, 1, rngs=nnx.Rngs(99)))
        loss = lambda model, x: jnp.mean((model(x) - 1) ** 2)  # noqa: E731
        for name, state in (("badam(1)", "reset"), ("full", "keep")):
            step = partial.step(name, state=state, recalc_every=1)
            trainer = Trainer(nnx.clone(model), optax.adamw(1e-3), loss, step, progress=False)
            trainer.train([jnp.ones((1, width))] * 3)
        some, everything = max(sizes[:-1]), sizes[-1]
        assert some / everything < 1 / count + 0.1

    def test_a_trained_layer_is_the_one_that_was_asked_for(self):
        model = Net(True)
        before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        for layer, other in itertools.pairwise([3, 1, 0]):
            policy = lambda at, layer=layer: [{f"blocks[{layer}]"}] * at.steps  # noqa: E731
            step = partial.step(policy, recalc_every=1)
            trainer = Trainer(model, optax.sgd(0.1), net_loss, step, progress=False)
            trainer.train([X])
            after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            moved = jax.tree.map(lambda a, b: np.asarray(a != b), before, after)
            kernel = moved["blocks"]["block"]["linear"]["kernel"].any((1, 2))
            assert kernel[layer] and not kernel[other]
            assert kernel.sum() == {3: 1, 1: 2}[layer]
            assert not moved["head"]["kernel"].any() and not moved["embed"]["kernel"].any()

    def test_weights_of_whole_numbers_rest(self):
        class Scaled(nnx.Module):
            def __init__(self, rngs):
                self.linear = nnx.Linear(4, 4, rngs=rngs)
                self.code = nnx.Param(jnp.full(4, rngs.params() is not None, jnp.int8))

            def __call__(self, x):
                return x + self.linear(x) * self.code[...]

        class Coded(nnx.Module):
            def __init__(self, rngs):
                self.blocks = partial.Stack([Scaled(rngs) for _ in range(2)])

            def __call__(self, x):
                return self.blocks(x)

        model, loss = Coded(nnx.Rngs(0)), lambda model, x: jnp.mean(model(x) ** 2)
        step = partial.step("lisa(1)", recalc_every=2)
        trainer = Trainer(model, optax.sgd(0.1), loss, step, progress=False)
        history = trainer.train([jnp.ones((2, 4))] * 4)
        assert history.loss[-1] < history.loss[0]
        assert model.blocks.block.code[...].dtype == jnp.int8

    def test_something_between_parameters_and_stack_is_told(self):
        def cast(model, x):
            graph, state = nnx.split(model)
            twice = jax.tree.map(lambda leaf: leaf * 1.0, state)
            return jnp.mean(nnx.merge(graph, twice)(x) ** 2)

        class Plain(nnx.Module):
            def __init__(self, rngs):
                self.blocks = partial.Stack([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

            def __call__(self, x):
                return self.blocks(x)

        step = partial.step("lisa(1)", recalc_every=2)
        trainer = Trainer(Plain(nnx.Rngs(0)), optax.sgd(0.1), cast, step, progress=False)
        with pytest.warns(UserWarning, match="between the parameters of blocks and its"):
            trainer.train([jnp.ones((2, 4))])
