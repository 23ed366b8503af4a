"""On a GPU that is emulated (``emulated_gpu``): the same results, and how often the CPU waits."""

import collections
import contextlib
import itertools
import logging
import re
import statistics
from types import SimpleNamespace

import emulated_gpu
import numpy as np
import pytest
import torch
from emulated_gpu import DEVICE, EmulatedGpu, EmulatedGraph
from helpers import metrics, read_pickles, write_stack

from cryodrgn_amort.core import InputError, Stopped, devices, onednn
from cryodrgn_amort.host import write_mrc
from cryodrgn_amort.models import synthetic
from cryodrgn_amort.options import EvalOptions, InferOptions, SimulateOptions
from cryodrgn_amort.runs import load_run
from cryodrgn_amort.simulation import simulate
from cryodrgn_amort.training import Trainer, stepper, train_run

pytestmark = pytest.mark.skipif(
    not emulated_gpu.AVAILABLE, reason="PyTorch before 2.10 cannot have a device made in Python"
)

NETWORK = {"encoder": "resid", "qdim": 16}
# name: flags, and how many kernels a step may launch at most where it is not replayed
CASES = {
    "resid": (NETWORK, 190),
    "bf16": ({**NETWORK, "precision": "bf16"}, 210),
    "fp16": ({**NETWORK, "precision": "fp16"}, 215),
    "twin": ({"encoder": "twin", "qdim": 16}, 190),
    "noise": ({"encoder": "noise", "qdim": 16}, 190),
    "vlt": ({"encoder": "vlt"}, 210),
    "linear": ({"encoder": "vlt", "table_init": "linear"}, 210),
    "hartley": ({"encoder": "mlp", "qdim": 16, "domain": "hartley", "pe_type": "none"}, 175),
    "whole images": ({**NETWORK, "enc_mask": -1, "beta": "a", "beta_control": 1.0}, 200),
    "augment": ({**NETWORK, "augment": 2, "consistency": 0.5}, 450),
    "lazy": ({**NETWORK, "lazy": True}, 260),
    "sleep": ({"encoder": "sleep", "from_run": "first"}, 195),
    "anchored": ({"encoder": "anchored", "anchors": 4, "from_run": "first"}, 215),
    "alternate": ({"encoder": "alternate", "anchors": 4, "num_epochs": 4}, 230),
    "its encoder": ({"encoder": "alternate", "from_run": "first", "rounds": 1}, 230),
}
TILTS = {"encode_mode": "tilt", "ntilts": 3, "dose_per_tilt": 2.93}
CASES |= {
    "tilts": ({**TILTS, "encoder": "tilt", "qdim": 16, "tdim": 16, "t_emb_dim": 8}, 215),
    "tilts, drawn": ({**TILTS, "encoder": "vlt", "random_tilts": True}, 205),
}
NOT_REPLAYED = ("lazy",)  # preprocessed in every epoch
LEFT = 200_000_000  # of memory, in bytes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few synthetic images; one thread and one library, whose sums are those of the device."""
    monkeypatch.setattr(synthetic.SyntheticImages.__init__, "__defaults__", (16, 16, 1, None))
    monkeypatch.setattr(onednn, "read_fact", lambda *_: None)  # not AMD's, whose library is another
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.fixture
def emulate(monkeypatch):
    """Let commands find a GPU."""

    @contextlib.contextmanager
    def use(graph=True, free=LEFT):
        gpu = EmulatedGpu()
        with monkeypatch.context() as patch:
            patch.setattr(devices, "_gpu", lambda: DEVICE)
            patch.setattr(devices, "_free", lambda device: free)
            patch.setattr(EmulatedGraph, "gpu", gpu)
            if graph:
                patch.setattr(stepper, "Graph", EmulatedGraph)
            with gpu:
                yield gpu

    return use


@pytest.fixture(scope="module")
def given(stack, plugins, tmp_path_factory):
    """Flags of a training, and the folder of a first run that second stages start from."""
    folder = tmp_path_factory.mktemp("device")
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "zdim": 3,
        "pdim": 16, "players": 3, "seed": 3, "num_epochs": 1, "batch_size": 8, "do_analysis": False,
    }  # fmt: skip
    train_run({**flags, "encoder": "vlt", "outdir": str(folder / "first")}, plugins)
    simulate(SimulateOptions(str(folder / "tilts"), n=40, D=16, tilts=4, seed=1))
    names = {"particles": "particles.star", "poses": "poses.pkl", "ctf": "ctf.pkl"}
    tilts = {name: str(folder / "tilts" / file) for name, file in names.items()}
    return SimpleNamespace(flags=flags, tilts=tilts, folder=folder, plugins=plugins)


def trained(given, where, more):
    """Train; returns the latents of the run, and its folder."""
    flags = {"precision": "fp32", **given.flags, **more, "outdir": str(given.folder / where)}
    flags |= given.tilts if "ntilts" in more else {}
    if "from_run" in more:
        flags["from_run"] = str(given.folder / more["from_run"])
        for name in ("particles", "poses", "ctf", "zdim", "pdim", "players"):
            del flags[name]
    train_run({**flags, "overwrite": "load" not in more}, given.plugins)
    return read_pickles(given.folder / where / "z.pkl"), given.folder / where


def same(found, wanted, tolerance=1e-5):
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other, atol=tolerance * np.nanmax(np.abs(other)), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_training(case, given, emulate, monkeypatch):
    """Eager and replayed steps give what the CPU does; none waits, and all are the same work."""
    flags, most = CASES[case]
    wanted, _ = trained(given, f"{case}-cpu", flags)
    step, marks = Trainer._train_batch, []

    def counted(self, *args):
        step(self, *args)
        marks.append((gpu.launches, gpu.syncs.copy(), gpu.trace))
        gpu.trace = []

    with monkeypatch.context() as patch, emulate(graph=False) as gpu:
        patch.setattr(Trainer, "_train_batch", counted)
        eager, folder = trained(given, f"{case}-eager", flags)
    same(eager, wanted)
    of_a_step = marks[2][1] - marks[1][1]
    assert not of_a_step, of_a_step
    assert statistics.median(b[0] - a[0] for a, b in itertools.pairwise(marks)) <= most
    first, second = ([a for a in of[2] if a[0] != "fill_"] for of in marks[1:3])
    assert first == second  # but for beta, which is filled in before
    if case not in NOT_REPLAYED:
        assert "on gpu:0 as float32" in (folder / "run.log").read_text()
    with emulate() as gpu:
        replayed, _ = trained(given, f"{case}-graph", flags)
    assert (gpu.replays > 1) == (case not in NOT_REPLAYED)
    assert all(map(np.array_equal, replayed, eager))


def test_what_is_sent_in_a_step(given, emulate, monkeypatch):
    """Positions alone if the particles are on the device; else what is kept of them, as it is."""
    pixels, size = 196, 8
    step, marks = Trainer._train_batch, []

    def counted(self, *args):
        step(self, *args)
        marks.append(gpu.sent)

    monkeypatch.setattr(Trainer, "_train_batch", counted)
    float32 = size * (4 * pixels + 4 * pixels // 2 + -(-pixels // 8))
    float16 = size * 2 * pixels
    for free, memory, each in ((LEFT, None, 0), (0, None, float32), (0, 40e-6, float16)):
        marks.clear()
        with emulate(graph=False, free=free) as gpu:
            trained(given, "sent", {**NETWORK, "memory": memory})
        assert marks[2] - marks[1] == 8 * size + each


@pytest.mark.parametrize("free", [0, 40_000])
def test_steps_replay_wherever_particles_are(free, given, emulate):
    """In memory, and on the device in half precision, where CTFs are evaluated in every step."""
    flags = {"encoder": "twin", "qdim": 16}
    with emulate(graph=False, free=2 * free):
        wanted, folder = trained(given, "anywhere-eager", flags)
    assert ("on gpu:0 as float16:" in (folder / "run.log").read_text()) == bool(free)
    with emulate(free=2 * free) as gpu:
        found, _ = trained(given, "anywhere", flags)
    assert gpu.replays > 3
    assert all(map(np.array_equal, found, wanted))


@pytest.fixture
def spoilt(given, tmp_path, small):
    """Flags of a training one of whose particles has no loss."""
    stack = write_stack(tmp_path / "in", 70)
    images = stack.images.copy()
    images[33, 2, 2] = np.nan
    write_mrc(stack.particles, images)
    flags = {**given.flags, "encoder": "vlt", "lazy": True, "norm": (0.0, 17.0),
             "shuffle_seed": 1, "num_epochs": 2}  # fmt: skip
    files = {"particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf}
    return SimpleNamespace(flags=flags | files, folder=tmp_path, plugins=given.plugins)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_batch_without_a_loss_changes_nothing_though_nobody_waited(on_nan, spoilt, emulate):
    """The checkpoint that is left, or the end, are those of a training that looked at each loss."""

    def run(where):
        if on_nan == "skip":
            return [*trained(spoilt, where, {"on_nan": "skip"})[0]]
        with pytest.raises(InputError, match="1 image is without a loss, at 33 of the stack"):
            trained(spoilt, where, {})
        return [*trained(spoilt, where, {"load": "latest", "on_nan": "skip"})[0]]

    wanted = run("cpu")
    with emulate():
        same(run("gpu"), wanted)
    columns = ("epoch", "gen_loss", "kld", "loss")
    mine, other = ([[float(r[c]) for c in columns] for r in metrics(spoilt.folder / where)]
                   for where in ("gpu", "cpu"))  # fmt: skip
    np.testing.assert_allclose(mine, other, rtol=1e-5)
    log = (spoilt.folder / "gpu/run.log").read_text()
    assert log.count("Batch left out: 1 image is without a loss, at 33 of the stack") == 2


def test_gradients_beyond_the_range_of_fp16_change_nothing(given, emulate, monkeypatch):
    """The loss is fine, the step is not: as a batch without a loss."""
    from cryodrgn_amort.models import decoder

    monkeypatch.setattr(decoder, "_HALF_SCALE", 2.0**30)
    with pytest.raises(InputError, match="training has diverged"):
        trained(given, "beyond-cpu", {**NETWORK, "precision": "fp16"})
    with emulate(), pytest.raises(InputError, match="training has diverged"):
        trained(given, "beyond", {**NETWORK, "precision": "fp16"})


def test_a_training_that_is_stopped_goes_on_exactly(given, emulate, monkeypatch):
    """Between two looks at losses, in the middle of replayed steps; hooks get losses to keep."""
    import os
    import signal

    seen = []

    class Listener:
        @staticmethod
        def batch_end(losses):
            seen.append(losses.total)

    plugins = type(given.plugins)(found={})
    plugins._manager.register(_hooks(Listener), "listener")
    here = SimpleNamespace(**{**vars(given), "plugins": plugins})
    take, count = stepper.Stepper.take, iter(range(100))

    def stopped(self, *args, **kwargs):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args, **kwargs)

    with emulate():
        whole, _ = trained(here, "whole", {**NETWORK, "num_epochs": 2})
        assert len({float(total) for total in seen}) == len(seen) == 18
        with monkeypatch.context() as patch:
            patch.setattr(stepper.Stepper, "take", stopped)
            with pytest.raises(Stopped):
                trained(here, "part", {**NETWORK, "num_epochs": 2})
        again, _ = trained(here, "part", {**NETWORK, "num_epochs": 2, "load": "latest"})
    assert all(map(np.array_equal, again, whole))
    on_the_cpu, _ = trained(given, "part", {**NETWORK, "num_epochs": 3, "load": "latest"})
    assert np.isfinite(on_the_cpu).all()


def _hooks(listener):
    from cryodrgn_amort.plugins import hookimpl

    return SimpleNamespace(batch_end=hookimpl(listener.batch_end))


def test_infer(given, emulate):
    """At most six waits in ten steps."""
    from cryodrgn_amort.inference import infer_run

    def fitted(where):
        run = load_run(str(given.folder / "first"), given.plugins)
        options = InferOptions(steps=20, batch_size=70, starts=("anchors",), precision="fp32")
        return infer_run(run, options, given.folder / f"infer-{where}")

    wanted = fitted("cpu")
    with emulate() as gpu:
        found = fitted("gpu")
    same((found.mean, found.logvar, found.elbo), (wanted.mean, wanted.logvar, wanted.elbo), 1e-4)
    of_fits = sum(n for where, n in gpu.syncs.items() if "optimisation.py" in where)
    assert 0 < of_fits <= 6 * 2 * 2  # windows; of some beforehand, and of all


def test_eval(given, emulate, monkeypatch):
    """At most two waits for a batch that is encoded, with its copies."""
    from cryodrgn_amort.evaluation import codec, evaluate

    if not (given.folder / "resid-cpu").exists():
        trained(given, "resid-cpu", NETWORK)

    def measured():
        run = load_run(str(given.folder / "resid-cpu"), given.plugins)
        options = EvalOptions(
            transforms=("roll:1", "rotate:37"), fit=0, umap=False, bootstrap=0, batch_size=8,
            volumes=2, labelled=2, precision="fp32",
        )  # fmt: skip
        return evaluate(run, options)

    encoded, counts = codec.Codec._encoded, []

    def counted(self, *args):
        before = gpu.syncs.copy()
        found = encoded(self, *args)
        counts.append(sum((gpu.syncs - before).values()))
        return found

    wanted = measured()
    with monkeypatch.context() as patch, emulate() as gpu:
        patch.setattr(codec.Codec, "_encoded", counted)
        found = measured()
    same((found.z, found.logvar, found.volumes), (wanted.z, wanted.logvar, wanted.volumes), 1e-5)
    for mine, other in zip(found.results, wanted.results, strict=True):
        same((mine.z, mine.logvar), (other.z, other.logvar), 1e-5)
    assert len(counts) == 9
    assert max(counts[1:]) <= 2
    by_site = collections.Counter({k: n for k, n in gpu.syncs.items() if "codec.py" in k})
    assert sum(by_site.values()) <= 2 * 18 + 20, by_site


def test_validation(given, emulate):
    """Fits, slopes of poses and misfits are those of the CPU."""
    from cryodrgn_amort.study.validation.case import Case
    from cryodrgn_amort.study.validation.gains import volume_spread
    from cryodrgn_amort.study.validation.misfits import Misfits
    from cryodrgn_amort.study.validation.poses import measured_slopes

    def found():
        run = load_run(str(given.folder / "first"), given.plugins).multiplying("fp32")
        case = Case(run, run.particles(), own=True)
        fits = case.fit(24)
        own, known = measured_slopes(case, fits)
        return (
            fits,
            own,
            known[0.0],
            Misfits(case, fits).of_particles()["explained"],
            volume_spread(case),
        )

    wanted = found()
    with emulate():
        there = found()
    for name in ("mean", "logvar", "elbo", "constant", "spectrum"):
        same([getattr(there[0], name)], [getattr(wanted[0], name)], 1e-3)
    same([there[1].slope, there[1].curvature], [wanted[1].slope, wanted[1].curvature], 1e-2)
    same([there[3]], [wanted[3]], 1e-2)
    assert there[4] == pytest.approx(wanted[4], rel=1e-4)
    assert there[2].slope.shape == wanted[2].slope.shape  # of other random numbers


def test_particles_like_a_runs(given, emulate, tmp_path):
    """The truth of each is that of the CPU; noise is drawn there in both cases."""
    options = {"like": str(given.folder / "first"), "seed": 1, "clean": True}
    simulate(SimulateOptions(str(tmp_path / "cpu"), **options), given.plugins)
    with emulate():
        simulate(SimulateOptions(str(tmp_path / "gpu"), **options), given.plugins)
    for name in ("clean.mrcs", "particles.mrcs"):
        one, other = (
            np.fromfile(tmp_path / where / name, np.float32)[256:] for where in ("gpu", "cpu")
        )
        assert len(one) == len(other) > 0
        assert np.abs(one - other).max() <= 2e-2 * np.abs(other).max()


def test_memory_that_is_full_halves_the_batch(given, monkeypatch, caplog):
    """Whatever is asked for at once is halved until it fits, and the results are the same."""
    from cryodrgn_amort.evaluation.codec import Codec
    from cryodrgn_amort.inference import infer_run
    from cryodrgn_amort.models import AmortVAE

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("cryodrgn_amort.inference.fitter.Fitter.variance", 1.0)
    run = load_run(str(given.folder / "first"), given.plugins)
    options = InferOptions(steps=0, batch_size=32, starts=("anchors",))
    wanted = infer_run(run, options, given.folder / "fits")

    def full(method):
        def limited(self, batch, z):
            if len(batch.index) > 9:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return method(self, batch, z)

        return limited

    with monkeypatch.context() as patch:
        for name in ("errors", "errors_at"):
            patch.setattr(AmortVAE, name, full(getattr(AmortVAE, name)))
        found = infer_run(run, options, given.folder / "fits-halved")
        codec = Codec(run.particles(), run.load_decoder()[0], None, 64)
        losses = codec.losses({"own": run.z()[0]}, np.arange(50))
    same((found.mean,), (wanted.mean,), 1e-5)
    codec = Codec(run.particles(), run.load_decoder()[0], None, 64)
    same((losses["own"],), (codec.losses({"own": run.z()[0]}, np.arange(50))["own"],), 1e-5)
    assert "Particles that are fitted: 8 at a time from here on; the GPU has no memory left: " \
           "2.00 GiB more were asked for" in caplog.text  # fmt: skip
    assert "Particles whose loss is measured: 6 at a time" in caplog.text
    with pytest.raises(RuntimeError, match="another"):
        list(devices.Halving("x")(lambda some: (_ for _ in ()).throw(RuntimeError("another")), 4))


@pytest.mark.parametrize(
    ("capability", "hip", "half"), [((7, 0), None, "fp16"), ((7, 5), None, "fp16"),
                                    ((8, 0), None, "bf16"), ((12, 0), None, "bf16"),
                                    ((9, 0), "6.3", "bf16")],
)  # fmt: skip
def test_the_card_chooses_the_precision(capability, hip, half, monkeypatch):
    """Before Ampere bf16 is emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert devices.half_precision(torch.device("cuda")) == half
    assert devices.half_precision(torch.device("cpu")) is None


def test_what_cuda_forbids_fails_here(emulate):
    """The emulated device itself: each kind of mistake, made on purpose."""
    with emulate() as gpu:
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="tensors on gpu:0 and cpu"):
            there + here
        assert (there + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]
        before = gpu.syncs.copy()
        _ = there[torch.tensor([0])], there[there > 0], float(there.sum()), there.nonzero()
        asked = {re.sub(" at .*", "", kind) for kind in gpu.syncs - before}
        assert asked == {"position from the CPU", "mask", "_local_scalar_dense", "nonzero",
                         "to the GPU"} - ({"to the GPU"} - asked)  # fmt: skip
        graph = EmulatedGraph([])
        with pytest.raises(RuntimeError, match="waits, while a graph is recorded"), \
                graph.recording():  # fmt: skip
            there.sum().item()
        with graph.recording():
            there.add_(1)
        assert there.cpu().tolist() == [1, 1, 1]
        graph.replay()
        assert there.cpu().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="in a thread that should only read"):
        there + 1
