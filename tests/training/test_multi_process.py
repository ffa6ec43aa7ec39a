"""Tests of a character transformer on one device, on a mesh, and in two processes on a mesh."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from priorityprop_jax import priorityprop
from priorityprop_jax.cli.tasks import cross_entropy
from priorityprop_jax.core.slots import by_layer
from priorityprop_jax.training import checkpoints
from priorityprop_jax.training.processes import WorkerLostError, raise_if_lost
from tests.training import worker

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MESH = worker.make_mesh()
DECISIONS = ("allocation", "update_counts", "updates")


def whole(leaf):
    return leaf.sharding.is_equivalent_to(NamedSharding(MESH, PartitionSpec()), leaf.ndim)


# One process.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training on the mesh: trainer, summary, and the layout before."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = worker.make_trainer(MESH, progress=False, checkpoint_dir=folder)
    before = worker.layouts((trainer.params, trainer.optimizer_state))
    trainer.train(worker.Batches(MESH), 2, eval_data=worker.Batches(MESH, seed=1))
    return trainer, worker.summary(trainer), before


def test_a_trainer_on_a_mesh_decides_as_a_bare_loop_on_one_device(trained):
    trainer, together, _ = trained
    graph, params, rest = nnx.split(worker.make_model(), nnx.Param, ...)
    tx = priorityprop(worker.make_optimizer(), **worker.OPTIONS, group=by_layer(params))
    state = tx.init(params)

    @jax.jit
    def loss_fn(params, batch):
        return cross_entropy(nnx.merge(graph, params, rest), batch)[0]

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    batches, losses = worker.Batches(), []
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in batches:
            params, state, loss = step(params, state, batch)
            losses.append(float(loss))
    assert state.allocation.tolist() == together["allocation"]
    assert state.update_counts.tolist() == together["update_counts"]
    assert len(set(together["update_counts"])) > 1 and losses[-1] < losses[0]
    np.testing.assert_allclose(losses, together["loss"], rtol=1e-5)
    evaluated = [loss_fn(params, batch) for batch in worker.Batches(seed=1)]
    found = trainer.evaluate(worker.Batches(MESH, seed=1))
    assert found["loss"] == pytest.approx(float(np.mean(evaluated)), rel=1e-5)


def test_arrays_stay_laid_out_as_they_were(trained):
    trainer, _, before = trained
    state = trainer.optimizer_state
    assert worker.layouts((trainer.params, state)) == before
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {8}
    assert all(whole(leaf) for leaf in (state.update_counts, state.allocation, state.step))
    kernel = trainer.model.blocks[0].qkv.kernel[...]
    assert kernel.sharding.spec == PartitionSpec(None, "model")
    trace = state.inner_state[0].trace["blocks"][0]["qkv"]["kernel"]
    assert jax.tree.leaves(trace)[0].sharding == kernel.sharding
    # Were they not, the second step would be compiled anew.
    assert trainer.step.compiled._cache_size() == 1


def test_checkpoints_pass_between_a_mesh_and_one_device(trained, tmp_path):
    source, _, _ = trained
    folder, arrays = source.checkpoint_dir, jax.tree.leaves((source.params, source.optimizer_state))
    for mesh in (None, MESH):
        trainer = worker.make_trainer(mesh, progress=False, checkpoint_dir=tmp_path)
        before = worker.layouts((trainer.params, trainer.optimizer_state))
        trainer.restore(folder)
        assert worker.layouts((trainer.params, trainer.optimizer_state)) == before
        restored = jax.tree.leaves((trainer.params, trainer.optimizer_state))
        for old, new in zip(arrays, restored, strict=True):
            np.testing.assert_array_equal(old, new)
        assert trainer.history.loss == source.history.loss
        if mesh is None:
            with checkpoints.open_folder(tmp_path, ()) as manager:
                trainer._save(manager)
            folder = tmp_path


# Two processes of four devices each.


def run(folder, mode):
    """Runs both, and returns what each printed, its errors and its exit status; never hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    both = []
    for i in range(2):
        with (
            (folder / f"{mode}{i}.out").open("w") as out,
            (folder / f"{mode}{i}.err").open("w") as err,
        ):
            command = [sys.executable, worker.__file__, address, "2", str(i), str(folder), mode]
            both.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    end = time.monotonic() + 500
    try:
        for process in both:
            process.wait(max(end - time.monotonic(), 1))
    finally:
        for process in both:
            process.kill()
            process.wait()
    found = []
    for i, process in enumerate(both):
        out, err = ((folder / f"{mode}{i}.{kind}").read_text() for kind in ("out", "err"))
        lines = [line for line in out.splitlines() if line.startswith("{")]
        assert lines, err[-3000:]
        found.append((json.loads(lines[-1]), err, process.returncode))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def killed(folder):
    """After two epochs, process 1 is killed in the third."""
    return run(folder, "killed")


@pytest.fixture(scope="module")
def resumed(folder, killed):
    """The second epoch again, from the checkpoint of the first, by new processes."""
    return run(folder, "resumed")


@pytest.mark.once
def test_two_processes_decide_as_one(killed, trained):
    (a, _, _), (b, _, _) = killed
    _, alone, _ = trained
    for name in (*DECISIONS, "loss", "evals"):
        assert a[name] == b[name]
    for name in DECISIONS:
        assert a[name] == alone[name]
    np.testing.assert_allclose(a["loss"], alone["loss"], rtol=1e-5)
    assert a["evals"][-1] == pytest.approx(alone["evals"][-1], rel=1e-5)


@pytest.mark.once
def test_one_process_shows_the_progress(killed):
    (_, first, _), (_, second, _) = killed
    assert "training:" in first and "training:" not in second


@pytest.mark.once
def test_a_lost_process_ends_the_run_with_one_line(killed, folder):
    (_, err, status), (_, _, lost) = killed
    assert lost == -9 and "Traceback" not in err
    if status == -signal.SIGABRT:
        # A device that has learned of the loss may run ahead of one that has not; gloo then aborts,
        # or JAX itself, where its coordinator is the first to notice.
        assert "gloo::EnforceNotMet" in err or "JAX distributed service" in err
        return
    assert status == 3
    (line,) = [line for line in err.splitlines() if line.startswith("WorkerLostError")]
    assert "another process has ended" in line and "Gloo" in line
    assert f"resume_from={str(folder / 'whole')!r}" in line


def test_errors_of_a_lost_process_are_told_from_others(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: reset by peer\nmore")
    with pytest.raises(WorkerLostError, match=r"resume_from='there' \(UNKNOWN: Gloo .* peer\)$"):
        raise_if_lost(lost, "there")
    raise_if_lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), None)
    raise_if_lost(ValueError("connection"), None)


@pytest.mark.once
def test_the_checkpoint_of_a_lost_run_is_restored_on_one_device(killed, folder):
    (a, _, _), (b, _, _) = killed
    trainer = worker.make_trainer(progress=False)
    trainer.restore(folder / "whole")
    for name in (*DECISIONS, "loss", "evals"):
        assert worker.summary(trainer)[name] == a[name]
    leaves = jax.tree.leaves((trainer.params, trainer.optimizer_state))
    places = {(leaf, str(index)) for leaf, index, _ in a["shards"] + b["shards"]}
    assert {leaf for leaf, _ in places} == set(range(len(leaves))) and len(places) > len(leaves)
    for leaf, index, values in a["shards"] + b["shards"]:
        part = leaves[leaf][tuple(slice(*bounds) for bounds in index)]
        assert len(part.sharding.device_set) == 1
        np.testing.assert_array_equal(np.asarray(part), np.asarray(values, part.dtype))


@pytest.mark.once
def test_processes_resume_bit_for_bit(killed, resumed):
    for (whole, _, _), (again, err, status) in zip(killed, resumed, strict=True):
        assert status == 0, err[-3000:]
        for name in (*DECISIONS, "loss", "shards"):
            assert whole[name] == again[name]


@pytest.mark.once
def test_processes_stop_together(resumed):
    (a, _, _), (b, _, _) = resumed
    # Process 1 was interrupted at the second step; both end with the cycle.
    assert a["stopped"] == b["stopped"] == [True, 16]


@pytest.mark.once
def test_processes_that_would_train_apart_are_told(resumed):
    for found, _, _ in resumed:
        params, batch = found["complaints"]
        assert "put the parameters on a mesh" in params
        assert "jax.make_array_from_process_local_data" in batch
