"""What bases, refreshes, moments, bits and rounding cost in perplexity, where the matrices matter.

    python scripts/study_optimizers.py runs/study            # 30 runs of 1.84M tokens, two at a time; resumable
    python scripts/study_optimizers.py runs/study --table    # the table of what is finished

llama_1m on the embedded text, rank 32, 900 updates of 8 × 256 packed tokens. A seed gives initialization and data order
to all rows alike. Each row is compared with its partner seed by seed: mean of the paired differences of log perplexity
(in per cent) and its standard error. Frozen matrices are the control: a setting in which a method does not beat them
clearly says nothing about methods.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from galore_pretrain.study.results import Result, paired, read
from galore_pretrain.study.sweep import Entry, Sweep

SEEDS = (0, 1, 2)
SHARED = {
    "model": "llama_1m", "data": "sample", "layout": "pack", "eval_tokens": 131_000, "eval_every": 900,
    "save_every": 300, "wandb": "disabled",
}  # fmt: skip
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
GALORE = {"optim": "galore_adamw"}
VARIANTS = {  # name: (flags, partner, largest difference in per cent that is accepted)
    "frozen": (GALORE | {"matrix_lr_scale": 0.0} | FP32, "default", None),
    "svd together": (GALORE | {"basis": "svd", "refresh": "together"} | FP32, None, None),
    "randomized together": (GALORE | {"refresh": "together"} | FP32, "svd together", 2.0),
    "default": (GALORE | FP32, "randomized together", 2.0),  # randomized, staggered, fp32
    "8 bits": ({"optim": "galore_adamw8bit"} | FP32, "default", 3.0),
    "bf16 sound": (GALORE | BF16, "default", 1.0),
    "bf16 reference": (GALORE | {"numerics": "reference"} | BF16, "bf16 sound", None),
    "moments project": (GALORE | {"moments": "project"} | FP32, "default", None),
    "natural": ({"optim": "natural_galore"} | FP32, "default", None),
    "adamw, matrices × 0.1": ({"optim": "adamw", "lr": 0.01, "matrix_lr_scale": 0.1} | FP32, "default", None),
}


def finished(root: Path, name: str) -> list[Result]:
    folders = [root / f"{Entry(name).folder}-seed{seed}" for seed in SEEDS]
    return [run for run in map(read, (f for f in folders if (f / "summary.json").exists())) if run.is_over]


def table(root: Path) -> None:
    runs = {name: finished(root, name) for name in VARIANTS}
    print("| | validation loss by seed | perplexity | against | difference | standard error | accepted |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, partner, bound) in VARIANTS.items():
        if not runs[name]:
            continue
        losses = [float(run.summary["eval_loss"]) for run in runs[name]]
        cells = [" ".join(f"{loss:.4f}" for loss in losses), f"{math.exp(statistics.mean(losses)):.2f}", partner or ""]
        mean, error, _ = (paired(runs[name], runs[partner]) if partner else None) or (None, None, 0)
        cells.append("" if mean is None else f"{100 * mean:+.2f} %")
        if mean is None or error is None:
            cells += ["" if mean is None else "one seed", ""]
        else:
            verdict = "" if bound is None else "missed" if 100 * mean - bound > 200 * error else "held"
            cells += [f"{100 * error:.2f} %", verdict and f"≤ {bound} %: {verdict}"]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    if not arguments.table:
        lines = [Entry(name, flags) for name, (flags, _, _) in VARIANTS.items()]
        sweep = Sweep(lines, SHARED, SEEDS, [], arguments.jobs, arguments.root)
        sweep.check()
        if code := sweep.run()[1]:
            sys.exit(code)
    table(arguments.root)


if __name__ == "__main__":
    main()
