#!/usr/bin/env bash
# All GPUs of one machine: scripts/node.sh --model llama_7b --optim galore_adamw8bit --rank 1024 --output runs/7b
# What follows is galore-pretrain's. A process that is lost ends all; they are started again, three times, and go on
# from the newest checkpoint: so name an --output. Without GPUs: PROCESSES=2 scripts/node.sh …
# torchrun repeats whatever fails, a wrong flag too: try the line without this script first.
set -euo pipefail

fail() { echo "$1" >&2 && exit 2; }
processes=${PROCESSES:-$( (nvidia-smi --list-gpus 2> /dev/null || true) | wc -l)}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "no GPU found: say PROCESSES=2, or another number of processes"
command -v torchrun > /dev/null || fail "torchrun is not on the PATH: activate the venv (. .venv/bin/activate)"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / processes > 0 ? $(nproc) / processes : 1))}
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 -m galore_pretrain "$@"
