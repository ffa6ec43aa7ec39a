"""Draws the pictures of the pages: `python -m docs.pictures` writes docs/img/*.svg."""

import ast
import json
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from benchmarks.records import RESULTS, read_lines
from benchmarks.suite.ablations import last_losses
from benchmarks.suite.standing import standing_of
from benchmarks.suite.statistics import Estimate, difference
from benchmarks.suite.workloads import read_workload
from priorityprop_jax import allocate
from priorityprop_jax.priority import repeats

SPENT, IDLE, FORWARD, LINE = "#d1495b", "#e7e9ee", "#30638e", "#3c4250"
# White behind the drawing keeps it readable on a dark page; the rest makes the bytes the same
# whenever it is drawn.
STYLE = {"font.size": 10, "svg.hashsalt": "priorityprop_jax", "text.color": LINE}
SAVE = {"format": "svg", "facecolor": "white", "metadata": {"Date": None}, "bbox_inches": "tight"}


def cycle() -> Figure:
    """Priorities, the allocation, and both schedules, as the library computes them."""
    names = ["head", "block 2", "block 1", "block 0", "embed"]
    priorities, budget, steps = np.array([4.0, 2.5, 1.5, 1.0, 0.5]), 30, 10
    granted = allocate(jnp.asarray(priorities), budget, min_updates=1, max_updates=20)

    figure = Figure(figsize=(11, 2.9), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True, width_ratios=[1, 1, 1.4, 1.4])
    places = np.arange(len(names))
    axes[0].barh(places, priorities, color=FORWARD)
    axes[0].set_title("priority of each slot")
    axes[0].set_yticks(places, names)
    axes[0].invert_yaxis()
    bars = axes[1].barh(places, granted, color=SPENT)
    axes[1].bar_label(bars, padding=2)
    axes[1].set_xlim(0, int(granted.max()) * 1.25)
    axes[1].set_title(f"allocation of {budget} updates")
    for axis, spread in zip(axes[2:], ["even", "nested"], strict=True):
        table = np.stack([repeats(granted, t, steps, spread=spread) for t in range(steps)], axis=1)
        for (row, column), count in np.ndenumerate(table):
            corner = (column - 0.46, row - 0.42)
            axis.add_patch(Rectangle(corner, 0.92, 0.84, color=SPENT if count else IDLE))
            if count:
                axis.text(column, row, str(count), ha="center", va="center", color="white")
        axis.set_xlim(-0.6, steps - 0.4)
        axis.set_title(f'updates at each step, "{spread}"')
        axis.set_xlabel("step of the cycle")
        axis.set_xticks(range(steps))
    for axis in axes:
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    for axis in axes[:2]:
        axis.set_xticks([])
    return figure


def _box(axis, x, y, label, color, text=LINE, width=1.3):
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.3), width, 0.6, boxstyle="round,pad=0.02", color=color
    )
    axis.add_patch(shape)
    axis.text(x, y, label, ha="center", va="center", color=text)


def _arrow(axis, start, end, color, style="-"):
    options = {"arrowstyle": "-|>", "mutation_scale": 12, "linestyle": style, "linewidth": 1.6}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **options))


def backward() -> Figure:
    """Which parts of a backward pass are run for two active sets of the same size."""
    stages = ["embed", "block 0", "block 1", "block 2", "head", "loss"]
    cases = [
        ("the last two active: the backward pass ends there", {3, 4}),
        ("an early one active: the chain back to it is paid too", {1, 4}),
    ]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, (title, active) in zip(figure.subplots(2, 1), cases, strict=True):
        deepest = min(active)
        for place, name in enumerate(stages):
            x = 2 * place
            on = place in active
            last = place == len(stages) - 1
            _box(axis, x, 1, name, "white" if last else SPENT if on else IDLE,
                 "white" if on else LINE)  # fmt: skip
            if not last:
                _arrow(axis, (x + 0.7, 1.15), (x + 1.3, 1.15), FORWARD)
                if place >= deepest:
                    _arrow(axis, (x + 1.3, 0.85), (x + 0.7, 0.85), SPENT)
                if on:
                    _arrow(axis, (x, 0.66), (x, 0.22), SPENT)
                    axis.text(x, 0.05, "gradient, update", ha="center", va="center", color=SPENT)
                elif place >= deepest:
                    axis.text(x, 0.4, "passes through", ha="center", va="center")
                else:
                    axis.text(x, 0.4, "no backward", ha="center", va="center")
        if deepest > 1:
            axis.text(2 * deepest - 3, 1.55, "outputs may come from a cache", ha="center")
        axis.set_title(title, loc="left")
        axis.set(xlim=(-0.9, 10.9), ylim=(-0.2, 1.75))
        axis.axis("off")
    handles = [
        Line2D([], [], color=FORWARD, label="forward"),
        Line2D([], [], color=SPENT, label="backward"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _matrix(axis, x, y, rows, columns, label, kept_rows=(), kept_columns=()):
    """A matrix with its upper left corner at (x, y), the kept part coloured."""
    size = 0.3
    for row in range(rows):
        for column in range(columns):
            kept = row in kept_rows or column in kept_columns
            corner = (x + size * column, y - size * (row + 1))
            axis.add_patch(
                Rectangle(corner, size, size, facecolor=SPENT if kept else IDLE, edgecolor="white")
            )
    axis.text(x + size * columns / 2, y + 0.1, label, ha="center", va="bottom")
    return x + size * columns


def meprop() -> Figure:
    """The two products of a linear layer's backward pass, with few output features kept."""
    kept, inputs, outputs, batch = (1, 6), 6, 9, 4
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axis = figure.subplots()

    def sign(x, text):
        axis.text(x + 0.3, 2.2, text, ha="center", va="center", fontsize=14)
        return x + 0.6

    x = _matrix(axis, 0, 2.8, batch, outputs, "output gradient $dy$", kept_columns=kept)
    x = sign(x, "·")
    x = _matrix(axis, x, 3.5, outputs, inputs, "$W^T$", kept_rows=kept)
    x = sign(x, "=")
    x = _matrix(axis, x, 2.8, batch, inputs, "input gradient $dx$", kept_columns=range(inputs))
    x += 1.2
    x = _matrix(axis, x, 3.1, inputs, batch, "$x^T$", kept_columns=range(batch))
    x = sign(x, "·")
    x = _matrix(axis, x, 2.8, batch, outputs, "$dy$", kept_columns=kept)
    x = sign(x, "=")
    x = _matrix(axis, x, 3.1, inputs, outputs, "weight gradient $dW$", kept_columns=kept)
    axis.set(xlim=(-0.1, x + 0.1), ylim=(0.6, 4), aspect="equal")
    axis.axis("off")
    return figure


def highway() -> Figure:
    """Which layers are at work when: plain backpropagation, and highway's rounds."""
    layers, rounds = 8, 2
    plain, at_once = np.eye(layers), np.ones((layers, rounds + 1))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[layers, rounds + 1])
    for axis, table in [(left, plain), (right, at_once)]:
        for (row, column), busy in np.ndenumerate(table):
            corner = (column - 0.46, row - 0.44)
            axis.add_patch(Rectangle(corner, 0.92, 0.88, color=SPENT if busy else IDLE))
        axis.set(xlim=(-0.6, table.shape[1] - 0.4), ylim=(layers - 0.4, -0.6))
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    left.set_title("plain: one layer waits for the next")
    left.set_xticks(range(layers), range(1, layers + 1))
    left.set_xlabel("products that wait for each other")
    left.set_yticks(range(layers), [f"layer {layer}" for layer in reversed(range(layers))])
    right.set_title(f"highway, k = {rounds}: all layers at once")
    labels = [*(f"round {i + 1}" for i in range(rounds)), "weights"]
    right.set_xticks(range(rounds + 1), labels)
    return figure


# Floors from the ground up: rooms from left to right, as (name, place, width, what is in it).
FLOORS = [
    [("core", 0, 12, "slots, names of leaves, depth of a program, gradients as rows")],
    [
        ("priority", 0.0, 4.6, "who deserves an update:\nscores, allocation, ledger"),
        ("rnn", 4.8, 4.4, "lean passes over time"),
    ],
    [
        ("training", 0.0, 1.8, "the loop around\nany step"),
        ("partial", 1.8, 1.8, "what is trained,\nonly"),
        ("meprop", 3.8, 1.8, "top k of output\ngradients"),
        ("exact", 5.6, 1.8, "the same gradients,\nsooner"),
        ("highway", 7.4, 1.8, "all layers\nat once"),
        ("sparse", 9.2, 1.4, "weights that are\nnot there"),
        ("models", 10.6, 1.4, "encoders\nand decoders"),
    ],
    [("cli", 0, 12, "train, finetune, report")],
]


def imports() -> dict[str, set[str]]:
    """Which room imports which, read from the package; what goes through another is left out."""
    package = Path(__file__).parents[1] / "priorityprop_jax"
    found: dict[str, set[str]] = {}
    for path in package.glob("*/**/*.py"):
        room = path.relative_to(package).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                if parts[0] == package.name and parts[1] != room:
                    found.setdefault(room, set()).add(parts[1])

    def below(room: str) -> set[str]:
        own = found.get(room, set())
        return own.union(*map(below, own))

    return {
        room: {one for one in own if not any(one in below(other) for other in own - {one})}
        for room, own in found.items()
    }


def house() -> Figure:
    """The rooms of the package on their floors, and who imports whom."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axis = figure.subplots()
    height, storey = 0.9, 1.7
    places = {}
    for floor, rooms in enumerate(FLOORS):
        for name, x, width, text in rooms:
            y = storey * floor
            places[name] = (x, y, width)
            shape = FancyBboxPatch(
                (x + 0.13, y), width - 0.26, height, boxstyle="round,pad=0.04", facecolor=IDLE,
                edgecolor=LINE,
            )  # fmt: skip
            axis.add_patch(shape)
            middle = x + width / 2
            axis.text(middle, y + 0.72, name, ha="center", va="center", weight="bold")
            axis.text(middle, y + 0.28, text, ha="center", va="center", fontsize=8.5)
    for room, own in imports().items():
        for other in own:
            (x, y, width), (left, under, wide) = places[room], places[other]
            if y == under:
                ends = (
                    (x + width - 0.13, left + 0.13) if left > x else (x + 0.13, left + wide - 0.13)
                )
                start, end = ((end, y + height / 2) for end in ends)
            else:
                at = (max(x, left) + min(x + width, left + wide)) / 2
                start, end = (at, y - 0.06), (at, under + height + 0.06)
            _arrow(axis, start, end, SPENT)
    axis.set(xlim=(-0.2, 12.2), ylim=(-0.2, storey * 3 + height + 0.2))
    axis.axis("off")
    return figure


# What budgets of updates, gradients and weights were handed out over, with a transformer.
GROUPS = {
    "leaves": {"priorityprop": "updates handed out by priority"},
    "layers": {"partial 0.5": "half of the backward pass, by priority",
               "random 0.5": "half of the backward pass, at random"},
    "elements": {"meprop 8%": "8 % of the features backward (meProp)",
                 "sparse 90%": "nine in ten weights left out"},
}  # fmt: skip


def found_over_adamw(task: str = "char-transformer") -> dict[str, tuple[float, Estimate]]:
    """How many times cheaper a step is than AdamW's at the same batch, and how much sooner a run.

    By method, of the records of the small suite.
    """
    standing = standing_of(read_workload("small", task), RESULTS / "evidence" / "small-cpu")
    assert standing is not None, "its runs are not finished"
    level = standing.workload.within
    return {n: (1 / standing.cost(n), standing.same_batch(n, level)) for n in standing.own}


def found() -> Figure:
    """What choosing was found to give, on an axis that has room for 200x."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axis = figure.subplots()
    known, y, ticks = found_over_adamw(), 0.0, {}
    record = json.loads((RESULTS / "muon" / "learning-cpu.json").read_text("utf-8"))
    arms = record["problems"]["characters, width 128"]["arms"]
    arm = arms["budget 1/4"]
    cheaper = arms["nadam"]["milliseconds"] / arm["milliseconds"]
    over = arm["over nadam"]
    rows = [(g, text, *known[name]) for g, own in GROUPS.items() for name, text in own.items()]
    sooner = Estimate(over["mean"], tuple(over["interval"]), 5)
    rows.append(("matrices", "Muon on a quarter of them, over NAdam", cheaper, sooner))
    before = None
    for group, text, step, sooner in rows:
        if group != before:
            y += 1.3
            ticks[y] = group
        y += 1.0
        before, ticks[y] = group, text
        axis.plot(step, y, "o", mfc="white", color=FORWARD, ms=7)
        if sooner.misses:
            arrived, seeds = sooner.pairs, sooner.pairs + sooner.misses
            axis.text(6, y, f"{arrived} of {seeds} runs arrive", va="center")
        else:
            axis.plot(sooner.interval, [y, y], color=SPENT, lw=5, alpha=0.35)
            axis.plot(sooner.mean, y, "o", color=SPENT, ms=7)
            least = "\N{GREATER-THAN OR EQUAL TO} " * bool(sooner.charged)
            axis.text(6, y, f"{least}{sooner.mean:.1f}x sooner", va="center", color=SPENT)
    axis.axvline(1, color=LINE, lw=1.2)
    axis.axvline(200, color=LINE, lw=1.2, ls="--")
    axis.text(190, 1.3, "200x", ha="right", va="center")
    axis.set(xscale="log", xlim=(0.6, 260), ylim=(y + 0.8, 0.4))
    axis.set_xticks([1, 2, 5, 10, 50, 200], ["1x", "2x", "5x", "10x", "50x", "200x"])
    axis.set_xticks([], minor=True)
    axis.set_yticks(list(ticks), list(ticks.values()))
    for label in axis.get_yticklabels():
        label.set_weight("bold" if label.get_text() in [row[0] for row in rows] else "normal")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=IDLE)
    axis.set_axisbelow(True)
    axis.spines[["top", "left", "right"]].set_visible(False)
    axis.set_xlabel("times that of tuned AdamW")
    key = [
        Line2D(
            [], [], marker="o", mfc="white", color=FORWARD, ls="", label="a step is so much cheaper"
        ),
        Line2D([], [], marker="o", color=SPENT, ls="", label="its training arrives so much sooner"),
    ]
    figure.legend(handles=key, loc="outside upper center", ncols=2, frameon=False)
    return figure


# Arms of the ablations, all but the first with half of its updates.
ABLATED = {
    "adamw": "AdamW, all of the updates",
    "magnitude gain": 'magnitude="gain"',
    "magnitude norm": 'magnitude="norm"',
    "uniform, nadam inside": "evenly, NAdam",
    "random": "at random",
    "default": "PriorityProp's mean |gradient|",
    "depth_base 1.0": "the same without its depth factor",
    "no count discount": "the same without its count discount",
}


TASKS = {
    "digits": (FORWARD, "digits"),
    "mnist-mlp": (SPENT, "MNIST"),
    "char-transformer": ("#3d8361", "characters, transformer"),
    "char-gru": ("#c98b2b", "characters, GRU"),
}


def over(base: str, arms: Iterable[str]) -> dict[str, dict[str, Estimate]]:
    """By task and arm: how much lower the last validation loss is than that of another arm."""
    runs, found = read_lines(RESULTS / "evidence/ablation-cpu/runs.jsonl"), {}
    for task in dict.fromkeys(run["workload"] for run in runs):
        last = last_losses([run for run in runs if run["workload"] == task])
        known = last.keys() & set(arms) if base in last else ()
        found[task] = {arm: difference(last[base], last[arm]) for arm in arms if arm in known}
    return found


def ablation() -> Figure:
    """Which factor of the priority earns anything, over handing the same updates out evenly."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axis, places = figure.subplots(), np.arange(len(ABLATED))
    found = over("uniform", ABLATED)
    for beside, (task, (color, name)) in zip((-0.3, -0.1, 0.1, 0.3), TASKS.items(), strict=True):
        rows = [found[task][arm] for arm in ABLATED]
        low, high = np.array([row.interval for row in rows]).T
        axis.hlines(places + beside, low, high, color=color, lw=5, alpha=0.35)
        axis.plot([row.mean for row in rows], places + beside, "o", color=color, ms=6, label=name)
    axis.axvline(0, color=LINE, lw=1.2)
    axis.set_yticks(places, ABLATED.values())
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=IDLE)
    axis.set_axisbelow(True)
    axis.spines[["top", "left", "right"]].set_visible(False)
    axis.set_xlabel("worse  \u2190  validation loss below that of even updates  \u2192  better")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


# Titles, records and blocks of what was fine-tuned, and names of ways that are not last blocks.
TUNED = (
    ("SmolLM2, once over 2,000 sentences", "smollm2-135m-sst2-1-epochs", 30),
    ("MiniLM, the same", "minilm-sst2-1-epochs", 6),
)
WAYS = {
    "full": "all {}", "lora:8": "LoRA", "lisa:2": "LISA", "badam:1": "BAdam",
    "badam:1 every 4": "BAdam", "priority": "by priority",
}  # fmt: skip


def last_blocks() -> Figure:
    """What it costs to fine-tune the last blocks, or in another way, and what that reaches."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axis, (title, name, blocks) in zip(figure.subplots(1, 2), TUNED, strict=True):
        path = RESULTS / f"finetune_llm/learning-{name}-cpu.json"
        arms = json.loads(path.read_text("utf-8"))["arms"]
        places = {arm: (100 * found["of_full_time"], found["loss"]) for arm, found in arms.items()}
        last = sorted((arm for arm in places if arm.startswith("suffix")), key=places.__getitem__)
        axis.axhline(places["full"][1], color=LINE, lw=1, ls=":")
        axis.plot(*zip(*(places[arm] for arm in [*last, "full"]), strict=True), color=SPENT, lw=1.5)
        for arm, (x, y) in places.items():
            on = arm == "full" or arm in last
            axis.plot(x, y, "o", color=SPENT if on else FORWARD, mfc=None if on else "white", ms=7)
            label = WAYS.get(arm, arm.replace("full", "all").replace("suffix:", "last "))
            place, side = ((4, 6), "left") if on else ((0, -16), "center")
            # Beside BAdam; and beside what begins in full.
            apart = {"priority": ((-7, -4), "right"), "lora:8": ((7, -2), "left")}
            place, side = apart.get(arm, (place, side))
            axis.annotate(label.format(blocks), (x, y), place, textcoords="offset points", ha=side)
        axis.set(xlim=(0, 120), xlabel="time of the training, % of that of all blocks", title=title)
        axis.margins(y=0.15)
        axis.grid(color=IDLE)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss on held-out sentences")
    return figure


def write(folder: Path) -> None:
    """Writes all pictures into a folder."""
    with matplotlib.rc_context(STYLE):
        for draw in (cycle, backward, meprop, highway, house, found, ablation, last_blocks):
            draw().savefig(folder / f"{draw.__name__}.svg", **SAVE)


if __name__ == "__main__":
    write(Path(__file__).parent / "img")
