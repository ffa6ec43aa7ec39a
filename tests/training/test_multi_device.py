"""Tests of trainers whose model and batches are on a mesh of eight devices."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import Trainer, meprop, partial, priorityprop, sparse
from priorityprop_jax.cli.tasks import MLP, cross_entropy
from priorityprop_jax.highway.scan import highway_nnx
from priorityprop_jax.priority.ledger import find_state
from priorityprop_jax.sparse.swap import sparse_layers
from tests.training import worker

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MESH = worker.make_mesh()


# A small model.
ROWS = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
CLASSES = (ROWS[:, 0] > 0).astype(np.int32) + 2 * (ROWS[:, 1] * ROWS[:, 2] > 0).astype(np.int32)
BATCHES = [{"x": ROWS[i : i + 16], "y": CLASSES[i : i + 16]} for i in range(0, 64, 16)]


class Deep(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.blocks = nnx.List(nnx.Linear(16, 16, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = highway_nnx(
            self.blocks, self.first(x), iterations=1, call=lambda block, x: x + nnx.tanh(block(x))
        )
        return self.head(x)


def train(mesh, model, optimizer=None, step=None):
    """Trains on a mesh, or on one device; the layout must stay what it was."""
    expected, _ = nnx.jit(cross_entropy)(model, BATCHES[0])
    batches = BATCHES
    if mesh is not None:
        worker.place(mesh, model)
        batches = [worker.spread(mesh, batch) for batch in BATCHES]
    # Left to itself the compiler would lay out Adam's moments, and then vectors, otherwise.
    optimizer = optimizer or optax.adam(0.03)
    trainer = Trainer(model, optimizer, cross_entropy, step, progress=False)
    before = worker.layouts((trainer.params, trainer.optimizer_state))
    trainer.train(batches, 2)
    assert worker.layouts((trainer.params, trainer.optimizer_state)) == before
    np.testing.assert_allclose(trainer.history.loss[0], expected, rtol=1e-5)
    assert np.mean(trainer.history.loss[-4:]) < np.mean(trainer.history.loss[:4])
    return trainer


def budgeted():
    return priorityprop(optax.adam(0.03), 0.5, recalc_every=3)


def test_a_budget_of_compute_chooses_as_on_one_device():
    step = partial.step(share=0.75, recalc_every=3)
    alone, together = (
        train(mesh, MLP((8, 16, 4), rngs=nnx.Rngs(0)), step=step) for mesh in (None, MESH)
    )
    for name in ("allocation", "update_counts"):
        a, b = (getattr(find_state(t.optimizer_state), name).tolist() for t in (alone, together))
        assert a == b
    assert alone.history.updates == together.history.updates
    np.testing.assert_allclose(alone.history.loss, together.history.loss, rtol=1e-4)
    reports = [trainer.get_step_report() for trainer in (alone, together)]
    sets = [[(v["active"], v["steps"]) for v in report["variants"]] for report in reports]
    assert sets[0] == sets[1] and len(sets[0]) > 1
    # One more to count FLOPs with, and none for a layout that has changed behind its back.
    assert reports[1]["programs"] <= reports[0]["programs"] + 1


def test_meprop():
    model = MLP((8, 16, 4), rngs=nnx.Rngs(0))
    meprop.meprop(model, (4, 8))
    trainer = train(MESH, model, step=meprop.step(share=0.4, recalc_every=3))
    assert trainer.get_step_report()["programs"] == 1
    assert trainer.get_step_report()["share"] < 1
    assert trainer.get_priority_report().unit == "features"


def test_sparse_layers_whose_places_move():
    model = MLP((8, 16, 4), rngs=nnx.Rngs(0))
    sparse.sparse_start(model, 0.5)
    before = [layer.mask() for layer in sparse_layers(model).values()]
    plain = []

    def step(setup):
        plain.append(setup.plain())
        return sparse.dynamic(end=8, every=3)(setup._replace(plain=lambda: plain[0]))

    trainer = train(MESH, model, budgeted(), step)
    after = [layer.mask() for layer in sparse_layers(trainer.model).values()]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    assert plain[0].compiled._cache_size() == 1


@pytest.mark.once
def test_highway():
    trainer = train(MESH, Deep(rngs=nnx.Rngs(0)), budgeted())
    assert trainer.step.compiled._cache_size() == 1
