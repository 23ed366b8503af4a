"""Evil twins and noise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cryodrgn_amort.errors import InputError
from cryodrgn_amort.inputs import EncoderInput, Noise, Twin
from cryodrgn_amort.particles import ParticleSource, load_particles


@given(n=st.integers(2, 300), seed=st.integers(0, 2**31))
def test_twins(n, seed):
    twin = Twin(n, seed).permutation
    index = torch.arange(n)
    assert torch.equal(twin.sort().values, index)  # no two particles share a twin
    assert (twin != index).all()  # nobody is its own twin
    if n > 2:
        assert (twin[twin] != index).all()  # the pairing is not symmetric
    assert torch.equal(Twin(n, seed).permutation, twin)


def test_one_particle_has_no_twin():
    with pytest.raises(InputError, match="1 particle has no twin"):
        Twin(1, 0)


def test_noise_is_the_same_image_in_any_batch():
    noise = Noise(16, mean=3.0, std=2.0, seed=5)
    together = noise.raw(torch.arange(40))
    torch.testing.assert_close(noise.raw(torch.tensor([31, 2])), together[[31, 2]], rtol=0, atol=0)
    assert together.dtype == torch.float32
    assert together.shape == (40, 16, 16)
    other = Noise(16, mean=3.0, std=2.0, seed=6).raw(torch.arange(40))
    assert abs(np.corrcoef(together.ravel(), other.ravel())[0, 1]) < 0.05
    pairs = np.corrcoef(together.reshape(40, -1))[~np.eye(40, dtype=bool)]
    assert np.abs(pairs).max() < 0.35  # images are independent: sigma is 1/16


def test_noise_has_the_mean_and_variance_asked_for():
    raw = Noise(32, mean=3.0, std=2.0, seed=0).raw(torch.arange(200)).numpy()
    n = raw.size
    assert raw.mean() == pytest.approx(3.0, abs=5 * 2 / n**0.5)
    assert raw.std() == pytest.approx(2.0, abs=5 * 2 / (2 * n) ** 0.5)
    standard = (raw - 3) / 2
    assert (standard**4).mean() == pytest.approx(3, abs=0.1)  # Gaussian


@pytest.fixture(scope="module")
def particles(stack):
    loaded = load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))
    loaded.fill_cache()
    return loaded


def as_shown(particles, i):
    """What the host shows its encoder for particle i: centred, phase-flipped."""
    y = particles.images[[i]]["y"].view(1, -1)
    y = particles.lattice.translate_ht(y, particles.trans[[i]].unsqueeze(1)).view(1, -1)
    return y * particles.ctf(torch.tensor([i])).sign()


def shown(particles, what, index):
    index = torch.tensor(index)
    batch = particles.batch(index, {}, what)
    return batch.image.view(len(index), -1)


def test_the_particle_is_shown_as_the_host_shows_it(particles):
    image = shown(particles, EncoderInput(), [3, 9])
    torch.testing.assert_close(image[1:], as_shown(particles, 9))


def test_the_twin_is_shown_with_its_own_shift_and_phases(particles):
    twin = Twin(particles.n, 1)
    image = shown(particles, twin, [3, 9])
    torch.testing.assert_close(image[:1], as_shown(particles, int(twin.permutation[3])))


def test_noise_goes_through_the_same_preprocessing(particles):
    noise = Noise(particles.box, *particles.raw_mean_std, seed=0)
    image = shown(particles, noise, [5])
    y = particles.images._process(noise.raw(torch.tensor([5])))[1].view(1, -1)
    y = particles.lattice.translate_ht(y, particles.trans[[5]].unsqueeze(1)).view(1, -1)
    torch.testing.assert_close(image, y * particles.ctf(torch.tensor([5])).sign())


@pytest.mark.parametrize("encoder", ["resid", "twin", "noise"])
def test_lazy_reading_shows_the_same(particles, stack, encoder, plugins):
    what = plugins.encoder_input("particle" if encoder == "resid" else encoder).build(
        type("S", (), {"seed": 4})(), particles
    )
    lazy = load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf, lazy=True))
    lazy.fill_cache()
    assert lazy.cache is None
    options = {"batch_size": 16, "shuffle": False}
    for (index, read), (same, lazily) in zip(
        particles.batches(what, **options), lazy.batches(what, **options), strict=True
    ):
        a, b = particles.batch(index, read, what), lazy.batch(same, lazily, what)
        torch.testing.assert_close(a.y, b.y)
        torch.testing.assert_close(a.image, b.image)


def test_run_keeps_its_twins(train, flags):
    from cryodrgn_amort.checkpoints import read_weights

    trainer = train(flags, encoder="twin", qdim=16)
    kept = read_weights(trainer.folder / "weights.pkl", "")["amort"]["input_state"]
    assert torch.equal(kept["permutation"], trainer.shown.permutation)
