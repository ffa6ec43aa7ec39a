"""What the subcommands of `priorityprop` share: options, a run's folder, its report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from priorityprop_jax.core.tables import aligned, markdown

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task
    from priorityprop_jax.training.history import History
    from priorityprop_jax.training.trainer import Trainer


class Failure(Exception):
    """What a user can mend: one line, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


# Options.


def number(
    kind: Callable[[str], Any], least: float, most: float = math.inf, what: str = "number"
) -> Callable[[str], Any]:
    """A parser of finite numbers in a range, for argparse; float numbers are above `least`."""
    text_of_range = f"from {least} on" if kind is int else f"above {least:g}"
    if most < math.inf:
        text_of_range += f" and up to {most:g}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        low = least <= value if kind is int else least < value
        if not (low and value <= most and value < (2**31 if kind is int else math.inf)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {text_of_range}")
        return value

    return parse


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""
    return number(int, least, what="whole number")


rate = number(float, 0)
fraction = number(float, 0, 1, "fraction")


def amount(text: str) -> int | float:
    """A parser of whole numbers from 1 on, and of fractions above 0 and up to 1."""
    try:
        return whole(1)(text) if text.isdecimal() else fraction(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number from 1 on nor a fraction such as 0.5"
        ) from None


# Every option of a run, as `add_argument` takes it: these of all commands, and each its own.
COMMON: dict[str, dict[str, Any]] = {
    "epochs": {"type": whole(1), "help": "default: the task's"},
    "learning_rate": {"type": rate, "help": "default: the task's"},
    "batch_size": {"type": whole(1), "help": "rows in a batch (default: the task's)"},
    "seed": {"type": whole(0), "default": 0, "help": "of weights and batches"},
}


def add_options(parser: argparse.ArgumentParser, options: Mapping[str, dict[str, Any]]) -> None:
    """Adds the options of a run, and where its folder goes or is."""
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs"), help="where the run's folder goes"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN",
        help="go on with an interrupted run, with its own options; all others are ignored",
    )  # fmt: skip


# A run's folder.


def open_run(
    arguments: argparse.Namespace, options: Mapping[str, dict[str, Any]], command: str
) -> tuple[argparse.Namespace, Path | None]:
    """The options of a run, those given or those in the folder of the one to resume; the folder.

    Raises:
      Failure: there is no such run, or it is finished, or of another command.
    """
    directory = arguments.resume
    if directory is None:
        return argparse.Namespace(**{name: getattr(arguments, name) for name in options}), None
    path = directory / "config.json"
    if not path.exists():
        raise Failure(f"{directory} is not a run: it has no config.json")
    if (directory / "report.json").exists():
        raise Failure(f"{directory} is finished: priorityprop report {directory}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        owner = values.pop("command")
        if owner == command:
            if values.keys() != options.keys():
                raise ValueError(f"it has {', '.join(values)}")
            for name, option in options.items():
                if not _is_valid(values[name], option):
                    raise ValueError(f"{name} is {values[name]!r}")
            return argparse.Namespace(**values), directory
    except (KeyError, ValueError, TypeError, AttributeError, argparse.ArgumentTypeError) as error:
        raise Failure(f"{path} is damaged ({error}); start a new run") from error
    raise Failure(f"{directory} is a run of {owner}: priorityprop {owner} --resume {directory}")


def _is_valid(value: Any, option: Mapping[str, Any]) -> bool:
    """Whether an option could have been given this value."""
    if value is None:
        return option.get("default") is None and "action" not in option
    if "choices" in option:
        return value in option["choices"]
    return isinstance(value, bool) if "action" in option else option["type"](str(value)) == value


def command_of(directory: Path) -> str:
    """The subcommand that made a run, as far as its `config.json` tells."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return "finetune" if values.get("command") == "finetune" else "train"
    except (OSError, ValueError, AttributeError):
        return "train"


def new_directory(out: Path, name: str, command: str, config: argparse.Namespace) -> Path:
    """Makes `OUT/NAME-1`, or the first number after that which is free, with its config.json."""
    numbers = itertools.count(1)
    directory = out / f"{name}-{next(numbers)}"
    while True:
        try:
            directory.mkdir(parents=True)
            break
        except FileExistsError:
            directory = out / f"{name}-{next(numbers)}"
    values = {"command": command, **vars(config)}
    write(directory / "config.json", json.dumps(values, indent=2) + "\n")
    return directory


def write(path: Path, text: str) -> None:
    """Writes all or nothing: to a temporary name in the same folder, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# Training.


@contextlib.contextmanager
def resumable(directory: Path) -> Iterator[None]:
    """Says how to go on with a run that Ctrl-C ends."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"go on with: priorityprop {command_of(directory)} --resume {directory}")
        raise


def train_arm(directory: Path, name: str, trainer: Trainer, task: Task, epochs: int) -> None:
    """Trains, from the latest checkpoint if there is one.

    Raises:
      Failure: the checkpoint does not fit, or the data do not.
      KeyboardInterrupt: Ctrl-C was pressed; the run can be gone on with.
    """
    from tqdm import tqdm

    checkpoints = directory / "checkpoint" / name
    trainer.checkpoint_dir = checkpoints
    saved = checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())

    def log(record: dict[str, Any]) -> None:
        if record["kind"] != "eval":
            return
        write_metrics(directory / "metrics.jsonl", name, trainer.history)
        if record["epoch"] in (epochs, *range(0, epochs, 5)):
            # Past the progress bar, which a plain print would break.
            tqdm.write(
                f"  {name}, epoch {record['epoch']}: validation accuracy "
                f"{record['accuracy']:.2%}, loss {record['loss']:.4f}"
            )

    try:
        history = trainer.train(
            task.train_data, epochs, eval_data=task.eval_data,
            resume_from=checkpoints if saved else None, log=log,
        )  # fmt: skip
    except ValueError as error:
        raise Failure(str(error)) from error
    if history.interrupted:
        raise KeyboardInterrupt


def write_metrics(path: Path, arm: str, history: History) -> None:
    """Writes all of an arm's records, one a line, in the order of its steps; others' lines stay."""
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    mine = json.dumps({"arm": arm})[:-1] + ","
    lines = [line for line in kept if line.endswith("}") and not line.startswith(mine)]
    records = [{"kind": "step", **r} for r in history.steps]
    records += [{"kind": "eval", **r} for r in history.evals]
    records.sort(key=lambda record: record["step"])  # a step stays before its evaluation
    lines += [json.dumps({"arm": arm, **record}) for record in records]
    write(path, "\n".join(lines) + "\n")


def result(trainer: Trainer, task: Task) -> dict[str, Any]:
    """What a finished training has come to, ready for JSON; evaluates on the test data."""
    history = trainer.history
    last, best = history.evals[-1], max(history.evals, key=lambda record: record["accuracy"])
    return {
        "steps": len(history.steps),
        "updates": sum(history.updates),
        "train_loss": history.loss[-1],
        "validation_loss": last["loss"],
        "validation": last["accuracy"],
        "best_validation": best["accuracy"],
        "best_epoch": best["epoch"],
        "test": trainer.evaluate(task.test_data)["accuracy"],
        "seconds": sum(history.seconds),
        "compile_seconds": history.compile_seconds,
    }


# The report.


class Section(NamedTuple):
    """A part of a report: its title, or none for the first, and its table in both forms."""

    title: str
    text: str
    markdown: str


def table(title: str, rows: Sequence[Sequence[str]]) -> Section:
    """The section of a table whose first row is the header."""
    lines = (line.rstrip() for line in aligned(rows))
    return Section(title, "\n".join(lines), "\n".join(markdown(rows)))


class Report(NamedTuple):
    """What a finished run prints, and what it writes into report.md."""

    title: str
    sections: Sequence[Section]

    def __str__(self) -> str:
        """The report for a terminal."""
        parts = [f"{s.title}:\n{s.text}" if s.title else s.text for s in self.sections]
        return "\n\n".join([f"\n{self.title}", *parts])


PICTURES = {"losses.png": "Loss over seconds", "priorities.png": "Share of the budget by layer"}


def save(directory: Path, record: Mapping[str, Any], report: Report) -> None:
    """Writes report.md with the pictures of the folder, and last report.json; prints the report."""
    options = ", ".join(f"{name}={value}" for name, value in record["config"].items())
    blocks = [f"# {report.title}", options]
    for section in report.sections:
        blocks += [f"## {section.title.capitalize()}"] if section.title else []
        blocks.append(section.markdown)
    pictures = [name for name in PICTURES if (directory / name).exists()]
    blocks += [f"![{PICTURES[name]}]({name})" for name in pictures]
    write(directory / "report.md", "\n\n".join(blocks) + "\n")
    # Last, as it tells that the run is finished
    write(directory / "report.json", json.dumps(record, indent=1) + "\n")
    print(report)
    print(f"\nsaved {directory}/: {', '.join(['report.md', *pictures, 'metrics.jsonl'])}")


def draw(path: Path, picture: Callable[[Path], Any]) -> None:
    """Draws all or nothing: to a temporary name with the same ending, then renamed."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        picture(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def draw_losses(path: Path, title: str, arms: Mapping[str, History]) -> None:
    """The loss of each arm over its seconds of training: of batches, averaged, and on validation.

    Args:
      path: of the picture.
      title: above it.
      arms: by the name in the legend.
    """
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
    axes.set(xlabel="seconds of training", ylabel="loss", yscale="log", title=title)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="0.9")
    axes.legend(title="points: validation\npale: training batches", frameon=False)
    draw(path, lambda temporary: figure.savefig(temporary, dpi=130))
