#!/usr/bin/env bash
# The same seeds give the same bytes as at another commit, and what that has written is read:
# tests/same_results.py.
#
#   bash tests/same_results.sh COMMIT
set -euo pipefail
commit=${1:?a commit is needed}
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MPLBACKEND=Agg CUDA_VISIBLE_DEVICES=
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir "$place/source" "$place/before" "$place/after"
git -C "$root" archive "$commit" | tar -x -C "$place/source"
python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --target "$place/site" "$place/source"
cd "$root/tests" # where the checkout's package is not in the way of either
for which in before after; do
    site=$([ "$which" = before ] && echo "$place/site" || true)
    PYTHONPATH=$site python same_results.py run "$place/$which" &
done
wait -n
wait -n
python same_results.py compare "$place/before" "$place/after"
python same_results.py read "$place/before"
