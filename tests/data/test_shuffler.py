"""``--shuffler-size``: random batches, read from front to back."""

import numpy as np
import pytest
import torch
from helpers import read_pickles

from cryodrgn_amort.data import BatchLoader, EncoderInput, ParticleSource, Twin, load_particles
from cryodrgn_amort.data.shuffler import Shuffler


def shuffled(n, batch_size, size, tilts=1, generator=None):
    reads = []

    def rows_of(index):
        return (index[:, None] * tilts + torch.arange(tilts)).flatten()

    def read(rows):
        reads.append(rows)
        return rows[:, None, None].float().expand(-1, 2, 2)

    return Shuffler(n, batch_size, size, rows_of, read, generator), reads


@pytest.mark.parametrize(
    ("n", "size", "tilts"), [(70, 32, 1), (70, 200, 1), (41, 20, 3), (5, 40, 2)]
)
def test_every_particle_comes_once_with_its_own_images(n, size, tilts):
    shuffler, reads = shuffled(n, 8, size, tilts)
    batches = list(shuffler)
    assert len(batches) == len(shuffler) == -(-n // 8)
    assert [len(index) for index, _, _ in batches[:-1]] == [8] * (len(batches) - 1)
    assert sorted(torch.cat([index for index, _, _ in batches]).tolist()) == list(range(n))
    for index, rows, images in batches:
        assert rows.tolist() == [tilts * i + k for i in index.tolist() for k in range(tilts)]
        assert images[:, 0, 0].tolist() == rows.tolist()
    for rows in reads:  # in one run each
        assert (rows.diff() == 1).all()
        assert len(rows) <= max(8, size // 2) * tilts


def test_orders_differ_by_epoch_and_follow_the_seed():
    def orders():
        shuffler, _ = shuffled(70, 8, 32, generator=torch.Generator().manual_seed(3))
        return [torch.cat([index for index, _, _ in shuffler]).tolist() for _ in range(2)]

    first, second = orders()
    assert first != second
    assert orders() == [first, second]
    assert np.abs(np.diff(first[:16])).mean() > 2  # mixed within a block


@pytest.mark.parametrize("shown", [EncoderInput(), Twin(70, 3)])
def test_batches_hold_what_they_hold_without_it(shown, stack):
    particles = load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))
    loader = BatchLoader(particles, shown, memory=0)
    for batch in loader.batches(16, shuffle=True, shuffler_size=32, threads=2):
        expected = loader.read(batch.index)
        for name in ("y", "image", "rot", "ctf"):
            torch.testing.assert_close(getattr(batch, name), getattr(expected, name))


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(flags, train, tmp_path):
    flags |= {"lazy": True, "shuffler_size": 32, "shuffle_seed": 4, "encoder": "vlt"}
    train(flags, outdir=str(tmp_path / "whole"))
    train(flags, outdir=str(tmp_path / "twice"), num_epochs=1)
    train(flags, outdir=str(tmp_path / "twice"), load="latest")
    z = [read_pickles(tmp_path / name / "z.pkl", 2) for name in ("whole", "twice")]
    assert np.array_equal(z[0], z[1])
