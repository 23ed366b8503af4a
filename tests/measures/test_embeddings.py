"""Latents in the plane: copies are put where their particles are, and the same ones every time."""

import numpy as np

from cryodrgn_amort.measures import embed, embeddings


def put(z, moved, umap):
    return embed(z, np.arange(4), {k: copies[:4] for k, copies in moved.items()}, 0, umap=umap)


def test_copies_lie_where_their_particles_are():
    rng = np.random.default_rng(0)
    corners = 20 * np.eye(4)[rng.integers(0, 4, 80)]
    z = (corners + rng.standard_normal((80, 4))).astype(np.float32)
    order = np.r_[1, 2, 3, 0, 4:80]
    moved = {"same": z + np.float32(0.01), "turned": z[order]}
    first, again = (put(z, moved, umap=True) for _ in range(2))
    assert list(first) == ["PCA", "UMAP"]
    for title, shown in first.items():
        spread = shown.points.std()
        np.testing.assert_array_equal(shown.labelled, shown.points[:4])
        np.testing.assert_array_equal(shown.points, again[title].points)
        for key, wanted in (("same", shown.labelled), ("turned", shown.labelled[order[:4]])):
            assert shown.moved[key].shape == (4, 2)
            assert np.linalg.norm(shown.moved[key] - wanted, axis=1).max() < 0.5 * spread
            np.testing.assert_array_equal(shown.moved[key], again[title].moved[key])
    apart = np.linalg.norm(first["UMAP"].points[:, None] - first["UMAP"].points, axis=2)
    same = (corners[:, None] == corners).all(2)
    assert apart[same].mean() < 0.5 * apart[~same].mean()


def test_without_copies_and_without_umap():
    z = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float32)
    assert list(put(z, {}, umap=False)) == ["PCA"]
    assert list(put(z[:, :2], {}, umap=True)) == ["z"]
    assert put(z[:, :1], {}, umap=True) == {}
    assert list(put(np.zeros_like(z), {}, umap=True)) == ["PCA"]


def test_of_many_particles_a_sample_is_shown_with_the_labelled_ones(monkeypatch):
    monkeypatch.setattr(embeddings, "_UMAP_MOST", 30)
    z = np.random.default_rng(0).standard_normal((200, 3))
    shown = put(z, {"turned": z + 1}, umap=False)["PCA"]
    assert len(shown.points) == len(np.unique(shown.index)) == 30
    np.testing.assert_array_equal(shown.index[:4], np.arange(4))
    assert (np.diff(shown.index) > 0).all()
