"""Trains in processes of their own, which `test_kills` ends at any moment.

Run as ``killed.py FOLDER KINDS FAULT alone``, or ``mesh``, for one of eight devices, or as one of
two processes ``ADDRESS PROCESS``. One after the other of the kinds is trained, or continued from
its latest checkpoint. A line a batch says that all is well, the last one what became of them, in
JSON. A fault, if not ``none``, is raised by the loader, the logger (log) or
a host callback (host), in ``loader@1`` by that of process 1 alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys

import jax
import numpy as np
import optax
from flax import nnx

from priorityprop_jax import meprop, partial, priorityprop
from priorityprop_jax.cli.tasks import MLP, cross_entropy
from priorityprop_jax.partial.prefix_cache import PrefixCache
from priorityprop_jax.training import Trainer, WorkerLostError, processes
from priorityprop_jax.training.step import counts
from tests.training import worker

ROWS, SIZE, EPOCHS = 64, 8, 3
BATCHES = ROWS // SIZE * EPOCHS  # of a kind
X = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32) + 2 * (X[:, 1] * X[:, 2] > 0).astype(np.int32)


class Telling:
    """Rows shuffled by epoch; says before each batch that it is still alive, or raises."""

    def __init__(self, mesh, fault):
        self.mesh, self.fault, self.epoch = mesh, fault, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(ROWS).astype(np.int32)
        for i, ids in enumerate(order.reshape(-1, SIZE)):
            print("alive", flush=True)
            if (self.epoch, i) == FAULTY:
                fail(self.fault, "loader")
                FAILING[:] = [self.fault]
            batch = {"x": X[ids], "y": Y[ids], "id": ids}
            yield batch if self.mesh is None else worker.spread(self.mesh, batch)


FAULTY = (1, 5)  # epoch and batch
FAILING = []  # what fails from now on


def fail(fault, where):
    """Raises if this is a fault of the place, as in loader, and of this process, as in loader@1."""
    kind, _, process = fault.partition("@")
    if kind == where and process in ("", str(jax.process_index())):
        raise RuntimeError(f"the {where} is gone")


def loss_fn(model, batch):
    loss, metrics = cross_entropy(model, batch)
    jax.debug.callback(lambda loss: [fail(fault, "host") for fault in FAILING], loss)
    return loss, metrics


@nnx.jit  # sooner compiled as a whole than operation by operation
def make_model():
    return MLP((8, 16, 16, 16, 4), rngs=nnx.Rngs(0))


def make(kind, mesh, folder, fault="none", cache=None):
    """A trainer that saves more often than epochs end, and not with them."""
    model, optimizer, step = make_model(), optax.sgd(0.1, momentum=0.5), None
    if mesh is not None:
        worker.place(mesh, model)
    if kind == "plain":
        optimizer = priorityprop(optimizer, 0.6, recalc_every=5, min_updates=0)
    elif kind == "meprop":
        meprop.meprop(model, (2, 4, 8))
        step = meprop.step(0.5, recalc_every=5)
    else:
        layers = [(f"layer_{i}", layer) for i, layer in enumerate(model.layers)]
        between = [(f"relu_{i}", nnx.relu) for i in range(3)]
        parts = [*sum(zip(layers, between, strict=False), ()), layers[-1]]
        policy, share = "suffix(1)" if cache else kind, 0.6 if kind == "priority" else None
        model = partial.nnx_stages(parts)
        step = partial.step(policy, share=share, cache=cache, recalc_every=3)
    return Trainer(
        model, optimizer, loss_fn if "host" in fault else cross_entropy, step, progress=False,
        checkpoint_dir=folder, checkpoint_every=3,
    )  # fmt: skip


def train(folder, kind, mesh, fault="none"):
    """From the latest checkpoint if there is one: what must not depend on where it was killed."""
    with contextlib.ExitStack() as stack:
        cache = None
        if kind == "cached":
            cache = PrefixCache(os.path.join(folder, "outputs"), examples=ROWS, dtype="float32")
            stack.enter_context(cache)
        folder = os.path.join(folder, kind)
        trainer = make(kind, mesh, folder, fault, cache)
        saved = os.path.isdir(folder) and any(map(str.isdecimal, os.listdir(folder)))
        FAILING.clear()
        log = lambda record: [fail(fault, "log") for fault in FAILING]  # noqa: E731
        loader, old = Telling(mesh, fault), folder if saved else None
        try:
            trainer.train(loader, EPOCHS, resume_from=old, log=log)
        except RuntimeError as error:
            if not isinstance(error, WorkerLostError):
                add_up(trainer)
            raise
    return told(trainer)


def add_up(trainer):
    """The books are of the same steps. Nothing is computed for it."""
    history, ledger = trainer.history, trainer.get_priority_report()
    steps = len(history.steps)
    assert [record["step"] for record in history.steps] == list(range(1, steps + 1))
    assert ledger.total == sum(history.updates) == sum(ledger.history[-1])
    assert ledger.steps[-1] == steps
    print("adds up at", steps, flush=True)


def told(trainer):
    """Losses, updates and arrays, bit for bit."""
    add_up(trainer)
    history, state = trainer.history, counts(trainer.optimizer_state)
    assert trainer.get_priority_report().history[-1] == np.asarray(state).tolist()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((trainer.params, trainer.optimizer_state)):
        for shard in leaf.addressable_shards:
            digest.update(np.asarray(shard.data).tobytes())
    return [history.loss, history.updates, digest.hexdigest()]


def all_of(folder, kinds, fault="none", where="alone"):
    mesh = None if where == "alone" else worker.make_mesh()
    return [train(folder, kind, mesh, fault) for kind in kinds]


def main(folder, kinds, fault, where, process=None):
    if process is not None:
        worker.join(where, 2, process, heartbeat_timeout_seconds=10)
        processes._GRACE = 3.0
    try:
        print(json.dumps(all_of(folder, kinds.split(","), fault, where)), flush=True)
    except WorkerLostError as error:
        print(f"WorkerLostError: {error}", file=sys.stderr, flush=True)
        os._exit(3)  # to leave in order is to wait for the others


if __name__ == "__main__":
    main(*sys.argv[1:])
