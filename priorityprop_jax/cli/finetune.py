"""The command `priorityprop finetune`: a pretrained model, fine-tuned on a budget of compute."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorityprop_jax.cli import meshes, runs
from priorityprop_jax.cli.runs import COMMON, Failure, Report, fraction, rate, told, whole
from priorityprop_jax.cli.tuning import is_decoder, make_step, model_path, optimizer, path_or_name
from priorityprop_jax.core.tables import short

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task

TEXT = (
    "Fine-tunes a pretrained model on a budget of compute. A decoder learns labels, completions or "
    "chats, an encoder labels. A policy chooses the layers that train, and the backward pass of "
    "the others is not run. Without options it is SmolLM2 on short messages that come along."
)
Config = argparse.Namespace
DTYPES = ("float32", "bfloat16")


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "type": path_or_name,
        "metavar": "MODEL",
        "default": "smollm2-135m",
        "help": "a name that `priorityprop models list` knows; the folder of a model: config.json, "
        "safetensors and tokenizer of a decoder (Llama, Mistral, Qwen) or an encoder (BERT, "
        "RoBERTa, DistilBERT); or a GGUF file",
    },
    "data": {
        "type": path_or_name,
        "metavar": "FILE",
        "default": "messages",
        "help": "a CSV, TSV or JSONL file with the columns text and label, prompt and completion, "
        "or messages; or sst2, or the messages that come along",
    },
    "skip_bad": {"action": "store_true", "help": "leave out rows that cannot be read"},
    "policy": {
        "help": "which layers train when: suffix:8 (the last 8 blocks and the head; of a decoder "
        "the frozen blocks run once); full (all); lora:8 (of a decoder: all are frozen, with small "
        "matrices of rank 8 beside them); lisa:2, badam:1 (2 or 1 at a time, drawn or in turn); "
        "priority, random (as many as the budget pays for, by gain or drawn) (default: for a "
        "decoder the suffix that the budget pays for, for an encoder priority)",
    },
    "budget": {
        "type": fraction,
        "help": "what a step may cost on average, as a fraction of full fine-tuning such as 0.25; "
        "for suffix without a number, priority and random (default: 0.25 for suffix, else 0.4)",
    },
    "recalc_every": {
        "type": whole(1),
        "help": "steps in a cycle, after which the layers are chosen anew (default: a quarter of "
        "an epoch; of lisa and badam there are as many cycles in it as turns for all blocks)",
    },
    "state": {
        "choices": ("keep", "reset", "offload"),
        "help": "the optimizer state of layers that do not train: kept on the device, dropped, or "
        "moved to host memory (default: reset for lisa and badam, else keep)",
    },
    "cache": {
        "action": "store_true",
        "help": "for an encoder: keep what the frozen first layers make of each text in the run's "
        "folder, until the run is finished, so that their forward pass runs once; it serves "
        "policies that train the same last layers for long, such as suffix",
    },
    "max_length": {"type": whole(2), "help": "tokens of a text (default: 256, encoders 48)"},
    "head": {
        "action": "store_true",
        "help": "a decoder tells labels by a head of its own on the last token, as "
        "LlamaForSequenceClassification of transformers does, not by a word behind the text",
    },
    "pack": {
        "action": "store_true",
        "help": "a decoder trains on rows of up to --max-length tokens that several texts share, "
        "without seeing each other; --batch-size counts these rows",
    },
    "alpha": {
        "type": rate, "help": "how much the matrices of lora count (default: twice their rank)"
    },
    "accumulate": {
        "type": whole(1), "default": 1,
        "help": "for a decoder with full, suffix or lora: batches whose gradients make one update",
    },
    "dtype": {
        "choices": DTYPES, "default": "float32",
        "help": "what a decoder computes in; its weights are float32",
    },
    "remat": {
        "choices": ("none", "products", "all"), "default": "products",
        "help": "what a decoder's backward pass computes again, to save memory: nothing, all but "
        "the products of its layers, or all of a block",
    },
    "numbers": {
        "action": "store_true",
        "help": "an encoder learns the labels as numbers, by least squares",
    },
    "limit": {
        "type": whole(1), "metavar": "N", "help": "use the first N rows of each part only"
    },
    "mesh": meshes.MESH,
    **COMMON,
}  # fmt: skip


OF_DECODERS = ("head", "pack", "dtype", "remat")


def defaults(**given: Any) -> Config:
    """All options, as they are where nothing else is given."""
    options = {name: option.get("default") for name, option in OPTIONS.items()}
    return Config(**options | given)


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    with meshes.together(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    config = runs.options_of(arguments, OPTIONS, "finetune")
    config.mesh = arguments.mesh or config.mesh  # a run goes on elsewhere
    path = model_path(config)
    decoder = is_decoder(path)
    if arguments.resume is None:
        _check_options(config, decoder)
    settle(config, decoder)
    if decoder:
        return _decoder(arguments, config, path)
    make_step(config)  # what is wrong with a policy shows before the data are read
    task = load(config)
    # What the data and the task decide is written down, so that a resumed run cannot differ.
    for name in ("epochs", "learning_rate", "batch_size"):
        setattr(config, name, getattr(task, name))
    meshes.check(config)
    config.recalc_every = _cycle(config, len(task.train_data), task.model)
    print(
        f"{task.name}: policy {config.policy}, {config.epochs} x {len(task.train_data)} steps in "
        f"cycles of {config.recalc_every}"
    )
    with runs.running(arguments, "finetune", _name(config), config) as directory:
        _train(directory, config, task)
    return 0


def settle(config: Config, decoder: bool) -> None:
    """Fills in what follows from the model and the policy where nothing is given."""
    if config.policy is None and not decoder:
        config.policy = "priority"
    if config.budget is None and config.policy in ("priority", "random"):
        config.budget = 0.4
    if config.state is None:
        config.state = "reset" if str(config.policy).startswith(("lisa", "badam")) else "keep"


def _cycle(config: Config, steps: int, model: Any) -> int:
    """Steps in a cycle: LISA and BAdam have as many in an epoch as give each block a turn."""
    from priorityprop_jax.cli.decoders import parts_of

    name, number = parts_of(config.policy or "suffix")
    turns = -(-model.config.num_hidden_layers // (number or 1)) if name in ("lisa", "badam") else 4
    return config.recalc_every or max(1, steps // turns)


def _check_options(config: Config, decoder: bool) -> None:
    """An option that would change nothing is an error."""
    from priorityprop_jax.cli.decoders import parts_of

    unused, of = [*OF_DECODERS, "alpha", "accumulate"], "an encoder"
    if decoder:
        name, number = parts_of("suffix" if config.policy is None else config.policy)
        unused, of = ["cache", "numbers"], f"{name} of a decoder"
        if name != "lora":
            unused.append("alpha")
        if name in ("full", "suffix", "lora"):
            unused += ["state", "recalc_every"]
        if name in ("full", "lora") or (name == "suffix" and number):
            unused.append("budget")
        if name == "full" and number:
            raise Failure("full, which trains all, takes no number", 2)
    check_unused(config, unused, of)


def check_unused(config: Config, options: Iterable[str], of: str) -> None:
    """Raises where one of these options is given, which change nothing there."""
    for option in options:
        if getattr(config, option) not in (None, False, OPTIONS[option].get("default")):
            raise Failure(f"--{option.replace('_', '-')} does nothing for {of}: leave it out", 2)


def _name(config: Config) -> str:
    return f"{Path(config.data).stem}-{re.sub('[^a-z0-9]', '', config.policy)}"


def _decoder(arguments: argparse.Namespace, config: Config, path: Path) -> int:
    from priorityprop_jax.cli import decoders

    name, _ = decoders.parts_of(config.policy or "suffix")
    if name not in ("full", "suffix", "lora"):
        make_step(config)
        if config.accumulate > 1:
            raise Failure(f"--accumulate goes with full, suffix and lora, not with {name}", 2)
    config.batch_size, config.epochs = config.batch_size or 16, config.epochs or 3
    config.learning_rate = config.learning_rate or decoders.RATES.get(name, 2e-4)
    meshes.check(config)
    task = decoders.load(config, path)
    steps = len(decoders.batches(config, task, task.train, train=True))
    if config.accumulate > config.epochs * steps:
        raise Failure(
            f"--accumulate {config.accumulate} is more than all {config.epochs * steps} batches: "
            "nothing would be learnt", 2
        )  # fmt: skip
    config.recalc_every = _cycle(config, steps, task.model)
    config.policy, share = decoders.plan(config, task)
    print(f"{Path(config.data).stem}: policy {config.policy}, {config.epochs} x {steps} steps")
    with runs.running(arguments, "finetune", _name(config), config) as directory:
        decoders.train(directory, config, task, config.epochs * steps, share)
    return 0


def load(config: Config) -> Task:
    """An encoder's task; everything that can be wrong with its files or their size shows here."""
    from priorityprop_jax.cli.tasks import encoded
    from priorityprop_jax.models.bert import BertConfig
    from priorityprop_jax.models.files import needed

    folder, parts = model_path(config), runs.texts(config)
    if parts[0].kind != "label":
        raise Failure(f"the rows of {config.data} have no text and label, which an encoder learns")
    length = config.max_length or 48
    with told(ValueError):
        positions = BertConfig.from_file(needed(folder, "config.json")).max_length
        if length > positions:
            raise Failure(
                f"the model has {positions} positions, and texts are of {length} tokens: lower "
                "--max-length, or take a model with more"
            )
        labels = [] if config.numbers else runs.labels(*parts)
        name = Path(config.data).stem
        with meshes.on_host(config.mesh):
            task = encoded(name, parts, folder, length=length, seed=config.seed, labels=labels)
    task = task.adjusted(config)
    runs.tell_cut(task.cut, sum(len(part["x"]) for part in task.parts), length)
    if (rows := len(task.parts[0]["x"])) < task.batch_size:
        raise Failure(
            f"there are {rows} rows to train on, less than a batch of {task.batch_size}", 2
        )
    return task


@contextlib.contextmanager
def trainer_of(directory: Path, config: Config, task: Task) -> Iterator[Any]:
    """The trainer of an encoder; what it keeps of frozen layers is in the folder until the end."""
    from priorityprop_jax.partial import PrefixCache, nnx_stages
    from priorityprop_jax.training.trainer import Trainer

    examples = int(task.parts[0]["id"].max()) + 1
    cache = PrefixCache(directory / "cache", examples=examples) if config.cache else None
    with cache or contextlib.nullcontext():
        model: Any = meshes.place(task.model, config.mesh)
        tx = optimizer(config.learning_rate, config.epochs * len(task.train_data), active=True)
        yield Trainer(nnx_stages(model.stages()), tx, task.loss_fn, make_step(config, cache))


def _train(directory: Path, config: Config, task: Task) -> None:
    """Trains, saves the model, and writes the report."""
    import jax

    from priorityprop_jax.models.weights import save_bert

    with trainer_of(directory, config, task) as trainer:
        data = [meshes.spread(part, config.mesh) for part in task.data]
        results = runs.train_arm(directory, config.policy, trainer, data, config.epochs)
    model: Any = task.model
    meshes.collect(model, config.mesh)
    if jax.process_index():
        return
    labels = list(task.labels)
    if not labels:  # the model that is saved has the numbers themselves
        mean, deviation = task.spread
        out = model.head.out
        out.kernel[...] *= deviation
        out.bias[...] = out.bias[...] * deviation + mean
    save_bert(model, directory / "model", labels=labels or None, tokenizer=model_path(config))
    about = {"model": "encoder", "kind": "label" if labels else "number", "labels": labels}
    about["length"] = int(task.parts[0]["x"].shape[1])
    runs.write(directory / "model" / "task.json", json.dumps(about, indent=1))
    record = {
        "command": "finetune",
        "config": vars(config),
        "results": results,
        "compute": trainer.get_step_report(),
        "ledger": trainer.get_priority_report().as_dict(),
    }
    made = report(record)
    losses = runs.losses(made.title, {config.policy: trainer.history})
    runs.save(directory, record, made, losses)
    shutil.rmtree(directory / "cache", ignore_errors=True)
    print(f"the model is in {directory / 'model'}/")


# The report.


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    if "device" in record:
        from priorityprop_jax.cli import decoders

        return decoders.report(record)
    config, results, compute = record["config"], record["results"], record["compute"]
    budget = "" if config["budget"] is None else f", budget {config['budget']:.0%}"
    full = f"{short(compute['full_flops'])}, for as many full steps"
    if results["validation"] is None:
        best = f"best {results['best_loss']:.4g} (epoch {results['best_epoch']})"
        last = f"{best}, last {results['validation_loss']:.4g}"
        totals = [("", "total"), ("dev squared error, of the variance", last)]
    else:
        best = f"best {results['best_validation']:.2%} (epoch {results['best_epoch']})"
        totals = [("", "total"), ("dev accuracy", f"{best}, last {results['validation']:.2%}")]
    if results["test"] is not None:
        totals.append(("test accuracy", f"{results['test']:.2%}"))
    totals += [
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
    name, policy = Path(config["data"]).stem, config["policy"]
    return Report(
        f"{name} fine-tuned: policy {policy}{budget}, one seed ({config['seed']})",
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
