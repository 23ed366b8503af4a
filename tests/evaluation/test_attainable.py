"""What the data allow of a simulation: closed forms, nothing and all to see, calibration."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, write_pickle
from scipy.stats import norm

from cryodrgn_amort import host
from cryodrgn_amort.core import CHECKSUMS, InputError
from cryodrgn_amort.data import ParticleSource, load_particles
from cryodrgn_amort.evaluation import attainable, evaluate
from cryodrgn_amort.evaluation.attainable import TruePosterior
from cryodrgn_amort.measures import coordinate_r2
from cryodrgn_amort.options import EvalOptions, SimulateOptions
from cryodrgn_amort.plugins import Plugins
from cryodrgn_amort.report import evaluation_summary, write_evaluation
from cryodrgn_amort.runs import load_run, settings_from_flags
from cryodrgn_amort.simulation import load_imaging, simulate
from cryodrgn_amort.simulation.specimens import BlobModel, clean_images
from cryodrgn_amort.simulation.truth import load_truth
from cryodrgn_amort.training import Trainer

BOX = 16
NAMES = {"attainable_class", "attainable_r2", "attainable_fve"}


class Simulated:
    """A simulation's particles, their truth, and how their images were made."""

    def __init__(self, folder, stack="particles.mrcs", ntilts=None):
        self.folder = folder
        tables = (str(folder / f"{name}.pkl") for name in ("poses", "ctf"))
        source = ParticleSource(str(folder / stack), *tables, ntilts=ntilts, datadir=str(folder))
        self.particles = load_particles(source)
        self.truth = load_truth(str(folder), self.particles)
        self.imaging = load_imaging(str(folder), self.particles)
        self.rows = np.arange(self.particles.n)

    def exact(self, **changes):
        imaging = replace(self.imaging, **changes)
        return TruePosterior(self.particles, self.truth, imaging, self.rows)

    def right(self, **changes):
        found = self.exact(**changes).of(self.rows)
        return (found.classes.argmax(1) == self.truth.labels).astype(float)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return simulations; the same one for the same options."""
    known = {}

    def make(n=400, D=BOX, **options):
        key = str((n, D, options))
        if key not in known:
            folder = tmp_path_factory.mktemp("made") / "data"
            simulate(SimulateOptions(outdir=str(folder), n=n, D=D, **options))
            known[key] = Simulated(folder)
        return known[key]

    return make


@pytest.fixture(scope="module")
def two(made, tmp_path_factory):
    """Return simulations of two volumes that differ at low frequencies and at high ones."""
    folder, axis = tmp_path_factory.mktemp("two"), np.arange(BOX) - BOX // 2
    squares = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    more = 0.8 * np.exp(-squares / 8)
    for sign, places in ((2, ([6, 10], [8, 7], [9, 6])), (-2, ([8, 9], [10, 6], [7, 9]))):
        more[places] += sign
    one = BlobModel(BOX).volume(3, 0.5)
    paths = tuple(str(folder / f"{k}.mrc") for k in (0, 1))
    for path, volume in zip(paths, (one, one + more), strict=True):
        host.write_mrc(path, volume.astype(np.float32), is_vol=True, Apix=12.0)
    return lambda **options: made(D=None, volumes=paths, **options)


def differences(two):
    """Return the Fourier transforms of the two noise-free images of each particle, subtracted."""
    model, of = two.truth.model(), two.imaging
    zeros = np.zeros(len(of.rots))
    both = [
        clean_images(model, of.rots, of.trans_px, np.full(len(of.rots), k), zeros, of.ctf)
        for k in (0, 1)
    ]
    return np.fft.fft2((both[1] - both[0]).numpy())


def spectrum(colour):
    """Return the noise's power at the frequencies of ``fft2``, of mean 1."""
    k = np.fft.fftfreq(BOX)
    power = 1 / (1 + 36 * (k[:, None] ** 2 + k**2))
    return power / power.mean() if colour == "coloured" else np.ones((BOX, BOX))


SNR = {"white": 0.1, "coloured": 0.2}


@pytest.mark.parametrize("colour", ["white", "coloured"])
def test_of_two_classes_it_is_the_error_of_the_best_classifier(two, colour):
    """Phi(d / 2), d the distance of the noise-free images in standard deviations of the noise."""
    right, expected = [], []
    for seed in range(3):
        data = two(n=500, seed=seed, snr=SNR[colour], noise=colour)
        variance = (data.imaging.sigma * BOX) ** 2 * spectrum(colour)
        distance = np.sqrt((np.abs(differences(data)) ** 2 / variance).sum((1, 2)))
        expected.append(norm.cdf(distance / 2))
        right.append(data.right())
    right, expected = np.concatenate(right), np.concatenate(expected)
    assert 0.7 < expected.mean() < 0.95
    error = np.sqrt((expected * (1 - expected)).mean() / len(right))
    assert abs(right.mean() - expected.mean()) < 3 * error


def test_coloured_noise_that_is_taken_for_white_costs_what_theory_says(two):
    """By plain distances it is right with Phi(|x|^2 / (2 sqrt(x'Sx))), S the noise's covariance."""
    right, wrong, expected = [], [], []
    for seed in range(3):
        data = two(n=500, seed=seed, snr=SNR["coloured"], noise="coloured")
        squares = np.abs(differences(data)) ** 2
        spread = data.imaging.sigma * BOX * np.sqrt((squares * spectrum("coloured")).sum((1, 2)))
        expected.append(norm.cdf(squares.sum((1, 2)) / (2 * spread)))
        right.append(data.right())
        wrong.append(data.right(power=None))
    right, wrong, expected = map(np.concatenate, (right, wrong, expected))
    error = np.sqrt((expected * (1 - expected)).mean() / len(right))
    assert abs(wrong.mean() - expected.mean()) < 3 * error
    assert right.mean() - wrong.mean() > 5 * error


def test_it_is_the_posterior_by_plain_distances_at_many_coordinates(made):
    data = made(n=60, snr=0.3)
    own, rows, at = data.imaging, np.arange(12), (np.arange(200) + 0.5) / 200
    classes, count = 5, 5 * 200
    found = data.exact().of(rows)
    images, prior = data.particles.raw(torch.from_numpy(rows)), np.array(BlobModel.SHARES)
    for i in rows:
        tables = [np.repeat(table[[i]], count, 0) for table in (own.rots, own.trans_px, own.ctf)]
        labels = np.repeat(np.arange(classes), 200)
        clean = clean_images(BlobModel(BOX), *tables[:2], labels, np.tile(at, classes), tables[2])
        nats = -((images[i] - clean).double() ** 2).sum((1, 2)).numpy() / (2 * own.sigma**2)
        joint = np.exp(nats - nats.max()).reshape(classes, 200) * prior[:, None]
        joint /= joint.sum()
        np.testing.assert_allclose(found.classes[i], joint.sum(1), atol=5e-3)
        assert found.coordinate[i] == pytest.approx(joint.sum(0) @ at, abs=5e-3)


@pytest.mark.parametrize(
    "options",
    [{"snr": 0.3}, {"snr": 0.05}, {"snr": np.inf}, {"snr": 1.0, "hinge_deg": 180.0},
     {"snr": 0.3, "noise": "coloured"}],
)  # fmt: skip
def test_more_nodes_change_nothing(made, options):
    data = made(n=100, **options)
    exact = data.exact()
    few = exact.of(data.rows)
    exact.nodes = np.linspace(0, 1, 4 * len(exact.nodes) - 3)
    many = exact.of(data.rows)
    assert np.abs(few.classes - many.classes).mean() < 2e-3
    assert np.abs(few.coordinate - many.coordinate).mean() < 5e-3
    errors = [exact.volume_errors(data.truth, data.rows[:30], many.at(data.rows[:30]))]
    exact.nodes = exact.nodes[::4]
    errors.append(exact.volume_errors(data.truth, data.rows[:30], few.at(data.rows[:30])))
    spread = np.linalg.norm(data.truth.positions - data.truth.positions.mean(0)) ** 2 / 100
    assert np.abs(errors[0].mean() - errors[1].mean()) < 0.01 * spread * BOX**3


@pytest.mark.parametrize("options", [{"snr": 0.1}, {"snr": 0.1, "noise": "coloured"}])
def test_it_is_as_often_right_as_it_expects(made, options):
    data = made(n=600, **options)
    found = data.exact().of(data.rows)
    right = found.classes.argmax(1) == data.truth.labels
    surprise = found.classes.max(1) - right
    assert 0.3 < right.mean() < 0.97
    assert abs(surprise.mean()) < 3.5 * surprise.std() / np.sqrt(600)
    squares = (found.coordinate - data.truth.coordinate) ** 2 - found.variance
    assert abs(squares.mean()) < 3.5 * squares.std() / np.sqrt(600)


def test_without_noise_all_is_attainable(made):
    data = made(n=100, snr=np.inf)
    found = data.exact().of(data.rows)
    np.testing.assert_array_equal(found.classes.argmax(1), data.truth.labels)
    assert coordinate_r2(found.coordinate, data.truth.coordinate) > 0.998


def test_of_noise_alone_nothing_is_but_the_largest_class(made):
    data = made(n=400, snr=1e-6, shares=(0.1, 0.1, 0.5, 0.2, 0.1))
    found = data.exact().of(data.rows)
    np.testing.assert_allclose(found.classes.max(1), 0.5, atol=0.02)
    assert (found.classes.argmax(1) == 2).all()
    assert abs(coordinate_r2(found.coordinate, data.truth.coordinate)) < 0.02


def test_wrong_poses_in_the_folder_cost(made):
    data = made(n=400, snr=0.1)
    whole, moved = data.right(), data.right(trans_px=data.imaging.trans_px + np.float32(1))
    assert whole.mean() - moved.mean() > 0.05
    turned = data.right(rots=np.roll(data.imaging.rots, 1, 0))
    assert turned.mean() < moved.mean()


def test_images_of_a_tilt_series_add_up(tmp_path):
    folder = tmp_path / "tilted"
    simulate(SimulateOptions(outdir=str(folder), n=150, D=BOX, tilts=3, tilt_step_deg=20, snr=0.3))
    first, whole = (Simulated(folder, "particles.star", ntilts) for ntilts in (1, 3))
    scale = np.cos(np.deg2rad([0, 20, -20]))
    np.testing.assert_allclose(whole.imaging.ctf[:, 8], np.tile(scale, 150), rtol=1e-6)
    rows = np.array([3, 70])
    model, labels, at = whole.truth.model(), np.arange(5), np.full(5, 0.3)
    each = np.sum([whole.imaging.log_likelihood(model, whole.particles.raw(torch.from_numpy(
        3 * rows + k)), 3 * rows + k, labels, at) for k in range(3)], 0)  # fmt: skip
    nodes = np.array([0.3])
    np.testing.assert_allclose(whole.exact()._log_likelihood(rows, nodes)[:, :, 0], each)
    assert whole.right().mean() > first.right().mean()


def trained(folder, out, **more):
    plugins = Plugins(found={})
    tables = {name: str(folder / f"{name}.pkl") for name in ("poses", "ctf")}
    flags = {
        "particles": str(folder / "particles.mrcs"), **tables, "zdim": 4, "outdir": str(out),
        "num_epochs": 4, "do_analysis": False, "pdim": 32, "players": 1, "qdim": 32,
        "qlayers": 1, "seed": 0, "lr": 1e-3, **more,
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return load_run(out, plugins)


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    folder = made(n=300, snr=1.0).folder
    return trained(folder, tmp_path_factory.mktemp("runs") / "run", holdout="0.2")


def measured(run, **more):
    quick = {"bootstrap": 100, "volumes": 2, "labelled": 2, "truth_volumes": 60, "fit": 4}
    return evaluate(run, EvalOptions(**{**quick, "umap": False, "transforms": (), **more}))


@pytest.fixture(scope="module")
def evaluation(made, run):
    return measured(run, truth=str(made(n=300, snr=1.0).folder))


def test_no_method_is_better(evaluation):
    found = evaluation.measures
    for name, most in (
        ("class_knn", "attainable_class"),
        ("coordinate_r2", "attainable_r2"),
        ("volume_fve", "attainable_fve"),
        ("class_knn_held_out", "attainable_class"),
    ):
        own, limit = found[name], found[most]
        assert own.attainable == limit.value
        assert own.share is None or own.share == own.value / limit.value < 1
        assert own.value < limit.low <= limit.value <= limit.high
    assert found["attainable_class"].value > 0.9 > found["attainable_class"].null == 0.25
    assert found["attainable_fve"].n == 60
    assert found["attainable_r2"].n == 240
    fits = [m for fit in evaluation.fits for name, m in fit.measures.items() if "class" in name]
    assert fits
    assert all(m.attainable == found["attainable_class"].value for m in fits)


def test_a_report_shows_it_beside_what_is_reached(evaluation, tmp_path):
    own = evaluation.measures["class_knn"]
    page = write_evaluation(evaluation, tmp_path).read_text()
    percent = round(100 * own.share)
    assert f"{percent} % of the {own.attainable:.3g} that the data allow" in page
    facts = json.loads((tmp_path / "amortization.json").read_text())
    assert facts["measures"]["class_knn"]["share"] == pytest.approx(own.share)
    assert "attainable" not in facts["measures"]["kl"]
    assert facts["definitions"].keys() >= NAMES
    text = evaluation_summary(evaluation)
    assert "of attainable" in text
    assert f"{own.attainable:.3g} ({percent} %)" in text


def test_without_the_truth_there_is_none(made, run):
    folder = made(n=300, snr=1.0).folder
    known = {name: str(folder / f"{name}.pkl") for name in ("labels", "coordinate")}
    found = measured(run, fit=0, **known)
    assert not found.measures.keys() & NAMES
    assert all(m.attainable is None for m in found.measures.values())
    assert "of attainable" not in evaluation_summary(found)
    words = np.where(np.arange(240) % 2, "odd", "even")
    own = measured(
        run, fit=0, truth=str(folder), labels=words
    )  # of which the simulation knows nothing
    assert own.measures.keys() & NAMES == {"attainable_r2", "attainable_fve"}
    assert own.measures["class_knn"].attainable is None


@pytest.fixture
def copied(made, tmp_path):
    folder = tmp_path / "copy"
    original = made(n=300, snr=1.0).folder
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns(CHECKSUMS))
    return folder


def rewrite(folder, **changes):
    content = yaml.safe_load((folder / "simulation.yaml").read_text())
    (folder / "simulation.yaml").write_text(yaml.safe_dump({**content, **changes}))


def test_where_the_folder_contradicts_the_images_it_is_left_out(run, copied, caplog):
    """As the posterior is too sure of what is not so."""
    (copied / "particles.mrcs").unlink()  # the run names its own
    assert measured(run, fit=0, truth=str(copied)).measures.keys() >= NAMES
    rots, trans = read_pickles(copied / "poses.pkl")
    write_pickle(copied / "poses.pkl", (rots, trans + np.float32(3 / (BOX + 1))))
    caplog.clear()
    assert not measured(run, fit=0, truth=str(copied)).measures.keys() & NAMES
    [line] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert line.startswith(f"--truth {copied}: what the data allow is left out")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: rewrite(f, noise_sigma="much"), "simulation.yaml is damaged"),
        (lambda f: rewrite(f, noise_sigma=float("nan")), "simulation.yaml is damaged"),
        (lambda f: rewrite(f, settings={}), "simulation.yaml is damaged"),
        (lambda f: (f / "ctf.pkl").unlink(), "ctf.pkl: no such file"),
        (lambda f: write_pickle(f / "ctf.pkl", np.ones((7, 9))), "7 rows for 300 particles"),
        (lambda f: write_pickle(f / "poses.pkl", "poses"), "not poses"),
    ],
)
def test_folders_that_do_not_fit(damage, says, made, copied):
    damage(copied)
    with pytest.raises(InputError) as caught:
        load_imaging(str(copied), made(n=300, snr=1.0).particles)
    assert str(caught.value).startswith(f"--truth {copied}")
    assert says in str(caught.value)


def test_one_class_that_does_not_move_leaves_nothing_to_tell(made):
    data = made(n=30, classes=1, hinge_deg=0.0)
    exact = data.exact()
    np.testing.assert_array_equal(exact.nodes, [0.5])
    np.testing.assert_array_equal(exact.of(data.rows).classes, 1)


def test_it_takes_little_memory_at_a_time(made, monkeypatch):
    from cryodrgn_amort.simulation import imaging

    data = made(n=60, snr=0.3)
    whole = data.exact().of(data.rows)
    monkeypatch.setattr(attainable, "_AT_ONCE", 7)
    monkeypatch.setattr(imaging, "_PROJECTED", 1)
    some = data.exact().of(data.rows)
    np.testing.assert_allclose(some.classes, whole.classes, atol=1e-4)
    np.testing.assert_allclose(some.coordinate, whole.coordinate, atol=1e-4)
