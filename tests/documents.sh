#!/usr/bin/env bash
# Every command of README.md and docs/, the quickstart and the notebook, on small data: tests/documents.
#
#   bash tests/documents.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$root/tests"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MPLBACKEND=Agg
exec python -m documents
