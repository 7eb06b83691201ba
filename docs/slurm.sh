#!/bin/bash
#SBATCH --job-name=sid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
# Submit with: sbatch docs/slurm.sh --config sdxl-4step-zero-cfg --set ... --out runs/mine
# Not tried on a cluster yet. --exclusive and --mem=0 ask for all of a node's CPUs and memory: torchrun is one task, and
# SLURM's default is one CPU a task.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun gives its processes 30 seconds to stop: too few for an iteration and a checkpoint of SDXL. Versions that have
# no --shutdown-timeout do not read this either, and always kill after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" -m sid_train distill "$@"
