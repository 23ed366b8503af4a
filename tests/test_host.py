"""Runs as stock cryodrgn sees them. The host's commands know nothing of this package."""

import argparse
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import read_pickles, run_host, write_pickle, write_stack

from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import ParticleSource, load_particles
from cryodrgn_amort.training.encoding import encode


@pytest.fixture(scope="module")
def runs(stack, tmp_path_factory, plugins):
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    folders = {}
    for encoder in ("resid", "vlt", "twin"):
        more = {} if encoder == "vlt" else {"qdim": 16}
        folder = tmp_path_factory.mktemp(encoder) / "run"
        flags = {
            "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "zdim": 3,
            "pdim": 16, "players": 1, "num_epochs": 2, "do_analysis": False, "seed": 1,
            "encoder": encoder, "outdir": str(folder), **more,
        }  # fmt: skip
        trainer = Trainer(settings_from_flags(flags, plugins), plugins)
        trainer.fit()
        folders[encoder] = trainer
    return folders


@pytest.mark.parametrize("encoder", ["resid", "vlt", "twin"])
def test_volumes_are_those_of_our_decoder(runs, encoder, tmp_path):
    from cryodrgn.mrcfile import parse_mrc

    trainer = runs[encoder]
    z = encode(trainer)[0]
    np.savetxt(tmp_path / "z.txt", z[:2])
    run_host(
        "eval_vol", trainer.folder / "weights.2.pkl", "-c", trainer.folder / "config.yaml",
        "--zfile", tmp_path / "z.txt", "-o", tmp_path / "vols",
    )  # fmt: skip
    found = sorted((tmp_path / "vols").glob("*.mrc"))
    assert len(found) == 2
    p = trainer.particles
    ours = trainer.model.eval().decode_volumes(torch.from_numpy(z[:2]), p.norm)
    for path, volume in zip(found, ours, strict=True):
        theirs = parse_mrc(str(path))[0]
        np.testing.assert_allclose(volume, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("pe_type", ["gaussian", "geom_lowf", "linear_lowf"])
@pytest.mark.parametrize("domain", ["fourier", "hartley"])
def test_volumes_equal_the_hosts_for_every_decoder(train, flags, domain, pe_type):
    from cryodrgn_amort import host

    trainer = train(flags, encoder="vlt", num_epochs=1, domain=domain, pe_type=pe_type)
    model, p = trainer.model.eval(), trainer.particles
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    for ours, latent in zip(model.decode_volumes(z, p.norm), z.numpy(), strict=True):
        theirs = host.eval_volume(model.decoder, p.lattice, p.norm, latent)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_eval_images_agrees_for_a_network_and_refuses_a_table(runs, stack, tmp_path):
    def evaluate(encoder):
        folder = runs[encoder].folder
        run_host(
            "eval_images", stack.particles, folder / "weights.2.pkl", "-c", folder / "config.yaml",
            "--poses", stack.poses, "--ctf", stack.ctf, "-o", tmp_path / encoder / "out.pkl",
            "--out-z", tmp_path / encoder / "z.pkl",
        )  # fmt: skip

    evaluate("resid")
    theirs = read_pickles(tmp_path / "resid/z.pkl", 2)
    for a, b in zip(theirs, encode(runs["resid"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="nan"):
        evaluate("vlt")
    assert not (tmp_path / "vlt/z.pkl").exists()


@pytest.mark.parametrize("encoder", ["vlt", "twin"])
def test_analyze_and_traversals(runs, encoder, tmp_path):
    folder = runs[encoder].folder
    run_host("analyze", folder, 2, "--skip-umap", "--ksample", "3", "--pc", "1")
    out = folder / "analyze.2"
    assert len(list((out / "kmeans3").glob("vol_*.mrc"))) == 3
    run_host("pc_traversal", folder / "z.2.pkl", "-o", tmp_path / "pc", "--pc", "1")
    assert any((tmp_path / "pc").iterdir())
    run_host(
        "graph_traversal", folder / "z.2.pkl", "--anchors", "0", "5", "9",
        "--max-neighbors", "60", "--avg-neighbors", "60",
        "-o", tmp_path / "path.txt", "--outind", tmp_path / "ind.txt",
    )  # fmt: skip
    assert np.loadtxt(tmp_path / "path.txt").shape[1] == 3


def test_training_ends_with_the_hosts_analysis(stack, tmp_path, cli):
    code, _, err = cli(
        "train_amort", stack.particles, "--poses", stack.poses, "--zdim", "1", "-n", "3",
        "--checkpoint", "2", "--encoder", "vlt", "--dec-dim", "8", "--dec-layers", "1",
        "-o", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "run/analyze.3").is_dir()


@pytest.mark.parametrize(
    ("n", "zdim", "says"),
    [
        (1, 2, "its principal components need 2 particles, there are 1"),
        (3, 3, "k-means has 3 clusters, one for each particle; UMAP needs more than 15 particles"),
    ],
)
def test_few_particles_are_analyzed_as_far_as_it_goes(n, zdim, says, tmp_path, cli, caplog):
    few = write_stack(tmp_path / "few", n)
    code, _, err = cli(
        "train_amort", few.particles, "--poses", few.poses, "--zdim", zdim, "-n", "1",
        "--encoder", "vlt", "--dec-dim", "8", "--dec-layers", "1", "-o", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert f"cryodrgn analyze, not all of it: {says}" in caplog.text
    assert (tmp_path / "run/analyze.1/kmeans3/labels.pkl").exists() == (n == 3)


def test_an_analysis_that_fails_takes_nothing_with_it(train, flags, monkeypatch, caplog):
    from cryodrgn.commands import analyze

    def fail(_):
        raise ValueError("n_samples=70 should be\nmore")

    monkeypatch.setattr(analyze, "main", fail)
    trainer = train(flags, do_analysis=True)
    assert "not all of it: ValueError: n_samples=70 should be" in caplog.text
    assert (trainer.folder / "z.pkl").exists()


@pytest.mark.parametrize("name", ["A.MRCS", "a.map", "a.st", "A.ST"])
def test_stacks_are_read_by_other_names(name, stack, tmp_path):
    """What the header confirms is read; other suffixes and other contents are refused."""
    path = tmp_path / name
    shutil.copy(stack.particles, path)
    own = load_particles(ParticleSource(str(path), stack.poses, stack.ctf, ind=None))
    theirs = load_particles(ParticleSource(stack.particles, stack.poses, stack.ctf))
    index = torch.arange(9)
    np.testing.assert_array_equal(own.raw(index), theirs.raw(index))
    chosen = write_pickle(tmp_path / "ind.pkl", np.array([5, 3, 60]))
    some = load_particles(ParticleSource(str(path), stack.poses, stack.ctf, ind=chosen))
    np.testing.assert_array_equal(some.raw(torch.arange(3)), theirs.raw(torch.tensor([5, 3, 60])))
    path.write_bytes(b"no stack" * 500)
    with pytest.raises(InputError, match="cannot be read"):
        load_particles(ParticleSource(str(path), stack.poses))


def test_tables_of_stacks_are_read_by_other_names(stack, tmp_path):
    (tmp_path / "A.TXT").write_text(f"{stack.particles}\n")
    own = load_particles(ParticleSource(str(tmp_path / "A.TXT"), stack.poses))
    np.testing.assert_array_equal(own.raw(torch.arange(2)), stack.images[:2])
    (tmp_path / "A.STAR").write_text("data_\n")
    with pytest.raises(InputError, match=r"A\.STAR: the host wants \.star in small letters"):
        load_particles(ParticleSource(str(tmp_path / "A.STAR"), stack.poses))


def test_a_stock_run_is_measured_like_ours(stack, tmp_path, train, flags, plugins):
    """The same training by the host and by us: the same measures."""
    from cryodrgn_amort.evaluation import evaluate
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import load_run

    run_host(
        "train_vae", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", "3",
        "-o", tmp_path / "stock", "-n", "2", "--enc-dim", "16", "--dec-dim", "16", "--lr", "1e-3",
        "--dec-layers", "1", "--seed", "3", "--no-analysis",
    )  # fmt: skip
    ours = train(flags, qdim=16).folder
    options = EvalOptions(bootstrap=0, umap=False, volumes=4, labelled=2, fit=2)
    a, b = (evaluate(load_run(f, plugins), options) for f in (tmp_path / "stock", ours))
    assert len(a.results) == 4
    for one, two in zip(a.results, b.results, strict=True):
        assert one.key == two.key
        for name, measure in one.measures.items():
            assert measure.value == pytest.approx(two.measures[name].value, rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(a.z, read_pickles(tmp_path / "stock/z.pkl", 2)[0], atol=1e-5)


class Newer:
    """The host as its unreleased branch has it: what ours must survive.

    It relaunches itself by ``torch.distributed.run`` with ``--_args-file``, has new arguments of
    ``make_dataloader``, and wraps its model for several GPUs.
    """

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def add_args(self, parser):
        self._module.add_args(parser)
        parser.add_argument("--_args-file", help=argparse.SUPPRESS)
        parser.add_argument("--prefetch-factor", type=int, default=2, help="Batches read ahead")

    def main(self, args):
        raise AssertionError("ours must not start the host's training")


@pytest.fixture
def newer(monkeypatch):
    from cryodrgn_amort import host

    found, made = Newer(host._train_vae()), host.make_dataloader

    def make_dataloader(
        data, *, batch_size, num_workers=0, shuffler_size=0, shuffle=False, seed=None,
        distributed=False, prefetch_factor=None,
    ):  # fmt: skip
        assert not distributed
        return made(data, batch_size=batch_size, num_workers=num_workers,
                    shuffler_size=shuffler_size, shuffle=shuffle, seed=seed)  # fmt: skip

    monkeypatch.setattr(host, "_train_vae", lambda: found)
    monkeypatch.setattr(host, "make_dataloader", make_dataloader)
    host.train_vae_defaults.cache_clear()
    yield host
    host.train_vae_defaults.cache_clear()


@pytest.mark.parametrize("encoder", ["resid", "vlt"])
def test_a_newer_host_trains_and_times_as_this_one(newer, encoder, train, flags, stack, tmp_path):
    more = {} if encoder == "vlt" else {"qdim": 16}
    trainer = train(flags, encoder=encoder, **more)
    config = yaml.safe_load((trainer.folder / "config.yaml").read_text())
    assert config["dataset_args"]["particles"] == stack.particles
    run_host("eval_vol", trainer.folder / "weights.pkl", "-c", trainer.folder / "config.yaml",
             "-z", 0, 0, 0, "-o", tmp_path / "vol.mrc")  # fmt: skip
    steps = newer.training_steps(
        stack.particles, stack.poses, stack.ctf, zdim=3, width=16, layers=1, batch_size=8
    )
    assert [next(steps) for _ in range(2)] == [8, 8]


def test_a_flag_that_only_a_newer_host_knows_is_refused_by_name(newer, flags, plugins):
    from cryodrgn_amort.cli import train_amort
    from cryodrgn_amort.runs import settings_from_flags

    parser = argparse.ArgumentParser()
    train_amort.add_args(parser)
    assert "_args-file" not in parser.format_help()
    base = ["p.mrcs", "-o", "out", "--zdim", "3", "--poses", "poses.pkl"]
    settings_from_flags(vars(parser.parse_args(base)), plugins)
    given = vars(parser.parse_args([*base, "--prefetch-factor", "4"]))
    with pytest.raises(InputError, match="--prefetch-factor: a flag of cryodrgn 4") as refusal:
        settings_from_flags(given, plugins)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("encoder", ["resid", "vlt"])
def test_weights_of_a_model_wrapped_for_several_gpus_are_read(runs, encoder, tmp_path, plugins):
    """DistributedDataParallel and DataParallel put ``module.`` before every name."""
    from cryodrgn_amort.runs import load_run

    folder = tmp_path / "run"
    shutil.copytree(runs[encoder].folder, folder)
    (folder / "checksums.sha256").unlink()
    for path in folder.glob("weights*.pkl"):
        checkpoint = torch.load(path, weights_only=False)
        state = checkpoint["model_state_dict"]
        checkpoint["model_state_dict"] = {f"module.{name}": v for name, v in state.items()}
        torch.save(checkpoint, path)
    before, after = (load_run(f, plugins) for f in (runs[encoder].folder, folder))
    z = torch.zeros(1, 3)
    volumes = [
        next(iter(r.load_decoder()[0].decode_volumes(z, (0.0, 1.0)))) for r in (before, after)
    ]
    assert torch.equal(*volumes)


def test_what_only_notebooks_need_is_imported_when_it_is_used():
    code = (
        "import sys\n"
        "from cryodrgn_amort import host\n"
        "host.train_vae_defaults()\n"
        "assert 'jsonschema' not in sys.modules\n"
        "from cryodrgn.commands import analyze\n"
        "assert analyze.nbformat.NO_CONVERT is sys.modules['nbformat'].NO_CONVERT\n"
        "import nbformat.v4\n"
        "assert nbformat.v4.new_notebook() and 'jsonschema' in sys.modules\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
