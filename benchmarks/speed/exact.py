"""What exact savings bring to a whole training step: the same model as written, and after `apply`.

Steps of AdamW, buffers donated, as one writes them with `nnx`; all arms in turns in one process,
three fresh processes a model; figures are medians over processes. `exact.apply` measures by itself,
in the same process, and the record has its table. With ``--torch PYTHON`` the same models, batches
and optimizer in PyTorch take their turns too, in a process of their own with as many threads, as
one runs them and, where there is no recurrent layer, with `torch.compile`. With ``--keep-memory``
both arms run after `exact.keep_memory`, and the model as written in a process of its own too,
without it; `times_sooner_with_memory` is what both bring together,
and what the documentation shows.

- `list`: 12 pre-norm blocks of width 256 in an `nnx.List`, 8 x 64 tokens.
- `scan`: the same blocks stacked by `nnx.vmap` and run by `nnx.scan`; in PyTorch a list.
- `minilm`: a BERT of MiniLM's shape (6 blocks of width 384), 32 x 24 tokens; `minilm-48` of 32
  x 48; `minilm-128` of 16 x 128.
- `smollm2`: a decoder of SmolLM2-135M's shape, 16 x 40 tokens, a class behind the last; its blocks
  are in the library's stack; `smollm2-512` of 1 x 512.
- `tagger`: a bidirectional LSTM of 128 over 32 sentences of 40 words.
- `lstm`: an LSTM of 256 over 4 x 256 steps; `lstm-1` over 1 x 256; `lstm-32` of 128 over 32 x 64;
  `lstm-500` of 500 over 32 x 64, and `lstm-128` over 128 x 64.
- `gru`: a GRU of 128 over 16 x 128 steps.
- `resnet`: a small residual network on 32 images of 32 x 32.

Run as `python -m benchmarks.speed.exact`. Writes `benchmarks/results/speed/exact-<device>.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.records import RESULTS, about, write
from benchmarks.speed import other
from benchmarks.speed.other import Other
from benchmarks.speed.partial_steps import BLOCKS, MINILM, WIDTH, Block
from benchmarks.tasks.cifar import SmallResNet
from priorityprop_jax import exact
from priorityprop_jax.core import timing
from priorityprop_jax.core.modules import pure_loss
from priorityprop_jax.core.program import product_flops
from priorityprop_jax.models.bert import BertClassifier, BertConfig
from priorityprop_jax.models.decoder import Decoder, DecoderConfig


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

    def __init__(self, inputs: int, width: int, both_ways: bool, cell: str, rngs: nnx.Rngs) -> None:
        kind = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}[cell]
        make = lambda: nnx.RNN(kind(inputs, width, rngs=rngs))  # noqa: E731
        self.rnn = nnx.Bidirectional(make(), make()) if both_ways else make()
        self.head = nnx.Linear(width * (1 + both_ways), 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x).mean(1))


_BLOCKS = {"shape": (8, 64, WIDTH), "blocks": BLOCKS, "compile": True}
_RESNET = {"width": 32, "depth": 2, "compile": True}
_BERT = {"kind": "bert", "config": vars(MINILM), "compile": True}
_SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "rope_theta": 1e5, "rms_norm_eps": 1e-5,
}  # fmt: skip


def recurrent(batch: int, steps: int, inputs: int, width: int, **more: Any) -> Any:
    about = {"kind": "rnn", "shape": (batch, steps, inputs), "width": width}
    return about | {"both_ways": False, "cell": "lstm"} | more


# Models and shapes of batches, with what PyTorch needs to make the same.
CASES: dict[str, dict[str, Any]] = {
    "list": {"kind": "list", **_BLOCKS},
    "scan": {"kind": "scan", **_BLOCKS},
    "minilm": {"shape": (32, 24), **_BERT},
    "minilm-48": {"shape": (32, 48), **_BERT},
    "minilm-128": {"shape": (16, 128), **_BERT},
    "smollm2": {"kind": "decoder", "shape": (16, 40), "config": _SMOLLM2, "compile": True},
    "smollm2-512": {"kind": "decoder", "shape": (1, 512), "config": _SMOLLM2, "compile": True},
    "tagger": recurrent(32, 40, 128, 128, both_ways=True),
    "lstm": recurrent(4, 256, 128, 256),
    "lstm-1": recurrent(1, 256, 128, 256),
    "lstm-32": recurrent(32, 64, 128, 128),
    "lstm-500": recurrent(32, 64, 500, 500),
    "lstm-128": recurrent(128, 64, 500, 500),
    "gru": recurrent(16, 128, 128, 128, cell="gru"),
    "resnet": {"kind": "resnet", "shape": (32, 32, 32, 3), **_RESNET},
}


def setting(case: dict[str, Any]) -> tuple[nnx.Module, Any]:
    """A model and a batch."""
    rngs, random, shape = nnx.Rngs(0), np.random.default_rng(0), case["shape"]
    model = {
        "list": lambda: List(rngs),
        "scan": lambda: Scan(rngs),
        "bert": lambda: BertClassifier(BertConfig(**case["config"]), rngs=rngs),
        "decoder": lambda: Decoder(
            dataclasses.replace(DecoderConfig.from_dict(case["config"]), classes=2), rngs=rngs
        ),
        "rnn": lambda: Recurrent(shape[-1], case["width"], case["both_ways"], case["cell"], rngs),
        "resnet": lambda: SmallResNet(width=case["width"], depth=case["depth"], rngs=rngs),
    }[case["kind"]]()
    if case["kind"] in ("bert", "decoder"):
        x = random.integers(1, case["config"]["vocab_size"], shape).astype(np.int32)
    else:
        x = random.normal(size=shape).astype(np.float32)
    return model, {"x": x, "y": np.arange(len(x)) % 2}


# Seconds. Threads of PyTorch look for work for some milliseconds after theirs is done, on the cores
# that the next arm needs, so that each arm waits. Then it runs for as long before what counts: its
# threads have to wake up and its caches to be filled first, as in no training.
PAUSE = 0.1
RATIOS = ("times_sooner", "times_sooner_with_memory", "torch_over_applied")


def loss_fn(model: Any, batch: Any) -> jax.Array:
    logits = model(batch["x"])
    logits = logits[:, -1] if logits.ndim == 3 else logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def stepper(model: nnx.Module, batch: Any) -> tuple[Any, Any, int, dict[str, Any]]:
    """What runs a step, its gradients, the bytes that it needs beside its arrays, and its parts.

    These are the forward pass, it with the backward pass and an update of SGD, and the step again:
    gradients alone would be written to memory where a step uses them up as they come.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params, rest, batch):
        model = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
        return loss_fn(model, batch), nnx.state(model, nnx.Not(nnx.Param))

    def runner(tx):
        def step(params, rest, state, batch):
            (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), rest, state, value

        carry = [*jax.tree.map(jnp.copy, (params, rest)), tx.init(params)]
        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*carry, batch).compile()

        def run() -> None:
            *carry[:], _ = compiled(*carry, batch)
            jax.block_until_ready(carry)

        return run, compiled

    run, compiled = runner(optax.adamw(1e-4))
    descend, _ = runner(optax.sgd(1e-6))
    grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rest, batch)[1]
    forward = jax.jit(loss)
    parts = {
        "forward": lambda: jax.block_until_ready(forward(params, rest, batch)),
        "gradient": descend,
        "step": run,
    }
    memory = compiled.memory_analysis()
    return run, grads, 0 if memory is None else memory.temp_size_in_bytes, parts


def measure(
    case: dict[str, Any], repeats: int, torch: str | None = None, memory: bool = False
) -> dict[str, Any]:
    """One process: all arms; `memory` says that it keeps its own."""
    model, batch = setting(case)
    products = gradient_flops(model, batch) / 1e6 / machine_rate()
    plain, expected, plain_bytes, plain_parts = stepper(model, batch)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        rows = exact.apply(model, loss_fn, jax.tree.map(jnp.asarray, batch))
    applying = time.perf_counter() - start
    sooner, grads, sooner_bytes, sooner_parts = stepper(model, batch)
    arms = {"as written": _timed(plain), "applied": _timed(sooner)}
    others: dict[str, Other] = {}
    if memory:
        arms = {f"{arm}, memory kept": run for arm, run in arms.items()}
        others["jax"] = Other(sys.executable, "-m", "benchmarks.speed.exact", "--answer")
    if torch:
        others["torch"] = other.torch(torch, "torch_models.py", len(os.sched_getaffinity(0)))
    for process in others.values():
        arms |= process.runners(case)
    ms = medians(arms, repeats)
    both = {"as written": plain_parts, "applied": sooner_parts}
    split = medians(
        {(arm, part): _timed(own[part]) for arm, own in both.items() for part in own}, repeats
    )
    norm = lambda tree: float(optax.tree.norm(tree))  # noqa: E731
    off = norm(jax.tree.map(jnp.subtract, grads, expected)) / norm(expected)
    before, best = list(ms.values())[:2]  # in this process
    found = {
        "milliseconds": ms,
        "times_sooner": before / best,
        "split_milliseconds": {
            arm: parts_of(*(split[arm, part] for part in own)) for arm, own in both.items()
        },
        "products_milliseconds": products,
        "temporary_bytes": {"as written": plain_bytes, "applied": sooner_bytes},
        "gradients_off_by": off,
        "apply_seconds": applying,
        "table": [row._asdict() for row in rows],
    }
    if torch:
        fastest = min(value for arm, value in ms.items() if arm.startswith("torch"))
        found |= {"torch_over_applied": fastest / best}
        found |= {"torch_version": others["torch"].ask(version=True)["version"]}
    if "jax" in others:
        found |= {"times_sooner_with_memory": ms["as written"] / best}
    for process in others.values():
        process.close()
    return found


def medians(runs: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Median milliseconds of runs that return their seconds, in turns behind two of them."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            seconds = run()
            while time.perf_counter() - start < PAUSE:
                seconds = run()
            times[name].append(1e3 * seconds)
    return {name: statistics.median(samples[2:]) for name, samples in times.items()}


def parts_of(forward: float, gradient: float, step: float) -> dict[str, float]:
    """The milliseconds of a step's parts, which add up to all of it."""
    return {"forward": forward, "backward": gradient - forward, "optimizer": step - gradient}


def machine_rate() -> float:
    """The FLOPs a nanosecond of large products on this machine."""
    ones, product = jnp.ones((2048, 2048)), jax.jit(jnp.dot)
    [seconds] = timing.medians([lambda: jax.block_until_ready(product(ones, ones))], 0.0, least=10)
    return 2 * 2048**3 / 1e9 / seconds


def gradient_flops(model: nnx.Module, batch: Any) -> float:
    """The FLOPs of the products of a gradient."""
    loss, params, rest = pure_loss(model, loss_fn)
    return product_flops(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, rest, batch))


def answer() -> None:
    """Runs the model as written, in this process, as it is asked for on standard input."""
    run: Callable[[], float] = lambda: 0.0  # noqa: E731
    for line in sys.stdin:
        asked = json.loads(line)
        if "case" in asked:
            run = _timed(stepper(*setting(asked["case"]))[0])
            print(json.dumps({"runs": ["as written"]}), flush=True)
        else:
            print(json.dumps({"seconds": run()}), flush=True)


def _timed(run: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def fresh(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures."""
    module = [sys.executable, "-m", "benchmarks.speed.exact"]
    command = [*module, "--worker", name, "--repeats", str(options.repeats)]
    command += ["--torch", options.torch] if options.torch else []
    command += ["--keep-memory"] if options.keep_memory else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15, help="counted runs of each arm")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each model")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has PyTorch")
    parser.add_argument("--keep-memory", action="store_true", help="arms that keep it, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if options.answer:
        answer()
        return
    if options.worker:
        memory = options.keep_memory and exact.keep_memory()
        found = measure(CASES[options.worker], options.repeats, options.torch, memory)
        print(json.dumps(found))
        return
    load, models = os.getloadavg(), {}
    for name in options.models:
        runs = [fresh(name, options) for _ in range(options.processes)]
        runs.sort(key=lambda run: run["times_sooner"])
        ratios = [key for key in RATIOS if key in runs[0]]
        medians = {key: statistics.median(run[key] for run in runs) for key in ratios}
        models[name] = medians | {"processes": runs}
        print(name, *(f"{run['times_sooner']:.2f}" for run in runs), flush=True)
        print(json.dumps(runs[len(runs) // 2], indent=1), flush=True)
        record = about("exact", load) | {"models": models}
        write(options.out / f"exact-{jax.devices()[0].platform}.json", record)


if __name__ == "__main__":
    main()
