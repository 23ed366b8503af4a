"""What the site has from elsewhere, put into its pages while it is built (a hook of MkDocs).

A page says so in comments:

    <!-- file: PATH -->      the text of a document outside this folder
    <!-- flags: COMMAND -->  its flags, by its parser
    <!-- measures -->        the catalogue of measures

Links to files of the repository that are no pages become their names.
"""

from __future__ import annotations

import argparse
import html
import importlib
import os
import re
from pathlib import Path
from typing import Any

from cryodrgn_amort.measures.tables import catalogue_table
from cryodrgn_amort.plugins import load_plugins

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
_FILE = re.compile(r"<!-- file: (\S+) -->")
_FLAGS = re.compile(r"<!-- flags: (\S+) -->")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page as it is built."""
    source = Path(page.file.abs_src_path)
    taken = _FILE.fullmatch(markdown.strip())
    if taken:
        origin = ROOT / taken[1]
        return _links(origin.read_text(), origin.parent, source.parent)
    markdown = _links(markdown, source.parent, source.parent)
    markdown = markdown.replace("<!-- measures -->", catalogue_table())
    return _FLAGS.sub(lambda found: flags_table(found[1]), markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that documents outside this folder show."""
    from mkdocs.structure.files import File

    for picture in (ROOT / "examples").glob("*.svg"):
        added = File.generated(config, f"results/{picture.name}", abs_src_path=str(picture))
        files.append(added)
    return files


def pages() -> dict[Path, Path]:
    """Return what page each document outside this folder is."""
    taken = {page: _FILE.fullmatch(page.read_text().strip()) for page in DOCS.rglob("*.md")}
    return {ROOT / found[1]: page for page, found in taken.items() if found}


def _links(text: str, origin: Path, place: Path) -> str:
    """Make the links of a document in ``origin`` those of a page in ``place``."""
    moved = pages()

    def link(found: re.Match[str]) -> str:
        picture, words, path, anchor = found[1], found[2], found[3], found[4] or ""
        if not path:
            return found[0]
        target = (origin / path).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{origin}: no {path}")
        if target == ROOT / "README.md":
            target = DOCS / "index.md"
        target = moved.get(target / "README.md" if target.is_dir() else target, target)
        if picture and target.parent == ROOT / "examples":
            target = DOCS / "results" / target.name
        if DOCS not in target.parents:
            return words
        return f"{picture}[{words}]({os.path.relpath(target, place)}{anchor})"

    return _LINK.sub(link, text)


def flags_table(command: str) -> str:
    """Return the flags of a command, by group, in Markdown."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(load_plugins().commands()[command].module).add_args(parser)
    lines = []
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        if not shown:
            continue
        title = (group.title or "").strip(": ")
        lines += ["", f"### {title[:1].upper()}{title[1:]}", "", "| flag | what |", "|---|---|"]
        lines += [f"| {_name(action)} | {_what(action, parser)} |" for action in shown]
    return "\n".join(lines)


def _name(action: argparse.Action) -> str:
    formatter = argparse.HelpFormatter("")
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if action.nargs == 0:
        return names
    values = formatter._format_args(action, (action.dest if not names else action.dest.upper()))
    values = html.escape(values).replace("|", "&#124;")  # a table's own sign
    return f"{names} <code>{values}</code>".strip()


def _what(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog)
    text = " ".join(formatter._expand_help(action).split()) if action.help else ""
    text = re.sub(r"([<>*_|\\\[\]])", r"\\\1", text)
    return re.sub(r"(?<!\w)(--?[a-z][\w-]*)", r"`\1`", text.replace("\\_", "_"))
