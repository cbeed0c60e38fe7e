"""Many runs from one command: the paper's tables, a grid of learning rates, or one's own list.

Each run is the command line's own, in its own process and folder; one that is finished is not made again, and one that
was stopped goes on. No torch in here.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from galore_pretrain.config.flags import RunCommand, flags, resolved
from galore_pretrain.config.options import find_model
from galore_pretrain.config.resolve import without_meaning
from galore_pretrain.errors import InputError
from galore_pretrain.signals import on_stop
from galore_pretrain.study.paper import printed
from galore_pretrain.study.results import FROZEN, FROZEN_FLAGS

GRID = (0.01, 0.005, 0.001, 0.0005, 0.0001)
"""Learning rates that the GaLore paper's authors tuned over (appendix C.1)."""
KINDS = ("table2", "table3", "figure3", "natural", "lr")
_BEYOND = 3  # factors that are tried beyond those that were named
_FIGURE3: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("adamw", "galore_adamw", {}),
    ("adamw8bit", "galore_adamw8bit", {}),
    ("adafactor", "galore_adafactor", {"betas": (0.9, 0.999)}),  # the paper's Adafactor has a first moment
)
"""Methods of the figure in pairs, without and with a projection, and the flags of both."""


@dataclass(frozen=True)
class Entry:
    """A line of a sweep's table: the flags that make it, beside those that all lines share."""

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Return the name of the line's folder."""
        return re.sub(r"[^\w.+]+", "-", self.name)

    @property
    def is_tuned(self) -> bool:
        """Whether a factor on the matrices' learning rate is looked for; not where the line itself says one."""
        return "matrix_lr_scale" not in self.flags


@dataclass(frozen=True)
class Planned:
    """One run: its folder, and all flags that it is given."""

    folder: Path
    flags: Mapping[str, Any]

    @property
    def loss(self) -> float | None:
        """The last validation loss of a finished run."""
        try:
            return float(json.loads((self.folder / "summary.json").read_text())["eval_loss"])
        except (OSError, ValueError, KeyError):
            return None

    def command(self) -> str:
        """Return the command that a person would type."""
        return " ".join(["galore-pretrain", *self.arguments()])

    def arguments(self) -> list[str]:
        """Return the command's words, without the program's name."""
        words: list[str] = []
        for name, value in {**self.flags, "output": self.folder}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
        return words


def entries(kind: str, model: str, optim: str | None) -> list[Entry]:
    """The lines of a sweep: of a kind, or of a JSON file, ``{"runs": {NAME: {FLAG: VALUE}}}``."""
    if kind not in KINDS:
        return [Entry(e.name, {"optim": optim or "galore_adamw", **e.flags}) for e in _own(Path(kind))]
    if kind == "lr":
        row = optim or "galore_adamw"
        return [Entry(f"{row} {lr:g}", {"optim": row, "lr": lr}) for lr in GRID]
    if optim is not None:
        raise InputError(f"--optim {optim}: sweep {kind} has rows of its own; only sweep lr takes one")
    if kind == "figure3":
        width = int(json.loads(find_model(model).read_text())["hidden_size"])
        found = []
        for full, projected, more in _FIGURE3:
            found.append(Entry(full, {"optim": full, **more}))
            for rank in (width // 4, width // 2):
                found.append(Entry(f"{projected} r{rank}", {"optim": projected, "rank": rank, **more}))
        return found
    rows = {
        "table2": ("adamw", "galore_adamw", "low_rank", "lora", "relora"),
        "table3": ("adamw8bit", "galore_adamw8bit"),
        "natural": ("adamw", "low_rank", "lora", "relora", "galore_adamw", "natural_galore"),
    }[kind]
    control = [] if kind == "table3" else [Entry(FROZEN, FROZEN_FLAGS)]
    return [Entry(row, {"optim": row}) for row in rows] + control


def own_length(kind: str, model: str) -> dict[str, int]:
    """The updates behind a picture, where they are not the recipe's."""
    figure = printed()["figure3"]
    return {"steps": figure["steps"]} if (kind, model) == ("figure3", figure["model"]) else {}


def _own(file: Path) -> list[Entry]:
    try:
        runs = json.loads(file.read_text())["runs"]
        found = [Entry(name, {key.replace("-", "_"): value for key, value in runs[name].items()}) for name in runs]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"sweep {file}: neither one of {', '.join(KINDS)} nor a JSON file "
            f'{{"runs": {{NAME: {{FLAG: VALUE}}}}}} ({error})'
        ) from error
    if not found:
        raise InputError(f"sweep {file}: names no run")
    for entry in found:
        if own := {"seed", "output"} & entry.flags.keys():
            raise InputError(f"sweep {file}: {entry.name} has --{min(own)}, which a sweep gives; leave it out")
    if len({entry.folder for entry in found}) < len(found):
        raise InputError(f"sweep {file}: two names make one folder ({', '.join(entry.folder for entry in found)})")
    return found


@dataclass
class Sweep:
    """``shared`` flags go to every run. ``seeds`` are run of each entry; with ``factors``, the first seed is run with
    each as ``--matrix-lr-scale`` before, and the one with the lowest validation loss is kept. Where that is the
    smallest or the largest, further ones are tried beyond it. ``jobs`` runs at a time share the machine's cores."""

    lines: Sequence[Entry]
    shared: Mapping[str, Any]
    seeds: Sequence[int]
    factors: Sequence[float]
    jobs: int
    output: Path
    _active: list[tuple[Planned, "subprocess.Popen[bytes]"]] = field(default_factory=list, init=False)
    _stop: int | None = field(default=None, init=False)

    def run(self) -> tuple[list[Path], int]:
        """(folders of the runs that have begun, exit code): 0, 1 where some run failed, 128 + N where signal N stopped
        the sweep."""
        with on_stop(self._interrupted):
            chosen, failed = self._tune() if self.factors else ({}, [])
            tuned = [entry for entry in self.lines if not (self.factors and entry.is_tuned) or entry.name in chosen]
            final = [self._planned(e, seed, chosen.get(e.name)) for seed in self.seeds for e in tuned]
            failed += [run for run in self._make(final) if run not in failed]
        for run in failed:
            print(f"failed: {run.folder} (see its log.txt)", file=sys.stderr)
        if self._stop is not None:
            over = sum(run.loss is not None for run in final)
            print(
                f"stopped, {over} of {len(self.seeds) * len(self.lines)} runs over; the same command goes on",
                file=sys.stderr,
            )
        code = 128 + self._stop if self._stop is not None else 1 if failed else 0
        return [run.folder for run in final if _has_begun(run.folder)], code

    def all_runs(self) -> list[Planned]:
        """Every run that may be made: with tuning, those with any of the factors."""
        return [
            self._planned(entry, seed, factor)
            for seed in self.seeds
            for entry in self.lines
            for factor in (self.factors if self.factors and entry.is_tuned else [None])
        ]

    def listing(self) -> list[str]:
        """The commands, and a word on those that can only be known when some are done."""
        later = list(self.seeds[1:])
        if not self.factors:
            return [run.command() for run in self.all_runs()]
        lines = [entry for entry in self.lines if not entry.is_tuned]
        known = replace(self, seeds=self.seeds[:1]).all_runs() + replace(self, lines=lines, seeds=later).all_runs()
        words = "# and factors beyond these, where the smallest or largest does best"
        words += f"; then seeds {', '.join(map(str, later))} of the others, with the best ones" if later else ""
        return [*(run.command() for run in known), words]

    def check(self) -> None:
        """InputError where a run's flags do not fit together, or a folder holds another run, before any is made."""
        for run in self.all_runs():
            _check_folder(run)

    def _tune(self) -> tuple[dict[str, float], list[Planned]]:
        """(the best factor of each entry that has one, runs that failed), with ``tuning.json`` as the record."""
        lines = [entry for entry in self.lines if entry.is_tuned]
        tried = {e.name: {factor: self._planned(e, self.seeds[0], factor) for factor in self.factors} for e in lines}
        failed = self._make([run for runs in tried.values() for run in runs.values()])
        while self._stop is None and (beyond := {e.name: (e, f) for e in lines if (f := self._beyond(tried[e.name]))}):
            more = {name: self._planned(entry, self.seeds[0], factor) for name, (entry, factor) in beyond.items()}
            for name, run in more.items():
                _check_folder(run)
                tried[name][beyond[name][1]] = run
            failed += self._make(list(more.values()))
        losses = {name: {f: run.loss for f, run in runs.items()} for name, runs in tried.items()}
        chosen = {}
        for name, found in losses.items():
            if known := {f: loss for f, loss in found.items() if loss is not None and math.isfinite(loss)}:
                chosen[name] = min(known, key=lambda f: known[f])
        for name, factor in chosen.items():
            if factor > 0 and factor in (min(f for f in losses[name] if f > 0), max(losses[name])) and not self._stop:
                print(f"{name}: the best factor, {factor:g}, is the outermost that was tried", file=sys.stderr)
        if self._stop is None:
            record = {"seed": self.seeds[0], "losses": losses, "chosen": chosen}
            (self.output / "tuning.json").write_text(json.dumps(record, indent=2) + "\n")
        return chosen, failed

    def _beyond(self, tried: Mapping[float, Planned]) -> float | None:
        """The factor to try next, where the best so far has none on one side of it: an edge is no optimum."""
        losses = {f: run.loss for f, run in sorted(tried.items()) if f > 0}
        known = {f: loss for f, loss in losses.items() if loss is not None and math.isfinite(loss)}
        if len(losses) < 2 or not known or len(tried) >= len(self.factors) + _BEYOND:
            return None
        factors, best = list(losses), min(known, key=lambda f: known[f])
        if best not in (factors[0], factors[-1]):
            return None
        further = best**2 / factors[1 if best == factors[0] else -2]
        rounded = (float(f"{further:.{digits}g}") for digits in (1, 2, 3, 17))
        return next(f for f in rounded if (f < best) == (further < best) and f != best)

    def _planned(self, entry: Entry, seed: int, factor: float | None) -> Planned:
        name = entry.folder + ("" if factor is None else f"-m{factor:g}")
        # Of the flags for all, a row takes those that mean something to it, as long as they do to another.
        own, others = without_meaning(entry.flags["optim"]), [without_meaning(e.flags["optim"]) for e in self.lines]
        shared = {n: v for n, v in self.shared.items() if n not in own or all(n in other for other in others)}
        tuned = {} if factor is None else {"matrix_lr_scale": factor}
        return Planned(self.output / f"{name}-seed{seed}", {**shared, **entry.flags, **tuned, "seed": seed})

    def _make(self, runs: Sequence[Planned]) -> list[Planned]:
        """Make all that are not finished; those that failed are returned."""
        waiting = [run for run in runs if run.loss is None]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ if self.jobs > 1 else dict(os.environ)
        failed: list[Planned] = []
        while (waiting and self._stop is None) or self._active:
            while waiting and self._stop is None and len(self._active) < self.jobs:
                run = waiting.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                with (run.folder / "log.txt").open("ab") as log:
                    command = [sys.executable, "-m", "galore_pretrain", *run.arguments()]
                    # A group of its own: a terminal's interrupt reaches the sweep alone, which passes it on.
                    process = subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
                    )
                self._active.append((run, process))
                if self._stop is not None:  # meanwhile
                    process.terminate()
                print(f"{time.strftime('%H:%M')} {run.folder} ({len(waiting)} to come)", file=sys.stderr)
            time.sleep(0.2)
            codes = [(run, process, process.poll()) for run, process in self._active]
            failed += [run for run, _, code in codes if code and self._stop is None]
            self._active = [(run, process) for run, process, code in codes if code is None]
        return failed

    def _interrupted(self, number: int) -> None:
        """Let the runs finish their updates and save."""
        self._stop = number
        for _, process in self._active:
            process.terminate()


def _check_folder(run: Planned) -> None:
    """InputError where the flags do not fit together, or the folder holds another run."""
    with RunCommand("train", params=flags()).make_context("train", run.arguments()) as context:
        config, _ = resolved(context, context.params)
    try:
        saved = json.loads((run.folder / "config.json").read_text())["config"]
        values = {name: entry["value"] for name, entry in saved.items() if name not in config.undecided}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the run will write it anew
        return
    if changed := config.differences(values):
        raise InputError(f"{run.folder} was made with other options: {', '.join(changed)}; give another --output")


def _has_begun(folder: Path) -> bool:
    """Whether there is a line of an update."""
    file = folder / "metrics.jsonl"
    return file.exists() and b"\n" in file.read_bytes()
