"""How the time of an update grows: with the model, the length, the batch, the rank and T; a table and a plot.

    python scripts/bench_growth.py --picture docs/benchmarks/growth.png      # half an hour

Each update is galore_adamw's, bf16, after backward, of the real parts of a run; medians, and for T the mean of updates
with and without new bases. GFLOP is the arithmetic of it that `plan` counts, bases apart: where GFLOP/s fall, something
grows faster than the arithmetic. 7B: two of its layers, and its embeddings.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from galore_pretrain.config.options import RunConfig, find_model
from galore_pretrain.config.resolve import resolve
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.traffic import count
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, prepare

BASE: dict[str, Any] = {"optim": "galore_adamw", "data": "sample", "steps": 1000, "grad_clip": 0.0, "layerwise": False}
BASE |= {"activation_checkpointing": False, "refresh": "together", "max_length": 256, "batch_size": 1, "rank": 128}
MODELS = ("llama_9m", "llama_20m", "llama_60m", "llama_130m", "llama_350m", "llama_1b")


def cells() -> list[tuple[str, str, dict[str, Any]]]:
    """(what grows, its value, options)"""
    found = [("model", name.removeprefix("llama_"), {"model": name}) for name in MODELS]
    found.append(("model", "7b, 2 layers", {"model": two_layers_of("llama_7b"), "rank": 1024}))
    for kind, option, values in (
        ("length", "max_length", (128, 256, 512, 1024)),
        ("batch", "batch_size", (1, 2, 4, 8, 16)),
        ("rank", "rank", (16, 64, 128, 256, 512)),
        ("T", "update_proj_gap", (1, 4, 16, 64)),
    ):
        found += [(kind, str(value), {"model": "llama_60m", option: value}) for value in values]
    return found


def two_layers_of(model: str) -> str:
    path = Path(tempfile.mkdtemp()) / f"{model}_2_layers.json"
    path.write_text(json.dumps(json.loads(find_model(model).read_text()) | {"num_hidden_layers": 2}))
    return str(path)


class Times(NamedTuple):
    """Seconds of forward and backward, of an update (without new bases, if they are apart), and of all new bases."""

    passes: float
    update: float
    bases: float | None
    weights: int


def timed(config: RunConfig, updates: int) -> tuple[list[float], list[float], int]:
    """Seconds of forward and backward, and of what follows, of so many updates; and the number of weights."""
    model = model_for(config, load_model_config(config.model))
    execution = execution_for(config, optimizer_for(config, prepare(config, model)))
    passes, rest = [], []
    for _ in range(updates):
        ids = torch.randint(model.config.vocab_size, (config.batch_size, config.max_length + 1))
        started = time.perf_counter()
        execution.begin(0, 1)
        mean_loss(model, ids[:, :-1], ids[:, 1:], ids[:, 1:].numel()).backward()
        middle = time.perf_counter()
        execution.complete()
        passes.append(middle - started)
        rest.append(time.perf_counter() - middle)
    return passes, rest, sum(p.numel() for p in model.parameters())


def measured(config: RunConfig, rounds: int) -> Times:
    """Medians: of every three updates, the first renews all bases."""
    passes, updates, weights = timed(replace(config, update_proj_gap=3), 1 + 3 * rounds)
    steady = median(updates[i] for i in range(1, len(updates)) if i % 3)
    return Times(median(passes[1:]), steady, max(0.0, median(updates[3::3]) - steady), weights)


def gathering(config: RunConfig, rounds: int) -> float:
    """Seconds in which layerwise updates add the gradients of one more micro-batch to their sums: the median."""
    model = model_for(config, load_model_config(config.model))
    optimizer = optimizer_for(config, prepare(config, model))
    params = list(optimizer.state)
    seconds = []
    for i in range(rounds + 2):  # the first has new bases, the second begins a sum
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        started = time.perf_counter()
        for p in params:
            optimizer.pending.accumulate(p, compress=True)
            if i == 0:
                optimizer.update_param(p)
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


def averaged(config: RunConfig) -> Times:
    """The mean over T updates, or some times as many."""
    gap = int(config.update_proj_gap or 1)
    passes, updates, weights = timed(config, 1 + gap * max(1, 16 // gap))
    return Times(median(passes[1:]), sum(updates[1:]) / len(updates[1:]), None, weights)


def draw(path: Path, found: list[tuple[str, str, float, float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(kind for kind, *_ in found))
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 3.8), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        values, passes, updates, products = zip(*(row[1:] for row in found if row[0] == kind), strict=True)
        axis.plot(values, passes, "o-", label="forward and backward")
        axis.plot(values, updates, "s-", label="update")
        both = [a + b for a, b in zip(passes, updates, strict=True)]
        axis.plot(values, both, "-", color="black", label="both")
        scaled = [both[0] / products[0] * p for p in products]
        axis.plot(values, scaled, ":", color="black", label="both, if they grew as the arithmetic")
        axis.set_yscale("log")
        axis.set_xlabel({"length": "tokens a row", "batch": "rows", "T": "updates a basis (T)"}.get(kind, kind))
        axis.tick_params(axis="x", rotation=30)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of",
        end=" ",
    )
    print(f"{2 * arguments.rounds} updates and {arguments.rounds} renewals of all bases.", end=" ")
    print("1 × 256 tokens, rank 128, llama_60m where nothing else is said\n")
    print("| | | GFLOP | forward, backward: ms | update: ms | GFLOP/s | update: share | ns a weight | all bases: ms |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    found = []
    for kind, value, options in cells():
        given = BASE | options
        given["total_batch_size"] = given["batch_size"]
        config, _ = resolve(given, dict.fromkeys(given, "flag"))
        times = averaged(config) if kind == "T" else measured(config, arguments.rounds)
        flops, seconds = count(config).flops, times.passes + times.update
        found.append((kind, value, times.passes, times.update, flops))
        words = [kind, value, f"{flops / 1e9:.0f}", f"{1000 * times.passes:.0f}", f"{1000 * times.update:.0f}"]
        words += [f"{flops / seconds / 1e9:.0f}", f"{100 * times.update / seconds:.0f} %"]
        words += [f"{1e9 * times.update / times.weights:.1f}"]
        words += ["" if times.bases is None else f"{1000 * times.bases:.0f}"]
        print(f"| {' | '.join(words)} |", flush=True)
    if arguments.picture:
        draw(arguments.picture, found)


if __name__ == "__main__":
    main()
