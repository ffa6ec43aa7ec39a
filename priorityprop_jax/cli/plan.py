"""The command `priorityprop plan`: what each choice of layers would cost, before anyone trains."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from priorityprop_jax.cli import decoders, finetune
from priorityprop_jax.cli.runs import rate, told, write
from priorityprop_jax.cli.tuning import is_decoder, model_path

TEXT = (
    "Tells what each choice of layers to train would cost on this machine. One step of each policy "
    "is compiled and timed: its FLOPs, milliseconds, peak memory and optimizer state."
)


def size(text: str) -> float:
    """A parser of sizes such as 4GiB, 500MB or 1e9, in bytes."""
    match = re.fullmatch(r"([\d.e+]+) ?(?:([kKMGT]?)(i?)B)?", text)
    try:
        number, prefix, binary = match.groups() if match else ("", "", "")
        unit = (1024 if binary else 1000) ** " kMGT".index((prefix or " ").replace("K", "k"))
        return rate(number) * unit
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GiB or 500MB") from None


OPTIONS: dict[str, dict[str, Any]] = {
    "task": {
        "choices": ("finetune", "digits"), "default": "finetune",
        "help": "whose model and batches: those of finetune, or those of train",
    },
    **{name: finetune.OPTIONS[name] for name in ("model", "data", "max_length", "batch_size")},
    "memory": {"type": size, "metavar": "SIZE", "help": "that a step may take, such as 4GiB"},
    "milliseconds": {"type": rate, "metavar": "MS", "help": "that a step may take"},
    "out": {"type": Path, "metavar": "DIR", "help": "where to write plan.json and plan.png"},
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    import jax
    import optax

    from priorityprop_jax.cli.tasks import digits
    from priorityprop_jax.partial import nnx_stages, plan
    from priorityprop_jax.partial.plan import LEGEND

    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)  # before the work, as it may fail
    config = finetune.defaults(**vars(arguments))
    beside: Any = None
    with told(ValueError):
        if arguments.task == "digits":
            task = digits().adjusted(config)
            model, batch = task.model, next(iter(task.train_data))
        elif is_decoder(path := model_path(config)):
            config.batch_size = config.batch_size or 16
            task = decoders.load(config, path)
            loader = decoders.batches(config, task.train, train=True)
            model, batch = task.model, max(loader, key=lambda batch: batch["x"].shape[1])
            beside = decoders.others(model, batch)
        else:
            task = finetune.load(config)
            model: Any = task.model
            model = nnx_stages(model.stages())
            batch = next(iter(task.train_data))
    name, rows = getattr(task, "name", Path(config.data).stem), len(batch["x"])
    print(f"{name}, batches of {rows}, on {jax.devices()[0].device_kind}; compiling ...")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    limits = {"memory": arguments.memory, "milliseconds": arguments.milliseconds}
    found = plan(model, task.loss_fn, batch, optimizer, beside=beside, **limits)
    print(f"\n{found}\n{LEGEND}")
    if arguments.out is not None:
        text = json.dumps({"task": name, "batch_size": rows, **found.as_dict()}, indent=1)
        write(arguments.out / "plan.json", text)
        write(arguments.out / "plan.png", found.plot)
        print(f"\nsaved {arguments.out}/: plan.json, plan.png")
    return 0
