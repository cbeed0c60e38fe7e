"""Small runs of the real command line, and what of them can be compared.

To start Python and import torch takes longer than such a run. So a run is a process of its own that is forked from one
in which all is imported already. Where the start itself is what is tested, `command` is for subprocess.

A run ends with a plan of its memory, for its summary. That takes as long as the rest of so small a run, so it is left
out here, but where a test asks for it.
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from galore_pretrain import run as program

MEASURED = {"tokens_per_second", "mfu", "peak_memory_bytes", "process_peak_bytes"}
"""Keys of metrics.jsonl that a clock, or the process's memory, put there."""
Done = subprocess.CompletedProcess[str]
COMMAND_LINE = "from galore_pretrain import cli; cli.main()"
TRACED = """
from torch import nn
compiled = nn.Module.compile
nn.Module.compile = lambda layer: compiled(layer, backend="aot_eager")
from galore_pretrain import cli
cli.main()
"""
"""The command line, whose --compile traces layers and their backward, and has torch's own operations run them.

It takes a tenth of the time: no C++ is written and compiled. What only that does is in one case of test_profile.py.
"""
KILLED = """
import os, signal
from galore_pretrain import cli
from galore_pretrain.train import trainer
advance, calls = trainer.Trainer._advance, []
def deadly(self, batches):
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, batches)
trainer.Trainer._advance = deadly
cli.main()
"""
"""The command line, killed when it is to make its seventh update."""
WARM = multiprocessing.get_context("forkserver")
"""Its processes are forked from one that has imported preloaded.py."""
WARM.set_forkserver_preload(["preloaded"])


def start_warm() -> None:
    """Start the process that those of `WARM` are forked from. It, and only it, finds modules of tests/ by a path."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):
        forkserver.ensure_running()


def forked(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """Start a process of `WARM`."""
    start_warm()
    process = WARM.Process(target=target, args=arguments, daemon=daemon)
    process.start()
    return process


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


def run(
    model: str, output: Path, *flags: str, env: Mapping[str, str] | None = None, planned: bool = False
) -> subprocess.CompletedProcess[str]:
    return python(COMMAND_LINE, *command(model, output, *flags)[3:], env=env, planned=planned)


def python(
    script: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300, planned: bool = False
) -> subprocess.CompletedProcess[str]:
    """What ``python -c script arguments`` comes to."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(script, *arguments, stdout=said[0], stderr=said[1], env=env, planned=planned)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, said[0].read_text(), said[1].read_text())
        return subprocess.CompletedProcess(arguments, process.exitcode, said[0].read_text(), said[1].read_text())


def start(
    script: str,
    *arguments: str,
    stdout: Path,
    stderr: Path,
    env: Mapping[str, str] | None = None,
    planned: bool = False,
) -> BaseProcess:
    """Start ``python -c script arguments``, whose output goes to files."""
    environment = dict(os.environ if env is None else env)
    return forked(execute, script, arguments, stdout, stderr, environment, Path.cwd(), planned)


def execute(
    script: str,
    arguments: tuple[str, ...],
    stdout: Path,
    stderr: Path,
    environment: dict[str, str],
    folder: Path,
    planned: bool = False,
) -> None:
    if not planned:
        program._planned_peak = known_peak
    gc.freeze()  # as the command line does with what it imports: no search for garbage goes through all of that
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def known_peak(prepared: program.Prepared) -> int | None:
    """The peak that a run's summary has, where it was planned to fit the run's updates to the memory."""
    return prepared.plan.peak_bytes if prepared.plan else None


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or another process's memory put there."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
