"""Poses that are refined: the host's ``train_vae --do-pose-sgd`` is the oracle where it goes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, run_host, same, write_pickle
from scipy.spatial.transform import Rotation

from cryodrgn_amort.core import CHECKSUMS, InputError, read_weights
from cryodrgn_amort.data import BatchLoader
from cryodrgn_amort.runs import load_run


def refining(stack, out, *more):
    return [
        stack.particles, "--zdim", "3", "-n", "3", "--checkpoint", "3", "--seed", "11",
        "--enc-dim", "24", "--dec-dim", "24", "--enc-layers", "2", "--dec-layers", "2",
        "--lr", "1e-3", "--no-analysis", "--domain", "hartley", "--do-pose-sgd", "-o", out, *more,
    ]  # fmt: skip


def weights(folder, name="weights.pkl"):
    return torch.load(folder / name, weights_only=False)["model_state_dict"]


def assert_close(own, other, what=None):
    assert np.linalg.norm(own - other) <= 1e-4 * np.linalg.norm(other), what


@pytest.mark.parametrize(
    "more",
    [
        ["--poses", "POSES", "--ctf", "CTF", "--pose-lr", "0.01"],
        ["--poses", "ROTS", "--pretrain", "2", "--shuffle-seed", "5", "--ind", "IND"],
        ["--poses", "POSES", "--ctf", "CTF", "--pose-lr", "0.003", "--enc-mask", "-1"],
    ],
    ids=["ctf", "rotations-pretrain-ind", "corners-lazy"],
)
def test_refinement_equals_train_vae(more, stack, tmp_path, cli):
    files = {
        "POSES": stack.poses,
        "ROTS": write_pickle(tmp_path / "rots.pkl", stack.rots),
        "CTF": stack.ctf,
        "IND": write_pickle(tmp_path / "ind.pkl", np.random.default_rng(1).permutation(70)[:51]),
    }
    more = [files.get(word, word) for word in more]
    run_host("train_vae", *refining(stack, tmp_path / "host", *more))
    more += ["--lazy"] if "-1" in more else []
    code, _, err = cli("train_amort", *refining(stack, tmp_path / "ours", *more))
    assert code == 0, err
    host, ours = weights(tmp_path / "host"), weights(tmp_path / "ours")
    assert list(host) == list(ours)
    for name in host:
        assert_close(ours[name], host[name], name)
    # the host's pose.pkl is divided by the box size twice
    expected, own = (read_pickles(tmp_path / run / "pose.3.pkl") for run in ("host", "ours"))
    given = (
        (stack.rots, stack.trans) if len(own) == 2 else (stack.rots[read_pickles(files["IND"])],)
    )
    assert len(expected) == len(own) == len(given)
    for refined, other, start in zip(own, expected, given, strict=True):
        assert refined.dtype == other.dtype == np.float32
        assert_close(refined - start, other - start)
        assert np.abs(refined - start).max() > 1e-4


def test_tilt_series_equal_train_vae(tmp_path, cli):
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation import simulate

    sim = tmp_path / "sim"
    simulate(SimulateOptions(str(sim), n=20, D=16, tilts=5, seed=1))
    stack = SimpleNamespace(particles=sim / "particles.star")
    more = [
        "--encode-mode", "tilt", "--ntilts", "3", "--random-tilts", "--tdim", "24", "--t-emb-dim",
        "8", "--poses", sim / "poses.pkl", "--ctf", sim / "ctf.pkl", "--pose-lr", "0.01",
    ]  # fmt: skip
    run_host("train_vae", *refining(stack, tmp_path / "host", *more))
    code, _, err = cli("train_amort", *refining(stack, tmp_path / "ours", *more))
    assert code == 0, err
    host, ours = weights(tmp_path / "host"), weights(tmp_path / "ours")
    for name in host:
        assert_close(ours[name], host[name], name)
    expected, own = (read_pickles(tmp_path / run / "pose.3.pkl") for run in ("host", "ours"))
    assert len(own[0]) == len(own[1]) == 100  # of images, not of particles
    for refined, other, start in zip(own, expected, read_pickles(sim / "poses.pkl"), strict=True):
        assert_close(refined - start, other - start)


@pytest.fixture(scope="module")
def rigid(tmp_path_factory):
    """150 almost noiseless images of one object."""
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation import simulate

    folder = tmp_path_factory.mktemp("rigid") / "sim"
    simulate(SimulateOptions(str(folder), n=150, D=16, snr=10, classes=1, hinge_deg=0.0, seed=1))
    return folder


@pytest.mark.parametrize(
    ("angle_deg", "shift_px", "pose_lr"), [(8, 0, 0.005), (0, 1, 0.04)], ids=["turned", "shifted"]
)
def test_wrong_poses_come_closer_to_the_truth(angle_deg, shift_px, pose_lr, rigid, train, flags):
    rots, trans = read_pickles(rigid / "poses.pkl")
    rng = np.random.default_rng(0)
    axes = rng.standard_normal((len(rots), 3))
    turns = Rotation.from_rotvec(
        angle_deg * axes / np.linalg.norm(axes, axis=1, keepdims=True), degrees=True
    )
    given = (
        (rots @ turns.as_matrix()).astype(np.float32),
        (trans + shift_px * rng.standard_normal(trans.shape) / 17).astype(np.float32),
    )

    def median_errors(found, shifts):
        u, _, w = np.linalg.svd(np.einsum("nij,nik->jk", rots, found))
        rest = found @ (u @ w).T @ rots.transpose(0, 2, 1)  # the object may turn as a whole
        angles_deg = np.degrees(Rotation.from_matrix(rest).magnitude())
        return np.median(angles_deg), np.median(np.linalg.norm(17 * (shifts - trans), axis=1))

    run = train(
        {**flags, "particles": str(rigid / "particles.mrcs"), "ctf": str(rigid / "ctf.pkl")},
        poses=write_pickle(rigid / "wrong.pkl", given), encoder="vlt", zdim=1, pdim=32, lr=3e-3,
        batch_size=6, num_epochs=22, checkpoint=22, do_pose_sgd=True, pretrain=9, pose_lr=pose_lr,
    )  # fmt: skip
    before = median_errors(*given)
    after = median_errors(*read_pickles(run.folder / "pose.pkl"))
    if angle_deg:
        assert before[0] > 7.5
        assert after[0] < 0.6 * before[0]
    else:
        assert before[1] > 1.1
        assert after[1] < 0.6 * before[1]


def test_a_resumed_run_ends_with_the_same_bits(train, flags, tmp_path):
    more = {"encoder": "vlt", "do_pose_sgd": True, "pose_lr": 0.01, "num_epochs": 4}
    whole = train(flags, **more, outdir=str(tmp_path / "whole"))
    train(flags, **more)
    run = tmp_path / "run"
    assert (run / "pose.pkl").read_bytes() == (run / "pose.4.pkl").read_bytes()
    parts = train(flags, **more, load=str(run / "weights.2.pkl"))
    assert parts.poses is not None
    assert same(*(read_weights(r / "weights.pkl", "") for r in (whole.folder, run)))
    assert (run / "pose.pkl").read_bytes() == (whole.folder / "pose.pkl").read_bytes()
    sums = (run / CHECKSUMS).read_text()
    assert all(f" pose{epoch}.pkl\n" in sums for epoch in ("", ".1", ".2", ".3", ".4"))
    with pytest.raises(InputError, match="its poses were refined; go on with --do-pose-sgd"):
        train(flags, encoder="vlt", num_epochs=5, load="latest")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["dataset_args"]["do_pose_sgd"] is True


def test_epochs_that_are_trained_again_lose_their_poses(train, flags, tmp_path, monkeypatch):
    """As their weights do: a run that goes on from epoch 1 has no poses of the old epoch 3."""
    more = {"encoder": "vlt", "do_pose_sgd": True, "num_epochs": 3}
    train(flags, **more)
    run = tmp_path / "run"
    train(flags, **{**more, "num_epochs": 2}, load=str(run / "weights.1.pkl"))
    assert sorted(p.name for p in run.glob("pose.*")) == ["pose.1.pkl", "pose.2.pkl", "pose.pkl"]
    train(flags, encoder="vlt", num_epochs=1, overwrite=True)
    assert not list(run.glob("pose*"))


def test_rolling_back_takes_poses_back(train, flags, monkeypatch):
    from cryodrgn_amort.models import NotFiniteError
    from cryodrgn_amort.training import stepper as training

    step, count, checked = training.train_step, iter(range(1, 1000)), []

    def fails_once(model, optimizer, batch, *args, **kwargs):
        number = next(count)
        if number == 13:  # in the third epoch
            raise NotFiniteError
        if number in (6, 14):  # the first batch after a checkpoint
            rots, _ = read_pickles(folder / f"pose.{1 if number == 6 else 2}.pkl")
            np.testing.assert_array_equal(batch.rot.detach(), rots[batch.index])
            checked.append(number)
        return step(model, optimizer, batch, *args, **kwargs)

    folder = Path(flags["outdir"])
    monkeypatch.setattr(training, "train_step", fails_once)
    train(flags, encoder="vlt", num_epochs=3, on_nan="rollback", do_pose_sgd=True, pose_lr=0.01)
    assert checked == [6, 14]


@pytest.mark.parametrize("load", [None, "latest"])
def test_pretraining_leaves_poses_alone(train, flags, stack, load):
    more = {"encoder": "vlt", "do_pose_sgd": True, "pretrain": 3, "num_epochs": 3}
    run = train(flags, **more) if load is None else None
    if load:
        train(flags, **{**more, "num_epochs": 2})
        run = train(flags, **more, load=load)
    for epoch in (2, 3):
        rots, trans = read_pickles(run.folder / f"pose.{epoch}.pkl")
        moved = np.abs(rots - stack.rots).max(), np.abs(trans - stack.trans).max()
        assert max(moved) < 1e-6 if epoch == 2 else min(moved) > 1e-5


def test_everything_reads_the_refined_poses(train, flags, stack, plugins, tmp_path, cli):
    """The run's own particles have them; those held out, and new ones, those that are given."""
    run = train(
        flags, qdim=16, do_pose_sgd=True, pose_lr=0.03, holdout="0.2", ind=write_pickle(
            tmp_path / "ind.pkl", np.random.default_rng(1).permutation(70)[:50]
        ),
    ).folder  # fmt: skip
    kept, held = (read_pickles(run / f"ind_{name}.pkl") for name in ("train", "heldout"))
    rots, trans = read_pickles(run / "pose.2.pkl")
    assert len(rots) == len(trans) == len(kept) == 40
    assert np.abs(rots - stack.rots[kept]).max() > 0.02
    opened = load_run(run, plugins)
    particles = opened.particles()
    np.testing.assert_array_equal(particles.rots, rots)
    np.testing.assert_allclose(particles.trans, 17 * trans, rtol=1e-6)
    np.testing.assert_array_equal(opened.held_out().rots, stack.rots[held])
    np.testing.assert_array_equal(opened.particles(poses=stack.poses).rots, stack.rots[kept])
    epoch_1 = load_run(run, plugins, epoch=1).particles().rots
    np.testing.assert_array_equal(epoch_1, read_pickles(run / "pose.1.pkl")[0])
    assert not np.array_equal(epoch_1, rots)
    # the images that its latents were read off
    model, shown = opened.load(particles)
    with torch.no_grad():
        batch = BatchLoader(particles, shown, memory=0).read(torch.arange(40))
        mean, _ = model.posterior(batch)
    np.testing.assert_allclose(mean, opened.z()[0], rtol=1e-3, atol=1e-5)

    code, _, err = cli("infer_amort", run, "-o", tmp_path / "fit", "--steps", "2")
    assert code == 0, err
    np.testing.assert_array_equal(load_run(tmp_path / "fit", plugins).particles().rots, rots)
    code, _, err = cli("infer_amort", run, "-o", tmp_path / "out", "--steps", "2", "--held-out")
    assert code == 0, err
    found = load_run(tmp_path / "out", plugins).particles().rots
    np.testing.assert_array_equal(found, stack.rots[held])

    code, _, err = cli("train_amort", "--from", run, "--encoder", "sleep", "-o", tmp_path / "next")
    assert code == 2
    assert "its poses were refined: say by --poses which ones" in err
    (run / "pose.2.pkl").unlink()
    with pytest.raises(InputError, match=r"RUN .*pose\.2\.pkl: no such file"):
        opened.particles()


def test_a_run_of_the_host_goes_on_with_its_poses(stack, plugins, tmp_path, cli):
    files = ["--poses", stack.poses, "--ctf", stack.ctf, "--pose-lr"]
    run_host("train_vae", *refining(stack, tmp_path / "host", *files, "0.05"))
    host = load_run(tmp_path / "host", plugins)
    rots, _ = read_pickles(tmp_path / "host/pose.3.pkl")
    np.testing.assert_array_equal(host.particles().rots, rots)
    assert np.abs(rots - stack.rots).max() > 0.1
    more = ["0.001", "-n", "4", "--load", tmp_path / "host/weights.3.pkl"]
    argv = refining(stack, tmp_path / "ours", *files, *more)
    code, _, err = cli(
        "train_amort", *(w for w in argv if w not in ("--do-pose-sgd", "--pose-lr", "0.001"))
    )
    assert code == 2
    assert "its poses were refined; go on with --do-pose-sgd" in err
    code, _, err = cli("train_amort", *argv)
    assert code == 0, err
    moved = np.abs(read_pickles(tmp_path / "ours/pose.4.pkl")[0] - rots).max()
    assert 1e-4 < moved < 0.02  # one visit from the host's


def test_several_processes_are_refused(train, flags, monkeypatch):
    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.training import trainer as training

    monkeypatch.setattr(training, "join", lambda: ProcessGroup(0, 2))
    with pytest.raises(InputError, match="--do-pose-sgd: not with several processes"):
        train(flags, do_pose_sgd=True)
