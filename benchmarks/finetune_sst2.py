"""Time to target: fine-tuning MiniLM-L6 on SST-2's 6,920 sentences, 32 tokens, 2 classes.

Target: the median over seeds of the best dev accuracy that tuned AdamW on everything reaches in
its full budget of one epoch. Every arm gets the same number of trials on seed 0, two
neighbours on one grid of learning rates (3e-4, and 1e-4 if it trains most parameters, else 1e-3),
and the better one, by dev accuracy, on further seeds. Schedules decay to the arm's own budget of
steps. All arms run in the same trainer, on the same order of the data for a seed.

The clock has two parts, so that training may run on a busy machine and no second is taken from it:
`run` trains and records which compiled program each step ran; `time` takes the seconds of each of
those programs on an idle machine, all interleaved, step by step, with the host's work around them
(plan, cache lookups and stores, optimizer state moves). Time to target is their sum up to the
evaluation that reached it. Evaluations, the same for all arms, and compilation are left out.

    python -m benchmarks.finetune_sst2 run --data DIR [--arms full lora ...] [--seeds 3]
    python -m benchmarks.finetune_sst2 time --data DIR
    python -m benchmarks.finetune_sst2 report

`run` appends one JSON line a finished run to `benchmarks/results/finetune_sst2-<device>.jsonl` and
leaves out what is there; it may be killed and started again. `report` writes
`benchmarks/results/finetune_sst2-<device>.json` and the table of the README.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import priorityprop_jax
from benchmarks.encoders import add_lora, encoder_stages, shortened
from benchmarks.records import read_lines, write
from priorityprop_jax import Compute, PrefixCache, PriorityPropTrainer, Situation
from priorityprop_jax.cli.tasks import ArrayLoader, Task, load_task
from priorityprop_jax.partial.prefix_cache import fingerprint

RESULTS = Path(__file__).parent / "results"
TOKENS = 32
EPOCH = 216  # steps of 32 sentences
NEAR = 0.01  # a second look, one point below the target: chosen after the runs had been seen
EVERY = 36  # steps of 32 sentences, or as many sentences, between two evaluations
Names = frozenset[str]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
      policy: see `make_policy`, or a function.
      steps: the arm's full budget; its schedule decays to 0 there.
      budget: of compute, a fraction.
      batch: sentences in a batch.
      cache: precision of the prefix cache, None for no cache.
      block_state: see `Compute`.
      lora: the rank, None for no LoRA.
      cycle: steps of a cycle.
    """

    policy: Any = "full"
    steps: int = EPOCH
    budget: float = 1.0
    batch: int = 32
    cache: str | None = None
    block_state: str = "keep"
    lora: int | None = None
    cycle: int = 36


def shrink(at: Situation) -> list[Names]:
    """All blocks for half an epoch, then the last 3 blocks: the cache pays an epoch later."""
    return [at.at_depths(range(7 if at.cycle < 3 else 4))] * at.steps


def grow(at: Situation) -> list[Names]:
    """The last block and the head for one cycle, then all blocks."""
    return [at.at_depths(range(2 if at.cycle < 1 else 7))] * at.steps


ARMS: dict[str, Arm] = {
    "full": Arm(),
    "full, shorter": Arm(steps=EPOCH // 2),
    "full, batch 8": Arm(steps=3 * EPOCH, batch=8, cycle=144),
    "LoRA": Arm(lora=8),
    "suffix(2), cached": Arm("suffix(2)", steps=2 * EPOCH, cache="bfloat16"),
    "random": Arm("random", budget=0.6),
    "lisa(2)": Arm("lisa(2)"),
    "badam(1)": Arm("badam(1)", block_state="reset"),
    "priority": Arm("priority", budget=0.6),
    # Changes of mechanism, in search of the goal.
    "blocks": Arm("suffix(6)", steps=3 * EPOCH // 4),
    "grow": Arm(grow, steps=3 * EPOCH // 4),
    "shrink, cached": Arm(shrink, steps=2 * EPOCH, cache="bfloat16"),
    "suffix(2), cached in float32": Arm("suffix(2)", steps=2 * EPOCH, cache="float32"),
}


def rates(arm: Arm) -> tuple[float, ...]:
    """The trials."""
    if arm.cache == "float32":
        return (3e-4,)  # one step aside from its twin: only the precision differs
    few = arm.lora is not None or arm.policy in ("suffix(2)", "badam(1)")
    return (3e-4, 1e-3 if few else 1e-4)


class Chunks:
    """An epoch of the loader in several, so that it is evaluated more often than once an epoch."""

    def __init__(self, loader: ArrayLoader, batches: int) -> None:
        self.loader, self.batches, self.chunk = loader, batches, 0

    def set_epoch(self, chunk: int) -> None:
        self.chunk = chunk

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.chunk * self.batches, (self.chunk + 1) * self.batches):
            epoch, place = divmod(step, len(self.loader))
            rng = np.random.default_rng((self.loader.seed, epoch))
            order = rng.permutation(self.loader.rows)
            rows = order[place * self.loader.batch_size : (place + 1) * self.loader.batch_size]
            yield {name: array[rows] for name, array in self.loader.arrays.items()}


def load(data: str | None, seed: int) -> Task:
    """The task, at 32 tokens."""
    task = load_task("sst2", data_dir=data, seed=seed)
    for loader in (task.train_data, task.eval_data):
        loader.arrays["x"] = shortened(loader.arrays["x"], TOKENS)
    return task


def make_trainer(arm: Arm, task: Task, rate: float, seed: int) -> PriorityPropTrainer:
    model: Any = task.model
    if arm.lora is not None:
        add_lora(model, arm.lora, seed)
    stages = encoder_stages(model)
    warm = max(1, arm.steps // 20)

    def schedule(step):
        left = (arm.steps - step) / (arm.steps - warm)
        return jnp.minimum((step + 1) / warm, jnp.maximum(left, 0.0))

    cache = None
    if arm.cache is not None:
        folder = tempfile.mkdtemp(prefix="prefix-")
        cache = PrefixCache(folder, examples=None, dtype=arm.cache)
    return PriorityPropTrainer(
        stages,
        optax.adamw(rate, weight_decay=0.01),
        task.loss_fn,
        arm.budget,
        recalc_every=arm.cycle,
        compute=Compute(
            policy=arm.policy, block_state=arm.block_state, cache=cache, schedule=schedule,
            clip_norm=1.0, seed=seed, max_variants=8,
        ),
    )  # fmt: skip


def train(name: str, rate: float, seed: int, data: str | None) -> dict[str, Any]:
    """One run: dev accuracy and the programs run so far, at each evaluation."""
    arm = ARMS[name]
    task = load(data, seed)
    trainer = make_trainer(arm, task, rate, seed)
    every = EVERY * 32 // arm.batch if arm.batch < 32 else EVERY
    loader = ArrayLoader(task.train_data.arrays, arm.batch, shuffle=True, seed=seed, drop_last=True)
    evals = []
    for _ in range(-(-arm.steps // every)):
        before = len(trainer.history.evals)
        trainer.train(Chunks(loader, every), 1, eval_data=task.eval_data)
        last = trainer.history.evals[before]
        report = trainer.get_compute_report()
        evals.append(
            {
                "step": last["step"],
                "accuracy": last["accuracy"],
                "loss": last["loss"],
                "flops": report["flops"],
                "programs": [
                    [
                        " ".join(row["active"]),
                        row["steps"] - row["cached_steps"],
                        row["cached_steps"],
                    ]
                    for row in report["variants"]
                ],
            }  # fmt: skip
        )
        if trainer.history.steps[-1]["step"] >= arm.steps:
            break
    return {
        "arm": name, "rate": rate, "seed": seed, "evals": evals,
        "best": max(e["accuracy"] for e in evals),
        "full_flops": report["full_flops"] / report["steps"],
        "compile_seconds": trainer.history.compile_seconds, "programs": report["programs"],
    }  # fmt: skip


def key(record: dict[str, Any]) -> tuple[str, float, int]:
    return record["arm"], record["rate"], record["seed"]


def best_rate(records: list[dict[str, Any]], name: str) -> float:
    mine = [r for r in records if r["arm"] == name and r["seed"] == 0]
    return max(mine, key=lambda r: r["best"])["rate"]


def run(path: Path, names: list[str], seeds: int, data: str | None) -> None:
    done = read_lines(path)

    def once(name: str, rate: float, seed: int) -> None:
        if (name, rate, seed) in map(key, done):
            return
        record = train(name, rate, seed, data)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        done.append(record)
        print(f"{name} rate {rate:g} seed {seed}: best dev accuracy {record['best']:.4f}")

    for name in names:
        for rate in rates(ARMS[name]):
            once(name, rate, 0)
    for seed in range(1, seeds):
        for name in names:
            once(name, best_rate(done, name), seed)


def take_times(path: Path, data: str | None, repeats: int) -> dict[str, float]:
    """Median seconds of a step of every program that the runs used, interleaved."""
    used: dict[tuple[int | None, int, str | None, str], dict[str, bool]] = {}
    for record in read_lines(path):
        arm = ARMS[record["arm"]]
        for names, missed, cached in record["evals"][-1]["programs"]:
            kind = (arm.lora, arm.batch, arm.cache, arm.block_state)
            flags = used.setdefault(kind, {})
            if missed:
                flags[f"{names}|0"] = True
            if cached:
                flags[f"{names}|1"] = True
    task = load(data, 0)
    benches = []
    for kind, programs in used.items():
        lora, batch, cache, block_state = kind
        # A cache serves the stage that it was opened at, so that each program needs its own.
        parts = [programs] if cache is None else [{p: True} for p in programs]
        for part in parts:
            arm = Arm(lora=lora, batch=batch, cache=cache, block_state=block_state, cycle=1)
            chosen: list[Names] = [frozenset()]
            arm = dataclasses.replace(arm, policy=lambda at, chosen=chosen: [chosen[0]])
            trainer = make_trainer(arm, load(data, 0), 1e-5, 0)
            trainer._budgeted._variants.most = 1000
            rows = {k: v[:batch] for k, v in task.train_data.arrays.items()}
            benches.append((kind, trainer, chosen, part, rows))
    samples: dict[str, list[float]] = {}
    for n in tqdm(range(repeats + 1), desc="rounds"):
        for kind, trainer, chosen, programs, rows in benches:
            for program in programs:
                names, flag = program.split("|")
                label = json.dumps([*kind, names, int(flag)])
                seconds = _time_one(trainer, chosen, frozenset(names.split()), rows, int(flag), n)
                if n:
                    samples.setdefault(label, []).append(seconds)
    medians = {label: statistics.median(times) for label, times in samples.items()}
    # A cache is opened with a fingerprint of its prefix, at most of all parameters.
    started = time.perf_counter()
    fingerprint(benches[0][1].params)
    return {"open": time.perf_counter() - started, **medians}


def _time_one(trainer, chosen, names, rows, cached, n) -> float:
    """One step, host work included; with ids that the cache has, or has not.

    A step before it opens the cache and moves optimizer state, which a run does once a cycle at
    most.
    """
    chosen[0] = names
    trainer._training = True  # The arrays are in the trainer's hands, as during `train`.
    other = rows if cached else {**rows, "id": rows["id"] + 10_000 * (n + 1)}
    _step(trainer, rows)
    jax.block_until_ready((trainer._params, trainer._opt_state))
    started = time.perf_counter()
    _step(trainer, other)
    jax.block_until_ready((trainer._params, trainer._opt_state))
    return time.perf_counter() - started


def _step(trainer: PriorityPropTrainer, batch: Any) -> None:
    trainer._params, trainer._rest, trainer._opt_state, _ = trainer._budgeted(
        trainer._params, trainer._rest, trainer._opt_state, batch
    )


def seconds_of(record: dict[str, Any], times: dict[str, float]) -> list[float]:
    """Training time up to each evaluation of a run."""
    arm = ARMS[record["arm"]]
    seconds = []
    for e in record["evals"]:
        total = 0.0
        for names, missed, cached in e["programs"]:
            for flag, steps in ((0, missed), (1, cached)):
                if steps:
                    label = json.dumps(
                        [arm.lora, arm.batch, arm.cache, arm.block_state, names, flag]
                    )
                    total += steps * times[label]
                    total += flag * times["open"]
        seconds.append(total)
    return seconds


def summary(records: list[dict[str, Any]], times: dict[str, float]) -> dict[str, Any]:
    """Target, and by arm the ratio of full fine-tuning's time to target to its own."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for name in ARMS:
        mine = [r for r in records if r["arm"] == name]
        if mine:
            rate = best_rate(records, name)
            by_arm[name] = sorted((r for r in mine if r["rate"] == rate), key=lambda r: r["seed"])
    target = statistics.median(r["best"] for r in by_arm["full"])

    def reached(record: dict[str, Any], below: float = 0.0) -> tuple[float, float] | None:
        for e, seconds in zip(record["evals"], seconds_of(record, times), strict=True):
            if e["accuracy"] >= target - below:
                return seconds, e["flops"]
        return None

    near = {r["seed"]: reached(r, NEAR) for r in by_arm["full"]}

    whole = {r["seed"]: seconds_of(r, times)[-1] for r in by_arm["full"]}
    base = {}
    for r in by_arm["full"]:
        hit = reached(r)
        # A full run that misses its own median is charged its whole budget: to our disadvantage
        # only if it would have got there at once after it.
        base[r["seed"]] = hit[0] if hit else whole[r["seed"]]
    rows = {}
    for name, runs in by_arm.items():
        hits = {r["seed"]: reached(r) for r in runs}
        ratios = [base[s] / h[0] for s, h in hits.items() if h and s in base]
        rows[name] = {
            "rate": runs[0]["rate"],
            "seeds": len(runs),
            "best": [r["best"] for r in runs],
            "median_best": statistics.median(r["best"] for r in runs),
            "missed": sum(h is None for h in hits.values()),
            "ratios": ratios,
            "ratio": math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None,
            "interval": bootstrap(ratios),
            "seconds_to_target": [h[0] if h else None for h in hits.values()],
            "flops_to_target": [h[1] if h else None for h in hits.values()],
            "near_ratios": [
                near[r["seed"]][0] / hit[0]
                for r in runs
                if near.get(r["seed"]) and (hit := reached(r, NEAR))
            ],
            "seconds_in_all": [seconds_of(r, times)[-1] for r in runs],
            "share_of_flops": runs[0]["evals"][-1]["flops"]
            / (runs[0]["full_flops"] * runs[0]["evals"][-1]["step"]),
        }
    return {"target": target, "full_seconds_to_target": base, "arms": rows}


def bootstrap(ratios: list[float], draws: int = 10_000) -> list[float] | None:
    """95 % interval of the geometric mean, seeds drawn with replacement."""
    if len(ratios) < 2:
        return None
    logs = np.log(ratios)
    rng = np.random.default_rng(0)
    means = logs[rng.integers(0, len(logs), (draws, len(logs)))].mean(1)
    return np.exp(np.quantile(means, [0.025, 0.975])).tolist()


def readme_table(record: dict[str, Any]) -> str:
    """The table of the README."""
    rows = []
    for name, row in record["summary"]["arms"].items():
        ratio, interval = "-", ""
        if row["ratio"] is not None:
            ratio = f"{row['ratio']:.2f}x"
        if row["interval"] is not None:
            interval = f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}"
        near = [f"{ratio:.2f}x" for ratio in row["near_ratios"]]
        rows.append(
            f"| {name} | {row['rate']:g} | {row['median_best']:.3f} | {ratio} {interval} | "
            f"{row['missed']} of {row['seeds']} | {', '.join(near) or '-'} | "
            f"{row['share_of_flops']:.2f} | {statistics.median(row['seconds_in_all']):.0f} |"
        )
    target = record["summary"]["target"]
    return "\n".join(
        [
            f"Fine-tuning MiniLM-L6 on SST-2 (6,920 sentences, 32 tokens), {record['device']}: how "
            f"much sooner than tuned AdamW on everything an arm reaches that one's median best dev "
            f"accuracy, {target:.3f} (`python -m benchmarks.finetune_sst2`); and, looked at after "
            f"the fact, one point below it, by seed:",
            "",
            "| arm | rate | best accuracy | time to target | missed | to a point below "
            "| FLOPs a step | seconds in all |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
        ]
    )


def device_name() -> tuple[str, str]:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu", f"{os.cpu_count()} CPU cores"
    return device.device_kind.lower().replace(" ", "-"), device.device_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "time", "report"))
    parser.add_argument("--data", help="folder of the data (default: as load_task)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    tag, device = device_name()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"finetune_sst2-{tag}.jsonl"
    times_path = RESULTS / f"finetune_sst2-{tag}-times.json"
    if arguments.command == "run":
        run(path, arguments.arms, arguments.seeds, arguments.data)
    elif arguments.command == "time":
        load_before = os.getloadavg()
        times = take_times(path, arguments.data, arguments.repeats)
        record = {"load_before": load_before, "load_after": os.getloadavg(), "seconds": times}
        write(times_path, record)
    else:
        records, times = read_lines(path), json.loads(times_path.read_text(encoding="utf-8"))
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS
        ).stdout.strip()
        record = {
            "benchmark": "finetune_sst2", "device": device,
            "date": datetime.date.today().isoformat(), "revision": revision,
            "versions": {
                "python": platform.python_version(), "jax": jax.__version__,
                "flax": flax.__version__, "optax": optax.__version__,
                "priorityprop_jax": priorityprop_jax.__version__,
            },
            "load": [times["load_before"], times["load_after"]],
            "summary": summary(records, times["seconds"]),
        }  # fmt: skip
        out = RESULTS / f"finetune_sst2-{tag}.json"
        write(out, record)
        print(readme_table(record))


if __name__ == "__main__":
    main()
