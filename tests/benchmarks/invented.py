"""A suite with invented runs: what a method is worth in it is known."""

import json
import math

import numpy as np

from benchmarks.suite import harness, workloads

BATCHES = (8, 16, 32)
STEP = {8: 0.006, 16: 0.01, 32: 0.018}  # seconds of AdamW
SECONDS = {"sparse 90%": 0.5, "lean": 1.0, "muon": 1.5, "suffix, cached": 1.0}  # of AdamW's
SPEED = {"sparse 90%": 2.0, "muon": 1.5, "nadam": 1.1, "partial 0.5": 0.5}  # in steps
BEST_RUNG = {"sparse 90%": 6}  # far outside of the first three rates
ARMS = ["adamw", "adamw, shorter", "nadam", "muon", "random 0.5", "partial 0.5", "cautious"]
WORKLOADS = {
    "plain": {"arms": ARMS, "recipes": ["sparse 90%", "lean"]},
    "tuned": {
        "arms": ["adamw", "nadam"], "recipes": ["suffix, cached"], "fine_tuning": True,
        "options": {"tuning_rows": 100},
    },
}  # fmt: skip


def loss_of(name, batch, rate, share, seed, apart):
    """What a run comes down to: by its share of the seconds, its rate, and a little by its seed."""
    rung = 4 * math.log10(rate / 1e-3)
    speed = SPEED.get(name, 1.0) / SECONDS.get(name, 1.0)
    luck = 0.002 * np.random.default_rng(seed).normal()
    off = 0.02 * (rung - BEST_RUNG.get(name, 1)) ** 2 + 0.05 * (batch != 16)
    return 1 + math.exp(-2 * speed * share) + off + luck + 0.1 * apart


def fake_run(workload, name, batch, rate, seed, steps, tuning):
    per_step = STEP[batch] * SECONDS.get(name, 1.0)
    share = steps * per_step / (workload.steps * STEP[16])
    end = loss_of(name, batch, rate, share, seed, tuning and workload.fine_tuning)
    points, evals = 4 if tuning else workload.evaluations, []
    for i in range(1, points + 1):
        step = math.ceil(steps * i / points)
        loss = end + (1 - step / steps)
        phases = harness.phases(name, 10, step)
        evals.append({"step": step, "loss": loss, "accuracy": 1 - loss / 4, "phases": phases})
    failed = "the loss became NaN or infinite" if name == "cautious" else None
    return {
        "suite": workload.suite, "workload": workload.name, "arm": name, "batch": batch,
        "rate": rate, "seed": seed, "steps": steps, "evals": evals,
        "test": None if tuning else {"loss": end, "accuracy": 0.9 - 0.01 * (name == "muon")},
        "flops": {"train": 1e6}, "where": None, "failed": failed, "date": "2000-01-01",
        "revision": "abc",
    }  # fmt: skip


def times(workload, void=False):
    names = [n for n in workload.all_arms if n != "adamw, shorter"]
    seconds = {}
    for name in names:
        own = SECONDS.get(name, 1.0)
        kinds = ("filling", "cached") if name == "suffix, cached" else ("train",)
        seconds[name] = {str(b): dict.fromkeys(kinds, [own * STEP[b]] * 3) for b in BATCHES}
    compiling = {name: dict.fromkeys(map(str, BATCHES), 1.0) for name in names}
    peaks = {
        name: {str(b): {"train": 2**20 * (0.5 if name == "suffix, cached" else 1)} for b in BATCHES}
        for name in names
    }
    return {
        "workload": workload.name, "seconds": seconds, "void": void,
        "evaluation": {"tuning": 0.1, "validation": 0.1},
        "compile_seconds": compiling, "peak_bytes": peaks, "foreign_cores": 0.0, "cores": 2,
        "split": {"forward": [0.003], "gradient": [0.008], "step": [0.01]}, "date": "2000-01-01",
        "revision": "abc",
    }  # fmt: skip


def write_workloads(folder):
    """Their files, in the form of the suite's."""
    for name, more in WORKLOADS.items():
        numbers = {"title": f"Title of {name}, MLP, more", "task": "digits", "options": {}}
        numbers |= {"rate": 1e-3, "batches": BATCHES, "steps": 1000, "fine_tuning": False}
        path = folder / "small" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers | more))


def write_suite(root, monkeypatch):
    """All runs of it, below `root / "evidence"`; returns the folder of its records."""
    monkeypatch.setattr(workloads, "FOLDER", root / "workloads")
    monkeypatch.setattr(harness, "run_arm", fake_run)
    write_workloads(root / "workloads")
    path = root / "evidence" / "small-cpu"
    for name in WORKLOADS:
        workload = workloads.read_workload("small", name)
        harness.add_line(path / "times.jsonl", times(workload))
        harness.Training(workload, path).train()
    return path
