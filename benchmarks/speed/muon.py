"""What a step costs with Muon on a budget, beside NAdam and Optax's Muon.

Whole steps (forward, backward, update, applied), parameters and state donated, of a character
transformer of four blocks, 1,024 characters a step in windows of 64, and of MiniLM, 32 sentences of
24 tokens. Matrices of the blocks are Muon's, all else is NAdam's. The arms:

- `nadam`: `optax.nadam` for all parameters.
- `optax`: `optax.contrib.muon`.
- `budget 1`, `budget 1/4`, `budget 1/8`: `priority.muon`. At least one matrix of each shape is
  updated a step. A block of the transformer has one of `[width, 3 * width]`, one of
  `[width, width]`, two of `[width, 4 * width]` or turned round; one of MiniLM has four of
  `[384, 384]` and two of `[384, 1536]` or turned round.

Arms run interleaved, a step each in turn. Run as `python -m benchmarks.speed.muon`. Writes
`benchmarks/results/speed/muon-<device>.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks.records import RESULTS, about, write
from benchmarks.tasks.problems import PROBLEMS, Problem, characters
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.priority import muon

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


def measure(name: str, problem: Problem, repeats: int) -> dict[str, Any]:
    """Seconds and FLOPs of a step of every arm."""
    params, batch = problem.start(0), problem.draw(jax.random.key(1))
    programs, held, results = {}, {}, {}
    for arm, tx in arms().items():

        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            loss, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        held[arm] = jax.tree.map(jnp.array, params), tx.init(params)
        start = time.perf_counter()
        programs[arm] = jax.jit(step, donate_argnums=(0, 1)).lower(*held[arm]).compile()
        results[arm] = {
            "compile_seconds": time.perf_counter() - start,
            "flops": programs[arm].cost_analysis()["flops"],
            "seconds": [],
        }
    for repeat in tqdm(range(repeats + 2), desc=name, disable=None):
        for arm, program in programs.items():
            start = time.perf_counter()
            *held[arm], loss = program(*held[arm])
            jax.block_until_ready((held[arm], loss))
            if repeat > 1:  # the first two warm up
                results[arm]["seconds"].append(time.perf_counter() - start)
    first = next(iter(results.values()))
    for result in results.values():
        pairs = zip(result["seconds"], first["seconds"], strict=True)
        result["median_seconds"] = statistics.median(result["seconds"])
        result["ratio"] = statistics.median(own / nadam for own, nadam in pairs)
    return {"problem": name, "arms": results}


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    names = list(record["results"][0]["arms"])
    lines = [
        f"Milliseconds of a whole step, and times NAdam's, {record['cores']} cores of "
        f"{record['device']}, float32 (`python -m benchmarks.speed.muon`):",
        "",
        f"| problem | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for result in record["results"]:
        cells = [
            f"{1e3 * arm['median_seconds']:.1f} ({arm['ratio']:.2f}x)"
            for arm in result["arms"].values()
        ]
        lines.append(f"| {result['problem']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31, help="counted steps of every arm")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    load = os.getloadavg()
    tiny = {"tiny": lambda: characters(8, 1, text=np.arange(20_000) % 65)}
    made = tiny if options.small else PROBLEMS
    results = [measure(name, problem(), options.repeats) for name, problem in made.items()]
    record = about("muon", load) | {"results": results}
    name = f"muon-{jax.default_backend()}{'-small' if options.small else ''}.json"
    write(options.out / name, record)
    print(f"wrote {options.out / name}\n\n{markdown(record)}")


if __name__ == "__main__":
    main()
