"""Leaderboards: tracks, and entries that hold what a method's runs on a track came to. Nothing here needs torch.

A leaderboard is a folder with a folder for each track. A track has a ``track.json``, and a folder for each entry. An
entry has an ``entry.json``, and the file of a method that is not shipped.
"""

import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from galore_pretrain.config.options import FLAGS
from galore_pretrain.errors import InputError
from galore_pretrain.optim import METHODS, is_own
from galore_pretrain.study.results import SETTING, Result
from galore_pretrain.study.sweep import as_words

UPDATES = 50
"""The updates whose losses an entry holds one by one, so that they can be repeated."""

_DIGITS = 6  # of losses, behind the point


@dataclass(frozen=True)
class Track:
    """Says what all entries of a folder share: the model, the text, the length, and how they are judged.

    ``flags`` are those of every run. An entry has all ``seeds``. Entries are compared with the ``baselines``, and with
    the ``control`` if there is one, by the names of their folders. ``validation_bytes`` are those of the text that is
    evaluated, in UTF-8; None where nobody has counted them.
    """

    folder: Path
    title: str
    about: str
    flags: Mapping[str, Any]
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    control: str | None
    validation_bytes: int | None

    @classmethod
    def read(cls, folder: Path) -> "Track":
        """Read the track of a folder; InputError where it has none."""
        values = _read_object(folder / "track.json", "no track; name a folder with a track.json")
        unknown = values.keys() ^ {field.name for field in fields(cls) if field.name != "folder"}
        if unknown:
            raise InputError(f"{folder / 'track.json'}: {min(unknown)} is missing, or is no key of a track")
        _check_flags(folder / "track.json", values["flags"], taken=("optim", "seed"))
        lists = {}
        for name, kind in (("seeds", int), ("baselines", str)):
            if not isinstance(values[name], list) or not all(type(part) is kind for part in values[name]):
                raise InputError(f"{folder / 'track.json'}: {name} is {values[name]!r}, and no list of {kind.__name__}")
            lists[name] = tuple(values[name])
        return cls(folder=folder, **values | lists)

    def entries(self) -> list["Entry"]:
        """Read all entries, in the order of their names."""
        return [Entry.read(file.parent, self) for file in sorted(self.folder.glob("*/entry.json"))]


@dataclass(frozen=True)
class Run:
    """Holds what the run of one seed came to.

    ``loss`` is that of the last evaluation, in nats per token, of ``tokens``; ``evaluations`` has all by their updates.
    ``first_losses`` are the training losses of the first updates. Sizes are of the whole model.
    """

    seed: int
    loss: float
    tokens: int
    evaluations: Mapping[str, float]
    first_losses: Sequence[float]
    seconds: float
    weights_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, eq=False)
class Entry:
    """A method on a track: how it was run, and what came of it.

    ``optim`` is a shipped method, or FILE.py:NAME of a file in the entry's folder, whose SHA-256 is ``method_sha256``.
    ``flags`` are those beside the track's. ``tuning`` has the losses by factor on the matrices' learning rate, and the
    seed that was tuned on; None where nothing was tuned. ``made_with`` are the commit, the versions and the hardware.
    """

    folder: Path
    track: Track
    optim: str
    method_sha256: str | None
    flags: Mapping[str, Any]
    tuning: Mapping[str, Any] | None
    made_with: Mapping[str, Any]
    runs: Sequence[Run]

    @classmethod
    def read(cls, folder: Path, track: Track | None = None) -> "Entry":
        """Read the entry of a folder, whose track is the folder above; InputError where it cannot be one."""
        file = folder / "entry.json"
        values = _read_object(file, "no entry; name a folder with an entry.json")
        unknown = values.keys() ^ {field.name for field in fields(cls) if field.name not in ("folder", "track")}
        if unknown:
            raise InputError(f"{file}: {min(unknown)} is missing, or is no key of an entry")
        track = track or Track.read(folder.parent)
        # What a run reads and writes is the track's to say, so no entry from elsewhere can name a file but its own.
        _check_flags(file, values["flags"], taken=("optim", "seed", *SETTING, *track.flags))
        optim = values["optim"]
        if not isinstance(optim, str) or not _is_method(optim):
            raise InputError(f"{file}: optim {optim!r} is no shipped method, and no FILE.py:NAME in the entry's folder")
        values["runs"] = _checked_runs(file, values["runs"], track)
        _check_tuning(file, values["tuning"])
        return cls(folder=folder, track=track, **values)

    @property
    def name(self) -> str:
        """The name of the entry's folder."""
        return self.folder.name

    @property
    def method_file(self) -> Path | None:
        """The file that a run of the entry executes; None of a shipped method."""
        if not is_own(self.optim):
            return None
        return self.folder / self.optim.rpartition(":")[0]

    @cached_property
    def losses(self) -> dict[int, float]:
        """The last validation losses by seed."""
        return {run.seed: run.loss for run in self.runs}

    @property
    def is_complete(self) -> bool:
        """Return whether there is a run of each of the track's seeds."""
        return set(self.losses) == set(self.track.seeds)

    def run_flags(self, seed: int) -> dict[str, Any]:
        """Return the flags of the run of one seed."""
        optim = self.optim
        if self.method_file is not None:
            optim = str(self.folder / self.optim)
        return {**self.track.flags, "optim": optim, **self.flags, "seed": seed}

    def command(self) -> str:
        """Return the command of the first run, as a person would type it."""
        return shlex.join(["galore-pretrain", *as_words(self.run_flags(self.runs[0].seed))])

    def check_method(self) -> None:
        """Raise InputError where the method's file is not the one that the runs were made with."""
        file = self.method_file
        if file is None:
            return
        if not file.is_file():
            raise InputError(f"{file}: the method's file is missing")
        if _digest(file) != self.method_sha256:
            raise InputError(f"{file} is not the file that the entry's runs were made with: its SHA-256 is another")

    def write(self, result: Result) -> None:
        """Write ``entry.json`` and, from where ``result`` had it, the method's file; InputError where there is one."""
        if self.folder.exists():
            raise InputError(f"{self.folder} is there already; give another --name, or remove it")
        source = self._method_source(result)
        self.folder.mkdir(parents=True)
        if source is not None and self.method_file is not None:
            shutil.copyfile(source, self.method_file)
        values = {
            "optim": self.optim,
            "method_sha256": self.method_sha256,
            "flags": dict(self.flags),
            "tuning": self.tuning,
            "made_with": self.made_with,
            "runs": [asdict(run) for run in self.runs],
        }
        text = json.dumps(values, indent=2)
        # A list of numbers is one line, not one for each.
        text = re.sub(r"\[\s+([-\d.eE,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        (self.folder / "entry.json").write_text(text + "\n")

    def _method_source(self, result: Result) -> Path | None:
        """Return the method's file, as a run named it; None of a shipped method, InputError where it is another now."""
        optim = str(result.config["optim"])
        if not is_own(optim):
            return None
        file = Path(optim.rpartition(":")[0])
        if file.suffix != ".py":
            raise InputError(f"--optim {optim}: an entry holds its method, so name it as FILE.py:NAME")
        if not file.is_file() or _digest(file) != self.method_sha256:
            raise InputError(f"{file} is not there any more, or has changed since {result.folder} was made")
        return file


def folder_name(label: str) -> str:
    """Return the name of an entry's folder for a method's label in a report."""
    if is_own(label):
        label = label.rpartition(":")[2]
    return re.sub(r"[^\w.+]+", "-", label)


def read_tuning(file: Path) -> dict[str, Any]:
    """Read a sweep's ``tuning.json``; InputError where there is none."""
    values = _read_object(file, "no tuning.json, which a sweep with --tune-matrices leaves")
    if not {"seed", "losses"} <= values.keys():
        raise InputError(f"{file}: no tuning.json of a sweep")
    return values


def entry_of(name: str, track: Track, results: Sequence[Result], tuning: Mapping[str, Any] | None) -> Entry:
    """Make an entry of the finished runs of one method; InputError where they are none of the track.

    ``tuning`` is the content of a sweep's ``tuning.json``, whose lines have the names of entries. Nothing is written.
    """
    by_seed: dict[int, Result] = {}
    for result in sorted(results, key=lambda result: int(result.config.get("seed", 0))):
        _check_run(track, result)
        seed = int(result.config["seed"])
        if seed in by_seed:
            raise InputError(f"{result.folder} and {by_seed[seed].folder} are both of seed {seed}; name one of them")
        by_seed[seed] = result
    first, *others = by_seed.values()
    flags = _own_flags(track, first)
    made_with = _made_with(first)
    for other in others:
        changed = _own_flags(track, other)
        if changed != flags or other.config["optim"] != first.config["optim"]:
            raise InputError(f"{other.folder} and {first.folder} differ in more than their seeds: no one entry")
        theirs = _made_with(other)
        if any(theirs[part] != made_with[part] for part in ("commit", "versions")):
            raise InputError(f"{other.folder} and {first.folder} were made with different code or libraries")
    optim = str(first.config["optim"])
    if is_own(optim):
        optim = Path(optim).name
        if not _is_method(optim):
            raise InputError(f"--optim {first.config['optim']}: an entry holds its method, so name it as FILE.py:NAME")
    tuned = None
    if tuning is not None and name in tuning["losses"]:
        tuned = {"seed": tuning["seed"], "losses": _rounded(tuning["losses"][name])}
    return Entry(
        folder=track.folder / name,
        track=track,
        optim=optim,
        method_sha256=first.environment.get("method_sha256"),
        flags=flags,
        tuning=tuned,
        made_with=made_with,
        runs=[_run_of(seed, result) for seed, result in by_seed.items()],
    )


def _check_run(track: Track, result: Result) -> None:
    """Raise InputError for a run that is not over, or not of the track."""
    if not result.config:
        raise InputError(f"{result.folder}: its config.json cannot be read")
    expected = {name: track.flags.get(name, FLAGS[name].default) for name in SETTING} | dict(track.flags)
    for name in ("tokenizer", "steps"):  # which follow from other flags, where the track leaves them out
        if name not in track.flags:
            del expected[name]
    for name, value in expected.items():
        ours = result.config.get(name, FLAGS[name].default)
        if ours != value:
            flag = name.replace("_", "-")
            raise InputError(f"{result.folder} has --{flag} {ours}, and {track.folder.name} has {value}: no run of it")
    if result.config["seed"] not in track.seeds:
        seeds = ", ".join(map(str, track.seeds))
        raise InputError(f"{result.folder} has --seed {result.config['seed']}; the seeds of the track are {seeds}")
    if not result.summary or not result.is_over:
        raise InputError(f"{result.folder} has not come to its end; the command of the run goes on")
    if not math.isfinite(result.final_loss):
        raise InputError(f"{result.folder} has diverged: its last validation loss is {result.final_loss}")


def _own_flags(track: Track, result: Result) -> dict[str, Any]:
    """Return the flags that an entry has to hold so that its runs can be repeated: a recipe may change."""
    flags = {}
    for name, flag in FLAGS.items():
        value = result.config.get(name)
        is_of_others = flag.free or name in track.flags or name in SETTING or name in ("optim", "seed")
        if not is_of_others and value is not None and value != flag.default:
            flags[name] = value
    return flags


def _made_with(result: Result) -> dict[str, Any]:
    """Return the commit, the versions and the hardware of a run."""
    environment = result.environment
    git = environment.get("git") or {}
    return {
        "commit": git.get("commit"),
        "changed": git.get("changed"),
        "versions": environment.get("versions", {}),
        "hardware": environment.get("hardware", {}),
    }


def _run_of(seed: int, result: Result) -> Run:
    """Return what a run came to."""
    summary = result.summary
    evaluations = {str(line["step"]): line["eval_loss"] for line in result.evaluations}
    first = [line["loss"] for line in result.lines[:UPDATES]]
    if not all(map(_is_number, first)):
        raise InputError(
            f"{result.folder}: one of its first {UPDATES} updates has no finite loss; it cannot be repeated"
        )
    return Run(
        seed=seed,
        loss=round(result.final_loss, _DIGITS),
        tokens=int(summary["eval_tokens"]),
        evaluations=_rounded(evaluations),
        first_losses=[round(loss, _DIGITS) for loss in first],
        seconds=round(summary["wall_seconds"], 1),
        weights_bytes=int(summary["weights_bytes"]),
        optimizer_bytes=int(summary["optimizer_bytes"]),
    )


def _rounded(losses: Mapping[str, float | None]) -> dict[str, Any]:
    """Return losses with few digits; None of a run that failed or diverged stays None."""
    rounded: dict[str, float | None] = {}
    for key, loss in losses.items():
        is_number = loss is not None and math.isfinite(loss)
        rounded[key] = round(loss, _DIGITS) if loss is not None and is_number else None
    return rounded


def _check_flags(file: Path, flags: Any, taken: Sequence[str]) -> None:
    """Raise InputError unless all are flags of a run that change what it computes, and none is said elsewhere.

    Their values must be of the flag's kind: a value that is no word of its own could be taken for another flag.
    """
    if not isinstance(flags, dict):
        raise InputError(f"{file}: flags are {flags!r}, and no object")
    for name, value in flags.items():
        if name not in FLAGS or FLAGS[name].free:
            raise InputError(f"{file}: {name!r} is no flag that changes what a run computes")
        if name in taken:
            raise InputError(f"{file}: {name!r} is not said there")
        parts = value if isinstance(value, list) and value else [value]
        if not all(_is_word(part, is_switch=FLAGS[name].kind is bool) for part in parts):
            raise InputError(f"{file}: {name!r} cannot be {value!r}")


def _is_word(value: Any, *, is_switch: bool) -> bool:
    """Return whether a value can stand behind its flag as one word, and for nothing else."""
    if isinstance(value, bool) or is_switch:
        return isinstance(value, bool) and is_switch
    if isinstance(value, str):
        return bool(value) and not value.startswith("-") and value.isprintable()
    return _is_number(value)


def _is_number(value: Any) -> bool:
    """Return whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_method(optim: str) -> bool:
    """Return whether ``optim`` is the name of a shipped method, or FILE.py:NAME without a folder."""
    if is_own(optim):
        return re.fullmatch(r"\w[\w.-]*\.py:\w+", optim) is not None
    return optim in METHODS


def _checked_runs(file: Path, runs: Any, track: Track) -> list[Run]:
    """Return an entry's runs; InputError unless each has what `Run` has, and all have different seeds of the track."""
    if not isinstance(runs, list) or not runs:
        raise InputError(f"{file}: no runs")
    checked = []
    for values in runs:
        try:
            run = Run(**values)
            numbers = [run.loss, run.tokens, run.seconds, run.weights_bytes, run.optimizer_bytes, *run.first_losses]
            is_sound = all(map(_is_number, numbers)) and run.seed in track.seeds
        except TypeError as error:
            raise InputError(f"{file}: a run is not as `leaderboard add` writes it ({error})") from error
        wanted = min(UPDATES, track.flags.get("steps") or UPDATES)
        if not is_sound or len(run.first_losses) != wanted:
            raise InputError(
                f"{file}: the run of seed {run.seed} needs finite numbers, the losses of its first {wanted} updates "
                "and a seed of the track"
            )
        checked.append(run)
    if len({run.seed for run in checked}) < len(checked):
        raise InputError(f"{file}: two runs are of one seed")
    return checked


def _check_tuning(file: Path, tuning: Any) -> None:
    """Raise InputError unless a tuning is absent, or has a seed and losses by factor, one of them at least finite."""
    if tuning is None:
        return
    try:
        losses = [loss for loss in tuning["losses"].values() if loss is not None]
        factors = [float(factor) for factor in tuning["losses"]]
        is_sound = all(map(_is_number, [tuning["seed"], *losses, *factors])) and len(losses) > 0
    except (TypeError, KeyError, AttributeError, ValueError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{file}: its tuning is not as `leaderboard add` writes it")


def _read_object(file: Path, otherwise: str) -> dict[str, Any]:
    """Return a JSON object; InputError where there is none."""
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file.parent}: {otherwise}") from error
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object")
    return values


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
