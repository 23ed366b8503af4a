"""Pickles and checkpoints, the host's and ours: read so that none runs code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import __version__
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.files import check_intact, check_plain, replacing
from cryodrgn_amort.private import PythonUnpickler

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "INTERRUPTED",
    "OWN_KEY",
    "epochs",
    "latest_z",
    "read_ind",
    "read_pickle",
    "read_weights",
    "read_z",
    "to_array",
    "write_pickle",
    "write_weights",
    "write_z",
]

OWN_KEY = "amort"
"""Our key in config.yaml and in checkpoints; the host ignores it."""
OWN_PARTS = frozenset({"encoder", "encoder_state_dict", "input_state", "norm", "random"})
"""What a checkpoint holds under ``OWN_KEY``."""

INTERRUPTED = ".interrupted.pkl"
"""Checkpoint within an epoch; named unlike what the host takes for its own."""
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


class _ArrayUnpickler(PythonUnpickler):
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
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror or 'cannot be read'}") from None
    except Exception as err:  # a damaged pickle can raise anything
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise InputError(f"{flag} {path}: not a usable pickle ({reason})") from None
    check_plain(parts, os.path.getsize(path), f"{flag} {path}")
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


def read_ind(path: str | os.PathLike[str], flag: str, n: int | None = None) -> np.ndarray:
    """Read indices of particles `(M,)` int64, each once, of a stack of ``n`` (None: not known).

    Raises
    ------
    InputError
        If the file holds anything else; ``flag`` names its role.
    """
    what = f"{flag} {path}"
    ind = to_array(read_pickle(path, flag), what)
    if ind.dtype == bool:
        raise InputError(f"{what}: holds booleans; indices are needed (numpy.flatnonzero)")
    if ind.ndim != 1 or not np.issubdtype(ind.dtype, np.integer):
        raise InputError(f"{what}: not a list of integer indices")
    if len(ind) == 0:
        raise InputError(f"{what}: selects no particle")
    if ind.min() < 0 or (n is not None and ind.max() >= n):
        bad = ind.min() if ind.min() < 0 else ind.max()
        of = "" if n is None else f", there are {n} particles"
        raise InputError(f"{what}: index {bad} is out of range{of}")
    if len(np.unique(ind)) != len(ind):
        raise InputError(f"{what}: holds an index more than once")
    return ind.astype(np.int64)


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
    _check_archive(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, which are refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror or 'cannot be read'}") from None
    except Exception:  # torch raises many kinds for damaged or foreign files
        raise InputError(f"{flag} {path}: not a checkpoint (a weights.pkl is needed)") from None
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not (
        isinstance(parts.get("epoch"), int) and isinstance(parts.get("model_state_dict"), dict)
    ):
        raise InputError(f"{flag} {path}: not a checkpoint (a weights.pkl is needed)")
    state = parts["model_state_dict"]
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InputError(f"{flag} {path}: a damaged checkpoint (its model_state_dict)")
    own = parts.get(OWN_KEY, {})
    if not isinstance(own, dict) or (own and not own.keys() >= OWN_PARTS):
        raise InputError(f"{flag} {path}: a damaged checkpoint (its part {OWN_KEY!r})")
    check_plain(parts, os.path.getsize(path), f"{flag} {path}")
    return parts


def _check_archive(path: str | os.PathLike[str], flag: str) -> None:
    """Refuse a checkpoint that is compressed, as PyTorch's are not: it could be without end."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # of another kind, or damaged: PyTorch says so
    if packed:
        raise InputError(f"{flag} {path}: not a checkpoint (it is compressed)")


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
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as err:  # PyTorch writes without Python, and hides what went wrong
            reason = f"cannot be written ({str(err).splitlines()[0]}): is the disk full?"
            raise OSError(errno.EIO, reason) from None


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
