"""Runs the parts of the check, each a process with a limit, and writes ``check.json`` and ``check.md`` after each."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path

import torch

from galore_pretrain.check import page
from galore_pretrain.check.page import Outcome
from galore_pretrain.check.part import Found, Settings
from galore_pretrain.check.parts import PARTS, Entry
from galore_pretrain.errors import InputError
from galore_pretrain.signals import on_stop
from galore_pretrain.text.hub import hub_text
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import find_tokenizer
from galore_pretrain.train.build import built

_LEAST_SECONDS = 10.0
"""What a part needs to be begun; to start Python and import torch takes half of it."""
_LAST_LINES = 30  # of what a part printed that ended otherwise than well


def settings_for(device: str, data: str, tokenizer: str | None) -> Settings:
    """Return what parts are told; InputError where there is no such device, text or tokenizer.

    The sample is not looked for: where it is not installed, parts say what they could not check for want of it.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    # Nothing here may make a context on a GPU: `seven` counts what is beside its own.
    count = torch.cuda.device_count()
    number = device.removeprefix("cuda").removeprefix(":") or "0"
    is_known = device == "cpu" or (device.startswith("cuda") and number.isdecimal())
    if not is_known:
        raise InputError(f"--device {device} is unknown; use auto, cpu, cuda or cuda:N")
    if device != "cpu" and int(number) >= count:
        raise InputError(f"--device {device}: this machine has {count} CUDA devices; use --device auto{built()}")
    if hub_text(data) is not None:
        raise InputError(f"--data {data}: the check reads no text of the hub; give a file or a folder, or sample")
    if data != "sample":
        if tokenizer is None:
            raise InputError(f"--data {data}: --tokenizer is missing; name that of the text, such as sample")
        open_source(data, "train")
    tokenizer = tokenizer or "sample"
    find_tokenizer(tokenizer)
    return Settings(device, data, tokenizer, scratch="")


class Runner:
    """Runs parts one after the other. ``say`` is told a line of each as it ends."""

    def __init__(self, settings: Settings, minutes: float, output: Path, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._minutes = minutes
        self._end = time.monotonic() + 60 * minutes
        self._output = output
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: int | None = None

    def run(self, names: Sequence[str]) -> int:
        """Run the parts of these names in their order, and return the exit code.

        It is 1 where a check failed, or a part died or passed its limit, and 128 + its number where a signal stopped
        it: what was found until then is written all the same.
        """
        outcomes: list[Outcome] = []
        with on_stop(self._interrupted), tempfile.TemporaryDirectory(dir=self._output, prefix="scratch-") as scratch:
            settings = replace(self._settings, scratch=scratch)
            for name in names:
                outcome = self._outcome(PARTS[name], settings)
                outcomes.append(outcome)
                page.write(self._output, settings, outcomes)
                self._say(page.line(outcome))
        self._say(page.verdict(outcomes))
        if self._stop is not None:
            return 128 + self._stop
        return int(page.has_failed(outcomes))

    def _outcome(self, entry: Entry, settings: Settings) -> Outcome:
        """Run one part, if it can be run, and return what came of it."""
        left = self._end - time.monotonic()
        if self._stop is not None:
            return Outcome(entry, "skipped", "the check was stopped")
        if entry.needs_gpu and not settings.device.startswith("cuda"):
            return Outcome(entry, "skipped", "it needs a GPU")
        if left < _LEAST_SECONDS:
            return Outcome(entry, "skipped", f"the {self._minutes:g} minutes were over")
        self._say(f"{entry.name}: {entry.about} …")
        file = Path(settings.scratch) / f"{entry.name}.jsonl"
        log = file.with_suffix(".log")
        limit = min(entry.limit, left)
        began = time.monotonic()
        code = self._run_process(entry, settings, file, log, limit)
        status, why = self._ending(entry, code, limit)
        said = ""
        if status != "done":
            said = _last_lines(log)
        return Outcome(entry, status, why, time.monotonic() - began, Found.read(file), said)

    def _run_process(self, entry: Entry, settings: Settings, file: Path, log: Path, limit: float) -> int | None:
        """Run a part's process, and return its exit code; None where it had to be ended at its limit."""
        words = [entry.name, dumps(asdict(settings)), str(file), str(limit)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                _command(words),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A group of its own, with what it starts: all of it is ended together, and by nobody else.
                process_group=0,
            )
        if self._stop is not None:  # a signal came before there was a process to end
            self._kill()
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._kill()
            self._process.wait()
            self._process = None

    def _ending(self, entry: Entry, code: int | None, limit: float) -> tuple[str, str]:
        """Return a part's status, and why it ended so, from its exit code."""
        if self._stop is not None:
            return "stopped", f"by {signal.Signals(self._stop).name}"
        if code is None and limit < entry.limit:
            return "cut", f"the {self._minutes:g} minutes were over"
        if code is None:
            return "late", f"it took more than its {limit:.0f} s"
        if code < 0:
            return "died", f"by {signal.Signals(-code).name}"
        if code > 0:
            return "died", f"with exit code {code}"
        return "done", ""

    def _interrupted(self, number: int) -> None:
        self._stop = number
        self._kill()

    def _kill(self) -> None:
        """End the process of the part at hand, and what it has started."""
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):  # nobody of the group is left
                os.killpg(process.pid, signal.SIGKILL)


def _command(words: Sequence[str]) -> list[str]:
    """Return the command that makes a part."""
    return [sys.executable, "-m", "galore_pretrain.check", *words]


def _environment() -> dict[str, str]:
    """Return the environment of a part: no hub is asked, and libraries keep quiet, unless the user says otherwise."""
    environment = dict(os.environ)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # as the command line has it
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment.setdefault("KINETO_LOG_LEVEL", "5")
    return environment


def _last_lines(log: Path) -> str:
    """Return the end of what a part printed, without the user's home and the place of this package."""
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    package = str(Path(__file__).parents[1])
    return "\n".join(lines).replace(package, "galore_pretrain").replace(str(Path.home()), "~")
