"""Results of runs, finished or not: read from their folders, and grouped so that only like is compared with like."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from galore_pretrain.config.evaluated import further_texts
from galore_pretrain.config.options import FLAGS
from galore_pretrain.errors import InputError
from galore_pretrain.study.seeds import Spread

SETTING = (
    "model",
    "init",
    "task",
    "epochs",
    "data",
    "eval_data",
    "text_key",
    "tokenizer",
    "layout",
    "documents",
    "max_length",
    "total_batch_size",
    "steps",
    "max_tokens",
    "eval_tokens",
)
"""The flags of a setting. Runs that differ in one of them are not compared."""

_NOT_THE_METHOD = {*SETTING, "optim", "seed", "name"}

FROZEN = "frozen"
"""The label of the control, in which the matrices keep their first weights."""

FROZEN_FLAGS = {"optim": "adamw", "matrix_lr_scale": 0.0}
"""The flags that make a run of the control."""

_MOST_POINTS = 1000  # of a curve: a picture has fewer pixels across


@dataclass(frozen=True)
class Result:
    """Holds what one run wrote into its folder.

    ``lines`` are the lines of ``metrics.jsonl`` that can be read. ``config`` has the resolved values (empty where there
    is no ``config.json``), ``environment`` all else that stands there (code, versions). ``summary`` is what the run
    wrote at its end (empty before). ``unread`` names the parts that exist and cannot be read.
    """

    folder: Path
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    unread: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines with a validation loss."""
        return [line for line in self.lines if line.get("eval_loss") is not None]

    @cached_property
    def seconds(self) -> list[float]:
        """Seconds of training up to each line, without evaluating and saving."""
        durations = []
        tokens_before = 0
        for line in self.lines:
            tokens = line["tokens_seen"] - tokens_before
            tokens_before = line["tokens_seen"]
            speed = line.get("tokens_per_second")
            durations.append(tokens / speed if speed else 0.0)
        return list(accumulate(durations))

    @property
    def is_over(self) -> bool:
        """Return whether the last line is the last update, evaluated."""
        if not self.evaluations:
            return False
        last = self.lines[-1]
        if self.evaluations[-1] is not last:
            return False
        steps = self.config.get("steps")
        if steps:
            return bool(last["step"] >= steps)
        if self.summary:
            return True
        max_tokens = self.config.get("max_tokens") or math.inf
        return bool(last["tokens_seen"] >= max_tokens)

    @property
    def final_loss(self) -> float:
        """The last validation loss; IndexError where nothing was evaluated."""
        return float(self.evaluations[-1]["eval_loss"])

    @property
    def base(self) -> str:
        """The optimizer's row, marked as `FROZEN` where the matrices keep their first weights."""
        if FROZEN_FLAGS.items() <= self.config.items():
            return FROZEN
        optim = str(self.config.get("optim", self.folder.name))
        if self.config.get("matrix_lr_scale") == 0:
            return f"{optim}, {FROZEN}"
        return optim


@dataclass(frozen=True)
class Comparison:
    """Runs in one ``setting``, by method, the best first; the runs of a method differ in their seeds."""

    setting: Mapping[str, Any]
    methods: Mapping[str, list[Result]]


def read(folder: Path) -> Result:
    """Read the run in ``folder``.

    A line of ``metrics.jsonl`` that is cut off or no JSON is left out. InputError where no line can be read.
    """
    lines, bad_lines = _read_metrics(folder)
    unread = []
    if bad_lines:
        unread.append(f"{bad_lines} lines of metrics.jsonl")
    for name in ("config.json", "summary.json"):
        file = folder / name
        if file.exists() and not json_object(file):
            unread.append(name)
    config, environment = read_config(folder)
    summary = json_object(folder / "summary.json")
    return Result(folder, lines, config, summary, tuple(unread), environment)


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of updates in ``metrics.jsonl``, and how many lines are no JSON."""
    try:
        text = (folder / "metrics.jsonl").read_text(errors="replace")
    except OSError as error:
        raise InputError(f"{folder}: no run ({error.strerror}: metrics.jsonl); name a run's folder") from error
    lines = []
    bad_lines = 0
    for line in text.splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            # A last line without its end is no damage: a run may just be writing it.
            if line.endswith("\n"):
                bad_lines += 1
            continue
        is_of_run = isinstance(values, dict) and {"step", "tokens_seen"} <= values.keys()
        if is_of_run and values["step"]:  # what a run begins from is evaluated as step 0
            lines.append(values)
    if not lines:
        raise InputError(f"{folder}: metrics.jsonl has no line of an update yet")
    return lines, bad_lines


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resolved values in ``config.json``, without where each came from, and all else that stands there."""
    environment = json_object(folder / "config.json")
    entries = environment.pop("config", None)
    if not isinstance(entries, dict):
        return {}, environment
    config = {}
    for name, entry in entries.items():
        if isinstance(entry, dict) and "value" in entry:
            config[name] = entry["value"]
    return config, environment


def find(paths: Sequence[Path]) -> list[Result]:
    """Read the runs that ``paths`` name: folders of runs, or folders that hold such (a sweep's).

    Folders of reports are passed over, so that a shell's ``sweeps/table2/*`` works. InputError where a folder has no
    run.
    """
    folders: list[Path] = []
    for path in paths:
        folders += _run_folders(path)
    # Where nothing but reports is named, `read` says of the first that it is no run.
    distinct = dict.fromkeys(folders or paths)
    return list(map(read, distinct))


def _run_folders(path: Path) -> list[Path]:
    """Return ``path`` if it is a run's folder, else the runs' folders in it, else ``path`` again for `read` to refuse.

    Of a report's folder, the answer is empty.
    """
    if (path / "metrics.jsonl").exists():
        return [path]
    inside = []
    for file in path.glob("*/metrics.jsonl"):
        has_a_whole_line = b"\n" in file.read_bytes()
        if has_a_whole_line:
            inside.append(file.parent)
    if inside:
        return sorted(inside)
    if (path / "report.md").exists():
        return []
    return [path]


def compare(results: Sequence[Result]) -> list[Comparison]:
    """Group the runs by their setting, and those of a setting by their method."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_setting_key(result), []).append(result)
    # The sort is stable and False comes first: runs without a config, of unknown setting, go to the end.
    in_order = sorted(groups.values(), key=lambda group: not group[0].config)
    comparisons = []
    for group in in_order:
        comparisons.append(Comparison(_setting(group[0]), _by_method(group)))
    return comparisons


def _setting(result: Result) -> dict[str, Any]:
    """Return the run's values of the flags of a setting, None where it has no config.

    A flag that was not known when it ran has its default.
    """
    if not result.config:
        return dict.fromkeys(SETTING)
    return {name: result.config.get(name, FLAGS[name].default) for name in SETTING}


def _setting_key(result: Result) -> str:
    """Return a text that is the same for runs of one setting; a run without a config stands alone."""
    if not result.config:
        return str(result.folder)
    return json.dumps(_setting(result))


def _by_method(group: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the runs of one setting by their method's label, the best method first.

    Methods are sorted by their mean final loss; those without a finished run come last, in the order of their runs.
    """
    # Runs of one label are seeds of one method. Two runs with the same label and the same seed are a repetition, not
    # another seed: the later one gets its folder's name into its label, and stands alone.
    methods: dict[str, list[Result]] = {}
    for result in group:
        label = _label(result, group)
        seed = result.config.get("seed")
        if any(other.config.get("seed") == seed for other in methods.get(label, [])):
            label += f" ({result.folder.name})"
        methods.setdefault(label, []).append(result)

    def mean_loss(method: tuple[str, list[Result]]) -> float:
        _, runs = method
        loss = final_loss(runs)
        return math.inf if loss is None else loss.mean

    return dict(sorted(methods.items(), key=mean_loss))


def _label(result: Result, group: Sequence[Result]) -> str:
    """Return the run's row, with the flags in which it differs from at least half the runs of that row."""
    # What most runs of a row have goes without saying: one odd learning rate does not make all others name theirs.
    same_row = [other.config for other in group if other.base == result.base]
    words = [result.base]
    for name in _method_flags():
        value = result.config.get(name)
        values = [config.get(name) for config in same_row]
        if values.count(value) * 2 <= len(same_row):
            words.append(f"{name} {value}")
    return ", ".join(words)


def _method_flags() -> list[str]:
    """Return the flags that may change a run's numbers and belong neither to the setting nor to the row's name."""
    return [name for name, flag in FLAGS.items() if not flag.free and name not in _NOT_THE_METHOD]


def finished(runs: Sequence[Result]) -> list[Result]:
    """Return the runs that have come to their end."""
    return [run for run in runs if run.is_over]


def final_loss(runs: Sequence[Result]) -> Spread | None:
    """Return the validation loss at the end, over the runs that have come to it; None where none has."""
    losses = [run.final_loss for run in finished(runs)]
    return Spread.of(losses) if losses else None


def last_mean(runs: Sequence[Result], key: str) -> float | None:
    """Return the mean of a number of the last evaluations, over the runs that have come to their end.

    None where none has, and where one of them has not the number, as runs of before it was written.
    """
    values = [run.evaluations[-1].get(key) for run in finished(runs)]
    known = [float(value) for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.mean(known)


def further_of(runs: Sequence[Result]) -> list[str]:
    """Return the names of the texts beside the first on which runs that have come to their end were evaluated."""
    names: dict[str, None] = {}
    for run in finished(runs):
        names |= dict.fromkeys(further_texts(run.evaluations[-1]))
    return list(names)


def losses_by_seed(runs: Sequence[Result]) -> dict[int, float]:
    """Return the last validation losses of the runs that have come to their end, by their seeds."""
    losses = {}
    for run in finished(runs):
        if "seed" in run.config:
            losses[int(run.config["seed"])] = run.final_loss
    return losses


def over_seeds(curves: Sequence[Mapping[int, tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """Merge curves, each {update: (x, y)}, into one: (mean x, mean y, least y, largest y).

    It has a point for each update that all curves have come to, or a thousand of them evenly spread.
    """
    common = set.intersection(*map(set, curves))
    merged = []
    for step in thinned(sorted(common)):
        points = [curve[step] for curve in curves]
        x, y = zip(*points, strict=True)
        mean_x = sum(x) / len(x)
        mean_y = sum(y) / len(y)
        merged.append((mean_x, mean_y, min(y), max(y)))
    return merged


def thinned(values: Sequence[int]) -> Sequence[int]:
    """Return a thousand of ``values`` at most, evenly spread, the last one among them."""
    stride = max(1, math.ceil(len(values) / _MOST_POINTS))
    # Counted from the end, where a run's last value stands.
    backwards = values[::-stride]
    return backwards[::-1]


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty where there is none that can be read."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
