"""A pretrained decoder for `priorityprop finetune`: its task, ways to train less, its report."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from priorityprop_jax.cli import meshes, runs, tuning
from priorityprop_jax.cli.runs import Failure, Report, told
from priorityprop_jax.core.tables import aligned, short

if TYPE_CHECKING:
    from priorityprop_jax.models import Decoder, Language

Config = argparse.Namespace
RATES = {"full": 5e-5, "suffix": 4e-4, "lora": 1e-3, "badam": 2e-3}  # by policy; others 2e-4


@dataclasses.dataclass
class Task:
    """A decoder, its words, and the rows that it is trained on and tried on."""

    model: Decoder
    language: Language
    kind: str  # of the texts
    labels: list[str]  # none where the answer is free
    loss_fn: Any  # of answers, with their accuracy where they are labels
    train: dict[str, list[Any]]  # x and y, and segments where rows are packed, by row
    dev: dict[str, list[Any]]
    length: int  # tokens, at most


def load(config: Config, path: Path) -> Task:
    """The task; everything that can be wrong with its files shows here."""
    import jax.numpy as jnp

    from priorityprop_jax.models import load_decoder, load_language
    from priorityprop_jax.models.prompts import answer_loss, answer_rows, class_rows, label_tokens
    from priorityprop_jax.models.tokenizer import check_tokens

    train, dev = runs.texts(config)[:2]
    kind = train.kind
    if kind not in ("label", "completion", "messages"):
        raise Failure(f"the rows of {config.data} have no label, completion or messages", 1)
    if config.head and kind != "label":
        raise Failure(f"--head tells labels, and the rows of {config.data} have none", 2)
    with told(ValueError):
        language = load_language(path)
        labels = runs.labels(train, dev) if kind == "label" else []
        about = {"dtype": jnp.dtype(config.dtype), "remat": config.remat, "seed": config.seed}
        with meshes.on_host(config.mesh):
            model = load_decoder(path, classes=len(labels) if config.head else None, **about)
        if model.config.classes and not config.head:
            raise Failure(f"{path} tells classes and cannot write: train it with --head", 2)
        answers = list(range(len(labels))) if config.head else label_tokens(language, labels)
        context = model.config.max_position_embeddings
        if (length := config.max_length or min(256, context)) > context:
            raise Failure(f"--max-length {length} is longer than the model's context, {context}", 2)
        if config.head:
            found = [class_rows(language, part.rows, length, labels) for part in (train, dev)]
        else:
            found = [answer_rows(language, kind, part.rows, length) for part in (train, dev)]
        for rows in found:
            check_tokens(rows.x, model.config.vocab_size)
    runs.tell_cut(sum(rows.cut for rows in found), sum(len(rows.x) for rows in found), length)
    parts = [{"x": rows.x, "y": rows.y} for rows in found]
    if config.pack:
        parts[0] = _packed(parts[0], length)
        parts[1]["segments"] = [np.ones_like(row) for row in parts[1]["x"]]
    if (count := len(parts[0]["x"])) < config.batch_size:
        raise Failure(
            f"there are {count} {'packed ' if config.pack else ''}rows to train on, less than a "
            f"batch of {config.batch_size}; --batch-size sets another", 2
        )  # fmt: skip
    loss_fn = answer_loss(answers if labels else None)
    return Task(model, language, kind, labels, loss_fn, parts[0], parts[1], length)


def _packed(part: dict[str, list[Any]], length: int) -> dict[str, list[Any]]:
    """As few rows as hold all examples, without the padding at their ends."""
    from priorityprop_jax.training import packed

    found = packed(part, length)
    sizes = np.count_nonzero(found["segments"], axis=1)
    print(f"{len(part['x'])} texts are packed into {len(sizes)} rows of up to {length} tokens")
    return {
        name: [row[:size] for row, size in zip(rows, sizes, strict=True)]
        for name, rows in found.items()
    }


def batches(config: Config, task: Task, part: Mapping[str, list[Any]], *, train: bool) -> Any:
    """The rows of a part of the task in batches of a few lengths."""
    from priorityprop_jax.training import buckets

    pad = {"y": -1} if "y" in part else None
    loader = buckets(
        part, config.batch_size, by="x", most=4, longest=task.length, pad=pad, shuffle=train,
        seed=config.seed, drop_last=train,
    )  # fmt: skip
    return meshes.spread(loader, config.mesh)


# What a step costs.


def parts_of(policy: str) -> tuple[str, int]:
    """A policy's name, and its number or 0: ``suffix:8`` or ``suffix(8)``."""
    from priorityprop_jax.partial.policies import written_as

    name, number = written_as(policy)
    if not name:
        raise Failure(f"there is no policy {policy!r}", 2)
    return name, number or 0


def plan(config: Config, task: Task) -> tuple[str, float | None]:
    """The policy to run, chosen by the budget where none is named; its share of a full gradient.

    It is None where the steps differ, and the ledger tells.
    """
    import jax
    from flax import nnx

    from priorityprop_jax.core.modules import trainable

    count = task.model.config.num_hidden_layers
    name, number = parts_of(config.policy or "suffix")
    flops = functools.cache(functools.partial(_flops, task, config))
    shares = lambda policy: flops(policy) / flops("full")  # noqa: E731
    if config.policy in (None, "suffix"):
        budget = config.budget or 0.25
        one, two = shares("suffix:1"), shares("suffix:2")
        # Blocks are alike, so that the cost is a line in their number.
        number = min(count, int((budget - one) / (two - one) + 1e-9) + 1)
        if number < 1:
            raise Failure(f"a budget of {budget:.0%} does not pay for one block: {one:.0%} would")
        config.budget = budget
    policy = f"{name}:{number}" if number else name
    if name == "suffix" and not 1 <= number <= count:
        raise Failure(f"suffix:{number}: the model has {count} blocks", 2)
    if name == "lora" and not number:
        raise Failure("lora needs a rank: lora:8", 2)
    listed = {f"suffix:{k}" for k in _few(count)} | {"lora:8"}
    if name in ("full", "suffix", "lora"):
        listed.add(policy)
    order = sorted(listed - {"full"}, key=shares)
    found = {"full": 1.0, **{other: shares(other) for other in reversed(order)}}
    rows = [("", "FLOPs of a gradient", "trained weights")]
    for other, share in found.items():
        state = nnx.state(_trained(task.model, config, other), trainable)
        weights = short(sum(leaf.size for leaf in jax.tree.leaves(state)))
        rows.append((f"{other}{' <' if other == policy else ''}", f"{share:.0%}", weights))
    print("\n".join(map(str.rstrip, aligned(rows))))
    return policy, found.get(policy)


def _few(count: int) -> list[int]:
    """Numbers of last blocks to compare."""
    return sorted({k for k in (count // 8, count // 4, count // 2) if k})


def _trained(model: Any, config: Config, policy: str) -> Any:
    """The model that a policy trains all of, as shapes."""
    from flax import nnx

    name, number = parts_of(policy)
    make = {"suffix": lambda m: m.top(number), "lora": lambda m: with_lora(m, number)}
    return nnx.eval_shape(make.get(name, lambda m: m), model)


def _flops(task: Task, config: Config, policy: str) -> float:
    """Of the gradient of a batch of the longest rows. Nothing is compiled, no array is made."""
    import jax
    import jax.numpy as jnp

    from priorityprop_jax.core.modules import pure_loss
    from priorityprop_jax.core.program import program_flops

    shape = (config.batch_size, max(map(len, task.train["x"])))
    x = y = jax.ShapeDtypeStruct(shape, jnp.int32)
    if parts_of(policy)[0] == "suffix":
        x = jax.ShapeDtypeStruct((*shape, task.model.config.hidden_size), jnp.dtype(config.dtype))
    loss, params, rest = pure_loss(_trained(task.model, config, policy), task.loss_fn)
    grad = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))
    return program_flops(grad(params, rest, {"x": x, "y": y}))


def with_lora(model: Any, rank: int, alpha: float | None = None) -> Any:
    """The model, with matrices of `add_lora` in it."""
    from priorityprop_jax.models.lora import add_lora

    add_lora(model, rank=rank, alpha=alpha or 2.0 * rank)
    return model


def others(model: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
    """What `partial.plan` compares with: last blocks behind ones that ran once, and LoRA."""
    import jax.numpy as jnp
    from flax import nnx

    hidden = {**batch, "x": jnp.zeros((*batch["x"].shape, model.config.hidden_size))}
    numbers = _few(model.config.num_hidden_layers)
    found = {f"suffix({k}), below run once": (model.top(k), hidden) for k in numbers}
    return found | {"lora(8)": (with_lora(nnx.clone(model), 8), batch)}


# Training.


def hidden_rows(model: Any, task: Task, config: Config, blocks: int, folder: Path) -> None:
    """Puts what the first blocks make of every row in the place of its tokens.

    They lie in a file, which is there as a whole or not at all.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from priorityprop_jax.training.processes import agreed

    both = [*task.train["x"], *task.dev["x"]]
    starts = np.cumsum([0, *map(len, both)])
    everything = {"x": both, "id": list(np.arange(len(both)))}
    if "segments" in task.train:
        everything["segments"] = [*task.train["segments"], *task.dev["segments"]]

    @nnx.jit
    def run(model, batch):
        found = model.below(batch["x"], blocks, batch.get("segments"))
        return found.astype(jnp.float32)

    def made() -> Iterator[tuple[int, np.ndarray]]:
        from tqdm import tqdm

        placed = meshes.place(model, config.mesh)
        loader = batches(config, task, everything, train=False)
        quiet = True if jax.process_index() else None
        for batch in tqdm(loader, "frozen blocks", disable=quiet, leave=False):
            # Hidden first: two programs that talk to other processes may not run at once.
            hidden, ids = meshes.gathered((run(placed, batch), batch["id"]))
            yield from zip(ids, hidden, strict=True)

    def fill(path: Path) -> None:
        shape = int(starts[-1]), task.model.config.hidden_size
        out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        for row, hidden in made():
            out[starts[row] : starts[row + 1]] = hidden[: len(both[row])]
        out.flush()

    path = folder / "hidden.npy"
    if not agreed(path.exists):
        if jax.process_index() == 0:
            runs.write(path, fill)
        else:
            collections.deque(made(), 0)  # of several processes none does it alone
        agreed(path.exists)
    found = np.load(path, mmap_mode="r")
    rows = [found[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    task.train["x"], task.dev["x"] = rows[: len(task.train["x"])], rows[len(task.train["x"]) :]


def trainer_of(directory: Path, config: Config, task: Task, steps: int) -> Any:
    """The trainer of a policy; with ``suffix`` rows become what the frozen blocks make of them."""
    import optax

    from priorityprop_jax.training.trainer import Trainer

    name, number = parts_of(config.policy)
    model: Any = task.model
    step, tx = None, tuning.optimizer(config.learning_rate, steps // config.accumulate)
    if name == "suffix":
        with meshes.on_host(config.mesh):
            top = model.top(number)
        hidden_rows(model, task, config, model.config.num_hidden_layers - number, directory)
        model = top
        del task.model  # what is below is not in memory
    elif name == "lora":
        with meshes.on_host(config.mesh):
            with_lora(model, number, config.alpha)
    elif name != "full":
        step = tuning.make_step(config)
        tx = tuning.optimizer(config.learning_rate, steps, active=True)
    if config.accumulate > 1:
        tx = optax.MultiSteps(tx, config.accumulate)
    return Trainer(meshes.place(model, config.mesh), tx, task.loss_fn, step)


def train(directory: Path, config: Config, task: Task, steps: int, share: float | None) -> None:
    """Trains, saves the model, and writes the report."""
    import jax

    from priorityprop_jax.models import load_decoder, save_decoder
    from priorityprop_jax.models.lora import merge_lora

    tokens = sum(map(len, task.train["x"]))
    trainer = trainer_of(directory, config, task, steps)
    train_data = batches(config, task, task.train, train=True)
    data = train_data, batches(config, task, task.dev, train=False), None
    results = runs.train_arm(directory, config.policy, trainer, data, config.epochs)
    results["tokens_per_second"] = tokens * config.epochs / max(results["seconds"], 1e-9)
    results["peak_bytes"] = runs.peak_bytes()
    whole: Any = trainer.model
    meshes.collect(whole, config.mesh)
    if jax.process_index():
        return
    with meshes.on_host(config.mesh):
        if config.policy.startswith("suffix"):
            whole = load_decoder(tuning.model_path(config), classes=trainer.model.config.classes)
            whole.put_top(trainer.model)
        elif config.policy.startswith("lora"):
            merge_lora(whole)
        labels = task.labels if config.head else None
        save_decoder(whole, directory / "model", task.language, labels=labels)
    about = {"model": "decoder", "kind": task.kind, "labels": task.labels, "length": task.length}
    runs.write(directory / "model" / "task.json", json.dumps(about, indent=1))
    record = {
        "command": "finetune",
        "config": vars(config),
        "results": results,
        "compute": {"share": share, **trainer.get_step_report()},
        "device": jax.devices()[0].device_kind,
    }
    made = report(record)
    losses = runs.losses(made.title, {config.policy: trainer.history})
    runs.save(directory, record, made, losses)
    (directory / "hidden.npy").unlink(missing_ok=True)
    shutil.rmtree(directory / "checkpoint", ignore_errors=True)
    print(f"the model is in {directory / 'model'}/, for transformers too")


def report(record: Mapping[str, Any]) -> Report:
    """The report of a finished run, of the contents of its report.json."""
    config, results, compute = record["config"], record["results"], record["compute"]
    share = compute["share"]
    best = f"best {results['best_loss']:.4f} (epoch {results['best_epoch']})"
    totals = [("", "total"), ("dev loss", f"{best}, last {results['validation_loss']:.4f}")]
    if results["validation"] is not None:
        totals.append(("dev accuracy", f"{results['validation']:.2%}"))
    totals += [
        ("FLOPs of a gradient", "" if share is None else f"{share:.0%} of a full one"),
        ("steps", f"{results['steps']:,}"),
        ("training", f"{results['seconds']:.1f} s, {results['tokens_per_second']:,.0f} tokens/s"),
        ("compilation", f"{results['compile_seconds']:.1f} s, not in the training time"),
        ("peak memory", f"{short(results['peak_bytes'])}B of the process, loading included"),
    ]
    title = f"{Path(config['data']).name} on {config['model']}: policy {config['policy']}"
    return Report(f"{title}, one seed ({config['seed']})", [runs.table("", totals)])
