"""The plugin host: the contract, faults, duplicates, and a third-party plugin for real."""

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cryodrgn_amort import builtin, hookimpl, hookspecs
from cryodrgn_amort.encoders import EncoderSpec
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.inputs import EncoderInput, InputSpec
from cryodrgn_amort.plugins import KINDS, Plugins
from cryodrgn_amort.settings import settings_from_flags
from cryodrgn_amort.training import Trainer

ROOT = Path(__file__).parents[1]
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "cryodrgn_amort_spec")]


def plugin(**hooks):
    module = types.SimpleNamespace()
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def input_named(name):
    return InputSpec(name, "test", lambda settings, particles: EncoderInput())


def test_what_ships_in_the_box(plugins):
    names = {kind: set(plugins.owned(kind)) for kind in KINDS}
    assert names["commands"] == {
        "simulate_amort", "train_amort", "eval_amort", "infer_amort", "compare_amort",
        "time_amort", "study_amort", "mnist_amort", "amort_plugins",
    }  # fmt: skip
    assert names["encoders"] == {
        "resid", "mlp", "vlt", "sleep", "anchored", "semi",
    }  # fmt: skip
    assert names["encoder_inputs"] == {"particle", "twin", "noise"}
    assert names["transforms"] == {"roll", "rotate"}
    assert {"baseline", "vlt", "vlt-frozen-encoder", "twin-large"} <= names["recipes"]
    assert len(names["recipes"]) == 20
    for kind in KINDS:
        for owned in plugins.owned(kind).values():
            assert owned.plugin == "built-in"
            assert owned.item.summary


def test_every_hook_says_when_it_is_called_and_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert len(HOOKS) == 12
    for name in HOOKS:
        assert inspect.getdoc(getattr(hookspecs, name)), name
        assert f"`{name}`" in readme, f"{name} is not in the README"


def test_observers_are_called_in_order(flags):
    calls = []
    observer = plugin(
        training_start=lambda trainer: calls.append(("start", trainer.epoch)),
        batch_end=lambda trainer, losses: calls.append(("batch", float(losses.total))),
        epoch_end=lambda trainer, metrics: calls.append(("epoch", metrics["epoch"])),
        checkpoint_written=lambda trainer, path: calls.append(("checkpoint", path.name)),
        training_end=lambda trainer: calls.append(("end", trainer.epoch)),
    )
    plugins = Plugins(found={"observer": observer})
    Trainer(settings_from_flags({**flags, "qdim": 16}, plugins), plugins).fit()
    batches = 5  # 70 particles in batches of 16
    kinds = [kind for kind, _ in calls]
    one = ["batch"] * batches + ["epoch", "checkpoint"]
    assert kinds == ["start", *one, *one, "end"]
    assert calls[0] == ("start", 0)
    assert calls[batches + 2] == ("checkpoint", "weights.1.pkl")
    assert all(value > 0 for kind, value in calls if kind == "batch")


def test_a_plugin_that_fails_is_left_out_in_one_line(capsys):
    def boom():
        raise RuntimeError("no\nluck")

    class BadImport:
        pass

    found = {
        "bad": plugin(encoders=boom, transforms=lambda: []),
        "unknown": plugin(encodrs=lambda: []),
        "wrong": plugin(encoders=lambda nonsense: []),
        "good": plugin(encoder_inputs=lambda: [input_named("fine")]),
    }
    plugins = Plugins(found=found)
    assert "fine" in plugins.owned("encoder_inputs")
    assert "resid" in plugins.owned("encoders")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "plugin 'unknown' left out" in lines[0]
    assert "encodrs" in lines[0]
    assert "plugin 'wrong' left out" in lines[1]
    assert "plugin 'bad': encoders left out (RuntimeError: no luck)" in lines[2]
    assert list(plugins.origins()) == ["built-in", "bad", "good"]


def test_a_plugin_that_exits_or_brings_nonsense_is_left_out(capsys):
    import argparse

    def leave():
        raise SystemExit(3)

    def clash(parser):
        parser.add_argument("--mine", default=3)
        parser.add_argument("--mine")

    found = {
        "exits": plugin(commands=leave),
        "nonsense": plugin(encoders=lambda: [object()]),
        "clash": plugin(train_args=clash),
    }
    plugins = Plugins(found=found)
    assert "train_amort" in plugins.commands()
    assert "resid" in plugins.owned("encoders")
    plugins.add_train_args(argparse.ArgumentParser())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("'")[1] for line in lines] == ["exits", "nonsense", "clash"]


def test_a_taken_name_is_refused_naming_both(capsys):
    found = {
        "first": plugin(encoder_inputs=lambda: [input_named("mine")]),
        "second": plugin(encoder_inputs=lambda: [input_named("mine"), input_named("vlt")]),
    }
    plugins = Plugins(found=found)
    assert plugins.owned("encoder_inputs")["mine"].plugin == "first"
    assert isinstance(plugins.encoder("vlt"), EncoderSpec)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "'second'" in lines[0]
    assert "'first'" in lines[0]
    assert "'vlt'" in lines[1]
    assert "'built-in'" in lines[1]


def test_built_ins_have_no_other_door():
    source = inspect.getsource(sys.modules["cryodrgn_amort.plugins"])
    assert source.count("builtin") == 2  # the import and the registration
    for kind in KINDS:
        assert hasattr(getattr(builtin, kind), "cryodrgn_amort_impl")


def test_a_plugin_encoder_is_saved_beside_a_token_encoder(flags, tmp_path):
    import torch

    from cryodrgn_amort.encoders import Encoder
    from cryodrgn_amort.runs import load_run

    class Linear(Encoder):
        def __init__(self, pixels, zdim):
            super().__init__()
            self.layer = torch.nn.Linear(pixels, 2 * zdim)

        def forward(self, batch):
            return self.layer(batch.image).chunk(2, dim=1)

    spec = EncoderSpec("linear", "one layer", build=lambda s, p: Linear(len(p.pixels), s.zdim))
    plugins = Plugins(found={"mine": plugin(encoders=lambda: [spec])})
    trainer = Trainer(settings_from_flags({**flags, "encoder": "linear"}, plugins), plugins)
    start = trainer.model.amort.layer.weight.detach().clone()
    trainer.fit()
    assert not torch.equal(trainer.model.amort.layer.weight, start)
    run = load_run(tmp_path / "run", plugins)
    model, shown = run.load(run.particles())
    assert shown is not None
    torch.testing.assert_close(model.amort.layer.weight, trainer.model.amort.layer.weight)
    with pytest.raises(InputError, match="--encoder linear: unknown"):
        load_run(tmp_path / "run", Plugins(found={}))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install examples/plugin for real, into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source")
    for path in (ROOT / "examples/plugin").rglob("*"):
        if path.suffix in (".toml", ".py"):
            to = copy / path.relative_to(ROOT / "examples/plugin")
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", target, copy],
        check=True,
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(target)}

    def run(*argv, **more):
        return subprocess.run(
            [sys.executable, "-m", "cryodrgn_amort", *map(str, argv)],
            env={**env, **more}, capture_output=True, text=True, cwd=target,
        )  # fmt: skip

    return run


def test_the_example_plugin_installs_trains_and_evaluates(installed, stack, tmp_path):
    listed = installed("amort_plugins")
    assert "lowpass (amort-lowpass 0.1.0)" in listed.stdout
    assert "the low-passed particle" in listed.stdout
    assert "epoch_end, train_args" in listed.stdout
    off = installed("amort_plugins", CRYODRGN_AMORT_DISABLE_PLUGINS="1")
    assert "lowpass" not in off.stdout
    common = [
        "train_amort", stack.particles, "--poses", stack.poses, "--ctf", stack.ctf, "--zdim", "3",
        "-n", "2", "--enc-dim", "16", "--dec-dim", "16", "--no-analysis", "-o", tmp_path / "run",
    ]  # fmt: skip
    refused = installed(*common, "--lowpass-px", "4")
    assert refused.returncode == 2
    assert "--lowpass-px: does not apply to --encoder resid" in refused.stderr
    done = installed(*common, "--encoder", "lowpass", "--lowpass-px", "4")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(s) for s in (tmp_path / "run/progress.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    evaluated = installed(
        "eval_amort", tmp_path / "run", "--no-umap", "--bootstrap", "10", "--fit", "2"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert (tmp_path / "run/amort.2/report.html").is_file()
