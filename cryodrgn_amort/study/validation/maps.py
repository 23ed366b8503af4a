"""Are the decoder's volumes in the particles: maps without the decoder, of selected particles.

Volumes of one half's decoder are found again among those of the other half's; each decoder then
selects, of the particles that it has not seen, those that a volume explains best, and the host
backprojects them. What the other decoder, which was trained on these particles but did not select
them, shows at the same place has nothing to do with the selection but what is in both halves: no
noise of the particles, and none of the decoder that selects (Henderson, PNAS 110, 18037, 2013).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import logsumexp

from cryodrgn_amort import host
from cryodrgn_amort.core import bar, read_pickle, write_pickle
from cryodrgn_amort.measures import fourier_radius, fsc, measure, ratio
from cryodrgn_amort.models import cluster_centres

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.study.validation.case import Case, Fits


__all__ = ["compared", "fsc_curves", "make_maps", "smooth"]

_TOGETHER = 64
_CANDIDATES = 1000  # latents of a half in which a volume of the other is looked for
_LEAST = 20  # particles in a map
_RADIUS = 16  # Fourier pixels


@dataclass(frozen=True)
class Maps:
    """Volumes of a half's particles, each `(K, box, box, box)`.

    Attributes
    ----------
    decoded
        By the decoder that was trained on them.
    chosen, random
        Backprojected: of those that the other decoder selected, and of as many at random.
    """

    decoded: np.ndarray
    chosen: np.ndarray
    random: np.ndarray


def make_maps(
    run: Run, cases: dict[str, Case], fits: dict[str, Fits], count: int, folder: Path
) -> dict[str, Maps]:
    """Make maps of both halves' particles, and keep them: ``half0.1.chosen.mrc``, ...

    Parameters
    ----------
    run
        Whose particles they are; its poses are used.
    cases, fits
        Of each half's decoder, and the other half's particles: two of them, by name.
    count
        Of maps of each half.
    """
    first, second = cases
    folder.mkdir(exist_ok=True)
    places = dict(zip(cases, matched(cases[first], cases[second], count), strict=True))
    found = {}
    for name, by in ((first, cases[second]), (second, cases[first])):
        selecting = second if name == first else first
        rows = selected(by, fits[selecting], places[selecting])
        rng = np.random.default_rng(by.seed)
        random = [rng.permutation(by.particles.n)[: rows.shape[1]] for _ in rows]
        decoded = cases[name].run.volumes(places[name])
        with tempfile.TemporaryDirectory(dir=folder) as made:
            chosen, others = (
                np.stack([_backprojected(run, by.positions[some], Path(made)) for some in each])
                for each in (rows, random)
            )
        found[name] = Maps(decoded, chosen, others)
        ctf = by.particles.ctf_params
        apix = 1.0 if ctf is None else float(ctf[0, 0])
        for kind, volumes in vars(found[name]).items():
            for k, volume in enumerate(volumes):
                path = folder / f"{name}.{k + 1}.{kind}.mrc"
                host.write_mrc(str(path), volume.astype(np.float32), Apix=apix)
    return found


def matched(case: Case, other: Case, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return latents of one decoder, and those of another that show the most similar volumes.

    `(K, zdim)` each: as many of the former as are asked for and there are particles for, spread
    over those of its particles. Volumes are compared up to 16 Fourier pixels, each minus the mean
    of its decoder's.
    """
    count = max(2, min(count, min(case.particles.n, other.particles.n) // _LEAST))
    z = cluster_centres(case.run.z()[0], count, case.seed)
    shown = case.sampled(z) - case.sampled(_some(case)).mean(0)
    latents = _some(other)
    theirs = other.sampled(latents)
    theirs -= theirs.mean(0)
    apart = (theirs**2).sum(1) - 2 * shown @ theirs.T  # and what is the same for all of them
    return z, latents[apart.argmin(1)]


def _some(case: Case) -> np.ndarray:
    z = case.run.z()[0]
    return z[np.sort(np.random.default_rng(case.seed).permutation(len(z))[:_CANDIDATES])]


@torch.no_grad()
def selected(case: Case, fits: Fits, z: np.ndarray) -> np.ndarray:
    """Return which particles of a case each of its decoder's latents explains best: `(K, M)`.

    That is their positions; by the odds of a latent against all others, as many for each.
    """
    white = case.whitened(fits.spectrum)
    latents = torch.from_numpy(np.ascontiguousarray(z, np.float32)).to(case.particles.device)
    errors = [
        white.errors_at(case.loader.read(index), latents[:, None].expand(-1, len(index), -1)).cpu()
        for index in bar(torch.arange(case.particles.n).split(_TOGETHER), "maps: selection")
    ]
    likelihood = torch.cat(errors, 1).double().numpy() / -2
    others = (logsumexp(np.delete(likelihood, k, 0), 0) for k in range(len(z)))
    odds = likelihood - np.stack(list(others))
    odds[~np.isfinite(odds)] = -np.inf
    return np.sort(np.argsort(-odds, 1)[:, : case.particles.n // len(z)], 1)


def _backprojected(run: Run, index: np.ndarray, folder: Path) -> np.ndarray:
    """Return the host's backprojection of particles of a run, by positions in the stack."""
    settings, poses = run.settings, run.settings.poses
    if run.refined_poses is not None:
        poses = str(folder / "poses.pkl")
        if not (folder / "poses.pkl").exists():
            _write_refined(run, folder / "poses.pkl")
    chosen = folder / "ind.pkl"
    write_pickle(chosen, index)
    return host.backproject(
        settings.particles, poses, settings.ctf, str(chosen), str(folder / "backprojected"),
        datadir=settings.datadir, invert=settings.invert_data, lazy=settings.lazy,
    )  # fmt: skip


def _write_refined(run: Run, path: Path) -> None:
    """Write the poses that a run has refined as those of the whole stack, as the host reads them.

    Particles that are not the run's have none.
    """
    assert run.refined_poses is not None
    assert run.whole_index is not None
    whole = []
    for known in read_pickle(run.refined_poses, "RUN"):
        parts = np.zeros((int(run.whole_index.max()) + 1, *known.shape[1:]), known.dtype)
        parts[run.whole_index] = known
        whole.append(parts)
    write_pickle(path, tuple(whole))


def _near(box: int) -> np.ndarray:
    """Tell which Fourier voxels are compared, `(box, box, box)` in the order of ``fftn``."""
    found: np.ndarray = fourier_radius(box) <= min(_RADIUS, box // 4)
    return found


def _voxels(volumes: np.ndarray) -> np.ndarray:
    """Return the Fourier voxels that are compared of volumes minus their mean: `(K, V)`."""
    near = _near(volumes.shape[-1])
    found: np.ndarray = np.fft.fftn(volumes - volumes.mean(0), axes=(1, 2, 3))[:, near]
    return found


def smooth(volume: np.ndarray) -> np.ndarray:
    """Return what is compared of a volume, in units of its spread: as it is shown."""
    kept = np.fft.fftn(volume) * _near(len(volume))
    found: np.ndarray = np.fft.ifftn(kept).real
    return found / max(float(found.std()), 1e-12)


def _correlations(first: np.ndarray, second: np.ndarray) -> Iterator[float]:
    for a, b in zip(first, second, strict=True):
        size = float(np.sqrt((np.abs(a) ** 2).sum() * (np.abs(b) ** 2).sum()))
        yield ratio(float((a.conj() * b).real.sum()), size)


def compared(halves: dict[str, Maps], rounds: int, seed: int) -> dict[str, Measure]:
    """Measure whether decoded volumes differ from each other as maps do, and alike in both halves.

    The intervals are over maps.
    """
    each = {
        name: {kind: _voxels(getattr(maps, kind)) for kind in ("decoded", "chosen", "random")}
        for name, maps in halves.items()
    }
    a, b = each.values()

    def of(name: str, *pairs: tuple[np.ndarray, np.ndarray]) -> Measure:
        values = np.array([c for x, y in pairs for c in _correlations(x, y)])
        return measure(name, np.mean, values[np.isfinite(values)], rounds=rounds, seed=seed)

    found = [
        of("map_agreement", *((h["decoded"], h["chosen"]) for h in (a, b))),
        of("map_agreement_random", *((h["decoded"], h["random"]) for h in (a, b))),
        of("map_halves_agreement", (a["chosen"], b["chosen"])),
        of("map_halves_agreement_random", (a["random"], b["random"])),
    ]
    return {m.name: m for m in found}


def fsc_curves(halves: dict[str, Maps]) -> dict[str, list[float]]:
    """Return mean Fourier shell correlations, by what is compared with what."""
    a, b = halves.values()
    pairs = {
        "decoded": [(h.decoded, h.chosen) for h in (a, b)],
        "decoded_random": [(h.decoded, h.random) for h in (a, b)],
        "halves": [(a.chosen, b.chosen)],
        "halves_random": [(a.random, b.random)],
    }
    return {
        name: np.mean([fsc(x, y) for p in some for x, y in zip(*p, strict=True)], 0).tolist()
        for name, some in pairs.items()
    }
