"""What fine-tuning costs by what is trained of a model, and what each way reaches.

SmolLM2-135M on SST-2 (the answer is a word behind the sentence) or on Shakespeare's lines (the
second half of a passage behind the first), or MiniLM on SST-2. The arms are policies of
`priorityprop finetune`, made by its own code: `full` AdamW, `lora:8`, `suffix:k` behind frozen
blocks that run once, `lisa:2`, `badam:1`, `priority` on 0.4 of full; `full, then suffix:k` trains
all in the first third of its steps, and `badam:1 every 4` goes on to the next block after four
steps in place of `--cycle`. `lora:8 remat all` makes blocks again in its backward pass, which
changes bytes and time alone, so that it learns what `lora:8` does. `--model` says which.

- `python -m benchmarks.finetune_llm steps`: milliseconds and peak bytes of a step of 16 rows of 40
  tokens (MiniLM: 32 of 32), and milliseconds of a forward pass. Every figure is of a fresh process,
  arms in turn; peak bytes are all arrays that are held and what the step's program takes beside
  them, as the compiler has it.
- `python -m benchmarks.finetune_llm learn`: the dev loss over steps, one process an arm and rate;
  rates go on by factors of two until the best on seed 1 is inside, and `--seeds` runs the best on
  more. `--trial-epochs 1` tries rates in so many epochs, whose schedule ends there, and runs the
  best alone for all of them; SmolLM2's last blocks, however many, then share a rate.
  What is finished is not run again. Training may be done on a busy machine, as its time is
  steps times those of `steps`, and a forward pass over all rows where blocks are frozen.
- `python -m benchmarks.finetune_llm report`: a table, with the time to the lowest loss that `full`
  reaches, and to 2 % and 5 % above it; ends alone count where `full` was looked at only there. Of
  Shakespeare it has losses alone, as steps are timed on rows like SST-2's.

Writes `benchmarks/results/finetune_llm/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.rates import best_rate, next_rates
from benchmarks.records import RESULTS, about, add_line, read_lines, write

FOLDER = RESULTS / "finetune_llm"
ARMS = {
    "smollm2-135m": (
        "full", "full remat all", "lora:8", "lora:8 remat all", "suffix:15", "suffix:8",
        "suffix:4", "lisa:2", "lisa:2 remat all", "badam:1 every 4", "priority",
        "full, then suffix:8",
    ),
    "minilm": (
        "full", "suffix:5", "suffix:4", "suffix:3", "suffix:2", "suffix:1", "lisa:2", "badam:1",
        "priority", "full, then suffix:2",
    ),
}  # fmt: skip
# Rates to begin with, by policy; the others as full.
RATES = {
    "smollm2-135m": {"full": 6e-5, "lora": 1e-3, "suffix": 8e-4, "lisa": 2.4e-4, "badam": 1.92e-3},
    "minilm": {"full": 1e-4, "suffix": 2e-4},
}
# Whose rate an arm takes where rates are tried in shorter runs; by itself what is not here.
TUNED_AS = {
    "smollm2-135m": {"suffix": "suffix:8"},
    "minilm": {},  # whose runs take a minute
}
BLOCKS = {"smollm2-135m": 30, "minilm": 6}
ROWS = {"smollm2-135m": 16, "minilm": 32}  # in a batch
LENGTH = 40


def first_rate(model: str, policy: str) -> float:
    """The rate that is tried first."""
    rates = RATES[model]
    return rates.get(policy.rpartition("then ")[2].partition(":")[0], rates["full"])


def options(arm: str) -> tuple[str, dict[str, str]]:
    """A policy, and what stands behind it: how many steps a cycle has, what is made again."""
    policy, *others = arm.split()
    return policy, dict(zip(others[::2], others[1::2], strict=True))


def config_of(arguments: argparse.Namespace, policy: str, rate: float = 1e-4) -> Any:
    """The options of the command."""
    from priorityprop_jax.cli import finetune

    encoder = arguments.model == "minilm"
    policy, others = options(policy)
    longest = 32 if encoder else 64 if arguments.data == "shakespeare" else 128
    given = {
        "model": arguments.model, "policy": policy, "batch_size": ROWS[arguments.model],
        "learning_rate": rate, "recalc_every": int(others.get("every", arguments.cycle)),
        "data": arguments.data, "max_length": longest, "remat": others.get("remat", "products"),
        "seed": arguments.seed, "epochs": arguments.epochs,
        "cache": encoder and policy.startswith("suffix"),
        "limit": arguments.rows if encoder else None,
    }  # fmt: skip
    config = finetune.defaults(**given)
    finetune.settle(config, decoder=not encoder)
    return config


def phases(arm: str, steps: int) -> list[tuple[str, int]]:
    """Policies and their steps."""
    first, _, then = arm.partition(", then ")
    return [(first, steps // 3), (then, steps - steps // 3)] if then else [(arm, steps)]


def shakespeare(rows: int) -> tuple[Any, Any]:
    """Passages of some 40 words, half of them to go on with."""
    import gzip

    from priorityprop_jax.models.texts import Texts

    folder = Path(os.environ["PRIORITYPROP_DATA"])
    text = gzip.decompress((folder / "tinyshakespeare.txt.gz").read_bytes()).decode()
    words = text.replace("\n", " ").split()
    pieces = [words[i : i + 40] for i in range(0, len(words) - 40, 40)]
    found = [
        {"prompt": " ".join(piece[:20]), "completion": f" {' '.join(piece[20:])}"}
        for piece in pieces
    ]
    return Texts("completion", found[:rows], []), Texts("completion", found[-400:], [])


def task_of(arguments: argparse.Namespace, config: Any) -> Any:
    """The decoder and its rows."""
    from priorityprop_jax.cli import decoders, runs
    from priorityprop_jax.models import find_model
    from priorityprop_jax.models.texts import Texts

    if arguments.data == "shakespeare":
        parts = shakespeare(arguments.rows)
    else:
        words = {"0": "negative", "1": "positive"}
        train, dev, _ = runs.texts(config)
        named = [
            [{"text": row["text"], "label": words[row["label"]]} for row in part.rows]
            for part in (train, dev)
        ]
        parts = tuple(
            Texts("label", rows[:most], [])
            for rows, most in zip(named, (arguments.rows, arguments.dev), strict=True)
        )
    runs.texts = lambda config: parts
    return decoders.load(config, find_model("smollm2-135m"))


@contextlib.contextmanager
def decoder(config: Any, task: Any, steps: int) -> Iterator[Any]:
    """A trainer, its batches and those to try it on."""
    from priorityprop_jax.cli import decoders

    whole = {name: dict(getattr(task, name)) for name in ("train", "dev")}
    with tempfile.TemporaryDirectory() as folder:
        model = task.model
        trainer = decoders.trainer_of(Path(folder), config, task, steps)
        loaders = [
            decoders.batches(config, task, part, train=part is task.train)
            for part in (task.train, task.dev)
        ]
        yield trainer, *loaders
    task.model, task.train, task.dev = model, whole["train"], whole["dev"]


@contextlib.contextmanager
def encoder(config: Any, task: Any, steps: int) -> Iterator[Any]:
    """The same; the schedule is that of all epochs."""
    from priorityprop_jax.cli import finetune

    del steps
    with (
        tempfile.TemporaryDirectory() as folder,
        finetune.trainer_of(Path(folder), config, task) as trainer,
    ):
        yield trainer, task.train_data, task.eval_data


def learn_one(arguments: argparse.Namespace) -> None:
    """Trains one arm, and writes its dev losses as a line."""
    from priorityprop_jax.cli import finetune

    config = config_of(arguments, arguments.arm, arguments.rate)
    if arguments.model == "minilm":
        made, task = encoder, finetune.load(config)
        per_epoch = len(task.train_data)
    else:
        made, task = decoder, task_of(arguments, config)
        per_epoch = len(task.train["x"]) // config.batch_size
    steps = config.epochs * per_epoch
    every, curve, done = -(-steps // arguments.points), [], 0
    parts = phases(arguments.arm, steps)
    for policy, count in parts:
        last = policy == parts[-1][0]
        rate = arguments.rate if last else tuned(arguments, policy)[0]
        with made(config_of(arguments, policy, rate), task, count if last else steps) as given:
            trainer, loader, dev = given
            trainer._progress = False
            order = []
            for epoch in range(config.epochs):
                loader.set_epoch(epoch)
                order += list(loader)
            order = order[done : done + count]
            if not curve and arguments.points > 1:
                curve.append({"step": 0, **trainer.evaluate(dev)})
            for start in range(0, len(order), every):
                trainer.train(order[start : start + every], 1)
                now = done + min(start + every, len(order))
                curve.append({"step": now, **trainer.evaluate(dev)})
                print(arguments.arm, arguments.rate, curve[-1], flush=True)
            done += len(order)
            _ = trainer.model  # takes the weights back
    line = {"key": key_of(arguments, arguments.arm, arguments.rate, arguments.seed)}
    add_line(FOLDER / "runs.jsonl", line | {"steps": done, "curve": curve})


def key_of(arguments: argparse.Namespace, arm: str, rate: float, seed: int) -> dict:
    names = ("model", "data", "rows", "dev", "epochs")
    same = {name: getattr(arguments, name) for name in names}
    return {"arm": arm, "rate": rate, "seed": seed, **same}


def again(arguments: argparse.Namespace, stage: str, arm: str, *more: str) -> str:
    """Runs this file in a fresh process for one arm; what it prints last."""
    same = ("model", "data", "rows", "dev", "epochs", "points", "cycle", "length", "repeats")
    same = (*same, "trial-epochs")
    options = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in same]
    command = [sys.executable, "-m", "benchmarks.finetune_llm", stage, f"--arm={arm}"]
    done = subprocess.run([*command, *options, *more], text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{arm} failed")
    return done.stdout.strip().splitlines()[-1]


def lowest(line: dict) -> float:
    """The lowest dev loss of a run."""
    return min(point["loss"] for point in line["curve"])


def learns_as(arm: str) -> str:
    """The arm with the same losses."""
    return arm.replace(" remat all", "")


def tuned_as(arguments: argparse.Namespace, arm: str) -> str:
    """The arm whose rate this one takes: its own, unless rates are tried in shorter runs."""
    arm = learns_as(arm)
    short = arguments.trial_epochs < arguments.epochs
    return TUNED_AS[arguments.model].get(arm.partition(":")[0], arm) if short else arm


def tuned(arguments: argparse.Namespace, arm: str) -> tuple[float, list[float]]:
    """The rate of the lowest dev loss on seed 1, and the rates to try next."""
    first = first_rate(arguments.model, arm)
    want = key_of(arguments, tuned_as(arguments, arm), 0.0, 1)
    want, found = want | {"epochs": arguments.trial_epochs}, {}
    for line in read_lines(FOLDER / "runs.jsonl"):
        if {**line["key"], "rate": 0.0} == want:
            found[line["key"]["rate"]] = lowest(line)
    return best_rate(found) if found else first, next_rates(found, (first, 2 * first, first / 2))


def learn(arguments: argparse.Namespace) -> None:
    """Every arm at its rates on seed 1, and at the best of them on all."""

    def run(arm: str, rate: float, seed: int, epochs: int) -> None:
        finished = [line["key"] for line in read_lines(FOLDER / "runs.jsonl")]
        if key_of(arguments, arm, rate, seed) | {"epochs": epochs} not in finished:
            more = [f"--rate={rate}", f"--seed={seed}", f"--epochs={epochs}"]
            if epochs < arguments.epochs:  # only its end is looked at
                more += [f"--trial-epochs={epochs}", "--points=1"]
            print(again(arguments, "learn", arm, *more), flush=True)

    for arm in arguments.arms:
        arm = tuned_as(arguments, arm)
        while rates := tuned(arguments, arm)[1]:
            for rate in rates:
                run(arm, rate, 1, arguments.trial_epochs)
    for seed in range(1, arguments.seeds + 1):
        for arm in arguments.arms:
            run(learns_as(arm), tuned(arguments, arm)[0], seed, arguments.epochs)


def fixed_task(arguments: argparse.Namespace, config: Any) -> Any:
    """A decoder and a batch of rows of one length."""
    import numpy as np

    from priorityprop_jax.cli import decoders, tuning
    from priorityprop_jax.models import load_decoder, load_language
    from priorityprop_jax.models.prompts import answer_loss, label_tokens

    path = tuning.model_path(config)
    language = load_language(path)
    labels = ["negative", "positive"]
    rng, length = np.random.default_rng(0), arguments.length
    rows = range(ROWS[arguments.model])
    answers = label_tokens(language, labels)
    part = {
        "x": [rng.integers(0, 49152, length).astype(np.int32) for _ in rows],
        "y": [np.array([-1] * (length - 1) + [answers[0]], np.int32) for _ in rows],
    }
    model = load_decoder(path, remat=config.remat)
    loss_fn = answer_loss(answers)
    return decoders.Task(model, language, "label", labels, loss_fn, part, dict(part), length)


def step_one(arguments: argparse.Namespace) -> None:
    """Times the steps of one arm, and prints a line."""
    import time

    import jax

    from priorityprop_jax.cli import finetune

    forward = arguments.arm == "forward"
    config = config_of(arguments, "full" if forward else arguments.arm)
    if arguments.model == "minilm":
        made, task = encoder, finetune.load(config)
    else:
        made, task = decoder, fixed_task(arguments, config)
    with made(config, task, 100) as (trainer, loader, _):
        trainer._progress = False
        batch = next(iter(loader))
        if forward:
            trainer.evaluate([batch])
            start = time.perf_counter()
            trainer.evaluate([batch] * arguments.repeats)
            print(json.dumps({"ms": 1e3 * (time.perf_counter() - start) / arguments.repeats}))
            return
        compiled = []
        keep = jax.stages.Lowered.compile

        def remember(lowered: Any, *args: Any, **options: Any) -> Any:
            compiled.append(keep(lowered, *args, **options))
            return compiled[-1]

        jax.stages.Lowered.compile = remember
        # What is drawn anew is timed over a whole cycle with one draw, and drawn once before; but
        # BAdam's turns cost more from one to the next, and what priority trains is compiled as it
        # changes: these are timed over an epoch.
        cycle, count = config.recalc_every, arguments.repeats
        if (name := str(config.policy).partition(":")[0]) in ("badam", "priority"):
            count = arguments.rows // ROWS[arguments.model]
        elif name == "lisa":
            count = cycle
        trainer.train([batch] * (cycle + 2 if name in ("lisa", "badam", "priority") else 2))
        if not compiled:  # a plain step compiles as it is called
            params, rest = trainer._current()
            step: Any = trainer.step
            given = (params, rest, trainer.optimizer_state, batch)
            step.compiled.lower(*given).compile()
        beside = max(
            m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            for m in (program.memory_analysis() for program in compiled)
        )
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer._current()))
        held += sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.optimizer_state))
        done = len(trainer.history.seconds)
        trainer.train([batch] * count)
        seconds = trainer.history.seconds[done:]
        ms = 1e3 * sum(seconds) / len(seconds)
    print(json.dumps({"ms": ms, "peak_bytes": held + beside, "held_bytes": held}))


def steps(arguments: argparse.Namespace) -> None:
    """Times all arms in turn, and writes the record; other arms that it has stay in it.

    `of_full` is over `full` in the same run, and `ms / of_full` is what that took.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    single = ["forward", *(arm for arm in arguments.arms if ", then " not in arm)]
    load, found = os.getloadavg(), {arm: [] for arm in single}
    for turn in range(arguments.rounds):
        for arm in single[:: 1 if turn % 2 == 0 else -1]:
            found[arm].append(json.loads(again(arguments, "steps", arm)))
            print(arm, found[arm][-1], flush=True)
    record = about("finetune_llm steps", load)
    record |= {"model": arguments.model, "batch": ROWS[arguments.model]}
    record |= {"length": arguments.length if arguments.model != "minilm" else 32}
    record["forward_ms"] = statistics.median(line["ms"] for line in found.pop("forward"))
    full = statistics.median(line["ms"] for line in found["full"])
    path = FOLDER / f"steps-{arguments.model}-{arguments.device}.json"
    record["arms"] = json.loads(path.read_text(encoding="utf-8"))["arms"] if path.exists() else {}
    record["arms"] |= {
        arm: {
            "ms": (ms := statistics.median(line["ms"] for line in lines)),
            "all_ms": [line["ms"] for line in lines],
            "of_full": ms / full,
            "peak_bytes": lines[0]["peak_bytes"],
            "of_full_bytes": lines[0]["peak_bytes"] / found["full"][0]["peak_bytes"],
        }
        for arm, lines in found.items()
    }
    write(path, record)


def seconds_at(step: float, line: dict, record: dict) -> float:
    """When a run is so far, by the milliseconds of its steps."""
    model, key = record["model"], line["key"]
    ms, begun = 0.0, 0
    for policy, count in phases(key["arm"], line["steps"]):
        if (own := min(step - begun, count)) > 0:
            name, _, number = policy.split()[0].partition(":")
            if name == "suffix":  # what is frozen ran once
                below = 1 - int(number) / BLOCKS[model]
                ms += below * record["forward_ms"] * key["rows"] / ROWS[model]
            ms += own * record["arms"]["full"]["ms"] * record["arms"][policy]["of_full"]
        begun += count
    return ms / 1e3


def seconds_to(target: float, line: dict, record: dict) -> float | None:
    """When a run's dev loss is first at a target, by straight lines between evaluations."""
    curve = line["curve"]
    for before, point in zip([None, *curve], curve, strict=False):
        if point["loss"] <= target:
            if before is None:
                return seconds_at(point["step"], line, record)
            share = (before["loss"] - target) / (before["loss"] - point["loss"])
            step = before["step"] + share * (point["step"] - before["step"])
            return seconds_at(step, line, record)
    return None


def mean(values: Iterable[float | None]) -> float | None:
    """Their mean, if they are there: free text has no accuracy."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def summary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each arm at its best rate: lowest loss and accuracy, and how soon it is at full's loss."""
    record = json.loads(
        (FOLDER / f"steps-{arguments.model}-{arguments.device}.json").read_text(encoding="utf-8")
    )
    lines: dict[str, dict[int, dict]] = {}
    for arm in arguments.arms:
        rate = tuned(arguments, arm)[0]
        for line in read_lines(FOLDER / "runs.jsonl"):
            key = line["key"]
            if key == key_of(arguments, learns_as(arm), rate, key["seed"]):
                lines.setdefault(arm, {})[key["seed"]] = line | {"key": key | {"arm": arm}}
    if any(len(line["curve"]) == 1 for line in lines["full"].values()):
        for own in lines.values():  # what is looked at more often would seem sooner
            own.update({seed: line | {"curve": line["curve"][-1:]} for seed, line in own.items()})
    whole = lambda line: seconds_at(line["steps"], line, record)  # noqa: E731
    found: dict[str, Any] = {}
    for arm, own in lines.items():
        points = [min(line["curve"], key=lambda point: point["loss"]) for line in own.values()]
        found[arm] = {
            "rate": tuned(arguments, arm)[0], "seeds": len(own),
            "loss": statistics.fmean(point["loss"] for point in points),
            "accuracy": mean(point.get("accuracy") for point in points),
        }  # fmt: skip
        if arguments.data != "sst2":  # of whose rows steps are timed
            continue
        found[arm]["of_full_time"] = whole(next(iter(own.values()))) / whole(lines["full"][1])
        for slack in (0, 2, 5):
            ratios: list[float] = []
            for seed in own.keys() & lines["full"].keys():
                target = (1 + slack / 100) * lowest(lines["full"][seed])
                base = seconds_to(target, lines["full"][seed], record)
                mine = seconds_to(target, own[seed], record)
                if base is not None and mine:
                    ratios.append(mine / base)
            found[arm][f"within {slack} %"] = {
                "arrived": len(ratios),
                "of_full_time": statistics.geometric_mean(ratios) if ratios else None,
            }
    return found


def report(arguments: argparse.Namespace) -> None:
    """A table of steps, and of what each arm reached at its best rate; and the record of it."""
    from priorityprop_jax.core.tables import markdown

    name = f"steps-{arguments.model}-{arguments.device}.json"
    record = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    found = summary(arguments)
    slacks = (0, 2, 5)
    head = ("what is trained", "ms a step", "of full", "peak GB", "of full", "dev loss", "accuracy")
    rows = [(*head, *(f"time to within {slack} %" for slack in slacks))]
    for arm in arguments.arms:
        own = record["arms"].get(arm) if arguments.data == "sst2" else None
        cells = ["", "", "", ""]
        if own:
            cells = [
                f"{own['ms']:,.0f}", f"{own['of_full']:.2f}",
                f"{own['peak_bytes'] / 1e9:.2f}", f"{own['of_full_bytes']:.2f}",
            ]  # fmt: skip
        reached = found.get(arm)
        if reached:
            accuracy = reached["accuracy"]
            cells += [f"{reached['loss']:.3f}", "" if accuracy is None else f"{accuracy:.3f}"]
            for slack in slacks if "of_full_time" in reached else ():
                to = reached[f"within {slack} %"]
                of = f"{to['of_full_time']:.2f} of full's" if to["arrived"] else "not reached"
                some = to["arrived"] < reached["seeds"] and to["arrived"]
                cells.append(f"{of} ({to['arrived']} of {reached['seeds']})" if some else of)
        rows.append((arm, *cells, *[""] * (len(rows[0]) - 1 - len(cells))))
    about_it = about("finetune_llm learn") | {"steps_measured_on": record["date"]}
    about_it |= key_of(arguments, "", 0.0, 0)
    for unused in ("arm", "rate", "seed"):
        del about_it[unused]
    run = f"{arguments.model}-{arguments.data}-{arguments.epochs}-epochs"
    write(FOLDER / f"learning-{run}-{arguments.device}.json", about_it | {"arms": found})
    print("\n".join(markdown(rows)))


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("steps", "learn", "report"))
    parser.add_argument("--model", choices=tuple(ARMS), default="smollm2-135m")
    parser.add_argument("--arms", nargs="+", help="(default: all of the model)")
    parser.add_argument("--data", choices=("sst2", "shakespeare"), default="sst2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trial-epochs", type=int, help="(default: all epochs)")
    for name, default in {
        "rows": 2000, "dev": 872, "epochs": 3, "seeds": 1, "points": 40, "cycle": 10, "rounds": 3,
        "repeats": 6, "length": LENGTH,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.arms = arguments.arms or list(ARMS[arguments.model])
    arguments.trial_epochs = arguments.trial_epochs or arguments.epochs
    one = {"learn": learn_one, "steps": step_one}
    every = {"learn": learn, "steps": steps, "report": report}
    (one if arguments.arm else every)[arguments.stage](arguments)


if __name__ == "__main__":
    main()
