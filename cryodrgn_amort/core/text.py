"""Numbers and tables as plain text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["number", "plain_number", "text_table"]


def number(value: float | None) -> str:
    """Write a number with three significant digits; an en dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value)).replace("-", "−")
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def plain_number(value: float | None) -> str:
    """Write a number as ``number`` does, in plain ASCII."""
    return number(value).replace("–", "-").replace("−", "-")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )
