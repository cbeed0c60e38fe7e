"""Sweeps: many runs from one command, for a table of the paper, a grid of learning rates, or a list in a file.

Each run is a process of the command line with a folder of its own. One that is finished is not made again, and one that
was stopped goes on. Nothing here needs torch.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from galore_pretrain.config.flags import RunCommand, flags, resolved
from galore_pretrain.config.options import FLAGS, find_model
from galore_pretrain.config.resolve import AS_BEFORE, CHOSEN, load_named, without_meaning
from galore_pretrain.config.tasks import GLUE
from galore_pretrain.errors import InputError
from galore_pretrain.optim import METHODS, is_own
from galore_pretrain.signals import on_stop
from galore_pretrain.study.paper import printed
from galore_pretrain.study.results import FROZEN, FROZEN_FLAGS

KINDS = ("methods", "table2", "table3", "figure3", "natural", "lr", "glue")

GRID = (0.01, 0.005, 0.001, 0.0005, 0.0001)
"""Learning rates that the GaLore paper's authors tuned over (appendix C.1)."""

# Methods of Figure 3 in pairs, without and with a projection, and the flags of both.
_FIGURE3: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("adamw", "galore_adamw", {}),
    ("adamw8bit", "galore_adamw8bit", {}),
    ("adafactor", "galore_adafactor", {"betas": (0.9, 0.999)}),  # the paper's Adafactor has a first moment
)

_ROWS = {
    "methods": tuple(row for row in METHODS if not is_own(row)),
    "table2": ("adamw", "galore_adamw", "low_rank", "lora", "relora"),
    "table3": ("adamw8bit", "galore_adamw8bit"),
    "natural": ("adamw", "low_rank", "lora", "relora", "galore_adamw", "natural_galore"),
}

_GLUE: tuple[tuple[str, int | None], ...] = (
    ("adamw", None),
    *((row, rank) for rank in (4, 8) for row in ("galore_adamw", "lora", "natural_galore")),
)
"""The methods and ranks of GaLore's and Natural GaLore's tables of GLUE."""

_MOST_FURTHER_FACTORS = 3  # tried beyond those that were named

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Entry:
    """A line of a sweep's table: the flags that make it, beside those that all lines share."""

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of the line's folder."""
        return re.sub(r"[^\w.+]+", "-", self.name)

    @property
    def is_tuned(self) -> bool:
        """Return whether a factor on the matrices' learning rate is looked for; not where the line itself says one."""
        return "matrix_lr_scale" not in self.flags


@dataclass(frozen=True)
class Planned:
    """One run: its folder, and all flags that it is given."""

    folder: Path
    flags: Mapping[str, Any]

    @property
    def loss(self) -> float | None:
        """The last validation loss of a finished run; None of one that is not finished."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text())
            return float(summary["eval_loss"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def finite_loss(self) -> float | None:
        """Return the last validation loss of the run; None where there is none, or where the run diverged."""
        loss = self.loss
        if loss is None or not math.isfinite(loss):
            return None
        return loss

    @property
    def has_begun(self) -> bool:
        """Return whether the run has written the line of an update."""
        file = self.folder / "metrics.jsonl"
        return file.exists() and b"\n" in file.read_bytes()

    def command(self) -> str:
        """Return the command that a person would type, quoted for a shell."""
        return shlex.join(["galore-pretrain", *self.arguments()])

    def arguments(self) -> list[str]:
        """Return the command's words, without the program's name."""
        words = as_words({**self.flags, "output": self.folder})
        if self.flags.get("task") is not None:
            words.insert(0, "finetune")
        return words


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags of a run, by their names, as the words of a command."""
    words: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is True:
            words.append(f"--{flag}")
        elif value is False:
            words.append(f"--no-{flag}")
        elif isinstance(value, (list, tuple)) and FLAGS[name].repeated:
            for part in value:
                words += [f"--{flag}", str(part)]
        elif isinstance(value, (list, tuple)):
            words += [f"--{flag}", ",".join(map(str, value))]
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def entries(kind: str, model: str, optim: str | None, tasks: Sequence[str] = GLUE) -> list[Entry]:
    """Return the lines of a sweep: of a kind, or of a JSON file, ``{"runs": {NAME: {FLAG: VALUE}}}``.

    ``optim`` is the row of a grid of learning rates, and the row of a file's lines that name none. ``tasks`` are those
    of GLUE.
    """
    row = optim or "galore_adamw"
    lines = []
    if kind == "lr":
        for lr in GRID:
            lines.append(Entry(f"{row} {lr:g}", {"optim": row, "lr": lr}))
        return lines
    if kind not in KINDS:
        for entry in _entries_of_file(Path(kind)):
            lines.append(Entry(entry.name, {"optim": row, **entry.flags}))
        return lines
    if optim is not None:
        raise InputError(f"--optim {optim}: sweep {kind} has rows of its own; only sweep lr takes one")
    if kind == "figure3":
        return _figure3(model)
    if kind == "glue":
        return _glue(tasks)
    for name in _ROWS[kind]:
        lines.append(Entry(name, {"optim": name}))
    if kind != "table3":  # of 7B, a control costs as much as a method
        lines.append(Entry(FROZEN, FROZEN_FLAGS))
    return lines


def _glue(tasks: Sequence[str]) -> list[Entry]:
    """Return the lines of the tables of GLUE, task by task."""
    lines = []
    for task in tasks:
        for row, rank in _GLUE:
            flags_of_line: dict[str, Any] = {"task": task, "optim": row}
            name = f"{task} {row}"
            if rank is not None:
                flags_of_line["rank"] = rank
                name += f" r{rank}"
            lines.append(Entry(name, flags_of_line))
    return lines


def _figure3(model: str) -> list[Entry]:
    """Return the lines of Figure 3: each pair of methods, the projected one at a quarter and half of the width."""
    shape = json.loads(find_model(model).read_text())
    if "hidden_size" not in shape:  # of a run's checkpoint
        raise InputError(
            f"--init {model}: sweep figure3 takes its ranks from a config.json; name that of {model}/model"
        )
    width = int(shape["hidden_size"])
    lines = []
    for full, projected, more in _FIGURE3:
        lines.append(Entry(full, {"optim": full, **more}))
        for rank in (width // 4, width // 2):
            lines.append(Entry(f"{projected} r{rank}", {"optim": projected, "rank": rank, **more}))
    return lines


def load_line(line: Entry, optim: str | None, *, allow_code: bool) -> None:
    """Load a line's method, if it is from outside the package; InputError where the command line does not name it.

    ``optim`` is what the command line names, itself and not by a file.
    """
    name = line.flags["optim"]
    if name != optim and not allow_code and is_own(name):
        raise InputError(
            f"--optim {name} stands in a file, and a method's file is executed only where the command line says so: "
            f"add --allow-code, or --optim {name}"
        )
    load_named(name)


def own_length(kind: str, model: str) -> dict[str, int]:
    """Return the flags of a picture's number of updates, where it is not the recipe's."""
    figure = printed()["figure3"]
    if kind == "figure3" and model == figure["model"]:
        return {"steps": figure["steps"]}
    return {}


def _entries_of_file(file: Path) -> list[Entry]:
    """Read the lines of a sweep from a JSON file; InputError where it is none, or its lines cannot make a sweep."""
    lines = []
    try:
        runs = json.loads(file.read_text())["runs"]
        for name in runs:
            with_underscores = {str(flag).replace("-", "_"): value for flag, value in runs[name].items()}
            lines.append(Entry(name, with_underscores))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"sweep {file}: neither one of {', '.join(KINDS)} nor a JSON file "
            f'{{"runs": {{NAME: {{FLAG: VALUE}}}}}} ({error})'
        ) from error
    if not lines:
        raise InputError(f"sweep {file}: names no run")
    for entry in lines:
        unknown = entry.flags.keys() - FLAGS.keys()
        if unknown:
            raise InputError(f"sweep {file}: {entry.name} has {min(unknown)!r}, which is no flag of a run")
        if "allow_code" in entry.flags:
            raise InputError(f"sweep {file}: {entry.name} has --allow-code, which only a command line can have")
        taken = {"seed", "output"} & entry.flags.keys()
        if taken:
            raise InputError(f"sweep {file}: {entry.name} has --{min(taken)}, which a sweep gives; leave it out")
    folders = [entry.folder for entry in lines]
    if len(set(folders)) < len(folders):
        raise InputError(f"sweep {file}: two names make one folder ({', '.join(folders)})")
    return lines


@dataclass
class Sweep:
    """Runs of a table's ``lines``, each with all ``seeds``, in folders under ``output``.

    ``shared`` flags go to every run. With ``factors``, the first seed of each line is run with each of them as
    ``--matrix-lr-scale`` before, and the one with the lowest validation loss is kept. ``jobs`` runs at a time share the
    machine's cores.
    """

    lines: Sequence[Entry]
    shared: Mapping[str, Any]
    seeds: Sequence[int]
    factors: Sequence[float]
    jobs: int
    output: Path
    _active: list[tuple[Planned, "subprocess.Popen[bytes]"]] = field(default_factory=list, init=False)
    _stop: int | None = field(default=None, init=False)

    def run(self) -> tuple[list[Path], int]:
        """Make all runs; return (folders of the runs that have begun, exit code).

        The code is 0, 1 where some run failed, 128 + N where signal N stopped the sweep.
        """
        # A sweep keeps no state of its own. What is done is read off the runs' folders: a run with a summary is
        # finished and is passed over, any other is started, and the command line itself goes on from the newest
        # checkpoint in the folder. The tuning reads its losses from the same summaries, so it comes to the same
        # choices. The same command therefore goes on after any break, and makes runs that failed again.
        chosen: dict[str, float] = {}
        failed: list[Planned] = []
        with on_stop(self._interrupted):
            if self.factors:
                chosen, failed = self._tune()
            final = self._final_runs(chosen)
            for run in self._make(final):
                if run not in failed:
                    failed.append(run)
        for run in failed:
            print(f"failed: {run.folder} (see its log.txt)", file=sys.stderr)
        begun = [run.folder for run in final if run.has_begun]
        if self._stop is None:
            exit_code = int(len(failed) > 0)
            return begun, exit_code
        over = sum(run.loss is not None for run in final)
        wanted = len(self.seeds) * len(self.lines)
        print(f"stopped, {over} of {wanted} runs over; the same command goes on", file=sys.stderr)
        return begun, 128 + self._stop

    def _final_runs(self, chosen: Mapping[str, float]) -> list[Planned]:
        """Return the runs of the table itself, seed by seed, with the factors that were chosen.

        A line whose every tuning run failed has no factor, and no run.
        """
        runs = []
        for seed in self.seeds:
            for entry in self.lines:
                if entry.name in chosen or not self._tunes(entry):
                    runs.append(self._planned(entry, seed, chosen.get(entry.name)))
        return runs

    def _tunes(self, entry: Entry) -> bool:
        """Return whether a factor is looked for: factors were named, and the line leaves it open."""
        return bool(self.factors) and entry.is_tuned

    def all_runs(self) -> list[Planned]:
        """Return every run that may be made: with tuning, those with any of the factors."""
        runs = []
        for seed in self.seeds:
            for entry in self.lines:
                runs += self._runs_of(entry, seed)
        return runs

    def _runs_of(self, entry: Entry, seed: int) -> list[Planned]:
        """Return the runs that a line may have with one seed: one for each factor, or the only one."""
        if not self._tunes(entry):
            return [self._planned(entry, seed, None)]
        return [self._planned(entry, seed, factor) for factor in self.factors]

    def listing(self) -> list[str]:
        """Return the commands, and a word on those that can only be known when some are done."""
        if not self.factors:
            return list(map(Planned.command, self.all_runs()))
        first, *later = self.seeds
        runs = []
        for entry in self.lines:
            runs += self._runs_of(entry, first)
        for seed in later:
            for entry in self.lines:
                if not entry.is_tuned:
                    runs += self._runs_of(entry, seed)
        words = "# and factors beyond these, where the smallest or largest does best"
        if later:
            seeds = ", ".join(map(str, later))
            words += f"; then seeds {seeds} of the others, with the best ones"
        return [*map(Planned.command, runs), words]

    def check(self) -> None:
        """Raise InputError where the flags of any run do not fit together, or its folder holds another run."""
        for run in self.all_runs():
            _check_folder(run)

    def _tune(self) -> tuple[dict[str, float], list[Planned]]:
        """Run the first seed of each line with all factors; return (the best factor by line, runs that failed).

        A line has no factor where none of its runs has a finite loss. ``tuning.json`` is the record.
        """
        # Each round makes the runs of all lines together, so that all jobs have work; then each line whose best factor
        # is the smallest or largest so far gets one beyond it. The rounds end where no line asks for more.
        lines = [entry for entry in self.lines if entry.is_tuned]
        tried: dict[str, dict[float, Planned]] = {}
        first_round: list[Planned] = []
        for entry in lines:
            runs = self._runs_of(entry, self.seeds[0])
            tried[entry.name] = dict(zip(self.factors, runs, strict=True))
            first_round += tried[entry.name].values()  # a factor that was named twice is run once
        failed = self._make(first_round)
        while self._stop is None:
            further = self._further_runs(lines, tried)
            if not further:
                break
            failed += self._make(further)
        chosen = {}
        losses = {}
        for name, runs_by_factor in tried.items():
            losses[name] = {factor: run.loss for factor, run in runs_by_factor.items()}
            best = _best_factor(runs_by_factor)
            if best is not None:
                chosen[name] = best
        if self._stop is None:
            _warn_of_edges(losses, chosen)
            record = {"seed": self.seeds[0], "losses": losses, "chosen": chosen}
            (self.output / "tuning.json").write_text(json.dumps(record, indent=2) + "\n")
        return chosen, failed

    def _further_runs(self, lines: Sequence[Entry], tried: Mapping[str, dict[float, Planned]]) -> list[Planned]:
        """Plan a run with a further factor for each line that needs one, and add it to ``tried``."""
        further = []
        for entry in lines:
            factor = self._beyond(tried[entry.name])
            if factor is None:
                continue
            run = self._planned(entry, self.seeds[0], factor)
            _check_folder(run)
            tried[entry.name][factor] = run
            further.append(run)
        return further

    def _beyond(self, tried: Mapping[float, Planned]) -> float | None:
        """Return the factor to try next, where the best so far has none on one side of it: an edge is no optimum."""
        # Factors are steps on a logarithmic scale: the next one is as many times beyond the edge as the edge is beyond
        # its neighbour, edge² / neighbour. It is rounded to the fewest digits that leave it beyond the edge, since it
        # names a folder. Frozen matrices (a factor of 0) have no ratio to others, and are no edge.
        positive = {factor: tried[factor] for factor in sorted(tried) if factor > 0}
        best = _best_factor(positive)
        if best is None or len(positive) < 2:
            return None
        if len(tried) >= len(self.factors) + _MOST_FURTHER_FACTORS:
            return None
        factors = list(positive)
        if best == factors[0]:
            neighbour = factors[1]
        elif best == factors[-1]:
            neighbour = factors[-2]
        else:
            return None
        return _rounded_away(best**2 / neighbour, best)

    def _planned(self, entry: Entry, seed: int, factor: float | None) -> Planned:
        """Return a line's run with one seed, and with one factor if there are factors."""
        name = entry.folder
        run_flags = {**self._shared_flags(entry), **entry.flags}
        if factor is not None:
            name += f"-m{factor:g}"
            run_flags["matrix_lr_scale"] = factor
        run_flags["seed"] = seed
        return Planned(self.output / f"{name}-seed{seed}", run_flags)

    def _shared_flags(self, entry: Entry) -> dict[str, Any]:
        """Return the flags for all lines that go to this one."""
        # A line takes those that mean something to its row. One that means something to no row goes to all: each run
        # would refuse it, and says so before any is made.
        meaningless = without_meaning(entry.flags["optim"])
        meaningless_to_all = set(meaningless)
        for other in self.lines:
            meaningless_to_all &= set(without_meaning(other.flags["optim"]))
        flags_of_line = {}
        for name, value in self.shared.items():
            if name not in meaningless or name in meaningless_to_all:
                flags_of_line[name] = value
        return flags_of_line

    def _make(self, runs: Sequence[Planned]) -> list[Planned]:
        """Make all runs that are not finished, ``jobs`` at a time; return those that failed."""
        # A queue: while there is room, the next run is started; a few times a second, those that ended are taken out.
        # After a signal none is started any more, and the rest are waited for: they save and end by themselves. Such
        # an end is no failure, whatever its exit code.
        waiting = [run for run in runs if run.loss is None]
        failed: list[Planned] = []
        while self._active or (waiting and self._stop is None):
            while waiting and self._stop is None and len(self._active) < self.jobs:
                run = waiting.pop(0)
                self._start(run)
                print(f"{time.strftime('%H:%M')} {run.folder} ({len(waiting)} to come)", file=sys.stderr)
            time.sleep(_POLL_SECONDS)
            still_active = []
            for run, process in self._active:
                code = process.poll()
                if code is None:
                    still_active.append((run, process))
                elif code != 0 and self._stop is None:
                    failed.append(run)
            self._active = still_active
        return failed

    def _start(self, run: Planned) -> None:
        """Start the run's process, which writes into the log of its folder."""
        command = [sys.executable, "-m", "galore_pretrain", *run.arguments()]
        environment = dict(os.environ)
        if self.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own: a terminal's interrupt reaches the sweep alone, which passes it on.
                process_group=0,
            )
        self._active.append((run, process))
        # A signal that came since the last look did not find this process among the active ones.
        if self._stop is not None:
            process.terminate()

    def _interrupted(self, number: int) -> None:
        """Let the runs finish their updates and save."""
        self._stop = number
        for _, process in self._active:
            process.terminate()


def _check_folder(run: Planned) -> None:
    """Raise InputError where the flags do not fit together, or the folder holds another run."""
    command = RunCommand("train", params=flags())
    with command.make_context("train", as_words({**run.flags, "output": run.folder})) as context:
        config, _ = resolved(context, context.params)
    values = {}
    try:
        saved = json.loads((run.folder / "config.json").read_text())["config"]
        for name, entry in saved.items():
            # What a run chose for itself, and may choose again, is no option of the one who starts it.
            was_chosen = entry["origin"] in (CHOSEN, AS_BEFORE)
            if not (was_chosen and name in config.undecided):
                values[name] = entry["value"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # there is no file, or none that can be read: the run will write it anew
    if config.bos == "auto":  # what that comes to is known once the run has its tokenizer
        config = replace(config, bos=values.get("bos", "no"))
    changed = config.differences(values)
    if changed:
        raise InputError(f"{run.folder} was made with other options: {', '.join(changed)}; give another --output")


def _best_factor(runs: Mapping[float, Planned]) -> float | None:
    """Return the factor whose run has the lowest loss; None where no run has a finite one."""
    losses = {}
    for factor, run in runs.items():
        loss = run.finite_loss
        if loss is not None:
            losses[factor] = loss
    if not losses:
        return None
    return min(losses, key=lambda factor: losses[factor])


def _warn_of_edges(tried: Mapping[str, Iterable[float]], chosen: Mapping[str, float]) -> None:
    """Say of which lines the best factor is still the smallest or the largest."""
    for name, factor in chosen.items():
        positive = [other for other in tried[name] if other > 0]
        if factor > 0 and factor in (min(positive), max(positive)):
            print(f"{name}: the best factor, {factor:g}, is the outermost that was tried", file=sys.stderr)


def _rounded_away(value: float, edge: float) -> float:
    """Return ``value`` with the fewest significant digits that leave it on the same side of ``edge``."""
    for digits in (1, 2, 3):
        rounded = float(f"{value:.{digits}g}")
        if rounded != edge and (rounded < edge) == (value < edge):
            return rounded
    return value
