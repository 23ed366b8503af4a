"""The proposal to the host in examples/upstream.md is tried, so that it stays true."""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # of what the host imports

TEXT = (Path(__file__).parents[2] / "examples/upstream.md").read_text()


def block(language, containing):
    """Return the one code block of the text that has these words."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    (one,) = (code for code in found if containing in code)
    return one


def patched(source, diff):
    """Apply a diff whose hunks are found by their lines alone, each of which must be there once."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in keep) for keep in (" -", " +")
        )
        # a line may go on in the source: def f(
        at = [
            m.start()
            for m in re.finditer("^" + re.escape(before.rstrip("\n")), source, re.MULTILINE)
        ]
        assert len(at) == 1, before
        end = at[0] + len(before.rstrip("\n"))
        source = source[: at[0]] + after.rstrip("\n") + source[end:]
    return source


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Load a patched copy of the host's command line, which our start-up file knows nothing of."""
    import cryodrgn

    original = (Path(cryodrgn.__file__).parent / "command_line.py").read_text()
    copy = tmp_path / "command_line.py"
    copy.write_text(patched(original, block("diff", "_plugin_commands")))
    spec = importlib.util.spec_from_file_location("cryodrgn.command_line", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(cryodrgn, "command_line", module, raising=False)
    return module


def test_our_commands_come_by_entry_points_alone(command_line, monkeypatch, capsys, plugins):
    """The file that is started with Python wraps the host's own module; this one it never saw."""
    points = [
        metadata.EntryPoint(name, spec.module, "cryodrgn.commands")
        for name, spec in plugins.commands().items()
    ]
    installed = metadata.entry_points

    def entry_points(**given):
        return points if given.get("group") == "cryodrgn.commands" else installed(**given)

    monkeypatch.setattr(command_line.metadata, "entry_points", entry_points)
    for argv, said in ((["--help"], "scores_amort"), (["train_amort", "--help"], "--table-lr")):
        monkeypatch.setattr(sys, "argv", ["cryodrgn", *argv])
        with pytest.raises(SystemExit) as ended:
            command_line.main_commands()
        assert not ended.value.code
        out, err = capsys.readouterr()
        assert said in out
        assert "Left out" not in err


def test_the_test_that_is_proposed(command_line, tmp_path, monkeypatch, capsys):
    name = "test_commands_of_other_packages"
    text = block("python", f"def {name}")
    assert text.count("    assert ") >= 3
    scope = {}
    exec(compile(text, "examples/upstream.md", "exec"), scope)
    (tmp_path / "other").mkdir()
    scope[name](tmp_path / "other", monkeypatch, capsys)
    # without the change it fails
    monkeypatch.setattr(command_line, "_plugin_commands", lambda group, taken: {})
    (tmp_path / "again").mkdir()
    with pytest.raises((AssertionError, SystemExit)):
        scope[name](tmp_path / "again", monkeypatch, capsys)
