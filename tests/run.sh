#!/usr/bin/env bash
# All tests, on the installed package, in the environment that the quickstart makes.
#
#   bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$root"
exec pytest -q "$@"
