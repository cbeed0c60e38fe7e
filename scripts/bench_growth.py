"""How the time of an update grows: with the model, the length, the batch, the rank and T; a table and a plot.

    python scripts/bench_growth.py --picture docs/benchmarks/growth.png      # a quarter of an hour

Each update is galore_adamw's, bf16, after backward, of the real parts of a run; medians. `products` is the arithmetic
that `plan` counts; what grows faster than it does is not the arithmetic's. 7B: two of its layers, and its embeddings.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from galore_pretrain.build import execution_for, model_for, optimizer_for, prepare
from galore_pretrain.config import RunConfig, find_model
from galore_pretrain.model import load_model_config, mean_loss
from galore_pretrain.recipes import resolve
from galore_pretrain.traffic import count

BASE: dict[str, Any] = {"optim": "galore_adamw", "data": "sample", "steps": 1000, "grad_clip": 0.0, "layerwise": False}
BASE |= {"activation_checkpointing": False, "refresh": "together", "max_length": 256, "batch_size": 1, "rank": 128}
MODELS = ("llama_9m", "llama_20m", "llama_60m", "llama_130m", "llama_350m", "llama_1b")


def cells() -> list[tuple[str, str, dict[str, Any]]]:
    """(what grows, its value, options)"""
    found = [("model", name.removeprefix("llama_"), {"model": name}) for name in MODELS]
    found.append(("model", "7b, 2 layers", {"model": two_layers_of("llama_7b"), "rank": 1024}))
    sixty = {"model": "llama_60m"}
    found += [("length", str(n), sixty | {"max_length": n}) for n in (128, 256, 512, 1024)]
    found += [("batch", str(n), sixty | {"batch_size": n}) for n in (1, 2, 4, 8, 16)]
    found += [("rank", str(n), sixty | {"rank": n}) for n in (16, 64, 128, 256, 512)]
    return found


def two_layers_of(model: str) -> str:
    path = Path(tempfile.mkdtemp()) / f"{model}_2_layers.json"
    path.write_text(json.dumps(json.loads(find_model(model).read_text()) | {"num_hidden_layers": 2}))
    return str(path)


def measured(config: RunConfig, rounds: int) -> tuple[float, float, float]:
    """Seconds of forward and backward, of an update without new bases, and of what all new bases add."""
    model = model_for(config, load_model_config(config.model))
    optimizer = optimizer_for(config, prepare(config, model))
    execution = execution_for(config, optimizer)
    vocabulary, shape = model.config.vocab_size, (config.batch_size, config.max_length + 1)
    passes, updates = [], []
    for _ in range(rounds + 2):
        ids = torch.randint(vocabulary, shape)
        started = time.perf_counter()
        execution.begin(0, 1)
        mean_loss(model, ids[:, :-1], ids[:, 1:], ids[:, 1:].numel()).backward()
        middle = time.perf_counter()
        execution.finish()
        passes.append(middle - started)
        updates.append(time.perf_counter() - middle)
    steady = statistics.median(updates[2:])
    for state in optimizer.state.values():
        state["step"] = int(config.update_proj_gap or 1)  # the next one renews all
    ids = torch.randint(vocabulary, shape)
    mean_loss(model, ids[:, :-1], ids[:, 1:], ids[:, 1:].numel()).backward()
    started = time.perf_counter()
    execution.finish()
    return statistics.median(passes[2:]), steady, max(0.0, time.perf_counter() - started - steady)


def draw(path: Path, found: list[tuple[str, str, float, float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(kind for kind, *_ in found))
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 3.4), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        values, passes, updates, products = zip(*(row[1:] for row in found if row[0] == kind), strict=True)
        axis.plot(values, passes, "o-", label="forward and backward")
        axis.plot(values, updates, "s-", label="update")
        scale = passes[0] / products[0]
        axis.plot(values, [scale * p for p in products], ":", color="gray", label="the arithmetic, from the first on")
        axis.set_yscale("log")
        axis.set_xlabel({"model": "model", "length": "tokens a row", "batch": "rows", "rank": "rank"}[kind])
        axis.tick_params(axis="x", rotation=30)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch {torch.__version__};", end=" ")
    print(f"medians of {arguments.rounds}; 1 × 256 tokens, rank 128 and llama_60m where nothing else is said\n")
    print("| | | forward, backward: ms | GFLOP | GFLOP/s | update: ms | its share | all bases: ms | over T = 200 |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    found = []
    for kind, value, options in cells():
        given = BASE | options
        given["total_batch_size"] = given["batch_size"]
        config, _ = resolve(given, dict.fromkeys(given, "flag"))
        passes, update, bases = measured(config, arguments.rounds)
        products = count(config).flops
        found.append((kind, value, passes, update, products))
        share = update / (passes + update)
        cells_ = [kind, value, f"{1000 * passes:.0f}", f"{products / 1e9:.0f}"]
        cells_ += [f"{products / (passes + update) / 1e9:.0f}", f"{1000 * update:.0f}", f"{100 * share:.0f} %"]
        print(f"| {' | '.join([*cells_, f'{1000 * bases:.0f}', f'{1000 * bases / 200:.1f}'])} |", flush=True)
    if arguments.picture:
        draw(arguments.picture, found)


if __name__ == "__main__":
    main()
