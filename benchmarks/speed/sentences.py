"""What all exact savings together bring to fine-tuning a BERT on sentences.

All of MiniLM on SST-2, 32 sentences a step, AdamW, buffers donated: as one writes it, each sentence
padded to 64 tokens or cut and padded to 24, against `exact.keep_memory`, `training.buckets` of at
most four lengths, `exact.apply`, `exact.embed_rows` and `exact.row_adam` together. Batches of a
bucket hold sentences of about one length; what each sentence adds to a gradient is the same.

Milliseconds are for a pass over 512 sentences, each arm in a fresh process of its own, in turn;
figures are medians over rounds. Run as `python -m benchmarks.speed.sentences`. Writes
`benchmarks/results/speed/sentences-<device>.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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

from benchmarks.records import RESULTS, about, write
from benchmarks.suite.workloads import shortened
from priorityprop_jax import exact
from priorityprop_jax.cli.main import keep_programs
from priorityprop_jax.cli.tasks import sst2
from priorityprop_jax.training import ArrayLoader, buckets

ROWS, TABLE, RATE = 32, "embed/word/embedding", 1e-5
LENGTHS = (64, 24)


def loss_fn(model: Any, batch: Any) -> jax.Array:
    logits = model(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def loader_of(x: np.ndarray, y: np.ndarray, savings: bool) -> Any:
    if not savings:
        return ArrayLoader({"x": x, "y": y}, ROWS, shuffle=True, drop_last=True)
    texts = [row[: np.count_nonzero(row)] for row in x]
    options: dict[str, Any] = {"by": "x", "most": 4, "longest": x.shape[1]}
    return buckets({"x": texts, "y": y}, ROWS, shuffle=True, drop_last=True, **options)


def measure(length: int, savings: bool, rows: int, task: Any = None) -> dict[str, Any]:
    """Milliseconds of a pass over so many sentences, after one step of each shape."""
    task = sst2() if task is None else task
    x, y = (task.train_data.arrays[name][:rows] for name in ("x", "y"))
    x = np.pad(x, [(0, 0), (0, max(0, length - x.shape[1]))])
    loader = loader_of(shortened(x, length), y, savings)
    batches = [{name: batch[name] for name in ("x", "y")} for batch in loader]
    model, tx = task.model, optax.adamw(RATE)
    if savings:
        median = sorted(batches, key=lambda batch: batch["x"].shape[1])[len(batches) // 2]
        with contextlib.redirect_stdout(io.StringIO()):
            exact.apply(model, loss_fn, jax.tree.map(jnp.asarray, median))
        exact.embed_rows(model)
        tx = exact.row_adam(RATE, weight_decay=1e-4)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    value_and_grad = exact.value_and_grad if savings else jax.value_and_grad

    def loss(params: Any, rest: Any, batch: Any) -> jax.Array:
        return loss_fn(nnx.merge(graph, nnx.State(params), rest), batch)

    def step(params: Any, state: Any, rest: Any, batch: Any) -> Any:
        if savings:
            params, state = exact.catch_up(params, state, {TABLE: batch["x"]})
        value, grads = value_and_grad(loss)(params, rest, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.copy, nnx.as_pure(params))
    carry, run = [params, tx.init(params)], jax.jit(step, donate_argnums=(0, 1))
    shapes = {batch["x"].shape: batch for batch in batches}
    for batch in [*shapes.values(), *shapes.values()]:
        *carry[:], _ = jax.block_until_ready(run(*carry, rest, batch))
    start = time.perf_counter()
    for batch in batches:
        *carry[:], value = jax.block_until_ready(run(*carry, rest, batch))
    ms = 1e3 * (time.perf_counter() - start)
    tokens = sum(batch["x"].size for batch in batches) / sum(len(batch["x"]) for batch in batches)
    return {"milliseconds": ms, "tokens_a_sentence": tokens, "loss": float(value)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of all arms")
    parser.add_argument("--rows", type=int, default=512, help="sentences in a pass")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if options.worker:
        keep_programs()
        length, savings = int(options.worker[0]), options.worker[1] == "all"
        if savings:
            exact.keep_memory()
        print(json.dumps(measure(length, savings, options.rows)))
        return
    load = os.getloadavg()
    runs: dict[int, dict[str, list[Any]]] = {n: {"none": [], "all": []} for n in LENGTHS}
    for turn in range(options.rounds):
        for length, arms in runs.items():
            for arm in list(arms)[:: 1 if turn % 2 == 0 else -1]:
                command = [sys.executable, "-m", "benchmarks.speed.sentences"]
                command += ["--worker", str(length), arm, "--rows", str(options.rows)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                arms[arm].append(json.loads(done.stdout.splitlines()[-1]))
                print(length, arm, arms[arm][-1], flush=True)
    found = {}
    for length, arms in runs.items():
        ms = {arm: statistics.median(x["milliseconds"] for x in all) for arm, all in arms.items()}
        found[length] = {"milliseconds": ms, "times_sooner": ms["none"] / ms["all"], "runs": arms}
        print(length, f"{found[length]['times_sooner']:.2f}")
    record = about("sentences", load) | {"rows": options.rows, "lengths": found}
    write(options.out / f"sentences-{jax.devices()[0].platform}.json", record)


if __name__ == "__main__":
    main()
