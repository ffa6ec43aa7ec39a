"""What a step that trains a part takes, over what it must do; and what starting costs.

Two models, AdamW, buffers donated:

- `stack`: 12 pre-norm blocks of width 256 in a `partial.Stack`, 8 x 64 tokens. One compiled
  program takes the numbers of the active blocks.
- `minilm`: a BERT of MiniLM's shape (6 blocks of width 384), 32 x 24 tokens, a program for each
  active set, as `partial.step` compiles them; `cached` are steps that find what the frozen blocks
  make of their batch in a `PrefixCache` in memory, looking it up included.

The ideal time of an arm is its FLOPs (see `program_flops`) over the full step's, times the full
step's milliseconds. Arms run in turns in one process, and three fresh processes a model; figures
are medians over processes. `start` is what `Trainer.train` spends on tracing and compiling up to
its first step, over the same for one plain jitted step. `long_run` is 300 steps of the stack under
a policy: programs, steps that trained something else than was asked for, and bytes of optimizer
state, as a share of those for all layers.

Run as `python -m benchmarks.speed.partial_steps`. Writes
`benchmarks/results/speed/partial_steps-<device>.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import priorityprop_jax as pp
from benchmarks.records import RESULTS, about, write
from priorityprop_jax.models.bert import BertClassifier, BertConfig

BLOCKS, WIDTH = 12, 256
MINILM = BertConfig(30522, 384, 6, 12, 1536)
SETS = {"top 2": (10, 11), "5 and 8": (5, 8), "0 and 3": (0, 3)}
STARTS = ("full", "suffix(1)", "lisa(2)", "badam(1)", "priority")


class Block(nnx.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attend(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Tower(nnx.Module):
    """Blocks in a stack."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.blocks = pp.partial.Stack([Block(WIDTH, rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.blocks(self.embed(x)).mean(1))


def setting(model: str) -> tuple[Any, Any]:
    """A model and a batch."""
    labels = np.arange(32 if model == "minilm" else 8) % 2
    if model == "minilm":
        tokens = np.random.default_rng(0).integers(1, 30522, (32, 24)).astype(np.int32)
        return BertClassifier(MINILM, rngs=nnx.Rngs(0)), {"x": tokens, "y": labels}
    x = np.random.default_rng(0).normal(size=(8, 64, WIDTH)).astype(np.float32)
    return Tower(nnx.Rngs(0)), {"x": x, "y": labels}


def loss_fn(model: Any, batch: Any) -> jax.Array:
    logits = model(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def plain(model: Any, batch: Any) -> tuple[Any, float]:
    """A hand-written step of everything, and the seconds that it takes to compile."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adamw(1e-4)
    carry = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def loss(params, batch):
        return loss_fn(nnx.merge(graph, params, jax.tree.map(lambda x: x, rest)), batch)

    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, batch).compile()
    seconds = time.perf_counter() - start

    def run() -> None:
        carry[0], carry[1], _ = compiled(*carry, batch)
        jax.block_until_ready(carry)

    return run, seconds


def steps(model: Any, batch: Any, policies: dict[str, Any], every: int = 10) -> dict[str, Any]:
    """For each policy a function that runs one step of the trainer's, and its FLOPs' share."""
    found = {}
    full = None
    for name, policy in policies.items():
        own, cache = nnx.clone(model), None
        if cached := name.endswith(", cached"):
            rows = len(batch["x"])
            cache = pp.partial.PrefixCache(None, examples=rows)
            own, batch = pp.partial.nnx_stages(own.stages()), batch | {"id": np.arange(rows)}
        make = pp.partial.step(policy, recalc_every=every, max_variants=16, cache=cache)
        trainer = pp.Trainer(own, optax.adamw(1e-4), loss_fn, make, progress=False)
        history = trainer.train([batch] * 3)  # the third finds what the second kept
        full = full or history.column("flops")[-1]
        step, (params, rest, state) = trainer.step, trainer._arrays()
        carry = [*jax.tree.map(jnp.copy, (params, rest, state))]
        placed = batch if cached else jax.tree.map(jnp.asarray, batch)

        def run(step=step, carry=carry, placed=placed) -> None:
            *carry[:], _ = step(*carry, placed)
            jax.block_until_ready(carry)

        found[name] = run, history.column("flops")[-1] / full, trainer
    return found


def measure(model: str, repeats: int) -> dict[str, Any]:
    """One process: milliseconds of every arm, in turns."""
    net, batch = setting(model)
    by_hand, _ = plain(net, batch)
    if model == "minilm":
        policies: dict[str, Any] = {f"suffix({k})": f"suffix({k})" for k in range(1, 6)}
        policies["lisa(2)"] = "lisa(2)"
        policies |= {f"suffix({k}), cached": f"suffix({k})" for k in (1, 3)}
    else:
        policies = {}
        for name, layers in SETS.items():
            active = frozenset(f"blocks[{i}]" for i in layers)
            policies[name] = lambda at, active=active: [active] * at.steps
    arms = steps(net, batch, {"full": "full"} | policies)
    runs = {"by hand": by_hand} | {name: run for name, (run, _, _) in arms.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 1:
                samples[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(times) for name, times in samples.items()}
    shares = {name: share for name, (_, share, _) in arms.items()}
    ratios = {name: ms[name] / (shares[name] * ms["by hand"]) for name in arms}
    programs = {name: trainer.get_step_report()["programs"] for name, (*_, trainer) in arms.items()}
    return {"milliseconds": ms, "share": shares, "over_ideal": ratios, "programs": programs}


def start(model: str, policy: str) -> dict[str, float]:
    """One process: seconds up to the first step, of a plain one and of a policy."""
    net, batch = setting(model)
    _, seconds = plain(net, batch)
    share = {"share": 0.5} if policy == "priority" else {}
    make = pp.partial.step(policy, **share)
    trainer = pp.Trainer(nnx.clone(net), optax.adamw(1e-4), loss_fn, make, progress=False)
    trainer.train([batch])
    mine = trainer.history.compile_seconds
    return {"plain_seconds": seconds, "seconds": mine, "ratio": mine / seconds}


def overhead(repeats: int) -> dict[str, float]:
    """Milliseconds a step of a small MLP, by hand and by the step of `full`, without waiting."""
    net = nnx.Sequential(*(nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(6)))
    batch = {"x": jnp.ones((4, 16)), "y": jnp.zeros(4, int)}
    by_hand, _ = plain(net, batch)
    (run, *_), (short, *_) = steps(net, batch, {"f": "full", "s": "suffix(1)"}, 100).values()
    found: dict[str, list[float]] = {"by hand": [], "full": [], "suffix(1)": []}
    for _ in range(repeats):
        for name, one in zip(found, (by_hand, run, short), strict=True):
            begin = time.perf_counter()
            for _ in range(100):
                one()
            found[name].append(10 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in found.items()}


def long_run(policy: str) -> dict[str, float]:
    """300 steps of a stack: programs, sets other than asked for, and bytes of the whole's."""
    net, batch = setting("stack")
    batch = {"x": batch["x"][:2, :16], "y": batch["y"][:2]}
    asked = []

    def watched(at: Any) -> Any:
        asked.extend(sets := pp.partial.make_policy(policy)(at))
        return sets

    make = pp.partial.step(watched, recalc_every=5, state="reset")
    trainer = pp.Trainer(net, optax.adamw(1e-4), loss_fn, make, progress=False)
    trainer.train([batch] * 300)
    report = trainer.get_step_report()
    ran = {frozenset(v["active"]): v["steps"] for v in report["variants"]}
    wanted = {names: asked.count(names) for names in asked}
    sizes = dict(zip(trainer.step.slots.names, trainer.step.slots.sizes, strict=True))
    held = sum(row["state_bytes"] for row in report["layers"])
    return {
        "programs": report["programs"],
        "steps_not_as_asked": sum(abs(wanted.get(names, 0) - n) for names, n in ran.items()),
        "sets": len(ran),
        "state_share": held / (8 * sum(sizes.values())),  # of two float32 moments of all
        "active_share": sum(sizes[name] for name in asked[-1]) / sum(sizes.values()),
    }


def fresh(*arguments: str) -> Any:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.speed.partial_steps", "--worker", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def middle(records: list[Any]) -> Any:
    """Medians over processes, number by number."""
    if isinstance(records[0], dict):
        return {key: middle([record[key] for record in records]) for key in records[0]}
    return statistics.median(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="counted runs of every arm")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each figure")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if options.worker:
        kind, *rest = options.worker
        jobs = {"measure": measure, "start": start, "overhead": overhead, "long_run": long_run}
        print(json.dumps(jobs[kind](*(int(x) if x.isdigit() else x for x in rest))))
        return
    several, repeats = range(options.processes), str(options.repeats)
    record = about("partial_steps", os.getloadavg())
    run = functools.partial(map, lambda arguments: fresh(*arguments))
    for model in ("stack", "minilm"):
        record[model] = middle(list(run([("measure", model, repeats) for _ in several])))
        print(model, json.dumps(record[model], indent=1), flush=True)
    record["overhead"] = middle(list(run([("overhead", "20") for _ in several])))
    print("overhead", record["overhead"], flush=True)
    record["long_run"] = {p: fresh("long_run", p) for p in ("lisa(2)", "badam(1)")}
    print("long_run", json.dumps(record["long_run"], indent=1), flush=True)
    record["start"] = {
        p: middle(list(run([("start", "minilm", p) for _ in several]))) for p in STARTS
    }
    print("start", json.dumps(record["start"], indent=1))
    write(options.out / f"partial_steps-{jax.devices()[0].platform}.json", record)


if __name__ == "__main__":
    main()
