"""Transforms: geometry by pixels and spots, by exact Fourier identities, and by a decoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.transform import Rotation as Turn

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import ParticleSource, Roll, Rotation, Transform, load_particles
from cryodrgn_amort.evaluation.codec import Codec
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.runs import load_run, settings_from_flags
from cryodrgn_amort.simulation import simulate
from cryodrgn_amort.training import Trainer

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
    quarter = Rotation(90)
    assert where(quarter.image(pixel(C, C))) == (C, C)
    assert where(quarter.image(pixel(C - 3, C))) == (C, C + 3)  # up goes to the right
    assert where(quarter.image(pixel(C, C + 3))) == (C + 3, C)  # right goes down
    assert where(Rotation(180).image(pixel(C - 3, C + 1))) == (C + 3, C - 1)
    assert where(Rotation(270).image(pixel(C - 3, C))) == (C, C - 3)


@given(seed=st.integers(0, 1000))
def test_four_quarter_turns_are_the_identity(seed):
    rng = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, BOX, BOX, generator=rng)
    rot, trans = torch.randn(2, 3, 3, generator=rng), torch.randn(2, 2, generator=rng)
    image, pose = raw, (rot, trans)
    for _ in range(4):
        image, pose = Rotation(90).image(image), Rotation(90).pose(*pose)
    assert torch.equal(image, raw)
    assert torch.equal(pose[0], rot)
    assert torch.equal(pose[1], trans)
    for k in (2, 3):
        steps = raw
        for _ in range(k):
            steps = Rotation(90).image(steps)
        for same in (90 * k, 90 * k - 360):
            assert torch.equal(Rotation(same).image(raw), steps)


@pytest.fixture(scope="module")
def particles(stack):
    return load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf), whole=True)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_turns_the_symmetrised_hartley_image_exactly(particles, quarters):
    raw = particles.raw(torch.arange(20))
    turned = particles.hartley(Rotation(90 * quarters).image(raw))
    expected = torch.rot90(particles.hartley(raw), -quarters, (1, 2))
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"window": True, "window_r": 0.85},
        {"window": True, "window_r": 0.3},
        {"window": True, "window_r": 0.99},
        {"window": False},
    ],
)
@pytest.mark.parametrize("invert_data", [True, False])
def test_quarter_turns_of_preprocessed_images_are_exact(stack, how, invert_data):
    source = ParticleSource(stack.particles, stack.poses, norm=(0.3, 2.0), **how)
    particles = load_particles(replace(source, invert_data=invert_data))
    raw = particles.raw(torch.arange(20)) + 1.0
    y = particles.hartley(raw)
    for angle_deg in (90, 180, 270, -90):
        turn = Rotation(angle_deg)
        found, expected = turn.hartley(y), particles.hartley(turn.image(raw))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, y, atol=0.1)


def test_only_what_is_exact_is_done_to_preprocessed_images(particles):
    class Mirror(Rotation):
        def image(self, raw):
            return raw.flip(-1)

    class Slower(Rotation):
        def ctf(self, params):
            return params

    y = particles.hartley(particles.raw(torch.arange(3)))
    for transform in (Roll(1), Rotation(30), Rotation(91), Mirror(90)):
        assert transform.hartley(y) is None
    assert Slower(90).hartley(y) is not None


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_ctf_turns_with_the_image(particles, quarters):
    params = particles.ctf_params[:10]
    params = params.clone()
    params[:, 2] += 4000  # strong astigmatism
    d = particles.D
    turned = particles.ctf_of(Rotation(90 * quarters).ctf(params)).view(-1, d, d)
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
    for transform in (Rotation(90 * quarters), Roll(shift_px)):
        new_rot, new_trans = transform.pose(*pose)
        moved = transform.image(project(rot, shift))
        assert where(moved) == where(project(new_rot[0].numpy(), new_trans[0].tolist()))


ANGLES = st.floats(-359, 359).filter(lambda angle_deg: abs(angle_deg) > 0.01)
"""Degrees, nearly all of them no quarter turns."""


def spots(x, y, width_px=1.5, box=32):
    """Images `(B, box, box)` float64 with one Gaussian spot each, at pixels (x, y) from C."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    x, y = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1) for v in (x, y))
    along = [torch.exp(-((axis - v) ** 2) / (2 * width_px**2)) for v in (y, x)]
    return along[0][:, :, None] * along[1][:, None, :]


def matrix(angle_deg):
    """Return the clockwise turn of (x right, y down)."""
    cos, sin = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[cos, -sin], [sin, cos]])


def test_up_turned_by_30_degrees_is_one_o_clock():
    up = Rotation(30).image(spots(0, -8.0))
    expected = spots(8 * 0.5, -8 * 0.75**0.5)
    torch.testing.assert_close(up, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(Rotation(-330).image(spots(0, -8.0)), up)


@settings(max_examples=40, deadline=None)
@given(angle_deg=ANGLES, radius=st.floats(0, 8), towards=st.floats(0, 7))
def test_a_spot_lands_where_it_must(angle_deg, radius, towards):
    at = radius * np.array([np.cos(towards), np.sin(towards)])
    turned = Rotation(angle_deg).image(spots(*at))
    torch.testing.assert_close(turned, spots(*(matrix(angle_deg) @ at)), rtol=0, atol=3e-4)


@settings(max_examples=25, deadline=None)
@given(angle_deg=ANGLES, seed=st.integers(0, 999))
def test_turning_is_orthogonal_so_that_white_noise_stays_white(angle_deg, seed):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, BOX, BOX, generator=rng, dtype=torch.float64)
    turn = Rotation(angle_deg).image
    torch.testing.assert_close((turn(a) * turn(b)).sum(), (a * b).sum(), rtol=0, atol=1e-10)
    if abs(angle_deg) <= 45:
        back = Rotation(-angle_deg).image(turn(a))
        torch.testing.assert_close(back, a, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(first=ANGLES, second=ANGLES)
def test_turns_add_up(first, second):
    image, rot = spots([3, -5], [2, 4]), torch.eye(3, dtype=torch.float64)[None]
    params, trans = torch.zeros(1, 8, dtype=torch.float64), torch.tensor([[2.0, -1]]).double()
    one, two, both = Rotation(first), Rotation(second), Rotation(first + second)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(two.image(one.image(image)), both.image(image), rtol=0, atol=6e-4)
    for once, twice in zip(both.pose(rot, trans), two.pose(*one.pose(rot, trans)), strict=True):
        torch.testing.assert_close(once, twice, **close)
    torch.testing.assert_close(two.ctf(one.ctf(params)), both.ctf(params), **close)


@pytest.mark.parametrize("angle_deg", [90, 180, 270])
def test_quarter_turns_are_the_limit(angle_deg):
    image = spots([3.3, -5], [2, 4.1])
    for almost in (angle_deg - 1e-3, angle_deg + 1e-3):
        turned = Rotation(almost).image(image)
        torch.testing.assert_close(turned, Rotation(angle_deg).image(image), rtol=0, atol=2e-4)


def test_what_comes_in_as_half_or_single_precision_is_turned_in_single():
    image = spots(3, 2)
    for dtype in (torch.float16, torch.float32):
        turned = Rotation(20).image(image.to(dtype))
        assert turned.dtype == torch.float32
        torch.testing.assert_close(turned.double(), Rotation(20).image(image), rtol=0, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(angle_deg=ANGLES, seed=st.integers(0, 999))
def test_a_turned_particle_is_the_particle_at_the_turned_pose_and_ctf(angle_deg, seed):
    """Spots in space, projected, shifted, with an astigmatic CTF: computed without any turning."""
    box, width_px = 64, 2.0
    rng = np.random.default_rng(seed)
    points = rng.uniform(-5, 5, (4, 3))
    rot = torch.from_numpy(Turn.random(random_state=rng).as_matrix())[None]
    trans = torch.from_numpy(rng.uniform(-2, 2, (1, 2)))
    params = torch.tensor([[2.0, 4000, 5500, rng.uniform(0, 180), 300, 2.7, 0.1, 0]]).double()
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    freqs = torch.stack([x, y], -1).view(1, -1, 2) / box  # cycles per pixel

    def particle(rot, trans, params):
        at = torch.from_numpy(points) @ rot[0].T  # pixels from the centre
        phase = (at[:, :2] - trans) @ freqs[0].T
        spectrum = torch.exp(-2j * np.pi * phase).sum(0)
        spectrum = spectrum * torch.exp(-2 * (np.pi * width_px) ** 2 * freqs[0].square().sum(1))
        ctf = host.compute_ctf(freqs / params[:, :1, None], *torch.split(params[:, 1:], 1, 1))
        spectrum = (spectrum * ctf.view(-1)).view(1, box, box)
        shifted = torch.fft.ifftshift(spectrum, dim=(1, 2))
        return torch.fft.fftshift(torch.fft.ifft2(shifted), dim=(1, 2)).real

    turn = Rotation(angle_deg)
    turned = turn.image(particle(rot, trans, params))
    expected = particle(*turn.pose(rot, trans), turn.ctf(params))
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def losses(tmp_path_factory, plugins):
    """Return what measures the loss of a run whose decoder has learnt where the density is."""
    folder = tmp_path_factory.mktemp("turned")
    simulate(SimulateOptions(outdir=str(folder / "data"), n=200, heldout=0, D=24, snr=0.5))
    flags = {
        "particles": str(folder / "data/particles.mrcs"), "poses": str(folder / "data/poses.pkl"),
        "ctf": str(folder / "data/ctf.pkl"), "outdir": str(folder / "run"), "num_epochs": 2,
        "do_analysis": False, "seed": 0, "zdim": 2, "pdim": 32, "players": 1, "qdim": 16,
        "qlayers": 1, "lr": 1e-2,
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    run = load_run(folder / "run", plugins)
    particles = run.particles()
    codec = Codec(particles, *run.load(particles), 256)
    zs = {"z": run.z_mu}
    return lambda *transform: codec.losses(zs, np.arange(particles.n), *transform)["z"].mean()


def test_the_control_of_any_angle_is_0(losses):
    """METRICS.md: image, pose and CTF transformed together explain each other as before."""
    rec = losses()
    for angle_deg in (5, 30, 45, 60, 90, 120, -77.5):
        assert abs(losses(Rotation(angle_deg)) - rec) < 0.005 * rec, angle_deg

    class ImageAlone(Rotation):
        pose = Transform.pose

    assert losses(ImageAlone(30)) > 1.02 * rec


def test_arguments_are_checked(particles, plugins):
    def build(name):
        kind, colon, argument = name.partition(":")
        return plugins.transform(kind).build(argument if colon else None, particles)

    assert build("roll").shift_px == 1
    assert build("roll:-3").shift_px == -3
    assert build("rotate").title == "turned 90 degrees clockwise"
    assert build("rotate:30").title == "turned 30 degrees clockwise"
    assert build("rotate:-22.5").title == "turned 22.5 degrees anticlockwise"
    for wrong in ("roll:0", "roll:16", "roll:x", "roll:1.5"):
        with pytest.raises(InputError, match=f"--transform {wrong}"):
            build(wrong)
    for wrong in ("abc", "nan", "inf", "-inf", "0", "-0.0", "360", "-720", "1e300", "30deg"):
        with pytest.raises(InputError, match=f"^--transform rotate:{wrong}: must be an angle"):
            build(f"rotate:{wrong}")
    with pytest.raises(InputError, match="--transform mirror: unknown; known are roll, rotate"):
        build("mirror")
