"""Measure what bf16 sums of gradients lose to those in fp32, beside the noise that the gradients themselves have.

    python scripts/measure_sums.py --model llama_1m --micro-batches 32 128

Weights are those after some updates of AdamW on the embedded text, and gradients are of the rows that follow. The same
gradients, of bf16 each, are summed in fp32; in bf16 with stochastic rounding, in 16 draws, as training sums them; and
in bf16 to nearest, as torch would. Errors are of the length of the sum in fp32, all parameters together.
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.check.updates import build, config_of
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import add_rounded
from galore_pretrain.text.batches import TokenRows, TrainingData
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer

DRAWS = 16
ROWS, LENGTH = 4, 64


def gradients(model: Any, batches: Iterator[Any]) -> list[Tensor]:
    """Return the gradients of the next rows: those of a mean over their tokens."""
    batch = next(batches)
    mean_loss(model, batch.input_ids, batch.labels, batch.labels.numel()).backward()
    found = []
    for p in model.parameters():
        found.append(p.grad)
        p.grad = None
    return found


def apart(one: list[Tensor], other: list[Tensor], length: float) -> float:
    """Return how far two lists of tensors are apart, of ``length``."""
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True))
    return math.sqrt(squares) / length


def main() -> None:
    """Print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1m")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = config_of("adamw", model=arguments.model, device="cpu", layerwise=False, lr=0.002, warmup_steps=1)
    built = build(config, torch.device("cpu"))
    text, tokenizer = open_source("sample", "train"), load_tokenizer("sample")
    batches = iter(TrainingData(text, TokenRows(tokenizer, "pack", LENGTH), ROWS, 0))
    for _ in range(arguments.updates):
        batch = next(batches)
        built.execution.begin(0, 1)
        mean_loss(built.model, batch.input_ids, batch.labels, batch.labels.numel()).backward()
        built.execution.complete()
    params = list(built.model.parameters())
    steps = []  # of each draw, those of all parameters
    for draw in range(1, DRAWS + 1):
        steps.append([Step(draw, bits=built.optimizer.random_bits(p, draw)) for p in params])
    exact = [torch.zeros(p.shape) for p in params]
    half = [torch.zeros(p.shape) for p in params]
    nearest = [torch.zeros_like(p) for p in params]
    drawn = [[torch.zeros_like(p) for p in params] for _ in range(DRAWS)]
    for number in range(1, max(arguments.micro_batches) + 1):
        for index, grad in enumerate(gradients(built.model, batches)):
            exact[index] += grad
            half[index] += grad if number % 2 else -grad.float()
            nearest[index] += grad
            for totals, of_draw in zip(drawn, steps, strict=True):
                add_rounded(totals[index], grad, of_draw[index], f"sum {number}")
        if number in arguments.micro_batches:
            tell(f"{arguments.model}, {number} micro-batches", exact, half, nearest, drawn)


def tell(label: str, exact: list[Tensor], half: list[Tensor], nearest: list[Tensor], drawn: list[list[Tensor]]) -> None:
    """Print the errors of the sums so far; ``half`` is one half of the micro-batches less the other."""
    zeros = [torch.zeros(()) for _ in exact]
    length = apart(exact, zeros, 1.0)
    of_draws = [apart(totals, exact, length) for totals in drawn]
    means = [torch.stack([totals[index].float() for totals in drawn]).mean(0) for index in range(len(exact))]
    print(
        f"{label}: stochastic rounding {sum(of_draws) / DRAWS:.5f}, the mean of {DRAWS} draws "
        f"{apart(means, exact, length):.5f}, to nearest {apart(nearest, exact, length):.5f}; two halves "
        f"{apart(half, zeros, length):.5f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
