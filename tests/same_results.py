"""The same seeds give the same bytes before and after a change: see same_results.sh.

Weights, latents, metrics and evaluations of one run of each kind are compared, but for times,
paths, versions, and the words in which measures are defined.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

DATA = (
    "data/particles.mrcs --poses data/poses.pkl --ctf data/ctf.pkl --holdout data/ind_heldout.pkl"
)
SIZES = "--dec-dim 32 --dec-layers 2 -b 16 -n 3 --seed 1 --no-analysis"
NETWORK = f"--enc-dim 32 --enc-layers 2 {SIZES}"
EVALUATION = "--fit 12 --bootstrap 20 --sample 60 --volumes 6 --truth-volumes 8 --seed 3"
COMMANDS = f"""
simulate_amort -o data -n 110 --heldout 20 -D 20 --seed 5
simulate_amort -o tomo -n 60 -D 20 --tilts 3 --seed 6
train_amort {DATA} --zdim 3 {NETWORK} -o baseline
train_amort {DATA} --zdim 3 {SIZES} -o vlt --encoder vlt --table-lr-end 1e-3
train_amort {DATA} --zdim 2 {NETWORK} -o twin --encoder twin
train_amort --from vlt --encoder anchored --anchors 4 -n 6 --seed 2 --no-analysis -o anchored
train_amort {DATA} --zdim 2 {NETWORK} -o refined --do-pose-sgd --domain hartley
train_amort {DATA} --zdim 2 {NETWORK} -o augmented --augment 2 --consistency 0.5
train_amort tomo/particles.star --datadir tomo --poses tomo/poses.pkl --ctf tomo/ctf.pkl \
--ntilts 3 --encode-mode tilt --zdim 2 {NETWORK} --dose-per-tilt 3 -o tilted
train_amort {DATA} --zdim 3 {NETWORK} -o baseline -n 4 --load latest
infer_amort baseline -o fitted --steps 20
infer_amort vlt --held-out -o unseen --steps 10 --beta implied
eval_amort baseline {EVALUATION} --truth data --no-umap
eval_amort vlt {EVALUATION} --truth data
eval_amort twin {EVALUATION} --no-umap
eval_amort anchored {EVALUATION} --transform roll:2 rotate:30 --truth data --no-umap
eval_amort refined {EVALUATION} --no-umap
eval_amort tilted {EVALUATION} --no-umap
compare_amort baseline vlt -o agreement.json --volumes 4 --bootstrap 20 --clusters 3
mnist_amort -o digits --methods vae vlt -n 2 --fit 20 --bootstrap 20
study_amort -o study --preset plan.yaml --jobs 1
"""
PLAN = """
data:
  simulate: {n: 60, heldout: 6, D: 16, seed: 0}
train: {zdim: 2, dec-dim: 16, dec-layers: 1, num-epochs: 2, lr: 0.001}
evaluate: {bootstrap: 10, fit: 2, labelled: 2, volumes: 4, no-umap: true, transform: "roll:1"}
recipes: {baseline: {enc-dim: 16}, vlt: {}}
"""
READING = f"""
eval_amort baseline {EVALUATION} --no-umap -o read/baseline
eval_amort vlt {EVALUATION} --no-umap -o read/vlt
infer_amort anchored -o read/fitted --steps 10
compare_amort baseline vlt fitted --volumes 2 --bootstrap 10 --clusters 3
train_amort {DATA} --zdim 3 {SIZES} -o vlt --encoder vlt --table-lr-end 1e-3 -n 4 --load latest
train_amort --from baseline --encoder semi -n 1 --seed 2 --no-analysis -o read/semi
study_amort -o study
"""
"""What is done with what another commit has written."""
LEFT_OUT = {"definitions", "cryodrgn_amort", "chunk", "config.yaml"}
"""Keys of JSON and YAML besides those that no second run gives again."""


def run(folder: Path, commands: str = COMMANDS) -> None:
    """Run commands in a folder, with the package that is found first."""
    os.chdir(folder)
    Path("plan.yaml").write_text(PLAN)
    main = import_module("cryodrgn_amort.cli").main
    for line in commands.strip().splitlines():
        try:
            main(line.split())
        except SystemExit as stop:
            if stop.code:
                raise SystemExit(f"{folder.name}: {line}: exit code {stop.code}") from None


def compare(before: Path, after: Path) -> int:
    """Print which files differ; return how many do."""
    from faults import trials

    trials._DROPPED |= LEFT_OUT
    old, new = (trials.digest(folder, folder) for folder in (before, after))
    differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in differ:
        where = "differs" if name in old and name in new else "is missing on one side"
        print(f"{name}: {where}")
    print(f"{len(old)} files, {len(differ)} differ")
    return len(differ)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]))
    elif sys.argv[1] == "read":
        run(Path(sys.argv[2]), READING)
    else:
        sys.exit(compare(*map(Path, sys.argv[2:])) > 0)
