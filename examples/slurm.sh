#!/bin/bash
# Train on two nodes of eight GPUs under Slurm: sbatch examples/slurm.sh, from the repository.
# Every node sees the repository, its .venv and the data at the same path. --batch-size is shared by
# all GPUs; what to expect: python -m hamner.plan --gpus 8 --nodes 2 --batch-size 384
# To go on: --resume --run-dir runs/a in place of hamner.train's other flags.
#SBATCH --job-name=hamner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m hamner.train --option a --batch-size 384 --data shards:data/fineweb --tokens 10e9
