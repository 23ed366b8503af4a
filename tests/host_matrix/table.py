"""The table in docs/host.md: written from what was found, and read by the tests."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Found = dict[str, dict[str, dict[str, str]]]  # host -> run -> command -> one of these:

SAME, WORKS, REFUSED, ABSENT = "same", "yes", "refused", "none"
FAILS, LIKE_STOCK = "fails", "as train_vae"

START, END = "<!-- host matrix: bash tests/host_matrix.sh --write-page -->", "<!-- end -->"


def _together(
    names: Sequence[str], lines: dict[str, tuple[str, ...]]
) -> dict[tuple[str, ...], str]:
    """Group names whose lines of cells are equal: line -> names, in their order."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(lines[name], []).append(f"`{name}`")
    return {line: ", ".join(members) for line, members in groups.items()}


def _cell(words: dict[str, str]) -> str:
    """Return one cell from what each host gave; the newest, and which others differ."""
    newest = list(words.values())[-1]
    others = [f"{host}: {word}" for host, word in words.items() if word != newest]
    return f"{newest} ({'; '.join(others)})" if others else newest


def render(found: Found, runs: Sequence[str], commands: Sequence[str]) -> str:
    """Write the table: runs with equal rows are one row, commands with equal columns one column."""
    cells = {
        (r, c): _cell({host: table[r][c] for host, table in found.items()})
        for r in runs for c in commands
    }  # fmt: skip
    columns = _together(commands, {c: tuple(cells[r, c] for r in runs) for c in commands})
    firsts = [names.split(", ")[0].strip("`") for names in columns.values()]
    rows = _together(runs, {r: tuple(cells[r, c] for c in firsts) for r in runs})
    lines = [f"| run of | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {names} | {' | '.join(line)} |" for line, names in rows.items()]
    return "\n".join(lines)


def parse(text: str) -> tuple[dict[str, int], list[str], list[str]]:
    """Read the table in a page: how often each run is named, the commands, all cells."""
    lines = text.split(START)[1].split(END)[0].strip().splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    header, _, *rows = split
    runs = [name for row in rows for name in re.findall("`(.+?)`", row[0])]
    commands = [name for cell in header[1:] for name in re.findall("`(.+?)`", cell)]
    return {r: runs.count(r) for r in runs}, commands, [cell for row in rows for cell in row[1:]]


def write(page: Path, table: str) -> None:
    """Put the table between its marks in a page."""
    before, rest = page.read_text().split(START)
    page.write_text(f"{before}{START}\n{table}\n{END}{rest.split(END, 1)[1]}")
