"""What a run survives: signals, damaged files and images, a second training in its folder."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from cryodrgn.mrcfile import write_mrc
from helpers import metrics, read_pickles, same, write_pickle, write_stack

from cryodrgn_amort.core import (
    CHECKSUMS,
    INTERRUPTED,
    InputError,
    Stopped,
    epochs,
    locked,
    onednn,
    read_weights,
    recorded,
)


@pytest.fixture
def stop_after(monkeypatch):
    """Let a signal arrive while the n-th batch is worked on."""
    from cryodrgn_amort.training.stepper import Stepper

    def arrange(number, signum=signal.SIGTERM):
        step, count = Stepper.take, iter(range(1, 10_000))

        def counted(self, *args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signum)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(Stepper, "take", counted)
        return lambda: monkeypatch.setattr(Stepper, "take", step)

    return arrange


@pytest.mark.parametrize(
    ("more", "signum"),
    [
        ({"qdim": 16}, signal.SIGINT),
        (
            {"encoder": "vlt", "shuffle_seed": 4, "table_lr_end": 1e-3, "table_init": "linear"},
            signal.SIGTERM,
        ),
        ({"qdim": 16, "augment": 1, "lr_end": 1e-5}, signal.SIGTERM),
        ({"qdim": 16, "do_pose_sgd": True, "pretrain": 2, "pose_lr": 0.01}, signal.SIGTERM),
        ({"encoder": "alternate", "qdim": 16, "anchors": 4}, signal.SIGTERM),
        ({"encoder": "alternate", "qdim": 16, "anchors": 4, "rounds": 1}, signal.SIGINT),
    ],
    ids=["resid", "vlt", "augment", "poses", "alternate", "alternate, one round"],
)
def test_a_training_that_is_stopped_goes_on_with_the_next_batch(
    train, flags, tmp_path, stop_after, signum, more, monkeypatch
):
    """70 particles are 5 batches: stopped in the second epoch, before a checkpoint, and again.

    As on AMD's processors, where another library multiplies while it trains.
    """
    monkeypatch.setattr(onednn, "read_fact", lambda *_: "AuthenticAMD")
    monkeypatch.setattr(onednn, "onednn_error", lambda: 1e-6)
    flags = {**flags, **more, "num_epochs": 4, "checkpoint": 3}
    whole = train(flags, outdir=str(tmp_path / "whole"))
    for load, batch, says in ((None, 8, "in epoch 2 after 3"), ("latest", 9, "in epoch 4 after 2")):
        undo = stop_after(batch, signum)
        with pytest.raises(Stopped) as stop:
            train(flags, load=load)
        undo()
        assert stop.value.number == signum
        assert says in str(stop.value)
        assert (tmp_path / "run" / INTERRUPTED).is_file()
        torch.manual_seed(99)
    parts = train(flags, load="latest")
    a, b = (read_weights(t.folder / "weights.pkl", "") for t in (whole, parts))
    assert same(a, b)
    for one, two in zip(
        *(read_pickles(t.folder / "z.pkl", 2) for t in (whole, parts)), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert metrics(whole.folder) == metrics(parts.folder)
    assert not (tmp_path / "run" / INTERRUPTED).exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_an_epoch_goes_on_with(train, flags, tmp_path, stop_after, monkeypatch):
    """The flags that its batches depend on, and what they drew: not what was drawn ahead."""
    from cryodrgn_amort.models import LookupTable

    begun, start = [], LookupTable.epoch_start

    def epoch_start(self, done):  # as a plugin's may: with random numbers
        begun.append(done)
        torch.rand(3)
        start(self, done)

    monkeypatch.setattr(LookupTable, "epoch_start", epoch_start)
    flags = {**flags, "encoder": "vlt", "shuffle_seed": 4, "num_epochs": 3}
    whole = train(flags, outdir=str(tmp_path / "whole"))
    undo = stop_after(8)
    with pytest.raises(Stopped):
        train(flags)
    undo()
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for more, says in (
        ({"batch_size": 23}, "with -b 16, not -b 23"),
        ({"shuffle_seed": None}, "with --shuffle-seed 4, not no --shuffle-seed"),
        ({"augment": 1, "encoder": "resid"}, "with --encoder vlt, not resid"),
    ):
        with pytest.raises(InputError, match=says):
            train(flags, load="latest", **more)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    stopped = read_weights(tmp_path / "run" / INTERRUPTED, "")
    stopped["amort"]["random"]["shuffle"] = torch.Generator().manual_seed(77).get_state()
    with recorded(tmp_path / "run", INTERRUPTED):
        torch.save(stopped, tmp_path / "run" / INTERRUPTED)
    begun.clear()
    parts = train(flags, load="latest")
    assert begun == [1 / 3, 2 / 3]
    a, b = (read_weights(t.folder / "weights.pkl", "") for t in (whole, parts))
    assert same(a, b)
    assert metrics(whole.folder) == metrics(parts.folder)


def test_a_second_stage_goes_on_within_an_epoch(train, flags, plugins, tmp_path, stop_after):
    from cryodrgn_amort.runs import settings_from_flags, with_run
    from cryodrgn_amort.training import Trainer

    train(flags, encoder="vlt", outdir=str(tmp_path / "vlt"))

    def second(name, **more):
        given = {"from_run": str(tmp_path / "vlt"), "encoder": "anchored", "anchors": 3, "seed": 1,
                 "outdir": str(tmp_path / name), "do_analysis": False, "num_epochs": 2, "qdim": 16,
                 "batch_size": 16, **more}  # fmt: skip
        trainer = Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)
        trainer.fit()
        return trainer

    whole = second("whole")
    undo = stop_after(7)
    with pytest.raises(Stopped):
        second("parts")
    undo()
    parts = second("parts", load="latest")
    a, b = (read_weights(t.folder / "weights.pkl", "") for t in (whole, parts))
    assert same(a, b)
    assert metrics(whole.folder) == metrics(parts.folder)


@pytest.mark.parametrize(
    ("signum", "more"),
    [(signal.SIGTERM, []), (signal.SIGINT, ["--lazy", "--num-workers", "2"])],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_the_command_says_so_in_one_line(flags, tmp_path, signum, more):
    """All processes get it, as from a cluster or a terminal: and the next call goes on."""
    argv = [
        sys.executable, "-m", "cryodrgn_amort", "train_amort", flags["particles"], "--poses",
        flags["poses"], "--ctf", flags["ctf"], "--zdim", "2", "--enc-dim", "8", "--dec-dim", "8",
        "--no-analysis", "-n", "100000", "--checkpoint", "1000000", "-o", str(tmp_path / "run"),
        *more,
    ]  # fmt: skip
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    log = tmp_path / "run/run.log"
    while not (log.is_file() and "Epoch: 2 " in log.read_text()):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    os.killpg(child.pid, signum)
    said = child.communicate(timeout=60)[1].splitlines()
    assert child.returncode == 128 + signum
    assert re.fullmatch(
        rf"cryodrgn train_amort: stopped by {signum.name} in epoch \d+ after \d+ of \d batches; "
        r"--load latest goes on from there",
        said[-1],
    )
    assert "Traceback" not in "".join(said)
    assert (tmp_path / "run" / INTERRUPTED).is_file()


def damage(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["weights.3.pkl", "z.3.pkl"])
def test_the_newest_checkpoint_that_is_whole_is_taken(train, flags, tmp_path, name):
    whole = train(flags, outdir=str(tmp_path / "whole"), num_epochs=4, encoder="vlt")
    train(flags, num_epochs=3, encoder="vlt")
    damage(tmp_path / "run" / name)
    again = train(flags, num_epochs=4, encoder="vlt", load="latest")
    log = (tmp_path / "run/run.log").read_text()
    assert f"Skipped {tmp_path / 'run' / name}: damaged" in log
    assert "Continuing after epoch 2" in log
    a, b = (read_weights(t.folder / "weights.pkl", "") for t in (whole, again))
    assert same(a, b)
    assert epochs(again.folder) == [1, 2, 3, 4]


def test_an_end_that_was_not_recorded_is_made_again(train, flags, tmp_path):
    """A full disk, as it may be: both final files are there, their checksums are not."""
    train(flags, num_epochs=2, encoder="vlt")
    sums = tmp_path / "run" / CHECKSUMS
    whole = sums.read_text()
    final = (" weights.pkl", " z.pkl")
    sums.write_text("".join(k for k in whole.splitlines(True) if not k.rstrip().endswith(final)))
    train(flags, num_epochs=2, encoder="vlt", load="latest")
    assert {line.split()[1] for line in sums.read_text().splitlines()} == {
        line.split()[1] for line in whole.splitlines()
    }
    with pytest.raises(InputError, match="leaves nothing to train"):
        train(flags, num_epochs=2, encoder="vlt", load="latest")


def test_no_checkpoint_is_whole(train, flags, tmp_path):
    train(flags, num_epochs=1, encoder="vlt")
    damage(tmp_path / "run/weights.1.pkl")
    with pytest.raises(InputError, match=r"no checkpoint that is whole \(.*weights\.1\.pkl: damag"):
        train(flags, num_epochs=2, encoder="vlt", load="latest")


def test_a_flipped_bit_in_any_file_of_a_run_is_seen(train, flags, plugins, tmp_path):
    train(flags, num_epochs=1, encoder="vlt", holdout="0.2")
    run = tmp_path / "run"
    sums = (run / CHECKSUMS).read_text()
    assert {line.split("  ")[1] for line in sums.splitlines()} == {
        "weights.1.pkl", "z.1.pkl", "weights.pkl", "z.pkl", "config.yaml", "ind_heldout.pkl",
        "ind_train.pkl", "metrics.csv",
    }  # fmt: skip
    done = subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=run, check=False)
    assert done.returncode == 0
    for name in ("weights.1.pkl", "z.1.pkl", "config.yaml", "ind_heldout.pkl"):
        before = (run / name).read_bytes()
        damage(run / name, at=len(before) // 2)
        with pytest.raises(InputError, match=rf"{name}: damaged"):
            open_all(run, plugins)
        (run / name).write_bytes(before)
    open_all(run, plugins)


def open_all(run, plugins):
    from cryodrgn_amort.runs import load_run

    opened = load_run(run, plugins)
    opened.z()
    opened.load(opened.particles())
    return opened


def test_a_run_can_be_read_while_it_trains(flags, plugins, tmp_path):
    argv = [
        sys.executable, "-m", "cryodrgn_amort", "train_amort", flags["particles"], "--poses",
        flags["poses"], "--ctf", flags["ctf"], "--zdim", "2", "--encoder", "vlt", "--dec-dim", "8",
        "--no-analysis", "-n", "15", "-o", str(tmp_path / "run"),
    ]  # fmt: skip
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    seen = set()
    while child.poll() is None:
        if epochs(tmp_path / "run"):
            seen.add(open_all(tmp_path / "run", plugins).epoch)
    assert child.returncode == 0
    assert len(seen) >= 2


def test_a_second_training_in_the_same_folder_is_refused(train, flags, tmp_path):
    train(flags, num_epochs=1)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with locked(tmp_path / "run", "this test"), pytest.raises(InputError, match="another training"):
        train(flags, num_epochs=2, load="latest")
    assert not (tmp_path / "run/.lock").exists()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    train(flags, num_epochs=2, load="latest")


def test_images_that_are_no_numbers_are_named_before_anything_is_written(
    train, flags, tmp_path, caplog
):
    stack = write_stack(tmp_path / "in", 12)
    images = stack.images.copy()
    images[4, 3, 3], images[7, 0, 0], images[9] = np.nan, np.inf, 2.5
    write_mrc(stack.particles, images)
    flags |= {"particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "qdim": 8}
    for more in ({}, {"norm": (0.0, 17.0)}):
        with pytest.raises(InputError, match="2 images are not finite, at 4, 7 of the stack"):
            train(flags, **more)
    assert not (tmp_path / "run").exists()
    kept = write_pickle(tmp_path / "ind.pkl", np.array([0, 1, 4, 9, 11]))
    with pytest.raises(InputError, match="1 image is not finite, at 4 of the stack"):
        train(flags, ind=kept)
    kept = write_pickle(tmp_path / "ind.pkl", np.array([0, 1, 9, 11]))
    train(flags, ind=kept)
    assert "1 image is constant, at 9 of the stack" in caplog.text


@pytest.fixture
def spoilt(flags, tmp_path):
    """Return flags of a training that reads a stack with one bad image only when it needs it."""
    stack = write_stack(tmp_path / "in", 70)
    images = stack.images.copy()
    images[33, 2, 2] = np.nan
    write_mrc(stack.particles, images)
    return {**flags, "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf,
            "encoder": "vlt", "lazy": True, "num_workers": 0, "norm": (0.0, 17.0),
            "shuffle_seed": 1}  # fmt: skip


def test_a_loss_that_is_no_number_stops_before_the_batch_and_names_the_particle(
    train, spoilt, tmp_path
):
    with pytest.raises(InputError, match="1 image is without a loss, at 33 of the stack"):
        train(spoilt)
    kept = read_weights(tmp_path / "run" / INTERRUPTED, "")
    states = [kept["model_state_dict"], kept["amort"]["encoder_state_dict"]["weight"]]
    weights = [v for k, v in states[0].items() if k.startswith("decoder.")] + states[1:]
    assert all(bool(w.isfinite().all()) for w in weights)
    again = train(spoilt, load="latest", on_nan="skip")
    log = (tmp_path / "run/run.log").read_text()
    assert log.count("Batch left out: 1 image is without a loss, at 33 of the stack") == 2
    assert all(np.isfinite(float(row["loss"])) for row in metrics(again.folder))
    whole = train(spoilt, outdir=str(tmp_path / "whole"), on_nan="skip")
    assert metrics(whole.folder) == metrics(again.folder)


def test_a_loss_beyond_all_bounds_is_caught_before_the_step(train, flags):
    with pytest.raises(InputError, match="loss of epoch 1 is no usable number"):
        train(flags, norm=(0.0, 1e-6))


def test_rolling_back_halves_the_rate_until_it_works(train, flags, tmp_path, monkeypatch):
    from cryodrgn_amort.models import NotFiniteError
    from cryodrgn_amort.training import stepper as training

    step, count = training.train_step, iter(range(1, 1000))

    def fails_at_times(model, optimizer, *args, **kwargs):
        if next(count) in (8, 14):  # in the second epoch, and again
            raise NotFiniteError
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, optimizer, *args, **kwargs)

    rates = []
    monkeypatch.setattr(training, "train_step", fails_at_times)
    run = train(flags, qdim=8, num_epochs=3, on_nan="rollback")
    assert epochs(run.folder) == [1, 2, 3]
    assert len(metrics(run.folder)) == 3
    assert rates[:7] == [1e-3] * 7
    assert rates[7:12] == [5e-4] * 5
    assert set(rates[12:]) == {2.5e-4}
    assert len(rates[12:]) == 5
    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(InputError, match=r"has diverged .*rollback: there is no checkpoint"):
        train(flags, outdir=str(tmp_path / "wild"), qdim=8, lr=1e12, on_nan="rollback")
    with pytest.raises(InputError, match="--on-nan never: not one of stop, skip, rollback"):
        train(flags, on_nan="never")
