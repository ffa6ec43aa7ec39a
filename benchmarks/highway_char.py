"""Training curves of highway backpropagation on characters, beside plain backpropagation's.

Two models on Tiny Shakespeare, batches of 16 windows, AdamW with a warm-up and a cosine decay, the
same for all arms, guard on:

- a narrow, deep pre-norm transformer over 64 characters, its blocks by `highway_nnx` with 1, 2 and
  4 rounds, along the identity and along measured residuals;
- a GRU over 128 characters, by `lean_rnn`, exact and with 1 and 2 rounds.

What is published is the validation loss by step, and how often the guard stopped the rounds of a
step. Clocks are not read: see `benchmarks.highway`. Run as `python -m benchmarks.highway_char`, and
with `--report` to show it again. Finished runs are kept in
`benchmarks/results/highway_char-<device>.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from benchmarks.records import about, read_lines, write
from priorityprop_jax.cli.tasks import CharRNN, CharTransformer, load_task
from priorityprop_jax.highway.scan import highway_nnx, highway_report
from priorityprop_jax.rnn.lean import lean_rnn

RATE, WARM_UP, EVERY = 2e-3, 100, 100
DEPTH, WIDTH, CONTEXT = 12, 64, 64

# By model: rounds (None: plain autodiff or, of a GRU, plain and lean) and residual.
ARMS: dict[str, dict[str, Any]] = {
    "transformer, plain": {"model": "transformer"},
    "transformer, 1 round": {"model": "transformer", "rounds": 1},
    "transformer, 2 rounds": {"model": "transformer", "rounds": 2},
    "transformer, 4 rounds": {"model": "transformer", "rounds": 4},
    "transformer, 2 rounds, measured": {
        "model": "transformer", "rounds": 2, "residual": "measured",
    },
    "transformer, 4 rounds, measured": {
        "model": "transformer", "rounds": 4, "residual": "measured",
    },
    "GRU, plain": {"model": "gru"},
    "GRU, lean": {"model": "gru", "lean": True},
    "GRU, 1 round": {"model": "gru", "lean": True, "rounds": 1},
    "GRU, 2 rounds": {"model": "gru", "lean": True, "rounds": 2},
}  # fmt: skip


def build(arm: dict[str, Any], vocabulary: int, seed: int) -> nnx.Module:
    rngs = nnx.Rngs(seed)
    if arm["model"] == "gru":
        model: Any = CharRNN(vocabulary, cell="gru", width=128, rngs=rngs)
        if arm.get("lean"):
            lean_rnn(model, iterations=arm.get("rounds"))
        return model
    return CharTransformer(vocabulary, width=WIDTH, depth=DEPTH, heads=4, rngs=rngs)


def logits(model: Any, tokens: Any, arm: dict[str, Any], probe: Any) -> Any:
    if "rounds" not in arm:
        return model(tokens)
    if arm["model"] == "gru":
        start = jnp.zeros((len(tokens), model.width))
        x = model.rnn(model.embed(tokens), initial_carry=start, probe=jnp.stack(probe))
        return model.head(x)
    x = model.embed(tokens) + model.position(np.arange(tokens.shape[1]))
    options = {"iterations": arm["rounds"], "residual": arm.get("residual", "identity")}
    return model.head(model.norm(highway_nnx(model.blocks, x, probe=probe, **options)))


def train(arm: dict[str, Any], steps: int, seed: int) -> dict:
    """Validation loss after every `EVERY` steps, and how many steps the guard cut short."""
    task = load_task("char-lm", seed=seed)
    vocabulary = task.model.head.out_features  # type: ignore[attr-defined]
    graph, params, rest = nnx.split(build(arm, vocabulary, seed), nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, min(WARM_UP, steps // 2), steps)
    tx = optax.adamw(schedule)

    length = CONTEXT if arm["model"] == "transformer" else None

    def loss(params, probe, batch):
        batch = {name: array[:, :length] for name, array in batch.items()}
        out = logits(nnx.merge(graph, params, rest), batch["x"], arm, probe)
        return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]).mean()

    @jax.jit
    def step(params, state, batch):
        grads, report = jax.grad(loss, argnums=(0, 1))(params, highway_report(), batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, report.stopped

    @jax.jit
    def evaluate(params, batch):
        return loss(params, highway_report(), batch)

    state, stopped, curve, done = tx.init(params), 0.0, {}, 0
    epoch = 0
    while done < steps:
        task.train_data.set_epoch(epoch)  # type: ignore[attr-defined]
        epoch += 1
        for batch in task.train_data:
            params, state, cut = step(params, state, batch)
            stopped += float(cut)
            done += 1
            if done % EVERY == 0 or done == steps:
                losses = [float(evaluate(params, b)) for b in task.eval_data if len(b["x"]) == 16]
                curve[str(done)] = statistics.mean(losses)
            if done == steps:
                break
    return {"validation": curve, "stopped_steps": int(stopped)}


def summary(runs: list[dict]) -> list[dict]:
    """By arm: mean validation loss at the end, its gap to the plain arm's, and the curve."""
    found: list[dict] = []
    for name in ARMS:
        own = [r for r in runs if r["arm"] == name]
        if not own:
            continue
        curve = {
            at: statistics.mean(r["validation"][at] for r in own) for at in own[0]["validation"]
        }
        plain = next((row for row in found if row["arm"] == name.split(",")[0] + ", plain"), None)
        last = list(curve.values())[-1]
        found.append(
            {"arm": name, "seeds": len(own), "curve": curve, "loss": last,
             "gap": last - (plain or {"loss": last})["loss"],
             "stopped": statistics.mean(r["stopped_steps"] for r in own) / own[0]["steps"]}
        )  # fmt: skip
    return found


def readme_table(record: dict) -> str:
    """The part of README.md that this benchmark's result is shown in."""
    rows = record["summary"]
    marks = [at for at in rows[0]["curve"] if int(at) in (200, 500, 1000)]
    lines = [
        f"Validation loss on characters (transformer of {DEPTH} blocks, width {WIDTH}, {CONTEXT} "
        "characters; GRU of 128, 128 characters; `python -m benchmarks.highway_char`):",
        "",
        f"| arm | seeds | {' | '.join(f'step {at}' for at in marks)} | to plain "
        "| steps cut by the guard |",
        f"| --- | ---: | {' | '.join('---:' for _ in marks)} | ---: | ---: |",
    ]
    for row in rows:
        losses = " | ".join(f"{row['curve'][at]:.3f}" for at in marks)
        lines.append(
            f"| {row['arm']} | {row['seeds']} | {losses} | {row['gap']:+.3f} "
            f"| {row['stopped']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="these alone")
    parser.add_argument("--report", action="store_true", help="show what was trained, and end")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    path = options.out / f"highway_char-{jax.default_backend()}.jsonl"
    if not options.report:
        work = [(seed, name) for seed in range(options.seeds) for name in options.arms or ARMS]
        for seed, name in tqdm(work, disable=None):
            known = {(r["arm"], r["seed"], r["steps"]) for r in read_lines(path)}
            if (name, seed, options.steps) not in known:
                record = {"arm": name, "seed": seed, "steps": options.steps}
                record |= train(ARMS[name], options.steps, seed)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    runs = [r for r in read_lines(path) if r["steps"] == options.steps]
    record = about("highway_char") | {"summary": summary(runs)}
    write(path.with_suffix(".json"), record)
    print(readme_table(record))


if __name__ == "__main__":
    main()
