"""Every measure against its definition, computed naively, and at its null and its ideal."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cryodrgn_amort.measures import (
    Neighbours,
    aggregate_kl,
    bootstrap,
    class_knn,
    coordinate_r2,
    fsc,
    kl_by_dimension,
    kmeans_ari,
    knn_coordinate,
    knn_labels,
    knn_overlap,
    latent_correlation,
    latents as latent_measures,
    linear_cka,
    looked_up,
    measure,
    memorisation,
    neighbourhood,
    ratio_of_means,
    retrieval_rank,
    volume_change,
    volumes as truth,
)
from cryodrgn_amort.measures.bootstrap import measure_ratio
from cryodrgn_amort.measures.losses import gained_share, loss_fraction
from cryodrgn_amort.measures.transformed_copies import (
    displacement,
    displacement_sigma,
    label_agreement,
    pair_scale,
    random_pair_sigma,
)
from cryodrgn_amort.models import kl_divergence


def latents(n=300, zdim=4, seed=0):
    return (
        np.random.default_rng(seed).standard_normal((n, zdim)) * np.array([3, 1, 0.5, 0.1])[:zdim]
    )


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 700), seed=st.integers(0, 99), far=st.sampled_from([0.0, 0.3, 30.0]))
def test_retrieval_rank_is_the_fraction_of_others_that_are_nearer(n, seed, far):
    z = latents(n, seed=seed)
    moved = z + far * np.random.default_rng(seed + 1).standard_normal(z.shape)
    naive = []
    for i in range(n):
        distance = np.linalg.norm(z - moved[i], axis=1)
        naive.append((np.delete(distance, i) < distance[i]).sum() / (n - 1))
    np.testing.assert_allclose(retrieval_rank(z, moved), naive, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_retrieval_rank_of_some_among_many(offset):
    z = latents(9000) + offset  # more than one block in both directions
    rng = np.random.default_rng(1)
    moved = z + rng.exponential(0.3, (9000, 1)) * rng.standard_normal(z.shape)
    rows = np.sort(rng.permutation(9000)[:300])
    squares = [((z - moved[i]) ** 2).sum(1) for i in rows]
    naive = [(d < d[i]).sum() / 8999 for d, i in zip(squares, rows, strict=True)]
    np.testing.assert_allclose(retrieval_rank(z, moved, rows), naive, atol=1e-12)


def test_all_particles_are_looked_up_unless_there_are_too_many(monkeypatch):
    np.testing.assert_array_equal(looked_up(10_000), np.arange(10_000))
    monkeypatch.setattr(latent_measures, "MOST_QUERIES", 40)
    rows = looked_up(300)
    assert len(np.unique(rows)) == 40
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, looked_up(300))
    assert not np.array_equal(rows, looked_up(300, seed=1))
    z, other = latents(300), latents(300, seed=1)
    some = knn_overlap(z, other)
    monkeypatch.undo()
    np.testing.assert_array_equal(some, knn_overlap(z, other)[rows])


def test_nulls_and_ideals():
    z = latents(2000)
    shuffled = z[np.random.default_rng(5).permutation(len(z))]
    scale = pair_scale(z)
    assert retrieval_rank(z, z).max() == 0
    assert retrieval_rank(z, shuffled).mean() == pytest.approx(0.5, abs=0.02)
    assert displacement(z, z, scale).max() == 0
    assert np.median(displacement(z, shuffled, scale)) == pytest.approx(1, abs=0.06)
    assert latent_correlation(z, z) == pytest.approx(1)
    assert latent_correlation(z, -z) == pytest.approx(-1)
    assert latent_correlation(z, shuffled) == pytest.approx(0, abs=0.05)
    logvar = np.zeros_like(z)
    pairs = np.median(displacement_sigma(z, shuffled, logvar))
    assert random_pair_sigma(z, logvar) == pytest.approx(pairs, rel=0.06)


def test_a_collapsed_encoder_gets_the_null():
    same = np.full((1000, 4), 0.3)
    np.testing.assert_allclose(retrieval_rank(same, same), 0.5)


def test_latent_correlation_is_weighted_by_variance():
    z = latents(1000)
    moved = z.copy()
    moved[:, 3] = np.random.default_rng(0).standard_normal(1000)  # carries 0.1 % of the variance
    assert latent_correlation(z, moved) > 0.99
    moved = z.copy()
    moved[:, 0] *= -1
    weight = z.var(0) / z.var(0).sum()
    assert latent_correlation(z, moved) == pytest.approx(1 - 2 * weight[0])
    constant = np.c_[z, np.ones(1000)]
    assert latent_correlation(constant, constant) == pytest.approx(1)


def test_displacement_sigma_counts_posterior_standard_deviations():
    z = np.zeros((1, 3))
    moved = np.array([[0.2, 0.0, 0.0]])
    logvar = np.full((1, 3), 2 * np.log(0.1))
    np.testing.assert_allclose(displacement_sigma(z, moved, logvar), [2.0])


def test_class_and_coordinate_follow_the_latent():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    coordinate = rng.uniform(size=600)
    good = np.c_[10.0 * labels, coordinate] + 0.01 * rng.standard_normal((600, 2))
    bad = rng.standard_normal((600, 2))
    rows = np.arange(600)
    near, far = Neighbours(good, rows), Neighbours(bad, rows)
    assert class_knn(near.own, labels, rows).mean() == 1
    assert class_knn(far.own, labels, rows).mean() == pytest.approx(1 / 3, abs=0.08)
    r2 = coordinate_r2(knn_coordinate(near.own, coordinate), coordinate)
    assert r2 > 0.97
    r2 = coordinate_r2(knn_coordinate(far.own, coordinate), coordinate)
    assert r2 == pytest.approx(-0.05, abs=0.15)
    before, after = (knn_labels(found, labels) for found in (near.own, near.of(good)))
    assert label_agreement(before, after) == 1


def test_leave_one_out_leaves_the_particle_out():
    z = np.r_[np.zeros(16), 100 + np.arange(16) * 0.01][:, None]
    labels = np.r_[np.zeros(16, int), np.ones(16, int)]
    labels[0] = 1  # all of its 15 neighbours are of class 0
    rows = np.arange(32)
    right = class_knn(Neighbours(z, rows).own, labels, rows)
    assert right[0] == 0
    assert right[1:].all()


@pytest.mark.parametrize("n", [9, 400])
def test_neighbours_are_the_nearest_others_however_they_are_searched_for(n, monkeypatch):
    z, rows = latents(n), np.arange(0, n, 3)
    points = z[rows] + 0.1
    distances = np.linalg.norm(z[rows, None] - z, axis=2)
    distances[np.arange(len(rows)), rows] = np.inf
    others = distances.argsort(1)[:, :15][:, : n - 1]
    nearest = np.linalg.norm(points[:, None] - z, axis=2).argsort(1)[:, : min(15, n - 1)]
    for most_dimensions in (10, 0):  # a tree, all distances
        monkeypatch.setattr(latent_measures, "_MOST_DIMENSIONS", most_dimensions)
        near = Neighbours(z, rows)
        np.testing.assert_array_equal(near.own, others)
        np.testing.assert_array_equal(near.of(points), nearest)
        same = Neighbours(np.zeros((n, 2)), rows).own
        assert same.shape == others.shape
        assert (same != rows[:, None]).all()


def test_loss_fraction_and_volume_change():
    original, constant = np.full(9, 100.0), np.full(9, 120.0)
    assert loss_fraction(original, original, constant) == 0
    assert loss_fraction(constant, original, constant) == 1
    assert loss_fraction(np.full(9, 105.0), original, constant) == pytest.approx(0.25)
    assert volume_change(np.array([1.0, 2, 3]), np.array([4.0, 4, 5])) == 0.5


def test_fsc():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 16, 16, 16))
    np.testing.assert_allclose(fsc(a, 2 * a), 1)
    np.testing.assert_allclose(fsc(a, -a), -1)
    assert fsc(a, b).shape == (9,)
    assert np.abs(fsc(a, b)[4:]).max() < 0.25
    assert fsc(a, np.roll(a, 3, 0))[4:].max() < 0.5


def test_bootstrap_interval_has_the_right_width():
    values = np.random.default_rng(0).standard_normal(400)
    found = measure("mean", np.mean, values, null=0.0, ideal=None)
    assert found.low < found.value < found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.2)
    assert found.n == 400
    assert found == measure("mean", np.mean, values, null=0.0, ideal=None)


@pytest.mark.parametrize("kept", [1 << 26, 5000])
@pytest.mark.parametrize("n", [2, 501, 502])
def test_counting_the_draws_gives_the_interval_of_the_draws(n, kept, monkeypatch):
    monkeypatch.setattr(bootstrap, "_COUNTS_KEPT", kept)
    counts = Mock(wraps=bootstrap._counts)
    monkeypatch.setattr(bootstrap, "_counts", counts)
    a, b = (latents(n, seed=seed) + 5 for seed in (0, 1))
    b += a
    values = a[:, 1].astype(np.float32)
    cases = {
        np.mean: (values,),
        np.median: (values,),
        latent_correlation: (a, np.c_[b[:, :3], np.ones(n)]),
        linear_cka: (a, b[:, :2]),
    }
    assert cases.keys() == bootstrap._RESAMPLED.keys()
    for statistic, arrays in cases.items():
        fast = measure("", statistic, *arrays, null=None, ideal=None, rounds=60, seed=3)
        rng = np.random.default_rng(3)
        rounds = [rng.integers(n, size=n) for _ in range(60)]
        drawn = [statistic(*(array[rows] for array in arrays)) for rows in rounds]
        low, high = np.percentile(drawn, [2.5, 97.5])
        np.testing.assert_allclose((fast.low, fast.high), (low, high), rtol=3e-6)  # float32
        assert fast.value == float(statistic(*arrays))
    assert counts.call_count == len(cases)


def test_what_is_not_finite_shows_in_the_interval():
    values = np.r_[np.ones(50), np.nan]
    for statistic in (np.mean, np.median):
        found = measure("", statistic, values, null=None, ideal=None, rounds=20)
        assert np.isnan([found.value, found.low, found.high]).all()


def test_kl_by_dimension_adds_up_to_the_kl_of_training():
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, 50, 4))
    found = kl_by_dimension(mean, logvar)
    whole = kl_divergence(torch.from_numpy(mean), torch.from_numpy(logvar)).numpy()
    np.testing.assert_allclose(found.sum(1), whole, rtol=1e-12)
    assert found.shape == (50, 4)
    assert found.min() >= 0
    assert kl_by_dimension(np.zeros((1, 1)), np.zeros((1, 1))) == 0


def test_aggregate_kl_of_the_prior_is_zero():
    zeros = np.zeros((300, 3))
    np.testing.assert_allclose(aggregate_kl(zeros, zeros), 0, atol=1e-12)


def test_aggregate_kl_of_posteriors_far_apart_is_the_closed_form():
    mean = np.repeat([[50.0, 0.0], [-50.0, 0.3]], 100, axis=0)
    logvar = np.full_like(mean, -2.0)
    kl = kl_by_dimension(mean, logvar).sum(1).mean()
    found = aggregate_kl(mean, logvar)
    assert found.mean() == pytest.approx(kl - np.log(2), rel=1e-12)


def test_aggregate_kl_of_a_mixture_that_overlaps():
    at = np.linspace(-9, 9, 20001)
    normal = [np.exp(-0.5 * ((at - m) / s) ** 2) / s for m, s in ((-1, 0.5), (1, 0.8), (0, 1))]
    mixture, prior = (normal[0] + normal[1]) / 2, normal[2]
    exact = (mixture * np.log(mixture / prior)).sum() / mixture.sum()
    mean = np.repeat([[-1.0], [1.0]], 1000, axis=0)
    logvar = np.repeat([[2 * np.log(0.5)], [2 * np.log(0.8)]], 1000, axis=0)
    terms = aggregate_kl(mean, logvar)
    assert terms.mean() == pytest.approx(exact, abs=4 * terms.std() / np.sqrt(2000))
    assert terms.std() / np.sqrt(2000) < 0.02
    np.testing.assert_array_equal(terms, aggregate_kl(mean, logvar))
    assert len(aggregate_kl(np.tile(mean, (2, 1)), np.tile(logvar, (2, 1)))) == 2000


@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 300), seed=st.integers(0, 99))
def test_neighbourhood_is_the_overlap_of_nearest_neighbours(n, seed):
    z, truth = latents(n, seed=seed), latents(n, zdim=2, seed=seed + 1)
    rows = np.arange(0, n, 3)
    k = max(1, round(0.05 * n))
    naive = []
    for i in rows:
        sets = []
        for points in (z, truth):
            distance = np.linalg.norm(points - points[i], axis=1)
            distance[i] = np.inf
            sets.append(set(np.argsort(distance)[:k]))
        naive.append(len(sets[0] & sets[1]) / k)
    overlap, null = neighbourhood(z, truth, rows)
    np.testing.assert_allclose(overlap, naive, atol=1e-12)
    assert null == pytest.approx(k / (n - 1))


def test_neighbourhood_at_its_ideal_and_its_null():
    truth, rows = latents(800), np.arange(800)
    shuffled = truth[np.random.default_rng(5).permutation(800)]
    overlap, null = neighbourhood(truth, truth, rows)
    assert overlap.min() == 1
    assert null == pytest.approx(40 / 799)
    assert neighbourhood(shuffled, truth, rows)[0].mean() == pytest.approx(null, abs=0.01)
    collapsed = np.full_like(truth, 0.3)
    np.testing.assert_allclose(neighbourhood(collapsed, truth, rows)[0], null)


def test_neighbourhood_does_not_choose_among_equals():
    rng = np.random.default_rng(0)
    labels = np.sort(rng.choice(3, 400, p=(0.5, 0.3, 0.2)))
    truth, rows = np.eye(3)[labels], np.arange(400)
    z = 10.0 * truth + rng.standard_normal((400, 3))  # the order within a class is by chance
    overlap, null = neighbourhood(z, truth, rows)
    assert overlap.min() == 1
    counts = np.bincount(labels)
    assert null == pytest.approx((counts * (counts - 1)).sum() / (400 * 399))
    collapsed = neighbourhood(np.zeros((400, 2)), truth, rows)[0]
    np.testing.assert_allclose(collapsed, (counts[labels] - 1) / 399)


def test_of_collapsed_latents_displacement_and_loss_are_unknown():
    z = np.zeros((5, 2))
    assert np.isnan(displacement(z, z, pair_scale(z, 0))).all()
    assert np.isnan(loss_fraction(np.ones(5), np.ones(5), np.ones(5)))


def test_collapsed_runs_divide_by_nothing():
    """Warnings are errors here: a division by zero would be one."""
    rng = np.random.default_rng(0)
    same, z, values = np.full((40, 3), 0.5), rng.standard_normal((40, 3)), rng.random(40)
    none, opts = np.zeros(40), {"rounds": 5, "null": 0.0, "ideal": 1.0}
    for statistic, arrays in (
        (coordinate_r2, (values, none + 2)),
        (gained_share, (values, none)),
        (volume_change, (values, none)),
        (ratio_of_means, (values, none)),
        (loss_fraction, (values, none, none)),
        (memorisation, (none, values, none)),
        (truth.volume_fve, (values, none)),
    ):
        found = measure("", statistic, *arrays, **opts)
        assert all(np.isnan(v) for v in (found.value, found.low, found.high)), statistic
    assert np.isnan(measure_ratio("", values, none).value)
    assert np.isnan(displacement(same, same, pair_scale(same))).all()
    # agreement with latents that are all the same is that of chance
    for other in (z, same):
        assert knn_overlap(same, other) == pytest.approx(15 / 39)
        assert kmeans_ari(other, same, 4) == 0
    few = np.repeat(np.eye(3), [20, 15, 5], axis=0)  # fewer latents that differ than clusters
    assert kmeans_ari(few, few, 10) == 1


def test_a_bootstrap_that_draws_one_value_alone_divides_by_nothing():
    found = measure(
        "", coordinate_r2, np.array([0.1, 0.9]), np.array([0.0, 1.0]), null=0.0, ideal=1.0
    )
    assert found.value == pytest.approx(0.96)
