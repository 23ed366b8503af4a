"""The fully connected layers of the host's decoder, forwards and backwards in buffers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cryodrgn_amort.core import on_gpu, tf32 as rounded_to_tf32, wide_products

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from cryodrgn_amort.models.pieces import Buffers


__all__ = ["DTYPES", "Layers", "Network", "Sums"]

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What ``--precision`` names."""
_aten = torch.ops.aten


class Network:
    """The layers of a decoder of the host.

    Parameters
    ----------
    decoder
        The host's module. Its parameters are read anew by every ``read``.
    """

    def __init__(self, decoder: Any, buffers: Buffers) -> None:
        network = getattr(decoder, "decoder", decoder)
        modules = network.main[::2]  # in between are the activations
        self._layers = [getattr(module, "linear", module) for module in modules]
        self._residual = [hasattr(module, "linear") for module in modules]
        self._slope = float(getattr(network.main[1], "negative_slope", 0.0))
        self._buffers = buffers
        self.width = len(self._layers[0].weight)
        self._identity = torch.eye(self.width)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer, in turn."""
        return [p for layer in self._layers for p in (layer.weight, layer.bias)]

    def read(self, columns: Tensor, matmul: torch.dtype | None, *, tf32: bool = False) -> Layers:
        """Return the layers as they are now.

        Parameters
        ----------
        columns
            Where the features stand among the host's, which the latent follows.
        matmul
            Precision of the matrix products; that of the parameters unless given.
        tf32
            Whether a GPU may round what it multiplies to TF32.
        """
        first, *rest = (
            layer.weight + self._eye(layer.weight) if residual else layer.weight
            for layer, residual in zip(self._layers, self._residual, strict=True)
        )
        narrow = matmul or first.dtype
        return Layers(
            first[:, columns].detach().to(narrow),
            first[:, len(columns) :].detach(),
            [w.detach().to(narrow) for w in rest[:-1]],
            rest[-1].detach().to(narrow),
            self._layers[0].bias.detach(),
            [layer.bias.detach().to(narrow) for layer in self._layers[1:]],
            self._slope,
            self._buffers,
            partial(rounded_to_tf32, first.device) if tf32 else contextlib.nullcontext,
        )

    def _eye(self, weight: Tensor) -> Tensor:
        """Return the identity matrix that a residual layer adds."""
        self._identity = self._identity.to(weight)
        return self._identity

    def gradients(self, sums: Sums, z: Tensor, columns: Tensor) -> list[Tensor]:
        """Return the gradients in the order of ``parameters``, for latents `(B, zdim)`."""
        first = torch.empty_like(self._layers[0].weight)
        first[:, columns] = sums.products[0]
        first[:, len(columns) :] = sums.bias.T @ z.to(sums.bias.dtype)
        found = [first, sums.bias.sum(0)]
        for product, bias in zip(sums.products[1:], sums.biases, strict=True):
            found += [product, bias]
        return found


@dataclass
class Layers:
    """The layers at one time: `h = act(x @ first.T + z @ latent.T + bias)` and so on.

    What meets the latent is in full precision, the rest in that of the products.
    """

    first: Tensor  # (width, features), columns: sines, cosines (or coordinates)
    latent: Tensor  # (width, zdim)
    hidden: list[Tensor]  # (width, width), residual connections included
    last: Tensor  # (outputs, width)
    bias: Tensor  # of the first layer, (width,)
    biases: list[Tensor]  # of every other layer
    slope: float  # of the activation where it is negative
    buffers: Buffers
    products: Callable[[], AbstractContextManager[None]]  # in which these matrices are multiplied

    def latent_bias(self, z: Tensor) -> Tensor:
        """Return the first layer's share that does not depend on the coordinates, `(B, width)`."""
        return torch.addmm(self.bias, z.detach().to(self.bias.dtype), self.latent.T)

    def forward(self, features: Tensor, bias: Tensor) -> list[Tensor]:
        """Return the activations of every hidden layer, each `(rows, width)`.

        Parameters
        ----------
        features
            Of the pixels of some images, `(rows, features)`.
        bias
            ``latent_bias`` of these images.
        """
        rows, width = len(features), len(self.first)
        out = self.buffers("hidden0", rows, width, features.dtype)
        bias = bias.to(out.dtype)
        with self.products():
            if len(bias) == 1:
                torch.addmm(bias, features, self.first.T, out=out)
            else:
                torch.mm(features, self.first.T, out=out)
                out.view(len(bias), -1, width).add_(bias[:, None])
        return self.after_first(out)

    def first_values(self, features: Tensor) -> Tensor:
        """Return the first layer's values but for ``latent_bias``, `(rows, width)`."""
        with self.products():
            return torch.mm(features, self.first.T)

    def after_first(self, values: Tensor) -> list[Tensor]:
        """Return the activations that follow from the first layer's values, which are changed."""
        found = [self._activate(values)]
        with self.products():
            for i, (weight, bias) in enumerate(zip(self.hidden, self.biases, strict=False)):
                out = self.buffers(f"hidden{i + 1}", len(values), values.shape[1], values.dtype)
                found.append(self._activate(torch.addmm(bias, found[-1], weight.T, out=out)))
        return found

    def outputs(self, hidden: list[Tensor]) -> Tensor:
        """Return the outputs `(rows, outputs)` that follow from the activations."""
        with self.products():
            return torch.addmm(self.biases[-1], hidden[-1], self.last.T)

    def backward(
        self, features: Tensor, hidden: list[Tensor], slope: Tensor, sums: Sums, images: slice
    ) -> Tensor:
        """Add the gradients of one piece to ``sums``.

        Returns those by the values of its first layer, `(rows, width)`.

        Parameters
        ----------
        features, hidden
            What ``forward`` was given, and returned.
        slope
            Gradient by the outputs, `(images, pixels, outputs)`.
        images
            Which images of the batch these are.
        """
        with self.products():
            return self._backward(features, hidden, slope, sums, images)

    def _backward(
        self, features: Tensor, hidden: list[Tensor], slope: Tensor, sums: Sums, images: slice
    ) -> Tensor:
        rows, width = hidden[0].shape
        narrow = features.dtype
        outputs = slope.view(rows, -1)
        grad = self.buffers(f"grad{len(self.hidden) % 2}", rows, width, narrow)
        if sums.parameters:
            sums.add_layer(len(self.hidden) + 1, outputs.to(narrow), hidden[-1], outputs)
        torch.mm(outputs.to(narrow), self.last, out=grad)
        for i in range(len(self.hidden) - 1, -1, -1):
            self._deactivate(grad, hidden[i + 1])
            if sums.parameters:
                sums.add_layer(i + 1, grad, hidden[i], grad)
            before = self.buffers(f"grad{i % 2}", rows, width, narrow)
            grad = torch.mm(grad, self.hidden[i], out=before)
        self._deactivate(grad, hidden[0])
        if sums.parameters:
            sums.add_layer(0, grad, features)
        sums.add_bias(images, grad.view(images.stop - images.start, -1, width))
        return grad

    def _activate(self, values: Tensor) -> Tensor:
        return _aten.leaky_relu_(values, self.slope) if self.slope else values.relu_()

    def _deactivate(self, grad: Tensor, activated: Tensor) -> None:
        if self.slope:
            _aten.leaky_relu_backward.grad_input(grad, activated, self.slope, True, grad_input=grad)
        else:
            _aten.threshold_backward.grad_input(grad, activated, 0, grad_input=grad)


class Sums:
    """Gradients of a batch, summed over its pieces in full precision.

    Parameters
    ----------
    bias
        ``latent_bias`` of the batch.
    frequencies
        Frequencies turned with each image `(B, 2, n)`; None: gradients by these are not wanted.
    parameters
        Whether those by the parameters are wanted.
    single
        Whether there is one piece: then nothing is added to zeros.
    """

    def __init__(
        self,
        layers: Layers,
        bias: Tensor,
        frequencies: Tensor | None,
        *,
        parameters: bool,
        single: bool,
    ) -> None:
        self.parameters, self._wide = parameters, bias.dtype
        self._single = single
        self.bias = bias if single else torch.zeros_like(bias)
        """By ``latent_bias``, `(B, width)`."""
        self.frequencies = frequencies
        """By the turned frequencies, `(B, 2, n)`."""
        if frequencies is not None and not single:
            self.frequencies = torch.zeros_like(frequencies)
        weights = [layers.first, *layers.hidden, layers.last] if parameters else []
        self.products, self.biases = weights, [w[:, 0] for w in weights[1:]]
        if not single:
            self.products = [torch.zeros_like(w, dtype=bias.dtype) for w in weights]
            self.biases = [bias.new_zeros(len(w)) for w in weights[1:]]

    def add_layer(
        self, layer: int, grad: Tensor, values: Tensor, by_bias: Tensor | None = None
    ) -> None:
        """Add the gradients by a layer's weight, `grad.T @ values`, and by its bias.

        ``by_bias`` `(rows, outputs)` are gradients to be summed; None: the layer is the first one.
        """
        if self._single or self._wide != grad.dtype:
            found = product(grad.T, values, self._wide)
            self.products[layer] = found if self._single else self.products[layer].add_(found)
        else:
            self.products[layer].addmm_(grad.T, values)
        if by_bias is not None:
            found = self._summed(by_bias, 0)
            place = layer - 1
            self.biases[place] = found if self._single else self.biases[place].add_(found)

    def add_bias(self, images: slice, grad: Tensor) -> None:
        """Add the gradients `(images, pixels, width)` by ``latent_bias``, summed over pixels."""
        found = self._summed(grad, 1)
        if self._single:
            self.bias = found
        else:
            self.bias[images] += found

    def add_frequencies(self, images: slice, grad: Tensor) -> None:
        """Add the gradient by the turned frequencies of some images."""
        assert self.frequencies is not None
        if self._single:
            self.frequencies = grad
        else:
            self.frequencies[images] += grad

    def _summed(self, values: Tensor, axis: int) -> Tensor:
        # on a GPU a piece is large, and so is a sum: not in half precision
        if self._single or on_gpu(values.device):
            return values.sum(axis, dtype=self._wide)
        return values.sum(axis)

    def add(self, other: Sums) -> None:
        """Add what others have summed up."""
        for part, more in zip(self._parts(), other._parts(), strict=True):
            part += more

    def _parts(self) -> list[Tensor]:
        own = [] if self.frequencies is None else [self.frequencies]
        return [self.bias, *own, *self.products, *self.biases]


def product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Multiply matrices, to be had in ``wide``: as it is summed up, where that can be."""
    if a.dtype != wide and wide_products(a.device):
        found: Tensor = torch.mm(a, b, out_dtype=wide)  # type: ignore[call-overload]
        return found
    return torch.mm(a, b).to(wide)
