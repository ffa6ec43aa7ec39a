"""What bare `priorityprop train` runs: Adam, NAdam and Muon on a budget, on the clock."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from scipy.special import stdtrit

from priorityprop_jax.cli import runs
from priorityprop_jax.cli.runs import Report, table
from priorityprop_jax.cli.tasks import Task, characters, cross_entropy
from priorityprop_jax.models.files import package
from priorityprop_jax.priority.budgeted import matrix_slots
from priorityprop_jax.priority.ledger import Ledger, find_state
from priorityprop_jax.priority.muon import muon

# The best of `python -m benchmarks.compare_rates`, which has seeds of its own.
RATES = {"adam": 8e-3, "nadam": 8e-3, "muon": 3.2e-2}
BUDGET, SEEDS = 0.25, 5
COLORS = {"adam": "#777777", "nadam": "black", "muon": "#0072B2"}


def _numbers(params: Any) -> Any:
    """Muon's are the matrices of the blocks, whose first axis is the block."""
    one = optax.contrib.MuonDimensionNumbers(1, 2)
    return jax.tree.map(lambda x: one if x.ndim == 3 else None, params)


def loss_of(task: Task) -> Callable[..., Any]:
    """The loss and metrics of parameters on a batch, compiled where it is called by itself."""
    graph, _, rest = nnx.split(task.model, nnx.Param, ...)
    return jax.jit(lambda params, batch: cross_entropy(nnx.merge(graph, params, rest), batch))


class Arm:
    """An optimizer with its compiled step, which all seeds share, and `loss_of` the task."""

    def __init__(self, name: str, task: Task, loss_fn: Any, rate: float, budget: float = BUDGET):
        steps = task.epochs * len(task.train_data)
        decayed = optax.cosine_decay_schedule(rate, steps)
        self.name = name
        self.tx = {
            "adam": lambda: optax.adam(decayed),
            "nadam": lambda: optax.nadam(decayed),
            "muon": lambda: muon(decayed, budget, weight_dimension_numbers=_numbers),
        }[name]()

        def step(params, state, batch):
            grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch)
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._step, self._evaluate = jax.jit(step), loss_fn
        self._dev = task.parts[1]
        first = next(iter(task.train_data))
        params, state = self.start(task)
        jax.block_until_ready((self._step(params, state, first), self._evaluate(params, self._dev)))

    def start(self, task: Task) -> tuple[Any, Any]:
        """The parameters and the state of the optimizer before the first step."""
        params = nnx.as_pure(nnx.state(task.model, nnx.Param))
        return params, self.tx.init(params)

    def run(self, task: Task) -> dict[str, Any]:
        """One training: the validation after each epoch, over the seconds of the steps alone."""
        params, state = self.start(task)
        seconds, losses, accuracies = [0.0], [], []

        def evaluate():
            loss, metrics = self._evaluate(params, self._dev)
            losses.append(float(loss))
            accuracies.append(float(metrics["accuracy"]))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss of {self.name} is not finite: lower its rate")

        evaluate()
        for epoch in range(task.epochs):
            task.train_data.set_epoch(epoch)
            batches = list(task.train_data)
            start = time.perf_counter()
            for batch in batches:
                params, state = self._step(params, state, batch)
            jax.block_until_ready(params)
            seconds.append(seconds[-1] + time.perf_counter() - start)
            evaluate()
        found = {"arm": self.name, "seed": task.seed, "steps": task.epochs * len(task.train_data)}
        found |= {"seconds": seconds, "loss": losses, "accuracy": accuracies}
        if self.name == "muon":
            blocks = lambda path, x: x if x.ndim == 3 else None  # noqa: E731
            ledger = Ledger(matrix_slots(jax.tree_util.tree_map_with_path(blocks, params)))
            ledger.record(find_state(state))
            found["ledger"] = ledger.as_dict()
        return found


def adjusted(config: argparse.Namespace, seed: int) -> Task:
    """The task of one seed; a ValueError where options make no sense."""
    task = characters(seed=seed).adjusted(config)
    len(task.train_data)
    return task


def run(arguments: argparse.Namespace, config: argparse.Namespace) -> None:
    """Trains every arm on every seed, those of one seed after each other, and reports."""
    package("matplotlib", "the picture is drawn with matplotlib", "demo")  # before, not after
    budget, seeds = (config.budget or BUDGET), (config.seeds or SEEDS)
    with runs.told(ValueError, TypeError, code=2):
        if isinstance(budget, int):
            raise ValueError("muon needs a share of the matrices as --budget, such as 0.25")
        task = adjusted(config, config.seed)
    print(f"characters of short messages: {', '.join(RATES)}, {seeds} seeds")
    with runs.running(arguments, "train", "characters-muon", config) as directory:
        path = directory / "metrics.jsonl"
        done = _finished(path)
        arms: dict[str, Arm] = {}
        loss_fn = loss_of(task)
        for seed in range(config.seed, config.seed + seeds):
            task = task if seed == task.seed else adjusted(config, seed)
            for name, rate in RATES.items():
                if (name, seed) in done:
                    continue
                if name not in arms:
                    arms[name] = Arm(name, task, loss_fn, config.learning_rate or rate, budget)
                done[name, seed] = arms[name].run(task)
                runs.write(path, "".join(f"{json.dumps(one)}\n" for one in done.values()))
            losses = ", ".join(f"{name} {done[name, seed]['loss'][-1]:.3f}" for name in RATES)
            print(f"  seed {seed}: validation loss {losses}")
        record = {"command": "train", "config": vars(config), "runs": list(done.values())}
        made = report(record)
        runs.save(directory, record, made, lambda path: draw(path, record))


def _finished(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs that are in a file already."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {(one["arm"], one["seed"]): one for one in found}


# The report.


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and Student's 95 % interval of it; NaN where there is but one value."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def seconds_to(one: Mapping[str, Any], loss: float) -> float | None:
    """When a run is at a loss for the first time, by straight lines between its evaluations."""
    points = list(zip(one["seconds"], one["loss"], strict=True))
    for (before, high), (after, low) in zip(points[:-1], points[1:], strict=True):
        if high <= loss:
            return after  # it was there from the start
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def sooner(own: Sequence[Any], other: Sequence[Any]) -> tuple[float, float, float] | None:
    """How many times sooner runs are where others of the same seeds end; None if one never is."""
    ratios = []
    for one, its in zip(own, other, strict=True):
        needed = seconds_to(one, its["loss"][-1])
        if needed is None:
            return None
        ratios.append(math.log(its["seconds"][-1] / needed))
    mean, low, high = map(math.exp, interval(ratios))
    return mean, low, high


def by_arm(record: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The runs of every arm, by seed."""
    order = sorted(record["runs"], key=lambda one: one["seed"])
    return {name: [one for one in order if one["arm"] == name] for name in RATES}


def verdict(arms: Mapping[str, Sequence[Any]]) -> str:
    """A sentence for each rival: whether Muon is better by more than its interval."""
    lines = []
    for name in ("nadam", "adam"):
        own, other = arms["muon"], arms[name]
        losses = [one["loss"][-1] - its["loss"][-1] for one, its in zip(own, other, strict=True)]
        times, (mean, low, high) = sooner(own, other), interval(losses)
        if len(own) < 2:
            lines.append(f"muon against {name}: one seed has no interval, and tells nothing")
        elif times is not None and times[1] > 1:
            lines.append(
                f"muon is where {name} ends {times[0]:.1f} times sooner (95 %: {times[1]:.1f} to "
                f"{times[2]:.1f}); loss at the end {mean:+.2f}"
            )
        else:
            took = "it does not come to that loss with every seed"
            if times is not None:
                took = f"{times[0]:.1f} times sooner, 95 %: {times[1]:.1f} to {times[2]:.1f}"
            lines.append(
                f"muon is NOT better than {name} by more than its interval ({took}; loss at the "
                f"end {mean:+.2f}, 95 %: {low:+.2f} to {high:+.2f})"
            )
    return "\n".join(lines)


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    arms = by_arm(record)
    rows = [("", "validation loss", "95 % interval", "accuracy", "train s", "ms a step")]
    for name, own in arms.items():
        mean, low, high = interval([one["loss"][-1] for one in own])
        seconds, steps = np.mean([one["seconds"][-1] for one in own]), own[0]["steps"]
        accuracy = np.mean([one["accuracy"][-1] for one in own])
        spread = "-" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        rows.append((
            name, f"{mean:.3f}", spread, f"{accuracy:.1%}", f"{seconds:.2f}",
            f"{1e3 * seconds / steps:.1f}",
        ))  # fmt: skip
    where = [("matrices of the blocks", "updated at")]
    where += [(name, f"{share:.0%} of the steps") for name, share in shares(arms["muon"]).items()]
    rate, seed = (record["config"][name] for name in ("learning_rate", "seed"))
    at = "each at its tuned rate" if rate is None else f"all at the rate {rate:g}"
    n = len(arms["muon"])
    title = f"characters: Adam, NAdam and Muon on a budget, {at}, {n} seed{'s' * (n != 1)} from "
    said = verdict(arms)
    spent = table("where muon's updates went", where)
    return Report(
        f"{title}{seed}", [table("", rows), spent, ("", said, said.replace("\n", "\n\n"))]
    )


def shares(own: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For every stack of matrices the share of the steps at which one of it was updated."""
    found: dict[str, list[float]] = {}
    for one in own:
        for row in one["ledger"]["slots"]:
            name = row["slot"].partition("[")[0].removeprefix("blocks/block/")
            name = name.removesuffix("/kernel")
            found.setdefault(name, []).append(row["updates"] / one["steps"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """Losses over seconds with their bands, and beside them where the updates went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = by_arm(record)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    for name, own in arms.items():
        seconds = np.mean([one["seconds"] for one in own], axis=0)
        bands = np.array(
            [interval(losses) for losses in zip(*(o["loss"] for o in own), strict=True)]
        )
        left.plot(seconds, bands[:, 0], color=COLORS[name], linewidth=2, label=name)
        left.fill_between(seconds, bands[:, 1], bands[:, 2], color=COLORS[name], alpha=0.25)
    left.set(xlabel="seconds of training", ylabel="validation loss")
    left.margins(x=0)
    left.legend(frameon=False, fontsize=11)
    left.spines[["top", "right"]].set_visible(False)
    left.grid(color="0.92")
    best = sooner(arms["muon"], arms["nadam"])
    heading = "Muon is not better than NAdam by more than its interval"
    if best is not None and best[1] > 1:
        heading = f"Muon is where NAdam ends {best[0]:.1f} times sooner"
        x, y = (np.mean([one[key][-1] for one in arms["nadam"]]) for key in ("seconds", "loss"))
        arrow = {"arrowstyle": "->", "color": "#D55E00", "lw": 2}
        left.annotate("", (x / best[0], y), (x, y), arrowprops=arrow)
    n = len(arms["muon"])
    left.set_title(f"{heading}\n(mean and 95 % interval of {n} seeds)", fontsize=11)
    found = shares(arms["muon"])
    names = [name.replace("_", " ") for name in found]
    right.barh(names, [1] * len(names), color="0.9")
    right.barh(names, list(found.values()), color=COLORS["muon"])
    for place, share in enumerate(found.values()):
        right.text(share + 0.02, place, f"{share:.0%}", va="center", fontsize=9)
    right.set(xlim=(0, 1), xticks=(0, 0.5, 1), xticklabels=("0 %", "50 %", "every step"))
    right.set_title("How often Muon updates a matrix\n(Adam: at every step)", fontsize=11)
    right.spines[["top", "right"]].set_visible(False)
    runs.write(path, lambda temporary: figure.savefig(temporary, dpi=130))
