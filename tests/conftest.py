"""Fixtures."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")
# The host's numbers are compared to the last digits, and runs to the last bit: on the CPU, whatever
# the machine has. CUDA_VISIBLE_DEVICES=0 tries the tests on a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from helpers import write_stack

LONGEST = ("test_study", "test_faults", "test_interrupts", "test_mnist", "test_parallel")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that none is left over at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape what is no text in what a test has printed: xdist sends it in UTF-8."""
    report = yield
    report.sections = [(name, _escaped(text)) for name, text in report.sections]
    if report.longrepr is not None and _escaped(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = _escaped(str(report.longrepr))
    return report


def _escaped(text):
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """70 particles of 16 px: not a multiple of the batch size."""
    return write_stack(tmp_path_factory.mktemp("stack"), 70)


@pytest.fixture(scope="session")
def plugins():
    """Return the built-ins alone, whatever is installed."""
    from cryodrgn_amort.plugins import Plugins

    return Plugins(found={})


@pytest.fixture
def cli(capsys):
    """Run ``cryodrgn_amort`` in this process; returns (exit code, stdout, stderr)."""
    from cryodrgn_amort.cli import main

    def run(*argv):
        code = 0
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def flags(stack, tmp_path):
    """Return flags of a small, quick training run, as ``settings_from_flags`` takes them."""
    return {
        "particles": stack.particles,
        "poses": stack.poses,
        "ctf": stack.ctf,
        "outdir": str(tmp_path / "run"),
        "num_epochs": 2,
        "do_analysis": False,
        "seed": 3,
        "zdim": 3,
        "pdim": 16,
        "players": 1,
        "lr": 1e-3,
    }


@pytest.fixture
def train(plugins):
    """Train from flags; returns the trainer."""
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    def run(flags, **more):
        trainer = Trainer(settings_from_flags({**flags, **more}, plugins), plugins)
        trainer.fit()
        return trainer

    return run


@pytest.fixture(scope="module")
def two_threads():
    """Work on two threads, where one does not share its work: `tests/run.sh` sets one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
