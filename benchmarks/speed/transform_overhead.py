"""What `priorityprop` costs over the optimizer that it wraps.

BERT-base's parameter shapes (199 leaves, 110 M float32 parameters), `optax.adam`, one jitted
program with buffers donated. Arms run interleaved, a whole cycle of 10 steps each, so that scoring
and allocation are in the figures. Two programs an arm:

- `update`: `tx.update` alone, gradients and state donated, as in a loop that applies the updates
  elsewhere. Adam's own update is the denominator.
- `step`: `tx.update` and `optax.apply_updates`, parameters and state donated, gradients kept.

Run as `python -m benchmarks.speed.transform_overhead`; needs about 9 GB. Writes
`benchmarks/results/speed/transform_overhead-<device>.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks.records import RESULTS, about, write
from priorityprop_jax import priorityprop

CYCLE = 10


def bert_base() -> dict[str, tuple[int, ...]]:
    """The shapes of BERT-base's parameters."""
    shapes = {"embed/word": (30522, 768), "embed/position": (512, 768), "embed/type": (2, 768)}
    shapes |= {"embed/norm/scale": (768,), "embed/norm/bias": (768,)}
    for i in range(12):
        for name in ("query", "key", "value", "out"):
            shapes[f"layer_{i}/{name}/kernel"] = (768, 768)
            shapes[f"layer_{i}/{name}/bias"] = (768,)
        shapes[f"layer_{i}/up/kernel"], shapes[f"layer_{i}/up/bias"] = (768, 3072), (3072,)
        shapes[f"layer_{i}/down/kernel"], shapes[f"layer_{i}/down/bias"] = (3072, 768), (768,)
        for norm in ("attention_norm", "mlp_norm"):
            shapes[f"layer_{i}/{norm}/scale"] = shapes[f"layer_{i}/{norm}/bias"] = (768,)
    return shapes | {"pooler/kernel": (768, 768), "pooler/bias": (768,)}


def arms(adam: optax.GradientTransformation) -> dict[str, optax.GradientTransformation]:
    """The transformations compared; the first one is the denominator."""
    return {
        "adam": adam,
        "full, min = max = 10": priorityprop(adam, None, CYCLE, CYCLE, CYCLE),
        "full, by priority, max 10": priorityprop(adam, 1.0, 0, CYCLE, CYCLE),
        "full, by priority, max 20": priorityprop(adam, 1.0, 1, 20, CYCLE),
        "tenth, by priority, max 10": priorityprop(adam, 0.1, 0, CYCLE, CYCLE),
        "tenth, by priority, max 20": priorityprop(adam, 0.1, 0, 20, CYCLE),
    }


def program(kind: str, tx: optax.GradientTransformation):
    """The jitted program of one arm: two trees and the state between them, all in its order.

    `update` is `(grads, state, params) -> (updates, state)`, `step` is `(params, state, grads) ->
    (params, state)`: what is donated comes in the order of what is returned, as JAX pairs them by
    shape, and buffers that are paired crosswise are copied.
    """

    def update(grads, state, params):
        return tx.update(grads, state, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update if kind == "update" else step, donate_argnums=(0, 1))


def measure(kind: str, names: list[str], repeats: int, shapes: dict) -> dict[str, dict]:
    """Seconds a step of every arm, amortised over whole cycles, and seconds to compile it."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = lambda key, shape: 0.02 * jax.random.normal(key, shape)  # noqa: E731
    params = {n: draw(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    grads = {n: draw(k, s) for k, (n, s) in zip(keys[::-1], shapes.items(), strict=True)}
    transformations = arms(optax.adam(1e-5))
    programs, states, results = {}, {}, {}
    for name in names:
        tx = transformations[name]
        state = jax.eval_shape(tx.init, params)
        jax.clear_caches()
        start = time.perf_counter()
        given = (grads, state, params) if kind == "update" else (params, state, grads)
        compiled = program(kind, tx).lower(*given).compile()
        compiling = time.perf_counter() - start
        programs[name], states[name] = compiled, jax.jit(tx.init)(params)
        memory = compiled.memory_analysis()
        results[name] = {
            "compile_seconds": compiling,
            "temporary_megabytes": round(memory.temp_size_in_bytes / 1e6, 1),
            "seconds": [],
        }
    bar = tqdm(total=(repeats + 1) * len(names), desc=kind, disable=None)
    for repeat in range(repeats + 1):
        for name in names:
            total = 0.0
            for _ in range(CYCLE):
                first, last = params, grads
                if kind == "update":
                    first, last = jax.block_until_ready(jax.tree.map(jnp.copy, grads)), params
                start = time.perf_counter()
                new, states[name] = programs[name](first, states[name], last)
                jax.block_until_ready((new, states[name]))
                total += time.perf_counter() - start
                if kind == "step":
                    params = new
                del first, last, new
            if repeat:  # the first one warms up
                results[name]["seconds"].append(total / CYCLE)
            bar.update()
    bar.close()
    first = results[names[0]]
    for result in results.values():
        pairs = zip(result["seconds"], first["seconds"], strict=True)
        result["ratio"] = statistics.median(ours / adam for ours, adam in pairs)
        result["compile_ratio"] = result["compile_seconds"] / first["compile_seconds"]
    return results


def markdown(record: dict) -> str:
    """The result as a table."""
    lines = [
        f"Time of an update over plain Adam's, BERT-base's shapes ({record['leaves']} leaves, "
        f"{record['parameters'] / 1e6:.0f} M float32 parameters), {record['cores']} CPU cores, "
        f"medians over cycles of {record['cycle']} steps, scoring included "
        "(`python -m benchmarks.speed.transform_overhead`):",
        "",
        "| budget | `update`, donated | `update` + `apply_updates` | compile time |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, update in record["results"]["update"].items():
        step = record["results"]["step"].get(name)  # absent where a run was cut short
        stepped = "-" if step is None else f"{step['ratio']:.2f}x"
        compiling = f"{update['compile_ratio']:.1f}x"
        lines.append(f"| {name} | {update['ratio']:.2f}x | {stepped} | {compiling} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="counted cycles of every arm")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    shapes = bert_base()
    if options.small:
        shapes = {name: tuple(min(n, 16) for n in shape) for name, shape in shapes.items()}
    names = list(arms(optax.adam(1.0)))
    device = jax.devices()[0]
    load = os.getloadavg()
    results: dict[str, dict] = {}
    for kind in ("update", "step"):
        # Two arms at a time, as each holds a state of its own: 0.9 GB
        results[kind] = {}
        for name in names[1:]:
            pair = measure(kind, [names[0], name], options.repeats, shapes)
            results[kind][name] = pair[name]
            results[kind][name]["adam"] = pair[names[0]]
            print(
                f"{kind:7}{name:28} {pair[name]['ratio']:.2f}x of Adam's time, "
                f"{pair[name]['compile_ratio']:.1f}x of its compile time "
                f"({pair[name]['compile_seconds']:.1f} s)",
                flush=True,
            )
    record = about("transform_overhead", load) | {
        "leaves": len(shapes),
        "parameters": sum(int(jnp.prod(jnp.array(s))) for s in shapes.values()),
        "cycle": CYCLE,
        "results": results,
    }
    name = f"transform_overhead-{device.platform}{'-small' if options.small else ''}.json"
    path = options.out / name
    write(path, record)
    print(f"wrote {path}\n\n{markdown(record)}")


if __name__ == "__main__":
    main()
