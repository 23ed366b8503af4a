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
SECONDS=0

say() { printf '%3d s  %s\n' $SECONDS "$*"; }
train() { # NAME FLAGS...
    name=$1
    shift
    cryodrgn train_amort data/particles.mrcs --poses data/poses.pkl --ctf data/ctf.pkl \
        --holdout data/ind_heldout.pkl --zdim 8 --dec-dim 64 --lr 1e-3 -n "$epochs" --seed 0 --no-analysis \
        --log-interval 1000000 -o "$name" --overwrite "$@" >"$name.log" 2>&1 || {
        cat "$name.log" >&2
        return 1
    }
    say "trained $name"
}
evaluate() { # NAME
    cryodrgn eval_amort "$1" --labels data/labels.pkl --coordinate data/coordinate.pkl --fit 32 --no-umap \
        >"$1.eval.log" 2>&1 || {
        cat "$1.eval.log" >&2
        return 1
    }
    say "report: $PWD/$1/amort.$epochs/report.html"
}

cat <<END
What comes, on two cores:
    now          2,000 particles are simulated, and 400 that are held out
    10 s         cryoDRGN's network is trained on them (progress: $PWD/baseline.log)
    2 minutes    first report: can this encoder be trusted?
    3 minutes    a table without any network, and a network that is shown the wrong particles
    6 minutes    their reports, and the numbers side by side
END
cryodrgn simulate_amort -o data -n "${QUICKSTART_PARTICLES:-2000}" --heldout 400 -D 32 --snr 0.3 --seed 0 --overwrite \
    >simulate.log 2>&1 || {
    cat simulate.log >&2
    exit 1
}
say "simulated: $PWD/data"
train baseline --encoder resid --enc-dim 256
evaluate baseline

export OMP_NUM_THREADS=1 # from here on two commands at a time, a core each
train twin --encoder twin --enc-dim 256 &
twin=$!
train vlt --encoder vlt
evaluate vlt
wait $twin
evaluate twin

for name in baseline vlt twin; do
    echo
    echo "== $name"
    grep -v '^(' $name.eval.log || true
done
cat <<END

Three numbers to look at, of baseline first:
    retrieval_rank, roll:1   0: a particle that is moved by one pixel stays where it was; 0.5: it lands anywhere.
                             About 0.4 says that the encoder knows pictures by heart, and not the molecule.
    held_out_score           1: particles that it has never seen are encoded as well as can be; 0: no better than a constant.
    class_knn                of how many particles is the composition found? About as many for vlt, which has no encoder,
                             and for twin, whose encoder sees the wrong particles: heterogeneity does not need an encoder.

Reports: $PWD/{baseline,vlt,twin}/amort.$epochs/report.html
Next: docs/tutorial.md, with your own particles.
END
