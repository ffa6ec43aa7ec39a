"""What meProp's backward pass and row-sparse Adam save, against dense JAX with the same donation.

Two parts, each with its arms interleaved in one run, four runs of an arm in turn:

- `layer`: the backward pass (gradients of inputs and kernel) of one layer 4096 -> 4096, batch 1024.
- `step`: a whole training step (loss, gradients, Adam, application) of an MLP 784-n-n-10.

Arms: `rows` (kernel ``(out, in)``, gradient and Adam by rows: `meprop` and `row_sparse_adam`),
`blocks` (the same in blocks of 64), `whole` (kernel ``(out, in)``, a whole gradient and
`optax.adam`), `drop-in` (Flax's kernel ``(in, out)``, a whole gradient and `optax.adam`).

Run as `python -m benchmarks.speed.meprop_speed`. Writes
`benchmarks/results/speed/meprop_speed-<device>.json`.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from benchmarks.records import RESULTS, about, write
from priorityprop_jax import meprop
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.meprop.products import MePropDot

COLUMNS = (((1,), (0,)), ((), ()))
TURN = 4  # counted runs of an arm before the next one's, as a training runs one arm alone
ARMS = ("rows", "blocks", "whole", "drop-in")


def product(arm: str, fraction: float, name: str) -> Callable[..., jax.Array]:
    """``(x, kernel) -> y`` of an arm, with kernel ``(out, in)`` except where Flax's is kept."""
    if arm == "dense":
        return lambda x, kernel: lax.dot_general(x, kernel, COLUMNS)
    rows = arm != "drop-in"
    pattern = "tile" if arm == "blocks" else "unified"
    # Only a layer with a name can have a gradient by rows.
    dot = MePropDot(
        fraction, pattern, 64, transposed=rows, name=name if arm in ("rows", "blocks") else ""
    )
    return lambda x, kernel: dot(x, kernel, COLUMNS)


@functools.cache  # one array for all arms: none of them finds its own in the cache
def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[-1])


@jax.custom_vjp
def ending_in(y: jax.Array, dy: jax.Array) -> jax.Array:
    """A loss whose gradient is ``dy`` as it stands, with no work of its own."""
    return jnp.zeros(())


ending_in.defvjp(lambda y, dy: (jnp.zeros(()), dy), lambda dy, _: (dy, jnp.zeros_like(dy)))


def layer_program(arm: str, fraction: float, width: int, batch: int):
    """``(dy, kernel, x) -> gradients``, compiled, and its arguments."""
    multiply = product(arm, fraction, "layer")

    def backward(dy, kernel, x):
        def loss(params):
            return ending_in(multiply(params["x"], params["layer"]["kernel"]), dy)

        return meprop.value_and_grad(loss)({"layer": {"kernel": kernel}, "x": x})[1]

    arguments = (draw(0, batch, width), draw(1, width, width), draw(2, batch, width))
    return jax.jit(backward).lower(*arguments).compile(), arguments


def step_program(arm: str, fraction: float, width: int, batch: int):
    """``(params, state, x, y) -> (params, state, loss)``, compiled and donated; its arguments."""
    widths = (784, width, width, 10)
    flip = arm not in ("dense", "drop-in")
    params = {
        f"layer_{i}": {
            "kernel": jnp.array(draw(i, b, a) if flip and b > 10 else draw(i, b, a).T),
            "bias": jnp.zeros(b),
        }
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }
    products = [product(arm, fraction, name) for name in params][:-1]
    by_rows = arm in ("rows", "blocks")
    tx = (meprop.row_sparse_adam if by_rows else optax.adam)(1e-3)

    def loss(params, x, y):
        for multiply, layer in zip(products, params.values(), strict=False):
            x = jax.nn.relu(multiply(x, layer["kernel"]) + layer["bias"])
        *_, last = params.values()
        logits = x @ last["kernel"] + last["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, state, x, y):
        value, grads = meprop.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    arguments = (params, tx.init(params), draw(7, batch, 784), jnp.arange(batch) % 10)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return compiled, arguments


def compare(make: Callable[..., Any], cases: dict[str, tuple], repeats: int, keep: int) -> dict:
    """Seconds of every case, interleaved; the first ``keep`` results are the next arguments."""
    programs, arguments, results = {}, {}, {}
    for name, case in cases.items():
        programs[name], arguments[name] = make(*case)
        memory = programs[name].memory_analysis()
        results[name] = {
            "flops": program_flops(programs[name]),
            "temporary_megabytes": round(memory.temp_size_in_bytes / 1e6, 1),
            "seconds": [],
        }
    for repeat in tqdm(range(repeats + 1), disable=None):
        for name, program in programs.items():
            turn = []
            for _ in range(TURN + 1):
                start = time.perf_counter()
                new = jax.block_until_ready(program(*arguments[name]))
                turn.append(time.perf_counter() - start)
                if keep:
                    arguments[name] = (*new[:keep], *arguments[name][keep:])
            if repeat:  # the first turn warms up, as does the first run of each
                results[name]["seconds"].append(statistics.mean(turn[1:]))
    dense = results["dense"]
    for result in results.values():
        pairs = zip(dense["seconds"], result["seconds"], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        result["speedup"] = statistics.median(ratios)
        result["quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        result["milliseconds"] = 1e3 * statistics.median(result["seconds"])
        result["flops_ratio"] = dense["flops"] / result["flops"]
    return results


def markdown(record: dict) -> str:
    """The result as a table."""
    lines = [
        f"Speed over dense JAX, float32, {record['cores']} CPU cores, medians "
        "(`python -m benchmarks.speed.meprop_speed`; 1.0x is dense):",
        "",
        "| what | features kept | ideal | by rows | in blocks of 64 | whole gradients | drop-in |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in record["cases"]:
        for fraction in record["fractions"]:
            cells = [
                f"{case['results'][f'{arm} {fraction}']['speedup']:.1f}x"
                if f"{arm} {fraction}" in case["results"]
                else "-"
                for arm in ARMS
            ]
            ideal = f"{1 / fraction:.1f}x" if case["kind"] == "layer" else ""
            lines.append(f"| {case['title']} | {fraction:.0%} | {ideal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12, help="counted turns of every arm")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--only", choices=("layer", "step"), help="one part only")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    sizes = [("layer", 4096, 1024), ("step", 2048, 128), ("step", 2048, 32), ("step", 500, 128)]
    if options.small:
        sizes = [("layer", 256, 16), ("step", 128, 8)]
    load = os.getloadavg()
    cases = []
    for kind, width, batch in sizes:
        if options.only not in (None, kind):
            continue
        arms = {"dense": ("dense", 1.0, width, batch)}
        for fraction in options.fractions:
            for arm in ARMS:
                if arm != "blocks" or width % 64 == 0:
                    arms[f"{arm} {fraction}"] = (arm, fraction, width, batch)
        make, keep = (layer_program, 0) if kind == "layer" else (step_program, 2)
        results = compare(make, arms, options.repeats, keep)
        name = f"layer {width}" if kind == "layer" else f"step of 784-{width}-{width}-10"
        title = f"{'backward of a ' if kind == 'layer' else ''}{name}, batch {batch}"
        cases.append({"kind": kind, "title": title, "results": results})
        for arm, result in results.items():
            low, high = result["quartiles"]
            print(
                f"{title:40} {arm:14} {result['milliseconds']:8.2f} ms  {result['speedup']:5.2f}x "
                f"({low:.2f} to {high:.2f})  FLOPs {result['flops_ratio']:.1f}x fewer",
                flush=True,
            )
    record = about("meprop_speed", load) | {"fractions": options.fractions, "cases": cases}
    suffix = "-small" if options.small else ""
    path = options.out / f"meprop_speed-{jax.default_backend()}{suffix}.json"
    write(path, record)
    print(f"wrote {path}\n\n{markdown(record)}")


if __name__ == "__main__":
    main()
