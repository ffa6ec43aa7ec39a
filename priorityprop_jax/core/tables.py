"""Tables of text, for people who read them."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, all others to the right.

    Args:
      rows: cells; the first row is the header.

    Example:
      >>> from priorityprop_jax.core.tables import aligned
      >>> for line in aligned([("layer", "ms"), ("output", "0.25")]):
      ...     print(line)
      layer     ms
      output  0.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The same as a table of Markdown.

    Args:
      rows: cells; the first row is the header. A ``|`` in a cell is escaped.

    Example:
      >>> from priorityprop_jax.core.tables import markdown
      >>> for line in markdown([("layer", "ms"), ("output", "0.25")]):
      ...     print(line)
      | layer | ms |
      | --- | ---: |
      | output | 0.25 |
    """
    ruled = [rows[0], ("---", *["---:"] * (len(rows[0]) - 1)), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in ruled]
