"""Fitted posteriors against a linear model, whose posterior is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cryodrgn_amort.data import Batch
from cryodrgn_amort.inference import ElboScale, FitOptions, fit, infer
from cryodrgn_amort.inference.bounds import anchored, elbo, importance_bound, importance_ratios
from cryodrgn_amort.measures.importance import SAMPLES, khat_limit, tail_shapes

VARIANCE = 0.3
PATIENT = FitOptions(steps=4000, lr=0.1, window=200, tolerance=1e-4)


class Linear:
    """x = A z + noise: q(z | x) is a Gaussian, and so is x."""

    def __init__(self, matrix):
        self.matrix = matrix

    def errors(self, batch, z):
        each = (batch.y - z @ self.matrix.T).square().sum(1)
        return each.sum(), each.detach()

    def errors_at(self, batch, z):
        return torch.stack([self.errors(batch, latent)[1] for latent in z])

    def posterior(self, y):
        """Return mean and precision of the exact posterior."""
        precision = (
            torch.eye(self.matrix.shape[1]).double() + self.matrix.T @ self.matrix / VARIANCE
        )
        mean = torch.linalg.solve(precision, self.matrix.T @ y.T / VARIANCE).T
        return mean, precision

    def log_likelihood(self, y):
        """Return log p(x), without the constant that the ELBO leaves out."""
        pixels = len(self.matrix)
        cov = self.matrix @ self.matrix.T + VARIANCE * torch.eye(pixels).double()
        exact = torch.distributions.MultivariateNormal(torch.zeros(pixels).double(), cov)
        return exact.log_prob(y) + pixels / 2 * math.log(2 * math.pi * VARIANCE)


def _batch(y):
    n = len(y)
    return Batch(torch.arange(n), y, None, torch.zeros(n, 3, 3), None)


@pytest.fixture
def diagonal():
    """Return a model whose exact posterior is diagonal, and data of it."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(40, 3, generator=generator).double())
    model = Linear(basis * torch.tensor([2.0, 1.0, 0.5]).double())
    z = torch.randn(20, 3, generator=generator).double()
    noise = torch.randn(20, 40, generator=generator).double()
    return model, _batch(z @ model.matrix.T + VARIANCE**0.5 * noise)


def _started(n):
    return torch.zeros(n, 3).double(), torch.zeros(n, 3).double()


def test_fits_are_the_exact_posteriors(diagonal):
    model, batch = diagonal
    ruler = ElboScale.implied(VARIANCE)
    generator = torch.Generator().manual_seed(1)
    (mean, logvar), converged = fit(
        model, batch, _started(20), ruler, PATIENT, torch.ones(3).double(), generator
    )
    exact, precision = model.posterior(batch.y)
    assert converged.all()
    assert (mean - exact).abs().max() < 1e-3
    assert (logvar.exp().sqrt() - precision.diagonal().rsqrt()).abs().max() < 1e-3
    # the posterior is exact: every sample has the same weight, p(x)
    noise = torch.randn(100, 20, 3, generator=generator).double()
    bound = importance_bound(importance_ratios(model, batch, (mean, logvar), ruler, noise))
    assert (bound - model.log_likelihood(batch.y)).abs().max() < 1e-3


def test_the_bound_tightens_with_the_number_of_samples():
    generator = torch.Generator().manual_seed(2)
    model = Linear(torch.randn(10, 3, generator=generator).double())  # correlated posteriors
    batch = _batch(torch.randn(200, 3, generator=generator).double() @ model.matrix.T)
    mean, precision = model.posterior(batch.y)
    # the best of the Gaussians without correlation
    best = mean, -precision.diagonal().log().expand(200, -1)
    ruler = ElboScale.implied(VARIANCE)
    truth = model.log_likelihood(batch.y).mean()
    draws = torch.randn(2000, 200, 3, generator=generator).double()
    bounds = [elbo(model, batch, best, ruler, draws[:200]).mean()]
    ratios = importance_ratios(model, batch, best, ruler, draws)
    bounds += [importance_bound(ratios[:k]).mean() for k in (5, 50, 2000)]
    assert bounds == sorted(bounds)
    assert bounds[0] < truth - 0.05
    assert truth - 0.02 < bounds[-1] < truth + 0.005
    # what is lost is the divergence between the two Gaussians
    lost = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert abs(bounds[0] + lost - truth) < 0.02


@pytest.mark.parametrize(("width", "least", "most"), [(1.0, -1.0, 0.5), (0.35, 0.7, 2.0)])
def test_weights_tell_whether_a_posterior_is_too_narrow(width, least, most, diagonal):
    """Of a Gaussian narrower by a factor f than the true one, the tail's shape is 1 - f^2."""
    model, batch = diagonal
    mean, precision = model.posterior(batch.y)
    logvar = (-precision.diagonal().log() + 2 * math.log(width)).expand_as(mean)
    noise = torch.randn(SAMPLES, *mean.shape, generator=torch.Generator().manual_seed(3)).double()
    ruler = ElboScale.implied(VARIANCE)
    ratios = importance_ratios(model, batch, (mean, logvar), ruler, noise).numpy()
    khat, worth = tail_shapes(ratios)
    assert least < np.median(khat) < most
    assert 0.6 < khat_limit(SAMPLES) < 0.7
    assert ((khat > khat_limit(SAMPLES)).mean() > 0.8) == (width < 1)
    assert (worth.mean() > 0.99) == (width == 1)


def test_weights_that_are_no_numbers_have_no_shape():
    ratios = np.random.default_rng(0).standard_normal((SAMPLES, 3))
    ratios[3, 1] = np.nan
    ratios[:, 2] = 7.0  # all the same, and ones whose tail is
    khat, worth = tail_shapes(np.c_[ratios, np.r_[5.0, np.zeros(SAMPLES - 1)]])
    assert np.isnan(khat).tolist() == [False, True, False, True]
    assert (khat[2], worth[2]) == (0, 1)


def test_any_beta_weighs_the_divergence(diagonal):
    model, batch = diagonal
    ruler = ElboScale(beta=0.1)
    generator = torch.Generator().manual_seed(1)
    (mean, logvar), _ = fit(
        model, batch, _started(20), ruler, PATIENT, torch.ones(3).double(), generator
    )
    gain = model.matrix.square().sum(0)
    assert (mean - batch.y @ model.matrix / (gain + 0.05)).abs().max() < 1e-3
    assert ((0.5 * logvar).exp() - (0.05 / (gain + 0.05)).sqrt()).abs().max() < 2e-3


def test_the_encoders_answer_stays_where_no_fit_is_better(diagonal):
    model, batch = diagonal
    mean, precision = model.posterior(batch.y)
    exact = mean, -precision.diagonal().log().expand(20, -1)
    ruler = ElboScale.implied(VARIANCE)
    hasty = FitOptions(steps=5)
    spread = torch.ones(3).double()
    found, own = infer(model, batch, exact, {"prior": _started(20)}, ruler, hasty, spread, 0)
    assert torch.equal(found.mean, mean)
    assert (found.start == -1).all()
    assert torch.equal(found.elbo, own)
    assert not found.converged.any()
    poor = mean + 1, exact[1]
    found, own = infer(
        model, batch, poor, {"encoder": poor, "prior": _started(20)}, ruler, FitOptions(), spread, 0
    )
    assert (found.elbo > own).all()
    assert set(found.start.tolist()) <= {0, 1}
    assert found.converged.all()


def test_each_particle_is_fitted_by_itself(diagonal):
    model, batch = diagonal
    spoilt = _batch(batch.y.clone())
    spoilt.y[7] = torch.nan
    ruler, spread = ElboScale.implied(VARIANCE), torch.ones(3).double()
    others = torch.arange(20) != 7

    def fitted(some):
        return infer(model, some, None, {"prior": _started(20)}, ruler, FitOptions(), spread, 0)[0]

    whole, rest = fitted(batch), fitted(spoilt)
    assert torch.equal(whole.mean[others], rest.mean[others])
    assert torch.equal(whole.elbo[others], rest.elbo[others])
    assert rest.elbo[7].isnan()
    assert not rest.converged[7]
    assert torch.equal(rest.mean[7], torch.zeros(3).double())


def test_anchors_are_weighted_by_their_likelihood(diagonal):
    model, batch = diagonal
    anchors = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double()
    mean, least = anchored(model, batch, anchors, VARIANCE)
    errors = (batch.y[:, None] - anchors @ model.matrix.T).square().sum(2)
    weights = torch.softmax(-errors / (2 * VARIANCE), 1)
    assert torch.allclose(mean, weights @ anchors)
    assert torch.allclose(least, errors.amin(1))
