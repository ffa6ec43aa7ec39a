"""Recurrent networks trained by automatic derivatives, the lean backward pass and Highway-BP.

A whole step of `nnx.RNN` over a sequence: forward pass, backward pass and SGD, all in one donated
program, with a loss at every time step. The arms:

- `autodiff`: JAX's derivative of the plain module.
- `lean`: after `lean_rnn(rnn)`; exact.
- `highway, k=1`, `k=2`: after `lean_rnn(rnn, iterations=k)`, with the cosine of its gradient of the
  parameters to the exact one.

LSTM and GRU of 128, 256 and 512 units, batches of 1, 4 and 16, 256 steps, and of 128 units with a
batch of 128; on an accelerator 1,024 and 4,096 steps too, and a deep narrow residual stack of 48
blocks by `highway_scan`. Arms run interleaved. Parameters are those of initialization, where gates
are half open.

Run as `python -m benchmarks.speed.highway`; `--quick` takes a minute. A case that is finished is
kept if the program is killed, and not run again: delete the `.jsonl` for a new start. Writes
`benchmarks/results/speed/highway-<device>.json`, `.jsonl` and a heat map `.png`.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from benchmarks.records import RESULTS, about, add_line, read_lines, write
from priorityprop_jax.highway.quality import gradient_quality
from priorityprop_jax.highway.scan import highway_scan
from priorityprop_jax.rnn.lean import lean_rnn

CELLS: dict[str, Any] = {"gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}
WIDTHS, BATCHES = (128, 256, 512), (1, 4, 16)
DEPTH, TOKENS, STACK_WIDTHS = 48, 32, (64, 128, 256, 512)
KS = (1, 2)
LEARNING_RATE = 1e-3


def cases(device: str, quick: bool) -> list[dict[str, Any]]:
    """What to measure on this device, the shortest first."""
    if quick:
        return [
            {"model": model, "width": 32, "batch": batch, "steps": 64}
            for model, batch in (("gru", 1), ("lstm", 4))
        ]
    lengths = (256,) if device == "cpu" else (256, 1024, 4096)
    found = [
        {"model": model, "width": width, "batch": batch, "steps": steps}
        for steps in lengths
        for model in CELLS
        for width in WIDTHS
        for batch in BATCHES
    ]
    # Where a batch alone keeps the device busy
    found += [{"model": model, "width": 128, "batch": 128, "steps": 256} for model in CELLS]
    if device != "cpu":
        found += [
            {"model": "transformer", "width": width, "batch": batch, "steps": TOKENS}
            for width in STACK_WIDTHS
            for batch in BATCHES
        ]
    return found


def rnn_arms(case: dict[str, Any]) -> dict[str, tuple[Callable[..., Any], Any]]:
    """``name -> (loss of parameters and inputs, parameters)``."""
    width, batch = case["width"], case["batch"]
    cell = CELLS[case["model"]](width, width, rngs=nnx.Rngs(0))
    zeros = jnp.zeros((batch, width))
    carry = zeros if case["model"] == "gru" else (zeros, zeros)
    arms = {}
    rounds = {"autodiff": None, "lean": {}} | {f"highway, k={k}": {"iterations": k} for k in KS}
    for name, options in rounds.items():
        rnn = nnx.clone(nnx.RNN(cell, time_major=True))
        if options is not None:
            lean_rnn(rnn, **options)
        graph, params, rest = nnx.split(rnn, nnx.Param, ...)

        def loss_fn(params, xs, graph=graph, rest=rest):
            hs: Any = nnx.merge(graph, params, rest)(xs, initial_carry=carry)
            # A target of its own for every step and unit, drawn by the inputs' own signs
            return jnp.mean(jnp.square(hs - jnp.sign(xs)))

        arms[name] = loss_fn, params
    return arms


def stack_arms(case: dict[str, Any]) -> dict[str, tuple[Callable[..., Any], Any]]:
    """The same for a pre-norm transformer whose blocks are stacked."""
    width, heads = case["width"], max(1, case["width"] // 64)
    shapes = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    params = {
        name: jax.random.normal(jax.random.key(seed), (DEPTH, *shape)) * shape[0] ** -0.5
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("out", "down"):  # as GPT-2 begins
        params[name] *= (2 * DEPTH) ** -0.5

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def block(p, x):
        q, k, v = jnp.split(normed(x) @ p["qkv"], 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:-1], heads, -1) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + y @ p["out"]
        return x + jax.nn.gelu(normed(x) @ p["up"]) @ p["down"]

    def plain(params, x):
        return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]

    functions = {"autodiff": plain}
    for k in KS:
        functions[f"highway, k={k}"] = lambda params, x, k=k: highway_scan(
            block, params, x, iterations=k
        )

    def loss_of(function):
        def loss_fn(params, xs):
            xs = jnp.swapaxes(xs, 0, 1)
            return jnp.mean(jnp.square(function(params, xs) - jnp.sign(xs)))

        return loss_fn

    return {name: (loss_of(function), params) for name, function in functions.items()}


def measure(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of a step of every arm, interleaved, and the quality of its gradient."""
    arms = (stack_arms if case["model"] == "transformer" else rnn_arms)(case)
    xs = jax.random.normal(jax.random.key(1), (case["steps"], case["batch"], case["width"]))
    programs, states, quality, exact = {}, {}, {}, None
    for name, (loss_fn, params) in arms.items():

        def step(params, xs, loss_fn=loss_fn):
            loss, grads = jax.value_and_grad(loss_fn)(params, xs)
            return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), loss

        grads = jax.jit(jax.grad(loss_fn))(params, xs)
        exact = grads if exact is None else exact
        quality[name] = gradient_quality(exact, grads)[-1].cosine
        states[name] = jax.tree.map(jnp.array, params)  # an own copy, to be donated
        programs[name] = jax.jit(step, donate_argnums=0).lower(params, xs).compile()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            states[name], loss = program(states[name], xs)
            jax.block_until_ready((states[name], loss))
            if repeat > 1:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, taken in seconds.items():
        pairs = zip(seconds["autodiff"], taken, strict=True)
        results[name] = {
            "median_seconds": statistics.median(taken),
            "times_faster_than_autodiff": statistics.median(plain / own for plain, own in pairs),
            "cosine_to_exact": quality[name],
            "seconds": taken,
        }
    return case | {"arms": results}


def best(result: dict[str, Any], cosine_at_least: float = 0.99) -> tuple[str, float]:
    """The fastest arm whose gradient is good enough, and how many times faster it is."""
    good = {
        name: arm["times_faster_than_autodiff"]
        for name, arm in result["arms"].items()
        if arm["cosine_to_exact"] >= cosine_at_least
    }
    name = max(good, key=good.__getitem__)
    return name, good[name]


def draw_map(path: Path, results: list[dict[str, Any]]) -> None:
    """The times that the best arm of cosine 0.99 is faster, by width and batch, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import CenteredNorm

    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        panels.setdefault((result["model"], result["steps"]), []).append(result)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained"
    )
    for axis, ((model, steps), cells) in zip(axes[0], panels.items(), strict=True):
        widths, batches = (sorted({cell[key] for cell in cells}) for key in ("width", "batch"))
        grid = [[math.nan] * len(batches) for _ in widths]
        for cell in cells:
            name, ratio = best(cell)
            at = widths.index(cell["width"]), batches.index(cell["batch"])
            grid[at[0]][at[1]] = ratio
            label = f"{ratio:.1f}x\n{name.removeprefix('highway, ')}"
            dark = "white" if abs(ratio - 1) > 1.2 else "black"
            axis.text(at[1], at[0], label, ha="center", va="center", color=dark)
        # White where nothing is gained: the colour says who wins
        axis.imshow(grid, cmap="RdBu", norm=CenteredNorm(1.0, 2.0))
        axis.set(title=f"{model}, {steps} steps", xlabel="batch", ylabel="width")
        axis.set_xticks(range(len(batches)), batches)
        axis.set_yticks(range(len(widths)), widths)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"Whole steps (forward, backward, SGD) on {record['device']}, float32, times faster than "
        "`jax.grad` of the plain module, and the cosine of the gradient to the exact one "
        "(`python -m benchmarks.speed.highway`):",
        "",
        "| model | width | batch | steps | autodiff, ms | lean (exact) "
        + "".join(f"| highway, k={k} | cosine " for k in KS)
        + "|",
        "| --- |" + " ---: |" * (5 + 2 * len(KS)),
    ]
    for result in record["results"]:
        arms = result["arms"]
        ratio = lambda name: f"{arms[name]['times_faster_than_autodiff']:.2f}x"  # noqa: B023, E731
        row = [
            result["model"],
            *(str(result[key]) for key in ("width", "batch", "steps")),
            f"{1e3 * arms['autodiff']['median_seconds']:.1f}",
            ratio("lean") if "lean" in arms else "",
        ]
        for k in KS:
            name = f"highway, k={k}"
            row += [ratio(name), f"{arms[name]['cosine_to_exact']:.3f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times whole steps of lean and Highway-BP.")
    parser.add_argument("--repeats", type=int, default=21, help="counted steps of every arm")
    parser.add_argument("--quick", action="store_true", help="two small cases, five steps of each")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    device, load = jax.default_backend(), os.getloadavg()
    name = f"highway-{device}{'-quick' if options.quick else ''}"
    lines, path = options.out / f"{name}.jsonl", options.out / f"{name}.json"
    known = {key_of(result): result for result in read_lines(lines)}
    wanted = cases(device, options.quick)
    results = []
    for case in tqdm(wanted, disable=None):
        if key_of(case) not in known:
            known[key_of(case)] = measure(case, 5 if options.quick else options.repeats)
            add_line(lines, known[key_of(case)])
        results.append(known[key_of(case)])
    record = about("highway", load) | {"results": results}
    write(path, record)
    draw_map(path.with_suffix(".png"), results)
    print(f"wrote {path}\n\n{markdown(record)}")


def key_of(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[key] for key in ("model", "width", "batch", "steps"))


if __name__ == "__main__":
    main()
