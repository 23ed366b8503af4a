"""Decoder and encoder in turns: ``--encoder alternate``; and ``--beta implied``."""

import csv
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import read_pickles

from cryodrgn_amort.core import InputError, epochs, read_weights
from cryodrgn_amort.inference import Fitter
from cryodrgn_amort.models import AlternatingEncoder, kl_divergence
from cryodrgn_amort.runs import load_run, settings_from_flags, with_run
from cryodrgn_amort.training import Trainer, held_out
from cryodrgn_amort.training.implied_beta import ImpliedBeta
from cryodrgn_amort.training.stages import stages_of, weigh_pixels

SMALL = {"encoder": "alternate", "anchors": 4, "qdim": 16}


@pytest.fixture
def settings(flags, plugins):
    return lambda **more: settings_from_flags({**flags, **SMALL, **more}, plugins)


@pytest.mark.parametrize("n", [70, 2000, 131_899])
@pytest.mark.parametrize("more", [{}, {"rounds": 1}, {"rounds": 3}, {"from_run": "first"}])
@pytest.mark.parametrize("num_epochs", [12, 20, 50, 200])
def test_every_epoch_is_of_one_stage(settings, n, more, num_epochs):
    """The first one is the table's, unless a run is given; the last one the encoder's."""
    given = replace(settings(num_epochs=num_epochs, batch_size=8, **{
        k: v for k, v in more.items() if k != "from_run"
    }), from_run=more.get("from_run"))  # fmt: skip
    found = stages_of(given, n, in_turns=True)
    assert [e for s in found for e in range(s.first, s.last + 1)] == list(range(1, num_epochs + 1))
    rounds = more.get("rounds", 2)
    turns = ["encoder", *["decoder", "encoder"] * (rounds - 1)]
    whats = [what for what, _ in itertools.groupby(s.what for s in found)]
    assert whats == ([] if "from_run" in more else ["table"]) + turns
    table = [s for s in found if s.what == "table"]
    done = [s.done(e) for s in table for e in range(s.first, s.last + 1)]
    np.testing.assert_allclose(done, np.arange(len(done)) / max(len(done), 1))
    assert all(s.coarse for s in table[1:])
    assert not any(s.coarse for s in (*table[:1], *found[-2:]))
    for stage in found:
        if stage.what == "encoder":
            made = stage.images_made(8)
            in_all = made["each_epoch"] * (stage.last - stage.first + 1)
            assert in_all <= 256_000 + made["copies"] * 8 * 20 or n == 2000
            assert made["copies"] == 16
            assert stage.batches <= -(-n // 8)
        else:
            assert stage.images_made(8) == {}
    share = sum(s.last - s.first + 1 for s in found if s.what == "encoder") / num_epochs
    assert "from_run" in more or share <= 0.5


def test_too_few_epochs_are_refused(settings):
    with pytest.raises(InputError, match="-n 3: too few epochs for --rounds 2"):
        stages_of(settings(num_epochs=3), 70, in_turns=True)
    second = replace(settings(num_epochs=2), from_run="first")
    with pytest.raises(InputError, match="-n 2: too few epochs for --rounds 2"):
        stages_of(second, 70, in_turns=True)
    with pytest.raises(InputError, match="--rounds 0: must be at least 1"):
        stages_of(settings(rounds=0), 70, in_turns=True)


def rows(folder):
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_a_run_holds_the_answers_of_its_encoder(train, flags, plugins):
    """z.pkl is what the encoder answers, and in each turn the other part stays as it is."""
    trainer = train({**flags, **SMALL}, num_epochs=4, checkpoint=1)
    turn = "encoder 1 of 640 images made up"  # 5 batches of 16 particles, 8 of each
    said = f"4 epochs in turns: table 1, {turn}, decoder 1, {turn}\n"
    assert said in (trainer.folder / "run.log").read_text()
    run = load_run(trainer.folder, plugins)
    fitter = Fitter(run, run.particles(), own=True)
    with torch.no_grad():
        answers = fitter.answer(fitter.loader.read(torch.arange(run.n)))
    for mine, stored in zip(answers, run.z(), strict=True):
        np.testing.assert_allclose(mine.numpy(), stored, atol=1e-5)
    states = [read_weights(trainer.folder / f"weights.{e}.pkl", "") for e in range(1, 5)]
    changed = []
    for before, after in itertools.pairwise(states):
        moved = set()
        for name, value in after["model_state_dict"].items():
            if name.startswith("decoder") and not torch.equal(
                before["model_state_dict"][name], value
            ):
                moved.add("decoder")
        own = [s["amort"]["encoder_state_dict"] for s in (before, after)]
        for name, value in own[1].items():
            if isinstance(value, torch.Tensor) and not torch.equal(own[0][name], value):
                moved.add("encoder" if "network.network" in name else name.split(".")[0])
        changed.append(moved - {"network"})  # its anchors, and the noise that it weighs by
    assert changed == [{"encoder", "table"}, {"decoder", "weights"}, {"encoder", "table"}]
    assert [r["latent_r2"] != "nan" for r in rows(trainer.folder)] == [False, True, False, True]
    mean, logvar = read_pickles(trainer.folder / "z.3.pkl", 2)
    np.testing.assert_array_equal(mean, read_pickles(trainer.folder / "z.2.pkl", 2)[0])
    assert np.isfinite(logvar).all()


def test_new_particles_are_encoded_whatever_their_number(train, flags, plugins, stack, tmp_path):
    trainer = train({**flags, **SMALL, "holdout": "0.3"}, num_epochs=4)
    run = load_run(trainer.folder, plugins)
    held = run.held_out()
    fitter = Fitter(run, held, own=False)
    assert fitter.has_answers
    batch = fitter.loader.read(torch.arange(held.n))
    mean, _ = fitter.answer(batch)
    assert mean.shape == (21, 3)
    assert mean.isfinite().all()


@pytest.mark.parametrize("encoder", ["vlt", "resid"])
def test_turns_go_on_from_a_finished_run(train, flags, plugins, tmp_path, encoder):
    first = train({**flags, "encoder": encoder, "outdir": str(tmp_path / "first")})
    given = {**SMALL, "from_run": str(first.folder), "outdir": str(tmp_path / "second"),
             "num_epochs": 3, "do_analysis": False, "seed": 1, "checkpoint": 1}  # fmt: skip
    trainer = Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)
    assert [s.what for s in trainer.stages] == ["encoder", "decoder", "encoder"]
    table = torch.cat(trainer.model.amort.latents(), 1)
    wanted = np.concatenate(read_pickles(first.folder / "z.pkl", 2), 1)
    np.testing.assert_array_equal(table.numpy(), wanted)
    trainer.fit()
    decoders = [
        {k: v for k, v in read_weights(path, "")["model_state_dict"].items() if "decoder" in k}
        for path in (first.folder / "weights.pkl", *(
            trainer.folder / f"weights.{e}.pkl" for e in (1, 2, 3)
        ))
    ]  # fmt: skip
    same = [all(map(torch.equal, a.values(), b.values()))
            for a, b in itertools.pairwise(decoders)]  # fmt: skip
    assert same == [True, False, True]
    assert trainer.settings.beta == "implied"


def test_turns_of_other_particles_are_refused(train, flags, plugins, tmp_path):
    first = train({**flags, "encoder": "vlt", "outdir": str(tmp_path / "first")})
    given = {**SMALL, "from_run": str(first.folder), "outdir": str(tmp_path / "second"),
             "holdout": "0.2", "seed": 1}  # fmt: skip
    with pytest.raises(InputError, match=r"--from .*first: was trained on 70 particles, these are"):
        Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_epochs": 6}, "-n 6: the run's turns were planned for -n 4"),
        ({"batch_size": 8}, "-b 8: the run's turns were planned for -b 16"),
        ({"rounds": 1}, "--rounds 1: the run's turns were planned for --rounds 2"),
    ],
)
def test_turns_that_were_planned_are_kept(train, flags, more, says):
    first = train({**flags, **SMALL}, num_epochs=4, checkpoint=2)
    load = str(first.folder / "weights.2.pkl")
    with pytest.raises(InputError, match=says):
        train({**flags, **SMALL, "num_epochs": 4, **more}, load=load)


@pytest.mark.parametrize("gains", [[1.0, -1.0, 5.0], [1.0, 1.0, 1.0]])
def test_a_round_that_does_not_help_is_taken_back(train, flags, plugins, monkeypatch, gains):
    """By the ELBO of particles held out; one that went on from there would find the same."""
    elbo, done = held_out._elbo, []

    def judged(trainer, variance):
        found, variance = elbo(trainer, variance)
        done.append(trainer.epoch)
        return torch.zeros_like(found) + sum(gains[: len(done)]), variance

    monkeypatch.setattr(held_out, "_elbo", judged)
    more = {"num_epochs": 9, "rounds": 3, "holdout": "0.3", "checkpoint": 1}
    trainer = train({**flags, **SMALL, **more})
    ends = [s.last for s in trainer.stages if s.what == "encoder"]
    worse = gains[1] < 0
    assert done == (ends[:2] if worse else ends)
    last = ends[0] if worse else ends[-1]
    assert trainer.epoch == epochs(trainer.folder)[-1] == last
    run = load_run(trainer.folder, plugins)
    assert run.epoch == last
    final = read_weights(trainer.folder / "weights.pkl", "")
    of_last = read_weights(trainer.folder / f"weights.{last}.pkl", "")
    assert all(torch.equal(final["model_state_dict"][k], v)
               for k, v in of_last["model_state_dict"].items() if not v.isnan().any())  # fmt: skip
    says = (trainer.folder / "run.log").read_text()
    assert ("the run ends with epoch" in says) == worse


def test_the_elbo_of_particles_held_out(train, flags, plugins):
    """In nats, of the run's own encoder and decoder; by the mean of draws from its posterior."""
    trainer = train({**flags, **SMALL, "holdout": "0.4"}, num_epochs=4)
    found, variance = held_out._elbo(trainer, None)
    run = load_run(trainer.folder, plugins)
    held = run.held_out()
    fitter = Fitter(run, held, own=False)
    batch = fitter.loader.read(torch.arange(held.n))
    mean, logvar = fitter.answer(batch)
    generator, total = torch.Generator().manual_seed(4), 0
    for _ in range(200):
        z = mean + torch.randn(mean.shape, generator=generator) * torch.exp(0.5 * logvar)
        total = total + fitter.model.errors(batch, z)[1].detach() / 200
    wanted = total / (-2 * variance) - kl_divergence(mean, logvar)
    assert abs(float(total.mean()) / len(held.mask) / variance - 1) < 0.01
    assert abs((found - wanted).mean()) < 0.1
    assert np.corrcoef(found, wanted)[0, 1] > 0.99


def test_the_implied_beta_is_twice_what_is_left_of_a_pixel(train, flags, tmp_path):
    """In the first epoch all of it; a training that goes on has the same one."""
    trainer = train({**flags, "encoder": "vlt", "beta": "implied"}, num_epochs=3)
    power = float(trainer.loader.read(torch.arange(70)).y.square().mean())
    log = (trainer.folder / "run.log").read_text()
    each = rows(trainer.folder)
    ratios = [(float(r["loss"]) - float(r["gen_loss"])) * len(trainer.particles.mask)
              / float(r["kld"]) for r in each]  # fmt: skip
    of_noise = 2 / trainer.particles.windowed
    wanted, least = [], of_noise * power
    for row in each:
        wanted.append(least)
        least = min(least, of_noise * float(row["gen_loss"]))
    np.testing.assert_allclose(ratios, wanted, rtol=1e-4)
    assert trainer.beta.value == pytest.approx(least, rel=1e-6)
    assert "beta='implied'" in log
    part = train({**flags, "encoder": "vlt", "beta": "implied", "outdir": str(tmp_path / "b")},
                 num_epochs=2)  # fmt: skip
    again = train({**flags, "encoder": "vlt", "beta": "implied", "outdir": str(tmp_path / "b")},
                  num_epochs=3, load="latest")  # fmt: skip
    assert part.beta.value >= again.beta.value == trainer.beta.value


def test_with_the_implied_beta_the_loss_is_an_elbo(train, flags, plugins):
    """Fits of such a run take it, too."""
    trainer = train({**flags, "encoder": "vlt", "beta": "implied"})
    fitter = Fitter(load_run(trainer.folder, plugins), trainer.particles, own=True)
    scale = fitter.elbo_scale("train")
    assert scale.beta == 2 * scale.variance == 2 * fitter.variance


def test_betas_that_contradict_each_other(flags, plugins):
    for more, says in (
        ({"beta": "implied", "beta_control": 1.0}, "--beta implied and --beta-control exclude"),
        ({"beta": "implicit"}, "--beta implicit: neither a number, nor implied, nor a schedule"),
    ):
        with pytest.raises(InputError, match=says):
            settings_from_flags({**flags, **more}, plugins)


def test_images_are_compared_up_to_a_radius(train, flags):
    """As a plain sum over these pixels has it; all of them when not in training."""
    trainer = train({**flags, "encoder": "vlt"}, num_epochs=1)
    model, batch = trainer.model, trainer.loader.read(torch.arange(9))
    z = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    ctf = torch.cat([batch.ctf, batch.ctf.flip(1)], 1)
    squares = (model.fast.images(batch.rot, z[:, None])[:, 0] * ctf - batch.y).square()
    frequency = trainer.particles.lattice.freqs2d[trainer.particles.mask].norm(dim=1)
    for radius, kept in (
        (4, frequency * 16 < 4.5),
        (2, frequency * 16 < 2.5),
        (100, frequency < 9),
    ):
        model.limit(radius)
        model.train()
        total, each = model.errors(batch, z)
        torch.testing.assert_close(each, squares[:, kept].sum(1), rtol=1e-4, atol=0)
        assert model.pixels(batch) == kept.sum()
        model.decoder.zero_grad()
        total.backward()
        trained = [p for p in model.decoder.parameters() if p.requires_grad]
        assert all(p.grad.abs().sum() > 0 for p in trained)
        model.eval()
        torch.testing.assert_close(model.errors(batch, z)[1], squares.sum(1), rtol=1e-4, atol=0)
        assert model.pixels(batch) == batch.y.shape[1]
    model.limit(None)
    model.train()
    torch.testing.assert_close(model.errors(batch, z)[1], squares.sum(1), rtol=1e-4, atol=0)


def test_latents_are_found_at_low_frequencies(train, flags, tmp_path):
    """High ones change nothing until the decoder's last turn, and then they do."""
    from cryodrgn.mrcfile import parse_mrc, write_mrc

    images = parse_mrc(flags["particles"])[0].copy()
    fourier = np.fft.fft2(images)
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(16, 1 / 16), np.fft.fftfreq(16, 1 / 16)))
    other = np.fft.ifft2(np.where(k > 6.6, 0.3 * fourier, fourier)).real.astype(np.float32)
    write_mrc(str(tmp_path / "other.mrcs"), other, is_vol=False)
    more = {
        **SMALL,
        "num_epochs": 6,
        "checkpoint": 1,
        "l_start": 4,
        "norm": (0.0, 10.0),
        "window": False,
    }
    found = []
    for name, particles in (("a", flags["particles"]), ("b", str(tmp_path / "other.mrcs"))):
        trainer = train({**flags, **more, "particles": particles, "outdir": str(tmp_path / name)})
        assert [s.coarse for s in trainer.stages] == [True, False, False, False]
        assert trainer.model.amort.radius == 4
        decoder = trainer.stages[2].last
        states = (read_weights(trainer.folder / f"weights.{e}.pkl", "")["model_state_dict"]
                  for e in (decoder - 2, decoder))  # fmt: skip
        found.append([{k: v for k, v in s.items() if k.startswith("decoder")} for s in states])
    for (a, b), same in zip(zip(*found, strict=True), (True, False), strict=True):
        assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a) == same


@pytest.mark.parametrize(("l_start", "says"), [(1, "--l-start 1: must be at least 2")])
def test_too_small_a_radius_is_refused(settings, l_start, says):
    with pytest.raises(InputError, match=says):
        stages_of(settings(l_start=l_start, num_epochs=9), 70, in_turns=True)


def test_pixels_weigh_as_the_noise_in_them_says(train, flags):
    """The loss is that of whitened images; with fixed weights in an epoch, from what was left."""
    trainer = train({**flags, **SMALL, "rounds": 1}, num_epochs=4)
    model, encoder = trainer.model, trainer.model.amort
    batch, particles = trainer.loader.read(torch.arange(70)), trainer.particles
    z = encoder.latents()[0]
    ctf = torch.cat([batch.ctf, batch.ctf.flip(1)], 1)
    left = model.fast.images(batch.rot, z[:, None])[:, 0] * ctf - batch.y
    frequency = (particles.lattice.freqs2d[particles.mask].norm(dim=1) * 16).round()
    trainer.stage = trainer.stages[0]
    weigh_pixels(trainer)
    for shell in (1, 3, 8):
        variance = left[:, frequency == shell].square().mean()
        at = encoder.weights[frequency == shell]
        torch.testing.assert_close(at, (1 / variance).expand(len(at)), rtol=1e-3, atol=0)
    model.train()
    weights = encoder.weights / encoder.weights.mean()
    wanted = (weights * left.square()).sum(1)
    torch.testing.assert_close(model.errors(batch, z)[1], wanted, rtol=1e-4, atol=0)
    model.eval()
    torch.testing.assert_close(model.errors(batch, z)[1], left.square().sum(1), rtol=1e-4, atol=0)
    trainer.stage = trainer.stages[-1]
    encoder.weights.fill_(7.0)
    weigh_pixels(trainer)  # in the encoder's turn nobody weighs anything
    assert (encoder.weights == 7).all()


def test_a_network_goes_on_with_the_anchors_that_it_knows(train, flags, monkeypatch):
    """Others, or these in another order, would undo what it has learnt in its first turn."""
    told, learn_from = [], AlternatingEncoder.learn_from

    def noted(self, mean):
        learn_from(self, mean)
        told.append((mean.clone(), self.network.anchors.clone(), self.network.spread.clone()))

    monkeypatch.setattr(AlternatingEncoder, "learn_from", noted)
    train({**flags, **SMALL}, num_epochs=6)
    (first, *known), (then, *still) = told
    assert not torch.equal(first, then)
    assert all(torch.equal(*pair) for pair in zip(known, still, strict=True))
    assert known[0].any()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"anchors": 71}, "--anchors 71: there are 70 particles to choose from"),
        ({"table_lr": -1.0}, "--table-lr -1.0: must be positive"),
        ({"do_pose_sgd": True}, "--do-pose-sgd: does not apply to --encoder alternate"),
        ({"encode_mode": "tilt"}, "--encoder alternate: learns from single images made up"),
        ({"augment": 1}, "--augment: does not apply to --encoder alternate"),
        ({"table_init": "linear"}, "--table-init: does not apply to --encoder alternate"),
    ],
)
def test_what_turns_cannot_do_is_refused_before_they_begin(train, flags, tmp_path, more, says):
    with pytest.raises(InputError, match=says):
        train({**flags, **SMALL, **more}, num_epochs=4)
    assert not (tmp_path / "run").exists()


def test_the_implied_beta_is_that_of_the_pixels_compared(train, flags):
    """Not of those of an earlier stage, whose noise may be weaker."""
    begun, begin = [], ImpliedBeta.begin

    def noted(self, kept=None):
        self.value = 1e-9
        begin(self, kept)
        begun.append((None if kept is None else len(kept), self.value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImpliedBeta, "begin", noted)
        trainer = train({**flags, **SMALL}, num_epochs=6)
    assert [s.what for s in trainer.stages][:2] == ["table", "table"]
    y = trainer.loader.read(torch.arange(70)).y
    frequency = trainer.particles.lattice.freqs2d[trainer.particles.mask].norm(dim=1) * 16
    inside = frequency.round() <= trainer.model.amort.radius
    powers = y.square().mean(), y[:, inside].square().mean()
    wanted = [2 * float(p) / trainer.particles.windowed for p in powers]
    assert [value for _, value in begun[:2]] == pytest.approx(wanted, rel=1e-4)
    assert [kept for kept, _ in begun] == [None, int(inside.sum()), None]


def test_going_back_in_the_only_stage_keeps_its_steps(train, flags):
    """With several processes they have hooks on the parameters, which must not be there twice."""
    trainer = train({**flags, "qdim": 16})
    steps = trainer.steps
    trainer._roll_back("a test")
    assert trainer.steps is steps
    turns = train({**flags, **SMALL, "outdir": flags["outdir"] + "2"}, num_epochs=4)
    steps = turns.steps
    turns._roll_back("a test")
    assert turns.steps is not steps
    assert turns.stage is turns.stages[-1]
