#!/usr/bin/env python3
"""The main job in miniature: pretrain llama_1m with GaLore on the embedded text, and say how well it did.

python scripts/demo.py                        # what `make demo` runs; a second call finds the run finished
python scripts/demo.py --plot docs/demo.png   # and draws the curve (needs matplotlib)
"""

import argparse
import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from galore_pretrain.text.batches import IGNORE, Documents, Position, TokenRows, validation_rows
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer

OUTPUT = Path("runs/demo")
STEPS = 600
EVAL_TOKENS = 50_000
COMMAND = (
    f"--model llama_1m --optim galore_adamw --data sample --steps {STEPS} --eval-tokens {EVAL_TOKENS} "
    f"--dtype float32 --wandb disabled --output {OUTPUT}"
)


def unigram_perplexity() -> float:
    """Return the perplexity of a model that knows how often each token occurs in the training text, and no context."""
    rows = TokenRows(load_tokenizer("sample"), "pad", 256)
    counts = np.ones(1024)  # one of each, so that an unseen token is not impossible
    training = rows(Documents(open_source("sample", "train"), 0, Position()))
    for row in islice(training, 8000):
        np.add.at(counts, row.labels[row.labels != IGNORE], 1)
    frequencies = counts / counts.sum()
    validation = validation_rows(open_source("sample", "validation"), rows, EVAL_TOKENS)
    labels = np.concatenate([row.labels[row.labels != IGNORE] for row in validation])
    losses = -np.log(frequencies[labels])
    return math.exp(losses.mean())


def read_curve() -> list[tuple[int, float]]:
    """Return (update, validation perplexity) of each evaluation of the run."""
    curve = []
    for text in (OUTPUT / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "eval_perplexity" in line:
            curve.append((line["step"], line["eval_perplexity"]))
    return curve


def plot(curve: list[tuple[int, float]], unigram: float, target: str) -> None:
    """Draw the validation perplexity against updates, on a log axis, with the unigram level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, perplexities = zip(*curve, strict=True)
    axes.plot(steps, perplexities, marker="o", color="#0072B2", label="llama_1m, GaLore-AdamW, rank 32")
    axes.axhline(unigram, color="#D55E00", linestyle="--", label="unigram level (no context)")
    axes.set(yscale="log", xlabel="updates of 8 × 256 tokens", ylabel="validation perplexity")
    axes.set_xlim(0, STEPS + 15)
    ticks = [30, 50, 100, 200, 300]
    axes.set_yticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


def main() -> None:
    """Train, then print the curve beside the unigram level; exit with 1 if it did not get well under it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args()
    print(f"galore-pretrain {COMMAND}", flush=True)
    subprocess.run([sys.executable, "-m", "galore_pretrain", *COMMAND.split()], check=True)

    curve = read_curve()
    unigram = unigram_perplexity()
    print("\nvalidation perplexity by update (vocabulary of 1024 pieces):")
    for step, perplexity in curve:
        bar = "▇" * round(perplexity / unigram * 60)
        print(f"  {step:5d}  {perplexity:7.1f}  {bar}")
    print(f"  unigram  {unigram:5.1f}  {'─' * 60}")
    print(f"curve: {OUTPUT / 'metrics.jsonl'}    model, in Hugging Face form: {OUTPUT / 'model'}")
    if arguments.plot:
        plot(curve, unigram, arguments.plot)
    _, last = curve[-1]
    # Not `>=`: a perplexity that is no number must fail as well.
    if not last < 0.5 * unigram:
        sys.exit(f"the last perplexity, {last:.1f}, is not well under the unigram level, {unigram:.1f}")


if __name__ == "__main__":
    main()
