"""infer_amort and --holdout: latents for a run's own particles, those held out, and new ones."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import read_pickles, run_host, write_pickle, write_stack

from cryodrgn_amort.core import InputError, locked, read_weights, read_z, recorded, write_weights
from cryodrgn_amort.inference import infer_run, inferred_summary
from cryodrgn_amort.options import InferOptions
from cryodrgn_amort.runs import load_run, settings_from_flags
from cryodrgn_amort.training import Trainer

HELD = 14  # a fifth of the particles


def _train(folder, stack, plugins, **more):
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf,
        "outdir": str(folder), "num_epochs": 2, "do_analysis": False, "seed": 3, "zdim": 3,
        "pdim": 16, "players": 1, "lr": 1e-3, **more,
    }  # fmt: skip
    if more.get("encoder") != "vlt":
        flags |= {"qdim": 16, "qlayers": 1}
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return load_run(folder, plugins)


@pytest.fixture(scope="module")
def runs(stack, plugins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "network": _train(folder / "network", stack, plugins, holdout="0.2"),
        "table": _train(folder / "table", stack, plugins, encoder="vlt", num_epochs=8),
        "twin": _train(folder / "twin", stack, plugins, encoder="twin"),
    }


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return write_stack(tmp_path_factory.mktemp("new"), 23, seed=5)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_held_out_particles_are_neither_trained_on_nor_lost(runs, stack):
    run = runs["network"]
    held = read_pickles(run.folder / "ind_heldout.pkl")
    trained = read_pickles(run.folder / "ind_train.pkl")
    assert len(held) == HELD
    assert sorted([*held, *trained]) == list(range(stack.n))
    assert len(run.z()[0]) == len(trained) == run.particles().n
    assert run.config["dataset_args"]["ind"] == str(run.folder / "ind_train.pkl")
    theirs = run.held_out()
    np.testing.assert_array_equal(theirs.ind, held)
    np.testing.assert_array_equal(theirs.rots.numpy(), stack.rots[held])
    np.testing.assert_array_equal(run.particles().rots.numpy(), stack.rots[trained])
    assert theirs.norm == run.particles().norm
    np.testing.assert_array_equal(  # the images, too
        theirs.raw(theirs.rots.new_tensor([2]).long())[0], stack.images[held[2]]
    )


def test_a_resumed_run_keeps_what_is_held_out(runs, stack, plugins, tmp_path):
    shutil.copytree(runs["network"].folder, tmp_path / "run")
    before = read_pickles(tmp_path / "run/ind_heldout.pkl")
    again = _train(tmp_path / "run", stack, plugins, load="latest", num_epochs=3, seed=99)
    np.testing.assert_array_equal(read_pickles(tmp_path / "run/ind_heldout.pkl"), before)
    assert len(again.z()[0]) == stack.n - HELD


def test_held_out_by_a_file_within_ind(stack, plugins, tmp_path):
    ind = write_pickle(tmp_path / "ind.pkl", np.arange(0, 60, 2))
    holdout = write_pickle(tmp_path / "out.pkl", np.array([58, 0, 4]))
    run = _train(tmp_path / "run", stack, plugins, ind=ind, holdout=holdout)
    np.testing.assert_array_equal(read_pickles(run.folder / "ind_heldout.pkl"), [0, 4, 58])
    assert run.particles().n == 27
    run_host("analyze", run.folder, 2, "--skip-umap", "--ksample", 3)


@pytest.mark.parametrize(
    ("holdout", "says"),
    [
        ("0", "a fraction between 0 and 1 is needed"),
        ("1.5", "a fraction between 0 and 1 is needed"),
        ("nan", "a fraction between 0 and 1 is needed"),
        ("0.001", "no particle is held out"),
        ("0.999", "all particles are held out"),
        ("nothing.pkl", "no such file"),
        ([70], "index 70 is out of range"),
        ([3, 3], "holds an index more than once"),
        (list(range(70)), "all particles are held out"),
    ],
)
def test_holdouts_that_make_no_sense(holdout, says, stack, plugins, tmp_path):
    if isinstance(holdout, list):
        holdout = write_pickle(tmp_path / "holdout.pkl", np.array(holdout))
    with pytest.raises(InputError, match=f"--holdout .*{says}"):
        _train(tmp_path / "run", stack, plugins, holdout=holdout)
    assert not (tmp_path / "run").exists()


def test_particles_that_ind_leaves_out_cannot_be_held_out(stack, plugins, tmp_path):
    ind = write_pickle(tmp_path / "ind.pkl", np.arange(30))
    holdout = write_pickle(tmp_path / "holdout.pkl", np.array([3, 31]))
    with pytest.raises(InputError, match="particle 31, which --ind leaves out"):
        _train(tmp_path / "run", stack, plugins, ind=ind, holdout=holdout)


@pytest.mark.parametrize("kind", ["network", "table", "twin"])
def test_own_particles_never_get_worse(kind, runs, tmp_path):
    run = runs[kind]
    found = infer_run(run, InferOptions(steps=60), tmp_path / "out")
    assert found.starts == ("encoder", "anchors")
    assert (found.gap >= 0).all()
    assert found.gap.mean() > 0.1
    assert np.isfinite(found.elbo).all()
    z, logvar = read_z(tmp_path / "out/z.pkl", "")
    np.testing.assert_array_equal(z, found.mean)
    np.testing.assert_array_equal(logvar, found.logvar)
    np.testing.assert_array_equal(read_pickles(tmp_path / "out/gap.pkl"), found.gap)
    facts = json.loads((tmp_path / "out/inference.json").read_text())
    assert facts["amortization_gap"] == pytest.approx(found.gap.mean())
    # the decoder is that of the run
    decoders = [
        {k: v for k, v in read_weights(path / "weights.2.pkl", "")["model_state_dict"].items()
         if k.startswith("decoder.")}
        for path in (run.folder, tmp_path / "out")
    ] if kind != "table" else [{}, {}]  # fmt: skip
    assert decoders[0].keys() == decoders[1].keys()
    assert all((decoders[0][k] == decoders[1][k]).all() for k in decoders[0])


def test_a_table_that_is_optimal_has_no_gap(runs, plugins, tmp_path):
    first = infer_run(runs["table"], InferOptions(steps=400), tmp_path / "first")
    assert first.gap.mean() > 0.1
    again = infer_run(load_run(tmp_path / "first", plugins), InferOptions(), tmp_path / "again")
    assert 0 <= again.gap.mean() < 0.1 * first.gap.mean()


def test_what_is_written_is_a_run_of_the_hosts_format(runs, new, cli, plugins, tmp_path):
    given = {"particles": new.particles, "poses": new.poses, "ctf": new.ctf}
    found = infer_run(runs["table"], InferOptions(**given, steps=20), tmp_path / "out")
    assert found.starts == ("anchors",)
    assert len(found.mean) == new.n
    assert not (tmp_path / "out/gap.pkl").exists()
    run = load_run(tmp_path / "out", plugins)
    assert run.particles().n == new.n
    run_host("analyze", tmp_path / "out", run.epoch, "--skip-umap", "--ksample", 3)
    assert (tmp_path / f"out/analyze.{run.epoch}/kmeans3/vol_001.mrc").exists()
    code, out, _ = cli("eval_amort", tmp_path / "out", "--no-umap", "--bootstrap", 10, "--fit", 0)
    assert code == 0
    assert "not applicable" in out


def test_held_out_and_new_particles_start_from_the_encoder(runs, new, tmp_path):
    run = runs["network"]
    held = infer_run(run, InferOptions(held_out=True, steps=20), tmp_path / "held")
    assert len(held.mean) == HELD
    np.testing.assert_array_equal(
        read_pickles(tmp_path / "held/ind.pkl"), read_pickles(run.folder / "ind_heldout.pkl")
    )
    given = {"particles": new.particles, "poses": new.poses, "ctf": new.ctf}
    found = infer_run(run, InferOptions(**given, steps=20), tmp_path / "new")
    assert found.starts == ("encoder", "anchors")
    assert (found.gap >= 0).all()


def test_what_is_written_can_be_moved(runs, plugins, tmp_path):
    infer_run(runs["network"], InferOptions(held_out=True, steps=1), tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_run(tmp_path / "there", plugins).particles().n == HELD


def test_files_of_others_are_left_alone(runs, cli, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ind.pkl").write_text("mine")
    code, _, err = cli("infer_amort", runs["network"].folder, "-o", out, "--steps", 1)
    assert code == 2
    assert "holds no run, but ind.pkl" in err
    assert {path.name: path.read_text() for path in out.iterdir()} == {"ind.pkl": "mine"}


def test_a_stock_run_of_train_dec(stack, plugins, tmp_path):
    run_host(
        "train_dec", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", 2,
        "-o", tmp_path / "dec", "-n", 1, "--dim", 16, "--layers", 1, "--no-analysis", "--no-amp",
    )  # fmt: skip
    run = load_run(tmp_path / "dec", plugins)
    found = infer_run(run, InferOptions(steps=20), tmp_path / "out")
    assert found.mean.shape == (stack.n, 2)
    assert np.isfinite(read_z(tmp_path / "out/z.pkl", "")[1]).all()


def test_without_steps_the_encoder_alone_answers(runs, tmp_path):
    run = runs["network"]
    options = InferOptions(starts=("encoder",), steps=0)
    found = infer_run(run, options, tmp_path / "out")
    for mine, theirs in zip((found.mean, found.logvar), run.z(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gap, 0, atol=1e-4)
    assert "not fitted" in (tmp_path / "out/run.log").read_text()


def test_a_stock_run_of_train_vae(stack, plugins, tmp_path):
    run_host(
        "train_vae", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", 2,
        "-o", tmp_path / "vae", "-n", 1, "--dec-dim", 16, "--dec-layers", 1, "--enc-dim", 16,
        "--enc-layers", 1, "--no-analysis", "--no-amp",
    )  # fmt: skip
    found = infer_run(load_run(tmp_path / "vae", plugins), InferOptions(steps=20), tmp_path / "out")
    assert found.starts == ("encoder", "anchors")
    assert (found.gap >= 0).all()
    assert len(read_z(tmp_path / "out/z.pkl", "")[0]) == stack.n


def test_what_is_done_is_not_done_again(runs, tmp_path, monkeypatch):
    from cryodrgn_amort.inference import fitter

    options = InferOptions(steps=10, batch_size=10)
    whole = infer_run(runs["table"], options, tmp_path / "whole")
    fit, calls = fitter.Fitter.fit_batch, []

    def killed(self, index, *rest):
        calls.append(index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(self, index, *rest)

    monkeypatch.setattr(fitter.Fitter, "fit_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        infer_run(runs["table"], options, tmp_path / "out")
    again = infer_run(runs["table"], options, tmp_path / "out")
    # some beforehand, to tell what it takes; then the third of seven parts a second time
    assert len(calls) == (1 + 3) + (1 + 5)
    np.testing.assert_array_equal(again.mean, whole.mean)
    np.testing.assert_array_equal(again.elbo, whole.elbo)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }


def _interrupted(run, options, out, monkeypatch, after=4):
    """Fit until some parts are done."""
    from cryodrgn_amort.inference import fitter

    fit, calls = fitter.Fitter.fit_batch, []

    def killed(self, index, *rest):
        calls.append(index)
        if len(calls) > after:
            raise KeyboardInterrupt
        return fit(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fitter.Fitter, "fit_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            infer_run(run, options, out)


@pytest.mark.parametrize("what", ["weights", "image", "pose"])
def test_what_is_done_counts_for_the_same_decoder_and_particles_alone(
    what, runs, stack, plugins, tmp_path, monkeypatch
):
    from cryodrgn.mrcfile import write_mrc

    from cryodrgn_amort.inference import fitter

    monkeypatch.setattr(fitter, "_VARIANCE_SAMPLE", 3)
    shutil.copytree(runs["table"].folder, tmp_path / "run")
    shutil.copy(stack.particles, tmp_path / "stack.mrcs")
    shutil.copy(stack.poses, tmp_path / "poses.pkl")
    places = {"particles": str(tmp_path / "stack.mrcs"), "poses": str(tmp_path / "poses.pkl")}
    options = InferOptions(steps=4, batch_size=10, ctf=stack.ctf, **places)
    _interrupted(load_run(tmp_path / "run", plugins), options, tmp_path / "out", monkeypatch)
    if what == "weights":
        path = tmp_path / "run/weights.8.pkl"
        kept = read_weights(path, "")
        for name, value in kept["model_state_dict"].items():
            if name.startswith("decoder."):
                value *= 1.1
        with recorded(path.parent, path.name):
            write_weights(path, 8, kept["model_state_dict"], **kept["amort"])
    elif what == "image":
        images = stack.images.copy()
        images[15] = images[16]
        write_mrc(places["particles"], images)
    else:
        rots = stack.rots.copy()
        rots[15] = rots[16]
        write_pickle(tmp_path / "poses.pkl", (rots, stack.trans))
    run = load_run(tmp_path / "run", plugins)
    again, fresh = (infer_run(run, options, tmp_path / name) for name in ("out", "fresh"))
    np.testing.assert_array_equal(again.mean, fresh.mean)
    np.testing.assert_array_equal(again.elbo, fresh.elbo)


def test_two_calls_do_not_share_a_folder(runs, cli, tmp_path, monkeypatch):
    options = InferOptions(steps=4, batch_size=10)
    _interrupted(runs["table"], options, tmp_path / "out", monkeypatch)
    before = contents(tmp_path / "out")
    with locked(tmp_path / "out", "this test"):
        argv = ["infer_amort", runs["table"].folder, "-o", tmp_path / "out", "--steps", 5]
        code, _, err = cli(*argv)
        assert contents(tmp_path / "out").keys() - before.keys() == {Path(".lock")}
    assert code == 2
    assert f"-o {tmp_path / 'out'}: another infer_amort writes to it" in err
    assert contents(tmp_path / "out") == before


def test_what_replaces_other_latents_leaves_nothing_of_them(runs, stack, plugins, tmp_path):
    infer_run(runs["network"], InferOptions(held_out=True, steps=1), tmp_path / "out")
    again = InferOptions(steps=1, overwrite=True)
    for name, epoch in (("table", 8), ("twin", 2)):
        infer_run(runs[name], again, tmp_path / "out")
        run = load_run(tmp_path / "out", plugins)
        assert (run.epoch, run.n) == (epoch, stack.n)
    infer_run(runs["twin"], again, tmp_path / "fresh")
    names = [{p.name for p in (tmp_path / n).iterdir()} for n in ("out", "fresh")]
    assert names[0] == names[1]


def test_an_input_is_not_replaced_by_what_is_made_of_it(runs, stack, cli, tmp_path):
    out = tmp_path / "out"
    infer_run(runs["table"], InferOptions(steps=1), out)
    write_pickle(out / "pose.pkl", (stack.rots, stack.trans))
    argv = ["infer_amort", runs["table"].folder, stack.particles, "--ctf", stack.ctf, "--poses",
            out / "pose.pkl", "-o", out, "--overwrite", "--steps", 1]  # fmt: skip
    before = contents(out)
    code, _, err = cli(*argv)
    assert (code, f"--poses {out / 'pose.pkl'}: would be replaced" in err) == (2, True)
    assert contents(out) == before


def test_many_particles_are_fitted_quickly_and_what_that_lacks_is_said(
    runs, tmp_path, monkeypatch, caplog
):
    from cryodrgn_amort.inference import posteriors

    monkeypatch.setattr(posteriors, "MANY", 69)
    with caplog.at_level("INFO", "cryodrgn_amort"):
        quick = infer_run(runs["network"], InferOptions(held_out=True), tmp_path / "few")
        assert quick.starts == ("encoder", "anchors")  # 14 are not many
        assert quick.would_gain is None
        assert caplog.text == ""
        quick = infer_run(runs["twin"], InferOptions(), tmp_path / "out")
    assert quick.starts == ("anchors",)
    assert (quick.gap >= 0).all()
    facts = json.loads((tmp_path / "out/inference.json").read_text())
    assert (facts["plan"]["steps"], facts["plan"]["starts"]) == (30, ["anchors"])
    assert re.search(r"Fitting 70 particles takes about \d:\d\d:\d\d", caplog.text)
    said = f"of a few that were tried, {100 * quick.would_gain:.0f} % would gain 0.5 nats or more"
    assert f"{said} by --steps 400: that takes about 0:" in caplog.text
    assert said in inferred_summary(quick)
    assert facts["would_gain"] == quick.would_gain
    thorough = infer_run(runs["twin"], InferOptions(steps=400), tmp_path / "thorough")
    assert (thorough.starts, thorough.would_gain) == (("encoder", "anchors"), None)
    assert thorough.elbo.mean() > quick.elbo.mean()
    probed = np.sort(np.random.default_rng(1).permutation(70)[:7])
    gains = (thorough.elbo - quick.elbo)[probed]
    assert quick.would_gain == pytest.approx((gains > 0.5).mean(), abs=2 / 7)


def test_a_particle_without_a_loss_is_marked_and_the_rest_spared(runs, stack, tmp_path):
    from cryodrgn.mrcfile import write_mrc

    images = stack.images.copy()
    images[5] = np.nan
    write_mrc(str(tmp_path / "nan.mrcs"), images)
    given = {"particles": str(tmp_path / "nan.mrcs"), "poses": stack.poses, "ctf": stack.ctf}
    given["starts"] = ("mean",)
    found = infer_run(runs["table"], InferOptions(**given, steps=20), tmp_path / "out")
    assert found.failed.tolist() == [5]
    assert not found.converged[5]
    assert np.isfinite(found.mean).all()
    given["particles"] = stack.particles
    sound = infer_run(runs["table"], InferOptions(**given, steps=20), tmp_path / "sound")
    others = np.arange(stack.n) != 5
    np.testing.assert_allclose(found.mean[others], sound.mean[others], atol=1e-5)


def test_an_encoder_shown_a_damaged_image_spoils_nothing(runs, stack, plugins, tmp_path):
    from cryodrgn.mrcfile import write_mrc

    images = stack.images.copy()
    images[5] = np.nan
    write_mrc(str(tmp_path / "nan.mrcs"), images)
    given = {"particles": str(tmp_path / "nan.mrcs"), "poses": stack.poses, "ctf": stack.ctf}
    found = infer_run(runs["network"], InferOptions(**given, steps=20), tmp_path / "out")
    assert found.failed.tolist() == [5]
    z, logvar = load_run(tmp_path / "out", plugins).z()  # refuses what is not finite
    np.testing.assert_allclose(z[5], runs["network"].z()[0].mean(0), atol=1e-6)
    assert np.isfinite(logvar).all()
    assert (found.gap[np.arange(stack.n) != 5] >= 0).all()


def test_killed_while_it_is_written_it_goes_on(runs, tmp_path, monkeypatch):
    from cryodrgn_amort.inference import fitter
    from cryodrgn_amort.runs import table

    options = InferOptions(steps=10)
    write, fits = table.write_weights, []

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(table, "write_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        infer_run(runs["table"], options, tmp_path / "out")
    assert (tmp_path / "out/config.yaml").exists()
    monkeypatch.setattr(table, "write_weights", write)
    monkeypatch.setattr(fitter.Fitter, "fit_batch", lambda *_: fits.append(1))
    found = infer_run(runs["table"], options, tmp_path / "out")
    assert fits == []
    np.testing.assert_array_equal(read_z(tmp_path / "out/z.pkl", "")[0], found.mean)


@pytest.mark.parametrize(
    ("kind", "argv", "says"),
    [
        ("table", ["--start", "encoder", "{new}"], "--start encoder: .* no row"),
        ("twin", ["--start", "encoder", "{new}"], "--start encoder: .* something else"),
        ("table", ["--start", "nowhere"], "--start nowhere: not one of encoder"),
        ("table", ["--held-out"], "--held-out: .* without --holdout"),
        ("network", ["--held-out", "{new}"], "--held-out: .* PARTICLES are new"),
        ("table", ["--beta", "much"], "--beta much"),
        ("table", ["--beta", "-1"], "--beta -1"),
        ("table", ["--steps", "-1"], "--steps -1: must not be negative"),
        ("table", ["{stack}"], "PARTICLES .*: need their --poses"),
        ("table", ["{stack}", "--poses", "{poses}"], "--ctf: .* was trained with CTFs"),
        ("table", ["{big}"], "have 20 px, .* trained on 16 px"),
        ("table", ["-o", "{run}"], "-o .*: is the RUN itself"),
        ("table", ["-o", "{other}"], "-o .*: holds a run that is not of infer_amort"),
    ],
)
def test_bad_input_is_one_line(kind, argv, says, runs, new, stack, cli, tmp_path):
    big = write_stack(tmp_path / "big", 3, box=20)
    names = {
        "stack": stack.particles, "poses": stack.poses, "run": str(runs[kind].folder),
        "other": str(runs["network"].folder if kind == "table" else runs["table"].folder),
    }  # fmt: skip
    given = []
    for word in argv:
        if word in ("{new}", "{big}"):
            which = new if word == "{new}" else big
            given = [which.particles, "--poses", which.poses, "--ctf", which.ctf, *given]
        else:
            given.append(word.format(**names))
    if "-o" not in given:
        given += ["-o", str(tmp_path / "out")]
    before = contents(runs[kind].folder)
    code, out, err = cli("infer_amort", runs[kind].folder, *given)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert re.search(says, err), err
    assert contents(runs[kind].folder) == before
    assert not (tmp_path / "out").exists()


def test_finished_latents_are_not_replaced_by_accident(runs, cli, tmp_path):
    argv = ["infer_amort", runs["table"].folder, "-o", tmp_path / "out", "--steps", 4]
    assert cli(*argv)[0] == 0
    before = contents(tmp_path / "out")
    code, _, err = cli(*argv)
    assert (code, "--overwrite replaces them" in err) == (2, True)
    assert contents(tmp_path / "out") == before
    assert cli(*argv, "--overwrite", "--seed", 1)[0] == 0
    assert contents(tmp_path / "out") != before


def test_the_evaluation_tells_what_the_encoder_loses(runs, stack, cli, tmp_path):
    labels = write_pickle(tmp_path / "labels.pkl", np.arange(stack.n) % 3)
    code, out, err = cli(
        "eval_amort", runs["network"].folder, "-o", tmp_path / "out", "--no-umap",
        "--bootstrap", 20, "--fit", 12, "--labels", labels,
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads((tmp_path / "out/amortization.json").read_text())
    fits = facts["fits"]
    assert set(fits) == {
        "training.train", "held-out.train", "training.implied", "held-out.implied",
    }  # fmt: skip
    seen, unseen = fits["training.train"], fits["held-out.train"]
    assert seen["beta"] == pytest.approx(1 / 3)
    assert fits["training.implied"]["beta"] == pytest.approx(
        2 * fits["held-out.implied"]["variance"]
    )
    gaps = [which["measures"]["amortization_gap"]["value"] for which in (seen, unseen)]
    assert min(gaps) > 0
    assert unseen["measures"]["generalisation_gap"]["value"] == pytest.approx(gaps[1] - gaps[0])
    assert {"held_out_score", "class_knn_encoder", "class_knn_fitted"} <= set(unseen["measures"])
    assert "approximation_gap" in fits["training.implied"]["measures"]
    assert {"nuisance_leak_view", "nuisance_leak_inplane", "nuisance_leak_defocus",
            "nuisance_leak_shift"} <= set(facts["measures"])  # fmt: skip
    assert "held-out" in out
    page = (tmp_path / "out/report.html").read_text()
    assert "What the encoder loses" in page
    with open(tmp_path / "out/trust.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    trained = read_pickles(runs["network"].folder / "ind_train.pkl")
    assert [int(row["particle"]) for row in rows] == trained.tolist()
    assert sum(row["gap"] != "" for row in rows) == 12
    trust = read_pickles(tmp_path / "out/trust.pkl")
    assert [float(row["trust"]) for row in rows] == pytest.approx(trust.tolist(), abs=1e-6)
    chosen = [
        read_pickles(tmp_path / f"out/ind_{name}.pkl").tolist()
        for name in ("stable", "unstable")
        if os.path.exists(tmp_path / f"out/ind_{name}.pkl")
    ]
    assert sorted(i for ids in chosen for i in ids) == trained.tolist()


def test_a_particle_without_a_loss_costs_no_measure(runs, stack, cli, tmp_path, caplog):
    from cryodrgn.mrcfile import write_mrc

    folder = runs["network"].folder
    images = stack.images.copy()
    images[read_pickles(folder / "ind_heldout.pkl")[3]] = np.nan
    write_mrc(str(tmp_path / "nan.mrcs"), images)
    labels = write_pickle(tmp_path / "labels.pkl", np.arange(stack.n) % 3)
    code, _, err = cli(
        "eval_amort", folder, "-o", tmp_path / "out", "--no-umap", "--bootstrap", 20, "--fit",
        HELD, "--labels", labels, "--particles", tmp_path / "nan.mrcs", "--transform",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads((tmp_path / "out/amortization.json").read_text())["fits"]
    seen, unseen = facts["training.implied"], facts["held-out.implied"]
    assert (seen["n"], seen["left_out"], unseen["n"], unseen["left_out"]) == (HELD, 0, HELD, 1)
    counts = {name: m["n"] for name, m in unseen["measures"].items()}
    named = ("amortization_gap", "generalisation_gap", "held_out_score", "approximation_gap")
    assert [counts[name] for name in named] == [HELD - 1] * 4
    assert all(np.isfinite(unseen["measures"][name]["value"]) for name in named)
    assert (counts["class_knn_fitted"], counts["converged"]) == (HELD, HELD)
    assert f"The loss of 1 of {HELD} held-out particles is not a number" in caplog.text
    assert f"1 of {HELD} held-out particles" in (tmp_path / "out/report.html").read_text()


def test_a_folder_whose_name_is_no_text(runs, tmp_path):
    """Its name is in the log, which is written when all is fitted."""
    out = tmp_path / "p\udcff\n"
    run = replace(runs["network"], folder=Path(shutil.copytree(runs["network"].folder, out / "in")))
    infer_run(run, InferOptions(steps=0, starts=("encoder",)), out / "fitted")
    log = (out / "fitted" / "run.log").read_text(encoding="utf-8")
    assert "decoder of " + str(tmp_path / r"p\udcff") in log
    assert load_run(out / "fitted", run.plugins).z_mu.shape == (56, 3)
