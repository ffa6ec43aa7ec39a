"""Tables of text, for people who read them."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its head first: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The same as a table of Markdown. A ``|`` in a cell is escaped."""
    ruled = [rows[0], ("---", *["---:"] * (len(rows[0]) - 1)), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in ruled]


def short(value: float) -> str:
    """A number in four digits with the prefix of a unit, which goes right behind: ``"1.5 G"``."""
    scales = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    prefix, unit = next((s for s in scales if abs(value) >= s[1]), ("", 1.0))
    return f"{value / unit:.4g} {prefix}"
