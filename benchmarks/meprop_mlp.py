"""meProp on MNIST's MLPs: accuracy against k, and time to the accuracy of tuned AdamW.

`run` trains every arm (784-n-n-10, 8,000 images, batch 128, cosine decay to zero over the arm's own
epochs): each learning rate of the grid on one seed, then the rate with the best validation accuracy
on further seeds. Finished runs are kept in `benchmarks/results/meprop_mlp-<device>.jsonl`, and what
was cut short is taken up again. `time` measures a step of each arm's programs, interleaved.
`report` puts both together: test accuracy against k, and seconds to the target, which is the median
best validation accuracy of tuned AdamW. Trajectories may be trained on a busy machine, as only
`time` reads a clock.

Run as `python -m benchmarks.meprop_mlp run`, then `time`, then `report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from benchmarks.finetune_sst2 import bootstrap
from benchmarks.records import about, read_lines, write
from priorityprop_jax import densify, row_sparse_adam
from priorityprop_jax.cli.tasks import load_task
from priorityprop_jax.meprop.grad import row_value_and_grad
from priorityprop_jax.meprop.products import MePropDot

COLUMNS = (((1,), (0,)), ((), ()))
RATES = (1e-3, 2.2e-3, 4.6e-3, 1e-2)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      k: hidden features kept, by part of the training: ((until, k), ...) with ``until`` a fraction
        of the epochs and k None for a dense backward pass.
      pattern: see `meprop_dot_general`.
      optimizer: `adamw` (dense), `lazy` (`row_sparse_adam`), `stale` (with ``decay_stale``), or
        `whole`: `optax.adamw` on densified gradients.
      dropout: on both hidden layers.
      batch: rows in a batch.
      epochs: of a run, as a fraction of the full budget.
    """

    k: tuple[tuple[float, int | None], ...] = ((1.0, None),)
    pattern: str = "unified"
    optimizer: str = "lazy"
    dropout: float = 0.0
    batch: int = 128
    epochs: float = 1.0

    def at(self, fraction: float) -> int | None:
        return next(k for until, k in self.k if fraction < until)


def fixed(k: int, **options: Any) -> Arm:
    return Arm(((1.0, k),), **options)


def arms(width: int) -> dict[str, Arm]:
    dense = {"optimizer": "adamw"}
    if width > 1000:
        return {
            "dense": Arm(**dense),
            "dense, half the epochs": Arm(epochs=0.5, **dense),
            "dense, third of the epochs": Arm(epochs=1 / 3, **dense),
            "dense, batch 32, quarter": Arm(batch=32, epochs=0.25, **dense),
            "unified 4%": fixed(82),
            "unified 8%": fixed(164),
            "unified 8%, half the epochs": fixed(164, epochs=0.5),
            "dense tenth, unified 8%, half": Arm(((0.1, None), (1.0, 164)), epochs=0.5),
            "unified 8%, batch 32, quarter": fixed(164, batch=32, epochs=0.25),
            "random 8%": fixed(164, pattern="random"),
            "dense, dropout": Arm(dropout=0.1, **dense),
            "unified 16%, dropout": fixed(328, dropout=0.1),
            "unified 8%, dropout, twice the epochs": fixed(164, dropout=0.1, epochs=2.0),
            "dense tenth, unified 16%, dropout": Arm(((0.1, None), (1.0, 328)), dropout=0.1),
        }
    named = {"dense": Arm(**dense)}
    for k in (80, 40, 20, 10):
        named[f"unified {k}"] = fixed(k)
    named |= {
        "unified 20, stale moments decay": fixed(20, optimizer="stale"),
        "unified 20, whole Adam": fixed(20, optimizer="whole"),
        "example 20, whole Adam": fixed(20, pattern="example", optimizer="whole"),
        "blocks of 20, 20": fixed(20, pattern="block"),
        "random 20": fixed(20, pattern="random"),
        "unified 20, dense first tenth": Arm(((0.1, None), (1.0, 20))),
        "unified 80, dense first tenth": Arm(((0.1, None), (1.0, 80))),
        "unified 20, dense last tenth": Arm(((0.9, 20), (1.0, None))),
        "unified growing 10 to 80": Arm(((0.25, 10), (0.5, 20), (0.75, 40), (1.0, 80))),
        "unified 20, twice the epochs": fixed(20, epochs=2.0),
    }
    with_dropout = {
        f"{name}, dropout": dataclasses.replace(arm, dropout=0.1)
        for name, arm in named.items()
        if name == "dense" or name.startswith("unified")
    }
    return named | with_dropout


@functools.cache
def data() -> tuple[np.ndarray, ...]:
    task = load_task("mnist-mlp")
    parts = (task.train_data, task.eval_data, task.test_data)
    return tuple(part.arrays[name] for part in parts for name in ("x", "y"))


def initial(width: int, seed: int) -> dict:
    """He-normal weights; hidden kernels ``(out, in)``, the last ``(in, out)``."""
    widths = (784, width, width, 10)
    params = {}
    for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        kernel = jax.random.normal(key, (b, a)) * np.sqrt(2 / a)
        params[f"layer_{i}"] = {"kernel": kernel if i < 2 else kernel.T, "bias": jnp.zeros(b)}
    return params


def forward(params: dict, x: Any, products: Any, dropout: float = 0.0, key: Any = None) -> Any:
    for i, layer in enumerate(params.values()):
        if i == 2:
            return x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(products[i](x, layer["kernel"]) + layer["bias"])
        if dropout:
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
            x = jnp.where(keep, x / (1 - dropout), 0)
    raise AssertionError("unreachable")


def transformation(arm: Arm, rate: Any) -> optax.GradientTransformation:
    if arm.optimizer in ("lazy", "stale"):
        return row_sparse_adam(rate, weight_decay=1e-4, decay_stale=arm.optimizer == "stale")
    return optax.adamw(rate)


def make_step(arm: Arm, k: int | None, width: int, rate: Any):
    """``(params, state, x, y, key) -> (params, state, loss)``."""

    def product(i: int):
        if k is None:
            return lambda x, kernel: lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))
        dot = MePropDot(k, arm.pattern, 20, transposed=True, name=f"layer_{i}", seed=i)  # type: ignore[arg-type]
        return lambda x, kernel: dot(x, kernel, COLUMNS)

    products, tx = [product(0), product(1)], transformation(arm, rate)

    def loss(params, x, y, key):
        logits = forward(params, x, products, arm.dropout, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, state, x, y, key):
        value, grads = row_value_and_grad(loss, params, x, y, key)
        if arm.optimizer not in ("lazy", "stale"):
            updates, state = tx.update(densify(grads), state, params)
            return optax.apply_updates(params, updates), state, value
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


@functools.lru_cache(maxsize=4)
def programs(arm: Arm, width: int, steps: int):
    """An epoch of each k, and the evaluation, compiled; the learning rate is an argument."""

    def epoch(k, params, state, order, key, rate):
        schedule = optax.cosine_decay_schedule(1.0, steps)
        step = make_step(arm, k, width, lambda count: rate * schedule(count))
        x, y = jnp.asarray(data()[0]), jnp.asarray(data()[1])

        def body(carry, rows):
            params, state, key = carry
            key, own = jax.random.split(key)
            params, state, value = step(params, state, x[rows], y[rows], own)
            return (params, state, key), value

        (params, state, key), losses = lax.scan(body, (params, state, key), order)
        return params, state, key, losses.mean()

    plain = [lambda x, w: x @ w.T] * 2
    evaluate = jax.jit(lambda p, x, y: (forward(p, x, plain).argmax(-1) == y).mean())
    compiled = jax.jit(epoch, static_argnums=0, donate_argnums=(1, 2, 4))
    return compiled, evaluate


def train(arm: Arm, width: int, epochs: int, rate: float, seed: int) -> dict:
    """Validation accuracy after every epoch, and test accuracy at the end."""
    x, y, vx, vy, tx, ty = data()
    own = max(1, round(epochs * arm.epochs))
    batches = len(x) // arm.batch
    compiled, evaluate = programs(arm, width, own * batches)
    params = initial(width, seed)
    # The learning rate does not enter the state.
    state, key = (
        transformation(arm, optax.constant_schedule(1.0)).init(params),
        jax.random.key(seed),
    )
    validation = []
    for epoch in range(own):
        order = np.random.default_rng((seed, epoch)).permutation(len(x))
        order = jnp.asarray(order[: batches * arm.batch].reshape(batches, arm.batch))
        k = arm.at(epoch / own)
        params, state, key, loss = compiled(k, params, state, order, key, jnp.float32(rate))
        validation.append(float(evaluate(params, vx, vy)))
        if not np.isfinite(float(loss)):
            break
    return {"validation": validation, "test": float(evaluate(params, tx, ty))}


def best_rate(runs: list[dict], width: int, name: str) -> float | None:
    """The rate with the best last validation accuracy on the first seed, once all are there."""
    tried = {
        r["rate"]: r["validation"][-1]
        for r in runs
        if (r["width"], r["arm"], r["seed"]) == (width, name, 0)
    }
    return max(tried, key=lambda rate: tried[rate]) if set(tried) >= set(RATES) else None


def run(path: Path, width: int, epochs: int, seeds: int, only: list[str] | None) -> None:
    chosen = {n: a for n, a in arms(width).items() if only is None or n in only}
    bar = tqdm(total=len(chosen) * (len(RATES) + seeds), disable=None)

    def one(name: str, arm: Arm, rate: float, seed: int) -> None:
        known = {
            (r["width"], r["arm"], r["rate"], r["seed"], r["epochs"]) for r in read_lines(path)
        }
        if (width, name, rate, seed, epochs) not in known:
            record = {"width": width, "arm": name, "rate": rate, "seed": seed, "epochs": epochs}
            record |= train(arm, width, epochs, rate, seed)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        bar.update()

    for name, arm in chosen.items():
        for rate in RATES:
            one(name, arm, rate, 0)
        rate = best_rate(read_lines(path), width, name)
        assert rate is not None
        for seed in range(1, seeds + 1):
            one(name, arm, rate, seed)
    bar.close()


def measure(width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of every arm, by k, in one interleaved run."""
    x, y = data()[:2]
    compiled, arguments, seconds = {}, {}, {}
    for name, arm in arms(width).items():
        for k in {k for _, k in arm.k}:
            key = (dataclasses.replace(arm, k=((1.0, k),), epochs=1.0), k)
            seconds.setdefault(key, []).append((name, str(k)))
            if key in compiled:
                continue
            params = initial(width, 0)
            state = transformation(arm, 1e-3).init(params)
            given = (params, state, x[: arm.batch], y[: arm.batch], jax.random.key(0))
            step = jax.jit(make_step(arm, k, width, 1e-3), donate_argnums=(0, 1))
            compiled[key], arguments[key] = step.lower(*given).compile(), given
    times: dict[Any, list[float]] = {key: [] for key in compiled}
    for repeat in tqdm(range(repeats + 2), disable=None):
        for key, program in compiled.items():
            start = time.perf_counter()
            new = jax.block_until_ready(program(*arguments[key]))
            if repeat > 1:
                times[key].append(time.perf_counter() - start)
            arguments[key] = (*new[:2], *arguments[key][2:])
    result: dict[str, dict[str, float]] = {}
    for key, users in seconds.items():
        for name, k in users:
            result.setdefault(name, {})[k] = statistics.median(times[key])
    return result


def summary(runs: list[dict], times: dict[str, dict]) -> dict[str, list[dict]]:
    """By width, one row an arm: accuracy, and seconds to the target against tuned AdamW."""
    tables: dict[str, list[dict]] = {}
    for width in sorted({r["width"] for r in runs}):
        mine = [r for r in runs if r["width"] == width]
        named = {}
        for name, arm in arms(width).items():
            rate = best_rate(mine, width, name)
            chosen = [r for r in mine if r["arm"] == name and r["rate"] == rate and r["seed"] > 0]
            if chosen:
                named[name] = (arm, rate, sorted(chosen, key=lambda r: r["seed"]))
        if "dense" not in named:
            continue
        target = statistics.median(max(r["validation"]) for r in named["dense"][2])
        own = times.get(str(width), {})

        def clock(name: str, arm: Arm, r: dict, target: float, own: dict) -> float | None:
            """Seconds to the target; None where it is missed."""
            steps = 8000 // arm.batch
            total = len(r["validation"])
            passed = 0.0
            for epoch, accuracy in enumerate(r["validation"]):
                passed += steps * own[name][str(arm.at(epoch / total))]
                if accuracy >= target:
                    return passed
            return None

        rows = []
        for name, (arm, rate, chosen) in named.items():
            tests = [100 * r["test"] for r in chosen]
            row = {
                "arm": name,
                "rate": rate,
                "seeds": len(chosen),
                "test": statistics.mean(tests),
                "spread": statistics.stdev(tests) if len(tests) > 1 else 0.0,
                "difference": statistics.mean(tests)
                - statistics.mean(100 * r["test"] for r in named["dense"][2]),
                "validation": statistics.median(max(r["validation"]) for r in chosen),
            }
            if name in own:
                row["step_milliseconds"] = {k: 1e3 * s for k, s in own[name].items()}
                plain = {r["seed"]: clock("dense", named["dense"][0], r, target, own)
                         for r in named["dense"][2]}  # fmt: skip
                seconds = {r["seed"]: clock(name, arm, r, target, own) for r in chosen}
                row["seconds"] = statistics.mean(full_time(name, arm, r, own) for r in chosen)
                ratios = [
                    plain[seed] / value  # type: ignore[operator]
                    for seed, value in seconds.items()
                    if value and plain.get(seed)
                ]
                row |= {
                    "reached": sum(v is not None for v in seconds.values()),
                    "pairs": len(ratios),
                    "speedup": float(np.exp(np.mean(np.log(ratios)))) if ratios else None,
                    "interval": bootstrap(ratios) if len(ratios) > 2 else None,
                }
            rows.append(row)
        tables[str(width)] = rows
    return tables


def full_time(name: str, arm: Arm, r: dict, own: dict) -> float:
    """Seconds of a whole run, evaluation left out."""
    total = len(r["validation"])
    return sum(8000 // arm.batch * own[name][str(arm.at(epoch / total))] for epoch in range(total))


def readme_table(record: dict) -> str:
    """The part of README.md that this benchmark's result is shown in."""
    lines = []
    for width, rows in record["summary"].items():
        lines += [
            f"MLP 784-{width}-{width}-10 on 8,000 MNIST images, learning rate tuned per arm: test "
            f"accuracy (mean over {rows[0]['seeds']} seeds), and time to the validation accuracy "
            "of tuned AdamW over AdamW's own, paired by seed (`python -m benchmarks.meprop_mlp`):",
            "",
            "| arm | test accuracy | to dense | step | seconds in all | reached the target "
            "| time to target |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            steps = row.get("step_milliseconds")
            shown = "-" if not steps else " / ".join(f"{ms:.1f}" for ms in steps.values()) + " ms"
            speed = "-" if row.get("speedup") is None else f"{row['speedup']:.2f}x"
            if row.get("interval"):
                speed += " ({:.2f} to {:.2f})".format(*row["interval"])
            lines.append(
                f"| {row['arm']} | {row['test']:.2f} ± {row['spread']:.2f} % | "
                f"{row['difference']:+.2f} | {shown} | {row.get('seconds', 0.0):.1f} | "
                f"{row.get('reached', '-')} of {row['seeds']} | {speed} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "time", "report"))
    parser.add_argument("--width", type=int, default=500, help="of both hidden layers")
    parser.add_argument("--epochs", type=int, default=20, help="the full budget")
    parser.add_argument("--seeds", type=int, default=5, help="beside the one that tunes")
    parser.add_argument("--arms", nargs="+", help="these alone")
    parser.add_argument("--repeats", type=int, default=40, help="of `time`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    runs = options.out / f"meprop_mlp-{jax.default_backend()}.jsonl"
    times = runs.with_name(f"{runs.stem}-times.json")
    if options.what == "run":
        run(runs, options.width, options.epochs, options.seeds, options.arms)
        return
    record = json.loads(times.read_text()) if times.exists() else {"seconds": {}}
    if options.what == "time":
        load = os.getloadavg()
        seconds = record["seconds"] | {str(options.width): measure(options.width, options.repeats)}
        write(times, about("meprop_mlp", load) | {"seconds": seconds})
        return
    record = about("meprop_mlp") | {"summary": summary(read_lines(runs), record["seconds"])}
    write(runs.with_suffix(".json"), record)
    print(readme_table(record))


if __name__ == "__main__":
    main()
