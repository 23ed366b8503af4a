"""The page of an evaluation, part by part: one that fails says so in its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import warn
from cryodrgn_amort.report.answers import answers
from cryodrgn_amort.report.html import Picture, environment, picture
from cryodrgn_amort.report.methods import CITATION, methods
from cryodrgn_amort.report.trust import STABLE
from cryodrgn_amort.report.verdict import MODE_NOTES, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.figure import Figure

    from cryodrgn_amort.report.results import Evaluation, TransformResult


__all__ = ["Section", "page_of"]


@dataclass(frozen=True)
class Section:
    """A part of the report, as plugins bring it (hook ``report_sections``).

    Attributes
    ----------
    title, text
        Plain text; an empty line in the text starts a paragraph.
    table
        Rows of text or numbers; the first one is the header.
    figures
        Caption -> matplotlib figure.
    """

    title: str
    text: str = ""
    table: Sequence[Sequence[str | float | None]] | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class _PluginPart:
    section: Section
    plugin: str
    pictures: list[Picture]

    @property
    def paragraphs(self) -> list[str]:
        return [p for p in re.split(r"\n\s*\n", self.section.text.strip()) if p]


_PARTS: Mapping[str, Callable[[Evaluation], dict[str, Any]]] = {
    "verdict": lambda e: {"verdict": verdict(e), "answers": answers(e), "mode_notes": MODE_NOTES},
    "transforms": lambda e: {"transforms": _by_transform(e)},
    "fits": lambda e: {"fitted_measures": {k: m for f in e.fits for k, m in f.measures.items()}},
    "latents": lambda _: {},
    "plugins": lambda e: {"sections": _plugin_parts(e)},
    "methods": lambda _: {"stable": STABLE, "citation": CITATION},
    "paper": lambda e: {"paper": methods(e)},
    "definitions": lambda _: {},
}
"""Parts of the page, templates of the same name, and what they are given besides the evaluation."""


def page_of(
    evaluation: Evaluation,
    pictures: Mapping[str, Sequence[Picture]],
    facts: Sequence[tuple[str, str]],
    measured: Mapping[str, Any],
) -> str:
    """Return report.html.

    Parameters
    ----------
    facts
        What the numbers were measured on, and how.
    measured
        Names of the measures whose definitions are shown.
    """
    templates = environment()
    shared = {"evaluation": evaluation, "run": evaluation.run, "pictures": pictures,
              "facts": facts, "measured": measured}  # fmt: skip
    parts = []
    for name, more in _PARTS.items():
        try:
            template = templates.get_template(f"report/{name}.html.j2")
            parts.append(template.render(**shared, **more(evaluation)))
        except Exception as err:
            said = f"{type(err).__name__}: {err}"
            warn(f"report: part {name!r} left out ({said})")
            template = templates.get_template("report/left_out.html.j2")
            parts.append(template.render(name=name, said=said))
    page: str = templates.get_template("report.html.j2").render(**shared, parts=parts)
    return page


def _by_transform(evaluation: Evaluation) -> list[list[TransformResult]]:
    names = dict.fromkeys(r.name for r in evaluation.results)
    return [[r for r in evaluation.results if r.name == name] for name in names]


def _plugin_parts(evaluation: Evaluation) -> list[_PluginPart]:
    """Collect the plugins' sections; one that fails says so in its place."""
    found = []
    plugins = evaluation.run.plugins
    for plugin, call in plugins.each("report_sections", evaluation=evaluation):
        try:
            parts = [_plugin_part(section, plugin) for section in call()]
        except Exception as err:
            said = f"({type(err).__name__}: {err})"
            warn(f"plugin {plugin!r}: report_sections left out {said}")
            section = Section(plugin, f"This plugin's part is left out {said}.")
            parts = [_PluginPart(section, plugin, [])]
        found += parts
    return found


def _plugin_part(section: Section, plugin: str) -> _PluginPart:
    drawn = [picture("", caption, caption, figure) for caption, figure in section.figures.items()]
    return _PluginPart(section, plugin, drawn)
