"""What commands there are, as a reader would type them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FIRST = ("README.md", "docs/commands/train_amort.md", "docs/encoders.md")  # later ones need these


def _pages(folder: str) -> list[str]:
    found = sorted(str(page.relative_to(ROOT)) for page in (ROOT / folder).rglob("*.md"))
    return [page for page in found if page not in _FIRST]


MANUAL = (*_FIRST, *_pages("docs"))
PAGES = (*MANUAL, *_pages("examples"))


@dataclass(frozen=True)
class Command:
    """A line of a ``bash`` block, continuations joined, comments gone."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """As it is typed."""
        return shlex.join(self.words)

    @property
    def own(self) -> tuple[str, ...] | None:
        """Name and arguments of a command of ours, however it is started; None: of another."""
        words = self.words
        if words[0] == "torchrun":
            words = words[words.index("cryodrgn_amort") :]
        if words[0] in ("cryodrgn", "cryodrgn_amort") and words[1].endswith(("_amort", "_plugins")):
            return words[1:]
        return None


def commands(page: str) -> list[Command]:
    """Return the commands of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    found = (tuple(shlex.split(line, comments=True)) for line in lines)
    return [Command(page, words) for words in found if words]
