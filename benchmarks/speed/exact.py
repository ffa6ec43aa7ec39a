"""What exact savings bring to a whole training step: the same model as written, and after `apply`.

Steps of AdamW, buffers donated, as one writes them with `nnx`; both arms in turns in one process,
three fresh processes a model; figures are medians over processes. `exact.apply` measures by itself,
in the same process, and the record has its table.

- `list`: 12 pre-norm blocks of width 256 in an `nnx.List`, 8 x 64 tokens.
- `scan`: the same blocks stacked by `nnx.vmap` and run by `nnx.scan`.
- `minilm`: a BERT of MiniLM's shape (6 blocks of width 384), 32 x 24 tokens; `minilm-128` of 16 x
  128.
- `tagger`: a bidirectional LSTM of 128 over 32 sentences of 40 words.
- `lstm`: an LSTM of 256 over 4 x 256 steps.
- `resnet`: a small residual network on 32 images of 32 x 32.

Run as `python -m benchmarks.speed.exact`. Writes `benchmarks/results/speed/exact-<device>.json`.
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
from benchmarks.speed.partial_steps import BLOCKS, MINILM, WIDTH, Block
from benchmarks.tasks.cifar import SmallResNet
from priorityprop_jax import exact
from priorityprop_jax.models.bert import BertClassifier


class List(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(WIDTH, rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Scan(nnx.Module):
    """Blocks in one loop."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=BLOCKS)
        @nnx.vmap(axis_size=BLOCKS)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(WIDTH, rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        return self.head(run(x, self.blocks).mean(1))


class Recurrent(nnx.Module):
    """A recurrent layer and a class for each sequence."""

    def __init__(self, inputs: int, width: int, both_ways: bool, rngs: nnx.Rngs) -> None:
        make = lambda: nnx.RNN(nnx.OptimizedLSTMCell(inputs, width, rngs=rngs))  # noqa: E731
        self.rnn = nnx.Bidirectional(make(), make()) if both_ways else make()
        self.head = nnx.Linear(width * (1 + both_ways), 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x).mean(1))


def setting(name: str) -> tuple[nnx.Module, Any]:
    """A model and a batch."""
    rngs, random = nnx.Rngs(0), np.random.default_rng(0)
    tokens = lambda *shape: random.integers(1, 30522, shape).astype(np.int32)  # noqa: E731
    values = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    model, x = {
        "list": lambda: (List(rngs), values(8, 64, WIDTH)),
        "scan": lambda: (Scan(rngs), values(8, 64, WIDTH)),
        "minilm": lambda: (BertClassifier(MINILM, rngs=rngs), tokens(32, 24)),
        "minilm-128": lambda: (BertClassifier(MINILM, rngs=rngs), tokens(16, 128)),
        "tagger": lambda: (Recurrent(128, 128, True, rngs), values(32, 40, 128)),
        "lstm": lambda: (Recurrent(128, 256, False, rngs), values(4, 256, 128)),
        "resnet": lambda: (SmallResNet(rngs=rngs), values(32, 32, 32, 3)),
    }[name]()
    return model, {"x": x, "y": np.arange(len(x)) % 2}


MODELS = ("list", "scan", "minilm", "minilm-128", "tagger", "lstm", "resnet")


def loss_fn(model: Any, batch: Any) -> jax.Array:
    logits = model(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def stepper(model: nnx.Module, batch: Any) -> tuple[Any, Any, int]:
    """What runs a step, what its gradients are, and the bytes that it needs beside its arrays."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adamw(1e-4)

    def loss(params, rest, batch):
        model = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
        return loss_fn(model, batch), nnx.state(model, nnx.Not(nnx.Param))

    def step(params, rest, state, batch):
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    carry = [*jax.tree.map(jnp.copy, (params, rest)), tx.init(params)]
    batch = jax.tree.map(jnp.asarray, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*carry, batch).compile()
    grads = jax.jit(jax.grad(loss, has_aux=True))(params, rest, batch)[0]

    def run() -> None:
        *carry[:], _ = compiled(*carry, batch)
        jax.block_until_ready(carry)

    memory = compiled.memory_analysis()
    return run, grads, 0 if memory is None else memory.temp_size_in_bytes


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One process: both arms."""
    model, batch = setting(name)
    plain, expected, plain_bytes = stepper(model, batch)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        rows = exact.apply(model, loss_fn, jax.tree.map(jnp.asarray, batch))
    applying = time.perf_counter() - start
    sooner, grads, sooner_bytes = stepper(model, batch)
    times: dict[str, list[float]] = {"as written": [], "applied": []}
    for turn in range(repeats + 2):
        for arm, run in zip(times, (plain, sooner), strict=True):
            start = time.perf_counter()
            run()
            if turn > 1:
                times[arm].append(1e3 * (time.perf_counter() - start))
    norm = lambda tree: float(optax.global_norm(tree))  # noqa: E731
    off = norm(jax.tree.map(jnp.subtract, grads, expected)) / norm(expected)
    ms = {arm: statistics.median(samples) for arm, samples in times.items()}
    return {
        "milliseconds": ms,
        "times_sooner": ms["as written"] / ms["applied"],
        "temporary_bytes": {"as written": plain_bytes, "applied": sooner_bytes},
        "gradients_off_by": off,
        "apply_seconds": applying,
        "table": [row._asdict() for row in rows],
    }


def fresh(name: str, repeats: int) -> dict[str, Any]:
    """What a process of its own measures."""
    module = [sys.executable, "-m", "benchmarks.speed.exact"]
    command = [*module, "--worker", name, "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=15, help="counted runs of both arms")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.repeats)))
        return
    record = about("exact", os.getloadavg()) | {"models": {}}
    for name in options.models:
        runs = [fresh(name, options.repeats) for _ in range(options.processes)]
        runs.sort(key=lambda run: run["times_sooner"])
        record["models"][name] = {
            "times_sooner": statistics.median(run["times_sooner"] for run in runs),
            "processes": runs,
        }
        print(name, *(f"{run['times_sooner']:.2f}" for run in runs), flush=True)
        print(json.dumps(runs[len(runs) // 2], indent=1), flush=True)
    write(options.out / f"exact-{jax.devices()[0].platform}.json", record)


if __name__ == "__main__":
    main()
