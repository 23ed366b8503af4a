#!/usr/bin/env bash
# One run on several machines: a process per GPU (or, without GPUs, per machine) shares the particles.
#
#   sbatch examples/slurm.sh particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 \
#          -b 256 -n 50 -o outs/vlt --encoder vlt
#
# A job that was killed goes on from its last checkpoint, on any number of machines: add --load latest.
#SBATCH --job-name=train_amort
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=200G
#SBATCH --time=24:00:00
set -euo pipefail

processes=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / processes))

# -b counts the particles of all processes together
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m cryodrgn_amort train_amort "$@"
