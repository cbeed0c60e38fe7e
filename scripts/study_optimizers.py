"""Study what bases, refreshes, moments, bits and rounding cost in perplexity, where the matrices matter.

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

from galore_pretrain.study.results import Result, finished, losses_by_seed, read
from galore_pretrain.study.seeds import paired
from galore_pretrain.study.sweep import Entry, Sweep

SEEDS = (0, 1, 2)
SHARED = {
    "model": "llama_1m",
    "data": "sample",
    "layout": "pack",
    "eval_tokens": 131_000,
    "eval_every": 900,
    "save_every": 300,
    "wandb": "disabled",
}
FP32 = {"dtype": "float32"}
BF16 = {"dtype": "bfloat16"}
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


def finished_runs(root: Path, name: str) -> list[Result]:
    """Read the runs of a variant that have come to their end."""
    runs = []
    for seed in SEEDS:
        folder = root / f"{Entry(name).folder}-seed{seed}"
        if (folder / "summary.json").exists():
            runs.append(read(folder))
    return finished(runs)


def table(root: Path) -> None:
    """Print the table of the variants that have a finished run."""
    print("| | validation loss by seed | perplexity | against | difference | standard error | accepted |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, partner, bound) in VARIANTS.items():
        runs = finished_runs(root, name)
        if not runs:
            continue
        losses = [run.final_loss for run in runs]
        by_seed = " ".join(f"{loss:.4f}" for loss in losses)
        perplexity = math.exp(statistics.mean(losses))
        cells = [name, by_seed, f"{perplexity:.2f}", partner or ""]
        if partner is None:
            cells += ["", "", ""]
        else:
            cells += compared(runs, finished_runs(root, partner), bound)
        print(f"| {' | '.join(cells)} |")


def compared(runs: list[Result], partners: list[Result], bound: float | None) -> list[str]:
    """Return the cells of a paired difference in per cent: it, its standard error, and whether the bound holds."""
    pair = paired(losses_by_seed(runs), losses_by_seed(partners))
    if pair is None:
        return ["", "", ""]
    difference = f"{100 * pair.mean:+.2f} %"
    if pair.error is None:
        return [difference, "one seed", ""]
    standard_error = f"{100 * pair.error:.2f} %"
    if bound is None:
        return [difference, standard_error, ""]
    # A bound is missed only where the difference exceeds it by two standard errors: chance alone does not miss it.
    is_missed = 100 * pair.mean - bound > 2 * 100 * pair.error
    verdict = "missed" if is_missed else "held"
    return [difference, standard_error, f"≤ {bound} %: {verdict}"]


def main() -> None:
    """Make the runs that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    if not arguments.table:
        lines = [Entry(name, flags) for name, (flags, _, _) in VARIANTS.items()]
        sweep = Sweep(lines, SHARED, SEEDS, [], arguments.jobs, arguments.root)
        sweep.check()
        _, code = sweep.run()
        if code != 0:
            sys.exit(code)
    table(arguments.root)


if __name__ == "__main__":
    main()
