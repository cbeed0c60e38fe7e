"""Small runs of the real command line, and what of them can be compared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MEASURED = {"tokens_per_second", "peak_memory_bytes", "process_peak_bytes"}
"""Keys of metrics.jsonl that a clock, or the process's memory, put there."""


def command(model: str, output: Path, *flags: str) -> list[str]:
    base = [
        "--model",
        model,
        "--steps",
        "12",
        "--total-batch-size",
        "4",
        "--max-length",
        "48",
        "--rank",
        "4",
    ]
    base += [
        "--update-proj-gap",
        "5",
        "--eval-tokens",
        "2000",
        "--dtype",
        "float32",
        "--save-every",
        "4",
        "--eval-every",
        "6",
    ]
    if "--data" not in flags:  # given twice, it would be two texts
        base += ["--data", "sample"]
    return [sys.executable, "-m", "galore_pretrain", *base, "--output", str(output), *flags]


def run(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, check=False, **kwargs)


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or another process's memory put there."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
