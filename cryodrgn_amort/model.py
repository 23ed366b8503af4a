"""AmortVAE: the host's HetOnlyVAE with any encoder in place of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cryodrgn_amort import host
from cryodrgn_amort.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cryodrgn_amort.encoders import Encoder
    from cryodrgn_amort.particles import Batch

__all__ = ["TOKEN_ENCODER", "AmortVAE", "build_model"]

TOKEN_ENCODER = {"encode_mode": "mlp", "qlayers": 0, "qdim": 1, "enc_mask": 2}
"""Encoder arguments in the config.yaml of runs whose encoder is none of the host's.

The host then builds a tiny network, which it never needs to decode volumes. Its weights are NaN,
so that ``cryodrgn eval_images`` fails instead of encoding with weights that were never trained.
"""

_VOLUME_FEATURES = 4_000_000  # numbers of positional encoding at a time
_ACTIVATION = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}
_OWN = "amort."


class AmortVAE(host.HetOnlyVAE):  # type: ignore[misc]
    """A ``HetOnlyVAE`` whose posterior may come from another encoder than the host's network.

    Parameters
    ----------
    amort
        The encoder; None: the host's own network.
    kwargs
        As ``HetOnlyVAE``.
    """

    def __init__(self, lattice: host.Lattice, *, amort: Encoder | None, **kwargs: Any) -> None:
        super().__init__(lattice, **kwargs)
        if amort is not None:
            for parameter in self.encoder.parameters():
                parameter.requires_grad_(False)
                nn.init.constant_(parameter, float("nan"))
        self.amort = amort

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z) for the batch, each `(B, zdim)`."""
        if self.amort is not None:
            mean, logvar = self.amort(batch)
            return mean, logvar
        mean, logvar = self.encode(batch.image)
        return mean, logvar

    def decode_images(
        self, coords: Tensor, mask: Tensor, rot: Tensor, ctf: Tensor | None, z: Tensor
    ) -> Tensor:
        """Decode the masked pixels of each particle's image, CTF applied: `(B, P)`.

        Parameters
        ----------
        coords, mask
            Of ``Particles``.
        rot, ctf, z
            `(B, 3, 3)`, `(B, D * D)` or None, `(B, zdim)`.
        """
        decoded: Tensor = self(coords @ rot, z).view(len(z), -1)
        if ctf is not None:
            decoded = decoded * ctf[:, mask]
        return decoded

    @torch.no_grad()
    def decode_volumes(self, z: Tensor, norm: tuple[float, float]) -> Iterator[Tensor]:
        """Decode volumes `(box, box, box)` at latents `(M, zdim)`, as ``eval_vol`` does.

        Only half of Fourier space is evaluated (the volume is real), and its positional encoding
        once for all latents.
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
        parts = kept.split(max(1, _VOLUME_FEATURES // decoder.in_dim))
        volumes = torch.zeros(len(z), size**3, device=plane.device)
        for part in parts:
            blank = torch.zeros(len(part), self.zdim, device=plane.device)
            features = decoder.positional_encoding_geom(torch.cat([coords[part], blank], 1))
            for volume, latent in zip(volumes, z, strict=True):
                features[:, -self.zdim :] = latent
                real, imag = decoder.decoder(features).unbind(1)
                volume[size**3 - 1 - part] = real + imag
                volume[part] = real - imag
        for volume in volumes:
            yield host.volume_of(volume.view(size, size, size), norm).cpu()

    def host_state_dict(self) -> dict[str, Tensor]:
        """Return the state that the host's ``HetOnlyVAE`` has, and no more."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(_OWN)}

    def own_state_dict(self) -> dict[str, Any]:
        """Return the state of an encoder that the host does not know; empty for its own."""
        return {} if self.amort is None else dict(self.amort.state_dict())

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
        except RuntimeError as err:
            reason = str(err).split("\n", 2)[1:2] or [str(err)]
            raise InputError(f"{name}: weights of another model ({reason[0].strip()})") from None

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the common optimizer, in the host's order."""
        token = set() if self.amort is None else {id(p) for p in self.encoder.parameters()}
        return [p for p in self.parameters() if id(p) not in token]


def build_model(
    model_args: Mapping[str, Any], lattice: host.Lattice, amort: Encoder | None
) -> AmortVAE:
    """Build a model from the ``model_args`` of a config.yaml, as the host would.

    Encoder before decoder, so that the random draws are the host's. It is put where the lattice is.
    """
    radius = model_args["enc_mask"]
    if radius != -1 and not 0 < radius <= lattice.D // 2:
        raise InputError(f"--enc-mask {radius}: must be -1 or between 1 and {lattice.D // 2}")
    enc_mask = None if radius == -1 else lattice.get_circular_mask(radius)
    in_dim = lattice.D**2 if enc_mask is None else int(enc_mask.sum())
    model = AmortVAE(
        lattice,
        amort=amort,
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
    )
    model.to(lattice.device)
    return model
