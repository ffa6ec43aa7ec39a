"""The suite's report: `REPORT.md` and its pictures, made from the records alone.

Page one is a chart, a table and three sentences; then a page a workload; then the raw tables. The
same records give the same text. It is written once every workload of `small` is finished and timed
on a quiet machine.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics as plain
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite.ablations import ablation_blocks
from benchmarks.suite.arms import BASE, arm_of
from benchmarks.suite.harness import Setting, best, budget_of
from benchmarks.suite.plots import plot_curves, plot_overview
from benchmarks.suite.standing import LEVELS, Standing, standing_of
from benchmarks.suite.statistics import Estimate, claim
from benchmarks.suite.words import gap, listed, number, of, ratio, table
from benchmarks.suite.workloads import read_workload, workload_names

TITLE = """\
# How much sooner

Second edition. Generated from the records under `benchmarks/results`; a test fails where the two
differ."""

READING = """\
## How to read this

A training is compared by the seconds that it takes until its validation loss is down where tuned
AdamW ends: the median of AdamW's lowest losses over its seeds, with the best rate and batch, in a
fixed budget of seconds. Where a pretrained model is fine-tuned, within 2 % of it. Every method has
its learning rate, its batch and the length of its run tuned on seeds that are not shown, with the
same number of trials, and up to four more where the best rate is at an end of those tried; AdamW
has them at each batch. A ratio is of two runs of the same seed; its mean is geometric, its interval
a 95 % percentile bootstrap over seeds, which with few seeds is rather too narrow. "≥" stands where
AdamW itself falls short on some seeds and is charged its whole budget. Where a method falls short
on a seed, its ratio is over the others, and nothing may be claimed from it; of fewer than three
there is none, as their mean would say who was lucky ("2 only"). Seconds are steps times the seconds
of a step, taken with all methods in turn on an idle machine; compiling and evaluating are not in
them. Between two evaluations (forty a run; twelve where a pretrained model is fine-tuned, as each
costs as much as many steps) the loss goes by a straight line. The best baseline is the fastest of
all on the seeds that are shown."""

# Speed benchmarks, each with a function `markdown` of its record.
SPEED = ("highway", "meprop_lstm", "meprop_speed", "sparse_layers", "transform_overhead")
EXACT = {
    "tagger": "a bidirectional LSTM tagger",
    "lstm": "an LSTM alone",
    "minilm-128": "a BERT at 128 tokens",
    "smollm2": "a decoder of SmolLM2's shape",
    "scan": "a scanned transformer",
    "minilm": "a BERT at 24 tokens",
    "list": "a transformer of unlike blocks",
}


def suites(evidence: Path) -> list[tuple[str, Path]]:
    """Name and folder of all measured suites that say how soon a target is reached."""
    folders = sorted(evidence.glob("*-*"))
    found = [(folder.name.partition("-")[0], folder) for folder in folders]
    return [(name, folder) for name, folder in found if name not in ("smoke", "ablation")]


def standings(name: str, folder: Path) -> tuple[list[Standing], list[str]]:
    """Of the workloads that are finished, and the names of the others."""
    done, left = [], []
    for workload in workload_names(name):
        standing = standing_of(read_workload(name, workload), folder)
        done += [standing] if standing else []
        left += [] if standing else [workload]
    return done, left


def shown(standing: Standing, name: str) -> Estimate | None:
    """Over AdamW at the same batch, of a method that gets there on every seed."""
    over = standing.same_batch(name, standing.workload.within)
    if over is None or over.interval is None or over.misses:
        return None
    return over


def exact(results: Path) -> dict[str, float]:
    """By model, how many times sooner a step with the same gradients is, its memory kept."""
    path = results / "speed" / "exact-cpu.json"
    if not path.exists():
        return {}
    models = json.loads(path.read_text("utf-8"))["models"]
    kept = {key: one.get("times_sooner_with_memory") for key, one in models.items()}
    return {key: kept[key] for key in EXACT if kept.get(key)}


def best_of(standing: Standing) -> str | None:
    """What is shown for this library: the recipe, else what the fewest runs of miss."""
    return standing.recipe() or next(iter(standing.of("ours")), None)


def row(standing: Standing) -> list[str]:
    """A workload's line of the first page's table."""
    name, level = best_of(standing), standing.workload.within
    if name is None:
        return [standing.workload.name, "-", "-", "-", "-", "-", "-"]
    own, baseline = standing.own[name], standing.best_baseline(level)
    missed, n = standing.missed(name, level), len(standing.runs(own))
    memory = standing.memory(name)
    called = f"`{baseline.name}`" + f", batch {baseline.batch}" * (baseline.name == BASE)
    return [
        standing.workload.name,
        f"`{name}`",
        ratio(standing.same_batch(name, level)),
        f"{ratio(standing.over(baseline, own, level))} over {called}",
        of(n - missed, n),
        gap(standing.price(name)),
        number(memory, ".2f"),
    ]


HEADER = (
    "task | this library's best | over tuned AdamW at the same batch | over the best baseline | "
    "gets there | test accuracy over AdamW's | peak memory of AdamW's"
)


def sentences(done: Sequence[Standing], results: Path) -> list[str]:
    """What page one says."""
    winners, losers = [], []
    for standing in done:
        name = best_of(standing)
        over = shown(standing, name) if name else None
        if name and over and over.interval and over.interval[0] > 1:
            winners.append(f"{standing.workload.name} {ratio(over)} with `{name}`")
        else:
            losers.append(standing.workload.name)
    never: dict[str, bool] = {}
    for standing in done:
        for name in standing.of("ours"):
            over = shown(standing, name)
            sooner = over is not None and over.interval is not None and over.interval[0] > 1
            never[name] = never.get(name, True) and not sooner
    slow = [f"`{name}`" for name, lost in never.items() if lost]
    same = [f"{EXACT[key]} {times:.2f}x" for key, times in exact(results).items() if times > 1.02]
    first = f"Sooner at AdamW's loss than AdamW at the same batch: {listed(winners)}"
    first += f"; on {listed(losers)} nothing of this library is shown to be." * bool(losers)
    return [
        first + "." * (not losers),
        f"Of this library's methods, sooner on no task that they were run on: {listed(slow)}.",
        f"Apart from these, with the same gradients a step is sooner of {listed(same)}.",
    ]


def page_one(device: str, done: Sequence[Standing], results: Path, picture: str) -> list[str]:
    rows = [" | ".join(row(standing)) for standing in done]
    return [
        f"![How much sooner than tuned AdamW, {device}]({picture})",
        table(HEADER, rows),
        "\n".join(sentences(done, results)),
    ]


def page(standing: Standing, picture: str) -> list[str]:
    """A workload: its chart, its sentences, its table of methods."""
    workload, level = standing.workload, standing.workload.within
    base, split = standing.own[BASE], standing.split()
    baseline = standing.best_baseline(level)
    shares = {part: split[part] / split["step"] for part in ("forward", "backward", "update")}
    head = (
        f"{workload.title}. The budget is {workload.steps} steps of AdamW at a batch of "
        f"{workload.batch}, {budget_of(workload, standing.times):.1f} seconds. Tuned AdamW has a "
        f"batch of {base.batch} and a rate of {base.rate:g}, and ends at a loss of "
        f"{standing.target:.4g}, the median of {len(standing.runs(base))} seeds. "
        f"The best baseline is `{baseline.name}`, batch {baseline.batch}."
    )
    limits = (
        "A step of AdamW is "
        + ", ".join(f"{share:.0%} {part}" for part, share in shares.items())
        + f": with a free backward pass it would be {1 / (1 - shares['backward']):.1f}x cheaper, "
        "so that more can only come from the batch, from fewer steps or from cheaper products."
    )
    rows = []
    order = sorted(standing.own, key=lambda name: -_mean(standing.same_batch(name, level)))
    for name in order:
        own = standing.own[name]
        missed, n = standing.missed(name, level), len(standing.runs(own))
        over = "-" if name == BASE else ratio(standing.same_batch(name, level))
        best = "-" if own == baseline else ratio(standing.over(baseline, own, level))
        price = "-" if name == BASE else gap(standing.price(name))
        cells = [name, arm_of(name).text, over, best, of(n - missed, n), price]
        of_base = (standing.memory(name), standing.cost(name))
        rows.append(" | ".join([*cells, *(number(share, ".2f") for share in of_base)]))
    header = f"method | what it does | {HEADER.split(' | ', 2)[2]} | a step of AdamW's"
    return [
        f"## {workload.name}",
        head,
        f"![{workload.name}]({picture})",
        table(header, rows),
        limits,
    ]


def _mean(over: Estimate | None) -> float:
    return over.mean if over is not None and over.mean is not None and not over.misses else 0.0


def raw(standing: Standing) -> list[str]:
    """Every method with its settings, all targets, what a step costs."""
    rows = []
    bases = [own for own in standing.bases.values() if own != standing.own[BASE]]
    for own in [*standing.own.values(), *bases]:
        runs, seconds = standing.runs(own), standing.step(own)
        losses = [loss for r in runs.values() if math.isfinite(loss := best(r))]
        against = standing.beside(own)
        ratios = [
            ratio(standing.over(against, own, level)) if own != against else "-" for level in LEVELS
        ]
        hits = [list(standing.hits(own, level).values()) for level in LEVELS]
        came = " / ".join(str(len(h) - h.count(None)) for h in hits)
        first = next((r for r in runs.values() if r["evals"]), None)
        flops = first["flops"].get("train") if first else None
        cells = [
            own.name, str(own.batch), f"{own.rate:g}{' (end)' * standing.edge(own)}",
            f"{own.share:g}", str(len(runs)), number(plain.median(losses) if losses else None),
            claim_of(standing, own), came, *ratios, number(seconds and 1e3 * seconds, ".3g"),
            number(flops and flops / 1e6, ".4g"), number(_mebibytes(standing.bytes(own)), ".4g"),
        ]  # fmt: skip
        rows.append(" | ".join(cells))
    levels = " | ".join(f"sooner, to {level:g} of the loss" for level in LEVELS)
    header = (
        "method | batch | rate | of the budget | seeds | lowest loss, median | may be said | "
        f"get there (1 / 1.02 / 1.05) | {levels} | ms a step | MFLOPs | MiB"
    )
    times = standing.times
    about = (
        f"Timed on {times['date']}, {times['cores']} cores, other processes on "
        f"{times['foreign_cores'] or 0:.2f}; revision {times['revision']}. A rate marked (end) is "
        "the lowest or the highest that was tried."
    )
    return [f"### {standing.workload.name}", about, table(header, rows)]


def claim_of(standing: Standing, own: Setting) -> str:
    if own.name == BASE:
        return "-"
    over = standing.same_batch(own.name, standing.workload.within)
    return "not timed" if over is None else claim(over.interval, over.misses)


def _mebibytes(size: float | None) -> float | None:
    return None if size is None else size / 2**20


def exact_blocks(results: Path) -> list[str]:
    found = exact(results)
    if not found:
        return []
    rows = [f"{EXACT[key]} | {times:.2f}x" for key, times in found.items()]
    return [
        "## Exact savings",
        "The same gradients to rounding, so that there is no target and no price but memory: "
        "`pp.exact.apply` and memory that is kept, whole training steps in turn, 2 cores.",
        table("a training step of | times sooner", rows),
    ]


def report_text(results: Path, evidence: Path) -> str:
    """`REPORT.md`, from the records alone."""
    blocks, details, tables = [TITLE], [], ["## Raw tables"]
    for name, folder in suites(evidence):
        done, left = standings(name, folder)
        if not done:
            continue
        device = folder.name.partition("-")[2]
        if name != "small":
            blocks.append(f"## On {device}")
        blocks += page_one(device, done, results, f"report/{folder.name}.png")
        if left:
            blocks.append(f"Not finished: {listed(left)}.")
        for standing in done:
            details += page(standing, f"report/{folder.name}-{standing.workload.name}.png")
            tables += raw(standing)
    if not details:
        blocks.append("There are no records yet.")
    blocks += [READING, *exact_blocks(results), *details, *tables]
    blocks += ablation_blocks(results) + speed_blocks(results)
    return "\n\n".join(blocks) + "\n"


def speed_blocks(results: Path) -> list[str]:
    """The tables of the speed benchmarks."""
    blocks = []
    for name in SPEED:
        for path in sorted((results / "speed").glob(f"{name}-*.json")):
            benchmark = importlib.import_module(f"benchmarks.speed.{name}")
            blocks.append(benchmark.markdown(json.loads(path.read_text(encoding="utf-8"))))
    return ["## Speed of single parts", *blocks] if blocks else []


def stands(evidence: Path) -> bool:
    """Whether every workload of `small` is finished, and timed on a quiet machine."""
    done, left = standings("small", evidence / "small-cpu")
    return bool(done) and not left


def readme_lines(evidence: Path) -> list[str]:
    """The three numbers of the README: the largest that may be said, ten seeds each."""
    found = []
    for standing in standings("small", evidence / "small-cpu")[0]:
        name = best_of(standing)
        over = shown(standing, name) if name else None
        if over is not None and over.interval is not None:
            found.append((over.interval[0], f"{standing.workload.name} {ratio(over)}"))
    return [text for _, text in sorted(found, reverse=True)[:3]]


def build(results: Path, evidence: Path, preview: Path | None = None) -> str:
    """Writes the report and, in the folder `report` beside it, its pictures.

    Args:
      results: the folder `benchmarks/results`.
      evidence: the folder of the suites' records.
      preview: where to write it instead, of what is finished.

    Returns:
      What was done, in a line.
    """
    if preview is None and not stands(evidence):
        left = standings("small", evidence / "small-cpu")[1]
        return (
            f"not finished, or not timed on a quiet machine: {', '.join(left)}; REPORT.md stays "
            "as it is. --preview FOLDER shows what is there"
        )
    out = results if preview is None else preview
    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (out / "REPORT.md").write_text(report_text(results, evidence), encoding="utf-8")
    for old in folder.glob("*.png"):
        old.unlink()
    for name, records in suites(evidence):
        done, _ = standings(name, records)
        if done:
            plot_overview(done, folder / f"{records.name}.png")
        for standing in done:
            plot_curves(standing, folder / f"{records.name}-{standing.workload.name}.png")
    return str(out / "REPORT.md")
