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
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cryodrgn_amort import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["PRECISIONS", "FastDecoder"]

PRECISIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Of the decoder's matrix products. Coordinates, losses, sums and optimizers keep at least fp32."""

_ROWS = {"cpu": 1 << 12, "cuda": 1 << 18}  # pixels at a time: a cache's worth, a GPU's worth
_FEWEST_ROWS = 256  # below, products are slow
_WORTH = 5e7  # multiplications in a product
_HALF_SCALE = 2.0**-9  # of gradients in half precision, whose range is small
_aten = torch.ops.aten
_T = TypeVar("_T")


class _Asked(NamedTuple):
    """By what gradients are asked for."""

    rot: bool
    target: bool
    latents: bool
    parameters: bool


@dataclass
class _Weights:
    """The network as it is now: `h = act(x @ first.T + z @ latent.T + b)` and so on.

    Biases and what meets the latent are in full precision, the rest in that of the products.
    """

    first: Tensor  # (width, features), columns: sines, cosines (or coordinates)
    latent: Tensor  # (width, zdim)
    hidden: list[Tensor]  # (width, width), residual connections included
    last: Tensor  # (outputs, width)
    biases: list[Tensor]  # of every layer but the first


@dataclass
class _Work:
    """What is to be done to a batch: the same for all its pieces."""

    weights: _Weights
    bias: Tensor  # of the first layer, latents included, (B, width)
    frequencies: Tensor  # of the encoding, turned with each image, (B, 2, features)
    plane: Tensor  # coordinates (pixels, 2)
    sign: Tensor | None  # of the coordinates that are evaluated, (B, pixels)
    target: Tensor  # (B, pixels, outputs)
    ctf: Tensor | None  # (B, pixels)
    weight: float  # of a pixel's error
    scale: float  # of the gradients on their way
    asked: _Asked
    by_target: Tensor | None  # gradients, (B, pixels, outputs)


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
    """

    def __init__(
        self, decoder: nn.Module, coords: Tensor, matmul: torch.dtype | None = None
    ) -> None:
        self.decoder: Any = decoder
        self.matmul = matmul
        self.fourier = isinstance(decoder, host.FTPositionalDecoder)
        self.pixels = len(coords) // 2 if self.fourier else len(coords)
        """Pixels that are evaluated of an image: its first half, or all."""
        self._coords = coords[: self.pixels].contiguous()
        network: Any = getattr(decoder, "decoder", decoder)
        modules = network.main[::2]  # in between are the activations
        self.layers = [getattr(module, "linear", module) for module in modules]
        self._residual = [hasattr(module, "linear") for module in modules]
        self._slope = float(getattr(network.main[1], "negative_slope", 0.0))
        self._buffers: dict[Any, Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer, in turn."""
        return [p for layer in self.layers for p in (layer.weight, layer.bias)]

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
        total, each = apply(self, rot, target, ctf, z, *self.parameters)
        return total, each

    def values(self, coords: Tensor, z: Tensor) -> Iterator[Tensor]:
        """Evaluate the network at `(n, 3)` coordinates for each latent `(M, zdim)`.

        Yields the outputs `(n, 2)` (Fourier) or `(n, 1)`, for one latent after the other; what does
        not depend on the latent is computed once. Not differentiable.
        """
        weights = self._weights()
        bias = self._latent_bias(weights, z)
        phases = coords.to(bias.dtype) @ self._frequencies().to(bias.dtype)
        start = torch.mm(self._features(phases), weights.first.T)
        for row in bias:
            yield self._outputs(weights, start + row.to(start.dtype)).to(bias.dtype)

    def _outputs(self, weights: _Weights, first: Tensor) -> Tensor:
        """Return what follows from the first layer's values `(rows, width)`, which are changed."""
        hidden = self._activate(first)
        layers = zip(weights.hidden, weights.biases, strict=False)
        for i, (weight, layer_bias) in enumerate(layers):
            out = self._buffer(f"hidden{i + 1}", len(hidden), hidden.shape[1], hidden.dtype)
            hidden = self._activate(torch.addmm(layer_bias, hidden, weight.T, out=out))
        return torch.addmm(weights.biases[-1], hidden, weights.last.T)

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
        weights = self._weights()
        bias = self._latent_bias(weights, z.flatten(0, 1)).view(*z.shape[:2], -1)
        wide = bias.dtype
        rot, coords = rot.to(wide), self._coords.to(wide)
        sign = coords.new_ones(len(rot), self.pixels)
        if self.fourier:
            sign = torch.where((coords @ rot)[..., 2] > 0, -1.0, 1.0).to(wide)
        whole = self.pixels * (2 if self.fourier else 1)
        most = _ROWS.get(coords.device.type, _ROWS["cuda"])
        together = max(1, most // self.pixels)
        found = torch.empty(*z.shape[:2], whole, dtype=wide, device=z.device)
        for image, (one_rot, one_sign) in enumerate(zip(rot, sign, strict=True)):
            phases = (one_sign[:, None] * (coords @ one_rot)) @ self._frequencies().to(wide)
            start = torch.mm(self._features(phases), weights.first.T)
            for latents in torch.arange(len(bias[image])).split(together):
                rows = bias[image, latents].to(start.dtype)
                size = len(rows) * self.pixels, start.shape[1]
                first = self._buffer("hidden0", *size, start.dtype)
                torch.add(start, rows[:, None], out=first.view(len(rows), *start.shape))
                outputs = self._outputs(weights, first).to(wide).view(len(rows), self.pixels, -1)
                real, imag = outputs[..., 0], outputs[..., -1] * one_sign
                here = found[image, latents[0] : latents[-1] + 1]
                if self.fourier:
                    torch.sub(real, imag, out=here[:, : self.pixels])
                    here[:, self.pixels :] = (real + imag).flip(1)
                else:
                    here.copy_(real)
        return found

    def run(
        self,
        rot: Tensor,
        target: Tensor,
        ctf: Tensor | None,
        z: Tensor,
        asked: _Asked,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return squared errors, and the gradients of their sum that are asked for.

        In the order rotations, target, latents, each of ``parameters``; else None.
        """
        weights = self._weights()
        bias = self._latent_bias(weights, z)
        wide, narrow = bias.dtype, weights.first.dtype
        rot = rot.to(wide)
        coords = self._coords.to(wide)
        frequencies = rot[:, :2] @ self._frequencies().to(wide)  # (B, 2, features)
        plane, sign = coords[:, :2], None
        target = self._target(target.to(wide))
        if self.fourier:  # where the depth is positive, the conjugate at the opposite point is used
            depth = (coords @ rot)[..., 2]
            sign = torch.where(depth > 0, -1.0, 1.0).to(wide)
            target[..., 1] *= sign
        if ctf is not None:
            ctf = ctf.to(wide)
            if not self.fourier:
                ctf = torch.cat([ctf, ctf.flip(1)], 1)
        weight = 2.0 if self.fourier else 1.0  # each pixel stands for two
        scale = _HALF_SCALE if narrow == torch.float16 else 1.0
        by_target = torch.empty_like(target) if asked.target else None
        work = _Work(
            weights, bias, frequencies, plane, sign, target, ctf, weight, scale, asked, by_target
        )
        hands = self._hands(len(z))
        pieces = list(self._pieces(len(z), hands))
        hands = min(hands, len(pieces))
        shares = [pieces[len(pieces) * k // hands : len(pieces) * (k + 1) // hands]
                  for k in range(hands)]  # fmt: skip
        results = self._each(partial(self._do, work), shares)
        errors = torch.zeros(len(z), dtype=wide, device=z.device)
        sums = _Sums(work)
        for own_errors, own_sums in results:  # in order: the same result every time
            errors += own_errors
            sums.add(own_sums)
        sums.scale(1 / scale)
        return errors, [
            None if sums.frequencies is None else self._by_rot(sums.frequencies),
            None if by_target is None else self._by_pixel(by_target, sign),
            sums.bias @ weights.latent if asked.latents else None,
            *(self._by_parameter(sums, z) if asked.parameters else (None for _ in self.parameters)),
        ]

    def _do(self, work: _Work, pieces: list[tuple[slice, slice]]) -> tuple[Tensor, _Sums]:
        """Return the squared errors and the gradients of some pieces."""
        weights, bias, ctf = work.weights, work.bias, work.ctf
        errors = bias.new_zeros(len(bias))
        sums = _Sums(work)
        for images, pixels in pieces:
            here = work.plane[pixels]
            signed = here if work.sign is None else work.sign[images, pixels, None] * here
            count = images.stop - images.start
            features = work.frequencies.shape[2]
            phases = self._buffer("phases", signed.shape[-2] * count, features, bias.dtype)
            out = phases.view(count, -1, features)
            torch.matmul(signed, work.frequencies[images], out=out)
            encoded = self._features(phases)
            hidden = self._forward(weights, encoded, bias[images])
            outputs = torch.addmm(weights.biases[-1], hidden[-1], weights.last.T)
            outputs = outputs.to(bias.dtype).view(count, -1, outputs.shape[1])
            here_ctf = None if ctf is None else ctf[images, pixels, None]
            residual = outputs if here_ctf is None else outputs * here_ctf
            residual = residual - work.target[images, pixels]
            errors[images] += work.weight * residual.square().sum((1, 2))
            if work.by_target is not None:
                work.by_target[images, pixels] = -2 * work.weight * residual
            if any(work.asked):
                slope = 2 * work.weight * work.scale * residual
                slope = slope if here_ctf is None else slope * here_ctf
                grad = self._backward(weights, encoded, hidden, slope, sums, images)
                if sums.frequencies is not None:
                    by_phase = self._by_phase(weights, encoded, grad).view(count, -1, features)
                    sums.frequencies[images] += signed.mT @ by_phase.to(bias.dtype)
        return errors, sums

    def _hands(self, images: int) -> int:
        """Return how many threads work side by side, each on pieces of its own.

        That is faster than several threads for each product, which the rest has to wait for, once
        products take so long that the threads do not wait for the interpreter.
        """
        if self._coords.device.type != "cpu":
            return 1
        threads = torch.get_num_threads()
        rows = min(_ROWS["cpu"], images * self.pixels // threads)
        return threads if rows * len(self.layers[0].weight) ** 2 >= _WORTH else 1

    def _each(self, do: Callable[[Any], _T], shares: list[Any]) -> list[_T]:
        """Do the shares side by side."""
        if len(shares) <= 1:
            return [do(share) for share in shares]

        def alone(share: Any) -> _T:
            with torch.no_grad():  # of this thread
                return do(share)

        return list(_pool(torch.get_num_threads()).map(alone, shares))

    def _forward(self, weights: _Weights, features: Tensor, bias: Tensor) -> list[Tensor]:
        """Return the activations of every hidden layer, each `(rows, width)`."""
        rows, width = len(features), len(weights.first)
        out = self._buffer("hidden0", rows, width, features.dtype)
        bias = bias.to(out.dtype)
        if len(bias) == 1:
            torch.addmm(bias, features, weights.first.T, out=out)
        else:
            torch.mm(features, weights.first.T, out=out)
            out.view(len(bias), -1, width).add_(bias[:, None])
        found = [self._activate(out)]
        for i, (weight, layer_bias) in enumerate(zip(weights.hidden, weights.biases, strict=False)):
            out = self._buffer(f"hidden{i + 1}", rows, width, features.dtype)
            torch.addmm(layer_bias, found[-1], weight.T, out=out)
            found.append(self._activate(out))
        return found

    def _backward(
        self,
        weights: _Weights,
        features: Tensor,
        hidden: list[Tensor],
        slope: Tensor,
        sums: _Sums,
        images: slice,
    ) -> Tensor:
        """Add the gradients of one piece, whose outputs have gradient ``slope``, to ``sums``.

        Returns those by the values of its first layer, `(rows, width)`.
        """
        rows, width = hidden[0].shape
        narrow = features.dtype
        outputs = slope.view(rows, -1)
        grad = self._buffer(f"grad{len(weights.hidden) % 2}", rows, width, narrow)
        if sums.parameters:
            sums.add_product(-1, outputs.to(narrow), hidden[-1])
            sums.biases[-1] += outputs.sum(0)
        torch.mm(outputs.to(narrow), weights.last, out=grad)
        for i in range(len(weights.hidden) - 1, -1, -1):
            self._deactivate(grad, hidden[i + 1])
            if sums.parameters:
                sums.add_product(i + 1, grad, hidden[i])
                sums.biases[i] += grad.sum(0)
            before = self._buffer(f"grad{i % 2}", rows, width, narrow)
            grad = torch.mm(grad, weights.hidden[i], out=before)
        self._deactivate(grad, hidden[0])
        if sums.parameters:
            sums.add_product(0, grad, features)
        by_image = grad.view(images.stop - images.start, -1, width)
        sums.bias[images] += by_image.sum(1)
        return grad

    def _by_phase(self, weights: _Weights, features: Tensor, grad: Tensor) -> Tensor:
        """Return gradients by phases `(rows, n)`, of those by the first layer's values."""
        found = torch.mm(grad, weights.first)
        if self._encoding is None:
            return found
        n = found.shape[1] // 2
        sines, cosines = features[:, :n], features[:, n:]
        return found[:, :n] * cosines - found[:, n:] * sines

    def _by_rot(self, frequencies: Tensor) -> Tensor:
        """Return gradients by rotations `(B, 3, 3)`, of those by turned frequencies.

        Images are planes: the third row turns nothing.
        """
        rows = frequencies @ self._frequencies().to(frequencies.dtype).T
        return torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)

    def _by_pixel(self, target: Tensor, sign: Tensor | None) -> Tensor:
        """Return gradients by masked pixels `(B, P)`, of those by what ``_target`` makes."""
        if sign is None:
            return target[..., 0]
        even, odd = target[..., 0], target[..., 1] * sign
        return torch.cat([even - odd, (even + odd).flip(1)], 1).mul_(0.5)

    def _by_parameter(self, sums: _Sums, z: Tensor) -> list[Tensor]:
        """Return the gradients in the order of ``parameters``."""
        first = torch.empty_like(self.layers[0].weight)
        features = sums.products[0].shape[1]
        first[:, self._columns()] = sums.products[0]
        first[:, features:] = sums.bias.T @ z.to(sums.bias.dtype)
        found = [first, sums.bias.sum(0)]
        for product, bias in zip(sums.products[1:], sums.biases, strict=True):
            found += [product, bias]
        return found

    def _target(self, target: Tensor) -> Tensor:
        """Return what the outputs are compared with, `(B, pixels, outputs)`."""
        if not self.fourier:
            return target[..., None].clone()
        near, far = target[:, : self.pixels], target[:, self.pixels :].flip(1)
        return torch.stack([near + far, far - near], 2).mul_(0.5)

    def _pieces(self, images: int, hands: int) -> Iterator[tuple[slice, slice]]:
        """Cut `(images, pixels)` into several whole images, or parts of one, at a time."""
        most = _ROWS.get(self._coords.device.type, _ROWS["cuda"])
        most = max(min(most, -(-images * self.pixels // hands)), min(most, _FEWEST_ROWS))
        together = max(1, most // self.pixels)
        parts = -(-self.pixels // most)
        step = -(-self.pixels // parts)
        for a in range(0, images, together):
            for r in range(0, self.pixels, step):
                yield (
                    slice(a, min(a + together, images)),
                    slice(r, min(r + step, self.pixels)),
                )

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return `(rows, width)` numbers of any value, the same memory in every call."""
        key = (threading.get_ident(), name, width, dtype)
        found = self._buffers.get(key)
        if found is None or len(found) < rows:
            found = torch.empty(rows, width, dtype=dtype, device=self._coords.device)
            self._buffers[key] = found
        return found[:rows]

    def _activate(self, values: Tensor) -> Tensor:
        return _aten.leaky_relu_(values, self._slope) if self._slope else values.relu_()

    def _deactivate(self, grad: Tensor, activated: Tensor) -> None:
        if self._slope:
            _aten.leaky_relu_backward.grad_input(
                grad, activated, self._slope, True, grad_input=grad
            )
        else:
            _aten.threshold_backward.grad_input(grad, activated, 0, grad_input=grad)

    def _features(self, phases: Tensor) -> Tensor:
        """Return sines and cosines `(rows, 2 n)` of phases `(rows, n)`, ready to be multiplied."""
        narrow = self.matmul or phases.dtype
        if self._encoding is None:
            return phases.to(narrow)
        rows, n = phases.shape
        features = self._buffer("features", rows, 2 * n, phases.dtype)
        torch.sin(phases, out=features[:, :n])
        torch.cos(phases, out=features[:, n:])
        if narrow == phases.dtype:
            return features
        return self._buffer("narrow", rows, 2 * n, narrow).copy_(features)

    def _weights(self) -> _Weights:
        first, *rest = (
            layer.weight + torch.eye(*layer.weight.shape, out=torch.empty_like(layer.weight))
            if residual
            else layer.weight
            for layer, residual in zip(self.layers, self._residual, strict=True)
        )
        narrow = self.matmul or first.dtype
        columns = self._columns()
        return _Weights(
            first[:, columns].detach().to(narrow),
            first[:, len(columns) :].detach(),
            [w.detach().to(narrow) for w in rest[:-1]],
            rest[-1].detach().to(narrow),
            [layer.bias.detach().to(narrow) for layer in self.layers[1:]],
        )

    def _latent_bias(self, weights: _Weights, z: Tensor) -> Tensor:
        """Return the first layer's share that does not depend on the coordinates, `(B, width)`."""
        bias = self.layers[0].bias.detach()
        return torch.addmm(bias, z.detach().to(bias.dtype), weights.latent.T)

    @functools.cached_property
    def _encoding(self) -> tuple[Tensor, Tensor] | None:
        """Frequencies and columns of the positional encoding; None where there is none.

        Frequencies `(3, n)` in radians per unit of the coordinates, and where the sines, then the
        cosines, stand among the host's features `(2 n,)`. They are read off the host's own
        encoding, as its derivative at the origin, where sines are 0 and rise by their frequency,
        and cosines are 1.
        """
        encode = getattr(self.decoder, "positional_encoding_geom", None)
        if encode is None:
            return None
        features = self.decoder.in_dim - self.decoder.zdim
        with torch.enable_grad():  # one point per feature, so that one pass yields all derivatives
            origin = self._coords.new_zeros(features, 3 + self.decoder.zdim, requires_grad=True)
            own = encode(origin)[:, :features].diagonal()
            (slopes,) = torch.autograd.grad(own.sum(), origin)
        slopes, cosine = slopes[:, :3], own.detach() > 0.5
        sines, cosines = (~cosine).nonzero()[:, 0], cosine.nonzero()[:, 0]
        return slopes[sines].T.contiguous(), torch.cat([sines, cosines])

    def forget(self) -> None:
        """Read the frequencies anew: the decoder has got another state."""
        self.__dict__.pop("_encoding", None)

    def _frequencies(self) -> Tensor:
        if self._encoding is None:
            return torch.eye(3, device=self._coords.device)
        return self._encoding[0]

    def _columns(self) -> Tensor:
        """Return where the features of this module stand among the host's."""
        if self._encoding is None:
            return torch.arange(3, device=self._coords.device)
        return self._encoding[1]


class _Sums:
    """Gradients of a batch, summed over its pieces in full precision."""

    def __init__(self, work: _Work) -> None:
        weights, bias = work.weights, work.bias
        self.parameters = work.asked.parameters
        self.bias = torch.zeros_like(bias)
        """By the first layer's share that does not depend on the coordinates, `(B, width)`."""
        self.frequencies = torch.zeros_like(work.frequencies) if work.asked.rot else None
        """By the frequencies turned with each image, `(B, 2, features)`; None: not asked for."""
        layers = [weights.first, *weights.hidden, weights.last] if self.parameters else []
        self.products = [torch.zeros_like(w, dtype=bias.dtype) for w in layers]
        self.biases = [bias.new_zeros(len(w)) for w in layers[1:]]

    def add_product(self, layer: int, grad: Tensor, values: Tensor) -> None:
        """Add the gradient by a layer's weight: `grad.T @ values`."""
        total = self.products[layer]
        if total.dtype == grad.dtype:
            total.addmm_(grad.T, values)
        else:
            total += torch.mm(grad.T, values)

    def add(self, other: _Sums) -> None:
        """Add what others have summed up."""
        for part, more in zip(self._parts(), other._parts(), strict=True):
            part += more

    def scale(self, factor: float) -> None:
        """Multiply all."""
        if factor != 1:
            for part in self._parts():
                part *= factor

    def _parts(self) -> list[Tensor]:
        own = [] if self.frequencies is None else [self.frequencies]
        return [self.bias, *own, *self.products, *self.biases]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads in which PyTorch starts no further ones."""
    return ThreadPoolExecutor(threads, "decoding", initializer=torch.set_num_threads, initargs=(1,))


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
        asked = _Asked(by_rot, by_target, by_latent, any(by_parameter))
        errors, ctx.gradients = decoder.run(rot, target, ctf, z, asked)
        ctx.mark_non_differentiable(errors)
        return errors.sum(), errors

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        rot, target, *others = (None if g is None else g * grad for g in ctx.gradients)
        return None, rot, target, None, *others
