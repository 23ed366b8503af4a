"""What several test files need: a small stack in the host's formats, the host's commands."""

from __future__ import annotations

import argparse
import csv
import importlib
import pickle
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.spatial.transform import Rotation

BOX = 16


def write_pickle(path, value):
    with open(path, "wb") as handle:
        pickle.dump(value, handle)
    return str(path)


def read_pickles(path, count=1):
    with open(path, "rb") as handle:
        parts = [pickle.load(handle) for _ in range(count)]
    return parts[0] if count == 1 else parts


def same(a, b):
    """Tell whether two checkpoints hold the same bits; NaN equals itself."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool((a.isnan() & b.isnan()).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metrics(folder):
    """Read metrics.csv without what is about time."""
    with open(folder / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in rows]


def write_stack(folder: Path, n: int, box: int = BOX, seed: int = 0) -> SimpleNamespace:
    """Write blobs in noise with random poses, shifts and CTFs; enough to train on, no science."""
    from cryodrgn.mrcfile import write_mrc

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:box, :box] - box / 2
    centre = rng.uniform(-box / 6, box / 6, (n, 2, 1, 1))
    blob = np.exp(-((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2) / (2 * (box / 8) ** 2))
    images = (rng.standard_normal((n, box, box)) - 2 * blob + 0.3).astype(np.float32)
    write_mrc(str(folder / "particles.mrcs"), images)
    rots = Rotation.random(n, random_state=seed).as_matrix().astype(np.float32)
    trans = rng.uniform(-0.05, 0.05, (n, 2)).astype(np.float32)
    ctf = np.zeros((n, 9), np.float32)
    ctf[:, 0], ctf[:, 1] = box, 6.0 * 32 / box
    ctf[:, 2] = rng.uniform(1e4, 2.5e4, n)
    ctf[:, 3] = ctf[:, 2] + rng.uniform(-300, 300, n)
    ctf[:, 4] = rng.uniform(0, 180, n)
    ctf[:, 5:8] = 300, 2.7, 0.1
    return SimpleNamespace(
        folder=folder,
        n=n,
        box=box,
        images=images,
        rots=rots,
        trans=trans,
        ctf_table=ctf,
        particles=str(folder / "particles.mrcs"),
        poses=write_pickle(folder / "poses.pkl", (rots, trans)),
        ctf=write_pickle(folder / "ctf.pkl", ctf),
    )


class Volume(np.ndarray):
    """A decoded volume that is counted as long as it is there."""

    alive = most = 0

    @classmethod
    def decoder(cls, box: int):
        """Return what decodes such, in the place of ``AmortVAE.decode_volumes``."""
        cls.alive = cls.most = 0
        rng = np.random.default_rng(0)

        def decode(model, z, norm):
            for _ in z:
                volume = rng.standard_normal((box, box, box)).astype(np.float32).view(cls)
                cls.alive += 1
                cls.most = max(cls.most, cls.alive)
                weakref.finalize(volume, cls._gone)
                yield volume

        return decode

    @classmethod
    def _gone(cls):
        cls.alive -= 1

    def numpy(self):
        return self

    def astype(self, *_, **__):
        return self


def run_host(command, *argv):
    """Run a command of the host in this process; it may warn."""
    module = importlib.import_module(f"cryodrgn.commands.{command}")
    parser = argparse.ArgumentParser()
    module.add_args(parser)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.main(parser.parse_args([str(a) for a in argv]))


def volume_at(path):
    from cryodrgn.mrcfile import parse_mrc

    return parse_mrc(str(path))[0]


def fsc(a, b):
    """Fourier shell correlation of shells 0 to D/2."""
    grid = np.arange(len(a)) - len(a) // 2
    shell = np.sqrt(grid[:, None, None] ** 2 + grid[:, None] ** 2 + grid**2).round().astype(int)
    fa, fb = (np.fft.fftshift(np.fft.fftn(v.astype(float))) for v in (a, b))

    def total(values):
        return np.bincount(shell.ravel(), values.ravel())[: len(a) // 2 + 1]

    power = np.sqrt(total(np.abs(fa) ** 2) * total(np.abs(fb) ** 2))
    return total((fa * fb.conj()).real) / power


def mirror(volume, axis=0):
    """Mirror about the origin pixel."""
    return np.roll(np.flip(volume, axis), 1, axis)
