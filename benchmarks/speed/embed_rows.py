"""What a whole step of full fine-tuning gains where gradients of embeddings are rows.

A BERT of MiniLM's shape (6 blocks of width 384), 32 x 24 tokens, another batch at each step, whose
words are drawn as often as words are (Zipf): the step as one writes it with Optax, buffers donated,
against one with `exact.embed_rows` and an optimizer by rows. Arms run in turns in one process,
three fresh processes a table; figures are medians over processes.

- `minilm`: a table of 30,522 rows.
- `multilingual`: one of 250,002 rows.

`adam rows` is `exact.row_adam` with `exact.catch_up` in front of each step, `lazy rows` is
`meprop.row_sparse_adam`, which is another algorithm.

Run as `python -m benchmarks.speed.embed_rows`. Writes
`benchmarks/results/speed/embed_rows-<device>.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from benchmarks.speed.partial_steps import MINILM
from priorityprop_jax import exact, meprop
from priorityprop_jax.models.bert import BertClassifier, BertConfig

TABLES = {"minilm": 30_522, "multilingual": 250_002}
SHAPE, BATCHES, TABLE = (32, 24), 20, "embed/word/embedding"
# The optimizer as written, and by rows.
ARMS = {
    "sgd": (optax.sgd(1e-4), meprop.row_sparse(optax.sgd(1e-4))),
    "adam": (optax.adamw(1e-5, weight_decay=0.01), exact.row_adam(1e-5, weight_decay=0.01)),
    "lazy": (None, meprop.row_sparse_adam(1e-5, weight_decay=0.01)),
}


def tokens(vocabulary: int) -> np.ndarray:
    """Batches ``int32[batches, *shape]``."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, vocabulary)
    draws = random.choice(vocabulary - 1, (BATCHES, *SHAPE), p=weights / weights.sum())
    return (draws + 1).astype(np.int32)


def stepper(config: BertConfig, tx: Any, by_rows: bool) -> tuple[Any, dict[str, Any]]:
    """What runs one step, and what it needs beside its arrays."""
    model = BertClassifier(config, rngs=nnx.Rngs(0))
    if by_rows:
        exact.embed_rows(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    value_and_grad = exact.value_and_grad if by_rows else jax.value_and_grad
    labels = jnp.arange(SHAPE[0]) % 2
    exactly = by_rows and tx is ARMS["adam"][1]

    def loss(params, rest, x):
        logits = nnx.merge(graph, nnx.State(params), rest)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, rest, x):
        if exactly:
            params, state = exact.catch_up(params, state, {TABLE: x})
        value, grads = value_and_grad(loss)(params, rest, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = nnx.as_pure(params)
    carry: list[Any] = [params, tx.init(params)]
    batches = [jnp.asarray(x) for x in tokens(config.vocab_size)]
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, rest, batches[0])
    compiled, done = lowered.compile(), [0]

    def run() -> float:
        start = time.perf_counter()
        *carry[:], _ = compiled(*carry, rest, batches[done[0] % BATCHES])
        jax.block_until_ready(carry)
        done[0] += 1
        return time.perf_counter() - start

    memory = compiled.memory_analysis()
    return run, {"temporary_bytes": 0 if memory is None else memory.temp_size_in_bytes}


def measure(config: BertConfig, repeats: int) -> dict[str, Any]:
    """One process: all arms."""
    runs, found = {}, {}
    for name, pair in ARMS.items():
        for tx, arm in zip(pair, (name, f"{name} rows"), strict=True):
            if tx is not None:
                runs[arm], found[arm] = stepper(config, tx, arm != name)
    times: dict[str, list[float]] = {arm: [] for arm in runs}
    for turn in range(repeats + 2):
        for arm, run in runs.items():
            seconds = run()
            if turn > 1:
                times[arm].append(1e3 * seconds)
    for arm, samples in times.items():
        found[arm]["milliseconds"] = statistics.median(samples)
        base = times[arm.removesuffix(" rows").replace("lazy", "adam")]
        ratios = [before / after for before, after in zip(base, samples, strict=True)]
        found[arm]["times_sooner"] = statistics.median(ratios)
    rows = [len(np.unique(x)) for x in tokens(config.vocab_size)]
    return {"rows_a_batch": statistics.median(rows), "arms": found}


def fresh(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures."""
    module = [sys.executable, "-m", "benchmarks.speed.embed_rows"]
    command = [*module, "--worker", name, "--repeats", str(options.repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--repeats", type=int, default=15, help="counted runs of each arm")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if options.worker:
        config = dataclasses.replace(MINILM, vocab_size=TABLES[options.worker])
        print(json.dumps(measure(config, options.repeats)))
        return
    load, tables = os.getloadavg(), {}
    path = options.out / f"embed_rows-{jax.devices()[0].platform}.json"
    for name in options.tables:
        runs = [fresh(name, options) for _ in range(options.processes)]
        tables[name] = {
            arm: {key: statistics.median(run["arms"][arm][key] for run in runs) for key in values}
            for arm, values in runs[0]["arms"].items()
        } | {"processes": runs}
        print(name, json.dumps({k: v for k, v in tables[name].items() if k != "processes"}))
        write(path, about("embed_rows", load) | {"tables": tables})


if __name__ == "__main__":
    main()
