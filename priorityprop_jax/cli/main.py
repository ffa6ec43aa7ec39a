"""The command `priorityprop`: train on a budget, and show the ledger.

`train` trains a task twice, at the same budget of updates or for as many steps; `finetune` is in
a module of its own, `bench` in a checkout's `benchmarks/suite`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorityprop_jax.cli import finetune
from priorityprop_jax.cli.runs import (
    Failure,
    Metrics,
    command_of,
    has_checkpoint,
    new_directory,
    rate,
    read_config,
    result,
    whole,
    write,
)
from priorityprop_jax.core.tables import aligned, markdown

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task
    from priorityprop_jax.priority.ledger import Ledger
    from priorityprop_jax.training.trainer import History, PriorityPropTrainer

TASKS = ("digits", "mnist-mlp", "char-lm", "sst2", "pos-tag")
CHAR_MODELS = ("transformer", "gru", "lstm")
BACKWARDS = ("dense", "meprop", "highway")
SPARSE_METHODS = ("static", "gmp", "rigl")
OURS = ("priorityprop", "meprop", "highway", "sparse")  # the arms compared with a plain one
OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "rmsprop", "sgd")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit code: 0; 1 where something failed; 2 for wrong arguments; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["bench"]:
            return _bench(argv[1:])
        # argparse exits by itself, with 2, where an argument is wrong
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except Failure as failure:
        return _fail(str(failure), failure.code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except FloatingPointError as error:
        return _fail(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")
    except ImportError as error:
        name = f"{error.name} is not installed: " if error.name else ""
        return _fail(f'{name}pip install "priorityprop-jax[demo]" ({error})')


def _fail(message: str, code: int = 1) -> int:
    print(f"priorityprop: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="priorityprop", description="Spend backprop where it matters: budgeted training."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a task, plainly and by priority (or by meProp, or sparse)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=_train)
    train.add_argument("--task", choices=TASKS, default="digits")
    train.add_argument(
        "--data-dir",
        type=Path,
        help="folder with the data files (default: $PRIORITYPROP_DATA, the cache, a download)",
    )
    train.add_argument(
        "--budget",
        type=_budget,
        default="full",
        help="updates a cycle: a whole number, a fraction of the full budget such as 0.5, or full",
    )
    train.add_argument(
        "--backward",
        choices=BACKWARDS,
        default="dense",
        help="meprop and highway compare their backward pass with the plain one, over the same "
        "steps",
    )
    train.add_argument(
        "--model",
        choices=CHAR_MODELS,
        help="for char-lm: what predicts the next character (default: transformer)",
    )
    train.add_argument(
        "--iterations",
        type=whole(0),
        help="for highway: rounds of its backward pass; without it recurrent layers get the exact "
        "one, which is leaner than the plain one",
    )
    train.add_argument(
        "--k",
        type=_k,
        help="for meprop: output features that the gradient flows through, a whole number or a "
        "fraction such as 0.04; without it, a fraction as --budget decides the k of each layer",
    )
    train.add_argument(
        "--sparsity",
        type=_sparsity,
        help="compares sparse weights with dense ones, over the same steps: the share of each "
        "layer's weights to leave out, such as 0.95, but for the output layer",
    )
    train.add_argument(
        "--sparse-method",
        choices=SPARSE_METHODS,
        help="where sparse weights come from: static (places drawn at random, or those that "
        "--prune leaves), gmp (gradual magnitude pruning, dense for the first 60%% of the epochs) "
        "or rigl (places move while training); with --sparsity alone it is static",
    )
    train.add_argument(
        "--prune",
        type=Path,
        metavar="RUN",
        help="fine-tune what another run of the task has trained: both arms start from the "
        "weights of its plain arm, and the smallest of them are left out",
    )
    train.add_argument("--min-updates", type=whole(0), default=1, help="least updates a cycle")
    train.add_argument("--max-updates", type=whole(1), default=20, help="most updates a cycle")
    train.add_argument("--recalc-every", type=whole(1), default=10, help="steps in a cycle")
    train.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    train.add_argument("--learning-rate", type=rate, help="default: the task's")
    train.add_argument("--epochs", type=whole(1), help="default: the task's")
    train.add_argument("--seed", type=whole(0), default=0)
    train.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with an interrupted run, with its own options; all others are ignored",
    )

    finetune.add_command(commands)

    commands.add_parser("bench", help="run and report the benchmark suites", add_help=False)

    report = commands.add_parser("report", help="print a finished run again")
    report.set_defaults(run=_report)
    report.add_argument("directory", metavar="RUN", type=Path, help="a folder of a run")
    return parser


def _bench(argv: Sequence[str]) -> int:
    """Hands over to the suite, which stands beside the package in a checkout alone."""
    import priorityprop_jax

    for root in (Path(priorityprop_jax.__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "suite" / "command.py").is_file():
            sys.path.insert(0, str(root))
            break
    else:
        raise Failure(
            "the benchmarks are not part of an installed package: clone the repository, and run "
            "this from its root"
        )
    from benchmarks.suite import command  # pyright: ignore[reportMissingImports]

    return command.main(argv)


def _budget(text: str) -> int | float | str:
    if text == "full":
        return text
    try:
        return int(text) if text.isdecimal() else rate(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither a number of updates, nor a fraction such as 0.5, nor "full"'
        ) from None


def _k(text: str) -> int | float:
    try:
        k = int(text) if text.isdecimal() else rate(text)
    except argparse.ArgumentTypeError:
        k = math.inf
    if k == 0 or (isinstance(k, float) and k > 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number from 1 on nor a fraction such as 0.04"
        )
    return k


def _sparsity(text: str) -> float:
    try:
        value = rate(text)
    except argparse.ArgumentTypeError:
        value = 1.0
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction above 0 and below 1")
    return value


@dataclasses.dataclass(frozen=True)
class _Config:
    """What a run was asked for: the contents of its config.json."""

    task: str
    data_dir: str | None
    budget: int | float | str
    min_updates: int
    max_updates: int
    recalc_every: int
    optimizer: str
    learning_rate: float | None
    epochs: int | None
    seed: int
    backward: str = "dense"
    k: int | float | None = None
    sparsity: float | None = None
    sparse_method: str | None = None
    prune: str | None = None
    model: str | None = None
    iterations: int | None = None

    @property
    def ours(self) -> str:
        """The arm that is compared with the plain one."""
        if self.sparsity is not None:
            return "sparse"
        return "priorityprop" if self.backward == "dense" else self.backward


def _train(arguments: argparse.Namespace) -> int:
    if arguments.resume is None:
        config = _Config(
            **{
                field.name: getattr(arguments, field.name)
                for field in dataclasses.fields(_Config)
                if field.name not in ("data_dir", "prune")
            },
            data_dir=None if arguments.data_dir is None else str(arguments.data_dir.absolute()),
            prune=None if arguments.prune is None else str(arguments.prune.absolute()),
        )
        directory = None
    else:
        directory = arguments.resume
        config = read_config(_Config, directory, "train")
        if (directory / "report.json").exists():
            raise Failure(f"{directory} is finished: priorityprop report {directory}")

    if config.k is not None and config.backward != "meprop":
        raise Failure("--k is of meProp: add --backward meprop", 2)
    if config.iterations is not None and config.backward != "highway":
        raise Failure("--iterations is of highway: add --backward highway", 2)
    if config.backward == "highway" and config.budget != "full":
        raise Failure("--backward highway goes without --budget", 2)
    if config.model is not None and config.task != "char-lm":
        raise Failure("--model is of char-lm: add --task char-lm", 2)
    if config.sparsity is None and (config.sparse_method or config.prune):
        raise Failure("--sparse-method and --prune need a --sparsity, such as 0.95", 2)
    if config.sparsity is not None and (config.backward != "dense" or config.budget != "full"):
        raise Failure("--sparsity goes with neither --budget nor --backward", 2)

    # Imported here, so that --help and wrong arguments answer at once
    from priorityprop_jax.cli.tasks import load_task

    def load() -> Task:
        try:
            task = load_task(
                config.task, data_dir=config.data_dir, seed=config.seed, model=config.model
            )
        except ValueError as error:
            raise Failure(str(error)) from error
        if config.prune is not None:
            _start_from(Path(config.prune), task)
        return task

    # Everything that can be wrong with the options shows here, before a run's folder is made
    arms = {config.optimizer: _trainer(config, load(), plain=True)}
    arms[config.ours] = _trainer(config, load(), plain=False)
    task = load()
    pruning = _pruning_trainer(config, load()) if config.sparse_method == "gmp" else None

    if directory is None:
        directory = new_directory(f"{config.task}-{config.optimizer}")
        write(directory / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return _run(directory, config, task, arms, pruning)


def _optimizer(config: _Config, task: Task) -> Any:
    import optax

    rate = task.learning_rate if config.learning_rate is None else config.learning_rate
    optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate),
        "lion": lambda: optax.lion(rate),
        "momentum": lambda: optax.sgd(rate, momentum=0.9),
        "rmsprop": lambda: optax.rmsprop(rate),
        "sgd": lambda: optax.sgd(rate),
    }
    return optimizers[config.optimizer]()


def _trainer(config: _Config, task: Task, *, plain: bool) -> PriorityPropTrainer:
    from priorityprop_jax.training.trainer import PriorityPropTrainer

    cycle = config.recalc_every
    budget = None if isinstance(config.budget, str) else config.budget
    full = plain or config.backward == "highway"
    numbers = (None, cycle, cycle) if full else (budget, config.min_updates, config.max_updates)
    try:
        optimizer = _optimizer(config, task)
        if config.backward == "meprop" and not plain:
            return _meprop_trainer(config, task, optimizer, budget)
        if config.backward == "highway" and not plain:
            _use_highway(task.model, config.iterations)
        if config.sparsity is not None and not plain:
            return _sparse_trainer(config, task, optimizer)
        return PriorityPropTrainer(task.model, optimizer, task.loss_fn, *numbers, cycle)
    except (ValueError, TypeError) as error:
        raise Failure(str(error), 2) from error


def _meprop_trainer(config: _Config, task: Task, optimizer: Any, budget: Any) -> Any:
    from priorityprop_jax.meprop.inject import meprop
    from priorityprop_jax.meprop.step import TopKCompute
    from priorityprop_jax.training.trainer import PriorityPropTrainer

    k = config.k
    if k is None and isinstance(budget, float):
        # From a quarter of what an even share would be to four times that
        factors = (0.25, 0.5, 0.75, 1, 1.5, 2, 4)
        meprop(task.model, tuple(sorted({min(1.0, budget * factor) for factor in factors})))
    elif k is not None and budget is None:
        meprop(task.model, k)
    else:
        raise ValueError(
            "meprop needs either --k, such as --k 20, or a fraction as --budget, such as "
            "--budget 0.05, that decides the k of each layer"
        )
    return PriorityPropTrainer(
        task.model, optimizer, task.loss_fn, budget, recalc_every=config.recalc_every,
        compute=TopKCompute(),
    )  # fmt: skip


def _use_highway(model: Any, iterations: int | None) -> None:
    """Puts Highway's backward pass, or the exact lean one, into a model."""
    from priorityprop_jax.cli.tasks import CharTransformer
    from priorityprop_jax.rnn.lean import lean_rnn

    if isinstance(model, CharTransformer):
        if iterations is None:
            raise ValueError("highway needs --iterations for a transformer, such as --iterations 2")
        model.iterations = iterations
    else:
        lean_rnn(model, iterations=iterations)


def _cosine(model: Any, task: Task) -> float:
    """Of the gradient on a batch, after training, to the exact one."""
    import jax
    from flax import nnx

    from priorityprop_jax.cli.tasks import CharTransformer
    from priorityprop_jax.highway.quality import gradient_quality
    from priorityprop_jax.meprop.inject import restore

    model = nnx.clone(model)  # the trainer's goes on as it is
    batch = next(iter(task.train_data))

    def gradient() -> Any:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda params: task.loss_fn(nnx.merge(graph, params, rest), batch)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    ours = gradient()
    if isinstance(model, CharTransformer):
        model.iterations = None
    else:
        restore(model)
    exact = gradient()
    return gradient_quality(exact, ours)[-1].cosine


def _sparse_trainer(config: _Config, task: Task, optimizer: Any) -> PriorityPropTrainer:
    """Of sparse layers; for gmp their places are to be changed when pruning has chosen them."""
    from priorityprop_jax.sparse.swap import sparse_start
    from priorityprop_jax.sparse.training import DynamicSparsity
    from priorityprop_jax.training.trainer import PriorityPropTrainer

    assert config.sparsity is not None
    places = "random" if config.prune is None else "largest"
    sparse_start(task.model, config.sparsity, places=places, seed=config.seed)
    moves = None
    if config.sparse_method == "rigl":
        steps = _epochs(config, task) * len(task.train_data)
        moves = DynamicSparsity(end=max(1, steps * 3 // 4), every=min(100, max(1, steps // 20)))
    cycle = config.recalc_every
    return PriorityPropTrainer(
        task.model, optimizer, task.loss_fn, None, cycle, cycle, cycle, sparsity=moves
    )


def _pruning_trainer(config: _Config, task: Task) -> PriorityPropTrainer:
    """Of the dense model, pruned from a tenth of the run on until its part of the epochs ends."""
    from priorityprop_jax.sparse.training import pruned_optimizer
    from priorityprop_jax.training.trainer import PriorityPropTrainer

    assert config.sparsity is not None
    epochs = _epochs(config, task)
    if epochs < 2:
        raise Failure("gmp prunes in the first 60% of the epochs: give it at least --epochs 2", 2)
    # The last step of a whole epoch, where the layers are changed
    end = _pruning_epochs(epochs) * len(task.train_data) - 1
    optimizer = pruned_optimizer(
        _optimizer(config, task), task.model, config.sparsity,
        begin=min(end, epochs * len(task.train_data) // 10), end=end,
    )  # fmt: skip
    cycle = config.recalc_every
    return PriorityPropTrainer(task.model, optimizer, task.loss_fn, None, cycle, cycle, cycle)


def _epochs(config: _Config, task: Task) -> int:
    return task.epochs if config.epochs is None else config.epochs


def _pruning_epochs(epochs: int) -> int:
    return max(1, epochs * 6 // 10)


def _start_from(directory: Path, task: Task) -> None:
    """Gives a task's model the weights that the plain arm of a run has trained."""
    theirs = read_config(_Config, directory, "train")
    if theirs.task != task.name:
        raise Failure(f"{directory} is a run of {theirs.task}, and not of {task.name}")
    if not (directory / "report.json").exists():
        raise Failure(f"{directory} is not finished: priorityprop train --resume {directory}")
    trainer = _trainer(theirs, task, plain=True)
    try:
        trainer.restore(directory / "checkpoint" / theirs.optimizer)
    except (ValueError, FileNotFoundError) as error:
        raise Failure(str(error)) from error


class _Limited:
    """The batches of a loader, but only so many over all epochs.

    The plain optimizer spends an update on every slot at every step, so at a smaller budget it is
    given fewer steps: its arm then costs as many updates as the other.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader = loader
        self.batches = batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return max(0, min(len(self.loader), self.batches - self.epoch * len(self.loader)))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), len(self))


def _run(
    directory: Path,
    config: _Config,
    task: Task,
    arms: dict[str, PriorityPropTrainer],
    pruning: PriorityPropTrainer | None = None,
) -> int:
    epochs = _epochs(config, task)
    steps = epochs * len(task.train_data)
    slots = len(arms[config.ours].get_priority_report().names)
    fraction = _fraction(config.budget, config.recalc_every * slots)
    by_updates = config.backward == "dense"
    plain_steps = max(1, round(steps * min(fraction, 1.0))) if by_updates else steps
    what = f"budget {fraction:.0%} of the full one" if config.k is None else f"k={config.k}"
    if config.backward == "highway":
        rounds = "exact, lean" if config.iterations is None else f"{config.iterations} rounds"
        what = f"highway ({rounds})"
    if config.sparsity is not None:
        what = f"sparsity {config.sparsity:g} ({config.sparse_method or 'static'})"
    print(f"{config.task}: {slots} slots, {steps} steps, {what}\nwriting to {directory}/")
    results: dict[str, dict[str, Any]] = {}
    for name, trainer in arms.items():
        plain = name != config.ours
        data: Any = _Limited(task.train_data, plain_steps) if plain else task.train_data
        own_epochs = math.ceil(plain_steps / len(task.train_data)) if plain else epochs
        if pruning is not None and not plain:
            history = _train_pruned(directory, trainer, pruning, epochs, task)
        else:
            history = _train_arm(directory, name, trainer, data, own_epochs, task)
        if history.interrupted:
            print(f"interrupted; go on with: priorityprop train --resume {directory}")
            return 130
        results[name] = result(trainer, history, task)
        if config.sparsity is not None:
            results[name] |= _sparse_result(trainer)
        if config.backward == "highway" and not plain:
            results[name]["cosine"] = _cosine(trainer.model, task)

    ledger = arms[config.ours].get_priority_report()
    record = {
        "config": dataclasses.asdict(config),
        "steps": steps,
        "metric": task.metric,
        "results": results,
        "ledger": ledger.as_dict(),
    }
    ledger.plot(directory / "priorities.tmp.png").replace(directory / "priorities.png")
    write(directory / "report.md", _markdown(record, ledger))
    # Last, as it tells that the run is finished
    write(directory / "report.json", json.dumps(record, indent=1) + "\n")
    print(_text(record, ledger))
    print(f"\nsaved {directory}/: report.md, priorities.png, metrics.jsonl, checkpoint/")
    return 0


def _fraction(budget: int | float | str, full: int) -> float:
    if isinstance(budget, str):
        return 1.0
    return budget / full if isinstance(budget, int) else budget


def _train_pruned(
    directory: Path,
    trainer: PriorityPropTrainer,
    pruning: PriorityPropTrainer,
    epochs: int,
    task: Task,
) -> History:
    """Trains densely while weights are pruned, then goes on with the sparse layers left."""
    from priorityprop_jax.sparse.training import continue_pruned

    if not has_checkpoint(directory / "checkpoint" / "sparse"):
        dense = _pruning_epochs(epochs)
        history = _train_arm(
            directory, "sparse", pruning, task.train_data, dense, task, folder="pruning"
        )
        if history.interrupted:
            return history
        continue_pruned(trainer, pruning)
        epochs -= dense
    return _train_arm(directory, "sparse", trainer, task.train_data, epochs, task)


def _sparse_result(trainer: PriorityPropTrainer) -> dict[str, Any]:
    from priorityprop_jax.sparse.training import layer_table

    layers = layer_table(trainer.model)
    return {
        "nonzeros": sum(layer["nonzeros"] for layer in layers),
        "layers": layers,
    }


def _train_arm(
    directory: Path,
    name: str,
    trainer: PriorityPropTrainer,
    loader: Iterable[Any],
    epochs: int,
    task: Task,
    *,
    folder: str | None = None,
) -> History:
    checkpoints = directory / "checkpoint" / (folder or name)
    trainer.checkpoint_dir = checkpoints
    resume = has_checkpoint(checkpoints)
    part = "" if name in OURS else " (plain)"
    print(f"\n{name}{part if folder is None else f' ({folder})'}")
    with Metrics(directory / "metrics.jsonl", name) as metrics:
        try:
            history = trainer.train(
                loader,
                epochs,
                eval_data=task.eval_data,
                resume_from=checkpoints if resume else None,
                log=metrics.write,
            )
        except ValueError as error:
            raise Failure(str(error)) from error
    if history.evals:
        last = history.evals[-1]
        print(f"  validation {task.metric} {last[task.metric]:.2%}, loss {last['loss']:.4f}")
    return history


_HEADER = (
    "",
    "validation",
    "best",
    "test",
    "val. loss",
    "steps",
    "updates",
    "train s",
    "compile s",
)


def _rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = []
    if record["config"].get("sparsity") is not None:
        columns.append(("non-zeros", lambda result: f"{result['nonzeros']:,}"))
    if record["config"].get("backward") == "highway":
        columns.append(("cosine", lambda result: f"{result.get('cosine', 1.0):.4f}"))
    if columns:
        columns.append(
            ("ms a step", lambda result: f"{1e3 * result['seconds'] / result['steps']:.2f}")
        )
    rows = [
        (
            name if name not in OURS else f"{name}({record['config']['optimizer']})",
            f"{result['validation']:.2%}",
            f"{result['best_validation']:.2%}",
            "-" if result["test"] is None else f"{result['test']:.2%}",
            f"{result['validation_loss']:.4f}",
            f"{result['steps']:,}",
            f"{result['updates']:,}",
            f"{result['seconds']:.1f}",
            f"{result['compile_seconds']:.1f}",
            *(shown(result) for _, shown in columns),
        )
        for name, result in record["results"].items()
    ]
    return [(*_HEADER, *(name for name, _ in columns)), *rows]


def _spent(record: dict[str, Any], ledger: Ledger) -> tuple[str, list[tuple[str, ...]] | Ledger]:
    """What a table of the layers, or of the slots, tells, and the table."""
    if record["config"].get("sparsity") is None:
        return f"where the budget went{_unit(record['config'])}", ledger
    rows = [
        (
            layer["layer"],
            "x".join(map(str, layer["shape"])),
            f"{layer['nonzeros']:,}",
            f"{1 - layer['nonzeros'] / layer['weights']:.1%}",
        )
        for layer in record["results"]["sparse"]["layers"]
    ]
    return "where the non-zeros are", [("layer", "shape", "non-zeros", "sparsity"), *rows]


def _text(record: dict[str, Any], ledger: Ledger) -> str:
    lines = aligned(_rows(record))
    title = (
        f"\n{record['config']['task']}: {record['metric']}, one seed ({record['config']['seed']})"
    )
    where, table = _spent(record, ledger)
    shown = aligned(table) if isinstance(table, list) else [str(table)]
    return "\n".join([title, *lines, "", f"{where}:", *shown])


def _markdown(record: dict[str, Any], ledger: Ledger) -> str:
    options = ", ".join(f"{key}={value}" for key, value in record["config"].items())
    where, table = _spent(record, ledger)
    return "\n".join(
        [
            f"# {record['config']['task']}: plain and {_how(record['config'])}",
            "",
            f"{record['metric'].capitalize()} of one seed. {options}",
            "",
            *markdown(_rows(record)),
            "",
            f"## {where[0].upper()}{where[1:]}",
            "",
            "![share of updates by layer](priorities.png)",
            "",
            *(markdown(table) if isinstance(table, list) else [table.to_markdown()]),
            "",
        ]
    )


def _unit(config: dict[str, Any]) -> str:
    meprop = config.get("backward", "dense") == "meprop"
    return " (an update is one output feature that the gradient passed at a step)" if meprop else ""


def _how(config: dict[str, Any]) -> str:
    if config.get("sparsity") is not None:
        return "with sparse weights, for as many steps"
    others = {"meprop": "by meProp", "highway": "by highway backpropagation"}
    if (backward := config.get("backward", "dense")) in others:
        return f"{others[backward]}, for as many steps"
    return "by priority, at the same budget of updates"


def _report(arguments: argparse.Namespace) -> int:
    from priorityprop_jax.priority.ledger import Ledger

    directory = arguments.directory
    path = directory / "report.json"
    if not path.exists():
        if (directory / "config.json").exists():
            again = f"priorityprop {command_of(directory)} --resume {directory}"
            raise Failure(f"{directory} is not finished: {again}")
        raise Failure(f"{directory} is not a run: it has no report.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("command") == "finetune":
            print(finetune.text(record))
        else:
            print(_text(record, Ledger.from_dict(record["ledger"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{path} is damaged ({error!r}); train again") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
