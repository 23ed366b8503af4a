"""The loop around the step: resume, checkpoints, what a run folder holds, hooks."""

import math
import re

import numpy as np
import pytest
import torch
import yaml
from helpers import metrics, read_pickles, run_host, same, write_pickle

from cryodrgn_amort.core import InputError, epochs, read_weights, replacing
from cryodrgn_amort.data import Particles
from cryodrgn_amort.training import Trainer


@pytest.mark.parametrize(
    "more",
    [
        {"qdim": 16},
        {"qdim": 16, "shuffle_seed": 4, "checkpoint": 3},
        {"encoder": "vlt"},
        {"encoder": "twin", "qdim": 16},
        {"encoder": "noise", "qdim": 16},
    ],
    ids=["resid", "resid-shuffle-seed", "vlt", "twin", "noise"],
)
def test_resume_is_exact(train, flags, tmp_path, more):
    """4 epochs at once = 2, then 4 by --load latest: weights, optimizers, random state, metrics."""
    whole = train(flags, outdir=str(tmp_path / "whole"), num_epochs=4, **more)
    train(flags, outdir=str(tmp_path / "parts"), num_epochs=2, **more)
    torch.manual_seed(99)
    parts = train(flags, outdir=str(tmp_path / "parts"), num_epochs=4, load="latest", **more)
    a, b = (read_weights(t.folder / "weights.pkl", "") for t in (whole, parts))
    assert same(a, b)
    for one, two in zip(
        *(read_pickles(t.folder / "z.pkl", 2) for t in (whole, parts)), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert metrics(whole.folder) == metrics(parts.folder)


def test_resume_from_an_earlier_epoch_forgets_the_later_ones(train, flags):
    folder = train(flags, qdim=16, num_epochs=4).folder
    before = metrics(folder)
    train(flags, qdim=16, num_epochs=5, load=str(folder / "weights.2.pkl"))
    assert epochs(folder) == [1, 2, 3, 4, 5]
    after = metrics(folder)
    assert [r["epoch"] for r in after] == list("12345")
    assert after[:4] == before


def test_a_stock_checkpoint_can_be_continued(train, flags, stack, tmp_path):
    run_host(
        "train_vae", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", "3",
        "-o", tmp_path / "run", "-n", "1", "--enc-dim", "16", "--dec-dim", "16",
        "--dec-layers", "1", "--no-analysis",
    )  # fmt: skip
    trainer = train(flags, qdim=16, num_epochs=2, load="latest")
    assert trainer.epoch == 2
    assert epochs(trainer.folder) == [1, 2]


def test_overwrite_leaves_nothing_of_the_old_run(train, flags):
    folder = train(flags, qdim=16, num_epochs=4).folder
    (folder / "mine.txt").write_text("kept")
    train(flags, qdim=16, num_epochs=2, overwrite=True)
    assert epochs(folder) == [1, 2]
    assert [r["epoch"] for r in metrics(folder)] == ["1", "2"]
    assert (folder / "run.log").read_text().count("=====>") == 2
    assert (folder / "mine.txt").read_text() == "kept"


def test_overwrite_that_fails_leaves_the_old_run(train, flags, monkeypatch):
    folder = train(flags, qdim=16).folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match=r"has diverged .*checkpoint: none"):
        train(flags, qdim=16, overwrite=True, lr=1e30)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr(Trainer, "_train_epoch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # later epochs come back as well
        train(flags, qdim=16, num_epochs=3, load=str(folder / "weights.1.pkl"))
    assert epochs(folder) == [1, 2]


def test_a_run_whose_replacement_was_killed_is_not_lost(train, flags):
    folder = train(flags, qdim=16).folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / ".replaced").mkdir()  # as a SIGKILL in the first epoch of --overwrite leaves it
    for name in before:
        (folder / name).rename(folder / ".replaced" / name)
    (folder / "config.yaml").write_text("")
    for more in ({}, {"load": "latest"}):
        with pytest.raises(InputError, match=r"whole in .*\.replaced: move it back"):
            train(flags, qdim=16, num_epochs=3, **more)
    kept = {p.name: p.read_bytes() for p in (folder / ".replaced").iterdir()}
    assert kept == before
    train(flags, qdim=16, num_epochs=1, overwrite=True)
    assert epochs(folder) == [1]
    assert not (folder / ".replaced").exists()


def test_anothers_epoch_files_are_not_touched(train, flags, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "z.3.pkl").write_text("mine")
    with pytest.raises(InputError, match=r"holds no run, but z\.3\.pkl"):
        train(flags, qdim=16)
    assert (folder / "z.3.pkl").read_text() == "mine"


def test_checkpoint_interval(train, flags):
    folder = train(flags, qdim=16, num_epochs=5, checkpoint=2).folder
    assert epochs(folder) == [2, 4, 5]  # the last one always, which analyze needs
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml", "metrics.csv", "run.log", "weights.pkl", "z.pkl", "checksums.sha256",
        *(f"{kind}.{e}.pkl" for kind in ("weights", "z") for e in (2, 4, 5)),
    }  # fmt: skip


def test_metrics_add_up(train, flags):
    trainer = train(flags, qdim=16)
    for row in metrics(trainer.folder):
        kl_weight = 1 / 3 / len(trainer.particles.mask)
        total = float(row["gen_loss"]) + kl_weight * float(row["kld"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
        assert 0 <= int(row["active_units"]) <= 3
    log = (trainer.folder / "run.log").read_text()
    assert "# =====> Epoch: 2 Average gen loss = " in log


def test_losses_fall(train, flags):
    rows = metrics(train(flags, qdim=32, num_epochs=8).folder)
    assert float(rows[-1]["loss"]) < 0.97 * float(rows[0]["loss"])


def test_config_is_plain_and_complete(train, flags):
    folder = train(flags, encoder="vlt", table_logvar=-3.0).folder
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model_args"]["qlayers"] == 0
    assert config["amort"]["encoder"] == "vlt"
    assert config["amort"]["settings"]["extra"] == {"table_logvar": -3.0}
    state = read_weights(folder / "weights.pkl", "")["model_state_dict"]
    token = [v for k, v in state.items() if k.startswith("encoder.")]
    assert token
    assert all(v.isnan().all() for v in token)
    assert not any(v.isnan().any() for k, v in state.items() if k.startswith("decoder."))


def test_recipe_sets_flags_and_flags_win(plugins, flags):
    from cryodrgn_amort.runs import settings_from_flags

    del flags["zdim"]
    settings = settings_from_flags({**flags, "recipe": "twin-small", "qlayers": 4}, plugins)
    assert (settings.encoder, settings.qlayers, settings.qdim, settings.zdim) == ("twin", 4, 256, 2)
    for name, owned in plugins.owned("recipes").items():
        if owned.item.command != "train_amort":
            with pytest.raises(InputError, match=f"--recipe {name}: is nothing to train"):
                settings_from_flags({"zdim": 8, **flags, "recipe": name}, plugins)
            continue
        more = dict.fromkeys(owned.item.parents, "zeros")
        settings_from_flags({"zdim": 8, **flags, "recipe": name, **more}, plugins)


def test_defaults_are_the_hosts(plugins):
    import argparse

    from cryodrgn.commands import train_vae

    from cryodrgn_amort.options import REPLACED
    from cryodrgn_amort.runs.config import with_defaults

    parser = argparse.ArgumentParser()
    train_vae.add_args(parser)
    theirs = vars(parser.parse_args(["p", "-o", "o", "--zdim", "8", "--poses", "q"]))
    ours = {"emb_type": "s2s2", **with_defaults({})}
    for name, value in theirs.items():
        assert name in ours or name in REPLACED, f"the host has a new flag: {name}"
        if name in ours and name not in (
            "particles",
            "outdir",
            "zdim",
            "poses",
            "seed",
            "emb_type",
        ):
            assert ours[name] == value, name


def test_diverged_training_stops_with_the_last_good_checkpoint(train, flags, tmp_path):
    with pytest.raises(InputError, match="has diverged"):
        train(flags, qdim=16, num_epochs=5, lr=1e12)
    for epoch in epochs(tmp_path / "run"):
        assert all(np.isfinite(z).all() for z in read_pickles(tmp_path / f"run/z.{epoch}.pkl", 2))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_selected_particles_are_the_right_ones(train, flags, stack, tmp_path):
    ind = np.random.default_rng(0).permutation(70)[:30]
    path = write_pickle(tmp_path / "ind.pkl", ind)
    p = train(flags, ind=path, qdim=16).particles
    np.testing.assert_array_equal(p.rots.numpy(), stack.rots[ind])
    np.testing.assert_allclose(p.trans.numpy(), stack.trans[ind] * 17, rtol=1e-6)
    np.testing.assert_allclose(p.ctf_params[:, 1].numpy(), stack.ctf_table[ind, 2])
    np.testing.assert_array_equal(p.raw(torch.tensor([3])).numpy(), stack.images[ind[3:4]])
    assert math.isclose(p.norm[1], p.images.norm[1])


def test_every_row_keeps_its_own_pixel_size(stack, tmp_path):
    from cryodrgn_amort.data import load_ctf

    table = stack.ctf_table.astype(np.float64)
    table[1, :2] = 64, 2.0
    found = load_ctf(write_pickle(tmp_path / "ctf.pkl", table), 70, None, 16)
    assert found.dtype == np.float32
    assert found[1, 0] == 8.0
    assert found[0, 0] == 12.0


def test_images_that_vanish_leave_no_run(flags, train, tmp_path, monkeypatch):
    def gone(self, rows):
        raise InputError("PARTICLES particles.mrcs: images cannot be read")

    monkeypatch.setattr(Particles, "raw", gone)
    with pytest.raises(InputError, match="cannot be read"):
        train(flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"precision": "half"}, "--precision half: not one of fp32, tf32, bf16, fp16, fp64"),
        ({"memory": 0.0}, "--memory 0.0: gigabytes are needed"),
        ({"memory": float("nan")}, "--memory nan"),
        ({"memory": 1.0, "lazy": True}, "--memory and --lazy exclude each other"),
        ({"pe_type": "linear_lowf", "pe_dim": 5}, "--pe-dim 5: linear_lowf has 8 and no other"),
        ({"pe_type": "geom_lowf", "pe_dim": 1}, "--pe-dim 1: geom_lowf needs at least 2"),
    ],
)
def test_flags_of_speed_that_make_no_sense(flags, train, tmp_path, more, says):
    with pytest.raises(InputError, match=re.escape(says)):
        train(flags, **more)
    assert not (tmp_path / "run").exists()


def test_a_command_line_that_is_no_text_is_in_the_log(train, flags, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_amort", "p\udcff", "\u00b5"])
    folder = train(flags, qdim=16, num_epochs=1, outdir=str(tmp_path / "p\udcff")).folder
    first, *_, last = (folder / "run.log").read_text(encoding="utf-8").splitlines()
    assert first.endswith("train_amort p\\udcff \u00b5")
    assert "Finished" in last
