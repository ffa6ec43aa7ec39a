"""The backward pass of an LSTM: automatic, by hand, and with meProp.

An LSTM of 500 units on 500 inputs, 64 steps, batches of 32, float32, as in the meProp paper's
models. The arms:

- `autodiff`: JAX's derivative of `nnx.RNN(nnx.OptimizedLSTMCell(...))`.
- `dense`: `priorityprop_jax.rnn.recurrent.run_cell` at k = hidden: exact, weight gradients as one
  product after the scan.
- `meprop, k=20`: the same with the 20 largest columns of every gate, 80 rows of the 2000.
- `meprop, k=5`: 20 rows in all.
- `swapped, k=20`: `nnx.RNN` after `swap_rnn`, kernels as Flax stores them.

Arms run interleaved. Two programs an arm: `backward`, from the residuals and a cotangent of the
outputs to the gradients of parameters and inputs, and `both`, forward and backward pass in one.

Run as `python -m benchmarks.speed.meprop_lstm`; `--quick` takes seconds. Writes
`benchmarks/results/speed/meprop_lstm-<device>.json`.
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
from flax import nnx
from tqdm import tqdm

from benchmarks.records import RESULTS, about, write
from priorityprop_jax.meprop.rnn import swap_rnn
from priorityprop_jax.rnn.recurrent import LSTMParams, run_cell

HIDDEN, INPUTS, STEPS, BATCH = 500, 500, 64, 32
KS = (5, 10, 20, 40)


def arms(hidden: int, inputs: int, batch: int, ks: tuple[int, ...]) -> dict:
    """``name -> (function of parameters and time-major inputs, parameters)``."""
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(inputs, hidden, rngs=nnx.Rngs(0)), time_major=True)
    swapped = nnx.clone(rnn)
    swap_rnn(swapped, ks[-2], "lstm")
    zeros = (jnp.zeros((batch, hidden)), jnp.zeros((batch, hidden)))
    cell: Any = rnn.cell
    params = LSTMParams(
        cell.dense_i.kernel[...].T, cell.dense_h.kernel[...].T, cell.dense_h.bias[...]
    )

    def of_module(module):
        graph, state, rest = nnx.split(module, nnx.Param, ...)
        return lambda state, xs: nnx.merge(graph, state, rest)(xs, initial_carry=zeros), state

    def by_hand(k):
        return lambda params, xs: run_cell(params, zeros, xs, k=k)[1], params

    named = {"autodiff": of_module(rnn), "dense": by_hand(hidden)}
    named |= {f"meprop, k={k}": by_hand(k) for k in ks}
    return named | {f"swapped, k={ks[-2]}": of_module(swapped)}


def measure(repeats: int, hidden: int, inputs: int, steps: int, batch: int, ks) -> dict:
    """Seconds of both programs of every arm, interleaved, and their ratios to `autodiff`."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    xs, cotangent = draw(1, steps, batch, inputs), draw(2, steps, batch, hidden)
    pull = jax.jit(lambda pullback, cotangent: pullback(cotangent))
    programs, results = {}, {}
    for name, (function, params) in arms(hidden, inputs, batch, ks).items():

        def both(params, xs, cotangent, function=function):
            out, pullback = jax.vjp(function, params, xs)
            return out, pullback(cotangent)

        pullback = jax.jit(lambda p, xs, f=function: jax.vjp(f, p, xs)[1])(params, xs)
        programs[name] = {
            "backward": (pull.lower(pullback, cotangent).compile(), (pullback, cotangent)),
            "both": (jax.jit(both).lower(params, xs, cotangent).compile(), (params, xs, cotangent)),
        }
        results[name] = {"backward": [], "both": []}
    bar = tqdm(total=2 * (repeats + 1), disable=None)
    for kind in ("backward", "both"):
        for repeat in range(repeats + 1):
            for name in programs:
                compiled, arguments = programs[name][kind]
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                if repeat:  # the first one warms up
                    results[name][kind].append(time.perf_counter() - start)
            bar.update()
    bar.close()
    summary = {}
    for name, kinds in results.items():
        summary[name] = {}
        for kind, seconds in kinds.items():
            ratio = lambda other: statistics.median(  # noqa: E731
                theirs / ours
                for theirs, ours in zip(results[other][kind], seconds, strict=True)  # noqa: B023
            )
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
            summary[name][kind] = {
                "median_seconds": statistics.median(seconds),
                "quartiles_seconds": [quartiles[0], quartiles[2]],
                "times_faster_than_autodiff": ratio("autodiff"),
                "times_faster_than_dense": ratio("dense"),
                "seconds": seconds,
            }
    return summary


def markdown(record: dict) -> str:
    """The result as a table."""
    lines = [
        f"LSTM of 500 on 500 inputs, 64 steps, batch 32, float32, {record['cores']} CPU cores "
        "(`python -m benchmarks.speed.meprop_lstm`; k features of each of four gates):",
        "",
        "| arm | backward, ms (quartiles) | faster than autodiff | than dense "
        "| both passes, ms | faster than autodiff |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, kinds in record["results"].items():
        backward, both = kinds["backward"], kinds["both"]
        low, high = (1e3 * q for q in backward["quartiles_seconds"])
        lines.append(
            f"| {name} | {1e3 * backward['median_seconds']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {backward['times_faster_than_autodiff']:.1f}x "
            f"| {backward['times_faster_than_dense']:.1f}x "
            f"| {1e3 * both['median_seconds']:.1f} | {both['times_faster_than_autodiff']:.1f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the backward pass of an LSTM.")
    parser.add_argument("--repeats", type=int, default=31, help="counted runs of every program")
    parser.add_argument("--quick", action="store_true", help="five runs of every program")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    sizes = (12, 8, 3, 2, (1, 2, 4)) if options.small else (HIDDEN, INPUTS, STEPS, BATCH, KS)
    load = os.getloadavg()
    results = measure(5 if options.quick else options.repeats, *sizes)
    about_it = {"hidden, inputs, steps, batch": sizes[:4], "results": results}
    record = about("meprop_lstm", load) | about_it
    suffix = "-small" if options.small else "-quick" if options.quick else ""
    path = options.out / f"meprop_lstm-{jax.default_backend()}{suffix}.json"
    write(path, record)
    print(f"wrote {path}\n\n{markdown(record)}")


if __name__ == "__main__":
    main()
