"""The programs of the guide to other people's trainers: what they print is true of what they do.

What is not installed is skipped; boards for metrics are stood in for.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

GUIDE = Path(__file__).parents[2] / "docs/guides/other-trainers.md"


def run(section):
    """The names that the program of one section leaves behind; each section is one program."""
    text = GUIDE.read_text(encoding="utf-8")
    namespace = {"__name__": section}
    start = text.index(f"\n## {section}\n")
    end = text.find("\n## ", start + 1) % (len(text) + 1)
    blocks = list(re.compile(r"^```python\n(.*?)^```$", re.M | re.S).finditer(text, start, end))
    assert blocks
    for block in blocks:
        # Empty lines in front make the line numbers of a traceback those of the page.
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, GUIDE, "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("default")  # Those of other people's code are theirs.
def test_tunix():
    pytest.importorskip("tunix", reason="google-tunix is not installed, which is large")
    made = run("Tunix")

    def params(model):
        flat, _ = jax.tree_util.tree_flatten_with_path(nnx.as_pure(nnx.state(model, nnx.Param)))
        names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat)
        return {name: np.asarray(x) for name, (_, x) in zip(names, flat, strict=True)}

    before = params(made["make_model"]())
    first = {leaf for leaf in before if leaf.startswith(("embedder", "layers/0"))}
    second = {leaf for leaf in before if leaf.startswith("layers/1")}
    kept = {"freezing": first | second, "budgeted": set(), "partial": first}
    for name, expected in kept.items():
        after = params(made[name].model)
        same = {leaf for leaf, x in before.items() if x.tobytes() == after[leaf].tobytes()}
        assert same == expected, name
        losses = made[name].metrics_logger.get_metric_history("", "loss", "train")
        assert len(losses) == 10 and losses[-1] < losses[0] - 0.3, name
    trained = len(before) - len(first | second)
    moments = jax.tree.leaves(made["freezing"].optimizer.opt_state)
    assert len(moments) == 1 + 2 * trained  # and a count
    state = made["partial"].optimizer.opt_state
    counts = dict(zip(before, np.asarray(nnx.as_pure(state.update_counts)), strict=True))
    assert counts == {leaf: 0 if leaf in first else 5 for leaf in before}
    assert made["spent"].total == 0.5 * 10 * len(before)


def test_grain(tmp_path):
    pytest.importorskip("grain", reason="grain is not installed")
    made = run("Grain")
    loader, make_trainer = made["loader"], made["make_trainer"]
    lists = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        lists.append(list(loader))
    rows = [np.concatenate([batch["x"] for batch in epoch]) for epoch in lists]
    assert len(rows[0]) == len(rows[1]) == 40
    assert (rows[0] != rows[1]).any()  # another order
    for each in rows:
        np.testing.assert_array_equal(np.sort(each, axis=0), np.sort(made["x"], axis=0))
    plain = made["pp"].Trainer(*_parts(made), progress=False)
    for epoch in lists:
        plain.train(epoch)
    assert plain.history.loss == made["history"].loss
    np.testing.assert_array_equal(plain.params["w"], made["trainer"].params["w"])

    class Broken(made["Epochs"]):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if (self.epoch, i) == (1, 4):
                    raise OSError("the disk is gone")
                yield batch

    with pytest.raises(OSError):
        make_trainer(tmp_path).train(Broken(loader.dataset), epochs=2)
    resumed = make_trainer(tmp_path)
    resumed.restore(tmp_path)
    assert len(resumed.history.loss) == 9  # within the second epoch
    assert resumed.train(loader, epochs=2, resume_from=tmp_path).loss == plain.history.loss
    np.testing.assert_array_equal(plain.params["w"], resumed.params["w"])


def _parts(made):
    """Parameters, optimizer and loss of the guide's trainer."""
    tx = made["pp"].priorityprop(made["optax"].adam(0.05), total_budget=0.5, recalc_every=5)
    return {"w": made["jnp"].zeros((3, 1))}, tx, made["loss_fn"]


class Board:
    """Stands for a `SummaryWriter` and for a run of `wandb`."""

    def __init__(self, *args, **kwargs):
        self.points, self.closed = {}, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def add_scalar(self, tag, value, global_step):
        self.points.setdefault(tag, {})[global_step] = float(value)

    def log(self, data, step):
        for tag, value in data.items():
            self.points.setdefault(tag, {})[step] = value


BOARDS = {
    "TensorBoard": ("tensorboardX", "SummaryWriter", "writer"),
    "Weights & Biases": ("wandb", "init", "run"),
}


@pytest.mark.parametrize("section", BOARDS)
def test_boards(section, monkeypatch):
    package, name, board = BOARDS[section]
    stub = types.ModuleType(package)
    setattr(stub, name, Board)
    monkeypatch.setitem(sys.modules, package, stub)
    made = run(section)
    points, history = made[board].points, made["trainer"].history
    assert made[board].closed
    assert points["step/loss"] == dict(enumerate(history.loss, 1))
    assert points["eval/loss"] == {20: history.evals[0]["loss"]}
    assert {"step/seconds", "step/epoch", "step/updates"} <= points.keys()
    for tag, values in points.items():
        assert tag.endswith("/kind") or all(isinstance(x, int | float) for x in values.values())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("section", BOARDS)
def test_real_boards_have_these_methods(section, monkeypatch, tmp_path):
    package, *_ = BOARDS[section]
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(section)["trainer"].history.loss
