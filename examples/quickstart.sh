#!/usr/bin/env bash
# From nothing to a report in a few minutes: simulates particles of a molecule with parts that come
# and go and an arm that moves, trains cryoDRGN's encoder, a lookup table and an evil twin on them,
# and measures what rolling and turning the particles does to the latents.
#
#   bash examples/quickstart.sh [OUTPUT FOLDER, default: quickstart]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out=${1:-quickstart}
mkdir -p "$out"
cd "$out"
epochs=${QUICKSTART_EPOCHS:-25}
export OMP_NUM_THREADS=1 # two commands at a time, a core each

cryodrgn simulate_amort -o data -n "${QUICKSTART_PARTICLES:-2000}" --heldout 400 -D 32 --snr 0.3 --seed 0 --overwrite

train() { # NAME FLAGS...
    name=$1
    shift
    cryodrgn train_amort data/particles.mrcs --poses data/poses.pkl --ctf data/ctf.pkl \
        --holdout data/ind_heldout.pkl --zdim 8 --dec-dim 64 --lr 1e-3 -n "$epochs" --seed 0 --no-analysis \
        --log-interval 1000000 -o "$name" --overwrite "$@" >"$name.log" 2>&1 || {
        cat "$name.log" >&2
        return 1
    }
    echo "trained $name"
}
evaluate() { # NAME
    cryodrgn eval_amort "$1" --labels data/labels.pkl --coordinate data/coordinate.pkl --fit 32 \
        >"$1.eval.log" 2>&1 || {
        cat "$1.eval.log" >&2
        return 1
    }
}

echo "training (25 epochs each; progress is in $PWD/*.log) ..."
train baseline --encoder resid --enc-dim 256 &
baseline=$!
train vlt --encoder vlt &
vlt=$!
wait $baseline
wait $vlt
train twin --encoder twin --enc-dim 256 &
twin=$!
echo "evaluating ..."
evaluate baseline
evaluate vlt
wait $twin
evaluate twin

for name in baseline vlt twin; do
    echo
    echo "== $name"
    grep -v '^(' $name.eval.log || true
done
echo
echo "Reports: $PWD/{baseline,vlt,twin}/amort.$epochs/report.html"
