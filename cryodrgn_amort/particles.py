"""Particles, their poses and CTFs: checked, preprocessed once, and handed out in batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort import host
from cryodrgn_amort.checkpoints import read_pickle, to_array
from cryodrgn_amort.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryodrgn_amort.inputs import EncoderInput

__all__ = ["Batch", "ParticleSource", "Particles", "load_particles"]

_CHUNK = 256
_EXTENSIONS = (".mrcs", ".mrc", ".star", ".cs", ".txt")


@dataclass(frozen=True)
class ParticleSource:
    """Which particles, and how they are preprocessed. Names are those of ``train_vae``'s flags.

    Attributes
    ----------
    norm
        Offset and scale of the normalisation; None: estimated as the host does.
    lazy
        Read images when they are needed instead of keeping them preprocessed in memory.
    """

    particles: str
    poses: str
    ctf: str | None = None
    ind: str | None = None
    datadir: str | None = None
    invert_data: bool = True
    window: bool = True
    window_r: float = 0.85
    norm: tuple[float, float] | None = None
    lazy: bool = False
    max_threads: int = 16


@dataclass
class Batch:
    """Some particles. `D` is the box size plus one (symmetrised Hartley images).

    Attributes
    ----------
    index
        Positions in the data set, after ``--ind``: `(B,)` int64, on the CPU.
    y
        Centred Hartley images, which the decoder has to explain: `(B, D, D)`.
    image
        What a network is shown: centred and phase-flipped, `(B, D, D)`. None for tables.
    rot
        Rotations `(B, 3, 3)`.
    ctf
        CTF of every pixel of the lattice, `(B, D * D)`; None without CTF.
    """

    index: Tensor
    y: Tensor
    image: Tensor | None
    rot: Tensor
    ctf: Tensor | None


def _load_ind(path: str, n: int) -> np.ndarray:
    ind = to_array(read_pickle(path, "--ind"), f"--ind {path}")
    if ind.dtype == bool:
        raise InputError(f"--ind {path}: holds booleans; indices are needed (numpy.flatnonzero)")
    if ind.ndim != 1 or not np.issubdtype(ind.dtype, np.integer):
        raise InputError(f"--ind {path}: not a list of integer indices")
    if len(ind) == 0:
        raise InputError(f"--ind {path}: selects no particle")
    if ind.min() < 0 or ind.max() >= n:
        bad = ind.min() if ind.min() < 0 else ind.max()
        raise InputError(f"--ind {path}: index {bad} is out of range, there are {n} particles")
    if len(np.unique(ind)) != len(ind):
        raise InputError(f"--ind {path}: holds an index more than once")
    return ind.astype(np.int64)


def _select(table: np.ndarray, n: int, ind: np.ndarray | None, what: str) -> np.ndarray:
    """Pick the rows of the particles from a table for the whole stack, or for ``ind`` alone."""
    if len(table) == n:
        return table if ind is None else table[ind]
    if ind is not None and len(table) == len(ind):
        return table
    also = "" if ind is None else f", {len(ind)} of them chosen by --ind"
    raise InputError(f"{what}: {len(table)} rows for {n} particles{also}")


def load_poses(
    path: str, n: int, ind: np.ndarray | None, box: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read and check poses.

    Returns
    -------
    rots
        `(N, 3, 3)` float32.
    trans_px
        Translations that centre the images, `(N, 2)` float32 in pixels; None if the file has
        none. As the host does, fractions are multiplied by box + 1.

    Raises
    ------
    InputError
        If the counts do not fit, a rotation is none, or a translation leaves the box.
    """
    what = f"--poses {path}"
    loaded = read_pickle(path, "--poses")
    parts = loaded if isinstance(loaded, (tuple, list)) else (loaded,)
    arrays = [to_array(p, what) for p in parts]
    if not 1 <= len(arrays) <= 2 or any(a.dtype.kind not in "fiu" for a in arrays):
        raise InputError(f"{what}: not poses (rotations, or rotations and translations)")
    if arrays[0].ndim != 3 or arrays[0].shape[1:] != (3, 3):
        raise InputError(f"{what}: rotations have shape {arrays[0].shape}, not (N, 3, 3)")
    rots = _select(arrays[0], n, ind, what).astype(np.float64)
    if not np.isfinite(rots).all():
        i = int(np.flatnonzero(~np.isfinite(rots).all((1, 2)))[0])
        raise InputError(f"{what}: the rotation of particle {i} is not finite")
    off = np.abs(rots @ rots.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    bad = (off > 1e-3) | (np.linalg.det(rots) < 0)
    if bad.any():
        raise InputError(f"{what}: the matrix of particle {int(np.argmax(bad))} is not a rotation")
    if len(arrays) == 1:
        return rots.astype(np.float32), None
    if arrays[1].ndim != 2 or arrays[1].shape[1] != 2:
        raise InputError(f"{what}: translations have shape {arrays[1].shape}, not (N, 2)")
    trans = _select(arrays[1], n, ind, what).astype(np.float32)
    outside = ~(np.abs(trans) <= 1).all(1)  # also catches NaN
    if outside.any():
        i = int(np.argmax(outside))
        raise InputError(
            f"{what}: translation {trans[i].tolist()} of particle {i} leaves the box; "
            "fractions of the box are needed, not pixels"
        )
    return rots.astype(np.float32), trans * (box + 1)


def load_ctf(path: str, n: int, ind: np.ndarray | None, box: int) -> np.ndarray:
    """Read and check CTF parameters.

    Returns
    -------
    numpy.ndarray
        `(N, 8)` float32: pixel size at this box (angstroms), defocus U and V (angstroms),
        astigmatism angle (degrees), voltage (kV), spherical aberration (mm), amplitude contrast,
        phase shift (degrees). Every row has its own pixel size.
    """
    what = f"--ctf {path}"
    table = to_array(read_pickle(path, "--ctf"), what)
    if table.ndim != 2 or table.shape[1] != 9 or table.dtype.kind not in "fiu":
        raise InputError(f"{what}: not CTF parameters (an array of N x 9)")
    table = _select(table, n, ind, what).astype(np.float64)
    if not np.isfinite(table).all():
        i = int(np.flatnonzero(~np.isfinite(table).all(1))[0])
        raise InputError(f"{what}: the row of particle {i} is not finite")
    if not (table[:, :2] > 0).all() or not (table[:, 5] > 0).all():
        raise InputError(f"{what}: image size, pixel size and voltage must be positive")
    apix = table[:, 0] * table[:, 1] / box
    return np.column_stack([apix, table[:, 2:]]).astype(np.float32)


class Particles:
    """Preprocessed particles.

    Parameters
    ----------
    images
        The host's data set, reading lazily.
    rots, trans_px, ctf_params
        `(N, 3, 3)`, `(N, 2)` or None, `(N, 8)` or None: see ``load_poses`` and ``load_ctf``.
    lazy
        Whether to read images when they are needed. Otherwise ``cache`` holds them all, centred.
    """

    def __init__(
        self,
        images: host.ImageDataset,
        rots: np.ndarray,
        trans_px: np.ndarray | None,
        ctf_params: np.ndarray | None,
        *,
        lazy: bool,
        ind: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images = images
        self.ind = ind
        self.n, self.D, self.box = images.N, images.D, images.D - 1
        self.device = torch.device(device)
        self.lattice = host.Lattice(self.D, extent=0.5, device=self.device)
        mask = self.lattice.get_circular_mask(self.D // 2)
        self.mask = mask.nonzero()[:, 0]
        """Positions of the masked pixels on the lattice, `(P,)`."""
        self.coords = self.lattice.coords[mask] / self.lattice.extent / 2
        """Masked lattice coordinates within [-0.5, 0.5], `(P, 3)`."""
        self.rots = torch.from_numpy(rots).to(self.device)
        self.trans = None if trans_px is None else torch.from_numpy(trans_px).to(self.device)
        self.ctf_params = None if ctf_params is None else torch.from_numpy(ctf_params).to(device)
        self.cache: Tensor | None = None
        self._lazy = lazy

    @property
    def norm(self) -> tuple[float, float]:
        """Offset and scale of the normalisation."""
        return self.images.norm[0], self.images.norm[1]

    @property
    def raw_mean_std(self) -> tuple[float, float]:
        """Mean and standard deviation of the real-space images, as the host estimates them."""
        return self.images.norm_real[0], self.images.norm_real[1]

    def fill_cache(self, progress: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter) -> None:
        """Preprocess all particles once, into memory; does nothing in lazy mode."""
        if self._lazy or self.cache is not None:
            return
        cache = torch.empty(self.n, self.D, self.D)
        for rows in progress(iter(torch.arange(self.n).split(_CHUNK))):
            cache[rows] = self.centred(rows).cpu()
        self.cache = cache

    def raw(self, rows: Tensor) -> Tensor:
        """Read real-space images `(B, box, box)` from the stack."""
        try:
            raw: Tensor = self.images.src.images(rows.numpy())
        except Exception as err:  # truncated or vanished files: whatever the host's reader raises
            files = ", ".join(sorted(set(self.images.src.filenames[rows.numpy()].tolist()))[:3])
            raise InputError(f"PARTICLES {files}: images cannot be read ({err})") from err
        return raw

    def hartley(self, raw: Tensor) -> Tensor:
        """Preprocess real-space images as the host does, not centred: `(B, D, D)`, on the CPU."""
        return host.preprocess(self.images, raw)

    def centre(self, y: Tensor, trans_px: Tensor | None) -> Tensor:
        """Shift Hartley images `(B, D, D)` by `(B, 2)` pixels, on the device."""
        y = y.to(self.device)
        if trans_px is None:
            return y
        b = len(y)
        shifted: Tensor = self.lattice.translate_ht(y.view(b, -1), trans_px.unsqueeze(1))
        return shifted.view(b, self.D, self.D)

    def centred(self, rows: Tensor, uncentred: Tensor | None = None) -> Tensor:
        """Return centred Hartley images `(B, D, D)` of ``rows`` (``uncentred``, if read before)."""
        if self.cache is not None:
            return self.cache[rows].to(self.device)
        y = self.hartley(self.raw(rows)) if uncentred is None else uncentred
        return self.centre(y, None if self.trans is None else self.trans[rows])

    def ctf_of(self, params: Tensor | None) -> Tensor | None:
        """Evaluate CTF parameters `(B, 8)` on the lattice: `(B, D * D)`."""
        if params is None:
            return None
        b = len(params)
        freqs = self.lattice.freqs2d.unsqueeze(0).expand(b, *self.lattice.freqs2d.shape)
        freqs = freqs / params[:, 0].view(b, 1, 1)
        ctf: Tensor = host.compute_ctf(freqs, *torch.split(params[:, 1:], 1, 1))
        return ctf.view(b, -1)

    def ctf(self, rows: Tensor) -> Tensor | None:
        """Evaluate the CTF of ``rows`` on the lattice: `(B, D * D)`."""
        return self.ctf_of(None if self.ctf_params is None else self.ctf_params[rows])

    def batches(
        self,
        shown: EncoderInput | None,
        *,
        batch_size: int,
        shuffle: bool,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
    ) -> Any:
        """Make a loader of ``(index, read)``, each to be handed to ``batch``.

        It is the host's own loader over our indices, so that it makes the host's random draws.
        """
        reads = None if self.cache is not None else self.images
        with host.quiet():
            return host.make_dataloader(
                _Reader(self.n, reads, shown),
                batch_size=batch_size,
                num_workers=num_workers,
                shuffle=shuffle,
                seed=shuffle_seed,
            )

    def batch(self, index: Tensor, read: dict[str, Tensor], shown: EncoderInput | None) -> Batch:
        """Assemble a batch: centre, evaluate the CTF, and show the encoder what it is shown."""
        y, ctf = self.centred(index, read.get("y")), self.ctf(index)
        image = None if shown is None else self.shown(index, shown, y, ctf, read.get("image"))
        return Batch(index, y, image, self.rots[index], ctf)

    def shown(
        self,
        index: Tensor,
        shown: EncoderInput,
        y: Tensor,
        ctf: Tensor | None,
        uncentred: Tensor | None = None,
    ) -> Tensor:
        """Return what a network is shown for ``index``: centred and phase-flipped, `(B, D, D)`."""
        rows = shown.rows(index)
        raw = shown.raw(index) if uncentred is None else None
        if raw is not None:
            uncentred = self.hartley(raw)
        if uncentred is None and torch.equal(rows, index):
            return self.flip(y, ctf)
        if uncentred is None:
            return self.flip(self.centred(rows), self.ctf(rows))
        trans = None if self.trans is None else self.trans[rows]
        return self.flip(self.centre(uncentred, trans), self.ctf(rows))

    @staticmethod
    def flip(y: Tensor, ctf: Tensor | None) -> Tensor:
        """Flip the phases of Hartley images by the sign of their CTF."""
        return y if ctf is None else y * ctf.sign().view_as(y)


class _Reader(torch.utils.data.Dataset[Any]):
    """Hands out indices and, if images are not in memory, what must be read for them.

    Runs in the loader's worker processes: holds nothing that lives on a device.
    """

    def __init__(
        self, n: int, images: host.ImageDataset | None, shown: EncoderInput | None
    ) -> None:
        self.n, self.images, self.input = n, images, shown

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        positions = torch.tensor(index)
        if self.images is None:
            return positions, {}
        read = {"y": host.preprocess(self.images, self.images.src.images(positions.numpy()))}
        if self.input is not None:
            rows, raw = self.input.rows(positions), self.input.raw(positions)
            if raw is None and not torch.equal(rows, positions):
                raw = self.images.src.images(rows.numpy())
            if raw is not None:
                read["image"] = host.preprocess(self.images, raw)
        return positions, read


def load_particles(source: ParticleSource, device: torch.device | str = "cpu") -> Particles:
    """Open and check particles, poses, CTF and selection. Reads no images but a sample.

    Raises
    ------
    InputError
        Names the flag and file that do not fit.
    """
    what = f"PARTICLES {source.particles}"
    if not source.particles.endswith(_EXTENSIONS):
        raise InputError(f"{what}: not one of {', '.join(_EXTENSIONS)}")
    if not os.path.isfile(source.particles):
        raise InputError(f"{what}: no such file (a folder does not count)")
    try:
        with host.quiet():
            stack = host.ImageSource.from_file(
                source.particles, lazy=True, datadir=source.datadir or ""
            )
            n, box = stack.n, stack.D
            stack.images([n - 1])  # a truncated stack ends before its last image
    except Exception as err:  # whatever the host's readers raise
        raise InputError(f"{what}: cannot be read ({type(err).__name__}: {err})") from err
    if np.issubdtype(np.dtype(stack.dtype), np.integer):
        raise InputError(
            f"{what}: stored as {np.dtype(stack.dtype).name}, which the host cannot train on; "
            "convert it to float32"
        )
    if box % 2:
        raise InputError(f"{what}: the box of {box} pixels is odd; the host needs an even one")
    ind = _load_ind(source.ind, n) if source.ind else None
    rots, trans = load_poses(source.poses, n, ind, box)
    ctf = load_ctf(source.ctf, n, ind, box) if source.ctf else None
    try:
        with host.quiet():
            images = host.ImageDataset(
                source.particles,
                lazy=True,
                norm=source.norm,
                invert_data=source.invert_data,
                ind=ind,
                window=source.window,
                datadir=source.datadir,
                window_r=source.window_r,
                max_threads=source.max_threads,
            )
    except Exception as err:
        raise InputError(f"{what}: images cannot be read ({type(err).__name__}: {err})") from err
    if not np.isfinite(images.norm).all() or not images.norm[1] > 0:
        raise InputError(f"{what}: the images are constant or not finite")
    return Particles(images, rots, trans, ctf, lazy=source.lazy, ind=ind, device=device)
