"""What a part of the check is told, and how it keeps what it finds: a line of JSON each, so that nothing found is lost.

A part may end by a signal at any moment. So it appends each finding to its file when it is made, and whoever reads the
file takes the lines that are whole.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from galore_pretrain.train.build import device_named

Value = bool | int | float | str


@dataclass(frozen=True)
class Settings:
    """Says what all parts are told: the device, the text and its tokenizer, and a folder that is removed at the end."""

    device: str
    data: str
    tokenizer: str
    scratch: str


@dataclass(frozen=True)
class Check:
    """Tells of one check: what was measured, the bound it has to hold in words, and whether it does."""

    name: str
    measured: Value
    bound: str
    ok: bool


@dataclass
class Found:
    """Holds what a part has found: the machine, checks, numbers, and what it could not check and why."""

    machine: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Value] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "Found":
        """Return what a part has written to ``file``; nothing where there is no such file."""
        found = cls()
        if not file.exists():
            return found
        for line in file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # the process ended while it wrote
                break
            found.take(json.loads(line))
        return found

    def take(self, line: Mapping[str, Any]) -> None:
        """Take one finding, as `Part` writes it."""
        if "machine" in line:
            self.machine = line["machine"]
        elif "check" in line:
            self.checks.append(Check(**line["check"]))
        elif "number" in line:
            self.numbers[line["number"]] = line["value"]
        else:
            self.skipped[line["skipped"]] = line["why"]


class Part:
    """Takes what a part of the check finds, and writes it to ``file`` at once.

    ``limit`` is how many seconds the part has, from now on.
    """

    def __init__(self, settings: Settings, file: Path, limit: float) -> None:
        self.settings = settings
        self.found = Found()
        self._file = file
        self._end = time.monotonic() + limit

    @cached_property
    def device(self) -> torch.device:
        """Return the device that is checked; InputError where there is none."""
        return device_named(self.settings.device)

    @property
    def is_on_gpu(self) -> bool:
        """Return whether a GPU is checked."""
        return self.device.type == "cuda"

    @property
    def scratch(self) -> Path:
        """Return the folder for what the part writes on its way."""
        return Path(self.settings.scratch)

    def seconds_left(self) -> float:
        """Return how many seconds the part has left."""
        return self._end - time.monotonic()

    def has_time_for(self, name: str, seconds: float) -> bool:
        """Return whether so many seconds are left; where they are not, say that ``name`` is skipped."""
        if self.seconds_left() >= seconds:
            return True
        self.skip(name, "no time was left")
        return False

    def machine(self, description: Mapping[str, Any]) -> None:
        """Say on which machine the part runs, and by which versions."""
        self._keep({"machine": dict(description)})

    def check(self, name: str, measured: Value, bound: str, ok: bool) -> None:
        """Say what was measured, and whether that holds its bound."""
        self._keep({"check": asdict(Check(name, _plain(measured), bound, bool(ok)))})

    def check_below(self, name: str, measured: float, bound: float) -> None:
        """Say what was measured, which is to be ``bound`` at most; what is no number is not."""
        self.check(name, measured, f"at most {bound:.3g}", measured <= bound)

    def number(self, name: str, value: Value) -> None:
        """Say what was measured, where nothing bounds it."""
        self._keep({"number": name, "value": _plain(value)})

    def skip(self, name: str, why: str) -> None:
        """Say what is not checked here, and why."""
        self._keep({"skipped": name, "why": why})

    def _keep(self, line: Mapping[str, Any]) -> None:
        self.found.take(line)
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _plain(value: Value) -> Value:
    """Return a value that JSON has: an infinity or no number as a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
