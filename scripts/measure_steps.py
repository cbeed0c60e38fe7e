"""Measure how large an update is beside the step of weights in 8 bits: what decides whether a rounding is felt.

    python scripts/measure_steps.py --model llama_1m --updates 1800 --tell-every 300 --data CORPUS
    python scripts/measure_steps.py --model llama_350m --rows 64 --updates 150 --tell-every 30 --device cuda

Weights are held in fp32, so that nothing but the method changes them. The rate warms up in the first tenth of the
updates and stays at the recipe's. Of each matrix that `--weights int8` would hold as codes, the root mean square of an
update's change is divided by that of the steps (the largest value of a row, or of a group of a row, over 127).
"""

import argparse
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.check.updates import build, config_of
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import is_projected
from galore_pretrain.text.batches import TokenRows, TrainingData
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer

LENGTH = 256
WARM_UP = 0.1  # of the updates
MOST = 56  # matrices, of all layers: what they were is kept beside them


def step_of(weight: Tensor, group: int | None) -> float | None:
    """Return the root mean square of a matrix's steps, a scale a row or a ``group`` of it; None: rows are no groups."""
    rows, columns = weight.shape
    width = group or columns
    if columns % width:
        return None
    largest = weight.reshape(rows, columns // width, width).abs().amax(-1)
    return float((largest / 127).square().mean().sqrt())


def tell(label: str, matrices: list[Tensor], before: list[Tensor]) -> None:
    """Print changes beside steps: the median of the matrices, and the smallest and largest."""
    changes = [float((now.detach() - old).square().mean().sqrt()) for now, old in zip(matrices, before, strict=True)]
    parts = [f"RMS of a change {statistics.median(changes):.2e}"]
    for name, group in (("row", None), ("256", 256), ("128", 128)):
        ratios = []
        for change, now in zip(changes, matrices, strict=True):
            step = step_of(now.detach(), group)
            if step is not None:
                ratios.append(change / step)
        if ratios:
            median, least, most = statistics.median(ratios), min(ratios), max(ratios)
            parts.append(f"of a step by {name} {median:.2f} ({least:.2f} to {most:.2f})")
    print(f"{label}: " + "; ".join(parts), flush=True)


def main() -> None:
    """Train, and print at times how large the update was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1m")
    parser.add_argument("--optim", default="galore_adamw")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--rows", type=int, default=8, help=f"of an update, of {LENGTH} tokens each")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--tell-every", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--tokenizer", default="sample")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    flags: dict[str, Any] = {"model": arguments.model, "device": arguments.device, "dtype": "float32"}
    flags |= {"layerwise": True, "activation_checkpointing": arguments.model == "llama_7b"}
    if arguments.rank is not None:
        flags["rank"] = arguments.rank
    device = torch.device(arguments.device)
    built = build(config_of(arguments.optim, **flags), device)
    matrices = [module.weight for name, module in built.model.named_modules() if is_projected(name, module)]
    matrices = matrices[:: math.ceil(len(matrices) / MOST)]
    source, tokenizer = open_source(arguments.data, "train"), load_tokenizer(arguments.tokenizer)
    batches = iter(TrainingData(source, TokenRows(tokenizer, "pack", LENGTH), arguments.rows, 0))
    groups = built.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for number in range(1, arguments.updates + 1):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1.0, number / (WARM_UP * arguments.updates))
        is_told = number % arguments.tell_every == 0
        before = [weight.detach().clone() for weight in matrices] if is_told else []
        batch = next(batches)
        built.execution.begin(0, 1)
        tokens, labels = batch.input_ids.to(device), batch.labels.to(device)
        loss = mean_loss(built.model, tokens, labels, batch.label_tokens)
        loss.backward()
        built.execution.complete()
        built.execution.outcome()
        if is_told:
            label = f"{arguments.model}, {arguments.optim}, update {number}, loss {loss.item():.3f}"
            tell(label, matrices, before)
        del loss, before


if __name__ == "__main__":
    main()
