"""What fine-tuning a decoder costs by what is trained of it, and what each way reaches.

SmolLM2-135M on SST-2 (the answer is a word behind the sentence) or on Shakespeare's lines (the
second half of a passage behind the first). The arms are policies of `priorityprop finetune`, made
by its own code: `full` AdamW, `lora:8`, `suffix:k` behind frozen blocks that run once, `lisa:2`,
`badam:1`.

- `python -m benchmarks.finetune_llm steps`: milliseconds and peak bytes of a step of 16 rows of 40
  tokens. Every figure is of a fresh process, arms in turn; peak bytes are all arrays that are held
  and what the step's program takes beside them, as the compiler has it.
- `python -m benchmarks.finetune_llm learn`: the dev loss over steps, one process an arm and rate;
  what is finished is not run again. Training may be done on a busy machine, as its time is steps
  times those of `steps`.
- `python -m benchmarks.finetune_llm report`: both as a table and a picture.

Writes `benchmarks/results/finetune_llm/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, about, add_line, read_lines, write

FOLDER = RESULTS / "finetune_llm"
ARMS = ("full", "lora:8", "suffix:15", "suffix:8", "suffix:4", "lisa:2", "badam:1")
RATES = {"full": (3e-5,), "lora": (5e-4,), "suffix": (1e-4, 2e-4), "lisa": (1e-4,)}
BATCH, LENGTH = 16, 40


def config_of(arguments: argparse.Namespace, policy: str, rate: float = 1e-4) -> Any:
    """The options of the command."""
    from priorityprop_jax.cli import finetune

    given = {
        "policy": policy, "batch_size": BATCH, "learning_rate": rate,
        "recalc_every": arguments.cycle,
        "state": "reset" if policy.startswith("badam") else "keep", "data": arguments.data,
        "max_length": 64 if arguments.data == "shakespeare" else 128, "seed": arguments.seed,
        "epochs": arguments.epochs,
    }  # fmt: skip
    return finetune.defaults(**given)


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


def learn_one(arguments: argparse.Namespace) -> None:
    """Trains one arm, and writes its dev losses as a line."""
    from priorityprop_jax.cli import decoders

    config = config_of(arguments, arguments.arm, arguments.rate)
    task = task_of(arguments, config)
    loader = decoders.batches(config, task, task.train, train=True)
    steps = config.epochs * len(loader)
    with tempfile.TemporaryDirectory() as folder:
        trainer = decoders.trainer_of(Path(folder), config, task, steps)
        trainer._progress = False
        loader = decoders.batches(config, task, task.train, train=True)
        dev = decoders.batches(config, task, task.dev, train=False)
        order = []
        for epoch in range(config.epochs):
            loader.set_epoch(epoch)
            order += list(loader)
        every = max(1, steps // arguments.points)
        curve = [{"step": 0, **trainer.evaluate(dev)}]
        for start in range(0, steps, every):
            trainer.train(order[start : start + every], 1)
            curve.append({"step": min(start + every, steps), **trainer.evaluate(dev)})
            print(arguments.arm, arguments.rate, curve[-1], flush=True)
    line = {"key": key_of(arguments, arguments.arm, arguments.rate), "curve": curve}
    add_line(FOLDER / "runs.jsonl", line)


def key_of(arguments: argparse.Namespace, arm: str, rate: float) -> dict:
    names = ("data", "rows", "dev", "epochs", "seed")
    return {"arm": arm, "rate": rate, **{name: getattr(arguments, name) for name in names}}


def again(arguments: argparse.Namespace, stage: str, arm: str, *more: str) -> str:
    """Runs this file in a fresh process for one arm; what it prints last."""
    same = ("data", "rows", "dev", "epochs", "seed", "points", "cycle", "length")
    options = [f"--{name}={getattr(arguments, name)}" for name in same]
    command = [sys.executable, "-m", "benchmarks.finetune_llm", stage, f"--arm={arm}"]
    done = subprocess.run([*command, *options, *more], text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{arm} failed")
    return done.stdout.strip().splitlines()[-1]


def learn(arguments: argparse.Namespace) -> None:
    """Every arm at every rate that has no line yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for arm in arguments.arms:
        for rate in RATES.get(arm.partition(":")[0], (1e-4,)):
            finished = [line["key"] for line in read_lines(FOLDER / "runs.jsonl")]
            if key_of(arguments, arm, rate) not in finished:
                print(again(arguments, "learn", arm, f"--rate={rate}"), flush=True)


def step_one(arguments: argparse.Namespace) -> None:
    """Times the steps of one arm, and prints a line."""
    import jax
    import numpy as np

    from priorityprop_jax.cli import decoders, tuning

    config = config_of(arguments, arguments.arm)
    from priorityprop_jax.models import load_decoder, load_language
    from priorityprop_jax.models.prompts import answer_loss, label_tokens

    path = tuning.model_path(config)
    language = load_language(path)
    labels = ["negative", "positive"]
    rng, length = np.random.default_rng(0), arguments.length
    x = [rng.integers(0, 49152, length).astype(np.int32) for _ in range(BATCH)]
    answers = label_tokens(language, labels)
    y = [np.array([-1] * (length - 1) + [answers[0]], np.int32) for _ in x]
    part = {"x": x, "y": y}
    model = load_decoder(path)
    loss_fn = answer_loss(answers)
    task = decoders.Task(model, language, "label", labels, loss_fn, part, dict(part), length)
    del model
    with tempfile.TemporaryDirectory() as folder:
        trainer = decoders.trainer_of(Path(folder), config, task, 100)
        trainer._progress = False
        batch = next(iter(decoders.batches(config, task, task.train, train=False)))
        compiled = []
        keep = jax.stages.Lowered.compile

        def remember(lowered: Any, *args: Any, **options: Any) -> Any:
            compiled.append(keep(lowered, *args, **options))
            return compiled[-1]

        jax.stages.Lowered.compile = remember
        trainer.train([batch] * 2)
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
        trainer.train([batch] * arguments.repeats)
        seconds = trainer.history.seconds[done:]
        ms = 1e3 * sum(seconds) / len(seconds)
    print(json.dumps({"ms": ms, "peak_bytes": held + beside, "held_bytes": held}))


def steps(arguments: argparse.Namespace) -> None:
    """Times all arms in turn, and writes the record."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    load, found = os.getloadavg(), {arm: [] for arm in arguments.arms}
    for turn in range(arguments.rounds):
        for arm in arguments.arms[:: 1 if turn % 2 == 0 else -1]:
            found[arm].append(json.loads(again(arguments, "steps", arm)))
            print(arm, found[arm][-1], flush=True)
    record = about("finetune_llm steps", load) | {"batch": BATCH, "length": arguments.length}
    full = statistics.median(line["ms"] for line in found["full"])
    record["arms"] = {
        arm: {
            "ms": (ms := statistics.median(line["ms"] for line in lines)),
            "all_ms": [line["ms"] for line in lines],
            "of_full": ms / full,
            "peak_bytes": lines[0]["peak_bytes"],
            "of_full_bytes": lines[0]["peak_bytes"] / found["full"][0]["peak_bytes"],
        }
        for arm, lines in found.items()
    }
    write(FOLDER / f"steps-{arguments.device}.json", record)


def report(arguments: argparse.Namespace) -> None:
    """A table of steps, and of what each arm reached at its best rate."""
    from priorityprop_jax.core.tables import markdown

    record = json.loads((FOLDER / f"steps-{arguments.device}.json").read_text())
    rows = [("what is trained", "ms a step", "of full", "peak GB", "of full", "best dev loss")]
    best: dict[str, float] = {}
    for line in read_lines(FOLDER / "runs.jsonl"):
        if line["key"]["data"] == arguments.data:
            loss = min(point["loss"] for point in line["curve"])
            arm = line["key"]["arm"]
            best[arm] = min(best.get(arm, loss), loss)
    for arm, found in record["arms"].items():
        loss = f"{best[arm]:.3f}" if arm in best else ""
        rows.append(
            (
                arm, f"{found['ms']:,.0f}", f"{found['of_full']:.2f}",
                f"{found['peak_bytes'] / 1e9:.2f}", f"{found['of_full_bytes']:.2f}", loss,
            )
        )  # fmt: skip
    print("\n".join(markdown(rows)))


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("steps", "learn", "report"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--data", choices=("sst2", "shakespeare"), default="sst2")
    parser.add_argument("--device", default="cpu")
    for name, default in {
        "rows": 2000, "dev": 872, "epochs": 3, "seed": 1, "points": 40, "cycle": 10,
        "rounds": 3, "repeats": 6, "length": LENGTH,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    one = {"learn": learn_one, "steps": step_one}
    every = {"learn": learn, "steps": steps, "report": report}
    (one if arguments.arm else every)[arguments.stage](arguments)


if __name__ == "__main__":
    main()
