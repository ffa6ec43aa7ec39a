"""Sparse training of MNIST's MLP 784-2048-2048-10: accuracy, a whole step, and time to target.

Arms: dense AdamW, also with fewer epochs or a smaller batch, and networks whose two hidden layers
have 95 % sparse weights, by the kernels of `sparse_linear`: `static`, with places drawn at random;
`rigl`, which moves places to where the dense gradient is largest; and `gmp`, gradual magnitude
pruning, dense in the first half of its epochs and sparse from there on. Networks that are sparse
from the start draw their values with a variance larger by 1 / density, so that a layer's outputs
vary as those of the dense one; an arm shows what the dense network's own variance does instead.

`run` trains every arm (8,000 images, cosine decay to zero over the arm's own epochs): each learning
rate of the grid on one seed, then the rate with the best validation accuracy on further seeds.
Finished runs are kept in `benchmarks/results/sparse_mlp-<device>.jsonl`, and what was cut short is
taken up again. `time` measures steps, prunings and moves of places, interleaved. `report` puts both
together. Trajectories may be trained on a busy machine, as only `time` reads a clock.

Run as `python -m benchmarks.sparse_mlp run`, then `time`, then `report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
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

from benchmarks.finetune_sst2 import bootstrap
from benchmarks.meprop_mlp import RATES, data
from benchmarks.records import about, read_lines, write
from priorityprop_jax import sparse_backend, sparse_linear
from priorityprop_jax.sparse.dynamic import cosine_fraction, drop_and_grow
from priorityprop_jax.sparse.gradual import gradual_pruning, masks_of
from priorityprop_jax.sparse.masks import random_mask
from priorityprop_jax.sparse.pattern import (
    densify_values,
    make_pattern,
    take_values,
)
from priorityprop_jax.sparse.swap import move_state

SPARSITY = 0.95
WIDTH = 2048
TURN = 4  # counted runs of a program before the next one's, as a training runs one alone
MOVE_EVERY, MOVE_UNTIL = 2, 0.75  # epochs between two moves of `rigl`, and its last, as a fraction
BARS = {"step": 3.0, "difference": -0.2}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      method: ``"dense"``, ``"static"``, ``"rigl"`` or ``"gmp"``.
      batch: rows in a batch.
      epochs: of a run, as a fraction of the full budget.
      scaled: whether initial values make up for what is missing.
    """

    method: str
    batch: int = 128
    epochs: float = 1.0
    scaled: bool = True

    def programs(self, epochs: int) -> list[str]:
        """Which program each epoch runs."""
        if self.method == "gmp":
            first = max(1, epochs // 2)
            return ["pruning"] * first + ["sparse"] * (epochs - first)
        return ["dense" if self.method == "dense" else "sparse"] * epochs

    def moves(self, epoch: int, epochs: int) -> bool:
        """Whether `rigl` moves places behind this epoch."""
        done = epoch + 1
        return self.method == "rigl" and done % MOVE_EVERY == 0 and done <= MOVE_UNTIL * epochs


ARMS = {
    "dense": Arm("dense"),
    "dense, half the epochs": Arm("dense", epochs=0.5),
    "dense, batch 32, quarter": Arm("dense", batch=32, epochs=0.25),
    "static": Arm("static"),
    "static, values as dense": Arm("static", scaled=False),
    "static, half the epochs": Arm("static", epochs=0.5),
    "static, twice the epochs": Arm("static", epochs=2.0),
    "rigl": Arm("rigl"),
    "gmp": Arm("gmp"),
}


def initial(arm: Arm, seed: int, width: int) -> tuple[dict, dict]:
    """He-normal parameters, and the patterns of those layers that are sparse."""
    widths = (784, width, width, 10)
    params, patterns = {}, {}
    for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        name, key = f"layer_{i}", jax.random.fold_in(jax.random.key(seed), i)
        kernel = jax.random.normal(key, (b, a)) * np.sqrt(2 / a)
        if arm.method in ("static", "rigl") and i < 2:
            mask = np.asarray(random_mask(jax.random.fold_in(key, 1), (b, a), SPARSITY))
            patterns[name] = make_pattern(mask)
            scale = np.sqrt(1 / mask.mean()) if arm.scaled else 1.0
            weight = {"values": scale * take_values(kernel, patterns[name])}
        else:
            weight = {"kernel": kernel.T}
        params[name] = weight | {"bias": jnp.zeros(b)}
    return params, patterns


def forward(params: dict, patterns: dict, x: Any, backend: str | None = None) -> Any:
    for name, layer in params.items():
        if name in patterns:
            y = sparse_linear(x, layer["values"], patterns[name], backend=backend)
        else:
            y = x @ layer["kernel"]
        x = y + layer["bias"]
        if name != "layer_2":
            x = jax.nn.relu(x)
    return x


def loss(params: dict, patterns: dict, x: Any, y: Any, backend: str | None = None) -> Any:
    logits = forward(params, patterns, x, backend)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def transformation(program: str, rate: Any, every: int, times: int) -> Any:
    """AdamW, with a pruning behind each of `times` stretches of `every` steps if asked for."""
    if program != "pruning":
        return optax.adamw(rate)
    pruning = gradual_pruning(
        SPARSITY,
        begin=every - 1,
        end=every * times - 1,
        every=every,
        where=lambda path: "layer_2" not in path,
    )
    return optax.chain(optax.adamw(rate), pruning)


def make_step(tx: Any, backend: str | None = None) -> Callable[..., Any]:
    """``(params, state, patterns, x, y) -> (params, state, loss)``."""

    def step(params, state, patterns, x, y):
        value, grads = jax.value_and_grad(loss)(params, patterns, x, y, backend)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


@functools.lru_cache(maxsize=8)
def epoch_program(program: str, batches: int, epochs: int, prunings: int) -> Callable[..., Any]:
    """An epoch, compiled; the learning rate is an argument."""

    def epoch(params, state, patterns, order, rate):
        schedule = optax.cosine_decay_schedule(1.0, epochs * batches)
        tx = transformation(program, lambda count: rate * schedule(count), batches, prunings)
        step = make_step(tx)
        x, y = jnp.asarray(data()[0]), jnp.asarray(data()[1])

        def body(carried, rows):
            params, state, value = step(*carried, patterns, x[rows], y[rows])
            return (params, state), value

        (params, state), losses = lax.scan(body, (params, state), order)
        return params, state, losses.mean()

    return jax.jit(epoch, donate_argnums=(0, 1))


@jax.jit
def evaluate(params: dict, patterns: dict, x: Any, y: Any) -> jax.Array:
    return (forward(params, patterns, x).argmax(-1) == y).mean()


@jax.jit
def dense_gradients(params: dict, patterns: dict, x: Any, y: Any) -> dict:
    """Magnitudes of the gradients ``(out, in)`` that the sparse layers would have if dense."""

    def dense_loss(weights):
        dense = {name: layer | {"kernel": weights[name].T} if name in weights else layer
                 for name, layer in params.items()}  # fmt: skip
        return loss(dense, {}, x, y)

    weights = {name: densify_values(params[name]["values"], p) for name, p in patterns.items()}
    return jax.tree.map(jnp.abs, jax.grad(dense_loss)(weights))


def with_moments(state: Any, change: Callable[[dict], dict]) -> Any:
    """An optimizer's state, its moments changed as the parameters are."""

    def replaced(part):
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(mu=change(part.mu), nu=change(part.nu))
        return part

    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    return jax.tree.map(replaced, state, is_leaf=is_adam)


def move(params: dict, state: Any, patterns: dict, x: Any, y: Any, fraction: float):
    """RigL's step: parameters, state and patterns with a fraction of the places moved."""
    scores = dense_gradients(params, patterns, x, y)
    found = {
        name: drop_and_grow(params[name]["values"], pattern, scores[name], fraction=fraction)
        for name, pattern in patterns.items()
    }

    moved = {name: (params[name]["values"].shape, source) for name, (_, source) in found.items()}
    params, state = move_state((params, state), moved)
    return params, state, {name: pattern for name, (pattern, _) in found.items()}


def become_sparse(params: dict, state: Any) -> tuple[dict, Any, dict]:
    """Parameters, state and patterns of a network that `gradual_pruning` has pruned."""
    masks = masks_of(state)
    patterns = {
        name: make_pattern(np.asarray(layer["kernel"]).T)
        for name, layer in masks.items()
        if layer["kernel"] is not None
    }

    def change(tree):
        return {
            name: {"values": take_values(layer["kernel"].T, patterns[name]), "bias": layer["bias"]}
            if name in patterns
            else layer
            for name, layer in tree.items()
        }

    return change(params), with_moments(state[0], change), patterns


def train(arm: Arm, epochs: int, rate: float, seed: int, width: int = WIDTH) -> dict:
    """Validation accuracy after every epoch, and test accuracy at the end."""
    x, y, vx, vy, tx, ty = data()
    own = max(1, round(epochs * arm.epochs))
    batches = len(x) // arm.batch
    params, patterns = initial(arm, seed, width)
    programs = arm.programs(own)
    prunings = programs.count("pruning")
    # The learning rate does not enter the state.
    state = transformation(programs[0], lambda _: 1.0, batches, prunings).init(params)
    validation = []
    for epoch, program in enumerate(programs):
        if program == "sparse" and not patterns:
            params, state, patterns = become_sparse(params, state)
        order = np.random.default_rng((seed, epoch)).permutation(len(x))
        order = jnp.asarray(order[: batches * arm.batch].reshape(batches, arm.batch))
        compiled = epoch_program(program, batches, own, prunings)
        params, state, value = compiled(params, state, patterns, order, jnp.float32(rate))
        if arm.moves(epoch, own):
            fraction = float(cosine_fraction(epoch + 1, own))
            rows = order[0]
            params, state, patterns = move(params, state, patterns, x[rows], y[rows], fraction)
        validation.append(float(evaluate(params, patterns, vx, vy)))
        if not np.isfinite(float(value)):
            break
    return {"validation": validation, "test": float(evaluate(params, patterns, tx, ty))}


def best_rate(runs: list[dict], name: str) -> float | None:
    """The rate with the best last validation accuracy on the first seed, once all are there."""
    tried = {r["rate"]: r["validation"][-1] for r in runs if (r["arm"], r["seed"]) == (name, 0)}
    return max(tried, key=lambda rate: tried[rate]) if set(tried) >= set(RATES) else None


def run(path: Path, epochs: int, seeds: int, only: list[str] | None) -> None:
    chosen = {name: arm for name, arm in ARMS.items() if only is None or name in only}
    bar = tqdm(total=len(chosen) * (len(RATES) + seeds), disable=None)

    def one(name: str, arm: Arm, rate: float, seed: int) -> None:
        known = {(r["arm"], r["rate"], r["seed"], r["epochs"]) for r in read_lines(path)}
        if (name, rate, seed, epochs) not in known:
            record = {"arm": name, "rate": rate, "seed": seed, "epochs": epochs}
            record |= train(arm, epochs, rate, seed)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        bar.update()

    for name, arm in chosen.items():
        for rate in RATES:
            one(name, arm, rate, 0)
        runs = [r for r in read_lines(path) if r["epochs"] == epochs]
        rate = best_rate(runs, name)
        assert rate is not None
        for seed in range(1, seeds + 1):
            one(name, arm, rate, seed)
    bar.close()


def step_programs(batch: int, width: int) -> dict[str, Callable[[], Any]]:
    """What a training is made of, each as a function that runs it once more."""
    x, y = (jnp.asarray(part[:batch]) for part in data()[:2])
    programs: dict[str, Callable[[], Any]] = {}

    def add(name, method, tx, backend=None):
        params, patterns = initial(Arm(method), 0, width)
        step = jax.jit(make_step(tx, backend), donate_argnums=(0, 1))
        kept = {"now": (params, tx.init(params))}

        def again():
            params, state, _ = jax.block_until_ready(step(*kept["now"], patterns, x, y))
            kept["now"] = (params, state)

        programs[name] = again
        return kept, patterns

    add("dense", "dense", optax.adamw(1e-3))
    kept, patterns = add("sparse", "static", optax.adamw(1e-3))
    if sparse_backend().name == "native":
        add("sparse, pure JAX", "static", optax.adamw(1e-3), "csr")
    often = 2**20
    add("pruning", "dense", transformation("pruning", 1e-3, often, 2))
    add("pruning, when it prunes", "dense", transformation("pruning", 1e-3, 1, often))
    programs["move"] = lambda: jax.block_until_ready(move(*kept["now"], patterns, x, y, 0.3))
    return programs


def measure(repeats: int, batches: tuple[int, ...] = (128, 32), width: int = WIDTH) -> dict:
    """By batch size and program, seconds of a run in each turn; all interleaved."""
    results = {}
    for batch in batches:
        programs = step_programs(batch, width)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for repeat in tqdm(range(repeats + 1), disable=None):
            for name, again in programs.items():
                # What happens once an epoch is measured once a turn.
                runs = 1 if name in ("move", "pruning, when it prunes") else TURN + 1
                turn = []
                for _ in range(runs):
                    start = time.perf_counter()
                    again()
                    turn.append(time.perf_counter() - start)
                if repeat:  # the first turn warms up, as does the first run of each
                    seconds[name].append(statistics.mean(turn[1:] or turn))
        results[str(batch)] = seconds
    return results


def seconds_by_epoch(arm: Arm, epochs: int, seconds: dict) -> list[float]:
    """Of a run of as many epochs, evaluation left out."""
    own = {name: statistics.median(turns) for name, turns in seconds[str(arm.batch)].items()}
    steps = 8000 // arm.batch
    found = []
    for epoch, program in enumerate(arm.programs(epochs)):
        spent = steps * own[program]
        if program == "pruning":
            spent += own["pruning, when it prunes"] - own["pruning"]
        if arm.moves(epoch, epochs):
            spent += own["move"]
        found.append(spent)
    return found


def summary(runs: list[dict], seconds: dict) -> dict:
    """Accuracy and seconds to the target of every arm, whole steps, and which bars are met."""
    epochs = max((r["epochs"] for r in runs), default=0)
    runs = [r for r in runs if r["epochs"] == epochs]
    named = {}
    for name in ARMS:
        rate = best_rate(runs, name)
        chosen = [r for r in runs if r["arm"] == name and r["rate"] == rate and r["seed"] > 0]
        if chosen:
            named[name] = sorted(chosen, key=lambda r: r["seed"])
    steps = {
        batch: {
            name: {
                "milliseconds": 1e3 * statistics.median(turns),
                "speedup": statistics.median(
                    a / b for a, b in zip(programs["dense"], turns, strict=True)
                ),
            }
            for name, turns in programs.items()
        }
        for batch, programs in seconds.items()
    }
    if "dense" not in named:
        return {"epochs": epochs, "steps": steps, "arms": []}
    target = statistics.median(max(r["validation"]) for r in named["dense"])

    def clock(name: str, r: dict) -> float | None:
        """Seconds to the target; None where it is missed."""
        passed = np.cumsum(seconds_by_epoch(ARMS[name], len(r["validation"]), seconds))
        reached = [float(s) for s, a in zip(passed, r["validation"], strict=True) if a >= target]
        return reached[0] if reached else None

    rows = []
    for name, chosen in named.items():
        tests = [100 * r["test"] for r in chosen]
        row = {
            "arm": name,
            "rate": chosen[0]["rate"],
            "seeds": len(chosen),
            "test": statistics.mean(tests),
            "spread": statistics.stdev(tests) if len(tests) > 1 else 0.0,
            "difference": statistics.mean(tests)
            - statistics.mean(100 * r["test"] for r in named["dense"]),
            "validation": statistics.median(max(r["validation"]) for r in chosen),
        }
        if seconds:
            plain = {r["seed"]: clock("dense", r) for r in named["dense"]}
            own = {r["seed"]: clock(name, r) for r in chosen}
            ratios = [
                plain[seed] / value  # type: ignore[operator]
                for seed, value in own.items()
                if value and plain.get(seed)
            ]
            row |= {
                "seconds": sum(seconds_by_epoch(ARMS[name], len(chosen[0]["validation"]), seconds)),
                "reached": sum(value is not None for value in own.values()),
                "pairs": len(ratios),
                "speedup": float(np.exp(np.mean(np.log(ratios)))) if ratios else None,
                "interval": bootstrap(ratios) if len(ratios) > 2 else None,
            }
        rows.append(row)
    return {"epochs": epochs, "target": target, "steps": steps, "arms": rows}


def readme_table(record: dict) -> str:
    """The part of README.md that this benchmark's result is shown in."""
    found = record["summary"]
    lines = [
        f"Whole training step of the MLP 784-{WIDTH}-{WIDTH}-10 with {SPARSITY:.0%} sparse hidden "
        f"layers over dense AdamW, {record['cores']} CPU cores (bar: {BARS['step']:.1f}x):",
        "",
        "| batch | dense | sparse | | bar |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for batch, programs in found["steps"].items():
        ours = programs["sparse"]
        lines.append(
            f"| {batch} | {programs['dense']['milliseconds']:.1f} ms | "
            f"{ours['milliseconds']:.1f} ms | {ours['speedup']:.1f}x | "
            f"{'met' if ours['speedup'] >= BARS['step'] else 'missed'} |"
        )
    if not found["arms"]:
        return "\n".join(lines)
    lines += [
        "",
        f"The same network trained on 8,000 MNIST images for {found['epochs']} epochs, learning "
        f"rate tuned per arm: test accuracy (mean over {found['arms'][0]['seeds']} seeds; bar: at "
        f"most {-BARS['difference']} points below dense), and time to the validation accuracy of "
        "tuned AdamW over AdamW's own, paired by seed (`python -m benchmarks.sparse_mlp`):",
        "",
        "| arm | test accuracy | to dense | bar | seconds in all | reached the target "
        "| time to target |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in found["arms"]:
        speed = "-" if row.get("speedup") is None else f"{row['speedup']:.2f}x"
        if row.get("interval"):
            speed += " ({:.2f} to {:.2f})".format(*row["interval"])
        # Means of accuracies on 1,000 images are multiples of 0.1 / seeds, but for rounding.
        met = "met" if row["difference"] >= BARS["difference"] - 1e-3 else "missed"
        lines.append(
            f"| {row['arm']} | {row['test']:.2f} ± {row['spread']:.2f} % | "
            f"{row['difference']:+.2f} | {'' if row['arm'].startswith('dense') else met} | "
            f"{row.get('seconds', 0.0):.1f} | {row.get('reached', '-')} of {row['seeds']} | "
            f"{speed} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "time", "report"))
    parser.add_argument("--epochs", type=int, default=10, help="the full budget")
    parser.add_argument("--seeds", type=int, default=5, help="beside the one that tunes")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="these alone")
    parser.add_argument("--repeats", type=int, default=12, help="counted turns of `time`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    runs = options.out / f"sparse_mlp-{jax.default_backend()}.jsonl"
    times = runs.with_name(f"{runs.stem}-times.json")
    if options.what == "run":
        run(runs, options.epochs, options.seeds, options.arms)
        return
    if options.what == "time":
        load = os.getloadavg()
        seconds = measure(options.repeats)
        write(times, about("sparse_mlp", load) | {"seconds": seconds})
        return
    seconds = json.loads(times.read_text(encoding="utf-8"))["seconds"] if times.exists() else {}
    record = about("sparse_mlp") | {"backend": sparse_backend()._asdict(), "bars": BARS}
    record["summary"] = summary(read_lines(runs), seconds)
    write(runs.with_suffix(".json"), record)
    print(readme_table(record))


if __name__ == "__main__":
    main()
