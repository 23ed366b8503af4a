"""time_amort: configurations side by side."""

import json

import pytest
import yaml

from cryodrgn_amort.options import TimingOptions
from cryodrgn_amort.runs import load_run
from cryodrgn_amort.training import time_epochs


@pytest.fixture
def folders(train, flags, tmp_path):
    """Runs of the same particles; one sees the corners of images, too."""
    for name, mask in (("round", None), ("whole", -1)):
        train(flags, outdir=str(tmp_path / name), num_epochs=1, qdim=8, enc_mask=mask)
    return [tmp_path / "round", tmp_path / "whole"]


def test_runs_that_are_shown_other_pixels_share_no_particles(folders, cli, tmp_path):
    out = tmp_path / "times.json"
    argv = ["time_amort", *folders, "--rounds", 1, "--batches", 1, "-o", out]
    code, shown, err = cli(*argv)
    assert code == 0, err
    assert ("round" in shown, "whole" in shown) == (True, True)
    seconds = json.loads(out.read_text())["seconds_per_epoch"]
    assert all(values[0] > 0 for values in seconds.values())


def test_runs_that_are_not_trained_as_ours_are_refused(folders, cli, plugins):
    config = folders[0] / "config.yaml"
    content = yaml.safe_load(config.read_text())
    del content["amort"]
    content["model_args"] |= {"dim": 16, "layers": 1}
    del content["model_args"]["encode_mode"]  # as in a run of train_dec
    config.write_text(yaml.safe_dump(content))
    (folders[0] / "checksums.sha256").unlink()
    code, _, err = cli("time_amort", *folders, "--rounds", 1, "--batches", 1)
    assert code == 2
    assert "a run of cryodrgn train_dec: only epochs of train_amort and train_vae" in err


def test_runs_of_the_same_particles_share_them(folders, plugins, monkeypatch):
    from cryodrgn_amort.training import trainer as training

    load, loads = training.load_particles, []
    monkeypatch.setattr(
        training, "load_particles", lambda *a, **k: loads.append(k) or load(*a, **k)
    )
    time_epochs([load_run(folders[i], plugins) for i in (0, 1)], TimingOptions(1, 1))
    assert [given["whole"] for given in loads] == [False, True]
    loads.clear()
    time_epochs([load_run(folders[0], plugins)] * 2, TimingOptions(1, 1))
    assert len(loads) == 1
