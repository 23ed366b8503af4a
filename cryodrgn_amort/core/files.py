"""Files: written so that none is ever half there, and held against their checksums when read."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cryodrgn_amort.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = [
    "CHECKSUMS",
    "check_intact",
    "check_place",
    "check_plain",
    "digest",
    "forget",
    "is_recorded",
    "locked",
    "named",
    "naming",
    "read_arrays",
    "read_json",
    "read_table",
    "read_text",
    "read_yaml",
    "record",
    "recorded",
    "replacing",
    "write_arrays",
    "write_json",
    "write_text",
]

CHECKSUMS = "checksums.sha256"
"""File of a folder with the checksums of its others, as ``sha256sum --check`` reads it."""
_SURELY_NS = 2_000_000_000  # after so long a further change shows in a file's times
_intact: dict[Path, tuple[Any, ...]] = {}  # files that were seen to be intact, and their states
_LOCK = ".lock"
_OWN_SUM = "sha256"  # key in JSON
_MOST_TEXT = 1 << 26  # bytes
_UNFOLDED, _MORE = 64, 1_000_000  # parts of plain data, or bytes of arrays, for each byte of a file


def check_place(path: str | os.PathLike[str], *, folder: bool) -> Path:
    """Check that ``-o`` can be written, before the work is done.

    Raises
    ------
    InputError
        If what it lies in is no folder or is not to be written to; or if it is a folder and is to
        be a file, or the other way round.
    """
    out = Path(path)
    above = (out, *out.absolute().parents) if folder else out.absolute().parents
    there = next(p for p in above if p.exists())
    if not there.is_dir() or (not folder and out.is_dir()):
        what = f"{there} is not a folder" if not there.is_dir() else "is a folder, not a file"
        raise InputError(f"-o {path}: {what}")
    if not os.access(there, os.W_OK):
        raise InputError(
            f"-o {path}: no permission to write to {there}; choose another place with -o"
        )
    return out


def named(err: OSError, path: str | os.PathLike[str]) -> OSError:
    """Return an error that says which file, and on a full disk what is free: writes say neither."""
    reason, number = err.strerror or str(err), err.errno or errno.EIO
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        there = next((p for p in Path(os.path.abspath(path)).parents if p.is_dir()), Path("/"))
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(there).free / 1e9:.3f} GB are free in {there}"
    return OSError(number, reason, os.fspath(path))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
    """Let an error that names no file, or ``temporary``, name the file that is written."""
    try:
        yield
    except OSError as err:
        if err.filename is not None and str(err.filename) != str(temporary):
            raise
        raise named(err, path) from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields a temporary path in the same folder, named with a leading dot (the host's search for
    the latest checkpoint trips over other names); it takes the place of ``path`` on success.

    Raises
    ------
    OSError
        If it cannot be written; names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksums(folder: Path) -> dict[str, str]:
    """Read the checksums of a folder's files by name; what is no such line is passed over."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = (re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line) for line in lines)
    return {m[2]: m[1] for m in found if m}


@contextlib.contextmanager
def recorded(folder: Path, *names: str) -> Iterator[None]:
    """Keep the checksums of files that are written meanwhile, for ``check_intact``.

    Until all are written, none is held against the checksum of what was there before. A name whose
    file is not there afterwards has none.
    """
    forget(folder, *names)
    yield
    record(folder, *names)


def record(folder: Path, *names: str) -> None:
    """Keep the checksums of files, for ``check_intact``; a name without a file has none."""
    new = {name: digest(folder / name) for name in names if (folder / name).is_file()}
    _write_checksums(folder, _checksums(folder) | new)


def forget(folder: Path, *names: str) -> None:
    """Keep no checksums of files, which will be written; until they are ``recorded``."""
    sums = _checksums(folder)
    if sums.keys() & set(names):
        _write_checksums(folder, {k: v for k, v in sums.items() if k not in names})


def _write_checksums(folder: Path, sums: dict[str, str]) -> None:
    kept = (f"{value}  {name}\n" for name, value in sums.items() if (folder / name).is_file())
    write_text(folder / CHECKSUMS, "".join(kept))


def is_recorded(folder: Path, *names: str) -> bool:
    """Tell whether the checksums of all these files are kept, if the folder has checksums."""
    return not (folder / CHECKSUMS).exists() or _checksums(folder).keys() >= set(names)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    found = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def check_intact(path: str | os.PathLike[str], flag: str) -> None:
    """Hold a file against its checksum, if its folder has one of it.

    Raises
    ------
    InputError
        If it is not what was written, is not there, or is something else than a file.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would never end
        what = "not a file" if path.exists() else "no such file"
        raise InputError(f"{flag} {path}: {what}")
    known = _checksums(path.parent).get(path.name)
    while known is not None:
        try:
            state = _state(path)
            if state is not None and _intact.get(path.absolute()) == (known, *state):
                return
            found = digest(path)
        except OSError as err:
            raise InputError(f"{flag} {path}: {err.strerror}") from None
        before, known = known, _checksums(path.parent).get(path.name)
        if found in (before, known):
            if state is not None:
                _intact[path.absolute()] = (found, *state)
            return
        if before != known:  # it is being written
            continue
        raise InputError(
            f"{flag} {path}: damaged: it is not what {CHECKSUMS} beside it says (if you changed it "
            "yourself, remove its line there)"
        )


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does; None: it has just been changed, and could be unseen."""
    stat = path.stat()
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _SURELY_NS:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_plain(value: Any, size: int, what: str) -> None:
    """Check that plain data, read from ``size`` bytes, are not far more than these can hold.

    Few bytes can stand for very many parts: references to the same ones, over and over.

    Raises
    ------
    InputError
        Names the file by ``what``.
    """
    left, todo = _UNFOLDED * size + _MORE, [value]
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            todo += (*part.keys(), *part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            todo += part
        elif isinstance(part, np.ndarray) and part.dtype.hasobject:
            todo += part.ravel().tolist() if part.size < left else ()
        left -= max(1, int(getattr(part, "nbytes", 0)))
        if left < 0 or len(todo) > left + _MORE:
            raise InputError(f"{what}: stands for far more than it holds")


def read_text(path: str | os.PathLike[str], flag: str) -> str:
    """Read a small text.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no text.
    """
    check_intact(path, flag)
    try:
        if os.path.getsize(path) > _MOST_TEXT:
            raise InputError(f"{flag} {path}: larger than any such file")
        return Path(path).read_text(encoding="utf-8")
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{flag} {path}: damaged (not a text)") from None


def read_json(path: str | os.PathLike[str], flag: str) -> Any:
    """Read JSON; raises as ``read_text`` does, and if it is not what ``write_json`` wrote."""
    found = _parsed(json.loads, path, flag)
    known = found.pop(_OWN_SUM, None) if isinstance(found, dict) else None
    if known is not None and known != _sum_of(found):
        raise InputError(f"{flag} {path}: damaged: it is not what was written")
    return found


def read_yaml(path: str | os.PathLike[str], flag: str) -> Any:
    """Read YAML of plain values; raises as ``read_text`` does."""
    return _parsed(yaml.safe_load, path, flag)


def read_table(path: str | os.PathLike[str], flag: str) -> list[dict[str, str]]:
    """Read a table of numbers (.csv), as they are written; raises as ``read_text`` does."""
    lines = read_text(path, flag).splitlines()
    try:
        rows = list(csv.DictReader(lines, strict=True))
        for value in (value for row in rows for value in row.values() if value != ""):
            float(value)
        return rows
    except (ValueError, TypeError, csv.Error) as err:
        reason = " ".join(str(err).split())[:200]
        raise InputError(f"{flag} {path}: damaged ({reason})") from None


def _parsed(parse: Callable[[str], Any], path: str | os.PathLike[str], flag: str) -> Any:
    text = read_text(path, flag)
    try:
        found = parse(text)
    except Exception as err:  # of whatever kind, nesting without end included
        reason = " ".join(str(err).split())[:200]
        raise InputError(f"{flag} {path}: damaged ({type(err).__name__}: {reason})") from None
    check_plain(found, len(text), f"{flag} {path}")
    return found


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep others from working in the same folder at the same time.

    Raises
    ------
    InputError
        If another process does: ``what`` names it.
    """
    path = folder / _LOCK
    with open(path, "wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(handle.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:  # held, or just given back: its owner removes it
            raise InputError(f"-o {folder}: {what}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, and what no UTF-8 is, as a file's name may be, as Python writes it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Write strict JSON, and its checksum: arrays become lists, what is not finite becomes null."""
    plain = {name: value for name, value in _plain(facts).items() if name != _OWN_SUM}
    text = json.dumps({**plain, _OWN_SUM: _sum_of(plain)}, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def write_arrays(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Keep arrays in an .npz file."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]


def read_arrays(path: str | os.PathLike[str], flag: str) -> dict[str, np.ndarray]:
    """Read what ``write_arrays`` has kept; raises InputError if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found}
    except Exception as err:  # zip, numpy and the system have many for a damaged one
        raise InputError(f"{flag} {path}: damaged ({type(err).__name__}); remove it") from None


def _sum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
