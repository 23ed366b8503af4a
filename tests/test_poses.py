"""Poses that are refined: the host's ``train_vae --do-pose-sgd`` is the oracle where it goes."""

import numpy as np
import pytest
import torch
from helpers import read_pickles, run_host, write_pickle


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
    ids=["ctf", "rotations-pretrain-ind", "corners"],
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
