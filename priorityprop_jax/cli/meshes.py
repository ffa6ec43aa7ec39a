"""Several devices and several processes: where a model's arrays lie, and who writes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from priorityprop_jax.cli.runs import Failure, told, whole

if TYPE_CHECKING:
    import jax

AXES = ("data", "model")


def grid(text: str) -> str:
    """A parser of meshes such as data=4,model=2, for argparse."""
    if not re.fullmatch(r"(data|model)=[1-9]\d*(,(?!\1)(data|model)=[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mesh such as data=4,model=2 or data=8")
    return text


MESH: dict[str, Any] = {
    "type": grid, "metavar": "data=D,model=M",
    "help": "train on D x M devices, all that there are: batches are split over data, "
    "weights and optimizer state over both; to resume on others, give it again",
}  # fmt: skip
# What starts one of several processes; they belong to the machines and not to the run.
PROCESSES: dict[str, dict[str, Any]] = {
    "coordinator": {
        "metavar": "HOST:PORT",
        "help": "this is one of several processes, which find each other at the first one's "
        "address; or auto, on clusters that JAX knows, such as Slurm's",
    },
    "processes": {"type": whole(1), "metavar": "N", "help": "how many, if not auto"},
    "process": {"type": whole(0), "metavar": "I", "help": "which of them, from 0, if not auto"},
}


@contextlib.contextmanager
def together(arguments: argparse.Namespace) -> Iterator[None]:
    """Within, processes are one program, of which the first alone prints; without, if it is one."""
    if arguments.coordinator is None:
        if (arguments.processes, arguments.process) != (None, None):
            raise Failure("--processes and --process need --coordinator HOST:PORT", 2)
        yield
        return
    import jax

    from priorityprop_jax.training.processes import WorkerLostError, leave_soon

    auto = arguments.coordinator == "auto"
    with told(ValueError, RuntimeError, code=2):
        jax.distributed.initialize(
            None if auto else arguments.coordinator, arguments.processes, arguments.process
        )
    if jax.default_backend() == "cpu":
        # The first alone would load its programs: keys of the others have their own devices in
        # them, and are never found. Messages of what is loaded are not in the others' order.
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        with contextlib.ExitStack() as stack:
            if jax.process_index():
                quiet = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(quiet))
            yield
    except WorkerLostError:
        lost = "another process has ended or does not answer; start all of them with --resume RUN"
        print(f"priorityprop: {lost}", file=sys.stderr, flush=True)
        os._exit(1)  # JAX would wait for the lost one
    except BaseException:
        leave_soon()
        raise


def check(config: argparse.Namespace) -> None:
    """Raises a `Failure` unless the devices are those of the run's mesh, and can share a batch."""
    import jax

    several = jax.process_count() > 1
    if several and config.mesh is None:
        raise Failure(f"several processes need a mesh: --mesh data={jax.device_count()}", 2)
    if several and (config.cache or config.state != "keep"):
        raise Failure("several processes share no host memory: --state keep, and no --cache", 2)
    if config.mesh is None:
        return
    sizes = _sizes(config.mesh)
    if (needed := math.prod(sizes)) != jax.device_count():
        raise Failure(
            f"a mesh {config.mesh} is of {needed} devices, and there are {jax.device_count()}: "
            "--mesh sets another", 2
        )  # fmt: skip
    if config.batch_size % sizes[0]:
        raise Failure(f"a batch of {config.batch_size} cannot be split over data={sizes[0]}", 2)


def _sizes(text: str) -> tuple[int, ...]:
    given = dict(part.split("=") for part in text.split(","))
    return tuple(int(given.get(axis, 1)) for axis in AXES)


def make(text: str) -> jax.sharding.Mesh:
    """The mesh of all devices."""
    import jax
    from jax.sharding import AxisType

    return jax.make_mesh(_sizes(text), AXES, axis_types=(AxisType.Auto,) * 2)


def on_host(text: str | None) -> contextlib.AbstractContextManager[Any]:
    """Within, arrays that go on a mesh are made in host memory: one device may be too small."""
    import jax

    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the host out
        if text is not None:
            return jax.default_device(jax.local_devices(backend="cpu")[0])
    return contextlib.nullcontext()


def place(model: Any, text: str | None) -> Any:
    """Splits every array of a model, in place: its largest axis over `model`, the next over `data`.

    The layers of a stack of `blocks` stay together, as parts of them are trained.
    """
    import jax
    from flax import nnx

    if text is None:
        return model
    mesh, stack = make(text), getattr(model.blocks, "block", None)

    def put(path: Any, leaf: Any) -> Any:
        axes: list[str | None] = [None] * leaf.ndim
        for name in reversed(AXES):
            first = stack is not None and path[0].key == "blocks"
            free = [i for i in range(first, leaf.ndim) if axes[i] is None]
            if fits := [i for i in free if leaf.shape[i] % mesh.shape[name] == 0]:
                axes[max(fits, key=lambda i: leaf.shape[i])] = name
        return _global(np.asarray(leaf), _layout(mesh, *axes))

    nnx.update(model, jax.tree_util.tree_map_with_path(put, nnx.state(model)))
    for block in model.blocks if stack is None else [stack]:
        block.layout = _layout(mesh, "data")
    return model


def collect(model: Any, text: str | None) -> None:
    """Brings what `place` has split back to the host, in place; every process must call it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    if text is not None:
        found = gathered(nnx.state(model))
        with on_host(text):
            nnx.update(model, jax.tree.map(jnp.asarray, found))


def _layout(mesh: jax.sharding.Mesh, *axes: str | None) -> jax.sharding.NamedSharding:
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*axes))


def _global(array: np.ndarray, layout: jax.sharding.NamedSharding) -> jax.Array:
    import jax

    return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])


class Spread:
    """A loader's batches, their rows spread over `data`; every process has all of the rows."""

    def __init__(self, loader: Any, text: str):
        self.loader, self.mesh = loader, make(text)
        self.set_epoch = loader.set_epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yields batches; one that is too small to be spread is on every device."""
        for batch in self.loader:
            rows = len(next(iter(batch.values())))
            layout = _layout(self.mesh, None if rows % self.mesh.shape["data"] else "data")
            yield {name: _global(array, layout) for name, array in batch.items()}


def spread(loader: Any, text: str | None) -> Any:
    """A loader whose batches are spread over a mesh, if there are both."""
    return loader if text is None or loader is None else Spread(loader, text)


def gathered(tree: Any) -> Any:
    """Arrays of all devices in host memory, in every process, which must all call this."""
    import jax
    from jax.experimental import multihost_utils

    def one(leaf: Any) -> np.ndarray:
        alone = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable
        return np.asarray(leaf if alone else multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)
