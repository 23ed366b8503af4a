"""Folders of results, compared file by file."""

from __future__ import annotations

import os
import pickle
import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def close(
    found: np.ndarray,
    expected: np.ndarray,
    what: str,
    tolerance: float = 1e-3,
    scale: float = 1e-8,
) -> None:
    """Hold numbers against each other, at a tolerance in units of the greatest, or of ``scale``.

    Raises
    ------
    AssertionError
        If they differ.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, not {expected.shape}"
    assert np.isfinite(found).all(), f"{what}: not finite"
    scale = max(np.abs(expected).max(initial=0), scale)
    apart = np.abs(found - expected).max(initial=0) / scale
    assert apart <= tolerance, f"{what}: {apart:.1e} of the greatest apart"


def read(path: Path) -> np.ndarray | None:
    """Return the numbers of a .mrc, .txt or .pkl; None: it is something else."""
    if path.suffix == ".mrc":
        from cryodrgn.mrcfile import parse_mrc

        return parse_mrc(str(path))[0]
    if path.suffix == ".txt":
        return np.loadtxt(path)
    if path.suffix == ".pkl":
        with open(path, "rb") as handle:
            value = pickle.load(handle)
        return value if isinstance(value, np.ndarray) else None
    return None


def _files(folder: Path, epoch: int) -> dict[str, Path]:
    """Name -> file; the epoch, of which folders' names speak, is left out of names."""
    found = {}
    for parent, _, names in os.walk(folder):  # does not follow links
        for name in names:
            path = os.path.join(parent, name)
            short = os.path.relpath(path, folder)
            # which volumes are in a cluster depends on the latents
            short = re.sub(r"(state_\d+)/.*", r"\1", short)
            found[re.sub(rf"epoch{epoch}\b|\.{epoch}\b", "", short)] = folder / path
    return found


def compare(
    found: tuple[Path, int],
    expected: tuple[Path, int],
    *,
    varies: Sequence[str],
    random: Sequence[str],
    others: Sequence[str],
    numbers: bool,
) -> None:
    """Hold folders of results against each other: names, shapes, and on demand numbers.

    Parameters
    ----------
    found, expected
        Folder and epoch.
    varies
        Patterns of files of which no two runs have as many rows.
    random
        Patterns of files whose numbers no two calls give again.
    others
        Patterns of files of other commands.

    Raises
    ------
    AssertionError
        If they differ.
    """
    ours, theirs = (
        {name: path for name, path in _files(*folder).items()
         if not any(fnmatch(name, p) for p in others)}
        for folder in (found, expected)
    )  # fmt: skip
    missing, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    assert not missing, f"lacks {', '.join(missing[:3])}"
    assert not more, f"has also {', '.join(more[:3])}"
    for name, path in sorted(theirs.items()):
        b = read(path)
        if b is None:
            continue
        a = read(ours[name])
        skipped = any(fnmatch(name, p) for p in varies)
        if not skipped or numbers:
            shape = None if a is None else a.shape
            assert shape == b.shape, f"{name}: {shape}, not {b.shape}"
        if numbers and not any(fnmatch(name, p) for p in random):
            close(a, b, name)
