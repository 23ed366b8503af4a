"""The benchmark: its turns, its processes, its tables, and that its sizes are what it says."""

import argparse
import contextlib
import importlib
import io
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cryodrgn_amort import host
from cryodrgn_amort.bench import __main__ as bench, workers
from cryodrgn_amort.bench.__main__ import Bench
from cryodrgn_amort.bench.processes import (
    Failed,
    Finished,
    environment,
    run_command,
    take_turns,
    working,
)
from cryodrgn_amort.bench.sections import Section, ratio, render
from cryodrgn_amort.bench.sizes import FULL, QUICK, Shape, variants
from cryodrgn_amort.core import available_memory

ENV = environment(1)


def test_sections_are_markdown_tables_with_their_notes():
    sections = [Section("Speed", ("D", "host"), [("64", "12.3"), ("128", "–")], ["One.", "Two."])]
    assert render({"Machine": "a CPU"}, [*sections, Section("Empty", ("D",))]).splitlines() == [
        "- Machine: a CPU", "", "### Speed", "", "| D | host |", "| --- | --- |", "| 64 | 12.3 |",
        "| 128 | – |", "", "One.", "Two.", "", "### Empty", "", "| D |", "| --- |",
    ]  # fmt: skip


def test_ratios_are_taken_within_rounds():
    assert ratio([2, 30, 8], [1, 10, 2]) == "3.00 × [2.00–4.00]"  # not 8 / 2
    assert ratio([3], [2]) == "1.50 ×"
    assert ratio([], [2]) == "–"


def test_shares_are_of_the_fastest_floor_of_the_precision():
    floors = dict(
        zip(bench._FLOORS.values(), ([10.0, 30.0], [20.0, 10.0], [100.0, 50.0]), strict=True)
    )
    rates = {"host": [2.0, 3.0], "ours, fp32": [10.0, 15.0], "ours, bf16": [20.0, 30.0], **floors}
    assert bench._relative(rates, "host") == "10 %"
    assert bench._relative(rates, "ours, fp32") == "5.00 × [5.00–5.00]; 50 %"
    assert bench._relative(rates, "ours, bf16") == "10.00 × [10.00–10.00]; 40 %"
    assert bench._relative({**rates, "ours, bf16": []}, "ours, bf16") == "–"
    assert bench._relative({**rates, "host": []}, "ours, fp32") == "–; 50 %"


def test_all_take_turns_and_the_warm_up_does_not_count():
    order = []

    def turn(name):
        order.append(name)
        if name == "c" and len(order) > 4:
            raise Failed("out of memory")
        return len(order)

    values, failures = take_turns({n: lambda n=n: turn(n) for n in "abc"}, rounds=2)
    assert "".join(order) == "cba" + "abc" + "ba"  # c has failed
    assert values == {"a": [4, 8], "b": [5, 7], "c": []}
    assert failures == {"c": "out of memory"}


def test_the_environment_is_that_of_the_user_without_allocator_settings(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("HOME_OF", "mine")
    env = environment(2, {"MALLOC_TOP_PAD_": "5"})
    assert "MALLOC_ARENA_MAX" not in env
    assert (env["HOME_OF"], env["MALLOC_TOP_PAD_"], env["OMP_NUM_THREADS"]) == ("mine", "5", "2")


def test_a_worker_answers_for_whole_pieces_of_work_and_not_for_preparations():
    answers = io.StringIO()
    workers.serve(iter([0, 4, 0, 4, 4]), io.StringIO("0.0\n0.0\n"), answers)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [f["done"] for f in found] == [4, 4]
    assert all(0 < f["seconds"] < 0.1 for f in found)


def test_a_process_that_breaks_says_why():
    with working(ENV, "table", n=1000) as worker, pytest.raises(Failed, match=r"zdim.*exit code 1"):
        worker.rate(0.01)
    with pytest.raises(Failed, match=r"^no luck \(exit code 3\)$"):
        run_command([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], ENV)


def test_a_command_is_measured_from_start_to_end():
    code = "import time; x = bytearray(200_000_000); time.sleep(0.3)"
    finished = run_command([sys.executable, "-c", code], ENV)
    assert 0.3 < finished.seconds < 30
    assert 200e6 < finished.peak_bytes < available_memory()


def test_a_command_is_stopped_when_it_says_so():
    code = "print('ready', flush=True); import time; time.sleep(60)"
    finished = run_command([sys.executable, "-c", code], ENV, until="ready")
    assert finished.seconds < 30
    with pytest.raises(Failed, match=r"^never \(exit code 3\)$"):
        run_command(
            [sys.executable, "-c", "print('never'); raise SystemExit(3)"], ENV, until="ready"
        )


def test_what_measures_memory_is_thin():
    code = (
        "import sys, cryodrgn_amort.bench.__main__\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_floor_has_the_sizes_of_the_hosts_decoder():
    for box in (16, 64):
        lattice = host.Lattice(box + 1, extent=0.5)
        mask = lattice.get_circular_mask((box + 1) // 2)
        assert 2 * workers.half_plane(box) == int(mask.sum())
        decoder = host.FTPositionalDecoder(
            3 + 8, box + 1, 3, 16, torch.nn.ReLU, enc_type="gaussian", feat_sigma=0.5
        )
        assert decoder.in_dim == workers.features(box) + 8
    floor = workers.floor_steps(box=16, width=8, layers=2, gemm="mkl")
    assert [next(floor), next(floor)] == [1, 1]


@pytest.mark.parametrize("optimizer", ["ours", "Adam", "SparseAdam"])
def test_tables_take_steps(optimizer):
    steps = workers.table_steps(n=40, zdim=2, optimizer=optimizer)
    assert [next(steps) for _ in range(5)] == [1] * 5


def test_a_flush_is_prepared_untimed():
    flush = workers.flush_rows(n=40, zdim=2)
    assert [next(flush) for _ in range(4)] == [0, 40, 0, 40]


def test_the_host_takes_its_steps(stack):
    steps = host.training_steps(
        stack.particles, stack.poses, stack.ctf, zdim=2, width=8, layers=1, batch_size=16
    )
    assert [next(steps) for _ in range(6)] == [16, 16, 16, 16, 6, 16]


def test_commands_are_what_they_are_called(tmp_path):
    def parse(module, argv):
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_args(parser)
        return vars(parser.parse_args(argv[1:]))

    files = {"particles": "p.mrcs", "poses": "poses.pkl", "ctf": "ctf.pkl"}
    common = {"zdim": 8, "batch_size": 16, "seed": 0, "do_analysis": False}
    for command in (*FULL.commands, *FULL.memory, *QUICK.commands, *QUICK.memory):
        theirs, ours = (
            parse(f"{package}.{who}", command.argv(who, files, str(tmp_path)))
            for package, who in (
                ("cryodrgn.commands", command.host),
                ("cryodrgn_amort.cli", "train_amort"),
            )
        )
        assert common.items() <= theirs.items()
        assert common.items() <= ours.items()
        assert not theirs["amp"]
        width, layers = ("pdim", "players") if command.host == "train_vae" else ("dim", "layers")
        assert (ours["pdim"], ours["players"]) == (theirs[width], theirs[layers])
        assert ours.get("log_interval", 1000) == theirs["log_interval"]
        assert ours.get("encoder") == ("vlt" if command.host == "train_dec" else None)


def test_whole_commands_become_rows(monkeypatch):
    def stack(env, n, box):
        return contextlib.nullcontext({"particles": "p", "poses": "o", "ctf": "c"})

    def run(argv, env, until):
        assert until is None
        if "bf16" in argv:
            raise Failed("no bf16 here")
        return Finished(30.0 if "train_vae" in argv else 10.0, 2**20)

    monkeypatch.setattr(bench, "stack", stack)
    monkeypatch.setattr(bench, "run_command", run)
    section = Bench(QUICK, 1, 0.01, 2, 1)._commands("T", QUICK.commands, ["fp32", "bf16"])
    assert [row[2:] for row in section.rows] == [
        ("`train_vae`", "30", "1.00 × [1.00–1.00]", "1"),
        ("`train_amort --precision fp32`", "10", "3.00 × [3.00–3.00]", "1"),
        ("`train_amort --precision bf16`", "–", "–", "–"),
    ]
    assert "no bf16 here" in section.notes[0]


def test_ours_is_in_its_default_precision_unless_told():
    found = [name for name, _, _ in variants(FULL.commands[1])]
    assert found == ["train_dec", "train_amort --encoder vlt"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rounds", "0"], "--rounds 0: must be positive"),
        (["--seconds", "nan"], "--seconds nan: must be positive"),
        (["--threads", "4096"], "--threads 4096: this machine has"),
        (["-o", "nowhere/OUT.md"], "-o nowhere/OUT.md: must name a file in a folder"),
        (["--only", "stop"], "invalid choice: 'stop'"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_into_memory_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda: 2**30)
    sizes = replace(QUICK, shapes=(Shape(128, 1024, 64),), table_rows=(10**7,))
    a_bench = Bench(sizes, 1, 0.01, 1, 1)
    assert "128 / 1024 / 64 left out: needs 42 GiB." in a_bench.step()[0].notes
    assert "10,000,000 rows left out: need 11 GiB." in a_bench.table()[0].notes


def test_a_quick_run(tmp_path):
    bench.main(["--quick", "--only", "step", "--threads", "1", "-o", str(tmp_path / "out.md")])
    text = (tmp_path / "out.md").read_text()
    assert "failed" not in text
    rows = [line for line in text.splitlines() if line.startswith("| 16 / 16 / 4 |")]
    assert len(rows) == 3  # tables of the step
    assert all("–" not in row for row in rows)
    assert "host, tuned" in text
    assert "cryodrgn " + host.VERSION in text


def test_the_bench_of_gpus_runs_without_one():
    """At toy sizes: the step is the host's, and every variant takes its turn."""
    from cryodrgn_amort.bench.gpu import GpuBench

    found = GpuBench(0.01)
    try:
        (parity,) = found.parity()
        apart = {row[0]: float(row[2]) for row in parity.rows}
        speed, shares = found.step()
        sections = [*found.syncs(), *found.table()]
    finally:
        logging.disable(logging.NOTSET)
    assert apart["fp32"] < 1e-5
    assert apart["fp64"] < 1e-6
    assert apart["bf16"] < 0.1
    assert all(float(cell.split()[0].replace(",", "")) > 0 for cell in speed.rows[0][1:])
    assert "×" in shares.rows[0][1]
    assert all(section.rows for section in sections)
