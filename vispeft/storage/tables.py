"""Tables as CSV, whose cells may hold any characters of names."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

__all__ = ["as_csv"]


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    r"""Write rows as CSV, lines ended by ``\n``.

    Args:
        rows: The cells, of the head too.
    """
    text = io.StringIO()
    # Python leaves a carriage return unquoted where lines end without one, and readers take it for the end of a line.
    odd = any("\r" in cell for row in rows for cell in row if isinstance(cell, str))
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
    writer.writerows(rows)
    return text.getvalue()
