"""Molecules from atomic models: which atoms, how they move, what a class lacks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from cryodrgn_amort.core import InputError, available_memory, check_intact
from cryodrgn_amort.simulation.parts import Hinge, Part, PartModel
from cryodrgn_amort.simulation.potential import Atoms, potential

if TYPE_CHECKING:
    from cryodrgn_amort.options import SimulateOptions


__all__ = ["AtomModel", "load_atoms"]
logger = logging.getLogger("cryodrgn_amort")

_CONTACT = 5.0  # angstroms between atoms that touch
_MARGIN = 3.0  # angstroms that an atom reaches beyond its centre
_BOXES = 1.5  # of the molecule's diameter
_BYTES = 350, 60  # per voxel of the images' box: while it is made, and of each part
_ANGLES = 33


class AtomModel(PartModel):
    """A ``PartModel`` made of atoms.

    Attributes
    ----------
    origin
        What is at the origin of the volumes, in the coordinates of the files.
    """

    origin: np.ndarray

    def facts(self) -> dict[str, Any]:
        """Return what simulation.yaml says of it."""
        return {"origin": self.origin.astype(float).tolist(), **super().facts()}


@dataclass(frozen=True)
class _Model:
    """A model of a file, by the name of both."""

    name: str
    atoms: Atoms
    structure: Any  # gemmi.Structure that it is from


def load_atoms(options: SimulateOptions, D: int, apix: float | None) -> AtomModel:
    """Read atomic models and make of them what is to be simulated.

    The common centre of the potentials of all models becomes the origin; they keep their places
    and orientations to each other.

    Parameters
    ----------
    apix
        Angstroms per pixel; None: the box is 1.5 times the molecule's diameter, which is twice
        the largest distance of an atom from the origin, in all its states, plus 6 angstroms.

    Raises
    ------
    InputError
        Names the flag, and the file or selection that does not fit.
    """
    models = [model for path in options.atoms for model in _read(path)]
    _check_memory(D, len(models) + 1 + len(options.without))
    if len(models) > 1 and (options.turn or options.without):
        flag, value = (
            ("--turn", options.turn) if options.turn else ("--without", options.without[0])
        )
        raise InputError(
            f"{flag} {value}: is for one model, not for the {len(models)} of --atoms, which are "
            "classes"
        )
    centres = [model.atoms.centre() for model in models]
    weights = np.array([weight for _, weight in centres])
    origin = weights @ np.array([centre for centre, _ in centres]) / weights.sum()
    cells, names, hinge = _cells(options, models, origin)
    reach = _MARGIN + max(_reach(atoms, origin, hinge if turns else None)
                          for atoms, _, turns in cells)  # fmt: skip
    apix = apix or round(2 * _BOXES * reach / D, 4)
    if D * apix < 2 * reach:
        given = f"--apix {options.apix:g}" if options.apix else f"--ctf {options.ctf}"
        raise InputError(
            f"{given}: the molecule has a diameter of {2 * reach:.4g} angstroms, more than the "
            f"box of {D} pixels of {apix:.4g}"
        )
    F = 2 * -(-3 * D // 4)
    parts = [Part(potential(atoms, F, D, apix, origin), classes, turns)
             for atoms, classes, turns in cells]  # fmt: skip
    model = AtomModel(D, apix, parts, names, hinge)
    model.origin = origin
    _say(options, models, hinge, 2 * reach, D * apix)
    return model


def _say(
    options: SimulateOptions, models: list[_Model], hinge: Hinge | None, across: float, box: float
) -> None:
    count = sum(len(model.atoms.where) for model in models)
    logger.info(f"{count} atoms, {across:.0f} angstroms across, in a box of {box:.0f}")
    if hinge is not None:
        axis = " ".join(f"{value:.3f}" for value in hinge.axis)
        logger.info(f"--turn {options.turn}: about the direction {axis}")


def _check_memory(D: int, parts: int) -> None:
    if D**3 * (_BYTES[0] + _BYTES[1] * parts) > available_memory():
        raise InputError(f"-D {D}: volumes of this box do not fit memory")


def _read(path: str) -> list[_Model]:
    """Read all models of a file; atoms without occupancy are left out later, by their weight."""
    import gemmi  # when it is needed

    what = f"--atoms {path}"
    check_intact(path, "--atoms")
    try:
        structure = gemmi.read_structure(path)
    except Exception as err:  # whatever is raised for damaged or foreign files
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise InputError(f"{what}: not a readable .pdb or .cif file ({reason})") from None
    found = [_of_model(model, what) for model in structure]
    if not found:
        raise InputError(f"{what}: holds no atoms")
    name = Path(path).name
    if len(found) == 1:
        return [_Model(name, found[0], structure)]
    return [_Model(f"{name} model {i + 1}", atoms, structure) for i, atoms in enumerate(found)]


def _of_model(model: Any, what: str) -> Atoms:
    rows, elements = [], {}
    coefficients: list[list[float]] = []
    for found in model.all():
        atom = found.atom
        name = atom.element.name
        if name not in elements:
            known = atom.element.c4322
            if known is None:
                raise InputError(f"{what}: the element {name} has no scattering factors")
            if name == "X":
                logger.warning(f"{what}: has atoms of unknown element, which count as oxygen")
            elements[name] = len(coefficients)
            coefficients.append([*known.a, *known.b])
        rows.append((*atom.pos.tolist(), atom.occ, atom.b_iso, elements[name]))
    table = np.array(rows, float).reshape(-1, 6)
    if not np.isfinite(table).all():
        raise InputError(f"{what}: positions, occupancies and B-factors must be finite")
    if not (table[:, 3] > 0).any():
        raise InputError(f"{what}: holds no atoms, or none with an occupancy above 0")
    occupancy, b_factor = table[:, 3].clip(min=0), table[:, 4].clip(min=0)
    return Atoms(table[:, :3], occupancy, b_factor, table[:, 5].astype(int), np.array(coefficients))


def _selected(model: _Model, selection: str, given: str) -> np.ndarray:
    """Return which atoms of the only model a selection has, `(N,)` bool.

    Raises
    ------
    InputError
        If it is none, has no atom, or all; ``given`` names the flag and its value.
    """
    import gemmi

    try:
        chosen = gemmi.Selection(selection)
    except Exception as err:
        reason = " ".join(str(err).split())[:200]
        raise InputError(f"{given}: not a selection ({reason})") from None
    structure = model.structure
    for found in structure[0].all():
        found.atom.flag = "n"
    for one in chosen.models(structure):
        for chain in chosen.chains(one):
            for residue in chosen.residues(chain):
                for atom in chosen.atoms(residue):
                    atom.flag = "y"
    which = np.array([found.atom.flag == "y" for found in structure[0].all()])
    there = model.atoms.occupancy > 0
    if not which[there].any():
        raise InputError(f"{given}: selects no atom of {model.name}")
    if which[there].all():
        raise InputError(f"{given}: selects all atoms of {model.name}")
    return which


_Cell = tuple[Atoms, tuple[int, ...], bool]


def _cells(
    options: SimulateOptions, models: list[_Model], origin: np.ndarray
) -> tuple[list[_Cell], list[str], Hinge | None]:
    """Return atoms that are in the same classes, turning or not; names of classes; the hinge."""
    if len(models) > 1:
        return (
            [(m.atoms, (i,), False) for i, m in enumerate(models)],
            [m.name for m in models],
            None,
        )
    model, hinge = models[0], None
    turns = np.zeros(len(model.atoms.where), bool)
    if options.turn is not None:
        selection, degrees = options.turn_parts
        turns = _selected(model, selection, f"--turn {options.turn}")
        hinge = _hinge(model.atoms, turns, degrees, origin, f"--turn {options.turn}")
    lacks = [_selected(model, one, f"--without {one}") for one in options.without]
    columns = np.stack([turns, *lacks], 1)
    kinds, kind = np.unique(columns, axis=0, return_inverse=True)
    cells = []
    for i, (turning, *missing) in enumerate(kinds):
        classes = (0, *(k + 1 for k, lacking in enumerate(missing) if not lacking))
        cells.append((model.atoms.chosen(kind.ravel() == i), classes, bool(turning)))
    names = [model.name, *(f"{model.name} without {one}" for one in options.without)]
    return cells, names, hinge


def _hinge(
    atoms: Atoms, turns: np.ndarray, degrees: float, origin: np.ndarray, given: str
) -> Hinge:
    """Find what a part turns about.

    The point is the mean of the atoms, on both sides, that are within 5 angstroms of one of the
    other side. The axis is, of those perpendicular to the line from there to the centre of the
    part's potential, that of its least moment of inertia; its largest component is positive.
    """
    places = atoms.where - origin
    part, rest = places[turns], places[~turns]
    close = [side[cKDTree(other).query(side, distance_upper_bound=_CONTACT)[0] <= _CONTACT]
             for side, other in ((part, rest), (rest, part))]  # fmt: skip
    if not len(close[0]):
        raise InputError(
            f"{given}: no atom of it is within {_CONTACT:g} angstroms of the rest, so there "
            "is no hinge"
        )
    point = np.concatenate(close).mean(0)
    chosen = atoms.chosen(turns)
    weights = chosen.occupancy * chosen.coefficients[chosen.element, :5].sum(1)
    away = part - point
    line = weights @ away / weights.sum()
    length = np.linalg.norm(line)
    across = np.eye(3) - np.outer(line, line) / length**2 if length > 1e-3 else np.eye(3)
    second = (away * weights[:, None]).T @ away
    second += 1e-9 * np.trace(second) * np.eye(3)  # of a straight line, any
    axis = np.linalg.eigh(across @ second @ across)[1][:, -1]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    return Hinge(point, axis / np.linalg.norm(axis), degrees)


def _reach(atoms: Atoms, origin: np.ndarray, hinge: Hinge | None) -> float:
    """Return the largest distance of an atom from the origin, in all states."""
    places = atoms.where[atoms.occupancy > 0] - origin
    states = [places]
    if hinge is not None:
        states = [hinge.turned(places, t) for t in np.linspace(0, 1, _ANGLES)]
    return max(float(np.linalg.norm(state, axis=1).max(initial=0.0)) for state in states)
