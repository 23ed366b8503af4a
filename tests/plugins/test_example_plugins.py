"""The worked examples of plugins: installed for real, used by real commands."""

import csv
import importlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_pickles, run_host
from scipy.spatial.transform import Rotation

from cryodrgn_amort.data import ParticleSource, Transform, load_particles
from cryodrgn_amort.evaluation.codec import Codec
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.plugins import load_plugins
from cryodrgn_amort.runs import load_run
from cryodrgn_amort.simulation import simulate

EXAMPLES = Path(__file__).parents[2] / "examples/plugins"
N, BOX = 120, 24
C = BOX // 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the examples into a folder of their own, where all our commands find them."""
    target, source = (tmp_path_factory.mktemp(name) for name in ("site", "source"))
    folders = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
    assert len(folders) == 4
    copies = [shutil.copytree(path, source / path.name) for path in folders]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", target, *copies],
        check=True,
    )  # fmt: skip
    before = set(sys.modules)
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    load_plugins.cache_clear()
    yield load_plugins()
    sys.path.remove(str(target))
    load_plugins.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("amort_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def command(installed, tmp_path_factory):
    """Return a training of ``--encoder conv`` on simulated particles, but for -n and -o."""
    data = tmp_path_factory.mktemp("data")
    simulate(SimulateOptions(outdir=str(data), n=N, heldout=0, D=BOX, snr=0.5))
    return [
        "train_amort", data / "particles.mrcs", "--poses", data / "poses.pkl",
        "--ctf", data / "ctf.pkl", "--zdim", "3", "--dec-dim", "32", "--dec-layers", "1",
        "--lr", "1e-2", "--seed", "4", "--no-analysis", "--encoder", "conv",
        "--conv-channels", "4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """Train for two epochs; returns the run folder."""
    from cryodrgn_amort.cli import main

    folder = tmp_path_factory.mktemp("conv") / "run"
    main([*map(str, command), "-n", "2", "-o", str(folder)])
    return folder


def test_they_are_listed_unless_switched_off(installed, cli, monkeypatch):
    code, out, err = cli("amort_plugins")
    assert (code, err) == (0, "")
    for line in (
        "conv (amort-conv 0.1.0)", "mirror (amort-mirror 0.1.0)",
        "nearest (amort-nearest 0.1.0)", "tensorboard (amort-tensorboard 0.1.0)",
        "hooks          batch_end, checkpoint_written, ",
    ):  # fmt: skip
        assert line in out
    monkeypatch.setenv("CRYODRGN_AMORT_DISABLE_PLUGINS", "1")
    with monkeypatch.context() as patch:
        patch.setattr("cryodrgn_amort.cli.amort_plugins.load_plugins", load_plugins.__wrapped__)
        assert "conv" not in cli("amort_plugins")[1]


def test_the_flag_of_the_encoder_is_checked(command, cli, tmp_path):
    common = [*command, "-n", "1", "-o", tmp_path / "run"]
    code, _, err = cli(*common, "--encoder", "vlt")
    assert (code, err.count("\n")) == (2, 1)
    assert "--conv-channels: does not apply to --encoder vlt" in err
    code, _, err = cli(*common, "--conv-channels", "0")
    assert (code, err.count("\n")) == (2, 1)
    assert "--conv-channels 0: must be between 1 and 1024" in err
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_encoder_goes_on_as_if_it_had_not_been_interrupted(
    installed, run, command, cli, tmp_path
):
    for more in (["-n", "1"], ["-n", "2", "--load", "latest"]):
        code, _, err = cli(*command, *more, "-o", tmp_path / "again")
        assert code == 0, err
    models = []
    for folder in (run, tmp_path / "again"):
        opened = load_run(folder, installed)
        models.append(opened.load(opened.particles())[0])
    one, two = (model.amort.state_dict() for model in models)
    start = installed.encoder("conv").make(opened.settings, opened.particles()).state_dict()
    assert one.keys() == two.keys() == start.keys()
    for name in one:
        assert torch.equal(one[name], two[name])
        assert not torch.equal(one[name], start[name])


def test_a_run_of_the_encoder_is_evaluated_and_its_answers_are_taken(run, cli, tmp_path):
    code, _, err = cli(
        "eval_amort", run, "--transform", "mirror", "--no-umap", "--bootstrap", "2", "--fit", "0",
        "--labelled", "2", "--volumes", "4", "-o", tmp_path / "eval",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "eval/amortization.json").read_text())
    assert found["transforms"].keys() == {"mirror.held", "mirror.follow"}
    for part in found["transforms"].values():
        assert abs(part["measures"]["control"]["value"]) < 1e-3
    code, _, err = cli(
        "infer_amort", run, "--start", "encoder", "--steps", "0", "-o", tmp_path / "told"
    )
    assert code == 0, err
    told, z = (read_pickles(folder / "z.2.pkl", 2) for folder in (tmp_path / "told", run))
    for a, b in zip(told, z, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.ptp(b, axis=0).min() > 1e-6


def test_a_second_stage_of_a_plugin_learns_from_what_a_decoder_makes_up(command, cli, tmp_path):
    """It tells latents apart, goes on, and is evaluated with its templates, as ``anchored`` is."""
    first, second = tmp_path / "vlt", tmp_path / "nearest"
    ours = command.index("--encoder")
    table = [*command[:ours], "--encoder", "vlt", "-n", "20", "-o", first]
    given = ["train_amort", "--from", first, "--encoder", "nearest", "-b", "32", "--seed", "1",
             "--no-analysis", "-o", second]  # fmt: skip
    for more in (table, [*given, "-n", "1"], [*given, "-n", "2", "--load", "latest"]):
        code, _, err = cli(*more)
        assert code == 0, err
    code, _, err = cli(*command[:ours], "--encoder", "nearest", "-n", "1", "-o", tmp_path / "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "--encoder nearest: needs a finished run, --from RUN" in err
    with open(second / "metrics.csv") as handle:
        explained = [float(row["latent_r2"]) for row in csv.DictReader(handle)]
    assert len(explained) == 2
    assert explained[1] > 0.5
    state = torch.load(second / "weights.2.pkl", weights_only=True)["amort"]["encoder_state_dict"]
    assert not torch.equal(state["precision"], torch.ones_like(state["precision"]))
    assert len(state["templates"].unique(dim=0)) == 16
    code, _, err = cli(
        "eval_amort", second, "--transform", "roll:1", "--no-umap", "--bootstrap", "2", "--fit",
        "2", "--labelled", "2", "--volumes", "2", "-o", tmp_path / "eval",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "eval/amortization.json").read_text())
    assert 0 <= found["measures"]["coverage_50"]["value"] <= 1


def test_the_stock_host_decodes_such_a_run_and_refuses_to_encode_with_it(run, command, tmp_path):
    weights, config = run / "weights.2.pkl", run / "config.yaml"
    run_host("eval_vol", weights, "-c", config, "-z", "0", "0", "0", "-o", tmp_path / "vol.mrc")
    assert (tmp_path / "vol.mrc").stat().st_size > 4 * BOX**3
    with pytest.raises(Exception, match="nan"):
        run_host(
            "eval_images", *command[1:2], weights, "-c", config, *command[2:6],
            "-o", tmp_path / "out.pkl", "--out-z", tmp_path / "z.pkl",
        )  # fmt: skip


def pixel(row, col):
    image = torch.zeros(1, BOX, BOX)
    image[0, row, col] = 1
    return image


def where(image):
    (found,) = (image[0] > 0.5 * image.max()).nonzero()
    return tuple(found.tolist())


def test_what_a_convolution_sees_is_the_particle_in_real_space(command):
    source = ParticleSource(
        *map(str, (command[1], command[3])), window=False, invert_data=False, norm=(0.0, 1.0)
    )
    for whole in (True, False):  # without the corners of Fourier space, a pixel is a spot
        particles = load_particles(source, whole=whole)
        shown = particles.centre(particles.hartley(pixel(5, 3)), None)
        assert where(particles.real(shown)) == (5, 3)
        noise = torch.randn(20, shown.shape[1], generator=torch.Generator().manual_seed(0))
        if whole:
            torch.testing.assert_close(particles.real(shown), BOX * pixel(5, 3), rtol=0, atol=1e-4)
            assert float(particles.real(noise).var()) == pytest.approx(1, abs=0.05)


@pytest.fixture
def mirror(installed):
    return installed.transform("mirror").build(None, None)


def test_a_mirrored_pixel_is_as_far_on_the_other_side(mirror):
    assert where(mirror.image(pixel(5, C + 3))) == (5, C - 3)
    assert where(mirror.image(pixel(C, C))) == (C, C)
    assert where(mirror.image(pixel(7, 0))) == (7, 0)  # has no other side


@pytest.mark.parametrize("seed", range(3))
def test_a_mirrored_projection_is_the_projection_from_behind(mirror, seed):
    """Of a chiral molecule: points in space, projected to spots without any mirror."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.uniform(-5, 5, (4, 3)))
    axis = torch.arange(BOX, dtype=torch.float64) - C

    def project(rot, trans_px):
        x, y = ((points @ rot[0].T)[:, :2] - trans_px).T[..., None]
        spots = [torch.exp(-((axis - at) ** 2) / 4) for at in (y, x)]
        return torch.einsum("py,px->yx", *spots)[None]

    rot = torch.from_numpy(Rotation.random(random_state=rng).as_matrix())[None]
    trans = torch.from_numpy(rng.uniform(-2, 2, (1, 2)))
    moved_rot, moved_trans = mirror.pose(rot, trans)
    assert torch.linalg.det(moved_rot).item() == pytest.approx(1)  # no other hand
    mirrored = mirror.image(project(rot, trans))
    torch.testing.assert_close(mirrored, project(moved_rot, moved_trans), rtol=0, atol=1e-6)
    assert (mirrored - project(rot, moved_trans)).abs().max() > 0.1


def test_mirroring_goes_with_the_ctf_and_with_preprocessing(mirror, command):
    source = ParticleSource(*map(str, (command[1], command[3], command[5])))
    particles = load_particles(source, whole=True)
    raw, y = particles.raw(torch.arange(9)), particles.hartley(particles.raw(torch.arange(9)))
    exact = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mirror.hartley(y), particles.hartley(mirror.image(raw)), **exact)
    params = particles.ctf_params[:9].clone()
    params[:, 2] += 4000  # strong astigmatism
    params[:, 3] = torch.arange(9) * 20.0
    grid = -1, particles.D, particles.D
    before, after = (particles.ctf_of(p).view(grid) for p in (params, mirror.ctf(params.clone())))
    torch.testing.assert_close(after, before.flip(-1), rtol=0, atol=2e-3)  # float32 phases
    assert not torch.allclose(after, before, atol=0.1)


def test_the_control_of_the_mirror_is_0(mirror, run, installed):
    opened = load_run(run, installed)
    particles = opened.particles()
    codec = Codec(particles, *opened.load(particles), 256)
    zs, sample = {"z": opened.z()[0]}, np.arange(particles.n)
    losses = codec.losses(zs, sample)["z"]
    np.testing.assert_allclose(codec.losses(zs, sample, mirror)["z"], losses, rtol=1e-4)

    class ImageAlone(type(mirror)):
        pose = Transform.pose  # the molecule of the other hand

    assert codec.losses(zs, sample, ImageAlone())["z"].mean() > 1.02 * losses.mean()


def test_the_mirror_takes_no_argument(run, cli):
    code, _, err = cli("eval_amort", run, "--transform", "mirror:3")
    assert (code, err.count("\n")) == (2, 1)
    assert "--transform mirror:3: mirror takes no argument" in err


def events(folder):
    """Read what TensorBoard would show: tag -> steps and values; and steps of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    return scalars, {tag: [e.step for e in log.Images(tag)] for tag in log.Tags()["images"]}


def test_tensorboard_shows_what_is_in_metrics_csv(command, cli, tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    common = [*command, "-b", "50", "--lr-end", "1e-4", "--tensorboard", "-o", folder]
    # two trainings of one run, of which the first has gone further than its last checkpoint
    for more in (["-n", "3", "--checkpoint", "2"], ["-n", "4", "--load", folder / "weights.2.pkl"]):
        code, _, err = cli(*common, *more)
        assert code == 0, err
    scalars, images = events(folder / "tensorboard")
    with open(folder / "metrics.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    ends = [N, 2 * N, 3 * N, 4 * N]
    for name in rows[0]:
        logged = scalars[f"epoch/{name}"]
        assert [step for step, _ in logged] == ends
        expected = [float(row[name]) for row in rows]
        assert [value for _, value in logged] == pytest.approx(expected, rel=1e-5)
    rates = [value for _, value in scalars["epoch/lr"]]
    assert rates[0] == pytest.approx(1e-2)
    assert sorted(rates, reverse=True) == rates
    assert images["z"] == [2 * N, 3 * N, 4 * N]
    sizes = [50, 50, 20]
    for tag, column in (("loss", "loss"), ("gen_loss", "gen_loss"), ("kld", "kld")):
        logged = scalars[f"batch/{tag}"]
        assert [step for step, _ in logged] == np.cumsum(sizes * 4).tolist()
        means = np.reshape([value for _, value in logged], (4, 3)) @ np.array(sizes) / N
        assert means == pytest.approx([float(row[column]) for row in rows], rel=1e-4)
