"""Particles with their poses and CTFs, and what they are to the model: centred Hartley images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    import numpy as np

    from cryodrgn_amort.data.store import Store
    from cryodrgn_amort.data.tilts import TiltSeries


__all__ = ["Batch", "Particles", "Share", "odd_images", "spans"]

_NAMED = 10  # positions in a message


@dataclass
class Batch:
    """Some particles or other images. `P` masked pixels; `S` stored ones: ``Particles.pixels``.

    `M` images: one per particle, or ``tilts`` of each, those of a particle together.

    Attributes
    ----------
    index
        Positions in the data set, after ``--ind``: `(B,)` int64, on the CPU.
    y
        Masked pixels of the centred Hartley images, which the decoder has to explain: `(M, P)`.
    image
        What a network is shown, centred and phase-flipped: `(M, S)`. None for tables.
    rot
        Rotations `(M, 3, 3)`. None: these images have no pose.
    ctf
        CTF at the first half of the masked pixels (the other half is its mirror image), and what
        dose and tilt leave of them: `(M, P / 2)`; None without CTF.
    share
        Which particles of a batch these are, when several processes share it.
    images
        Positions of the images in the data set, `(M,)` int64, on the CPU; None: those of ``index``.
    sent, sent_images
        ``index`` and ``images`` on the device, if they have been sent there.
    """

    index: Tensor
    y: Tensor
    image: Tensor | None
    rot: Tensor | None
    ctf: Tensor | None
    share: Share | None = None
    images: Tensor | None = None
    sent: Tensor | None = None
    sent_images: Tensor | None = None

    def of(self, places: Tensor | slice) -> Batch:
        """Return some of the particles, by their places in the batch, `(M,)` or in a row."""
        rest = (self.y, self.image, self.rot, self.ctf)
        at: Any
        known: Any = places
        if isinstance(places, slice):
            if places.stop - places.start >= len(self.index):
                return self
            at = at_known = slice(places.start * self.tilts, places.stop * self.tilts)
        else:
            of_particle = torch.arange(self.tilts, device=places.device)
            at = (places[:, None] * self.tilts + of_particle).flatten().to(self.y.device)
            known, at_known = places.cpu(), at.cpu()
        y, image, rot, ctf = (None if part is None else part[at] for part in rest)
        assert y is not None
        images = None if self.images is None else self.images[at_known]
        sent = None if self.sent is None else self.sent[places]
        return Batch(self.index[known], y, image, rot, ctf, images=images, sent=sent)

    def repeated(self, times: int) -> Batch:
        """Return each particle so many times in a row, but for its image: for others in its place.

        Waits for no GPU.
        """
        index, sent, rot, ctf = (
            None if part is None else part.repeat_interleave(times, 0)
            for part in (self.index, self.device_index, self.rot, self.ctf)
        )
        assert index is not None
        share = None if self.share is None else self.share.repeated(times)
        return Batch(index, self.y[:0], None, rot, ctf, share, sent=sent)

    @property
    def tilts(self) -> int:
        """Number of images of each particle."""
        return len(self.y) // len(self.index) if len(self.index) else 1

    @property
    def rows(self) -> Tensor:
        """Where this process keeps numbers of these particles, `(B,)`; alone, the index."""
        return self.index if self.share is None else self.share.rows

    @property
    def device_index(self) -> Tensor:
        """``index`` on the device of the images."""
        return self.index.to(self.y.device) if self.sent is None else self.sent

    @property
    def device_rows(self) -> Tensor:
        """``rows`` on the device of the images."""
        return self.device_index if self.share is None else self.share.rows.to(self.y.device)

    @property
    def device_images(self) -> Tensor:
        """Positions of the images in the data set `(M,)`, on their device."""
        if self.images is None:
            return self.device_index
        return self.images.to(self.y.device) if self.sent_images is None else self.sent_images

    @property
    def size(self) -> int:
        """Number of particles in the batch, all processes together."""
        return len(self.index) if self.share is None else self.share.size


@dataclass
class Share:
    """The particles of a batch that one of several processes has.

    Attributes
    ----------
    rows
        See ``Batch.rows``, `(B,)`; on the device.
    places
        Their positions in the whole batch, `(B,)`; on the device.
    size
        Number of particles in the whole batch.
    """

    rows: Tensor
    places: Tensor
    size: int

    def repeated(self, times: int) -> Share:
        """Return that of a batch with each particle so many times in a row."""
        each = torch.arange(times, device=self.places.device)
        places = (self.places[:, None] * times + each).flatten()
        return Share(self.rows.repeat_interleave(times), places, self.size * times)


class Particles:
    """Images in a stack, and what is known of each.

    Whatever takes ``rows`` wants positions of images; those of a particle are ``rows_of`` it.

    Parameters
    ----------
    images
        The host's data set, reading lazily.
    rots, trans_px, ctf_params
        `(N, 3, 3)`, `(N, 2)` or None, `(N, 8)` or None: see ``load_poses`` and ``load_ctf``. Of
        tilt series, CTFs have their scale as a ninth number.
    ind
        Which of the ``total`` particles these are, `(n,)`; None: all.
    tilts
        Which images belong together; None: each is a particle.
    whole
        Whether the corners outside the circular mask, and the origin, are wanted too.

    Attributes
    ----------
    n, box, D
        Number of particles, their size in pixels, and that of their symmetrised Hartley images.
    mask
        Positions of the masked pixels on the lattice, `(P,)`; pixel i is opposite to P - 1 - i.
    pixels
        Positions of the pixels that are kept of each image, `(S,)`: the mask, or all.
    """

    def __init__(
        self,
        images: host.ImageDataset,
        rots: np.ndarray,
        trans_px: np.ndarray | None,
        ctf_params: np.ndarray | None,
        *,
        ind: np.ndarray | None = None,
        total: int | None = None,
        tilts: TiltSeries | None = None,
        whole: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images = images
        self.ind = ind
        self.held_out: np.ndarray | None = None
        """Positions in the stack of what training leaves out; None: nothing is left out."""
        self.left_out: tuple[int, ...] = ()
        """Where among these others would be that are left out: see ``ParticleSource.without``."""
        self.tilts = tilts
        self.n, self.D, self.box = images.N if tilts is None else tilts.n, images.D, images.D - 1
        self.total = self.n if total is None else total
        self.device = torch.device(device)
        self.lattice = host.Lattice(self.D, extent=0.5, device=self.device)
        self.mask = self.lattice.get_circular_mask(self.D // 2).nonzero()[:, 0]
        self.whole = whole
        self.prepared: Store | None = None
        """What a ``BatchLoader`` has preprocessed, for further ones of the same particles."""
        self.pixels = torch.arange(self.D**2, device=self.device) if whole else self.mask
        self.rots = torch.from_numpy(rots).to(self.device)
        self.trans = None if trans_px is None else torch.from_numpy(trans_px).to(self.device)
        self.ctf_params = None if ctf_params is None else torch.from_numpy(ctf_params).to(device)

    @property
    def norm(self) -> tuple[float, float]:
        """Offset and scale of the normalisation."""
        return self.images.norm[0], self.images.norm[1]

    @property
    def raw_mean_std(self) -> tuple[float, float]:
        """Mean and standard deviation of the real-space images, as the host estimates them."""
        return self.images.norm_real[0], self.images.norm_real[1]

    @property
    def ntilts(self) -> int:
        """Number of images of a particle that are used."""
        return 1 if self.tilts is None else self.tilts.ntilts

    @property
    def windowed(self) -> float:
        """Mean square of the window: what it leaves of the power of noise, but not of a particle.

        Pixels of the transformed images are not independent then: as far as what lies within the
        window is concerned, their noise has the variance that is measured, divided by this.
        """
        window = self.images.window
        return 1.0 if window is None else float(window.double().square().mean())

    def rows_of(self, index: Tensor, rng: np.random.RandomState | None = None) -> Tensor:
        """Return the images of particles `(B,)`: `(B * ntilts,)`. See ``TiltSeries.rows``."""
        return index if self.tilts is None else self.tilts.rows(index, rng)

    def raw(self, rows: Tensor) -> Tensor:
        """Read real-space images `(B, box, box)` from the stack.

        Raises
        ------
        InputError
            If the files are truncated or gone.
        """
        try:
            raw: Tensor = self.images.src.images(rows.numpy())
        except Exception as err:  # truncated or vanished files: whatever the host's reader raises
            files = ", ".join(sorted(set(self.images.src.filenames[rows.numpy()].tolist()))[:3])
            raise InputError(f"PARTICLES {files}: images cannot be read ({err})") from err
        return raw

    def hartley(self, raw: Tensor) -> Tensor:
        """Preprocess images as the host does, not centred: to `(B, D, D)`, on the device."""
        return host.preprocess(self.images, raw.to(self.device))

    def centre(self, y: Tensor, trans_px: Tensor | None) -> Tensor:
        """Shift Hartley images `(B, D, D)` by `(B, 2)` pixels, on the device: `(B, S)`."""
        kept = y.to(self.device).flatten(1)
        kept = kept if self.whole else kept[:, self.pixels]
        return kept if trans_px is None else self.shift(kept, trans_px)

    def shift(self, values: Tensor, trans_px: Tensor) -> Tensor:
        """Shift stored `(B, S)` or masked pixels `(B, P)` of Hartley images by `(B, 2)` pixels."""
        # as the host's translate_ht, which picks pixels by positions that are on the CPU
        pixels = self.mask if values.shape[1] == len(self.mask) else self.pixels
        angles = self.lattice.freqs2d[pixels] @ trans_px[:, :, None] * 2 * math.pi
        angles = angles[:, :, 0]
        return torch.cos(angles) * values + torch.sin(angles) * values.flip(1)

    def centred(self, rows: Tensor, raw: Tensor | None = None) -> Tensor:
        """Return centred Hartley images `(B, S)` of ``rows``, or of ``raw`` in their place."""
        trans = None if self.trans is None else self.trans[rows]
        return self.centre(self.hartley(self.raw(rows) if raw is None else raw), trans)

    def ctf_of(self, params: Tensor | None) -> Tensor | None:
        """Evaluate CTF parameters `(B, 8)`: `(B, S)`."""
        if params is None:
            return None
        freqs = self.lattice.freqs2d[self.pixels].expand(len(params), -1, 2)
        freqs = freqs / params[:, 0].view(-1, 1, 1)
        ctf: Tensor = host.compute_ctf(freqs, *torch.split(params[:, 1:], 1, 1))
        return ctf.flatten(1)

    def ctf(self, rows: Tensor) -> Tensor | None:
        """Evaluate the CTF of ``rows``: `(B, S)`."""
        return self.ctf_of(None if self.ctf_params is None else self.ctf_params[rows])

    def masked(self, values: Tensor) -> Tensor:
        """Pick the masked pixels `(B, P)` of stored ones `(B, S)`."""
        return values[:, self.mask] if self.whole else values

    def half(self, ctf: Tensor | None, rows: Tensor) -> Tensor | None:
        """Make of the CTFs `(B, S)` of ``rows`` what ``Batch.ctf`` holds, `(B, P / 2)`."""
        if ctf is None:
            return None
        half = self.masked(ctf)[:, : len(self.mask) // 2]
        if self.tilts is None or not self.tilts.weighted or self.ctf_params is None:
            return half
        weights = self.tilts.weights(rows, self.lattice, float(self.ctf_params[0, 0]))
        return half * weights[:, self.mask[: half.shape[1]]]

    def real(self, image: Tensor) -> Tensor:
        """Return what a network is shown, `(B, S)`, in real space: `(B, box, box)`.

        White noise keeps its variance.
        """
        whole = image.new_zeros(len(image), self.D**2)
        whole[:, self.pixels] = image
        real: Tensor = host.iht2_center(whole.view(-1, self.D, self.D)[:, :-1, :-1]) * self.box
        return real

    def unprocessed(self, y: Tensor, rows: Tensor) -> Tensor:
        """Return images as they would be in the stack: `(B, box, box)`, but for the window.

        Parameters
        ----------
        y
            Masked pixels of centred Hartley images, `(B, P)`.
        rows
            Whose translations they have, `(B,)`.
        """
        (offset, scale), sign = self.norm, -1 if self.images.invert_data else 1
        moved = y if self.trans is None else self.shift(y, -self.trans[rows])
        whole = torch.full((len(y), self.D**2), offset, dtype=y.dtype, device=y.device)
        whole[:, self.mask] += scale * moved
        plain = whole.view(-1, self.D, self.D)[:, :-1, :-1]
        raw: Tensor = sign * host.iht2_center(plain)
        return raw

    @staticmethod
    def flip(y: Tensor, ctf: Tensor | None) -> Tensor:
        """Flip the phases of Hartley images by the sign of their CTF, pixel by pixel."""
        return y if ctf is None else y * ctf.sign()


def spans(raw: Tensor) -> Tensor:
    """Return greatest minus least pixel of images `(B, box, box)`: `(B,)`.

    0 if an image is constant, NaN or infinite if a pixel is.
    """
    found: Tensor = raw.amax((1, 2)) - raw.amin((1, 2))
    return found


def odd_images(positions: list[int], what: str, noun: str = "image") -> str:
    """Say which images (or whatever ``noun`` says) of a stack are ``what``."""
    some = ", ".join(map(str, sorted(positions)[:_NAMED]))
    more = ", ..." if len(positions) > _NAMED else ""
    count = f"1 {noun} is" if len(positions) == 1 else f"{len(positions)} {noun}s are"
    return f"{count} {what}, at {some}{more} of the stack (from 0)"
