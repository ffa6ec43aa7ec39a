"""Trains in a process of its own, which `test_kills` ends at any moment: FOLDER STEP."""

from __future__ import annotations

import json
import os
import sys

import jax

from priorityprop_jax import partial
from priorityprop_jax.training import Trainer
from tests.training.test_trainer import Loader, _batches, _params, _pure_loss

STEPS = {"plain": None, "lisa": lambda: partial.step("lisa(1)", recalc_every=3)}


class Telling(Loader):
    """Says before each batch that it is still alive."""

    def __iter__(self):
        for batch in super().__iter__():
            print("alive", flush=True)
            yield batch


def train(folder, kind):
    """From the latest checkpoint if there is one: the trainer, after four epochs of eight steps."""
    import optax

    import priorityprop_jax as pp

    make = STEPS[kind]
    tx = optax.adam(0.03)
    if make is None:
        tx = pp.priorityprop(tx, 0.6, recalc_every=5, min_updates=0)
    trainer = Trainer(
        _params(), tx, _pure_loss, make and make(), progress=False, checkpoint_dir=folder,
        checkpoint_every=3,
    )  # fmt: skip
    old = folder if os.path.isdir(folder) and any(map(str.isdecimal, os.listdir(folder))) else None
    trainer.train(Telling(_batches()), 4, resume_from=old)
    return trainer


def told(trainer):
    """What must not depend on where a run was killed."""
    losses = [
        [record["step"], record["loss"], record["updates"]] for record in trainer.history.steps
    ]
    leaves = jax.tree.leaves((trainer.params, trainer.optimizer_state))
    ledger = trainer.get_priority_report()
    assert ledger.total == sum(trainer.history.updates)
    return {"losses": losses, "sum": [float(leaf.sum()) for leaf in leaves], "spent": ledger.total}


if __name__ == "__main__":
    print(json.dumps(told(train(*sys.argv[1:]))))
