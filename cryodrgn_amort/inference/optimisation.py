"""Posteriors fitted to single particles, with the decoder as it is.

What an encoder answers in one go is found here by optimisation: mean and log variance of q(z) for
each particle by itself, so that its own ELBO is as large as it gets (stochastic variational
inference: Cremer, Li & Duvenaud, arXiv 1801.03558; Hjelm et al., arXiv 1511.06382). The
difference is the amortization gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cryodrgn_amort.inference.bounds import Decoder, ElboScale, Posterior, drawn, elbo
from cryodrgn_amort.models import kl_divergence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.data import Batch


__all__ = ["Fit", "FitOptions", "Fitted", "fit", "infer"]

_BETAS = (0.9, 0.95)
_HALVINGS = 4  # of the learning rate, then a particle is done
_FEWER = 0.75  # a batch shrinks when so few of its particles are left
_LEAST_SPREAD, _LEAST_BETA = 1e-3, 1e-6
_LEAST_PRECISION = 0.5


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


def _noise(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)


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


class _Fitting:
    """The particles of a batch that are not done yet.

    Attributes
    ----------
    left
        Their places in the whole batch, `(B,)`.
    mean, logvar
        Where they are, `(B, zdim)`.
    best, halvings
        Of each the least cost so far, and how often its learning rate was halved, `(B, 1)`.
    cost, path, slope
        Sums over the steps of a window: minus the ELBO `(B, 1)`, the means, and noise times
        gradient, `(B, zdim)` each.
    """

    def __init__(
        self, batch: Batch, start: Posterior, elbo_scale: ElboScale, options: FitOptions,
        spread: Tensor,
    ) -> None:  # fmt: skip
        self.elbo_scale, self.options, self.batch = elbo_scale, options, batch
        mean, logvar = (part.clone() for part in start)
        self.mean, self.logvar, self.adam = mean, logvar, _Adam(mean)
        self.scale = spread.clamp(min=_LEAST_SPREAD).to(mean)
        self.left = torch.arange(len(mean), device=mean.device)
        self.best = torch.full_like(mean[:, :1], math.inf)
        self.halvings, self.cost = torch.zeros_like(self.best), torch.zeros_like(self.best)
        self.path, self.slope = torch.zeros_like(mean), torch.zeros_like(mean)

    def step(self, model: Decoder, noise: Tensor) -> None:
        """Move the means by the gradient at one latent of each particle."""
        mean, beta = self.mean, self.elbo_scale.beta
        z = drawn(mean, self.logvar, noise).requires_grad_()
        total, each = model.errors(self.batch, z)
        (grad,) = torch.autograd.grad(total, z)
        kl = kl_divergence(mean, self.logvar)
        self.cost -= self.elbo_scale.elbo(each.to(mean.dtype), kl)[:, None]
        self.slope.addcmul_(noise, grad)
        lr = self.options.lr * 0.5**self.halvings * self.scale
        self.adam.step(mean, grad + beta * mean, lr)
        self.path += mean

    def end_window(self, steps: int) -> tuple[Tensor, Tensor]:
        """Set log variances and learning rates by what a window of so many steps has told.

        Returns which particles have finite numbers, and which of them are done, `(B,)` bool; the
        sums have become means.
        """
        if steps > self.options.window // 2:
            curvature = self.slope / steps * torch.exp(-0.5 * self.logvar)
            target = _best_logvar(curvature, self.elbo_scale.beta)
            self.logvar = self.logvar.lerp(target, 1 / (1 + self.halvings))
        self.cost /= steps
        self.path /= steps
        sound = torch.cat([self.cost, self.path, self.logvar], 1).isfinite().all(1)
        self.halvings += (self.cost > self.best - self.options.tolerance).to(self.halvings)
        self.best = torch.minimum(self.best, self.cost)
        return sound, sound & (self.halvings[:, 0] >= _HALVINGS)

    def go_on(self, going: Tensor) -> None:
        """Begin a window; leave out the particles that are not ``going``, once they are many."""
        for total in (self.cost, self.path, self.slope):
            total.zero_()
        if going.float().mean() >= _FEWER:
            return
        kept = going.nonzero()[:, 0]
        for name in ("left", "mean", "logvar", "best", "halvings", "cost", "path", "slope"):
            setattr(self, name, getattr(self, name)[kept])
        self.adam.keep(kept)
        self.batch = self.batch.of(kept)


def fit(
    model: Decoder,
    batch: Batch,
    start: Posterior,
    elbo_scale: ElboScale,
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
    found = start[0].clone(), start[1].clone()
    converged = torch.zeros_like(found[0][:, 0]).bool()
    now, noise = _Fitting(batch, start, elbo_scale, options, spread), torch.empty(0)
    for step in range(options.steps):
        place = step % options.window
        if place == 0:
            noise = _balanced(options.window, start[0], generator)[:, now.left]
        now.step(model, noise[place])
        if place + 1 < options.window and step + 1 < options.steps:
            continue
        sound, done = now.end_window(place + 1)
        for held, new in zip(found, (now.path, now.logvar), strict=True):
            before = held.index_select(0, now.left)
            held.index_copy_(0, now.left, torch.where(sound[:, None], new, before))
        converged.index_copy_(0, now.left, done)
        going = sound & ~done
        if not going.any():
            break
        now.go_on(going)
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
    elbo_scale: ElboScale,
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
        return elbo(model, batch, posterior, elbo_scale, draws)

    best, own = None, None
    if answer is not None:
        own = measured(answer)
        none = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        best = Fit(answer[0].clone(), answer[1].clone(), own.clone(), none, none.long() - 1)
    for number, start in enumerate(starts.values()):
        posterior, converged = fit(model, batch, start, elbo_scale, options, spread, generator)
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
