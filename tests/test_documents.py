"""What README.md, docs/ and examples/ tell to type: it exists. tests/documents.sh runs it."""

import argparse
import html
import importlib
import re
import subprocess
import sys

import pytest
import tomllib
import yaml
from documents.commands import MANUAL, PAGES, ROOT, commands

import cryodrgn_amort
from cryodrgn_amort import api
from cryodrgn_amort.measures.catalogue import DEFINITIONS
from cryodrgn_amort.plugins import hookspecs

HOOKS = [name for name in hookspecs.__all__ if name != "hookimpl"]
COMMANDS = [command for page in PAGES for command in commands(page)]


def test_there_are_some():
    assert len([c for c in COMMANDS if c.page in MANUAL]) > 30
    assert {c.own[0] for c in COMMANDS if c.own} >= {"train_amort", "eval_amort", "study_amort"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_exists_with_its_flags(command, plugins):
    if command.own is None:
        name, *rest = command.words
        assert name in ("bash", "pip", "cryodrgn", "python")
        files = [word for word in rest if "/" in word and not word.startswith("-")]
        for file in files if name != "cryodrgn" else ():
            assert (ROOT / file).exists(), file
        return
    name, *argv = command.own
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(plugins.commands()[name].module).add_args(parser)
    parser.parse_args(argv)


def test_every_command_is_shown(plugins):
    shown = {c.own[0] for c in COMMANDS if c.own and c.page in MANUAL}
    assert shown == set(plugins.commands())


def test_the_job_script_is_one():
    script = ROOT / "examples/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().replace("\\\n", "").splitlines()
    assert any(re.search(r"torchrun .*-m cryodrgn_amort train_amort", line) for line in lines)


def test_containers_install_the_pinned_versions():
    """Both recipes from the same base, by the same command; conda by the same pins."""
    folder = ROOT / "examples/containers"
    dockerfile = re.sub(r"\\\n\s*", " ", (folder / "Dockerfile").read_text())
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    kinds = [line.split()[0] for line in lines]
    assert kinds[0] == "FROM"
    assert set(kinds) <= {"FROM", "ARG", "LABEL", "COPY", "RUN", "WORKDIR", "CMD"}
    (start,) = re.findall(r"^FROM (\S+:\S+)$", dockerfile, re.MULTILINE)
    (install,) = re.findall(r"(pip install [^&\n]+?)\s*(?:&&|$)", dockerfile, re.MULTILINE)
    definition = re.sub(r"\\\n\s*", " ", (folder / "apptainer.def").read_text())
    assert f"\nBootstrap: docker\nFrom: {start}\n" in definition
    assert install in definition
    sections = re.findall(r"^%(\w+)", definition, re.MULTILINE)
    assert sorted(sections) == ["files", "labels", "post", "runscript", "test"]
    assert (ROOT / install.split("--constraint /opt/cryodrgn_amort/")[1].split()[0]).is_file()
    assert re.search(r"^# .*CUDA \d+\.\d", dockerfile, re.MULTILINE)
    conda = yaml.safe_load((ROOT / "examples/environment.yml").read_text())
    assert set(conda) == {"name", "channels", "dependencies"}
    (pips,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    pins, *wanted = pips
    assert (ROOT / "examples" / pins.removeprefix("--constraint ")).is_file()
    assert wanted == ["torch", ".."]


def test_the_licence_and_the_citation_are_those_of_the_package():
    """As the project's metadata have them, and in the wheel that is built."""
    with open(ROOT / "pyproject.toml", "rb") as handle:
        project = tomllib.load(handle)["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cryodrgn_amort.__version__
    assert citation["license"] == project["license"] == "GPL-3.0-or-later"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    cited = " ".join(reference["title"] for reference in citation["references"])
    assert "Observations on Applications in cryo-EM" in cited
    assert "CryoDRGN" in cited
    licence = (ROOT / "LICENSE").read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in licence
    assert len(licence.splitlines()) > 600
    assert project["license-files"] == ["LICENSE"]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, with every link, anchor and reference checked."""
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_flag_measure_hook_and_function(site, plugins):
    def text(page):
        return html.unescape((site / page).read_text())

    for name, spec in plugins.commands().items():
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(spec.module).add_args(parser)
        page, shown = text(f"commands/{name}.html"), visible(parser)
        assert not [flag for flag in shown if f"<code>{flag}</code>" not in page], name
    assert not [m for m in DEFINITIONS if f"<code>{m}</code>" not in text("measures.html")]
    module = "cryodrgn_amort.plugins.hookspecs"
    assert not [h for h in HOOKS if f'id="{module}.{h}"' not in text("plugins.html")]
    python = text("python.html")
    assert not [f for f in api.__all__ if f'id="cryodrgn_amort.api.{f}"' not in python
                and f[0].islower()]  # fmt: skip


def visible(parser):
    actions = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    return [flag for action in actions for flag in action.option_strings]


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?:', page.read_text())
