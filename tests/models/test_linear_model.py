"""The linear model finds what is in the particles, in its place; and nothing where nothing is."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import read_pickles

from cryodrgn_amort.core import InputError, read_z
from cryodrgn_amort.data import BatchLoader, ParticleSource, load_particles
from cryodrgn_amort.measures import Neighbours, class_knn
from cryodrgn_amort.models import LinearModel, whole_ctf
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.simulation import simulate

BOX, N = 24, 600


def made(folder, **given):
    simulate(SimulateOptions(outdir=str(folder), n=N, D=BOX, clean=True, **given))
    return folder


def loader_of(folder, stack="particles"):
    source = ParticleSource(
        particles=str(folder / f"{stack}.mrcs"), poses=str(folder / "poses.pkl"),
        ctf=str(folder / "ctf.pkl"), norm=(0.0, 20.0),
    )  # fmt: skip
    return BatchLoader(load_particles(source, "cpu"), None, memory=1 << 30)


def fitted(folder, components=4, **more):
    model = LinearModel(loader_of(folder), components, 0, 0.85, **more)
    model.fit()
    return model


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    return made(tmp_path_factory.mktemp("linear") / "moving", snr=0.3)


@pytest.fixture(scope="module")
def model(moving):
    return fitted(moving)


def everything(model):
    return model.particles.n, model.posterior(model._loader.read(torch.arange(N)))


def test_classes_are_told_apart(model, moving):
    _, (mean, covariance) = everything(model)
    assert model.found >= 2
    assert model.gain > 5
    z = mean.numpy()
    near = Neighbours(z, np.arange(N))
    assert class_knn(near.own, read_pickles(moving / "labels.pkl"), near.rows).mean() > 0.75
    total = (mean.mT @ mean + covariance.sum(0)) / N  # a standard normal prior is theirs
    np.testing.assert_allclose(total.numpy(), np.eye(len(total)), atol=0.3)


def test_what_it_expects_is_what_is_shown(model, moving):
    """The images without noise; turned over, or a pixel away, they are not."""
    batch = model._loader.read(torch.arange(64))
    clean = loader_of(moving, "clean").read(torch.arange(64)).y[:, model._keep]
    mean, _, (_, _, _, ctf, _, images, _) = model._posterior(batch)
    expected = images[..., 0] + torch.einsum("bpk,bk->bp", images[..., 1:], mean)
    torch.testing.assert_close(ctf, whole_ctf(batch.ctf)[:, model._keep])

    def alike(a, b):
        return float((a * b).sum() / (a.norm() * b.norm()))

    assert alike(expected, clean) > 0.93
    assert alike(images[..., 0], clean) < alike(expected, clean) - 0.02  # the mean alone
    assert alike(expected.flip(1), clean) < 0.7
    moved = model.particles.shift(
        loader_of(moving, "clean").read(torch.arange(64)).y, torch.tensor([[1.0, 0.0]])
    )
    assert alike(expected, moved[:, model._keep]) < 0.9


def test_posteriors_are_those_of_a_gaussian(model):
    """By the covariance of a whole image, whose noise and latents are Gaussian."""
    batch = model._loader.read(torch.arange(3))
    mean, covariance, (_, _, y, _, precision, images, gain) = model._posterior(batch)
    for i in range(3):
        own, shown = images[i, :, 0].double(), images[i, :, 1:].double()
        noise = torch.diag(1 / precision.double())
        whole = shown @ shown.T + noise
        left = y[i].double() - own
        wanted = shown.T @ torch.linalg.solve(whole, left)
        np.testing.assert_allclose(mean[i], wanted, atol=1e-3)
        width = torch.eye(shown.shape[1]) - shown.T @ torch.linalg.solve(whole, shown)
        np.testing.assert_allclose(covariance[i], width, atol=1e-3)
        more = torch.distributions.MultivariateNormal(own, whole).log_prob(y[i].double())
        alone = torch.distributions.MultivariateNormal(own, noise).log_prob(y[i].double())
        assert float(gain[i].sum()) == pytest.approx(float(more - alone), abs=1e-2)


def test_a_damaged_image_shows_nothing(model):
    batch = model._loader.read(torch.arange(8))
    batch.y = batch.y.clone()
    batch.y[3, 5] = float("nan")
    whole = model.posterior(model._loader.read(torch.arange(8)))[0]
    found, covariance = model.posterior(batch)
    assert found.isfinite().all()
    assert covariance.isfinite().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found[others], whole[others])


def test_noise_is_measured(model, moving):
    noise = (
        loader_of(moving).read(torch.arange(N)).y
        - loader_of(moving, "clean").read(torch.arange(N)).y
    )
    power = model._shells.power(noise).mean(0)
    found = model._noise[: model.radius]
    np.testing.assert_allclose(found, power[: model.radius], rtol=0.15)


@pytest.mark.parametrize("snr", [0.3, 0.05])
def test_of_one_structure_it_finds_nothing(tmp_path, snr):
    for seed in range(2):
        folder = made(tmp_path / str(seed), snr=snr, classes=1, hinge_deg=0.0, seed=seed)
        model = fitted(folder)
        assert (model.found, model.gain) == (0, 0.0)
        mean, covariance = everything(model)[1]
        assert not mean.any()
        torch.testing.assert_close(covariance, torch.eye(4).expand_as(covariance))


def test_two_processes_add_up_to_one(model, moving):
    """Each has its particles; what they add up to are the sums of one."""

    class Half:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def sum_(self, tensors):
            pass

    whole = model._expect()
    parts = []
    for rank in (0, 1):
        half = LinearModel(loader_of(moving), 4, 0, 0.85, Half(rank))
        for name in ("_grid", "_keep", "_volumes", "_noise"):
            setattr(half, name, getattr(model, name))
        parts.append(half._expect())
    for name, value in vars(whole).items():
        both = getattr(parts[0], name) + getattr(parts[1], name)
        torch.testing.assert_close(both, value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def test_a_table_starts_with_it(train, flags, caplog):
    """With latents that it does not find at their prior; a training that goes on has them."""
    more = {"encoder": "vlt", "table_init": "linear", "table_freeze": True, "zdim": 10}
    with caplog.at_level(logging.INFO, "cryodrgn_amort"):
        trainer = train(flags, **more)
        assert "components gain" in caplog.text
        caplog.clear()
        train(flags, **more, num_epochs=3, load="latest")
        assert "Epoch: 3" in caplog.text
        assert "components gain" not in caplog.text
    model = LinearModel(trainer.loader, 10, trainer.settings.seed, 0.85)
    model.fit()
    wanted, covariance = model.posterior(trainer.loader.read(torch.arange(70)))
    mean, logvar = read_z(trainer.folder / "z.pkl", "")
    count = wanted.shape[1]
    np.testing.assert_allclose(mean[:, :count], wanted, atol=1e-4)
    variance = covariance.diagonal(dim1=1, dim2=2)
    np.testing.assert_allclose(np.exp(logvar[:, :count]), variance, atol=1e-4)
    assert not mean[:, count:].any()
    assert not logvar[:, count:].any()


def test_a_run_whose_decoder_is_taken_has_its_own_latents(train, flags, tmp_path):
    train(flags, encoder="vlt", num_epochs=1, outdir=str(tmp_path / "first"))
    with pytest.raises(InputError, match="--table-init linear: does not apply to --from"):
        train(flags, encoder="semi", from_run=str(tmp_path / "first"), table_init="linear",
              outdir=str(tmp_path / "semi"))  # fmt: skip


def test_tilts_of_a_particle_tell_of_it_together(tmp_path):
    """Five tell its class better than one does."""
    simulate(SimulateOptions(outdir=str(tmp_path), n=300, D=16, tilts=5, snr=1.0, hinge_deg=0.0))
    source = ParticleSource(
        str(tmp_path / "particles.star"), str(tmp_path / "poses.pkl"), str(tmp_path / "ctf.pkl"),
        ntilts=5,
    )  # fmt: skip
    found = []
    for ntilts in (1, 5):
        loader = BatchLoader(load_particles(replace(source, ntilts=ntilts)), None, memory=1 << 30)
        model = LinearModel(loader, 4, 0, 0.85)
        model.fit()
        z = model.posterior(loader.read(torch.arange(300)))[0].numpy()
        near = Neighbours(z, np.arange(300))
        labels = read_pickles(tmp_path / "labels.pkl")
        found.append(float(class_knn(near.own, labels, near.rows).mean()))
    assert found[1] > found[0] + 0.1
    assert found[1] > 0.8
