#!/usr/bin/env bash
# All tests, on the installed package, in the environment that the quickstart makes.
#
#   bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$root"
export OMP_WAIT_POLICY=passive # threads that wait for each other on busy cores do not spin
exec pytest -q "$@"
