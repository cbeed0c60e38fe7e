#!/usr/bin/env bash
# Several machines under Slurm, one torchrun on each:
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh --model llama_7b --optim galore_adamw8bit --rank 1024 --output runs/7b
# --output must be a folder that all of them see. Slurm's warning of the end, and scancel, save a checkpoint first, for
# which torchrun allows 30 s;
# submitted again, the same line goes on from the newest.
#SBATCH --job-name=galore-pretrain
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:?no GPUs: give sbatch --gpus-per-node}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus > 0 ? SLURM_CPUS_PER_TASK / gpus : 1))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for each start: torch's own keeps old addresses
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m galore_pretrain "$@"
