"""Every way to give particles gives the same ones; HOST's sharp edges are blunt or refused."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from cryodrgn.ctf import compute_ctf
from cryodrgn.mrcfile import write_mrc
from helpers import write_pickle, write_stack

from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import ParticleSource, load_particles

N = 24
FORMATS = (".mrcs", ".star", ".star of RELION 3.1", ".cs", ".txt")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """One data set, written in every format, in a folder of its own and beside ``--datadir``."""
    folder = tmp_path_factory.mktemp("combinations")
    made = write_stack(folder, N)
    write_mrc(str(folder / "a.mrcs"), made.images[:10])
    write_mrc(str(folder / "b.mrcs"), made.images[10:])
    names = [f"{i + 1:06d}@{'a' if i < 10 else 'b'}.mrcs" for i in range(10)]
    names += [f"{i + 1:06d}@b.mrcs" for i in range(N - 10)]
    listed = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1})
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnImageSize": [16], "rlnImagePixelSize": [12]})
    starfile.write(listed[["rlnImageName"]], folder / "old.star")
    starfile.write({"optics": optics, "particles": listed}, folder / "new.star")
    (folder / "list.txt").write_text("a.mrcs\nb.mrcs\n")
    table = np.zeros(N, [("blob/path", "S40"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,))])
    table["blob/path"] = [b"a.mrcs"] * 10 + [b"b.mrcs"] * (N - 10)
    table["blob/idx"] = [*range(10), *range(N - 10)]
    table["blob/shape"] = 16
    with open(folder / "list.cs", "wb") as handle:
        np.save(handle, table)
    files = ("particles.mrcs", "old.star", "new.star", "list.cs", "list.txt")
    rotations = write_pickle(folder / "rotations.pkl", made.rots)
    paths = {name: str(folder / file) for name, file in zip(FORMATS, files, strict=True)}
    return SimpleNamespace(made=made, folder=folder, rotations=rotations, paths=paths)


def shown(source):
    particles = load_particles(source)
    index = torch.arange(particles.n)
    return particles, particles.centred(index, particles.raw(index))


@pytest.mark.parametrize(
    ("shifts", "ctf", "chosen"),
    list(itertools.product((True, False), (True, False), (None, 3))),
)
def test_every_format_gives_the_same_particles(given, tmp_path, shifts, ctf, chosen):
    ind = None
    if chosen is not None:
        ind = write_pickle(tmp_path / "ind.pkl", np.arange(N)[::-1][::chosen].copy())
    found = {}
    for name, path in given.paths.items():
        for datadir in (None, str(given.folder)):
            if datadir and name in (".mrcs", ".txt"):
                continue
            poses = given.made.poses if shifts else given.rotations
            more = {"ctf": given.made.ctf if ctf else None, "ind": ind, "datadir": datadir}
            found[name, datadir] = shown(ParticleSource(path, poses, norm=(0.0, 17.0), **more))
    particles, images = found.pop((".mrcs", None))
    rows = np.arange(N) if ind is None else np.arange(N)[::-1][::3]
    np.testing.assert_array_equal(particles.rots.numpy(), given.made.rots[rows])
    assert (particles.trans is not None) == shifts
    assert (particles.ctf_params is not None) == ctf
    for (name, _), (others, theirs) in found.items():
        assert torch.equal(images, theirs), name
        assert torch.equal(particles.rots, others.rots), name


def test_a_selection_as_long_as_the_stack_reorders_everything(given, tmp_path):
    """The host reorders images and CTFs by it, and leaves the poses as they are."""
    order = np.random.default_rng(0).permutation(N)
    ind = write_pickle(tmp_path / "ind.pkl", order)
    source = {"poses": given.made.poses, "ctf": given.made.ctf, "norm": (0.0, 17.0)}
    whole, images = shown(ParticleSource(given.paths[".mrcs"], **source))
    mixed, theirs = shown(ParticleSource(given.paths[".mrcs"], **source, ind=ind))
    assert torch.equal(images[order], theirs)
    assert torch.equal(whole.rots[order], mixed.rots)
    assert torch.equal(whole.trans[order], mixed.trans)
    assert torch.equal(whole.ctf_params[order], mixed.ctf_params)


def test_optics_groups_have_their_own_pixel_sizes(given, tmp_path):
    """The host takes that of the first row for all."""
    table = given.made.ctf_table.astype(np.float64)
    table[N // 2 :, 1] *= 1.5
    ctf = write_pickle(tmp_path / "ctf.pkl", table)  # in float64, on which the host fails
    source = ParticleSource(given.paths[".mrcs"], given.made.poses, ctf)
    particles = load_particles(source)
    rows = torch.arange(N)
    found = particles.half(particles.ctf(rows), rows)
    for i in (0, N // 2, N - 1):
        apix, *rest = (torch.tensor(float(v)) for v in table[i, 1:])
        at = particles.lattice.freqs2d[particles.mask] / apix
        expected = compute_ctf(at[None], *(r.view(1, 1) for r in rest))[0]
        torch.testing.assert_close(found[i], expected[: found.shape[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        (5, 300_000, "voltage of 300000 kV"),
        (2, 1.5, "defocus"),
        (6, 2.7e7, "spherical aberration"),
        (7, 7.0, "amplitude contrast of 7"),
    ],
)
def test_ctfs_in_other_units_are_refused(given, tmp_path, column, value, says):
    table = given.made.ctf_table.copy()
    table[:, column] = value
    if column == 2:
        table[:, 3] = value
    path = write_pickle(tmp_path / "ctf.pkl", table)
    with pytest.raises(InputError, match=rf"--ctf .*ctf\.pkl: .*{says}"):
        load_particles(ParticleSource(given.paths[".mrcs"], given.made.poses, path))


def test_particles_in_focus_are_none_in_other_units(given, tmp_path):
    table = given.made.ctf_table.copy()
    table[:, 2:4] = 0
    path = write_pickle(tmp_path / "ctf.pkl", table)
    found = load_particles(ParticleSource(given.paths[".mrcs"], given.made.poses, path))
    assert (found.ctf_params[:, 1:3] == 0).all()


def test_training_leaves_its_inputs_as_they_are(train, flags, stack):
    """The host's poses divide their translations in place when they are saved."""
    before = {p: p.read_bytes() for p in stack.folder.iterdir()}
    train(flags, qdim=8, num_epochs=1)
    assert before == {p: p.read_bytes() for p in stack.folder.iterdir()}


def test_stray_files_of_other_tools_do_not_matter(train, flags, tmp_path):
    """The host's search for the latest checkpoint takes them for one."""
    train(flags, qdim=8, num_epochs=1)
    for name in ("weights.4.pkl.tmp", "weights.x.pkl", "weights.9.pkl", "z.7.pkl"):
        (tmp_path / "run" / name).write_bytes(b"x")
    again = train(flags, qdim=8, num_epochs=2, load="latest")
    assert "Continuing after epoch 1" in (again.folder / "run.log").read_text()


def test_a_last_epoch_between_checkpoints_is_analysed(train, flags, tmp_path):
    """The host's automatic analysis looks for a checkpoint that was not written."""
    run = train(flags, qdim=8, num_epochs=3, checkpoint=2)
    assert (run.folder / "weights.3.pkl").is_file()
    assert (run.folder / "z.3.pkl").is_file()


def test_the_log_of_a_run_is_that_run_alone(train, flags):
    """The host's grows with every run into the same folder, and lacks what is said elsewhere."""
    train(flags, qdim=8, num_epochs=1)
    run = train(flags, qdim=8, num_epochs=1, overwrite=True)
    log = (run.folder / "run.log").read_text()
    assert log.count("Training complete") == 1
    assert "Particles: " in log
