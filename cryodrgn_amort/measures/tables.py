"""Measures as rows of text, as JSON, and as a table in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import plain_number
from cryodrgn_amort.measures.catalogue import DEFINITIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.measures.bootstrap import Measure


__all__ = ["catalogue_table", "measure_facts", "text_row", "text_share"]


def text_row(m: Measure) -> tuple[str, ...]:
    """Write name, value, interval, null and ideal of a measure in plain ASCII."""
    interval = "-" if m.low is None else f"{plain_number(m.low)} to {plain_number(m.high)}"
    return (m.name, plain_number(m.value), interval, plain_number(m.null), plain_number(m.ideal))


def text_share(m: Measure) -> str:
    """Write what of a measure is attainable, and which share of it that is, in plain ASCII."""
    if m.share is None:
        return "" if m.attainable is None else plain_number(m.attainable)
    return f"{plain_number(m.attainable)} ({100 * m.share:.0f} %)"


def measure_facts(measures: Mapping[str, Measure]) -> dict[str, Any]:
    """Return what reports write of measures, by name; what is attainable only where it is known."""
    columns = ("value", "low", "high", "null", "ideal", "n")
    more = ("attainable", "share")
    return {
        name: {c: getattr(m, c) for c in (*columns, *(more if m.attainable is not None else ()))}
        for name, m in measures.items()
    }


def catalogue_table() -> str:
    """Return all measures as a table in Markdown, as docs/measures.md has it."""
    rows = [("number", "unit", "null", "ideal", "meaning")]
    for name, d in DEFINITIONS.items():
        null, ideal = (v if isinstance(v, str) else plain_number(v) for v in (d.null, d.ideal))
        rows.append((f"`{name}`", d.unit or "-", null, ideal, d.text))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|---|---|", *lines[1:]])
