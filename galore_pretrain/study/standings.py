"""``galore-pretrain leaderboard table``: the entries of a leaderboard as a page of Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_pretrain.errors import InputError
from galore_pretrain.study.leaderboard import Entry, Track
from galore_pretrain.study.seeds import paired, ranks
from galore_pretrain.study.tables import Table

_HOW_TO_READ = """Entries come in the order of their mean validation loss.

* **Rank**: 1 + the number of entries that are told apart as better. Those that the seeds cannot tell apart share one.
* **Against** a baseline: 100 times the natural logarithm of the entry's perplexity over the baseline's. A small one is
  the percentage by which it is larger; +20 are 22 %, +90 are 146 %. It is a mean over the seeds ± half the width of its
  95 % interval (Student's t). A * stands where that leaves out 0, which of twenty pairs that are alike happens to one.
* **State**: the optimizer's, in 10⁶ bytes."""


def page(folder: Path) -> str:
    """Return the page of a leaderboard; InputError where a folder has no track, or a track's files are damaged."""
    tracks = sorted(file.parent for file in folder.glob("*/track.json"))
    if not tracks:
        raise InputError(f"{folder}: no leaderboard; name a folder with folders of tracks, each with a track.json")
    parts = [
        "# Leaderboard",
        f"Made by `galore-pretrain leaderboard table {folder.name}` from the entries in [{folder.name}/]"
        f"(../{folder.name}). [How to add one](adding-a-method.md#to-the-leaderboard).",
        _HOW_TO_READ,
    ]
    for track in map(Track.read, tracks):
        parts += _section(track)
    return "\n\n".join(parts) + "\n"


def _section(track: Track) -> list[str]:
    """Return the paragraphs of a track."""
    entries = sorted(track.entries(), key=_mean_loss)
    complete = [entry for entry in entries if entry.is_complete]
    others = [entry for entry in entries if not entry.is_complete]
    parts = [f"## {track.title}", track.about]
    if not entries:
        return [*parts, "No entries yet."]
    if complete:
        parts.append(_table(track, complete, entries, ranked=True).markdown())
    if others:
        parts += [
            f"**Of fewer seeds than the track's {len(track.seeds)}**, at the rate of the recipe unless the last table "
            "says how it was tuned. They have no rank: one seed tells nothing of the spread.",
            _table(track, others, entries, ranked=False).markdown(),
        ]
    tunings = {entry: entry.tuning for entry in entries if entry.tuning is not None}
    if tunings:
        parts += ["### How they were tuned", _on_tuning(tunings.values()), _tuning(tunings).markdown()]
    parts.append("### Commands")
    lines = [f"    {entry.command()}" for entry in entries]
    parts += ["Of the first seed of each; the others differ in `--seed`.", "\n".join(lines)]
    return parts


def _table(track: Track, entries: Sequence[Entry], of_track: Sequence[Entry], *, ranked: bool) -> Table:
    """Return the table of some entries ``of_track``, with their ranks if they are all of the same seeds."""
    by_name = {entry.name: entry for entry in of_track}
    rank_of = ranks({entry.name: entry.losses for entry in entries}) if ranked else {}
    baselines = [by_name[name] for name in track.baselines if name in by_name]
    control = by_name.get(track.control or "")
    columns = ["rank"] if ranked else []
    columns += ["entry", "perplexity"]
    columns += [f"against {baseline.name}" for baseline in baselines]
    if control is not None:
        columns.append(f"of {control.name}'s")
    if track.validation_bytes is not None:
        columns.append("bits per byte")
    columns.append("state")
    if not ranked:
        columns.append("seeds")
    rows = []
    for entry in entries:
        cells = {
            "rank": str(rank_of.get(entry.name, "")),
            "entry": f"[{entry.name}](../{track.folder.parent.name}/{track.folder.name}/{entry.name}/entry.json)",
            "perplexity": f"{math.exp(_mean_loss(entry)):.2f}",
            "bits per byte": _bits_per_byte(track, entry),
            "state": f"{max(run.optimizer_bytes for run in entry.runs) / 1e6:.2f}",
            "seeds": str(len(entry.runs)),
        }
        for baseline in baselines:
            cells[f"against {baseline.name}"] = _against(entry, baseline)
        if control is not None:
            share = math.exp(_mean_loss(entry) - _mean_loss(control))
            cells[f"of {control.name}'s"] = f"{share:.2f}"
        rows.append([cells[name] for name in columns])
    return Table(columns, rows)


def _mean_loss(entry: Entry) -> float:
    """Return the mean over the seeds of the last validation loss."""
    return statistics.mean(entry.losses.values())


def _against(entry: Entry, baseline: Entry) -> str:
    """Return the paired difference from a baseline; a dash for the baseline itself."""
    if entry.name == baseline.name:
        return "–"
    difference = paired(entry.losses, baseline.losses)
    return "no seed in common" if difference is None else str(difference)


def _bits_per_byte(track: Track, entry: Entry) -> str:
    """Return the mean number of bits for a byte of the validation text."""
    if track.validation_bytes is None:
        return ""
    nats = _mean_loss(entry) * entry.runs[0].tokens
    return f"{nats / math.log(2) / track.validation_bytes:.4f}"


def _on_tuning(tunings: Iterable[Mapping[str, Any]]) -> str:
    """Return a sentence on what was tuned."""
    seeds = sorted({int(tuning["seed"]) for tuning in tunings})
    words = ", ".join(map(str, seeds))
    return (
        f"The factor on the matrices' learning rate (`--matrix-lr-scale`), on seed {words}, at the track's length. "
        "Validation perplexity by factor:"
    )


def _tuning(tunings: Mapping[Entry, Mapping[str, Any]]) -> Table:
    """Return the table of perplexities by factor, the best of each entry in bold."""
    losses_of: dict[Entry, dict[float, float | None]] = {}
    for entry, tuning in tunings.items():
        losses_of[entry] = {float(factor): loss for factor, loss in tuning["losses"].items()}
    factors = sorted({factor for losses in losses_of.values() for factor in losses})
    rows = []
    for entry, losses in losses_of.items():
        best = min(loss for loss in losses.values() if loss is not None)
        row = [entry.name, f"{entry.flags['lr']:g}"]
        for factor in factors:
            row.append(_cell(losses[factor], best) if factor in losses else "")
        rows.append(row)
    headings = [f"× {factor:g}" for factor in factors]
    return Table(["entry", "--lr", *headings], rows)


def _cell(loss: float | None, best: float) -> str:
    """Return a perplexity, in bold where it is the best."""
    if loss is None:
        return "diverged"
    perplexity = f"{math.exp(loss):.1f}"
    return f"**{perplexity}**" if loss == best else perplexity
