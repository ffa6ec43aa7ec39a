"""Places that move: dropping and growing against a sort in Python, and in a training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import Trainer, priorityprop
from priorityprop_jax.sparse.pattern import carry, densify_values, make_pattern, mask_of
from priorityprop_jax.sparse.step import cosine_fraction, drop_and_grow, dynamic
from priorityprop_jax.sparse.swap import sparse_layers, sparse_start
from priorityprop_jax.training.loader import ArrayLoader


def check(pattern):
    """Index arrays by row and by column go through the places of one mask."""
    again = make_pattern(mask_of(pattern), capacity=pattern.capacity)
    for found, expected in zip(*map(jax.tree.leaves, (pattern, again)), strict=True):
        assert found.dtype == expected.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def reference(values, mask, scores, fraction):
    """The new mask of single places; `values` by row as in the pattern."""
    mask, scores = mask.copy(), np.where(np.isnan(scores), -np.inf, scores)
    places = [(int(i), int(j)) for i, j in zip(*np.nonzero(mask), strict=True)]
    moved = round(fraction * len(places))
    size = {place: abs(float(v)) for place, v in zip(places, values, strict=False)}
    size = {place: np.inf if np.isnan(v) else v for place, v in size.items()}
    dropped = sorted(places, key=lambda place: -size[place])[len(places) - moved :]
    outside = sorted(
        (place for place in np.ndindex(mask.shape) if not mask[place]),
        key=lambda place: -scores[place],
    )
    back = sorted(sorted(dropped), key=lambda place: -scores[place])
    for place in dropped:
        mask[place] = False
    for place in (outside + back)[:moved]:
        mask[place] = True
    return mask


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_places_move_from_small_values_to_large_scores(density):
    rng = np.random.default_rng(int(10 * density))
    mask = rng.random((6, 7)) < density
    pattern = make_pattern(mask, capacity=45)
    values = np.full(45, np.nan, np.float32)
    used = int(mask.sum())
    values[:used] = rng.integers(-3, 4, used)  # many of one magnitude
    values[1:used:9] = np.nan
    scores = rng.integers(0, 4, (6, 7)).astype(np.float32)
    scores[rng.random((6, 7)) < 0.1] = np.nan
    for fraction in (0.0, 0.3, 1.0):
        changed, source = drop_and_grow(values, pattern, scores, fraction=fraction)
        check(changed)
        assert changed.capacity == 45 and int(changed.row_starts[-1]) == used
        expected = reference(values, mask, scores, fraction)
        np.testing.assert_array_equal(mask_of(changed), expected)
        before = np.zeros((6, 7), np.float32)
        before[mask] = values[:used]
        after = densify_values(carry(jnp.asarray(values), source), changed)
        np.testing.assert_array_equal(after, np.where(mask & expected, before, 0))


def test_bfloat16_is_taken():
    pattern = make_pattern(np.array([[1, 1, 0]]))
    values = jnp.array([1, 2], jnp.bfloat16)
    changed, _ = drop_and_grow(values, pattern, values[jnp.array([[0, 0, 1]])], fraction=0.5)
    assert mask_of(changed).tolist() == [[False, True, True]]


def test_the_schedule_is_the_papers():
    steps = np.arange(101)
    found = [cosine_fraction(int(step), 100, 0.3) for step in steps]
    np.testing.assert_allclose(found, 0.15 * (1 + np.cos(np.pi * steps / 100)), atol=1e-6)
    assert found[0] == 0.3 and found[-1] == 0


ROWS = 64
X = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
Y = np.sin(X[:, :1] + X[:, 1:2] * X[:, 2:3]).astype(np.float32)


def loader():
    return ArrayLoader({"x": X, "y": Y}, 16, shuffle=True, seed=0)


def make_model():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(8, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 24, rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers, nnx.Linear(24, 1, rngs=rngs))


def loss(model, batch):
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


def make(step=None, model=None, **options):
    if model is None:
        model = make_model()
        sparse_start(model, 0.75)
    tx = priorityprop(optax.adam(1e-2), None, 4, 4, 4)
    return Trainer(model, tx, loss, step, progress=False, **options)


MOVES = dynamic(12, every=3, fraction=0.4)


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
        compiled.append(trainer.step._plain.compiled._cache_size())
    # Steps 3, 6 and 9 move places, in the first, second and third epoch of 4 steps each.
    for before, after, moves in zip(seen, seen[1:], (True, True, True, False), strict=False):
        for name in start:
            assert after[name].sum() == start[name].sum()
            assert (before[name] != after[name]).any() == moves
    assert set(compiled) == {1}
    assert trainer.step.compile_seconds > trainer.step._plain.compile_seconds > 0
    losses = [record["loss"] for record in trainer.history.steps]
    assert losses[-1] < losses[0]
    # What the optimizer keeps has moved along: it is zero where a value is new.
    still = make()
    still.train(loader(), epochs=1)
    assert all((masks(still)[name] == start[name]).all() for name in start)


def test_new_places_have_the_largest_gradients_and_start_at_zero():
    trainer = make(dynamic(100, every=4, fraction=0.5))
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
    params, rest, moved = trainer.step._move(0.5, params, rest, trainer.optimizer_state, batch)
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
        dynamic(**options)


def test_what_cannot_move_places_is_refused():
    for model in (make_model(), {"kernel": np.ones((2, 2), np.float32)}):
        with pytest.raises(ValueError, match="no SparseLinear or SparseConv"):
            make(MOVES, model=model)
    with pytest.raises(ValueError, match="one process"):
        make(MOVES).step.check_processes()


def test_a_record_of_other_moves_is_refused(tmp_path):
    first = make(MOVES, checkpoint_dir=tmp_path)
    first.train(loader(), epochs=1)
    with pytest.raises(ValueError, match="give it the same options"):
        make(dynamic(13, every=3, fraction=0.4)).restore(tmp_path)


def test_a_shared_layer_moves_with_its_moments():
    """What `flax.nnx` keeps it under is its first name by the alphabet, not by the setting."""

    class Twice(nnx.Module):
        def __init__(self):
            self.second = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.first = self.second
            self.output = nnx.Linear(8, 1, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.output(jax.nn.relu(self.first(jax.nn.relu(self.second(x)))))

    model = Twice()
    sparse_start(model, 0.5)
    trainer = make(dynamic(100, every=2, fraction=0.5), model)
    before = model.first.mask()
    trainer.train(loader(), epochs=1)
    assert trainer.model.first is trainer.model.second
    check(trainer.model.first.pattern)
    assert (trainer.model.first.mask() != before).any()
