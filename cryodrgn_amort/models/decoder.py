"""The host's coordinate network, evaluated and differentiated for the price of its products.

Same parameters and same numbers as the host's decoder, but

- the rotation is folded into the frequencies of the positional encoding, and the latent's share of
  the first layer is computed once per image;
- of a Fourier image only half is evaluated: with half-plane outputs ``re``, ``im``, CTF ``c`` and
  the even and odd parts ``e``, ``o`` of the target, the squared error of the whole image is
  ``2 sum((c re - e)^2 + (c im - o)^2)``;
- forward and backward pass go hand in hand over pieces that fit a processor's cache, in buffers
  that are made once, so that nothing of the size (images, pixels, width) exists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cryodrgn_amort import host
from cryodrgn_amort.core import multiply, on_gpu
from cryodrgn_amort.models.layers import Layers, Network, Sums
from cryodrgn_amort.models.pieces import Buffers, rows_at_once, shares, side_by_side, slices
from cryodrgn_amort.models.positional_encoding import PositionalEncoding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from cryodrgn_amort.models.pieces import Piece


__all__ = ["FastDecoder"]

_HALF_SCALE = 2.0**-9  # of gradients in half precision, whose range is small
_TOGETHER = 1 << 25  # pixels of images that are compared at once


class _Wanted(NamedTuple):
    """Which gradients are wanted."""

    rot: bool
    target: bool
    latents: bool
    parameters: bool


@dataclass
class _Work:
    """What is to be done to a batch: the same for all its pieces."""

    layers: Layers
    bias: Tensor  # of the first layer, latents included, (B, width)
    frequencies: Tensor  # of the encoding, turned with each image, (B, 2, features)
    plane: Tensor  # coordinates (pixels, 2)
    sign: Tensor | None  # of the coordinates that are evaluated, (B, pixels)
    target: Tensor  # (B, pixels, outputs)
    ctf: Tensor | None  # (B, pixels)
    weight: float  # of a pixel's error
    scale: float  # of the gradients on their way
    wanted: _Wanted
    by_target: Tensor | None  # gradients, (B, pixels, outputs)

    def sums(self, *, single: bool = False) -> Sums:
        """Begin to sum up the gradients that are wanted; ``single``: of one piece."""
        frequencies = self.frequencies if self.wanted.rot else None
        parameters = self.wanted.parameters
        return Sums(self.layers, self.bias, frequencies, parameters=parameters, single=single)


class FastDecoder:
    """Squared errors and volumes of a decoder of the host.

    Parameters
    ----------
    decoder
        The host's module. Its parameters are read anew in every call.
    coords
        Masked lattice coordinates `(P, 3)` within [-0.5, 0.5], without the origin: pixel i is
        opposite to pixel P - 1 - i.
    matmul
        Precision of the matrix products; that of the parameters unless given.
    tf32
        Whether a GPU may round what the layers multiply to TF32; never the coordinates.
    """

    def __init__(
        self,
        decoder: nn.Module,
        coords: Tensor,
        matmul: torch.dtype | None = None,
        *,
        tf32: bool = False,
    ) -> None:
        self.decoder: Any = decoder
        self.matmul, self._tf32 = matmul, tf32
        self.fourier = isinstance(decoder, host.FTPositionalDecoder)
        self.pixels = len(coords) // 2 if self.fourier else len(coords)
        """Pixels that are evaluated of an image: its first half, or all."""
        self._coords = coords[: self.pixels].contiguous()
        self._buffers = Buffers(coords.device)
        self._network = Network(decoder, self._buffers)
        self._cpu = not on_gpu(coords.device)

    @functools.cached_property
    def _encoding(self) -> PositionalEncoding:
        return PositionalEncoding(self.decoder, self._coords, self._buffers)

    @functools.cached_property
    def most(self) -> int:
        """How many pixels to work on at a time, chosen once: so steps are all alike."""
        features, layers = len(self._encoding.columns), len(self._network.parameters) // 2
        narrow = torch.empty((), dtype=self.matmul).element_size()
        row = 6 * features + narrow * (features + self._network.width * (layers + 2))
        return rows_at_once(self._coords.device, row)

    def held(self) -> list[Tensor]:
        """Return the memory that every call uses again."""
        return self._buffers.held()

    def forget(self) -> None:
        """Read the encoding's frequencies anew: the decoder has got another state."""
        self.__dict__.pop("_encoding", None)

    def _layers(self) -> Layers:
        return self._network.read(self._encoding.columns, self.matmul, tf32=self._tf32)

    def _frequencies(self, dtype: torch.dtype) -> Tensor:
        return self._encoding.frequencies.to(dtype)

    def _features(self, phases: Tensor) -> Tensor:
        return self._encoding.features(phases, self.matmul or phases.dtype)

    @property
    def gradient_scale(self) -> float:
        """By what gradients are multiplied on their way, to be within the range of fp16."""
        return _HALF_SCALE if self.matmul == torch.float16 else 1.0

    def squared_errors(
        self, rot: Tensor, target: Tensor, ctf: Tensor | None, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compare decoded images with particles.

        Parameters
        ----------
        rot, z
            `(B, 3, 3)`, `(B, zdim)`.
        target
            Masked pixels of the particles, `(B, P)`.
        ctf
            CTF at the first half of these pixels, `(B, P / 2)`, or None.

        Returns
        -------
        total
            Sum of all squared errors, a scalar that can be differentiated once, by the latents,
            the decoder's parameters, the rotations and the particles' pixels.
        each
            Squared error of each image, `(B,)`, detached.
        """
        apply: Any = _SquaredErrors.apply
        total, each = apply(self, rot, target, ctf, z, *self._network.parameters)
        return total, each

    @torch.no_grad()
    def errors_at(self, rot: Tensor, target: Tensor, ctf: Tensor | None, z: Tensor) -> Tensor:
        """Compare particles with what several latents decode to; not differentiable.

        As ``squared_errors`` does, but with z `(K, B, zdim)`: returns `(K, B)`.
        """
        whole = None if ctf is None else torch.cat([ctf, ctf.flip(-1)], -1)[:, None]
        found = z.new_empty(z.shape[:2], dtype=target.dtype)
        for some in slices(len(z), max(1, _TOGETHER // max(1, target.numel()))):
            images = self.images(rot, z[some].transpose(0, 1)).to(target.dtype)
            images = images if whole is None else images.mul_(whole)
            torch.sum(images.sub_(target[:, None]).square_(), 2, out=found[some].T)
        return found

    def values(self, coords: Tensor, z: Tensor) -> Iterator[Tensor]:
        """Evaluate the network at `(n, 3)` coordinates for each latent `(M, zdim)`.

        Yields the outputs `(n, 2)` (Fourier) or `(n, 1)`, for one latent after the other; what does
        not depend on the latent is computed once. Not differentiable.
        """
        layers = self._layers()
        bias = layers.latent_bias(z)
        phases = coords.to(bias.dtype) @ self._frequencies(bias.dtype)
        start = layers.first_values(self._features(phases))
        for row in bias:
            hidden = layers.after_first(start + row.to(start.dtype))
            yield layers.outputs(hidden).to(bias.dtype)

    @torch.no_grad()
    def images(self, rot: Tensor, z: Tensor) -> Tensor:
        """Decode several latents at each of several poses, without CTF.

        What does not depend on the latent is computed once per pose. Not differentiable.

        Parameters
        ----------
        rot
            `(B, 3, 3)`.
        z
            `(B, K, zdim)`.

        Returns
        -------
        Tensor
            Masked pixels, `(B, K, P)`.
        """
        layers = self._layers()
        bias = layers.latent_bias(z.flatten(0, 1)).view(*z.shape[:2], self._network.width)
        wide = bias.dtype
        rot, coords = rot.to(wide), self._coords.to(wide)
        sign = coords.new_ones(len(rot), self.pixels)
        if self.fourier:
            sign.masked_fill_((coords @ rot)[..., 2] > 0, -1.0)
        whole = self.pixels * (2 if self.fourier else 1)
        found = torch.empty(*z.shape[:2], whole, dtype=wide, device=z.device)
        at_once = max(1, self.most // self.pixels)  # images of latents
        poses = max(1, at_once // max(1, z.shape[1]))
        for some in slices(len(rot), poses):
            signs = sign[some]
            turned = signs[:, :, None] * (coords @ rot[some])
            phases = turned.flatten(0, 1) @ self._frequencies(wide)
            start = layers.first_values(self._features(phases))
            start = start.view(len(signs), 1, self.pixels, self._network.width)
            for latents in slices(z.shape[1], at_once):
                rows = bias[some, latents, None].to(start.dtype)
                shape = *rows.shape[:2], *start.shape[2:]
                first = self._buffers(
                    "hidden0", shape[0] * shape[1] * shape[2], shape[3], rows.dtype
                )
                torch.add(start, rows, out=first.view(shape))
                outputs = layers.outputs(layers.after_first(first)).to(wide)
                outputs = outputs.view(*shape[:3], -1)
                real, imag = outputs[..., 0], outputs[..., -1] * signs[:, None]
                here = found[some, latents]
                if self.fourier:
                    torch.sub(real, imag, out=here[..., : self.pixels])
                    here[..., self.pixels :] = (real + imag).flip(2)
                else:
                    here.copy_(real)
        return found

    def run(
        self,
        rot: Tensor,
        target: Tensor,
        ctf: Tensor | None,
        z: Tensor,
        wanted: _Wanted,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Compare as ``squared_errors`` does; returns errors `(B,)`, and gradients of their sum.

        These are by rotations, target, latents, and weight and bias of each layer; None where they
        are not wanted. They are ``gradient_scale`` times too large.
        """
        layers = self._layers()
        bias = layers.latent_bias(z)
        wide = bias.dtype
        rot = rot.to(wide)
        coords = self._coords.to(wide)
        frequencies = rot[:, :2] @ self._frequencies(wide)  # (B, 2, features)
        plane, sign = coords[:, :2], None
        target = self._target(target.to(wide))
        if self.fourier:  # where the depth is positive, the conjugate at the opposite point is used
            depth = (coords @ rot)[..., 2]
            sign = torch.ones_like(depth).masked_fill_(depth > 0, -1.0)
            target[..., 1] *= sign
        if ctf is not None:
            ctf = ctf.to(wide)
            if not self.fourier:
                ctf = torch.cat([ctf, ctf.flip(1)], 1)
        weight = 2.0 if self.fourier else 1.0  # each pixel stands for two
        scale = self.gradient_scale
        by_target = torch.empty_like(target) if wanted.target else None
        work = _Work(
            layers, bias, frequencies, plane, sign, target, ctf, weight, scale, wanted, by_target
        )
        cut = shares(len(z), self.pixels, self._network.width, self.most, cpu=self._cpu)
        done = side_by_side(partial(self._do, work), cut) or [self._do(work, [])]
        errors, sums = done[0]
        for more_errors, more_sums in done[1:]:  # in order: the same result every time
            errors += more_errors
            sums.add(more_sums)
        by_parameter: list[Tensor | None] = [None] * len(self._network.parameters)
        if wanted.parameters:
            by_parameter = [*self._network.gradients(sums, z, self._encoding.columns)]
        return errors, [
            None if sums.frequencies is None else self._by_rot(sums.frequencies),
            None if by_target is None else self._by_pixel(by_target, sign),
            sums.bias @ layers.latent if wanted.latents else None,
            *by_parameter,
        ]

    def _do(self, work: _Work, pieces: list[Piece]) -> tuple[Tensor, Sums]:
        """Return the squared errors and the gradients of some pieces."""
        layers, bias, ctf = work.layers, work.bias, work.ctf
        single = len(pieces) == 1 and pieces[0][0] == slice(0, len(bias))
        errors, sums = bias.new_zeros(0 if single else len(bias)), work.sums(single=single)
        for images, pixels in pieces:
            here = work.plane[pixels]
            signed = here if work.sign is None else work.sign[images, pixels, None] * here
            count = images.stop - images.start
            features = work.frequencies.shape[2]
            phases = self._buffers("phases", signed.shape[-2] * count, features, bias.dtype)
            self._phases(signed, work.frequencies[images], phases.view(count, -1, features))
            encoded = self._features(phases)
            hidden = layers.forward(encoded, bias[images])
            outputs = layers.outputs(hidden).to(bias.dtype)
            outputs = outputs.view(count, -1, outputs.shape[1])
            here_ctf = None if ctf is None else ctf[images, pixels, None]
            residual = outputs if here_ctf is None else outputs * here_ctf
            residual = residual - work.target[images, pixels]
            own = work.weight * residual.square().sum((1, 2))
            if single:
                errors = own
            else:
                errors[images] += own
            if work.by_target is not None:
                work.by_target[images, pixels] = -2 * work.weight * work.scale * residual
            if any(work.wanted):
                slope = 2 * work.weight * work.scale * residual
                slope = slope if here_ctf is None else slope * here_ctf
                grad = layers.backward(encoded, hidden, slope, sums, images)
                if sums.frequencies is not None:
                    by_feature = torch.mm(grad, layers.first)
                    by_phase = self._encoding.by_phase(encoded, by_feature)
                    by_phase = by_phase.view(count, -1, features).to(bias.dtype)
                    sums.add_frequencies(images, signed.mT @ by_phase)
        return errors, sums

    def _phases(self, coords: Tensor, frequencies: Tensor, out: Tensor) -> None:
        """Multiply coordinates `(..., pixels, 2)` with frequencies `(B, 2, n)`.

        On a GPU without a matrix product, which may be allowed to round to TF32.
        """
        if self._cpu:
            torch.matmul(coords, frequencies, out=out)
            return
        torch.mul(coords[..., :1], frequencies[:, :1], out=out)
        out.addcmul_(coords[..., 1:], frequencies[:, 1:])

    def _by_rot(self, frequencies: Tensor) -> Tensor:
        """Return gradients by rotations `(B, 3, 3)`, of those by turned frequencies.

        Images are planes: the third row turns nothing.
        """
        rows = frequencies @ self._frequencies(frequencies.dtype).T
        return torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)

    def _by_pixel(self, target: Tensor, sign: Tensor | None) -> Tensor:
        """Return gradients by masked pixels `(B, P)`, of those by what ``_target`` makes."""
        if sign is None:
            return target[..., 0]
        even, odd = target[..., 0], target[..., 1] * sign
        return torch.cat([even - odd, (even + odd).flip(1)], 1).mul_(0.5)

    def _target(self, target: Tensor) -> Tensor:
        """Return what the outputs are compared with, `(B, pixels, outputs)`."""
        if not self.fourier:
            return target[..., None].clone()
        near, far = target[:, : self.pixels], target[:, self.pixels :].flip(1)
        return torch.stack([near + far, far - near], 2).mul_(0.5)


class _SquaredErrors(torch.autograd.Function):
    """``FastDecoder.run`` for autograd: the gradients are ready when the forward pass is."""

    @staticmethod
    def forward(
        ctx: Any,
        decoder: FastDecoder,
        rot: Tensor,
        target: Tensor,
        ctf: Tensor | None,
        z: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, by_rot, by_target, _, by_latent, *by_parameter = ctx.needs_input_grad
        wanted = _Wanted(by_rot, by_target, by_latent, any(by_parameter))
        errors, ctx.gradients = decoder.run(rot, target, ctf, z, wanted)
        ctx.scale = decoder.gradient_scale
        ctx.mark_non_differentiable(errors)
        return errors.sum(), errors

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # theirs alone: nobody copies them
        found = [g for g in gradients if g is not None]
        if found:
            multiply(found, grad / ctx.scale)
        rot, target, *others = gradients
        return None, rot, target, None, *others
