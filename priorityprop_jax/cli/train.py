"""The command `priorityprop train`: optimizers on the clock, or digits plainly and by a method."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from priorityprop_jax.cli import runs
from priorityprop_jax.cli.runs import COMMON, Failure, Report, amount, fraction, table, told, whole

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task
    from priorityprop_jax.training.trainer import Trainer

TEXT = (
    "Trains a small network plainly and by a method on a budget. By itself it compares Adam, NAdam "
    "and Muon on a budget over several seeds, with a small transformer on characters of short "
    "messages that come along; the other methods train a multilayer perceptron on scikit-learn's "
    "digits. At the end it tells what was spent on what."
)
Config = argparse.Namespace


# Each of these changes the task's model where the method asks for it, and makes the trainer.


def _priorityprop(config: Config, task: Task, optimizer: Any) -> Trainer:
    from priorityprop_jax.training import PriorityPropTrainer

    budget = {name: getattr(config, name) for name in ("min_updates", "max_updates")}
    budget = {name: value for name, value in budget.items() if value is not None}
    budget |= {"total_budget": config.budget, "recalc_every": config.recalc_every or 10}
    return PriorityPropTrainer(task.model, optimizer, task.loss_fn, **budget)


def _meprop(config: Config, task: Task, optimizer: Any) -> Trainer:
    from priorityprop_jax.meprop import meprop, step
    from priorityprop_jax.training.trainer import Trainer

    k, share = config.k, config.budget
    if (k is None) == (share is None) or isinstance(share, int):
        raise ValueError(
            "meprop needs either --k, such as --k 20, or a fraction as --budget, such as "
            "--budget 0.05, that decides the k of each layer"
        )
    if k is None:  # from a quarter of what an even share would be to four times that
        k = tuple(sorted({min(1.0, share * factor) for factor in (0.25, 0.5, 0.75, 1, 1.5, 2, 4)}))
    meprop(task.model, k)
    made = step(share, recalc_every=config.recalc_every or 10)
    return Trainer(task.model, optimizer, task.loss_fn, made)


def _sparse(config: Config, task: Task, optimizer: Any) -> Trainer:
    from priorityprop_jax.sparse.swap import sparse_start
    from priorityprop_jax.training.trainer import Trainer

    if config.sparsity is None or config.sparsity == 1:
        raise ValueError("sparse needs a --sparsity above 0 and below 1, such as 0.95")
    sparse_start(task.model, config.sparsity, seed=config.seed)
    step = None
    if config.sparse_method == "rigl":
        from priorityprop_jax.sparse import dynamic

        steps = task.epochs * len(task.train_data)
        step = dynamic(max(1, steps * 3 // 4), every=min(100, max(1, steps // 20)))
    return Trainer(task.model, optimizer, task.loss_fn, step)


# By name: what makes the trainer, the options that not all have, and what to call it in a title.
METHODS: dict[str, tuple[Callable[..., Trainer] | None, tuple[str, ...], str]] = {
    "muon": (None, ("budget", "seeds"), ""),  # cli/compare.py
    "priorityprop": (
        _priorityprop, ("budget", "min_updates", "max_updates", "optimizer", "recalc_every"),
        "by priority, at the same budget of updates",
    ),
    "meprop": (
        _meprop, ("budget", "k", "optimizer", "recalc_every"), "by meProp, for as many steps"
    ),
    "sparse": (
        _sparse, ("sparsity", "sparse_method", "optimizer"),
        "with sparse weights, for as many steps",
    ),
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "method": {
        "choices": tuple(METHODS),
        "default": "muon",
        "help": "to compare with plain training",
    },
    "budget": {
        "type": amount,
        "help": "for muon: the share of the matrices a step (default: 0.25); for priorityprop: "
        "updates a cycle, a whole number or a fraction of the full "
        "budget such as 0.5 (default: all of it); for meprop: a fraction of the features, such as "
        "0.1, that decides the k of each layer",
    },
    "seeds": {"type": whole(1), "help": "for muon: how many, from --seed on (default: 5)"},
    "min_updates": {"type": whole(0), "help": "for priorityprop: least of a cycle (default: 1)"},
    "max_updates": {"type": whole(1), "help": "for priorityprop: most of a cycle (default: 20)"},
    "k": {
        "type": amount,
        "help": "for meprop: output features that the gradient flows through, a whole number or a "
        "fraction such as 0.04",
    },
    "sparsity": {
        "type": fraction,
        "help": "for sparse: share of the weights to leave out, such as 0.95, but for the output "
        "layer",
    },
    "sparse_method": {
        "choices": ("static", "rigl"),
        "help": "for sparse: places stay, or move while training (default: static)",
    },
    "recalc_every": {"type": whole(1), "help": "steps in a cycle (default: 10)"},
    "optimizer": {
        "choices": ("adam", "adamw", "lion", "rmsprop", "sgd"),
        "help": "of both, on digits (default: adam)",
    },
    **COMMON,
}


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    config = runs.options_of(arguments, OPTIONS, "train")
    make, _, _ = METHODS[config.method]
    for option in sorted({name for _, options, _ in METHODS.values() for name in options}):
        owners = [name for name, (_, options, _) in METHODS.items() if option in options]
        if getattr(config, option) is not None and config.method not in owners:
            wrong = f"--{option.replace('_', '-')} is of {' and '.join(owners)}"
            raise Failure(f"{wrong}: add --method {owners[0]}", 2)
    if make is None:
        from priorityprop_jax.cli import compare

        compare.run(arguments, config)
        return 0

    import optax

    from priorityprop_jax.cli.tasks import digits
    from priorityprop_jax.sparse.measure import layer_table
    from priorityprop_jax.training.trainer import Trainer

    # Everything that can be wrong with the options shows here, before a run's folder is made
    with told(ValueError, TypeError, code=2):
        # Twice, as a model is trained in place
        task, other = (digits(seed=config.seed).adjusted(config) for _ in range(2))
        plainly = config.optimizer or "adam"
        optimizer = getattr(optax, plainly)(task.learning_rate)
        ours = make(config, task, optimizer)
        if config.method == "priorityprop":
            share = 1.0 if config.budget is None else config.budget
            if isinstance(share, int):
                share /= len(ours.step.slots) * (config.recalc_every or 10)
            # An update of every slot at every step: fewer steps come to as many updates.
            steps = max(1, round(min(1.0, share) * len(task.train_data)))
            other = dataclasses.replace(other, max_batches=steps)
        plain = Trainer(other.model, optimizer, other.loss_fn)

    print(f"digits: {config.method}, {task.epochs} epochs")
    arms = {plainly: (plain, other.data), config.method: (ours, task.data)}
    with runs.running(arguments, "train", f"digits-{config.method}", config) as directory:
        results = {n: runs.train_arm(directory, n, *arm, task.epochs) for n, arm in arms.items()}
        ledger = None if config.method == "sparse" else ours.get_priority_report()
        record = {
            "command": "train",
            "config": vars(config),
            "results": results,
            "ledger": None if ledger is None else ledger.as_dict(),
            "layers": layer_table(ours.model) if ledger is None else None,
        }
        # With one k for all layers there is nothing to decide, and nothing to see.
        if ledger is not None and config.k is None:
            runs.write(directory / "priorities.png", ledger.plot)
        histories = {name: trainer.history for name, (trainer, _) in arms.items()}
        made = report(record)
        runs.save(directory, record, made, runs.losses(made.title, histories))
    return 0


# The report.

_COLUMNS = {
    "validation": "{validation:.2%}", "best": "{best_validation:.2%}", "test": "{test:.2%}",
    "val. loss": "{validation_loss:.4f}", "steps": "{steps:,}", "updates": "{updates:,}",
    "train s": "{seconds:.1f}", "ms a step": "{ms:.2f}", "compile s": "{compile_seconds:.1f}",
}  # fmt: skip


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    if record["config"]["method"] == "muon":
        from priorityprop_jax.cli import compare

        return compare.report(record)
    from priorityprop_jax.priority.ledger import Ledger

    config, columns = record["config"], dict(_COLUMNS)
    if config["method"] == "meprop":
        del columns["updates"]  # it counts features
    rows = [("", *columns)]
    for name, found in record["results"].items():
        found = found | {"ms": 1e3 * found["seconds"] / found["steps"]}
        rows.append((name, *(form.format(**found) for form in columns.values())))
    if record["ledger"] is None:
        layers = [("layer", "shape", "non-zeros", "left out")]
        for layer in record["layers"]:
            shape = "x".join(map(str, layer["shape"]))
            left_out = f"{1 - layer['nonzeros'] / layer['weights']:.1%}"
            layers.append((layer["layer"], shape, f"{layer['nonzeros']:,}", left_out))
        where = table("where the non-zeros are", layers)
    else:
        ledger = Ledger.from_dict(record["ledger"])
        where = "where the budget went", str(ledger), ledger.to_markdown()
    title = f"digits: plain {config['optimizer'] or 'adam'}, and {METHODS[config['method']][2]}"
    return Report(f"{title}, one seed ({config['seed']})", [table("", rows), where])
