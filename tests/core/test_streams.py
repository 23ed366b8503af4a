"""Whoever reads standard output and error: may leave, may not know a letter, may not be there."""

import os
import subprocess
import sys

SCRIPT = r"""
import argparse, logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.INFO)  # as the host does
from cryodrgn_amort.cli.command_line import _guarded

def work(args):
    for i in range(2000):
        logging.info("line %d", i)
    print("\u00b5, \udcff, \u4e2d")
    sys.stderr.write("caution: \udcff\n")
    open(sys.argv[1], "w").write("done")

_guarded("train_amort", work)(argparse.Namespace())
"""


def run(tmp_path, first_line_only=False, **how):
    """Run the script; returns what it says on standard output and error."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path / "done")]
    with subprocess.Popen(argv, env=env, **how) as process:
        if first_line_only:
            out = process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read() if process.stderr else b""
        else:
            out, err = process.communicate()
    assert process.returncode == 0, err
    assert (tmp_path / "done").read_text() == "done"
    return out, err


def test_a_closed_pipe_is_no_error_of_the_work(tmp_path):
    pipe = subprocess.PIPE
    out, err = run(tmp_path, True, stdout=pipe, stderr=pipe)
    assert (out, err) == (b"INFO:root:line 0\n", b"caution: \\udcff\n")
    run(tmp_path, True, stdout=pipe, stderr=subprocess.STDOUT)


def test_help_into_a_closed_pipe():
    argv = [sys.executable, "-m", "cryodrgn_amort", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_an_encoding_lacks_is_written_all_the_same(tmp_path):
    out, _ = run(tmp_path, stdout=subprocess.PIPE)
    assert out.endswith(b"line 1999\n\\xb5, \\udcff, \\u4e2d\n")


def test_closed_streams_are_no_error_either(tmp_path):
    def close():
        os.close(1)
        os.close(2)

    run(tmp_path, preexec_fn=close)
