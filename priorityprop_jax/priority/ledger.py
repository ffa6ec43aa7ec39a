"""What was spent on whom: a dict, a table, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from priorityprop_jax.core.slots import Slots
from priorityprop_jax.core.tables import aligned, markdown

_VECTORS = ("update_counts", "priorities", "allocation")  # what makes a state one that counts
_NONFINITE = "nonfinite_counts"  # where the state has it
_MOST = 1000  # records kept


def find_state(opt_state: Any) -> Any:
    """The one NamedTuple in an optimizer state that counts what was spent on every slot.

    Its fields may be wrapped as the framework wraps them. A ValueError if there are none or more.
    """
    counts = lambda x: set(_VECTORS) <= set(getattr(x, "_fields", ()))  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=counts) if counts(x)]
    if len(found) != 1:
        raise ValueError(
            f"expected one state with the fields {', '.join(_VECTORS)} in the optimizer state, "
            f"got {len(found)}: a ledger is of one optimizer that counts, such as priorityprop"
        )
    return found[0]


class Ledger:
    """The account of a run: for every slot what it got, its share of the whole, its priority.

    Of a long run it keeps up to 1,000 records of what had been spent by when, evenly spread.

    Args:
      slots: the slots of the trained parameters, see `find_slots`.
      unit: what the state counts, for the heads of tables and the axes of pictures.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import Ledger, find_slots, priorityprop
      >>> params = {"Dense_0": jnp.ones((2, 3)), "Dense_1": jnp.ones((3, 1))}
      >>> tx = priorityprop(optax.adam(1e-3), total_budget=2, recalc_every=1)
      >>> state = tx.init(params)
      >>> _, state = tx.update(params, state, params)
      >>> ledger = Ledger(find_slots(params))
      >>> ledger.record(state)
      >>> print(ledger)
      slot     depth  shape  updates   share  priority  granted  non-finite
      Dense_0      1    2x3        1   50.0%       1.1        1           0
      Dense_1      0    3x1        1   50.0%         1        1           0
      total                        2  100.0%                  2           0
      step 1, 2 slots, budget clamped in 0 cycles
    """

    def __init__(self, slots: Slots, unit: str = "updates") -> None:
        self.unit = unit
        self.names, self.depths, self.layers = slots.names, slots.depths, slots.layers
        text = lambda shape: "x".join(map(str, shape)) or "scalar"  # noqa: E731
        self.shapes = ["+".join(map(text, shapes)) for shapes in slots.shapes]
        self.steps: list[int] = []
        self.history: list[list[int]] = []  # [records][slots], spent so far
        self.clamped_cycles: int | None = None
        self.vectors: dict[str, list[Any]] = {name: [0] * len(slots) for name in _VECTORS}

    def record(self, opt_state: Any) -> None:
        """Enters the present state of an optimizer. Waits for the device.

        Args:
          opt_state: any optimizer state that holds one NamedTuple with the fields ``step``,
            ``update_counts``, ``priorities`` and ``allocation``, such as a `PriorityPropState`;
            its ``nonfinite_counts`` and ``clamped_cycles`` are shown where it has them.

        Raises:
          ValueError: if there is no such state, or it is of other slots.
        """
        state = find_state(opt_state)
        read = lambda name: np.asarray(jax.tree.leaves(getattr(state, name))[0])  # noqa: E731
        vectors = {name: read(name) for name in (*_VECTORS, _NONFINITE) if name in state._fields}
        counts = vectors["update_counts"]
        if counts.shape != (len(self.names),):
            raise ValueError(
                f"the state has update counts of shape {counts.shape}, but the ledger has "
                f"{len(self.names)} slots; give find_slots the options of the transformation"
            )
        step = int(read("step"))
        if self.steps[-1:] == [step]:
            del self.steps[-1], self.history[-1]
        self.steps.append(step)
        self.history.append(counts.tolist())
        if len(self.steps) > _MOST:  # every other one: stretches become twice as long
            del self.steps[-2::-2], self.history[-2::-2]
        clamped = "clamped_cycles"
        self.clamped_cycles = int(read(clamped)) if clamped in state._fields else None
        self.vectors = {name: vector.tolist() for name, vector in vectors.items()}

    @property
    def total(self) -> int:
        """What was spent on all slots together, in `unit`."""
        return sum(self.vectors["update_counts"])

    def _heads(self) -> dict[str, str]:
        """The heads of the vectors' columns."""
        heads = (self.unit, "priority", "granted", "non-finite")
        return dict(zip((*_VECTORS, _NONFINITE), heads, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One dict a slot: its name, depth, layer, shape, what it got, share, priority, and more.

        What it got has the unit as its key (``"updates"``); ``share`` is of all that was spent so
        far, from 0 to 1; ``granted`` is of the last cycle's allocation; ``non-finite``, where the
        state counts it, how often the magnitude was NaN or infinite.
        """
        columns = {"slot": self.names, "depth": self.depths, "layer": self.layers}
        columns["shape"] = self.shapes
        for name, vector in self.vectors.items():
            columns[self._heads()[name]] = vector
        columns["share"] = [n / max(self.total, 1) for n in columns[self.unit]]
        values = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON. `from_dict` is the inverse."""
        return {
            "unit": self.unit,
            "step": [0, *self.steps][-1],
            "total": self.total,
            "clamped_cycles": self.clamped_cycles,
            "slots": self.rows(),
            "history": {"steps": list(self.steps), "update_counts": [*map(list, self.history)]},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Ledger:
        """Rebuilds a ledger from `as_dict`.

        Raises:
          ValueError: if the record is not one of `as_dict`'s.
        """
        try:
            ledger = cls(Slots((), (), (), (), (), ()), record.get("unit", "updates"))
            column = lambda head: [row[head] for row in record["slots"]]  # noqa: E731
            ledger.names, ledger.depths = tuple(column("slot")), tuple(column("depth"))
            ledger.layers, ledger.shapes = tuple(column("layer")), column("shape")
            ledger.steps = list(record["history"]["steps"])
            ledger.history = [*map(list, record["history"]["update_counts"])]
            ledger.clamped_cycles = record["clamped_cycles"]
            heads = ledger._heads()
            if not any("non-finite" in row for row in record["slots"]):
                del heads[_NONFINITE]
            ledger.vectors = {name: column(head) for name, head in heads.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a ledger: {error!r} is missing or of another type") from error
        lengths = {len(counts) for counts in ledger.history}
        if lengths - {len(ledger.names)} or len(ledger.history) != len(ledger.steps):
            raise ValueError("not a ledger: its history does not fit its slots")
        return ledger

    def _table(self) -> list[list[str]]:
        """Cells: the heads, one row a slot, the totals."""
        form = {"share": "{:.1%}", "priority": "{:.3g}"}
        heads = ["slot", "depth", "shape", self.unit, "share", "priority", "granted"]
        heads += ["non-finite"] * (_NONFINITE in self.vectors)
        body = [[form.get(head, "{}").format(row[head]) for head in heads] for row in self.rows()]
        totals = {self._heads()[name]: str(sum(vector)) for name, vector in self.vectors.items()}
        totals |= {"slot": "total", "priority": "", "share": "100.0%" if self.total else "0.0%"}
        return [heads, *body, [totals.get(head, "") for head in heads]]

    def _summary(self) -> str:
        number, clamped = len(self.names), self.clamped_cycles
        text = f"step {[0, *self.steps][-1]}, {number} slot{'s' * (number != 1)}"
        if clamped is None:
            return text
        return f"{text}, budget clamped in {clamped} cycle{'s' * (clamped != 1)}"

    def __str__(self) -> str:
        """The ledger as an aligned table."""
        return "\n".join([*(line.rstrip() for line in aligned(self._table())), self._summary()])

    def to_markdown(self) -> str:
        """The ledger as a Markdown table."""
        return "\n".join([*markdown(self._table()), "", self._summary()])

    def plot(self, path: str | Path) -> Path:
        """Draws which layers the budget of every cycle went to, over the run.

        Layers are stacked from the input (bottom) to the output (top); a band's height is its share
        of what was spent between two records. Needs matplotlib (the extra ``demo``).

        Args:
          path: where the picture goes; the ending chooses the format.

        Returns:
          The path.

        Raises:
          ValueError: if nothing has been spent.
        """
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        layers, steps, shares = self._shares()
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colors = colormaps["viridis"](np.linspace(0.05, 0.95, len(layers)))
        # Steps, not slopes: a share belongs to the whole stretch between two records.
        edges = np.repeat(steps, 2)[1:-1]
        bands = np.repeat(shares, 2, axis=0).T
        axes.stackplot(edges, bands, colors=colors, edgecolor="white", linewidth=0.4)
        even = np.array([self.layers.count(layer) for layer in layers]) / len(self.names)
        for line in np.cumsum(even)[:-1]:
            axes.axhline(line, color="black", linewidth=0.7, linestyle=(0, (2, 3)), alpha=0.6)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel="step")
        axes.set_ylabel(f"share of {self.unit}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        spent = f"{self.total:,} {self.unit} over {len(self.names)} slots"
        axes.set_title(f"Where the budget went: {spent}\n(dashed: an even split)", fontsize=11)
        for label, y in _labels(layers, shares[-1]):
            axes.text(1.01, y, label, transform=axes.transAxes, va="center", fontsize=8)
        figure.savefig(path, dpi=130)
        return Path(path)

    def _shares(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Layers from the input, ``[records + 1]`` steps and ``[records, layers]`` shares."""
        depth = dict(zip(self.layers, self.depths, strict=True))
        layers = sorted(depth, key=lambda layer: -depth[layer])
        member = np.array([[own == layer for layer in layers] for own in self.layers], float)
        counts = np.array(self.history, float).reshape(len(self.history), len(self.names))
        steps = np.array(self.steps)
        if not len(steps) or steps[0] != 0:
            steps = np.insert(steps, 0, 0)
            counts = np.insert(counts, 0, 0, axis=0)
        spent = np.diff(counts, axis=0) @ member  # [records, layers]
        keep = spent.sum(axis=1) > 0
        if not keep.any():
            raise ValueError("nothing has been spent yet: record a state after some steps first")
        steps = np.concatenate([steps[:1], steps[1:][keep]])
        return layers, steps, spent[keep] / spent[keep].sum(axis=1, keepdims=True)


def _labels(layers: Sequence[str], shares: np.ndarray) -> list[tuple[str, float]]:
    """Layer names at the middles of their bands at the right edge, thinned until they fit."""
    middles = np.cumsum(shares) - shares / 2
    every = max(1, math.ceil(len(layers) / 24))
    labels: list[tuple[str, float]] = []
    for layer, middle in zip(layers[::every], middles[::every], strict=True):
        below = labels[-1][1] if labels else -1.0
        labels.append((layer, max(float(middle), below + 0.04)))
    return labels
