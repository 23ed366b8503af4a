"""A user's mistake: one line that names flag and file, exit code 2, nothing touched on disk."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import read_pickles, write_pickle, write_stack

from cryodrgn_amort.core import read_ind
from cryodrgn_amort.data import load_poses


@pytest.fixture
def files(stack, tmp_path):
    return write_stack(tmp_path / "in", 12)


@pytest.fixture
def refused(cli, files, tmp_path):
    """Train with some flags changed; check the refusal and that nothing was written."""

    def run(*more, says, particles=None, poses=None, ctf=None, drop=()):
        before = snapshot(tmp_path)
        argv = [
            "train_amort", particles or files.particles, "--poses", poses or files.poses,
            "--ctf", ctf or files.ctf, "--zdim", "2", "-o", tmp_path / "out", "-n", "1",
            "--no-analysis", *more,
        ]  # fmt: skip
        code, _, err = cli(*[a for a in argv if a not in drop])
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert err.startswith("cryodrgn train_amort: error: ")
        for words in [says] if isinstance(says, str) else says:
            assert words in err
        assert snapshot(tmp_path) == before

    return run


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_without_a_run_is_left_alone(refused, cli, tmp_path):
    """A project's own pose.pkl, or a simulation, is not what a dead training left."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("pose.pkl", "ind_train.pkl"):
        write_pickle(out / name, np.arange(12))
        refused(says=["-o", "holds no run", name])
        refused("--overwrite", says=["-o", "holds no run", name])
        (out / name).unlink()
    cli("simulate_amort", "-o", out, "-n", "8", "--heldout", "4", "-D", "16")
    refused("--overwrite", "--holdout", "0.5", says=["-o", "holds no run", "ind_train.pkl"])


def test_inputs_within_the_run_that_is_replaced(refused, cli, files, tmp_path):
    argv = ["train_amort", files.particles, "--poses", files.poses, "--ctf", files.ctf, "--zdim",
            "2", "-o", tmp_path / "out", "-n", "1", "--no-analysis", "--encoder", "vlt",
            "--holdout", "0.2"]  # fmt: skip
    assert cli(*argv)[0] == 0
    refused("--overwrite", "--ind", tmp_path / "out/ind_train.pkl",
            says=["--ind", "ind_train.pkl", "of the run that -o", "replaces"])  # fmt: skip


def test_a_table_that_starts_from_a_run_of_other_particles(refused, cli, files, tmp_path):
    argv = ["train_amort", files.particles, "--poses", files.poses, "--ctf", files.ctf, "--zdim",
            "2", "-o", tmp_path / "first", "-n", "1", "--no-analysis",
            "--encoder", "vlt"]  # fmt: skip
    assert cli(*argv, "--ind", write_pickle(tmp_path / "first.pkl", np.arange(10)))[0] == 0
    other = write_pickle(tmp_path / "second.pkl", np.arange(11, 1, -1))
    start = "--encoder", "vlt", "--table-init", tmp_path / "first", "--ind", other
    refused(*start, says=["--table-init", "first: was trained on 10", "are 10, of which it had 8"])


def test_counts(refused, files, tmp_path):
    short = write_pickle(tmp_path / "short.pkl", (files.rots[:7], files.trans[:7]))
    refused(poses=short, says=["--poses", "short.pkl", "7 rows for 12 particles"])
    ctf = write_pickle(tmp_path / "few.pkl", files.ctf_table[:5])
    refused(ctf=ctf, says=["--ctf", "few.pkl", "5 rows for 12 particles"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r, t: (np.where(np.arange(12)[:, None, None] == 4, np.nan, r), t),
         "rotation of particle 4 is not finite"),
        (lambda r, t: (r * 1.01, t), "the matrix of particle 0 is not a rotation"),
        (lambda r, t: (r.round(1), t), "is not a rotation"),
        (lambda r, t: (r.round(2) + 0.01 * (np.arange(12) == 7)[:, None, None], t),
         "the matrix of particle 7 is not a rotation"),
        (lambda r, t: (r * -1, t), "the matrix of particle 0 is not a rotation"),
        (lambda r, t: (r[:, :2], t), "(12, 2, 3), not (N, 3, 3)"),
        (lambda r, t: (r, t * 0 - 1.5), "leaves the box"),
        (lambda r, t: (r, t * np.nan), "leaves the box"),
        (lambda r, t: (r, t[:, :1]), "(12, 1), not (N, 2)"),
        (lambda r, t: "poses", "not poses"),
        (lambda r, t: (r, t, t), "not poses"),
        (lambda r, t: [[1, 2], [[3], 4]], "different lengths"),
    ],
)  # fmt: skip
def test_poses(refused, files, tmp_path, change, says):
    path = write_pickle(tmp_path / "bad_poses.pkl", change(files.rots, files.trans))
    refused(poses=path, says=["--poses", "bad_poses.pkl", says])


@pytest.mark.parametrize("decimals", [2, 3])
def test_rotations_that_were_rounded_are_made_rotations_again(decimals, files, tmp_path, caplog):
    rounded = files.rots.round(decimals)
    assert np.abs(rounded @ rounded.transpose(0, 2, 1) - np.eye(3)).max() > 1e-3
    path = write_pickle(tmp_path / "rounded.pkl", (rounded, files.trans))
    rots, _ = load_poses(path, 12, None, 16)
    np.testing.assert_allclose(
        rots @ rots.transpose(0, 2, 1), np.eye(3)[None].repeat(12, 0), atol=1e-6
    )
    np.testing.assert_allclose(rots, files.rots, atol=10.0**-decimals)
    assert f"rotations are rounded to {decimals} decimals" in caplog.text
    exact = write_pickle(tmp_path / "exact.pkl", (files.rots, files.trans))
    np.testing.assert_array_equal(load_poses(exact, 12, None, 16)[0], files.rots)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c[:, :8], "not CTF parameters"),
        (lambda c: np.where(np.arange(12)[:, None] == 3, np.inf, c), "particle 3 is not finite"),
        (lambda c: c * 0, "must be positive"),
    ],
)  # fmt: skip
def test_ctf(refused, files, tmp_path, change, says):
    path = write_pickle(tmp_path / "bad_ctf.pkl", change(files.ctf_table))
    refused(ctf=path, says=["--ctf", "bad_ctf.pkl", says])


@pytest.mark.parametrize(
    ("ind", "says"),
    [
        (np.arange(12) % 2 == 0, "holds booleans"),
        (np.array([1, 12]), "index 12 is out of range, there are 12 particles"),
        (np.array([-1, 3]), "index -1 is out of range"),
        (np.array([1, 1]), "more than once"),
        (np.array([], int), "selects no particle"),
        (np.array([0.5]), "not a list of integer indices"),
        (range(10**12), "range(0, 1000000000000) has 1000000000000 values"),
        (pd.Series([1, 2]), "it holds a pandas Series; save its .to_numpy()"),
        (pd.Index(["a", "b"], dtype=object), "list of integer indices"),
        (pd.MultiIndex.from_tuples([(1, 2), (3, 4)]), "index of several levels"),
        ({"a": 1}, "not a list of integer indices"),
        ([[1], [1, 2]], "different lengths"),
    ],
)
def test_ind(refused, tmp_path, ind, says):
    path = write_pickle(tmp_path / "ind.pkl", ind)
    refused("--ind", path, says=["--ind", "ind.pkl", says])


@pytest.mark.parametrize(
    "ind",
    [
        pd.DataFrame({"class": [1, 2, 1, 1]}).query("`class` == 1").index,
        pd.Index([0, 2, 3]).astype("int32"),
        pd.RangeIndex(0, 3),
        range(0, 6, 2),
        (np.int64(0), 2, 3),
        [0, 2, 3],
    ],
    ids=lambda ind: type(ind).__name__,
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_indices_as_people_save_them(ind, protocol, tmp_path):
    path = tmp_path / "ind.pkl"
    path.write_bytes(pickle.dumps(ind, protocol))
    found = read_ind(path, "--ind", 6)
    assert found.dtype == np.int64
    assert found.tolist() == list(map(int, ind))


def test_files_that_are_something_else(refused, files, tmp_path):
    text = tmp_path / "text.pkl"
    text.write_text("no pickle at all")
    for flag in ("poses", "ctf"):
        refused(**{flag: str(text)}, says=[f"--{flag}", "text.pkl", "not a usable pickle"])
        refused(
            **{flag: str(tmp_path / "gone.pkl")}, says=[f"--{flag}", "gone.pkl", "no such file"]
        )
    refused("--ind", text, says=["--ind", "text.pkl", "not a usable pickle"])
    refused(particles=str(text), says=["PARTICLES", "text.pkl", ".mrcs"])
    refused(particles=str(tmp_path / "gone.mrcs"), says=["gone.mrcs", "no such file"])
    mrc = tmp_path / "short.mrcs"
    mrc.write_bytes(b"\0" * 100)
    refused(particles=str(mrc), says=["PARTICLES", "short.mrcs", "cannot be read"])


def test_truncated_stack(refused, files, tmp_path):
    path = tmp_path / "cut.mrcs"
    path.write_bytes(Path(files.particles).read_bytes()[:-100])
    refused(particles=str(path), says=["PARTICLES", "cut.mrcs", "cannot be read"])


def test_integer_stack(refused, files, tmp_path):
    from cryodrgn.mrcfile import write_mrc

    path = tmp_path / "int16.mrcs"
    write_mrc(str(path), (files.images * 100).astype(np.int16))
    refused(particles=str(path), says=["int16.mrcs", "stored as int16", "float32"])


def test_checkpoints_that_are_damaged(refused, tmp_path):
    import torch

    path = tmp_path / "weights.1.pkl"
    for content in (
        {"epoch": "x", "model_state_dict": {}},
        {"epoch": 1, "model_state_dict": 3},
        {"epoch": 1, "model_state_dict": {}, "amort": {"version": "1"}},
        {"epoch": 1, "model_state_dict": {}, "amort": 5},
    ):
        torch.save(content, path)
        refused("--load", path, says=["--load", "weights.1.pkl", "checkpoint"])


def test_odd_box(refused, tmp_path):
    odd = write_stack(tmp_path / "odd", 12, box=15)
    refused(particles=odd.particles, says=["particles.mrcs", "15 pixels is odd"])


def test_a_damaged_type_of_array_does_not_end_the_process(tmp_path):
    """A flipped bit makes 64-bit integers times without a unit, which NumPy does not survive."""
    whole = pickle.dumps(np.arange(4), protocol=4)
    assert whole.count(b"\x8c\x02i8") == 1
    (tmp_path / "ind.pkl").write_bytes(whole.replace(b"\x8c\x02i8", b"\x8c\x02m8"))
    code = "from cryodrgn_amort.core import read_ind; read_ind('ind.pkl', '--ind')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 1, found.stderr
    assert "--ind ind.pkl: not a usable pickle (it holds times or dates" in found.stderr


def test_pickles_that_run_code_do_not(refused, tmp_path):
    import os

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = write_pickle(tmp_path / "evil.pkl", Payload())
    for flag in ("poses", "ctf"):
        refused(**{flag: path}, says=["evil.pkl", "mkdir", "not plain data"])
    refused("--ind", path, says="not plain data")
    refused("--load", path, says="not a checkpoint")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--zdim", "0"], "--zdim 0: must be at least 1"),
        (["-n", "0"], "--num-epochs 0"),
        (["--enc-layers", "-1"], "--enc-layers -1"),
        (["--lr", "0"], "--lr 0.0: must be positive"),
        (["--enc-mask", "99"], "--enc-mask 99: must be -1 or between 1 and 8"),
        (["--encoder", "vlb"], "--encoder vlb: unknown; known are alternate, anchored, mlp"),
        (["--recipe", "base"], "--recipe base: unknown; known are alternate, anchored, augment"),
        (["--recipe", "vlt-frozen-encoder"], "needs --table-init"),
        (["--encoder", "sleep"], "--encoder sleep: needs a finished run, --from RUN"),
        (["--encoder", "anchored", "--from", "no"], "--from no: not a run folder"),
        (["--anchors", "9"], "--anchors: does not apply to --encoder resid"),
        (["--lr-end", "0"], "--lr-end 0.0: must be positive"),
        (["--beta", "x"], "--beta x"),
        (["--beta", "nan"], "--beta nan: must not be negative, nor infinite"),
        (["--beta", "-1"], "--beta -1"),
        (["--lr", "inf"], "--lr inf"),
        (["--wd", "nan"], "--wd nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**70)], "--seed 1180591620717411303424"),
        (["--lazy", "--num-workers", "-1"], "--num-workers -1"),
        (["--window-r", "5"], "--window-r 5.0"),
        (["--norm", "nan", "1"], "--norm nan 1.0"),
        (["--encoder", "vlt", "--table-logvar", "nan"], "--table-logvar nan"),
        (["--encoder", "vlt", "--table-lr", "inf"], "--table-lr inf"),
        (["--beta", "a"], "needs --beta-control"),
        (["--norm", "0", "0"], "--norm"),
        (["--table-lr", "1"], "--table-lr: does not apply to --encoder resid"),
        (["--encoder", "resid", "--encode-mode", "mlp"], "--encode-mode mlp: contradicts"),
        (["--encode-mode", "tilt"], "a tilt series needs a .star file"),
        (["--encode-mode", "conv"], "--encode-mode conv: real-space"),
        (["--do-pose-sgd", "--pose-lr", "0"], "--pose-lr 0.0: must be positive"),
        (["--do-pose-sgd", "--pretrain", "-1"], "--pretrain -1: must not be negative"),
        (["--do-pose-sgd", "--encoder", "twin"], "--do-pose-sgd: does not apply to --encoder twin"),
        (["--do-pose-sgd", "--augment"], "--do-pose-sgd: does not apply to --augment"),
        (["--use-real"], "--use-real: "),
        (["--lazy", "--shuffler-size", "4"], "--shuffler-size 4: at least two batches"),
        (["--checkpoint", "-1"], "--checkpoint -1"),
        (["--pe-type", "none"], "--pe-type none: "),
        (["--load", "latest"], "has no checkpoint"),
        (["--load", "gone.pkl"], "--load gone.pkl: no such file"),
    ],
)  # fmt: skip
def test_flags(refused, more, says):
    refused(*more, says=says)


def test_zdim_is_required(cli, files, tmp_path):
    code, _, err = cli("train_amort", files.particles, "--poses", files.poses, "-o", tmp_path / "o")
    assert code == 2
    assert "--zdim" in err


def test_run_folders_are_not_overwritten_by_accident(cli, files, tmp_path, refused):
    argv = [
        "train_amort", files.particles, "--poses", files.poses, "--ctf", files.ctf, "--zdim", "2",
        "-o", tmp_path / "out", "-n", "1", "--no-analysis", "--enc-dim", "8", "--dec-dim", "8",
    ]  # fmt: skip
    assert cli(*argv)[0] == 0
    refused(says=["-o", "out", "holds a run already", "--load latest", "--overwrite"])
    refused(
        "--load", tmp_path / "out/z.pkl", "-n", "3", says=["--load", "z.pkl", "not a checkpoint"]
    )
    refused("--load", "latest", says=["has 1 epochs already"])
    other = tmp_path / "weights.1.pkl"  # of another run: must not take this one's place
    other.write_bytes((tmp_path / "out/weights.1.pkl").read_bytes())
    refused("--load", other, "-n", "3", says=["-o", "holds a run already"])
    refused("--load", "latest", "--overwrite", says="exclude each other")
    refused("--load", "latest", "-n", "3", says=["weights of another model"])
    refused("--load", "latest", "-n", "3", "--encoder", "vlt", says="--encoder resid, not vlt")
    poses = write_pickle(tmp_path / "bad.pkl", (files.rots[:3], files.trans[:3]))
    refused("--overwrite", poses=poses, says="3 rows for 12")
    old = read_pickles(tmp_path / "out/z.pkl", 2)
    assert cli(*argv, "--overwrite", "--seed", "5")[0] == 0
    assert not np.array_equal(read_pickles(tmp_path / "out/z.pkl", 2)[0], old[0])


def test_unwritable_folder_is_one_line(cli, files, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli(
        "train_amort", files.particles, "--poses", files.poses, "--zdim", "2",
        "-o", tmp_path / "file" / "run", "-n", "1", "--no-analysis",
    )  # fmt: skip
    assert code == 2
    assert err.count("\n") == 1
    assert "file" in err
