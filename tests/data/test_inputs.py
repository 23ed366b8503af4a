"""Evil twins and noise."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import (
    BatchLoader,
    EncoderInput,
    Noise,
    ParticleSource,
    Twin,
    load_particles,
)


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


@pytest.fixture
def particles(stack):
    return load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))


def as_shown(particles, raw, i):
    """What the host shows its encoder for an image with the shift and the CTF of particle i."""
    y = particles.images._process(raw.clone())[1].view(1, -1)
    y = particles.lattice.translate_ht(y, particles.trans[[i]].unsqueeze(1)).view(1, -1)
    return y[:, particles.mask] * particles.ctf(torch.tensor([i])).sign()


def first_batch(particles, what, folder, kept):
    memory = {"float32": 10**9, "no ctf": 70 * 4 * 196, "float16": 75 * 2 * 196, "file": 1000}
    if what is not None and what.raw(torch.tensor([0])) is not None:
        memory = {name: 2 * size for name, size in memory.items()}
    loader = BatchLoader(particles, what, memory=memory.get(kept, 0), folder=folder)
    expected = {
        "stack": "from the stack",
        "float32": "in memory as float32, with",
        "no ctf": "in memory as float32:",
        "float16": "in memory as float16:",
        "file": "temporary file",
    }
    assert expected[kept] in loader.description
    return next(iter(loader.batches(16, shuffle=False)))


@pytest.mark.parametrize("kept", ["stack", "float32", "no ctf", "float16", "file"])
@pytest.mark.parametrize("name", ["particle", "twin", "noise"])
def test_what_is_shown(name, kept, particles, tmp_path):
    """The image, centred and phase-flipped as its own translation and CTF want it."""
    what = {
        "particle": EncoderInput(),
        "twin": Twin(particles.n, 1),
        "noise": Noise(particles.box, *particles.raw_mean_std, seed=0),
    }[name]
    batch = first_batch(particles, what, tmp_path, kept)
    for i in (3, 9):
        shown = int(what.rows(torch.tensor([i])))
        raw = what.raw(torch.tensor([i]))
        raw = particles.raw(torch.tensor([shown])) if raw is None else raw
        close = {"rtol": 1e-3, "atol": 1e-3} if kept == "float16" else {}
        expected = as_shown(particles, raw, shown)
        torch.testing.assert_close(batch.image[[i]], expected, **close)
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("kept", ["stack", "float32", "no ctf", "file"])
def test_what_is_to_be_explained(kept, particles, tmp_path):
    batch = first_batch(particles, None, tmp_path, kept)
    index = torch.arange(16)
    ctf = particles.ctf(index)
    assert batch.image is None
    torch.testing.assert_close(batch.y, particles.centred(index))
    torch.testing.assert_close(batch.ctf, ctf[:, : ctf.shape[1] // 2])
    torch.testing.assert_close(batch.rot, particles.rots[:16])
    # the other half of the CTF is the mirror image, as the decoder takes for granted
    torch.testing.assert_close(batch.ctf, ctf.flip(1)[:, : ctf.shape[1] // 2], rtol=0, atol=1e-3)


def test_loaders_of_the_same_particles_share_them(stack):
    particles = load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))
    noise = Noise(particles.box, *particles.raw_mean_std, seed=0)
    first, second, third = (
        next(iter(BatchLoader(particles, what, memory=10**9).batches(16, shuffle=False)))
        for what in (EncoderInput(), noise, EncoderInput())
    )
    assert torch.equal(first.y, second.y)
    assert torch.equal(first.image, third.image)
    alone = load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))
    expected = next(iter(BatchLoader(alone, noise, memory=10**9).batches(16, shuffle=False)))
    assert torch.equal(second.image, expected.image)


def test_neither_memory_nor_disk(particles):
    loader = BatchLoader(particles, None, memory=1000, folder=None)
    assert loader.from_stack
    assert "fit neither memory nor disk" in loader.description


def test_run_keeps_its_twins(train, flags):
    from cryodrgn_amort.core import read_weights

    trainer = train(flags, encoder="twin", qdim=16)
    kept = read_weights(trainer.folder / "weights.pkl", "")["amort"]["input_state"]
    assert torch.equal(kept["permutation"], trainer.shown.permutation)


def test_particles_are_preprocessed_once_for_several_loaders(particles, monkeypatch):
    """For a network and for a table of the same particles; noise is made in addition."""
    from cryodrgn_amort.data import Particles

    read, raw = [], Particles.raw
    monkeypatch.setattr(
        Particles, "raw", lambda self, rows: read.append(len(rows)) or raw(self, rows)
    )
    for shown in (EncoderInput(), None, EncoderInput(), Noise(particles.box, 0.0, 1.0, 0)):
        loader = BatchLoader(particles, shown, memory=10**9)
        batch = next(iter(loader.batches(16, shuffle=False)))
        assert (batch.image is None) == (shown is None)
    assert sum(read) == particles.n


@pytest.mark.parametrize("window_r", [None, 0.6, 0.85])
def test_noise_within_the_window_is_as_strong_as_before(stack, window_r):
    """White noise, windowed: what is left of its power is said to be left."""
    more = {"window": False} if window_r is None else {"window_r": window_r}
    source = ParticleSource(stack.particles, stack.poses, stack.ctf, norm=(0.0, 1.0), **more)
    particles = load_particles(source)
    white = torch.randn(2000, 16, 16, generator=torch.Generator().manual_seed(0))
    power = float(particles.centre(particles.hartley(white), None).var())
    assert particles.windowed == pytest.approx(power / 16**2, rel=0.05)
