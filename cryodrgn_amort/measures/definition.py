"""What a definition of a measure says."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Definition"]


@dataclass(frozen=True)
class Definition:
    """What a measure is: all that files, reports and documents say of it.

    Attributes
    ----------
    title, text, unit
        For humans; an empty unit: a pure number.
    null, ideal
        Its value if latents had nothing to do with images, and at best; None: there is none. Words
        where it depends on the data, and is measured with it.
    per_image
        Whether files keep its value for each particle: ``NAME.pkl``.
    attainable
        The measure that says what the data allow of it.
    """

    title: str
    text: str
    unit: str = ""
    null: float | str | None = None
    ideal: float | str | None = None
    per_image: bool = False
    attainable: str | None = None

    def words(self) -> dict[str, str]:
        """Return what files say of it."""
        return {"title": self.title, "text": self.text, "unit": self.unit}
