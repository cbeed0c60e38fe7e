"""Time updates of llama_7b by several methods in turn, on this machine: one process holds all their states.

    python scripts/bench_7b_methods.py    # scale and galore_adamw8bit: half an hour on two cores, and 19 GB of memory

Each update is one row of 256 tokens of text, layerwise, with activation checkpointing, in bf16. All methods train the
same weights, one after the other, so their seconds are of the same minutes; what the loss of a fixed row does says that
they work, and nothing of which is better. Prints a report in Markdown.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from bench_7b import ROWS, SHARED, print_machine

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.meters import process_peak_bytes
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.text.batches import Row, stack, validation_rows
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model
from galore_pretrain.train.evaluate import evaluate
from galore_pretrain.train.inputs import open_inputs

METHODS = ("scale", "galore_adamw8bit")


def config_of(model: str, name: str) -> RunConfig:
    """Return the config of a run by one of the methods."""
    values = {**SHARED, **ROWS[name], "layout": "pack", "model": model}
    config, _ = resolve(values, dict.fromkeys(values, "flag"))
    return config


def update(model: Any, config: RunConfig, optimizer: RuleOptimizer, row: Row) -> tuple[float, float, float]:
    """Make one update; return the loss of its row, and seconds: forward, and backward with the updates in it."""
    batch = stack([row])
    execution = execution_for(config, optimizer)  # hooks the parameters, and lets go of them when it is dropped
    start = time.perf_counter()
    loss = mean_loss(model, batch.input_ids, batch.labels, batch.label_tokens)
    forward = time.perf_counter() - start
    execution.begin(0, 1)
    loss.backward()
    execution.complete()
    seconds = time.perf_counter() - start
    outcome = execution.outcome()
    assert outcome.skipped == 0, "a gradient was not finite"
    del execution
    gc.collect()
    return loss.item(), forward, seconds - forward


def main() -> None:
    """Make the updates in turn and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_7b")
    parser.add_argument("--updates", type=int, default=3, help="of each method")
    arguments = parser.parse_args()
    configs = {name: config_of(arguments.model, name) for name in METHODS}
    first = next(iter(configs.values()))
    inputs = open_inputs(first)
    cpu = torch.device("cpu")
    model = set_up_model(first, model_for(first, inputs.model, cpu))
    optimizers = {name: optimizer_for(config, model) for name, config in configs.items()}
    rows = validation_rows(inputs.training, inputs.rows, first.max_length * arguments.updates * len(configs))
    (fixed,) = validation_rows(inputs.validation, inputs.rows, first.max_length)

    def fixed_loss() -> float:
        return evaluate(model, [fixed], batch_size=1, reference_batch=None, device=cpu).loss

    print_machine()
    print(f"Loss of the fixed row before: {fixed_loss():.4f}\n", flush=True)
    print("| update | loss of its row | forward s | backward and update s | s | loss of the fixed row | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    remaining = iter(rows)
    for number in range(1, arguments.updates + 1):
        for name, config in configs.items():
            loss, forward, backward = update(model, config, optimizers[name], next(remaining))
            seconds[name].append(forward + backward)
            peak = process_peak_bytes() / 2**30
            print(
                f"| {name} {number} | {loss:.4f} | {forward:.1f} | {backward:.1f} | {forward + backward:.1f} "
                f"| {fixed_loss():.4f} | {peak:.2f} |",
                flush=True,
            )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print("\nMedians: " + ", ".join(f"{name} {median:.1f} s" for name, median in medians.items()))


if __name__ == "__main__":
    main()
