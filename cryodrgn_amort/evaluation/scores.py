"""Scores of particles, added to the RELION .star or cryoSPARC .cs file that they come from.

What is there stays as it is, to the byte: rows of a .star file are continued, fields of a .cs file
follow the others.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import InputError, read_ind, read_json, read_text, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


__all__ = ["Scores", "add_scores", "load_scores"]

_TRUST = "trust.csv"
_TOKEN = re.compile(r'"[^"]*"(?=\s|$)|\'[^\']*\'(?=\s|$)|\S+')
_IMAGES = ("_rlnImageName", "_rlnTomoParticleName")
_GROUPS = ("_rlnGroupName", "_rlnGroupNumber")
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Scores:
    """What an evaluation found of each particle.

    Attributes
    ----------
    source
        The file that holds it, for messages.
    particles
        Positions in the stack, `(N,)`.
    total
        How many particles the stack has; None: not known.
    columns
        Values by name, `(N,)` each; NaN where it was not measured.
    stack
        The file of the particles that the run was trained on, if it is known.
    """

    source: str
    particles: np.ndarray
    total: int | None
    columns: dict[str, np.ndarray]
    stack: Path | None = None

    def rows(self, name: str, total: int) -> np.ndarray:
        """Return a column for all particles of the stack, `(total,)`; NaN for those not in it."""
        values = np.full(total, np.nan)
        values[self.particles] = self.columns[name]
        return values


def load_scores(folder: str) -> Scores:
    """Read ``trust.csv`` in the folder of an evaluation, or in the latest one of a run's folder.

    Raises
    ------
    InputError
        If there is none, or it is damaged.
    """
    path = Path(folder)
    if not (path / _TRUST).is_file():
        found = [p for p in path.glob(f"amort.*/{_TRUST}") if p.parent.suffix[1:].isdigit()]
        if not found:
            raise InputError(
                f"EVAL {folder}: neither a folder of eval_amort nor a run that has one "
                f"(no {_TRUST}); run `cryodrgn eval_amort` first"
            )
        path = max(found, key=lambda p: int(p.parent.suffix[1:])).parent
    rows = list(csv.DictReader(read_text(path / _TRUST, "EVAL").splitlines()))
    try:
        names = list(rows[0])[1:]
        particles = np.array([int(row["particle"]) for row in rows])
        columns = {n: np.array([float(row[n] or "nan") for row in rows]) for n in names}
        run = read_json(path / "amortization.json", "EVAL")["run"]
        total, stack = run.get("stack"), run.get("settings", {}).get("particles")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        if isinstance(err, InputError):
            raise
        raise InputError(f"EVAL {path / _TRUST}: damaged ({type(err).__name__})") from None
    if particles.min() < 0 or len(np.unique(particles)) < len(particles):
        raise InputError(f"EVAL {path / _TRUST}: damaged (particles that cannot be)")
    return Scores(str(path / _TRUST), particles, total, columns, stack and Path(stack))


def add_scores(
    scores: Scores,
    table: str,
    out: str,
    *,
    columns: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    ind: str | None = None,
) -> tuple[int, list[str]]:
    """Copy a .star or .cs file, and add scores to its particles.

    Parameters
    ----------
    table, out
        The file that the stack's particles are in, in the stack's order; where the copy goes.
        Any order, and any part, if the run was trained on a file of the same names (image or
        group names of a .star, uid of a .cs).
    columns
        Names of the scores; None: all that are known of any particle.
    labels
        Further columns: label in the file -> score.
    ind
        Pickle of positions in the stack: only these particles are copied.

    Returns
    -------
    rows
        How many are in the copy.
    names
        Labels of the columns that were added.

    Raises
    ------
    InputError
        If file, scores and flags do not fit; nothing has been written then.
    """
    what, source, target = f"PARTICLES {table}", Path(table), Path(out)
    _check_paths(what, source, out)
    known = [name for name, values in scores.columns.items() if np.isfinite(values).any()]
    names, given = known if columns is None else columns, {} if labels is None else labels
    wanted = {_label(name, source.suffix): name for name in names}
    for label, name in given.items():
        if wanted.get(label, name) != name:
            raise InputError(f"--as {label}={name}: {wanted[label]} is written there")
    wanted |= given
    _check_columns(scores, columns or (), given, source.suffix)
    file = (_Star if source.suffix == ".star" else _Cryosparc)(source)
    owner, total = _owner(file, scores, what)
    chosen = (
        np.ones(len(owner), bool) if ind is None else np.isin(owner, read_ind(ind, "--ind", total))
    )
    for label in wanted:
        if label in file.labels:
            raise InputError(f"{what}: has a column {label} already")
    added = {label: scores.rows(name, total)[owner] for label, name in wanted.items()}
    with replacing(target) as temporary:
        temporary.write_bytes(file.with_columns(added, chosen))
    return int(chosen.sum()), list(wanted)


def _check_paths(what: str, source: Path, out: str) -> None:
    """Refuse files of other kinds, and a copy that has no place or would replace something else."""
    target = Path(out)
    if source.suffix not in (".star", ".cs"):
        raise InputError(f"{what}: a .star or a .cs file is needed")
    if target.suffix != source.suffix:
        raise InputError(f"-o {out}: must end in {source.suffix}, as PARTICLES do")
    if target.exists() and not target.is_file():
        raise InputError(f"-o {out}: is not a file")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"-o {out}: is PARTICLES itself")
    if not target.absolute().parent.is_dir():
        raise InputError(f"-o {out}: its folder is not there")


def _check_columns(
    scores: Scores, columns: Sequence[str], labels: Mapping[str, str], suffix: str
) -> None:
    """Refuse names of no score, and labels that a .star file cannot have."""
    for flag, names in (("--columns", columns), ("--as", labels.values())):
        for name in names:
            if name not in scores.columns:
                raise InputError(
                    f"{flag} {name}: {scores.source} has {', '.join(scores.columns)} only"
                )
    for label in labels:
        if suffix == ".star" and not _LABEL.fullmatch(label):
            raise InputError(f"--as {label}: not a label (letters, digits, _)")


def _label(name: str, suffix: str) -> str:
    """Return what a score is called in a file: ``amortRankRoll1Held``, ``amort/rank_roll_1_held``.

    RELION keeps columns that it does not know; cryoSPARC's fields are in groups.
    """
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    if suffix == ".cs":
        return "amort/" + "_".join(words)
    return "amort" + "".join(word[0].upper() + word[1:] for word in words)


def _owner(file: _Star | _Cryosparc, scores: Scores, what: str) -> tuple[np.ndarray, int]:
    """Return which particle of the stack each row is, `(rows,)`, and how many the stack has."""
    owner = _by_name(file, scores)
    owner = file.owner(scores) if owner is None else owner
    total = max(int(owner.max()) + 1, scores.total or 0)
    if scores.particles.max() >= total:
        raise InputError(
            f"{what}: has {total} particles, {scores.source} is about particle "
            f"{scores.particles.max()}"
        )
    return owner, total


def _by_name(file: _Star | _Cryosparc, scores: Scores) -> np.ndarray | None:
    """Return which particle of the stack each row is, by name; None: the names are others."""
    stack = scores.stack
    if stack is None or stack.suffix != file.path.suffix or not stack.is_file():
        return None
    try:
        theirs = type(file)(stack).names()
    except InputError:  # the host reads files that we do not
        return None
    for own, names in zip(file.names(), theirs, strict=True):
        known = {name: i for i, name in enumerate(dict.fromkeys(names))}
        if len(known) == scores.total and own and known.keys() >= set(own):
            return np.array([known[name] for name in own])
    return None


class _Star:
    """A STAR file, as lines; its particles are the rows of one loop.

    Hall, J. Chem. Inf. Comput. Sci. 31, 326 (1991), as far as RELION writes it: a row is a line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.what = path, f"PARTICLES {path}"
        try:
            # of whatever encoding: what is not understood comes out as it went in
            text = path.read_bytes().decode("utf-8", "surrogateescape")
        except OSError as err:
            raise InputError(f"{self.what}: {err.strerror}") from None
        self.lines = text.splitlines(keepends=True)
        loops = [loop for loop in self._loops() if set(loop[0]) & set(_IMAGES)]
        if len(loops) != 1:
            raise InputError(
                f"{self.what}: {len(loops) or 'no'} tables of particles (with "
                f"{' or '.join(_IMAGES)}); one is needed"
            )
        columns, self._last, self.rows = loops[0]
        self.columns = columns
        self.labels = {label.removeprefix("_") for label in columns}
        self._values = [_TOKEN.findall(self.lines[number]) for number in self.rows]
        for number, values in zip(self.rows, self._values, strict=True):
            if len(values) != len(columns):
                raise InputError(
                    f"{self.what}: line {number + 1} has {len(values)} values for {len(columns)} "
                    "columns"
                )
        if not self.rows:
            raise InputError(f"{self.what}: has no particles")

    def _loops(self) -> list[tuple[list[str], int, list[int]]]:
        """Return of each loop the labels, the line of the last one, and the lines of its rows."""
        found: list[tuple[list[str], int, list[int]]] = []
        within = False
        for number, line in enumerate(self.lines):
            word = line.strip()
            if word == "loop_":
                found.append(([], number, []))
                within = True
            elif word.startswith("data_"):
                within = False
            elif not within and word and found and found[-1][2] and word[0] not in "_#;":
                raise InputError(f"{self.what}: line {number + 1}: a row after a blank line")
            elif not within or not word or word.startswith("#"):
                within = within and not (found and found[-1][2] and not word)
            elif word.startswith("_") and not found[-1][2]:
                found[-1] = ([*found[-1][0], word.split()[0]], number, [])
            elif word.startswith(";"):
                raise InputError(f"{self.what}: line {number + 1}: text over several lines")
            else:
                found[-1][2].append(number)
        return found

    def names(self) -> tuple[list[Any], ...]:
        """Return the name of each row's image, and of its group; none where there are none."""
        labels = _IMAGES[0], next((name for name in _GROUPS if name in self.columns), "")
        places = [self.columns.index(label) if label in self.columns else -1 for label in labels]
        images, groups = ([row[at] for row in self._values] if at >= 0 else [] for at in places)
        return [name.lstrip("0") for name in images], groups

    def owner(self, scores: Scores) -> np.ndarray:
        """Return which particle of the stack each row is of, `(rows,)`: of tilt series, its group.

        Whether images are grouped is told by their number.
        """
        rows = np.arange(len(self.rows))
        if scores.total is None or len(rows) == scores.total:
            return rows
        groups = self.names()[1]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        if len(numbers) == scores.total:
            return np.array([numbers[name] for name in groups])
        raise InputError(
            f"{self.what}: has {len(rows)} particles, the stack of {scores.source} {scores.total}"
        )

    def with_columns(self, added: Mapping[str, np.ndarray], chosen: np.ndarray) -> bytes:
        """Return the file with further columns, and the chosen rows only."""
        lines = list(self.lines)
        end = lines[self._last][len(lines[self._last].rstrip("\r\n")) :] or "\n"
        first = len(self.columns) + 1
        header = [f"_{label} #{first + i} {end}" for i, label in enumerate(added)]
        lines[self._last] += "".join(header)
        for number, keep, *values in zip(self.rows, chosen, *added.values(), strict=True):
            line = lines[number]
            body = line.rstrip("\r\n")
            gap = "" if body.endswith((" ", "\t")) else " "
            new = " ".join(f"{value:.6g}" for value in values)
            rest = f"{gap}{new}{' ' if new and not gap else ''}" if new else ""
            lines[number] = f"{body}{rest}{line[len(body) :]}" if keep else ""
        return "".join(lines).encode("utf-8", "surrogateescape")


class _Cryosparc:
    """A .cs file: a structured array in NumPy's format."""

    def __init__(self, path: Path) -> None:
        self.path, self.what = path, f"PARTICLES {path}"
        try:
            with open(path, "rb") as handle:
                self.table: np.ndarray = np.load(handle, allow_pickle=False)
        except OSError as err:
            raise InputError(f"{self.what}: {err.strerror or err}") from None
        except Exception as err:  # whatever NumPy raises for other files
            reason = " ".join(str(err).split())[:100]
            raise InputError(f"{self.what}: not a .cs file of plain data ({reason})") from None
        names = self.table.dtype.names
        if not isinstance(self.table, np.ndarray) or names is None or self.table.ndim != 1:
            raise InputError(f"{self.what}: not a .cs file (a table with named fields)")
        if not len(self.table):
            raise InputError(f"{self.what}: has no particles")
        self.labels = set(names)

    def names(self) -> tuple[list[Any], ...]:
        """Return the uid of each row; none where there are none."""
        return (self.table["uid"].tolist() if "uid" in self.labels else [],)

    def owner(self, scores: Scores) -> np.ndarray:
        """Return which particle of the stack each row is, `(rows,)`."""
        if scores.total is not None and len(self.table) != scores.total:
            raise InputError(
                f"{self.what}: has {len(self.table)} particles, the stack of {scores.source} "
                f"{scores.total}"
            )
        return np.arange(len(self.table))

    def with_columns(self, added: Mapping[str, np.ndarray], chosen: np.ndarray) -> bytes:
        """Return the file with further fields, and the chosen rows only."""
        own = self.table.dtype
        names = own.names
        assert names is not None
        fields = [(name, own[name].base, own[name].shape) for name in names]
        new = np.empty(int(chosen.sum()), [*fields, *((label, "<f4") for label in added)])
        for name in names:
            new[name] = self.table[name][chosen]
        for label, values in added.items():
            new[label] = values[chosen]
        stream = io.BytesIO()
        np.save(stream, new, allow_pickle=False)
        return stream.getvalue()
