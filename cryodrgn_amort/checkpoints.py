"""The files of a run: written so that none is ever half there, read so that none runs code."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import __version__
from cryodrgn_amort.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CHECKSUMS",
    "INTERRUPTED",
    "OWN_KEY",
    "check_intact",
    "epochs",
    "latest_z",
    "locked",
    "read_pickle",
    "read_weights",
    "read_z",
    "recorded",
    "replacing",
    "to_array",
    "write_json",
    "write_pickle",
    "write_weights",
    "write_z",
]

OWN_KEY = "amort"
"""Our key in config.yaml and in checkpoints; the host ignores it."""
OWN_PARTS = frozenset({"encoder", "encoder_state_dict", "input_state", "norm", "random"})
"""What a checkpoint holds under ``OWN_KEY``."""

CHECKSUMS = "checksums.sha256"
"""File of a run's folder with the checksums of its others, as ``sha256sum --check`` reads it."""

INTERRUPTED = ".interrupted.pkl"
"""Checkpoint within an epoch; named unlike what the host takes for its own."""
_LOCK = ".lock"
_ARRAY_NAMES = {
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},  # bytes in pickles of protocol 2
    "torch._utils": {"_rebuild_tensor_v2"},
}


def _storage_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays, torch tensors and plain Python containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if name in _ARRAY_NAMES.get(module, ()):
            return OrderedDict if name == "OrderedDict" else super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data")


def read_pickle(path: str | os.PathLike[str], flag: str, count: int = 1) -> Any:
    """Read a pickle of arrays and plain containers from a user, running none of its code.

    Parameters
    ----------
    flag
        Names the file's role in errors.
    count
        Number of pickles in the file; a list of them is returned if more than one.

    Raises
    ------
    InputError
        If the file is missing, damaged, no pickle, or holds anything but plain data.
    """
    check_intact(path, flag)
    try:
        with open(path, "rb") as handle:
            parts = [_ArrayUnpickler(handle).load() for _ in range(count)]
    except FileNotFoundError:
        raise InputError(f"{flag} {path}: no such file") from None
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror}") from None
    except Exception as err:  # a damaged pickle can raise anything
        raise InputError(f"{flag} {path}: not a usable pickle ({err})") from None
    return parts[0] if count == 1 else parts


def to_array(value: Any, what: str) -> np.ndarray:
    """Make an array of what a pickle held.

    Raises
    ------
    InputError
        If it has no regular shape; ``what`` names flag and file.
    """
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(f"{what}: a list of entries of different lengths, not an array") from None


def read_z(path: str | os.PathLike[str], flag: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a z.pkl of the host: means and log variances, each `(N, zdim)` float32."""
    parts = read_pickle(path, flag, count=2)
    usable = all(isinstance(p, np.ndarray) and p.ndim == 2 and p.dtype.kind == "f" for p in parts)
    if not usable or parts[0].shape != parts[1].shape:
        raise InputError(f"{flag} {path}: not a z file (two pickled arrays, N x zdim each)")
    if not all(np.isfinite(p).all() for p in parts):
        raise InputError(f"{flag} {path}: holds values that are not finite")
    return parts[0].astype(np.float32, copy=False), parts[1].astype(np.float32, copy=False)


def read_weights(path: str | os.PathLike[str], flag: str) -> dict[str, Any]:
    """Read a weights.pkl of ours or of the host, onto the CPU.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no checkpoint.
    """
    check_intact(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, which are refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{flag} {path}: no such file") from None
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror}") from None
    except Exception:  # torch raises many kinds for damaged or foreign files
        raise InputError(f"{flag} {path}: not a checkpoint (a weights.pkl is needed)") from None
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not (
        isinstance(parts.get("epoch"), int) and isinstance(parts.get("model_state_dict"), dict)
    ):
        raise InputError(f"{flag} {path}: not a checkpoint (a weights.pkl is needed)")
    own = parts.get(OWN_KEY, {})
    if not isinstance(own, dict) or (own and not own.keys() >= OWN_PARTS):
        raise InputError(f"{flag} {path}: a damaged checkpoint (its part {OWN_KEY!r})")
    return parts


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields a temporary path in the same folder, named with a leading dot (the host's search for
    the latest checkpoint trips over other names); it takes the place of ``path`` on success.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
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

    def write(sums: dict[str, str]) -> None:
        kept = (f"{value}  {name}\n" for name, value in sums.items() if (folder / name).is_file())
        with replacing(folder / CHECKSUMS) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    sums = _checksums(folder)
    if sums.keys() & set(names):
        sums = {name: value for name, value in sums.items() if name not in names}
        write(sums)
    yield
    write(sums | {name: _digest(folder / name) for name in names if (folder / name).is_file()})


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_intact(path: str | os.PathLike[str], flag: str) -> None:
    """Hold a file against its checksum, if its folder has one of it.

    Raises
    ------
    InputError
        If it is not what was written.
    """
    path = Path(path)
    known = _checksums(path.parent).get(path.name)
    if known is None or not path.is_file():
        return
    try:
        found = _digest(path)
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror}") from None
    if found != known:
        raise InputError(
            f"{flag} {path}: damaged: it is not what {CHECKSUMS} beside it says (if you changed it "
            "yourself, remove its line there)"
        )


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep others from working in the same folder at the same time.

    Raises
    ------
    InputError
        If another process does: ``what`` names it.
    """
    path = folder / _LOCK
    with open(path, "w") as handle:
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


def write_json(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Write strict JSON: arrays become lists, what is not finite becomes null."""
    text = json.dumps(_plain(facts), indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


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


def write_pickle(path: str | os.PathLike[str], *values: Any) -> None:
    """Pickle ``values`` one after the other into one file."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        for value in values:
            pickle.dump(value, handle)


def write_weights(
    path: str | os.PathLike[str],
    epoch: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    **own: Any,
) -> None:
    """Write a weights.pkl, which the host can read.

    Parameters
    ----------
    model, optimizer
        Their states.
    own
        Of ``OWN_PARTS``: ``encoder`` and ``encoder_state_dict``; what else is not given is empty.
    """
    rest: dict[str, Any] = {"input_state": {}, "norm": None, "random": {}}
    checkpoint = {
        "epoch": epoch,
        "model_state_dict": dict(model),
        "optimizer_state_dict": dict(optimizer or {}),
        OWN_KEY: {"version": __version__, **rest, **own},
    }
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def write_z(path: str | os.PathLike[str], mean: np.ndarray, logvar: np.ndarray) -> None:
    """Write a z.pkl as the host does."""
    write_pickle(path, np.asarray(mean, np.float32), np.asarray(logvar, np.float32))


def epochs(folder: str | os.PathLike[str]) -> list[int]:
    """Return the epochs of a run folder that have both weights and z, in order."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    found = (re.fullmatch(r"weights\.(\d+)\.pkl", name) for name in names)
    return sorted(int(m[1]) for m in found if m and f"z.{m[1]}.pkl" in names)


def latest_z(folder: str | os.PathLike[str], flag: str) -> Path:
    """Return the final z file of a run folder, or that of its latest epoch."""
    final = Path(folder) / "z.pkl"
    if final.is_file():
        return final
    known = epochs(folder)
    if not known:
        raise InputError(f"{flag} {folder}: no z.pkl in this folder")
    return Path(folder) / f"z.{known[-1]}.pkl"
