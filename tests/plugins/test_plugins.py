"""The plugin host: the contract and its documentation, faults, duplicates, deprecation."""

import inspect
import re
import sys
import types
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import InputError, __version__
from cryodrgn_amort.core.registry import KINDS
from cryodrgn_amort.data import EncoderInput
from cryodrgn_amort.models import EncoderSpec, InputSpec, Losses
from cryodrgn_amort.plugins import Plugins, builtin, hookspecs
from cryodrgn_amort.report import Evaluation
from cryodrgn_amort.runs import settings_from_flags
from cryodrgn_amort.training import Trainer

ROOT = Path(__file__).parents[2]
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
        "time_amort", "validate_amort", "scores_amort", "study_amort", "mnist_amort",
        "amort_plugins",
    }  # fmt: skip
    assert names["encoders"] == {
        "resid", "mlp", "tilt", "vlt", "sleep", "anchored", "semi", "alternate",
    }  # fmt: skip
    assert names["encoder_inputs"] == {"particle", "twin", "noise"}
    assert names["transforms"] == {"roll", "rotate"}
    assert {"baseline", "vlt", "vlt-frozen-encoder", "twin-large"} <= names["recipes"]
    assert len(names["recipes"]) == 21
    for kind in KINDS:
        for owned in plugins.owned(kind).values():
            assert owned.plugin == "built-in"
            assert owned.item.summary


def arguments():
    """Return what docs/plugins.md says about the arguments of hooks."""
    page = (ROOT / "docs/plugins.md").read_text()
    return dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", page, re.MULTILINE))


def test_the_page_has_every_argument_of_a_hook_and_no_other():
    specs = {name: inspect.signature(getattr(hookspecs, name)) for name in HOOKS}
    assert len(specs) == 12
    assert set(arguments()) == {name for spec in specs.values() for name in spec.parameters}
    assert all(inspect.getdoc(getattr(hookspecs, name)) for name in HOOKS)


def test_the_page_names_attributes_that_there_are():
    said = arguments()
    documented = inspect.getdoc(Trainer).split("Attributes")[1]
    known = {
        "trainer": re.findall(r"\w+", " ".join(re.findall(r"^[\w, ]+$", documented, re.MULTILINE))),
        "losses": [field.name for field in fields(Losses)],
        "evaluation": ["evaluate", *(field.name for field in fields(Evaluation))],
    }
    for name, names in known.items():
        named = re.findall(r"`(\w+)`", said[name])
        assert len(named) > 3
        assert set(named) <= set(names), name


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


def test_an_observer_that_fails_is_left_out_and_training_goes_on(flags, capsys):
    calls = []

    def disk_full(trainer):
        raise OSError("no\nspace")

    def stop(trainer, metrics):
        raise InputError("early enough")

    found = {
        "log": plugin(training_start=disk_full, batch_end=lambda: calls.append("failed before")),
        "fine": plugin(batch_end=lambda trainer: calls.append(trainer.seen)),
    }
    plugins = Plugins(found=found)
    Trainer(settings_from_flags({**flags, "qdim": 16}, plugins), plugins).fit()
    assert calls == [16, 32, 48, 64, 70, 86, 102, 118, 134, 140]
    assert capsys.readouterr().err.splitlines() == [
        "cryodrgn_amort: plugin 'log': training_start failed, left out from here on "
        "(OSError: no space)"
    ]
    plugins = Plugins(found={"stop": plugin(epoch_end=stop)})
    more = {**flags, "qdim": 16, "outdir": flags["outdir"] + "-stopped"}
    with pytest.raises(InputError, match="early enough"):
        Trainer(settings_from_flags(more, plugins), plugins).fit()


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
    source = inspect.getsource(sys.modules["cryodrgn_amort.plugins.manager"])
    assert source.count("builtin") == 2  # the import and the registration
    for kind in KINDS:
        assert hasattr(getattr(builtin, kind), "cryodrgn_amort_impl")


def test_a_plugin_encoder_is_saved_beside_a_token_encoder(flags, tmp_path):
    import torch

    from cryodrgn_amort.models import Encoder
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


def test_an_encoder_is_made_with_the_seed_and_disturbs_no_other_draws(flags, plugins):
    import torch

    spec = EncoderSpec("drawn", "test", build=lambda settings, particles: torch.rand(3))
    settings = settings_from_flags(flags, plugins)
    torch.manual_seed(0)
    first = spec.make(settings, None)
    after = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(after, torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_an_encoder_that_is_made_leaves_gpus_as_they_were(flags, plugins, monkeypatch):
    import torch

    def build(settings, particles):
        return torch.rand(3, device="cuda") if torch.cuda.is_available() else torch.rand(3)

    def reseed_all(seed):
        raise AssertionError(seed)

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseed_all)
    spec = EncoderSpec("drawn", "test", build=build)
    settings = settings_from_flags(flags, plugins)
    first = spec.make(settings, None)
    before = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    assert torch.equal(first, spec.make(settings, None))
    after = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("how", ["wrapper", "hookwrapper"])
def test_hook_wrappers_are_refused_by_name(how, capsys):
    def around(trainer):
        yield

    def bring():
        yield

    late = types.SimpleNamespace(training_end=hookimpl(**{how: True})(around))
    more = types.SimpleNamespace(encoders=hookimpl(**{how: True})(bring))
    plugins = Plugins(found={"late": late, "more": more})
    assert list(plugins.origins()) == ["built-in"]
    assert "resid" in plugins.owned("encoders")
    assert capsys.readouterr().err.splitlines() == [
        f"cryodrgn_amort: plugin {name!r} left out (TypeError: {hook} is a hook wrapper, which is "
        "never run here)"
        for name, hook in (("late", "training_end"), ("more", "encoders"))
    ]


POLICY = re.compile(r"deprecated since (\d+)\.(\d+), goes in (\d+)\.(\d+)")
"""The words of a deprecation: see examples/plugins/README.md."""


def unkept(source, changelog, version):
    """Return the deprecations in a source that are not what the policy says.

    Those without its words, without a line in the changelog, too short, or overdue.
    """
    now = tuple(int(part) for part in version.split(".")[:2])
    wrong = []
    for line in re.findall(r"[^\n]*(?i:deprecated )[^\n]*", source):
        found = POLICY.search(line)
        since, goes = ((0, 0), (0, 0)) if found is None else (
            tuple(map(int, found.groups()[at : at + 2])) for at in (0, 2)
        )  # fmt: skip
        stays = goes >= (since[0], since[1] + 2)
        if found is None or now >= goes or not stays or found[0] not in changelog:
            wrong.append(line.strip())
    return wrong


def test_deprecations_are_as_the_policy_says():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for path in (ROOT / "cryodrgn_amort").rglob("*.py"):
        assert unkept(path.read_text(), changelog, __version__) == [], path
    for name in HOOKS:  # a hook that goes says so in these words, too
        spec = getattr(hookspecs, name).cryodrgn_amort_spec
        said = [spec["warn_on_impl"], *(spec["warn_on_impl_args"] or {}).values()]
        assert all(POLICY.search(str(warning)) for warning in said if warning is not None)


def test_the_policy_is_enforced():
    line = "hook old: deprecated since 0.2, goes in 0.4: use new"
    code = f"@hookspec(warn_on_impl=FutureWarning('{line}'))"
    assert unkept(code, line, "0.2.0") == unkept(code, line, "0.3.9") == []
    for changelog, version in ((line, "0.4.0"), (line, "1.0.0"), ("", "0.3.0")):
        assert unkept(code, changelog, version) == [code]
    for other in ("deprecated since 0.2, goes in 0.3: use new", "this is deprecated : use new"):
        assert unkept(other, other, "0.2.0") == [other]


def test_who_implements_a_deprecated_hook_is_told_in_one_line(monkeypatch, capsys):
    line = "deprecated since 0.2, goes in 0.4: use new"

    def old():
        """Do what was done before."""

    def epoch_end(trainer, metrics):
        """Do as ever."""

    made_up = {
        **vars(hookspecs),
        "old": hookspecs.hookspec(warn_on_impl=FutureWarning(f"hook old: {line}"))(old),
        "epoch_end": hookspecs.hookspec(
            warn_on_impl_args={"metrics": FutureWarning(f"argument metrics: {line}")}
        )(epoch_end),
    }
    monkeypatch.setattr(
        "cryodrgn_amort.plugins.manager.hookspecs", types.SimpleNamespace(**made_up)
    )
    found = {
        "late": plugin(old=lambda: None, epoch_end=lambda metrics: None),
        "modern": plugin(epoch_end=lambda trainer: None),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins = Plugins(found=found)
    assert list(plugins.origins()) == ["built-in", "late", "modern"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"cryodrgn_amort: plugin 'late': argument metrics: {line}",
        f"cryodrgn_amort: plugin 'late': hook old: {line}",
    ]
