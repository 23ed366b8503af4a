"""What is not public elsewhere is still what we take it for."""

import argparse
import inspect
import io
import pickle
import types

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

from cryodrgn_amort import host
from cryodrgn_amort.core import abbreviate, actions_of, replaced
from cryodrgn_amort.core.private import PythonUnpickler
from cryodrgn_amort.data import ParticleSource, load_particles


def test_pickles_are_read_in_python_with_our_choice_of_classes():
    class Choosy(PythonUnpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(name)

    assert inspect.isfunction(PythonUnpickler.load)
    assert PythonUnpickler(io.BytesIO(pickle.dumps({"a": [1.5, b"x"]}))).load() == {
        "a": [1.5, b"x"]
    }
    with pytest.raises(pickle.UnpicklingError, match="Fraction"):
        Choosy(io.BytesIO(b"cfractions\nFraction\n.")).load()


def test_all_actions_of_a_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("particles")
    parser.add_argument_group("more").add_argument("--ctf", "-c")
    parser.add_mutually_exclusive_group().add_argument("--amp", action="store_true")
    found = actions_of(parser)
    assert [action.dest for action in found] == ["particles", "ctf", "amp"]
    found[0].required = False  # train_amort does so
    found[0].nargs = "?"
    assert parser.parse_args([]).particles is None


def test_a_name_that_is_replaced_comes_back():
    module = types.ModuleType("m")
    module.use = 1
    with pytest.raises(KeyError), replaced(module, "use", 2):
        raise KeyError(module.use)
    assert module.use == 1
    with replaced(module, "use", 2):
        assert module.use == 2


def test_the_host_chooses_no_backend_in_a_notebook(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "svg")
    plt.close("all")  # of other tests
    before, mine = matplotlib.use, plt.figure().number
    try:
        with host._same_backend():
            matplotlib.use("pdf")
            plt.figure()
        assert matplotlib.get_backend().lower() == "agg"
        assert plt.get_fignums() == [mine]
        assert matplotlib.use is before
    finally:
        plt.close("all")


def test_images_are_prepared_as_the_host_prepares_them(stack):
    particles = load_particles(
        ParticleSource(stack.particles, stack.poses, stack.ctf), torch.device("cpu")
    )
    images = host.ImageDataset(stack.particles, lazy=True, norm=particles.norm)
    raw = torch.from_numpy(stack.images[:3])
    for count in (3, 1):  # the host drops the axis of a single image
        found = host.preprocess(images, raw[:count])
        theirs = torch.stack([torch.as_tensor(images[i]["y"]) for i in range(count)])
        torch.testing.assert_close(found, theirs.reshape(found.shape), rtol=1e-5, atol=1e-5)
    assert torch.equal(raw, torch.from_numpy(stack.images[:3]))


def test_beginnings_of_flags_mean_what_they_meant(capsys):
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--encode-mode")
    parser.add_argument("--enc-dim")
    before = list(actions_of(parser))
    parser.add_argument("--encoder")
    with pytest.raises(SystemExit):
        parser.parse_args(["--encode", "tilt"])
    abbreviate(parser, before)
    assert parser.parse_args(["--encode", "tilt"]).encode_mode == "tilt"
    assert parser.parse_args(["--encoder", "vlt", "--enc-d", "3"]).encoder == "vlt"
    assert "--encode " not in parser.format_help()
    assert parser.parse_args(["--encode=tilt"]).encode_mode == "tilt"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parser.parse_args(["--enc", "3"])  # as before
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.endswith("could match --encode-mode, --enc-dim, --encoder")
