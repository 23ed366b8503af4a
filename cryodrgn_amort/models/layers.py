"""The fully connected layers of the host's decoder, forwards and backwards in buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cryodrgn_amort.models.pieces import Buffers


__all__ = ["Layers", "Network", "Sums"]
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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer, in turn."""
        return [p for layer in self._layers for p in (layer.weight, layer.bias)]

    def read(self, columns: Tensor, matmul: torch.dtype | None) -> Layers:
        """Return the layers as they are now.

        Parameters
        ----------
        columns
            Where the features stand among the host's, which the latent follows.
        matmul
            Precision of the matrix products; that of the parameters unless given.
        """
        first, *rest = (
            layer.weight + torch.eye(*layer.weight.shape, out=torch.empty_like(layer.weight))
            if residual
            else layer.weight
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
        )

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
        if len(bias) == 1:
            torch.addmm(bias, features, self.first.T, out=out)
        else:
            torch.mm(features, self.first.T, out=out)
            out.view(len(bias), -1, width).add_(bias[:, None])
        return self.after_first(out)

    def after_first(self, values: Tensor) -> list[Tensor]:
        """Return the activations that follow from the first layer's values, which are changed."""
        found = [self._activate(values)]
        for i, (weight, bias) in enumerate(zip(self.hidden, self.biases, strict=False)):
            out = self.buffers(f"hidden{i + 1}", len(values), values.shape[1], values.dtype)
            found.append(self._activate(torch.addmm(bias, found[-1], weight.T, out=out)))
        return found

    def outputs(self, hidden: list[Tensor]) -> Tensor:
        """Return the outputs `(rows, outputs)` that follow from the activations."""
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
        rows, width = hidden[0].shape
        narrow = features.dtype
        outputs = slope.view(rows, -1)
        grad = self.buffers(f"grad{len(self.hidden) % 2}", rows, width, narrow)
        if sums.parameters:
            sums.add_product(-1, outputs.to(narrow), hidden[-1])
            sums.biases[-1] += outputs.sum(0)
        torch.mm(outputs.to(narrow), self.last, out=grad)
        for i in range(len(self.hidden) - 1, -1, -1):
            self._deactivate(grad, hidden[i + 1])
            if sums.parameters:
                sums.add_product(i + 1, grad, hidden[i])
                sums.biases[i] += grad.sum(0)
            before = self.buffers(f"grad{i % 2}", rows, width, narrow)
            grad = torch.mm(grad, self.hidden[i], out=before)
        self._deactivate(grad, hidden[0])
        if sums.parameters:
            sums.add_product(0, grad, features)
        by_image = grad.view(images.stop - images.start, -1, width)
        sums.bias[images] += by_image.sum(1)
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
    """

    def __init__(
        self, layers: Layers, bias: Tensor, frequencies: Tensor | None, *, parameters: bool
    ) -> None:
        self.parameters = parameters
        self.bias = torch.zeros_like(bias)
        """By ``latent_bias``, `(B, width)`."""
        self.frequencies = None if frequencies is None else torch.zeros_like(frequencies)
        """By the turned frequencies, `(B, 2, n)`."""
        weights = [layers.first, *layers.hidden, layers.last] if parameters else []
        self.products = [torch.zeros_like(w, dtype=bias.dtype) for w in weights]
        self.biases = [bias.new_zeros(len(w)) for w in weights[1:]]

    def add_product(self, layer: int, grad: Tensor, values: Tensor) -> None:
        """Add the gradient by a layer's weight: `grad.T @ values`."""
        total = self.products[layer]
        if total.dtype == grad.dtype:
            total.addmm_(grad.T, values)
        else:
            total += torch.mm(grad.T, values)

    def add(self, other: Sums) -> None:
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
