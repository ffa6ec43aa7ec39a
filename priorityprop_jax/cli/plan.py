"""The command `priorityprop plan`: what each choice of layers would cost, before anyone trains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from priorityprop_jax.cli import decoders, finetune
from priorityprop_jax.cli.runs import rate, told, write
from priorityprop_jax.cli.tuning import is_decoder, model_path
from priorityprop_jax.core.tables import bytes_of

TEXT = (
    "Tells what each choice of layers to train would cost on this machine. One step of each policy "
    "is compiled and timed: its FLOPs, milliseconds, peak memory and optimizer state."
)


def size(text: str) -> float:
    """A parser of sizes such as 4GiB, 500MB or 1e9, in bytes."""
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


OF_TEXTS = ("model", "data", "max_length")
OPTIONS: dict[str, dict[str, Any]] = {
    "task": {
        "choices": ("finetune", "digits"), "default": "finetune",
        "help": "whose model and batches: those of finetune, or those of train",
    },
    **{name: finetune.OPTIONS[name] for name in (*OF_TEXTS, *finetune.OF_DECODERS, "batch_size")},
    "memory": {"type": size, "metavar": "SIZE", "help": "that a step may take, such as 4GiB"},
    "milliseconds": {"type": rate, "metavar": "MS", "help": "that a step may take"},
    "out": {"type": Path, "metavar": "DIR", "help": "where to write plan.json and plan.png"},
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    import jax
    import optax
    from flax import nnx

    from priorityprop_jax.cli.tasks import digits
    from priorityprop_jax.partial import nnx_stages, plan
    from priorityprop_jax.partial.plan import LEGEND

    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)  # before the work, as it may fail
    config = finetune.defaults(**vars(arguments))
    beside: Any = None
    with told(ValueError):
        if arguments.task == "digits":
            finetune.check_unused(config, (*OF_TEXTS, *finetune.OF_DECODERS), "digits")
            task = digits().adjusted(config)
            model, batch = task.model, next(iter(task.train_data))
        elif is_decoder(path := model_path(config)):
            config.batch_size = config.batch_size or 16
            task = decoders.load(config, path)
            loader = decoders.batches(config, task, task.train, train=True)
            model, batch = task.model, max(loader, key=lambda batch: batch["x"].shape[1])
            beside = decoders.others(model, batch)
        else:
            finetune.check_unused(config, finetune.OF_DECODERS, "an encoder")
            task = finetune.load(config)
            whole: Any = task.model
            model, batch = nnx_stages(whole.stages()), next(iter(task.train_data))
            beside = {"lora(8)": (decoders.with_lora(nnx.clone(whole), 8), batch)}
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
