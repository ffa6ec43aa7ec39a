"""What the subcommands of `priorityprop` share: options, a run's folder, its report."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from priorityprop_jax.core.tables import aligned, markdown
from priorityprop_jax.models.files import written as write

if TYPE_CHECKING:
    from priorityprop_jax.training.history import History
    from priorityprop_jax.training.trainer import Trainer


class Failure(Exception):
    """What a user can mend: one line, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def told(*kinds: type[Exception], code: int = 1) -> Iterator[None]:
    """Makes a `Failure` of errors of some kinds, which say what a user can mend."""
    try:
        yield
    except kinds as error:
        raise Failure(str(error), code) from error


# Options.


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """A parser of finite numbers in a range, for argparse; those of kind float above `least`."""
    what = f"whole number from {least} on" if kind is int else f"number above {least:g}"
    if most < math.inf:
        what = f"fraction above {least:g} and up to {most:g}"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            fits = least <= value < 2**31 if kind is int else least < value <= most
            if fits and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")

    return parse


whole = functools.partial(number, int)
rate = number(float, 0)
fraction = number(float, 0, 1)


def amount(text: str) -> int | float:
    """A parser of whole numbers from 1 on, and of fractions above 0 and up to 1."""
    return whole(1)(text) if text.isdecimal() else fraction(text)


# Every option of a run, as `add_argument` takes it: these of all commands, and each its own.
COMMON: dict[str, dict[str, Any]] = {
    "epochs": {"type": whole(1), "help": "default: the task's"},
    "learning_rate": {"type": rate, "help": "default: the task's"},
    "batch_size": {"type": whole(1), "help": "rows in a batch (default: the task's)"},
    "seed": {"type": whole(0), "default": 0, "help": "of weights and batches"},
}


# Where a run's folder goes or is.
PLACES: dict[str, dict[str, Any]] = {
    "out": {
        "type": Path, "metavar": "DIR", "default": Path("runs"),
        "help": "where the run's folder goes",
    },
    "resume": {
        "type": Path, "metavar": "RUN",
        "help": "go on with an interrupted run, with its own options; all others are ignored",
    },
}  # fmt: skip


# A run's folder.

_DAMAGE = (AttributeError, LookupError, TypeError, ValueError)


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[Any]:
    """Gives what a file of JSON holds; an error within is told as damage to it."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (*_DAMAGE, argparse.ArgumentTypeError) as error:
        raise Failure(f"{path} is damaged ({error!r}); {remedy}") from error


def read_config(directory: Path) -> tuple[str, dict[str, Any]]:
    """The subcommand that a run is of, and its options."""
    path = directory / "config.json"
    if not path.exists():
        raise Failure(f"{directory} is not a run: it has no config.json")
    with reading(path, "start a new run") as values:
        return values.pop("command"), values


def options_of(
    arguments: argparse.Namespace, options: Mapping[str, dict[str, Any]], command: str
) -> argparse.Namespace:
    """The options of a run: those given, or those in the folder of the one to resume."""
    directory = arguments.resume
    if directory is None:
        return argparse.Namespace(**{name: getattr(arguments, name) for name in options})
    owner, values = read_config(directory)
    if (directory / "report.json").exists():
        raise Failure(f"{directory} is finished: priorityprop report {directory}")
    if owner != command:
        raise Failure(f"{directory} is a run of {owner}: priorityprop {owner} --resume {directory}")
    with reading(directory / "config.json", "start a new run"):
        if values.keys() != options.keys():
            raise ValueError(f"it has {', '.join(values)}")
        for name, option in options.items():
            if not _is_valid(values[name], option):
                raise ValueError(f"{name} is {values[name]!r}")
    return argparse.Namespace(**values)


def _is_valid(value: Any, option: Mapping[str, Any]) -> bool:
    """Whether an option could have been given this value."""
    if value is None:
        return option.get("default") is None and "action" not in option
    if "choices" in option:
        return value in option["choices"]
    if "action" in option:
        return isinstance(value, bool)
    return option.get("type", str)(str(value)) == value


# Texts.


def texts(config: argparse.Namespace) -> tuple[Any, ...]:
    """The texts to train on, to try and, if there are some, to test, of a file or by name."""
    from priorityprop_jax.models.texts import read_texts, split

    own = config.data != "messages"
    path = Path(config.data) if own else Path(__file__).with_name("messages.csv")
    if config.data == "sst2":
        from priorityprop_jax.cli.tasks import sst2_texts

        return tuple(part._replace(rows=part.rows[: config.limit]) for part in sst2_texts())
    with told(ValueError):
        found = read_texts(path, skip_bad=config.skip_bad)
        for line in found.skipped:
            print(f"left out: {line}")
        parts = split(found, seed=config.seed)
    return tuple(part._replace(rows=part.rows[: config.limit]) for part in parts)


def tell_cut(cut: int, rows: int, length: int) -> None:
    """Says how many texts are seen in part alone, if any."""
    if cut:
        print(f"{cut} of {rows} texts are cut to {length} tokens")


def labels(train: Any, *others: Any) -> list[str]:
    """The labels to learn; an error if others occur where the model is tried."""
    from priorityprop_jax.models.texts import check_labels, labels_of

    with told(ValueError):
        found = labels_of(train)
        for part in others:
            check_labels(part, found, "the rows to try it on")
    return found


# Training.


@contextlib.contextmanager
def running(
    arguments: argparse.Namespace, command: str, name: str, config: argparse.Namespace
) -> Iterator[Path]:
    """Gives the run's folder, and says how to go on with it where Ctrl-C ends it.

    That is the one to resume, or a new one with a config.json: ``OUT/NAME-1``, or the first number
    after that which is free.
    """
    from priorityprop_jax.training.processes import agreed

    def new() -> int:
        numbers = itertools.count(1)
        while True:
            free = arguments.out / f"{name}-{(number := next(numbers))}"
            with contextlib.suppress(FileExistsError):
                free.mkdir(parents=True)
                values = {"command": command, **vars(config)}
                write(free / "config.json", json.dumps(values, indent=2))
                return number

    directory = arguments.resume or arguments.out / f"{name}-{agreed(new)}"
    print(f"writing to {directory}/")
    try:
        yield directory
    except KeyboardInterrupt:
        print(f"go on with: priorityprop {command} --resume {directory}")
        raise


def train_arm(
    directory: Path, name: str, trainer: Trainer, data: Sequence[Any], epochs: int
) -> dict[str, Any]:
    """Trains, from the latest checkpoint if there is one; the result, ready for JSON.

    ``data`` are batches to train on, to try on, and to test on or None.
    """
    train, dev, test = data
    import jax
    from tqdm import tqdm

    trainer.checkpoint_dir = checkpoints = directory / "checkpoint" / name
    saved = checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())

    write_new = metrics_writer(directory / "metrics.jsonl", name)

    def log(record: dict[str, Any]) -> None:
        if record["kind"] != "eval" or jax.process_index():
            return
        write_new(trainer.history)
        if record["epoch"] in (epochs, *range(0, epochs, 5)):
            accuracy = f"accuracy {record['accuracy']:.2%}, " if "accuracy" in record else ""
            # Past the progress bar, which a plain print would break.
            tqdm.write(
                f"  {name}, epoch {record['epoch']}: validation {accuracy}loss {record['loss']:.4f}"
            )

    resume_from = checkpoints if saved else None
    with told(ValueError):
        history = trainer.train(train, epochs, eval_data=dev, resume_from=resume_from, log=log)
    if history.interrupted:
        raise KeyboardInterrupt
    last = history.evals[-1]
    best = max(history.evals, key=lambda record: record.get("accuracy", -record["loss"]))
    tested = {} if test is None else trainer.evaluate(test)
    return {
        "steps": len(history.steps),
        "updates": sum(history.updates),
        "validation_loss": last["loss"],
        "best_loss": best["loss"],
        "validation": last.get("accuracy"),
        "best_validation": best.get("accuracy"),
        "best_epoch": best["epoch"],
        "test": tested.get("accuracy"),
        "seconds": sum(history.seconds),
        "compile_seconds": history.compile_seconds,
    }


def peak_bytes() -> int:
    """The most memory that was in use so far: of the device where it says so, or the process."""
    import resource
    import sys

    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )


def metrics_writer(path: Path, arm: str) -> Callable[[History], None]:
    """Appends an arm's new records, one a line, in the order of its steps.

    The first time it writes all of them, in the place of what a run that has ended left behind;
    other arms' lines stay.
    """
    done = None

    def write_new(history: History) -> None:
        nonlocal done
        both = {"step": history.steps, "eval": history.evals}
        new = [
            {"kind": kind, **record}
            for (kind, records), start in zip(both.items(), done or (0, 0), strict=True)
            for record in records[start:]
        ]
        new.sort(key=lambda record: record["step"])  # a step stays before its evaluation
        lines = [json.dumps({"arm": arm, **record}) for record in new]
        if done is None:
            kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            mine = json.dumps({"arm": arm})[:-1] + ","
            kept = [line for line in kept if line.endswith("}") and not line.startswith(mine)]
            write(path, "\n".join(kept + lines))
        else:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        done = len(history.steps), len(history.evals)

    return write_new


# The report.


class Report(NamedTuple):
    """What a finished run prints, and what it writes into report.md."""

    title: str
    sections: Sequence[tuple[str, str, str]]  # a title or none, the table as text and as Markdown

    def __str__(self) -> str:
        """The report for a terminal."""
        parts = [f"{title}:\n{text}" if title else text for title, text, _ in self.sections]
        return "\n\n".join([f"\n{self.title}", *parts])


def table(title: str, rows: Sequence[Sequence[str]]) -> tuple[str, str, str]:
    """The section of a table whose first row is the header."""
    return title, "\n".join(map(str.rstrip, aligned(rows))), "\n".join(markdown(rows))


PICTURES = {"losses.png": "Loss over seconds", "priorities.png": "Share of the budget by layer"}


def save(
    directory: Path, record: Mapping[str, Any], report: Report, draw: Callable[[Path], None]
) -> None:
    """Draws the losses, writes report.md and, last, report.json; prints the report."""
    draw(directory / "losses.png")
    options = ", ".join(f"{name}={value}" for name, value in record["config"].items())
    blocks = [f"# {report.title}", options]
    for title, _, text in report.sections:
        blocks += [f"## {title.capitalize()}", text] if title else [text]
    pictures = [name for name in PICTURES if (directory / name).exists()]
    blocks += [f"![{PICTURES[name]}]({name})" for name in pictures]
    write(directory / "report.md", "\n\n".join(blocks))
    # Last, as it tells that the run is finished
    write(directory / "report.json", json.dumps(record, indent=1))
    print(report)
    print(f"\nsaved {directory}/: {', '.join(['report.md', *pictures, 'metrics.jsonl'])}")


def losses(title: str, arms: Mapping[str, History]) -> Callable[[Path], None]:
    """Draws the loss of each arm, by its name in the legend, over its seconds of training."""
    return lambda path: _draw_losses(path, title, arms)


def _draw_losses(path: Path, title: str, arms: Mapping[str, History]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, history), color in zip(arms.items(), ("black", "#0072B2"), strict=False):
        seconds = list(itertools.accumulate(history.seconds))
        wide = max(1, len(seconds) // 50)  # steps that are averaged
        last = range(wide, len(seconds) + 1)
        smooth = [math.fsum(history.loss[i - wide : i]) / wide for i in last]
        axes.plot([seconds[i - 1] for i in last], smooth, color=color, alpha=0.35, linewidth=1)
        axes.plot(
            [seconds[record["step"] - 1] for record in history.evals],
            [record["loss"] for record in history.evals],
            color=color, marker="o", markersize=3.5, label=name,
        )  # fmt: skip
    axes.set(xlabel="seconds of training", ylabel="loss", yscale="log")
    axes.set_title(title, fontsize=10)
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter="")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="0.9")
    axes.legend(title="points: validation\npale: training batches", frameon=False)
    write(path, lambda temporary: figure.savefig(temporary, dpi=130))
