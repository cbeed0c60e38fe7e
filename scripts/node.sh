#!/usr/bin/env bash
# All GPUs of one machine: scripts/node.sh --model llama_7b --optim galore_adamw8bit --rank 1024 --output runs/7b
# What follows is galore-pretrain's. A process that is lost ends all; they are started again, three times, and go on
# from the newest checkpoint: so name an --output. Without GPUs: PROCESSES=2 scripts/node.sh …
set -euo pipefail

processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / processes > 0 ? $(nproc) / processes : 1))}
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 -m galore_pretrain "$@"
