"""The ways to train that are compared, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

BASE = "adamw"
SHORTER = "adamw, shorter"
FAMILIES = ("baseline", "random", "ours")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      text: what it does, in a line.
      family: one of `FAMILIES`; `random` is selection at equal budget.
      optimizer: `adamw`, `nadam`, `cautious`, `muon`, `schedule_free`, `priorityprop` or
        `scale_by_priority`.
      options: of the optimizer.
      edits: what is done to the model before training, in order: (name, options).
      rows: whether gradients are meProp's rows, and the optimizer row-sparse Adam.
      policy: of a budget of compute; None without one.
      backward: share of the backward pass that the policy may spend on average.
      cached: whether outputs in front of the first active layer come from a cache.
    """

    text: str
    family: str = "ours"
    optimizer: str = "adamw"
    options: tuple[tuple[str, Any], ...] = ()
    edits: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    rows: bool = False
    policy: str | None = None
    backward: float = 1.0
    cached: bool = False


def edit(name: str, **options: Any) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return name, tuple(sorted(options.items()))


def options(**given: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(given.items()))


NINETY, LEAN = edit("sparse", sparsity=0.9), edit("lean")

ARMS: dict[str, Arm] = {
    # What anyone has without this library, but that Muon is here the one that is quicker a step.
    BASE: Arm("AdamW, the whole budget", "baseline"),
    SHORTER: Arm("AdamW, its schedule decayed in a part of the budget", "baseline"),
    "adamw b1 0.8": Arm("AdamW, a shorter memory", "baseline", options=options(b1=0.8)),
    "adamw b1 0.95": Arm("AdamW, a longer memory", "baseline", options=options(b1=0.95)),
    "nadam": Arm("AdamW with Nesterov's momentum", "baseline", "nadam"),
    "cautious": Arm("AdamW, no step against the gradient's sign", "baseline", "cautious"),
    "muon": Arm("Muon on the matrices, NAdam on the rest", "baseline", "muon", options(budget=1.0)),
    "schedule-free": Arm(
        "schedule-free AdamW: warm-up, then a constant rate", "baseline", "schedule_free"
    ),
    "lora": Arm("LoRA of rank 8 on the linear layers", "baseline", edits=(edit("lora", rank=8),)),
    "suffix": Arm("the output half of the layers alone", "baseline", policy="suffix(half)"),
    "random 0.5": Arm(
        "layers drawn at random, half of the backward pass", "random", policy="random", backward=0.5
    ),
    "random meprop 8%": Arm(
        "8 % of each layer's features, drawn at random", "random",
        edits=(edit("meprop", k=0.08, pattern="random"),), rows=True,
    ),
    # This library's.
    "muon 1/4": Arm(
        "Muon on a quarter of the matrices a step", "ours", "muon", options(budget=0.25)
    ),
    "suffix, cached": Arm(
        "the output half alone, outputs of the frozen half from a cache",
        policy="suffix(half)", cached=True,
    ),
    "scale_by_priority": Arm(
        "AdamW's updates times what the priority grants each leaf", optimizer="scale_by_priority"
    ),
    "priorityprop": Arm(
        "AdamW, as many updates in all, handed out by priority", optimizer="priorityprop"
    ),
    "partial 0.5": Arm(
        "layers chosen by priority, half of the backward pass", policy="priority", backward=0.5
    ),
    "meprop 8%": Arm(
        "8 % of each layer's features backward", edits=(edit("meprop", k=0.08),), rows=True
    ),
    "sparse 90%": Arm("nine in ten weights left out, fixed places", edits=(NINETY,)),
    "lean": Arm("exact gradients, the lean backward pass over time", edits=(LEAN,)),
    "highway": Arm("highway backpropagation: one round", edits=(edit("highway", iterations=1),)),
    # Several at once: the candidates for a workload's recipe.
    "sparse 80%": Arm("four in five weights left out", edits=(edit("sparse", sparsity=0.8),)),
    "sparse 90% + nadam": Arm(
        "nine in ten weights left out, NAdam", optimizer="nadam", edits=(NINETY,)
    ),
    "lean + nadam": Arm("the lean backward pass, NAdam", optimizer="nadam", edits=(LEAN,)),
    "lean + muon 1/4": Arm(
        "the lean backward pass, Muon on a quarter of the matrices",
        optimizer="muon", options=options(budget=0.25), edits=(LEAN,),
    ),
}  # fmt: skip


def ablated(text: str, family: str = "ours", **changed: Any) -> Arm:
    """PriorityProp around AdamW at half of the full budget of updates, one thing changed."""
    chosen = options(**{"total_budget": 0.5, **changed})
    return Arm(text, family, "priorityprop", chosen)


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
    "in turn": ablated("whoever is most updates behind", "baseline", score="robin"),
    "b1 0.8": ablated("the default around a shorter memory", inner="adamw b1 0.8"),
    "uniform, b1 0.8": ablated(
        "the same updates for every leaf", "baseline", inner="adamw b1 0.8", score="uniform"
    ),
    "nadam inside": ablated("the default around NAdam", inner="nadam"),
    "uniform, nadam inside": ablated(
        "the same updates for every leaf", "baseline", inner="nadam", score="uniform"
    ),
    "budget 0.25": ablated("the default with a quarter of the updates", total_budget=0.25),
    "uniform, budget 0.25": ablated(
        "uniform with a quarter of the updates", "baseline", score="uniform", total_budget=0.25
    ),
    # Who has a turn where an update is dear; "muon 1/4" is in turn.
    "muon 1/4, random": Arm(
        "a quarter of the matrices, drawn", "random", "muon", options(budget=0.25, score="random")
    ),
    "muon 1/4, priority": Arm(
        "by mean |momentum| x (1 / count)", "ours", "muon",
        options(budget=0.25, score="priorityprop"),
    ),
    "muon 1/4, change": Arm(
        "by how much it changed since its turn", "ours", "muon",
        options(budget=0.25, score="change"),
    ),
}  # fmt: skip


def arm_of(name: str) -> Arm:
    known = ARMS | ABLATIONS
    if name not in known:
        raise ValueError(f"no arm {name!r}; the arms are {', '.join(known)}")
    return known[name]
