"""Copies of particles for training: their geometry, their weight in the loss, and the flags."""

import csv

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import ParticleSource, Roll, Rotation, load_particles
from cryodrgn_amort.models import divergence
from cryodrgn_amort.runs import settings_from_flags
from cryodrgn_amort.training.augment import Augmented


def opened(stack, whole=False):
    return load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf), whole=whole)


def batch_of(particles, index, transform=None, extra_px=None):
    """Preprocess particles from the stack, as the evaluation does; their image may be shifted."""
    from cryodrgn_amort.data import Batch

    raw, rot, trans = particles.raw(index), particles.rots[index], particles.trans[index]
    params = particles.ctf_params[index]
    if transform is not None:
        raw, params = transform.image(raw), transform.ctf(params)
        rot, trans = transform.pose(rot, trans)
    y, ctf = particles.hartley(raw), particles.ctf_of(params)
    shown = particles.centre(y, trans if extra_px is None else trans + extra_px)
    y = particles.masked(particles.centre(y, trans))
    return Batch(index, y, particles.flip(shown, ctf), rot, particles.half(ctf, index))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_quarter_turn_is_that_of_the_particle(stack, angle, whole):
    """Beside the evaluation's own: the image turned first, then preprocessed and centred."""
    particles, index = opened(stack, whole), torch.arange(5)
    turn = Rotation(angle)
    copy = Augmented(particles, 0, 0.0).copy(
        batch_of(particles, index), torch.tensor(float(angle)), torch.zeros(5, 2, dtype=torch.long)
    )
    wanted = batch_of(particles, index, turn)
    torch.testing.assert_close(copy.y, wanted.y, atol=2e-5, rtol=0)
    torch.testing.assert_close(copy.rot, wanted.rot)
    torch.testing.assert_close(copy.ctf, wanted.ctf, atol=1e-5, rtol=0)
    inner = particles.mask if whole else slice(None)
    torch.testing.assert_close(copy.image[:, inner], wanted.image[:, inner], atol=2e-5, rtol=0)


def test_any_angle_moves_what_is_seen_as_it_moves_the_decoder(tmp_path):
    """Images and poses of one small object: what the copy shows is what its pose projects to."""
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation import simulate

    simulate(SimulateOptions(outdir=str(tmp_path), n=4, D=32, snr=float("inf"), classes=1,
                             hinge_deg=0, shift_px=0, use_ctf=False))  # fmt: skip
    particles = load_particles(
        ParticleSource(str(tmp_path / "particles.mrcs"), str(tmp_path / "poses.pkl"))
    )
    raw = particles.raw(torch.arange(4))
    from cryodrgn_amort.data import Batch

    y = particles.masked(particles.centre(particles.hartley(raw), None))
    batch = Batch(torch.arange(4), y, y, particles.rots[:4], None)
    for angle in (25.0, 200.0):
        turn = Rotation(angle)
        still = torch.zeros(4, 2, dtype=torch.long)
        copy = Augmented(particles, 0, 0.0).copy(batch, torch.tensor(angle), still)
        wanted = particles.masked(particles.centre(particles.hartley(turn.image(raw)), None))
        other = particles.masked(
            particles.centre(particles.hartley(Rotation(-angle).image(raw)), None)
        )
        spread = (wanted - other).square().mean()
        assert (copy.y - wanted).square().mean() < 0.01 * spread
        torch.testing.assert_close(copy.rot, turn.pose(batch.rot, torch.zeros(4, 2))[0])
        torch.testing.assert_close(copy.image, copy.y)


def test_only_what_is_shown_is_rolled(stack):
    particles, index = opened(stack), torch.arange(6)
    shift = torch.tensor([[1, 0], [0, 1], [-1, 1], [2, -2], [0, 0], [1, 1]])
    batch = batch_of(particles, index)
    copy = Augmented(particles, 2, 0.0).copy(batch, torch.tensor(0.0), shift)
    torch.testing.assert_close(copy.y, batch.y, atol=2e-5, rtol=0)
    wanted = batch_of(particles, index, extra_px=shift.float())
    torch.testing.assert_close(copy.image, wanted.image, atol=1e-4, rtol=0)
    # centring to the right by one pixel shows what rolling to the right does
    rolled = particles.centre(particles.hartley(Roll(1).image(particles.raw(index[:1]))),
                              particles.trans[:1])  # fmt: skip
    again = particles.flip(copy.image[:1], particles.ctf(index[:1]))
    centred = particles.flip(batch.image[:1], particles.ctf(index[:1]))
    assert (again - rolled).square().mean() < 0.3 * (centred - rolled).square().mean()


def test_rolls_are_whole_pixels_within_bounds_and_turns_are_any(stack, monkeypatch):
    particles = opened(stack)
    seen = []
    monkeypatch.setattr(
        Augmented, "copy", lambda self, batch, angle, shift: seen.append((angle, shift))
    )
    batch = batch_of(particles, torch.arange(40))
    for _ in range(30):
        Augmented(particles, 2, 0.0).copied(batch)
    angles = torch.stack([angle for angle, _ in seen])
    shifts = torch.stack([shift for _, shift in seen])
    assert angles.min() < 60
    assert angles.max() > 300
    assert shifts.unique().tolist() == [-2, -1, 0, 1, 2]


def test_divergence_of_gaussians():
    a, b = (tuple(torch.randn(2, 5, 3, dtype=torch.float64)) for _ in range(2))
    wanted = kl_divergence(*(Normal(m, (0.5 * v).exp()) for m, v in (a, b))).sum(1)
    torch.testing.assert_close(divergence(a, b), wanted)


def test_consistency_adds_the_divergence_of_copy_and_particle(stack):
    particles = opened(stack)
    batch = batch_of(particles, torch.arange(4))

    class Model:
        training = False

        def posterior(self, batch):
            return batch.image[:, :3], batch.image[:, 3:6]

        def losses_of(self, batch, mean, logvar, beta, control):
            from cryodrgn_amort.models import Losses

            zero = torch.zeros(())
            return Losses(zero, zero, zero, beta)

    model = Model()
    for weight in (0.0, 2.0):
        objective = Augmented(particles, 1, weight)
        torch.manual_seed(0)
        copy = objective.copied(batch)
        torch.manual_seed(0)
        result, _ = objective.loss(model, batch, 0.25, None)
        apart = divergence(model.posterior(copy), model.posterior(batch)).mean()
        assert apart > 0
        torch.testing.assert_close(result.total, weight * 0.25 * apart / batch.y.shape[1])


def test_training_on_copies_goes_on_exactly(train, flags, tmp_path):
    flags = {
        **flags,
        "augment": 1,
        "consistency": 1.0,
        "qdim": 16,
        "num_epochs": 4,
        "checkpoint": 2,
    }
    whole = train(flags, outdir=str(tmp_path / "whole"))
    train(flags, num_epochs=2)
    again = train(flags, load="latest")
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = train({**flags, "outdir": str(tmp_path / "plain"), "augment": None, "consistency": 0.0})
    assert not torch.equal(next(plain.model.parameters()), next(whole.model.parameters()))
    with open(tmp_path / "whole/metrics.csv") as handle:
        losses = [float(row["gen_loss"]) for row in csv.DictReader(handle)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"encoder": "vlt", "augment": 1}, "--augment: does not apply to --encoder vlt"),
        ({"encoder": "twin", "augment": 1}, "--augment: does not apply to --encoder twin"),
        ({"augment": -1}, "--augment -1: must not be negative"),
        ({"consistency": 1.0}, "--consistency 1.0: needs copies, --augment"),
        ({"from_run": "run", "augment": 1}, "--augment: does not apply to --from"),
    ],
)
def test_where_it_cannot_be(flags, plugins, more, says):
    with pytest.raises(InputError) as err:
        settings_from_flags({**flags, **more}, plugins)
    assert says in str(err.value)
