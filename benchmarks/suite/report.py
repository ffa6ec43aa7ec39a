"""The suite's report: `REPORT.md` and its plots, made from the records alone.

The same records give the same text. What is missing (a timing, a target, enough seeds) is said in
place of the number.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite.ablations import ablation_blocks
from benchmarks.suite.details import pictures, suite_blocks
from benchmarks.suite.overview import chosen, overview_blocks, plot_overview
from benchmarks.suite.plots import PLOTS, plot_accuracy, plot_profile
from benchmarks.suite.standing import (
    Describe,
    accuracies,
    described_arms,
    load,
    profiles,
    standings,
)

TITLE = """\
# How much sooner

Generated from the records under `benchmarks/results`; a test fails where the two differ."""

READING = """\
# Details

How to read them: a ratio is the seconds to the target of one arm over another's on the same seed,
and its mean is geometric, with a 95 % percentile bootstrap over seeds. Seconds are steps times the
median seconds of a step, measured with all arms interleaved; they count training alone, not
compiling. An arm falls short on a seed where it never arrives. "≥" stands where the arm compared
with falls short on some seeds and is charged its whole budget. A ratio of an arm that falls short
is over the seeds that it reaches, and nothing may be claimed from it. "2x" may be said when the
interval's lower end is 2. With few seeds such intervals tend to be too narrow, and the fastest of
many arms is chosen on the seeds that it is shown on. "Random" is the arm's own random counterpart,
or else the random selection whose whole run costs nearest to the arm's. "(edge)" marks a learning
rate at an end of those that were tried: a better one may lie beyond. Combinations were chosen by
trying a few on the tuning seed and on up to two of the seeds that they are shown on. FLOPs are the
compiler's count, which takes the body of a loop once and native kernels not at all. Smoke runs are
not reported. The MNIST workloads are split in the order of the file, whose end is harder than its
middle, so that accuracies on the test rows lie below those on the validation rows."""

# Speed benchmarks, each with a function `markdown` of its record.
SPEED = ("highway", "meprop_lstm", "meprop_speed", "sparse_layers", "transform_overhead")


def report_text(results: Path, workloads: Path, describe: Describe = described_arms) -> str:
    """`REPORT.md`, from the records alone."""
    blocks, suites = [TITLE], load(results, workloads)
    if not suites:
        blocks.append("There are no records yet.")
    for suite in measured(suites):
        blocks += overview_blocks(suite, standings(suite, describe))
    blocks.append(READING)
    for suite in suites:
        make = ablation_blocks if suite["suite"] == "ablation" else suite_blocks
        blocks += make(suite, describe)
    if accuracies(results):
        blocks += [
            "## Accuracy against k",
            "meProp on MNIST's MLPs, from the archive of older benchmarks: test accuracy over the "
            "features kept in the backward pass; whiskers are one standard deviation over seeds.",
            "![Accuracy against k](report/accuracy-against-k.png)",
        ]
    blocks += speed_blocks(results)
    return "\n\n".join(blocks) + "\n"


def measured(suites: Sequence[Mapping]) -> list[Mapping]:
    """Those that say how soon a target is reached."""
    return [suite for suite in suites if suite["suite"] != "ablation"]


def speed_blocks(results: Path) -> list[str]:
    """The tables of the speed benchmarks."""
    blocks = []
    for name in SPEED:
        for path in sorted((results / "speed").glob(f"{name}-*.json")):
            benchmark = importlib.import_module(f"benchmarks.speed.{name}")
            blocks.append(benchmark.markdown(json.loads(path.read_text(encoding="utf-8"))))
    return ["## Speed of single parts", *blocks] if blocks else []


def build(results: Path, workloads: Path, out: Path, describe: Describe = described_arms) -> None:
    """Writes the report and, in the folder `report` beside it, its plots.

    Args:
      results: the folder `benchmarks/results`.
      workloads: the folder of the workloads' files, `SUITE/NAME.json`.
      out: of `REPORT.md`.
      describe: family and text of each arm of a workload.
    """
    out.write_text(report_text(results, workloads, describe), encoding="utf-8")
    folder = out.parent / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for suite in measured(load(results, workloads)):
        tuned = standings(suite, describe)
        if chosen(tuned):
            plot_overview(suite, tuned, folder / f"{suite['folder']}-overview.png")
        for standing in tuned:
            name = f"{suite['folder']}-{standing.workload['name']}"
            for kind in pictures(standing):
                PLOTS[kind](standing, folder / f"{name}-{kind}.png")
        if found := profiles(tuned):
            about = {arm: text for s in tuned for arm, text in s.arms.items()}
            plot_profile(found, about, folder / f"{suite['folder']}-profile.png")
    if found := accuracies(results):
        plot_accuracy(found, folder / "accuracy-against-k.png")
