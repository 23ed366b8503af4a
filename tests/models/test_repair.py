"""The second stage: noise like the particles', images made up, encoders that learn from them."""

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import read_pickles, run_host, write_pickle, write_stack

from cryodrgn_amort.core import CHECKSUMS, InputError, read_weights, recorded, write_weights
from cryodrgn_amort.data import (
    Agreement,
    NoiseModel,
    ParticleSource,
    Shells,
    load_particles,
    optics_groups,
)
from cryodrgn_amort.inference.bounds import anchored as weighted_anchors
from cryodrgn_amort.models import SyntheticImages
from cryodrgn_amort.models.second_stage import AnchoredEncoder, split_pose
from cryodrgn_amort.runs import load_run, settings_from_flags, with_run
from cryodrgn_amort.training import Trainer


@pytest.fixture(scope="module")
def first(stack, plugins, tmp_path_factory):
    """Return the folder of a finished table run."""
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "zdim": 3,
        "outdir": str(tmp_path_factory.mktemp("first") / "vlt"), "num_epochs": 9,
        "seed": 3, "do_analysis": False, "pdim": 16, "players": 1, "lr": 1e-2, "encoder": "vlt",
        "holdout": "0.2", "beta": 0.01,
    }  # fmt: skip
    trainer = Trainer(settings_from_flags(flags, plugins), plugins)
    trainer.fit()
    return trainer.folder


_SMALL = {
    "anchored": {"qdim": 16, "anchors": 4},
    "sleep": {"qdim": 16},
    "resid": {"qdim": 16},
    "twin": {"qdim": 16},
}


@pytest.fixture
def second(first, plugins, tmp_path):
    """Prepare the training of a second stage; returns the trainer."""

    def make(encoder="anchored", **more):
        given = {
            "from_run": str(first), "encoder": encoder, "outdir": str(tmp_path / "second"),
            "seed": 1, "do_analysis": False, "num_epochs": 2, **_SMALL.get(encoder, {}), **more,
        }  # fmt: skip
        return Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)

    return make


@pytest.fixture
def learning(second):
    """Return a trainer whose first epoch has begun, and a batch of particles."""
    trainer = second()
    trainer.prepare_particles(None)
    trainer.objective.epoch_start(1)
    trainer.model.eval()
    return trainer, next(iter(trainer.batches))


def opened(stack):
    return load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))


def test_a_shell_holds_the_pixels_of_one_frequency(stack):
    particles = opened(stack)
    shells = Shells(particles)
    at = (particles.lattice.freqs2d[particles.mask] == torch.tensor([3 / 16, 0.0])).all(1)
    assert at.sum() == 1
    power = shells.power(2.0 * at[None].float())
    same = (shells.of_pixel == 2).sum()
    assert power[0, 2] == 4 / same
    assert power.sum() == power[0, 2]


def test_noise_has_the_spectrum_that_it_is_to_have(stack):
    """In each optics group, after window, Hartley transform, normalisation and centring."""
    particles = opened(stack)
    particles.ctf_params[1::2, 4] = 200.0  # kV
    groups = optics_groups(particles.ctf_params, particles.n)
    assert groups[0] != groups[1]
    assert len(groups.unique()) == 2
    shells = Shells(particles)
    falling = torch.linspace(2.0, 0.5, shells.count)
    spectra = torch.stack([falling, falling.flip(0)])
    noise = NoiseModel(particles, shells, spectra, groups, seed=0)
    generator = torch.Generator().manual_seed(5)
    for particle in (0, 1):
        drawn = noise.draw(torch.full((3000,), particle), generator)
        found = shells.power(drawn).mean(0)
        torch.testing.assert_close(found, spectra[groups[particle]], rtol=0.1, atol=0)
        assert abs(drawn.mean()) < 0.02
    both = (spectra[0] + spectra[1]) / 2  # as many particles are of either
    torch.testing.assert_close(noise.precision(), 1 / both[shells.of_pixel])


def test_the_noise_is_what_latents_leave_unexplained(learning):
    trainer, _ = learning
    mean = trainer.latents[0]
    total = trainer.model.errors(trainer.loader.read(torch.arange(len(mean))), mean)[0]
    found = trainer.objective.noise.spectra[0]
    shells = trainer.objective.noise.shells
    sizes = torch.bincount(shells.of_pixel)
    assert float(found @ sizes.float()) * len(mean) == pytest.approx(float(total), rel=1e-4)


def test_images_made_up_are_the_decoders_with_their_ctf_and_noise(learning, monkeypatch):
    trainer, batch = learning
    noise = []
    new = trainer.objective.noise.draw
    monkeypatch.setattr(
        trainer.objective.noise, "draw", lambda *a: (noise.append(new(*a)), noise[-1])[1]
    )
    made = trainer.objective.draw(batch)
    silent = replace(made, y=made.y - noise[0])
    errors = trainer.model.errors(silent, made.z)[1]
    assert errors.max() < 1e-6 * made.y.square().sum(1).min()
    torch.testing.assert_close(made.image.abs(), made.y.abs())
    flips = (made.image != made.y)[:, : batch.ctf.shape[1]]
    assert torch.equal(flips & (made.y[:, : flips.shape[1]] != 0), batch.ctf < 0)


def test_poses_are_those_of_particles_turned_in_the_plane(learning):
    trainer, batch = learning
    made = trainer.objective.draw(batch)
    views = trainer.particles.rots[:, 2]
    away = (made.rot[:, None, 2] - views[None]).norm(dim=2)
    assert away.amin(1).max() < 1e-5
    turns = torch.einsum("bij,bkj->bik", made.rot, trainer.particles.rots[away.argmin(1)])
    angles = torch.atan2(turns[:, 1, 0], turns[:, 0, 0])
    torch.testing.assert_close(turns[:, 2, 2], torch.ones(len(turns)))
    assert angles.min() < -1 < 1 < angles.max()
    torch.testing.assert_close(turns.det(), torch.ones(len(turns)))


def test_latents_are_drawn_from_posteriors(learning):
    trainer, _ = learning
    objective, (mean, logvar) = trainer.objective, trainer.latents
    z = objective._z.flatten(0, 1)
    expected = mean.var(0) + logvar.exp().mean(0)
    torch.testing.assert_close(z.mean(0), mean.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(z.var(0), expected, rtol=0.1, atol=0)


def test_what_an_anchored_encoder_sees_is_the_likelihood_of_its_anchors(learning):
    trainer, batch = learning
    encoder = trainer.model.amort
    made = trainer.objective.draw(batch)
    decoded = encoder._compared(made.of(torch.arange(made.size)))
    torch.testing.assert_close(decoded, encoder._compared(made), rtol=1e-3, atol=1e-4)
    encoder.precision.fill_(1 / 0.7)  # the same at all frequencies
    likelihood = encoder._compared(batch)[:, -4:] / 3
    expected, _ = weighted_anchors(trainer.model, batch, encoder.anchors, variance=0.7)
    torch.testing.assert_close(likelihood @ encoder.anchors, expected, rtol=1e-3, atol=1e-3)


def test_a_pool_is_that_of_its_epoch_whatever_was_before(learning):
    trainer, batch = learning
    objective = trainer.objective
    before = objective._images.clone()
    for epoch in (2, 3, 4):
        objective.epoch_start(epoch)
    changed = (objective._images != before).flatten(1).any(1)
    assert 0 < changed.sum() < len(changed)
    anew = SyntheticImages(
        trainer.model.fast,
        trainer.particles,
        *trainer.latents,
        trainer.model.amort.template_latents(),
        1,
    )
    anew.epoch_start(4)
    assert torch.equal(anew._images, objective._images)
    assert torch.equal(anew.draw(batch).y, objective.draw(batch).y)


def test_variances_out_of_range_find_the_way_back(learning):
    """A network that answers with too large, or too small, a variance learns so from its loss."""
    trainer, batch = learning
    for logvar, way in ((50.0, 1), (-50.0, -1)):
        answer = torch.full((batch.size, trainer.model.zdim), logvar, requires_grad=True)

        class Model:
            def posterior(self, mine, answer=answer):
                return torch.ones_like(answer), answer

        losses, _ = trainer.objective.loss(Model(), batch, 0.0, None)
        assert losses.total.isfinite()
        (gradient,) = torch.autograd.grad(losses.total, answer)
        assert (gradient * way > 0).all()


def test_images_apart_have_poses_and_latents_of_their_own(learning):
    trainer, batch = learning
    objective = trainer.objective
    first, other = (objective.draw_apart(batch, number) for number in (0, 1))
    rots = torch.cat([first.rot, other.rot])
    z = torch.cat([first.z, other.z])
    assert len(rots.flatten(1).unique(dim=0)) == len(z.unique(dim=0)) == 2 * batch.size
    again = objective.draw_apart(batch, 0)
    assert torch.equal(again.z, first.z)
    assert not torch.equal(again.y, first.y)  # other noise
    objective.epoch_start(1)  # the pool is made again
    images = objective._images.clone()
    objective._made.fill_(-1)
    objective.epoch_start(1)
    assert torch.equal(images, objective._images)


def test_a_batch_that_is_left_out_leaves_no_trace_in_the_metrics(second, monkeypatch):
    trainer = second("sleep", on_nan="skip", num_epochs=1, batch_size=16)
    draw, count = SyntheticImages.draw, iter(range(100))

    def spoilt(self, batch):
        found = draw(self, batch)
        if next(count) == 2:  # after those that are compared with the particles, and a step
            found.image[0] = torch.nan
        return found

    monkeypatch.setattr(SyntheticImages, "draw", spoilt)
    trainer.fit()
    assert "Batch left out" in (trainer.folder / "run.log").read_text()
    assert np.isfinite(trainer.objective.epoch_metrics()["latent_r2"])


def test_the_loss_is_the_density_of_the_latents(learning):
    trainer, batch = learning
    objective, model = trainer.objective, trainer.model
    state = objective.generator.get_state()
    made = objective.draw(batch)
    objective.generator.set_state(state)
    result, mean = objective.loss(model, batch, 1.0, None)
    expected_mean, logvar = model.posterior(made)
    q = torch.distributions.Normal(expected_mean, torch.exp(0.5 * logvar))
    expected = -q.log_prob(made.z).sum(1).mean()
    torch.testing.assert_close(result.total, expected)
    torch.testing.assert_close(mean, expected_mean)


@pytest.mark.parametrize("encoder", ["anchored", "sleep", "resid", "semi"])
def test_a_second_stage_is_a_run_like_any_other(encoder, first, second, plugins, tmp_path):
    trainer = second(encoder)
    trainer.fit()
    run = load_run(trainer.folder, plugins)
    states = [
        read_weights(folder / "weights.pkl", "")["model_state_dict"]
        for folder in (first, run.folder)
    ]
    kept = all(
        torch.equal(value, states[1][name])
        for name, value in states[0].items()
        if name.startswith("decoder.")
    )
    assert kept == (encoder != "semi")
    np.testing.assert_array_equal(
        read_pickles(first / "ind_heldout.pkl"), read_pickles(run.folder / "ind_heldout.pkl")
    )
    assert run.settings.beta == 0.01
    if encoder == "semi":
        return
    with open(run.folder / "metrics.csv", newline="") as handle:
        assert all(np.isfinite(float(row["latent_r2"])) for row in csv.DictReader(handle))
    noise = json.loads((run.folder / "noise.json").read_text())
    assert noise["groups"] == [run.particles().n]
    assert len(noise["noise_variance"][0]) == len(noise["power_ratio"]) == 8
    assert "times the particles' power" in (run.folder / "run.log").read_text()
    model, _ = run.load(run.particles())  # --from is not needed any more
    trainer.model.eval()
    batch = trainer.loader.read(torch.arange(9))
    with torch.no_grad():
        for mine, theirs, z in zip(
            trainer.model.posterior(batch), model.posterior(batch), run.z(), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
            np.testing.assert_allclose(mine, z[:9], rtol=1e-4, atol=1e-4)


def test_a_table_starts_from_what_was_checked(first, second, train, flags, tmp_path):
    """--table-init wins over --from, whose decoder and latents are of one epoch."""
    other = train(flags, encoder="vlt", holdout="0.2", seed=8, num_epochs=1).folder
    with pytest.raises(InputError, match=r"--table-init .*: was trained on 56 particles"):
        second("semi", table_init=str(other))
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / CHECKSUMS).unlink()
    shutil.copy(copy / "z.1.pkl", copy / "z.pkl")  # of an earlier training that was continued
    table = second("semi", from_run=str(copy), num_epochs=3).model.amort
    np.testing.assert_array_equal(table.latents()[0].numpy(), read_pickles(first / "z.9.pkl"))


def turned(angle):
    turn = torch.eye(3)
    turn[:2, :2] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    return turn


def test_a_pose_is_a_turn_in_the_plane_of_its_view(stack):
    rot = torch.cat([opened(stack).rots, torch.eye(3)[None], -turned(1.0)[None]])
    rot[-1] = torch.tensor([1.0, -1.0, -1.0]).diag()  # from below: the other pole
    turn, view = split_pose(rot)
    torch.testing.assert_close(view.det(), torch.ones(len(rot)))
    torch.testing.assert_close(turn @ view[:, :2], rot[:, :2])
    torch.testing.assert_close(view[:, 2], rot[:, 2])
    torch.testing.assert_close(split_pose(turned(0.7) @ rot)[1], view, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["anchored", "sleep"])
def test_a_particle_that_is_turned_with_its_pose_has_the_same_latent(encoder, second):
    """By a right angle, which moves pixels of the Hartley image onto others: exactly."""
    trainer = second(encoder)
    trainer.prepare_particles(None)
    batch = trainer.loader.read(torch.arange(7))
    batch.ctf, side = None, trainer.particles.D
    batch.image = batch.y
    whole = torch.zeros(7, side**2)
    whole[:, trainer.particles.mask] = batch.y
    other = torch.rot90(whole.view(7, side, side), -1, (1, 2)).flatten(1)
    y = other[:, trainer.particles.mask]
    rot = torch.stack([turned(math.pi / 2) @ r for r in batch.rot])
    with torch.no_grad():
        before = trainer.model.posterior(batch)
        after = trainer.model.posterior(replace(batch, y=y, image=y, rot=rot))
        wrong = trainer.model.posterior(replace(batch, y=y, image=y))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert (before[0] - wrong[0]).abs().mean() > 10 * (before[0] - after[0]).abs().mean()


def test_any_turn_of_the_decoders_images_is_undone(second):
    trainer = second("sleep")
    rot, z = trainer.particles.rots[:9], trainer.latents[0][:9, None]
    turn, view = split_pose(rot)
    images, expected = (trainer.model.fast.images(r, z)[:, 0] for r in (rot, view))
    low = trainer.particles.lattice.freqs2d[trainer.particles.mask].norm(dim=1) < 0.3
    found = trainer.model.amort._turned(images, turn)
    left, before = (
        (image - expected)[:, low].square().sum() / expected[:, low].square().sum()
        for image in (found, images)
    )
    assert left < 0.15 * before


@pytest.mark.parametrize("encoder", ["anchored", "sleep", "resid"])
def test_latents_of_clear_images_are_learnt(encoder, second):
    trainer = second(encoder, batch_size=64, lr=1e-2)
    trainer.prepare_particles(None)
    objective, explained = trainer.objective, []
    objective.noise._gains *= 0.02
    for epoch in (1, 2):
        objective.epoch_start(epoch)
        for _ in range(120):
            trainer.steps.take(next(trainer.batches.loaded()), 0.0)
        explained.append(objective.epoch_metrics()["latent_r2"])
    assert explained[1] > max(explained[0], 0.15), explained


@pytest.mark.parametrize("encoder", ["anchored", "sleep"])
def test_a_second_stage_goes_on_as_if_it_had_not_stopped(encoder, second):
    whole = second(encoder, num_epochs=4)
    whole.fit()
    ends = [read_weights(whole.folder / "weights.4.pkl", "")]
    again = second(encoder, num_epochs=4, load=str(whole.folder / "weights.2.pkl"))
    again.fit()
    ends.append(read_weights(whole.folder / "weights.4.pkl", ""))
    for part in (lambda c: c["amort"]["encoder_state_dict"], lambda c: c["model_state_dict"]):
        for name, value in part(ends[0]).items():
            other = part(ends[1])[name]
            assert torch.equal(value, other) or value.isnan().all(), name
    rates = [group["lr"] for group in again.optimizer.param_groups]
    expected = 2e-5 + (1e-3 - 2e-5) * (1 + math.cos(math.pi * 3 / 4)) / 2
    assert rates == [pytest.approx(expected)]


def test_the_host_reads_a_network_and_refuses_what_it_cannot_read(second, stack, tmp_path, first):
    held = tmp_path / "ind.pkl"
    write_pickle(held, read_pickles(first / "ind_heldout.pkl"))
    argv = [stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--ind", held,
            "-o", tmp_path / "out.pkl", "--out-z", tmp_path / "z.pkl"]  # fmt: skip
    trainer = second("resid")
    trainer.fit()
    folder = trainer.folder
    run_host("eval_images", argv[0], folder / "weights.pkl", "-c", folder / "config.yaml",
             *argv[1:])  # fmt: skip
    z, _ = read_pickles(tmp_path / "z.pkl", 2)
    assert np.isfinite(z).all()
    assert len(z) == 14


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"zdim": 4}, "--zdim 4: --from .* has 3"),
        ({"pdim": 17}, "--dec-dim 17: --from .* has 16"),
        ({"window": False}, "--no-window False: --from .* has True"),
        ({"encoder": "twin"}, "--from: does not apply to --encoder twin"),
        ({"encoder": "vlt"}, "--from: does not apply to --encoder vlt"),
        ({"anchors": 1}, "--anchors 1: at least 2"),
        ({"anchors": 1000}, "--anchors 1000: the run has"),
        ({"encoder": "resid", "enc_mask": -1}, "--enc-mask -1: --from .* no corners"),
    ],
)
def test_mistakes_are_named(more, says, second, tmp_path):
    with pytest.raises(InputError, match=says):
        second(**more)
    assert not (tmp_path / "second").exists()


def test_a_second_stage_goes_on_for_the_same_decoder_alone(first, second, plugins, tmp_path):
    second("sleep", num_epochs=1).fit()
    before = {p: p.read_bytes() for p in (tmp_path / "second").iterdir()}
    shutil.copytree(first, tmp_path / "again")
    epoch = load_run(first, plugins).epoch
    path = tmp_path / f"again/weights.{epoch}.pkl"
    kept = read_weights(path, "")
    for name, value in kept["model_state_dict"].items():
        if name.startswith("decoder."):
            value *= 1.01
    with recorded(path.parent, path.name):
        write_weights(path, epoch, kept["model_state_dict"], **kept["amort"])
    with pytest.raises(InputError, match=r"--from .*again: its decoder is not the one"):
        second("sleep", from_run=str(tmp_path / "again"), load="latest").fit()
    assert before == {p: p.read_bytes() for p in (tmp_path / "second").iterdir()}
    second("sleep", load="latest").fit()


def test_a_run_cannot_be_its_own_second_stage(first, plugins):
    with pytest.raises(InputError, match=r"--from .*: is the output folder"):
        with_run({"from_run": str(first), "outdir": str(first)}, plugins)


def test_shells_that_part_are_named():
    rng = np.random.default_rng(0)
    real, synthetic = rng.gamma(20, size=(2, 400, 6))
    assert Agreement(np.arange(6) / 16, real, synthetic).warning() is None
    synthetic[:, 4] *= 1.3
    found = Agreement(np.arange(6) / 16, real, synthetic)
    assert found.parts.tolist() == [4]
    assert "most in shell 5 (0.250 cycles per pixel), where they have 1.3" in found.warning()


def test_a_stack_without_ctf_or_shifts(plugins, tmp_path):
    stack = write_stack(tmp_path, 40)
    flags = {
        "particles": stack.particles, "poses": stack.poses, "zdim": 2, "num_epochs": 1, "seed": 0,
        "outdir": str(tmp_path / "vlt"), "do_analysis": False, "pdim": 8, "encoder": "vlt",
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    given = {
        "from_run": str(tmp_path / "vlt"), "encoder": "anchored", "outdir": str(tmp_path / "a"),
        "anchors": 3, "num_epochs": 1, "seed": 0, "do_analysis": False,
    }  # fmt: skip
    trainer = Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)
    trainer.fit()
    assert isinstance(trainer.model.amort, AnchoredEncoder)
    assert np.isfinite(load_run(tmp_path / "a", plugins).z()[0]).all()
