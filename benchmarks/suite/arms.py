"""The ways to train that are compared, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.suite.workloads import Workload

FAMILIES = ("baseline", "random", "ours", "combination")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      text: what it does, in a line.
      family: `baseline`, `random` (selection at equal budget), `ours` or `combination`.
      examples: seen in a run, as a fraction of those of the full budget.
      batch: rows in a batch, as a fraction of the workload's.
      optimizer: `adamw`, `muon`, `schedule_free`, `priorityprop` or `scale_by_priority`.
      options: of the optimizer.
      edits: what is done to the model before training, in order: (name, options).
      rows: whether gradients are meProp's rows, and the optimizer row-sparse Adam.
      policy: of a budget of compute; None without one.
      backward: share of the backward pass that the policy may spend on average.
      top_k: whether the budget decides k of each meProp layer: the share of their backward pass.
      cached: whether outputs in front of the first active layer come from a cache.
      pruned: of the rows whose last loss is below the mean, the share that an epoch leaves out;
        the others stand for them (InfoBatch, Qin et al., 2023, arXiv 2303.04947).
    """

    text: str
    family: str = "ours"
    examples: float = 1.0
    batch: float = 1.0
    optimizer: str = "adamw"
    options: tuple[tuple[str, Any], ...] = ()
    edits: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    rows: bool = False
    policy: str | None = None
    backward: float = 1.0
    top_k: float | None = None
    cached: bool = False
    pruned: float = 0.0

    def steps(self, workload: Workload) -> int:
        return max(
            1, round(workload.steps * self.examples * workload.batch / self.rows_of(workload))
        )

    def rows_of(self, workload: Workload) -> int:
        return max(1, round(workload.batch * self.batch))


def edit(name: str, **options: Any) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return name, tuple(sorted(options.items()))


ARMS: dict[str, Arm] = {
    "adamw": Arm("AdamW at the full budget", "baseline"),
    "adamw, half the steps": Arm("AdamW, its schedule decayed in half the steps", "baseline", 0.5),
    "adamw, quarter batch": Arm(
        "AdamW at a quarter of the batch and four times the steps: equal FLOPs", "baseline", 1, 0.25
    ),
    "muon": Arm("Muon on the matrices, Adam on the rest", "baseline", optimizer="muon"),
    "schedule-free": Arm(
        "schedule-free AdamW: warm-up, then a constant rate", "baseline", optimizer="schedule_free"
    ),
    "lora": Arm("LoRA of rank 8 on the linear layers", "baseline", edits=(edit("lora", rank=8),)),
    "suffix": Arm("the output half of the layers alone", "baseline", policy="suffix(half)"),
    "suffix, cached": Arm(
        "the output half alone, outputs of the frozen half from a cache, twice the steps",
        "ours", 2.0,
        policy="suffix(half)", cached=True,
    ),
    "random 0.5": Arm(
        "layers drawn at random each cycle, half of the backward pass", "random",
        policy="random", backward=0.5,
    ),
    "scale_by_priority": Arm(
        "AdamW's updates times what the priority grants each leaf", optimizer="scale_by_priority"
    ),
    "priorityprop": Arm(
        "AdamW, as many updates in all, handed out by priority", optimizer="priorityprop"
    ),
    "partial 0.25": Arm(
        "layers chosen by priority, a quarter of the backward pass", policy="priority",
        backward=0.25,
    ),
    "partial 0.5": Arm(
        "layers chosen by priority, half of the backward pass", policy="priority", backward=0.5
    ),
    "meprop 8%": Arm(
        "meProp with 8 % of each layer's features, row-sparse Adam",
        edits=(edit("meprop", k=0.08),), rows=True,
    ),
    "random meprop 8%": Arm(
        "the same, features drawn at random", "random",
        edits=(edit("meprop", k=0.08, pattern="random"),), rows=True,
    ),
    "meprop budget 0.1": Arm(
        "meProp, k of each layer by priority, a tenth of the backward pass",
        edits=(edit("meprop", k=(0.025, 0.05, 0.1, 0.2, 0.4)),), top_k=0.1,
    ),
    "sparse 90%": Arm(
        "nine in ten weights left out, fixed places", edits=(edit("sparse", sparsity=0.9),)
    ),
    "sparse 95%": Arm(
        "nineteen in twenty weights left out, fixed places", edits=(edit("sparse", sparsity=0.95),)
    ),
    "lean": Arm("exact gradients by the lean backward pass over time", edits=(edit("lean"),)),
    "highway": Arm("highway backpropagation: one round", edits=(edit("highway", iterations=1),)),
}  # fmt: skip


def ablated(text: str, family: str = "ours", **options: Any) -> Arm:
    """PriorityProp around AdamW at half of the full budget of updates, one thing changed."""
    chosen = {"total_budget": 0.5, **options}
    return Arm(text, family, optimizer="priorityprop", options=tuple(sorted(chosen.items())))


# What PriorityProp's factors are worth: half of the updates, the same number for all.
ABLATIONS: dict[str, Arm] = {
    "uniform": ablated(
        "the same updates for every leaf", "baseline", score="uniform"
    ),
    "random": ablated(
        "scores drawn anew each cycle", "random",
        magnitude="random", count_discount=False, depth_base=1.0,
    ),
    "default": ablated("mean |gradient| x (1 / count) x 1.1 ** depth"),
    "magnitude norm": ablated("the gradient's norm in place of its mean", magnitude="norm"),
    "magnitude gain": ablated("the promised decrease of the loss", magnitude="gain"),
    "no magnitude": ablated("(1 / count) x 1.1 ** depth alone", magnitude="constant"),
    "no count discount": ablated("mean |gradient| x 1.1 ** depth", count_discount=False),
    "magnitude alone": ablated("mean |gradient|", count_discount=False, depth_base=1.0),
    "depth_base 1.0": ablated("no depth factor", depth_base=1.0),
    "depth_base 0.9": ablated("the depth factor turned round", depth_base=0.9),
    "depth_base 2.0": ablated("a strong depth factor", depth_base=2.0),
    "spread nested": ablated("updates packed to the front of a cycle", spread="nested"),
    "budget 0.25": ablated("the default with a quarter of the updates", total_budget=0.25),
    "uniform, budget 0.25": ablated(
        "uniform with a quarter of the updates", "baseline", score="uniform", total_budget=0.25
    ),
}  # fmt: skip

# By workload, the best way that was found by trying; of `sst2` it is "suffix, cached".
COMBINATIONS: dict[str, Arm] = {
    "mnist-mlp": Arm(
        "four in five weights left out, a quarter more steps", "combination", 1.25,
        edits=(edit("sparse", sparsity=0.8),),
    ),
    "char-transformer": Arm(
        "nine in ten weights left out, half of the batch, 0.85 of the examples", "combination",
        0.85, 0.5, edits=(edit("sparse", sparsity=0.9),),
    ),
    "char-gru": Arm(
        "the exact lean backward pass over time, a quarter of the batch, 0.85 of the examples",
        "combination", 0.85, 0.25, edits=(edit("lean"),),
    ),
    "pos-tag": Arm(
        "the exact lean backward pass over time, a quarter of the batch, four times the steps",
        "combination", 1.0, 0.25, edits=(edit("lean"),),
    ),
}  # fmt: skip


def arm_of(workload: Workload, name: str) -> Arm:
    if name == "combination" and workload.name in COMBINATIONS:
        return COMBINATIONS[workload.name]
    if name in ABLATIONS:
        return ABLATIONS[name]
    if name not in ARMS:
        raise ValueError(
            f"no arm {name!r}; the arms of {workload.name} are {', '.join(workload.arms)}"
        )
    return ARMS[name]


def describe(workload: Workload) -> dict[str, dict[str, str]]:
    """Family and text of each arm of a workload, for the report."""
    arms = {name: arm_of(workload, name) for name in workload.arms}
    return {name: {"family": arm.family, "text": arm.text} for name, arm in arms.items()}
