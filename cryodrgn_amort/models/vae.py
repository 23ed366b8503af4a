"""AmortVAE: the host's HetOnlyVAE with any encoder in place of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, on_gpu
from cryodrgn_amort.models.base import LatentModel
from cryodrgn_amort.models.decoder import FastDecoder
from cryodrgn_amort.models.layers import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.models.encoders import Encoder


__all__ = ["TOKEN_ENCODER", "TOKEN_TILT_PARAMS", "AmortVAE", "build_model"]

TOKEN_ENCODER = {"encode_mode": "mlp", "qlayers": 0, "qdim": 1, "enc_mask": 2}
TOKEN_TILT_PARAMS = {"t_emb_dim": 1, "tlayers": 0, "tdim": 1}  # of tilt series
"""Encoder arguments in the config.yaml of runs whose encoder is none of the host's.

The host then builds a tiny network, which it never needs to decode volumes. Its weights are NaN,
so that ``cryodrgn eval_images`` fails instead of encoding with weights that were never trained.
"""
_VOLUME_ROWS = 1 << 13  # voxels at a time
_VOXELS_AT_ONCE = 100_000_000  # of decoded volumes: 400 MB
_ACTIVATION = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}
_SAMPLED, _SAMPLED_RADIUS = 512, 16  # frequencies, and how far they reach
_OWN = "amort."


class AmortVAE(LatentModel, host.HetOnlyVAE):  # type: ignore[misc]
    """A ``HetOnlyVAE`` whose posterior may come from another encoder than the host's network.

    Parameters
    ----------
    amort
        The encoder; None: the host's own network.
    precision
        Of the decoder's matrix products, one of ``DTYPES``; "fp64" makes everything double.
    kwargs
        As ``HetOnlyVAE``.

    Attributes
    ----------
    kept
        Places of the masked pixels that are compared in training, `(P',)`; None: all.
    """

    def __init__(
        self,
        lattice: host.Lattice,
        *,
        amort: Encoder | None,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(lattice, **kwargs)
        if amort is not None:
            for parameter in self.encoder.parameters():
                parameter.requires_grad_(False)
                nn.init.constant_(parameter, float("nan"))
        self.amort = amort
        self.decoder_fixed = False
        self.narrow = precision == "fp16"
        mask = lattice.get_circular_mask(lattice.D // 2)
        coords = lattice.coords[mask] / lattice.extent / 2
        self._make_fast = partial(
            FastDecoder, self.decoder, matmul=DTYPES[precision], tf32=precision == "tf32"
        )
        self.fast = self._make_fast(coords)
        self._coords = coords
        self.kept: Tensor | None = None
        self._gain: Tensor | None = None
        if amort is not None:
            amort.decoder = self.fast
        # where the encoder's pixels stand among the stored ones; None: they are the same
        inner = None if self.enc_mask is None else self.enc_mask[mask]
        self._shown = None if inner is None or inner.all() else inner.nonzero()[:, 0]
        if precision == "fp64":
            self.double()

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z) for the batch, each `(B, zdim)`.

        Raises
        ------
        InputError
            If the encoder answers for each image of a tilt series, not for each particle.
        """
        if self.amort is not None:
            mean, logvar = self.amort(batch)
            if len(mean) != len(batch.index):
                raise InputError(
                    f"--encoder: its answers are for {len(mean)} images, not for the "
                    f"{len(batch.index)} particles that they are of; it cannot read tilt series"
                )
            return mean, logvar
        assert batch.image is not None
        image = batch.image if self._shown is None else batch.image[:, self._shown]
        image = image.to(next(self.encoder.parameters()).dtype)
        if self.encode_mode == "tilt" and not len(image):  # the host's cannot
            image = self.encoder.encoder1(image).view(0, self.encoder.in_dim2)
            both = self.encoder.encoder2(image)
        else:
            both = self.encoder(image)
        return both[:, : self.zdim], both[:, self.zdim :]

    def errors(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compare by squared errors of the masked pixels; see ``LatentModel.errors``."""
        assert batch.rot is not None
        tilts, y, ctf, fast = batch.tilts, batch.y, batch.ctf, self.fast
        z = z if tilts == 1 else z.repeat_interleave(tilts, 0)
        if self.kept is not None and self.training:
            y, fast = y[:, self.kept], self._coarse
            ctf = None if ctf is None else ctf[:, self.kept[: len(self.kept) // 2]]
        if self._gain is not None and self.training:
            half = self._gain[: len(self._gain) // 2]
            y, ctf = y * self._gain, half.expand(len(y), -1) if ctf is None else ctf * half
        total, each = fast.squared_errors(batch.rot, y, ctf, z)
        return total, each if tilts == 1 else each.view(-1, tilts).sum(1)

    @torch.no_grad()
    def errors_at(self, batch: Batch, z: Tensor) -> Tensor:
        """Decode several latents at each pose together; see ``LatentModel.errors_at``."""
        assert batch.rot is not None
        if self.training:  # where pixels are chosen and weighed
            return super().errors_at(batch, z)
        tilts = batch.tilts
        z = z if tilts == 1 else z.repeat_interleave(tilts, 1)
        each = self.fast.errors_at(batch.rot, batch.y, batch.ctf, z)
        return each if tilts == 1 else each.view(len(z), -1, tilts).sum(2)

    def weigh(self, weights: Tensor | None) -> None:
        """Weigh squared errors in training by masked pixels `(P,)`; None: all alike.

        Opposite pixels have the same weight; on average over those that are compared it is made 1.
        """
        if weights is None:
            self._gain = None
            return
        weights = weights if self.kept is None else weights[self.kept]
        gain = (weights / weights.mean()).sqrt()
        if self._gain is not None and self._gain.shape == gain.shape:
            self._gain.copy_(gain)  # where a step that is replayed reads it
        else:
            self._gain = gain

    def pixels(self, batch: Batch) -> int:
        """Return how many pixels of an image are compared."""
        limited = self.kept is not None and self.training
        return len(self.kept) if limited and self.kept is not None else batch.y.shape[1]

    def held(self) -> list[Tensor]:
        """Return the memory that every training step uses again."""
        return (self.fast if self.kept is None else self._coarse).held()

    def limit(self, radius: int | None) -> None:
        """Compare images in training up to a radius in Fourier pixels alone; None: wholly."""
        self.kept = self._gain = None
        if radius is None:
            return
        inside = (self._coords[:, :2].norm(dim=1) * (self.lattice.D - 1)).round() <= radius
        if not inside.all():
            self.kept = inside.nonzero()[:, 0]
            self._coarse = self._make_fast(self._coords[self.kept])

    @torch.no_grad()
    def decode_volumes(self, z: Tensor, norm: tuple[float, float]) -> Iterator[Tensor]:
        """Decode volumes `(box, box, box)` at latents `(M, zdim)`, as ``eval_vol`` does.

        Only half of Fourier space is evaluated (the volume is real), and its positional encoding
        once for as many latents as are decoded at a time: memory does not grow with their number.
        """
        lattice, decoder = self.lattice, self.decoder
        if not isinstance(decoder, host.FTPositionalDecoder):
            for row in z.cpu().numpy():
                yield host.eval_volume(decoder, lattice, norm, row)
            return
        size, plane = lattice.D, lattice.coords
        levels = torch.linspace(-lattice.extent, lattice.extent, size, device=plane.device)
        half = levels[: size // 2 + 1]  # the rest is the complex conjugate, in reverse order
        coords = plane + torch.stack([half * 0, half * 0, half], 1)[:, None]
        coords = coords.view(-1, 3)[: size**3 // 2 + 1]
        kept = (coords.square().sum(1) <= lattice.extent**2).nonzero()[:, 0]
        rows = max(_VOLUME_ROWS, self.fast.most) if on_gpu(z.device) else _VOLUME_ROWS
        for some in z.split(max(1, _VOXELS_AT_ONCE // size**3)):
            volumes = torch.zeros(len(some), size**3, device=plane.device)
            for part in kept.split(rows):
                values = self.fast.values(coords[part], some)
                for volume, of_volume in zip(volumes, values, strict=True):
                    real, imag = of_volume.float().unbind(1)
                    volume[size**3 - 1 - part] = real + imag
                    volume[part] = real - imag
            for volume in volumes:
                yield host.volume_of(volume.view(size, size, size), norm).cpu()

    @torch.no_grad()
    def sampled(self, z: Tensor) -> np.ndarray:
        """Decode latents `(M, zdim)` at the same random frequencies: `(M, F)`.

        Euclidean distances are those between the volumes up to 16 Fourier pixels, but for a factor
        and the error of a sample of 512.
        """
        rng, reach = np.random.default_rng(0), min(0.5, _SAMPLED_RADIUS / (self.lattice.D - 1))
        k = rng.uniform(-reach, reach, (8 * _SAMPLED, 3))
        k = k[np.linalg.norm(k, axis=1) < reach][:_SAMPLED].astype(np.float32)
        device = self.lattice.coords.device
        values = self.fast.values(torch.from_numpy(k).to(device), z.to(device))
        return torch.stack([row.flatten().float().cpu() for row in values]).numpy()

    def host_state_dict(self) -> dict[str, Tensor]:
        """Return the state that the host's ``HetOnlyVAE`` has, and no more."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(_OWN)}

    def restore(
        self, host_state: Mapping[str, Tensor], own_state: Mapping[str, Any], name: str
    ) -> None:
        """Load both parts of the state.

        Raises
        ------
        InputError
            If they belong to another model; ``name`` says where they came from.
        """
        try:
            own = {f"{_OWN}{key}": value for key, value in own_state.items()}
            self.load_state_dict({**host_state, **own})
            self.fast.forget()
        except RuntimeError as err:
            reason = str(err).split("\n", 2)[1:2] or [str(err)]
            raise InputError(f"{name}: weights of another model ({reason[0].strip()})") from None

    def fix_decoder(self) -> None:
        """Keep the decoder as it is: its parameters are not trained."""
        self.decoder.requires_grad_(False)
        self.decoder_fixed = True

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the common optimizer, in the host's order."""
        left_out = [] if self.amort is None else [self.encoder]
        left_out += [self.decoder] if self.decoder_fixed else []
        fixed = {id(p) for part in left_out for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in fixed]


def build_model(
    model_args: Mapping[str, Any],
    lattice: host.Lattice,
    amort: Encoder | None,
    precision: str = "fp32",
) -> AmortVAE:
    """Build a model from the ``model_args`` of a config.yaml, as the host would.

    Encoder before decoder, so that the random draws are the host's. It is put where the lattice is.

    Parameters
    ----------
    amort, precision
        As of ``AmortVAE``.

    Raises
    ------
    InputError
        If the size of the mask or of the positional encoding does not fit the box.
    """
    radius = model_args["enc_mask"]
    if radius != -1 and not 0 < radius <= lattice.D // 2:
        raise InputError(f"--enc-mask {radius}: must be -1 or between 1 and {lattice.D // 2}")
    if pe_dim := model_args["pe_dim"]:
        if model_args["pe_type"] == "linear_lowf" and pe_dim != lattice.D // 2:
            raise InputError(f"--pe-dim {pe_dim}: linear_lowf has {lattice.D // 2} and no other")
        if model_args["pe_type"].startswith("geom") and pe_dim < 2:
            raise InputError(f"--pe-dim {pe_dim}: {model_args['pe_type']} needs at least 2")
    enc_mask = None if radius == -1 else lattice.get_circular_mask(radius)
    in_dim = lattice.D**2 if enc_mask is None else int(enc_mask.sum())
    model = AmortVAE(
        lattice,
        amort=amort,
        precision=precision,
        qlayers=model_args["qlayers"],
        qdim=model_args["qdim"],
        players=model_args["players"],
        pdim=model_args["pdim"],
        in_dim=in_dim,
        zdim=model_args["zdim"],
        encode_mode=model_args["encode_mode"],
        enc_mask=enc_mask,
        enc_type=model_args["pe_type"],
        enc_dim=model_args["pe_dim"],
        domain=model_args["domain"],
        activation=_ACTIVATION[model_args["activation"]],
        feat_sigma=model_args["feat_sigma"],
        tilt_params=model_args.get("tilt_params", {}),
    )
    model.to(lattice.device)
    return model
