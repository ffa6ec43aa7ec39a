"""One of several processes that train together, and what it has in common with the tests.

Run as ``worker.py ADDRESS PROCESSES PROCESS FOLDER MODE``; its last line of output is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.tasks.char import CharTransformer
from priorityprop_jax import PriorityPropTrainer
from priorityprop_jax.cli.tasks import cross_entropy
from priorityprop_jax.core.slots import by_layer
from priorityprop_jax.training import WorkerLostError

STEPS = 6  # in an epoch
ROWS = 8  # in a batch
OPTIONS = {"total_budget": 0.5, "min_updates": 0, "max_updates": 4, "recalc_every": 4}


def layouts(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def make_mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def place(mesh, model):
    """Splits matrices over ``model``; vectors stay whole, which a compiler by itself would change.

    What is no parameter stays on one device.
    """
    state = nnx.state(model, nnx.Param)
    axes = {2: PartitionSpec(None, "model")}
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, axes.get(x.ndim, PartitionSpec())), state
    )
    nnx.update(model, jax.device_put(state, shardings))
    return model


@nnx.jit  # sooner compiled as a whole than operation by operation
def make_model():
    return CharTransformer(16, context=8, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))


def make_optimizer():
    return optax.sgd(0.3, momentum=0.5)


def make_trainer(mesh=None, **options):
    model = make_model()
    if mesh is not None:
        place(mesh, model)
    # A slot a layer: the fewer slots, the sooner a step is compiled.
    group = by_layer(nnx.state(model, nnx.Param))
    return PriorityPropTrainer(
        model, make_optimizer(), cross_entropy, **OPTIONS, group=group, **options
    )


class Batches:
    """Text of a simple rule; on a mesh, a process makes its own rows alone."""

    def __init__(self, mesh=None, *, seed=0, kill_at=None):
        self.mesh, self.seed, self.kill_at = mesh, seed, kill_at
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return STEPS

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        for i in range(STEPS):
            if (self.epoch, i) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            start, step = rng.integers(0, 4, (2, ROWS, 1))
            text = (3 * start + (1 + step) * np.arange(9)) % 16  # [batch, time]
            batch = {"x": text[:, :-1].astype(np.int32), "y": text[:, 1:].astype(np.int32)}
            yield batch if self.mesh is None else spread(self.mesh, batch)


def spread(mesh, batch):
    """A batch over ``data``, each process giving its rows of it."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def mine(array):
        rows = len(array) // jax.process_count()
        return array[rows * jax.process_index() :][:rows]

    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, mine(array)), batch
    )


def summary(trainer):
    """What all processes must agree on, and in `shards` what is theirs of all arrays."""
    state = trainer.optimizer_state
    return {
        "allocation": state.allocation.tolist(),
        "update_counts": state.update_counts.tolist(),
        "loss": trainer.history.loss,
        "updates": trainer.history.updates,
        "evals": trainer.history.evals,
        "shards": [
            [i, [[cut.start, cut.stop] for cut in shard.index], np.asarray(shard.data).tolist()]
            for i, leaf in enumerate(jax.tree.leaves((trainer.params, state)))
            for shard in leaf.addressable_shards
        ],
    }


def complaint(call):
    """The first line of the ValueError that this must raise."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


def join(address, processes, process, **options):
    """Becomes one of several processes, which have eight devices in all."""
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A loaded machine may let one wait long for the other.
    times = {"heartbeat_timeout_seconds": 100, "shutdown_timeout_seconds": 200} | options
    jax.distributed.initialize(
        address, int(processes), int(process), initialization_timeout=200, **times
    )


def main(address, processes, process, folder, mode):
    join(address, processes, process)
    # A shell has its background processes ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr.isatty = lambda: True  # or no process would show its progress
    mesh = make_mesh()
    first, whole = os.path.join(folder, "first"), os.path.join(folder, "whole")
    if mode == "killed":
        trainer = make_trainer(mesh, checkpoint_dir=whole)
        trainer.train(Batches(mesh), 1)
        if process == "0":
            shutil.copytree(whole, first)
        trainer.train(Batches(mesh), 1, eval_data=Batches(mesh, seed=1))
        print(json.dumps(summary(trainer)), flush=True)
        try:
            trainer.train(Batches(mesh, kill_at=(2, 3) if process == "1" else None), 1)
        except WorkerLostError as error:
            print(f"WorkerLostError: {error}", file=sys.stderr, flush=True)
            # To leave in order is to wait for the others, and JAX aborts where they do not come.
            os._exit(3)
    if mode == "resumed":
        complaints = [complaint(make_trainer)]
        trainer = make_trainer(mesh)
        complaints.append(complaint(lambda: trainer.train(Batches())))
        trainer.train(Batches(mesh), 2, resume_from=first)
        resumed = summary(trainer)
        if process == "1":
            trainer.train(Interrupted(mesh), 1)
        else:
            trainer.train(Batches(mesh), 1)
        stopped = [trainer.history.interrupted, len(trainer.history.steps)]
        print(json.dumps(resumed | {"complaints": complaints, "stopped": stopped}), flush=True)


class Interrupted(Batches):
    """Sends this process SIGINT before the second batch."""

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if i == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


if __name__ == "__main__":
    main(*sys.argv[1:])
