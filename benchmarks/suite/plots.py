"""The report's pictures: what a person looks at rather than reads."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import statistics
from benchmarks.suite.arms import BASE, arm_of
from benchmarks.suite.standing import Standing
from benchmarks.suite.statistics import Estimate

OURS, OTHERS, BLACK = "#0072B2", "0.5", "black"
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MOST = 6  # lines in a chart of curves, beside AdamW's


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def save(made: Any, path: Path) -> None:
    made.savefig(path, dpi=110, metadata={"Software": None})


def plot_overview(done: Sequence[Standing], path: Path) -> None:
    """Every task, every method: how much sooner than AdamW at the same batch, a line at 1x.

    Methods with too few runs that get there for an interval share a line: nothing is drawn of them,
    as a mean would say who was lucky.
    """
    rows: list[tuple[Standing, list[str], Estimate | None]] = []
    for standing in done:
        level, own = standing.workload.within, [name for name in standing.own if name != BASE]
        over = {name: standing.same_batch(name, level) for name in own}
        drawn = {name: found for name, found in over.items() if found and found.interval}
        short = {n: standing.missed(n, level) / len(standing.runs(standing.own[n])) for n in drawn}
        for name in sorted(drawn, key=lambda n: (short[n], -(drawn[n].mean or 0.0))):
            rows.append((standing, [name], drawn[name]))
        left = [name for name in own if name not in drawn]
        for ours in (True, False):
            names = [name for name in left if (arm_of(name).family == "ours") == ours]
            rows += [(standing, names, None)] if names else []
    made, (axes,) = figure(8.6, 1.6 + 0.21 * (len(rows) + 2.0 * len(done)))
    beside = axes.get_yaxis_transform()  # x in parts of the width, y in rows
    y, ticks, ends, before = -1.0, {}, [0.7, 1.5], None
    for standing, names, over in rows:
        name = names[0]
        if standing is not before:
            y += 1.0 if before is None else 2.0
            title = ", ".join(standing.workload.title.split(", ")[:2])
            axes.text(0.0, y, title, transform=beside, fontsize=9, fontweight="bold", va="center",
                      bbox={"color": "white", "pad": 1.5})  # fmt: skip
            before = standing
        y += 1.0
        colour = OURS if arm_of(name).family == "ours" else OTHERS
        if over is None or over.interval is None:
            ticks[y] = (f"fewer than {statistics.FEWEST} get there", colour, None)
            axes.text(0.01, y, ", ".join(names), transform=beside, color=colour,
                      fontsize=8, va="center",
                      bbox={"color": "white", "pad": 0.5, "ec": "none"})  # fmt: skip
            continue
        missed = standing.missed(name, standing.workload.within)
        weight = "bold" if name == standing.recipe() else None
        ticks[y] = (name, colour, weight)
        axes.plot(over.interval, (y, y), color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(over.mean, y, "o", color=colour, ms=5, mfc="white" if missed else colour)
        ends += over.interval
        note = f"{over.mean:.2f}x"
        if missed:
            note += f"; {missed} of {len(standing.runs(standing.own[name]))} fall short"
        axes.text(1.01, y, note, transform=beside, color=colour, fontsize=8, va="center",
                  fontweight=weight)  # fmt: skip
    axes.axvline(1, color=BLACK, lw=1.2, zorder=0)
    axes.set_xscale("log", base=2)
    left, right = min(ends) / 1.1, max(ends) * 1.1
    marks = [m for m in (0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 16) if left <= m <= right]
    axes.set_xlim(left, right)
    axes.set_xticks(marks, [f"{mark:g}x" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(list(ticks), [name for name, _, _ in ticks.values()], fontsize=8)
    for label, (_, colour, weight) in zip(axes.get_yticklabels(), ticks.values(), strict=True):
        label.set_color(colour)
        label.set_fontweight(weight or "normal")
    axes.set_ylim(y + 0.8, -0.8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("later  \N{LEFTWARDS ARROW}  tuned AdamW  \N{RIGHTWARDS ARROW}  sooner")
    made.suptitle(
        "How much sooner is the loss down where tuned AdamW ends?\n"
        "over AdamW at the same batch; blue: this library, grey: other ways; bands: 95 % intervals;"
        "\nhollow: some runs fall short",
        fontsize=10,
    )
    save(made, path)


def plot_curves(standing: Standing, path: Path) -> None:
    """Validation loss against seconds of training, median over seeds; the fastest methods."""
    level, made = standing.workload.within, None
    ranked = sorted(
        (name for name in standing.own if name != BASE and standing.seconds(standing.own[name])),
        key=lambda name: (
            standing.missed(name, level),
            plain.fmean(t for t in standing.hits(standing.own[name], level).values() if t)
            if any(standing.hits(standing.own[name], level).values())
            else math.inf,
        ),
    )
    made, (axes,) = figure(9, 4.6)
    values: list[float] = []
    for i, name in enumerate([BASE, *ranked[:MOST]]):
        own = standing.own[name]
        seconds: Any = standing.seconds(own)
        runs = [r for r in standing.runs(own).values() if not r["failed"]]
        if not runs:
            continue
        at = statistics.clock(runs[0], seconds)
        curve = [
            plain.median(r["evals"][k]["loss"] for r in runs if k < len(r["evals"]))
            for k in range(len(at))
        ]
        values += [v for v in curve if math.isfinite(v)]
        colour, width = (BLACK, 2.4) if name == BASE else (COLOURS[i - 1], 1.5)
        axes.plot(at, curve, label=f"{name}, batch {own.batch}", color=colour, lw=width)
    aim = level * standing.target
    axes.axhline(aim, color="0.6", lw=1, ls="--", zorder=0)
    axes.annotate("where tuned AdamW ends" + ", and 2 %" * (level > 1), (0.01, aim), (0, -3),
                  xycoords=("axes fraction", "data"), textcoords="offset points", color="0.4",
                  fontsize=8, va="top")  # fmt: skip
    values.sort()
    top = values[int(0.8 * (len(values) - 1))] if values else aim
    low = min([aim, *values[:1]])
    axes.set_ylim(low - 0.08 * (top - low or 1), top)
    axes.set_xlim(left=0)
    axes.set(xlabel="seconds of training", ylabel="validation loss, median of seeds")
    axes.set_title(standing.workload.title, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(made, path)
