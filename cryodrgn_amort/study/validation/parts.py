"""The parts of a validation: each reads what those before it have written, and writes its own."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import InputError, matrix_products, write_arrays, write_json
from cryodrgn_amort.measures import measure
from cryodrgn_amort.study.validation.case import Fits, other_half
from cryodrgn_amort.study.validation.epochs import epoch_curve
from cryodrgn_amort.study.validation.gains import agreement, clusters, gain, volume_spread
from cryodrgn_amort.study.validation.maps import compared, fsc_curves, make_maps
from cryodrgn_amort.study.validation.misfits import LOW, Misfits
from cryodrgn_amort.study.validation.poses import (
    PoseSlopes,
    crossed_slopes,
    likely_errors,
    likely_poses,
    measured_slopes,
    read_off,
)
from cryodrgn_amort.study.validation.renoising import renoised

if TYPE_CHECKING:
    from cryodrgn_amort.study.validation.plan import Validation


__all__ = ["do_part"]

_POSE_ROUNDS = 24  # of the bootstrap


@matrix_products()
def do_part(validation: Validation, name: str) -> None:
    """Do a part, and write what it found.

    Raises
    ------
    InputError
        If there is no such part, or what it needs is not there.
    """
    kind, _, case = name.partition(".")
    validation.part(name).parent.mkdir(exist_ok=True)
    if kind == "fit" and case in (*validation.halves, *validation.nulls):
        fits = validation.case(case).fit(validation.options.sample)
        fits.write(validation.part(name, "npz"))
        return
    if name not in _PARTS:
        raise InputError(f"--part {name}: there is none of that name; --dry-run lists them")
    write_json(validation.part(name), _PARTS[name](validation))


def _fits(validation: Validation, name: str) -> Fits:
    path = validation.part(f"fit.{name}", "npz")
    if not path.is_file():
        raise InputError(f"--part: needs fit.{name}, which is not done yet ({path})")
    return Fits.read(path)


def _gain(validation: Validation) -> dict[str, Any]:
    rounds, seed = validation.options.bootstrap, validation.options.seed
    found: dict[str, Any] = {"gain": {}, "spread": {}, "clusters": {}, "agreement": {}}
    for name in (*validation.halves, *validation.nulls):
        case, fits = validation.case(name), _fits(validation, name)
        found["gain"][name] = asdict(gain("heterogeneity_gain", fits, rounds, seed))
        found["spread"][name] = volume_spread(case)
        found["clusters"][name] = clusters(case.run.z()[0], seed)
        if name in validation.halves:
            other = validation.trained(other_half(name))
            pair = agreement(case, fits, other, rounds, seed)
            found["agreement"][name] = {m.name: asdict(m) for m in pair}
    return found


def _keep(validation: Validation, name: str, positions: np.ndarray, **columns: np.ndarray) -> None:
    """Keep what a part found of particles at positions in the stack `(M,)`: for trust.csv."""
    order = np.argsort(positions)
    sorted_ = {column: values[order] for column, values in columns.items()}
    write_arrays(validation.part(name, "npz"), position=positions[order], **sorted_)


def _poses(validation: Validation) -> dict[str, Any]:
    parts, crossed, positions = [], [], []
    for name in validation.halves:
        case, fits = validation.case(name), _fits(validation, name)
        positions.append(case.positions[fits.rows])
        parts.append(measured_slopes(case, fits))
        if not validation.options.quick:
            other = validation.trained(other_half(name))
            crossed.append(crossed_slopes(case, fits, other))
    own = PoseSlopes.joined([p[0] for p in parts])
    known = {deg: PoseSlopes.joined([p[1][deg] for p in parts]) for deg in parts[0][1]}
    curve = {deg: likely_errors(slopes) for deg, slopes in known.items()}
    value, n = likely_errors(own), len(own.slope)
    rng = np.random.default_rng(validation.options.seed)
    drawn = [likely_errors(own.of(rng.integers(n, size=n)), value) for _ in range(_POSE_ROUNDS)]
    angles = [read_off(d[0], curve) for d in drawn]
    moved = likely_poses(own, value)
    _keep(validation, "poses", np.concatenate(positions), pose_deg=moved[:, 0], pose_px=moved[:, 1])
    found = {
        "degrees": read_off(value[0], curve), "low": float(np.percentile(angles, 2.5)),
        "high": float(np.percentile(angles, 97.5)), "pixels": value[1], "n": n,
        "pixels_at_known_poses": curve[0.0][1], "reading": value[0],
        "known": {str(k): v[0] for k, v in curve.items()}, "of_decoders": None,
    }  # fmt: skip
    if crossed:
        both = read_off(likely_errors(PoseSlopes.joined(crossed))[0], curve)
        found["of_decoders"] = both / math.sqrt(2)  # one of them
    return found


def _misfits(validation: Validation) -> dict[str, Any]:
    positions, found, crossed = [], [], []
    for name in validation.halves:
        case = validation.case(name)
        asked = Misfits(case, _fits(validation, name))
        found.append(asked.of_particles())
        positions.append(case.positions)
        if not validation.options.quick:
            other = validation.trained(other_half(name))
            crossed.append(asked.of_decoders(other, found[-1]["misfit_p"]))
    columns = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    _keep(validation, "misfits", np.concatenate(positions), **columns)
    usual = {}
    for name in validation.nulls:
        of_null = Misfits(validation.case(name), _fits(validation, name)).of_particles()
        usual[name] = float((of_null["misfit_p"] < LOW).mean())
    p = columns["misfit_p"]
    return {
        "below": float((p < LOW).mean()), "n": len(p), "below_of_nulls": usual,
        "below_of_decoders": float((np.concatenate(crossed) < LOW).mean())
        if sum(map(len, crossed)) else None,
    }  # fmt: skip


def _epochs(validation: Validation) -> dict[str, Any]:
    case, fits = validation.case("half0"), _fits(validation, "half0")
    curve = epoch_curve(case, fits, max(20, validation.options.sample // 2))
    gained, error, whole = curve.growth
    return {
        "epochs": curve.epochs.tolist(), "elbo": curve.elbo.mean(1).tolist(), "best": curve.best,
        "error": (curve.elbo.std(1) / np.sqrt(curve.elbo.shape[1])).tolist(),
        "last_quarter": gained, "last_quarter_error": error, "all": whole,
        "improves": curve.improves, "declines": curve.declines,
    }  # fmt: skip


def _noise(validation: Validation) -> dict[str, Any]:
    options = validation.options
    positions, bias, spread, encoded = renoised(validation.run, options.sample, options.seed)
    _keep(validation, "noise", positions, noise_bias=bias, noise_spread=spread)
    told = np.isfinite(spread)
    opts = {"rounds": options.bootstrap, "seed": options.seed}
    return {
        "encoded": encoded, "n": len(bias), "told": int(told.sum()),
        "bias": asdict(measure("renoised_bias", np.median, bias, **opts)),
        "spread": asdict(measure("renoised_spread", np.median, spread[told], **opts))
        if told.any() else None,
    }  # fmt: skip


def _maps(validation: Validation) -> dict[str, Any]:
    options = validation.options
    cases = {name: validation.case(name) for name in validation.halves}
    fits = {name: _fits(validation, name) for name in cases}
    found = make_maps(validation.run, cases, fits, options.maps, validation.folder / "maps")
    measures = compared(found, options.bootstrap, options.seed)
    count = len(found["half0"].decoded)
    return {
        "latents": count, "particles": min(c.particles.n for c in cases.values()) // count,
        "fsc": fsc_curves(found), **{name: asdict(m) for name, m in measures.items()},
    }  # fmt: skip


_PARTS = {
    "gain": _gain, "maps": _maps, "poses": _poses, "misfits": _misfits, "epochs": _epochs,
    "noise": _noise,
}  # fmt: skip
