from __future__ import annotations

import bz2
import gzip
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import fsc, mirror, read_pickles, run_host, volume_at, write_pickle
from scipy.spatial.transform import Rotation

from cryodrgn_amort import host
from cryodrgn_amort.core import CHECKSUMS, InputError, locked
from cryodrgn_amort.data import ParticleSource, load_particles
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.simulation import imager, simulate, simulator as module
from cryodrgn_amort.simulation.specimens import BlobModel, VolumeModel, read_volume

D = 32
TABLES = ("particles.mrcs", "poses.pkl", "ctf.pkl", "labels.pkl", "coordinate.pkl", "ind_train.pkl")


def make(folder, **options):
    """Simulate into ``folder`` and read everything back."""
    result = simulate(SimulateOptions(outdir=str(folder), **options))
    read = {
        path.stem: read_pickles(path)
        for path in Path(folder).glob("*.pkl")
        if path.name != "poses.pkl"
    }
    rots, trans = read_pickles(Path(folder) / "poses.pkl")
    return SimpleNamespace(
        result=result,
        folder=Path(folder),
        raw=host.parse_mrc(str(Path(folder) / "particles.mrcs"))[0],
        rots=rots,
        trans_px=trans * (result.D + 1),
        settings=yaml.safe_load((Path(folder) / "simulation.yaml").read_text()),
        **read,
    )


def centre_of_mass(array):
    """Centre of mass, coordinates in the order of the axes, from the origin of the host."""
    total = array.sum()
    axes = range(array.ndim)
    return np.array(
        [
            (array.sum(tuple(a for a in axes if a != axis)) * (np.arange(n) - n // 2)).sum() / total
            for axis, n in enumerate(array.shape)
        ]
    )


def hartley_at(volume, k):
    """Direct Hartley sum of a volume at `(P, 3)` frequencies x y z in cycles per box."""
    grid = (np.arange(len(volume)) - len(volume) // 2) / len(volume)
    x, y, z = (np.exp(-2j * np.pi * k[:, i, None] * grid) for i in range(3))
    fourier = np.einsum("zyp,py,pz->p", np.einsum("zyx,px->zyp", volume, x), y, z, optimize=True)
    return fourier.real - fourier.imag


def gaussian(centre_xyz, box=D, sigma=1.5):
    z, y, x = np.mgrid[:box, :box, :box] - box // 2
    square = (x - centre_xyz[0]) ** 2 + (y - centre_xyz[1]) ** 2 + (z - centre_xyz[2]) ** 2
    return np.exp(-square / (2 * sigma**2)).astype(np.float32)


def lumpy(box=D, seed=3):
    """Return a chiral volume: 25 Gaussians of different heights within 0.3 box of the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-0.17, 0.17, (25, 3)) * box
    heights = rng.uniform(0.5, 2, 25)
    parts = [h * gaussian(c, box, 1.2) for h, c in zip(heights, centres, strict=True)]
    return np.sum(parts, 0).astype(np.float32)


@pytest.fixture
def mrc(tmp_path):
    """Write a volume; returns its path."""

    def write(name, volume, apix=4.0):
        path = str(tmp_path / name)
        host.write_mrc(path, np.asarray(volume), is_vol=True, Apix=apix)
        return path

    return write


# --- geometry, against the host's own lattice, pose table, CTF and shifts


@pytest.mark.parametrize("kind", ["blobs", "volumes"])
def test_images_are_what_the_host_models(tmp_path, mrc, kind):
    given = {"volumes": (mrc("v.mrc", lumpy()),)} if kind == "volumes" else {}
    rigid = {} if given else {"classes": 1, "hinge_deg": 0.0}
    sim = make(tmp_path / "sim", n=6, snr=np.inf, shift_px=3.0, **given, **rigid)
    source = ParticleSource(
        str(sim.folder / "particles.mrcs"),
        str(sim.folder / "poses.pkl"),
        str(sim.folder / "ctf.pkl"),
        window=False,
        norm=(0.0, 1.0),
    )
    particles = load_particles(source, whole=True)
    rows = torch.arange(6)
    seen = particles.centred(rows).numpy().reshape(6, -1)
    ctf = particles.ctf(rows).numpy()
    truth = volume_at(sim.folder / "volumes/class0.mrc")
    k = particles.lattice.coords.numpy() * D  # cycles per box
    k = k[inside := (k**2).sum(1) < (D / 2 - 0.1) ** 2]

    def misfit(volume):
        model = np.stack([hartley_at(volume, k @ rot) for rot in sim.rots]) * ctf[:, inside]
        return np.linalg.norm(model - seen[:, inside]) / np.linalg.norm(model)

    assert misfit(truth) < 2e-3  # tails of the Gaussians, interpolation
    assert misfit(mirror(truth)) > 0.3
    assert misfit(truth.swapaxes(0, 2)) > 0.3


@pytest.mark.parametrize("kind", ["blobs", "volumes"])
def test_translation_centres_and_contrast_is_negative(tmp_path, mrc, kind):
    p = np.array([5.0, -3.0, 2.0])
    given = {"volumes": (mrc("v.mrc", gaussian(p)),)} if kind == "volumes" else {}
    rigid = {} if given else {"classes": 1, "hinge_deg": 0.0}
    rots = Rotation.from_euler("zyz", [[0, 0, 0], [90, 0, 0], [20, 70, 110]], degrees=True)
    trans_px = np.array([[3.0, 0], [0, -2], [1.5, 2.5]])
    poses = write_pickle(
        tmp_path / "poses.pkl", (rots.as_matrix(), (trans_px / (D + 1)).astype(np.float32))
    )
    sim = make(tmp_path / "sim", snr=np.inf, use_ctf=False, poses=poses, **given, **rigid)
    if not given:
        p = centre_of_mass(volume_at(sim.folder / "volumes/class0.mrc"))[::-1]
    for raw, rot, t in zip(sim.raw, rots.as_matrix(), trans_px, strict=True):
        assert -raw.min() > 10 * abs(raw.max())
        np.testing.assert_allclose(centre_of_mass(-raw)[::-1], (rot @ p)[:2] - t, atol=0.02)


def test_blob_projection_is_the_slice_of_its_volume():
    model = BlobModel(D)
    rng = np.random.default_rng(0)
    rots, shift = (
        Rotation.from_quat(rng.normal(size=(6, 4))).as_matrix(),
        rng.uniform(-2, 2, (6, 2)),
    )
    for label, t in ((0, 0.1), (3, 0.9)):
        drawn = model.project(rots, shift, np.full(6, label), np.full(6, t))
        slices = VolumeModel([model.volume(label, t)], ["v"]).project(rots, shift, np.zeros(6, int))
        # slices lack what is beyond Nyquist
        assert (drawn - slices).norm() / drawn.norm() < 3e-3


def test_projection_is_the_sum_over_z():
    model, one = BlobModel(D), np.ones(1)
    for label in range(5):
        image = model.project(np.eye(3)[None], np.zeros((1, 2)), one.astype(int) * label, one)[0]
        np.testing.assert_allclose(image, model.volume(label, 1.0).sum(0), atol=2e-4 * image.max())


def test_slices_are_accurate_far_from_the_origin():
    volume = gaussian((9, -6, 7))
    rot = Rotation.from_euler("zyz", [30, 50, 70], degrees=True).as_matrix()
    image = VolumeModel([volume], ["v"]).project(rot[None], np.zeros((1, 2)), np.zeros(1, int))[0]
    seen = gaussian((*(rot @ [9, -6, 7])[:2], 0)).sum(0)
    np.testing.assert_allclose(image, seen, atol=0.01 * seen.max())


# --- heterogeneity


def test_compositions_and_arm():
    model = BlobModel(D)
    mass = [model.volume(c, 0.5).sum() for c in range(5)]
    blocks = np.sum(BlobModel.COMPOSITIONS, 1)
    np.testing.assert_allclose(np.diff(mass) / (mass[1] - mass[0]), np.diff(blocks), atol=0.01)
    assert model.names[2] == "core+block0+block1"
    assert np.abs(model.volume(0, 0.0) - model.volume(0, 1.0)).max() > 0.5
    rigid = BlobModel(D, classes=1, hinge_deg=0)
    np.testing.assert_array_equal(rigid.volume(0, 0.0), model.volume(3, 0.5))


def test_labels_follow_the_shares(tmp_path):
    sim = make(tmp_path / "a", n=3000, D=16)
    np.testing.assert_allclose(np.bincount(sim.labels) / 3000, BlobModel.SHARES, atol=0.03)
    assert 0 <= sim.coordinate.min() < 0.01
    assert 0.99 < sim.coordinate.max() <= 1
    written = [c["share"] for c in sim.settings["classes"]]
    np.testing.assert_allclose(written, np.bincount(sim.labels) / 3000)
    sim = make(tmp_path / "b", n=3000, D=16, classes=2, shares=(1, 3))
    np.testing.assert_allclose(np.bincount(sim.labels) / 3000, [0.25, 0.75], atol=0.03)


def test_truth_on_disk(tmp_path):
    sim = make(tmp_path / "sim", n=64)
    model = BlobModel(D)
    names = {path.stem for path in (sim.folder / "volumes").glob("*.mrc")}
    times = ("0.00", "0.25", "0.50", "0.75", "1.00")
    assert names == {"mean"} | {f"class{c}_t{t}" for c in range(5) for t in times}
    np.testing.assert_allclose(
        volume_at(sim.folder / "volumes/class4_t0.25.mrc"), model.volume(4, 0.25)
    )
    average = np.mean(
        [model.volume(c, t) for c, t in zip(sim.labels, sim.coordinate, strict=True)], 0
    )
    mean = volume_at(sim.folder / "volumes/mean.mrc")
    assert np.linalg.norm(mean - average) < 0.01 * np.linalg.norm(average)


def test_homogeneous_set_has_no_motion(tmp_path):
    sim = make(tmp_path / "sim", n=10, classes=1, hinge_deg=0.0)
    assert not sim.labels.any()
    assert not hasattr(sim, "coordinate")
    assert {p.name for p in (sim.folder / "volumes").glob("*.mrc")} == {"class0.mrc", "mean.mrc"}


def test_user_volumes(tmp_path, mrc):
    a, b = gaussian((4, 0, 0)), gaussian((0, 0, 0))
    paths = mrc("a.mrc", a, 3.5), mrc("b.mrc", b, 3.5)
    sim = make(tmp_path / "sim", n=40, volumes=paths, shares=(3, 1), snr=np.inf, use_ctf=False)
    assert 20 < (sim.labels == 0).sum() < 40
    for label, volume in enumerate((a, b)):
        np.testing.assert_array_equal(volume_at(sim.folder / f"volumes/class{label}.mrc"), volume)
    share = np.mean(sim.labels == 0)
    np.testing.assert_allclose(
        volume_at(sim.folder / "volumes/mean.mrc"), share * a + (1 - share) * b, atol=1e-6
    )
    source = host.ImageSource.from_file(str(sim.folder / "particles.mrcs"), lazy=True)
    assert (source.n, source.D, source.apix) == (40, D, 3.5)
    assert not hasattr(sim, "coordinate")
    assert not (sim.folder / "ctf.pkl").exists()
    # the second class is centred: the shift alone moves it
    for i in np.flatnonzero(sim.labels == 1):
        np.testing.assert_allclose(centre_of_mass(-sim.raw[i])[::-1], -sim.trans_px[i], atol=0.02)


def write_map(path, volume, kind=np.float32, order="<", apix=6.0):
    """Write a volume as the format has it: 1,024 bytes of header, then the voxels."""
    mode = {np.int8: 0, np.int16: 1, np.float32: 2, np.uint16: 6, np.float16: 12}[kind]
    words = np.zeros(256, np.int32)
    words[[0, 1, 2]] = words[[7, 8, 9]] = volume.shape[::-1]
    words[3] = mode
    words[10:13] = (np.array(volume.shape[::-1]) * apix).astype(np.float32).view(np.int32)
    words[16:19] = 1, 2, 3
    head = bytearray(words.astype(f"{order}i4").tobytes())
    head[208:212], head[212:214] = b"MAP ", b"\x44\x44" if order == "<" else b"\x11\x11"
    data = bytes(head) + volume.astype(np.dtype(kind).newbyteorder(order)).tobytes()
    opened = {".gz": gzip.open, ".bz2": bz2.open}.get(Path(path).suffix, open)
    with opened(path, "wb") as handle:
        handle.write(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind", "order"),
    [("a.mrc", np.float32, ">"), ("a.map.gz", np.float32, "<"), ("a.mrc.bz2", np.float32, ">"),
     ("A.MRC", np.int16, "<"), ("a.map", np.float16, "<"), ("a.ccp4", np.int8, "<"),
     ("a.mrc", np.uint16, ">")],
)  # fmt: skip
def test_maps_as_people_have_them(name, kind, order, tmp_path):
    volume = (100 * gaussian((2, 0, 0), 16)).round()
    found, apix = read_volume(write_map(tmp_path / name, volume, kind, order))
    np.testing.assert_array_equal(found, volume)
    assert found.dtype == np.float32
    assert apix == 6.0


def test_maps_with_negative_density_are_used_as_they_are(tmp_path, mrc, caplog):
    decoded = gaussian((3, 0, 0)) - 0.4  # a mean below 0, as decoded volumes have it
    np.testing.assert_array_equal(read_volume(mrc("decoded.mrc", decoded))[0], decoded)
    assert not caplog.text
    sim = make(tmp_path / "sim", n=4, volumes=(mrc("inverted.mrc", -gaussian((0, 0, 0))),))
    assert "inverted.mrc: its strongest density is negative" in caplog.text
    assert sim.labels.tolist() == [0] * 4


def test_smaller_maps_are_padded_about_their_middle(tmp_path, mrc):
    whole = gaussian((3, -2, 1), 32)
    part = whole[4:29, 2:30, 6:27]  # 25 x 28 x 21, whose middles are those of the whole
    starts = [16 - size // 2 for size in part.shape]
    cut = whole[tuple(slice(s, s + size) for s, size in zip(starts, part.shape, strict=True))]
    found, _ = read_volume(mrc("cut.mrc", np.ascontiguousarray(cut)), box=32)
    np.testing.assert_allclose(found, whole, atol=0.02)
    sim = make(tmp_path / "sim", n=4, D=32, volumes=(mrc("small.mrc", gaussian((0, 0, 0), 16)),))
    assert sim.raw.shape == (4, 32, 32)


# --- noise


@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_snr(tmp_path, noise):
    sim = make(tmp_path / "sim", n=1500, snr=0.2, noise=noise, clean=True)
    clean = volume_at(sim.folder / "clean.mrcs").astype(float)
    added = sim.raw - clean
    assert clean.var() / added.var() == pytest.approx(0.2, rel=0.03)
    assert sim.result.noise_sigma == pytest.approx(added.std(), rel=0.01)
    assert sim.settings["noise_sigma"] == sim.result.noise_sigma
    assert abs(added.mean()) < 0.01 * added.std()
    power = (np.abs(np.fft.fft2(added[:200])) ** 2).mean(0)
    ratio = power[:2, :2].mean() / power[D // 2, D // 2]
    expected = 1 + 36 * 0.5 if noise == "coloured" else 1.0  # 1 + (k / (1/6))**2 at the corner
    assert ratio == pytest.approx(expected, rel=0.15)


def test_no_noise(tmp_path):
    sim = make(tmp_path / "sim", n=20, snr=np.inf, clean=True)
    np.testing.assert_array_equal(sim.raw, volume_at(sim.folder / "clean.mrcs"))
    assert sim.result.noise_sigma == 0


# --- the same bytes


def test_bytes_depend_on_the_seed_and_not_on_the_chunk(tmp_path, monkeypatch):
    common = {"n": 150, "heldout": 20, "noise": "coloured", "clean": True}
    folders = {}
    for name, more in {
        "a": {},
        "again": {},
        "small": {},
        "odd": {},
        "seed": {"seed": 1},
    }.items():
        monkeypatch.setattr(module, "_CHUNK", {"small": 64, "odd": 100}.get(name, 512))
        folders[name] = make(tmp_path / name, **common, **more).folder
    for file in (*TABLES, "clean.mrcs", "ind_heldout.pkl"):
        wanted = (folders["a"] / file).read_bytes()
        for same in ("again", "small", "odd"):
            assert (folders[same] / file).read_bytes() == wanted, (same, file)
        assert (folders["seed"] / file).read_bytes() != wanted, file


def test_user_volumes_give_the_same_bytes(tmp_path, mrc, monkeypatch):
    paths = mrc("a.mrc", gaussian((4, 0, 0))), mrc("b.mrc", gaussian((0, 3, 0)))
    stacks = []
    for chunk in (64, 512):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        stacks.append(make(tmp_path / f"{chunk}", n=130, volumes=paths).raw)
    np.testing.assert_array_equal(*stacks)


def test_the_stack_is_streamed(tmp_path, monkeypatch):
    sizes, together = [], []
    clean = imager.ModelImager.clean

    def spy(self, rows):
        temporary = tmp_path / "sim/.particles.mrcs.tmp"
        sizes.append(temporary.stat().st_size if temporary.exists() else 0)
        together.append(len(rows))
        return clean(self, rows)

    monkeypatch.setattr(imager.ModelImager, "clean", spy)
    monkeypatch.setattr(module, "_CHUNK", 128)
    make(tmp_path / "sim", n=1280)
    assert max(together) == 64
    written = [size // (4 * D * D) for size in sizes[-20:]]
    held = [64 * i - done for i, done in enumerate(written)]
    assert max(held) <= 128 + 64  # what is written may still be in the file's buffer
    assert not [p for p in (tmp_path / "sim").iterdir() if p.name.startswith(".")]


def test_progress_is_plain_lines_without_a_terminal(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    caplog.set_level(logging.INFO, "cryodrgn_amort")
    make(tmp_path / "sim", n=2000, D=16)
    lines = [m for m in caplog.messages if m.endswith("images simulated")]
    assert len(lines) == 10
    assert lines[-1].startswith("2000/2000")


# --- split and tables


def test_split_is_random_disjoint_and_complete(tmp_path):
    sim = make(tmp_path / "sim", n=90, heldout=30)
    assert (len(sim.ind_train), len(sim.ind_heldout), len(sim.raw)) == (90, 30, 120)
    both = np.concatenate([sim.ind_train, sim.ind_heldout])
    np.testing.assert_array_equal(np.sort(both), np.arange(120))
    assert sim.ind_heldout.min() < 60 < sim.ind_heldout.max()
    assert both.dtype == np.int64
    whole = make(tmp_path / "whole", n=9)
    np.testing.assert_array_equal(whole.ind_train, np.arange(9))
    assert not hasattr(whole, "ind_heldout")


def test_user_tables(tmp_path, stack):
    sim = make(tmp_path / "sim", poses=stack.poses, ctf=stack.ctf, n=20, heldout=10)
    np.testing.assert_array_equal(sim.rots, stack.rots[:30])
    np.testing.assert_allclose(sim.trans_px, stack.trans[:30] * (D + 1), atol=1e-6)
    np.testing.assert_array_equal(sim.ctf[:, 2:], stack.ctf_table[:30, 2:])
    assert (sim.ctf[:, 0] == D).all()
    wanted = stack.ctf_table[:30, 0] * stack.ctf_table[:30, 1] / D
    np.testing.assert_allclose(sim.ctf[:, 1], wanted, rtol=1e-6)
    source = host.ImageSource.from_file(str(sim.folder / "particles.mrcs"), lazy=True)
    assert source.apix == pytest.approx(wanted[0])
    every = make(tmp_path / "every", poses=stack.poses, heldout=10)
    assert (every.result.n, every.result.heldout) == (stack.n - 10, 10)
    assert len(every.ctf) == stack.n
    drawn = make(tmp_path / "drawn", ctf=stack.ctf)
    assert len(drawn.rots) == stack.n
    assert 0 < np.abs(drawn.trans_px).max() <= 1.5


def test_poses_without_translations(tmp_path, stack):
    poses = write_pickle(tmp_path / "rots.pkl", stack.rots)
    assert not make(tmp_path / "sim", poses=poses).trans_px.any()


def test_rotations_are_uniform(tmp_path):
    sim = make(tmp_path / "sim", n=3000, D=16)
    for axis in range(3):  # where the axes go: mean 0, second moments 1/3
        seen = sim.rots[:, :, axis].astype(float)
        np.testing.assert_allclose(seen.mean(0), 0, atol=0.05)
        np.testing.assert_allclose(seen.T @ seen / 3000, np.eye(3) / 3, atol=0.03)


# --- the folder


def test_overwrite_leaves_nothing_of_the_earlier_simulation(tmp_path):
    make(tmp_path / "sim", n=10, heldout=5, clean=True)
    (tmp_path / "sim/volumes/own.mrc").write_text("the user's")
    with pytest.raises(InputError, match=r"-o .*already holds particles\.mrcs; give --overwrite"):
        simulate(SimulateOptions(outdir=str(tmp_path / "sim"), n=10))
    make(tmp_path / "sim", n=10, classes=1, hinge_deg=0.0, use_ctf=False, overwrite=True)
    assert {str(p.relative_to(tmp_path / "sim")) for p in (tmp_path / "sim").rglob("*")} == {
        "particles.mrcs", "poses.pkl", "labels.pkl", "ind_train.pkl", "simulation.yaml",
        "volumes", "volumes/class0.mrc", "volumes/mean.mrc", "volumes/own.mrc", CHECKSUMS,
        f"volumes/{CHECKSUMS}",
    }  # fmt: skip


def test_interruption_leaves_the_earlier_simulation(tmp_path, monkeypatch):
    make(tmp_path / "sim", n=200)
    before = {p: p.read_bytes() for p in (tmp_path / "sim").rglob("*") if p.is_file()}

    def interrupted(self, rows, stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(imager.ModelImager, "noise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "sim", n=100, seed=5, overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "sim").rglob("*") if p.is_file()} == before


def test_two_calls_do_not_share_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", "this test"):
        with pytest.raises(InputError, match="another simulate_amort writes to it"):
            simulate(SimulateOptions(outdir=str(tmp_path / "out"), n=10))
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_inputs_are_never_replaced(tmp_path):
    sim = make(tmp_path / "sim", n=10)
    for flag, given in (
        ("--poses", {"poses": str(sim.folder / "poses.pkl")}),
        ("--ctf", {"ctf": str(sim.folder / "ctf.pkl")}),
        ("--volumes", {"volumes": (str(sim.folder / "volumes/mean.mrc"),)}),
    ):
        with pytest.raises(InputError, match=f"{flag} .*would be replaced"):
            simulate(SimulateOptions(outdir=str(sim.folder), overwrite=True, **given))


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "0"], "-n 0: must be at least 1"),
        (["--heldout", "-1"], "--heldout -1"),
        (["--seed", "-1"], "--seed -1"),
        (["-D", "33"], "-D 33: an even box"),
        (["-D", "8"], "-D 8: an even box"),
        (["-D", "1000000"], "-D 1000000: volumes of this box do not fit memory"),
        (["-n", str(10**15)], "out of memory: Unable to allocate"),
        (["--snr", "0"], "--snr 0.0: must be positive"),
        (["--snr", "nan"], "--snr nan"),
        (["--apix", "0"], "--apix 0.0"),
        (["--apix", "inf"], "--apix inf"),
        (["--shift-px", "-1"], "--shift-px -1.0"),
        (["--shift-px", "nan"], "--shift-px nan"),
        (["--shift-px", "16"], "--shift-px 16.0: must be less than half the box of 32"),
        (["--hinge-deg", "200"], "--hinge-deg 200.0"),
        (["--classes", "6"], "--classes 6: 1 to 5"),
        (["--classes", "0"], "--classes 0: 1 to 5"),
        (["--shares", "1", "2"], "--shares 1.0 2.0: 5 classes need as many"),
        (["--shares", "1", "1", "1", "1", "-1"], "must not be negative"),
        (["--classes", "1", "--shares", "0"], "--shares 0.0"),
        (["--noise", "pink"], "--noise"),
        (["--poses", "missing.pkl"], "--poses missing.pkl: no such file"),
        (["--ctf", "missing.pkl"], "--ctf missing.pkl: no such file"),
        (["--volumes", "missing.mrc"], "--volumes missing.mrc: no such file"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, cli, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("simulate_amort", "-o", "sim", *argv)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "sim").exists()


def refused(tmp_path, match, **options):
    with pytest.raises(InputError, match=match):
        simulate(SimulateOptions(outdir=str(tmp_path / "sim"), **options))
    assert not (tmp_path / "sim").exists()


def test_bad_tables(tmp_path, stack):
    short = write_pickle(tmp_path / "short.pkl", stack.ctf_table[:7])
    empty = write_pickle(tmp_path / "empty.pkl", stack.ctf_table[:0])
    text = write_pickle(tmp_path / "text.pkl", "poses")
    ragged = write_pickle(tmp_path / "ragged.pkl", [[1.0], [1.0, 2.0]])
    refused(
        tmp_path,
        f"--poses {stack.poses} has 70 rows and --ctf {short} has 7 rows",
        poses=stack.poses,
        ctf=short,
    )
    refused(tmp_path, "-n 60 and --heldout 11: .* has only 70 rows", poses=stack.poses, n=60,
            heldout=11)  # fmt: skip
    refused(tmp_path, "--heldout 70: .* has only 70 rows", poses=stack.poses, heldout=70)
    refused(tmp_path, "has only 0 rows", ctf=empty)
    refused(tmp_path, "--poses .*text.pkl: not a table", poses=text)
    refused(tmp_path, "--ctf .*ragged.pkl: not a table", ctf=ragged)
    refused(tmp_path, "--poses .*ctf.pkl: rotations have shape", poses=stack.ctf)
    refused(tmp_path, "--ctf .*: not CTF parameters", ctf=write_pickle(tmp_path / "r", stack.rots))
    refused(tmp_path, "--ctf .*: contradicts --no-ctf", ctf=stack.ctf, use_ctf=False)
    refused(tmp_path, "--apix 2.0: with --ctf", ctf=stack.ctf, apix=2.0)
    refused(tmp_path, "--shift-px 1.0: with --poses", poses=stack.poses, shift_px=1.0)


def test_bad_volumes(tmp_path, mrc):
    good, other = mrc("good.mrc", gaussian((0, 0, 0))), mrc("other.mrc", gaussian((0, 0, 0), 16))
    refused(tmp_path, "--volumes .*good.mrc: 32x32x32 does not fit into -D 16", D=16,
            volumes=(good,))  # fmt: skip
    refused(tmp_path, "--volumes .*other.mrc: its box of 16 px .*good.mrc.*-D 32 pads smaller",
            volumes=(good, other))  # fmt: skip
    finer = mrc("finer.mrc", gaussian((0, 0, 0)), 2.0)
    refused(tmp_path, "finer.mrc: its pixel size of 2.0 does not fit", volumes=(good, finer))
    for name, volume, why in (
        ("flat", np.ones((32, 32, 32), np.float32), "constant"),
        ("nan", np.full((32, 32, 32), np.nan, np.float32), "not finite"),
        ("stack", np.ones((3, 32, 32), np.float32), "32x32x3 is not a cube; -D 32 or more pads"),
        ("odd", gaussian((0, 0, 0), 33), "an even box .*; -D 34 or more pads"),
    ):
        refused(tmp_path, f"--volumes .*{name}.mrc: .*{why}", volumes=(mrc(f"{name}.mrc", volume),))
    text = tmp_path / "text.mrc"
    text.write_text("no volume")
    refused(tmp_path, "--volumes .*text.mrc: not a readable", volumes=(str(text),))
    cut = tmp_path / "cut.mrc"
    cut.write_bytes(Path(good).read_bytes()[:5000])
    refused(tmp_path, "--volumes .*cut.mrc: not a readable", volumes=(str(cut),))
    permuted = bytearray(Path(good).read_bytes())
    permuted[64:76] = np.int32([3, 2, 1]).tobytes()
    (tmp_path / "permuted.mrc").write_bytes(permuted)
    refused(tmp_path, r"axes are stored in the order \(3, 2, 1\)",
            volumes=(str(tmp_path / "permuted.mrc"),))  # fmt: skip
    refused(tmp_path, "--classes 2: with --volumes", volumes=(good,), classes=2)
    refused(tmp_path, "--hinge-deg 10.0: .* --volumes", volumes=(good,), hinge_deg=10.0)


def test_unsafe_pickles_are_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path, "--poses .*evil.pkl", poses=str(tmp_path / "evil.pkl"))
    assert not ran.exists()


# --- the host gets the volume back


@pytest.mark.parametrize("kind", ["blobs", "volumes", "no_ctf"])
def test_backproject_voxel_recovers_the_volume(tmp_path, mrc, cli, kind):
    argv = {
        "blobs": ["--classes", "1", "--hinge-deg", "0"],
        "no_ctf": ["--classes", "1", "--hinge-deg", "0", "--no-ctf"],
        "volumes": ["--volumes", mrc("v.mrc", lumpy())],
    }[kind]
    code, _, err = cli("simulate_amort", "-o", tmp_path / "sim", "-n", 2500, "--snr", 100, *argv)
    assert code == 0, err
    sim = tmp_path / "sim"
    ctf = [] if kind == "no_ctf" else ["--ctf", sim / "ctf.pkl"]
    run_host(
        "backproject_voxel", sim / "particles.mrcs", "--poses", sim / "poses.pkl", *ctf,
        "-o", tmp_path / "back", "--no-half-maps",
    )  # fmt: skip
    found, truth = volume_at(tmp_path / "back/backproject.mrc"), volume_at(sim / "volumes/mean.mrc")
    half_nyquist = D // 4
    # the host takes the images' mean away, and with it the volume's: shell 0 is rounding
    assert fsc(found, truth)[1 : half_nyquist + 1].min() >= 0.95
    for axis in range(3):
        mirrored = fsc(found, mirror(truth, axis))[half_nyquist // 2 : half_nyquist + 1]
        assert mirrored.mean() < 0.65
