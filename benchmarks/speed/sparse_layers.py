"""What sparse weights save in layers and convolutions, against dense JAX with the same shapes.

Three kinds of cases, the arms of each interleaved in one process, four runs of an arm in turn:

- `linear`: ``x W + b`` of a square weight; gradients of inputs, weight and bias.
- `stack`: three of them with relu between, where sparse neighbours keep the batch innermost.
- `conv`: convolutions of ResNet-18, NHWC, without a bias.

Programs: `forward`, `backward` (all gradients for a given ``dy``) and `both`. Arms: `dense`, the
backends `native` and, of products, `csr` (JAX alone), and with ``--torch PYTHON`` dense PyTorch in
another interpreter, convolutions in both memory layouts. Each place of a weight is kept or not at
random. Threads are limited by the affinity of the process before JAX starts; several counts get a
process each.

Run as `python -m benchmarks.speed.sparse_layers`, with `--report` to show what is there again.
Writes `benchmarks/results/speed/sparse_layers-<device>.json` after each case; what was cut short is
taken up again, and `--again` starts afresh.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
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
from jax import lax
from tqdm import tqdm

from benchmarks.records import RESULTS, about, write
from benchmarks.speed import other
from benchmarks.speed.meprop_speed import draw
from priorityprop_jax.sparse import (
    SparsePattern,
    make_pattern,
    sparse_backend,
    sparse_conv,
    sparse_linear,
)

TURN = 4  # counted runs of an arm before the next one's, as a training runs one layer for long
LONG = 0.1  # seconds: runs that take longer are counted from the first on, one a turn
SKIP = 2.0  # seconds: an arm of JAX alone that takes longer is left out
SECONDS = 0.8  # of each program of each arm, in 3 rounds at least

# Sparsities by backend.
LINEAR = {"native": (0.8, 0.9, 0.95, 0.99), "csr": (0.8, 0.85, 0.9, 0.95, 0.99)}
CONV = {"native": (0.8, 0.9, 0.95, 0.98)}


def cases() -> dict[str, dict]:
    found: dict[str, dict] = {}
    for batch in (128, 512):
        for width in (768, 2048, 3072):
            name = f"linear {batch}x{width}x{width}"
            found[name] = {"kind": "linear", "batch": batch, "width": width, "depth": 1}
    for batch, width in ((128, 768), (128, 2048), (512, 2048)):
        name = f"stack of 3, {batch}x{width}x{width}"
        found[name] = {"kind": "stack", "batch": batch, "width": width, "depth": 3}
    for size, channels, features, kernel, stride in (
        (56, 64, 64, 3, 1),
        (56, 64, 128, 3, 2),
        (56, 64, 128, 1, 2),
        (28, 128, 128, 3, 1),
        (14, 256, 256, 3, 1),
        (7, 512, 512, 3, 1),
    ):
        name = f"conv {size}x{size}, {channels} to {features}, {kernel}x{kernel}"
        found[name + (f", stride {stride}" if stride > 1 else "")] = {
            "kind": "conv", "batch": 64, "size": size, "channels": channels,
            "features": features, "kernel": kernel, "stride": stride,
        }  # fmt: skip
    return found


CASES = cases()


@functools.cache
def random_pattern(rows: int, columns: int, sparsity: float, seed: int) -> SparsePattern:
    return make_pattern(np.random.default_rng(seed).random((rows, columns)) >= sparsity)


def weight_bytes(pattern: SparsePattern | None, dense: int) -> int:
    """Of float32 values, and of all index arrays."""
    if pattern is None:
        return 4 * dense
    indices = sum(leaf.nbytes for leaf in jax.tree.leaves(pattern))
    return 4 * pattern.capacity + indices


def programs_of(layer: Callable[..., jax.Array], parameters: Any, x: Any, patterns: Any) -> dict:
    """``forward``, ``backward`` and ``both`` of ``layer(parameters, x, patterns)``.

    Each is a jitted function and its arguments.
    """
    y = jax.eval_shape(layer, parameters, x, patterns)
    dy = draw(99, *y.shape)

    def both(parameters, x, patterns, dy):
        y, pull = jax.vjp(lambda parameters, x: layer(parameters, x, patterns), parameters, x)
        return y, pull(dy)

    def backward(*arguments):
        return both(*arguments)[1]

    arguments = (parameters, x, patterns)
    return {
        "forward": (jax.jit(layer), arguments),
        "backward": (jax.jit(backward), (*arguments, dy)),
        "both": (jax.jit(both), (*arguments, dy)),
    }


def linear_arm(case: dict, backend: str, sparsity: float) -> tuple[dict, int]:
    """Programs of one arm, and the bytes of its weights."""
    width, depth = case["width"], case["depth"]
    dense = backend == "dense"
    biases = [jnp.zeros(width)] * depth
    if dense:
        patterns = [None] * depth
        weights = [draw(i, width, width) for i in range(depth)]
    else:
        patterns = [random_pattern(width, width, sparsity, i) for i in range(depth)]
        weights = [draw(i, p.capacity) for i, p in enumerate(patterns)]
        # As few values a row as there are: keep outputs finite in a stack.
        weights = [w / jnp.maximum(jnp.std(w) * np.sqrt(width), 1e-6) for w in weights]

    def layer(parameters, x, patterns):
        for i, (weight, bias) in enumerate(parameters):
            x = jax.nn.relu(x) if i else x
            if dense:
                x = x @ weight + bias
            else:
                x = sparse_linear(x, weight, patterns[i], backend=backend) + bias
        return x

    parameters = list(zip(weights, biases, strict=True))
    x = draw(7, case["batch"], width)
    return programs_of(layer, parameters, x, patterns), sum(
        weight_bytes(p, width * width) for p in patterns
    )


def conv_arm(case: dict, backend: str, sparsity: float) -> tuple[dict, int]:
    size, ins, outs = case["size"], case["channels"], case["features"]
    kernel, stride = (case["kernel"],) * 2, (case["stride"],) * 2
    columns = ins * math.prod(kernel)
    pad = (case["kernel"] - 1) // 2  # as torchvision has it, not "SAME" where strides are 2
    padding = ((pad, pad), (pad, pad))
    x = draw(7, case["batch"], size, size, ins)
    if backend == "dense":
        pattern = None
        weight = draw(0, *kernel, ins, outs)

        def layer(weight, x, _):
            names = lax.conv_dimension_numbers(x.shape, weight.shape, ("NHWC", "HWIO", "NHWC"))
            return lax.conv_general_dilated(x, weight, stride, padding, dimension_numbers=names)
    else:
        pattern = random_pattern(outs, columns, sparsity, 0)
        weight = draw(0, pattern.capacity) * 10

        def layer(weight, x, pattern):
            return sparse_conv(
                x, weight, pattern, kernel_size=kernel, strides=stride, padding=padding,
                backend=backend,
            )  # fmt: skip

    programs = programs_of(layer, weight, x, pattern)
    del programs["both"]
    return programs, weight_bytes(pattern, outs * columns)


def arms_of(case: dict) -> dict[str, tuple[str, float]]:
    """Backend and sparsity by name; the sparser of a backend first."""
    by_backend = dict(CONV if case["kind"] == "conv" else LINEAR)
    if sparse_backend().name != "native":
        del by_backend["native"]
    if case["kind"] == "stack":
        by_backend.pop("csr", None)
    return {"dense": ("dense", 0.0)} | {
        f"{backend} {s}": (backend, s)
        for backend, sparsities in by_backend.items()
        for s in sorted(sparsities, reverse=True)
    }


def timed(program: Callable[..., Any], arguments: tuple) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - start

    return run


def interleave(
    runners: dict[tuple[str, str], Callable[[], float]], rounds: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], float | None]]:
    """Seconds of each, a mean a round; one run's of those left out, None of those not tried."""
    first, skipped = {}, {}
    for (arm, program), run in runners.items():
        csr = arm.startswith("csr")
        if csr and any(program == other for _, other in skipped):
            skipped[arm, program] = None  # a sparser one took too long
            continue
        run()
        spent = run()
        (skipped if csr and spent > SKIP else first)[arm, program] = spent
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in first}
    for count in range(rounds):
        for key, expected in first.items():
            turn = 1 if expected > LONG else TURN
            if count >= max(3, SECONDS / (expected * turn)):
                continue
            if turn > 1:
                runners[key]()  # it finds the caches as others left them
            seconds[key].append(statistics.mean(runners[key]() for _ in range(turn)))
    return seconds, skipped


def measure(case: dict, rounds: int, torch: other.Other | None = None) -> dict[str, Any]:
    """By arm and program: milliseconds, and the speed over the dense one in the same round."""
    load = os.getloadavg()
    runners, arms = {}, {}
    for name, (backend, sparsity) in arms_of(case).items():
        arm = conv_arm if case["kind"] == "conv" else linear_arm
        programs, nbytes = arm(case, backend, sparsity)
        if backend == "csr":  # slow: one program says enough
            programs = {"both": programs["both"]}
        arms[name] = {"weight_bytes": nbytes, "programs": {}}
        if name in ("dense", "native 0.99", "native 0.98"):
            program, arguments = programs["backward"]
            memory = program.lower(*arguments).compile().memory_analysis()
            arms[name]["backward_temporary_bytes"] = memory.temp_size_in_bytes
        runners |= {(name, p): timed(*program) for p, program in programs.items()}
    if torch is not None and case["kind"] in ("linear", "conv"):
        for name, run in torch.runners(case).items():
            key: Any = tuple(name.split("/"))
            arms.setdefault(key[0], {"programs": {}})
            runners[key] = run
    seconds, skipped = interleave(runners, rounds)
    for (name, program), turns in seconds.items():
        dense = seconds.get(("dense", program), turns)
        ratios = sorted(a / b for a, b in zip(dense, turns, strict=False))
        arms[name]["programs"][program] = {
            "milliseconds": 1e3 * statistics.median(turns),
            "speedup": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "rounds": len(turns),
        }
    for (name, program), once in skipped.items():
        arms[name]["programs"][program] = {"skipped_after_seconds": once}
    random_pattern.cache_clear()
    draw.cache_clear()
    return {"case": case, "load_before_and_after": [load, os.getloadavg()], "arms": arms}


def speedup(result: dict, arm: str, program: str, over: str = "dense") -> float | None:
    """The speed of an arm over another; `both` is the sum of two where it was not measured."""

    def milliseconds(name: str) -> float | None:
        programs = result["arms"].get(name, {}).get("programs", {})
        if program in programs:
            return programs[program].get("milliseconds")
        if program != "both":
            return None
        parts = [programs.get(part, {}).get("milliseconds") for part in ("forward", "backward")]
        return None if None in parts else sum(parts)

    own = result["arms"].get(arm, {}).get("programs", {}).get(program, {})
    if over == "dense" and "speedup" in own:
        return own["speedup"]
    if over == "torch":  # the faster of its layouts
        times = [milliseconds(name) for name in result["arms"] if name.startswith("torch")]
        reference = min((t for t in times if t is not None), default=None)
    else:
        reference = milliseconds(over)
    mine = milliseconds(arm)
    return reference / mine if reference and mine else None


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [title, "", f"| {' | '.join(columns)} |"]
    numbers = [cell == "-" or cell[0].isdigit() for cell in rows[0]]
    aligned = ["---:" if number else "---" for number in numbers]
    return [*lines, f"| {' | '.join(aligned)} |", *(f"| {' | '.join(row)} |" for row in rows), ""]


def markdown(record: dict) -> str:
    """The result's tables, of the most threads."""
    threads = max(record["threads"], key=int)
    found = {
        (result["case"]["kind"], threads, name): result
        for name, result in record["threads"][threads].items()
    }
    cores = f"{threads} thread{'s' if threads != '1' else ''}"

    def rows(kinds, arms, program, sparsities):
        for (kind, _, name), result in found.items():
            if kind not in kinds:
                continue
            for arm, title in arms.items():
                cells = [speedup(result, f"{arm} {s}", program) for s in sparsities]
                if any(cells):
                    yield [name, title, *map(shown, cells)]

    percent = [f"{s:.0%}" for s in LINEAR["csr"]]
    backends = {"native": "native", "csr": "pure JAX"}
    lines = table(
        "Forward and backward pass of sparse linear layers, speed over dense JAX (batch x in x "
        f"out, float32, {cores}, 1.0x is dense; `python -m benchmarks.speed.sparse_layers`):",
        ["layer", "backend", *percent],
        [*rows(("linear", "stack"), backends, "both", LINEAR["csr"])],
    )
    sparsities = CONV["native"]
    for program in ("forward", "backward"):
        lines += table(
            f"Convolutions (batch 64), {program} pass, speed over dense JAX:",
            ["layer", "backend", *(f"{s:.0%}" for s in sparsities)],
            [*rows(("conv",), {"native": "native"}, program, sparsities)],
        )
    over_torch = [
        [name, *(
            shown(speedup(result, arm, program, "torch"))
            for arm in ("dense", "native 0.9")
            for program in ("forward", "backward")
        )]
        for (kind, _, name), result in found.items()
        if kind == "conv" and "torch" in result["arms"]
    ]  # fmt: skip
    lines += table(
        "The same convolutions, speed over dense PyTorch:",
        ["layer", "dense JAX, forward", "backward", "90 % sparse, forward", "backward"],
        over_torch,
    )
    memory = []
    for (kind, _, name), result in found.items():
        sparse = next((arm for arm in ("native 0.99", "native 0.98") if arm in result["arms"]), "")
        if sparse and kind != "stack":
            sizes = [f"{result['arms'][a]['weight_bytes'] / 1e6:.2f} MB" for a in ("dense", sparse)]
            memory.append([name, f"{float(sparse.split()[1]):.0%}", *sizes])
    lines += table(
        "Memory of the weights, indices included:", ["layer", "sparsity", "dense", "sparse"], memory
    )
    return "\n".join(lines).rstrip()


def limit_threads(threads: int) -> None:
    """Leaves JAX, which has not started yet, as many threads."""
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("threads are limited by the affinity of a process: this needs Linux")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise SystemExit(f"{threads} threads need as many cores, this process has {len(cores)}")
    os.sched_setaffinity(0, cores[:threads])
    jax.block_until_ready(draw(0, 512, 512) @ draw(1, 512, 512))
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    pool = names.count("tf_XLAEigen")
    if pool != threads:
        raise SystemExit(f"the compiler's pool has {pool} threads, not {threads}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="of all arms, at most")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--only", nargs="+", help="cases whose names contain one of these")
    parser.add_argument("--again", action="store_true", help="also cases that are measured")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has PyTorch")
    parser.add_argument("--report", action="store_true", help="show what was measured, and end")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if len(options.threads) == 1 and not options.report:
        limit_threads(options.threads[0])
    path = options.out / f"sparse_layers-{jax.default_backend()}.json"
    if options.report:
        record = json.loads(path.read_text(encoding="utf-8"))
        print(markdown(record))
        return
    if len(options.threads) > 1:
        for threads in options.threads:
            command = [sys.executable, "-m", "benchmarks.speed.sparse_layers", *sys.argv[1:]]
            subprocess.run([*command, "--threads", str(threads)], check=True)
        return
    threads = str(options.threads[0])
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"threads": {}}
    torch = other.torch(options.torch, "torch_dense.py", int(threads)) if options.torch else None
    measured = record["threads"].setdefault(threads, {})
    wanted = [n for n in CASES if options.only is None or any(part in n for part in options.only)]
    load = os.getloadavg()
    for name in tqdm(wanted, disable=None):
        if name in measured and not options.again:
            continue
        start = time.perf_counter()
        measured[name] = measure(CASES[name], 3 if options.quick else options.rounds, torch)
        measured[name]["wall_seconds"] = time.perf_counter() - start
        everything = {case: measured[case] for case in CASES if case in measured}
        record["threads"][threads] = measured = everything
        backend = sparse_backend()._asdict()
        new = about("sparse_layers", load) | {"backend": backend, "threads": record["threads"]}
        if torch is not None:
            new["versions"]["torch"] = torch.ask(version=True)["version"]
        write(path, new)
    if torch is not None:
        torch.close()
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
