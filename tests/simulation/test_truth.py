"""Measures against a simulation's truth: decoders that know it, folders that do not fit."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, run_host, write_pickle
from scipy.spatial.distance import cdist

from cryodrgn_amort import host
from cryodrgn_amort.core import CHECKSUMS, InputError
from cryodrgn_amort.data import ParticleSource, load_particles
from cryodrgn_amort.evaluation import evaluate
from cryodrgn_amort.measures import fve_radius, volume_errors, volume_fve
from cryodrgn_amort.measures.volumes import fsc_area
from cryodrgn_amort.models import AmortVAE
from cryodrgn_amort.options import EvalOptions, SimulateOptions
from cryodrgn_amort.plugins import Plugins
from cryodrgn_amort.runs import load_run, settings_from_flags
from cryodrgn_amort.simulation import simulate, truth
from cryodrgn_amort.simulation.specimens import BlobModel
from cryodrgn_amort.simulation.truth import load_truth
from cryodrgn_amort.training import Trainer

BOX, N = 16, 90
IDEAL = 0.5 - 1 / BOX
QUICK = {
    "bootstrap": 3, "volumes": 2, "labelled": 2, "sample": 40, "truth_volumes": 25, "fit": 2,
}  # fmt: skip
ATTAINABLE = {"attainable_class", "attainable_r2", "attainable_fve"}
TRUTH = {"neighbourhood", "per_image_fsc", "volume_fve", *ATTAINABLE}
LEAKS = {f"nuisance_leak_{name}" for name in ("view", "inplane", "defocus", "shift")}
COVERAGE = {
    "calibration_p",
    "encoding_cost",
    "likelihood_rank",
    "made_up_distance",
    *(f"coverage_{level}" for level in (50, 80, 95)),
}
LATENTS = {"active_units", "kl", "aggregate_kl", "reconstruction", *LEAKS}


def files(folder):
    names = {name: str(folder / f"{name}.pkl") for name in ("poses", "ctf")}
    return {
        "particles": str(folder / "particles.mrcs"), "ind": str(folder / "ind_train.pkl"), **names
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "moving"
    simulate(SimulateOptions(outdir=str(folder), n=N, heldout=12, D=BOX))
    return folder


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """Three volumes of the user's, one class each; those are gone afterwards."""
    folder = tmp_path_factory.mktemp("still")
    model = BlobModel(BOX, 3)
    for k in range(3):
        path = str(folder / f"mine{k}.mrc")
        host.write_mrc(path, model.volume(k, 0.5), is_vol=True, Apix=3.0)
    mine = tuple(str(folder / f"mine{k}.mrc") for k in range(3))
    simulate(SimulateOptions(outdir=str(folder / "out"), n=60, volumes=mine))
    for path in mine:
        os.unlink(path)
    return folder / "out"


@pytest.fixture(scope="module")
def particles(data):
    return load_particles(ParticleSource(**files(data)))


def trained(data, folder, **more):
    plugins = Plugins(found={})
    flags = {
        **files(data), "zdim": 3, "outdir": str(folder), "num_epochs": 1, "do_analysis": False,
        "pdim": 16, "players": 1, "qdim": 16, "qlayers": 1, **more,
    }  # fmt: skip
    if more.get("encoder") == "vlt":
        flags = {name: value for name, value in flags.items() if name not in ("qdim", "qlayers")}
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return load_run(folder, plugins)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    run_host(
        "train_dec", data / "particles.mrcs", "--poses", data / "poses.pkl", "--ctf",
        data / "ctf.pkl", "--ind", data / "ind_train.pkl", "--zdim", "3", "-n", "1", "--dim", "16",
        "--layers", "1", "--no-analysis", "-o", out / "dec",
    )  # fmt: skip
    return SimpleNamespace(
        network=trained(data, out / "network"),
        table=trained(data, out / "table", encoder="vlt", seed=1),
        negative=trained(data, out / "negative", encoder="vlt", invert_data=False),
        dec=load_run(out / "dec", Plugins(found={})),
    )


def measured(run, **more):
    return evaluate(run, EvalOptions(**{**QUICK, "umap": False, "transforms": (), **more}))


def test_the_truth_is_that_of_the_selected_particles(data, particles):
    found = load_truth(str(data), particles)
    chosen = read_pickles(data / "ind_train.pkl")
    np.testing.assert_array_equal(found.labels, read_pickles(data / "labels.pkl")[chosen])
    np.testing.assert_array_equal(found.coordinate, read_pickles(data / "coordinate.pkl")[chosen])
    rows = np.array([3, 50])
    for volume, i in zip(found.volumes(rows), chosen[rows], strict=True):
        label, at = (read_pickles(data / f"{name}.pkl")[i] for name in ("labels", "coordinate"))
        np.testing.assert_array_equal(volume, BlobModel(BOX).volume(int(label), float(at)))


def test_true_volumes_have_the_scale_and_sign_of_decoded_ones(tmp_path):
    """What a decoder that explains noise-free images perfectly would be decoded to."""
    folder, box = tmp_path / "clean", 32
    poses = (np.tile(np.eye(3, dtype=np.float32), (4, 1, 1)), np.zeros((4, 2), np.float32))
    simulate(
        SimulateOptions(outdir=str(folder), n=4, D=box, snr=np.inf, use_ctf=False,
                        poses=write_pickle(tmp_path / "poses.pkl", poses))
    )  # fmt: skip
    p = load_particles(
        ParticleSource(str(folder / "particles.mrcs"), str(folder / "poses.pkl"), window=False)
    )
    offset, scale = p.norm
    seen = p.hartley(p.raw(torch.arange(4)))[:, :-1, :-1]
    for volume, image in zip(load_truth(str(folder), p).volumes(np.arange(4)), seen, strict=True):
        fourier = host.fftn_center(torch.from_numpy(volume))
        hartley = (fourier.real - fourier.imag - offset) / scale
        torch.testing.assert_close(hartley[box // 2], image, rtol=0, atol=1e-4)
        padded = torch.nn.functional.pad(hartley, (0, 1, 0, 1, 0, 1))
        decoded = host.volume_of(padded, p.norm).numpy()
        np.testing.assert_allclose(decoded, volume, atol=1e-4 * volume.max())


def test_errors_of_decoders_that_know_the_truth(data, particles):
    known, rows = load_truth(str(data), particles), np.arange(0, N, 3)

    def errors(decoded):
        return volume_errors(lambda: known.volumes(rows), decoded)

    perfect = errors(known.volumes(rows))
    assert volume_fve(perfect.errors, perfect.spreads) == 1
    np.testing.assert_allclose(perfect.areas, IDEAL)
    assert perfect.null_areas.max() < IDEAL
    mean = np.mean(list(known.volumes(rows)), axis=0)
    same = errors(mean for _ in rows)
    assert volume_fve(same.errors, same.spreads) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(same.areas, same.null_areas, rtol=1e-6)
    one = next(known.volumes(rows))
    wrong = errors(one for _ in rows)
    np.testing.assert_allclose(wrong.areas, wrong.null_areas, rtol=1e-6)
    assert volume_fve(wrong.errors, wrong.spreads) < 0
    halfway = errors((mean + volume) / 2 for volume in known.volumes(rows))
    assert volume_fve(halfway.errors, halfway.spreads) == pytest.approx(0.75, rel=1e-6)
    double = errors(2 * volume for volume in known.volumes(rows))
    assert volume_fve(double.errors, double.spreads) < -5  # the scale counts
    np.testing.assert_allclose(double.areas, IDEAL)  # but not for an FSC
    flipped = errors(-volume for volume in known.volumes(rows))
    assert volume_fve(flipped.errors, flipped.spreads) < -5
    assert flipped.areas.max() < 0


def test_the_explained_variance_is_that_of_low_frequencies(data, particles):
    known, rows = load_truth(str(data), particles), np.arange(6)
    axis = np.arange(BOX)
    for k, counts in ((fve_radius(BOX), True), (fve_radius(BOX) + 1, False)):
        wave = np.cos(2 * np.pi * k * axis / BOX) * np.ones((BOX, BOX, 1))
        waved = (volume + wave for volume in known.volumes(rows))
        found = volume_errors(lambda: known.volumes(rows), waved)
        expected = BOX**6 / 2 if counts else 0  # Parseval
        np.testing.assert_allclose(found.errors, expected, rtol=1e-4, atol=1e-3)
    assert [fve_radius(box) for box in (32, 64, 128)] == [9, 18, 36]


def test_fsc_area_is_cryobench_s():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, BOX, BOX, BOX))
    b += a
    axis = np.arange(-BOX // 2, BOX // 2)
    distance = np.sqrt(sum(np.meshgrid(axis**2, axis**2, axis**2)))
    fa, fb = (np.fft.fftshift(np.fft.fftn(v)) for v in (a, b))
    curve, before = [1.0], np.zeros((BOX, BOX, BOX), bool)
    for i in range(1, BOX // 2):
        upto = distance < i
        u, v = fa[upto & ~before], fb[upto & ~before]
        curve.append((np.vdot(u, v) / np.sqrt(np.vdot(u, u) * np.vdot(v, v))).real)
        before = upto
    area = (sum(curve) - (curve[0] + curve[-1]) / 2) / BOX  # trapezoids
    assert fsc_area(np.fft.fftn(a), np.fft.fftn(b)) == pytest.approx(area, rel=1e-10)
    assert 0.1 < area < IDEAL
    nothing = np.zeros((BOX, BOX, BOX))
    assert fsc_area(nothing, nothing) == pytest.approx(IDEAL)
    assert fsc_area(nothing, np.fft.fftn(a)) == pytest.approx(0.5 / BOX)


def test_positions_have_the_distances_of_the_volumes():
    rng = np.random.default_rng(0)
    labels, coordinate = rng.integers(0, 5, 60), rng.random(60)
    model = BlobModel(32)
    positions = truth._positions(model.volume, 5, labels, coordinate)
    assert positions.shape[1] < 100
    at = zip(labels, coordinate, strict=True)
    volumes = np.stack([model.volume(int(k), float(t)).ravel() for k, t in at])
    exact = cdist(volumes, volumes)
    np.testing.assert_allclose(cdist(positions, positions), exact, atol=2e-3 * exact.max())


def test_own_volumes_are_classes_without_motion(still):
    source = files(still)
    p = load_particles(ParticleSource(**source))
    known = load_truth(str(still), p)
    assert known.coordinate is None
    labels = read_pickles(still / "labels.pkl")[read_pickles(still / "ind_train.pkl")]
    np.testing.assert_array_equal(known.labels, labels)
    volume = next(known.volumes(np.array([7])))
    np.testing.assert_array_equal(volume, BlobModel(BOX, 3).volume(int(labels[7]), 0.5))
    apart = cdist(known.positions, known.positions) > 0
    np.testing.assert_array_equal(apart, labels[:, None] != labels)


def test_where_all_are_equal_there_is_nothing_to_explain(tmp_path):
    options = {"outdir": str(tmp_path / "one"), "n": 30, "D": BOX, "classes": 1, "hinge_deg": 0.0}
    simulate(SimulateOptions(**options))
    run = trained(tmp_path / "one", tmp_path / "run", encoder="vlt")
    found = measured(run, truth=str(tmp_path / "one"), volumes=2, truth_volumes=5).measures
    assert set(found) == LATENTS | {"class_knn", "neighbourhood", "per_image_fsc"}
    assert found["neighbourhood"].value == found["neighbourhood"].null == 1


@pytest.mark.parametrize("kind", ["table", "negative"])
def test_a_decoder_of_true_volumes_gets_the_ideals(kind, data, particles, runs, monkeypatch):
    run = getattr(runs, kind)
    z, known = run.z()[0], load_truth(str(data), particles)
    sign = -1 if kind == "negative" else 1  # what the run's images look like

    def decode(model, latents, norm):
        for latent in latents.numpy():
            [i] = np.flatnonzero((z == latent).all(1))
            yield torch.from_numpy(sign * next(known.volumes([i])))

    monkeypatch.setattr(AmortVAE, "decode_volumes", decode)
    found = measured(run, truth=str(data)).measures
    assert found["volume_fve"].value == pytest.approx(1)
    assert found["per_image_fsc"].value == pytest.approx(IDEAL)
    assert found["per_image_fsc"].ideal == pytest.approx(IDEAL)
    assert found["per_image_fsc"].null < IDEAL
    assert found["per_image_fsc"].n == QUICK["truth_volumes"]


def test_every_run_is_measured_on_the_same_particles(data, runs):
    rows = {}
    for kind in ("network", "table", "dec"):
        found = measured(getattr(runs, kind), truth=str(data))
        posterior = LATENTS if kind != "dec" else LATENTS - {"kl", "aggregate_kl"}
        more = {"noise_swap_signal", "noise_swap_noise", *COVERAGE} if kind == "network" else set()
        assert set(found.measures) == posterior | TRUTH | more | {"class_knn", "coordinate_r2"}
        assert set(found.arrays) == {"reconstruction", "neighbourhood", "per_image_fsc"}
        for name, values in found.arrays.items():
            assert values.shape == (N,)
            there = np.flatnonzero(np.isfinite(values))
            np.testing.assert_array_equal(there, rows.setdefault(name, there))
            assert values[there].mean() == pytest.approx(found.measures[name].value)
            assert found.measures[name].n == len(there)
        if kind == "dec":
            assert found.kl_per_dimension is None
        else:
            assert found.kl_per_dimension.shape == (3,)
            assert found.kl_per_dimension.sum() == pytest.approx(found.measures["kl"].value)
    assert [len(rows[name]) for name in ("reconstruction", "per_image_fsc")] == [40, 25]
    assert set(rows["per_image_fsc"]) < set(rows["reconstruction"])


@pytest.mark.parametrize("kind", ["network", "table", "dec"])
def test_reconstruction_is_the_loss_at_the_runs_own_latents(kind, runs):
    found = measured(getattr(runs, kind), transforms=("roll:1",), sample=1000)
    p = found.run.particles()
    model, _ = found.run.load(p)
    rows = torch.arange(N)
    y, ctf = p.centred(rows), p.ctf(rows)
    with torch.no_grad():
        for z, values in (
            (found.z, found.arrays["reconstruction"]),
            (np.tile(found.z.mean(0), (N, 1)), None),
        ):
            decoded = model(p.lattice.coords[p.mask] @ p.rots, torch.tensor(z)) * ctf
            losses = ((decoded - y).square().sum(1) / 2).numpy()
            if values is not None:
                np.testing.assert_allclose(values, losses, rtol=1e-5)
    assert found.measures["reconstruction"].null == pytest.approx(losses.mean(), rel=1e-5)


def test_the_command(data, runs, cli, tmp_path):
    from cryodrgn.dashboard.covariate_pkl import _parse_particle_covariate_raw

    argv = [runs.table.folder, "--no-umap", "--bootstrap", "3", "--labelled", "2", "-o", tmp_path]
    code, out, err = cli("eval_amort", *argv, "--truth", data, "--truth-volumes", "20")
    assert code == 0, err
    assert "volume_fve" in out
    facts = json.loads((tmp_path / "amortization.json").read_text())
    for name in TRUTH | LATENTS:
        assert facts["definitions"][name]["text"]
    assert facts["options"]["truth"] == str(data)
    assert facts["volume_fve_radius_voxels"] == 4
    assert sum(facts["kl_per_dimension"]) == pytest.approx(facts["measures"]["kl"]["value"])
    for name in ("reconstruction", "neighbourhood", "per_image_fsc"):
        path = tmp_path / f"{name}.pkl"
        values, kind = _parse_particle_covariate_raw(read_pickles(path), str(path))
        assert kind == "numeric"
        assert values.shape == (N,)
    code, _, err = cli("eval_amort", *argv)
    assert code == 0, err
    assert (tmp_path / "reconstruction.pkl").is_file()
    assert not (tmp_path / "per_image_fsc.pkl").exists()


def test_labels_that_are_given_win(data, runs, tmp_path):
    words = write_pickle(tmp_path / "words.pkl", np.where(np.arange(N) % 2, "odd", "even"))
    found = measured(runs.table, truth=str(data), labels=words)
    assert found.label_names == ("even", "odd")
    np.testing.assert_array_equal(found.labels, np.arange(N) % 2)
    chosen = read_pickles(data / "ind_train.pkl")
    np.testing.assert_array_equal(found.coordinate, read_pickles(data / "coordinate.pkl")[chosen])


def settings(folder, **changes):
    content = yaml.safe_load((folder / "simulation.yaml").read_text())
    content["settings"].update(changes)
    (folder / "simulation.yaml").write_text(yaml.safe_dump(content))


def table(folder, name, change):
    write_pickle(folder / f"{name}.pkl", change(read_pickles(folder / f"{name}.pkl")))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f), "not a folder of simulate_amort"),
        (lambda f: (f / "simulation.yaml").unlink(), "has no simulation.yaml"),
        (lambda f: (f / "simulation.yaml").write_text("a: [\nb"), "damaged"),
        (lambda f: (f / "simulation.yaml").write_text("!!python/name:os.system"), "damaged"),
        (lambda f: (f / "simulation.yaml").write_text("5"), "damaged"),
        (lambda f: settings(f, classes="many"), "damaged"),
        (lambda f: settings(f, classes=99), "damaged"),
        (lambda f: settings(f, volumes=3), "damaged"),
        (lambda f: settings(f, D=32), "of 32 px, but the run's particles have 16 px"),
        (lambda f: settings(f, hinge_deg=20), "class0_t0.00.mrc is not what simulation.yaml"),
        (lambda f: settings(f, volumes=["gone.mrc"] * 5), "class0.mrc: no such file"),
        (lambda f: (f / "labels.pkl").unlink(), "labels.pkl: no such file"),
        (lambda f: table(f, "labels", lambda v: v[:5]), "of 5 particles, the run's stack of 102"),
        (lambda f: table(f, "labels", lambda v: v + 1), "numbers from 0 to 4"),
        (lambda f: table(f, "labels", lambda v: v[:, None]), "a number per particle"),
        (lambda f: table(f, "labels", lambda v: v + 0.0), "labels.pkl does not hold integers"),
        (lambda f: table(f, "labels", lambda v: print), "not plain data"),
        (lambda f: table(f, "coordinate", lambda v: v * np.nan), "numbers from 0 to 1"),
        (lambda f: (f / "coordinate.pkl").unlink(), "coordinate.pkl: no such file"),
        (lambda f: table(f, "poses", lambda v: (v[0][::-1], v[1])), "of other particles"),
        (lambda f: table(f, "poses", lambda v: "poses"), "poses.pkl does not hold rotations"),
        (lambda f: table(f, "poses", lambda v: v[0][:7]), "of 7 images"),
        (lambda f: (f / "volumes/class0_t0.00.mrc").unlink(), "class0_t0.00.mrc"),
        (lambda f: (f / "volumes/class0_t0.00.mrc").write_bytes(b"x"), "class0_t0.00.mrc"),
    ],
)
def test_folders_that_do_not_fit(damage, says, data, particles, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns(CHECKSUMS))
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_truth(str(folder), particles)
    assert str(caught.value).startswith(f"--truth {folder}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["labels.pkl", "simulation.yaml", "volumes/class0_t0.00.mrc"])
def test_a_truth_that_was_changed_is_refused(name, data, particles, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(data, folder)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"--truth .*{name}: damaged: it is not what"):
        load_truth(str(folder), particles)


def test_a_truth_that_does_not_fit_is_one_line(runs, cli, tmp_path):
    code, out, err = cli("eval_amort", runs.table.folder, "--truth", tmp_path, "-o", tmp_path / "o")
    assert code == 2
    assert err.count("\n") == 1
    assert f"--truth {tmp_path}: not a folder of simulate_amort" in err
    assert not out
    assert not list(tmp_path.iterdir())
    code, _, err = cli("eval_amort", runs.table.folder, "--truth-volumes", "1")
    assert code == 2
    assert "--truth-volumes 1: must be at least 2" in err
