"""Runs as people have them: of every command of the host, few of their files, odd latents."""

import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, write_pickle

from cryodrgn_amort.core import InputError, read_weights, write_z
from cryodrgn_amort.inference import infer_run
from cryodrgn_amort.options import EvalOptions, InferOptions, TrainSettings
from cryodrgn_amort.runs import inherited, load_run
from cryodrgn_amort.runs.config import with_defaults
from cryodrgn_amort.simulation import load_known

ZDIM, WIDTH = 3, 16
EVAL = ("--transform", "roll:1", "--fit", "4", "--bootstrap", "10", "--no-umap", "--sample", "20")


@pytest.fixture(scope="module")
def lattice(stack):
    from cryodrgn.lattice import Lattice

    return Lattice(stack.box + 1, extent=0.5)


def dataset(stack):
    return {
        "particles": stack.particles, "ctf": stack.ctf, "ind": None, "invert_data": True,
        "datadir": None,
    }  # fmt: skip


def of_abinit(stack, folder):
    """Write a run as ``cryodrgn abinit`` of 4.3.1 does; returns its network, rotations, shifts."""
    from cryodrgn.models_ai import HyperVolume

    rng = torch.Generator().manual_seed(0)
    sizes = {
        "resolution": stack.box + 1, "z_dim": ZDIM, "n_layers": 2, "hidden_dim": WIDTH,
        "pe_type": "gaussian", "pe_dim": 8, "feat_sigma": 0.5, "domain": "hartley",
        "pe_type_conf": None,
    }  # fmt: skip
    network = HyperVolume(**sizes).eval()
    state = network.state_dict()
    folder.mkdir()
    torch.save(
        {
            "epoch": 3, "model_state_dict": {f"hypervolume.{k}": v for k, v in state.items()},
            "hypervolume_state_dict": state, "hypervolume_params": sizes,
            "optimizers_state_dict": {}, "output_mask_radius": stack.box // 2,
        },
        folder / "weights.3.pkl",
    )  # fmt: skip
    z = torch.randn(stack.n, ZDIM, generator=rng).numpy()
    write_pickle(folder / "z.3.pkl", z)  # latents alone
    shifts_px = (stack.trans * (stack.box + 1)).astype(np.float64)
    write_pickle(folder / "pose.3.pkl", (stack.rots, shifts_px))
    training = {
        "hypervolume_layers": 2, "hypervolume_dim": WIDTH, "window_radius_gt_real": 0.85,
        "zdim": ZDIM, "pe_type_conf": None, "explicit_volume": False,
    }  # fmt: skip
    config = {
        "dataset_args": dataset(stack), "training": training,
        "lattice_args": {"D": stack.box + 1, "extent": 0.5, "ignore_DC": True},
        "model_args": {"zdim": ZDIM, "use_conf_encoder": False, "pe_type": "gaussian", "pe_dim": 8,
                       "feat_sigma": 0.5, "domain": "hartley"},
        "data_norm_mean": 0.0, "data_norm_std": 17.0, "time": datetime(2026, 1, 1),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return network, shifts_px


def of_abinit_het(stack, folder, lattice):
    """Write a run as ``cryodrgn abinit_het_old`` does, whose checkpoints hold arrays."""
    from cryodrgn.models import HetOnlyVAE

    mask = lattice.get_circular_mask(stack.box // 2)
    model = HetOnlyVAE(lattice, 1, WIDTH, 1, WIDTH, int(mask.sum()), ZDIM, encode_mode="resid",
                       enc_mask=mask, enc_type="gaussian", enc_dim=8, domain="hartley",
                       feat_sigma=0.5)  # fmt: skip
    config = {
        "dataset_args": {**dataset(stack), "norm": [0.0, 17.0], "window": True, "window_r": 0.85,
                         "keepreal": False},
        "lattice_args": {"D": stack.box + 1, "extent": 0.5, "ignore_DC": True},
        "model_args": {"qlayers": 1, "qdim": WIDTH, "players": 1, "pdim": WIDTH, "zdim": ZDIM,
                       "encode_mode": "resid", "enc_mask": 8, "pe_type": "gaussian", "pe_dim": 8,
                       "feat_sigma": 0.5, "domain": "hartley", "activation": "relu"},
        "time": datetime(2026, 1, 1),
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(
        {
            "epoch": 2, "model_state_dict": model.state_dict(), "optimizer_state_dict": {},
            "search_pose": (stack.rots, stack.trans.astype(np.float64)), "configs": config,
        },
        folder / "weights.pkl",
    )  # fmt: skip
    with open(folder / "z.pkl", "wb") as handle:
        for part in (0, -4):
            rng = np.random.default_rng(part + 4)
            np.asarray(rng.standard_normal((stack.n, ZDIM)) + part, np.float32).dump(handle)
    write_pickle(folder / "pose.pkl", (stack.rots, stack.trans))
    return model


def batch_of(run):
    from cryodrgn_amort.data import BatchLoader

    particles = run.particles()
    return particles, BatchLoader(particles, None, memory=0).read(torch.arange(9))


def test_a_run_of_abinit_is_decoded_at_the_poses_that_it_found(stack, plugins, tmp_path, lattice):
    """As the host does: its network, at rotations and shifts in pixels, seen through the CTF."""
    network, shifts_px = of_abinit(stack, tmp_path / "run")
    run = load_run(tmp_path / "run", plugins)
    assert (run.origin.command, run.epoch, run.autodecoder) == ("abinit", 3, True)
    particles, batch = batch_of(run)
    np.testing.assert_allclose(particles.trans, shifts_px, rtol=1e-5)
    z = torch.from_numpy(run.z_mu[:9])
    own = run.load_decoder()[0].errors(batch, z)[1]
    mask = lattice.get_circular_mask(stack.box // 2)
    coords = lattice.coords[mask]
    rots = torch.from_numpy(stack.rots[:9])
    images = particles.hartley(particles.raw(torch.arange(9)))
    shifts = torch.from_numpy(shifts_px[:9]).float()[:, None]
    target = lattice.translate_ht(images.view(9, -1), shifts).view(9, -1)[:, mask]
    ctf = particles.ctf(torch.arange(9)).view(9, -1)
    with torch.no_grad():
        decoded = network(coords @ rots, z)
    ctf = ctf if ctf.shape[1] == decoded.shape[1] else ctf[:, mask]
    theirs = (decoded * ctf - target).square().sum(1)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=0)


def test_volumes_of_abinit_are_eval_vols(stack, plugins, tmp_path, lattice):
    """But for what the host leaves out of them: the z axis, and the edge of Fourier space."""
    from cryodrgn.models_ai import eval_volume_method

    network, _ = of_abinit(stack, tmp_path / "run")
    run = load_run(tmp_path / "run", plugins)
    z = run.z_mu[:1]
    own = run.volumes(z)[0]
    theirs = eval_volume_method(network, lattice, ZDIM, (0.0, 17.0), z[0], radius=stack.box // 2)
    spectra = [np.fft.fftshift(np.fft.fftn(np.fft.fftshift(v))) for v in (own, theirs.numpy())]
    at = np.indices(own.shape) - stack.box // 2
    inside = (np.square(at).sum(0) < 6**2) & (np.square(at[1:]).sum(0) > 0)
    a, b = (s[inside] for s in spectra)
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_a_run_of_abinit_het_is_decoded_at_the_poses_that_it_found(
    stack, plugins, tmp_path, lattice
):
    model = of_abinit_het(stack, tmp_path / "run", lattice)
    run = load_run(tmp_path / "run", plugins)
    assert (run.origin.command, run.epoch, run.encoder.name) == ("abinit_het", 2, "vlt")
    particles = run.particles()
    np.testing.assert_allclose(particles.trans, stack.trans * (stack.box + 1), rtol=1e-6)
    theirs = model.eval().decoder.eval_volume(
        lattice.coords, lattice.D, lattice.extent, (0.0, 17.0), run.z_mu[0]
    )
    np.testing.assert_allclose(run.volumes(run.z_mu[:1])[0], theirs, atol=1e-5)


def test_runs_that_find_poses_are_evaluated_compared_and_inferred(
    stack, cli, plugins, tmp_path, lattice
):
    of_abinit(stack, tmp_path / "ai")
    of_abinit_het(stack, tmp_path / "het", lattice)
    for name in ("ai", "het"):
        code, out, err = cli("eval_amort", tmp_path / name, *EVAL)
        assert code == 0, err
        assert "not applicable" in out
    code, out, err = cli("compare_amort", tmp_path / "ai", tmp_path / "het", "--bootstrap", "0")
    assert code == 0, err
    assert "knn_overlap" in out
    found = infer_run(load_run(tmp_path / "ai", plugins), InferOptions(steps=2), tmp_path / "new")
    assert np.isfinite(found.elbo).all()
    again = load_run(tmp_path / "new", plugins).particles()  # poses in fractions now
    np.testing.assert_allclose(again.trans, stack.trans * (stack.box + 1), rtol=1e-4, atol=1e-5)
    code, _, err = cli("train_amort", stack.particles, "--poses", stack.poses, "--zdim", ZDIM, "-n",
                       1, "-o", tmp_path / "vlt", "--encoder", "vlt", "--table-init",
                       tmp_path / "ai", "--table-freeze", "--dec-dim", 16,
                       "--no-analysis")  # fmt: skip
    assert code == 0, err
    start = read_pickles(tmp_path / "ai" / "z.3.pkl")
    np.testing.assert_allclose(read_pickles(tmp_path / "vlt" / "z.pkl", 2)[0], start)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_args": {"layers": 3, "dim": 16}}, "train_nn: it has one volume"),
        ({"model_args": {"qlayers": 3, "qdim": 16}}, "abinit_homo: it has one volume"),
        ({"training": {"zdim": 0}}, "abinit with --zdim 0: it has no latents"),
        ({"training": {"zdim": 3, "explicit_volume": True}}, "abinit with --explicit-volume"),
        ({"training": {"zdim": 3, "pe_type_conf": "geom"}}, "abinit with --pe-type-conf"),
        ({"model_args": {"size": 3}}, "damaged"),
    ],
)
def test_what_kind_of_run_cannot_be_read_is_said(changed, says, stack, plugins, tmp_path):
    of_abinit(stack, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = {**yaml.safe_load(path.read_text()), **changed}
    if "model_args" in changed:
        del config["data_norm_mean"]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=says):
        load_run(tmp_path / "run", plugins)


@pytest.fixture(scope="module")
def trained(stack, plugins, tmp_path_factory):
    """Return the folder of a run of train_amort's network, with one checkpoint of two epochs."""
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "zdim": ZDIM,
        "outdir": str(folder), "num_epochs": 2, "seed": 3, "do_analysis": False, "pdim": 16,
        "players": 1, "qdim": 16, "qlayers": 1, "lr": 1e-3, "checkpoint": 2, "holdout": "0.1",
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return folder


@pytest.fixture
def sent(trained, tmp_path):
    """Return a folder with what a colleague sends of that run."""
    folder = tmp_path / "sent"
    folder.mkdir()
    for name in ("config.yaml", "weights.pkl", "z.pkl"):
        shutil.copy(trained / name, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["amort"]  # of the host
    config["dataset_args"]["ind"] = str(trained / "ind_train.pkl")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_final_files_alone_are_a_run(sent, trained, cli, plugins, tmp_path):
    run, whole = load_run(sent, plugins), load_run(trained, plugins)
    assert (run.epoch, run.file("weights").name) == (2, "weights.pkl")
    np.testing.assert_array_equal(run.z_mu, whole.z_mu)
    np.testing.assert_array_equal(run.volumes(run.z_mu[:1]), whole.volumes(run.z_mu[:1]))
    with pytest.raises(InputError, match="does not have it; it has 2"):
        load_run(sent, plugins, epoch=1)
    code, _, err = cli("eval_amort", sent, *EVAL)
    assert code == 0, err
    assert (sent / "amort.2" / "report.html").is_file()
    code, _, err = cli("infer_amort", sent, "-o", tmp_path / "inferred", "--steps", "2")
    assert code == 0, err
    code, _, err = cli("compare_amort", sent, trained, tmp_path / "inferred", "--volumes", "2",
                         "--clusters", "2", "--bootstrap", "0")  # fmt: skip
    assert code == 0, err
    for more in (("--encoder", "vlt", "--table-init"), ("--encoder", "semi", "--from")):
        given = (
            ()
            if "--from" in more
            else (
                stack_of(run),
                "--poses",
                run.settings.poses,
                "--ind",
                run.settings.ind,
                "--zdim",
                ZDIM,
            )
        )
        code, _, err = cli("train_amort", *given, *more, sent, "-n", 1, "-o", tmp_path / more[1],
                           "--no-analysis", *(("--dec-dim", 16) if given else ()))  # fmt: skip
        assert code == 0, err


@pytest.mark.parametrize("fraction", [True, False])
def test_a_run_with_particles_held_out_is_read_without_its_lists_of_them(
    fraction, trained, stack, cli, plugins, tmp_path
):
    """Which they are follows from a fraction and the seed, or from the file that was given."""
    for name in ("config.yaml", "weights.pkl", "z.pkl"):
        shutil.copy(trained / name, tmp_path)
    if not fraction:
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        config["amort"]["settings"]["holdout"] = str(trained / "ind_heldout.pkl")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run, whole = load_run(tmp_path, plugins), load_run(trained, plugins)
    for own, theirs in ((run.particles(), whole.particles()), (run.held_out(), whole.held_out())):
        np.testing.assert_array_equal(own.ind, theirs.ind)
    assert run.index is None  # not the first of the stack
    assert whole.index is not None
    of_abinit(stack, tmp_path / "other")
    code, _, err = cli("compare_amort", tmp_path, tmp_path / "other")
    assert code == 2
    assert "which particles it has is not known" in err


def test_particles_held_out_are_not_trained_on_for_want_of_their_list(
    trained, stack, cli, tmp_path
):
    for name in ("config.yaml", "weights.pkl"):
        shutil.copy(trained / name, tmp_path)
    argv = ["train_amort", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim",
            ZDIM, "-n", 3, "--no-analysis", "--dec-dim", 16, "--dec-layers", 1, "--enc-dim", 16,
            "--enc-layers", 1, "--load", tmp_path / "weights.pkl", "-o"]  # fmt: skip
    code, _, err = cli(*argv, tmp_path / "a")
    assert code == 2
    assert "its run was trained with --holdout 0.1, and ind_heldout.pkl" in err
    code, _, err = cli(*argv, tmp_path / "b", "--holdout", trained / "ind_heldout.pkl")
    assert code == 0, err
    found = (read_pickles(folder / "ind_heldout.pkl") for folder in (trained, tmp_path / "b"))
    np.testing.assert_array_equal(*found)


def test_one_latent_is_too_few_to_learn_from(stack, plugins, tmp_path):
    given = {"particles": stack.particles, "outdir": str(tmp_path), "poses": stack.poses}
    had = TrainSettings(**with_defaults({**given, "zdim": ZDIM}))
    for encoder in ("sleep", "anchored"):
        with pytest.raises(InputError, match=f"--from run: has one latent.*--encoder {encoder}"):
            inherited({"from_run": "run", "encoder": encoder}, had, 1, plugins)


def stack_of(run):
    return run.settings.particles


def test_weights_of_a_data_parallel_model_are_read(sent, plugins):
    expected = load_run(sent, plugins).volumes(np.zeros((1, ZDIM), np.float32))
    checkpoint = read_weights(sent / "weights.pkl", "RUN")
    state = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {f"module.{k}": v for k, v in state.items()}
    torch.save(checkpoint, sent / "weights.pkl")
    found = load_run(sent, plugins).volumes(np.zeros((1, ZDIM), np.float32))
    np.testing.assert_array_equal(found, expected)


def test_a_config_of_cryodrgn_before_2_is_read(sent, plugins):
    config = yaml.safe_load((sent / "config.yaml").read_text())
    (sent / "config.yaml").unlink()
    del config["model_args"]["activation"]
    config["dataset_args"]["norm"] = [np.float32(v) for v in config["dataset_args"]["norm"]]
    write_pickle(sent / "config.pkl", {**config, "time": datetime(2020, 1, 1)})
    run = load_run(sent, plugins)
    assert run.settings.activation == "relu"
    assert run.particles().n == run.n


@pytest.fixture
def spoilt(sent):
    """Return that folder, with two latents that are no numbers."""
    mean, logvar = read_pickles(sent / "z.pkl", 2)
    mean[4], logvar[11, 1] = np.nan, np.inf
    with open(sent / "z.pkl", "wb") as handle:
        mean.dump(handle)
        logvar.dump(handle)
    return sent


def test_particles_without_a_finite_latent_are_left_out(spoilt, cli, plugins, tmp_path, caplog):
    run = load_run(spoilt, plugins)
    ind = read_pickles(run.settings.ind)
    kept = np.delete(np.arange(len(ind)), [4, 11])
    assert run.odd.tolist() == [4, 11]
    assert "2 particles whose latents are not finite (rows 4, 11 of its z.pkl" in caplog.text
    particles = run.particles()
    np.testing.assert_array_equal(particles.ind, ind[kept])
    np.testing.assert_array_equal(run.index, ind[kept])
    whole = run.particles(complete=True)
    np.testing.assert_array_equal(particles.rots, whole.rots[kept])
    np.testing.assert_array_equal(particles.trans, whole.trans[kept])
    np.testing.assert_array_equal(particles.ctf_params, whole.ctf_params[kept])
    at = torch.arange(len(kept))
    np.testing.assert_array_equal(particles.raw(at), whole.raw(torch.from_numpy(kept)))
    code, _, err = cli("eval_amort", spoilt, *EVAL)
    assert code == 0, err
    facts = json.loads((spoilt / "amort.2" / "amortization.json").read_text())
    assert facts["run"]["left_out"] == [4, 11]
    assert facts["run"]["n"] == len(kept)
    assert "rows 4, 11" in (spoilt / "amort.2" / "report.html").read_text()
    trust = read_pickles(spoilt / "amort.2" / "trust.pkl")  # for the dashboard, of all
    assert len(trust) == len(ind)
    assert np.isnan(trust[[4, 11]]).all()
    assert np.isfinite(trust[kept]).all()
    code, _, err = cli("compare_amort", spoilt, spoilt, "--volumes", "2", "--clusters", "2",
                         "--bootstrap", "0")  # fmt: skip
    assert code == 0, err


def test_what_is_known_may_be_of_all_particles_of_the_run(spoilt, plugins, tmp_path):
    run = load_run(spoilt, plugins)
    particles = run.particles()
    kept = np.delete(np.arange(run.n + 2), [4, 11])
    for n in (run.n, run.n + 2, particles.total):
        path = write_pickle(tmp_path / "co.pkl", np.arange(n, dtype=float))
        found = load_known(EvalOptions(coordinate=path), particles).coordinate
        expected = {run.n: np.arange(run.n), run.n + 2: kept, particles.total: particles.ind}[n]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("encoder", ["twin", "noise"])
def test_what_is_shown_by_position_needs_every_particle(encoder, train, flags, plugins, tmp_path):
    folder = train(flags, encoder=encoder, qdim=8).folder
    mean, logvar = read_pickles(folder / "z.2.pkl", 2)
    mean[3] = np.nan
    (folder / "checksums.sha256").unlink()
    write_z(folder / "z.2.pkl", mean, logvar)
    run = load_run(folder, plugins)
    with pytest.raises(InputError, match=r"row 3 of its z\.pkl.*infer_amort fits them anew"):
        run.load(run.particles())
    infer_run(run, InferOptions(steps=1), tmp_path / "new")
    new = load_run(tmp_path / "new", plugins)
    assert new.load(new.particles())[1] is None


def test_latents_that_are_not_finite_are_inferred_anew(spoilt, plugins, tmp_path):
    run = load_run(spoilt, plugins)
    found = infer_run(run, InferOptions(steps=2), tmp_path / "new")
    assert len(found.mean) == run.n + 2
    assert np.isfinite(found.mean).all()
    new = load_run(tmp_path / "new", plugins)
    assert new.n == run.n + 2
    assert not len(new.odd)


def test_a_table_starts_odd_particles_from_the_mean_of_the_others(spoilt, cli, plugins, tmp_path):
    run = load_run(spoilt, plugins)
    code, _, err = cli("train_amort", stack_of(run), "--poses", run.settings.poses, "--ind",
                       run.settings.ind, "--zdim", ZDIM, "--encoder", "vlt", "--table-init", spoilt,
                       "--table-freeze", "-n", 1, "-o", tmp_path / "vlt", "--no-analysis",
                       "--dec-dim", 16)  # fmt: skip
    assert code == 0, err
    mean, logvar = read_pickles(tmp_path / "vlt" / "z.pkl", 2)
    for row in (4, 11):
        np.testing.assert_allclose(mean[row], run.z_mu.mean(0), rtol=1e-4, atol=1e-6)
    assert np.isfinite(logvar).all()
    np.testing.assert_array_equal(np.delete(mean, [4, 11], 0), run.z_mu)


def test_a_run_without_any_finite_latent_is_refused(spoilt, plugins):
    mean, logvar = read_pickles(spoilt / "z.pkl", 2)
    with open(spoilt / "z.pkl", "wb") as handle:
        (mean * np.nan).dump(handle)
        logvar.dump(handle)
    with pytest.raises(InputError, match="no latent that is finite"):
        load_run(spoilt, plugins).z()
