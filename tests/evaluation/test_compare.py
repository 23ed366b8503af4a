"""Agreement of runs: the measures at null and ideal, and the command on runs of all kinds."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import BOX, Volume, run_host
from scipy.spatial import procrustes
from scipy.stats import ortho_group

from cryodrgn_amort.evaluation import compare
from cryodrgn_amort.measures import fsc, kmeans_ari, knn_overlap, linear_cka, procrustes_disparity
from cryodrgn_amort.models import AmortVAE
from cryodrgn_amort.options import CompareOptions
from cryodrgn_amort.runs import load_run, settings_from_flags
from cryodrgn_amort.training import Trainer


def latents(n=400, zdim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, zdim))


def test_a_rotated_scaled_copy_agrees():
    z = latents()
    copy = 3.0 * z @ ortho_group.rvs(3, random_state=0) + 5
    assert knn_overlap(z, copy).min() == 1
    assert linear_cka(z, copy) == pytest.approx(1)
    assert procrustes_disparity(z, copy) == pytest.approx(0, abs=1e-9)
    assert kmeans_ari(z, z, 5) == 1


def test_unrelated_latents_do_not():
    z, other = latents(2000), latents(2000, seed=1)
    assert knn_overlap(z, other).mean() == pytest.approx(15 / 2000, abs=0.003)
    assert linear_cka(z, other) < 0.01
    assert procrustes_disparity(z, other) > 0.95
    assert abs(kmeans_ari(z, other, 5)) < 0.02


def test_overlap_is_the_naive_one_and_dimensions_may_differ():
    z, other = latents(60), latents(60, zdim=2, seed=1)

    def nearest(points, i):
        order = np.argsort(np.linalg.norm(points - points[i], axis=1))
        return set(order[order != i][:15])

    naive = [len(nearest(z, i) & nearest(other, i)) / 15 for i in range(60)]
    np.testing.assert_allclose(knn_overlap(z, other), naive)
    padded = np.c_[other, np.zeros(60)]
    assert procrustes_disparity(z, other) == pytest.approx(procrustes(z, padded)[2])
    assert procrustes_disparity(z, np.zeros((60, 2))) == 1


@pytest.fixture(scope="module")
def folders(stack, tmp_path_factory, plugins):
    out = tmp_path_factory.mktemp("runs")
    common = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "zdim": 3,
        "pdim": 16, "players": 1, "num_epochs": 1, "do_analysis": False,
    }  # fmt: skip
    for name, more in {
        "a": {"seed": 0, "qdim": 16},
        "b": {"seed": 1, "qdim": 16},
        "vlt": {"seed": 0, "encoder": "vlt"},
    }.items():
        flags = {**common, **more, "outdir": str(out / name)}
        Trainer(settings_from_flags(flags, plugins), plugins).fit()
    run_host(
        "train_dec", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", "3",
        "-n", "1", "--dim", "16", "--layers", "1", "--no-analysis", "-o", out / "dec",
    )  # fmt: skip
    return out


def test_the_command(folders, cli, tmp_path):
    runs = [folders / name for name in ("a", "b", "vlt", "dec")]
    out = tmp_path / "agreement.json"
    code, shown, err = cli("compare_amort", *runs, "--volumes", "3", "-o", out)
    assert code == 0, err
    facts = json.loads(out.read_text())
    found = facts["pairs"]
    assert all(facts["definitions"][name]["text"] for name in found[0]["measures"])
    assert len(found) == 6
    assert [pair["only_seed"] for pair in found] == [True] + [False] * 5
    for pair in found:
        values = {name: m["value"] for name, m in pair["measures"].items()}
        assert set(values) == {
            "knn_overlap", "linear_cka", "procrustes_disparity", "kmeans_ari", "volume_fsc",
        }  # fmt: skip
        assert 0 <= values["knn_overlap"] <= 1
        assert -1 <= values["volume_fsc"] <= 1
    assert "b (other seed)" in shown


def test_volumes_are_compared_one_after_the_other(folders, plugins, monkeypatch):
    runs = [load_run(folders / name, plugins) for name in ("a", "b", "vlt")]
    options = CompareOptions(volumes=4, bootstrap=0)
    sample = np.random.default_rng(0).permutation(runs[0].n)[:4]
    found = {(Path(c.first).name, Path(c.second).name): c.measures["volume_fsc"]
             for c in compare(runs, options)}  # fmt: skip
    volumes = {run.name: run.volumes(run.z_mu[sample]) for run in runs}

    def mean(first, second):
        return np.mean([fsc(u, v)[1:].mean() for u, v in zip(first, second, strict=True)])

    for (i, j), m in found.items():
        assert m.value == pytest.approx(mean(volumes[i], volumes[j]))
        assert m.null == pytest.approx(mean(volumes[i], np.roll(volumes[j], 1, axis=0)))
    monkeypatch.setattr(AmortVAE, "decode_volumes", Volume.decoder(BOX))
    compare(runs, replace(options, volumes=30))
    assert Volume.most <= 3 * len(runs) + 3
    assert Volume.alive == 0


def test_neither_memory_nor_the_parents_seed_is_configuration(folders, plugins):
    a, b, dec = (str(folders / name) for name in ("a", "b", "dec"))
    run = load_run(folders / "vlt", plugins)

    def only_seed(first, second):
        runs = [
            replace(run, settings=replace(run.settings, seed=seed, **given))
            for seed, given in enumerate((first, second))
        ]
        [pair] = compare(runs, CompareOptions(volumes=0, clusters=2, bootstrap=0))
        return pair.only_seed

    def table(path):
        return {"extra": {"table_init": path}}

    assert only_seed({"memory": 0.5}, {})
    assert only_seed({"from_run": a}, {"from_run": b})
    assert not only_seed({"from_run": a}, {"from_run": dec})
    assert not only_seed({"from_run": a}, {})
    assert not only_seed({"from_run": a}, {"from_run": "gone"})
    assert only_seed(table(a), table(b))
    assert only_seed(table(f"{a}/z.1.pkl"), table(f"{b}/z.1.pkl"))
    assert not only_seed(table(a), table(f"{b}/z.1.pkl"))
    assert not only_seed(table(a), table(dec))


def test_a_run_agrees_with_itself(folders, cli):
    code, shown, _ = cli("compare_amort", folders / "a", folders / "a", "--volumes", "2")
    assert code == 0
    rows = {line.split()[2]: line for line in shown.splitlines() if line.startswith("a ")}
    assert " 1 " in rows["knn_overlap"]
    assert " 1 " in rows["volume_fsc"]
    assert "other seed" not in shown
    assert "No two runs differ in the seed alone" in shown


def test_particles_are_matched_by_their_place_in_the_stack(train, flags, cli, tmp_path):
    """Frozen tables of the same latents, of other particles, as many, in another order."""
    z = np.random.default_rng(0).standard_normal((70, 3)).astype(np.float32)
    common = {**flags, "encoder": "vlt", "num_epochs": 1, "table_freeze": True}
    chosen = {"one": np.arange(50), "two": np.random.default_rng(1).permutation(70)[:50]}
    for seed, (name, rows) in enumerate(chosen.items()):
        own = tmp_path / f"{name}.z.pkl"
        with open(own, "wb") as handle:
            for part in (z[rows], 0 * z[rows] - 4):
                pickle.dump(part, handle)
        train(common, table_init=str(own), ind=_pickle(tmp_path / f"{name}.ind.pkl", rows),
              seed=seed, outdir=str(tmp_path / name))  # fmt: skip
    out = tmp_path / "out.json"
    code, _, err = cli(
        "compare_amort", *map(tmp_path.joinpath, chosen), "--volumes", "0", "-o", out
    )
    assert code == 0, err
    measures = json.loads(out.read_text())["pairs"][0]["measures"]
    both = len(np.intersect1d(*chosen.values()))
    assert 20 < both < 45
    assert measures["knn_overlap"]["n"] == both
    assert measures["knn_overlap"]["value"] == 1
    assert measures["linear_cka"]["value"] == pytest.approx(1)


def test_holding_out_is_not_another_configuration(train, flags, cli, tmp_path):
    held = _pickle(tmp_path / "held.pkl", range(0, 70, 10))
    names = ("s0", "s1")
    for seed, name in enumerate(names):
        train(flags, encoder="vlt", num_epochs=1, holdout=held, seed=seed,
              outdir=str(tmp_path / name))  # fmt: skip
    code, shown, _ = cli("compare_amort", *map(tmp_path.joinpath, names), "--volumes", "0")
    assert code == 0
    assert "s1 (other seed)" in shown


def test_mistakes_are_one_line(folders, cli, tmp_path, stack, train, flags):
    ends = {"few": range(2), "rest": range(2, 70)}
    few, rest = (
        train(flags, encoder="vlt", num_epochs=1, outdir=str(tmp_path / name),
              ind=_pickle(tmp_path / f"{name}.pkl", rows)).folder
        for name, rows in ends.items()
    )  # fmt: skip
    for argv, says in (
        ([folders / "a"], "at least two runs"),
        ([folders / "a", tmp_path / "gone"], "gone: not a run folder"),
        ([few, rest], "0 particles in common"),
        ([folders / "a", few], "2 particles in common"),
        ([folders / "a", folders / "b", "--clusters", "500"], "--clusters 500"),
        ([folders / "a", folders / "b", "--epoch", "7"], "--epoch 7"),
        ([folders / "a", folders / "b", "--volumes", "-1"], "--volumes -1"),
    ):
        code, _, err = cli("compare_amort", *argv, "-o", tmp_path / "out.json")
        assert code == 2
        assert err.count("\n") == 1
        assert says in err
    assert not (tmp_path / "out.json").exists()


def _pickle(path, indices):
    from helpers import write_pickle

    return write_pickle(path, np.array(indices))


def test_a_stock_autodecoder_is_not_applicable(folders, cli):
    code, shown, err = cli(
        "eval_amort", folders / "dec", "--no-umap", "--bootstrap", "0", "--fit", "0"
    )
    assert code == 0, err
    assert "not applicable" in shown
    assert (folders / "dec/amort.1/report.html").is_file()
