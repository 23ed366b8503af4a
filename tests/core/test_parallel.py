"""Several processes against one: the same run."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cryodrgn.mrcfile import parse_mrc, write_mrc

from cryodrgn_amort.core import read_weights, read_z, write_z

CASES = {
    "vlt": {"encoder": "vlt"},
    "resid": {"encoder": "resid", "qdim": 12, "beta": 0.5, "checkpoint": 2},
    "twin": {"encoder": "twin", "qdim": 12},
    "noise": {"encoder": "noise", "qdim": 12},
    "lazy": {
        "encoder": "twin",
        "qdim": 12,
        "lazy": True,
        "num_workers": 0,
        "batch_size": 23,
    },
    "frozen": {"encoder": "vlt", "table_freeze": True},
    # one particle in the last batch: one process has none of it
    "anchored": {"encoder": "anchored", "qdim": 12, "anchors": 4, "batch_size": 23},
    "alternate": {
        "encoder": "alternate",
        "qdim": 12,
        "anchors": 4,
        "batch_size": 23,
        "num_epochs": 6,
    },
    "augment": {"qdim": 12, "augment": 1, "batch_size": 23},
    "resumed": {"encoder": "vlt", "num_epochs": 3, "batch_size": 23, "load": "latest"},
    # the second process gets a signal in the second epoch; all go on from there
    "stopped": {"encoder": "vlt", "num_epochs": 3, "batch_size": 23, "shuffle_seed": 4},
    # one process has the particle without a loss
    "skipped": {"encoder": "vlt", "lazy": True, "on_nan": "skip", "batch_size": 23},
}
_STOPPED_AFTER = 6  # batches, of 4 in an epoch


EVALUATION = {
    "transforms": ("roll:1", "rotate:90"),
    "umap": False,
    "volumes": 2,
    "labelled": 2,
    "fit": 2,
}


def flags_of(name, flags, folder):
    found = {**flags, "precision": "fp64", "outdir": str(folder / name), **CASES[name]}
    if name == "skipped":
        found |= {"particles": str(folder / "holed.mrcs"), "norm": (0.0, 10.0)}
    if name == "anchored":  # the second stage of what "resumed" begins with
        found |= {"from_run": str(folder / "resumed"), "pdim": 16, "players": 1}
    return found


@pytest.fixture(scope="module")
def both(stack, tmp_path_factory, plugins):
    """Return the folders of the runs of one process and of two."""
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "num_epochs": 2,
        "do_analysis": False, "seed": 3, "zdim": 3, "pdim": 16, "players": 1, "lr": 1e-3,
    }  # fmt: skip
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    images = parse_mrc(stack.particles)[0].copy()
    images[7, 3, 4] = np.nan
    for folder in (one, two):
        write_mrc(str(folder / "holed.mrcs"), images, is_vol=False)
    for folder in (one, two):  # what "resumed" resumes, written by one process
        start = {**flags_of("resumed", flags, folder), "num_epochs": 1, "load": None}
        Trainer(settings_from_flags(start, plugins), plugins).fit()
    plans = {name: flags_of(name, flags, two) for name in CASES}
    here = Path(__file__).resolve()
    found = [str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # helpers
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(here), json.dumps(plans)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert launched.returncode == 0, "\n".join(
        x for x in launched.stderr.splitlines() if "Error" in x or "File" in x
    )
    for name in CASES:
        given = flags_of(name, flags, one)
        Trainer(settings_from_flags(given, plugins), plugins).fit()
    return one, two


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, both):
    # images that are read batch by batch, or made up, are transformed in float32 with other
    # neighbours
    made_anew = ("lazy", "anchored", "alternate", "augment", "skipped")
    tolerance = 1e-5 if name in made_anew else 1e-10
    one, two = (read_weights(folder / name / "weights.pkl", "") for folder in both)
    for part in (lambda c: c["model_state_dict"], lambda c: c["amort"]["encoder_state_dict"]):
        assert part(one).keys() == part(two).keys()
        for key, value in part(one).items():
            if isinstance(value, torch.Tensor) and not value.isnan().any():
                assert value.shape == part(two)[key].shape
                close = (value.double() - part(two)[key].double()).abs() <= tolerance
                assert close.all(), key
    for a, b in zip(*(read_z(folder / name / "z.pkl", "") for folder in both), strict=True):
        assert abs(a - b).max() <= max(1e-6, tolerance)
    logs = [(folder / name / "run.log").read_text() for folder in both]
    assert [log.count("# =====> Epoch") for log in logs] == [logs[0].count("# =====> Epoch")] * 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "", "RANK": ""}, None),
        ({"RANK": "0", "MASTER_ADDR": "node7"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "MASTER_PORT": "29500"}, None),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE 4: is set, RANK and MASTER_ADDR and MASTER_PORT not"),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "n", "MASTER_PORT": "1"}, "4: is set, RANK not"),
        ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_PORT": "1"}, "RANK 1: is set, MASTER_ADDR not"),
        ({"RANK": "2"}, "RANK 2: is set, WORLD_SIZE and"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE two: a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0: a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK -1: a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "n", "MASTER_PORT": "1"}, "RANK 2: must"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "n", "MASTER_PORT": "x"}, "MASTER_PORT x"),
    ],
)
def test_what_the_environment_says_of_several_processes(given, says, monkeypatch):
    from cryodrgn_amort.core import InputError, ProcessGroup, alone, join

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if says is None:
        assert join() == ProcessGroup()
    else:
        with pytest.raises(InputError, match=says):
            join()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name == "RANK" else "2")
    for local, why in (("", "LOCAL_RANK: is not set"), ("2", "LOCAL_RANK 2: this machine has 2")):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(InputError, match=why):
            join()
    alone()
    assert join() == ProcessGroup()


def test_a_taken_port_is_named(monkeypatch):
    from cryodrgn_amort.core import InputError, join

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            InputError, match=rf"MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: .*in use"
        ):
            join()


def test_the_api_never_ends_the_callers_process(both):
    for rank in range(2):
        assert (both[1] / f"after-api.{rank}").read_text() == "1 70"


def test_two_processes_encode_what_one_does(both, plugins):
    from cryodrgn_amort.evaluation import evaluate
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import load_run

    one, two = both
    mine = evaluate(load_run(one / "twin", plugins), EvalOptions(**EVALUATION))
    theirs = read_z(two / "z.pkl", "")
    np.testing.assert_allclose(theirs[0], mine.results[0].z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs[1], mine.z, rtol=1e-4, atol=1e-5)


PATIENT = """
import os, sys, time
from datetime import timedelta
from cryodrgn_amort.core import parallel
parallel._PATIENCE = timedelta(seconds=1)
processes = parallel.join()
if processes.leads:
    time.sleep(2.5)  # writes a report, say
processes.wait()
print("together")
if processes.leads:
    time.sleep(2.5)
processes.end_process()
"""


def test_others_wait_as_long_as_one_works_alone(tmp_path):
    script = tmp_path / "patient.py"
    script.write_text(PATIENT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("together") == 2


def evaluation(folder, plugins):
    """Keep a copy's latents, and those of the particles, in the place of a z file's two parts."""
    from cryodrgn_amort.core import join
    from cryodrgn_amort.evaluation import assist, evaluate
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import load_run

    run, options, processes = load_run(folder / "twin", plugins), EvalOptions(**EVALUATION), join()
    if not processes.leads:
        assist(run, options, processes)
        return
    found = evaluate(run, options, processes)
    write_z(folder / "z.pkl", found.results[0].z, found.z)


def stop(trainer):
    """Train until a signal that one process gets."""
    from cryodrgn_amort.core import Stopped
    from cryodrgn_amort.training.stepper import Stepper

    step, count = Stepper.take, iter(range(1, 100))

    def counted(self, *args, **kwargs):
        if next(count) == _STOPPED_AFTER and not trainer.processes.leads:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    Stepper.take = counted
    with pytest.raises(Stopped, match="SIGTERM in epoch 2 after 2 of 4 batches") as stopped:
        trainer.fit()
    Stepper.take = step
    assert stopped.value.number == signal.SIGTERM
    trainer.processes.wait()


def worker(plans):
    from cryodrgn_amort.plugins import Plugins
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    plugins = Plugins(found={})
    for flags in plans.values():
        trainer = Trainer(settings_from_flags(flags, plugins), plugins)
        assert trainer.processes.size == 2
        if trainer.settings.encoder == "vlt":  # each holds the rows of its own particles
            assert len(trainer.model.amort.weight) == 35
        if Path(trainer.settings.outdir).name == "stopped":
            stop(trainer)
            flags = {**flags, "load": "latest"}
            trainer = Trainer(settings_from_flags(flags, plugins), plugins)
        trainer.fit()
    evaluation(Path(plans["twin"]["outdir"]).parent, plugins)
    call_the_api(Path(plans["twin"]["outdir"]).parent, plans["frozen"])
    trainer.processes.end_process()


def call_the_api(folder, flags):
    """Train by the Python API: the caller's script goes on behind it, in each process."""
    import cryodrgn_amort as ca

    names = ("particles", "poses", "ctf", "zdim", "encoder", "table_freeze", "seed")
    run = ca.train(
        **{name: flags[name] for name in names}, num_epochs=1, dec_dim=16, dec_layers=1,
        outdir=folder / "api",
    )  # fmt: skip
    (folder / f"after-api.{os.environ['RANK']}").write_text(f"{run.epoch} {len(run.z_mu)}")


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
