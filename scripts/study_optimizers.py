"""What bases, refreshes, moments, bits and rounding cost in perplexity, where the matrices matter.

    python scripts/study_optimizers.py runs/study            # 30 runs of 1.84M tokens, two at a time; resumable
    python scripts/study_optimizers.py runs/study --table    # the table of what is finished

llama_1m on the embedded text, rank 32, 900 updates of 8 × 256 packed tokens. A seed gives initialization and data order
to all rows alike. Each row is compared with its partner seed by seed: mean of the paired differences of log perplexity
(in per cent) and its standard error. Frozen matrices are the control: a setting in which a method does not beat them
clearly says nothing about methods.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SEEDS = (0, 1, 2)
COMMON = (
    "--model llama_1m --data sample --layout pack --eval-tokens 131K --eval-every 900 --save-every 300 --wandb disabled"
)
FP32, BF16 = "--dtype float32", "--dtype bfloat16"
VARIANTS = {  # name: (flags, partner, largest difference in per cent that is accepted)
    "frozen": (f"--optim galore_adamw --matrix-lr-scale 0 {FP32}", "default", None),
    "svd together": (f"--optim galore_adamw --basis svd --refresh together {FP32}", None, None),
    "randomized together": (f"--optim galore_adamw --refresh together {FP32}", "svd together", 2.0),
    "default": (f"--optim galore_adamw {FP32}", "randomized together", 2.0),  # randomized, staggered, fp32
    "8 bits": (f"--optim galore_adamw8bit {FP32}", "default", 3.0),
    "bf16 sound": (f"--optim galore_adamw {BF16}", "default", 1.0),
    "bf16 reference": (f"--optim galore_adamw --numerics reference {BF16}", "bf16 sound", None),
    "moments project": (f"--optim galore_adamw --moments project {FP32}", "default", None),
    "natural": (f"--optim natural_galore {FP32}", "default", None),
    "adamw, matrices × 0.1": (f"--optim adamw --lr 0.01 --matrix-lr-scale 0.1 {FP32}", "default", None),
}


def folder(root: Path, name: str, seed: int) -> Path:
    return root / f"{name.replace(' ', '_').replace(',', '').replace('×', 'x')}-seed{seed}"


def run(root: Path, jobs: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    waiting = [
        (name, seed) for seed in SEEDS for name in VARIANTS if not (folder(root, name, seed) / "summary.json").exists()
    ]
    active: list[subprocess.Popen[bytes]] = []
    while waiting or active:
        while waiting and len(active) < jobs:
            name, seed = waiting.pop(0)
            output = folder(root, name, seed)
            output.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "galore_pretrain", *COMMON.split(), *VARIANTS[name][0].split()]
            with (output / "log").open("ab") as log:
                arguments = [*command, "--seed", str(seed), "--output", str(output)]
                active.append(subprocess.Popen(arguments, env=environment, stderr=log))
            print(time.strftime("%H:%M"), name, seed, flush=True)
        time.sleep(1)
        if failed := [process.args for process in active if process.poll()]:
            sys.exit(f"a run failed, see its log: {failed[0]}")
        active = [process for process in active if process.poll() is None]


def table(root: Path) -> None:
    losses: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}
    for name, found in losses.items():
        for seed in SEEDS:
            if (path := folder(root, name, seed) / "summary.json").exists():
                found[seed] = json.loads(path.read_text())["eval_loss"]
    print(
        "| | validation loss by seed | perplexity | against | difference | standard error | accepted |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, (_, partner, bound) in VARIANTS.items():
        mine = losses[name]
        if not mine:
            continue
        perplexity = f"{2.718281828459045 ** statistics.mean(mine.values()):.2f}"
        cells = [" ".join(f"{mine[s]:.4f}" for s in sorted(mine)), perplexity, partner or ""]
        pairs = [100 * (mine[s] - losses[partner][s]) for s in mine if partner and s in losses[partner]]
        if pairs:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
            mean = statistics.mean(pairs)
            verdict = "" if bound is None else f"≤ {bound} %: {'missed' if mean - bound > 2 * error else 'held'}"
            cells += [f"{mean:+.2f} %", f"{error:.2f} %", verdict]
        else:
            cells += ["", "", ""]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments.root, arguments.jobs)
    table(arguments.root)


if __name__ == "__main__":
    main()
