"""The host's downstream commands: how they are called, and what must come of it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.data import BatchLoader, EncoderInput
from cryodrgn_amort.plugins import Plugins
from cryodrgn_amort.runs import load_run
from host_matrix.folders import close, read
from host_matrix.runs import PARTICLES, TILT_SERIES, N
from host_matrix.server import SELECTION

if TYPE_CHECKING:
    from collections.abc import Callable

    from host_matrix.runs import Run

SKETCH = 12


@dataclass(frozen=True)
class Command:
    """A command of the host.

    Attributes
    ----------
    argv
        From a run and a folder for the results, those of ``cryodrgn NAME``.
    check
        Holds the results against what is known of the run.
    gives
        The folder of the results, where it is not the one given.
    environ
        Environment variables.
    varies, random, others
        See ``folders.compare``.
    """

    name: str
    argv: Callable[[Run, Path], list[object]]
    check: Callable[[Run, Path], None]
    gives: Callable[[Run, Path], Path] = lambda run, out: out
    environ: Callable[[Run], dict[str, str]] = lambda run: {}
    script: str = "cryodrgn"
    varies: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _decode(run: Run, z: np.ndarray) -> np.ndarray:
    model, norm = load_run(run.folder, Plugins(found={})).load_decoder()
    return torch.stack(
        list(model.decode_volumes(torch.tensor(z, dtype=torch.float32), norm))
    ).numpy()


def _volumes(folder: Path) -> np.ndarray:
    return np.stack([read(p) for p in sorted(folder.glob("vol_[0-9]*.mrc"))])


def _decoded(run: Run, folder: Path, z: np.ndarray) -> None:
    """Hold volumes against ours; they must differ from each other by more than the tolerance."""
    found, expected = _volumes(folder), _decode(run, z)
    close(found, expected, f"{folder.name}/vol_*.mrc")
    if np.ptp(run.z):
        apart = np.abs(expected - expected[::-1]).max() / np.abs(expected).max()
        assert apart > 1e-2, (
            f"{folder.name}: volumes do not differ ({apart:.1e}), nothing is tested"
        )


def _columns(z: np.ndarray) -> str:
    """Return what the user of ``filter`` circles: a half of the particles, or all."""
    values = np.sort(z[:, 0])
    if not np.ptp(values):
        return f"z0 {values[0] + 1:.9g}"
    middle = len(values) // 2
    gaps = np.diff(values[middle - 20 : middle + 20])
    at = middle - 20 + int(gaps.argmax())
    return f"z0 {(values[at] + values[at + 1]) / 2:.9g}"


def _analyze(run: Run, out: Path) -> None:
    kmeans, pc = out / "kmeans5", out / "pc1"
    centres = np.loadtxt(kmeans / "centers.txt")
    close(centres, run.z[np.loadtxt(kmeans / "centers_ind.txt").astype(int)], "centers.txt", 1e-6)
    _decoded(run, kmeans, centres)
    _decoded(run, pc, np.loadtxt(pc / "z_values.txt"))
    labels = read(kmeans / "labels.pkl")
    near = ((run.z[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (labels == near).mean() > 0.8 or not np.ptp(run.z), "labels.pkl: not the clusters of z"
    if run.z.shape[1] > 2:  # the host takes two dimensions as they are
        umap = read(out / "umap.pkl")
        assert umap.shape == (len(run.z), 2), "umap.pkl"
        assert np.isfinite(umap).all(), "umap.pkl"


def _eval_vol(run: Run, out: Path) -> None:
    _decoded(run, out, run.z[:4])


def _eval_images(run: Run, out: Path) -> None:
    with open(out / "z.pkl", "rb") as handle:
        found = pickle.load(handle)
    if run.sees == "particle":
        close(found, run.z, "z.pkl")
        return
    opened = load_run(run.folder, Plugins(found={}))
    particles = opened.particles()
    model, _ = opened.load(particles)
    batch = BatchLoader(particles, EncoderInput(), memory=0).read(torch.arange(particles.n))
    with torch.no_grad():
        close(found, model.posterior(batch)[0].numpy(), "z.pkl")
    assert np.abs(found - run.z).max() > 1e-2 * np.abs(run.z).max(), "was shown the particle"


def _pc_traversal(run: Run, out: Path) -> None:
    path = np.loadtxt(out / "pc1.txt")
    direction = np.linalg.svd(run.z - run.z.mean(0), full_matrices=False)[2][0]
    on_axis = (run.z - run.z.mean(0)) @ direction
    ends = np.sort(np.percentile(on_axis, [5, 95]))
    if direction @ (path[-1] - path[0]) < 0:
        path = path[::-1]
    close(path, run.z.mean(0) + np.linspace(*ends, len(path))[:, None] * direction, "pc1.txt")


def _graph_traversal(run: Run, out: Path) -> None:
    assert (out / "path.txt").exists(), "finds no path"
    path, index = np.loadtxt(out / "path.txt"), np.loadtxt(out / "ind.txt").astype(int)
    assert {index[0], index[-1]} == {0, 9}, "ind.txt: not from anchor to anchor"
    close(path, run.z[index], "path.txt")


def _direct_traversal(run: Run, out: Path) -> None:
    close(np.loadtxt(out / "path.txt"), np.linspace(run.z[0], run.z[9], 6), "path.txt")


def _landscape(run: Run, out: Path) -> None:
    kmeans = out / f"kmeans{SKETCH}"
    centres = np.loadtxt(kmeans / "centers.txt")
    close(centres, run.z[np.loadtxt(kmeans / "centers_ind.txt").astype(int)], "centers.txt", 1e-6)
    _decoded(run, kmeans, centres)
    rows = np.concatenate([read(p) for p in sorted(out.glob("*/state_*_particle_ind.pkl"))])
    assert set(rows) <= set(run.rows), "particle_ind.pkl: not particles of the run"


def _landscape_full(run: Run, out: Path) -> None:
    rows = read(out / "ind.sampled.pkl")
    close(read(out / "z.sampled.pkl"), run.z[rows], "z.sampled.pkl", 1e-6)
    mask = read(out.parent / "mask.mrc").astype(bool)
    with open(out.parent / "vol_pca_obj.pkl", "rb") as handle:
        components = pickle.load(handle)
    volumes = _decode(run, run.z[rows])[:, mask]
    found, expected = read(out / "vol_pca_sampled.pkl"), components.transform(volumes)
    # where all volumes are the same, the rest is rounding: of sums as long as the volumes
    rounding = 1e-3 * float(np.linalg.norm(volumes, axis=1).max())
    close(found, expected, "vol_pca_sampled.pkl", scale=rounding)
    assert len(read(out / "vol_pca_all.pkl")) == len(run.z), "vol_pca_all.pkl"


def _filter(run: Run, out: Path) -> None:
    threshold = float(_columns(run.z).split()[1])
    circled = run.z[:, 0] < threshold
    np.testing.assert_array_equal(read(out / "indices.pkl"), run.rows[circled])
    np.testing.assert_array_equal(read(out / "indices_inverse.pkl"), run.rows[~circled])


def _selected(run: Run) -> Path:
    return run.folder.parent.parent / "out" / run.name / "select_clusters/selected.pkl"


def _labels(run: Run) -> Path:
    return run.folder / f"analyze.{run.epoch}/kmeans5/labels.pkl"


def _wanted(run: Run) -> list[int]:
    """Return two clusters that have particles, counted from 0."""
    return [int(n) for n in np.unique(read(_labels(run)))[[0, -1]]]


def _select_clusters(run: Run, out: Path) -> None:
    chosen = np.isin(read(_labels(run)), _wanted(run))
    np.testing.assert_array_equal(np.sort(read(out / "selected.pkl")), run.rows[chosen])


def _star(run: Run) -> str:
    return "tilts/particles.star" if run.tilted else "data/particles.star"


def _filter_star(run: Run, out: Path) -> None:
    import pandas as pd
    import starfile

    before = starfile.read(run.folder.parent.parent / _star(run))
    after = starfile.read(out / "particles.star")
    if run.tilted:  # all images of the particles
        groups = before["rlnGroupName"].drop_duplicates().iloc[read(_selected(run))]
        rows = before[before["rlnGroupName"].isin(groups)]
        pd.testing.assert_frame_equal(after, rows.reset_index(drop=True))
        return
    rows = before["particles"].iloc[read(_selected(run))]
    pd.testing.assert_frame_equal(after["particles"], rows.reset_index(drop=True))
    groups = after["particles"]["rlnOpticsGroup"]
    optics = before["optics"][before["optics"]["rlnOpticsGroup"].isin(groups)]
    # the host writes whole numbers of this table as 1.0
    pd.testing.assert_frame_equal(after["optics"], optics.reset_index(drop=True), check_dtype=False)


def _filter_cs(run: Run, out: Path) -> None:
    before = np.load(run.folder.parent.parent / "data/particles.cs")
    np.testing.assert_array_equal(np.load(out / "particles.cs"), before[read(_selected(run))])


def _select_argv(run: Run, out: Path) -> list[object]:
    first = 0 if run.host.startswith("4.2") else 1  # what the host counts clusters from
    clusters = [n + first for n in _wanted(run)]
    argv = [_labels(run), "--sel", *clusters, "-o", out / "selected.pkl"]
    if len(run.rows) < N:
        argv += ["--parent-ind", "data/kept.pkl", "--N-orig", N]
    return argv


def _eval_images_argv(run: Run, out: Path) -> list[object]:
    data = TILT_SERIES if run.tilted else PARTICLES
    argv = [data[0], run.folder / "weights.pkl", "-c", run.folder / "config.yaml",
            *data[1:], "-o", out / "loss.pkl", "--out-z", out / "z.pkl"]  # fmt: skip
    return argv + (["--ind", "data/kept.pkl"] if len(run.rows) < N else [])


def _latents(run: Run, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    np.savetxt(out.parent / "z.txt", run.z[:4])
    return str(out.parent / "z.txt")


def _z(run: Run) -> Path:
    return run.folder / f"z.{run.epoch}.pkl"


_RANDOM = ("umap.pkl",)
COMMANDS = (
    Command(
        "analyze",
        lambda run, out: [run.folder, run.epoch, "--ksample", 5, "--pc", 1, "--n-per-pc", 3],
        _analyze,
        gives=lambda run, out: run.folder / f"analyze.{run.epoch}",
        random=_RANDOM,
    ),
    Command(
        "eval_vol",
        lambda run, out: [run.folder / "weights.pkl", "-c", run.folder / "config.yaml",
                          "--zfile", _latents(run, out), "-o", out],
        _eval_vol,
    ),
    Command("eval_images", _eval_images_argv, _eval_images),
    Command(
        "pc_traversal", lambda run, out: [_z(run), "--pc", 1, "-o", out / "paths"],
        lambda run, out: _pc_traversal(run, out / "paths"),
    ),
    Command(
        "graph_traversal",
        lambda run, out: [_z(run), "--anchors", 0, 9, "--max-neighbors", 60, "--avg-neighbors", 60,
                          "-o", out / "path.txt", "--outind", out / "ind.txt"],
        _graph_traversal,
        varies=("*.txt",),
    ),
    Command(
        "direct_traversal",
        lambda run, out: [_z(run), "--anchors", 0, 9, "-o", out / "path.txt"],
        _direct_traversal,
    ),
    Command(
        "analyze_landscape",
        # counted from 0: from 1 the host weighs a cluster of the last volume alone by nothing
        lambda run, out: [run.folder, run.epoch, "-N", SKETCH, "-d", 32, "-M", 4, "--pc-dim", 4,
                          "--plot-dim", 3, "--vol-start-index", 0],
        _landscape,
        gives=lambda run, out: run.folder / f"landscape.{run.epoch}",
        varies=("*/state_*",),
        others=("landscape_full/*", "*.ipynb"),
        random=_RANDOM,
    ),
    Command(
        "analyze_landscape_full",
        lambda run, out: [run.folder, run.epoch, "-N", SKETCH, "-d", 32, "--epochs", 3,
                          "--dim", 16],
        _landscape_full,
        gives=lambda run, out: run.folder / f"landscape.{run.epoch}/landscape_full",
        random=("umap_vol_pca.pkl", "full_clustering/*"),
    ),
    Command(
        "filter",
        lambda run, out: [run.folder, "--epoch", run.epoch, "-k", 5, "-f", "--sel-dir", out],
        _filter,
        environ=lambda run: {SELECTION: _columns(run.z)},
        varies=("*",),
    ),
    Command("dashboard", lambda run, out: [run.folder, "--no-browser"], lambda run, out: None,
            varies=("*",)),
    Command("select_clusters", _select_argv, _select_clusters, script="cryodrgn_utils",
            varies=("*",)),
    Command(
        "filter_star",
        lambda run, out: [_star(run), *(["--et"] if run.tilted else []), "--ind", _selected(run),
                          "-o", out / "particles.star"],
        _filter_star,
        script="cryodrgn_utils",
    ),
    Command(
        "filter_cs",
        lambda run, out: ["data/particles.cs", "--ind", _selected(run), "-o",
                          out / "particles.cs"],
        _filter_cs,
        script="cryodrgn_utils",
    ),
)  # fmt: skip
"""In an order in which each has what it reads."""
