#!/usr/bin/env bash
# All tests, on the installed package, in the environment that the quickstart makes, two files at
# a time.
#
#   bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$root"
export OMP_NUM_THREADS=1       # more threads than cores wait for each other
export OMP_WAIT_POLICY=passive # without spinning, where a test has several
exec pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
