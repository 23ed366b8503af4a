"""Tilt series: several images of a particle, one latent. The host's ``train_vae`` is the oracle."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, run_host, write_pickle

from cryodrgn_amort.core import ProcessGroup
from cryodrgn_amort.data import (
    BatchLoader,
    EncoderInput,
    Noise,
    ParticleSource,
    Twin,
    load_particles,
)

TILTS, N = 5, 44
NETWORK = ["--enc-dim", "24", "--enc-layers", "2", "--tdim", "24", "--t-emb-dim", "8"]


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation import simulate

    folder = tmp_path_factory.mktemp("tilts") / "sim"
    simulate(SimulateOptions(str(folder), n=40, heldout=4, D=16, tilts=TILTS, seed=1))
    return folder


def flags(sim, out, *more, ntilts=TILTS):
    return [
        sim / "particles.star", "--encode-mode", "tilt", "--ntilts", str(ntilts),
        "--poses", sim / "poses.pkl", "--ctf", sim / "ctf.pkl", "--zdim", "3", "-n", "2",
        "--seed", "11", "--dec-dim", "24", "--dec-layers", "2", "--lr", "1e-3", "--no-analysis",
        "-o", out, *more,
    ]  # fmt: skip


def opened(sim, **more):
    given = {"ntilts": 3, **more}
    return load_particles(
        ParticleSource(
            str(sim / "particles.star"), str(sim / "poses.pkl"), str(sim / "ctf.pkl"), **given
        )
    )


def weights(folder, name="weights.pkl"):
    return torch.load(folder / name, weights_only=False)["model_state_dict"]


@pytest.mark.parametrize(
    ("ntilts", "more"),
    [
        (TILTS, []),
        (3, ["--random-tilts", "--dose-per-tilt", "3", "--angle-per-tilt", "3"]),
        (4, ["--lazy", "--ind", "IND", "--dose-per-tilt", "9", "--domain", "hartley"]),
    ],
    ids=["plain", "random-dose", "lazy-ind-dose"],
)
def test_the_network_equals_train_vae(ntilts, more, sim, tmp_path, cli):
    ind = write_pickle(tmp_path / "ind.pkl", np.random.default_rng(1).permutation(N)[:31])
    more = [{"IND": ind}.get(word, word) for word in (*more, *NETWORK)]
    run_host("train_vae", *flags(sim, tmp_path / "host", *more, ntilts=ntilts))
    code, _, err = cli("train_amort", *flags(sim, tmp_path / "ours", *more, ntilts=ntilts))
    assert code == 0, err
    host, ours = weights(tmp_path / "host"), weights(tmp_path / "ours")
    assert list(host) == list(ours)
    for name in host:
        assert (ours[name] - host[name]).norm() <= 1e-4 * host[name].norm(), name
    # z.2.pkl: for z.pkl the host encodes once more, and draws other tilts
    z, expected = (read_pickles(tmp_path / run / "z.2.pkl", 2) for run in ("ours", "host"))
    assert len(z[0]) == (31 if "--ind" in more else N)
    for own, other in zip(z, expected, strict=True):
        assert np.linalg.norm(own - other) <= 1e-4 * np.linalg.norm(other)


def test_rows_count_particles(sim, tmp_path, cli):
    code, _, err = cli(
        "train_amort",
        *flags(sim, tmp_path / "vlt", "--encoder", "vlt", "--holdout", sim / "ind_heldout.pkl"),
    )
    assert code == 0, err
    mean, logvar = read_pickles(tmp_path / "vlt/z.pkl", 2)
    assert mean.shape == logvar.shape == (40, 3)
    with open(tmp_path / "vlt/metrics.csv") as handle:
        last = list(csv.DictReader(handle))[-1]
    assert float(last["table_moved"]) > 0
    assert read_pickles(tmp_path / "vlt/ind_heldout.pkl").tolist() == (
        read_pickles(sim / "ind_heldout.pkl").tolist()
    )
    # the host opens it, and its filter and dashboard count particles
    config = yaml.safe_load((tmp_path / "vlt/config.yaml").read_text())
    assert config["model_args"]["encode_mode"] == "tilt"
    run_host("eval_vol", tmp_path / "vlt/weights.pkl", "-c", tmp_path / "vlt/config.yaml",
             "-z", "0", "0", "0", "-o", tmp_path / "vol.mrc")  # fmt: skip
    run_host("analyze", tmp_path / "vlt", "2", "--skip-umap", "--pc", "1", "--ksample", "3")


def test_a_particles_error_is_the_sum_over_its_images(sim):
    from cryodrgn_amort.models import build_model

    particles = opened(sim, ntilts=4)
    args = {
        "qlayers": 1, "qdim": 8, "players": 1, "pdim": 16, "zdim": 2, "encode_mode": "tilt",
        "enc_mask": 8, "pe_type": "gaussian", "pe_dim": None, "feat_sigma": 0.5,
        "domain": "fourier", "activation": "relu",
        "tilt_params": {"t_emb_dim": 4, "ntilts": 4, "tlayers": 1, "tdim": 8},
    }  # fmt: skip
    model = build_model(args, particles.lattice, None)
    index = torch.tensor([7, 2, 30])
    batch = BatchLoader(particles, EncoderInput(), memory=0).read(index)
    assert batch.tilts == 4
    z = torch.randn(3, 2)
    _, each = model.errors(batch, z)
    _, images = model.fast.squared_errors(batch.rot, batch.y, batch.ctf, z.repeat_interleave(4, 0))
    torch.testing.assert_close(each, images.view(3, 4).sum(1))
    some = batch.of(torch.tensor([2, 0]))
    torch.testing.assert_close(model.errors(some, z[[2, 0]])[1], each[[2, 0]])
    assert len(model.posterior(some)[0]) == 2


@pytest.mark.parametrize("shown", [EncoderInput(), Twin(N, 3), Noise(16, 0.0, 1.0, 3)])
@pytest.mark.parametrize("random", [False, True])
def test_every_way_to_keep_images_gives_the_same_batches(shown, random, sim):
    """In memory, from the stack, and shared by two processes."""

    def batches(memory, processes=None):
        loader = BatchLoader(
            opened(sim, random_tilts=random), shown, memory=memory, processes=processes
        )
        torch.manual_seed(5)
        rng = np.random.RandomState(5) if random else None
        return list(loader.batches(16, shuffle=True, rng=rng))

    whole = batches(int(1e9))
    assert [len(b.index) for b in whole] == [16, 16, 12]  # the last one is not whole
    assert sorted(torch.cat([b.index for b in whole]).tolist()) == list(range(N))
    for ours, lazy in zip(whole, batches(0), strict=True):
        assert ours.y.shape[0] == 3 * len(ours.index)
        for name in ("index", "y", "image", "rot", "ctf"):
            torch.testing.assert_close(getattr(ours, name), getattr(lazy, name))
    for ours, *shares in zip(
        whole, *(batches(int(1e9), ProcessGroup(r, 2)) for r in (0, 1)), strict=True
    ):
        for share in shares:
            expected = ours.of(share.share.places)
            for name in ("index", "y", "image", "rot", "ctf"):
                torch.testing.assert_close(getattr(share, name), getattr(expected, name))


def test_twins_and_noise_are_of_particles(sim):
    particles = opened(sim)
    twin = Twin(N, 3)
    plain = BatchLoader(particles, EncoderInput(), memory=0)
    index = torch.arange(6)
    shown = BatchLoader(particles, twin, memory=0).read(index).image
    torch.testing.assert_close(shown, plain.read(twin.permutation[index]).image)
    noise = BatchLoader(particles, Noise(16, 0.0, 1.0, 3), memory=0)
    series = noise.read(index).image.view(6, 3, -1)
    assert (series[:, 0] - series[:, 1]).abs().mean() > 0.1  # an image of its own for each tilt


def test_a_resumed_run_ends_with_the_same_bits(sim, tmp_path, cli):
    more = ["--random-tilts", "--checkpoint", "1", *NETWORK]
    for name, epochs in (("whole", ("2",)), ("twice", ("1", "2"))):
        for n in epochs:
            load = ["--load", "latest"] if n == "2" and len(epochs) > 1 else []
            code, _, err = cli(
                "train_amort", *flags(sim, tmp_path / name, *more, *load, "-n", n, ntilts=3)
            )
            assert code == 0, err
    whole, twice = weights(tmp_path / "whole"), weights(tmp_path / "twice")
    assert all(torch.equal(whole[name], twice[name]) for name in whole)


def test_the_host_reads_the_simulation(sim, tmp_path):
    """Backprojection by the host, with its dose weighting off, gives the mean volume."""
    from cryodrgn_amort import host
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation import simulate

    simulate(SimulateOptions(str(tmp_path / "sim"), n=150, D=24, tilts=7, tilt_step_deg=8,
                             classes=1, hinge_deg=0, snr=50, seed=2))  # fmt: skip
    run_host(
        "backproject_voxel", tmp_path / "sim/particles.star", "--poses", tmp_path / "sim/poses.pkl",
        "--ctf", tmp_path / "sim/ctf.pkl", "--tilt", "--ntilts", "7", "-d", "1e-6", "-a", "0",
        "-o", tmp_path / "out",
    )  # fmt: skip
    found = host.parse_mrc(str(tmp_path / "out/backproject.mrc"))[0]
    true = host.parse_mrc(str(tmp_path / "sim/volumes/mean.mrc"))[0]
    assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > 0.9


def test_tilts_turn_about_the_y_axis_and_share_the_dose(tmp_path):
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation import simulate

    base = {"n": 64, "D": 16, "seed": 4, "snr": 0.5}
    single = simulate(SimulateOptions(str(tmp_path / "single"), **base))
    tomo = simulate(SimulateOptions(str(tmp_path / "tomo"), **base, tilts=3, tilt_step_deg=30))
    assert tomo.signal_variance == pytest.approx(single.signal_variance, rel=1e-5)
    assert tomo.noise_sigma**2 == pytest.approx(3 * single.noise_sigma**2, rel=1e-5)
    rots, trans = read_pickles(tmp_path / "tomo/poses.pkl")
    own_rots, own_trans = read_pickles(tmp_path / "single/poses.pkl")
    np.testing.assert_array_equal(rots[::3], own_rots)
    np.testing.assert_array_equal(trans[::3], own_trans)
    up = rots[1::3] @ rots[::3].transpose(0, 2, 1)
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    about_y = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]
    np.testing.assert_allclose(up, np.broadcast_to(about_y, up.shape), atol=1e-5)
    np.testing.assert_allclose(rots[2::3] @ rots[::3].transpose(0, 2, 1), up.transpose(0, 2, 1),
                               atol=1e-5)  # fmt: skip
    labels = [read_pickles(tmp_path / name / "labels.pkl") for name in ("single", "tomo")]
    np.testing.assert_array_equal(*labels)


def test_evaluation_and_fits(sim, tmp_path, cli):
    more = [*NETWORK, "--holdout", sim / "ind_heldout.pkl", "--dose-per-tilt", "3"]
    code, _, err = cli("train_amort", *flags(sim, tmp_path / "net", *more, ntilts=3))
    assert code == 0, err
    quick = ["--fit", "3", "--volumes", "3", "--labelled", "2", "--bootstrap", "5", "--no-umap"]
    code, _, err = cli("eval_amort", tmp_path / "net", *quick, "--truth", sim)
    assert code == 0, err
    found = json.loads((tmp_path / "net/amort.2/amortization.json").read_text())
    measures = found["measures"]
    assert {"class_knn", "noise_swap_signal", "nuisance_leak_view"} <= measures.keys()
    assert "coverage_50" not in measures
    for result in found["transforms"].values():
        off = abs(result["measures"]["control"]["value"])
        assert off < (1e-3 if result["name"] == "rotate:90" else 3)  # the window does not roll
        assert result["measures"]["retrieval_rank"]["n"] == 40
    code, _, err = cli(
        "infer_amort", tmp_path / "net", "--held-out", "-o", tmp_path / "fitted", "--steps", "30"
    )
    assert code == 0, err
    assert read_pickles(tmp_path / "fitted/z.pkl", 2)[0].shape == (4, 3)
    # a fitted posterior explains a particle at least as well as the encoder's
    assert (read_pickles(tmp_path / "fitted/gap.pkl") >= 0).all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ntilts", "6"], "--ntilts 6: particle 0 of"),
        (["--augment"], "--augment: does not apply to tilt series"),
        (["--encoder", "resid"], "--encode-mode tilt: contradicts --encoder resid"),
        (["--poses", "SHORT"], "SHORT: 7 rows for 220"),
        (["--dose-per-tilt", "3", "--ctf", "OTHER"], "known for 200 and 300 kV"),
    ],
)
def test_refused(more, said, sim, tmp_path, cli):
    table = read_pickles(sim / "ctf.pkl").copy()
    table[:, 5] = 120
    files = {
        "SHORT": write_pickle(tmp_path / "SHORT", np.tile(np.eye(3), (7, 1, 1))),
        "OTHER": write_pickle(tmp_path / "OTHER", table),
    }
    words = [files.get(word, word) for word in more]
    code, _, err = cli("train_amort", *flags(sim, tmp_path / "run", *words))
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data_\n\nloop_\n_rlnImageName #1\n_rlnCtfScalefactor #2\n1@particles.mrcs 1\n",
         "not a tilt series"),
        ("data_\n\nloop_\n_rlnImageName #1\n_rlnGroupName #2\n1@particles.mrcs a\n",
         "no column _rlnCtfScalefactor"),
        ("data_\n\nloop_\n_rlnImageName #1\n_rlnGroupName #2\n_rlnCtfScalefactor #3\n"
         "1@particles.mrcs a nan\n", "_rlnCtfScalefactor of image 0 is no finite number"),
    ],
)  # fmt: skip
def test_star_files_that_are_none(text, said, sim, tmp_path, cli):
    (tmp_path / "bad.star").write_text(text)
    code, _, err = cli(
        "train_amort", tmp_path / "bad.star", *flags(sim, tmp_path / "run")[1:], "--datadir", sim
    )
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_host_is_told_its_dose(sim, tmp_path, cli, stack):
    """Its config does not say: the flag gives what ours has."""
    more = [*NETWORK, "--dose-per-tilt", "9"]
    run_host("train_vae", *flags(sim, tmp_path / "host", *more))
    assert cli("train_amort", *flags(sim, tmp_path / "ours", *more))[0] == 0
    quick = ["--transform", "--fit", "0", "--bootstrap", "2", "--no-umap", "--volumes", "2"]
    losses = []
    for run, dose in (("ours", []), ("host", ["-d", "9"]), ("host", [])):
        code, _, err = cli("eval_amort", tmp_path / run, *quick, *dose, "-o", tmp_path / "out")
        assert code == 0, err
        losses.append(read_pickles(tmp_path / "out/reconstruction.pkl"))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert abs(losses[0] - losses[2]).mean() > 0.01
    single = ["--poses", stack.poses, "--zdim", "2", "-n", "1", "--dec-dim", "8", "--enc-dim", "8",
              "--no-analysis", "-o", tmp_path / "single"]  # fmt: skip
    assert cli("train_amort", stack.particles, *single)[0] == 0
    code, _, err = cli("eval_amort", tmp_path / "single", "-d", "3")
    assert code == 2
    assert "--dose-per-tilt: RUN" in err
