"""Before an arm is timed it proves that it does what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.suite.arms import Arm, arm_of, edit
from benchmarks.suite.runners import CYCLE, CompiledRun, TrainerRun, build
from benchmarks.suite.workloads import Stream, Workload, load
from priorityprop_jax.core.paths import path_name

STEPS = 4


class NotEngaged(Exception):
    """An arm does not do what it says."""


def full(arm: Arm) -> Arm | None:
    """The arm at its exact setting, where it is plain AdamW to rounding; None if it has none."""
    plain = ("adamw", "priorityprop", "scale_by_priority")
    if arm.optimizer not in plain or "b1" in dict(arm.options) or "lora" in dict(arm.edits):
        return None
    if arm.cached:
        return None  # outputs from a cache are rounded
    exact: dict[str, Any] = {}
    if arm.optimizer in ("priorityprop", "scale_by_priority"):
        exact["options"] = (("max_updates", CYCLE), ("min_updates", CYCLE))
    if arm.policy is not None:
        exact |= {"policy": "full", "backward": 1.0}
    edits = []
    for name, _ in arm.edits:
        edits.append(
            {
                "meprop": edit("meprop", k=1.0),
                "sparse": edit("sparse", sparsity=0.0, places="largest"),
                "highway": edit("highway", iterations=10_000),
                "lean": edit("lean"),
            }[name]
        )
    return dataclasses.replace(arm, edits=tuple(edits), **exact)


def prove(workload: Workload, name: str) -> dict[str, Any]:
    """What was seen of an arm in a few steps.

    Returns:
      `flops` and `dense_flops` of a step, `unchanged`: the share of the parameters' numbers that
      are bit-identical after these steps, and `full`: the largest relative difference of the loss
      to plain AdamW's at the exact setting, None where there is none.

    Raises:
      NotEngaged: the exact setting is not AdamW, or nothing is saved where something should be.
    """
    arm, rows = arm_of(name), load(workload)[0]
    plain = Arm("")
    batches = Stream(rows, workload.batch, 0).take(STEPS)

    def trained(arm: Arm) -> Any:
        run = build(workload, name, workload.batch, workload.rate, 0, workload.steps, arm)
        before = _numbers(run.params())
        run.train(batches)
        return run, before, _numbers(run.params())

    dense, _, _ = trained(plain)
    wanted = dense.evaluate(rows.validation)["loss"]
    run, before, after = trained(arm)
    same = sum(int((before[name] == after[name]).sum()) for name in before.keys() & after.keys())
    found: dict[str, Any] = {
        "workload": workload.name, "arm": name, "steps": STEPS,
        "flops": run.flops["train"], "dense_flops": dense.flops["train"],
        "unchanged": same / max(1, sum(map(np.size, before.values()))), "full": None,
    }  # fmt: skip
    exact = full(arm)
    if exact is not None:
        twin, _, _ = trained(exact)
        loss = twin.evaluate(rows.validation)["loss"]
        found["full"] = abs(loss - wanted) / abs(wanted)
        if found["full"] > 1e-3:
            raise NotEngaged(f"{name}: at its exact setting the loss is {loss}, AdamW's {wanted}")
    frozen = arm.policy is not None and arm.policy.startswith("suffix")
    recurrent = workload.task in ("char-lm", "pos-tag")  # all rows of a small cell come up soon
    if (frozen or (arm.rows and not recurrent)) and not found["unchanged"]:
        raise NotEngaged(f"{name}: every parameter has changed")
    # Custom kernels and loops are not in the compiler's count, so only these two kinds are held to.
    if isinstance(run, TrainerRun) and arm.policy != "full" and run.share >= 1:
        raise NotEngaged(f"{name}: costs {run.share:.0%} of the FLOPs of full steps")
    if isinstance(run, CompiledRun) and arm.rows and found["flops"] >= found["dense_flops"]:
        raise NotEngaged(f"{name}: as many FLOPs as the dense step")
    return found


def _numbers(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): np.array(leaf) for path, leaf in leaves}
