"""Coverage of posteriors: exact ones, ones that are too sure, and the whole way from a run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryodrgn_amort.data import Batch
from cryodrgn_amort.evaluation import calibration
from cryodrgn_amort.evaluation.calibration import calibrate
from cryodrgn_amort.measures import (
    Measure,
    calibration as measures_of,
    calibration_measures,
)
from cryodrgn_amort.measures.bootstrap import measure_ratio, single
from cryodrgn_amort.measures.calibration import LEVELS, coverage, ecdf, ecdf_band
from cryodrgn_amort.measures.two_samples import energy_distance
from cryodrgn_amort.report import verdict as definitions


class Images:
    """Makes up latents, and images that are these and noise of variance 1/4."""

    def __init__(self, *args, **__):
        self.generator = torch.Generator().manual_seed(args[5])

    poses = 128
    noise = SimpleNamespace(shells=SimpleNamespace(power=torch.square))

    def draw_apart(self, batch, number):
        z = torch.randn(len(batch.index), 3, generator=self.generator)
        seen = z + 0.5 * torch.randn(z.shape, generator=self.generator)
        return SimpleNamespace(z=z, y=seen, index=batch.index)


class Model:
    """Has the true posteriors, or wider or narrower ones."""

    amort = fast = None

    def __init__(self, sureness=1.0):
        self.sureness = sureness

    def posterior(self, batch):
        if self.sureness == "prior":
            return torch.zeros_like(batch.y), torch.zeros_like(batch.y)
        logvar = torch.full_like(batch.y, np.log(0.2))
        return 0.8 * batch.y, logvar + 2 * np.log(self.sureness)

    def errors(self, batch, z):
        error = (batch.y - z).square().sum(1) / 0.25
        return error.sum(), error

    def errors_at(self, batch, z):
        return torch.stack([self.errors(batch, latent)[1] for latent in z])


class Particles:
    """Of what is made up, a share; the rest is noise."""

    def __init__(self, share):
        self.model, self.share = Model(), share
        self.particles = SimpleNamespace(n=1500)
        self.loader = SimpleNamespace(read=self.read)
        self.generator = torch.Generator().manual_seed(2)

    def answer(self, batch):
        return self.model.posterior(batch)

    def read(self, index):
        z = self.share * torch.randn(len(index), 3, generator=self.generator)
        return SimpleNamespace(
            y=z + 0.5 * torch.randn(z.shape, generator=self.generator), index=index
        )


@pytest.fixture
def calibrated(monkeypatch):
    """Calibrate a model next to particles that have a share of the signal."""

    def run(sureness=1.0, share=1.0, seed=0):
        monkeypatch.setattr(calibration, "SyntheticImages", Images)
        loader = SimpleNamespace(read=lambda index: Batch(index, None, None, None, None))
        monkeypatch.setattr(calibration, "BatchLoader", lambda *_, **__: loader)
        particles = SimpleNamespace(n=50, device=torch.device("cpu"))
        zeros = np.zeros((50, 3), np.float32)
        return calibrate(Model(sureness), particles, zeros, zeros, Particles(share), seed)

    return run


@pytest.mark.parametrize(("sureness", "sign"), [(1.0, 0), (0.5, -1), (2.0, 1)])
def test_coverage_is_that_of_the_posterior(sureness, sign, calibrated):
    """True posteriors of z ~ N(0, 1), seen with noise of variance 1/4; or wider, or narrower."""
    ranks = calibrated(sureness).ranks
    assert ranks.shape == (1024, 3)
    for level in LEVELS:
        found = coverage(ranks, level).mean() - level / 100
        assert abs(found) < 0.03 if sign == 0 else sign * found > 0.03
    if sign == 0:
        assert np.abs(np.histogram(ranks, 10, (0, 1))[0] / ranks.size - 0.1).max() < 0.02


def _measured(found):
    return {m.name: m for m in calibration_measures(found, {"rounds": 50, "seed": 0})}


def test_right_posteriors_are_called_wrong_in_one_of_twenty(calibrated, monkeypatch):
    monkeypatch.setattr(measures_of, "energy_distance", lambda name, *_: single(name, 0.0, 1))
    p = np.array([_measured(calibrated(seed=seed))["calibration_p"].value for seed in range(100)])
    assert (p < 0.05).sum() <= 10  # 99 % of what chance makes of 5 %
    assert (p < 0.5).sum() >= 20


def test_bands_tell_posteriors_that_are_too_narrow_and_ones_that_are_the_prior(calibrated):
    right, narrow, prior = (_measured(calibrated(s)) for s in (1.0, 0.7, "prior"))
    assert right["calibration_p"].value > 0.05
    assert narrow["calibration_p"].value < 0.01
    assert prior["calibration_p"].value < 0.01
    # of the prior, only what it explains of the image is wrong
    assert abs(prior["coverage_80"].value - 0.8) < 0.03
    assert prior["likelihood_rank"].value > 0.8
    assert right["likelihood_rank"].low < 0.5 < right["likelihood_rank"].high


def test_bands_hold_what_is_uniform():
    rng = np.random.default_rng(1)
    low, high = ecdf_band(300)
    shares = [ecdf(rng.uniform(size=300))[1] for _ in range(400)]
    inside = np.mean([((low <= s) & (s <= high)).all() for s in shares])
    assert 0.92 < inside < 0.98


def test_images_made_up_are_told_from_other_particles(calibrated):
    alike, less = (_measured(calibrated(share=s))["made_up_distance"] for s in (1.0, 0.5))
    assert alike.value < alike.null
    assert less.value > 2 * less.null


def test_alike_samples_are_told_apart_in_one_of_twenty():
    rng = np.random.default_rng(0)
    found = [energy_distance("made_up_distance", *rng.exponential(size=(2, 60, 5)), seed=k)
             for k in range(100)]  # fmt: skip
    assert 1 <= sum(m.value > m.null for m in found) <= 11
    powers = rng.exponential(size=(2, 60, 5))
    apart = energy_distance("made_up_distance", powers[0], powers[1] * np.arange(1, 6) ** 0.5)
    assert apart.value > apart.null


def test_particles_gain_what_they_have_of_what_the_decoder_shows(calibrated):
    """The latents' gain over 0 is (y^2 - (0.2 y)^2) / 2 / 0.25 per dimension: 0.96 E[y^2] / 0.5."""
    opts = {"rounds": 200, "seed": 0}
    for share in (1.0, 0.5):
        found = calibrated(share=share)
        assert found.gains.mean() == pytest.approx(3 * 0.96 * 1.25 / 0.5, rel=0.06)
        ratio = {m.name: m for m in calibration_measures(found, opts)}["gain_ratio"]
        wanted = (share**2 + 0.25) / 1.25
        assert ratio.low < wanted < ratio.high
        assert ratio.high - ratio.low < 0.2
        assert ratio.null == 0


def test_an_image_that_is_no_number_has_no_gain(calibrated, monkeypatch):
    read = Particles.read

    def spoilt(self, index):
        batch = read(self, index)
        batch.y[0] = torch.nan
        return batch

    monkeypatch.setattr(Particles, "read", spoilt)
    found = calibrated()
    assert np.isnan(found.particle_gains).sum() == 8  # one in each batch
    ratio = calibration_measures(found, {"rounds": 100, "seed": 0})[-1]
    assert 0.9 < ratio.value < 1.1


def test_a_held_out_image_that_is_no_number_spoils_no_measure(train, flags, plugins, tmp_path):
    """Its answer is the mean of all latents, and so are its neighbours'."""
    from cryodrgn.mrcfile import write_mrc
    from helpers import write_pickle, write_stack

    from cryodrgn_amort.evaluation import evaluate
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import load_run

    stack = write_stack(tmp_path / "in", 70)
    labels = write_pickle(tmp_path / "labels.pkl", np.arange(70) % 3)
    held = np.arange(8)
    files = {"particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf}
    train({**flags, **files}, qdim=8, holdout=write_pickle(tmp_path / "held.pkl", held))
    images = stack.images.copy()
    images[2, 3, 3] = np.nan
    write_mrc(stack.particles, images)
    options = EvalOptions(
        transforms=(), umap=False, volumes=2, labelled=2, fit=2, bootstrap=5, labels=labels
    )
    measures = evaluate(load_run(tmp_path / "run", plugins), options).measures
    assert np.isfinite(measures["class_knn_held_out"].value)
    assert measures["class_knn_held_out"].n == 8


def test_samples_are_resampled_each_for_itself():
    """The relative standard error of a ratio is that of both means together."""
    rng = np.random.default_rng(0)
    values, reference = rng.normal(10, 2, 400), rng.normal(5, 1, 1000)
    found = measure_ratio("x", values, reference, rounds=2000)
    assert found.value == values.mean() / reference.mean()
    error = found.value * np.hypot(0.2 / np.sqrt(400), 0.2 / np.sqrt(1000))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    alone = measure_ratio("x", values, reference, rounds=0)
    assert (alone.low, alone.high) == (None, None)


def test_a_particle_that_cannot_be_explained_is_left_out(calibrated):
    found = calibrated()
    spoilt = replace(found, particle_gains=np.append(found.particle_gains, np.nan))
    measures = [calibration_measures(f, {"rounds": 0, "seed": 0})[-1] for f in (found, spoilt)]
    assert measures[0].value == pytest.approx(measures[1].value, rel=1e-5)


@pytest.mark.parametrize(
    ("interval", "says"),
    [((0.3, 0.9), "gain less"), ((0.9, 0.97), ""), ((1.0, 1.3), ""), ((1.1, 1.5), "gain more")],
)
def test_a_report_warns_of_decoders_that_are_not_like_the_particles(interval, says):
    low, high = interval
    ratio = Measure("gain_ratio", (low + high) / 2, low, high, 0.0, 1.0, 400)
    evaluation = SimpleNamespace(
        measures={"gain_ratio": ratio}, z=np.zeros((200, 2)), applicable=True, results=[],
        reason="", volumes=np.ones((2, 4, 4, 4)), calibration=None,
    )  # fmt: skip
    for applicable in (True, False):
        evaluation.applicable = applicable
        found = " ".join(definitions.verdict(evaluation).cautions)
        assert (says in found) if says else not found


def test_intervals_are_central():
    ranks = np.array([[0.26, 0.74], [0.24, 0.5], [0.02, 0.98]])
    assert coverage(ranks, 50).tolist() == [1.0, 0.5, 0.0]
    assert coverage(ranks, 95).tolist() == [1.0, 1.0, 0.0]


def test_an_evaluation_measures_it(train, flags, plugins, tmp_path):
    import json

    from cryodrgn_amort.evaluation import evaluate
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.report import write_evaluation
    from cryodrgn_amort.runs import load_run

    options = EvalOptions(transforms=(), umap=False, volumes=2, labelled=2, fit=2, bootstrap=10)
    train(flags, qdim=16)
    found = evaluate(load_run(tmp_path / "run", plugins), options)
    for level in LEVELS:
        measure = found.measures[f"coverage_{level}"]
        assert isinstance(measure, Measure)
        assert 0 <= measure.value <= 1
        assert measure.ideal == level / 100
    write_evaluation(found, tmp_path / "report")
    facts = json.loads((tmp_path / "report/amortization.json").read_text())
    counts = {name: sum(column) for name, column in facts["calibration_ranks"].items()}
    assert counts == {**{f"latent {i}": 1024 for i in range(3)}, "distance": 256, "likelihood": 256}
    named = {"calibration_p", "likelihood_rank", "made_up_distance"}
    assert named <= found.measures.keys()
    assert (tmp_path / "report/calibration.png").is_file()
    train(flags, encoder="twin", qdim=16, overwrite=True)
    found = evaluate(load_run(tmp_path / "run", plugins), options)
    assert "coverage_50" not in found.measures  # it is shown something else
