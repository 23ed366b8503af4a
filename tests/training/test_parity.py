"""The baseline against the host's own ``train_vae``, same seed: the oracle of the training step."""

import re

import numpy as np
import pytest
import torch
from helpers import read_pickles, run_host, write_pickle

pytestmark = pytest.mark.usefixtures("two_threads")


def epoch_losses(run_log):
    line = r"Epoch: (\d+) Average gen loss = (\S+), KLD = (\S+), total loss = ([0-9.]+);"
    return np.array([[float(v) for v in m] for m in re.findall(line, run_log.read_text())])


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--ctf", "CTF", "--ind", "IND", "--shuffle-seed", "5", "--checkpoint", "2"],
        ["--ctf", "CTF", "--encode-mode", "mlp", "--domain", "hartley", "--beta", "0.5"],
        ["--ctf", "CTF", "--lazy", "--num-workers", "0", "--pe-type", "geom_lowf", "--wd", "1e-3"],
        ["--ctf", "CTF", "--no-window", "--uninvert-data", "--norm", "0", "20", "--enc-mask", "-1"],
    ],
    ids=["plain", "ind-ctf-shuffle", "mlp-hartley", "lazy-geom-wd", "no-window-norm"],
)
def test_baseline_equals_train_vae(more, stack, tmp_path, cli):
    ind = write_pickle(tmp_path / "ind.pkl", np.random.default_rng(1).permutation(70)[:51])
    more = [{"CTF": stack.ctf, "IND": ind}.get(word, word) for word in more]
    common = [
        stack.particles, "--poses", stack.poses, "--zdim", "3", "-n", "3", "--seed", "11",
        "--enc-dim", "24", "--dec-dim", "24", "--enc-layers", "2", "--dec-layers", "2",
        "--lr", "1e-3", "--no-analysis", *more,
    ]  # fmt: skip
    run_host("train_vae", *common, "-o", tmp_path / "host")
    code, _, err = cli("train_amort", *common, "-o", tmp_path / "ours")
    assert code == 0, err

    host, ours = (
        torch.load(tmp_path / name / "weights.pkl", weights_only=False)["model_state_dict"]
        for name in ("host", "ours")
    )
    assert list(host) == list(ours)
    for name in host:
        assert (ours[name] - host[name]).norm() <= 1e-4 * host[name].norm(), name
    for a, b in zip(
        read_pickles(tmp_path / "host/z.pkl", 2),
        read_pickles(tmp_path / "ours/z.pkl", 2),
        strict=True,
    ):
        assert np.linalg.norm(b - a) <= 1e-4 * np.linalg.norm(a)
    losses = epoch_losses(tmp_path / "host/run.log")
    assert len(losses) == 3
    np.testing.assert_allclose(epoch_losses(tmp_path / "ours/run.log"), losses, rtol=1e-4)
