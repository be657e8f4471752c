"""Tables as CSV, whose cells may hold any characters of names."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

__all__ = ["as_csv", "needs_quotes"]


def needs_quotes(rows: Sequence[Sequence[object]]) -> bool:
    """Tell whether all cells of a table are quoted, since one has a carriage return.

    Python leaves it unquoted where lines end without one, and readers take it for the end of a line.

    Args:
        rows: The cells.
    """
    return any("\r" in cell for row in rows for cell in row if isinstance(cell, str))


def as_csv(rows: Sequence[Sequence[object]], quoted: bool | None = None) -> str:
    r"""Write rows as CSV, lines ended by ``\n``.

    Args:
        rows: The cells, of the head too, or some rows of a table that is written in parts.
        quoted: Whether all cells are quoted, for tables in parts; None decides by `needs_quotes` of these rows.
    """
    text = io.StringIO()
    odd = needs_quotes(rows) if quoted is None else quoted
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
    writer.writerows(rows)
    return text.getvalue()
