"""Files that cannot be written: which one, and what is free."""

import errno
import os
import re
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryodrgn_amort import host
from cryodrgn_amort.cli import command_line as cli
from cryodrgn_amort.core import (
    InputError,
    check_place,
    files,
    replacing,
    write_json,
    write_text,
    write_weights,
    write_z,
)

FREE = r"; \d+\.\d{3} GB are free in "


def write_csv(path):
    with replacing(path) as temporary, open(temporary, "w", newline="") as handle:
        handle.write("x" * 100_000)


WRITERS = {
    "json": lambda path: write_json(path, {"a": [1] * 10_000}),
    "z": lambda path: write_z(path, np.zeros((10_000, 8)), np.zeros((10_000, 8))),
    "weights": lambda path: write_weights(path, 1, {"w": torch.zeros(100_000)}),
    "csv": write_csv,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_on_a_full_disk_the_error_names_the_file_and_what_is_free(writer, tmp_path):
    path = tmp_path / "file.x"
    path.write_text("old")
    (tmp_path / ".file.x.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=FREE + re.escape(str(tmp_path))) as caught:
        WRITERS[writer](path)
    assert caught.value.filename == str(path)
    assert "full" in caught.value.strerror or caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["file.x"]
    assert path.read_text() == "old"


def test_volumes_on_a_full_disk(tmp_path):
    path = tmp_path / "vol.mrc"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=FREE) as caught:
        host.write_mrc(str(path), np.zeros((32, 32, 32), np.float32))
    assert caught.value.filename == str(path)


def test_a_text_with_a_name_that_is_none(tmp_path):
    write_text(tmp_path / "a", "\u00b5 p\udcff")
    assert (tmp_path / "a").read_bytes() == b"\xc2\xb5 p\\udcff"


def test_a_folder_that_is_not_there_is_named_as_it_was_given(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_csv(tmp_path / "none" / "file.x")
    assert caught.value.filename == str(tmp_path / "none" / "file.x")
    assert "free" not in caught.value.strerror


def test_particles_that_fit_no_disk_are_refused_by_name(train, flags, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=FREE) as caught:
            train(flags, qdim=16, memory=1e-9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == f"{tmp_path}/"
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    ("number", "name", "suggested"),
    [
        (errno.EACCES, "out/.lock", True),
        (errno.EROFS, "", True),
        (errno.EPERM, "particles.mrcs", False),
        (errno.ENOENT, "out/a", False),
    ],
)
def test_another_place_is_suggested_where_nothing_may_be_written(
    number, name, suggested, tmp_path, capsys
):
    def denied(args):
        raise OSError(number, "no", str(tmp_path / name))

    for flag in ("outdir", "output"):
        with pytest.raises(SystemExit):
            cli._guarded("c", denied)(SimpleNamespace(**{flag: str(tmp_path / "out")}))
        said = capsys.readouterr().err
        assert said.startswith(f"cryodrgn c: error: {tmp_path / name}: no")
        assert said.endswith("; choose another place with -o\n") == suggested


def test_where_output_cannot_go_is_said_before_the_work(tmp_path, monkeypatch, cli):
    file = tmp_path / "file"
    file.write_text("mine")
    for place, folder, says in (
        (file / "a.json", False, "file is not a folder"),
        (tmp_path, False, "is a folder, not a file"),
        (file / "a", True, "file is not a folder"),
        (file, True, "file is not a folder"),
    ):
        with pytest.raises(InputError, match=says):
            check_place(place, folder=folder)
    check_place(tmp_path / "new" / "out", folder=True)
    check_place(file, folder=False)  # is replaced
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    for folder in (True, False):
        with pytest.raises(InputError, match=r"no permission .*; choose another place with -o"):
            check_place(tmp_path / "a.json", folder=folder)
    monkeypatch.undo()
    for command in ("compare_amort", "time_amort"):
        code, _, said = cli(command, "none", "none", "-o", tmp_path)
        assert (code, said.count("\n")) == (2, 1)
        assert f"-o {tmp_path}: is a folder, not a file" in said


def test_an_error_without_a_file_names_the_output_folder(tmp_path, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for args, says in (
        (SimpleNamespace(outdir=str(tmp_path)), f"{tmp_path}/: No space left on device{FREE}"),
        (SimpleNamespace(), "error: No space left on device"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli._guarded("train_amort", full)(args)
        assert stop.value.code == 2
        assert re.search(says, capsys.readouterr().err)


def test_full_memory_is_one_line_and_other_errors_keep_their_traceback(capsys):
    def run(err):
        def work(args):
            raise err

        cli._guarded("c", work)(SimpleNamespace())

    for err in (
        MemoryError("Unable to allocate 3 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(err)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said == f"cryodrgn c: error: out of memory: {str(err).splitlines()[0]}\n"
    with pytest.raises(SystemExit) as stop:
        run(torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 "
            "GiB of which 1.21 GiB is free. Process 7 has"
        ))  # fmt: skip
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "cryodrgn c: error: the GPU has no memory left: 2.00 GiB more were asked for, 1.21 GiB are "
        "free; a smaller --batch-size, or --precision bf16 helps\n"
    )
    with pytest.raises(RuntimeError, match="a bug"):
        run(RuntimeError("a bug"))


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    """Of a file that has just been written nothing is remembered: a change might not show."""
    path, hashed = tmp_path / "z.pkl", []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda p: hashed.append(p) or digest(p))
    with files.recorded(tmp_path, "z.pkl"):
        path.write_bytes(b"latents")
    hashed.clear()
    for _ in range(2):
        files.check_intact(path, "RUN")
    assert len(hashed) == 2
    monkeypatch.setattr(files, "_SURELY_NS", 0)
    for _ in range(3):
        files.check_intact(path, "RUN")
    assert len(hashed) == 3
    os.utime(path)
    path.write_bytes(b"latentt")
    with pytest.raises(InputError, match="damaged"):
        files.check_intact(path, "RUN")
    with files.recorded(tmp_path, "z.pkl"):
        path.write_bytes(b"latents")
    files.check_intact(path, "RUN")
