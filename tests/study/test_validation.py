"""``validate_amort``: what it says where the answer is known; it goes on where it stopped."""

import copy
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, write_pickle

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options import SimulateOptions, ValidateOptions
from cryodrgn_amort.runs import load_run, settings_argv, settings_from_flags, trained_settings
from cryodrgn_amort.simulation import simulate
from cryodrgn_amort.study.validation.case import Case, Fits
from cryodrgn_amort.study.validation.epochs import EpochCurve
from cryodrgn_amort.study.validation.gains import agreement, clusters, gain
from cryodrgn_amort.study.validation.maps import (
    Maps,
    _write_refined,
    compared,
    fsc_curves,
    selected,
)
from cryodrgn_amort.study.validation.misfits import Misfits
from cryodrgn_amort.study.validation.plan import Validation
from cryodrgn_amort.study.validation.poses import (
    PoseSlopes,
    crossed_slopes,
    likely_errors,
    likely_poses,
    pose_slopes,
    read_off,
    turned,
)
from cryodrgn_amort.study.validation.renoising import scatter
from cryodrgn_amort.study.validation.verdict import CANNOT, NO, YES, answers, corrected


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sim"
    simulate(SimulateOptions(outdir=str(folder), n=240, D=16, snr=2.0, seed=1))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, plugins):
    """A table of 240 particles whose decoder has learnt something."""
    from cryodrgn_amort.training import Trainer

    out = tmp_path_factory.mktemp("run") / "vlt"
    flags = {
        "particles": str(data / "particles.mrcs"), "poses": str(data / "poses.pkl"),
        "ctf": str(data / "ctf.pkl"), "outdir": str(out), "num_epochs": 12, "do_analysis": False,
        "seed": 0, "zdim": 2, "pdim": 32, "players": 2, "lr": 3e-3, "encoder": "vlt",
        "batch_size": 16, "checkpoint": 4,
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return load_run(out, plugins)


@pytest.fixture(scope="module")
def case(trained):
    return Case(trained, trained.particles(), own=True)


@pytest.fixture(scope="module")
def fits(case):
    return case.fit(120)


def test_fits_are_whitened_and_explain(case, fits, tmp_path):
    white = case.whitened(fits.spectrum)
    batch = case.loader.read(torch.from_numpy(fits.rows))
    left = (batch.y - case.decoded(batch, torch.from_numpy(fits.mean))) * white.gain
    assert float(left.square().mean()) == pytest.approx(case.particles.windowed, rel=0.02)
    assert (fits.elbo - fits.constant).mean() > 1
    error = white.errors(batch, torch.from_numpy(fits.mean))[1]
    torch.testing.assert_close(error, left.square().sum(1), rtol=1e-3, atol=1e-2)
    fits.write(tmp_path / "fits.npz")
    again = Fits.read(tmp_path / "fits.npz")
    np.testing.assert_array_equal(again.elbo, fits.elbo)
    (tmp_path / "fits.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        Fits.read(tmp_path / "fits.npz")


def test_posteriors_are_where_nothing_near_is_better(case, fits):
    white = case.whitened(fits.spectrum)
    batch = case.loader.read(torch.from_numpy(fits.rows[:32]))
    z = torch.from_numpy(fits.mean[:32])
    best = case._cost(white, batch, z)
    for step in (0.1, -0.1):
        for k in range(2):
            moved = z.clone()
            moved[:, k] += step * case.fitter.spread[k]
            worse = case._cost(white, batch, moved) - best
            assert (worse > -0.3).float().mean() > 0.9  # of a spectrum measured before


def test_slopes_point_to_the_turn_that_images_have(case, fits):
    """Images without noise, turned by a degree about an axis: the likely turn is that."""
    white = case.whitened(fits.spectrum)
    batch = case.loader.read(torch.from_numpy(fits.rows[:64]))
    z = torch.from_numpy(fits.mean[:64])
    for axis in range(3):
        vector = torch.zeros(1, 3)
        vector[0, axis] = math.radians(1)
        shown = SimpleNamespace(**vars(batch))
        shown.rot = turned(vector) @ batch.rot
        batch.y = case.decoded(shown, z)
        slopes = pose_slopes(case, white, batch, z)
        H, g = slopes.curvature.sum(0), slopes.slope.sum(0)
        g += np.zeros(5)
        found = np.degrees(np.linalg.solve(H, g)[:3])
        wanted = np.zeros(3)
        wanted[axis] = 1
        np.testing.assert_allclose(found, wanted, atol=0.35)


def test_slopes_point_to_the_shift_that_images_have(case, fits):
    white = case.whitened(fits.spectrum)
    batch = case.loader.read(torch.from_numpy(fits.rows[:64]))
    z = torch.from_numpy(fits.mean[:64])
    shown = case.decoded(batch, z)
    batch.y = case.particles.shift(shown, torch.tensor([[-0.2, 0.1]]).expand(64, 2))
    slopes = pose_slopes(case, white, batch, z)
    found = np.linalg.solve(slopes.curvature.sum(0), slopes.slope.sum(0))[3:]
    np.testing.assert_allclose(found, [0.2, -0.1], atol=0.04)


def test_likely_errors_are_those_that_slopes_were_drawn_with():
    rng = np.random.default_rng(0)
    n, turn, shift = 3000, math.radians(3), 0.2
    roots = rng.standard_normal((n, 5, 12)) * np.array([40, 40, 60, 8, 8])[:, None] / 3
    H = roots @ roots.transpose(0, 2, 1)
    errors = rng.standard_normal((n, 5)) * np.array([turn] * 3 + [shift] * 2)
    noise = np.einsum("bij,bj->bi", roots, rng.standard_normal((n, 12)))
    slopes = PoseSlopes(np.einsum("bij,bj->bi", H, errors) + noise, H)
    degrees, pixels = likely_errors(slopes)
    assert degrees == pytest.approx(3 * math.sqrt(3), rel=0.05)
    assert pixels == pytest.approx(shift * math.sqrt(2), rel=0.1)
    none = likely_errors(PoseSlopes(noise, H))
    assert none[0] < 0.5
    assert read_off(3.0, {0.0: (1.0, 0), 2.0: (2.0, 0), 4.0: (4.0, 0)}) == 3.0


@pytest.fixture(scope="module")
def every(case):
    return case.fit(240)


def _spoilt(case, fits, kind):
    """Make up images, and something else in each sixth's place; returns a case, and which."""
    rows, rng = torch.arange(case.particles.n), np.random.default_rng(0)
    batch, draw = case.loader.read(rows), torch.Generator().manual_seed(4)
    bad = rows % 6 == 0
    noise = case.noise(fits.spectrum).draw(rows, draw)
    z = torch.from_numpy(
        fits.mean + np.exp(0.5 * fits.logvar) * rng.standard_normal(fits.mean.shape)
    )
    batch.y = case.decoded(batch, z.float()) + noise
    if kind == "noise":
        batch.y[bad] = noise[bad]
    elif kind == "poses":  # a molecule that is there, but turned as if it were another
        shown = case.decoded(replace(batch, rot=batch.rot.roll(7, 0)), z.float())
        batch.y[bad] = (shown + noise)[bad]
    loader = SimpleNamespace(
        read=lambda index: replace(case.loader.read(index), y=batch.y[index].clone())
    )
    other = copy.copy(case)
    other.loader = loader
    return other, bad.numpy()


@pytest.mark.parametrize(("kind", "least"), [("noise", 0.95), ("poses", 0.8), ("", 0.0)])
def test_misfits_are_found_and_others_are_not(kind, least, case, every):
    other, bad = _spoilt(case, every, kind)
    found = Misfits(other, every).of_particles()
    p = found["misfit_p"]
    assert {len(column) for column in found.values()} == {240}
    assert 0 < p.min() <= p.max() <= 1
    assert (p[~bad] < 0.05).mean() < 0.08
    if kind:
        area = (p[bad][:, None] < p[~bad]).mean() + (p[bad][:, None] == p[~bad]).mean() / 2
        assert area > least
        assert np.median(p[bad]) < 0.1


def test_an_image_that_is_no_number_is_a_misfit(case, every):
    other, _ = _spoilt(case, every, "")
    read = other.loader.read
    other.loader.read = lambda index: replace(
        read(index), y=read(index).y.masked_fill((index == 3)[:, None], torch.nan)
    )
    p = Misfits(other, every).of_particles()["misfit_p"]
    assert p[3] == p.min() < 0.01


def test_halves_that_are_the_same_agree_and_with_other_particles_do_not(case, fits, trained):
    own, others = agreement(case, fits, trained, 20, 0)
    assert own.value > 0.5
    assert abs(others.value) < 0.3
    m = gain("heterogeneity_gain", fits, 20, 0)
    assert m.value == pytest.approx((fits.elbo - fits.constant).mean())
    assert m.low < m.value < m.high


@pytest.mark.parametrize(
    ("means", "best", "improves", "declines"),
    [
        ([0, 20, 30, 38, 44], 25, True, False),
        ([0, 30, 40, 40.1, 40.1], 15, False, False),
        ([0, 30, 40, 36, 30], 15, False, True),
    ],
)
def test_epoch_curves(means, best, improves, declines):
    rng = np.random.default_rng(0)
    particles = rng.standard_normal(400) * 20
    each = np.array(means)[:, None] + particles + rng.standard_normal((5, 400)) * 2
    curve = EpochCurve(np.array([5, 10, 15, 20, 25]), each)
    assert (curve.best, curve.improves, curve.declines) == (best, improves, declines)


def _measure(low, high):
    return {"value": (low + high) / 2, "low": low, "high": high}


def _gain(halves, nulls, agree):
    pair = {"halves_agreement": _measure(*agree), "halves_agreement_others": _measure(-0.1, 0.1)}
    return {
        "gain": {"half0": _measure(*halves), "half1": _measure(*halves), "null0": _measure(*nulls)},
        "agreement": {"half0": pair, "half1": pair},
    }


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (_gain((30, 40), (2, 4), (0.6, 0.8)), YES),
        (_gain((2, 4), (2, 4), (-0.1, 0.1)), NO),
        (_gain((30, 40), (2, 4), (0.0, 0.1)), CANNOT),  # gains that two halves do not share
        (_gain((2, 4), (2, 4), (0.5, 0.6)), CANNOT),
        (_gain((5, 7), (2, 4), (0.3, 0.5)), CANNOT),
    ],
)
def test_heterogeneity(found, said):
    assert answers({"gain": found})[0].said == said


@pytest.mark.parametrize(
    ("degrees", "high", "base", "said"),
    [(5.0, 5.5, 1.5, NO), (1.7, 2.5, 1.6, YES), (2.9, 6.0, 1.0, CANNOT)],
)
def test_poses(degrees, high, base, said):
    found = {"degrees": degrees, "low": degrees - 0.5, "high": high, "of_decoders": base}
    assert corrected(found)[0] == pytest.approx(math.sqrt(degrees**2 - base**2))
    told = answers({"poses": found, "gain": _gain((2, 4), (2, 4), (-0.1, 0.1))})
    assert [a.said for a in told] == [NO, said]
    assert corrected({**found, "of_decoders": degrees + 1})[0] == 0


def test_a_decoder_that_has_learnt_too_little_blames_nothing_else():
    """After 3 epochs of 25 poses that are right look as if they were off by 9 degrees."""
    curve = {
        "epochs": [1, 2, 3], "best": 3, "last_quarter": 5.0, "last_quarter_error": 0.5, "all": 15.0,
        "improves": True, "declines": False,
    }  # fmt: skip
    off = {"degrees": 9.3, "low": 8.4, "high": 10.6, "of_decoders": 1.3}
    found = {
        "poses": off, "epochs": curve, "gain": _gain((2, 4), (2, 4), (-0.1, 0.1)),
        "maps": _maps((0.0, 0.1), (-0.1, 0.1)),
    }  # fmt: skip
    assert [a.said for a in answers(found)] == [CANNOT, CANNOT, NO, CANNOT]
    found["epochs"] = {**curve, "improves": False}
    assert [a.said for a in answers(found)] == [NO, NO, YES, NO]


def test_heterogeneity_that_is_not_found_is_not_taken_for_wrong_poses():
    """400 particles of 16 px with right poses, of which 12 epochs find some: 15 degrees."""
    off = {"degrees": 15.5, "low": 12.2, "high": 16.0, "of_decoders": 3.8}
    unsure = _gain((0.1, 0.8), (-0.5, 0.0), (0.17, 0.24))
    assert [a.said for a in answers({"poses": off, "gain": unsure})] == [CANNOT, CANNOT]
    assert [a.said for a in answers({"poses": off})] == [CANNOT]  # --quick
    right = {"degrees": 1.0, "low": 0.0, "high": 2.0, "of_decoders": 1.0}
    assert [a.said for a in answers({"poses": right, "gain": unsure})] == [CANNOT, YES]


def _maps(own, random):
    return {
        "latents": 6, "particles": 100, "map_agreement": _measure(*own),
        "map_agreement_random": _measure(*random), "map_halves_agreement": _measure(*own),
        "map_halves_agreement_random": _measure(*random),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "random", "said"),
    [
        ((0.6, 0.8), (-0.1, 0.1), YES),
        ((-0.03, 0.08), (-0.1, 0.1), NO),
        ((0.12, 0.4), (-0.1, 0.1), CANNOT),
        ((0.25, 0.4), (0.1, 0.3), CANNOT),  # random ones are no worse
    ],
)
def test_volumes_are_in_the_particles(own, random, said):
    assert answers({"maps": _maps(own, random)})[0].said == said


def _blobs(count, seed=0):
    """Volumes that differ by where a part of them is, and by noise that none shares."""
    at = np.stack(np.meshgrid(*[np.arange(16) - 7.5] * 3, indexing="ij"))
    where = np.random.default_rng(seed).uniform(-4, 4, (count, 3, 1, 1, 1))
    parts = np.exp(-((at - where) ** 2).sum(1) / 6)
    return np.exp(-(at**2).sum(0) / 20) + parts


def test_maps_agree_with_volumes_that_are_in_them():
    rng = np.random.default_rng(1)

    def noisy(volumes):
        return volumes + 0.3 * rng.standard_normal(volumes.shape)

    shown, mean = _blobs(6), _blobs(6).mean(0, keepdims=True).repeat(6, 0)
    true = {h: Maps(noisy(shown), noisy(shown), noisy(mean)) for h in ("half0", "half1")}
    found = compared(true, 100, 0)
    assert found["map_agreement"].low > 0.3
    assert found["map_halves_agreement"].value > 0.3
    assert abs(found["map_agreement_random"].value) < 0.15
    noise = {h: Maps(noisy(mean), noisy(mean), noisy(mean)) for h in ("half0", "half1")}
    assert abs(compared(noise, 100, 0)["map_agreement"].value) < 0.15
    curves = fsc_curves(true)
    assert np.mean(curves["decoded"][1:6]) > np.mean(curves["decoded_random"][1:6]) + 0.03


def test_particles_are_selected_that_a_latent_explains(case, fits):
    """Of images made up at two latents, each is given to its own."""
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    white, draw = case.whitened(fits.spectrum), case.generator()
    own = torch.arange(case.particles.n) % 2
    batch = case.loader.read(torch.arange(case.particles.n))
    shown = case.decoded(batch, z[own])
    made = SimpleNamespace(
        read=lambda index: replace(
            case.loader.read(index),
            y=(shown + noise)[index],
        )
    )
    noise = case.noise(fits.spectrum).draw(torch.arange(case.particles.n), draw)
    fake = SimpleNamespace(
        whitened=case.whitened, particles=case.particles, loader=made, seed=0,
    )  # fmt: skip
    rows = selected(fake, fits, z.numpy())
    assert rows.shape == (2, 120)
    right = np.mean([(own[rows[k]] == k).float().mean() for k in (0, 1)])
    assert right > 0.9
    assert white is not None


def test_poses_that_a_run_has_refined_are_those_of_the_whole_stack(tmp_path):
    rots, trans = np.arange(27.0).reshape(3, 3, 3), np.arange(6.0).reshape(3, 2)
    write_pickle(tmp_path / "pose.pkl", (rots, trans))
    run = SimpleNamespace(refined_poses=tmp_path / "pose.pkl", whole_index=np.array([4, 1, 2]))
    _write_refined(run, tmp_path / "poses.pkl")
    whole = read_pickles(tmp_path / "poses.pkl")
    assert whole[0].shape == (5, 3, 3)
    np.testing.assert_array_equal(whole[0][[4, 1, 2]], rots)
    np.testing.assert_array_equal(whole[1][[4, 1, 2]], trans)


def test_poses_that_halves_have_refined_stay_with_their_particles(data, plugins, tmp_path):
    """A half's decoder is asked of the other's particles: at the poses that these have got."""
    import argparse

    from cryodrgn_amort.runs import add_train_flags
    from cryodrgn_amort.training import Trainer

    flags = {
        "particles": str(data / "particles.mrcs"), "poses": str(data / "poses.pkl"),
        "ctf": str(data / "ctf.pkl"), "num_epochs": 1, "do_analysis": False, "zdim": 2, "pdim": 8,
        "qdim": 8, "do_pose_sgd": True, "pretrain": 0, "pose_lr": 0.05,
    }  # fmt: skip

    def train(folder, ind=None):
        settings = settings_from_flags({**flags, "outdir": str(folder), "ind": ind}, plugins)
        Trainer(settings, plugins).fit()
        return load_run(folder, plugins)

    run, parser = train(tmp_path / "run"), argparse.ArgumentParser()
    add_train_flags(parser, plugins)
    options = ValidateOptions(run=str(run.folder), outdir=str(tmp_path / "valid"))
    validation = Validation(run, options, plugins, parser)
    validation.prepare()
    halves = [train(tmp_path / f"valid/runs/half{k}", str(tmp_path / f"valid/halves/half{k}.pkl"))
              for k in (0, 1)]  # fmt: skip
    for k in (0, 1):
        particles = validation.case(f"half{k}").particles
        known = read_pickles(halves[1 - k].refined_poses)[0]
        np.testing.assert_allclose(particles.rots.numpy(), known, atol=1e-6)
        given = read_pickles(data / "poses.pkl")[0][particles.ind]
        assert np.abs(known - given).max() > 1e-3


def test_scatter_of_right_posteriors_is_what_they_say():
    """y = z + noise of variance 1/4: the mean of the posterior is 0.8 y, its variance 0.2."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 3))
    again = 0.8 * (z + 0.5 * rng.standard_normal((5, 500, 3)))
    bias, spread = scatter(z, np.full((500, 3), np.log(0.2)), again)
    assert np.median(spread) == pytest.approx(1, abs=0.1)
    assert np.median(bias) < 0.2
    sure = scatter(z, np.full((500, 3), np.log(0.05)), again)
    assert np.median(sure[1]) > 2.5
    off = scatter(z + 2, np.full((500, 3), np.log(0.2)), again)[0]
    assert np.median(off) > 2
    assert np.isnan(scatter(z, np.zeros((500, 3)), again)[1]).all()  # it knows nothing


def test_new_noise_is_read_as_the_log_variances_say_where_fits_mean_them(case, fits, monkeypatch):
    """Laplace's own posteriors, encoded by the maximum of the posterior."""
    rows = torch.from_numpy(fits.rows[:60])
    batch, draw = case.loader.read(rows), case.generator()
    white, noise = case.whitened(fits.spectrum), case.noise(fits.spectrum)
    mean, logvar = fits.mean[:60], fits.logvar[:60]
    shown, again = case.decoded(batch, torch.from_numpy(mean)), []
    for _ in range(5):
        batch.y = shown + noise.draw(rows, draw)
        again.append(case.posterior(white, batch)[0].numpy())
    spread = np.nanmedian(scatter(mean, logvar, np.stack(again))[1])
    assert 0.7 < spread < 1.3  # 1.5 by noise that is taken for the same in all of the image


@pytest.mark.parametrize(
    ("below", "nulls", "crossed", "said"),
    [
        (0.14, [0.04], 0.03, YES),
        (0.14, [0.12], 0.03, NO),
        (0.14, [0.04], 0.15, NO),  # faults of decoders look like that
        (0.08, [0.03], 0.02, NO),
        (0.14, [], None, YES),  # --quick
    ],
)
def test_misfits(below, nulls, crossed, said):
    found = {
        "below": below, "n": 500, "below_of_decoders": crossed,
        "below_of_nulls": {f"null{k}": share for k, share in enumerate(nulls)},
    }  # fmt: skip
    assert answers({"misfits": found})[0].said == said


@pytest.mark.parametrize(
    ("spread", "bias", "said"),
    [((0.8, 1.3), (0.2, 0.4), YES), ((8, 9), (0.2, 0.4), NO), ((0.9, 1.1), (2, 3), NO),
     ((1.8, 2.6), (0.2, 0.4), CANNOT), (None, (0, 0), CANNOT)],
)  # fmt: skip
def test_error_bars(spread, bias, said):
    found = {"encoded": True, "n": 300, "bias": _measure(*bias),
             "spread": None if spread is None else _measure(*spread)}  # fmt: skip
    assert answers({"noise": found})[0].said == said


def test_clusters_are_counted():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0, 0], [6, 0, 0], [0, 6, 0]])
    assert clusters(rng.standard_normal((600, 3)), 0) == 1
    assert clusters(rng.standard_normal((600, 3)) + centres[rng.integers(3, size=600)], 0) == 3


def test_single_poses_are_found_as_far_as_they_can_be(case, fits):
    white, draw = case.whitened(fits.spectrum), case.generator()
    axes = torch.randn(120, 3, generator=draw) * math.radians(6) / math.sqrt(3)
    batch = case.made_up(fits, torch.arange(120), turned(axes), draw)[0]
    slopes = pose_slopes(case, white, batch, case.posterior(white, batch)[0])
    found = likely_poses(slopes, (6.0, 0.1))
    assert found.shape == (120, 2)
    truth = np.degrees(axes.norm(dim=1).numpy())
    assert np.corrcoef(found[:, 0], truth)[0, 1] > 0.3
    assert likely_poses(slopes, (0.01, 0.001)).max() < 0.1  # poses that are known


def test_what_two_decoders_differ_by_looks_like_an_error_of_poses(case, fits, trained):
    """The same decoder on both sides: there is none."""
    none = likely_errors(crossed_slopes(case, fits, trained))[0]
    draw = case.generator()
    axes = torch.randn(120, 3, generator=draw) * math.radians(8) / math.sqrt(3)
    batch = case.made_up(fits, torch.arange(120), turned(axes), draw)[0]
    white = case.whitened(fits.spectrum)
    off = likely_errors(pose_slopes(case, white, batch, case.posterior(white, batch)[0]))[0]
    assert off > none + 1


def test_flags_that_train_a_run_again(trained, plugins, tmp_path):
    import argparse

    from cryodrgn_amort.runs import add_train_flags

    parser = argparse.ArgumentParser()
    add_train_flags(parser, plugins)
    argv = settings_argv(trained_settings(trained, parser), parser)
    again = settings_from_flags(vars(parser.parse_args(argv)), plugins)
    own, other = trained.settings.to_dict(), again.to_dict()
    assert {k for k in own if own[k] != other[k]} <= {"do_analysis"}


def test_flags_of_a_run_of_train_vae_are_those_of_its_command(
    stack, plugins, tmp_path, monkeypatch
):
    import argparse

    from helpers import run_host

    from cryodrgn_amort.runs import add_train_flags

    argv = ["train_vae", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", "3",
            "-n", "1", "-b", "10", "--lr", "0.002", "--enc-dim", "8", "--dec-dim", "8", "-o",
            str(tmp_path / "vae"), "--no-analysis", "--uninvert-data"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["cryodrgn", *argv])
    run_host(*argv)
    run = load_run(tmp_path / "vae", plugins)
    parser = argparse.ArgumentParser()
    add_train_flags(parser, plugins)
    found = trained_settings(run, parser)
    assert (found.batch_size, found.lr, found.invert_data, found.qdim) == (10, 0.002, False, 8)
    del run.config["cmd"]
    with pytest.raises(InputError, match="does not say by which command"):
        trained_settings(run, parser)


@pytest.fixture(scope="module")
def validated(trained, tmp_path_factory):
    from cryodrgn_amort.cli import main

    out = tmp_path_factory.mktemp("valid") / "out"
    argv = ["validate_amort", str(trained.folder), "-o", str(out), "--sample", "40", "--bootstrap",
            "20", "--jobs", "2"]  # fmt: skip
    main(argv)
    return SimpleNamespace(out=out, argv=argv)


def test_everything_is_there(validated, trained):
    out = validated.out
    facts = json.loads((out / "validation.json").read_text())
    assert len(facts["answers"]) == 6
    assert set(facts["parts"]) == {"gain", "maps", "poses", "misfits", "epochs", "noise"}
    kinds = ("decoded", "chosen", "random")
    named = {f"half{h}.{k}.{kind}.mrc" for h in (0, 1) for k in range(1, 7) for kind in kinds}
    assert {p.name for p in (out / "maps").iterdir()} == named
    assert all(a["said"] in (YES, NO, CANNOT) for a in facts["answers"])
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "Is there heterogeneity" in page
    halves = [read_pickles(out / f"halves/half{k}.pkl") for k in (0, 1)]
    assert sorted(np.concatenate(halves)) == list(range(240))
    rows = (out / "trust.csv").read_text().splitlines()
    assert len(rows) == 241
    for k in (0, 1):
        config = yaml.safe_load((out / f"runs/half{k}/config.yaml").read_text())
        assert config["amort"]["settings"]["encoder"] == "vlt"
    null = yaml.safe_load((out / "null0/simulation.yaml").read_text())
    assert null["settings"]["homogeneous"]


def test_what_is_done_is_not_done_again(validated, cli):
    before = {p: p.stat().st_mtime_ns for p in (validated.out / "parts").iterdir()}
    code, out, err = cli(*validated.argv)
    assert code == 0, err
    assert "0 of 13 steps are to be done" in out
    assert {p: p.stat().st_mtime_ns for p in (validated.out / "parts").iterdir()} == before
    (validated.out / "steps/part.gain.json").unlink()
    assert "part.gain" in cli(*validated.argv, "--dry-run")[1]


def test_quick_trains_nothing(trained, tmp_path, cli):
    code, out, err = cli("validate_amort", trained.folder, "-o", tmp_path / "quick", "--quick",
                         "--sample", 40, "--bootstrap", 20, "--jobs", 1)  # fmt: skip
    assert code == 0, err
    assert "nothing is trained" in out
    assert not (tmp_path / "quick/runs").exists()
    assert "Are the poses right?" in out
    assert "Is there heterogeneity" not in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sample", "30"], "was made with sample: 40, not 30"),
        (["--part", "nothing"], "--part nothing: there is none of that name"),
    ],
)
def test_refusals(validated, cli, argv, said):
    before = {p: p.stat().st_mtime_ns for p in validated.out.rglob("*.json")}
    given = [a for a in validated.argv if a not in ("--sample", "40")] if "--sample" in argv else (
        validated.argv
    )  # fmt: skip
    code, _, err = cli(*given, *argv)
    assert code == 2
    assert said in err
    assert {p: p.stat().st_mtime_ns for p in validated.out.rglob("*.json")} == before


def test_folders_of_others_and_runs_of_a_second_stage_are_refused(trained, tmp_path, cli):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    code, _, err = cli("validate_amort", trained.folder, "-o", tmp_path / "full")
    assert (code, "is not empty, and no validation" in err) == (2, True)
    copy = tmp_path / "second"
    shutil.copytree(trained.folder, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["amort"]["settings"]["from_run"] = "elsewhere"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    (copy / "checksums.sha256").unlink()
    code, _, err = cli("validate_amort", copy, "-o", tmp_path / "out")
    assert code == 2
    assert "validate that, or give --quick" in err
    assert not (tmp_path / "out").exists()


def test_options_are_checked():
    with pytest.raises(InputError):
        ValidateOptions(run="a", outdir="b", nulls=0)


def test_names_of_folders_are_no_yaml_and_half_a_file_is_no_result(trained, tmp_path, cli):
    run = tmp_path / "a: b #1"
    shutil.copytree(trained.folder, run)
    argv = ["validate_amort", run, "-o", tmp_path / "out", "--quick", "--sample", 20]
    assert cli(*argv, "--dry-run")[0] == 0
    code, _, err = cli(*argv, "--dry-run")  # finds what it has written
    assert code == 0, err
    code, _, err = cli(*argv, "--part", "misfits")
    assert code == 2
    assert "needs fit.run, which is not done yet" in err
    (tmp_path / "out/parts/misfits.npz").write_bytes(b"half")  # of one that was killed
    code, _, err = cli(*argv, "--bootstrap", 200, "--jobs", 1)
    assert code == 0, err
    assert (tmp_path / "out/trust.csv").is_file()
