"""The bench's result as tables in Markdown."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING

from cryodrgn_amort.core import __version__, cores, number, read_fact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Section", "machine_facts", "middle", "ratio", "render"]


@dataclass
class Section:
    """A table of the result: the cells of each row, and remarks below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def machine_facts(threads: int) -> dict[str, str]:
    """Return what the numbers depend on: machine, versions, date."""
    cpu = read_fact("/proc/cpuinfo", "model name") or "unknown CPU"
    load = f"{os.getloadavg()[0]:.1f}"
    return {
        "Machine": f"{cpu}, {cores()} cores, {threads} threads used, load before {load}",
        "Versions": f"torch {version('torch')}, cryodrgn {version('cryodrgn')}, cryodrgn_amort "
        f"{__version__}, Python {sys.version.split()[0]}",
        "Date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }


def render(facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Write facts and tables as markdown."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for section in sections:
        lines += ["", f"### {section.title}", ""]
        for cells in (section.header, ("---",) * len(section.header), *section.rows):
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *section.notes] if section.notes else []
    return "\n".join(lines) + "\n"


def ratio(ours: Sequence[float], others: Sequence[float]) -> str:
    """Write the median and the range of the ratios within rounds; a dash if one was not run."""
    ratios = [a / b for a, b in zip(ours, others, strict=False)]
    if not ratios:
        return "–"
    low, high = min(ratios), max(ratios)
    spread = f" [{low:.2f}–{high:.2f}]" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f} ×{spread}"


def middle(values: Sequence[float]) -> str:
    """Write the median; a dash if there are no values."""
    return number(median(values) if values else None)
