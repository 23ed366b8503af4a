"""What the data allow, from arrays: the posterior of class and coordinate, shares of it."""

import numpy as np
import pytest
from scipy.stats import norm

from cryodrgn_amort.measures import Measure, fve_voxels, structure_posterior, with_attainable
from cryodrgn_amort.measures.catalogue import ATTAINABLE, DEFINITIONS
from cryodrgn_amort.measures.tables import measure_facts, text_share
from cryodrgn_amort.measures.volumes import volume_errors

SHARES = np.array([3.0, 1.0])


def test_without_information_the_posterior_is_the_prior():
    for nodes in (1, 5, 9):
        found = structure_posterior(np.full((4, 2, nodes), -7.0), SHARES)
        np.testing.assert_allclose(found.classes, [[0.75, 0.25]] * 4)
        np.testing.assert_allclose(found.coordinate, 0.5)
        np.testing.assert_allclose(found.variance, 1 / 12 if nodes > 1 else 0, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found.weights.sum(2), found.classes)


def test_of_two_classes_it_is_bayes_rule():
    nats = np.array([[0.0, 1.0], [-1000.0, -1003.0]])[:, :, None]
    odds = 3 * np.exp([-1.0, 3.0])
    found = structure_posterior(nats, SHARES)
    np.testing.assert_allclose(found.classes[:, 0], odds / (1 + odds))
    none = structure_posterior(nats, np.array([0.0, 1.0]))
    np.testing.assert_array_equal(none.classes, [[0, 1]] * 2)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_of_a_coordinate_that_is_seen_in_noise_it_is_a_truncated_gaussian(sigma):
    """A parabola is its own spline, whatever the number of nodes."""
    seen = np.array([0.2, 0.55, 0.97])
    low, high = -seen / sigma, (1 - seen) / sigma
    mass, ends = norm.cdf(high) - norm.cdf(low), (norm.pdf(low), norm.pdf(high))
    mean = seen + sigma * (ends[0] - ends[1]) / mass
    spread = 1 + (low * ends[0] - high * ends[1]) / mass - ((ends[0] - ends[1]) / mass) ** 2
    for nodes in (5, 9):
        at = np.linspace(0, 1, nodes)
        nats = -((at - seen[:, None]) ** 2) / (2 * sigma**2)
        found = structure_posterior(np.stack([nats, nats - 1e4], 1), SHARES)
        np.testing.assert_allclose(found.coordinate, mean, atol=2e-4)
        np.testing.assert_allclose(found.variance, sigma**2 * spread, rtol=0.02)
        np.testing.assert_allclose(found.weights[:, 0] @ at, found.coordinate, rtol=1e-6)


def test_particles_are_put_together_and_picked():
    nats = np.random.default_rng(0).standard_normal((6, 2, 5))
    whole = structure_posterior(nats, SHARES)
    both = whole.joined([structure_posterior(part, SHARES) for part in (nats[:2], nats[2:])])
    for name, values in vars(whole).items():
        np.testing.assert_allclose(getattr(both, name), values)
        np.testing.assert_array_equal(getattr(whole.at(np.array([4, 1])), name), values[[4, 1]])


@pytest.mark.parametrize("box", [16, 18])
def test_distances_of_the_voxels_that_are_kept_are_those_of_all(box):
    a, b, c = np.random.default_rng(0).standard_normal((3, box, box, box))
    errors = volume_errors(lambda: [a, b], [c, c]).errors
    for volume, error in zip((a, b), errors, strict=True):
        own = np.linalg.norm(fve_voxels(volume) - fve_voxels(c)) ** 2
        assert own == pytest.approx(error, rel=1e-5)


def test_a_share_is_that_of_what_is_attainable():
    own = Measure("class_knn", 0.72, 0.7, 0.74, 0.2, 1.0, 50)
    most = Measure("attainable_class", 0.9, None, None, None, None, 50)
    assert own.share is None
    assert with_attainable({"class_knn": own}, {}) == {"class_knn": own}
    assert "share" not in measure_facts({"class_knn": own})["class_knn"]
    both = {m.name: m for m in (own, most)}
    found = with_attainable(both, both)
    assert found["attainable_class"] == most
    assert found["class_knn"].share == pytest.approx(0.8)
    assert text_share(found["class_knn"]) == "0.9 (80 %)"
    assert text_share(own) == ""
    facts = measure_facts(found)
    assert (facts["class_knn"]["attainable"], facts["class_knn"]["share"]) == (0.9, 0.72 / 0.9)
    nothing = Measure("attainable_class", 0.0, None, None, None, None, 50)
    none = with_attainable(both, {"attainable_class": nothing})["class_knn"]
    assert (none.share, text_share(none)) == (None, "0")
    worse = Measure("volume_fve", -2.0, None, None, 0.0, 1.0, 50, 0.9)
    assert (worse.share, text_share(worse)) == (None, "0.9")
    assert set(ATTAINABLE.values()) <= DEFINITIONS.keys()
