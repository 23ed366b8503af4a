"""Posteriors fitted to single particles, with the decoder as it is.

What an encoder answers in one go is found here by optimisation: mean and log variance of q(z) for
each particle by itself, so that its own ELBO is as large as it gets (stochastic variational
inference: Cremer, Li & Duvenaud, arXiv 1801.03558; Hjelm et al., arXiv 1511.06382). The
difference is the amortization gap.

Whatever has ``errors(batch, z)`` can be a model here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cryodrgn_amort.objective import kl_divergence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.particles import Batch

__all__ = [
    "Decoder",
    "Fit",
    "FitOptions",
    "Fitted",
    "Posterior",
    "Yardstick",
    "anchored",
    "elbo",
    "errors_at",
    "fit",
    "importance_bound",
    "infer",
]  # fmt: skip

_BETAS = (0.9, 0.95)
_HALVINGS = 4  # of the learning rate, then a particle is done
_FEWER = 0.75  # a batch shrinks when so few of its particles are left
_LEAST_SPREAD, _LEAST_BETA = 1e-3, 1e-6
_LEAST_PRECISION = 0.5

Posterior = tuple[Tensor, Tensor]
"""Means and log variances, each `(B, zdim)`."""


class Decoder(Protocol):
    """What explains the particles: see ``LatentModel.errors``."""

    def errors(self, batch: Batch, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the total error, differentiable by z, and that of each particle `(B,)`."""
        ...


@dataclass(frozen=True)
class Yardstick:
    """In what the ELBO is measured: -(error + beta KL) / (2 variance), in nats.

    Up to the same constant for all latents. With beta = 2 variance this is the ELBO of a model
    whose noise has that variance in each pixel.

    Attributes
    ----------
    beta
        Weight of the KL divergence, as in training.
    variance
        Of the noise; the host's normalisation makes that of the images 1.
    """

    beta: float
    variance: float = 1.0

    @classmethod
    def implied(cls, variance: float) -> Yardstick:
        """Return that of a model with this variance of the noise: its beta is implied."""
        return cls(2 * variance, variance)

    def elbo(self, error: Tensor, kl: Tensor) -> Tensor:
        """Return the ELBO of each particle, `(B,)`."""
        return (error + self.beta * kl) / (-2 * self.variance)


@dataclass(frozen=True)
class FitOptions:
    """How posteriors are fitted.

    Attributes
    ----------
    steps
        At most so many per particle.
    lr
        Learning rate of the means, in units of the latents' spread.
    window, tolerance
        After every so many steps, the log variances become those at which the ELBO is stationary,
        as far as these steps can tell; and a particle whose ELBO, averaged over them, did not get
        better by so many nats has its learning rate halved. After four such times it is done.
    draws
        Latents by which an ELBO is measured; even, since they come in opposite pairs.
    """

    steps: int = 400
    lr: float = 0.2
    window: int = 10
    tolerance: float = 0.05
    draws: int = 16


@dataclass
class Fit:
    """Posteriors of a batch of particles.

    Attributes
    ----------
    mean, logvar
        `(B, zdim)`.
    elbo
        Of each particle in nats, `(B,)`; NaN where it cannot be computed.
    converged
        Whether the ELBO had stopped improving, `(B,)` bool.
    start
        Number of the start that led here, `(B,)`; -1: that answer of the encoder itself.
    """

    mean: Tensor
    logvar: Tensor
    elbo: Tensor
    converged: Tensor
    start: Tensor


Fitted = tuple["Batch", Fit, "Tensor | None", "Posterior | None"]
"""A batch, its fit, and of the encoder's answers to it the ELBO and the posterior."""


def _draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + noise * torch.exp(0.5 * logvar)


def _noise(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)


@torch.no_grad()
def errors_at(model: Decoder, batch: Batch, z: Tensor) -> Tensor:
    """Return the error of each particle at several latents `(K, B, zdim)`: `(K, B)`."""
    return torch.stack([model.errors(batch, latent)[1] for latent in z])


@torch.no_grad()
def elbo(
    model: Decoder, batch: Batch, posterior: Posterior, yardstick: Yardstick, draws: Tensor
) -> Tensor:
    """Measure the ELBO of each particle in nats, `(B,)`.

    Parameters
    ----------
    draws
        Standard normal noise `(K, B, zdim)`, used together with its opposite; the same for all
        posteriors that are to be compared.
    """
    mean, logvar = posterior
    z = _draw(mean, logvar, torch.cat([draws, -draws]))
    error = errors_at(model, batch, z).mean(0)
    return yardstick.elbo(error, kl_divergence(mean, logvar).to(error.dtype))


@torch.no_grad()
def importance_bound(
    model: Decoder, batch: Batch, posterior: Posterior, yardstick: Yardstick, noise: Tensor
) -> Tensor:
    """Estimate log p(x) from below by importance sampling (Burda et al., arXiv 1509.00519).

    In nats up to the constant of the ELBO, `(B,)`; it is tighter the more samples there are.

    Parameters
    ----------
    noise
        Standard normal, `(K, B, zdim)`.
    """
    mean, logvar = posterior
    z = _draw(mean, logvar, noise)
    prior, own = (-0.5 * at.square().sum(2) for at in (z, noise))
    log_q = own - 0.5 * logvar.sum(1)
    error = errors_at(model, batch, z)
    weight = yardstick.beta / (2 * yardstick.variance)
    ratios = error / (-2 * yardstick.variance) + weight * (prior - log_q).to(error.dtype)
    return torch.logsumexp(ratios, 0) - math.log(len(noise))


@torch.no_grad()
def anchored(
    model: Decoder, batch: Batch, anchors: Tensor, variance: float
) -> tuple[Tensor, Tensor]:
    """Return the mean of some latents, weighted by how well they explain each particle.

    Parameters
    ----------
    anchors
        `(K, zdim)`; all are equally likely beforehand.
    variance
        Of the noise.

    Returns
    -------
    mean
        `(B, zdim)`.
    least
        Smallest error of each particle at an anchor, `(B,)`.
    """
    size = len(batch.index)
    error = errors_at(model, batch, anchors[:, None].expand(-1, size, -1))
    weights = torch.softmax(error / (-2 * variance), 0).nan_to_num(1 / len(anchors))
    return weights.to(anchors.dtype).T @ anchors, error.amin(0)


def _balanced(steps: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise for so many steps, `(steps, B, zdim)`, whose means are exact.

    Each number is followed by its opposite, the sizes of a particle's numbers in a dimension are
    stratified, and their mean square is 1: so the mean over the steps of a function of the latent
    has little error, though the latents differ in every step.
    """
    count = -(-steps // 2)
    shape = (count, *like.shape)
    order = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(0)
    within = torch.rand(shape, generator=generator, dtype=torch.float64)
    size = torch.special.ndtri(0.5 + 0.5 * (order + within) / count)
    size /= size.square().mean(0).sqrt()
    both = torch.stack([size, -size], 1).flatten(0, 1)[:steps]
    return both.to(like.device, like.dtype)


class _Adam:
    """Adam with a learning rate for each row (Kingma & Ba, arXiv 1412.6980, Algorithm 1)."""

    def __init__(self, like: Tensor) -> None:
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, rows: Tensor, grad: Tensor, lr: Tensor) -> None:
        self.t += 1
        self.m.lerp_(grad, 1 - _BETAS[0])
        self.v.lerp_(grad.square(), 1 - _BETAS[1])
        size = (self.v / (1 - _BETAS[1] ** self.t)).sqrt_().add_(1e-12)
        rows.addcdiv_(self.m * lr, size, value=-1 / (1 - _BETAS[0] ** self.t))

    def keep(self, places: Tensor) -> None:
        self.m, self.v = self.m[places], self.v[places]


def fit(
    model: Decoder,
    batch: Batch,
    start: Posterior,
    yardstick: Yardstick,
    options: FitOptions,
    spread: Tensor,
    generator: torch.Generator,
) -> tuple[Posterior, Tensor]:
    """Fit the posteriors of a batch, each particle until its own ELBO stops improving.

    Parameters
    ----------
    spread
        Standard deviation of the latents in each dimension, `(zdim,)`.
    generator
        Draws the noise, on the CPU.

    Returns
    -------
    posterior
        Means over the last ``window`` steps.
    converged
        Whether it did, `(B,)`. Particles with a loss that is not a number keep their start, and
        did not.
    """
    mean, logvar = (part.clone() for part in start)
    found, converged = (mean.clone(), logvar.clone()), torch.zeros_like(mean[:, 0]).bool()
    scale = spread.clamp(min=_LEAST_SPREAD).to(mean)
    left = torch.arange(len(mean), device=mean.device)
    best, halvings = torch.full_like(mean[:, :1], math.inf), torch.zeros_like(mean[:, :1])
    adam, part = _Adam(mean), batch
    cost, path, slope = torch.zeros_like(best), torch.zeros_like(mean), torch.zeros_like(mean)
    noise = torch.empty(0)
    for step in range(1, options.steps + 1):
        place = (step - 1) % options.window
        if place == 0:
            noise = _balanced(options.window, start[0], generator)[:, left]
        z = _draw(mean, logvar, noise[place]).requires_grad_()
        total, each = model.errors(part, z)
        (grad,) = torch.autograd.grad(total, z)
        cost -= yardstick.elbo(each.to(mean.dtype), kl_divergence(mean, logvar))[:, None]
        slope.addcmul_(noise[place], grad)
        adam.step(mean, grad + yardstick.beta * mean, options.lr * 0.5**halvings * scale)
        path += mean
        steps = place + 1
        if steps < options.window and step < options.steps:
            continue
        if steps > options.window // 2:
            target = _best_logvar(slope / steps * torch.exp(-0.5 * logvar), yardstick.beta)
            logvar = logvar.lerp(target, 1 / (1 + halvings))
        cost /= steps
        path /= steps
        sound = torch.cat([cost, path, logvar], 1).isfinite().all(1)
        for held, new in zip(found, (path, logvar), strict=True):
            held[left[sound]] = new[sound]
        halvings += (cost > best - options.tolerance).to(halvings)
        best = torch.minimum(best, cost)
        done = sound & (halvings[:, 0] >= _HALVINGS)
        converged[left] = done
        going = sound & ~done
        for total in (cost, path, slope):
            total.zero_()
        if not going.any():
            break
        if going.float().mean() < _FEWER:
            kept = going.nonzero()[:, 0]
            left, mean, logvar = left[kept], mean[kept], logvar[kept]
            best, halvings = best[kept], halvings[kept]
            cost, path, slope = cost[kept], path[kept], slope[kept]
            adam.keep(kept)
            part = part.of(kept)
    return found, converged


def _best_logvar(curvature: Tensor, beta: float) -> Tensor:
    """Return the log variances at which the ELBO is stationary, `(B, zdim)`.

    Parameters
    ----------
    curvature
        Mean of the error's second derivatives by the latents. Over normal noise that is
        the mean of noise times first derivative, over the standard deviation (Price 1958;
        Opper & Archambeau 2009).
    """
    precision = 1 + curvature / max(beta, _LEAST_BETA)
    return -precision.clamp(min=_LEAST_PRECISION).log()


def infer(
    model: Decoder,
    batch: Batch,
    answer: Posterior | None,
    starts: Mapping[str, Posterior],
    yardstick: Yardstick,
    options: FitOptions,
    spread: Tensor,
    seed: int,
) -> tuple[Fit, Tensor | None]:
    """Fit from several starts, and keep what is best for each particle.

    Parameters
    ----------
    answer
        The encoder's; it is kept where no fit has a larger ELBO.
    starts
        By name; at least one.
    seed
        Of all noise.

    Returns
    -------
    fit
        The best posteriors.
    elbo
        Of the encoder's answer, `(B,)`, by the same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(starts.values()))[0]
    draws = _noise(torch.Size((options.draws // 2, *first.shape)), first, generator)

    def measured(posterior: Posterior) -> Tensor:
        return elbo(model, batch, posterior, yardstick, draws)

    best, own = None, None
    if answer is not None:
        own = measured(answer)
        none = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        best = Fit(answer[0].clone(), answer[1].clone(), own.clone(), none, none.long() - 1)
    for number, start in enumerate(starts.values()):
        posterior, converged = fit(model, batch, start, yardstick, options, spread, generator)
        origin = torch.full_like(converged, number, dtype=torch.long)
        found = Fit(*posterior, measured(posterior), converged, origin)
        best = found if best is None else _better(best, found)
    assert best is not None
    return best, own


def _better(a: Fit, b: Fit) -> Fit:
    """Take for each particle the one with the larger ELBO.

    An answer that no fit could better has converged if the fit has.
    """
    take = (b.elbo > a.elbo) | (a.elbo.isnan() & ~b.elbo.isnan())
    pick = take[:, None]
    return Fit(
        torch.where(pick, b.mean, a.mean),
        torch.where(pick, b.logvar, a.logvar),
        torch.where(take, b.elbo, a.elbo),
        torch.where(take | (a.start < 0), b.converged, a.converged),
        torch.where(take, b.start, a.start),
    )
