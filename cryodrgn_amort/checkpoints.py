"""Pickles and checkpoints, the host's and ours: read so that none runs code."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from datetime import datetime
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
    "odd_rows",
    "odd_text",
    "read_ind",
    "read_pickle",
    "read_weights",
    "read_z",
    "to_array",
    "without_odd",
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
_NAMED = 10  # particles in a message
_LONGEST = 10**8  # range
_PARALLEL = "module."
"""What PyTorch's data-parallel wrappers put before every name."""
_ARRAY_NAMES = {
    "numpy": {"ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "collections": {"OrderedDict"},
    "datetime": {"datetime"},  # of a config.pkl
    "_codecs": {"encode"},  # bytes in pickles of protocol 2
    "torch._utils": {"_rebuild_tensor_v2"},
}


def _storage_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _dtype(code: Any, *more: Any) -> np.dtype:
    """Make a type of array, but of times: one that a damaged file makes of them ends the process.

    NumPy looks for their unit where the state that follows has none.
    """
    found: np.dtype = np.dtype(code, *more)
    if found.kind in "mM":
        raise pickle.UnpicklingError("it holds times or dates, which are no numbers")
    return found


def _pandas_index(_: str, parts: dict[str, Any]) -> Any:
    """Stand in for what makes a pandas Index: the array that it holds, or the range."""
    if "data" in parts:
        return np.asarray(parts["data"])
    if "start" not in parts:
        raise pickle.UnpicklingError("it holds a pandas index of several levels; save one of them")
    return range(int(parts["start"]), int(parts["stop"]), int(parts["step"]))


class _ArrayUnpickler(PythonUnpickler):
    """Admits arrays, tensors, plain Python containers, pandas' indices, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if (module, name) in (("builtins", "range"), ("__builtin__", "xrange")):  # protocol 2
            return range
        if module.split(".")[0] == "pandas":  # which need not be imported
            if name == "_new_Index":
                return _pandas_index
            if name.endswith("Index"):
                return name
            raise pickle.UnpicklingError(f"it holds a pandas {name}; save its .to_numpy()")
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if name in _ARRAY_NAMES.get(module, ()):
            return OrderedDict if name == "OrderedDict" else super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data")


def read_pickle(path: str | os.PathLike[str], flag: str, count: int | None = 1) -> Any:
    """Read a pickle of arrays and plain containers from a user, running none of its code.

    Parameters
    ----------
    flag
        Names the file's role in errors.
    count
        Number of pickles in the file; a list of them is returned if more than one. None: all.

    Raises
    ------
    InputError
        If the file is missing, damaged, no pickle, or holds anything but plain data.
    """
    check_intact(path, flag)
    try:
        with open(path, "rb") as handle:
            if count is None:
                parts: list[Any] = []
                size = os.path.getsize(path)
                while handle.tell() < size or not parts:
                    parts.append(_ArrayUnpickler(handle).load())
            else:
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
        If it has no regular shape, or is too long a range; ``what`` names flag and file.
    """
    if isinstance(value, range) and len(value) > _LONGEST:
        raise InputError(f"{what}: {value} has {len(value)} values")
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
    """Read a z.pkl of the host: means and log variances, each `(N, zdim)` float32.

    Log variances are NaN where the file has none, as those of ``train_dec`` and ``abinit``. Rows
    may hold values that are not finite: see ``odd_rows``.

    Raises
    ------
    InputError
        If the file is no z file, or no row is finite.
    """
    parts = read_pickle(path, flag, count=None)
    usable = all(isinstance(p, np.ndarray) and p.ndim == 2 and p.dtype.kind == "f" for p in parts)
    if not usable or not 1 <= len(parts) <= 2 or len({p.shape for p in parts}) > 1:
        raise InputError(f"{flag} {path}: not a z file (two pickled arrays, N x zdim each)")
    mean = parts[0].astype(np.float32, copy=False)
    logvar = np.full_like(mean, np.nan) if len(parts) == 1 else parts[1]
    if len(odd_rows(mean, logvar)) == len(mean):
        raise InputError(f"{flag} {path}: holds no latent that is finite")
    return mean, logvar.astype(np.float32, copy=False)


def odd_rows(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """Return the positions of latents `(N, zdim)` that are not finite, `(M,)`.

    Log variances count, unless they are all NaN: there are none then.
    """
    good = np.isfinite(mean).all(1)
    if not np.isnan(logvar).all():
        good &= np.isfinite(logvar).all(1)
    return np.flatnonzero(~good)


def without_odd(mean: np.ndarray, logvar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return latents `(N, zdim)` with the mean of the others where they are not finite."""
    odd, parts = odd_rows(mean, logvar), []
    for part in (mean, logvar):
        filled = part.copy()
        filled[odd] = np.delete(part, odd, 0).mean(0)
        parts.append(filled)
    return parts[0], parts[1]


def odd_text(rows: np.ndarray) -> str:
    """Name particles whose latents are not finite, by their rows among the latents."""
    some = ", ".join(map(str, rows[:_NAMED])) + (", ..." if len(rows) > _NAMED else "")
    one = len(rows) == 1
    count = "1 particle whose latent is" if one else f"{len(rows)} particles whose latents are"
    return f"{count} not finite ({'row' if one else 'rows'} {some} of its z.pkl, from 0)"


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
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # of abinit_het: it holds arrays
                with _arrays_admitted():
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
    if state and all(name.startswith(_PARALLEL) for name in state):
        parts["model_state_dict"] = {k.removeprefix(_PARALLEL): v for k, v in state.items()}
    own = parts.get(OWN_KEY, {})
    if not isinstance(own, dict) or (own and not own.keys() >= OWN_PARTS):
        raise InputError(f"{flag} {path}: a damaged checkpoint (its part {OWN_KEY!r})")
    check_plain(parts, os.path.getsize(path), f"{flag} {path}")
    return parts


@functools.cache
def _array_types() -> list[Any]:
    """Return what pickles of numpy arrays, and of the time in a config, are made of."""
    value = np.float64(0)
    made = [(value.__reduce__()[0], "scalar"), (np.array(value).__reduce__()[0], "_reconstruct")]
    types = [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(make, f"{module}.{name}") for make, name in made for module in modules]
    return [np.ndarray, np.dtype, *types, datetime, *named]


def _arrays_admitted() -> contextlib.AbstractContextManager[Any]:
    """Let PyTorch read arrays in checkpoints, where it can be told to (from 2.6 on)."""
    try:
        return torch.serialization.safe_globals(_array_types())
    except (AttributeError, TypeError):
        return contextlib.nullcontext()


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
