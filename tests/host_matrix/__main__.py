"""Try every command on every run: ``bash tests/host_matrix.sh``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from host_matrix import browser, dashboard, table
from host_matrix.commands import COMMANDS, Command
from host_matrix.folders import compare
from host_matrix.host import Host
from host_matrix.runs import HOSTS_OWN, IN_BROWSER, SAME, Run, make

if TYPE_CHECKING:
    from concurrent.futures import Future

JOBS = 2
ABSENT = "invalid choice"


def _call(
    host: Host, command: Command, run: Run, out: Path, log: Path, pictures: Path | None
) -> int:
    """Call a command, for the dashboard also use it; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    argv = [command.script, command.name, *command.argv(run, out)]
    if command.name != "dashboard":
        return host.run(argv, out.parents[2], log, **command.environ(run))
    port = dashboard.free_port()
    started = host.start([*argv, "--port", port], out.parents[2], log)
    url = f"http://127.0.0.1:{port}/"
    try:
        takes_covariates = dashboard.check(run, url, out, lambda: host.has_ended(started))
        if takes_covariates:
            picture = pictures and pictures / f"dashboard-{run.name}-{host.version}.png"
            browser.show(url, run.folder.parent.parent / "evals" / IN_BROWSER, picture)
    except AssertionError:
        if ABSENT in log.read_text():
            return 2
        raise
    finally:
        host.end(started)
        host.wait(started)
    return 0


def _try(
    host: Host, command: Command, run: Run, like: Run | None, work: Path, pictures: Path | None
) -> str:
    """Give a run to a command; returns what came of it, one of the words of ``table``."""
    out, log = work / "out" / run.name / command.name, work / "logs" / f"{run.name}.{command.name}"
    code = _call(host, command, run, out, log, pictures)
    said = log.read_text()
    if code == 2 and ABSENT in said:
        return table.ABSENT
    if command.name == "eval_images" and run.sees == "nothing":
        assert code, "takes a table's NaN for an encoder"
        assert "nan" in said.lower(), f"fails without naming NaN: {said.splitlines()[-1]}"
        assert not any(out.iterdir()), "fails, and writes something"
        return table.REFUSED
    assert code == 0, f"exit code {code}: {(said.splitlines() or [''])[-1]}"
    command.check(run, command.gives(run, out))
    if like is None:
        return table.WORKS
    of = work / "out" / like.name / command.name
    numbers = run.name in SAME
    compare(
        (command.gives(run, out), run.epoch), (command.gives(like, of), like.epoch),
        varies=command.varies, random=command.random, others=command.others, numbers=numbers,
    )  # fmt: skip
    return table.SAME if numbers else table.WORKS


def _all_of(host: Host, run: Run, stocks: dict[str, Run], found: dict[str, dict[str, str]],
            work: Path, pictures: Path | None) -> dict[str, str]:  # fmt: skip
    """Give a run to all commands: command -> what came of it, or what went wrong."""
    cells = {}
    for command in COMMANDS:
        expected = found.get(run.like, {}).get(command.name, "")
        try:
            cells[command.name] = _try(host, command, run, stocks.get(run.like), work, pictures)
        except Exception as err:
            if not isinstance(err, (AssertionError, OSError)):
                traceback.print_exc()
            why = (str(err).strip().splitlines() or [repr(err)])[0]
            cells[command.name] = f"{table.FAILS}: {why.replace(str(run.folder), 'RUN')}"
        if cells[command.name].startswith(table.FAILS) and cells[command.name] == expected:
            cells[command.name] = table.LIKE_STOCK
    return cells


def try_host(here: Path, only: list[str], pictures: Path | None) -> dict[str, dict[str, str]]:
    """Try one version of the host: run -> command -> what came of it."""
    work = here / "work"
    shutil.rmtree(work, ignore_errors=True)
    stock, ours = Host(here / "host"), Host(here / "ours")
    assert not stock.has_plugin, f"{here / 'host'}: not the unmodified host"
    assert ours.has_plugin, f"{here / 'ours'}: without cryodrgn_amort"
    try:
        runs = make(work, stock, ours, JOBS)
        ours.close()
        stocks = {run.name: run for run in runs if not run.like}
        wanted = [run for run in runs if not only or run.name in only]
        found: dict[str, dict[str, str]] = {}
        with ThreadPoolExecutor(JOBS) as pool:
            for some in (list(stocks.values()), [r for r in wanted if r.name not in stocks]):
                waiting: dict[str, Future[dict[str, str]]] = {
                    run.name: pool.submit(_all_of, stock, run, stocks, found, work, pictures)
                    for run in some
                }
                found |= {name: future.result() for name, future in waiting.items()}
    finally:
        stock.close()
        ours.close()
    return found


def main() -> None:
    """Try all hosts; exit code 1 if a cell is not as it should be."""
    parser = argparse.ArgumentParser(prog="bash tests/host_matrix.sh", description=__doc__)
    parser.add_argument("hosts", nargs="+", type=Path, help="folders with host and ours")
    parser.add_argument("--write-page", action="store_true", help="put the table into docs/host.md")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="keep the browser's here")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these runs alone")
    args = parser.parse_args()
    if args.write_page and (args.only or len(args.hosts) < 2):
        parser.error("--write-page: takes all runs, and two hosts")
    if browser.program() is None:
        parser.error("no Chromium (Debian: chromium; or name it with CHROMIUM=...)")
    pictures = args.screenshots and args.screenshots.resolve()
    started, results = time.monotonic(), {}
    for here in map(Path.resolve, args.hosts):
        results[here.name] = try_host(here, args.only, pictures)
        (here / "results.json").write_text(json.dumps(results[here.name], indent=1))
        seconds = time.monotonic() - started
        print(f"cryodrgn {here.name}: {len(results[here.name])} runs, {seconds:.0f} s", flush=True)
    faults = [
        f"cryodrgn {host}: {command}, {run}: {cell}"
        for host, rows in results.items() for run, cells in rows.items()
        for command, cell in cells.items()
        if cell.startswith(table.FAILS) and (run, command) not in HOSTS_OWN
    ]  # fmt: skip
    print(*faults, f"{len(faults)} faults, {time.monotonic() - started:.0f} s", sep="\n")
    names = [name for name in next(iter(results.values())) if not name.startswith("train_vae")]
    written = table.render(results, names, [command.name for command in COMMANDS])
    print(written)
    if args.write_page and not faults:
        table.write(Path(__file__).parents[2] / "docs/host.md", written)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
