#!/usr/bin/env bash
# Kills, full disks, damaged and hostile files, by the hundreds and thousands: tests/faults.
#
#   bash tests/faults.sh [--kills N] [--full N] [--damaged N] [--jobs N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$root/tests"
export OMP_NUM_THREADS=1
exec python -m faults "$@"
