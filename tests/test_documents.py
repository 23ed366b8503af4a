"""What README.md and examples/ tell people to type: it exists. tests/documents.sh runs it."""

import argparse
import importlib
import re
import subprocess

import pytest
from documents.commands import PAGES, ROOT, commands

COMMANDS = [command for page in PAGES for command in commands(page)]


def test_there_are_some():
    assert len([c for c in COMMANDS if c.page == "README.md"]) > 30
    assert {c.own[0] for c in COMMANDS if c.own} >= {"train_amort", "eval_amort", "study_amort"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_exists_with_its_flags(command, plugins):
    if command.own is None:
        name, *rest = command.words
        assert name in ("bash", "pip", "cryodrgn", "python", "pdoc")
        files = [word for word in rest if "/" in word and not word.startswith("-")]
        for file in files if name != "cryodrgn" else ():
            assert (ROOT / file).exists(), file
        return
    name, *argv = command.own
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(plugins.commands()[name].module).add_args(parser)
    parser.parse_args(argv)


def test_every_command_is_shown(plugins):
    shown = {c.own[0] for c in COMMANDS if c.own and c.page == "README.md"}
    assert shown == set(plugins.commands())


def test_the_job_script_is_one():
    script = ROOT / "examples/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().replace("\\\n", "").splitlines()
    assert any(re.search(r"torchrun .*-m cryodrgn_amort train_amort", line) for line in lines)


def test_the_measures_are_those_of_the_catalogue():
    """README has what ``catalogue_table`` returns."""
    from cryodrgn_amort.measures.tables import catalogue_table

    assert catalogue_table() in (ROOT / "README.md").read_text()
