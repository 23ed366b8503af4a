"""The short form of ``bash tests/faults.sh``: some kills, full disks and damaged files, and all
hostile ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

# The others, and each of these more often, by bash tests/faults.sh: what costs time here is to know
# how each would have ended.
SOME = ("training, table", "simulation", "fits", "particles", "a table goes on", "comparison")


def test_faults_do_no_harm():
    done = subprocess.run(
        [sys.executable, "-m", "faults", "--quick", "--kills", "4", "--full", "4",
         "--damaged", "12", "--jobs", "1", "--only", *SOME],
        cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    totals = dict(re.findall(r"\| ([\w ]+) \| all \| (.*) \|", _joined(done.stdout)))
    ends = totals["kills"].split(" | ")
    assert int(ends[1]) >= 4
    assert ends[2:] == ["0", "0", "0"]
    assert int(totals["full disks"].split(" | ")[1]) >= 4
    refused, harmless, executed, broken = map(int, totals["hostile files"].split(" | "))
    assert refused + harmless >= 30
    assert executed == broken == 0


def _joined(text):
    """Put the kind of fault before each row of its table."""
    kind, lines = "", []
    for line in text.splitlines():
        if line.endswith("hangs |"):
            kind = line.split(" | ")[0].removeprefix("| ")
        lines.append(f"| {kind} {line}")
    return "\n".join(lines)
