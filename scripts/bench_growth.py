"""Measure how the time of an update grows with the model, the length, the batch, the rank and T: a table and a plot.

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
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from galore_pretrain.config.options import RunConfig, find_model
from galore_pretrain.config.resolve import resolve
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.traffic import count
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model

BASE: dict[str, Any] = {
    "optim": "galore_adamw",
    "data": "sample",
    "steps": 1000,
    "grad_clip": 0.0,
    "layerwise": False,
    "activation_checkpointing": False,
    "refresh": "together",
    "max_length": 256,
    "batch_size": 1,
    "rank": 128,
}
MODELS = ("llama_9m", "llama_20m", "llama_60m", "llama_130m", "llama_350m", "llama_1b")
GROWING = (  # what grows, the option that says so, and its values
    ("length", "max_length", (128, 256, 512, 1024)),
    ("batch", "batch_size", (1, 2, 4, 8, 16)),
    ("rank", "rank", (16, 64, 128, 256, 512)),
    ("T", "update_proj_gap", (1, 4, 16, 64)),
)
X_LABELS = {"length": "tokens a row", "batch": "rows", "T": "updates a basis (T)"}


def cells() -> list[tuple[str, str, dict[str, Any]]]:
    """Return (what grows, its value, options) of each line of the table."""
    lines: list[tuple[str, str, dict[str, Any]]] = []
    for name in MODELS:
        lines.append(("model", name.removeprefix("llama_"), {"model": name}))
    lines.append(("model", "7b, 2 layers", {"model": two_layers_of("llama_7b"), "rank": 1024}))
    for kind, option, values in GROWING:
        for value in values:
            lines.append((kind, str(value), {"model": "llama_60m", option: value}))
    return lines


def two_layers_of(model: str) -> str:
    """Write the model's config with two layers into a new folder; return its path."""
    shape = json.loads(find_model(model).read_text())
    shape["num_hidden_layers"] = 2
    path = Path(tempfile.mkdtemp()) / f"{model}_2_layers.json"
    path.write_text(json.dumps(shape))
    return str(path)


class Times(NamedTuple):
    """The times of one line: seconds, and the number of weights that they are for."""

    passes: float  # forward and backward
    update: float  # without new bases, where those are measured apart
    bases: float | None  # all of them
    weights: int


def timed(config: RunConfig, updates: int) -> tuple[list[float], list[float], int]:
    """Make so many updates; return (seconds of forward and backward, seconds of the rest, number of weights)."""
    model = model_for(config, load_model_config(config.model))
    optimizer = optimizer_for(config, set_up_model(config, model))
    execution = execution_for(config, optimizer)
    passes = []
    rest = []
    for _ in range(updates):
        ids = torch.randint(model.config.vocab_size, (config.batch_size, config.max_length + 1))
        inputs = ids[:, :-1]
        labels = ids[:, 1:]
        started = time.perf_counter()
        execution.begin(0, 1)
        mean_loss(model, inputs, labels, labels.numel()).backward()
        middle = time.perf_counter()
        execution.complete()
        ended = time.perf_counter()
        passes.append(middle - started)
        rest.append(ended - middle)
    weights = sum(p.numel() for p in model.parameters())
    return passes, rest, weights


def measured(config: RunConfig, rounds: int) -> Times:
    """Return medians over so many rounds of three updates."""
    # With T = 3, updates 0, 3, 6, … renew all bases. Update 0 is left out: libraries start there. What a renewal takes
    # is the difference between the medians of the updates with one and of those without.
    renewing_each_third = replace(config, update_proj_gap=3)
    passes, updates, weights = timed(renewing_each_third, 1 + 3 * rounds)
    renewing = updates[3::3]
    steady = median(updates[1::3] + updates[2::3])
    bases = max(0.0, median(renewing) - steady)
    return Times(median(passes[1:]), steady, bases, weights)


def gathering(config: RunConfig, rounds: int) -> float:
    """Return the median seconds in which layerwise updates add one more micro-batch's gradients to their sums."""
    model = model_for(config, load_model_config(config.model))
    optimizer = optimizer_for(config, set_up_model(config, model))
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
    """Return the mean over T updates, or some times as many, so that each has its share of new bases."""
    gap = int(config.update_proj_gap or 1)
    periods = max(1, 16 // gap)
    passes, updates, weights = timed(config, 1 + gap * periods)
    return Times(
        passes=median(passes[1:]),
        update=mean(updates[1:]),
        bases=None,
        weights=weights,
    )


class Point(NamedTuple):
    """One line of the table, as the plot needs it: times in seconds, and the arithmetic of an update in FLOP."""

    kind: str
    value: str
    passes: float
    update: float
    flops: float


def draw(path: Path, points: list[Point]) -> None:
    """Draw the times against what grows, a panel for each, beside times that grow as the arithmetic does."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(point.kind for point in points))
    figure = Figure(figsize=(13, 3.8))
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        shown = [point for point in points if point.kind == kind]
        _, values, passes, updates, flops = zip(*shown, strict=True)
        both = list(map(sum, zip(passes, updates, strict=True)))
        seconds_a_flop = both[0] / flops[0]
        scaled = [seconds_a_flop * flop for flop in flops]
        axes.plot(values, passes, "o-", label="forward and backward")
        axes.plot(values, updates, "s-", label="update")
        axes.plot(values, both, "-", color="black", label="both")
        axes.plot(values, scaled, ":", color="black", label="both, if they grew as the arithmetic")
        axes.set_yscale("log")
        axes.set_xlabel(X_LABELS.get(kind, kind))
        axes.tick_params(axis="x", rotation=30)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=110)


def line(kind: str, value: str, times: Times, flops: float) -> str:
    """Return a line of the table in Markdown."""
    seconds = times.passes + times.update
    cells = [
        f"{kind} {value}",
        f"{flops / 1e9:.0f}",
        f"{1000 * times.passes:.0f}",
        f"{1000 * times.update:.0f}",
        f"{flops / seconds / 1e9:.0f}",
        f"{100 * times.update / seconds:.0f} %",
        f"{1e9 * times.update / times.weights:.1f}",
        "" if times.bases is None else f"{1000 * times.bases:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print line by line; draw at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"medians of {2 * arguments.rounds} updates and {arguments.rounds} renewals of all bases. "
        "1 × 256 tokens, rank 128, llama_60m where nothing else is said\n"
    )
    print("| | GFLOP | forward, backward: ms | update: ms | GFLOP/s | update: share | ns a weight | all bases: ms |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    points = []
    for kind, value, options in cells():
        values = BASE | options
        values["total_batch_size"] = values["batch_size"]
        config, _ = resolve(values, dict.fromkeys(values, "flag"))
        times = averaged(config) if kind == "T" else measured(config, arguments.rounds)
        flops = count(config).flops
        points.append(Point(kind, value, times.passes, times.update, flops))
        print(line(kind, value, times, flops), flush=True)
    if arguments.picture:
        draw(arguments.picture, points)


if __name__ == "__main__":
    main()
