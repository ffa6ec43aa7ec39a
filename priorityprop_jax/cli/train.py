"""The command `priorityprop train`: digits, trained plainly and by a method on the same budget."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from priorityprop_jax.cli.runs import (
    COMMON,
    Failure,
    Report,
    Section,
    amount,
    draw,
    draw_losses,
    fraction,
    new_directory,
    open_run,
    result,
    resumable,
    save,
    table,
    train_arm,
    whole,
)

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task
    from priorityprop_jax.training.trainer import Trainer

HELP = "train a small network on digits, plainly and by a method on a budget"
DESCRIPTION = (
    "Trains a multilayer perceptron on scikit-learn's digits twice, with the plain optimizer and "
    "by a method of this library on the same budget, and tells what was spent on what."
)
Config = argparse.Namespace


# Each of these changes the task's model where the method asks for it, and makes the trainer.


def _priorityprop(config: Config, task: Task, optimizer: Any) -> Trainer:
    from priorityprop_jax.training import PriorityPropTrainer

    least = 1 if config.min_updates is None else config.min_updates
    most = 20 if config.max_updates is None else config.max_updates
    return PriorityPropTrainer(
        task.model, optimizer, task.loss_fn, config.budget, least, most, config.recalc_every
    )


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
    made = step(share, recalc_every=config.recalc_every)
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


class Method(NamedTuple):
    """A way to train.

    Attributes:
      make: makes the trainer of a run.
      options: those that not every method has.
      text: what is compared, for the title of the report.
    """

    make: Callable[[Config, Task, Any], Trainer]
    options: tuple[str, ...]
    text: str


METHODS = {
    "priorityprop": Method(
        _priorityprop, ("budget", "min_updates", "max_updates"),
        "by priority, at the same budget of updates",
    ),
    "meprop": Method(_meprop, ("budget", "k"), "by meProp, for as many steps"),
    "sparse": Method(
        _sparse, ("sparsity", "sparse_method"), "with sparse weights, for as many steps"
    ),
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "method": {"choices": tuple(METHODS), "default": "priorityprop", "help": "to compare with"},
    "budget": {
        "type": amount,
        "help": "for priorityprop: updates a cycle, a whole number or a fraction of the full "
        "budget such as 0.5 (default: all of it); for meprop: a fraction of the features, such as "
        "0.1, that decides the k of each layer",
    },
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
    "recalc_every": {"type": whole(1), "default": 10, "help": "steps in a cycle"},
    "optimizer": {
        "choices": ("adam", "adamw", "lion", "rmsprop", "sgd"),
        "default": "adam",
        "help": "of both",
    },
    **COMMON,
}


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    config, directory = open_run(arguments, OPTIONS, "train")
    method = METHODS[config.method]
    for option in sorted({name for other in METHODS.values() for name in other.options}):
        owners = [name for name, other in METHODS.items() if option in other.options]
        if getattr(config, option) is not None and config.method not in owners:
            wrong = f"--{option.replace('_', '-')} is of {' and '.join(owners)}"
            raise Failure(f"{wrong}: add --method {owners[0]}", 2)

    from priorityprop_jax.sparse.measure import layer_table
    from priorityprop_jax.training.trainer import Trainer

    # Everything that can be wrong with the options shows here, before a run's folder is made
    try:
        task = _task(config)
        ours = method.make(config, task, _optimizer(config, task))
        if config.method == "priorityprop":
            share = _share(config, len(ours.step.slots))
            # An update of every slot at every step: fewer steps come to as many updates.
            steps = max(1, round(min(1.0, share) * len(task.train_data)))
            other = dataclasses.replace(_task(config), max_batches=steps)
        else:
            other = _task(config)
        plain = Trainer(other.model, _optimizer(config, other), other.loss_fn)
    except (ValueError, TypeError) as error:
        raise Failure(str(error), 2) from error
    if directory is None:
        directory = new_directory(arguments.out, f"digits-{config.method}", "train", config)

    print(f"digits: {config.method}, {task.epochs} epochs\nwriting to {directory}/")
    arms = {config.optimizer: (plain, other), config.method: (ours, task)}
    with resumable(directory):
        for name, (trainer, own) in arms.items():
            train_arm(directory, name, trainer, own, task.epochs)
        results = {name: result(*arm) for name, arm in arms.items()}
    ledger = None if config.method == "sparse" else ours.get_priority_report()
    record = {
        "command": "train",
        "config": vars(config),
        "results": results,
        "ledger": None if ledger is None else ledger.as_dict(),
        "layers": layer_table(ours.model) if ledger is None else None,
    }
    names = {
        config.optimizer: f"{config.optimizer} (plain)",
        config.method: f"{config.method} ({config.optimizer})",
    }
    histories = {names[name]: trainer.history for name, (trainer, _) in arms.items()}
    draw_losses(directory / "losses.png", f"digits, one seed ({config.seed})", histories)
    # With one k for all layers there is nothing to decide, and nothing to see.
    if ledger is not None and config.k is None:
        draw(directory / "priorities.png", ledger.plot)
    save(directory, record, report(record))
    return 0


def _task(config: Config) -> Task:
    """The digits, anew each time: a model is trained in place."""
    from priorityprop_jax.cli.tasks import digits

    task = digits(seed=config.seed)
    given = {name: getattr(config, name) for name in ("learning_rate", "batch_size", "epochs")}
    return dataclasses.replace(task, **{k: v for k, v in given.items() if v is not None})


def _optimizer(config: Config, task: Task) -> Any:
    import optax

    return getattr(optax, config.optimizer)(task.learning_rate)


def _share(config: Config, slots: int) -> float:
    """Of the full budget, an update of every slot at every step."""
    if isinstance(config.budget, int):
        return config.budget / (slots * config.recalc_every)
    return 1.0 if config.budget is None else config.budget


# The report.


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    from priorityprop_jax.priority.ledger import Ledger

    config = record["config"]
    header = ("", "validation", "best", "test", "val. loss", "steps", "updates")
    rows: list[tuple[str, ...]] = [(*header, "train s", "ms a step", "compile s")]
    for name, found in record["results"].items():
        rows.append(
            (
                name,
                *(f"{found[key]:.2%}" for key in ("validation", "best_validation", "test")),
                f"{found['validation_loss']:.4f}",
                f"{found['steps']:,}",
                f"{found['updates']:,}",
                f"{found['seconds']:.1f}",
                f"{1e3 * found['seconds'] / found['steps']:.2f}",
                f"{found['compile_seconds']:.1f}",
            )
        )
    if record["ledger"] is None:
        layers = [("layer", "shape", "non-zeros", "left out")]
        for layer in record["layers"]:
            shape = "x".join(map(str, layer["shape"]))
            left_out = f"{1 - layer['nonzeros'] / layer['weights']:.1%}"
            layers.append((layer["layer"], shape, f"{layer['nonzeros']:,}", left_out))
        where = table("where the non-zeros are", layers)
    else:
        ledger = Ledger.from_dict(record["ledger"])
        where = Section("where the budget went", str(ledger), ledger.to_markdown())
    title = (
        f"digits: plain {config['optimizer']}, and {METHODS[config['method']].text}; accuracy of "
        f"one seed ({config['seed']})"
    )
    return Report(title, [table("", rows), where])
