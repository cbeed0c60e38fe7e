"""llama_7b takes real updates on this machine, is killed between two checkpoints, and goes on as if it had not been.

    python scripts/bench_7b.py runs/bench-7b    # an hour on two cores; takes 20 GB of memory and 55 GB of disk
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

RUN: dict[str, Any] = {
    "model": "llama_7b",
    "optim": "galore_adamw8bit",
    "rank": 1024,
    "update_proj_gap": 50,  # so that every basis is renewed within the first five updates
    "dtype": "bfloat16",
    "layerwise": True,
    "activation_checkpointing": True,
    "batch_size": 1,
    "total_batch_size": 1,
    "max_length": 256,
    "grad_clip": 0.0,
    "lr": 0.0005,
    "steps": 6,
    "warmup_steps": 2,
    "data": "sample",
    "eval_every": 1,
    "eval_tokens": 256,
    "save_every": 3,
    "keep": 1,
    "wandb": "disabled",
}
KILLED_AFTER = 4
_TIMES = ("tokens_per_second", "peak_memory_bytes", "process_peak_bytes")


def flags(values: dict[str, Any]) -> list[str]:
    found = []
    for name, value in values.items():
        dashed = name.replace("_", "-")
        found += [f"--{dashed}"] if value is True else [f"--{dashed}", str(value)]
    return found


def rows(output: Path) -> list[dict[str, Any]]:
    """Complete lines of the run's metrics."""
    file = output / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def killed_after(command: list[str], output: Path, updates: int) -> list[dict[str, Any]]:
    """Metrics of a run that was killed after so many updates."""
    with subprocess.Popen(command) as process:
        while len(rows(output)) < updates:
            if process.poll() is not None:
                sys.exit(f"the run ended by itself, with code {process.returncode}")
            time.sleep(0.2)
        process.kill()
    return rows(output)


def bases_due(steps: int) -> list[int]:
    """How many bases each update renews."""
    config, _ = resolve(RUN, dict.fromkeys(RUN, "flag"))
    optimizer = optimizer_for(config, model_for(config, load_model_config(config.model), "meta"))
    return [sum(optimizer.next_due(p, step) == step for p in optimizer.state) for step in range(1, steps + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    arguments, more = parser.parse_known_args()
    output: Path = arguments.output
    if output.exists():
        parser.error(f"{output} exists; name a new folder")
    command = [*flags(RUN), *more, "--output", str(output)]
    runs = [sys.executable, "-m", "galore_pretrain", *command]

    before = killed_after(runs, output, KILLED_AFTER)
    subprocess.run(runs, check=True)
    after, summary = rows(output), json.loads((output / "summary.json").read_text())

    def numbers(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in _TIMES}

    same = [numbers(row) for row in after[:KILLED_AFTER]] == [numbers(row) for row in before[:KILLED_AFTER]]
    bf16 = "with" if has_fast_bf16(torch.device("cpu")) else "without"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "bitsandbytes", "transformers")]
    print(f"    galore-pretrain {' '.join(command)}\n")
    print(f"{platform.machine()} CPU {bf16} bf16 instructions, {torch.get_num_threads()} threads,", end=" ")
    print(f"{memory:.1f} GiB of memory; {', '.join(versions)}\n")
    print("| update | lr | bases renewed | loss of its sequence | loss of the fixed one | s | process peak GiB |")
    print("|---|---|---|---|---|---|---|")
    seen = [0, *(row["tokens_seen"] for row in after[:-1])]
    for row, before_it, due in zip(after, seen, bases_due(len(after)), strict=True):
        seconds = (row["tokens_seen"] - before_it) / row["tokens_per_second"]
        print(f"| {row['step']} | {row['lr']:.2g} | {due} | {row['loss']:.4f} | {row['eval_loss']:.4f}", end=" ")
        print(f"| {seconds:.0f} | {row['process_peak_bytes'] / 2**30:.2f} |")
    peaks = {name: summary[f"{name}_bytes"] / 2**30 for name in ("planned_peak", "process_peak")}
    print(
        f"\nTensors planned: {peaks['planned_peak']:.2f} GiB; peak of the process, over all of both runs and", end=" "
    )
    print(
        f"the export: {peaks['process_peak']:.2f} GiB. Killed after update {KILLED_AFTER}, resumed from update", end=" "
    )
    print(f"{RUN['save_every']}: update {KILLED_AFTER} was repeated with {'the same' if same else 'OTHER'} numbers.")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
