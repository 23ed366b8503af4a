"""The table of what stock cryodrgn makes of our runs, and its dashboard in a browser."""

import re
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import read_pickles, run_host
from host_matrix import browser, table
from host_matrix.commands import COMMANDS
from host_matrix.folders import compare
from host_matrix.runs import rows_of_the_table

PAGE = Path(__file__).parents[1] / "docs/host.md"
NAMES = [command.name for command in COMMANDS]


def test_the_page_has_what_there_is_and_nothing_fails(plugins):
    counts, commands, cells = table.parse(PAGE.read_text())
    assert sorted(commands) == sorted(NAMES)
    assert counts == dict.fromkeys(rows_of_the_table(plugins), 1)
    assert not [cell for cell in cells if table.FAILS in cell]
    made = {n for n, r in plugins.owned("recipes").items() if r.item.command == "train_amort"}
    assert made | {"mlp"} < counts.keys()


def test_commands_are_the_hosts():
    for command in COMMANDS:
        folder = {"cryodrgn": "commands", "cryodrgn_utils": "commands_utils"}[command.script]
        assert find_spec(f"cryodrgn.{folder}.{command.name}")


def test_a_table_is_read_as_it_was_written(tmp_path):
    line = {"x": "yes", "y": "yes", "z": "refused"}
    cells = {"a": line, "b": {**line, "z": "yes"}, "c": line}
    older = {run: {**row, "y": "none"} for run, row in cells.items()}
    written = table.render({"1": older, "2": cells}, ["a", "b", "c"], ["x", "y", "z"])
    assert written.splitlines() == [
        "| run of | `x` | `y` | `z` |",
        "|---|---|---|---|",
        "| `a`, `c` | yes | yes (1: none) | refused |",
        "| `b` | yes | yes (1: none) | yes |",
    ]
    page = tmp_path / "host.md"
    page.write_text(f"before\n{table.START}\n| old |\n{table.END}\nafter\n")
    for _ in range(2):
        table.write(page, written)
    text = page.read_text()
    assert text.startswith(f"before\n{table.START}\n| run of")
    assert text.endswith(f"{table.END}\nafter\n")
    counts, commands, _ = table.parse(text)
    assert (counts, commands) == ({"a": 1, "b": 1, "c": 1}, ["x", "y", "z"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "more.txt").write_text("1"), "has also more.txt"),
        (lambda f: (f / "z.txt").unlink(), "lacks z.txt"),
        (lambda f: np.savetxt(f / "z.txt", np.ones((4, 2))), r"z.txt: \(4, 2\), not \(3, 2\)"),
        (
            lambda f: np.savetxt(f / "z.txt", np.full((3, 2), 1.01)),
            "z.txt: 1.0e-02 of the greatest",
        ),
        (lambda f: np.savetxt(f / "z.txt", np.full((3, 2), np.nan)), "z.txt: not finite"),
    ],
)
def test_folders_that_differ_are_told_apart(change, says, tmp_path):
    for name, epoch in (("a", 2), ("b", 7)):
        (tmp_path / name).mkdir()
        np.savetxt(tmp_path / name / "z.txt", np.ones((3, 2)))
        (tmp_path / name / f"curve_epoch{epoch}.png").touch()
    both = (tmp_path / "a", 2), (tmp_path / "b", 7)
    more = {"varies": (), "random": (), "others": (), "numbers": True}
    compare(*both, **more)
    change(tmp_path / "a")
    with pytest.raises(AssertionError, match=says):
        compare(*both, **more)


@pytest.mark.skipif(browser.program() is None, reason="no Chromium")
def test_the_dashboard_shows_our_values_in_a_browser(train, flags, cli, tmp_path):
    """A table's, which has no retrieval rank; all that is written of it can be loaded."""
    app = pytest.importorskip("cryodrgn.dashboard.app")
    from werkzeug.serving import make_server

    folder = train(flags, encoder="vlt").folder
    run_host("analyze", folder, 2, "--skip-umap", "--ksample", "2", "--pc", "1", "--n-per-pc", "2")
    small = ["--no-umap", "--bootstrap", "2", "--fit", "8", "--volumes", "2", "--labelled", "2",
             "--maps", "0"]  # fmt: skip
    code, _, err = cli("eval_amort", folder, *small, "-o", tmp_path / "eval")
    assert code == 0, err
    values = tmp_path / "eval/reconstruction.pkl"
    assert np.isfinite(read_pickles(values)).sum() > 30
    server = make_server("127.0.0.1", 0, app.create_app(str(folder)), threaded=True)
    server.daemon_threads = False  # closing waits for them: no socket stays open
    threading.Thread(target=server.serve_forever).start()
    try:
        browser.show(f"http://127.0.0.1:{server.port}/", values, tmp_path / "seen.png")
    finally:
        server.shutdown()
        server.server_close()
    assert re.match(rb"\x89PNG", (tmp_path / "seen.png").read_bytes())
