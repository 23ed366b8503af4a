"""Evaluating a run: one reading and one transform where one will do, samples of large sets."""

import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import BOX, Volume

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import read_weights, recorded, write_weights, write_z
from cryodrgn_amort.data import Roll, Rotation, Transform, TransformSpec
from cryodrgn_amort.evaluation import calibration, codec as evaluation, evaluate
from cryodrgn_amort.evaluation.codec import Codec
from cryodrgn_amort.measures import latents as metrics
from cryodrgn_amort.models import AmortVAE, vae as model
from cryodrgn_amort.models.decoder import FastDecoder
from cryodrgn_amort.options import EvalOptions
from cryodrgn_amort.plugins import Plugins
from cryodrgn_amort.report import write_evaluation
from cryodrgn_amort.report.trust import trust_table
from cryodrgn_amort.report.verdict import verdict
from cryodrgn_amort.runs import load_run

N = 70


class Plain(Transform):
    """As a plugin has it: without a short cut."""

    def __init__(self, known):
        self.title, self.image, self.pose, self.ctf = "", known.image, known.pose, known.ctf

    def image(self, raw):
        """Be replaced."""


@pytest.fixture(scope="module")
def run(stack, plugins, tmp_path_factory):
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    folder = tmp_path_factory.mktemp("evaluation") / "run"
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf,
        "outdir": str(folder), "num_epochs": 1, "do_analysis": False, "seed": 0, "zdim": 3,
        "pdim": 16, "players": 1, "qdim": 16, "qlayers": 1,
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return load_run(folder, plugins)


@pytest.fixture
def codec(run):
    particles = run.particles()
    return Codec(particles, *run.load(particles), 32)


def test_quarter_turns_cost_neither_reading_nor_an_fft(codec, monkeypatch):
    transforms = [Roll(1), *(Rotation(angle) for angle in (90, 180, 270))]
    expected_calls = {"raw": 3, "hartley": 3 * 2, "ctf_of": 3 * 4}  # of three batches
    watched = {name: Mock(wraps=getattr(codec.particles, name)) for name in expected_calls}
    for name, watch in watched.items():
        monkeypatch.setattr(codec.particles, name, watch)
    z, _, copies = codec.encode([(t.title, t) for t in transforms])
    assert {name: watch.call_count for name, watch in watched.items()} == expected_calls
    again, _, expected = codec.encode([(t.title, Plain(t)) for t in transforms])
    np.testing.assert_array_equal(z, again)
    assert copies.keys() == expected.keys()
    for key, (mean, logvar) in copies.items():
        np.testing.assert_allclose(mean, expected[key][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logvar, expected[key][1], rtol=1e-4, atol=1e-5)
        assert mean.shape == (N, 3)
        assert np.abs(mean - z).max() > 1e-3


def test_reconstruction_of_turned_particles_is_that_of_their_turned_images(codec):
    zs = {"z": np.zeros((N, 3), np.float32)}
    turn, sample = Rotation(90), np.arange(0, 60, 3)
    losses, expected = (codec.losses(zs, sample, t)["z"] for t in (turn, Plain(turn)))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # pose and CTF turn with the image: nothing has changed
    np.testing.assert_allclose(losses, codec.losses(zs, sample)["z"], rtol=1e-5)
    assert losses.shape == (20,)


def test_a_transform_that_writes_into_what_it_is_given_spoils_nothing(codec):
    class Careless(Roll):
        def ctf(self, params):
            params[:, 7] += 180.0  # phase shift
            return params

    alone, _, _ = codec.encode([])
    z, _, copies = codec.encode([("careless", Careless(1)), ("roll", Roll(1))])
    _, _, expected = codec.encode([("roll", Roll(1))])
    np.testing.assert_array_equal(z, alone)
    for mode in ("held", "follow"):
        np.testing.assert_array_equal(copies[("roll", mode)][0], expected[("roll", mode)][0])
    assert not np.array_equal(copies[("careless", "follow")][0], copies[("roll", "follow")][0])


def test_of_many_particles_a_sample_is_looked_up_among_all(run, tmp_path, monkeypatch):
    labels = tmp_path / "labels.pkl"
    labels.write_bytes((np.arange(N) % 3).dumps())
    options = EvalOptions(
        transforms=("roll:1",), labels=str(labels), umap=False, volumes=2, labelled=2, sample=20,
        bootstrap=20, fit=4,
    )  # fmt: skip
    whole = evaluate(run, options)
    monkeypatch.setattr(metrics, "MOST_QUERIES", 30)
    some = evaluate(run, options)
    assert some.measures["class_knn"].n == 30
    for full, sampled in zip(whole.results, some.results, strict=True):
        rank = sampled.arrays["retrieval_rank"]
        looked_up = np.isfinite(rank)
        np.testing.assert_array_equal(np.flatnonzero(looked_up), metrics.looked_up(N))
        np.testing.assert_array_equal(rank[looked_up], full.arrays["retrieval_rank"][looked_up])
        assert sampled.measures["retrieval_rank"].value == rank[looked_up].mean()
        assert sampled.measures["top1"].null == 1 / N
        numbers = {name: m.n for name, m in sampled.measures.items()}
        for name in ("retrieval_rank", "top1", "label_agreement"):
            assert numbers[name] == 30
            assert full.measures[name].n == N
        assert numbers["displacement"] == numbers["latent_correlation"] == N


@pytest.mark.parametrize("kept", [True, False])
def test_decoded_volumes_are_held_a_few_at_a_time(kept, run, monkeypatch):
    transforms = ("roll:1", "rotate:90", "roll:3")
    options = EvalOptions(transforms=transforms, umap=False, volumes=30, labelled=2, maps=1,
                          sample=20, bootstrap=0, fit=0)  # fmt: skip
    monkeypatch.setattr(AmortVAE, "decode_volumes", Volume.decoder(BOX))
    if not kept:
        monkeypatch.setattr(evaluation, "_VOXELS_KEPT", 0)
    found = evaluate(run, options)
    assert Volume.most <= (30 if kept else 0) + 8
    assert Volume.alive == 0
    assert [len(r.volumes) for r in found.results] == [2, 2, 0, 0, 0, 0]
    for result in found.results:
        assert result.volumes.base is None or result.volumes.base.size == result.volumes.size


def test_volumes_are_decoded_a_few_at_a_time(run, monkeypatch):
    z, sizes = run.z_mu[:7], []
    whole = run.volumes(z)
    values = FastDecoder.values

    def watched(decoder, coords, some):
        sizes.append(len(some))
        return values(decoder, coords, some)

    monkeypatch.setattr(FastDecoder, "values", watched)
    monkeypatch.setattr(model, "_VOXELS_AT_ONCE", 3 * (BOX + 1) ** 3)
    np.testing.assert_allclose(run.volumes(z), whole, rtol=1e-5, atol=1e-5 * whole.max())
    assert set(sizes) == {3, 1}
    assert run.volumes(z[:0]).shape == (0, BOX, BOX, BOX)


def test_a_collapsed_run_is_measured_without_a_division_by_zero(
    run, plugins, tmp_path, monkeypatch
):
    """Whatever the encoder is shown, it answers the same: warnings are errors here."""
    shutil.copytree(run.folder, tmp_path / "run")
    weights, latents = tmp_path / "run/weights.1.pkl", tmp_path / "run/z.1.pkl"
    kept = read_weights(weights, "")
    state = kept["model_state_dict"]
    last = max(name.rpartition(".")[0] for name in state if name.startswith("encoder."))
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name].zero_()
    with recorded(tmp_path / "run", weights.name, latents.name):
        write_weights(weights, 1, state, **kept["amort"])
        write_z(latents, np.zeros((N, 3)), np.zeros((N, 3)))
    monkeypatch.setattr(calibration, "IMAGES", 64)
    options = EvalOptions(transforms=("roll:1",), maps=0, umap=False, volumes=3, labelled=2,
                          sample=20, bootstrap=5, fit=2)  # fmt: skip
    found = evaluate(load_run(tmp_path / "run", plugins), options)
    assert (found.z == 0).all()
    for result in found.results:
        assert result.measures["retrieval_rank"].value == 0.5
        assert np.isnan(result.measures["volume_change"].value)
    write_evaluation(found, tmp_path / "out")
    assert "No latent dimension is active" in (tmp_path / "out/report.html").read_text()


def test_a_transform_of_a_plugin_says_that_it_is_a_control(run):
    class Slid(Transform):
        title, undone_by_centring = "slid", True
        image, pose = Roll(1).image, Roll(1).pose

    spec = TransformSpec("slide", "", lambda *_: Slid())
    plugin = SimpleNamespace(transforms=hookimpl(lambda: [spec]))
    run = replace(run, plugins=Plugins(found={"mine": plugin}))
    options = EvalOptions(
        transforms=("slide", "rotate:90"), umap=False, volumes=2, labelled=2, sample=20,
        bootstrap=0, fit=0,
    )  # fmt: skip
    found = evaluate(run, options)
    controls = {r.key: r.is_control for r in found.results}
    assert [key for key, control in controls.items() if control] == ["slide.follow"]
    said = verdict(found)
    assert ["A control" in line for line in said.lines] == list(controls.values())
    tests = [r.arrays["retrieval_rank"] for r in found.results if not r.is_control]
    np.testing.assert_array_equal(trust_table(found)["trust"], 1 - np.max(tests, 0))


def test_the_log_says_how_long_the_stages_took(run, caplog):
    options = EvalOptions(
        transforms=("roll:1",), umap=False, volumes=2, labelled=2, sample=20, fit=2
    )
    with caplog.at_level("INFO", "cryodrgn_amort"):
        evaluate(run, options)
    stages = ("measures", "encoding", "reconstruction", "volumes", "embeddings")
    line = next(m for m in caplog.messages if m.startswith("Evaluated in"))
    assert all(f"{stage} " in line for stage in stages)
