"""The report's plots: what a person looks at rather than reads."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite import statistics
from benchmarks.suite.standing import BASE, SHORT, TARGETS, Standing

GROUPS = 16  # layers shown at most
# Okabe and Ito's colours, which the colour-blind tell apart; black is AdamW's.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LINES = {"baseline": "--", "random": ":"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def styles(families: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A line of its own for each arm: dashes say the family, colour and marker the arm."""
    found: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for arm, family in families.items():
        i = seen.setdefault(family, 0)
        seen[family] += arm != BASE
        found[arm] = {
            "color": "black" if arm == BASE else COLOURS[i % len(COLOURS)],
            "linestyle": LINES.get(family, "-"),
            "linewidth": 2.4 if arm == BASE or family == "combination" else 1.3,
            # Six colours and seven markers: no pair comes twice.
            "marker": "" if arm == BASE else MARKERS[i % len(MARKERS)],
            "markersize": 4,
        }
    return found


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def save(made: Any, path: Path) -> None:
    made.savefig(path, dpi=110, metadata={"Software": None})


def families(about: Mapping[str, Mapping]) -> dict[str, str]:
    return {arm: text["family"] for arm, text in about.items()}


def plot_curves(standing: Standing, path: Path) -> None:
    """The validation metric against seconds of training, median over seeds."""
    made, (axes,) = figure(9, 5)
    drawn, style = [], styles(families(standing.arms))
    for arm, runs in standing.runs.items():
        if arm not in standing.seconds:
            continue
        points: dict[float, list[float]] = {}
        for run in runs.values():
            for at, e in zip(
                statistics.clock(run, standing.seconds[arm]), run["evals"], strict=True
            ):
                points.setdefault(at, []).append(e["metric"])
        at = sorted(points)
        values = [plain.median(points[x]) for x in at]
        drawn += [v for v in values if math.isfinite(v)]
        axes.plot(at, values, label=arm, markevery=3, **style[arm])
    if standing.target:
        for which, dashes in zip(TARGETS, ("-", "--"), strict=True):
            aim = standing.target[which]
            axes.axhline(aim, color="0.6", lw=1, ls=dashes, zorder=0)
            axes.annotate(
                f"target: {SHORT[which]}",
                (0, aim),
                xycoords=("axes fraction", "data"),
                fontsize=7,
                color="0.4",
                va="bottom" if (which == "value") == standing.higher else "top",
            )
    # The first steps would squeeze what is to be seen into a corner.
    drawn.sort()
    if len(drawn) > 9:
        cut = len(drawn) // 4
        low, high = (drawn[cut], drawn[-1]) if standing.higher else (drawn[0], drawn[-cut])
        margin = 0.06 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    metric = standing.workload.get("metric", "metric")
    axes.set(xlabel="seconds of training", ylabel=f"validation {metric} (median of seeds)")
    axes.set_title(standing.workload["name"], fontsize=10)
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8, frameon=False)
    save(made, path)


def plot_speed_up(standing: Standing, path: Path) -> None:
    """Speed-ups over tuned AdamW to both targets, with intervals; misses in words."""
    arms = [arm for arm in standing.runs if arm != BASE]
    made, axes = figure(10, 1.4 + 0.3 * len(arms), columns=2)
    targets = standing.target or {}
    for which, axis in zip(TARGETS, axes, strict=True):
        ends = [0.5, 2.4]
        for y, arm in enumerate(arms):
            over = standing.over(BASE, arm, which)
            missed, n = standing.missed(arm, which), len(standing.runs[arm])
            if over is not None and over.mean is not None:
                colour = "0.55" if missed else "#0072B2"
                axis.plot(over.mean, y, "o", color=colour, mfc="white" if missed else colour, ms=6)
                if over.interval is not None:
                    axis.plot(over.interval, (y, y), color=colour, lw=2, zorder=1)
                ends += [over.mean, *(over.interval or ())]
            note = f"{missed} of {n} short" if missed else ""
            axis.annotate(
                note if over is not None else "not timed",
                (0.99, y),
                fontsize=7,
                va="center",
                xycoords=("axes fraction", "data"),
                ha="right",
                color="#D55E00",
            )
        axis.axvline(1, color="black", lw=1)
        axis.set_xscale("log", base=2)
        # Room at the right for the words.
        axis.set_xlim(min(ends) / 1.15, max(ends) * (max(ends) / min(ends)) ** 0.35)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_yticks(
            range(len(arms)), arms if which == "value" else [""] * len(arms), fontsize=8
        )
        axis.grid(axis="x", color="0.9")
        axis.set_title(f"to {targets[which]:.4g} ({SHORT[which]})", fontsize=9)
        axis.set_xlabel("times sooner than tuned AdamW", fontsize=8)
    made.suptitle(
        f"{standing.workload['name']}: 95 % intervals over paired seeds; hollow: some runs "
        "never arrive",
        fontsize=9,
    )
    save(made, path)


def grouped(shares: Mapping[str, float]) -> dict[str, float]:
    """The same by ever shorter paths, until few enough are left to be shown."""
    while len(shares) > GROUPS and any("/" in name for name in shares):
        depth = max(name.count("/") for name in shares)
        shorter: dict[str, float] = {}
        for name, share in shares.items():
            key = name.rpartition("/")[0] if name.count("/") == depth else name
            shorter[key] = shorter.get(key, 0.0) + share
        shares = shorter
    return dict(shares)


def plot_where(standing: Standing, path: Path) -> None:
    """Share of an arm's budget that went to each layer, mean over seeds."""
    rows: dict[str, dict[str, float]] = {}
    for arm, runs in standing.runs.items():
        own = [dict(r["where"]) for r in runs.values() if r.get("where")]
        for shares in own:
            for layer, share in shares.items():
                rows.setdefault(arm, {}).setdefault(layer, 0.0)
                rows[arm][layer] += share / len(own)
    # All arms are cut to the same depth.
    every = {layer: 0.0 for own in rows.values() for layer in own}
    kept = grouped(every)
    # Some arms have layers, others their leaves: a leaf is shown with its layer.
    kept = [name for name in kept if not any(name.startswith(f"{other}/") for other in kept)]
    shown = {
        arm: {
            name: sum(v for k, v in own.items() if k == name or k.startswith(name + "/"))
            for name in kept
        }
        for arm, own in rows.items()
    }
    made, (axes,) = figure(2.6 + 0.62 * len(kept), 1.9 + 0.32 * len(shown))
    table = [[own[name] for name in kept] for own in shown.values()]
    axes.imshow(table, cmap="cividis", vmin=0, aspect="auto")
    top = max(map(max, table)) or 1
    for y, line in enumerate(table):
        for x, share in enumerate(line):
            colour = "black" if share > 0.6 * top else "white"
            axes.text(
                x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour
            )
    axes.set_xticks(range(len(kept)), kept, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(shown)), shown, fontsize=8)
    axes.set_title(f"{standing.workload['name']}: where the budget went, %", fontsize=9)
    save(made, path)


def plot_profile(found: Mapping, about: Mapping[str, Mapping], path: Path) -> None:
    """Dolan and More's profiles, one panel a target."""
    made, axes = figure(11, 4.6, columns=len(found))
    style = styles(families(about))
    taus = [2 ** (i / 40) for i in range(121)]
    legend: dict[str, Any] = {}
    for (which, times), axis in zip(found.items(), axes, strict=True):
        for arm, share in statistics.performance_profile(times, taus).items():
            if share[-1]:  # the others would all lie on the line at 0
                options = style[arm] | {"markevery": 20}
                (line,) = axis.step(taus, share, where="post", **options)
                legend[f"{arm} ({len(times[arm])})"] = line
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        axis.set(ylim=(-0.03, 1.03), xlabel="time over the fastest arm's")
        axis.set_title(f"target: {SHORT[which]}", fontsize=9)
    axes[0].set_ylabel("share of problems solved")
    axes[-1].legend(
        legend.values(),
        legend,
        bbox_to_anchor=(1.01, 1),
        loc="upper left",
        fontsize=8,
        frameon=False,
        title="arm (problems),\nif it solves any here",
        title_fontsize=8,
    )
    save(made, path)


def plot_accuracy(found: Mapping[str, Mapping], path: Path) -> None:
    """Test accuracy over the share of features kept; dense as a line."""
    made, axes = figure(5 * len(found), 4, columns=len(found))
    for axis, (width, series) in zip(axes, found.items(), strict=True):
        kept = [name for name in series if not name.startswith("dense")]
        for i, (name, points) in enumerate(series.items()):
            x, y, spread = zip(*points, strict=True)
            if name in kept:
                axis.errorbar(
                    x,
                    y,
                    spread,
                    label=name,
                    capsize=3,
                    color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)],
                )
            else:
                axis.axhline(y[0], color="black", ls="--" if "," in name else "-", lw=1, label=name)
        axis.set_xscale("log")
        shares = sorted({share for name in kept for share, _, _ in series[name]})
        axis.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
        axis.set_xticks([], minor=True)
        axis.set_title(f"MLP of width {width}", fontsize=10)
        axis.set(xlabel="features kept in the backward pass", ylabel="test accuracy, %")
        axis.legend(fontsize=8, frameon=False)
    save(made, path)


PLOTS: dict[str, Callable[[Standing, Path], None]] = {
    "curves": plot_curves,
    "speed-up": plot_speed_up,
    "where": plot_where,
}
