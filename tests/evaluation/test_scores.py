"""Scores go back to where particles come from: everything else in the file stays as it is."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import starfile
from helpers import write_pickle

from cryodrgn_amort.evaluation import load_scores

N = 12
OPTICS = (
    "# version 30001\n\ndata_optics\n\nloop_ \n_rlnOpticsGroupName #1 \n_rlnOpticsGroup #2 \n"
    "_rlnImagePixelSize #3 \n_rlnImageSize #4 \n_rlnImageDimensionality #5 \n_rlnVoltage #6 \n"
    "_rlnSphericalAberration #7 \n_rlnAmplitudeContrast #8 \n"
    '"optics group 1"         1     0.885000          320            2   300.000000     2.700000 '
    "    0.100000 \n opticsGroup2         2     1.060000          256            2   200.000000  "
    "   2.000000     0.070000 \n \n\n"
)


def rows(names, extra=""):
    return "".join(
        f"{i * 7919.125 % 5000:12.6f} {i * 31.7 % 360:13.6f} {name} {'12'[i % 2]:>12} "
        f"{10000 + i * 0.1:.4f}{extra} \n"
        for i, name in enumerate(names)
    )


def star(kind):
    """Return a file as RELION 3.0, 3.1 and 5 write them."""
    names = [f"{i + 1:06d}@Extract/job007/Movies/mic_{i % 3}.mrcs" for i in range(N)]
    labels = (
        "_rlnCoordinateX #1 \n_rlnAngleRot #2 \n{0} #3 \n_rlnOpticsGroup #4 \n_rlnDefocusU #5 \n"
    )
    if kind == "3.0":
        return "\ndata_\n\nloop_ \n" + labels.format("_rlnImageName") + rows(names)
    if kind == "3.1":
        head = "\n# version 30001\n\ndata_particles\n\nloop_ \n" + labels.format("_rlnImageName")
        return OPTICS + head + rows(names) + " \n"
    head = "\n# version 50001\n\ndata_general\n\n_rlnTomoSubTomosAre2DStacks            1\n \n"
    head += "\n# version 50001\n\ndata_particles\n\nloop_ \n" + labels.format("_rlnImageName")
    head += "_rlnTomoParticleName #6 \n_rlnTomoVisibleFrames #7 \n"
    body = rows(names, " TS_01/{0} [1,1,0,1]")
    body = "".join(
        line.replace("{0}", str(i + 1)) + "\n" for i, line in enumerate(body.splitlines())
    )
    return OPTICS.replace("30001", "50001") + head + body + " \n"


@pytest.fixture
def evaluation(tmp_path):
    """Return a folder of an evaluation of particles 9, 2, 5 and 11 of 12, each with its score."""
    return write_evaluation(tmp_path / "run/amort.5", [9, 2, 5, 11], N)


def write_evaluation(folder, particles, total):
    folder.mkdir(parents=True)
    lines = "".join(f"{i},0.{i:02d},{'' if i == 5 else i + 0.5},\n" for i in particles)
    (folder / "trust.csv").write_text("particle,trust,rank.roll-1.held,gap\n" + lines)
    (folder / "amortization.json").write_text(json.dumps({"run": {"stack": total}}))
    return folder


@pytest.mark.parametrize("kind", ["3.0", "3.1", "5"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_star(kind, end, evaluation, tmp_path, cli):
    text = star(kind).replace("\n", end)
    (tmp_path / "in.star").write_bytes(text.encode())
    files = [tmp_path / "in.star", "-o", tmp_path / "out.star"]
    fom = ["--as", "rlnParticleFigureOfMerit=trust"]
    code, out, err = cli("scores_amort", tmp_path / "run", *files, *fom)
    assert code == 0, err
    assert "12 rows, with amortTrust, amortRankRoll1Held, rlnParticleFigureOfMerit" in out
    scored = (tmp_path / "out.star").read_bytes().decode()
    added = ("amortTrust", "amortRankRoll1Held", "rlnParticleFigureOfMerit")
    # line by line: nothing is lost or changed, particles' lines only go on
    lines = [
        x for x in scored.split(end) if not x.startswith(tuple(f"_{name} #" for name in added))
    ]
    assert len(lines) == len(text.split(end))
    for old, new in zip(text.split(end), lines, strict=True):
        assert new.startswith(old)
        assert (new == old) == ("@" not in old)
    # and by the field's own reader
    (tmp_path / "out.star").write_bytes(scored.replace("\r", "").encode())
    before = starfile.read(tmp_path / "in.star", always_dict=True)
    after = starfile.read(tmp_path / "out.star", always_dict=True)
    assert list(before) == list(after)
    for name in before:
        if not hasattr(before[name], "columns"):
            assert before[name] == after[name]
            continue
        ours = [label for label in after[name].columns if label in added]
        assert bool(ours) == ("rlnImageName" in before[name])
        assert before[name].equals(after[name].drop(columns=ours))
    particles = next(t for t in after.values() if "amortTrust" in t)
    expected = np.full(N, np.nan)
    expected[[9, 2, 5, 11]] = [0.09, 0.02, 0.05, 0.11]
    np.testing.assert_allclose(particles["amortTrust"], expected)
    np.testing.assert_allclose(particles["rlnParticleFigureOfMerit"], expected)
    expected[[9, 2, 5, 11]] = [9.5, 2.5, np.nan, 11.5]
    np.testing.assert_allclose(particles["amortRankRoll1Held"], expected)


@pytest.mark.skipif(not shutil.which("relion_star_printtable"), reason="RELION is not installed")
@pytest.mark.parametrize("kind", ["3.0", "3.1"])
def test_relion_reads_it(kind, evaluation, tmp_path, cli):
    (tmp_path / "in.star").write_text(star(kind))
    files = [tmp_path / "in.star", "-o", tmp_path / "out.star"]
    fom = ["--as", "rlnParticleFigureOfMerit=trust"]
    code, _, err = cli("scores_amort", evaluation, *files, *fom)
    assert code == 0, err

    def printed(file):
        table = "data_particles" if kind == "3.1" else "data_"
        argv = ["relion_star_printtable", file, table, "rlnAngleRot", "rlnImageName"]
        argv += ["rlnParticleFigureOfMerit"] if file.name == "out.star" else []
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split("\n")

    before, after = printed(tmp_path / "in.star"), printed(tmp_path / "out.star")
    assert [" ".join(line.split()[:2]) for line in after] == [" ".join(x.split()) for x in before]
    assert [line.split()[2] for line in after if line][9] in ("0.09", "0.090000")


def test_cs(evaluation, tmp_path, cli):
    rng = np.random.default_rng(0)
    fields = [
        ("uid", "<u8"), ("blob/path", "S60"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)),
        ("blob/psize_A", "<f4"), ("ctf/df1_A", "<f4"), ("alignments3D/pose", "<f4", (3,)),
        ("alignments3D/shift", "<f4", (2,)), ("location/micrograph_path", "S70"),
    ]  # fmt: skip
    table = np.zeros(N, fields)
    table["uid"] = rng.integers(0, 2**63, N, dtype=np.uint64)
    table["blob/path"], table["blob/idx"] = b">J12/extract/mic.mrc", np.arange(N)
    table["alignments3D/pose"] = rng.standard_normal((N, 3))
    with open(tmp_path / "in.cs", "wb") as handle:
        np.save(handle, table)
    keep = write_pickle(tmp_path / "keep.pkl", np.array([11, 2, 3]))
    code, out, err = cli("scores_amort", evaluation, tmp_path / "in.cs", "-o", tmp_path / "out.cs",
                         "--columns", "trust", "--ind", keep)  # fmt: skip
    assert code == 0, err
    assert "3 rows, with amort/trust" in out
    scored = np.load(tmp_path / "out.cs", allow_pickle=False)
    assert scored.dtype.names == (*table.dtype.names, "amort/trust")
    for name in table.dtype.names:
        assert scored.dtype[name] == table.dtype[name]
        assert scored[name].tobytes() == table[name][[2, 3, 11]].tobytes()
    np.testing.assert_allclose(scored["amort/trust"], [0.02, np.nan, 0.11], rtol=1e-6)


def test_images_of_a_tilt_series_have_their_particles_score(tmp_path, cli):
    folder = write_evaluation(tmp_path / "amort.5", [2, 0], 3)
    names = ["a", "a", "c", "b", "c", "b"]  # particles by their first image: a, c, b
    lines = "".join(f"{i + 1}@x.mrcs {name} 1\n" for i, name in enumerate(names))
    head = "data_\n\nloop_\n_rlnImageName #1\n_rlnGroupName #2\n_rlnCtfScalefactor #3\n"
    (tmp_path / "in.star").write_text(head + lines)
    keep = write_pickle(tmp_path / "keep.pkl", np.array([2, 1]))
    code, _, err = cli("scores_amort", folder, tmp_path / "in.star", "-o", tmp_path / "out.star",
                       "--columns", "trust", "--ind", keep)  # fmt: skip
    assert code == 0, err
    found = starfile.read(tmp_path / "out.star")
    assert found["rlnGroupName"].tolist() == ["c", "b", "c", "b"]
    np.testing.assert_allclose(found["amortTrust"], [np.nan, 0.02, np.nan, 0.02])


@pytest.mark.parametrize("kind", ["star", "tilts", "cs"])
def test_rows_are_found_by_name(kind, tmp_path, cli):
    """In another order, and a part of them, where the run was trained on a file of these names."""
    suffix = "cs" if kind == "cs" else "star"
    folder = write_evaluation(tmp_path / "amort.5", [2, 0, 3], 4)
    facts = {"stack": 4, "settings": {"particles": str(tmp_path / f"stack.{suffix}")}}
    (folder / "amortization.json").write_text(json.dumps({"run": facts}))
    images = 2 if kind == "tilts" else 1
    uid = [77, 11, 55, 33]
    head = "data_\n\nloop_\n_rlnImageName #1\n_rlnGroupName #2\n"

    def write(path, order):
        if kind == "cs":
            table = np.array([(uid[i],) for i in order], [("uid", "<u8")])
            with open(path, "wb") as handle:
                np.save(handle, table)
            return
        lines = [f"{images * i + k + 1:06d}@x.mrcs g{uid[i] if images > 1 else 0}\n"
                 for i in order for k in range(images)]  # fmt: skip
        path.write_text(head + "".join(lines))

    write(tmp_path / f"stack.{suffix}", range(4))
    write(tmp_path / f"in.{suffix}", [3, 1, 2])
    code, _, err = cli("scores_amort", folder, tmp_path / f"in.{suffix}", "-o",
                       tmp_path / f"out.{suffix}", "--columns", "trust")  # fmt: skip
    assert code == 0, err
    expected = np.repeat([0.03, np.nan, 0.02], images)
    if kind == "cs":
        found = np.load(tmp_path / "out.cs")["amort/trust"]
    else:
        found = starfile.read(tmp_path / "out.star")["amortTrust"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace("000012@", "").replace("mic_2.mrcs", "mic 2.mrcs"), "values for"),
        (lambda t: t + t.split("loop_")[-1].split("\n")[-3] + "\n", "has 13 particles, the stack"),
        (lambda t: t.replace("_rlnImageName", "_rlnImage"), "no tables of particles"),
        (lambda t: t.replace("_rlnDefocusU", "_amortTrust"), "has a column amortTrust already"),
        (lambda t: t + "\ndata_more\n\nloop_\n_rlnImageName #1\n1@x\n", "2 tables of particles"),
        (lambda t: "", "no tables of particles"),
        (
            lambda t: t[: t.rstrip().rfind("\n")] + "\n" + t[t.rstrip().rfind("\n") :],
            "a row after a blank line",
        ),
    ],
)
def test_star_files_that_do_not_fit(change, says, evaluation, tmp_path, cli):
    (tmp_path / "in.star").write_text(change(star("3.0")))
    code, _, err = cli(
        "scores_amort", evaluation, tmp_path / "in.star", "-o", tmp_path / "out.star"
    )
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.star").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no", "in.star", "-o", "out.star"], "EVAL no: neither a folder"),
        (["EVAL", "in.star", "-o", "in.star"], "is PARTICLES itself"),
        (["EVAL", "in.star", "-o", "out.cs"], "-o out.cs: must end in .star"),
        (["EVAL", "in.mrcs", "-o", "out.mrcs"], "a .star or a .cs file is needed"),
        (["EVAL", "no.star", "-o", "out.star"], "PARTICLES no.star: No such file"),
        (["EVAL", "in.star", "-o", "no/out.star"], "-o no/out.star: its folder is not there"),
        (["EVAL", "in.star", "-o", "out.star", "--columns", "trusty"], "--columns trusty: "),
        (["EVAL", "in.star", "-o", "out.star", "--as", "x"], "--as x: LABEL=NAME"),
        (["EVAL", "in.star", "-o", "out.star", "--as", "a b=trust"], "--as a b: not a label"),
        (["EVAL", "in.star", "-o", "out.star", "--ind", "far.pkl"], "there are 12 particles"),
        (["EVAL", "text.cs", "-o", "out.cs"], "not a .cs file"),
        (["EVAL", "array.cs", "-o", "out.cs"], "a table with named fields"),
        (["EVAL", "objects.cs", "-o", "out.cs"], "not a .cs file of plain data"),
    ],
)
def test_bad_calls(argv, says, evaluation, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.star").write_text(star("3.1"))
    (tmp_path / "text.cs").write_text("text")
    write_pickle(tmp_path / "far.pkl", np.array([12]))
    for name, array in (("array", np.arange(3)), ("objects", np.array([{}], object))):
        with open(tmp_path / f"{name}.cs", "wb") as handle:
            np.save(handle, array)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = cli("scores_amort", *("run" if a == "EVAL" else a for a in argv))
    assert (code, says in err) == (2, True), err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_an_evaluation_writes_is_read(train, flags, plugins, tmp_path, cli):
    """Of a run with --ind, in whose order its particles are."""
    chosen = np.random.default_rng(3).permutation(70)[:30]
    ind = write_pickle(tmp_path / "ind.pkl", chosen)
    trainer = train(flags, ind=str(ind), num_epochs=1, qdim=8)
    quick = ["--fit", "2", "--volumes", "2", "--bootstrap", "2", "--no-umap", "--labelled", "2"]
    assert cli("eval_amort", trainer.folder, *quick)[0] == 0
    scores = load_scores(str(trainer.folder))
    assert scores.total == 70
    assert scores.particles.tolist() == chosen.tolist()
    assert {"trust", "gap", "rank.roll-1.held"} <= scores.columns.keys()
    assert np.isnan(scores.rows("trust", 70)).sum() == 40
