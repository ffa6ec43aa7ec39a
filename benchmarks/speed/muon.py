"""What a step costs with Muon on a budget, beside NAdam and Optax's Muon.

Whole steps (forward, backward, update, applied) of a character transformer of four blocks, windows
of 64 random characters, 1,024 a step, parameters and state donated. Hidden matrices are Muon's,
all else is NAdam's. The arms:

- `nadam`: `optax.nadam` for all parameters.
- `optax`: `optax.contrib.muon`.
- `budget 1`, `budget 1/4`, `budget 1/8`: `priority.muon`. At least one matrix of each shape is
  updated a step, and there are four of `[width, 3 * width]`, four of `[width, width]`, eight of
  `[width, 4 * width]` or turned round.

Arms run interleaved, a step each in turn. Run as `python -m benchmarks.speed.muon`. Writes
`benchmarks/results/speed/muon-<device>.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from benchmarks.records import RESULTS, about, write
from benchmarks.tasks.char import CharTransformer
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.priority import muon

WIDTHS = (128, 256)
TOKENS, CONTEXT, CHARACTERS, DEPTH = 1024, 64, 65, 4
RATE = 1e-3


def hidden(params: Any) -> Any:
    """Which parameters are Muon's: the matrices of the blocks."""
    is_one = lambda path, x: path_name(path).startswith("blocks") and x.ndim == 2  # noqa: E731
    return jax.tree_util.tree_map_with_path(is_one, params)


def numbers(params: Any) -> Any:
    """The same in the words of Optax."""
    one = optax.contrib.MuonDimensionNumbers()
    return jax.tree.map(lambda own: one if own else None, hidden(params))


def arms(rate: float = RATE) -> dict[str, optax.GradientTransformation]:
    """The optimizers compared; ratios are to the first."""
    found: dict[str, Any] = {"nadam": optax.nadam(rate)}
    found["optax"] = optax.contrib.muon(
        rate, muon_weight_dimension_numbers=numbers, consistent_rms=0.2
    )
    for name, budget in {"1": 1, "1/4": 1 / 4, "1/8": 1 / 8}.items():
        found[f"budget {name}"] = muon(rate, budget, mask=hidden)
    return found


def transformer(width: int, depth: int = DEPTH, seed: int = 0) -> CharTransformer:
    """The model."""
    rngs = nnx.Rngs(seed)
    return CharTransformer(CHARACTERS, context=CONTEXT, width=width, depth=depth, rngs=rngs)


def loss_of(model: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """The loss of parameters on windows of a character more than the context."""
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_fn


def measure(width: int, repeats: int, depth: int = DEPTH) -> dict[str, Any]:
    """Seconds and FLOPs of a step of every arm."""
    model = transformer(width, depth)
    params, loss_fn = nnx.as_pure(nnx.state(model, nnx.Param)), loss_of(model)
    shape = (TOKENS // CONTEXT, CONTEXT + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, CHARACTERS)
    programs, held, results = {}, {}, {}
    for name, tx in arms().items():

        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        held[name] = jax.tree.map(jnp.array, params), tx.init(params)
        start = time.perf_counter()
        programs[name] = jax.jit(step, donate_argnums=(0, 1)).lower(*held[name]).compile()
        results[name] = {
            "compile_seconds": time.perf_counter() - start,
            "flops": programs[name].cost_analysis()["flops"],
            "seconds": [],
        }
    for repeat in tqdm(range(repeats + 2), desc=f"width {width}", disable=None):
        for name, program in programs.items():
            start = time.perf_counter()
            *held[name], loss = program(*held[name])
            jax.block_until_ready((held[name], loss))
            if repeat > 1:  # the first two warm up
                results[name]["seconds"].append(time.perf_counter() - start)
    first = next(iter(results.values()))
    for result in results.values():
        pairs = zip(result["seconds"], first["seconds"], strict=True)
        result["median_seconds"] = statistics.median(result["seconds"])
        result["ratio"] = statistics.median(own / nadam for own, nadam in pairs)
    return {"width": width, "depth": depth, "tokens": TOKENS, "arms": results}


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    names = list(record["results"][0]["arms"])
    lines = [
        f"Milliseconds of a whole step, and times NAdam's, {record['cores']} cores of "
        f"{record['device']}, float32 (`python -m benchmarks.speed.muon`):",
        "",
        f"| width | {' | '.join(names)} |",
        f"| ---: |{' ---: |' * len(names)}",
    ]
    for result in record["results"]:
        cells = [
            f"{1e3 * arm['median_seconds']:.1f} ({arm['ratio']:.2f}x)"
            for arm in result["arms"].values()
        ]
        lines.append(f"| {result['width']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31, help="counted steps of every arm")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    load = os.getloadavg()
    wanted = {"width": (8,), "depth": 1} if options.small else {"width": WIDTHS, "depth": DEPTH}
    results = [measure(width, options.repeats, wanted["depth"]) for width in wanted["width"]]
    record = about("muon", load) | {"results": results}
    name = f"muon-{jax.default_backend()}{'-small' if options.small else ''}.json"
    write(options.out / name, record)
    print(f"wrote {options.out / name}\n\n{markdown(record)}")


if __name__ == "__main__":
    main()
