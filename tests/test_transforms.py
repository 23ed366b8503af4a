"""Transforms: geometry by one-pixel images, by exact Fourier identities, and by the decoder."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodrgn_amort.errors import InputError
from cryodrgn_amort.particles import ParticleSource, load_particles
from cryodrgn_amort.transforms import Roll, Rotation

BOX = 16
C = BOX // 2


def pixel(row, col):
    image = torch.zeros(1, BOX, BOX)
    image[0, row % BOX, col % BOX] = 1
    return image


def where(image):
    return tuple(int(v) for v in image[0].nonzero()[0])


def test_roll_moves_right():
    assert where(Roll(1).image(pixel(5, 3))) == (5, 4)
    assert where(Roll(1).image(pixel(5, BOX - 1))) == (5, 0)
    assert where(Roll(-2).image(pixel(5, 3))) == (5, 1)


def test_rotation_is_clockwise_about_the_fourier_origin():
    quarter = Rotation(1)
    assert where(quarter.image(pixel(C, C))) == (C, C)
    assert where(quarter.image(pixel(C - 3, C))) == (C, C + 3)  # up goes to the right
    assert where(quarter.image(pixel(C, C + 3))) == (C + 3, C)  # right goes down
    assert where(Rotation(2).image(pixel(C - 3, C + 1))) == (C + 3, C - 1)
    assert where(Rotation(3).image(pixel(C - 3, C))) == (C, C - 3)


@given(seed=st.integers(0, 1000))
def test_four_quarter_turns_are_the_identity(seed):
    rng = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, BOX, BOX, generator=rng)
    rot, trans = torch.randn(2, 3, 3, generator=rng), torch.randn(2, 2, generator=rng)
    image, pose = raw, (rot, trans)
    for _ in range(4):
        image, pose = Rotation(1).image(image), Rotation(1).pose(*pose)
    assert torch.equal(image, raw)
    assert torch.equal(pose[0], rot)
    assert torch.equal(pose[1], trans)
    for k in (2, 3):
        once, steps = Rotation(k), raw
        for _ in range(k):
            steps = Rotation(1).image(steps)
        assert torch.equal(once.image(raw), steps)


@pytest.fixture(scope="module")
def particles(stack):
    return load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_turns_the_symmetrised_hartley_image_exactly(particles, quarters):
    raw = particles.raw(torch.arange(20))
    turned = particles.hartley(Rotation(quarters).image(raw))
    expected = torch.rot90(particles.hartley(raw), -quarters, (1, 2))
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_ctf_turns_with_the_image(particles, quarters):
    params = particles.ctf_params[:10]
    params = params.clone()
    params[:, 2] += 4000  # strong astigmatism
    d = particles.D
    turned = particles.ctf_of(Rotation(quarters).ctf(params)).view(-1, d, d)
    expected = torch.rot90(particles.ctf_of(params).view(-1, d, d), -quarters, (1, 2))
    torch.testing.assert_close(turned, expected, rtol=0, atol=2e-3)  # float32 phases of the CTF


@settings(max_examples=25, deadline=None)
@given(
    quarters=st.integers(1, 3),
    shift_px=st.integers(-5, 5).filter(bool),
    seed=st.integers(0, 999),
)
def test_a_moved_projection_is_the_projection_at_the_moved_pose(quarters, shift_px, seed):
    """One point in space, projected to a pixel: transformed image = image at transformed pose."""
    rng = np.random.default_rng(seed)
    axes = rng.permutation(3)
    rot = np.eye(3)[axes] * rng.choice([-1, 1], 3)[:, None]
    if np.linalg.det(rot) < 0:
        rot[2] *= -1
    point = rng.integers(-2, 3, 3)
    shift = rng.integers(-2, 3, 2)  # the image is shifted by -trans: +trans centres it

    def project(rot, trans_px):
        x, y, _ = np.asarray(rot) @ point
        return pixel(C + round(y - trans_px[1]), C + round(x - trans_px[0]))

    pose = (torch.tensor(rot[None]), torch.tensor(shift[None] * 1.0))
    for transform in (Rotation(quarters), Roll(shift_px)):
        new_rot, new_trans = transform.pose(*pose)
        moved = transform.image(project(rot, shift))
        assert where(moved) == where(project(new_rot[0].numpy(), new_trans[0].tolist()))


def test_arguments_are_checked(particles, plugins):
    def build(name):
        kind, colon, argument = name.partition(":")
        return plugins.transform(kind).build(argument if colon else None, particles)

    assert build("roll").shift_px == 1
    assert build("roll:-3").shift_px == -3
    assert build("rotate:270").quarters == 3
    for wrong in ("roll:0", "roll:16", "roll:x", "roll:1.5", "rotate:45"):
        with pytest.raises(InputError, match=f"--transform {wrong}"):
            build(wrong)
    with pytest.raises(InputError, match="--transform mirror: unknown; known are roll, rotate"):
        build("mirror")
