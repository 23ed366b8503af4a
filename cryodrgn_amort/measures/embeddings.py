"""Latent space in the plane: principal components and UMAP."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

__all__ = ["Embedding", "embed"]

_UMAP_MOST = 20_000
_UMAP_NEIGHBOURS = 15


@dataclass(frozen=True)
class Embedding:
    """A picture of latent space in the plane.

    Attributes
    ----------
    points
        Particles `(M, 2)`: all, or a sample of a large set.
    labelled
        The labelled particles `(L, 2)`.
    moved
        Key of a transform result -> its labelled particles `(L, 2)`.
    axes
        Axis labels.
    index
        Which particles ``points`` are: positions `(M,)`.
    """

    points: np.ndarray
    labelled: np.ndarray
    moved: dict[str, np.ndarray]
    axes: tuple[str, str]
    index: np.ndarray


def embed(
    z: np.ndarray, labelled: np.ndarray, moved: dict[str, np.ndarray], seed: int, *, umap: bool
) -> dict[str, Embedding]:
    """Put latents into the plane: principal components, and UMAP where there are enough points.

    Parameters
    ----------
    z
        `(N, zdim)`.
    labelled
        The first so many of these, by position, `(L,)`.
    moved
        Key -> where the labelled ones are put besides, `(L, zdim)`.
    umap
        Whether that is wanted, too.
    """
    rng = np.random.default_rng(seed)
    rest = rng.permutation(np.arange(len(labelled), len(z)))[: _UMAP_MOST - len(labelled)]
    shown = np.concatenate([labelled, np.sort(rest)])
    found = {}
    centre = z.mean(0)
    axes = np.linalg.svd(z[shown] - centre, full_matrices=False)[2][:2]
    if z.shape[1] == 2:  # as it is
        found["z"] = Embedding(z[shown], z[labelled], moved, ("z1", "z2"), shown)
    elif len(axes) == 2:
        share = ((z - centre) @ axes.T).var(0) / max(z.var(0).sum(), 1e-30)
        found["PCA"] = Embedding(
            (z[shown] - centre) @ axes.T,
            (z[labelled] - centre) @ axes.T,
            {key: (copy - centre) @ axes.T for key, copy in moved.items()},
            (f"PC1 ({share[0]:.0%} of variance)", f"PC2 ({share[1]:.0%})"),
            shown,
        )
    enough = len(shown) > 20 and z.shape[1] > 2 and z.std() > 0
    if umap and enough:
        copies = np.concatenate([np.empty((0, z.shape[1])), *moved.values()])
        points, put = _umap(z[shown], copies, seed)
        parts = np.split(put, len(moved)) if moved else []
        found["UMAP"] = Embedding(
            points,
            points[: len(labelled)],
            dict(zip(moved, parts, strict=True)),
            ("UMAP1", "UMAP2"),
            shown,
        )
    return found


def _umap(z: np.ndarray, copies: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit UMAP to latents `(M, zdim)` and put copies `(C, zdim)` into it; each two columns.

    UMAP is handed the distances: its own search for neighbours takes most of its time, half of it
    to be compiled anew by every process, and is not exact for more than 4,096 points.
    """
    search = NearestNeighbors(n_neighbors=_UMAP_NEIGHBOURS).fit(z)
    distances, neighbours = search.kneighbors(z)
    starts = np.arange(len(z) + 1) * _UMAP_NEIGHBOURS
    graph = csr_matrix((distances.ravel(), neighbours.ravel(), starts), (len(z), len(z)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba's, and umap's of what is given in advance
        from umap import UMAP

        reducer = UMAP(
            n_neighbors=_UMAP_NEIGHBOURS,
            metric="precomputed",
            precomputed_knn=(neighbours, distances),
            random_state=seed,
        )
        points = reducer.fit_transform(graph.maximum(graph.T))
        put = reducer.transform(cdist(copies, z)) if len(copies) else np.empty((0, 2))
    return points, put
