"""Molecules from atomic models, against gemmi's scattering factors, direct sums, and the host."""

import gzip
import shutil
from pathlib import Path

import gemmi
import numpy as np
import pytest
import scipy.constants as si
import torch
import yaml
from helpers import fsc, mirror, read_pickles, run_host, volume_at
from scipy.spatial.transform import Rotation

from cryodrgn_amort import host
from cryodrgn_amort.core import CHECKSUMS, InputError
from cryodrgn_amort.data import ParticleSource, load_particles
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.simulation import potential as potential_module, simulate, simulator
from cryodrgn_amort.simulation.atoms import load_atoms
from cryodrgn_amort.simulation.parts import Part, PartModel
from cryodrgn_amort.simulation.potential import Atoms, potential
from cryodrgn_amort.simulation.truth import load_truth

D, APIX = 32, 3.0
VOLTS = si.h**2 / (2 * np.pi * si.m_e * si.e) * 1e20


def chain(name, places, element="C", b=20.0, occ=1.0):
    found = gemmi.Chain(name)
    for i, place in enumerate(places):
        residue, atom = gemmi.Residue(), gemmi.Atom()
        residue.name, residue.seqid = "ALA", gemmi.SeqId(str(i + 1))
        atom.name, atom.element = "CA", gemmi.Element(element)
        atom.pos, atom.b_iso, atom.occ = gemmi.Position(*map(float, place)), b, occ
        residue.add_atom(atom)
        found.add_residue(residue)
    return found


def write(path, *models):
    """Write models, lists of chains; returns the path."""
    structure = gemmi.Structure()
    for number, chains in enumerate(models, 1):
        # gemmi below 0.7 numbers models by texts
        model = gemmi.Model(number if gemmi.__version__ >= "0.7" else str(number))
        for one in chains:
            model.add_chain(one)
        structure.add_model(model)
    structure.setup_entities()
    if str(path).endswith(".cif"):
        structure.make_mmcif_document().write_file(str(path))
    else:
        structure.write_pdb(str(path))
    return str(path)


def ball(n, centre, radius, seed):
    random = np.random.default_rng(seed)
    v = random.standard_normal((n, 3))
    return centre + radius * v / np.linalg.norm(v, axis=1)[:, None] * random.random((n, 1)) ** 0.3


BODY = ball(150, (100, 50, 20), 13, 0)
ARM = np.stack([np.linspace(112, 134, 30), 50 + ball(30, 0, 2, 1)[:, 1], np.full(30, 20)], 1)
BLOCK = ball(60, (96, 66, 26), 7, 2)


def chains():
    return [chain("A", BODY), chain("B", ARM, "N", 40.0), chain("C", BLOCK, "P", 5.0, 0.5)]


@pytest.fixture
def molecule(tmp_path):
    return write(tmp_path / "in.cif", chains())


def options(atoms, out="sim", **more):
    files = (atoms,) if isinstance(atoms, str) else atoms
    return SimulateOptions(outdir=str(out), atoms=files, **{"D": D, "apix": APIX, **more})


def load(atoms, **more):
    return load_atoms(options(atoms, **more), D, APIX)


MOVING = {"turn": "B:25", "without": ("C",)}


def states():
    return [(label, t) for label in (0, 1) for t in (0.0, 0.35, 1.0)]


def direct(model, label, t, k):
    """Sum over atoms at frequencies `(P, 3)` in cycles per angstrom, by gemmi's own functions."""
    total = np.zeros(len(k), complex)
    s = np.linalg.norm(k, axis=1)
    for places, element, b, occ, which in (
        (BODY, "C", 20, 1, "A"), (ARM, "N", 40, 1, "B"), (BLOCK, "P", 5, 0.5, "C"),
    ):  # fmt: skip
        if which == "C" and label == 1:
            continue
        places = places - model.origin
        if which == "B":
            places = model.hinge.turned(places, t)
        f = np.array([gemmi.Element(element).c4322.calculate_sf(v) for v in s**2 / 4])
        phases = np.exp(-2j * np.pi * places @ k.T).sum(0)
        total += occ * f * np.exp(-b * s**2 / 4) * phases
    return VOLTS * total / APIX**3


# --- the potential and its projections


@pytest.mark.parametrize(("element", "b"), [("C", 0.0), ("Fe", 0.0), ("Fe", 60.0)])
def test_amplitude_of_one_atom(tmp_path, element, b):
    path = write(tmp_path / "one.pdb", [chain("A", [(7, 8, 9)], element, b)])
    fourier = np.abs(np.fft.fftn(load(path).volume(0, 0.5).astype(float)))
    k = np.fft.fftfreq(D)
    s = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    inside = s < 0.5 - 1e-6
    f = np.array(
        [gemmi.Element(element).c4322.calculate_sf(v) for v in (s[inside] / APIX) ** 2 / 4]
    )
    expected = VOLTS * f * np.exp(-b * (s[inside] / APIX) ** 2 / 4) / APIX**3
    np.testing.assert_allclose(fourier[inside], expected, atol=1e-3 * expected.max())
    assert fourier[~inside].max() < 1e-4 * expected.max()


def test_few_functions_make_all_scattering_factors():
    known = [gemmi.Element(name).c4322 for name in ("H", "C", "Fe", "U")]
    b = np.array([0.0, 12.5, 60, 190] * 4)
    element, occupancy = np.repeat(np.arange(4), 4), np.linspace(0.2, 1, 16)
    coefficients = np.array([[*one.a, *one.b] for one in known])
    atoms = Atoms(np.zeros((16, 3)), occupancy, b, element, coefficients)
    weights, functions = potential_module._separated(atoms, 0.5)
    s = np.linspace(0, 0.5, 33)
    f = np.array([[one.calculate_sf(v) for v in s**2 / 4] for one in known])[element]
    expected = f * np.exp(-b[:, None] * s**2 / 4) * occupancy[:, None]
    found = weights @ np.array([function(s) for function in functions])
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected.max())
    assert len(functions) < 12


@pytest.mark.parametrize("shift", [0.0, 2.3])
def test_images_are_direct_sums_over_atoms(molecule, shift):
    model = load(molecule, **MOVING)
    rots = Rotation.random(6, random_state=1).as_matrix()
    labels, at = map(np.array, zip(*states(), strict=True))
    shifts = np.full((6, 2), shift) * [1, -0.5]
    images = model.project(rots, shifts, labels, at).double().numpy()
    ky, kx = np.meshgrid(np.fft.fftfreq(D), np.fft.fftfreq(D), indexing="ij")
    inside = kx**2 + ky**2 < (0.5 - 1e-3) ** 2
    k2 = np.stack([kx[inside], ky[inside]], 1)
    for image, rot, label, t, move in zip(images, rots, labels, at, shifts, strict=True):
        fourier = np.fft.fft2(np.fft.ifftshift(image))
        expected = direct(model, label, t, k2 / APIX @ rot[:2]) * np.exp(-2j * np.pi * k2 @ move)
        error = np.linalg.norm(fourier[inside] - expected) / np.linalg.norm(expected)
        assert error < 5e-4
        assert np.abs(fourier[~inside]).max() < 1e-4 * np.abs(expected).max()


def test_projection_is_the_sum_over_z(molecule):
    model = load(molecule, **MOVING)
    for label, t in states():
        image = model.project(np.eye(3)[None], np.zeros((1, 2)), [label], np.array([t]))[0].numpy()
        np.testing.assert_allclose(image, model.volume(label, t).sum(0), atol=2e-5 * image.max())


def test_a_turned_part_is_the_volume_of_turned_atoms(molecule):
    model = load(molecule, **MOVING)
    arm = model.hinge.turned(ARM - model.origin, 0.9) + model.origin
    angle = Rotation.from_matrix(model.hinge.rotations(np.array([0.9]))[0]).magnitude()
    assert np.rad2deg(angle) == pytest.approx(25 * 0.8)
    whole = []
    for places, element, b, occ in ((BODY, "C", 20, 1), (arm, "N", 40, 1), (BLOCK, "P", 5, 0.5)):
        known = gemmi.Element(element).c4322
        n, zero = len(places), np.zeros(len(places), int)
        atoms = Atoms(
            places, np.full(n, occ), np.full(n, b), zero, np.array([[*known.a, *known.b]])
        )
        whole.append(Part(potential(atoms, 48, D, APIX, model.origin), (0,), False))
    turned = PartModel(D, APIX, whole, ["turned"]).volume(0, 0.5)
    found, rested = model.volume(0, 0.9), model.volume(0, 0.5)
    assert np.linalg.norm(found - turned) < 2e-3 * np.linalg.norm(turned)
    assert np.linalg.norm(rested - turned) > 0.2 * np.linalg.norm(turned)


def test_a_class_can_lack_atoms_that_turn(molecule):
    model = load(molecule, turn="B:25", without=("B/11-30", "B"))
    assert [sorted(part.classes) for part in model.parts if part.turns] == [[0, 1], [0]]
    mass = [model.volume(label, 0.2).sum() for label in range(3)]
    assert (mass[0] - mass[1]) / (mass[0] - mass[2]) == pytest.approx(2 / 3, rel=1e-3)
    turned = [
        np.abs(model.volume(label, 0.0) - model.volume(label, 1.0)).max() for label in range(3)
    ]
    assert turned[2] == 0 < turned[1] < turned[0]
    view = np.eye(3)[None].repeat(3, 0), np.zeros((3, 2)), np.arange(3), np.full(3, 0.2)
    for label, image in enumerate(model.project(*view).numpy()):
        expected = model.volume(label, 0.2).sum(0)
        np.testing.assert_allclose(image, expected, atol=2e-5 * image.max())


def test_mean_volume(molecule):
    model, random = load(molecule, **MOVING), np.random.default_rng(0)
    labels, at = random.integers(0, 2, 300), random.random(300)
    average = np.mean([model.volume(k, t) for k, t in zip(labels, at, strict=True)], 0)
    mean = model.mean(labels, at)
    assert np.linalg.norm(mean - average) < 0.01 * np.linalg.norm(average)


def test_backproject_voxel_recovers_the_volume(tmp_path, molecule):
    simulate(options(molecule, tmp_path / "sim", n=2500, snr=np.inf))
    sim = tmp_path / "sim"
    run_host(
        "backproject_voxel", sim / "particles.mrcs", "--poses", sim / "poses.pkl", "--ctf",
        sim / "ctf.pkl", "-o", tmp_path / "back", "--no-half-maps",
    )  # fmt: skip
    found, truth = volume_at(tmp_path / "back/backproject.mrc"), volume_at(sim / "volumes/mean.mrc")
    assert fsc(found, truth)[1 : D // 2 - 2].min() >= 0.95
    for axis in range(3):
        assert fsc(found, mirror(truth, axis))[D // 8 : D // 2 - 2].mean() < 0.65
        assert fsc(found, np.roll(truth, 1, axis))[D // 8 : D // 2 - 2].mean() < 0.65


# --- what it is made of


def test_the_hinge_is_where_parts_touch_and_its_axis_deterministic(molecule):
    hinge = load(molecule, turn="B:16").hinge
    origin = load(molecule).origin
    apart = np.linalg.norm(ARM[:, None] - np.concatenate([BODY, BLOCK]), axis=2) <= 5
    touching = np.concatenate([ARM[apart.any(1)], np.concatenate([BODY, BLOCK])[apart.any(0)]])
    np.testing.assert_allclose(hinge.point, touching.mean(0) - origin, atol=1e-3)
    line = (ARM - origin - hinge.point).mean(0)
    assert abs(hinge.axis @ line) < 1e-6 * np.linalg.norm(line)
    assert np.linalg.norm(hinge.axis) == pytest.approx(1)
    away = ARM - origin - hinge.point
    inertia = [np.square(np.cross(away, axis)).sum() for axis in (hinge.axis, np.cross(hinge.axis,
               line / np.linalg.norm(line)))]  # fmt: skip
    assert inertia[0] < inertia[1]
    assert hinge.axis[np.abs(hinge.axis).argmax()] > 0


def test_models_and_files_are_classes(tmp_path):
    ensemble = write(
        tmp_path / "two.pdb", [chain("A", BODY)], [chain("A", BODY + np.array([3, 0, 0]))]
    )
    other = write(tmp_path / "other.cif", [chain("A", BLOCK, occ=0.25)])
    model = load((ensemble, other))
    assert model.names == ["two.pdb model 1", "two.pdb model 2", "other.cif"]
    assert [part.classes for part in model.parts] == [(0,), (1,), (2,)]
    np.testing.assert_allclose(model.shares, 1 / 3)
    masses = [model.volume(k, 0.5).sum() for k in range(3)]
    np.testing.assert_allclose(np.array(masses) / masses[0], [1, 1, 60 * 0.25 / 150], rtol=1e-3)
    (tmp_path / "two.pdb.gz").write_bytes(gzip.compress(Path(ensemble).read_bytes()))
    zipped = load((str(tmp_path / "two.pdb.gz"), other))
    np.testing.assert_array_equal(zipped.volume(1, 0.5), model.volume(1, 0.5))


def test_the_default_box_is_half_as_large_again_as_the_molecule(tmp_path, molecule):
    simulate(SimulateOptions(str(tmp_path / "sim"), atoms=(molecule,), n=4, turn="B:90"))
    model = load_atoms(options(molecule, turn="B:90"), D, 10.0)
    places = np.concatenate([BODY, BLOCK]) - model.origin
    arms = [model.hinge.turned(ARM - model.origin, t) for t in np.linspace(0, 1, 33)]
    reach = max(np.linalg.norm(p, axis=1).max() for p in (places, *arms)) + 3
    images = host.ImageSource.from_file(str(tmp_path / "sim/particles.mrcs"))
    assert (images.n, images.D) == (4, 64)
    assert images.apix == pytest.approx(3 * reach / 64, abs=1e-3)


def test_tilt_series(tmp_path, molecule):
    simulate(options(molecule, tmp_path / "tilts", n=4, D=16, apix=None, tilts=3, **MOVING))
    images = host.ImageSource.from_file(str(tmp_path / "tilts/particles.mrcs"))
    assert (images.n, images.D) == (12, 16)
    assert len(read_pickles(tmp_path / "tilts/coordinate.pkl")) == 4


def test_the_folder(tmp_path, molecule):
    folder = tmp_path / "sim"
    simulate(options(molecule, folder, n=60, shares=(3, 1), **MOVING))
    names = {path.stem for path in (folder / "volumes").glob("*.mrc")}
    times = ("0.00", "0.25", "0.50", "0.75", "1.00")
    moving = {f"class{c}_t{t}" for c in (0, 1) for t in times}
    assert names == {"mean", "part0", "part1", "part2"} | moving
    written = yaml.safe_load((folder / "simulation.yaml").read_text())
    assert written["classes"][1]["holds"] == "in.cif without C"
    assert 30 < (read_pickles(folder / "labels.pkl") == 0).sum() < 60
    coordinate = read_pickles(folder / "coordinate.pkl")
    assert coordinate.std() == pytest.approx(12**-0.5, rel=0.25)
    sizes = [host.parse_mrc(str(folder / f"volumes/{n}.mrc"))[1].apix for n in ("part0", "mean")]
    assert sizes == pytest.approx([APIX * 2 / 3, APIX])
    model = load(molecule, **MOVING)
    np.testing.assert_array_equal(
        volume_at(folder / "volumes/class1_t0.25.mrc"), model.volume(1, 0.25)
    )
    said = written["object"]
    np.testing.assert_allclose(said["hinge"]["point"], model.hinge.point)
    np.testing.assert_allclose(said["origin"], model.origin)
    assert [part["turns"] for part in said["parts"]].count(True) == 1
    simulate(SimulateOptions(str(folder), n=4, D=16, classes=1, hinge_deg=0.0, overwrite=True))
    names = {path.stem for path in (folder / "volumes").glob("*.mrc")}
    assert names == {"mean", "class0"}


def test_the_same_seed_gives_the_same_bytes(tmp_path, molecule, monkeypatch):
    found = []
    for name, chunk in (("a", 64), ("b", 512)):
        monkeypatch.setattr(simulator, "_CHUNK", chunk)
        simulate(options(molecule, tmp_path / name, n=150, seed=3, **MOVING))
        files = sorted(p for p in (tmp_path / name).rglob("*.*") if p.suffix != ".yaml")
        found.append([p.read_bytes() for p in files if p.name != CHECKSUMS])
    assert found[0] == found[1]
    assert len(found[0]) > 15
    simulate(options(molecule, tmp_path / "c", n=150, seed=4, **MOVING))
    assert (tmp_path / "c/particles.mrcs").read_bytes() not in found[0]


# --- the truth, without the atoms


@pytest.fixture(params=[MOVING, {"without": ("C",)}], ids=["moving", "still"])
def simulated(request, tmp_path, molecule):
    folder = tmp_path / "sim"
    simulate(options(molecule, folder, n=40, heldout=8, snr=2.0, clean=True, **request.param))
    Path(molecule).unlink()
    source = {name: str(folder / f"{name}.pkl") for name in ("poses", "ctf")}
    ind = str(folder / "ind_train.pkl")
    return folder, load_particles(ParticleSource(str(folder / "particles.mrcs"), ind=ind, **source))


def test_truth_needs_no_atoms(simulated):
    folder, particles = simulated
    known, chosen = load_truth(str(folder), particles), read_pickles(folder / "ind_train.pkl")
    np.testing.assert_array_equal(known.labels, read_pickles(folder / "labels.pkl")[chosen])
    moves = (folder / "coordinate.pkl").exists()
    assert (known.coordinate is not None) == moves
    clean = host.parse_mrc(str(folder / "clean.mrcs"))[0][chosen]
    found = known.clean(particles, torch.arange(40)).numpy()
    np.testing.assert_allclose(found, clean, atol=1e-5 * np.abs(clean).max())
    volumes = list(known.volumes(np.arange(3)))
    assert volumes[0].shape == (D, D, D)
    assert len(known.positions) == 40


def test_truths_that_do_not_fit(simulated, tmp_path):
    folder, particles = simulated
    moves = (folder / "coordinate.pkl").exists()

    def change(**changed):
        def apply(copy):
            content = yaml.safe_load((copy / "simulation.yaml").read_text())
            content["object"].update(changed)
            (copy / "simulation.yaml").write_text(yaml.safe_dump(content))

        return apply

    hinge = {"degrees": 10.0, "point": [0, 0, 0], "axis": [0, 0, 1]}
    cases = [
        (change(parts=[]), "simulation.yaml is damaged"),
        (change(parts=[{"file": "part0.mrc", "turns": False, "classes": [9]}]), "is damaged"),
        (change(hinge={**hinge, "axis": [1, 1, 1]}), "simulation.yaml is damaged"),
        (lambda copy: (copy / "volumes/part0.mrc").unlink(), "part0.mrc: no such file"),
        (lambda copy: (copy / "labels.pkl").unlink(), "labels.pkl: no such file"),
    ]
    if moves:
        cases.append((change(hinge=hinge), "class0_t0.00.mrc is not what simulation.yaml"))
    for i, (damage, says) in enumerate(cases):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(CHECKSUMS))
        damage(copy)
        with pytest.raises(InputError) as caught:
            load_truth(str(copy), particles)
        assert says in str(caught.value)
        assert str(caught.value).startswith(f"--truth {copy}")


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--volumes", "a.mrc"], "--volumes a.mrc: excludes --atoms"),
        (["--classes", "2"], "--classes 2: with --atoms"),
        (["--hinge-deg", "9"], "--hinge-deg 9.0: with --atoms"),
        (["--turn", "B"], "--turn B: SELECTION:DEG is needed"),
        (["--turn", "B:x"], "--turn B:x: SELECTION:DEG is needed"),
        (["--turn", "B:0"], "--turn B:0: SELECTION:DEG is needed"),
        (["--turn", "B:181"], "--turn B:181: SELECTION:DEG is needed"),
        (["--turn", "A/1-x:9"], "--turn A/1-x:9: not a selection"),
        (["--turn", "Z:9"], "--turn Z:9: selects no atom of in.cif"),
        (["--turn", "A,B,C,F:9"], "--turn A,B,C,F:9: selects all atoms"),
        (["--turn", "F:9"], "--turn F:9: no atom of it is within 5 angstroms"),
        (["--without", "B/700"], "--without B/700: selects no atom"),
        (["--without", "*"], "--without *: selects all atoms"),
        (["--without", "A", "--shares", "1"], "--shares 1.0: 2 classes need as many"),
        (["--apix", "0.5"], "--apix 0.5: the molecule has a diameter of"),
        (["-D", "100000"], "-D 100000: volumes of this box do not fit memory"),
        (["--noise", "white", "--noise-spectrum", "s.txt"], "s.txt: excludes --noise"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, cli, argv, message):
    write(tmp_path / "in.cif", [*chains(), chain("F", BLOCK + 40)])
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("simulate_amort", "-o", "sim", "-n", "4", "--atoms", "in.cif", *argv)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.cif"]


@pytest.mark.parametrize("flag", ["--turn", "--without"])
def test_flags_of_atoms_alone(tmp_path, monkeypatch, cli, flag):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("simulate_amort", "-o", "sim", flag, "B:9")
    assert code == 2
    assert f"{flag} B:9: is for --atoms" in err
    write(tmp_path / "in.pdb", chains(), chains())
    code, _, err = cli("simulate_amort", "-o", "sim", "--atoms", "in.pdb", flag, "B:9")
    assert code == 2
    assert f"{flag} B:9: is for one model, not for the 2" in err.splitlines()[-1]
    assert not (tmp_path / "sim").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.cif", "rubbish", "not a readable"),
        ("a.pdb", "rubbish", "holds no atoms"),
        ("a.txt", "rubbish", "not a readable"),
        ("a.pdb.gz", "rubbish", "holds no atoms"),
        ("a.cif", "data_a\n_a.b 1\n", "holds no atoms"),
        ("none.cif", None, "no such file"),
        ("nan.cif", [chain("A", BODY, b=float("nan"))], "must be finite"),
        ("zero.pdb", [chain("A", BODY, occ=0.0)], "an occupancy above 0"),
        ("fermium.pdb", [chain("A", BODY, "Fm")], "the element Fm has no scattering factors"),
    ],
)
def test_bad_files(tmp_path, name, content, says):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content:
        write(path, content)
    with pytest.raises(InputError) as caught:
        simulate(options(str(path), tmp_path / "sim"))
    assert str(caught.value).startswith(f"--atoms {path}: ")
    assert says in str(caught.value)
    assert not (tmp_path / "sim").exists()


def test_atoms_are_never_replaced(tmp_path):
    (tmp_path / "volumes").mkdir()
    path = write(tmp_path / "volumes/in.pdb", chains())
    with pytest.raises(InputError, match=r"--atoms .*would be replaced"):
        simulate(options(path, tmp_path, overwrite=True))
