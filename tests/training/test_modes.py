"""Tests of the modes that modules are trained in, and of what a loss changes in a module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax.partial.stages import nnx_stages
from priorityprop_jax.training import PriorityPropTrainer, Trainer
from priorityprop_jax.training.model import as_model

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
BATCH = {"x": X, "y": X[:, :1]}


class Block(nnx.Module):
    def __init__(self, rngs, **modes):
        self.inner = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        self.drop = nnx.Dropout(0.5, rngs=rngs, **modes)

    def __call__(self, x):
        return self.drop(self.inner(x) + 1)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def _others(model):
    """Everything in a model but its parameters."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.map(lambda x: np.array(data(x)), state)


def _moved(before, after):
    """Names of what differs."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in pairs
        if not np.array_equal(a, b)
    }


def _chain(model):
    return nnx_stages([("a", model.blocks[0]), ("b", model.blocks[1]), ("head", model.head)])


@pytest.mark.parametrize("make", [lambda model: model, _chain])
def test_parts_in_evaluation_mode_stay_in_it(make):
    model = Net()
    model.blocks[0].inner.eval()
    model.blocks[1].drop.eval()
    graph, before = nnx.graphdef(model), _others(model)
    trainer = Trainer(make(model), optax.sgd(0.1), _loss, progress=False)
    history = trainer.train([BATCH] * 2)
    # A plain loop in the same modes.
    plain = Net()
    plain.blocks[0].inner.eval()
    plain.blocks[1].drop.eval()
    expected = float(_loss(plain, BATCH))
    assert history.loss[0] == pytest.approx(expected, rel=1e-5)
    assert nnx.graphdef(model) == graph
    moved = _moved(before, _others(model))
    assert moved == {
        "blocks/0/drop/rngs/count", "blocks/1/inner/layers/1/mean", "blocks/1/inner/layers/1/var",
    }  # fmt: skip
    # Evaluation is in evaluation mode throughout, and changes neither modes nor state.
    between = _others(model)
    value = trainer.evaluate([BATCH])["loss"]
    assert nnx.graphdef(model) == graph and not _moved(between, _others(model))
    model.eval()
    assert value == pytest.approx(float(_loss(model, BATCH)), rel=1e-5)


def _recurrent(rngs, mode):
    cell = nnx.LSTMCell(3, 3, rngs=rngs)
    return nnx.Sequential(nnx.RNN(cell), nnx.Dropout(0.5, deterministic=mode, rngs=rngs))


def _spectral(rngs, mode):
    return nnx.SpectralNorm(nnx.Linear(3, 3, rngs=rngs), update_stats=not mode, rngs=rngs)


SIBLINGS = {
    "dropout": lambda rngs, mode: nnx.Dropout(0.5, deterministic=mode, rngs=rngs),
    "norm": lambda rngs, mode: nnx.BatchNorm(3, use_running_average=bool(mode), rngs=rngs),
    "attention": lambda rngs, mode: nnx.MultiHeadAttention(
        1, 3, dropout_rate=0.5, deterministic=mode, decode=False, rngs=rngs
    ),
    "recurrent": _recurrent,
    "spectral": _spectral,
}


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("kind", SIBLINGS)
def test_siblings(kind, stages):
    """Whatever has a mode, by whichever attribute: on, off, and None for not said."""
    batch = {"x": X[None], "y": X[None]}
    for mode in (False, True, None) if kind in ("dropout", "attention") else (False, True):
        rngs = nnx.Rngs(0)
        module, head = SIBLINGS[kind](rngs, mode), nnx.Linear(3, 3, rngs=rngs)
        model = nnx.Sequential(module, nnx.Dropout(0.0), head)  # never off as a whole
        chain = nnx_stages([("module", module), ("head", head)]) if stages else model
        before = _others(module)
        made = as_model(chain)
        params, rest = made.split()
        made.join(params, made.loss(_loss, params, rest, batch)[1])
        moved = _moved(before, _others(module)) - {"layers/0/rngs/count"}  # that an RNN starts at
        assert bool(moved) == (not mode)


class TestAsAWhole:
    def test_warns_once_and_is_trained_so(self):
        model = Net()
        model.eval()
        before = _others(model)
        with pytest.warns(UserWarning, match="the model is in evaluation mode as a whole") as seen:
            trainer = PriorityPropTrainer(model, optax.sgd(0.1), _loss, progress=False)
        trainer.train([BATCH])
        assert len(seen) == 1 and seen[0].filename == __file__
        assert not _moved(before, _others(model))

    def test_of_stages(self):
        model = Net()
        model.eval()
        _chain(model)  # The head has no mode: a frozen front is given so on purpose.
        with pytest.warns(UserWarning, match="every module is in evaluation mode") as seen:
            nnx_stages([("a", model.blocks[0]), ("b", model.blocks[1])])
        assert seen[0].filename == __file__

    def test_a_model_without_modes_is_not_warned_of(self):
        linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        linear.eval()
        Trainer(linear, optax.sgd(0.1), _loss)
        nnx_stages([("linear", linear)])


class TestWhatALossChanges:
    def test_modes(self):
        def loss_fn(model, batch):
            model.train()
            return _loss(model, batch)

        model = Net()
        model.blocks[1].inner.eval()
        trainer = Trainer(model, optax.sgd(0.1), loss_fn, progress=False)
        name = "blocks/1/inner/layers/1/use_running_average"
        with pytest.raises(ValueError, match=f"loss_fn has changed the model's {name}, which"):
            trainer.train([BATCH])
        model.train()  # Nothing changes now, and nothing is lost.
        assert len(Trainer(model, optax.sgd(0.1), loss_fn, progress=False).train([BATCH]).loss) == 1

    def test_put_back_in_the_end(self):
        def loss_fn(model, batch):
            model.eval()
            loss = _loss(model, batch)
            model.train()
            return loss

        model = Net()
        before = _others(model)
        Trainer(model, optax.sgd(0.1), loss_fn, progress=False).train([BATCH])
        assert not _moved(before, _others(model))

    @pytest.mark.parametrize("stages", [False, True])
    def test_counters_and_new_variables(self, stages):
        class Counting(nnx.Linear):
            def __call__(self, inputs):
                self.calls = getattr(self, "calls", 0) + 1
                return super().__call__(inputs)

        module = Counting(3, 1, rngs=nnx.Rngs(0))
        model = nnx_stages([("module", module)]) if stages else module
        trainer = Trainer(model, optax.sgd(0.1), _loss, progress=False)
        who = "stage 'module'" if stages else "loss_fn"
        with pytest.raises(
            ValueError, match=f"{who} has changed the model's calls, .*nnx.Variable"
        ):
            trainer.train([BATCH])
        assert module(X).shape == (8, 1) and np.isfinite(module.kernel[...]).all()

    def test_variables_are_handed_on(self):
        class Counting(nnx.Linear):
            def __init__(self):
                super().__init__(3, 1, rngs=nnx.Rngs(0))
                self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

            def __call__(self, inputs):
                self.calls[...] += 1
                return super().__call__(inputs)

        model = Counting()
        Trainer(model, optax.sgd(0.1), _loss, progress=False).train([BATCH] * 3)
        assert int(model.calls[...]) == 3
