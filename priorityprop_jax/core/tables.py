"""Tables of text, for people who read them."""

from __future__ import annotations

import math
import re
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


def mebibytes(size: float) -> float:
    """Bytes in MiB."""
    return size / 2**20


def bytes_of(size: str) -> float:
    """A size such as ``"4GiB"``, ``"500 MB"`` or ``"1e9"``; a ValueError if it is none above 0."""
    match = re.fullmatch(r"([\d.e+]+) ?(?:([kKMGT]?)(i?)B)?", size)
    try:
        number, prefix, binary = match.groups() if match else ("", "", "")
        place = " kMGT".index((prefix or " ").replace("K", "k"))
        found = float(number) * (1024 if binary else 1000) ** place
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"{size!r} is not a size such as 4GiB or 500MB")
    return found
