#!/bin/bash
# Train on all GPUs of several machines: examples/ssh.sh machine1 machine2, from the repository.
# Every machine has as many GPUs, sees the repository, its .venv and the data at the same path, and
# reaches the first one at port 29500. --batch-size is shared by all GPUs, so it must be a multiple of their number.
# Ctrl-C ends them all. To go on: --resume --run-dir runs/a in place of hamner.train's other flags.
set -eu
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for machine in "$@"; do
    ssh -tt "$machine" "cd '$PWD' && .venv/bin/torchrun --nnodes $# --nproc-per-node gpu \
        --rdzv-backend c10d --rdzv-endpoint '$1:29500' --rdzv-id hamner \
        -m hamner.train --option a --batch-size 96 --data shards:data/fineweb --tokens 10e9" \
        </dev/null &
done
# The first that fails ends the others.
for machine in "$@"; do wait -n; done
