"""``simulate_amort --like``: particles as a run's, whose truth its decoder and latents are."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, forget, write_z
from cryodrgn_amort.data import Shells, load_particles
from cryodrgn_amort.models.synthetic import whole_ctf
from cryodrgn_amort.options import EvalOptions, SimulateOptions
from cryodrgn_amort.runs import load_run, settings_from_flags, source_of
from cryodrgn_amort.simulation import load_known, simulate
from cryodrgn_amort.training import Trainer


@pytest.fixture(scope="module")
def trained(stack, plugins, tmp_path_factory):
    """A table of 70 particles, of which some are held out."""
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf,
        "outdir": str(tmp_path_factory.mktemp("like") / "run"), "num_epochs": 2,
        "do_analysis": False, "seed": 3, "zdim": 3, "pdim": 16, "players": 1, "lr": 1e-3,
        "encoder": "vlt", "holdout": "0.2", "window": False,
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return flags["outdir"]


@pytest.fixture
def run(trained, plugins):
    return load_run(trained, plugins)


def like(run, outdir, **more):
    options = SimulateOptions(outdir=str(outdir), like=str(run.folder), **more)
    simulate(options, run.plugins)
    return outdir


def test_images_are_what_the_decoder_shows(run, tmp_path, plugins):
    """After the host's preprocessing, to rounding: CTF, shift, sign and scale are right."""
    folder = like(run, tmp_path / "twin", clean=True)
    truth, own = load_run(folder / "truth", plugins), run.particles()
    n = own.n
    assert n == 56
    z = torch.from_numpy(truth.z()[0])
    np.testing.assert_array_equal(read_pickles(folder / "poses.pkl")[0], own.rots.numpy())
    p = truth.particles()
    assert p.norm == pytest.approx(run.settings.norm)
    clean = host.ImageSource.from_file(str(folder / "clean.mrcs")).images(np.arange(n))
    rows = torch.arange(n)
    shown = run.load_decoder()[0].fast.images(own.rots, z[:, None])[:, 0]
    shown = shown * whole_ctf(own.half(own.ctf(rows), rows))
    inside = own.lattice.freqs2d[own.mask].abs().amax(1) < 0.5  # -0.5 and 0.5 are one pixel of it
    found = p.centred(rows, clean)
    torch.testing.assert_close(found[:, inside], shown[:, inside], atol=2e-5, rtol=1e-4)
    away = (z - torch.from_numpy(run.z()[0])) * torch.exp(-0.5 * torch.from_numpy(run.z()[1]))
    assert 0.8 < float(away.std()) < 1.2  # drawn from the posteriors


def test_noise_is_what_the_latents_leave(run, tmp_path, plugins):
    folder = like(run, tmp_path / "twin", clean=True)
    rows = torch.arange(56)
    noisy = host.ImageSource.from_file(str(folder / "particles.mrcs")).images(np.arange(56))
    clean = host.ImageSource.from_file(str(folder / "clean.mrcs")).images(np.arange(56))
    own = run.particles()
    shells = Shells(own)
    none = own.centred(rows, torch.zeros_like(clean))
    found = shells.power(own.centred(rows, noisy - clean) - none).mean(0)
    z = torch.from_numpy(run.z()[0])
    shown = run.load_decoder()[0].fast.images(own.rots, z[:, None])[:, 0]
    left = own.centred(rows) - shown * whole_ctf(own.half(own.ctf(rows), rows))
    wanted = shells.power(left).mean(0)
    torch.testing.assert_close(found, wanted, rtol=0.25, atol=0)
    stored = yaml.safe_load((folder / "simulation.yaml").read_text())
    np.testing.assert_allclose(stored["noise_spectrum"]["variance"], wanted, rtol=1e-3)
    assert stored["noise_sigma"] == pytest.approx(float((noisy - clean).std()), rel=0.1)


def test_its_truth_is_known_to_an_evaluation(run, tmp_path, train, flags, cli, plugins):
    folder = like(run, tmp_path / "twin", heldout=6)
    given = {
        **flags, "particles": str(folder / "particles.mrcs"), "poses": str(folder / "poses.pkl"),
        "ctf": str(folder / "ctf.pkl"), "holdout": str(folder / "ind_heldout.pkl"),
        "outdir": str(tmp_path / "found"),
    }  # fmt: skip
    train(given, encoder="vlt")
    found = load_run(tmp_path / "found", plugins)
    truth = load_known(EvalOptions(truth=str(folder)), found.particles(), plugins).truth
    chosen, z = read_pickles(folder / "ind_train.pkl"), read_pickles(folder / "truth/z.pkl")
    np.testing.assert_array_equal(truth.z, z[chosen])
    np.testing.assert_array_equal(truth.labels, read_pickles(folder / "labels.pkl")[chosen])
    wanted = run.volumes(z[chosen[:2]])
    np.testing.assert_allclose(list(truth.volumes(np.arange(2))), wanted, atol=1e-4)
    apart = np.linalg.norm(truth.positions - truth.positions[0], axis=1)
    volumes = run.volumes(z[chosen])
    of_volumes = np.linalg.norm((volumes - volumes[0]).reshape(len(chosen), -1), axis=1)
    assert np.corrcoef(apart[1:], of_volumes[1:])[0, 1] > 0.9
    code, _, err = cli("eval_amort", tmp_path / "found", "--truth", folder, "--fit", 0,
                       "--transform", "roll:1", "-o", tmp_path / "eval")  # fmt: skip
    assert code == 0, err
    measures = json.loads((tmp_path / "eval/amortization.json").read_text())["measures"]
    assert {"neighbourhood", "volume_fve", "class_knn"} <= measures.keys()
    assert "attainable_class" not in measures


def test_one_latent_for_all(run, tmp_path, plugins):
    folder = like(run, tmp_path / "null", homogeneous=True, clean=True)
    z = read_pickles(folder / "truth/z.pkl")
    np.testing.assert_allclose(z, np.tile(run.z()[0].mean(0), (56, 1)), atol=1e-5)
    assert not read_pickles(folder / "labels.pkl").any()
    assert sorted(p.name for p in (folder / "volumes").glob("*.mrc")) == ["class0.mrc", "mean.mrc"]
    known = load_known(EvalOptions(truth=str(folder)), load_run(
        folder / "truth", plugins).particles(), plugins)  # fmt: skip
    assert known.truth.positions.std(0).max() < 1e-4


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    a, b, c = (like(run, tmp_path / str(k), seed=k // 2) for k in range(3))
    for name in ("particles.mrcs", "labels.pkl", "truth/z.pkl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert (a / "particles.mrcs").read_bytes() != (c / "particles.mrcs").read_bytes()


def test_another_simulation_in_its_place_leaves_no_truth_behind(run, tmp_path):
    folder = like(run, tmp_path / "twin")
    simulate(SimulateOptions(outdir=str(folder), n=4, D=16, overwrite=True))
    assert not (folder / "truth").exists()


def test_without_the_hosts_inversion_images_are_the_negative(train, flags, tmp_path, plugins):
    train(flags, encoder="vlt", invert_data=False, ctf=None)
    run = load_run(flags["outdir"], plugins)
    folder = like(run, tmp_path / "twin", clean=True)
    assert not (folder / "ctf.pkl").exists()
    truth = load_run(folder / "truth", plugins)
    clean = host.ImageSource.from_file(str(folder / "clean.mrcs")).images(np.arange(70))
    p, z = truth.particles(), torch.from_numpy(truth.z()[0])
    shown = run.load_decoder()[0].fast.images(p.rots, z[:, None])[:, 0]
    found = p.centred(torch.arange(70), clean)
    assert torch.corrcoef(torch.stack([found.flatten(), shown.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"like": "nowhere"}, "--like nowhere: not a run folder"),
        ({"n": 60}, "-n 60 and --heldout 0: --like"),
        ({"heldout": 56}, "--heldout 56: --like"),
        ({"D": 32}, "-D: --like"),
        ({"snr": 0.1}, "--snr: --like"),
        ({"like": None, "homogeneous": True}, "--homogeneous: is for --like"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(run, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        simulate(SimulateOptions(**{"outdir": str(tmp_path / "twin"), "like": str(run.folder),
                                    **more}), run.plugins)  # fmt: skip
    assert not (tmp_path / "twin").exists()


def test_latents_of_other_particles_are_refused(run, tmp_path, plugins):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    run = load_run(copy, plugins)
    write_z(run.file("z"), *np.zeros((2, 5, 3)))
    forget(copy, run.file("z").name)
    with pytest.raises(InputError, match="has latents of 5 particles, its inputs hold 56"):
        like(run, tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_particles_are_opened_as_the_run_saw_them(run, tmp_path, plugins):
    """Its normalisation is the run's: a decoder explains its twin as it did its particles."""
    folder = like(run, tmp_path / "twin")
    truth = load_run(folder / "truth", plugins)
    assert truth.particles().norm == run.particles().norm
    again = load_particles(source_of(truth.settings))
    assert again.n == 56
