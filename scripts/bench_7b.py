"""Run llama_7b on this machine, kill it between two checkpoints, and check that it goes on as if it had not been.

    python scripts/bench_7b.py runs/bench-7b    # an hour on two cores; takes 20 GB of memory and 55 GB of disk
    python scripts/bench_7b.py runs/bench-7b --row q_galore    # of those in ROWS; 11 GB of memory
    python scripts/bench_7b.py runs/bench-7b --data FILE --tokenizer M.model    # more flags are a run's own

Every update is followed by an evaluation of the same 256 tokens of text that is not trained on. The process is killed
with SIGKILL after update 4, one update past its last checkpoint; the same command then goes on, and must write the same
numbers for that update again. Prints a report in Markdown.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from galore_pretrain import load_model_config
from galore_pretrain.config.resolve import resolve
from galore_pretrain.tensors.products import has_fast_bf16
from galore_pretrain.train.build import model_for, optimizer_for

SHARED: dict[str, Any] = {
    "model": "llama_7b",
    "dtype": "bfloat16",
    "layerwise": True,
    "activation_checkpointing": True,
    "batch_size": 1,
    "total_batch_size": 1,
    "max_length": 256,
    "grad_clip": 0.0,
    "steps": 6,
    "warmup_steps": 2,
    "data": "sample",
    "eval_every": 1,
    "eval_tokens": 256,
    "save_every": 3,
    "keep": 1,
    "wandb": "disabled",
}
ROWS: dict[str, dict[str, Any]] = {
    "galore_adamw8bit": {"optim": "galore_adamw8bit", "rank": 1024, "update_proj_gap": 50, "lr": 0.0005},
    "q_galore": {"optim": "q_galore", "rank": 768, "update_proj_gap": 50, "lr": 0.0005},
    "scale": {"optim": "scale", "lr": 1e-5},
    "scale_int8": {"optim": "scale", "weights": "int8", "lr": 1e-5},
    "q_apollo_mini": {"optim": "q_apollo_mini", "lr": 0.001},
}
"""What a row adds to `SHARED`. In periods of 50, every basis is renewed within the first five updates. Rates are a
tenth of the recipes', whose warm-up of 15,000 updates is not waited for."""
KILLED_AFTER = 4
_TIMES = ("tokens_per_second", "peak_memory_bytes", "process_peak_bytes")


def flags(values: dict[str, Any]) -> list[str]:
    """Return the words of a command line that say ``values``."""
    words = []
    for name, value in values.items():
        dashed = name.replace("_", "-")
        words.append(f"--{dashed}")
        if value is not True:
            words.append(str(value))
    return words


def rows(output: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the run's metrics."""
    file = output / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def killed_after(command: list[str], output: Path, updates: int) -> list[dict[str, Any]]:
    """Start a run and kill it after so many updates; return its metrics."""
    with subprocess.Popen(command) as process:
        while len(rows(output)) < updates:
            if process.poll() is not None:
                sys.exit(f"the run ended by itself, with code {process.returncode}")
            time.sleep(0.2)
        process.kill()
    return rows(output)


def bases_due(values: dict[str, Any], steps: int) -> list[int]:
    """Return how many bases each update of a run renews."""
    config, _ = resolve(values, dict.fromkeys(values, "flag"))
    # Without storage: which bases are due does not depend on numbers.
    model = model_for(config, load_model_config(config.model), "meta")
    optimizer = optimizer_for(config, model)
    due = []
    for step in range(1, steps + 1):
        due.append(sum(optimizer.next_due(p, step) == step for p in optimizer.state))
    return due


def are_the_same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Whether two runs wrote the same numbers, times and memory apart."""
    for first, second in zip(before, after, strict=True):
        for name in first.keys() | second.keys():
            if name not in _TIMES and first.get(name) != second.get(name):
                return False
    return True


def print_machine() -> None:
    """Print processor, memory and versions."""
    bf16 = "with" if has_fast_bf16(torch.device("cpu")) else "without"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "bitsandbytes", "transformers")]
    print(
        f"{platform.machine()} CPU {bf16} bf16 instructions, {torch.get_num_threads()} threads, "
        f"{memory:.1f} GiB of memory; {', '.join(versions)}\n"
    )


def print_updates(values: dict[str, Any], updates: list[dict[str, Any]]) -> None:
    """Print a table of the updates in Markdown."""
    print("| update | lr | bases renewed | loss of its sequence | loss of the fixed one | s | process peak GiB |")
    print("|---|---|---|---|---|---|---|")
    tokens_before = 0
    for row, due in zip(updates, bases_due(values, len(updates)), strict=True):
        seconds = (row["tokens_seen"] - tokens_before) / row["tokens_per_second"]
        tokens_before = row["tokens_seen"]
        peak = row["process_peak_bytes"] / 2**30
        print(
            f"| {row['step']} | {row['lr']:.2g} | {due} | {row['loss']:.4f} | {row['eval_loss']:.4f} "
            f"| {seconds:.0f} | {peak:.2f} |"
        )


def main() -> None:
    """Run, kill, go on, and print the report; exit with 1 where the repeated update has other numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--row", choices=ROWS, default="galore_adamw8bit")
    arguments, more = parser.parse_known_args()
    output: Path = arguments.output
    if output.exists():
        parser.error(f"{output} exists; name a new folder")
    values = SHARED | ROWS[arguments.row]
    words = [*flags(values), *more, "--output", str(output)]
    command = [sys.executable, "-m", "galore_pretrain", *words]

    before = killed_after(command, output, KILLED_AFTER)
    subprocess.run(command, check=True)
    after = rows(output)
    summary = json.loads((output / "summary.json").read_text())
    same = are_the_same(before[:KILLED_AFTER], after[:KILLED_AFTER])

    print(f"    galore-pretrain {' '.join(words)}\n")
    print_machine()
    print_updates(values, after)
    planned = summary["planned_peak_bytes"] / 2**30
    peak = summary["process_peak_bytes"] / 2**30
    repeated = "the same" if same else "OTHER"
    print(
        f"\nTensors planned: {planned:.2f} GiB; peak of the process, over all of both runs and the export: "
        f"{peak:.2f} GiB. Killed after update {KILLED_AFTER}, resumed from update {SHARED['save_every']}: "
        f"update {KILLED_AFTER} was repeated with {repeated} numbers."
    )
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
