"""Joining the ``cryodrgn`` command: installed for real, removed without a trace."""

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path

import pytest

from cryodrgn_amort.cli import command_line as cli
from cryodrgn_amort.core import default_device, device_name

ROOT = Path(__file__).parents[2]
OURS = (
    "simulate_amort", "train_amort", "eval_amort", "infer_amort", "compare_amort", "time_amort",
    "validate_amort", "scores_amort", "study_amort", "mnist_amort", "amort_plugins",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Make a virtual environment with a copy of the host; other packages come from this one."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    here = Path(sysconfig.get_path("purelib"))
    shutil.copytree(
        here / "cryodrgn", site / "cryodrgn", ignore=shutil.ignore_patterns("__pycache__")
    )
    dist = Path(str(importlib.metadata.distribution("cryodrgn")._path))
    shutil.copytree(dist, site / dist.name)
    (site / "others.pth").write_text(f"{here}\n")
    script = folder / "bin/cryodrgn"
    script.write_text(
        f"#!{folder}/bin/python\nfrom cryodrgn.command_line import main_commands\nmain_commands()\n"
    )
    script.chmod(0o755)
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "cryodrgn_amort"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    return types.SimpleNamespace(folder=folder, site=site, source=source, script=script)


def pip(environment, *argv):
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python",
         environment.folder / "bin/python", *argv],
        check=True, capture_output=True,
    )  # fmt: skip


def files(environment):
    return {
        path.relative_to(environment.folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("bin", "lib")
        for path in (environment.folder / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def run(environment, *argv):
    return subprocess.run(
        [environment.script, *argv], capture_output=True, text=True, cwd=environment.folder
    )


def listed(shown):
    return [name for name in OURS if name in shown.stdout]


@pytest.mark.parametrize("how", ["normal", "editable"])
def test_install_joins_and_uninstall_leaves_no_trace(environment, how):
    before = files(environment)
    where = ["-e", environment.source] if how == "editable" else [environment.source]
    pip(environment, "install", "--no-deps", "--no-build-isolation", *where)
    shown = run(environment, "--help")
    assert shown.returncode == 0
    assert listed(shown) == list(OURS)
    assert "train_vae" in shown.stdout
    assert shown.stderr == ""
    if how == "normal":  # break what is installed: the host must not notice but for one line
        broken = environment.site / "cryodrgn_amort/plugins/manager.py"
        code = broken.read_text()
        broken.write_text("def oops(:\n")
        shown = run(environment, "--help")
        assert shown.returncode == 0
        assert "train_vae" in shown.stdout
        assert shown.stderr.count("\n") == 1
        assert "cryodrgn_amort: subcommands not added (SyntaxError" in shown.stderr
        broken.write_text(code)
    pip(environment, "uninstall", "-y", "cryodrgn-amort")
    assert files(environment) == before


def fake_host(seen):
    def get_commands(cmd_dir, cmds, doc_str=""):
        seen.append(list(cmds))

    return types.SimpleNamespace(_get_commands=get_commands)


@pytest.fixture
def joined(monkeypatch):
    """Join a stand-in for the host's command line; returns what it is asked to list."""
    seen = []
    host = fake_host(seen)
    cli.join_host(host)
    yield lambda folder, names: (host._get_commands(f"/x/{folder}", names, doc_str=""), seen[-1])[1]
    for name in OURS:
        sys.modules.pop(f"cryodrgn.commands.{name}", None)


def test_the_hosts_commands_win_a_name_clash(joined):
    assert joined("commands", ["analyze", "train_amort"]).count("train_amort") == 1
    assert "cryodrgn.commands.train_amort" not in sys.modules
    assert joined("commands", ["analyze"]) == ["analyze", *OURS]
    assert hasattr(sys.modules["cryodrgn.commands.train_amort"], "add_args")


def test_utility_commands_are_left_alone(joined):
    assert joined("commands_utils", ["clean"]) == ["clean"]


@pytest.mark.parametrize(
    "fault", [ImportError("no jinja2"), SyntaxError("bad"), AttributeError("add_args")]
)
def test_a_broken_command_is_left_out_in_one_line(joined, monkeypatch, capsys, fault):
    load = cli._load

    def broken(spec):
        if spec.name == "train_amort":
            raise fault
        return load(spec)

    monkeypatch.setattr(cli, "_load", broken)
    assert joined("commands", ["analyze"]) == ["analyze", *(n for n in OURS if n != "train_amort")]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "`train_amort` is not available" in err


def test_the_start_up_module_is_light_and_removes_itself():
    path = ROOT / "cryodrgn_amort/cli/startup/_cryodrgn_amort_hook.py"
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('hook', {str(path)!r})\n"
        "hook = importlib.util.module_from_spec(spec)\n"
        "before = set(sys.modules); spec.loader.exec_module(hook); hook.install()\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
        "assert sys.meta_path[0] is hook._Finder\n"
        "hook.install(); assert sys.meta_path.count(hook._Finder) == 1\n"
        "assert hook._Finder.find_spec('json') is None\n"
        "hook.uninstall(); assert hook._Finder not in sys.meta_path\n"
    )
    assert subprocess.run([sys.executable, "-S", "-c", code]).returncode == 0


def test_the_script_lists_and_helps(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(name in out for name in OURS)
    code, out, _ = cli("train_amort", "--help")
    assert code == 0
    assert "--table-lr" in out
    assert "==SUPPRESS==" not in out
    assert "(default: 16)" in out  # the host's --batch-size
    assert cli()[0] == 2
    assert cli("train_vae")[0] == 2


def test_the_version_names_all_that_a_report_of_a_fault_needs(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for name in ("cryodrgn", "torch", "numpy"):
        assert f"{name} {importlib.metadata.version(name)}" in said
    assert said.splitlines()[-1] == device_name(default_device())
