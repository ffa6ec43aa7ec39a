"""Training with sparse weights: places that move, and pruning that ends in sparse layers."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import Compute, DynamicSparsity, PriorityPropTrainer
from priorityprop_jax.cli.tasks import ArrayLoader
from priorityprop_jax.sparse.swap import sparse_layers, sparse_start
from priorityprop_jax.sparse.training import continue_pruned, layer_table, pruned_optimizer

pytestmark = pytest.mark.usefixtures("compile_once")

ROWS = 64
X = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
Y = np.sin(X[:, :1] + X[:, 1:2] * X[:, 2:3]).astype(np.float32)
CYCLE = 4


def loader():
    return ArrayLoader({"x": X, "y": Y}, 16, shuffle=True, seed=0)


def make_model():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(8, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 24, rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers, nnx.Linear(24, 1, rngs=rngs))


def loss(model, batch):
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


def make(sparsity=None, model=None, tx=None, **options):
    if model is None:
        model = make_model()
        sparse_start(model, 0.75)
    tx = optax.adam(1e-2) if tx is None else tx
    numbers = (None, CYCLE, CYCLE, CYCLE)
    return PriorityPropTrainer(
        model, tx, loss, *numbers, sparsity=sparsity, progress=False, **options
    )


MOVES = DynamicSparsity(end=12, every=3, fraction=0.4)


def masks(trainer):
    return {name: layer.mask() for name, layer in sparse_layers(trainer.model).items()}


def state(trainer):
    trees = (nnx.state(trainer.model), trainer.optimizer_state)
    return [np.asarray(x) for x in jax.tree.leaves(trees)]


def test_places_move_when_it_is_time_and_nothing_is_compiled_for_it():
    trainer = make(MOVES)
    start = masks(trainer)
    seen = [start]
    compiled = []
    for _ in range(4):
        trainer.train(loader())
        seen.append(masks(trainer))
        compiled.append(trainer._traces)
    # Steps 3, 6 and 9 move places, in the first, second and third epoch of 4 steps each.
    for before, after, moves in zip(seen, seen[1:], (True, True, True, False), strict=False):
        for name in start:
            assert after[name].sum() == start[name].sum()
            assert (before[name] != after[name]).any() == moves
    assert len(set(compiled)) == 1
    losses = [record["loss"] for record in trainer.history.steps]
    assert losses[-1] < losses[0]
    # What the optimizer keeps has moved along: it is zero where a value is new.
    still = make()
    still.train(loader(), epochs=1)
    assert all((masks(still)[name] == start[name]).all() for name in start)


def test_new_places_have_the_largest_gradients_and_start_at_zero():
    trainer = make(DynamicSparsity(end=100, every=4, fraction=0.5))
    data = loader()
    trainer.train(data, epochs=1)  # the fifth step would be the first after a change
    before = sparse_layers(trainer.model)["layers/2"]
    old, old_kernel = before.mask(), np.asarray(before.kernel())
    data.set_epoch(1)
    batch = next(iter(data))

    def dense_loss(kernel):
        model = nnx.merge(*nnx.split(trainer.model))
        x = jax.nn.relu(model.layers[0](batch["x"]))
        x = jax.nn.relu(x @ kernel + model.layers[2].bias[...])
        return ((model.layers[4](x) - batch["y"]) ** 2).mean()

    score = np.abs(jax.grad(dense_loss)(old_kernel))
    params, rest = nnx.state(trainer.model, nnx.Param), nnx.state(trainer.model, nnx.Not(nnx.Param))
    params, rest, moved = trainer._change(4, params, rest, trainer.optimizer_state, batch)
    model = nnx.merge(nnx.graphdef(trainer.model), params, rest)
    new = model.layers[2].mask()
    grown, dropped = new & ~old, old & ~new
    assert grown.sum() == dropped.sum() > 0
    # Dropped places are the smallest of values, new ones the largest of gradients.
    assert np.abs(old_kernel[dropped]).max() <= np.abs(old_kernel[old & new]).min()
    assert score[grown].min() >= score[~new & ~old].max()
    kernel = np.asarray(model.layers[2].kernel())
    assert not kernel[grown].any()
    np.testing.assert_array_equal(kernel[old & new], old_kernel[old & new])

    def moments(tree, layer):
        """First and second moments, as dense kernels of a layer of these places."""
        found = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            if "values" in keys and "2" in keys and leaf.shape == layer.values.shape:
                twin = nnx.merge(*nnx.split(layer))
                twin.values.set_value(leaf)
                found.append(np.asarray(twin.kernel()))
        return found

    pairs = zip(
        moments(trainer.optimizer_state, before), moments(moved, model.layers[2]), strict=True
    )
    count = 0
    for was, now in pairs:
        count += 1
        np.testing.assert_array_equal(now, np.where(old & new, was, 0))
    assert count >= 2


def test_a_run_that_was_interrupted_goes_on_alike(tmp_path):
    whole = make(MOVES)
    whole.train(loader(), epochs=3)
    first = make(MOVES, checkpoint_dir=tmp_path)
    first.train(loader(), epochs=2)
    second = make(MOVES, checkpoint_dir=tmp_path)
    second.train(loader(), epochs=3, resume_from=tmp_path)
    for a, b in zip(state(whole), state(second), strict=True):
        np.testing.assert_array_equal(a, b)
    third = make(MOVES)
    third.restore(tmp_path)
    for a, b in zip(state(third), state(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 0}, "end must be a whole number"),
        ({"end": 5, "every": 1.5}, "every must be a whole number"),
        ({"end": 5, "fraction": 1.1}, "fraction must be from 0 to 1"),
    ],
)
def test_moves_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicSparsity(**options)


def test_models_whose_places_cannot_move_are_refused():
    with pytest.raises(TypeError, match="DynamicSparsity"):
        make("rigl")
    with pytest.raises(ValueError, match="no SparseLinear or SparseConv"):
        make(MOVES, model=make_model())
    with pytest.raises(ValueError, match="without compute"):
        PriorityPropTrainer(
            make_model(), optax.sgd(0.1), loss, 0.5, sparsity=MOVES, compute=Compute()
        )


def test_pruning_ends_in_sparse_layers_that_go_on_where_it_stopped():
    sparsity = 0.75
    model = make_model()
    pruning = pruned_optimizer(optax.adam(1e-2), model, sparsity, begin=1, end=7)
    dense = make(model=model, tx=pruning)
    dense.train(loader(), epochs=2)
    sparse = make()
    continue_pruned(sparse, dense)
    for name, layer in sparse_layers(sparse.model).items():
        kernel = dense.model.layers[int(name.split("/")[1])].kernel[...]
        assert layer.nonzeros == round(kernel.size / 4) == np.count_nonzero(kernel)
        np.testing.assert_array_equal(layer.kernel(), kernel)
    batch = {"x": X, "y": Y}
    np.testing.assert_allclose(loss(sparse.model, batch), loss(dense.model, batch), rtol=1e-6)
    sparse.train(loader(), epochs=1)
    assert [record["step"] for record in sparse.history.steps] == [*range(1, 13)]
    assert sparse.get_priority_report().total == 12 * 6

    # The same without the change of layers, as masks keep what is pruned at zero.
    dense.train(loader(), epochs=1)
    for name, layer in sparse_layers(sparse.model).items():
        kernel = dense.model.layers[int(name.split("/")[1])].kernel[...]
        np.testing.assert_allclose(layer.kernel(), kernel, rtol=1e-4, atol=1e-6)


def test_a_table_of_layers():
    rows = layer_table(make().model)
    assert rows[1] == {"layer": "layers/2", "shape": [24, 24], "nonzeros": 144, "weights": 576}
    assert rows[2] == {"layer": "layers/4", "shape": [24, 1], "nonzeros": 24, "weights": 24}
