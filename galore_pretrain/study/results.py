"""What runs have to show, finished or not: read from their folders, and set side by side where that means something."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from galore_pretrain.config.options import FLAGS
from galore_pretrain.errors import InputError

SETTING = (
    "model", "data", "eval_data", "tokenizer", "layout", "max_length", "total_batch_size", "steps", "max_tokens",
    "eval_tokens",
)  # fmt: skip
"""Runs that differ in one of these are not compared."""
_NOT_THE_METHOD = {*SETTING, "optim", "seed", "name"}
FROZEN = "frozen"
"""A control: the matrices keep their first weights."""
FROZEN_FLAGS = {"optim": "adamw", "matrix_lr_scale": 0.0}
"""The flags that make it."""


@dataclass(frozen=True)
class Result:
    """One run. ``lines`` are those of ``metrics.jsonl`` that can be read, ``config`` the resolved values (empty where
    there is no ``config.json``), ``summary`` what the run wrote at its end (empty before). ``unread``: what of it is
    there and cannot be read."""

    folder: Path
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    unread: tuple[str, ...] = ()

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines with a validation loss."""
        return [line for line in self.lines if line.get("eval_loss") is not None]

    @cached_property
    def seconds(self) -> list[float]:
        """Seconds of training up to each line, without evaluating and saving."""
        tokens = [0, *(line["tokens_seen"] for line in self.lines)]
        each = [
            (after - before) / line["tokens_per_second"] if line.get("tokens_per_second") else 0.0
            for before, after, line in zip(tokens, tokens[1:], self.lines, strict=False)
        ]
        return list(accumulate(each))

    @property
    def is_over(self) -> bool:
        """Whether the last line is the last update, evaluated."""
        if not self.evaluations or self.evaluations[-1] is not self.lines[-1]:
            return False
        if self.config.get("steps"):
            return bool(self.lines[-1]["step"] >= self.config["steps"])
        return bool(self.summary) or self.lines[-1]["tokens_seen"] >= (self.config.get("max_tokens") or math.inf)

    @property
    def base(self) -> str:
        """The row, or that the matrices are frozen."""
        if all(self.config.get(flag) == value for flag, value in FROZEN_FLAGS.items()):
            return FROZEN
        optim = str(self.config.get("optim", self.folder.name))
        return f"{optim}, {FROZEN}" if self.config.get("matrix_lr_scale") == 0 else optim


@dataclass(frozen=True)
class Comparison:
    """Runs in one ``setting``, by method, the best first; the runs of a method differ in their seeds."""

    setting: Mapping[str, Any]
    methods: Mapping[str, list[Result]]


def read(folder: Path) -> Result:
    """The run in ``folder``. A line that is cut off or no JSON is left out; InputError where no line can be read."""
    lines, bad = [], 0
    try:
        text = (folder / "metrics.jsonl").read_text(errors="replace")
    except OSError as error:
        raise InputError(f"{folder}: no run ({error.strerror}: metrics.jsonl); name a run's folder") from error
    for line in text.splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            bad += line.endswith("\n")  # the last one may just be written
            continue
        if isinstance(values, dict) and {"step", "tokens_seen"} <= values.keys():
            lines.append(values)
    if not lines:
        raise InputError(f"{folder}: metrics.jsonl has no line of an update yet")
    unread = [f"{bad} lines of metrics.jsonl"] if bad else []
    for name in ("config.json", "summary.json"):
        if (folder / name).exists() and not _json(folder / name):
            unread.append(name)
    resolved = _json(folder / "config.json").get("config")
    known = resolved.items() if isinstance(resolved, dict) else ()
    config = {name: entry["value"] for name, entry in known if isinstance(entry, dict) and "value" in entry}
    return Result(folder, lines, config, _json(folder / "summary.json"), tuple(unread))


def find(paths: Sequence[Path]) -> list[Result]:
    """The runs that ``paths`` name: folders of runs, or folders that hold such (a sweep's). Reports are passed over."""
    folders: list[Path] = []
    for path in paths:
        inside = sorted(f.parent for f in path.glob("*/metrics.jsonl") if b"\n" in f.read_bytes())
        others = [] if (path / "report.md").exists() else [path]  # which `read` then refuses
        folders += [path] if (path / "metrics.jsonl").exists() else inside or others
    return [read(folder) for folder in dict.fromkeys(folders or paths)]


def compare(results: Sequence[Result]) -> list[Comparison]:
    """The runs in groups that may be compared, each run under its method's name and what sets it apart."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps([result.config.get(name) for name in SETTING] if result.config else str(result.folder))
        groups.setdefault(key, []).append(result)
    return [
        Comparison({name: group[0].config.get(name) for name in SETTING}, _by_method(group))
        for group in sorted(groups.values(), key=lambda group: not group[0].config)  # what says nothing comes last
    ]


def _by_method(group: Sequence[Result]) -> dict[str, list[Result]]:
    names = [name for name, flag in FLAGS.items() if not flag.free and name not in _NOT_THE_METHOD]
    methods: dict[str, list[Result]] = {}
    for result in group:
        alike = [other.config for other in group if other.base == result.base]
        words = [result.base]
        for name in names:
            value = result.config.get(name)
            if sum(other.get(name) == value for other in alike) * 2 <= len(alike):  # what most have goes without saying
                words.append(f"{name} {value}")
        label = ", ".join(words)
        if any(other.config.get("seed") == result.config.get("seed") for other in methods.get(label, [])):
            label += f" ({result.folder.name})"  # a repetition is not another seed
        methods.setdefault(label, []).append(result)

    def rank(label: str) -> float:
        loss = final_loss(methods[label])
        return math.inf if loss is None else loss.mean

    return {label: methods[label] for label in sorted(methods, key=rank)}


@dataclass(frozen=True)
class Spread:
    """Mean, and standard deviation over seeds (None of one)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


def final_loss(runs: Sequence[Result]) -> Spread | None:
    """The validation loss at the end, over the runs that have come to it."""
    losses = [float(run.evaluations[-1]["eval_loss"]) for run in runs if run.is_over]
    return Spread.of(losses) if losses else None


def paired(ours: Sequence[Result], theirs: Sequence[Result]) -> tuple[float, float | None, int] | None:
    """(mean difference of the final losses seed by seed, its standard error, pairs), where seeds are shared."""
    other = {run.config.get("seed"): run for run in theirs if run.is_over}
    differences = [
        run.evaluations[-1]["eval_loss"] - other[run.config.get("seed")].evaluations[-1]["eval_loss"]
        for run in ours
        if run.is_over and run.config.get("seed") in other
    ]
    if not differences:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return statistics.mean(differences), error, len(differences)


def over_seeds(curves: Sequence[Mapping[int, tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """Curves, update: (x, y), as one: (mean x, mean y, least y, largest y) at each update that all have come to."""
    found = []
    for step in thinned(sorted(set.intersection(*(set(curve) for curve in curves)))):
        x, y = zip(*(curve[step] for curve in curves), strict=True)
        found.append((sum(x) / len(x), sum(y) / len(y), min(y), max(y)))
    return found


def thinned(values: Sequence[int]) -> Sequence[int]:
    """A thousand of ``values`` at most, evenly spread, the last one among them."""
    return values[:: -max(1, -(-len(values) // 1000))][::-1]


_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def told_apart(mean: float, error: float, pairs: int) -> bool:
    """Whether a mean of paired differences is other than 0 at the 95 % level of Student's t (two-sided)."""
    return abs(mean) > error * (_T95[pairs - 2] if pairs - 2 < len(_T95) else 2.2)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
